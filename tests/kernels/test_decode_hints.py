"""What the decode kernel reads before the kernel ahead of it is done may be anything: no result depends on it."""

import re

import numpy as np
import pytest
from decode_problems import Built, Call, run
from devices import EmulatedDevice, GpuDevice

import nbfmha
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


def make_late():
    """Lets the next kernel begin, and writes when that one has long read."""
    from numba import cuda

    from ptx_inline import device as dev

    def late(target, source, count):
        dev.griddepcontrol_launch_dependents()
        for _ in range(100):
            cuda.nanosleep(1000)
        i = cuda.grid(1)
        if i < count:
            target[i] = source[i]

    return late


LATE = Kernel(make_late, ("i32*", "i32*", "i32"))


@pytest.mark.gpu
@pytest.mark.parametrize("value", [0, -1, 10**9])
@pytest.mark.parametrize("which", ["seq_ids", "lengths", "block_tables"])
def test_what_the_kernel_ahead_writes_late_counts(gpu, which, value):
    """On sm_90 and newer, where decode begins while the kernel ahead still runs."""
    device, (q, k, v) = GpuDevice(gpu), CALL.inputs()
    built = Built(CALL, k, v)
    cache, ids, q = built.on(device, CALL), device.to_device(built.slots.astype(np.int32)), device.to_device(q)
    options = {"num_splits": CALL.num_splits, "return_lse": True, "impl": "dequant"}
    expected = nbfmha.decode(q, cache, ids, **options)
    target = ids if which == "seq_ids" else getattr(cache.arrays, which)
    kept = target.clone()
    target.fill_(min(value, 0) if which == "block_tables" else value)  # tables have pages, or -1, at all times
    gpu.cuda.synchronize()
    LATE.launch((-(-kept.numel() // 256),), (256,), (target, kept, kept.numel()))
    got = nbfmha.decode(q, cache, ids, **options)
    gpu.cuda.synchronize()
    assert all(gpu.equal(x, y) for x, y in zip(got, expected, strict=True))
