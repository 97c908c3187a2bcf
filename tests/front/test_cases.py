"""Every case of ``nbfmha validate`` as a test, so that the command and the tests cannot drift apart."""

import pytest

from nbfmha.validate import Context, all_cases, run_case
from nbfmha.validate.implementations import Reference, Unavailable, choose

CASES = all_cases()
ON_IMPLEMENTATION = [case for case in CASES if case.evidence == "implementation"]
NEED_GPU = ("hardware_bits", "kernel_bits")


def test_names_are_unique_and_groups_stand_together():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    groups = [case.group for case in CASES]
    assert groups == sorted(groups, key=groups.index)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.group}-{case.name}")
def test_case_on_this_cpu(case):
    outcome = run_case(case, Context(Reference(), target="sm_120a", target_required=True))
    assert outcome.result.status == ("skip" if case.name in NEED_GPU else "pass"), outcome.result.reason


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
    [case for case in ON_IMPLEMENTATION if case.name not in (*NEED_GPU, "nan_scale", "scale_sources")],
    ids=lambda case: case.name,
)
def test_a_single_wrong_element_fails_the_case(case):
    assert run_case(case, Context(WrongAnswers())).result.status == "fail"


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
