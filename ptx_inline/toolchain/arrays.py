"""Addresses, devices and current streams of arrays that other libraries own.

Torch tensors are read directly (about 0.1 us); everything else with DLPack or ``__cuda_array_interface__`` (CuPy,
Numba, JAX) through cuda-core's ``StridedMemoryView``, which also orders the producer's stream before ours.
"""

from __future__ import annotations

import sys


def is_torch(array: object) -> bool:
    """True for a torch tensor; never imports torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def is_gpu_array(array: object) -> bool:
    """True for an array in GPU memory, whichever library owns it."""
    if is_torch(array):
        return array.is_cuda
    if hasattr(array, "__cuda_array_interface__"):
        return True
    return hasattr(array, "__dlpack_device__") and int(array.__dlpack_device__()[0]) in (2, 13)  # kDLCUDA, managed


def address_and_device(array: object, stream: int) -> tuple[int, int]:
    """Address of the first element and device ordinal; ``stream`` (a handle) is where the array will be used.

    Raises ``TypeError`` for something that is no array and ``ValueError`` for one that is not in GPU memory.
    """
    if is_torch(array):
        if not array.is_cuda:
            raise ValueError("kernel argument must be in GPU memory, got a CPU tensor; move it with .cuda()")
        return array.data_ptr(), array.get_device()
    if not is_gpu_array(array):
        raise TypeError(
            "pointer argument must be an address (int), a torch tensor or an array with DLPack or "
            f"__cuda_array_interface__ in GPU memory, got {type(array).__name__}"
        )
    from cuda.core.utils import StridedMemoryView

    view = StridedMemoryView.from_any_interface(array, stream_ptr=stream)
    return view.ptr, view.device_id


def current_stream(array: object) -> int:
    """Handle of the stream on which the array's library would launch now; 0 is the legacy default stream."""
    if is_torch(array):
        torch = sys.modules["torch"]
        return torch._C._cuda_getCurrentRawStream(array.get_device())
    if type(array).__module__.partition(".")[0] == "cupy":
        return sys.modules["cupy"].cuda.get_current_stream().ptr
    return 0
