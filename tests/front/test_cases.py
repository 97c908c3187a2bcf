"""Every case of ``nbfmha validate`` as a test, so that the command and the tests cannot drift apart."""

import pytest

from nbfmha.emulated import Machine
from nbfmha.validate import Context, run_case, select_cases
from nbfmha.validate.implementations import Emulated, Reference, Unavailable, choose

CASES = select_cases()
ON_IMPLEMENTATION = [case for case in CASES if case.evidence == "implementation"]
# these compare kernels with what the reference itself is made of
NEED_KERNELS = ("model_bits", "quantise_kernels", "dequantise_kernels", "relayout_kernels")


def test_names_are_unique_and_groups_stand_together():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    groups = [case.group for case in CASES]
    assert groups == sorted(groups, key=groups.index)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.group}-{case.name}")
def test_case_on_this_cpu(case):
    outcome = run_case(case, Context(Reference(), target="sm_120a", target_required=True))
    assert outcome.result.status == ("skip" if case.name in NEED_KERNELS else "pass"), outcome.result.reason


@pytest.mark.parametrize("case", ON_IMPLEMENTATION, ids=lambda case: case.name)
def test_case_on_the_emulator(case):
    outcome = run_case(case, Context(Emulated("sm_120a")))
    assert outcome.result.status == "pass", outcome.result.reason
    assert outcome.subject == "emulated"


@pytest.mark.parametrize(
    ("name", "target"),
    [*((name, "sm_90a") for name in ("model_bits", "zero_a", "zeros", "relayout_kernels")), ("model_bits", "sm_80")],
)
def test_case_on_the_emulator_without_block_scale_mma(name, target):
    (case,) = (case for case in CASES if case.name == name)
    implementation = Emulated(target)
    assert implementation.kernels == "dequant"
    outcome = run_case(case, Context(implementation))
    assert outcome.result.status == "pass", outcome.result.reason
    if name == "model_bits":
        assert outcome.result.metric.endswith("bit patterns of m16n8k16.f16 exact")


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", ON_IMPLEMENTATION, ids=lambda case: case.name)
def test_other_seeds(case, seed):
    outcome = run_case(case, Context(Reference(), seed=seed))
    assert outcome.result.status != "fail", outcome.result.reason


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_machine_code_where_there_is_no_block_scale_mma(target):
    (case,) = (case for case in CASES if case.name == "assemble_qk")
    outcome = run_case(case, Context(Reference(), target=target, target_required=True))
    assert outcome.result.status == "pass", outcome.result.reason
    assert "HMMA.16816...F32" in outcome.result.metric


def test_missing_toolchain_skips_unless_the_target_was_asked_for(monkeypatch):
    from nbfmha import doctor

    monkeypatch.setattr(doctor, "toolchain", lambda: (doctor.Component("NVRTC", False, "not there"),))
    (case,) = (case for case in CASES if case.name == "assemble_qk")
    skipped = run_case(case, Context(Reference())).result
    assert (skipped.status, skipped.reason) == ("skip", "toolchain incomplete: NVRTC; install nbfmha[cu13]")
    assert run_case(case, Context(Reference(), target_required=True)).result.status == "fail"


class WrongAnswers(Reference):
    """The reference with one score, or one element of D in each tile, slightly wrong."""

    def qk(self, q, k, *, scales_in="host memory"):
        scores = super().qk(q, k)
        scores.reshape(-1).view("uint32")[-1:] += 1 << 12
        return scores

    def mma_registers(self, *operands):
        d = super().mma_registers(*operands)
        d[:, 17, 2] += 1 + abs(d[:, 17, 2]) / 256
        return d


# these two look at which elements are NaN, and compare the implementation with itself
@pytest.mark.parametrize(
    "case",
    [case for case in ON_IMPLEMENTATION if case.name not in (*NEED_KERNELS, "nan_scale", "scale_sources")],
    ids=lambda case: case.name,
)
def test_a_single_wrong_element_fails_the_case(case):
    assert run_case(case, Context(WrongAnswers())).result.status == "fail"


class BitFlips(Machine):
    """A machine whose kernels leave one bit wrong: the second highest of their last result's last element, for register
    images of tiles that of each tile."""

    def _run(self, kernel, grid, block, arguments, arrays, smem_bytes):
        empty = [array for array in arrays.values() if array.content is None] or [list(arrays.values())[-1]]
        left = super()._run(kernel, grid, block, arguments, arrays, smem_bytes)
        wrong = empty[-1].copy_to_host()
        tiles = len(wrong) if wrong.shape[1:] == (32, 4) else 1
        wrong.reshape(tiles, -1)[:, -1:].view("uint8")[:, -1] ^= 0x40
        empty[-1].write(wrong)
        return left


# nan_scale asks which elements are NaN
@pytest.mark.parametrize(
    "case", [case for case in ON_IMPLEMENTATION if case.name != "nan_scale"], ids=lambda case: case.name
)
def test_a_single_wrong_bit_of_an_emulated_kernel_fails_the_case(case):
    result = run_case(case, Context(Emulated("sm_120a", BitFlips("sm_120a")))).result
    # scale_sources compares results with each other, and all are wrong in the same place
    assert result.status == ("pass" if case.name == "scale_sources" else "fail"), result.metric


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dequant", "blockscale"])
@pytest.mark.parametrize("case", ON_IMPLEMENTATION, ids=lambda case: case.name)
def test_case_on_this_gpu(case, name):
    try:
        implementation = choose(name)
    except Unavailable as reason:
        pytest.skip(str(reason))
    outcome = run_case(case, Context(implementation))
    assert outcome.result.status != "fail", outcome.result.reason
