"""What is compiled ahead of an emulated validation: exactly the kernels that it launches."""

import contextlib

import numpy as np
import pytest

from nbfmha.emulated import Machine
from nbfmha.kernels.relayout import relayout_kernel
from nbfmha.validate import Context, prepare, run_case, select_cases
from nbfmha.validate.implementations import Emulated
from ptx_inline.toolchain import cache_directory

RELAYOUT = tuple(case for case in select_cases() if case.name == "relayout_kernels")


class Watched(Machine):
    """A machine that counts launches."""

    def __init__(self, arch):
        super().__init__(arch)
        self.launched = []

    def _run(self, kernel, *rest):
        self.launched.append(kernel)
        return super()._run(kernel, *rest)


def test_the_recorder_sees_every_kernel_that_is_launched():
    machine = Watched("sm_120a")
    cases = [case for case in select_cases() if case.name in ("scale_selectors", "quantise_kernels", "relayout_kernels")]
    for case in cases:
        assert run_case(case, Context(Emulated("sm_120a", machine))).result.status == "pass"
    assert prepare.launched_kernels("sm_120a", cases) == tuple(dict.fromkeys(machine.launched))
    assert len(set(machine.launched)) == 8 + (9 + 2) + 9  # the recipe with global_scale="amax" launches two more


def test_the_kernels_of_the_machine_code_cases_are_among_them():
    launched = prepare.launched_kernels("sm_120a", select_cases())
    assert prepare._assembled("sm_120a") <= set(launched)
    assert prepare.launched_kernels("sm_120a", [case for case in select_cases() if case.evidence != "implementation"]) == ()


def compiled():
    return sorted(path.suffix for path in cache_directory().iterdir()) if cache_directory().is_dir() else []


def test_other_processes_fill_the_cache(cache_directory):
    said = []

    def waiting(what):
        said.append(what)
        return contextlib.nullcontext()

    with prepare.PreparedMachine("sm_120a", RELAYOUT, waiting) as machine:
        result = run_case(RELAYOUT[0], Context(Emulated("sm_120a", machine))).result
    assert result.status == "pass", result.reason
    assert compiled() == [".ptx"] * 9
    assert set(said) <= {"compiling the emulator, once (about 20 s of one core)", "compiling kernels, once"}


def test_a_process_that_fails_costs_time_and_nothing_else(monkeypatch, cache_directory):
    # a job that cannot be sent to another process ends with an error
    monkeypatch.setattr(prepare, "_compile", lambda *arguments: None)
    with prepare.PreparedMachine("sm_120a", RELAYOUT, contextlib.nullcontext) as machine:
        kernel = relayout_kernel("linear", "linear")
        assert machine._jobs[kernel].exception() is not None
        result = run_case(RELAYOUT[0], Context(Emulated("sm_120a", machine))).result
    assert result.status == "pass", result.reason


@pytest.mark.parametrize("where", ["missing/below", "."])
def test_a_cache_that_can_be_written_to(monkeypatch, tmp_path, where):
    monkeypatch.setenv("NBFMHA_CACHE_DIR", str(tmp_path / where))
    assert prepare._can_write_kernels()
    monkeypatch.setattr(prepare.os, "access", lambda path, mode: path != tmp_path)
    assert not prepare._can_write_kernels()


def test_the_recorder_leaves_zeros():
    recorder = prepare.Recorder("sm_120a")
    x, y = recorder.array(np.ones(4, np.float32)), recorder.empty((2, 2), "float32")
    recorder.launch(relayout_kernel("linear", "linear"), (1,), (1,), (x, y))
    np.testing.assert_array_equal(y.copy_to_host(), np.zeros((2, 2)))
    assert list(recorder.kernels) == [relayout_kernel("linear", "linear")]
