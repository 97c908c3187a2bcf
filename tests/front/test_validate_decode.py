"""``nbfmha validate --what decode``: its cases, what they notice, its table, JSON and plot."""

import functools
import inspect
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from nbfmha import doctor
from nbfmha.accuracy import CACHES
from nbfmha.cli import app
from nbfmha.emulated import EmulatedArray, Machine
from nbfmha.kernels.decode_device import make_decode
from nbfmha.validate import Context, cases_decode, prepare, run_case, select_cases
from nbfmha.validate import decode_problems as problems
from nbfmha.validate.implementations import Emulated, Reference, Unavailable, choose

CASES = {case.name: case for case in select_cases("decode")}
ON_IMPLEMENTATION = [name for name, case in CASES.items() if case.evidence == "implementation"]
KERNELS_OF_THEIR_OWN = ("decode_softcap", "decode_wide")
DECODING = [name for name in ON_IMPLEMENTATION if name != "decode_append" and name not in KERNELS_OF_THEIR_OWN]


def run_on(machine, name):
    return run_case(CASES[name], Context(machine if isinstance(machine, Emulated) else Emulated("sm_120a", machine))).result


class TestCases:
    @pytest.mark.parametrize("name", CASES)
    def test_in_numpy_nothing_but_the_model_runs(self, name):
        result = run_case(CASES[name], Context(Reference())).result
        assert result.status == ("skip" if name in ON_IMPLEMENTATION else "pass"), result.reason
        if name in ON_IMPLEMENTATION:
            assert result.reason == "needs a GPU or the emulator: the cache's model would be compared with itself"

    @pytest.mark.parametrize("name", ON_IMPLEMENTATION)
    def test_on_the_emulator(self, name):
        result = run_on(Machine("sm_120a"), name)
        assert result.status == "pass", result.reason
        if name != "decode_append":
            assert result.details["relative_l2"] < 5e-4
            assert result.details["largest_budget"] > result.max_abs_error > 0
        if name == "decode_speculative":
            assert result.details["masked_rows"] == 4  # one of the second sequence's queries, 4 heads
        if name == "decode_pages":
            tables = result.details["block_tables"]
            assert any(table != sorted(table) for table in tables)
            assert all(len(set(table)) == len(table) for table in tables)
            assert {(length - 32) // 16 * 16 % 64 for length in result.details["lengths"]} >= {0, 48}
        if name == "decode_forks":
            assert result.details["shared_pages"] == 2

    @pytest.mark.parametrize("name", ON_IMPLEMENTATION)
    def test_by_dequantisation(self, name):
        result = run_on(Emulated("sm_90a"), name)
        assert result.status == "pass", result.reason

    @pytest.mark.gpu
    @pytest.mark.parametrize("kernels", ["dequant", "blockscale"])
    @pytest.mark.parametrize("name", ON_IMPLEMENTATION)
    def test_on_this_gpu(self, name, kernels):
        try:
            implementation = choose(kernels)
        except Unavailable as reason:
            pytest.skip(str(reason))
        result = run_case(CASES[name], Context(implementation)).result
        assert result.status == "pass", result.reason

    def test_few_kernels_are_compiled(self):
        names = [kernel.name for kernel in prepare.launched_kernels("sm_120a", CASES.values())]
        assert len([name for name in names if "make_decode(" in name]) == 4
        assert len(names) <= 11, names


class Faulty(Machine):
    """A machine whose launches go through ``fault(name, arguments, run)``, which may change what the kernel gets, or what
    it leaves, or not ``run`` it."""

    def __init__(self, fault):
        super().__init__("sm_120a")
        self.fault = fault

    def _run(self, kernel, grid, block, arguments, arrays, smem_bytes):
        name = kernel.name.partition("(")[0].rpartition(".make_")[2]
        run = functools.partial(super()._run, kernel, grid, block, arguments, arrays, smem_bytes)
        return self.fault(name, arguments, run) or {}


def spoilt(kernel, argument, change):
    """``kernel`` leaves one of its arrays changed."""

    def fault(name, arguments, run):
        left = run()
        if name == kernel:
            change(arguments[argument].content)
        return left

    return fault


def one_code(codes):
    """In the page that was written last, and in its first token."""
    written = [page for page in range(len(codes)) if (codes[page, 0, 0] != 0xFF).any()]
    codes[written[-1], 0, 0, 0] = 0xFF


def means_scaled(k_mean):
    k_mean *= np.float32(1 + 1e-4)


def without(kernel):
    """``kernel`` does nothing."""
    return lambda name, arguments, run: None if name == kernel else run()


def without_the_last_split(name, arguments, run):
    """The splits are merged when the last one is yet to come."""
    names = list(inspect.signature(make_decode("dequant", 64, "float16", 1, False, "tile", 4)).parameters)
    tickets = arguments[names.index("tickets")] if name == "decode" else 0
    if isinstance(tickets, EmulatedArray):
        tickets.content[:] = 1
    return run()


class OffBy(Emulated):
    """The kernels, with something wrong in every result."""

    def __init__(self, spoil):
        super().__init__("sm_120a")
        self.spoil = spoil

    def decode(self, q, cache, seq_ids, **options):
        out, lse = super().decode(q, cache, seq_ids, **options)
        self.spoil(out, lse)
        return out, lse


class Ignores(Emulated):
    """The kernels without one of decode's options."""

    def __init__(self, option):
        super().__init__("sm_120a")
        self.option = option

    def decode(self, q, cache, seq_ids, **options):
        options.pop(self.option, None)
        return super().decode(q, cache, seq_ids, **options)


class ReadsFreePages(Emulated):
    """What lies in pages that nobody owns shows in the last bits."""

    def decode(self, q, cache, seq_ids, **options):
        out, lse = super().decode(q, cache, seq_ids, **options)
        free = (cache.arrays.k_codes.copy_to_host() == 0x77).all(axis=(1, 2, 3))
        return out * (1 + free.any() * np.float16(2.0**-10)), lse


def one_output(out, lse):
    out[-1, -1, -1, -1] += 0.05 + 0.1 * abs(out[-1, -1, -1, -1])


def one_lse(out, lse):
    lse[-1, 0, -1] += 1e-3


class TestWhatFails:
    @pytest.mark.parametrize("spoil", [one_output, one_lse])
    @pytest.mark.parametrize("name", DECODING)
    def test_one_wrong_number(self, name, spoil):
        result = run_on(OffBy(spoil), name)
        assert (result.status, "outputs and LSEs" in result.metric) == ("fail", True), result.reason

    @pytest.mark.parametrize(
        ("name", "fault"),
        [
            ("decode_append", spoilt("append", 0, one_code)),
            ("decode_append", spoilt("mean", 0, means_scaled)),
            ("decode_pages", without("clear")),
            ("decode_pages", without("entries")),
            ("decode_forks", without("copy_slots")),
            ("decode_forks", without("copy_pages")),
            ("decode_splits", without_the_last_split),
            ("decode_constant_v", spoilt("append", 3, lambda scales: np.add(scales, 1, out=scales, where=scales < 0x70))),
        ],
    )
    def test_a_broken_kernel(self, name, fault):
        result = run_on(Faulty(fault), name)
        assert result.status == "fail"

    @pytest.mark.parametrize(
        ("name", "option"),
        [
            ("decode_windows", "window"),
            ("decode_sinks", "sinks"),
            ("decode_softcap", "softcap"),
            ("decode_softcap", "softmax_scale"),
        ],
    )
    def test_an_option_without_effect(self, name, option):
        result = run_on(Ignores(option), name)
        assert (result.status, "outputs and LSEs" in result.metric) == ("fail", True), result.reason

    def test_free_pages_that_are_read(self):
        result = run_on(ReadsFreePages("sm_120a"), "decode_poison")
        assert (result.status, "outputs and LSEs" in result.metric) == ("fail", True), result.reason

    def test_a_wrong_token_is_found(self):
        def next_channel(out, lse):
            out[0, 0, 3] = np.roll(out[0, 0, 3], 1)

        result = run_on(OffBy(next_channel), "decode_needles")
        assert "of 1820 outputs and LSEs" in result.metric
        assert result.status == "fail"

    def test_windows_that_do_not_help(self, monkeypatch):
        table = cases_decode.cache_errors()
        monkeypatch.setattr(cases_decode, "cache_errors", lambda: table | {"default": table["no 16-bit windows"]})
        result = run_case(CASES[cases_decode.QUALITY], Context(Reference())).result
        assert result.status == "fail"
        assert "1.000 of the relative L2 without them, allowed 0.250" in result.metric


def test_the_recorder_sees_every_kernel_that_is_launched():
    launched = []
    machine = Faulty(lambda name, arguments, run: launched.append(name) or run())
    names = ["decode_append", "decode_forks", "decode_pages", "decode_splits"]
    for name in names:
        assert run_on(machine, name).status == "pass"
    found = prepare.launched_kernels("sm_120a", [CASES[name] for name in names])
    assert [kernel.name.partition("(")[0].rpartition(".make_")[2] for kernel in found] == list(dict.fromkeys(launched))


def test_what_is_poisoned_is_what_nobody_has():
    context = Context(Emulated("sm_120a", prepare.Recorder("sm_120a")))  # runs nothing: what is there is what we write
    twin, ids = problems.grown(context, context.rng("x"), (200, 150))
    twin.free([ids[1]])
    twin.cache.arrays.block_tables.write(np.full(twin.cache.block_tables.shape, 3, np.int32))
    host = problems.poisoned_where_unused(twin, 0x77, 100.0)
    for name, x in host.items():
        before = twin.on_host()[name]
        if name in ("lengths", "block_tables"):
            np.testing.assert_array_equal(x, before)
            continue
        own = 3 if name.endswith(("codes", "scales")) else ids[0]
        np.testing.assert_array_equal(x[own], before[own])
        others = np.delete(x, own, axis=0)
        assert np.all(others == (0x77 if name.endswith(("codes", "scales")) else 100))


def test_command_with_json_and_plots(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "find_gpus", lambda: doctor.Gpus((), "no NVIDIA driver is installed on this machine"))
    path, plots = tmp_path / "out.json", tmp_path / "plots"
    arguments = ("--what", "decode", "--impl", "reference", "--json", path, "--plot", plots)
    result = CliRunner().invoke(app, ["validate", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert f"passed: 1 of {len(CASES)} cases, {len(ON_IMPLEMENTATION)} skipped" in result.stdout
    report = json.loads(path.read_text())
    assert (report["what"], report["ok"], report["implementation"]) == ("decode", True, "reference")
    assert [case["name"] for case in report["cases"]] == list(CASES)
    caches = report["cases"][-1]["details"]["caches"]
    assert list(caches) == list(CACHES)
    (line,) = (line for line in result.stdout.splitlines() if line.split()[:1] == ["default"])
    assert line.split()[1:] == [f"{error:.4f}" for error in caches["default"].values()]
    assert [file.name for file in plots.iterdir()] == ["decode_quality.png"]
    assert (plots / "decode_quality.png").read_bytes().startswith(b"\x89PNG")
