"""What the decode kernel reads before the kernel ahead of it is done may be anything: no result depends on it."""

import re

import numpy as np
import pytest
from decode_problems import Call, run
from devices import EmulatedDevice

from nbfmha.kernels.decode import decode_kernel
from ptx_inline.toolchain import Kernel

EARLY_LOAD = re.compile(r"ld\.relaxed\.gpu\.global\.s32\s+(%r\d+), \[[^\]]*\];")
CALL = Call((300, 81), num_splits=9)


@pytest.fixture(scope="module")
def device():
    return EmulatedDevice("sm_90a")


@pytest.fixture(scope="module")
def undisturbed(device):
    return run(device, CALL)[:2]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120a"])
@pytest.mark.parametrize("pages", ["tile", "tiles", "blocks"])
def test_slot_page_and_length_are_read_early_where_a_kernel_may_begin_early(arch, pages):
    ptx = decode_kernel("dequant", 64, pages=pages).ptx(arch)
    expected = 3 if arch != "sm_80" and pages != "blocks" else 0
    assert len(EARLY_LOAD.findall(ptx)) == expected
    assert ptx.count("cp.async.bulk.prefetch.L2") == (2 if expected else 0)


@pytest.mark.parametrize("value", [0, 1, 2, 10**9, -1, -(2**31)])
@pytest.mark.parametrize("which", range(3))
def test_whatever_is_read_early_the_result_is_the_same(device, undisturbed, which, value, monkeypatch):
    """Slot, page or length: of another sequence, stale, or memory that nobody has written; the emulator lets no load leave
    its array."""
    plain, replaced = Kernel.ptx, []

    def ptx(kernel, target):
        numbers = iter(range(3))

        def replace(match):
            if next(numbers) != which:
                return match[0]
            replaced.append(match[0])
            return f"mov.u32 {match[1]}, {value};"

        return EARLY_LOAD.sub(replace, plain(kernel, target))

    monkeypatch.setattr(Kernel, "ptx", ptx)
    out, lse = run(device, CALL)[:2]
    assert replaced
    np.testing.assert_array_equal(out, undisturbed[0])
    np.testing.assert_array_equal(lse, undisturbed[1])
