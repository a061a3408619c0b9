"""One table for each group of comparable runs, under titles that tell them apart."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from ..describe import setting
from ..load import Run, comparable, flat
from .accuracy import accuracy_table
from .budgets import budget_tables
from .cells import Table
from .efficiency import efficiency_table
from .marks import MAX_TESTED
from .reference import FULL_CACHE, Reference
from .training import train_table

KINDS: Mapping[str, Callable[[Sequence[Run]], Table]] = {
    "accuracy": accuracy_table,
    "efficiency": efficiency_table,
    "train": train_table,
}

TOLD = re.compile(
    r"(kind|dtype|device|seed|batch_size|hardware\..*|runner\.compile|task\.limit|task\.sha256\..*|task\.source"
    r"|task\.class|model\.name|task\.prompt_tokens|task\.new_tokens)"
)
"""Settings that every title has, or that its other parts follow from."""
LONGEST = 40
"""Characters of a setting's value in a title."""


def tables(runs: Sequence[Run]) -> list[Table]:
    """One table for each group of comparable runs."""
    return list(each_table(runs))


def each_table(
    runs: Sequence[Run], by_budget: bool = False, margin: float | None = None, reference: Reference = FULL_CACHE
) -> Iterator[Table]:
    """The tables one by one, so that those of a large folder need not be in memory together.

    Args:
        runs: All runs.
        by_budget: A row a method and a column a budget.
        margin, reference: See :func:`.accuracy.accuracy_table`.
    """
    used: Counter[str] = Counter()
    for make in table_makers(runs, by_budget, margin, reference):
        for table in make():
            table.name = _name(table.runs[0], used)
            yield table


def table_makers(
    runs: Sequence[Run], by_budget: bool = False, margin: float | None = None, reference: Reference = FULL_CACHE
) -> list[Callable[[], list[Table]]]:
    """For each group of comparable runs, what makes its tables, without names; see :func:`each_table`."""
    groups = [group for group in comparable(runs) if group[0].record["kind"] in KINDS]
    differences = differences_of(groups)
    tested = len(runs) <= MAX_TESTED
    options = _Options(by_budget, margin, tested, reference)
    return [partial(_tables_of, group, differences[group[0].group_key], options) for group in groups]


class _Options(NamedTuple):
    by_budget: bool
    margin: float | None
    tested: bool
    reference: Reference


def _tables_of(group: Sequence[Run], differences: Sequence[str], options: _Options) -> list[Table]:
    """Tables of a group; ``differences``: the settings in which its tables differ from those of other groups."""
    group = [run.built() for run in group]  # which are in memory until these tables are written
    is_accuracy = group[0].record["kind"] == "accuracy"
    _, margin, tested, reference = options
    if options.by_budget:
        group_tables = budget_tables(group, tested, reference)
    elif is_accuracy:
        group_tables = [accuracy_table(group, tested=tested, margin=margin, reference=reference)]
    else:
        group_tables = [KINDS[group[0].record["kind"]](group)]
    common = ", ".join([setting(group[0].record, group), *differences])
    for table in group_tables:
        table.setting = common
        if not tested and is_accuracy:
            table.notes.append(f"Differences are not tested among more than {MAX_TESTED} runs: choose some.")
        table.title = ", ".join([table.title, *differences])
    return group_tables


def differences_of(groups: Sequence[Sequence[Run]]) -> dict[str, list[str]]:
    """Of each group, the settings in which it differs from others of its task and model, unless titles have them."""
    alike: dict[tuple[str, ...], list[Run]] = {}
    for first, *_ in groups:
        alike.setdefault((first.record["kind"], first.record["task"], first.record["model"]), []).append(first)
    out = {}
    for firsts in alike.values():
        settings = [_settings(run) for run in firsts]
        keys = sorted(set().union(*settings))
        varying = [key for key in keys if len({run_settings.get(key) for run_settings in settings}) > 1]
        for run, run_settings in zip(firsts, settings, strict=True):
            out[run.group_key] = [f"{key.rpartition('.')[2]} {run_settings.get(key, 'not given')}" for key in varying]
    return out


def _settings(run: Run) -> dict[str, str]:
    identity = {key: value for key, value in run.record["identity"].items() if key != "method"}
    if run.record["kind"] == "train":  # a table is over seeds and learning rates
        identity["train"] = {key: value for key, value in identity["train"].items() if key != "lr"}
    shown = {f"task.{key}" for key in run.record.get("shown", {})}
    settings = {key: _short(value) for key, value in flat(identity).items() if key not in shown}
    return {key: value for key, value in settings.items() if not TOLD.fullmatch(key)}


def _short(value: object) -> str:
    if isinstance(value, list):
        value = ",".join(map(str, value))
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _name(run: Run, used: Counter[str]) -> str:
    """``longbench-mini-smollm2-135m``, with a number from the second table of the name on."""
    text = f"{run.record['task']}-{run.record['model']}".lower()
    name = re.sub(r"[^a-z0-9]+", "-", text).strip("-") or "table"
    used[name] += 1
    return name if used[name] == 1 else f"{name}-{used[name]}"
