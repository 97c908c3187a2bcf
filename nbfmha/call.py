"""One attention call, checked as a whole before anything runs: arrays of one place, a problem, a recipe, an output.

Nothing here computes or launches: :mod:`nbfmha.dispatch` decides who runs a call, :mod:`nbfmha.runners` runs it.
"""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from nbfmha.emulated import EmulatedArray, Machine
from nbfmha.problem import DTYPES, Problem
from nbfmha.quantized_tensor import QuantizedTensor
from nbfmha.recipe import PRESETS, Recipe, resolve_recipe
from nbfmha.validation import check_choice, check_float_dtype, dtype_name, message
from nbfmha.views import LAYOUTS, overlap, repeats_itself
from ptx_inline.toolchain import Target
from ptx_inline.toolchain.arrays import address_and_device, current_stream, is_torch
from ptx_inline.toolchain.launcher import device_target

DEFAULT_RECIPE = "accurate"
_AXES = {"bhsd": "(..., num_heads, tokens, head_dim)", "bshd": "(..., tokens, num_heads, head_dim)"}
_LIBRARIES = "of NumPy, torch, CuPy or Numba, or on an emulated machine"


class Place(NamedTuple):
    """Where an array lies.

    kind      "host" (NumPy, torch on the CPU), "gpu" or "emulated"
    library   "numpy", "torch", "cupy", "numba" or "emulated"
    device    ordinal of the GPU, or the emulated machine; None on the host
    """

    kind: str
    library: str
    device: int | Machine | None

    @property
    def target(self) -> Target | None:
        """What kernels are compiled for there; None on the host. Raises ``ValueError`` for a GPU older than sm_80."""
        if self.kind == "gpu":
            return device_target(self.device)
        return Target.parse(self.device.arch) if self.kind == "emulated" else None

    def __str__(self) -> str:
        where = {"host": "in host memory", "gpu": f"on GPU {self.device}"}.get(self.kind)
        return f"{self.library}, {where}" if where else f"an emulated {self.device.arch}"


_NUMPY_HOST, _TORCH_HOST = Place("host", "numpy", None), Place("host", "torch", None)


@dataclass(frozen=True, slots=True)
class Call:
    """What the caller passed, known to fit together.

    q, k, v   arrays or ``QuantizedTensor``s, in ``layout``
    problem   its dtype is that of the arrays; "float32" where all three are quantised
    recipe    None where something is quantised already: nothing is left to quantise
    sinks     (num_heads_q,) or None: where q lies, in any float dtype; or a float32 NumPy array
    out       an array to write to, or None
    """

    q: Any
    k: Any
    v: Any
    problem: Problem
    recipe: Recipe | None
    layout: str
    sinks: Any
    out: Any
    place: Place

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """(..., num_heads_q, seqlen_q)."""
        return (*self.q.shape[:-3], self.problem.num_heads_q, self.problem.seqlen_q)

    @property
    def like(self) -> Any:
        """An array of the call's library and place: q, or its codes."""
        return self.q.codes if isinstance(self.q, QuantizedTensor) else self.q


def make_call(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    q_offset: int | None = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    sinks: Any = None,
    recipe: str | Recipe | None = DEFAULT_RECIPE,
    layout: str = "bhsd",
    out: Any = None,
) -> Call:
    """The call of these arguments, which are those of :func:`nbfmha.attention`, as are the errors."""
    check_choice("layout", layout, LAYOUTS)
    place = _check_places(q, k, v)
    if place.library == "torch":
        check_gradients({"q": q, "k": k, "v": v, "sinks": sinks, "out": out})
    dtype = _check_dtypes(q, k, v)
    resolved = _check_recipe(recipe, q, k, v)
    q_shape, k_shape, v_shape = tuple(q.shape), tuple(k.shape), tuple(v.shape)
    _check_shapes(q_shape, k_shape, v_shape, layout)
    problem = _problem(
        q_shape,
        k_shape,
        dtype,
        layout,
        causal=causal,
        softmax_scale=softmax_scale,
        window=tuple(window) if isinstance(window, list) else window,
        softcap=softcap,
        q_offset=q_offset,
        cu_seqlens_q=_edges(cu_seqlens_q),
        cu_seqlens_k=_edges(cu_seqlens_k),
        has_sinks=sinks is not None,
    )
    if sinks is not None:
        sinks = _check_sinks(sinks, problem.num_heads_q, place)
    if out is not None:
        _check_out(out, q, k, v, dtype, place)
    return Call(q, k, v, problem, resolved, layout, sinks, out, place)


