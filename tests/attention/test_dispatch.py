"""Which implementation runs a call: what ``explain`` says of it, the gate, and the true/false contract."""

import logging
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import nbfmha
from nbfmha import dispatch, doctor
from nbfmha.dispatch import IMPLEMENTATIONS, Unavailable, explain
from nbfmha.emulated import Machine
from nbfmha.problem import Problem
from nbfmha.recipe import PRESETS, Recipe

PROBLEM = Problem(2, 8, 2, 100, 300, 128)


def arrays(head_dim=64, dtype=np.float16):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in ((4, 70, head_dim), *[(2, 150, head_dim)] * 2)]


def emulated(arch, head_dim=64):
    machine = Machine(arch)
    return [machine.array(x) for x in arrays(head_dim)]


@pytest.fixture
def set_gate(monkeypatch):
    """A function that sets ``NBFMHA_BLOCKSCALE`` as for a new process."""

    def set_to(value):
        dispatch.gate.cache_clear()
        if value is None:
            monkeypatch.delenv(dispatch.GATE, raising=False)
        else:
            monkeypatch.setenv(dispatch.GATE, value)

    set_to(None)
    yield set_to
    dispatch.gate.cache_clear()


@pytest.fixture(autouse=True)
def gate_not_set(set_gate):
    """Every test begins without the variable."""


class TestExplain:
    def test_text(self):
        assert str(explain(*arrays(), causal=True, window=(30, 0), sinks=np.zeros(4))) == (
            "attention, float16, batch 1, 4 heads on 2, 70 x 150 tokens, head_dim 64, causal, window (30, 0), sinks, "
            "recipe accurate; numpy, in host memory\n"
            "  blockscale  no   the arrays are in host memory; move them to a GPU, or ask for 'emulated'\n"
            "  legacy      no   the arrays are in host memory; move them to a GPU, or ask for 'emulated'\n"
            "  dequant     no   the arrays are in host memory; move them to a GPU, or ask for 'emulated'\n"
            "  emulated    yes  the PTX of blockscale for sm_120a, run on this CPU; by name alone, it takes its time\n"
            "  reference   yes  NumPy, float64: the recipe's model\n"
            "auto takes reference"
        )

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"q_offset": 3}, "q_offset 3"),
            ({"softcap": 5}, "softcap 5.0"),
            ({"cu_seqlens_q": (0, 30, 70), "cu_seqlens_k": (0, 70, 150)}, "2 sequences packed"),
            ({"recipe": "fast"}, "recipe fast"),
            ({"recipe": Recipe(smooth_k=True)}, "Recipe(qk='nvfp4', smooth_k=True"),
            ({"return_lse": True, "out": np.empty((4, 70, 64), np.float16)}, "head_dim 64, recipe accurate; numpy"),
        ],
        ids=["q_offset", "softcap", "packed", "preset", "recipe", "no matter"],
    )
    def test_describes_the_call(self, options, text):
        assert text in explain(*arrays(), **options).call

    @pytest.mark.parametrize(
        ("target", "runs", "auto"),
        [
            (None, {"emulated", "reference"}, "reference"),
            ("sm_80", {"dequant"}, "dequant"),
            ("sm_90a", {"dequant"}, "dequant"),
            ("sm_120a", {"blockscale", "dequant"}, "blockscale"),
            ("sm_121a", {"blockscale", "dequant"}, "blockscale"),
        ],
    )
    def test_problems_by_target(self, target, runs, auto):
        explanation = explain(PROBLEM, recipe="fast", target=target)
        assert [choice.name for choice in explanation.choices] == list(IMPLEMENTATIONS)
        assert {choice.name for choice in explanation.choices if choice.runs} == runs
        assert explanation.auto == auto
        assert explanation[auto].runs
        assert str(target or "in host memory") in explanation.call
        if target == "sm_90a":
            assert explanation["blockscale"].reason == "the block-scale MMA needs sm_120a or sm_121a, this is sm_90a"

    @pytest.mark.parametrize(
        ("target", "runs", "auto"),
        [
            (None, {"emulated", "reference"}, "reference"),
            ("sm_90a", set(), None),
            ("sm_120a", {"legacy"}, "legacy"),
            ("sm_121a", {"legacy"}, "legacy"),
        ],
    )
    def test_one_scale_a_row_is_for_legacy(self, set_gate, target, runs, auto):
        for gate in (None, "0"):
            set_gate(gate)
            explanation = explain(PROBLEM, recipe="legacy", target=target)
            assert {choice.name for choice in explanation.choices if choice.runs} == runs
            assert explanation.auto == auto
        assert explanation["emulated"].reason.startswith("the PTX of legacy for sm_120a" if target is None else "the arr")
        if target == "sm_90a":
            assert explanation["legacy"].reason == "f8f6f4 needs sm_120a or sm_121a, this is sm_90a"
            assert explanation["dequant"].reason.startswith("scale_per='row' runs by 'legacy' alone")
        if target == "sm_120a":
            other = explain(PROBLEM, target=target)["legacy"].reason
            assert other == "legacy runs recipes with scale_per='row', such as recipe='legacy'"

    @pytest.mark.parametrize("arch", ["sm_80", "sm_120a"])
    def test_emulated_arrays_are_run_as_on_their_machine(self, arch):
        explanation = explain(*emulated(arch))
        own = "blockscale" if arch == "sm_120a" else "dequant"
        assert explanation.auto == own
        assert explanation[own].reason.endswith(f"on {arch}, its PTX run on this CPU")
        assert explanation["emulated"].reason.startswith(f"the PTX of {own} for {arch}")
        assert not explanation["reference"].runs
        assert explanation.call.endswith(f"; an emulated {arch}")

    def test_what_no_kernel_takes(self):
        odd = explain(*arrays(head_dim=80))
        assert (odd["emulated"].runs, odd.auto) == (False, "reference")
        assert odd["emulated"].reason.startswith("head_dim must be one of 64, 96, 128, 256, got 80")
        mixed = explain(PROBLEM, recipe=Recipe(v_format="f16"), target="sm_120a")
        assert mixed.auto is None
        assert str(mixed).endswith("auto finds none that runs")

    def test_says_what_the_call_would_say(self):
        q, k, v = arrays()
        with pytest.raises(ValueError, match=r"v must be of shape \(2, 150, 64\)"):
            explain(q, k, v[:1])
        with pytest.raises(TypeError, match="target must be None beside arrays, got 'sm_80'; it is where the arrays lie"):
            explain(q, k, v, target="sm_80")
        with pytest.raises(TypeError, match="k and v must be None beside a Problem, got arrays"):
            explain(PROBLEM, k)
        with pytest.raises(TypeError, match="options must be recipe alone beside a Problem, got causal"):
            explain(PROBLEM, causal=True)
        with pytest.raises(ValueError, match="name must be one of 'blockscale', 'legacy'"):
            explain(q, k, v)["auto"]

    def test_the_order_is_the_one_of_doctor(self):
        assert doctor.IMPLEMENTATIONS == IMPLEMENTATIONS


