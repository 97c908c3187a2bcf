"""What the doctor says on machines that this one may not be: the GPUs are passed in, never queried."""

import json

import pytest

from nbfmha import doctor
from nbfmha.doctor import Gpu, Gpus
from nbfmha.validate import implementations


def gpu(name, major, minor, target):
    return Gpu(0, name, (major, minor), 24 << 30, 100, target)


NO_DRIVER = Gpus((), "no NVIDIA driver is installed on this machine")
TURING = Gpus((gpu("T4", 7, 5, "not supported"),), "", "CUDA 13.0")
HOPPER = Gpus((gpu("H100", 9, 0, "sm_90a"),), "", "CUDA 13.0")
BLACKWELL = Gpus((gpu("RTX 5090", 12, 0, "sm_120a"),), "", "CUDA 13.0")
DATACENTRE_BLACKWELL = Gpus((gpu("B200", 10, 0, "sm_100a"),), "", "CUDA 13.0")


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (NO_DRIVER, {"reference"}),
        (TURING, {"reference"}),
        (HOPPER, {"dequant", "reference"}),
        (DATACENTRE_BLACKWELL, {"dequant", "reference"}),
        (BLACKWELL, {"blockscale", "legacy", "dequant", "reference"}),
    ],
)
def test_which_implementations_run_where(gpus, expected):
    found = doctor.availability(gpus)
    assert {name for name, state in found.items() if state.available} == expected
    assert tuple(found) == doctor.IMPLEMENTATIONS
    assert all(state.reason for state in found.values())


def test_reasons_name_the_need_and_what_is_there():
    assert "no NVIDIA driver" in doctor.availability(NO_DRIVER)["dequant"].reason
    assert "needs compute capability 12.0 or 12.1 (sm_120a/sm_121a); this machine has H100 (9.0)" in (
        doctor.availability(HOPPER)["blockscale"].reason
    )
    assert "H100" in doctor.availability(HOPPER)["dequant"].reason


def test_missing_toolchain_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "toolchain", lambda: (doctor.Component("NVRTC", False, "not there"),))
    state = doctor.availability(HOPPER)["dequant"]
    assert not state.available
    assert "toolchain incomplete: NVRTC" in state.reason


def test_report_is_complete_and_json_ready(monkeypatch, tmp_path):
    monkeypatch.setenv("NBFMHA_CACHE_DIR", str(tmp_path))
    (tmp_path / "0.cubin").touch()
    report = doctor.inspect()
    assert report.cache_directory == str(tmp_path)
    assert report.cache_entries == 1
    assert [state.name for state in report.implementations] == list(doctor.IMPLEMENTATIONS)
    data = json.loads(json.dumps(report.as_json()))
    assert data["packages"][0]["name"] == "nbfmha"
    assert isinstance(data["can_assemble"], bool)


def test_driver_that_raises_is_an_answer_and_not_a_crash(monkeypatch):
    from cuda.bindings import driver

    def broken(flags):
        raise RuntimeError("boom")

    monkeypatch.setattr(driver, "cuInit", broken)
    found = doctor.find_gpus()
    assert found.devices == ()
    assert "the CUDA driver does not work: RuntimeError: boom" in found.reason


def test_auto_takes_the_first_that_can_run_and_explains_the_others(monkeypatch):
    monkeypatch.setattr(doctor, "find_gpus", lambda: HOPPER)
    assert implementations.choose("auto").name == "dequant"
    lines = implementations.explain_auto()
    assert len(lines) == 2
    assert lines[0].startswith("blockscale: passed over, needs compute capability 12.0")
    assert lines[1].startswith("dequant: taken")


def test_asking_by_name_never_falls_back(monkeypatch):
    monkeypatch.setattr(doctor, "find_gpus", lambda: NO_DRIVER)
    for name in ("blockscale", "dequant"):
        with pytest.raises(implementations.Unavailable, match=f"'{name}' cannot run here: needs a GPU of"):
            implementations.choose(name)
    assert implementations.choose("auto").name == "reference"
    with pytest.raises(ValueError, match="must be one of auto, blockscale, dequant, reference, got 'legacy'"):
        implementations.choose("legacy")
