"""What the forward kernel reads: arrays that kernels can reach, written by the pre-pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nbfmha.recipe import TILE_N
from nbfmha.tiles import View

HEAD_DIMS = (64, 96, 128, 256)
"""What pre-pass and forward kernel are compiled for."""


@dataclass(frozen=True)
class Operands:
    """Quantised operands, 16-bit ones and corrections of one attention call; arrays C-contiguous, scales linear.

    heads_q, heads_kv count the heads of all batch entries. ``code_dim`` is head_dim rounded up to whole k steps of 64;
    ``padded`` the length of the padded token axis (:mod:`nbfmha.tiles`). What lies in padding is zero.

    q, sfq         uint8 (heads_q, seqlen_q, code_dim / 2) and (..., code_dim / 16)
    k, sfk         uint8 (heads_kv, padded, code_dim / 2) and (..., code_dim / 16), rows of each tile in ``stored_order``
    vt, sfv        uint8 (heads_kv, head_dim, padded / 2) and (heads_kv, head_dim, padded / 16): V transposed
                   With ``scale_per="row"`` the scales are float32: sfq (heads_q, seqlen_q), sfk (heads_kv, padded) in the
                   order of k's rows, sfv (heads_kv, sequences, head_dim); codes lie as ever
    q_values       float16 (heads_q, seqlen_q, head_dim), k_values and v_values float16 (heads_kv, seqlen_k, head_dim): what
                   codes and scales stand for, exactly, in the caller's order of rows
    q16, k16, v16  views of the 16-bit operands, for the 16-bit windows; None where there are none
    delta          float32 (heads_q, delta tokens), qm.k': added to the scores of a mean block's queries; or None. A mean
                   block has a place for each padded token of its own sequence, ``delta_tile`` of :mod:`nbfmha.tiles` says
                   where. Tiles of 64 keys that are not visited for its queries are not written and may hold anything
    shift          float32 (heads_q, seqlen_q), q.km, the part of a score that K smoothing took away; or None
    sinks          float32 (num_heads_q,), a logit of each head that joins the denominator; or None
    blocks         int32 (query blocks, 8): ``tiles.query_blocks``

    Codes and scales are there for ``blockscale`` and ``legacy``, values for ``dequant``; neither where the recipe quantises
    nothing.
    """

    q: Any
    sfq: Any
    k: Any
    sfk: Any
    vt: Any
    sfv: Any
    q_values: Any
    k_values: Any
    v_values: Any
    q16: View | None
    k16: View | None
    v16: View | None
    delta: Any
    shift: Any
    sinks: Any
    blocks: Any


def stored_order() -> np.ndarray:
    """int (64,): the token of a tile that each of K's stored rows holds.

    Stored row ``8 t + 2 q + e`` of each 32 is token ``8 q + 2 t + e``: lane q of a quad then gets, over four n tiles of
    m16n8k64, the scores of tokens 8 q .. 8 q + 7, the eight that its fragment of P holds in the second MMA.
    """
    row = np.arange(TILE_N)
    inside = row % 32
    return row - inside + inside % 8 // 2 * 8 + inside // 8 * 2 + inside % 2
