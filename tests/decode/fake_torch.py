"""As much of torch as the host code of caches asks for, with tensors that have an address and no memory; and kernels that
note what is launched instead."""

from __future__ import annotations

import math
import sys
from itertools import accumulate
from types import SimpleNamespace
from typing import NamedTuple

from ptx_inline.toolchain.kernel import CompiledKernel
from ptx_inline.toolchain.parameters import Placeholder
from ptx_inline.toolchain.targets import Target

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "int32": 4, "int64": 8, "uint8": 1}
FIRST = 1 << 33
"""Address of the first array."""


class Tensor:
    """Elements of ``dtype`` from ``address`` on."""

    taken = FIRST

    def __init__(self, shape, dtype="torch.float16", device=0, address=None, stride=None, requires_grad=False):
        self.shape, self.dtype, self.device, self.requires_grad = tuple(shape), dtype, device, requires_grad
        self._stride = stride or tuple(accumulate(self.shape[:0:-1], int.__mul__, initial=1))[::-1]
        self._address = address
        if address is None:
            self._address = Tensor.taken
            Tensor.taken += (self.numel() * self.element_size() + 511) // 512 * 512 + 512

    is_cuda = property(lambda self: self.device >= 0)
    is_cpu = property(lambda self: self.device < 0)

    def get_device(self):
        return self.device

    def data_ptr(self):
        return self._address

    def stride(self):
        return self._stride

    def numel(self):
        return math.prod(self.shape)

    def element_size(self):
        return ITEM_BYTES[self.dtype.removeprefix("torch.")]

    def is_contiguous(self):
        return self._stride == Tensor(self.shape, self.dtype, address=0).stride()

    def fill_(self, value):
        return self

    def to(self, device, non_blocking=False):
        return Tensor(self.shape, self.dtype, device)


class Torch:
    """The module; ``grad``, ``stream`` and ``capturing`` are as a test sets them."""

    Tensor = Tensor
    float16, bfloat16, float32, int32, uint8 = (f"torch.{x}" for x in ("float16", "bfloat16", "float32", "int32", "uint8"))
    contiguous_format = "contiguous"

    def __init__(self):
        self.grad, self.stream, self.capturing = True, 100, False
        self._C = SimpleNamespace(_cuda_getCurrentRawStream=lambda device: self.stream + device)
        self.cuda = SimpleNamespace(is_current_stream_capturing=lambda: self.capturing)

    def is_grad_enabled(self):
        return self.grad

    def empty(self, *shape, dtype, device):
        return Tensor(shape[0] if isinstance(shape[0], tuple) else shape, dtype, device)

    def empty_like(self, like, memory_format):
        return Tensor(like.shape, like.dtype, like.device)

    def from_numpy(self, values):
        return Tensor(values.shape, f"torch.{values.dtype.name}", -1)


class Launch(NamedTuple):
    """One launch, with the addresses of its arrays."""

    kernel: CompiledKernel
    device: int
    grid: tuple
    block: tuple
    values: list
    smem_bytes: int
    stream: int


class Launches(list):
    """What was launched. ``prepared``: how often a launch was prepared."""

    prepared = 0

    def loaded(self, kernel):
        """A kernel that is ready on every device."""

        def launch(device, grid, block, values, smem_bytes, stream):
            self.append(Launch(kernel, device, grid, block, list(values), smem_bytes, stream))

        def prepare(device, grid, block, values, addresses, smem_bytes):
            self.prepared += 1

            def queue(given, stream):
                assert len(given) == addresses
                full = [given[x.index] if isinstance(x, Placeholder) else x for x in values]
                launch(device, grid, block, full, smem_bytes, stream)

            return queue

        return SimpleNamespace(launch=launch, prepare=prepare)

    def take(self, *factories):
        """What was launched of these kernels, or of all, with numbers instead of addresses, as they first come."""
        numbers, taken = {}, []
        for launch in self:
            if factories and launch.kernel.factory not in factories:
                continue
            values = [numbers.setdefault(x, f"array {len(numbers)}") if x >= FIRST else x for x in launch.values]
            taken.append(launch._replace(kernel=launch.kernel.name, values=values))
        self.clear()
        return taken


def install(monkeypatch, target="sm_90a"):
    """Put both in place; returns ``(torch, launches)``."""
    torch, launches = Torch(), Launches()
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(CompiledKernel, "load", lambda self, device=None: launches.loaded(self))
    monkeypatch.setattr("nbfmha.call.device_target", lambda ordinal: Target.parse(target))
    monkeypatch.setattr("nbfmha.decoding.multiprocessors", lambda ordinal: 132)
    return torch, launches
