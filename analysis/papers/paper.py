"""A paper's published numbers, and which run of ours answers each: read from ``data/NAME.toml`` and its CSV files.

The CSV files hold facts as the papers print them: a line for each model and setting, in the paper's words, and a column
for each number. The TOML file names their source and translates models, settings and columns into runs.
"""

from __future__ import annotations

import csv
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from statistics import fmean
from typing import Any

from ...conf.errors import InputError
from ...conf.wording import one_of
from .claims import Claim, claims

AVERAGE = "average"


@dataclass(frozen=True)
class PaperRow:
    """One line of a published table.

    Attributes:
        model, setting: in the paper's words.
        values: the numbers by column.
        our_model: name of the same model in our records; None where there is no configuration for it.
        label: of the run that answers it; None where no method does, and ``reason`` says why.
        settings: ``part.key=value`` of the run's identity where labels do not tell.
        run: overrides that make the run.
    """

    model: str
    setting: str
    values: Mapping[str, float]
    our_model: str | None = None
    label: str | None = None
    settings: str = ""
    run: str = ""
    reason: str = ""

    @property
    def name(self) -> str:
        """The model and the setting as one text."""
        return f"{self.model}, {self.setting}"


@dataclass(frozen=True)
class PaperTable:
    """One published table.

    Attributes:
        name, source: what it is and where it was read.
        rows: its lines.
        kind, task: of our records that answer it: ``accuracy`` with the class of the task, or ``train``.
        columns: our data set (or metric) of each published column.
        unit: of the numbers.
        run: overrides that all runs share.
        question_after_compression: whether the prompt is compressed before the question is known.
        differs: in which our runs differ from the paper's in any case.
    """

    name: str
    source: str
    rows: Sequence[PaperRow]
    kind: str
    task: str
    columns: Mapping[str, str]
    unit: str
    run: str
    question_after_compression: bool
    differs: tuple[str, ...]

    @property
    def sets(self) -> list[str]:
        """Our names of the columns, without the average."""
        return [ours for ours in self.columns.values() if ours != AVERAGE]


@dataclass(frozen=True)
class Paper:
    """One paper.

    Attributes:
        name: of the command's argument.
        title, arxiv: of the paper.
        methods: names of our methods that are the paper's.
        tables: published tables of quality.
        claims: published figures of speed and memory.
        note: what a reader must know.
    """

    name: str
    title: str
    arxiv: str
    methods: Sequence[str]
    tables: Sequence[PaperTable] = ()
    claims: Sequence[Claim] = ()
    note: str = field(default="")


def names() -> list[str]:
    """Every paper that there is data of."""
    data = files("kvbench.analysis") / "papers" / "data"
    return sorted(file.name.removesuffix(".toml") for file in data.iterdir() if file.name.endswith(".toml"))


def paper(name: str) -> Paper:
    """One paper by its name; case, dashes and underscores do not matter.

    Raises:
        InputError: there is none of this name.
    """
    plain = {re.sub(r"\W|_", "", known).lower(): known for known in names()}
    known = plain.get(re.sub(r"\W|_", "", name).lower())
    if known is None:
        raise InputError("NAME", name, one_of(name, [*names(), "all"]))
    read = tomllib.loads(_data(f"{known}.toml"))
    return Paper(
        name=known,
        title=read["title"],
        arxiv=read["arxiv"],
        methods=read["methods"],
        tables=[_table(table) for table in read.get("tables", ())],
        claims=[claim for claim in claims() if claim.paper == read.get("claims")],
        note=read.get("note", ""),
    )


def _table(read: Mapping[str, Any]) -> PaperTable:
    lines = list(csv.DictReader(_data(read["file"]).splitlines()))
    published = [name for name in lines[0] if name not in ("model", "setting")]
    columns = read.get("columns") or {name: name for name in published}
    return PaperTable(
        name=read["name"],
        source=read["source"],
        rows=[_row(line, columns, read) for line in lines if any(line[name] for name in columns)],
        kind=read.get("kind", "accuracy"),
        task=read.get("task", ""),
        columns=columns,
        unit=read.get("unit", "percent"),
        run=read.get("run", ""),
        question_after_compression=read.get("question_after_compression", False),
        differs=tuple(read.get("differs", ())),
    )


def _row(line: Mapping[str, str], columns: Mapping[str, str], table: Mapping[str, Any]) -> PaperRow:
    """A line of the CSV with the first rule of the table that fits it."""
    values = {name: float(line[name]) for name in columns if line[name]}
    if AVERAGE not in columns and len(values) == len(columns) > 1:
        values[AVERAGE] = fmean(values.values())
    model, setting = line["model"], line["setting"]
    trained = table.get("kind") == "train"
    our_model = "scratch" if trained else table.get("models", {}).get(model)
    for rule in table.get("rows", ()):
        found = _match(rule, model, setting)
        if found is None:
            continue
        if "none" in rule:
            return PaperRow(model, setting, values, our_model, reason=rule["none"])
        label, settings, run = (_fill(rule.get(key, ""), found) for key in ("label", "settings", "run"))
        reason = "" if our_model is not None else "there is no configuration of this model"
        return PaperRow(model, setting, values, our_model, label, settings, run, reason)
    return PaperRow(model, setting, values, our_model, reason="no such method here")


def _match(rule: Mapping[str, Any], model: str, setting: str) -> dict[str, str] | None:
    """The named parts of a line that a rule fits; None where it does not."""
    found: dict[str, str] = {}
    for key, text in (("model", model), ("setting", setting)):
        if key in rule:
            pattern = "".join(
                f"(?P<{part[1:-1]}>.+?)" if part.startswith("{") else re.escape(part)
                for part in re.split(r"(\{\w+\})", rule[key])
            )
            match = re.fullmatch(pattern, text)
            if match is None:
                return None
            found |= match.groupdict()
    if any(found.get(name) not in allowed for name, allowed in rule.get("only", {}).items()):
        return None
    return found


def _fill(template: str, values: Mapping[str, str]) -> str:
    """``{name}`` as the value, ``{a+b}`` as a sum."""

    def value(match: re.Match[str]) -> str:
        first, second = match.groups()
        return values[first] if second is None else str(int(values[first]) + int(values[second]))

    return re.sub(r"\{(\w+)(?:\+(\w+))?\}", value, template)


def _data(name: str) -> str:
    return (files("kvbench.analysis") / "papers" / "data" / name).read_text(encoding="utf-8")
