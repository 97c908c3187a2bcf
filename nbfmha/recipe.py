"""How attention is quantised: which operands in NVFP4, what is done so that it hurts little, and what stays in 16 bits.

The scores. With km the mean of k over the tokens (of one head) and qm the mean of q over a block of queries:

    q.k = (q - qm).(k - km) + qm.(k - km) + q.km

``smooth_k`` quantises k - km instead of k; q.km is the same for every key of a row, so it changes no weight and is added
to the row's LSE (before a softcap, which is not linear, it is added to the scores). ``smooth_q`` quantises q - qm and adds
qm.(k - km), computed in float32 from what was not quantised, to the scores.

The values. ``pv="f16"``: V is stored in NVFP4 (``v_format``), dequantised exactly to f16, P = exp(score - row max) rounded
to f16. ``pv="nvfp4"``: P too is quantised, each 16 keys of 448*6*P sharing a UE4M3 scale; the factor 448*6 spends the
whole range of the scales on P's [0, 1], and is divided out at the end (log(448*6) taken off the LSE).

One scale a row. ``scale_per="row"`` is for the plain FP4 MMA (``f8f6f4``), which has no scales: the same E2M1 codes, but
one float32 scale amax/6 for each token of q and k over head_dim, and for each channel of v over the tokens of a sequence;
both are applied after the MMA (``nbfmha.row_scales``). P is 448*P in E4M3 (``pv="e4m3"``), which that MMA multiplies with
V's codes; the factor is divided out as above.

16-bit windows. For the keys in them scores come from f16 q and k, P is rounded to f16 and V is the f16 v, nothing else
changes. ``diagonal_tiles=d``: each block of 64 queries has in 16 bits the 64-key tiles from d before the one on which
its first query stands to d after the one of its last. ``sink_tokens``: so are the first keys of every sequence.

``row_sum``: what the output is divided by. "exact" sums P before its rounding to nvfp4; "rounded" sums what the second MMA
multiplies, so that the weights of a row add up to one (a column of ones beside V gives that sum on the same MMA). The
LSE is the logarithm of that same sum, so that pieces merge with the weights they were divided by.

The 16-bit windows, and "f16" of what is not quantised, stand for the 16-bit format of the call: bfloat16 where the inputs
are bfloat16. P and V of NVFP4 tiles are f16 in every call: it holds each dequantised NVFP4 value without a global scale
exactly (E2M1 times UE4M3: 6 significant bits, 2^-10 .. 2688), and P to three bits more than bfloat16.

| preset   | smoothing | scales        | P.V   | 16-bit windows               | what it is                              |
|----------|-----------|---------------|-------|------------------------------|-----------------------------------------|
| naive    | none      | amax          | nvfp4 | none                         | plain NVFP4                             |
| sage3    | K, Q(128) | amax          | nvfp4 | none                         | SageAttention3 (arXiv 2505.11594)       |
| fast     | K, Q(64)  | four_over_six | nvfp4 | diagonal tile, first 64 keys | the block-scale MMA for all other tiles |
| accurate | K, Q(64)  | four_over_six | f16   | diagonal +-1, first 64 keys  | the default                             |
| legacy   | K         | amax of a row | e4m3  | none                         | the plain FP4 MMA: f8f6f4               |

All of them have V's scales along tokens. Along head_dim, one channel far larger than its 15 neighbours (layer 0 of
SmolLM2 has one of 11 times the median) costs those neighbours their precision.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from nbfmha.validation import check_choice, message

TILE_N = 64
"""Keys of a tile, and queries of a block of the 16-bit windows."""

P_SCALE = {"f16": 1, "nvfp4": 448 * 6, "e4m3": 448}
"""What P in [0, 1] is multiplied by before it is rounded, by ``pv``: with "nvfp4" the largest UE4M3 times the largest E2M1,
with "e4m3" the largest E4M3."""

SMOOTH_Q_BLOCKS = (64, 128)


@dataclass(frozen=True)
class Recipe:
    """How one attention call is quantised; the module says what each field does. The fields' defaults quantise plainly.

    qk              "nvfp4": in FP4 codes, or "f16": q and k as they came
    smooth_k        subtract the mean over the tokens, per head and channel
    smooth_q        subtract the mean of each block of 64 or 128 queries; None: do not
    scale_q, _k, _v "amax" or "four_over_six": how the scale of 16 elements is chosen (``nbfmha.nvfp4``)
    scale_per       "block": 16 elements share a UE4M3 scale (NVFP4); "row": one float32 scale a row, see the module. "row"
                    and pv="e4m3" need each other, amax scales, and all of q, k and v quantised, v along "tokens"
    pv              "f16", "nvfp4" or "e4m3": the precision of P, and of the second MMA
    v_format        "nvfp4": in FP4 codes, or "f16": v as it came
    v_axis          "head_dim" or "tokens": along which axis 16 elements (or a row) of V share a scale; pv="nvfp4" needs
                    "tokens"
    row_sum         "exact" or "rounded": see the module
    diagonal_tiles  64-key tiles in 16 bits on each side of the diagonal one; 0: that one alone; None: not even it
    sink_tokens     first keys in 16 bits, a multiple of 64

    Raises ``TypeError`` for a wrong type; ``ValueError`` for an unknown name, a value out of range, or a combination that
    no implementation could tell from another recipe or could not compute.
    """

    qk: str = "nvfp4"
    smooth_k: bool = False
    smooth_q: int | None = None
    scale_q: str = "amax"
    scale_k: str = "amax"
    scale_v: str = "amax"
    scale_per: str = "block"
    pv: str = "f16"
    v_format: str = "nvfp4"
    v_axis: str = "head_dim"
    row_sum: str = "exact"
    diagonal_tiles: int | None = None
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        if not isinstance(self.smooth_k, bool):
            raise TypeError(message("smooth_k", "True or False", repr(self.smooth_k)))
        for name in ("smooth_q", "diagonal_tiles", "sink_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer | None):
                raise TypeError(message(name, "an integer", repr(value)))
        if self.smooth_q is not None and self.smooth_q not in SMOOTH_Q_BLOCKS:
            raise ValueError(message("smooth_q", "64, 128 or None", self.smooth_q))
        if self.diagonal_tiles is not None and self.diagonal_tiles < 0:
            way_out = "0 keeps the diagonal tile alone, None keeps none"
            raise ValueError(message("diagonal_tiles", ">= 0 or None", self.diagonal_tiles, way_out))
        if self.sink_tokens is None:
            raise TypeError(message("sink_tokens", "an integer", None, "0 keeps no key in 16 bits"))
        if self.sink_tokens < 0 or self.sink_tokens % TILE_N:
            raise ValueError(message("sink_tokens", f"a multiple of {TILE_N}, >= 0", self.sink_tokens))
        self._check_combination()

    def _check_combination(self) -> None:
        self._check_scale_per()
        if self.pv == "nvfp4" and self.v_format != "nvfp4":
            raise ValueError(message("v_format", "'nvfp4' with pv='nvfp4'", repr(self.v_format), "pv='f16' takes both"))
        if self.pv == "nvfp4" and self.v_axis != "tokens":
            way_out = "the block-scale MMA sums over tokens, so that is where its scales lie; pv='f16' takes both"
            raise ValueError(message("v_axis", "'tokens' with pv='nvfp4'", repr(self.v_axis), way_out))
        plain = {field.name: field.default for field in fields(self)}
        idle: list[tuple[str, str]] = []
        if self.qk == "f16":
            idle += [(name, "qk='f16': nothing is quantised there") for name in _QK_FIELDS]
        if self.v_format == "f16":
            idle += [(name, "v_format='f16': nothing is quantised there") for name in ("scale_v", "v_axis")]
        if self.pv == "f16":
            idle.append(("row_sum", "pv='f16'"))
        if not self.is_quantized:
            idle += [(name, "everything in 16 bits") for name in ("diagonal_tiles", "sink_tokens")]
        for name, why in idle:
            if getattr(self, name) != plain[name]:
                raise ValueError(message(name, f"{plain[name]!r} with {why}", repr(getattr(self, name))))

    def _check_scale_per(self) -> None:
        if self.pv == "e4m3" and self.scale_per != "row":
            way_out = "f8f6f4, which multiplies it with V's codes, has no scales for 16 elements; pv='nvfp4' has"
            raise ValueError(message("scale_per", "'row' with pv='e4m3'", repr(self.scale_per), way_out))
        if self.scale_per != "row":
            return
        needed = {"pv": "e4m3", "qk": "nvfp4", "v_format": "nvfp4", "v_axis": "tokens"}
        for name, value in (needed | dict.fromkeys(("scale_q", "scale_k", "scale_v"), "amax")).items():
            if getattr(self, name) != value:
                way_out = "scale_per='block' takes others"
                raise ValueError(message(name, f"{value!r} with scale_per='row'", repr(getattr(self, name)), way_out))

    @property
    def is_quantized(self) -> bool:
        """Whether anything is in FP4 codes."""
        return "nvfp4" in (self.qk, self.v_format)

    @property
    def has_windows(self) -> bool:
        """Whether some keys are kept in 16 bits."""
        return self.diagonal_tiles is not None or self.sink_tokens > 0


_CHOICES = {
    "qk": ("nvfp4", "f16"),
    "scale_q": ("amax", "four_over_six"),
    "scale_k": ("amax", "four_over_six"),
    "scale_v": ("amax", "four_over_six"),
    "scale_per": ("block", "row"),
    "pv": ("f16", "nvfp4", "e4m3"),
    "v_format": ("nvfp4", "f16"),
    "v_axis": ("head_dim", "tokens"),
    "row_sum": ("exact", "rounded"),
}
_QK_FIELDS = ("smooth_k", "smooth_q", "scale_q", "scale_k")
_BETTER_SCALES = {"scale_q": "four_over_six", "scale_k": "four_over_six", "scale_v": "four_over_six"}

PRESETS = {
    "naive": Recipe(pv="nvfp4", v_axis="tokens"),
    "sage3": Recipe(smooth_k=True, smooth_q=128, pv="nvfp4", v_axis="tokens"),
    "fast": Recipe(
        smooth_k=True, smooth_q=64, **_BETTER_SCALES, pv="nvfp4", v_axis="tokens", diagonal_tiles=0, sink_tokens=64
    ),
    "accurate": Recipe(smooth_k=True, smooth_q=64, **_BETTER_SCALES, v_axis="tokens", diagonal_tiles=1, sink_tokens=64),
    "legacy": Recipe(smooth_k=True, scale_per="row", pv="e4m3", v_axis="tokens"),
}
"""Recipes by name; "accurate" is the default of ``nbfmha.attention``."""


def resolve_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe as it is, or the preset of that name; ``TypeError`` for another type, ``ValueError`` for another name."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise TypeError(message("recipe", "a Recipe or the name of a preset", type(recipe).__name__))
    return PRESETS[check_choice("recipe", recipe, PRESETS)]
