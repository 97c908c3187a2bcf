"""A small piece of real attention input, shipped with the package (``data/README.md`` says where it comes from)."""

from __future__ import annotations

from importlib import resources
from typing import NamedTuple

import numpy as np


class Sample(NamedTuple):
    """Post-RoPE attention input of one layer, float16: q (9, 512, 64), k and v (3, 512, 64), heads first."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray


def load_sample() -> Sample:
    """q, k and v of layer 9 of SmolLM2-135M-Instruct for 512 tokens of Hamlet: new, writable arrays at every call."""
    source = resources.files("nbfmha").joinpath("data", "smollm2_layer09.npz")
    with source.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return Sample(q=arrays["q"], k=arrays["k"], v=arrays["v"])
