"""How each implementation runs a checked call: NumPy's models on the host, kernels where the arrays lie, or their PTX here.

``run`` gives the output in the caller's kind of array, written to ``call.out`` where there is one.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np

from nbfmha import gpu_arrays, nvfp4, quantized_operands, reference
from nbfmha.call import Call, Place
from nbfmha.emulated import EmulatedArray, Machine
from nbfmha.quantized_tensor import QuantizedTensor
from nbfmha.recipe_model import recipe_attention
from nbfmha.tiles import View
from nbfmha.validation import dtype_name
from nbfmha.views import view_of
from ptx_inline.toolchain.arrays import is_torch

EMULATED_ARCH = "sm_120a"
"""What arrays in host memory are emulated on."""


def run(call: Call, implementation: str, kernels: str, *, with_lse: bool) -> tuple[Any, Any]:
    """(out, lse) of a call that ``implementation`` can run; lse is None unless ``with_lse``.

    kernels: "blockscale", "legacy" or "dequant", what "emulated" runs; others are what they are. Raises ``ValueError``,
    before anything is launched, for arrays in GPU memory that kernels cannot read as they lie.
    """
    if implementation == "reference":
        return _on_host(call, _reference(call), with_lse)
    if implementation != "emulated":
        return _run_kernels(call, implementation, with_lse)
    if call.place.kind == "emulated":
        return _run_kernels(call, kernels, with_lse)
    machine = Machine(EMULATED_ARCH)
    moved = {name: _to_machine(machine, getattr(call, name)) for name in ("q", "k", "v", "sinks")}
    place = Place("emulated", "emulated", machine)
    return _from_machine(call, *_run_kernels(replace(call, **moved, out=None, place=place), kernels, with_lse))


def _run_kernels(call: Call, implementation: str, with_lse: bool) -> tuple[Any, Any]:
    """Pre-pass and forward kernel, queued on the current stream of the library that q is of."""
    from nbfmha.kernels.prefill import prefill
    from nbfmha.kernels.prepass import prepare

    problem, shape, recipe = call.problem, tuple(call.q.shape), call.recipe
    # all that may be refused is, before anything is launched
    given = [_readable(name, getattr(call, name), call) for name in ("q", "k", "v")]
    out = gpu_arrays.empty(call.like, shape, problem.dtype) if call.out is None else call.out
    out_view = view_of("out", out, call.layout, problem.dtype, 4)
    lse = gpu_arrays.empty(call.like, call.lse_shape, "float32") if with_lse else None
    if 0 not in shape:
        sinks = _float32_sinks(call)
        if recipe is not None:
            operands = prepare(*given, problem, recipe, sinks, implementation=implementation)
        else:
            recipe = quantized_operands.RECIPES[implementation]
            operands = quantized_operands.prepare(given, call, implementation, sinks)
        prefill(operands, problem, recipe, implementation=implementation, out=out_view, lse=lse)
    return out, lse


def _readable(name: str, x: Any, call: Call) -> View | QuantizedTensor:
    """An operand as kernels read it; ``ValueError`` where they cannot, as it lies."""
    if isinstance(x, QuantizedTensor):
        return quantized_operands.check_memory(name, x)
    return view_of(name, x, call.layout, call.problem.dtype, 16)


def _float32_sinks(call: Call) -> Any:
    """The sinks in float32 where q lies."""
    sinks = call.sinks
    if sinks is None:
        return None
    if is_torch(sinks):
        return sinks.detach().to(sys.modules["torch"].float32).contiguous()
    if call.place.library == "cupy" and not isinstance(sinks, np.ndarray):
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(call.place.device):
            return cupy.ascontiguousarray(sinks, dtype="float32")
    if hasattr(sinks, "copy_to_host"):  # Numba's, and an emulated machine's, convert nothing where they are
        sinks = _values(sinks) if isinstance(sinks, EmulatedArray) else sinks.copy_to_host()
    return gpu_arrays.from_host(call.like, sinks.astype(np.float32))


def _reference(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) in float64 and NumPy, out (..., num_heads_q, seqlen_q, head_dim)."""
    q, k, v = (_values(array) for array in (call.q, call.k, call.v))
    if call.layout == "bshd":
        q, k, v = (array.swapaxes(-2, -3) for array in (q, k, v))
    if not q.size:
        return np.empty(q.shape), np.empty(call.lse_shape)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf in the input propagate as IEEE says
        if call.recipe is None:
            return reference.attention(q, k, v, call.problem, sinks=call.sinks, return_lse=True)
        return recipe_attention(q, k, v, call.problem, call.recipe, sinks=call.sinks)


