"""Drawings of formats, thread-to-element layouts, scale layouts, scores, attention, decode, and warps of the emulator.

Every function takes arrays or descriptors and returns a new ``matplotlib.figure.Figure``; nothing opens a window or keeps
global state. ``nbfmha layout --png``, ``nbfmha validate --plot`` and the notebooks draw with the same functions.
"""

from nbfmha.viz.attention import (
    draw_accuracy,
    draw_error_map,
    draw_online_softmax,
    draw_relative_l2,
    draw_tiles_of,
)
from nbfmha.viz.decode import draw_cache_bytes, draw_decode_rows, draw_sequence_bytes, draw_window_errors
from nbfmha.viz.formats import (
    draw_block,
    draw_error_by_magnitude,
    draw_number_lines,
    draw_quantized_matrix,
    draw_rounding,
    draw_scale_use,
)
from nbfmha.viz.fragments import draw_fragment, draw_packing
from nbfmha.viz.scales import draw_scale_layout
from nbfmha.viz.scores import draw_scores, draw_tiles
from nbfmha.viz.style import save
from nbfmha.viz.warp import draw_accumulation, draw_mma, draw_profile

__all__ = [
    "draw_accumulation",
    "draw_accuracy",
    "draw_block",
    "draw_cache_bytes",
    "draw_decode_rows",
    "draw_error_by_magnitude",
    "draw_error_map",
    "draw_fragment",
    "draw_mma",
    "draw_number_lines",
    "draw_online_softmax",
    "draw_packing",
    "draw_profile",
    "draw_quantized_matrix",
    "draw_relative_l2",
    "draw_rounding",
    "draw_scale_layout",
    "draw_scale_use",
    "draw_scores",
    "draw_sequence_bytes",
    "draw_tiles",
    "draw_tiles_of",
    "draw_window_errors",
    "save",
]
