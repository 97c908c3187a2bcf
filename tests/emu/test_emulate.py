"""The emulator's front: arguments in and out, workers, entries, launches that do not fit, and the profile's figures."""

import re

import numpy as np
import pytest

from ptx_inline.emu import (
    Breakpoint,
    MemoryAccessError,
    Output,
    RaceError,
    TrapError,
    UninitializedReadError,
    emulate,
    stops,
)

HEAD = ".version 8.8\n.target sm_120a\n.address_size 64\n"
REGISTERS = ".reg .pred %p;\n.reg .b32 %r<8>;\n.reg .f32 %f<4>;\n.reg .b64 %d<6>;\n"
#: %r0: number of the thread in the grid.
THREAD = "mov.u32 %r1, %ctaid.x;\nmov.u32 %r2, %ntid.x;\nmov.u32 %r3, %tid.x;\nmad.lo.u32 %r0, %r1, %r2, %r3;\n"


def entry(name, parameters, body):
    declared = ", ".join(f".param .{type} {parameter}" for parameter, type in parameters.items())
    return f".visible .entry {name}({declared})\n{{\n{REGISTERS}{THREAD}{body}ret;\n}}\n"


def access(parameter, size=4, index="%r0", register="%d1"):
    return f"ld.param.u64 {register}, [{parameter}];\nmad.wide.u32 {register}, {index}, {size}, {register};\n"


#: target[i] = source[i] * 3 + bias, for i < count.
SCALE = entry(
    "scale",
    {"source": "u64", "target": "u64", "bias": "u32", "count": "u32"},
    "ld.param.u32 %r4, [count];\nsetp.ge.u32 %p, %r0, %r4;\n@%p ret;\n"
    + access("source")
    + access("target", register="%d2")
    + "ld.param.u32 %r5, [bias];\nld.global.u32 %r6, [%d1];\nmad.lo.u32 %r6, %r6, 3, %r5;\nst.global.u32 [%d2], %r6;\n",
)
NOTHING = entry("nothing", {}, "")
SOURCE = np.arange(1000, 1500, dtype=np.uint32)


def scale(source=SOURCE, target=None, bias=7, count=500, grid=(8,), **options):
    target = Output((500,), np.uint32) if target is None else target
    return emulate(HEAD + SCALE, grid, (64,), (source, target, bias, count), **options)


# arguments and results


def test_outputs_are_new_arrays_and_the_callers_are_unchanged():
    target = np.zeros((20, 25), np.int32)
    run = scale(target=target)
    source_out, target_out, bias, count = run.outputs
    np.testing.assert_array_equal(target_out, (SOURCE.astype(np.int32) * 3 + 7).reshape(20, 25))
    assert target_out.dtype == np.int32
    np.testing.assert_array_equal(source_out, SOURCE)
    assert source_out is not SOURCE
    assert not target.any()
    assert (bias, count) == (7, 500)
    assert run.unwritten == {}


def test_the_same_array_twice_is_one_buffer():
    array = SOURCE.copy()
    first, second = scale(source=array, target=array).outputs[:2]
    np.testing.assert_array_equal(first, SOURCE * 3 + 7)
    np.testing.assert_array_equal(second, first)
    np.testing.assert_array_equal(array, SOURCE)


def test_one_output_twice_is_one_buffer():
    output = Output((500,), np.uint32)
    with pytest.raises(UninitializedReadError, match="read of memory that nobody has written") as error:
        scale(source=output, target=output)
    assert "of argument 0" in str(error.value)


def test_what_nobody_wrote_of_an_output_is_counted_and_poisoned():
    run = scale(target=Output((500,), np.uint32), count=300)
    assert run.unwritten == {1: 800}
    np.testing.assert_array_equal(run.outputs[1][:300], SOURCE[:300] * 3 + 7)
    assert np.all(run.outputs[1][300:] == 0xCDCDCDCD)
    assert scale().unwritten == {1: 0}


