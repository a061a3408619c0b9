"""A table as data: its cells with their numbers, and what is said above and below it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...conf.versions import older_parts
from ..load import Run

MIB, GIB = 2**20, 2**30

INTERVAL, RANGE = "95 % interval", "least and greatest"
"""What ``low`` and ``high`` of a cell are."""


class Cell(NamedTuple):
    """One entry; a tuple, because a table of many runs has millions of them.

    Attributes:
        text: as printed.
        value, low, high, n: the number, its interval and the count behind it, for the CSV; None for words.
        better: +1 where larger is better, -1 where smaller is, 0 where neither is a merit.
        bold: the best of its column.
        measured: low and high are the least and greatest of repeated measurements, not an interval of a mean.
        p: p-value against the full cache after Holm's rule within the table.
    """

    text: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    better: int = 0
    bold: bool = False
    measured: bool = False
    p: float | None = None

    @property
    def spread(self) -> str:
        """What ``low`` and ``high`` are, in words; empty where there are none."""
        if self.low is None:
            return ""
        return RANGE if self.measured else INTERVAL


@dataclass
class Table:
    """One group of comparable runs.

    Attributes:
        title: task and model.
        columns: headers; the first is the method's.
        rows: cells, row by row; ``runs`` holds the run of each.
        notes: sentences below the table.
        families: of each column, the heading that it shares with its neighbours, or an empty text; empty: none has one.
        blocks: number of each row's block of comparable rows; empty: all rows are one block.
        name: of the table in file names and LaTeX labels.
        setting: what the runs have in common, as in the title; empty: each row has its own.
    """

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    runs: list[Run]
    notes: list[str] = field(default_factory=list)
    families: list[str] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    name: str = ""
    setting: str = ""

    def family_spans(self) -> list[tuple[str, int]]:
        """(heading, number of columns) from left to right; no heading is an empty text."""
        spans: list[tuple[str, int]] = []
        for family in self.families or [""] * len(self.columns):
            if spans and spans[-1][0] == family:
                spans[-1] = (family, spans[-1][1] + 1)
            else:
                spans.append((family, 1))
        return spans

    def with_columns(self, places: Sequence[int]) -> Table:
        """The same table with some of its columns, in their order."""
        return Table(
            self.title,
            [self.columns[i] for i in places],
            [[row[i] for i in places] for row in self.rows],
            self.runs,
            self.notes,
            [self.families[i] for i in places] if self.families else [],
            self.blocks,
            self.name,
            self.setting,
        )


MISSING = Cell("-")
"""A number that a run does not have."""
OLDER = "‡"
"""Sign of a run of an older version of a part."""


def label(run: Run) -> Cell:
    """The name of a row's run, with :data:`OLDER` where it has a part of an older version."""
    return Cell(run.label + older_sign(run))


def older_sign(run: Run) -> str:
    """:data:`OLDER` for a run with a part of an older version, else nothing."""
    return OLDER if older_parts(run.record["identity"]) else ""


def score(estimate: Mapping[str, Any], form: str = ".2f", better: int = 1) -> Cell:
    """A mean, with its interval for the CSV."""
    mean = estimate["mean"]
    return Cell(fixed(mean, form), mean, estimate["low"], estimate["high"], estimate["n"], better)


def interval(estimate: Mapping[str, Any], form: str = ".2f") -> Cell:
    """The interval of a mean; a dash where there is none."""
    if estimate["low"] is None:
        return MISSING
    return Cell(f"[{fixed(estimate['low'], form)}, {fixed(estimate['high'], form)}]")


def fixed(value: float, form: str) -> str:
    """A number with fixed digits, and no sign where all digits are zero: 0.00, not -0.00."""
    text = format(value, form)
    return text if text.strip("+-0.,") else format(0.0, form.removeprefix("+"))


def percent(share: float | None) -> Cell:
    """A share as a cell."""
    return MISSING if share is None else number(100 * share, 1, " %")


def number(value: float, digits: int, unit: str = "") -> Cell:
    """A number with its unit."""
    return Cell(f"{value:.{digits}f}{unit}", value)


def metric(record: Mapping[str, Any], name: str, digits: int, better: int) -> Cell:
    """The median of a repeated measurement."""
    spread = record["metrics"].get(name)
    if spread is None:
        return MISSING
    count = len(spread["repetitions"])
    return Cell(
        f"{spread['median']:.{digits}f}", spread["median"], spread["min"], spread["max"], count, better, measured=True
    )


def peak(record: Mapping[str, Any], phase: str) -> Cell:
    """Highest mark of memory in MiB; a dash where the machine cannot measure it."""
    mark = record["memory"][phase]
    return MISSING if mark is None else Cell(f"{mark['allocated'] / MIB:.0f}", mark["allocated"] / MIB, better=-1)


def run_hash(run: Run) -> Cell:
    """The run that a row is of."""
    return Cell(run.record["hash"])


def out_of_memory_row(run: Run, columns: int) -> list[Cell]:
    """The row of a run that has no numbers; the last column is the run's hash."""
    return [label(run), Cell("out of memory"), *(Cell("") for _ in range(columns - 3)), run_hash(run)]
