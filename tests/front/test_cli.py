"""The ``nbfmha`` command: what it prints, its exit codes, and what it says of bad input."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from nbfmha import __version__, doctor
from nbfmha.cli import app
from nbfmha.validate import session
from nbfmha.validate.case import Registry, Result

NO_DRIVER = doctor.Gpus((), "no NVIDIA driver is installed on this machine")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "find_gpus", lambda: NO_DRIVER)


def nbfmha(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_help_and_version():
    assert nbfmha("--version").stdout.strip() == __version__
    text = nbfmha("--help").stdout
    for command in ("doctor", "validate", "layout", "sass", "ptx", "bench"):
        assert command in text


def test_start_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from nbfmha.cli import app; "
        "print([name for name in ('numba', 'torch', 'matplotlib', 'cuda', 'numpy', 'rich.live') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_doctor(tmp_path):
    result = nbfmha("doctor", "--json", tmp_path / "doctor.json")
    assert result.exit_code == 0
    for text in ("no NVIDIA driver", "blockscale", "legacy", "dequant", "reference", "NVRTC", "nvdisasm", "kernel cache"):
        assert text in result.stdout
    (emulated,) = (line.split() for line in result.stdout.splitlines() if line.strip().startswith("emulated"))
    assert emulated[:4] == ["emulated", "yes", "the", "kernels'"]
    assert json.loads((tmp_path / "doctor.json").read_text())["gpu_reason"] == NO_DRIVER.reason


def test_layout_in_the_terminal():
    text = nbfmha("layout", "m16n8k64.mxf4nvf4.4x", "A").stdout
    assert "A of m16n8k64.mxf4nvf4.4x: 16 x 64, 4 bits an element" in text
    assert "T17 r0" in text
    assert "each element is held by exactly 1 lane" in text
    text = nbfmha("layout", "mxf4nvf4.4x", "SFB", "--thread-id", 2).stdout
    assert "T30 r0" in text
    assert "24 of 32 lanes are not read" in text
    text = nbfmha("layout", "mxf8f6f4.1x", "SFA", "--byte-id", 3).stdout
    assert "T0 r0[24:32]" in text
    assert nbfmha("layout", "m16n8k16.f16", "D").stdout == nbfmha("layout", "m16n8k16.f16", "C").stdout


def test_layout_as_a_picture(tmp_path):
    path = tmp_path / "a.png"
    assert nbfmha("layout", "4x", "A", "--png", path).exit_code == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("layout", "nonsense", "A"), "MMA must name one of m16n8k64.mxf4nvf4.4x"),
        (("layout", "2x", "A"), "MMA must name one of m16n8k64.mxf4nvf4.2x, m16n8k64.mxf4.2x, got '2x'"),
        (("layout", "4x", "E"), "operand must be one of A, B, C, SFA, SFB"),
        (("layout", "4x", "SFA", "--thread-id", "2"), "thread_id must be one of"),
        (("layout", "4x", "A", "--thread-id", "1"), "operand A has none"),
        (("layout", "4x", "A", "--png", "x.nonsense"), "cannot write x.nonsense"),
        (("validate", "--impl", "legacy"), "implementation must be one of auto, blockscale, dequant, emulated, reference"),
        (("validate", "--impl", "dequant"), "'dequant' cannot run here: needs a GPU of compute capability 8.0"),
        (("validate", "--impl", "blockscale"), "'blockscale' cannot run here"),
        (("validate", "--arch", "sm_70"), "arch must be one of sm_80, sm_86"),
        (("validate", "--json", "no/such/folder/x.json"), "cannot write no/such/folder/x.json"),
        (("sass", "nonsense"), "kernel must be one of quantize"),
        (("ptx", "qk", "--arch", "sm_999"), "arch must be one of"),
        (("bench", "nonsense"), "benchmark must be one of emulator, launch, quantize"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message):
    result = nbfmha(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output


@pytest.mark.parametrize("kind", ["sass", "ptx"])
def test_listings_of_a_kernel(kind):
    result = nbfmha(kind, "probe", "--arch", "sm_120a")
    assert result.exit_code == 0
    mnemonic = {"sass": "OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X", "ptx": "mxf4nvf4.block_scale.scale_vec::4X"}[kind]
    assert mnemonic in result.stdout
    assert "1 MMA:" in result.stdout
    assert "0 bytes spilled" in result.stdout
    mix = nbfmha(kind, "probe", "--arch", "sm_120a", "--mix").stdout
    assert len(mix) < len(result.stdout) / 2


def registry(status):
    cases = Registry()

    @cases.case("formats", "one", evidence="computed")
    def one(context):
        return {"pass": Result.passed("fine"), "fail": Result.failed("bad", "because"), "skip": Result.skipped("no")}[
            status
        ]

    return cases.cases()


@pytest.mark.parametrize(("status", "exit_code"), [("pass", 0), ("skip", 0), ("fail", 1)])
def test_exit_code_of_validate(monkeypatch, tmp_path, status, exit_code):
    monkeypatch.setattr(session, "select_cases", lambda what: registry(status))
    path = tmp_path / "out.json"
    result = nbfmha("validate", "--json", path)
    assert result.exit_code == exit_code
    report = json.loads(path.read_text())
    assert report["ok"] is (exit_code == 0)
    assert report["implementation"] == "emulated"
    assert [case["status"] for case in report["cases"]] == [status]
    assert "auto: blockscale: passed over, needs a GPU" in result.stdout
    assert "auto: emulated: taken" in result.stdout


def test_plots_of_validate(monkeypatch, tmp_path):
    monkeypatch.setattr(session, "select_cases", lambda what: registry("pass"))
    result = nbfmha("validate", "--impl", "reference", "--plot", tmp_path / "plots")
    assert result.exit_code == 0
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert {"fragment_A.png", "scales_blocked_128x4.png", "indicators_row_major_packing.png", "real_scores.png"} <= names
    assert "auto:" not in result.stdout
