"""The table of what is supported says what dispatch says."""

from pathlib import Path

import pytest

from nbfmha import dispatch, support
from nbfmha.recipe import PRESETS


@pytest.fixture(scope="module")
def rows():
    return {title: dict(zip(dispatch.IMPLEMENTATIONS, cells, strict=True)) for title, *cells in support.support_rows()}


def test_the_reference_supports_everything(rows):
    cells = {title: row["reference"] for title, row in rows.items()}
    assert cells.pop("runs on") == "any CPU"
    assert cells.pop("head_dim") == "64, 96, 128, 256, other even"
    assert cells.pop("dtype") == "float16, bfloat16, float32"
    assert cells.pop("recipe") == ", ".join(PRESETS)
    assert set(cells.values()) == {"yes", "all"}


def test_kernels_support_what_the_issue_asks_for(rows):
    for name in ("blockscale", "dequant", "emulated"):
        for title in ("dtype", "causal, window, q_offset, softcap, sinks, packed sequences, GQA, MQA"):
            assert rows[title][name] == rows[title]["reference"]
        assert rows["`QuantizedTensor`s: q, k and v, V's scales along tokens"][name] == "yes"
        assert rows["`QuantizedTensor`s: a global scale"][name] == "none"
    assert rows["head_dim"]["blockscale"] == "64, 96, 128, 256"
    assert rows["runs on"]["blockscale"] == "sm_120a"
    assert rows["runs on"]["dequant"].startswith("sm_80, ")


def test_recipes_by_kind_of_scale(rows):
    blocks = ", ".join(name for name, recipe in PRESETS.items() if recipe.scale_per == "block")
    assert rows["recipe"] == {
        "blockscale": blocks, "legacy": "legacy", "dequant": blocks,
        "emulated": rows["recipe"]["reference"], "reference": ", ".join(PRESETS),
    }  # fmt: skip


def test_legacy_runs_its_own_recipe_where_blockscale_runs(rows):
    for title in ("runs on", "head_dim", "dtype", "any seqlen_q and seqlen_k, 0 and 1 too"):
        assert rows[title]["legacy"] == rows[title]["blockscale"]
    assert rows["everything in 16 bits"]["legacy"] == "none"
    quantised = [cells["legacy"] for title, cells in rows.items() if title.startswith("`QuantizedTensor`s")]
    assert quantised == ["none"] * 4


def test_cells_name_the_targets_that_lack_something(monkeypatch):
    def runs(name, problem, recipe, target, stored=None):
        return name == "dequant" and target is not None and (problem.head_dim < 256 or target.major > 8)

    monkeypatch.setattr(support, "_runs", runs)
    rows = {title: cells for title, *cells in support.support_rows()}
    column = dispatch.IMPLEMENTATIONS.index("dequant")
    assert rows["head_dim"][column] == ("64, 96, 128, 256 (not sm_80, sm_86, sm_89), other even (not sm_80, sm_86, sm_89)")
    assert rows["head_dim"][column + 1] == "none"


def test_markdown():
    lines = support.support_table().splitlines()
    assert lines[0] == "| | `blockscale` | `legacy` | `dequant` | `emulated` | `reference` |"
    assert lines[1] == "| --- | --- | --- | --- | --- | --- |"
    assert {line.count("|") for line in lines} == {7}
    assert len(lines) == 2 + len(support.support_rows())


def test_the_readme_has_this_table():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert support.support_table().strip() in readme, "python -m nbfmha.support prints what belongs there"
