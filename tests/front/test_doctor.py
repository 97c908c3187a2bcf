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
        (NO_DRIVER, {"emulated", "reference"}),
        (TURING, {"emulated", "reference"}),
        (HOPPER, {"dequant", "emulated", "reference"}),
        (DATACENTRE_BLACKWELL, {"dequant", "emulated", "reference"}),
        (BLACKWELL, {"blockscale", "legacy", "dequant", "emulated", "reference"}),
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
    found = doctor.availability(HOPPER)
    assert not found["dequant"].available
    assert found["dequant"].reason == "toolchain incomplete: NVRTC; install nbfmha[cu13]"
    assert not found["emulated"].available
    expected = "needs the compiler, not a GPU; toolchain incomplete: NVRTC; install nbfmha[cu13]"
    assert found["emulated"].reason == expected
    monkeypatch.setattr(doctor, "find_gpus", lambda: NO_DRIVER)
    with pytest.raises(implementations.Unavailable, match=r"'emulated' cannot run here: needs the compiler, not a GPU"):
        implementations.choose("emulated")
    assert implementations.choose("auto").name == "reference"
    assert implementations.explain_auto()[-2:] == [
        f"emulated: passed over, {expected}",
        "reference: taken, NumPy model of the block-scale MMA; runs on any CPU",
    ]


def test_report_is_complete_and_json_ready(monkeypatch, tmp_path):
    monkeypatch.setenv("NBFMHA_CACHE_DIR", str(tmp_path))
    for name in ("0.cubin", "1.ptx", "half-written"):
        (tmp_path / name).touch()
    report = doctor.inspect()
    assert report.cache_directory == str(tmp_path)
    assert report.cache_entries == 2
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
    with pytest.raises(ValueError, match="must be one of auto, blockscale, dequant, emulated, reference, got 'legacy'"):
        implementations.choose("legacy")


@pytest.mark.parametrize(
    ("target", "kernels", "addends", "fraction_bits"),
    [("sm_120a", "blockscale", 5, 35), ("sm_90a", "dequant", 17, 25), ("sm_100a", "dequant", 17, 25)],
)
def test_auto_emulates_the_kernels_of_the_target_where_there_is_no_gpu(
    monkeypatch, target, kernels, addends, fraction_bits
):
    monkeypatch.setattr(doctor, "find_gpus", lambda: NO_DRIVER)
    implementation = implementations.choose("auto", target)
    assert (implementation.name, implementation.kernels, implementation.on_gpu) == ("emulated", kernels, False)
    assert f"the final PTX of the '{kernels}' kernels for {target}" in implementation.proof
    assert implementation.proof.endswith("not run on hardware")
    accumulation = implementation.accumulation
    assert (accumulation.addends, accumulation.fraction_bits) == (addends, fraction_bits)
    lines = implementations.explain_auto()
    assert [line.partition(":")[0] for line in lines] == ["blockscale", "dequant", "emulated"]
    assert lines[-1] == "emulated: taken, the kernels' PTX, run on this CPU by ptx_inline.emu; needs no GPU"
