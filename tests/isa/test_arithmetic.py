"""The NumPy model of the MMAs' arithmetic against an independent one in exact rational numbers, and by its own rules."""

import math
from fractions import Fraction

import numpy as np
import pytest

from ptx_inline.isa.arithmetic import NAN_BITS, mma, mma_registers, to_containers
from ptx_inline.isa.formats import FORMATS
from ptx_inline.isa.fragments import fragment
from ptx_inline.isa.instructions import INSTRUCTIONS

MIXES = [
    (key, a_format, b_format, sf_format)
    for key, found in INSTRUCTIONS.items()
    for a_format in found.a_formats
    for b_format in found.b_formats
    for sf_format in found.sf_formats or (None,)
]
#: mantissa bits, exponent bits, bias of the operands that are no code of ``FORMATS``
WIDE = {"f16": (10, 5, 15), "bf16": (7, 8, 127), "f32": (23, 8, 127)}


def parts(code: int, name: str) -> tuple[Fraction | float, int]:
    """(value, exponent) of a code; value is a float for NaN and Inf. Zeros have exponent -10^6."""
    if name in WIDE:
        mantissa_bits, exponent_bits, bias = WIDE[name]
        has_zero, special, sign_bit = True, (1 << exponent_bits) - 1, mantissa_bits + exponent_bits
    else:
        found = FORMATS[name]
        code &= (1 << found.bits) - 1
        if code in found.nan_codes:
            return math.nan, 0
        if code in found.inf_codes:
            return math.copysign(math.inf, -1.0 if code >> 7 else 1.0), 0
        mantissa_bits, exponent_bits, bias = found.mantissa_bits, found.exponent_bits, found.bias
        has_zero, special, sign_bit = found.has_zero, None, found.bits - 1 if found.signed else 99
    mantissa = code & ((1 << mantissa_bits) - 1)
    field = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    sign = -1 if code >> sign_bit & 1 else 1
    if field == special:
        return (math.nan if mantissa else sign * math.inf), 0
    subnormal = has_zero and field == 0
    exponent = (1 if subnormal else field) - bias
    value = sign * (Fraction(mantissa, 1 << mantissa_bits) + (not subnormal)) * Fraction(2) ** exponent
    return value, exponent if value else -(10**6)


def truncate(value: Fraction, unit: Fraction) -> Fraction:
    return math.trunc(value / unit) * unit


def rational_mma(key, a, b, c, sfa, sfb, a_format, b_format, sf_format, target=None) -> int:
    """Bits of one element of D, from code lists a, b (K), the bits c, scale bytes sfa, sfb."""
    found = INSTRUCTIONS[key].on(target)
    step = found.numerics.step or found.shape[2]
    for start in range(0, found.shape[2], step):
        part = slice(start, start + step)
        c = rational_step(found, a[part], b[part], c, sfa, sfb, a_format, b_format, sf_format)
    return c


