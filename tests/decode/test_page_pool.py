"""Who owns which page: an account that never loses one, whatever comes, and changes nothing where it refuses."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nbfmha.kv_layout import CacheLayout
from nbfmha.page_pool import CacheFull, PagePool

SMALL = CacheLayout(1, 64, page_size=32, recent_tokens=16, sink_tokens=0)


class Accounts(RuleBasedStateMachine):
    """The pool beside pages that remember who wrote each of their blocks, as the device would."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(SMALL, pages=12, max_sequences=5, max_length=150)
        self.tables = np.full_like(self.pool.tables, -1)
        self.pages = {}
        self.histories = {}  # slot -> blocks that it must read
        self.lengths = {}
        self.operations = 0

    def follow(self, changes):
        for source, target in changes.copies:
            self.pages[int(target)] = dict(self.pages.get(int(source), {}))
        for slot, column, page in changes.entries:
            self.tables[slot, column] = page

    def snapshot(self):
        p = self.pool
        arrays = (p.lengths, p.tables, p._owned, p._live, p._owners)
        return [x.copy() for x in arrays], list(p._free_pages), list(p._free_slots)

    def refuses(self, call, before):
        with pytest.raises((CacheFull, ValueError)):
            call()
        after = self.snapshot()
        assert before[1:] == after[1:]
        for x, y in zip(before[0], after[0], strict=True):
            np.testing.assert_array_equal(x, y)

    @rule(count=st.integers(1, 2))
    def allocate(self, count):
        before = self.snapshot()
        if len(self.histories) + count > 5:
            return self.refuses(lambda: self.pool.allocate(count), before)
        for slot in self.pool.allocate(count):
            self.histories[int(slot)], self.lengths[int(slot)] = [], 0
            self.tables[slot] = -1

    @precondition(lambda self: self.histories)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 60), min_size=1, max_size=5), ahead=st.booleans())
    def append(self, data, tokens, ahead):
        some = st.lists(st.sampled_from(sorted(self.histories)), min_size=1, max_size=len(tokens), unique=True)
        slots = data.draw(some)
        counts = np.array(tokens[: len(slots)])
        before = self.snapshot()
        try:
            changes = self.pool.reserve(np.array(slots), counts)
        except (CacheFull, ValueError):
            return self.refuses(lambda: self.pool.reserve(np.array(slots), counts), before)
        self.follow(changes)
        if ahead:
            return
        for slot, count in zip(slots, counts.tolist(), strict=True):
            self.lengths[slot] += count
            history = self.histories[slot]
            while 16 * len(history) < SMALL.quantized_tokens(self.lengths[slot]):
                self.operations += 1
                token = 16 * len(history)
                history.append(self.operations)
                self.pages.setdefault(int(self.tables[slot, token // 32]), {})[token % 32] = history[-1]
        self.pool.advance(np.array(slots), counts)
        self.read_all()

    @precondition(lambda self: self.histories)
    @rule(data=st.data(), count=st.integers(1, 2))
    def fork(self, data, count):
        slot = data.draw(st.sampled_from(sorted(self.histories)))
        before = self.snapshot()
        if len(self.histories) + count > 5:
            return self.refuses(lambda: self.pool.fork(slot, count), before)
        new, changes = self.pool.fork(slot, count)
        self.tables[new] = -1
        self.follow(changes)
        for other in new.tolist():
            self.histories[other], self.lengths[other] = list(self.histories[slot]), self.lengths[slot]

    @precondition(lambda self: self.histories)
    @rule(data=st.data())
    def free(self, data):
        slot = data.draw(st.sampled_from(sorted(self.histories)))
        self.pool.free(np.array([slot]))
        self.tables[slot] = -1
        del self.histories[slot], self.lengths[slot]

    def read_all(self):
        for slot, history in self.histories.items():
            for i, block in enumerate(history):
                assert self.pages[int(self.tables[slot, i // 2])][16 * (i % 2)] == block, (slot, i)

    @invariant()
    def every_page_is_free_or_owned_as_often_as_counted(self):
        owners = Counter(int(page) for _, pages in self.pool.pages_in_use() for page in pages)
        free = self.pool._free_pages
        assert sorted([*free, *owners]) == list(range(12))
        for page, times in owners.items():
            assert self.pool._owners[page] == times
        stats = self.pool.stats
        assert stats.free_pages == len(free)
        assert stats.sequences == len(self.histories) == 5 - stats.free_sequences
        assert stats.tokens == sum(self.lengths.values())
        assert stats.shared_pages == sum(times > 1 for times in owners.values())
        np.testing.assert_array_equal(self.tables, self.pool.tables, "what the device was told")

    def teardown(self):
        self.read_all()
        self.pool.free(np.array(sorted(self.histories), np.int64))
        assert self.pool.stats == (0, 5, 0, 12, 12, 0)


TestAccounts = Accounts.TestCase
TestAccounts.settings = settings(max_examples=100, stateful_step_count=100, deadline=None)  # 10,000 operations


def test_pages_are_those_of_quantised_tokens():
    pool = PagePool(SMALL, pages=4, max_sequences=1, max_length=140)
    slots = pool.allocate(1)
    for length in range(1, 141):
        pool.reserve(slots, np.array([1]))
        pool.advance(slots, np.array([1]))
        ((_, pages),) = pool.pages_in_use()
        assert len(pages) == SMALL.pages_of(length) == -(-max((length - 16) // 16 * 16, 0) // 32)
    with pytest.raises(ValueError, match=r"tokens must be within max_length = 140, got 140 \+ 1 of sequence 0; make"):
        pool.reserve(slots, np.array([1]))


def test_a_partly_filled_page_is_copied_for_all_but_its_last_owner():
    pool = PagePool(SMALL, pages=4, max_sequences=4, max_length=140)
    slots = pool.allocate(1)
    pool.reserve(slots, np.array([32]))
    pool.advance(slots, np.array([32]))
    new, changes = pool.fork(int(slots[0]), 2)
    assert changes.entries.tolist() == [[1, 0, 0], [2, 0, 0]]
    assert pool.stats.shared_pages == 1
    everyone = np.concatenate([slots, new])
    assert not pool.has_reserved(everyone, np.full(3, 16))
    changes = pool.reserve(everyone, np.full(3, 16))
    assert changes.copies[:, 0].tolist() == [0, 0], "two copies of the page, and it itself for the last"
    assert len({int(page) for _, pages in pool.pages_in_use() for page in pages}) == 3
    assert pool.has_reserved(everyone, np.full(3, 16))


def test_refusals():
    pool = PagePool(SMALL, pages=2, max_sequences=2, max_length=200)
    with pytest.raises(CacheFull, match="out of sequences: 3 asked, 2 of 2 free; free some"):
        pool.allocate(3)
    slots = pool.allocate(2)
    with pytest.raises(CacheFull, match="out of pages: 3 pages wanted, 2 of 2 free; free sequences, or"):
        pool.reserve(slots, np.array([64, 40]))
    with pytest.raises(ValueError, match="tokens must be what was reserved, got more, of sequence 1; reserve"):
        pool.advance(slots, np.array([10, 32]))
    with pytest.raises(ValueError, match="seq_ids must be sequences that allocate or fork gave, got 2; is it freed"):
        pool.slots("seq_ids", [0, 2])
    with pytest.raises(ValueError, match="seq_ids must be sequences that allocate or fork gave, got -1"):
        pool.slots("seq_ids", [-1])
    with pytest.raises(ValueError, match=r"seq_ids must be each sequence once, got \[1, 1\]; append one chunk of each"):
        pool.slots("seq_ids", [1, 1])
    with pytest.raises(TypeError, match="seq_ids must be integers in host memory, got int; pass a list of ints"):
        pool.slots("seq_ids", 1)
    with pytest.raises(TypeError, match="seq_ids must be one-dimensional, of integers, got an array of float64"):
        pool.slots("seq_ids", [0.0])
    pool.free(slots)
    with pytest.raises(ValueError, match="got 0; is it freed"):
        pool.slots("seq_ids", [0])
    for name, value in (("pages", 0), ("max_sequences", 0), ("max_length", 0)):
        sizes = {"pages": 1, "max_sequences": 1, "max_length": 1, name: value}
        with pytest.raises(ValueError, match=rf"{name} must be in \[1, \d+\], got 0"):
            PagePool(SMALL, **sizes)
