"""The arithmetic model, through fragment maps and selectors, against results read from a physical sm_120 GPU."""

import dataclasses

import numpy as np
import pytest

from ptx_inline.isa import arithmetic
from ptx_inline.isa.instructions import INSTRUCTIONS
from ptx_inline.isa.transcripts import document, input_registers, result_hash, transcripts

CASES = {case.name: case for case in transcripts()}


@pytest.mark.parametrize("name", CASES)
def test_model_reproduces_the_gpu(name):
    assert result_hash(CASES[name].compute()) == CASES[name].hash


def test_every_hash_is_a_case_and_every_blackwell_mma_is_covered():
    assert set(CASES) == set(document()["hashes"])
    assert len(CASES) == 18
    assert {case.mma for case in CASES.values()} == {key for key in INSTRUCTIONS if not key.startswith("m16n8k16.")}


def test_recipe_of_the_inputs():
    inputs = input_registers()
    # word 9 by hand: 9 * 2654435761 mod 2^32 = 2415085369, xor (9 >> 3) * 40503
    assert inputs["a"][9, 0] == 2415085369 ^ 40503
    assert inputs["a"].shape == (32, 4)
    assert inputs["b"].shape == (32, 2)
    # word 192, bytes 0 to 3: 123 + (7 * 192 + 3 b) mod 8 = 123, 126, 129, 124
    assert inputs["sfa"].view(np.uint8)[:4].tolist() == [123, 126, 129, 124]
    np.testing.assert_array_equal(inputs["c"][6], [3.0, 1.0, -2.0, 0.25])


def test_hash_sees_every_bit_of_every_lane():
    d = CASES["nvf4_4X_ue4m3_s0000"].compute()
    expected = result_hash(d)
    for lane, register in ((0, 0), (17, 2), (31, 3)):
        changed = d.copy()
        changed.view(np.uint32)[lane, register] ^= 1
        assert result_hash(changed) != expected


def reproduced(monkeypatch, **changes) -> int:
    """How many hashes a changed model reproduces; changes: functions of ``arithmetic`` by name."""
    with monkeypatch.context() as patch:
        for name, function in changes.items():
            patch.setattr(arithmetic, name, function)
        return sum(result_hash(case.compute()) == case.hash for case in CASES.values())


def test_hashes_tell_a_wrong_rounding(monkeypatch):
    def to_nearest(values):
        rounded = values.astype(np.float32) + np.float32(0)
        rounded.view(np.uint32)[np.isnan(values)] = arithmetic.NAN_BITS
        return rounded

    assert reproduced(monkeypatch) == len(CASES)
    assert reproduced(monkeypatch, _round_toward_zero=to_nearest) == len(CASES) - 9


@pytest.mark.parametrize("change", [-1, 1])
def test_hashes_tell_a_wrong_alignment_of_the_k32_kinds_only(monkeypatch, change):
    wrong = {}
    for key, found in INSTRUCTIONS.items():
        numerics = dataclasses.replace(found.numerics, fraction_bits=found.numerics.fraction_bits + change)
        wrong[key] = dataclasses.replace(found, numerics=numerics)
    with monkeypatch.context() as patch:
        patch.setattr(arithmetic, "instruction", wrong.__getitem__)
        failing = {case.mma for case in CASES.values() if result_hash(case.compute()) != case.hash}
    # the k64 cases do not tell 35 bits from 34 or 36: the module's docstring says so
    assert failing == {"m16n8k32.f8f6f4", "m16n8k32.mxf8f6f4.1x"}


def test_hashes_tell_a_wrong_container(monkeypatch):
    decode = arithmetic._decode

    def pad_bits_masked(codes, format, container=False):
        return decode(codes & np.uint8(0xFC) if container and format == "e2m1" else codes, format, container)

    with_e2m1 = sum("f8f6f4" in case.mma and "e2m1" in (case.a_format, case.b_format) for case in CASES.values())
    assert reproduced(monkeypatch, _decode=pad_bits_masked) == len(CASES) - with_e2m1
