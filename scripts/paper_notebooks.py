"""The notebooks of ``docs/notebooks/papers``, one a paper of ``kvbench paper``, all from the template below.

    python scripts/paper_notebooks.py --write     # after a paper or the template has changed

``tests/integration/test_paper_notebooks.py`` checks that the files are of the template, and runs them on the committed
records.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from kvbench.analysis.papers.paper import Paper, names, paper

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks" / "papers"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}

TEMPLATE = (
    (
        "markdown",
        """# {title}

[arXiv {arxiv}](https://arxiv.org/abs/{arxiv}). The numbers that the paper prints, each beside our run that comes
nearest. Point `RESULTS` at your own results folder to compare your runs; no model, no GPU and no torch is needed. With
the committed records, which are of a model of 135M parameters, no number is expected to be reproduced. `kvbench paper
{name} RESULTS` prints the same page.""",
    ),
    (
        "code",
        """%matplotlib inline
from collections import Counter
from pathlib import Path

import pandas as pd
from IPython.display import Markdown, display

from kvbench.analysis.figures import draw, figures
from kvbench.analysis.load import load
from kvbench.analysis.papers.compare import compare
from kvbench.analysis.papers.paper import paper
from kvbench.analysis.papers.render import blocks, markdown

RESULTS = Path("../../../results/reference")
PAPER = paper("{name}")
runs, problems = load(RESULTS)
cells = compare(PAPER, runs)
print(len(cells), "published numbers:", dict(Counter(cell.verdict for cell in cells)))""",
    ),
    (
        "markdown",
        """## The paper's tables beside ours

Averages alone; `blocks(..., cells=True)` has each data set. A number has a verdict only where chance alone differs;
what differs is listed below the tables, then the commands for the runs that are missing.""",
    ),
    ("code", "display(Markdown(markdown(blocks(PAPER, cells, runs, str(RESULTS), cells=False))))"),
    (
        "markdown",
        """## The numbers as a data frame

One row a published number, with ours and its interval where there is a run. `published_difference` and `our_difference`
are to the full cache of the same model: they can be compared where the scores themselves cannot.""",
    ),
    (
        "code",
        """SHOWN = ["table", "row", "column", "published", "ours", "low", "high", "verdict"]
rows = []
for cell in cells:
    row = {{key: value for key, value in vars(cell).items() if key not in ("run", "ours", "our_difference")}}
    row |= dict(zip(("ours", "low", "high", "n"), cell.ours or [None] * 4, strict=True))
    row["our_difference"] = None if cell.our_difference is None else cell.our_difference[0]
    rows.append(row)
frame = pd.DataFrame(rows, columns=[*SHOWN, "published_difference", "our_difference", "differs", "device"])
display(frame[SHOWN].dropna(subset=["ours"]).head(12).round(2))
display(frame[["row", "published_difference", "our_difference"]].dropna().round(2))""",
    ),
    (
        "markdown",
        """## Our runs of {methods}

Against the full cache on the same examples, or, for architectures, among those trained alike.""",
    ),
    (
        "code",
        """own = [run for run in runs if run.is_full_cache or run.record["method"] in PAPER.methods]
for spec in list(figures(own, ["pareto", "trained"]))[:3]:
    print(spec.title, *spec.caption, sep="\\n")
    display(draw(spec))""",
    ),
)


def notebook(found: Paper) -> str:
    """The notebook of one paper as the text of its file, without outputs."""
    words = {
        "name": found.name,
        "title": found.title,
        "arxiv": found.arxiv,
        "methods": ", ".join(f"`{method}`" for method in found.methods),
    }
    made = new_notebook(metadata={"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for number, (kind, text) in enumerate(TEMPLATE):
        new_cell = new_markdown_cell if kind == "markdown" else new_code_cell
        made.cells.append(new_cell(text.format(**words), id=f"{found.name.replace('_', '-')}-{number}"))
    return str(nbformat.writes(made)) + "\n"


def main() -> int:
    """Write the notebooks, or say which are not those of the template; exit status 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the files")
    args = parser.parse_args()
    stale = []
    for name in names():
        path, text = FOLDER / f"{name}.ipynb", notebook(paper(name))
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if args.write:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
        else:
            stale.append(str(path))
    for path in stale:
        print(f"{path} is not of the template: python scripts/paper_notebooks.py --write")
    return int(bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
