"""The decode kernel's machine code for Hopper, outside of its loop: what all warps wait for, as far as it can be read."""

import re
from itertools import pairwise

import pytest

from nbfmha.kernels.decode import decode_kernel
from nbfmha.steady_loop import INSTRUCTION

REGISTER = re.compile(r"\bR\d+\b")


@pytest.fixture(scope="module", params=[(4, 1), (4, 4), (16, 1)], ids="warps, teams = {0[0]}, {0[1]}".format)
def code(request):
    sass = decode_kernel("dequant", 128, "bfloat16", 1, False, "tile", *request.param).sass("sm_90a")
    return [(found[2], found[3]) for found in INSTRUCTION.finditer(sass)]


def find(code, opcode, first=0):
    return [i for i in range(first, len(code)) if code[i][0].startswith(opcode)]


def read_between(code, first, last):
    """Registers that the instructions behind ``first`` read, up to ``last``."""
    return {name for i in range(first + 1, last + 1) for name in REGISTER.findall(code[i][1].partition(",")[2])}


def target(code, load):
    return REGISTER.search(code[load][1])[0]


def test_the_slot_is_asked_for_before_all_else(code):
    """CTAs that begin when the call ahead merges its splits have no time for the 125 instructions that came before it."""
    (wait,) = find(code, "ACQBULK")
    slot, *others = find(code[:wait], "LDG")
    assert slot < 65  # teams of a CTA divide first, to find out what they have
    assert len(others) == 2, "length and page"
    assert target(code, slot) in read_between(code, slot, others[0])


def test_what_does_not_depend_on_each_other_is_asked_for_together(code):
    """After the wait: slot, length and page where the slot was read early; else length and page, once the slot is there. An
    instruction that a predicate skips waits for its operands too."""
    (wait,) = find(code, "ACQBULK")
    loads = [i for i in find(code, "LDG.E", wait) if code[i][0] == "LDG.E"]
    late_slot, *together = loads[:4]
    assert target(code, late_slot) == target(code, together[0])
    for one, other in pairwise(together):
        assert not {target(code, load) for load in together} & read_between(code, one, other)
    length, page = sorted(loads[4:6], key=lambda load: target(code, load) != target(code, together[1]))
    assert (target(code, length), target(code, page)) == (target(code, together[1]), target(code, together[2]))
    assert not {target(code, length), target(code, page)} & read_between(code, min(length, page), max(length, page))


def test_queries_and_km_are_asked_for_before_any_keys(code):
    """Else they would come behind the first tiles of all warps, which wait for them."""
    (wait,) = find(code, "ACQBULK")
    copies = find(code, "LDGSTS", wait)
    assert [code[i][0] for i in copies[:3]] == ["LDGSTS.E.BYPASS.128.ZFILL", *["LDGSTS.E.BYPASS.128"] * 2]
    first_keys = copies[3]
    assert find(code, "LDGDEPBAR", copies[2])[0] < first_keys, "a group of their own"
    assert not find(code[:first_keys], "BAR.SYNC")


def test_the_last_cta_asks_for_the_others_results_at_once(code):
    """Which rows they are was worked out before the ticket, while it waited."""
    (ticket,) = find(code, "ATOMG")
    last = find(code, "LDG.E.128", ticket)[3]
    assert last - ticket <= 60
