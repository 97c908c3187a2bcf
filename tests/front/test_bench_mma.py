"""The MMA benchmark: operands with exact sums, operations counted, and a count of instructions where there is no GPU."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from nbfmha.bench import measure, mma
from nbfmha.cli import app
from nbfmha.kernels.throughput import MMAS_A_TURN, throughput_kernel, why_not
from ptx_inline.isa.arithmetic import mma_registers
from ptx_inline.isa.instructions import INSTRUCTIONS
from ptx_inline.toolchain import TARGETS, Target

BLOCK_SCALE = "m16n8k64.mxf4nvf4.4x"
SMALL = mma.Load("small", 2, 4, 8)


@pytest.mark.parametrize("key", INSTRUCTIONS)
def test_the_exact_product_is_the_models(key):
    operands = mma.make_operands(key, 2)
    scales = operands.arrays[3:] if INSTRUCTIONS[key].sf_vec_size else ()
    for target in ("sm_80", "sm_90a"):
        d = operands.c
        for _ in range(3 * MMAS_A_TURN // 2):
            d = mma_registers(key, operands.a, operands.b, d, *scales, target=target)
        np.testing.assert_array_equal(d, operands.expected(3))
    assert len(np.unique(operands.product)) > 30


@pytest.mark.parametrize("key", INSTRUCTIONS)
def test_the_emulator_counts_the_loop(key):
    found = mma.count(key, SMALL)
    # thread and lane; an address and a load an operand; turns; 5 to find the place of d, its address; four stores, ret
    operands = 4 if INSTRUCTIONS[key].sf_vec_size else 2
    assert (found.mmas, found.others) == (MMAS_A_TURN, 3)
    assert found.outside == 2 + 3 * operands + 2 + SMALL.chains + 1 + 5 + 2 + SMALL.chains + 1


def test_a_wrong_result_is_no_figure(monkeypatch):
    right = mma.make_operands("m16n8k16.f16", 1)
    wrong = replace(right, product=right.product + (np.arange(32) == 7)[:, None])
    monkeypatch.setattr(mma, "make_operands", lambda *_: wrong)
    with pytest.raises(AssertionError, match=r"m16n8k16\.f16"):
        mma.count("m16n8k16.f16", mma.LATENCY)


def test_operations_and_cycles():
    assert [mma.flops(key) for key in (BLOCK_SCALE, "m16n8k32.f8f6f4", "m16n8k16.bf16")] == [16384, 8192, 4096]
    assert (mma.LATENCY.mmas, mma.SATURATED.mmas) == (16 * 4096, 16 * 16 * 4096)
    # 33 cycles from MMA to MMA at 1 GHz: 65,536 of them take 2.162688 ms
    slow = mma.Row("m16n8k16.f16", mma.LATENCY, 132, 33 * 65536 / 1e6, 1000.0)
    assert slow.clocks_per_mma == pytest.approx(33)
    assert slow.tflop_s == pytest.approx(132 * 4096 / 33 / 1e3)
    # 16 cycles from MMA to MMA in each of four sub-partitions
    fast = mma.Row(BLOCK_SCALE, mma.SATURATED, 170, 16 * 4 * 65536 / 2e6, 2000.0)
    assert fast.clocks_per_mma == pytest.approx(16)
    assert fast.flop_per_clock == pytest.approx(4096)
    assert fast.tflop_s == pytest.approx(170 * 4096 * 2e-3)
    assert replace(fast, clock_mhz=None).flop_per_clock is None
    assert replace(fast, clock_mhz=None).clocks_per_mma is None


def test_who_has_which():
    for name in TARGETS:
        lacking = [key for key in INSTRUCTIONS if why_not(key, Target.parse(name))]
        assert lacking == ([] if name == "sm_120a" else [key for key in INSTRUCTIONS if "k16" not in key])
    assert why_not(BLOCK_SCALE, Target.parse("sm_121a")) is None
    assert why_not(BLOCK_SCALE, Target.parse("sm_90a")) == "sm_90a lacks it, needs sm_120a or sm_120f or sm_121a"
    with pytest.raises(ValueError, match="target must be one that has"):
        throughput_kernel(BLOCK_SCALE, 4, "sm_100a")
    with pytest.raises(ValueError, match="chains must be a divisor of 16, got 3"):
        throughput_kernel(BLOCK_SCALE, 3, "sm_120a")


@pytest.mark.parametrize(
    ("key", "target", "opcode"),
    [(BLOCK_SCALE, "sm_120a", "OMMA"), ("m16n8k32.f8f6f4", "sm_121a", "QMMA"), ("m16n8k16.f16", "sm_90a", "HMMA")],
)
def test_machine_code_is_the_loop_in_registers(key, target, opcode):
    kernel = throughput_kernel(key, 4, target)
    resources = kernel.resources(target)
    assert (resources.spill_store_bytes, resources.stack_bytes) == (0, 0)
    code = [line.split("*/")[1] for line in kernel.sass(target).splitlines() if "/*0" in line and "*/" in line]
    # assemblers write turns out: between the first and the last branch back it is MMAs and a few others
    mmas = [i for i, line in enumerate(code) if opcode in line]
    assert len(mmas) % MMAS_A_TURN == 0
    assert not any("LDG" in line or "STG" in line or "MOV" in line for line in code[mmas[0] : mmas[-1]])
    assert mmas[-1] - mmas[0] < 1.5 * len(mmas)


def test_the_table_says_why_a_row_has_no_figures():
    rows = [mma.Row("m16n8k16.f16", load, 132, 2.0, 1980.0) for load in mma.LOADS]
    rows.append(mma.Row("m16n8k16.bf16", mma.LATENCY, 132, 2.0, None))
    console = measure.console()
    with console.capture() as capture:
        console.print(mma.speed_table(rows, {BLOCK_SCALE: "sm_90a lacks it"}, "some GPU"))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capture.get().splitlines() if "│" in line]
    assert lines[0] == [BLOCK_SCALE, "sm_90a lacks it", "", "", "", ""]
    assert lines[1][:2] == ["m16n8k16.f16", mma.LATENCY.name]
    assert lines[2][2:4] == [f"{rows[1].tflop_s:,.1f}", f"{rows[1].flop_per_clock:,.0f}"]
    assert lines[2][4:] == [f"{rows[1].clocks_per_mma:.1f}", "1,980"]
    assert lines[3][3:] == ["-", "-", "-"]


def test_without_a_gpu_the_command_counts(tmp_path, monkeypatch):
    def none():
        raise RuntimeError("no GPU in this test")

    monkeypatch.setattr(measure, "require_gpu", none)
    monkeypatch.setattr(mma, "LOADS", (SMALL,))
    result = CliRunner().invoke(app, ["bench", "mma", "--json", str(tmp_path / "x.json")])
    assert result.exit_code == 0, result.output
    assert "not measured: no GPU in this test" in result.output
    assert "emulated for sm_120a (counted, not timed)" in result.output
    report = json.loads((tmp_path / "x.json").read_text())
    assert (report["machine"], report["rows"]) == (None, [])
    assert [row["mma"] for row in report["counts"]] == list(INSTRUCTIONS)
    assert set(report["not_measured"].values()) == {"no GPU in this test"}


@pytest.mark.gpu
def test_on_a_gpu_rows_are_checked_and_timed(gpu, monkeypatch):
    from ptx_inline.toolchain.launcher import device_target

    monkeypatch.setattr(mma, "BURST_MS", 2)
    target = device_target(gpu.cuda.current_device())
    keys = [key for key in INSTRUCTIONS if why_not(key, target) is None]
    loads = tuple(replace(load, turns=64) for load in mma.LOADS)
    rows = mma.time_rows(gpu, target, keys, loads, rounds=1)
    assert [(row.mma, row.load) for row in rows] == [(key, load) for key in keys for load in loads]
    for slow, fast in zip(rows[::2], rows[1::2], strict=True):
        assert 0 < slow.tflop_s < fast.tflop_s
        assert slow.clock_mhz is None or 100 < slow.clock_mhz < 5000
