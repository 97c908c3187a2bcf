"""The compiled MMA against the NumPy model, bit for bit, on random registers and on the cases that need care."""

import itertools

import numpy as np
import pytest
from numba import njit

from ptx_inline.emu.simt.mma import MmaTables, mma, mma_table, stack_tables
from ptx_inline.isa.arithmetic import NAN_BITS, mma_registers
from ptx_inline.isa.instructions import INSTRUCTIONS
from ptx_inline.isa.transcripts import input_registers, result_hash, transcripts

TILES = 2048
#: Every instruction with every triple of formats, and the index of each in the tables.
CASES = tuple(
    (key, a, b, sf)
    for key, description in INSTRUCTIONS.items()
    for a, b, sf in itertools.product(description.a_formats, description.b_formats, description.sf_formats or (None,))
)
INDEX = {case: index for index, case in enumerate(CASES)}
#: The MMAs whose arithmetic is another one before sm_90; their indices follow.
OLDER = tuple(case for case in CASES if INSTRUCTIONS[case[0]].numerics_before_sm_90)
TABLES = stack_tables([mma_table(*case) for case in CASES] + [mma_table(*case, "sm_80") for case in OLDER])
#: The default formats of each instruction, on which most of the work is spent.
MAIN = tuple(next(case for case in CASES if case[0] == key) for key in INSTRUCTIONS)
UE4M3, UE8M0 = (0x38383838, 0x7F7F7F7F)  # ones


@njit(nogil=True)
def compiled(tables, index, selectors, a, b, c, sfa, sfb, d):
    ba, ta, bb, tb = selectors
    for tile in range(a.shape[0]):
        mma(tables, index, ba, ta, bb, tb, a[tile], b[tile], c[tile], sfa[tile], sfb[tile], d[tile])


def run(case, a, b, c, sfa, sfb, selectors=(0, 0, 0, 0), target=None):
    """D bits (tiles, 32, 4), on registers as wide as the widest MMA's: what lies beyond must not matter."""
    pad = np.full((len(a), 32, 4), 0xDEADBEEF, np.uint32)
    wide_a, wide_b = np.concatenate([a, pad], -1)[..., :4], np.concatenate([b, pad], -1)[..., :4]
    d = np.full((len(a), 32, 4), 0x55555555, np.uint32)
    arrays = [np.ascontiguousarray(x) for x in (wide_a, wide_b, c, sfa, sfb)]
    compiled(TABLES, INDEX[case] if target is None else len(CASES) + OLDER.index(case), selectors, *arrays, d)
    return d


def model(case, a, b, c, sfa, sfb, selectors=(0, 0, 0, 0), target=None):
    key, a_format, b_format, sf_format = case
    scales = (sfa, sfb) if sf_format else ()
    names = ("byte_id_a", "thread_id_a", "byte_id_b", "thread_id_b")
    formats = {"a_format": a_format, "b_format": b_format, "sf_format": sf_format}
    ids = dict(zip(names, selectors, strict=True))
    return mma_registers(key, a, b, c.view(np.float32), *scales, **formats, **ids, target=target).view(np.uint32)


def words(rng, *shape):
    return rng.integers(0, 2**32, shape, dtype=np.uint32)


def registers(case, rng, tiles):
    """Arbitrary bits everywhere: a, b, c, sfa, sfb."""
    counts = INSTRUCTIONS[case[0]].registers
    a, b = words(rng, tiles, 32, counts["a"]), words(rng, tiles, 32, counts["b"])
    return [a, b, words(rng, tiles, 32, 4), words(rng, tiles, 32), words(rng, tiles, 32)]


def tame(case, rng, tiles):
    """Registers whose sums are mostly finite: no NaN in the scales, exponents of C and the 16-bit formats near 1."""
    a, b, c, sfa, sfb = registers(case, rng, tiles)
    if case[1] in ("f16", "bf16"):
        a, b = (x & np.uint32(0xBBFFBBFF if case[1] == "f16" else 0xBFFFBFFF) for x in (a, b))
    if case[1] in ("e4m3", "e5m2") or case[2] in ("e4m3", "e5m2"):
        a, b = (x & np.uint32(0xBBBBBBBB) for x in (a, b))
    mask = 0x07070707 if case[3] == "ue4m3" else 0x0F0F0F0F
    base = np.uint32(0x38383838 if case[3] == "ue4m3" else 0x70707070)
    sfa, sfb = ((x & np.uint32(mask)) + base for x in (sfa, sfb))
    field = (rng.integers(100, 140, c.shape, dtype=np.uint32)) << np.uint32(23)
    return [a, b, (c & np.uint32(0x807FFFFF)) | field, sfa, sfb]


