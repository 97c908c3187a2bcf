"""Pre-pass of forward attention: from q, k, v in 16 or 32 bits to what the forward kernel reads.

    km = mean of k over a sequence, k' = k - km          qm = mean of q over 64 or 128 queries, q' = q - qm
    q', k' -> NVFP4 along head_dim, v -> NVFP4 along tokens: codes and scales, or for ``dequant`` what they stand for;
    with ``scale_per="row"`` all to FP4 with an f32 scale a row, and v's scales first (:mod:`prepass_legacy`)
    delta = qm . k' in float32                            shift = q . km

The specification is ``recipe_model.pre_pass``. float32 inputs are rounded to float16 first, by every kernel that reads
them. At most six launches: ``k_sums``, ``k_mean``, ``q``, ``k`` (:mod:`prepass_rows`), ``v`` (:mod:`prepass_values`) and
``delta`` (:mod:`prepass_delta`). q and v are read once (q's second reading finds it in a cache), k three times at most.
"""

from __future__ import annotations

from typing import Any

from nbfmha import gpu_arrays
from nbfmha.kernels import prepass_delta, prepass_legacy, prepass_rows, prepass_values
from nbfmha.kernels.operands import HEAD_DIMS, Operands
from nbfmha.kernels.prefill import rows_of_cta
from nbfmha.kernels.prepass_load import channels_of_v, code_cols, threads_of, threads_of_v
from nbfmha.kernels.prepass_tables import Tables, tables_of
from nbfmha.problem import Problem
from nbfmha.recipe import TILE_N, Recipe
from nbfmha.tiles import TILE_M, View
from nbfmha.validation import FLOAT_DTYPES, check_choice, dtype_name, message

_MAX_CTAS = 2**31 - 1
_MADE = ("q", "sfq", "k", "sfk", "vt", "sfv", "q_values", "k_values", "v_values", "delta", "shift")


def prepare(
    q: View, k: View, v: View, problem: Problem, recipe: Recipe, sinks: Any = None, *, implementation: str
) -> Operands:
    """The operands of one attention call for ``implementation`` ("blockscale", "legacy" or "dequant"), queued where q lies
    on the current stream there; nothing waits.

    Args:
        q, k, v: arrays that ``problem`` describes, of its dtype, on one GPU or emulated machine; channels contiguous, first
            element 16-byte aligned, strides multiples of 16 bytes. Read only.
        sinks: float32 (num_heads_q,) there, or None, as ``problem.has_sinks`` says; handed on.

    The first call of a set of lengths uploads tables of their tiles; a CUDA graph can be captured from the second on.

    Raises ``ValueError`` for a head_dim, dtype, recipe, alignment or shape that kernels have not, ``TypeError`` for an
    array of another dtype, ``RuntimeError`` for lengths that are new while a graph is captured.
    """
    return prepare_with_means(q, k, v, problem, recipe, sinks, implementation=implementation)[0]


def prepare_with_means(
    q: View, k: View, v: View, problem: Problem, recipe: Recipe, sinks: Any = None, *, implementation: str
) -> tuple[Operands, Any, Any]:
    """As ``prepare``, and the means that were subtracted: qm, float32 (heads_q, mean blocks, head_dim), and km, float32
    (heads_kv, sequences, head_dim); None where the recipe does not smooth."""
    _check(q, k, v, problem, recipe, sinks)
    tables = tables_of(problem, recipe.smooth_q, rows_of_cta(implementation, problem.head_dim), q.array)
    made = dict.fromkeys(_MADE)
    sixteen = _sixteen_bits(q, k, v, problem, recipe)
    q_mean = k_mean = None
    if recipe.is_quantized:
        if recipe.smooth_k:
            k_mean = _mean_of_k(k, problem, tables)
        to_values = implementation == "dequant"
        q_mean = _quantize_q(made, q, sixteen[0], k_mean, problem, recipe, tables, to_values)
        _quantize_k(made, k, sixteen[1], k_mean, problem, recipe, tables, to_values)
        _quantize_v(made, v, sixteen[2], problem, recipe, tables, to_values)
        if recipe.smooth_q is not None:
            # a float32 k that is there in float16 too is read so: half the bytes
            made["delta"] = _delta(q_mean, sixteen[1] or k, k_mean, problem, tables)
    q16, k16, v16 = sixteen
    return Operands(**made, q16=q16, k16=k16, v16=v16, sinks=sinks, blocks=tables.query_blocks), q_mean, k_mean