def place_of(name: str, array: Any) -> Place:
    """Where an array or the codes of a ``QuantizedTensor`` lie. Raises ``TypeError`` for anything else."""
    if is_torch(array):
        if array.is_cuda:
            return Place("gpu", "torch", array.get_device())
        if not array.is_cpu:
            got = f"a torch tensor on {array.device.type!r}"
            raise TypeError(message(name, "on the CPU or a CUDA GPU", got, "move it with .to()"))
        return _TORCH_HOST
    if isinstance(array, np.ndarray):
        return _NUMPY_HOST
    if isinstance(array, EmulatedArray):
        return Place("emulated", "emulated", array.machine)
    if isinstance(array, QuantizedTensor):
        return place_of(f"{name}.codes", array.codes)
    library = type(array).__module__.partition(".")[0]
    if library in ("cupy", "numba") and hasattr(array, "__cuda_array_interface__"):
        return Place("gpu", library, address_and_device(array, current_stream(array))[1])
    got = f"{type(array).__module__}.{type(array).__qualname__}"
    way_out = "torch.from_dlpack takes arrays of other libraries" if hasattr(array, "__dlpack__") else None
    raise TypeError(message(name, f"an array {_LIBRARIES}, or a QuantizedTensor", got, way_out))


def _check_places(q: Any, k: Any, v: Any) -> Place:
    place = place_of("q", q)
    for name, array in (("q", q), ("k", k), ("v", v)):
        for part_name, part in _parts(name, array):
            check_place(part_name, place_of(part_name, part), place)
    return place


def _parts(name: str, array: Any) -> list[tuple[str, Any]]:
    """The arrays that an operand is made of, by name."""
    if not isinstance(array, QuantizedTensor):
        return [(name, array)]
    parts = [(f"{name}.codes", array.codes), (f"{name}.scales", array.scales)]
    return parts if array.global_scale is None else [*parts, (f"{name}.global_scale", array.global_scale)]


def check_place(name: str, got: Place, place: Place) -> None:
    """Raise ``TypeError`` for another library than that of ``place``, where q lies, ``ValueError`` for another place."""
    if got is place or got == place:
        return
    if got.library != place.library:
        raise TypeError(message(name, f"an array of {place.library}, as q is", f"one of {got.library}"))
    if got.kind == place.kind == "emulated":
        raise ValueError(message(name, "on the machine of q", "another machine"))
    raise ValueError(message(name, f"where q is ({place})", got))


def _check_dtypes(q: Any, k: Any, v: Any) -> str:
    """The dtype of the call: that of its arrays, "float32" without one."""
    first = dtype = None
    for name, array in (("q", q), ("k", k), ("v", v)):
        if isinstance(array, QuantizedTensor):
            continue
        if dtype is None:
            first, dtype = name, _check_dtype(name, array)
            found = array.dtype
        elif array.dtype != found and dtype_name(array) != dtype:
            raise TypeError(message(f"{name}.dtype", f"that of {first} ({dtype})", dtype_name(array), "convert it first"))
    return dtype or "float32"


def _check_dtype(name: str, array: Any) -> str:
    if dtype_name(array) == "uint16":
        way_out = "view bfloat16 bits as such: .view(ml_dtypes.bfloat16)"
        raise TypeError(message(f"{name}.dtype", "float16, bfloat16 or float32", "uint16", way_out))
    return check_float_dtype(name, array)


def _check_recipe(recipe: str | Recipe | None, q: Any, k: Any, v: Any) -> Recipe | None:
    if not (isinstance(q, QuantizedTensor) or isinstance(k, QuantizedTensor) or isinstance(v, QuantizedTensor)):
        return resolve_recipe(recipe)
    if recipe is not None and resolve_recipe(recipe) != PRESETS[DEFAULT_RECIPE]:
        way_out = "what they stand for is taken exactly; nbfmha.dequantize makes arrays that a recipe can quantise"
        raise ValueError(message("recipe", "left at its default with QuantizedTensors", repr(recipe), way_out))
    return None


