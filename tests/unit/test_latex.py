"""LaTeX tables: what they are made of, and that they fit, with a real pdflatex where there is one."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib
import pytest
from contract_settings import every_nth
from records import accuracy, estimate, save

from kvbench.analysis.load import load
from kvbench.analysis.tables import latex, tables
from kvbench.analysis.tables.groups import each_table
from kvbench.analysis.tables.latex import LONGEST, TEXT_WIDTH, latex_page, layout_of
from kvbench.analysis.tables.longbench import NAMES
from kvbench.analysis.tables.tex_text import breakable, escape, number_text, text_width

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"
PDFLATEX = shutil.which("pdflatex")


def longbench_record(method, budget, mean):
    """A record with the 16 English and code sets."""
    record = accuracy(method, budget, mean)
    names = [name for name in NAMES if not name.endswith("_zh") and name not in ("dureader", "vcsum", "lsht")]
    record["data"]["examples"] = dict.fromkeys(names, 20)
    record["scores"] = {name: estimate(mean) for name in names}
    record["average"] = estimate(mean, 20 * len(names))
    return record


def test_families_head_their_data_sets(tmp_path):
    save(tmp_path, longbench_record("full", None, 22.0), longbench_record("snapkv", 128, 20.0))
    (table,) = tables(load(tmp_path)[0])
    text = latex(table)
    for family in (r"{3}{c}{Single-doc. QA}", r"{3}{c}{Multi-doc. QA}", r"{3}{c}{Summarization}", r"{2}{c}{Code}"):
        assert rf"\multicolumn{family}" in text
    assert r"\label{tab:longbench-m}" in text
    assert r"\cmidrule(lr){2-4}\cmidrule(lr){5-7}" in text
    assert layout_of(table, TEXT_WIDTH).width <= TEXT_WIDTH


def test_a_table_that_fits_a_column_is_no_float_of_two(tmp_path):
    save(tmp_path, accuracy("full", None, 22.0), accuracy("streaming_llm", 1024, 20.0))
    (table,) = tables(load(tmp_path)[0])

    def environment(*columns: str) -> str:
        places = [0, *(table.columns.index(name) for name in columns)]
        return re.findall(r"\\begin\{(table\*?)\}", latex(table.with_columns(places)))[0]

    assert environment("mean") == environment("mean", "vs full", "KV kept") == "table"
    assert environment("mean", "95 % interval", "KV kept") == "table"
    assert environment(*table.columns[1:]) == "table*"


AFM = Path(matplotlib.get_data_path()) / "fonts" / "afm"
"""Adobe's metrics of Computer Modern, which Matplotlib brings."""
GLYPHS = dict(
    zip("0123456789", ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"], strict=True)
) | {
    ".": "period",
    ",": "comma",
    "[": "bracketleft",
    "]": "bracketright",
    "(": "parenleft",
    ")": "parenright",
    "+": "plus",
    "=": "equal",
    "%": "percent",
    "/": "slash",
    ":": "colon",
    " ": "space",
    "-": "hyphen",
}


def metrics() -> tuple[dict[str, float], dict[tuple[str, str], float]]:
    """(width of each glyph, kern of each pair) of cmr10 in thousandths of the type size."""
    text = (AFM / "cmr10.afm").read_text(encoding="latin-1")
    widths = {name: float(width) for width, name in re.findall(r"^C -?\d+ ; WX ([\d.]+) ; N (\S+) ;", text, re.M)}
    return widths, {(a, b): float(kern) for a, b, kern in re.findall(r"^KPX (\S+) (\S+) (\S+)", text, re.M)}


def test_widths_are_those_of_the_font():
    """Never less, which would be an overfull line, and at most a tenth more."""
    widths, kerns = metrics()
    cells = {
        cell.text for table in tables(load(REFERENCE / "methods_longbench")[0]) for row in table.rows for cell in row
    }
    texts = [
        text for text in cells | set(NAMES.values()) if all(c in GLYPHS or (c.isascii() and c.isalpha()) for c in text)
    ]
    assert len(texts) > 400
    for text in texts:
        glyphs = [GLYPHS.get(c, c) for c in text]
        real = sum(widths[g] for g in glyphs) + sum(kerns.get(pair, 0.0) for pair in itertools.pairwise(glyphs))
        assert real <= 100 * text_width(escape(text), 10.0) <= 1.1 * real + 30, text


def test_a_long_table_may_be_broken_over_pages(tmp_path):
    save(tmp_path, *(accuracy("snapkv", budget, 20.0) for budget in range(1, LONGEST + 2)))
    (table,) = tables(load(tmp_path)[0])
    assert r"\begin{longtable}" in latex(table) and r"\begin{table" not in latex(table)
    table.rows, table.runs = table.rows[:LONGEST], table.runs[:LONGEST]
    assert r"\begin{longtable}" not in latex(table) and r"\begin{table" in latex(table)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("-2.00", "$-$2.00"),
        ("[-3.00, -1.00]", "[$-$3.00, $-$1.00]"),
        ("1.36 x", r"1.36$\times$"),
        ("4.50 - 5.50", "4.50--5.50"),
        ("-", "--"),
        ("13.8 %", r"13.8 \%"),
        ("out of memory", "out of memory"),
    ],
)
def test_numbers_are_printed_as_numbers(text, printed):
    assert number_text(text).replace("−", "$-$") == printed


