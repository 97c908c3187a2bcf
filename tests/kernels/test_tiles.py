"""Tables of tiles against the mask, key by key: where corrections lie, and what the pre-pass computes of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbfmha.kernels.prepass_delta import TILES_A_CTA, work_list
from nbfmha.problem import Problem
from nbfmha.tiles import MeanBlock, QueryBlock, delta_tiles, key_tiles, mean_blocks, query_blocks

sides = st.none() | st.integers(0, 300)
lengths = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), min_size=1, max_size=5)


def packed(pairs, **options) -> Problem:
    queries, keys = (tuple(np.cumsum((0, *column)).tolist()) for column in zip(*pairs, strict=True))
    return Problem(1, 6, 2, queries[-1], keys[-1], 64, cu_seqlens_q=queries, cu_seqlens_k=keys, **options)


def assert_tables(problem: Problem, mean_size: int, group: int, rows: int) -> None:
    mask, tiles = problem.mask(), key_tiles(problem)
    means = [MeanBlock(*row) for row in mean_blocks(problem, mean_size)]
    taken = np.zeros(delta_tiles(problem, mean_size), int)
    needed = np.zeros((len(means) * group, len(tiles)), bool)
    for index, block in enumerate(means):
        own = tiles[:, 3] == block.sequence
        np.add.at(taken, np.flatnonzero(own) + block.delta_tile, 1)
        keys = [slice(source, source + count) for source, count, *_ in tiles]
        seen = [t for t in range(len(tiles)) if mask[block.first : block.stop, keys[t]].any()]
        if seen:
            assert (block.begin, block.end) == (seen[0], seen[-1] + 1)
        else:  # the forward kernel looks at the last tile where a window begins right after its keys
            assert block.end - block.begin <= 1
        needed[index * group : (index + 1) * group, block.begin : block.end] = True
    assert np.all(taken == 1), "places that two blocks share, or nobody has"
    for name in ("begin", "end"):
        assert np.all(np.diff([getattr(block, name) for block in means]) >= 0), f"{name} does not ascend"

    for row in query_blocks(problem, mean_size):
        query = QueryBlock(*row)
        block = next(mean for mean in means if mean.first <= query.first < mean.stop)
        assert (query.delta_tile, query.sequence) == (block.delta_tile, block.sequence)
        assert query.stop <= block.stop

    done = np.zeros_like(needed, int)
    for first_row, begin, end in work_list(mean_blocks(problem, mean_size), group, rows):
        assert 0 < end - begin <= TILES_A_CTA
        done[first_row : first_row + rows, begin:end] += 1
    assert np.all(done[needed] == 1), "a tile that no CTA computes, or two do"


@settings(deadline=None, max_examples=60)
@given(lengths, st.booleans(), st.tuples(sides, sides), st.sampled_from([64, 128]), st.sampled_from([1, 3, 8]))
def test_tables_of_packed_sequences(pairs, causal, window, mean_size, group):
    assert_tables(packed(pairs, causal=causal, window=window), mean_size, group, 32)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 900), st.integers(0, 900), st.booleans(), st.tuples(sides, sides), st.integers(-500, 900))
def test_tables_of_one_sequence(seqlen_q, seqlen_k, causal, window, q_offset):
    problem = Problem(1, 1, 1, seqlen_q, seqlen_k, 64, causal=causal, window=window, q_offset=q_offset)
    assert_tables(problem, 64, 1, 8)


def test_the_corrections_of_packed_sequences_are_linear():
    sixteen, sixty_four = (delta_tiles(packed([(1024, 1024)] * n), 64) for n in (16, 64))
    assert (sixteen, sixty_four) == (16 * 16 * 16, 64 * 16 * 16)


def test_work_stops_at_the_causal_edge():
    """64 rows are 8 mean blocks of 8 heads: of 32 x 32 tiles those at or below the diagonal, and what fills the CTAs."""
    causal, full = (Problem(1, 8, 1, 2048, 2048, 128, causal=causal) for causal in (True, False))
    counted = [np.sum(np.diff(work_list(mean_blocks(p, 64), 8, 64)[:, 1:])) for p in (causal, full)]
    assert counted == [8 + 16 + 24 + 32, 4 * 32]


def test_without_smoothing_blocks_have_no_corrections():
    problem = packed([(70, 100), (130, 60)])
    assert not mean_blocks(problem, None)[:, MeanBlock._fields.index("delta_tile")].any()
    np.testing.assert_array_equal(np.diff(mean_blocks(problem, None)[:, :2])[:, 0], [64, 6, 64, 64, 2])


def test_more_corrections_than_an_int32_counts_are_refused():
    with pytest.raises(ValueError, match="short enough for 2\\^31 - 1, got 2147483648 tiles of 64 corrections a head"):
        delta_tiles(Problem(1, 1, 1, 2**21, 2**22, 64), 64)
