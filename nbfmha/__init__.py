"""NVFP4 attention on NVIDIA GPUs, checkable on any machine.

Importing the package is cheap and needs no GPU, no driver and no torch: every public name is loaded when it is first
used (PEP 562). ``nbfmha --help`` lists the commands; ``nbfmha validate`` checks the whole stack on this machine.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# public name -> module that defines it
_EXPORTS = {
    "CacheFull": "nbfmha.page_pool",
    "PagedKVCache": "nbfmha.cache",
    "QuantizedTensor": "nbfmha.quantized_tensor",
    "Recipe": "nbfmha.recipe",
    "attention": "nbfmha.forward",
    "decode": "nbfmha.decoding",
    "dequantize": "nbfmha.quantization",
    "explain": "nbfmha.dispatch",
    "fmha_prefill_blockscale": "nbfmha.dispatch",
    "fmha_prefill_legacy": "nbfmha.dispatch",
    "load_sample": "nbfmha.sample",
    "quantize": "nbfmha.quantization",
    "relayout": "nbfmha.quantization",
}

__all__ = [
    "CacheFull",
    "PagedKVCache",
    "QuantizedTensor",
    "Recipe",
    "__version__",
    "attention",
    "decode",
    "dequantize",
    "explain",
    "fmha_prefill_blockscale",
    "fmha_prefill_legacy",
    "load_sample",
    "quantize",
    "relayout",
]

if TYPE_CHECKING:
    from nbfmha.cache import PagedKVCache
    from nbfmha.decoding import decode
    from nbfmha.dispatch import explain, fmha_prefill_blockscale, fmha_prefill_legacy
    from nbfmha.forward import attention
    from nbfmha.page_pool import CacheFull
    from nbfmha.quantization import dequantize, quantize, relayout
    from nbfmha.quantized_tensor import QuantizedTensor
    from nbfmha.recipe import Recipe
    from nbfmha.sample import load_sample


def __getattr__(name: str):
    if name in _EXPORTS:
        value = getattr(import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'nbfmha' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_EXPORTS))
