"""The notebook runs on the committed records, and its two forms say the same."""

from __future__ import annotations

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "analysis" / "notebooks"


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_it_runs_and_shows_tables_and_figures() -> None:
    notebook = jupytext.read(FOLDER / "start_here.py")
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": FOLDER}}).execute()
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    kinds = {kind for out in outputs for kind in out.get("data", {})}
    assert {"text/markdown", "image/png"} <= kinds
    text = "".join(out.get("text", "") for out in outputs)
    assert "- full:" in text
    assert "0 records that cannot be read" in text


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda p: p.name)
def test_both_forms_of_a_notebook_say_the_same(path: Path) -> None:
    """``jupytext --sync analysis/notebooks/*.py`` makes them so."""
    pair = jupytext.read(path.with_suffix(".ipynb"))
    assert cells(jupytext.read(path)) == cells(pair)
    assert not any(cell.get("outputs") for cell in pair.cells), "outputs are made, not kept"
