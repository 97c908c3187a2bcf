"""``QuantizedTensor``s in the place of q, k or v, for kernels: who can take them, and what the forward kernel is given.

Both ways multiply what the tensors stand for exactly, with P in the 16-bit format of the V that the second MMA reads:

==============  ==================================================================================================
``blockscale``  codes and scales go to the block-scale MMA as they are, moved to its tiles (:mod:`kernels.repack`).
                All three in NVFP4, q and k blocked along head_dim, v along tokens
``dequant``     each is dequantised to the 16-bit format of the call, which is that of the arrays beside it (float16
                beside float32 and where there are none), then everything is in 16 bits. float16 and bfloat16 hold every
                NVFP4 value without a global scale, bfloat16 every MXFP4 value that float32 holds
==============  ==================================================================================================

A global scale lies in GPU memory, and 16 bits do not hold its products: it is refused. ``legacy``, which has one scale a
row, takes none of these tensors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from nbfmha import gpu_quantization
from nbfmha.call import Call
from nbfmha.problem import Problem
from nbfmha.quantized_tensor import QuantizedTensor
from nbfmha.recipe import Recipe
from nbfmha.tiles import View
from nbfmha.views import view_of

RECIPES = {"blockscale": Recipe(v_axis="tokens"), "dequant": Recipe(qk="f16", v_format="f16")}
"""What the forward kernel of each implementation that takes them runs."""


class Storage(NamedTuple):
    """How one operand is stored. axis: along which 16 or 32 elements share a scale: "head_dim", "tokens" or "heads"."""

    format: str
    axis: str
    has_global_scale: bool


Stored = tuple[Storage | None, Storage | None, Storage | None]
"""Of q, k and v; None for an array."""


def stored(call: Call) -> Stored | None:
    """How the operands of a call are stored; None where all are arrays."""
    if call.recipe is not None:
        return None
    return tuple(_storage(x, call.layout) if isinstance(x, QuantizedTensor) else None for x in (call.q, call.k, call.v))


def _storage(x: QuantizedTensor, layout: str) -> Storage:
    # a QuantizedTensor calls its last axis but one tokens
    axis = "heads" if layout == "bshd" and x.axis == "tokens" else x.axis
    return Storage(x.format, axis, x.global_scale is not None)


def why_not(problem: Problem, operands: Stored, implementation: str) -> str | None:
    """Why ``implementation`` cannot take the operands as they are stored, in words; None where it can."""
    if implementation == "legacy":
        return "f8f6f4 has one scale a row, QuantizedTensors one for 16 or 32 elements; nbfmha.dequantize makes arrays"
    named = dict(zip("qkv", operands, strict=True))
    scaled = [name for name, x in named.items() if x and x.has_global_scale]
    if scaled:
        return (
            f"{' and '.join(scaled)} came with a global_scale, whose products 16 bits do not hold; pass them without it, "
            "multiply softmax_scale by those of q and k, and the output by that of v"
        )
    if implementation == "blockscale":
        return _why_not_codes(problem, named)
    odd = [name for name, x in named.items() if x and x.format == "mxfp4"]
    if odd and problem.dtype != "bfloat16":
        way_out = "nbfmha.dequantize makes arrays of them, and beside bfloat16 arrays they are taken"
        return f"{' and '.join(odd)} came in mxfp4, whose range float16 has not; {way_out}"
    return None


def _why_not_codes(problem: Problem, named: dict[str, Storage | None]) -> str | None:
    arrays = [name for name, x in named.items() if x is None]
    if arrays:
        return f"the block-scale MMA reads codes of q, k and v alike, but {' and '.join(arrays)} came as an array"
    odd = [name for name, x in named.items() if x.format != "nvfp4"]
    if odd:
        return f"the kernels' block-scale MMA is that of nvfp4, but {' and '.join(odd)} came in {named[odd[0]].format}"
    axes = tuple(x.axis for x in named.values())
    if axes != ("head_dim", "head_dim", "tokens"):
        return (
            "the block-scale MMA takes scales along head_dim of q and k and along tokens of v (layout 'bhsd'), "
            f"but they lie along {', '.join(axes)}"
        )
    from nbfmha.kernels import repack

    return repack.why_not(problem)


def check_memory(name: str, x: QuantizedTensor) -> QuantizedTensor:
    """``x``. Raises ``ValueError`` where kernels cannot read its arrays as they lie."""
    gpu_quantization.check_arrays(x, name)
    return x


def prepare(operands: list[View | QuantizedTensor], call: Call, implementation: str, sinks: Any) -> Any:
    """What the forward kernel reads, its ``Operands``, for ``RECIPES[implementation]``; queued on the current stream.

    operands: of q, k and v: views of arrays of the call's dtype, and checked ``QuantizedTensor``s that ``why_not`` passed.
    sinks: float32, where q lies, or None.
    """
    if implementation == "blockscale":
        from nbfmha.kernels.repack import repack

        return repack(*(_linear(x) for x in operands), call.problem, sinks)
    from nbfmha.kernels import prepass

    problem = call.problem
    if not any(isinstance(x, View) for x in operands):
        problem = replace(problem, dtype="float16")  # nothing to round, and the output's dtype is no matter here
    views = [_dequantized(name, x, call.layout, problem.dtype) for name, x in zip("qkv", operands, strict=True)]
    return prepass.prepare(*views, problem, RECIPES[implementation], sinks, implementation=implementation)


def _linear(x: QuantizedTensor) -> QuantizedTensor:
    return x if x.scale_layout == "linear" else gpu_quantization.relayout(x, "linear")


def _dequantized(name: str, x: View | QuantizedTensor, layout: str, dtype: str) -> View:
    """A view of what ``x`` stands for, in the dtype of the arrays beside it: exact in any of the three."""
    return x if isinstance(x, View) else view_of(name, gpu_quantization.dequantize(x, dtype), layout, dtype, 16)