def selectors(case):
    description = INSTRUCTIONS[case[0]]
    a = itertools.product(description.byte_ids, description.thread_ids_a)
    b = itertools.product(description.byte_ids, description.thread_ids_b)
    return [(*x, *y) for x, y in itertools.product(list(a), list(b))]


def seed(case):
    return np.random.default_rng(INDEX[case])


@pytest.mark.parametrize("case", MAIN, ids=lambda case: case[0])
@pytest.mark.parametrize("inputs", [registers, tame])
def test_main_instructions_equal_the_model(case, inputs):
    arrays = inputs(case, seed(case), TILES)
    result, expected = run(case, *arrays), model(case, *arrays)
    np.testing.assert_array_equal(result, expected)
    if inputs is tame:
        assert np.mean(expected == NAN_BITS) < 0.01
        assert len(np.unique(expected)) > expected.size // 4


@pytest.mark.parametrize("case", OLDER, ids=lambda case: case[0])
@pytest.mark.parametrize("inputs", [registers, tame])
def test_before_sm_90_equals_the_model(case, inputs):
    arrays = inputs(case, seed(case), TILES)
    result = run(case, *arrays, target="sm_80")
    np.testing.assert_array_equal(result, model(case, *arrays, target="sm_80"))
    if inputs is tame:
        assert np.mean(result != run(case, *arrays)) > 0.01


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(filter(None, case)))
def test_every_format_equals_the_model(case):
    for inputs in (registers, tame):
        arrays = inputs(case, seed(case), 48)
        np.testing.assert_array_equal(run(case, *arrays), model(case, *arrays))


@pytest.mark.parametrize("case", [c for c in CASES if c[3] and c[1] == c[2]], ids=lambda case: "-".join(case))
def test_every_selector_equals_the_model(case):
    arrays = tame(case, seed(case), 2)
    results = set()
    for choice in selectors(case):
        result = run(case, *arrays, choice)
        np.testing.assert_array_equal(result, model(case, *arrays, choice))
        results.add(result.tobytes())
    assert len(results) == len(selectors(case))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(filter(None, case)))
def test_zeros(case):
    """Rows, columns and groups of zeros of both signs beside numbers, C = +-0, scales of zero where there are."""
    rng = seed(case)
    a, b, c, sfa, sfb = tame(case, rng, 64)
    a[rng.random(a.shape) < 0.7] &= np.uint32(0x80008000 if case[1] in ("f16", "bf16") else 0x80808080)
    b[rng.random(b.shape) < 0.7] = 0
    a[:8] = 0
    c[rng.random(c.shape) < 0.7] &= np.uint32(0x80000000)
    sfa[rng.random(sfa.shape) < 0.3] &= np.uint32(0xFF00FFFF)
    result = run(case, a, b, c, sfa, sfb)
    np.testing.assert_array_equal(result, model(case, a, b, c, sfa, sfb))
    assert not np.any(result == 0x80000000)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(filter(None, case)))