def test_scalars_of_every_kind_reach_the_kernel():
    parameters = {"out": "u64", "a": "s32", "b": "u64", "c": "f32", "d": "f64", "e": "u16", "f": "u8"}
    body = "ld.param.u64 %d1, [out];\n.reg .b16 %h<2>;\n.reg .f64 %e<2>;\n"
    for number, (name, register, type, store) in enumerate(
        [("a", "%r4", "s32", "s32"), ("b", "%d2", "u64", "u64"), ("c", "%f0", "f32", "f32"), ("d", "%e0", "f64", "f64"),
         ("e", "%h0", "u16", "u16"), ("f", "%h1", "u8", "u8")]
    ):  # fmt: skip
        body += f"ld.param.{type} {register}, [{name}];\nst.global.{store} [%d1+{8 * number}], {register};\n"
    given = (-5, 2**64 - 1, 0.1, np.float64(0.1), np.uint16(40000), 255)
    text = HEAD + entry("scalars", parameters, body)
    run = emulate(text, (1,), (1,), (np.zeros(6, np.uint64), *given))
    slots = run.outputs[0]
    assert slots[:1].view(np.int32)[0] == -5
    assert slots[1] == 2**64 - 1
    assert slots[2:3].view(np.float32)[0] == np.float32(0.1)
    assert slots[3:4].view(np.float64)[0] == 0.1
    assert (slots[4], slots[5]) == (40000, 255)
    assert run.outputs[1:] == given


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"source": SOURCE[::2]}, ValueError, r"argument 0 must be C-contiguous, got strides \(8,\)"),
        ({"source": None}, TypeError, "argument 0 must be an integer, a NumPy array or an Output, got NoneType"),
        ({"bias": SOURCE}, TypeError, "argument 2 must be a number, as the kernel declares it, got an array"),
        ({"bias": 2**32}, ValueError, "argument 2 must fit 32 bits, got 4294967296"),
        ({"source": np.array([None])}, TypeError, "argument 0 must be an array of numbers, got dtype object"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changed, error, message):
    with pytest.raises(error, match=message):
        scale(**changed)


def test_arrays_that_overlap_are_refused():
    with pytest.raises(ValueError, match="argument 1 must be the same array as argument 0 or share no memory with it"):
        scale(source=SOURCE, target=SOURCE[:])


def test_the_number_of_arguments_must_fit():
    with pytest.raises(ValueError, match="arguments must be 4 for scale, got 1"):
        emulate(HEAD + SCALE, (1,), (1,), (SOURCE,))


# workers


def test_workers_change_neither_outputs_nor_counts():
    one, two, all_cores = scale(workers=1), scale(workers=2), scale()
    for other in (two, all_cores):
        np.testing.assert_array_equal(other.outputs[1], one.outputs[1])
        np.testing.assert_array_equal(other.profile.counts, one.profile.counts)
        assert other.unwritten == one.unwritten
    assert one.profile.ctas == 8


def test_the_first_failing_cta_is_reported_by_one_worker():
    with pytest.raises(MemoryAccessError) as error:
        scale(source=SOURCE[:100].copy(), workers=1)
    assert (error.value.cta, error.value.warp, error.value.lane) == ((1, 0, 0), 1, 4)
    assert error.value.text == "ld.global.u32 %r6, [%d1];"
    assert "4 bytes out of bounds: byte 400 of the 400 bytes of argument 0" in str(error.value)


def test_a_failure_ends_every_worker():
    with pytest.raises(MemoryAccessError, match="of the 400 bytes of argument 0"):
        scale(source=SOURCE[:100].copy(), workers=2)


def test_a_race_names_both_threads():
    """Every thread writes word 0: the second to come is told who the first was."""
    text = HEAD + entry("race", {"out": "u64"}, access("out", index="0") + "st.global.u32 [%d1], %r0;\n")
    with pytest.raises(RaceError) as error:
        emulate(text, (1,), (64,), (Output((1,), np.uint32),))
    message = str(error.value)
    assert re.search(r"data race: write to a byte that warp 0 lane \d+ of CTA \(0, 0, 0\) has written", message)
    assert "byte 0 of the 4 bytes of argument 0" in message
    assert error.value.address is not None


