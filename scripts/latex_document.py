r"""A LaTeX document of five tables and five figures of the committed records, as a paper would include them.

    python scripts/latex_document.py -o build/latex      # or: make paper

Writes ``paper.tex``, the tables as ``kvbench table -o FILE.tex`` writes them, and the figures as ``kvbench plot --style
paper --format pdf`` does, and runs ``pdflatex`` on them where there is one. Says how many pages came out and which
boxes are overfull; exit status 1 if there are any. A column is 3.25 inches wide and the text 6.75: the two choices of
``--width``.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kvbench.analysis.figures.cli import main as plot
from kvbench.analysis.load import Run, load
from kvbench.analysis.tables import Table, accuracy_table, budget_tables, efficiency_table
from kvbench.analysis.tables.latex import latex_page

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "results" / "reference"
TABLES: Mapping[str, tuple[str, Callable[[Sequence[Run]], Table]]] = {
    "quality": ("pareto_quick/longbench-mini", lambda runs: accuracy_table(runs, by_set=False)),
    "needles": ("methods_needle", lambda runs: budget_tables(runs)[0]),
    "question-later": ("needle_agnostic", lambda runs: budget_tables(runs)[0]),
    "loss": ("perplexity", lambda runs: budget_tables(runs)[0]),
    "speed": ("memory_8k", efficiency_table),
}
"""Folder below the committed records of each table, and the table of its runs."""

FIGURES = (
    ("pareto", "pareto_quick", "single"),
    ("length", "no_cache_vs_full", "single"),
    ("trained", "family/text-stdlib", "single"),
    ("speed", "pareto_quick", "single"),
    ("distance", "perplexity", "double"),
)
"""Kind, folder and width."""

TEXT_POINTS = 487.0
"""6.75 inches of 72.27 points."""

PAGE = r"""\documentclass[twocolumn]{article}
\usepackage[letterpaper,textwidth=6.75in,textheight=9.2in,columnsep=0.25in]{geometry}
\usepackage{array,booktabs,graphicx,longtable}
\setlength{\belowcaptionskip}{4pt}
\renewcommand{\topfraction}{0.95}
\renewcommand{\dbltopfraction}{0.95}
\renewcommand{\textfraction}{0.05}
\renewcommand{\floatpagefraction}{0.8}
\renewcommand{\dblfloatpagefraction}{0.8}
\setcounter{topnumber}{4}
\setcounter{dbltopnumber}{4}
\setcounter{totalnumber}{6}
\begin{document}
BODY
\end{document}
"""


def main() -> int:
    """Write and set the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "build" / "latex", help="folder (build/latex)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    parts = [figure(args.output, *wanted) for wanted in FIGURES]
    for place, (name, (results, made)) in enumerate(TABLES.items()):
        table = made(load(REFERENCE / results)[0])
        table.name = name
        (args.output / f"{name}.tex").write_text("".join(latex_page([table], TEXT_POINTS)), encoding="utf-8")
        parts.insert(2 * place, rf"\input{{{name}}}")
    text = r"Tables and figures of the committed records of \texttt{kvbench}."
    (args.output / "paper.tex").write_text(PAGE.replace("BODY", "\n".join([text, *parts])), encoding="utf-8")
    print(f"wrote {args.output / 'paper.tex'}")
    return compiled(args.output)


def figure(folder: Path, kind: str, results: str, width: str) -> str:
    """Draw one figure into the folder; returns what includes it."""
    drawn = folder / f"{kind}-{results.replace('/', '-')}"
    options = ["--figure", kind, "--style", "paper", "--width", width, "--format", "pdf"]
    if plot([str(REFERENCE / results), "-o", str(drawn), *options]):
        raise SystemExit(f"kvbench plot could not draw {kind} of {results}")
    entry = next(iter(json.loads((drawn / "manifest.json").read_text(encoding="utf-8"))["figures"].values()))
    star = "*" if width == "double" else ""
    caption = re.sub(r"([&%$#_{}])", r"\\\1", entry["title"] + ".")
    file = f"{drawn.name}/{entry['files'][0]}"
    return rf"""\begin{{figure{star}}}
\centering
\includegraphics{{{file}}}
\caption{{{caption}}}
\end{{figure{star}}}"""


def compiled(folder: Path) -> int:
    """Run pdflatex; exit status 1 if it fails or a box is overfull."""
    program = shutil.which("pdflatex")
    if program is None:
        print("no pdflatex: Debian's texlive-latex-recommended sets paper.tex")
        return 0
    command = [program, "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    for _ in range(2):  # references need the run before
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=300)
    pages = re.search(r"Output written on paper\.pdf \((\d+) pages?", run.stdout)
    overfull = re.findall(r"Overfull \\[hv]box.*", run.stdout)
    print(f"{pages[1]} pages, {len(overfull)} overfull boxes" if pages else run.stdout[-2000:], *overfull, sep="\n")
    return int(pages is None or bool(overfull))


if __name__ == "__main__":
    raise SystemExit(main())
