"""Tables of scored runs: a row a run, with its scores by data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from ..describe import setting
from ..held import reads_another_part, share_held, share_read
from ..load import Run, average, fewer_is_better
from ..stats import LEVEL, Comparison, Estimate, non_inferior
from .cells import MIB, MISSING, Cell, Table, interval, label, number, out_of_memory_row, percent, run_hash, score
from .longbench import family, paper_order, short_name
from .marks import (
    BEST,
    BLOCKS,
    DAGGER,
    FLOOR_MARK,
    READ,
    Tests,
    at_the_floor,
    bold,
    in_blocks,
    members_of,
    significant,
    tests_of,
)
from .notes import guards, made_by, missing_sets, narrow_storage, older_versions, ways_of_reading
from .reference import FULL_CACHE, Reference

HOLM = "p (Holm)"
WITHIN = {True: "yes", False: "no", None: "undecided"}
"""Answers of :func:`.stats.non_inferior` in words."""


def accuracy_table(
    runs: Sequence[Run],
    by_set: bool = True,
    tested: bool = True,
    margin: float | None = None,
    reference: Reference = FULL_CACHE,
) -> Table:
    """Scores by data set, their mean with its interval, the paired difference to a reference, and bytes.

    Args:
        runs: one group of comparable runs, at least one.
        by_set: a column for each data set, examples won and lost, and output length; without them the table fits a
            terminal.
        tested: whether differences are tested, and the best are bold.
        margin: largest loss against the reference that counts as none, in the unit of the difference: a column says
            which methods are within it; default: no such column.
        reference: method that the others are compared with.

    Raises:
        InputError: the reference is more than one method of the table.
    """
    runs, blocks = in_blocks(runs)
    done = [run for run in runs if run.done]
    tests = tests_of(done, reference.run_for) if tested else Tests()
    columns = _Columns.of(done, by_set, tests, margin, reference)
    rows = [columns.row(run) if run.done else out_of_memory_row(run, len(columns.heads)) for run in runs]
    families = ["", *map(family, columns.names), *("" for _ in columns.heads[1 + len(columns.names) :])]
    table = Table(title(runs), columns.heads, rows, runs, families=families if any(families) else [], blocks=blocks)
    marks = _mark_the_best(table, columns) if tested else []
    table.notes += guards(runs[0].record) + missing_sets(runs) + marks + columns.notes() + narrow_storage(runs)
    table.notes += ways_of_reading(runs) + older_versions(runs) + made_by(runs)
    return table


@dataclass(frozen=True)
class _Columns:
    """Columns of a table of scores.

    Attributes:
        names: Data sets with a column of their own.
        further: Averages beside the one over all data sets.
        loss: Whether scores are losses, shown as perplexity.
        is_whole: Whether there are columns for examples won and lost, and for output length.
        has_mean_bytes: Whether records have the mean bytes over the decode steps.
        has_read_bytes: Whether a step of any method reads other bytes than are held.
        floor: Data sets on which the full cache scores nothing.
        tests: Comparisons of the runs.
        margin: Loss against the reference that counts as none; None: there is no such column.
        reference: Method that the others are compared with.
    """

    names: list[str]
    further: list[str]
    loss: bool
    is_whole: bool
    has_mean_bytes: bool
    has_read_bytes: bool
    floor: set[str]
    tests: Tests
    margin: float | None
    reference: Reference

    @classmethod
    def of(
        cls, done: Sequence[Run], by_set: bool, tests: Tests, margin: float | None, reference: Reference
    ) -> _Columns:
        names = sorted(_keys(done, "scores"), key=paper_order) if by_set else []
        loss = bool(done) and fewer_is_better(done[0].record)
        if loss and len(names) == 1:
            names = []
        has_mean = any(run.record["bytes"].get("kv_bytes_mean") is not None for run in done)
        full = next((run for run in done if run.is_full_cache), None)
        has_read = reads_another_part(done)
        averages, floor = _keys(done, "averages"), at_the_floor(full)
        return cls(names, averages, loss, by_set, has_mean, has_read, floor, tests, margin, reference)

    @property
    def heads(self) -> list[str]:
        mean, unit = ("perplexity", "nats ") if self.loss else ("mean", "")
        against = f"{unit}vs {self.reference.name}"
        heads = ["method", *map(short_name, self.names), *self.further, mean, "95 % interval", against, "95 % interval"]
        heads += [] if self.reference.is_full_cache else [HOLM]
        heads += [f"within {self.margin:g}"] if self.margin is not None else []
        heads += ["won/tied/lost"] if self.is_whole and self.tests.paired else []
        heads += [f"tokens vs {self.reference.name}"] if self.is_whole and self.tests.drift else []
        heads += ["KV MiB", "mean KV MiB"] if self.has_mean_bytes else ["KV MiB"]
        return [*heads, "KV kept", *(["KV read"] if self.has_read_bytes else []), "run"]

    def row(self, run: Run) -> list[Cell]:
        record = run.record
        better, digits = (-1, 3) if self.loss else (1, 2)
        averages, held, mean = record.get("averages", {}), record["bytes"], average(record)
        return [
            label(run),
            *self._data_sets(run, better),
            *(score(averages[n]) if n in averages else MISSING for n in self.further),
            score(mean, better=better),
            interval(mean),
            *self._against_reference(run, f"+.{digits}f"),
            *([self._within(run, self.margin)] if self.margin is not None else []),
            *self._examples(run),
            number(held["kv_bytes_stored"] / MIB, 2),
            *([_mean_bytes(held)] if self.has_mean_bytes else []),
            percent(share_held(run)),
            *([percent(share_read(run))] if self.has_read_bytes else []),
            run_hash(run),
        ]

    def _data_sets(self, run: Run, better: int) -> list[Cell]:
        record = run.record
        scores = {name: average(record, name) for name in record["scores"]} if self.loss else record["scores"]
        cells = [score(scores[name], better=better) if name in scores else MISSING for name in self.names]
        if not run.is_full_cache:
            return cells
        return [
            cell._replace(text=cell.text + FLOOR_MARK) if name in self.floor else cell
            for name, cell in zip(self.names, cells, strict=True)
        ]

    def _difference(self, run: Run) -> Mapping[str, Any] | None:
        """The paired difference to the reference: as recorded, for the full cache."""
        if self.reference.is_full_cache:
            recorded: Mapping[str, Any] | None = run.record.get("paired", {}).get("difference")
            return recorded
        pair = self.tests.paired.get(run.record["hash"])
        return None if pair is None else asdict(pair[0].difference)

    def _against_reference(self, run: Run, form: str) -> list[Cell]:
        """The paired difference, with a mark if it is significant, its interval, and p where it has a column."""
        difference = self._difference(run)
        if difference is None:
            return [MISSING, MISSING] if self.reference.is_full_cache else [MISSING, MISSING, MISSING]
        cell = score(difference, form)
        pair = self.tests.paired.get(run.record["hash"])
        if pair is not None:
            cell = cell._replace(p=pair[1], text=cell.text + (DAGGER if self.tests.is_significant(run) else ""))
        cells = [cell, interval(difference, form)]
        return cells if self.reference.is_full_cache or pair is None else [*cells, number(pair[1], 4)]

    def _within(self, run: Run, margin: float) -> Cell:
        """Whether a run loses less than the margin against the reference."""
        difference = self._difference(run)
        if difference is None or difference["low"] is None:
            return MISSING
        ends = (difference["mean"], difference["low"], difference["high"], difference["n"])
        return Cell(WITHIN[non_inferior(Estimate(*ends), margin, self.loss)])

    def _examples(self, run: Run) -> list[Cell]:
        """Examples won, tied and lost, and the change of the output's length."""
        if not self.is_whole:
            return []
        cells = []
        if self.tests.paired:
            pair = self.tests.paired.get(run.record["hash"])
            cells.append(MISSING if pair is None else self._flips(pair[0]))
        if self.tests.drift:
            drift = self.tests.drift.get(run.record["hash"])
            cells.append(MISSING if drift is None else score(asdict(drift), "+.1f"))
        return cells

    def _flips(self, comparison: Comparison) -> Cell:
        won, lost = comparison.won, comparison.lost
        if self.loss:  # a larger loss is lost
            won, lost = lost, won
        return Cell(f"{won}/{comparison.tied}/{lost}")

    def notes(self) -> list[str]:
        """What the marks and the further columns are."""
        notes = []
        if not self.reference.is_full_cache:
            name = self.reference.name
            notes.append(f"vs {name}: paired on the same examples, at the row's budget if {name} has several budgets.")
        if any(p < 1 - LEVEL for _, p in self.tests.paired.values()):
            notes.append(significant(self.reference.words))
        if self.margin is not None:
            unit = "nats" if self.loss else "points"
            notes.append(
                f"within {self.margin:g}: whether the whole interval of the difference is above a loss of "
                f"{self.margin:g} {unit} (yes), below it (no) or neither (undecided); one-sided, 2.5 %."
            )
        floor = [short_name(name) for name in self.names if name in self.floor]
        if floor:
            notes.append(f"{FLOOR_MARK}: the full cache scores 0 on nearly all examples, so no method can lose there.")
        if self.is_whole and self.tests.paired:
            notes.append(
                f"won/tied/lost: examples that score more, the same and less than with {self.reference.words}."
            )
        if self.is_whole and self.tests.drift:
            notes.append(f"tokens vs {self.reference.name}: change of the output's length.")
        if self.has_mean_bytes:
            notes.append("KV MiB: after the prompt; mean KV MiB and KV kept: mean over the predicted tokens.")
        if self.has_read_bytes:
            notes.append(READ)
        return notes


