"""Three pages of tables and figures, set by a real pdflatex where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex (texlive-latex-recommended)")
def test_three_pages_of_five_tables_and_five_figures_have_no_overfull_box(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "latex_document.py"), "-o", str(tmp_path)]
    made = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "3 pages, 0 overfull boxes" in made.stdout
    text = (tmp_path / "paper.tex").read_text(encoding="utf-8")
    assert text.count(r"\input{") == text.count(r"\includegraphics{") == 5