class TestByName:
    @pytest.mark.parametrize("impl", ["blockscale", "dequant", "legacy"])
    def test_never_falls_back(self, impl):
        q, k, v = arrays()
        out = np.full_like(q, 7)
        reason = explain(q, k, v)[impl].reason
        with pytest.raises(Unavailable) as error:
            nbfmha.attention(q, k, v, impl=impl, out=out)
        assert str(error.value) == (
            f"impl must be an implementation that runs this call, got {impl!r}: {reason}; "
            "'emulated' and 'reference' can run this call"
        )
        assert (out == 7).all()

    def test_the_reference_is_for_the_host(self):
        with pytest.raises(
            Unavailable, match=r"'reference': the arrays are on an emulated machine; take them off with copy"
        ):
            nbfmha.attention(*emulated("sm_120a"), impl="reference")

    def test_auto_says_why_each_was_passed_over(self):
        text = (
            r"the call must be one that an implementation runs, got none for impl='auto' "
            r"\(blockscale: head_dim must be .* got 80; .*legacy: .*dequant: head_dim .*reference: the arrays are on an em"
        )
        with pytest.raises(Unavailable, match=text):
            nbfmha.attention(*emulated("sm_120a", head_dim=80))


class TestGate:
    @pytest.mark.parametrize("value", [None, "1"])
    def test_is_open(self, set_gate, value):
        set_gate(value)
        assert explain(PROBLEM, target="sm_120a").auto == "blockscale"

    def test_switches_blockscale_off_by_name_too(self, set_gate):
        set_gate("0")
        explanation = explain(*emulated("sm_120a"))
        assert explanation["blockscale"].reason == "switched off by NBFMHA_BLOCKSCALE=0"
        assert explanation.auto == "dequant"
        assert explanation["emulated"].reason.startswith("the PTX of dequant for sm_120a")
        with pytest.raises(
            Unavailable, match="'blockscale': switched off by NBFMHA_BLOCKSCALE=0; 'dequant' and 'emulated'"
        ):
            nbfmha.attention(*emulated("sm_120a"), impl="blockscale")

    @pytest.mark.parametrize("value", ["", "yes", "2"])
    def test_takes_no_other_value(self, set_gate, value):
        set_gate(value)
        for _ in range(2):
            with pytest.raises(ValueError, match=f"NBFMHA_BLOCKSCALE must be '0' or '1' or not set, got '{value}'"):
                explain(PROBLEM)

    def test_is_read_once_and_logged_once(self, set_gate, monkeypatch, caplog):
        set_gate("0")
        with caplog.at_level(logging.INFO, "nbfmha"):
            for _ in range(2):
                nbfmha.attention(*arrays())
            monkeypatch.setenv(dispatch.GATE, "1")
            assert explain(PROBLEM, target="sm_120a").auto == "dequant"
        assert [record.getMessage() for record in caplog.records] == ["NBFMHA_BLOCKSCALE is 0: blockscale is off"]

    def test_says_nothing_unless_logging_is_set_up(self):
        code = "import nbfmha, numpy as np; x = np.ones((1, 4, 64), np.float16); nbfmha.attention(x, x, x)"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert (run.stdout, run.stderr) == ("", "")


