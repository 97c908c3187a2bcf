"""Kernels by the names that ``nbfmha sass`` and ``nbfmha ptx`` take."""

from __future__ import annotations

from collections.abc import Callable

from nbfmha.validation import message
from ptx_inline.toolchain import Kernel, Target


def _mma(target: Target) -> str:
    return "blockscale" if target.has_block_scale_mma else "dequant"


def _quantize(target: Target) -> Kernel:
    from nbfmha.kernels.quantize import flat_kernel

    return flat_kernel("float16", "nvfp4", "amax", False)


def _quantize_tokens(target: Target) -> Kernel:
    from nbfmha.kernels.quantize import tokens_kernel

    return tokens_kernel("float16", "nvfp4", "amax", "linear", False)


def _quantize_four_over_six(target: Target) -> Kernel:
    from nbfmha.kernels.quantize import flat_kernel

    return flat_kernel("float16", "nvfp4", "four_over_six", False)


def _dequantize(target: Target) -> Kernel:
    from nbfmha.kernels.dequantize import flat_kernel

    return flat_kernel("float16", "nvfp4", False)


def _probe(target: Target) -> Kernel:
    from nbfmha.kernels.probe import probe_kernel

    return probe_kernel(_mma(target))


def _qk(target: Target) -> Kernel:
    from nbfmha.kernels.qk import qk_kernel

    return qk_kernel(_mma(target), 128)


def _prefill(target: Target) -> Kernel:
    """NVFP4 tiles alone, P in NVFP4 where an MMA takes it."""
    from nbfmha.kernels.prefill import prefill_kernel

    pv = "nvfp4" if target.has_block_scale_mma else "f16"
    return prefill_kernel(_mma(target), 128, pv=pv, has_delta=True)


def _prefill_64(target: Target) -> Kernel:
    """The same at head_dim 64."""
    from nbfmha.kernels.prefill import prefill_kernel

    pv = "nvfp4" if target.has_block_scale_mma else "f16"
    return prefill_kernel(_mma(target), 64, pv=pv, has_delta=True)


def _prefill_legacy(target: Target) -> Kernel:
    """FP4 tiles with one scale a row, by the plain FP4 MMA, at head_dim 64."""
    from nbfmha.kernels.prefill import prefill_kernel

    if not target.has_block_scale_mma:
        raise ValueError(message("arch", "sm_120a or sm_121a for 'prefill_legacy', whose f8f6f4 MMA no other has", target))
    return prefill_kernel("legacy", 64, pv="e4m3")


def _append(target: Target) -> Kernel:
    from nbfmha.kernels.append import append_kernel

    return append_kernel("float16", 128, "four_over_six")


def _decode(target: Target) -> Kernel:
    """Up to 8 rows, pages of whole tiles."""
    from nbfmha.kernels.decode import decode_kernel

    return decode_kernel(_mma(target), 128)


#: Name -> function of the target that returns the kernel as it would run there: with the block-scale MMA where the
#: target has it, else with exact dequantisation.
CATALOGUE: dict[str, Callable[[Target], Kernel]] = {
    "quantize": _quantize,
    "quantize_tokens": _quantize_tokens,
    "quantize_four_over_six": _quantize_four_over_six,
    "dequantize": _dequantize,
    "probe": _probe,
    "qk": _qk,
    "prefill": _prefill,
    "prefill_64": _prefill_64,
    "prefill_legacy": _prefill_legacy,
    "append": _append,
    "decode": _decode,
}


def kernel(name: str, target: str | Target) -> Kernel:
    """The kernel of this name for a target. Raises ``ValueError`` for an unknown name or target, or one without its MMA."""
    target = Target.parse(target)
    if name not in CATALOGUE:
        raise ValueError(f"kernel must be one of {', '.join(CATALOGUE)}, got {name!r}")
    return CATALOGUE[name](target)
