"""Every notebook runs from top to bottom on a CPU, and is kept without outputs."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed; it comes with nbfmha[notebooks]")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed; it comes with nbfmha[notebooks]")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_the_notebooks_are_there():
    assert [path.stem for path in NOTEBOOKS][:3] == ["01_nvfp4_format", "02_mma_fragments", "03_qk_validation"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped_and_logic_stays_in_the_package(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
            lines = [line.split() for line in cell.source.splitlines()]
            assert not [line for line in lines if line and line[0] in ("def", "class", "for", "while", "if")], cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_every_cell_shows_something(path):
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(ROOT)}}
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources)
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs, f"nothing to look at: {cell.source}"
            streams = [output.text for output in cell.outputs if output.get("name") == "stderr"]
            assert not streams, f"{cell.source}\n{streams}"
