"""Finished runs read back from results folders: their records, and which of them may stand in one table.

    runs, problems = load(Path("results/reference"))
    for group in comparable(runs): ...

A record that is damaged, or whose numbers contradict each other, is left out and named in ``problems``; see
:mod:`.schema` for the rules.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ..conf.errors import InputError
from .compact import LazyRecord
from .describe import (
    average,
    by_compressed_layers,
    compressed_layers,
    fewer_is_better,
    has_current_intervals,
    longbench_rows,
    setting,
    tie_rule,
)
from .entries import NOT_LOADED, examples_of, read_entries, read_record
from .examples import Examples
from .ordering import by_budget, comparable, flat, ordered, settings_key
from .schema import FIELDS, RECORD, RESULTS, SAMPLES, SCHEMA

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "FIELDS",
    "NOT_LOADED",
    "RECORD",
    "RESULTS",
    "SAMPLES",
    "SCHEMA",
    "Run",
    "average",
    "by_budget",
    "by_compressed_layers",
    "comparable",
    "compressed_layers",
    "fewer_is_better",
    "flat",
    "frame",
    "load",
    "longbench_rows",
    "read_record",
    "read_runs",
    "setting",
    "settings_key",
    "tie_rule",
]

HEADLINES = ("score", "kv_bytes_stored", "kv_ratio", "ttft_ms", "tpot_ms", "decode_tokens_per_s", "peak_decode_bytes")
"""Columns that :func:`frame` has whatever kinds of runs there are."""


P = ParamSpec("P")
T = TypeVar("T")


def _without_collection(function: Callable[P, T]) -> Callable[P, T]:
    """The function without Python's search for cycles, which would go through all records again and again."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        was_on = gc.isenabled()
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            if was_on:
                gc.enable()

    return run


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        path: its folder.
        record: ``record.json``; :func:`load` leaves out :data:`NOT_LOADED`, which :meth:`whole_record` has.
        label: name for tables; see :func:`load`.
        examples: score of each example, for tests between runs; None if ``samples.jsonl`` does not fit the record.
        settings: ``group_key`` if it is known; None: it is made from the record.
        is_current: :func:`has_current_intervals` of the record if it is known; None: the record is asked.
    """

    path: Path
    record: Mapping[str, Any]
    label: str
    examples: Examples | None = None
    settings: str | None = None
    is_current: bool | None = None

    @cached_property
    def is_full_cache(self) -> bool:
        """Everything kept, uncompressed: the baseline (``full`` on another storage is not)."""
        method = self.record["identity"]["method"]
        is_plain = method["selection"] == {"class": "Selection"} and method["storage"] == {"class": "Dense"}
        return bool(is_plain and method.get("sharing") is None)

    @property
    def curve(self) -> str:
        """The label without its budget (``snapkv + kivi4``): what one curve of a figure is of."""
        budget = self.record["budget"]
        return self.label if budget is None else self.label.replace(f" {budget}", "", 1)

    @property
    def done(self) -> bool:
        """False for a run that was out of memory: it has no numbers."""
        return bool(self.record["status"] == "done")

    @cached_property
    def group_key(self) -> str:
        """:func:`settings_key` of the record."""
        return settings_key(self.record) if self.settings is None else self.settings

    def built(self) -> Run:
        """This run with its record as a dict of its own, where only some fields of it are in memory."""
        return replace(self, record=self.record.whole()) if isinstance(self.record, LazyRecord) else self

    def samples(self) -> list[dict[str, Any]]:
        """Rows of ``samples.jsonl``, one per example."""
        with (self.path / SAMPLES).open(encoding="utf-8") as file:  # str.splitlines would also split at U+2028
            return [json.loads(line) for line in file]

    def whole_record(self) -> dict[str, Any]:
        """``record.json`` with all its fields, read again."""
        return read_record(self.path / RECORD)


@_without_collection
def load(folder: str | Path, *more: str | Path) -> tuple[list[Run], list[str]]:
    """Every finished run under the folders, by method and budget, and a line for each record that is not shown.

    A record is not shown if it cannot be read, breaks a rule of :mod:`.schema`, contradicts its samples, or is a copy
    of another one. One whose samples are missing or damaged is shown, and a line says so.

    Runs of one table whose labels would be the same (``snapkv 512`` with two windows) are distinguished by the settings
    in which they differ.

    The committed runs, in ``reference`` directly below a results folder, are read only if that folder is named.

    Raises:
        InputError: no record in one of the folders.
    """
    runs, problems = [], []
    for results in dict.fromkeys(map(Path, (folder, *more))):
        for below, entry in read_entries(results).items():
            path = results / below
            if entry.skipped is not None:
                problems.append(f"skipped: {InputError('results_dir', path / RECORD, entry.skipped)}")
            if entry.note is not None:
                text = f"{entry.note}; the run is shown, without tests of significance"
                problems.append(f"note: {InputError('results_dir', path / SAMPLES, text)}")
            if entry.record is not None:
                known = (entry.settings, entry.is_current)
                runs.append(Run(path, entry.record, entry.record["method_label"], entry.examples, *known))
    runs, copies = _without_copies(runs)
    return ordered(_with_current_statistics(runs)), problems + copies


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """The runs in these folders, in the order and with the labels of :func:`load`.

    Raises:
        InputError: one of them has no record that can be read.
    """
    records = [(folder, read_record(folder / RECORD)) for folder in folders]
    runs = [Run(folder, r, r["method_label"], examples_of(folder, r)) for folder, r in records]
    return ordered(_with_current_statistics(runs))


def _without_copies(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """One run of each hash, the one that finished last; and a line for each other one."""
    chosen: dict[str, Run] = {}
    for run in runs:
        other = chosen.get(run.record["hash"])
        if other is None or _freshness(run) > _freshness(other):
            chosen[run.record["hash"]] = run
    copies = []
    for run in runs:
        kept = chosen[run.record["hash"]]
        if kept is not run:
            problem = f"is the same run as {kept.path}, which finished last and is shown"
            copies.append(f"skipped: {InputError('results_dir', run.path / RECORD, problem)}")
    return [run for run in runs if chosen[run.record["hash"]] is run], copies


def _freshness(run: Run) -> tuple[bool, str]:
    return run.done, run.record.get("finished", "")


def _with_current_statistics(runs: Sequence[Run]) -> list[Run]:
    """The runs with intervals made by today's rules, where records are older and their examples are there."""
    by_hash = {run.record["hash"]: run for run in runs}
    return [_with_current_intervals(run, by_hash) if _has_older_intervals(run) else run for run in runs]


