"""Forward attention, wherever the arrays lie."""

from __future__ import annotations

from typing import Any

from nbfmha import dispatch
from nbfmha.call import DEFAULT_RECIPE, make_call
from nbfmha.recipe import Recipe
from nbfmha.validation import check_choice


def attention(
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
    impl: str = "auto",
    layout: str = "bhsd",
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """softmax(softmax_scale * q k^T) v, quantised to FP4 by ``recipe``.

    q is (..., num_heads_q, seqlen_q, head_dim), k and v (..., num_heads_kv, seqlen_k, head_dim), with any number of
    leading axes; with ``layout="bshd"`` (..., tokens, num_heads, head_dim). Query head h reads key/value head
    h // (num_heads_q / num_heads_kv). The output is a new array of q's shape, dtype, library and device (C-contiguous),
    or ``out``. Inputs are not changed.

    Args:
        q, k, v: arrays of one library, place and dtype (float16, bfloat16, float32): NumPy (bfloat16: ml_dtypes'), torch
            on the CPU or a GPU, CuPy and Numba in GPU memory, :mod:`nbfmha.emulated`. In GPU memory any strides that
            keep channels together and leading axes evenly spaced are read in place, with a 16-byte aligned address and
            strides in multiples of 16 bytes. Values are rounded to 16 bits first: float32 to float16, so that they
            must not exceed 65504. ``QuantizedTensor``s in place of any of the three, where the arrays would lie, are
            taken for what they stand for: nothing is smoothed or quantised but P (to 16 bits). Where all three are such,
            the output is float32. Kernels (:mod:`nbfmha.quantized_operands`) take them contiguous and without global
            scale, MXFP4 beside bfloat16 arrays alone; the block-scale MMA reads the codes of three NVFP4 tensors with
            V's scales along tokens.
        causal: query i sees the keys up to ``i + q_offset``.
        softmax_scale: what scores are multiplied by; 1/sqrt(head_dim) when None.
        window: (left, right), how many keys before and after its position a query sees; None on a side: all.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        q_offset: position of query 0 on the key axis; ``seqlen_k - seqlen_q`` when None (bottom right).
        cu_seqlens_q, cu_seqlens_k: boundaries of sequences laid end to end on the token axes, (sequences + 1,) integers
            from 0 to the length of the axis, with no batch. Tuples, lists, or arrays: reading one in GPU memory waits
            for the GPU, so pass a list where you have it.
        sinks: (num_heads_q,), a logit of each query head that joins the softmax's denominator; any float dtype, of q's
            library and place or NumPy. Values in GPU memory are not checked; elsewhere they must be finite or -inf.
        recipe: "accurate", "fast", "sage3", "naive", "legacy" or a :class:`nbfmha.recipe.Recipe`; with
            ``QuantizedTensor``s left at its default, or None: there is nothing left to quantise.
        impl: "auto", or by name "blockscale", "legacy", "dequant", "emulated", "reference", which never falls back;
            :mod:`nbfmha.dispatch` says what each is, and :func:`nbfmha.explain` who runs a call and why not the others.
        layout: "bhsd" or "bshd", the order of heads and tokens in q, k, v and the output.
        return_lse: also return the LSE, the natural logarithm of the denominator: float32 (..., num_heads_q, seqlen_q) in
            both layouts.
        out: an array of q's shape, dtype, library and place, written and returned; in memory of its own.

    A query that sees no key gets 0 and an LSE of -inf (its sink where there is one). On a GPU the work is queued on the
    library's current stream and not waited for. Forward only: a torch tensor that requires a gradient is refused unless
    gradients are switched off (``torch.no_grad()``, ``torch.inference_mode()``), since the output would have lost it.

    Returns ``out``, or ``(out, lse)`` with ``return_lse``.

    Raises ``TypeError`` for a wrong type, dtype or mixed libraries; ``ValueError`` for shapes, devices, strides or options
    that do not fit together; :class:`nbfmha.dispatch.Unavailable`, a ``ValueError``, where no implementation, or not the
    one named, can run the call. All of them before anything is launched or written.
    """
    check_choice("impl", impl, dispatch.IMPLS)
    call = make_call(
        q,
        k,
        v,
        causal=causal,
        softmax_scale=softmax_scale,
        window=window,
        softcap=softcap,
        q_offset=q_offset,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        sinks=sinks,
        recipe=recipe,
        layout=layout,
        out=out,
    )
    result, lse = dispatch.run(call, impl, with_lse=return_lse)
    return (result, lse) if return_lse else result
