"""README and docs: links, commands, tables and reference pages. Nothing here imports torch."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import hydra
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from kvbench.analysis import tables
from kvbench.analysis.load import comparable, load
from kvbench.runners.command import COMMANDS
from kvbench.runners.config.arguments import quote_texts

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "results/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
README = ROOT / "README.md"
README_LINES = 140
GENERATED = "docs/reference/"
"""Pages that scripts write whole, tested by :func:`test_the_reference_pages_are_current` and beside their scripts."""
PRINTED_BY_TESTS = "docs/explanation/statistics.md"
"""Its tables are the output of tests/integration/test_coverage.py, which takes minutes."""
TIMED_ON_A_GPU = "docs/results/gpu.md"
"""Its table is printed by ``scripts/gpu_check.py``, which imports torch: a test of its own."""
OWN_CHOICES = {"value_weighted", "value_norm", "last_word", "animals"}
"""Choices that a page tells the reader to write; tests of those pages compose them."""


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def script(name: str = "docs_reference") -> ModuleType:
    """A script of ``scripts``, which is no part of the package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# links ----------------------------------------------------------------------------------------------------------------


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


@cache
def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_file_of_the_repository_that_is_named_exists(page: Path) -> None:
    folders = "methods|models|tasks|runners|analysis|conf|tests|scripts|docs|results/reference"
    named = re.findall(rf"`((?:{folders})/[\w./-]*\w)`", page.read_text(encoding="utf-8"))
    own = {"tasks/last_word.py", "models/tiny"}
    missing = [name for name in named if name not in own and not list(ROOT.glob(name + "*"))]
    assert missing == []


def test_every_page_that_the_code_names_exists() -> None:
    """Comments, docstrings and messages lead to a page that is there; pages of other repositories follow a commit."""
    for folder in ("conf", "methods", "models", "tasks", "runners", "analysis", "scripts", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".sh") and path.is_file():
                for page in re.findall(r"(?<!@[0-9a-f]{7} )\bdocs/[\w/-]+\.md\b", path.read_text(encoding="utf-8")):
                    assert (ROOT / page).is_file(), f"{path.relative_to(ROOT)} names {page}"


# commands -------------------------------------------------------------------------------------------------------------


def commands(text: str) -> Iterator[list[str]]:
    """Words of each ``kvbench``, ``python`` or ``make`` command of a page, in code blocks, indented or in a line."""
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.M | re.S)
    blocks += ["\n".join(line[4:] for line in re.findall(r"^    .*$", text, re.M))]
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    lines += re.findall(r"(?<!`)`((?:kvbench|python|make) [^`]*)`", text.replace("\n", " "))
    for line in lines:
        line = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line.strip()).split(";")[0]
        if re.match(r"(kvbench|python|make) ", line):
            try:
                yield shlex.split(line, comments=True)
            except ValueError:  # a quote that a placeholder leaves open
                continue


ALL_COMMANDS = {
    shlex.join(words): words for page in PAGES if page.is_file() for words in commands(page.read_text(encoding="utf-8"))
}
RUNS = {
    text: words[2:]
    for text, words in ALL_COMMANDS.items()
    if words[:2] in (["kvbench", "run"], ["python", "run.py"]) and not {"--help", "--cfg"} & set(words)
}


def variants(overrides: list[str]) -> Iterator[list[str]]:
    """Overrides without choices of a sweep: each choice once, with the first of all others."""
    loader = GlobalHydra.instance().config_loader()  # for ``glob(...)``
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(overrides)
    choices = [
        [f"{o.key_or_group}={value}" for value in o.sweep_string_iterator()] if o.is_sweep_override() else [text]
        for o, text in zip(parsed, overrides, strict=True)
    ]
    first = [options[0] for options in choices]
    yield first
    for place, options in enumerate(choices):
        for option in options[1:]:
            yield [*first[:place], option, *first[place + 1 :]]


def test_there_are_commands() -> None:
    """The pages are read: a pattern that finds nothing would pass every other test."""
    assert len(RUNS) > 40 and len(ALL_COMMANDS) > len(RUNS) + 20


@pytest.mark.slow
def test_every_run_command_composes() -> None:
    """``kvbench run ...`` and ``python run.py ...`` name groups, choices and keys that exist."""
    broken = []
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("kvbench.conf", version_base="1.3"):
        for text, words in RUNS.items():
            overrides = quote_texts([w for w in words if "=" in w and not w.startswith(("-", "hydra"))])
            if any(re.split("[=,]", w)[-1] in OWN_CHOICES or w.endswith(("=...", "=CHOICE")) for w in overrides):
                continue
            for launcher in (w for w in words if w.startswith("hydra/launcher=")):
                assert (ROOT / "conf" / f"{launcher.replace('=', '/')}.yaml").is_file(), text
            try:
                for chosen in variants(overrides):
                    hydra.compose("config", overrides=chosen)
            except HydraException as error:
                broken.append(f"{text}: {error}")
    assert broken == []