def test_every_special_character_is_escaped():
    assert escape("a_b%c&d#e$f{g}h~i^j\\k<l>m|n") == (
        r"a\_b\%c\&d\#e\$f\{g\}h\textasciitilde{}i\textasciicircum{}j\textbackslash{}k\textless{}l\textgreater{}m"
        r"\textbar{}n"
    )
    assert breakable("a_b=c/d") == r"a\_\allowbreak{}b=\allowbreak{}c/\allowbreak{}d"


def test_other_scripts_name_the_program_that_sets_them(tmp_path):
    record = accuracy("snapkv", 128, 20.0)
    record["method_label"] = "snapkv 问答"
    save(tmp_path, record)
    text = "".join(latex_page(each_table(load(tmp_path)[0])))
    assert "xelatex" in text
    assert "xelatex" not in "".join(latex_page(each_table(load(REFERENCE / "make_run")[0])))


@pytest.mark.skipif(PDFLATEX is None, reason="needs pdflatex (texlive-latex-recommended and -extra)")
@pytest.mark.parametrize(
    ("columns", "by_budget"),
    every_nth(2, [("onecolumn", False), ("twocolumn", False), ("twocolumn", True), ("onecolumn", True)]),
)
def test_every_committed_table_fits(tmp_path, columns, by_budget):
    body = "".join(latex_page(each_table(load(REFERENCE)[0], by_budget)))
    page = rf"""\documentclass[{columns}]{{article}}
\usepackage{{array,booktabs,graphicx,longtable}}
\extrafloats{{200}}
\begin{{document}}
{body}
\end{{document}}
"""
    (tmp_path / "page.tex").write_text(page)
    command = [str(PDFLATEX), "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    for _ in range(2):  # a longtable takes the widths of its columns from the run before
        made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=300)
        log = made.stdout
    assert (tmp_path / "page.pdf").is_file(), log[-2000:]
    assert re.findall(r"Overfull \\hbox.*", log) == []
    assert body.count(r"\begin{table") + body.count(r"\begin{longtable") >= 20


@pytest.mark.skipif(PDFLATEX is None, reason="needs pdflatex (texlive-latex-recommended and -extra)")
def test_a_label_of_special_characters_is_set(tmp_path):
    record = accuracy("h2o", 128, 20.0)
    record["method_label"] = 'h2o \\evil{x} $ ^ ~ # % & _ < > | " `c` [a] é ±'
    save(tmp_path / "runs", record, accuracy("full", None, 22.0))
    body = "".join(latex_page(each_table(load(tmp_path / "runs")[0])))
    (tmp_path / "page.tex").write_text(
        f"\\documentclass{{article}}\n\\usepackage{{array,booktabs,graphicx,longtable}}\n\\begin{{document}}\n{body}\n"
        "\\end{document}\n"
    )
    command = [str(PDFLATEX), "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    log = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=300).stdout
    assert (tmp_path / "page.pdf").is_file(), log[-2000:]
    assert "Overfull" not in log