def _has_older_intervals(run: Run) -> bool:
    is_current = has_current_intervals(run.record) if run.is_current is None else run.is_current
    return not is_current and run.examples is not None


def _with_current_intervals(run: Run, by_hash: Mapping[str, Run]) -> Run:
    from .summaries import with_current_statistics  # here, because it imports scipy

    assert run.examples is not None
    scores = run.examples.by_data_set()
    if scores.keys() != run.record["scores"].keys():  # rows of before they named their part of a data set
        return run
    full = by_hash.get(run.record.get("paired", {}).get("hash", ""))
    baseline = None if full is None or full.examples is None else full.examples.by_data_set()
    return replace(run, record=with_current_statistics(run.record, scores, baseline))


def frame(runs: Sequence[Run]) -> pd.DataFrame:
    """Runs as a table for one's own analysis: a row a run, with what identifies it and its headline numbers.

    Columns that a kind of run has no number for are NaN there: ``score`` for an efficiency run, ``tpot_ms`` for an
    accuracy run.
    """
    import pandas as pd  # here, because its import takes longer than most tables

    rows = []
    for run in runs:
        record = run.record
        row: dict[str, Any] = {key: record[key] for key in ("kind", "status", "task", "model", "method", "budget")}
        row |= {"label": run.label, "dtype": record["identity"]["dtype"], "device": record["identity"]["device"]}
        row |= record.get("bytes", {})
        if "average" in record:
            shown = average(record)
            row |= {"score": shown["mean"], "score_low": shown["low"], "score_high": shown["high"]}
            row["score_unit"] = "perplexity" if fewer_is_better(record) else "percent"
        row |= {name: None if m is None else m["median"] for name, m in record.get("metrics", {}).items()}
        for phase in ("peak_prefill", "peak_decode"):
            if record.get("memory", {}).get(phase):
                row[f"{phase}_bytes"] = record["memory"][phase]["allocated"]
        row |= {"hash": record["hash"], "path": str(run.path)}
        rows.append(row)
    made = pd.DataFrame(rows)
    return made.reindex(columns=[*made.columns, *(c for c in HEADLINES if c not in made.columns)])