def _sixteen_bits(
    q: View, k: View, v: View, problem: Problem, recipe: Recipe
) -> tuple[View, View, View] | tuple[None, None, None]:
    """The 16-bit operands: the caller's; or, for float32, new ones, which the quantising kernels fill where there are."""
    if recipe.is_quantized and not recipe.has_windows:
        return None, None, None
    if problem.dtype != "float32":
        return q, k, v
    new = []
    for view, heads, tokens in (
        (q, problem.num_heads_q, problem.seqlen_q),
        (k, problem.num_heads_kv, problem.seqlen_k),
        (v, problem.num_heads_kv, problem.seqlen_k),
    ):
        head_dim = problem.head_dim
        array = gpu_arrays.empty(view.array, (problem.batch * heads, tokens, head_dim), "float16")
        chunks = problem.batch * heads * tokens * head_dim // 8
        if chunks and not recipe.is_quantized:
            grid = _grid(-(-chunks // prepass_values.CONVERT_THREADS))
            arguments = (array, view.array, *view.strides, heads, tokens, chunks)
            kernel = prepass_values.convert_kernel(head_dim)
            gpu_arrays.launch(kernel, grid, (prepass_values.CONVERT_THREADS,), arguments)
        new.append(View(array, (heads * tokens * head_dim, tokens * head_dim, head_dim)))
    return tuple(new)


def _mean_of_k(k: View, problem: Problem, tables: Tables) -> Any:
    """km, float32 (heads_kv, sequences, head_dim)."""
    heads, head_dim = problem.batch * problem.num_heads_kv, problem.head_dim
    tiles, sequences = tables.key_tiles.shape[0], tables.sequences.shape[0]
    sums = gpu_arrays.empty(k.array, (heads, tiles, head_dim), "float32")
    if heads * tiles:
        kernel = prepass_rows.k_sums_kernel(problem.dtype, head_dim)
        arguments = (sums, k.array, tables.key_tiles, *k.strides, tiles, problem.num_heads_kv)
        gpu_arrays.launch(kernel, _grid(heads * tiles), (threads_of(head_dim),), arguments)
    k_mean = gpu_arrays.empty(k.array, (heads, sequences, head_dim), "float32")
    if heads:
        grid = _grid(heads * sequences * (head_dim // prepass_rows.MEAN_CHANNELS))
        arguments = (k_mean, sums if tiles else 0, tables.sequences, tiles, sequences)
        gpu_arrays.launch(prepass_rows.k_mean_kernel(head_dim), grid, (prepass_rows.MEAN_THREADS,), arguments)
    return k_mean


def _quantize_q(
    made: dict,
    q: View,
    q16: View | None,
    k_mean: Any,
    problem: Problem,
    recipe: Recipe,
    tables: Tables,
    to_values: bool,
) -> Any:
    """Fills q and sfq, or q_values, and shift of ``made``; returns qm, float32 (heads_q, mean blocks, head_dim), if any."""
    heads, tokens, head_dim = problem.batch * problem.num_heads_q, problem.seqlen_q, problem.head_dim
    blocks = tables.mean_blocks.shape[0]
    smooth = recipe.smooth_q is not None
    codes, scales = _make_rows(made, "q", q.array, heads, tokens, problem, recipe, to_values)
    q_mean = gpu_arrays.empty(q.array, (heads, blocks, head_dim), "float32") if smooth else None
    shift = None if k_mean is None else gpu_arrays.empty(q.array, (heads, tokens), "float32")
    made["shift"] = shift
    if heads * blocks:
        rows = recipe.smooth_q or TILE_M
        kernel = prepass_rows.q_kernel(problem.dtype, head_dim, rows, _rule(recipe, "q"), smooth, to_values)
        arguments = (
            codes, *_or_null(scales), q.array, *_or_null(q_mean, shift, _written(q16, problem), k_mean), tables.mean_blocks,
            int(k_mean is not None), int(q16 is not None), *q.strides, tokens, blocks, problem.num_heads_q,
            problem.qhead_per_kvhead, tables.sequences.shape[0],
        )  # fmt: skip
        gpu_arrays.launch(kernel, _grid(heads * blocks), (threads_of(head_dim),), arguments)
    return q_mean


def _quantize_k(
    made: dict,
    k: View,
    k16: View | None,
    k_mean: Any,
    problem: Problem,
    recipe: Recipe,
    tables: Tables,
    to_values: bool,
) -> None:
    """Fills k and sfk, or k_values, of ``made``."""
    heads, head_dim, tiles = problem.batch * problem.num_heads_kv, problem.head_dim, tables.key_tiles.shape[0]
    rows = problem.seqlen_k if to_values else tiles * TILE_N
    codes, scales = _make_rows(made, "k", k.array, heads, rows, problem, recipe, to_values)
    if heads * tiles:
        kernel = prepass_rows.k_kernel(problem.dtype, head_dim, _rule(recipe, "k"), to_values)
        arguments = (
            codes, *_or_null(scales), k.array, *_or_null(_written(k16, problem), k_mean), tables.key_tiles,
            int(k_mean is not None), int(k16 is not None), *k.strides, problem.seqlen_k, tiles, problem.num_heads_kv,
            tables.sequences.shape[0],
        )  # fmt: skip
        gpu_arrays.launch(kernel, _grid(heads * tiles), (threads_of(head_dim),), arguments)


def _quantize_v(
    made: dict, v: View, v16: View | None, problem: Problem, recipe: Recipe, tables: Tables, to_values: bool
) -> None:
    """Fills vt and sfv, or v_values, of ``made``."""
    heads, head_dim, tiles = problem.batch * problem.num_heads_kv, problem.head_dim, tables.key_tiles.shape[0]
    if to_values:
        made["v_values"] = gpu_arrays.empty(v.array, (heads, problem.seqlen_k, head_dim), "float16")
        outputs, kernel = (made["v_values"],), prepass_values.values_kernel(problem.dtype, head_dim, recipe.scale_v)
    else:
        made["vt"] = gpu_arrays.empty(v.array, (heads, head_dim, tiles * TILE_N // 2), "uint8")
        if recipe.scale_per == "row":
            made["sfv"] = _scales_of_v(v, problem, tables)
        else:
            made["sfv"] = gpu_arrays.empty(v.array, (heads, head_dim, tiles * TILE_N // 16), "uint8")
        outputs, kernel = (made["vt"], made["sfv"]), prepass_values.v_kernel(problem.dtype, head_dim, _rule(recipe, "v"))
    if heads * tiles:
        arguments = (
            *outputs, v.array, *_or_null(_written(v16, problem)), tables.key_tiles, int(v16 is not None), *v.strides,
            problem.seqlen_k, tiles, problem.num_heads_kv, *(() if to_values else (tables.sequences.shape[0],)),
        )  # fmt: skip
        grid = _grid(heads * tiles * (head_dim // channels_of_v(head_dim)))
        gpu_arrays.launch(kernel, grid, (threads_of_v(head_dim),), arguments)


def _scales_of_v(v: View, problem: Problem, tables: Tables) -> Any:
    """amax / 6 of each channel over the tokens of each sequence, float32 (heads_kv, sequences, head_dim)."""
    heads, head_dim = problem.batch * problem.num_heads_kv, problem.head_dim
    tiles, sequences = tables.key_tiles.shape[0], tables.sequences.shape[0]
    peaks = gpu_arrays.empty(v.array, (heads, tiles, head_dim // 2), "int32")
    if heads * tiles:
        grid = _grid(heads * tiles * (head_dim // channels_of_v(head_dim)))
        arguments = (peaks, v.array, tables.key_tiles, *v.strides, tiles, problem.num_heads_kv)
        kernel = prepass_legacy.v_peaks_kernel(problem.dtype, head_dim)
        gpu_arrays.launch(kernel, grid, (threads_of_v(head_dim),), arguments)
    scales = gpu_arrays.empty(v.array, (heads, sequences, head_dim), "float32")
    if heads:
        grid = _grid(heads * sequences * (head_dim // prepass_legacy.SCALE_CHANNELS))
        arguments = (scales, peaks if tiles else 0, tables.sequences, tiles, sequences)
        sixteen = "bfloat16" if problem.dtype == "bfloat16" else "float16"
        kernel = prepass_legacy.v_scales_kernel(sixteen, head_dim)
        gpu_arrays.launch(kernel, grid, (prepass_legacy.SCALE_THREADS,), arguments)
    return scales


def _rule(recipe: Recipe, operand: str) -> str:
    """How kernels find the scales of q, k or v: by a rule for 16 elements, or "row"."""
    return "row" if recipe.scale_per == "row" else getattr(recipe, f"scale_{operand}")


def _make_rows(
    made: dict, name: str, like: Any, heads: int, rows: int, problem: Problem, recipe: Recipe, to_values: bool
) -> tuple[Any, Any]:
    """New (codes, scales), or (values, None), of q or k."""
    head_dim = problem.head_dim
    if to_values:
        values = made[f"{name}_values"] = gpu_arrays.empty(like, (heads, rows, head_dim), "float16")
        return values, None
    cols = code_cols(head_dim)
    made[name] = gpu_arrays.empty(like, (heads, rows, 8 * cols), "uint8")
    if recipe.scale_per == "row":
        made[f"sf{name}"] = gpu_arrays.empty(like, (heads, rows), "float32")
    else:
        made[f"sf{name}"] = gpu_arrays.empty(like, (heads, rows, cols), "uint8")
    return made[name], made[f"sf{name}"]


def _delta(q_mean: Any, k: View, k_mean: Any, problem: Problem, tables: Tables) -> Any:
    """qm . k', float32 (heads_q, delta tokens), written where a query sees a key of the tile."""
    heads_q, heads_kv = problem.batch * problem.num_heads_q, problem.batch * problem.num_heads_kv
    work, dtype = tables.delta_work.shape[0], dtype_name(k.array)
    delta = gpu_arrays.empty_for_parts(k.array, (heads_q, tables.delta_tiles * TILE_N))
    if heads_kv * work:
        arguments = (
            delta, q_mean, k.array, *_or_null(k_mean), tables.key_tiles, tables.mean_blocks, tables.delta_work,
            int(k_mean is not None), *k.strides, tables.mean_blocks.shape[0], problem.qhead_per_kvhead, work,
            tables.delta_tiles, problem.num_heads_kv, tables.sequences.shape[0],
        )  # fmt: skip
        kernel = prepass_delta.delta_kernel(dtype, problem.head_dim)
        smem_bytes = prepass_delta.shared_bytes(dtype, problem.head_dim)
        gpu_arrays.launch(kernel, _grid(heads_kv * work), (prepass_delta.THREADS,), arguments, smem_bytes)
    return delta


def _written(view: View | None, problem: Problem) -> Any:
    """The 16-bit array that a kernel is to write: there is one for float32 inputs alone."""
    return view.array if view is not None and problem.dtype == "float32" else None


def _or_null(*arrays: Any) -> tuple:
    return tuple(0 if array is None else array for array in arrays)


def _grid(ctas: int) -> tuple[int]:
    if ctas > _MAX_CTAS:
        raise ValueError(message("q, k, v", f"small enough for {_MAX_CTAS} CTAs a kernel", ctas, "split the batch"))
    return (ctas,)


def _check(q: View, k: View, v: View, problem: Problem, recipe: Recipe, sinks: Any) -> None:
    if problem.head_dim not in HEAD_DIMS:
        allowed = f"one of {', '.join(map(str, HEAD_DIMS))}"
        raise ValueError(message("head_dim", allowed, problem.head_dim, "pad the last axis"))
    check_choice("dtype", problem.dtype, FLOAT_DTYPES, "convert it first")
    if (recipe.qk == "nvfp4") != (recipe.v_format == "nvfp4"):
        got = f"qk={recipe.qk!r}, v_format={recipe.v_format!r}"
        raise ValueError(message("recipe", "in NVFP4 or in 16 bits as a whole", got))
    if recipe.v_format == "nvfp4" and recipe.v_axis != "tokens":
        raise ValueError(message("recipe", "one with v_axis='tokens'", repr(recipe.v_axis)))
    elements = 4 if problem.dtype == "float32" else 8
    for name, view in (("q", q), ("k", k), ("v", v)):
        if dtype_name(view.array) != problem.dtype:
            raise TypeError(message(f"{name}.dtype", problem.dtype, dtype_name(view.array)))
        if any(stride % elements for stride in view.strides):
            way_out = "copy it to contiguous memory"
            raise ValueError(message(f"{name}.strides", f"multiples of {elements} elements", view.strides, way_out))
        if not gpu_arrays.is_aligned(view.array, 16):
            raise ValueError(message(name, "at an address that is a multiple of 16", "another", "copy it"))
    if (sinks is not None) != problem.has_sinks:
        expected, got = ("an array", "None") if problem.has_sinks else ("None", "an array")
        raise ValueError(message("sinks", f"{expected}, as problem.has_sinks says", got))
    if sinks is not None:
        if dtype_name(sinks) != "float32":
            raise TypeError(message("sinks.dtype", "float32", dtype_name(sinks), "convert it first"))
        if tuple(sinks.shape) != (problem.num_heads_q,):
            raise ValueError(message("sinks", f"of shape {(problem.num_heads_q,)}", tuple(sinks.shape)))
        gpu_arrays.check_contiguous("sinks", sinks)
