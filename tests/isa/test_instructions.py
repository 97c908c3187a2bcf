"""The instruction registry: complete, frozen, and consistent with the fragment maps."""

import dataclasses
import re

import numpy as np
import pytest

from ptx_inline.isa.formats import FORMATS
from ptx_inline.isa.fragments import fragment
from ptx_inline.isa.instructions import INSTRUCTIONS, instruction


@pytest.mark.parametrize("key", INSTRUCTIONS)
def test_description_agrees_with_itself_and_its_mnemonic(key):
    found = instruction(key)
    m, n, k = found.shape
    assert found.key == key
    assert key.startswith(f"m{m}n{n}k{k}.")
    assert found.mnemonic.startswith(f"mma.sync.aligned.m{m}n{n}k{k}.row.col.")
    vector = re.search(r"\.scale_vec::(\d)X\.", found.mnemonic)
    if found.sf_vec_size:
        assert int(vector[1]) == found.scales_per_row == k // found.sf_vec_size
        assert found.mnemonic.endswith(f".f32.{found.sf_formats[0]}")
        # the selected bytes lie inside the word
        assert max(found.byte_ids) + found.scales_per_row <= 4
    else:
        assert vector is None
        assert found.scales_per_row == 0
        assert found.mnemonic.endswith(".f32")
    assert found.numerics.fraction_bits > 23
    assert k % found.numerics.group == 0
    assert found.min_target == found.min_targets[0]
    assert found.source


@pytest.mark.parametrize("key", INSTRUCTIONS)
def test_registers_are_those_of_the_fragments(key):
    found = instruction(key)
    for operand in "ABC":
        assert found.registers[operand.lower()] == fragment(key, operand).registers
        values = fragment(key, operand).register.size
        assert values * fragment(key, operand).element_bits == 32 * found.registers[operand.lower()]
    assert found.registers["d"] == 4
    for operand in ("sfa", "sfb"):
        assert found.registers[operand] == (1 if found.sf_vec_size else 0)


def test_operand_formats_fit_their_elements():
    for found in INSTRUCTIONS.values():
        for name in (*found.a_formats, *found.b_formats):
            if found.element_bits < 16:
                assert FORMATS[name].bits <= found.element_bits
        for name in found.sf_formats:
            assert not FORMATS[name].signed


def test_known_mnemonics():
    names = {key: found.mnemonic for key, found in INSTRUCTIONS.items()}
    assert names["m16n8k64.mxf4nvf4.4x"] == (
        "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3"
    )
    assert names["m16n8k16.f16"] == "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
    mixed = instruction("m16n8k32.mxf8f6f4.1x").ptx_name("e4m3", "e2m1")
    assert mixed == ("mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e2m1.f32.ue8m0")
    assert len(set(names.values())) == len(INSTRUCTIONS)


def test_registry_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        instruction("m16n8k16.f16").key = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        instruction("m16n8k16.f16").numerics.group = 2
    assert np.unique([found.key for found in INSTRUCTIONS.values()]).size == len(INSTRUCTIONS)


def test_numerics_go_by_the_target():
    older = {key for key, found in INSTRUCTIONS.items() if found.on("sm_89").numerics != found.numerics}
    assert older == {"m16n8k16.f16", "m16n8k16.bf16"}
    for target in ("sm_90", "sm_100a", "sm_120a", None):
        assert all(found.on(target) is found for found in INSTRUCTIONS.values())
    numerics = instruction("m16n8k16.f16").on("sm_80").numerics
    assert (numerics.step, numerics.fraction_bits, numerics.min_exponent) == (8, 24, -132)


def test_errors_name_what_is_allowed():
    with pytest.raises(ValueError, match=r"mma must be one of m16n8k64.mxf4nvf4.4x, .*got 'nothing'"):
        instruction("nothing")
    with pytest.raises(ValueError, match=r"a_format must be one of e2m1 for m16n8k64.mxf4.2x, got 'e4m3'"):
        instruction("m16n8k64.mxf4.2x").ptx_name(a_format="e4m3")
    with pytest.raises(ValueError, match=r"sf_format must be one of none for m16n8k16.f16, got 'ue8m0'"):
        instruction("m16n8k16.f16").formats(sf_format="ue8m0")