def _check_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], layout: str) -> None:
    for name, shape in (("q", q), ("k", k), ("v", v)):
        if len(shape) < 3:
            raise ValueError(message(name, f"an array {_AXES[layout]} of rank >= 3", f"shape {shape}"))
    if k[:-3] != q[:-3] or k[-1] != q[-1]:
        lead = "".join(f"{length}, " for length in q[:-3])
        rest = "num_heads_kv, seqlen_k" if layout == "bhsd" else "seqlen_k, num_heads_kv"
        raise ValueError(message("k", f"of shape ({lead}{rest}, {q[-1]}) for q of shape {q}", k))
    if v != k:
        raise ValueError(message("v", f"of shape {k}, as k is", v))


def _edges(value: Any) -> Any:
    """Boundaries as a tuple, if ``value`` is anything like a list of them; ``Problem`` checks what comes out."""
    if hasattr(value, "copy_to_host"):
        value = value.copy_to_host()
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(value) if isinstance(value, list) else value


def _problem(q: tuple[int, ...], k: tuple[int, ...], dtype: str, layout: str, **options: Any) -> Problem:
    """The problem of a call; the same one for the same call, since checking one takes longer than finding it again."""
    try:
        hash(tuple(options.values()))
    except TypeError:
        return _make_problem.__wrapped__(q, k, dtype, layout, **options)  # which says what is wrong with it
    return _make_problem(q, k, dtype, layout, **options)


@functools.lru_cache(maxsize=256, typed=True)
def _make_problem(q: tuple[int, ...], k: tuple[int, ...], dtype: str, layout: str, **options: Any) -> Problem:
    heads, tokens = LAYOUTS[layout]
    return Problem(math.prod(q[:-3]), q[heads], k[heads], q[tokens], k[tokens], q[-1], dtype, **options)


def _check_sinks(sinks: Any, num_heads_q: int, place: Place) -> Any:
    """Sinks of another float dtype or library: float32 in NumPy where they are on the host, else as they are."""
    if not hasattr(sinks, "shape"):
        raise TypeError(message("sinks", f"an array of {place.library} or NumPy", type(sinks).__name__, "np.array(sinks)"))
    got = place_of("sinks", sinks)
    if got.library != "numpy":
        check_place("sinks", got, place)
    if dtype_name(sinks) not in DTYPES:
        raise TypeError(message("sinks.dtype", f"one of {', '.join(DTYPES)}", dtype_name(sinks), "convert it first"))
    if tuple(sinks.shape) != (num_heads_q,):
        raise ValueError(message("sinks", f"of shape (num_heads_q,) = ({num_heads_q},)", tuple(sinks.shape)))
    if got.kind != "host":
        return sinks
    with np.errstate(over="ignore"):
        values = (sinks.detach().float().numpy() if is_torch(sinks) else sinks).astype(np.float32)
    if not (values < np.inf).all():
        raise ValueError(message("sinks", "finite or -inf", values.max()))
    return values


def _check_out(out: Any, q: Any, k: Any, v: Any, dtype: str, place: Place) -> None:
    if isinstance(out, QuantizedTensor):
        raise TypeError(message("out", f"an array of {place.library}", "QuantizedTensor"))
    check_place("out", place_of("out", out), place)
    if dtype_name(out) != dtype:
        raise TypeError(message("out.dtype", dtype, dtype_name(out)))
    if tuple(out.shape) != tuple(q.shape):
        raise ValueError(message("out", f"of shape {tuple(q.shape)}, as q is", tuple(out.shape)))
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError(message("out", "writeable", "a read-only array", "pass a copy"))
    if repeats_itself(out):
        raise ValueError(message("out", "without an element that stands at two indices", "an expanded array"))
    for name, array in (("q", q), ("k", k), ("v", v)):
        if any(overlap(out, part) for _, part in _parts(name, array)):
            raise ValueError(message("out", "in memory of its own", f"memory that it shares with {name}"))


def check_gradients(tensors: dict[str, Any]) -> None:
    """Refuse what would lose a gradient without a word: there is no backward pass."""
    if not sys.modules["torch"].is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if getattr(tensor, "requires_grad", False):
            way_out = f"attention is forward only: call it under torch.no_grad(), or pass {name}.detach()"
            raise ValueError(message(name, "without requires_grad", "a tensor that records gradients", way_out))