def test_cancellation(case):
    """Each product against its negative, so that only what truncation left and C remain; then C against the sum."""
    a, b, c, sfa, sfb = tame(case, seed(case), 64)
    # the upper half of k repeats the lower half, with the signs of A flipped
    half_a, half_b = a.shape[-1] // 2, b.shape[-1] // 2
    bits = INSTRUCTIONS[case[0]].element_bits
    top = {4: 3, 8: {"e2m1": 5, "e2m3": 5, "e3m2": 5}.get(case[1], 7), 16: 15}[bits]
    sign = np.uint32(sum(1 << (top + bits * i) for i in range(32 // bits)))
    a[..., half_a:] = a[..., :half_a] ^ sign
    b[..., half_b:] = b[..., :half_b]
    sfa[:] = sfb[:] = UE4M3 if case[3] == "ue4m3" else UE8M0
    small = (c & np.uint32(0x807FFFFF)) | np.uint32(90 << 23)
    for addend in (np.zeros_like(c), small, c):
        result = run(case, a, b, addend, sfa, sfb)
        np.testing.assert_array_equal(result, model(case, a, b, addend, sfa, sfb))
        if not np.any(addend):
            assert not np.any(result)
    b[..., half_b:] = 0
    total = run(case, a, b, np.zeros_like(c), sfa, sfb)
    rest = run(case, a, b, total ^ np.uint32(0x80000000), sfa, sfb)
    np.testing.assert_array_equal(rest, model(case, a, b, total ^ np.uint32(0x80000000), sfa, sfb))
    assert not np.any(total == rest) or np.any(total == 0)


@pytest.mark.parametrize("case", MAIN, ids=lambda case: case[0])
def test_subnormal_and_overflowing_results(case):
    a, b, c, sfa, sfb = tame(case, seed(case), 128)
    subnormal = c & np.uint32(0x807FFFFF)
    if case[3]:
        tiny, huge = (np.full_like(sfa, x) for x in (0x01020304, 0x7D7E7C7B if case[3] == "ue4m3" else 0xFDFEFCFB))
        for left, right in itertools.product((tiny, huge), repeat=2):
            for addend in (subnormal, c):
                arrays = (a, b, addend, left, right)
                np.testing.assert_array_equal(run(case, *arrays), model(case, *arrays))
        if case[3] == "ue8m0":
            assert np.any(run(case, a, b, c, huge, huge) == 0x7F800000)
    if case[1] in ("f16", "bf16"):
        a = a & np.uint32(0x83FF83FF if case[1] == "f16" else 0x807F807F)
    arrays = (a, b, subnormal, sfa, sfb)
    np.testing.assert_array_equal(run(case, *arrays), model(case, *arrays))
    largest = np.full_like(c, 0x7F7FFFFF)
    arrays = (a, b, largest, sfa, sfb)
    np.testing.assert_array_equal(run(case, *arrays), model(case, *arrays))


@pytest.mark.parametrize("case", transcripts(), ids=lambda case: case.name)
def test_hardware_transcripts(case):
    """Hashes of what a physical sm_120 GPU computed."""
    formats = INSTRUCTIONS[case.mma].formats(case.a_format, case.b_format, case.sf_format)
    inputs = input_registers()
    arrays = (inputs["a"], inputs["b"], inputs["c"].view(np.uint32), inputs["sfa"], inputs["sfb"])
    d = run((case.mma, *formats), *(x[None].copy() for x in arrays), case.selectors)
    assert result_hash(d[0].view(np.float32)) == case.hash


def test_d_may_be_c():
    case = MAIN[0]
    a, b, c, sfa, sfb = tame(case, seed(case), 4)
    expected = model(case, a, b, c, sfa, sfb)
    compiled(TABLES, INDEX[case], (0, 0, 0, 0), *(np.ascontiguousarray(np.pad(x, ((0, 0), (0, 0), (0, 4)))[..., :4])
             for x in (a, b)), c, sfa, sfb, c)  # fmt: skip
    np.testing.assert_array_equal(c, expected)


def test_no_mma_has_tables_of_the_same_types():
    empty = stack_tables([])
    assert isinstance(empty, MmaTables)
    assert [(x.dtype, x.ndim) for x in empty] == [(x.dtype, x.ndim) for x in TABLES]
    assert empty.numbers.shape == (1, TABLES.numbers.shape[1])
    assert not any(np.any(x) for x in empty)


def test_equal_tables_are_kept_once():
    one, two = (stack_tables([mma_table("m16n8k16.f16")] * count) for count in (1, 2))
    assert one.values.size == two.values.size == 1 + 2**16
    np.testing.assert_array_equal(two.numbers[0], two.numbers[1])


def test_what_is_not_an_mma():
    with pytest.raises(ValueError, match="mma must be one of"):
        mma_table("m8n8k4")
    with pytest.raises(ValueError, match="a_format must be one of"):
        mma_table("m16n8k16.f16", "bf16")