class TestContract:
    """``fmha_prefill_*`` return False, with nothing written, where they cannot run, and never for a wrong argument."""

    @pytest.mark.parametrize("name", ["blockscale", "legacy"])
    @pytest.mark.parametrize("place", ["host", "sm_80"])
    def test_declines_with_a_reason(self, caplog, name, place):
        q, k, v = arrays() if place == "host" else emulated(place)
        out = np.full_like(q, 7) if place == "host" else q.machine.empty(q.shape, "float16")
        with caplog.at_level(logging.INFO, "nbfmha"):
            assert getattr(nbfmha, f"fmha_prefill_{name}")(q, k, v, out, causal=True) is False
        reason = explain(q, k, v, recipe="legacy" if name == "legacy" else "accurate")[name].reason
        assert f"fmha_prefill_{name} declines: {reason}" in [record.getMessage() for record in caplog.records]
        assert (out == 7).all() if place == "host" else out.content is None

    def test_legacy_declines_another_recipe_and_quantised_tensors(self, caplog):
        q, k, v = emulated("sm_120a")
        out = q.machine.empty(q.shape, "float16")
        with caplog.at_level(logging.INFO, "nbfmha"):
            assert nbfmha.fmha_prefill_legacy(q, k, v, out, recipe="accurate") is False
            host = arrays()
            assert nbfmha.fmha_prefill_legacy(host[0], *map(nbfmha.quantize, host[1:]), np.empty_like(host[0])) is False
        assert any("such as recipe='legacy'" in record.getMessage() for record in caplog.records)

    def test_declines_behind_the_gate(self, set_gate):
        set_gate("0")
        q, k, v = emulated("sm_120a")
        assert nbfmha.fmha_prefill_blockscale(q, k, v, q.machine.empty(q.shape, "float16")) is False

    @pytest.mark.parametrize("name", ["blockscale", "legacy"])
    def test_a_wrong_argument_is_an_error(self, name):
        function = getattr(nbfmha, f"fmha_prefill_{name}")
        q, k, v = arrays()
        with pytest.raises(TypeError, match="out must be an array to write to, got None"):
            function(q, k, v, None)
        with pytest.raises(ValueError, match=r"out must be of shape \(4, 70, 64\), as q is, got \(2, 150, 64\)"):
            function(q, k, v, np.empty_like(k))
        with pytest.raises(TypeError, match=r"v\.dtype must be that of q"):
            function(q, k, v.astype(ml_dtypes.bfloat16), np.empty_like(q))

    def test_the_fallback_of_the_seed(self):
        """A caller's own chain: one after the other, then what it had before."""
        q, k, v = arrays()
        out = np.empty_like(q)
        for step in (nbfmha.fmha_prefill_blockscale, nbfmha.fmha_prefill_legacy):
            assert not step(q, k, v, out, causal=True)
        assert nbfmha.attention(q, k, v, causal=True, out=out) is out


def test_the_default_recipe_has_a_name():
    assert dispatch.DEFAULT_RECIPE in PRESETS