def rational_step(found, a, b, c, sfa, sfb, a_format, b_format, sf_format) -> int:
    k, numerics = len(a), found.numerics
    c_value, c_exponent = parts(c, "f32")
    addends = [(c_value, c_exponent)]
    for start in range(0, k, numerics.group):
        products, exponents = [], []
        for i in range(start, start + numerics.group):
            (x, x_exponent), (y, y_exponent) = parts(a[i], a_format), parts(b[i], b_format)
            x, y = (float(v) if isinstance(w, float) else v for v, w in ((x, y), (y, x)))
            products.append(x * y)
            exponents.append(x_exponent + y_exponent)
        total = sum(products)
        exponent = exponents[0] if numerics.group == 1 else (0 if any(products) else -(10**6))
        if sf_format:
            for scale in (sfa[start // found.sf_vec_size], sfb[start // found.sf_vec_size]):
                value, scale_exponent = parts(scale, sf_format)
                total = total * (float(value) if isinstance(total, float) else value)
                exponent += scale_exponent
        addends.append((total, exponent))
    if any(isinstance(value, float) for value, _ in addends):
        total = sum(float(value) if isinstance(value, float) else 0.0 for value, _ in addends)
        return NAN_BITS if math.isnan(total) else (0x7F800000 if total > 0 else 0xFF800000)
    e_max = max(numerics.min_exponent, *(exponent for _, exponent in addends))
    total = sum(truncate(value, Fraction(2) ** (e_max - numerics.fraction_bits)) for value, _ in addends)
    return float32_bits_toward_zero(total)


def float32_bits_toward_zero(value: Fraction) -> int:
    magnitude, sign = abs(value), 0x80000000 if value < 0 else 0
    if magnitude >= Fraction(2) ** 128:
        return sign | 0x7F800000
    exponent = -126
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    units = math.trunc(magnitude / Fraction(2) ** (exponent - 23))
    bits = units if exponent == -126 else ((exponent + 127) << 23) + units - (1 << 23)
    return sign | bits if bits else 0


def random_operands(rng, key, a_format, b_format, sf_format, *, kind: str):
    """One tile; kind: "any" codes, "moderate" ones whose addends overlap, or "cancelling" (C near minus the product)."""
    found = INSTRUCTIONS[key]
    m, n, k = found.shape
    if found.element_bits == 16:
        if kind == "any":
            a, b = (rng.integers(0, 1 << 16, (rows, k), dtype=np.uint16) for rows in (m, n))
        else:
            a, b = (rng.standard_normal((rows, k)) for rows in (m, n))
            a, b = (encode_wide(x, a_format) for x in (a, b))
    else:
        a = rng.integers(0, 1 << FORMATS[a_format].bits, (m, k), dtype=np.uint8)
        b = rng.integers(0, 1 << FORMATS[b_format].bits, (n, k), dtype=np.uint8)
    scales = [None, None]
    if sf_format:
        low, high = (0, 256) if kind == "any" else {"ue8m0": (110, 140), "ue4m3": (0, 0x7F)}[sf_format]
        scales = [rng.integers(low, high, (rows, found.scales_per_row), dtype=np.uint8) for rows in (m, n)]
    if kind == "any":
        c = rng.integers(0, 1 << 32, (m, n), dtype=np.uint32).view(np.float32)
    else:
        c = (rng.standard_normal((m, n)) * np.exp2(rng.integers(-30, 30, (m, n)))).astype(np.float32)
    if kind == "cancelling":
        formats = {"a_format": a_format, "b_format": b_format, "sf_format": sf_format}
        product = mma(key, a, b, np.zeros((m, n), np.float32), *scales, **formats)
        c = np.where(np.isfinite(product), -product, c)
    return a, b, c, *scales


def encode_wide(values, name):
    if name == "f16":
        return values.astype(np.float16).view(np.uint16)
    return (values.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


@pytest.mark.parametrize("kind", ["any", "moderate", "cancelling"])
@pytest.mark.parametrize(("key", "a_format", "b_format", "sf_format"), MIXES)
def test_equal_to_rational_arithmetic(key, a_format, b_format, sf_format, kind):
    rng = np.random.default_rng([MIXES.index((key, a_format, b_format, sf_format)), len(kind)])
    formats = (a_format, b_format, sf_format)
    a, b, c, sfa, sfb = random_operands(rng, key, *formats, kind=kind)
    got = mma(key, a, b, c, sfa, sfb, a_format=a_format, b_format=b_format, sf_format=sf_format).view(np.uint32)
    for row, col in [(0, 0), (15, 7), *zip(rng.integers(0, 16, 14), rng.integers(0, 8, 14), strict=True)]:
        scales = (sfa[row].tolist(), sfb[col].tolist()) if sf_format else (None, None)
        bits = int(c.view(np.uint32)[row, col])
        expected = rational_mma(key, a[row].tolist(), b[col].tolist(), bits, *scales, *formats)
        assert int(got[row, col]) == expected, (row, col, hex(int(got[row, col])), hex(expected))


@pytest.mark.parametrize("kind", ["any", "moderate", "cancelling"])
@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_before_sm_90_equal_to_rational_arithmetic(name, kind):
    key = f"m16n8k16.{name}"
    rng = np.random.default_rng(len(kind))
    a, b, c, _, _ = random_operands(rng, key, name, name, None, kind=kind)
    got = mma(key, a, b, c, target="sm_86").view(np.uint32)
    bits = c.view(np.uint32)
    for row, col in np.ndindex(16, 8):
        operands = (a[row].tolist(), b[col].tolist(), int(bits[row, col]), None, None)
        expected = rational_mma(key, *operands, name, name, None, target="sm_86")
        assert int(got[row, col]) == expected, (row, col, hex(int(got[row, col])), hex(expected))
    if kind != "any":
        assert np.any(got != mma(key, a, b, c).view(np.uint32))


def test_before_sm_90_the_halves_of_k_are_added_one_after_the_other():
    key = "m16n8k16.f16"
    a, b, c = zeros(key)
    one, minus_one = (np.float16(x).view(np.uint16) for x in (1, -1))
    a[:, 0] = b[:] = one
    a[:8, 1] = a[8:, 8] = minus_one  # rows 0 to 7 cancel within a half, the others between the halves
    for exponent, within, between, today in ((-24, 2.0**-24, 0.0, 2.0**-24), (-25, 0.0, 0.0, 2.0**-25)):
        c[:] = 2.0**exponent
        for target in ("sm_80", "sm_86", "sm_87", "sm_89"):
            d = mma(key, a, b, c, target=target)
            assert (d[:8] == within).all()
            assert (d[8:] == between).all()
        for target in ("sm_90", "sm_90a", "sm_100a", "sm_120a", None):
            np.testing.assert_array_equal(mma(key, a, b, c, target=target), today)


@pytest.mark.parametrize(("key", "a_format", "b_format", "sf_format"), MIXES)
def test_registers_and_matrices_agree(key, a_format, b_format, sf_format):
    found = INSTRUCTIONS[key]
    rng = np.random.default_rng(3)
    formats = {"a_format": a_format, "b_format": b_format, "sf_format": sf_format}
    a, b, c, sfa, sfb = random_operands(rng, key, a_format, b_format, sf_format, kind="moderate")
    expected = mma(key, a, b, c, sfa, sfb, **formats)
    if found.element_bits == 8:
        a, b = to_containers(a, a_format), to_containers(b, b_format)
    selectors = {"byte_id_a": 0, "thread_id_a": 0, "byte_id_b": 0, "thread_id_b": 0}
    scales = (None, None)
    if sf_format:
        selectors = {
            "byte_id_a": found.byte_ids[-1],
            "thread_id_a": found.thread_ids_a[-1],
            "byte_id_b": found.byte_ids[0],
            "thread_id_b": found.thread_ids_b[2],
        }
        maps = (
            fragment(key, "SFA", byte_id=selectors["byte_id_a"], thread_id=selectors["thread_id_a"]),
            fragment(key, "SFB", byte_id=selectors["byte_id_b"], thread_id=selectors["thread_id_b"]),
        )
        # what is not selected is NaN, so reading it would show
        scales = tuple(found_map.pack(x, fill=0xFFFFFFFF)[:, 0] for found_map, x in zip(maps, (sfa, sfb), strict=True))
    to_c = fragment(key, "C")
    registers = to_c.pack(c.view(np.uint32)).view(np.float32)
    d = mma_registers(
        key, fragment(key, "A").pack(a), fragment(key, "B").pack(b), registers, *scales, **selectors, **formats
    )
    np.testing.assert_array_equal(to_c.unpack(d.view(np.uint32)), expected.view(np.uint32))


def zeros(key):
    found = INSTRUCTIONS[key]
    m, n, k = found.shape
    dtype = np.uint16 if found.element_bits == 16 else np.uint8
    scales = [np.full((rows, found.scales_per_row), 0x38, np.uint8) for rows in (m, n)] if found.sf_vec_size else []
    return [np.zeros((m, k), dtype), np.zeros((n, k), dtype), np.zeros((m, n), np.float32), *scales]


@pytest.mark.parametrize("key", INSTRUCTIONS)
def test_zero_operand_returns_c_and_never_minus_zero(key):
    operands = zeros(key)
    rng = np.random.default_rng(5)
    operands[2] = rng.standard_normal((16, 8)).astype(np.float32)
    np.testing.assert_array_equal(mma(key, *operands), operands[2])
    operands[2][:] = -0.0
    np.testing.assert_array_equal(mma(key, *operands).view(np.uint32), 0)


@pytest.mark.parametrize("key", INSTRUCTIONS)
def test_non_finite_c(key):
    operands = zeros(key)
    operands[2][0, :3] = [np.inf, -np.inf, np.nan]
    d = mma(key, *operands).view(np.uint32)
    assert d[0, :3].tolist() == [0x7F800000, 0xFF800000, NAN_BITS]
    assert not d[1:].any()


@pytest.mark.parametrize(("key", "nan"), [("m16n8k64.mxf4nvf4.4x", 0x7F), ("m16n8k32.mxf8f6f4.1x", 0xFF)])
def test_a_nan_scale_poisons_its_row_only_even_of_zero_codes(key, nan):
    operands = zeros(key)
    operands[3][4, -1] = nan
    d = mma(key, *operands).view(np.uint32)
    np.testing.assert_array_equal(d[4], NAN_BITS)
    assert not np.delete(d, 4, axis=0).any()


def test_top_bit_of_ue4m3_is_ignored():
    key = "m16n8k64.mxf4nvf4.4x"
    rng = np.random.default_rng(7)
    a, b, c, sfa, sfb = random_operands(rng, key, "e2m1", "e2m1", "ue4m3", kind="moderate")
    expected = mma(key, a, b, c, sfa, sfb)
    np.testing.assert_array_equal(mma(key, a, b, c, sfa | np.uint8(0x80), sfb), expected)


def test_bits_above_a_six_bit_container_are_ignored_and_pad_bits_are_not():
    key = "m16n8k32.f8f6f4"
    b = np.full((32, 2), 0x08080808, np.uint32)  # 1.0 in e2m3
    c = np.zeros((32, 4), np.float32)

    def first(byte, a_format):
        a = np.full((32, 4), byte * 0x01010101, np.uint32)
        return float(mma_registers(key, a, b, c, a_format=a_format, b_format="e2m3")[0, 0])

    assert first(0x08, "e2m3") == first(0xC8, "e2m3") == 32.0
    assert first(0x08, "e2m1") == first(0x48, "e2m1") == 32.0  # code 2 in bits [5:2]
    assert first(0x09, "e2m1") == 32 * 1.125  # E2M3 0x09


def test_c_far_below_the_products_is_truncated_at_35_bits():
    key = "m16n8k64.mxf4nvf4.4x"
    a, b, c, sfa, sfb = zeros(key)
    a[:, 0], b[:, 0] = 2, 2  # 1 * 1, minus the same: the group cancels but keeps its exponent 0
    a[:, 1], b[:, 1] = 2, 10
    c[:] = 2.0**-35 + 2.0**-36
    np.testing.assert_array_equal(mma(key, a, b, c, sfa, sfb), 2.0**-35)
    a[:] = 0  # without any product C is kept whole
    np.testing.assert_array_equal(mma(key, a, b, c, sfa, sfb), c)


def test_sums_round_toward_zero_and_overflow_to_infinity():
    key = "m16n8k16.f16"
    a, b, c = zeros(key)
    a[:, 0] = b[:, 0] = np.float16(1).view(np.uint16)
    c[:, 0::2], c[:, 1::2] = -(2.0**24) - 2, 2.0**25
    d = mma(key, a, b, c)
    np.testing.assert_array_equal(d[:, 0::2], -(2.0**24))  # -16777217 is no float32
    np.testing.assert_array_equal(d[:, 1::2], 2.0**25)
    key = "m16n8k16.bf16"
    big = np.uint16(0x5F80)  # 2^64
    a, b = np.full((16, 16), big), np.full((8, 16), big)
    np.testing.assert_array_equal(mma(key, a, b, np.zeros((16, 8), np.float32)), np.inf)
    c[:] = np.finfo(np.float32).max
    a[:], b[:] = 0, 0
    a[:, 0] = b[:, 0] = np.uint16(0x3F80)
    np.testing.assert_array_equal(mma(key, a, b, c), np.finfo(np.float32).max)


def test_batches_broadcast_and_pieces_do_not_show():
    key = "m16n8k64.mxf4nvf4.4x"
    rng = np.random.default_rng(11)
    a = rng.integers(0, 16, (60, 1, 16, 64), dtype=np.uint8)
    b = rng.integers(0, 16, (9, 8, 64), dtype=np.uint8)
    sfa = rng.integers(0, 0x7F, (60, 1, 16, 4), dtype=np.uint8)
    sfb = rng.integers(0, 0x7F, (9, 8, 4), dtype=np.uint8)
    c = np.float32(0.5) * np.ones((16, 8), np.float32)
    d = mma(key, a, b, c, sfa, sfb)
    assert d.shape == (60, 9, 16, 8)
    for i, j in ((0, 0), (31, 4), (59, 8)):
        np.testing.assert_array_equal(d[i, j], mma(key, a[i, 0], b[j], c, sfa[i, 0], sfb[j]))
    assert mma(key, a[:0], b, c, sfa[:0], sfb).shape == (0, 9, 16, 8)


def test_wrong_operands():
    key = "m16n8k64.mxf4nvf4.4x"
    a, b, c, sfa, sfb = zeros(key)
    with pytest.raises(TypeError, match="a must be of dtype uint8, got int64"):
        mma(key, a.astype(np.int64), b, c, sfa, sfb)
    with pytest.raises(TypeError, match="c must be of dtype float32, got float64"):
        mma(key, a, b, c.astype(np.float64), sfa, sfb)
    with pytest.raises(ValueError, match=r"b must have the shape \(..., 8, 64\), got \(64, 8\)"):
        mma(key, a, b.T, c, sfa, sfb)
    with pytest.raises(ValueError, match="sfa and sfb must be given"):
        mma(key, a, b, c, sfa)
    with pytest.raises(ValueError, match="a must hold 4-bit e2m1 codes, got 0x10"):
        mma(key, a + np.uint8(16), b, c, sfa, sfb)
    with pytest.raises(ValueError, match="sf_format must be one of ue4m3, ue8m0"):
        mma(key, a, b, c, sfa, sfb, sf_format="e4m3")
    with pytest.raises(ValueError, match="which has no scales"):
        mma("m16n8k16.f16", *zeros("m16n8k16.f16"), sfa, sfb)
    with pytest.raises(ValueError, match="select scales"):
        mma_registers(
            "m16n8k32.f8f6f4",
            np.zeros((32, 4), np.uint32),
            np.zeros((32, 2), np.uint32),
            np.zeros((32, 4), np.float32),
            byte_id_a=1,
        )
    with pytest.raises(ValueError, match="format must be one of e2m1"):
        to_containers(a, "f16")