def test_every_other_command_is_one_that_there_is() -> None:
    targets = set(re.findall(r"^([a-z]+):.*?##", (ROOT / "Makefile").read_text(), re.M))
    for text, words in ALL_COMMANDS.items():
        if text in RUNS or words[1] in ("...", "COMMAND"):
            continue
        if words[0] == "make":
            assert words[1] in targets, text
        elif words[0] == "python":
            files = [w for w in words[1:] if re.fullmatch(r"(scripts|tests)/[\w/]+\.(py|sh)", w)] or [words[1]]
            assert all((ROOT / name).is_file() for name in files if name != "-m"), text
        else:
            assert words[1] in COMMANDS, text
            if words[1] != "run" and len(words) > 2:
                script().command_parser(words[1]).parse_args(words[2:])
        for word in words[1:]:
            if word.startswith("results/reference/") and "-o" not in words[words.index(word) - 1]:
                assert (ROOT / word).exists(), text


# contents -------------------------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_names_every_method() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= README_LINES
    table = text[text.index("## Methods") : text.index("## Tasks")]
    for path in (ROOT / "conf" / "method").glob("*.yaml"):
        is_composition = isinstance(yaml.safe_load(path.read_text()).get("defaults", [None])[0], str)
        assert f"`{path.stem}`" in table or is_composition, path.stem


def test_every_task_is_on_the_page_of_tasks() -> None:
    text = (ROOT / "docs" / "reference" / "tasks.md").read_text(encoding="utf-8")
    for path in [*(ROOT / "conf" / "task").glob("*.yaml"), *(ROOT / "conf" / "workload").glob("*.yaml")]:
        assert f"`{path.stem}`" in text or f"={path.stem}`" in text, path.stem


def number_rows(text: str) -> list[str]:
    """Rows of the tables of a page most of whose cells are numbers, but for their heads."""
    rows = []
    for table in re.findall(r"(?:^\|.*\n)+", text + "\n", re.M):
        body = table.splitlines()[2:]
        cells = [cell.strip() for row in body for cell in row.split("|")[2:-1]]
        numbers = sum(re.match(r"[*`\[]*[+-]?\d", cell) is not None for cell in cells)
        if numbers > sum(map(bool, cells)) / 2:
            rows += body
    return rows


def test_number_tables_are_found() -> None:
    table = "| a | b | c |\n|---|---|---:|\n| x | **1.5** | |\n| y | [2, 3] | word |\n"
    assert number_rows(f"text\n\n{table}\nmore") == table.splitlines()[2:]
    assert number_rows("| a | b |\n|---|---|\n| 1 | word |\n") == []


@pytest.mark.parametrize("page", [p for p in PAGES if number_rows(p.read_text(encoding="utf-8"))], ids=page_id)
def test_every_row_of_numbers_is_printed_by_a_command_of_the_page(page: Path, monkeypatch, capsys) -> None:
    if page_id(page).startswith(GENERATED) or page_id(page) in (PRINTED_BY_TESTS, TIMED_ON_A_GPU):
        pytest.skip("tested elsewhere")
    monkeypatch.chdir(ROOT)
    text = page.read_text(encoding="utf-8")
    for words in commands(text):
        if words[:2] == ["kvbench", "table"] and "results/reference" in " ".join(words[2:3]):
            assert tables.main(words[2:]) == 0
        elif words[:2] == ["python", "scripts/result_tables.py"]:
            assert script("result_tables").main(words[2:]) == 0
    printed = capsys.readouterr().out.splitlines()
    if page == README:
        for group in comparable(load(ROOT / "results/reference/make_run")[0]):
            printed += tables.markdown(tables.accuracy_table(group, by_set=False)).splitlines()
    assert [row for row in number_rows(text) if row not in printed] == []


@pytest.mark.slow
def test_the_gpu_s_table_is_printed_by_its_command() -> None:
    text = (ROOT / TIMED_ON_A_GPU).read_text(encoding="utf-8")
    (words,) = (words for words in commands(text) if words[:2] == ["python", "scripts/gpu_check.py"])
    made = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert number_rows(text) and [row for row in number_rows(text) if row not in made.stdout.splitlines()] == []


def test_the_reference_pages_are_current() -> None:
    """Else: ``python scripts/docs_reference.py --write``."""
    for name, text in script().pages().items():
        assert (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8") == text, name


def test_every_page_is_in_the_navigation() -> None:
    """mkdocs itself needs its own packages; the list is checked without them."""
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    pages = [p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(str(page) for page in pages if page.parts[0] != "figures")


def test_design_notes_are_short_and_their_numbers_stay() -> None:
    """Notes 1 to N each once, so that a number cites a note; none of them is a page."""
    text = (ROOT / "docs" / "explanation" / "decisions.md").read_text(encoding="utf-8")
    notes = re.split(r"^\*\*(\d+)\.\*\* ", text, flags=re.M)
    assert sorted(map(int, notes[1::2])) == list(range(1, len(notes) // 2 + 1))
    assert [number for number, note in zip(notes[1::2], notes[2::2], strict=True) if len(note) > 900] == []


def test_the_quick_tests_are_files_that_there_are() -> None:
    (names,) = re.findall(r"^QUICK := ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.M)
    files = names.replace("\\\n", " ").split()
    assert files and all(list((ROOT / "tests").glob(f"*/test_{name}.py")) for name in files)