@pytest.mark.parametrize(("workers", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_workers_must_be_a_positive_integer(workers, error):
    with pytest.raises(error, match="workers must be"):
        scale(workers=workers)


# which kernel, which launch


def test_entry_picks_one_of_several():
    text = HEAD + NOTHING + SCALE
    arguments = (SOURCE, Output((500,), np.uint32), 0, 500)
    np.testing.assert_array_equal(emulate(text, (8,), (64,), arguments, entry="scale").outputs[1], SOURCE * 3)
    assert emulate(text, (1,), (32,), (), entry="nothing").outputs == ()
    for name in (None, "other"):
        with pytest.raises(ValueError, match=f"entry must be one of nothing, scale, got {name!r}"):
            emulate(text, (1,), (32,), (), entry=name)


def test_a_kernel_object_is_asked_for_the_targets_ptx():
    asked = []

    class Kernel:
        def ptx(self, target):
            asked.append(target)
            return HEAD.replace("sm_120a", target) + SCALE

    kernel, arguments = Kernel(), (SOURCE, Output((500,), np.uint32), 7, 500)
    for options in ((), ("sm_90a",)):
        np.testing.assert_array_equal(emulate(kernel, (8,), (64,), arguments, *options).outputs[1], scale().outputs[1])
    at = next(stops(kernel, (8,), (64,), arguments, "sm_80", breakpoints=[Breakpoint(warp=1)]))
    assert at.warp == 1
    assert asked == ["sm_120a", "sm_90a", "sm_80"]


@pytest.mark.parametrize("kernel", [None, 3, b"text"])
def test_other_things_are_no_kernel(kernel):
    with pytest.raises(TypeError, match=rf"must be PTX text or have a ptx\(arch\) method, got {type(kernel).__name__}"):
        emulate(kernel, (1,), (32,), ())


@pytest.mark.parametrize(
    ("grid", "block", "error", "message"),
    [
        (8, (32,), TypeError, "grid must be a tuple of one to three sizes, got 8"),
        ((1, 1, 1, 1), (32,), TypeError, "grid must be a tuple of one to three sizes"),
        ((0,), (32,), ValueError, "grid must be at least 1, got 0"),
        ((1,), (32.0,), TypeError, "block must be an integer, got float"),
        ((1,), (32, 33), ValueError, r"block must have at most 1024 threads, got \(32, 33, 1\)"),
        ((2**14, 2**14), (1,), ValueError, "grid must have fewer than"),
    ],
)
def test_launches_that_no_gpu_takes_are_refused(grid, block, error, message):
    with pytest.raises(error, match=message):
        emulate(HEAD + NOTHING, grid, block, ())


def test_grid_and_block_have_three_dimensions():
    body = (
        "mov.u32 %r4, %tid.z;\nmov.u32 %r5, %ntid.y;\nmov.u32 %r6, %tid.y;\nmad.lo.u32 %r4, %r4, %r5, %r6;\n"
        "mad.lo.u32 %r4, %r4, %r2, %r3;\nmov.u32 %r5, %ctaid.y;\nmov.u32 %r6, %ctaid.z;\nmad.lo.u32 %r5, %r6, 3, %r5;\n"
        "mad.lo.u32 %r5, %r5, 2, %r1;\nmad.lo.u32 %r4, %r5, 40, %r4;\n"
        + access("out", index="%r4")
        + "st.global.u32 [%d1], %r5;\n"
    )
    run = emulate(HEAD + entry("corners", {"out": "u64"}, body), (2, 3, 4), (5, 4, 2), (Output((24, 40), np.uint32),))
    np.testing.assert_array_equal(run.outputs[0], np.repeat(np.arange(24)[:, None], 40, axis=1))
    assert run.unwritten == {0: 0}
    assert run.profile.ctas == 24


SHARED = HEAD + ".extern .shared .align 16 .b8 dynamic[];\n" + entry(
    "shared",
    {"out": "u64"},
    "mov.u32 %r4, dynamic;\nmad.lo.u32 %r4, %r3, 4, %r4;\nst.shared.u32 [%r4], %r0;\nld.shared.u32 %r5, [%r4];\n"
    + access("out")
    + "st.global.u32 [%d1], %r5;\n",
)  # fmt: skip


def test_dynamic_shared_memory_is_as_large_as_asked():
    output = Output((64,), np.uint32)
    np.testing.assert_array_equal(emulate(SHARED, (1,), (64,), (output,), smem_bytes=256).outputs[0], np.arange(64))
    with pytest.raises(MemoryAccessError, match="4 bytes at shared address 0xfc are outside its 252 bytes") as error:
        emulate(SHARED, (1,), (64,), (output,), smem_bytes=252)
    assert (error.value.warp, error.value.lane, error.value.address) == (1, 31, 252)


@pytest.mark.parametrize(("target", "limit"), [("sm_120a", 99), ("sm_90a", 227), ("sm_80", 163), ("sm_86", 99)])
def test_shared_memory_is_bounded_by_the_target(target, limit):
    text = SHARED.replace("sm_120a", target)
    emulate(text, (1,), (32,), (Output((32,), np.uint32),), smem_bytes=limit * 1024)
    message = f"shared memory must be at most {limit * 1024} bytes on {target}, got {limit * 1024 + 4}"
    with pytest.raises(ValueError, match=message):
        emulate(text, (1,), (32,), (Output((32,), np.uint32),), smem_bytes=limit * 1024 + 4)


def test_an_endless_kernel_is_ended():
    text = HEAD + entry("endless", {}, "again:\nadd.u32 %r4, %r4, 1;\nbra again;\n")
    with pytest.raises(TrapError, match="has executed 1000 warp instructions without ending"):
        emulate(text, (1,), (32,), (), max_instructions=1000)


def test_breakpoints_and_on_stop_belong_together():
    for options in ({"breakpoints": [Breakpoint(line=1)]}, {"on_stop": print}):
        with pytest.raises(ValueError, match="breakpoints and on_stop must be given together, or neither"):
            scale(**options)


# profile


def strided(stride, space):
    """One warp loads a word a lane, ``stride`` bytes apart."""
    if space == "global":
        return access("data", size=stride) + "ld.global.u32 %r4, [%d1];\n"
    address = f".shared .align 4 .b8 tile[4096];\nmov.u32 %r4, tile;\nmad.lo.u32 %r4, %r3, {stride}, %r4;\n"
    return address + "st.shared.u32 [%r4], %r3;\n"


@pytest.mark.parametrize(
    ("space", "stride", "transactions", "ideal"),
    [
        ("global", 4, 4, 4), ("global", 8, 8, 4), ("global", 32, 32, 4), ("global", 128, 32, 4),
        ("shared", 4, 1, 1), ("shared", 8, 2, 1), ("shared", 64, 16, 1), ("shared", 128, 32, 1), ("shared", 68, 1, 1),
    ],
)  # fmt: skip
def test_transactions_of_strided_accesses(space, stride, transactions, ideal):
    """32-byte sectors and passes over 32 banks of 4 bytes, by hand."""
    text = HEAD + entry("strided", {"data": "u64"}, strided(stride, space))
    profile = emulate(text, (3,), (32,), (np.zeros(1024 * 3, np.uint32),)).profile
    (found,) = [one for one in profile.accesses() if one.space == space]
    assert (found.requests, found.transactions, found.ideal) == (3, 3 * transactions, 3 * ideal)
    assert found.excess == transactions / ideal
    assert profile.bank_conflicts == (3 * (transactions - ideal) if space == "shared" else 0)
    assert profile.coalescing == (transactions / ideal if space == "global" else 1.0)


def test_instructions_are_counted_by_class_opcode_and_lane():
    profile = scale().profile
    # 16 warps; the guarded ret is issued by all and executed by 12 lanes; the last 12 threads of 512 do no more
    assert profile.warp_instructions == 16 * 16
    assert profile.lane_instructions == 512 * 6 + 12 + 500 * 9
    assert profile.opcodes()["mad.lo.u32"] == 2 * 16
    assert profile.opcodes()["ret"] == 2 * 16
    assert sum(profile.opcodes().values()) == profile.warp_instructions
    counts = {one.name: (one.warp_instructions, one.lane_instructions) for one in profile.by_class()}
    assert counts["branch"] == (32, 512)
    assert counts["store"] == (16, 500)
    assert counts["compare"] == (16, 512)
    assert sum(warp for warp, _ in counts.values()) == profile.warp_instructions
    assert [one.space for one in profile.accesses()] == ["global", "global"]
    assert profile.seconds > 0
    assert profile.lane_instructions_per_second == profile.lane_instructions / profile.seconds
    assert repr(profile).startswith("Profile(CTAs: 8, 256 warp instructions: ")
    assert repr(profile).endswith("0 bank conflicts, 1.00 x the fewest sectors)")


def test_a_run_without_accesses_has_a_profile_too():
    profile = emulate(HEAD + NOTHING, (1,), (32,), ()).profile
    assert profile.accesses() == []
    assert (profile.bank_conflicts, profile.coalescing) == (0, 1.0)


def test_without_a_folder_for_the_cache_the_core_is_compiled_in_the_process(monkeypatch):
    from numba.core import caching

    from ptx_inline.emu.machine import compiled_core

    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    run = compiled_core.__wrapped__()
    assert isinstance(run._cache, caching.NullCache)
