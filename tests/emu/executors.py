"""Runs a kernel on a GPU with the arguments of ``emulate``, so that a test has one body for both executors."""

from __future__ import annotations

import numpy as np

from ptx_inline.emu import Output


def on_gpu(torch):
    """Executor: as :func:`elementwise.emulated`, on the CUDA device of ``torch``; arrays are copied there and back."""

    def run(kernel, grid, block, arguments, smem_bytes: int = 0) -> tuple:
        arrays = [x.array() if isinstance(x, Output) else x for x in arguments]
        device = [
            torch.from_numpy(np.ascontiguousarray(x).view(np.uint8).reshape(-1).copy()).cuda()
            if isinstance(x, np.ndarray)
            else x
            for x in arrays
        ]
        kernel.launch(grid, block, device, smem_bytes=smem_bytes)
        torch.cuda.synchronize()
        return tuple(
            found.cpu().numpy().view(x.dtype).reshape(x.shape) if isinstance(x, np.ndarray) else x
            for found, x in zip(device, arrays, strict=True)
        )

    return run
