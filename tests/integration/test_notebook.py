"""The notebooks run, and both forms of each say the same."""

from __future__ import annotations

from pathlib import Path

import jupytext
import nbformat
import pytest
from local_model import save_local_model
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (ROOT / "analysis" / "notebooks", ROOT / "docs" / "notebooks")
NOTEBOOKS = {path.stem: path for folder in FOLDERS for path in sorted(folder.glob("*.py"))}


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def executed(name: str) -> tuple[str, set[str]]:
    """(what a notebook prints, the kinds of what it shows)."""
    path = NOTEBOOKS[name]
    notebook = jupytext.read(path)
    place = {"metadata": {"path": path.parent}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    return "".join(out.get("text", "") for out in outputs), {kind for out in outputs for kind in out.get("data", {})}


def test_the_records_give_tables_and_figures() -> None:
    text, kinds = executed("start_here")
    assert {"text/markdown", "image/png"} <= kinds
    assert "- full:" in text
    assert "0 records that cannot be read" in text


@pytest.mark.slow
def test_a_model_is_compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBENCH_NOTEBOOK_MODEL", str(save_local_model(tmp_path)))
    text, _ = executed("compress_a_model")
    assert text.count(" MiB  ") == 6 and "snapkv budget=128 storage=kivi4" in text


def test_a_method_is_added() -> None:
    assert "as expected" in executed("add_a_method")[0]


@pytest.mark.slow
def test_bytes_and_steps_are_measured() -> None:
    text, _ = executed("speed_and_memory")
    assert text.count(" ms a step") == 5
    assert "100.0% of the full cache" in text and "12.8% of the full cache" in text


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=lambda p: p.name)
def test_both_forms_of_a_notebook_say_the_same(path: Path) -> None:
    """``jupytext --sync analysis/notebooks/*.py docs/notebooks/*.py`` makes them so."""
    pair = jupytext.read(path.with_suffix(".ipynb"))
    assert cells(jupytext.read(path)) == cells(pair)
    assert not any(cell.get("outputs") for cell in pair.cells), "outputs are made, not kept"