def _on_host(call: Call, result: tuple[np.ndarray, np.ndarray], with_lse: bool) -> tuple[Any, Any]:
    """(out, lse) in the caller's layout, library and dtype, rounded once from float64."""
    out, lse = result
    if call.layout == "bshd":
        out = out.swapaxes(-2, -3)
    bfloat16 = call.problem.dtype == "bfloat16"
    with np.errstate(over="ignore"):
        out = _to_odd(out) if bfloat16 else out.astype(call.problem.dtype, order="C")
        lse = lse.astype(np.float32) if with_lse else None
    if call.place.library == "torch":
        torch = sys.modules["torch"]
        out = torch.from_numpy(out).to(getattr(torch, call.problem.dtype))
        lse = torch.from_numpy(lse) if with_lse else None
    elif bfloat16:
        out = out.astype(_numpy_dtype(call))
    return _deliver(call, out), lse


def _deliver(call: Call, out: Any) -> Any:
    """``out``, in the caller's own array where one was given."""
    if call.out is None:
        return out
    if is_torch(out):
        call.out.copy_(out)
    else:
        call.out[...] = out
    return call.out


def _values(x: Any) -> np.ndarray:
    """A host array, a ``QuantizedTensor`` of host arrays or an emulated array, in NumPy, bfloat16 widened if need be."""
    if isinstance(x, QuantizedTensor):
        return nvfp4.dequantize(x.with_arrays(_values))
    if isinstance(x, EmulatedArray):
        content = x.copy_to_host()
        return (content.astype(np.uint32) << 16).view(np.float32) if x.dtype == "bfloat16" else content
    if not is_torch(x):
        return x
    x = x.detach()
    return (x.float() if dtype_name(x) == "bfloat16" else x).numpy()


def _to_odd(x: np.ndarray) -> np.ndarray:
    """float64 to float32, what is inexact to the neighbour with an odd last bit: rounding that to 16 bits rounds once."""
    rounded = x.astype(np.float32, order="C")
    with np.errstate(invalid="ignore"):
        inexact, too_far = rounded != x, np.abs(rounded) > np.abs(x)
    bits = rounded.view(np.uint32)
    bits -= too_far
    bits |= inexact
    return rounded


def _numpy_dtype(call: Call) -> np.dtype:
    """The dtype of the first array of the call; in NumPy's own byte order."""
    return next(x for x in (call.q, call.k, call.v) if not isinstance(x, QuantizedTensor)).dtype.newbyteorder("=")


def _to_machine(machine: Machine, x: Any) -> EmulatedArray | QuantizedTensor | None:
    """A copy of a host array, or of those of a ``QuantizedTensor``, in a machine's memory."""
    if x is None:
        return None
    if isinstance(x, QuantizedTensor):
        return x.with_arrays(lambda array: _to_machine(machine, array))
    dtype = dtype_name(x)
    if is_torch(x):
        torch = sys.modules["torch"]
        x = x.detach().contiguous()
        x = (x.view(torch.int16) if dtype == "bfloat16" else x).numpy()
    if dtype == "bfloat16":
        return machine.array(np.ascontiguousarray(x).view(np.uint16), dtype)
    return machine.array(x.astype(x.dtype.newbyteorder("="), copy=False))


def _from_machine(call: Call, out: EmulatedArray, lse: EmulatedArray | None) -> tuple[Any, Any]:
    """A copy of the results in the caller's kind of host array."""
    bits, lse = out.copy_to_host(), None if lse is None else lse.copy_to_host()
    if call.place.library == "torch":
        torch = sys.modules["torch"]
        if out.dtype == "bfloat16":
            result = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
        else:
            result = torch.from_numpy(bits)
        return _deliver(call, result), None if lse is None else torch.from_numpy(lse)
    return _deliver(call, bits.view(_numpy_dtype(call)) if out.dtype == "bfloat16" else bits), lse
