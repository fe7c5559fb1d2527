"""The notebook, from top to bottom, with a kernel of its own: every cell runs, and what it shows is there."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """The notebook after a run beside the repository's files, in a folder that is thrown away."""
    for name in ("assets", "configs", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    return notebook, tmp_path


def outputs(notebook, kind):
    return [
        data
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if (data := output.get("data", {}).get(kind) if kind != "text" else output.get("text"))
    ]


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(executed):
    notebook, folder = executed
    assert len(outputs(notebook, "image/png")) == 6
    said = "".join(outputs(notebook, "text"))
    assert "finished: runs/quickstart/export" in said and "22,793,579 parameters" in said and "error" not in said
    assert (folder / "out/quickstart/branch/config.json").is_file()
    assert len(list((folder / "out/ten-animals").glob("*.png"))) == 10


def test_the_notebook_that_is_kept_has_its_pictures_and_both_languages():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert len(outputs(notebook, "image/png")) == 6 and NOTEBOOK.stat().st_size < 700_000
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            assert any("\u4e00" <= letter <= "\u9fff" for letter in cell.source), cell.source
            assert sum(letter.isascii() and letter.isalpha() for letter in cell.source) > 20, cell.source