def _keys(done: Sequence[Run], field: str) -> list[str]:
    """Names in a field of any of the runs, in the order of the first run that has them."""
    return list(dict.fromkeys(chain.from_iterable(run.record.get(field, ()) for run in done)))


def _mean_bytes(held: Mapping[str, Any]) -> Cell:
    mean = held.get("kv_bytes_mean")
    return MISSING if mean is None else number(mean / MIB, 2)


def _mark_the_best(table: Table, columns: _Columns) -> list[str]:
    """Set the best cells of each block in bold; the notes that say so."""
    members = members_of(table.runs, table.blocks)
    places = {name: 1 + i for i, name in enumerate(columns.names)}
    mean = 1 + len(columns.names) + len(columns.further)
    for rows in members:
        runs = [table.runs[i] for i in rows]
        for name, column in [*places.items(), (None, mean)]:
            best = columns.tests.best(runs, name)
            for i in rows:
                if table.runs[i].record["hash"] in best:
                    table.rows[i][column] = bold(table.rows[i][column])
    return [BLOCKS, BEST] if members else []


def title(runs: Sequence[Run]) -> str:
    """Task, model, amount of data and settings of a group."""
    record = runs[0].record
    examples = record["data"].get("examples", {})
    count = f"{sum(examples.values())} examples of {len(examples)} data set{'s' if len(examples) != 1 else ''}"
    return f"{record['task']} / {record['model']}: {count}, {setting(record, runs)}"
