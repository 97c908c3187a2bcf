"""The emulator's benchmark on tiny sizes: every workload is right, figures are what they say, a wrong result stops it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from nbfmha.bench import emulator, emulator_workloads
from nbfmha.cli import app

SMALL = emulator_workloads.all_workloads(0.0001)


@pytest.mark.parametrize("number", range(len(SMALL)))
def test_every_workload_gives_what_numpy_gives(number):
    workload = SMALL[number]()
    run = workload.run(1)
    workload.check(run.outputs)
    assert not any(run.unwritten.values())


def test_size_scales_the_work():
    one, three = (make(ctas).run(1).profile for make in (emulator_workloads.integers,) for ctas in (1, 3))
    assert three.lane_instructions == 3 * one.lane_instructions
    # 7 before the loop, one to set it up, 11 a turn, a store and ret
    assert one.warp_instructions == 4 * (7 + 1 + 64 * 11 + 2)


@pytest.mark.parametrize(
    ("make", "name", "count"),
    [
        (lambda: emulator_workloads.transpose(1), "bank_conflicts", 0),
        (lambda: emulator_workloads.transpose(1), "coalescing", 1.0),
        (lambda: emulator_workloads.copy(1), "coalescing", 1.0),
    ],
)
def test_memory_workloads_are_the_good_way_to_do_it(make, name, count):
    assert getattr(make().run(1).profile, name) == count


def test_a_row_is_the_median_of_checked_runs():
    row = emulator.time_workload(emulator_workloads.integers(2, 4), 2, rounds=3)
    assert (row.name, row.warp_instructions) == ("integer arithmetic", 8 * (10 + 4 * 11))
    assert row.lane_instructions == 32 * (row.warp_instructions - 8), "the last turn's branch is taken by no lane"
    timed = replace(row, one_core_s=2.0, all_cores_s=0.5)
    assert timed.per_second == row.lane_instructions / 2
    assert timed.per_second_all == row.lane_instructions * 2
    assert timed.ns_per_warp_instruction == 2e9 / row.warp_instructions


def test_a_wrong_result_is_no_figure():
    workload = emulator_workloads.integers(1, 4)
    wrong = replace(workload, expected={0: workload.expected[0] + np.uint32(1)})
    with pytest.raises(AssertionError, match="integer arithmetic"):
        emulator.time_workload(wrong, 1, rounds=1)


def test_the_command_prints_and_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(emulator, "all_workloads", lambda size: [lambda: emulator_workloads.fused(1, 2)])
    result = CliRunner().invoke(app, ["bench", "emulator", "--json", str(tmp_path / "x.json")])
    assert result.exit_code == 0, result.output
    assert "emulated lane-instructions a second" in result.output
    assert "f32 FMA" in result.output
    assert "a further launch of one CTA" in result.output
    report = json.loads((tmp_path / "x.json").read_text())
    (row,) = report["rows"]
    assert row["per_second"] == pytest.approx(row["lane_instructions"] / row["one_core_s"])
    assert report["machine"]["processor"]
    assert 0 < report["start"]["small_launch_s"] < report["start"]["imports_s"] + report["start"]["first_launch_s"]
