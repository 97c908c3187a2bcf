"""The shipped sample."""

from importlib import resources

import numpy as np

from nbfmha.sample import load_sample


def test_shapes_and_content():
    sample = load_sample()
    assert [x.shape for x in sample] == [(9, 512, 64), (3, 512, 64), (3, 512, 64)]
    assert all(x.dtype == np.float16 and np.isfinite(x).all() and x.flags.c_contiguous for x in sample)
    # a real model: keys share a large mean over tokens, values do not
    shares = []
    for x in (sample.k.astype(float), sample.v.astype(float)):
        shares.append(np.sum(x.mean(axis=1) ** 2) / np.sum(np.mean(x**2, axis=1)))
    assert shares[0] > 0.25 > shares[1]


def test_every_call_gives_new_arrays():
    first = load_sample()
    first.q[...] = 0
    assert load_sample().q.any()


def test_ships_small_and_with_its_provenance():
    data = resources.files("nbfmha").joinpath("data")
    assert sum(len(file.read_bytes()) for file in data.iterdir()) < 2_000_000
    assert "Apache" in data.joinpath("README.md").read_text()
