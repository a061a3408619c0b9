"""The papers' notebooks: of one template, and they run on the committed records."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbclient import NotebookClient

from kvbench.analysis.papers.paper import names, paper

ROOT = Path(__file__).resolve().parents[2]
QUICK = "cla"
"""The notebook that runs with every test run; the others are slow."""


def script() -> ModuleType:
    """``scripts/paper_notebooks.py``, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("paper_notebooks", ROOT / "scripts" / "paper_notebooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_notebook_is_of_the_template() -> None:
    """Else: ``python scripts/paper_notebooks.py --write``."""
    made = script()
    assert {path.stem for path in made.FOLDER.glob("*.ipynb")} == set(names())
    for name in names():
        text = (made.FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
        assert text == made.notebook(paper(name)), name
        assert paper(name).title in text and "outputs" in text


@pytest.mark.parametrize("name", [n if n == QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names()])
def test_a_notebook_runs_on_the_committed_records(name: str) -> None:
    path = ROOT / "docs" / "notebooks" / "papers" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": path.parent}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    text = "".join(out.get("text", "") for out in outputs)
    count = sum(len(row.values) for table in paper(name).tables for row in table.rows) + len(paper(name).claims)
    assert int(text.split(" published numbers:")[0]) >= count
    shown = [out["data"] for out in outputs if "data" in out]
    assert any(f"arXiv {paper(name).arxiv}" in data.get("text/markdown", "") for data in shown)
    assert any("image/png" in data for data in shown)
