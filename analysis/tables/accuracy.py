"""Tables of scored runs: by data set, or by budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..describe import setting
from ..load import Run, average, comparable, fewer_is_better
from .cells import MIB, MISSING, Cell, Table, fixed, interval, number, out_of_memory_row, run_hash, score
from .longbench import family, paper_order, short_name
from .marks import emphasized
from .notes import different_layers, guards, made_by, narrow_storage, tie_rules, ways_of_reading


def accuracy_table(runs: Sequence[Run], by_set: bool = True) -> Table:
    """Scores by data set, their mean with its interval, the paired difference to the full cache, and bytes.

    Args:
        runs: one group of comparable runs, at least one.
        by_set: a column for each data set; without them the table fits a terminal.
    """
    done = [run for run in runs if run.done]
    names = sorted(_keys(done, "scores"), key=paper_order) if by_set else []
    further = _keys(done, "averages")
    loss = bool(done) and fewer_is_better(done[0].record)
    if loss and len(names) == 1:
        names = []
    mean, against = ("perplexity", "nats vs full") if loss else ("mean", "vs full")
    ends = [mean, "95 % interval", against, "95 % interval", "KV MiB", "KV kept", "run"]
    columns = ["method", *map(short_name, names), *further, *ends]
    rows = [
        _accuracy_row(run, names, further, loss) if run.done else out_of_memory_row(run, len(columns)) for run in runs
    ]
    families = ["", *map(family, names), *("" for _ in (*further, *ends))]
    table = Table(title(runs), columns, rows, list(runs), families=families if any(families) else [])
    table.notes += guards(runs[0].record) + _missing_sets(runs) + narrow_storage(runs)
    table.notes += ways_of_reading(runs) + made_by(runs)
    return emphasized(table)


def _keys(done: Sequence[Run], field: str) -> list[str]:
    """Names in a field of any of the runs, in the order of the first run that has them."""
    return list(dict.fromkeys(name for run in done for name in run.record.get(field, {})))


def _accuracy_row(run: Run, names: Sequence[str], further: Sequence[str], loss: bool) -> list[Cell]:
    record = run.record
    better, digits = (-1, 3) if loss else (1, 2)
    difference, averages, held = record.get("paired", {}).get("difference"), record.get("averages", {}), record["bytes"]
    return [
        Cell(run.label),
        *(score(average(record, n), better=better) if n in record["scores"] else MISSING for n in names),
        *(score(averages[n]) if n in averages else MISSING for n in further),
        score(average(record), better=better),
        interval(average(record)),
        MISSING if difference is None else score(difference, f"+.{digits}f", better),
        MISSING if difference is None else interval(difference, f"+.{digits}f"),
        number(held["kv_bytes_stored"] / MIB, 2),
        number(100 * held["kv_ratio"], 1, " %"),
        run_hash(run),
    ]


def _missing_sets(runs: Sequence[Run]) -> list[str]:
    """Which runs lack a data set that others have: their means are of other data."""
    done = [run for run in runs if run.done]
    every = {name for run in done for name in run.record["scores"]}
    lacking = [run.label for run in done if every - run.record["scores"].keys()]
    return [f"Some data sets are missing, so these means are of other data: {', '.join(lacking)}."] if lacking else []


def title(runs: Sequence[Run]) -> str:
    """Task, model, amount of data and settings of a group."""
    record = runs[0].record
    examples = record["data"].get("examples", {})
    count = f"{sum(examples.values())} examples of {len(examples)} data set{'s' if len(examples) != 1 else ''}"
    return f"{record['task']} / {record['model']}: {count}, {setting(record, runs)}"


# by budget ------------------------------------------------------------------------------------------------------------


def budget_tables(runs: Sequence[Run]) -> list[Table]:
    """Scores of each group of comparable runs: a row a method and a column a budget, and the runs that have none.

    Budgets are those in tokens; a fraction of the prompt stands with the runs that have no budget.
    """
    made = []
    for group in comparable([r for r in runs if r.record["kind"] == "accuracy" and r.done]):
        by_curve: dict[str, dict[int, Run]] = {}
        others = []
        for run in group:
            budget = run.record["budget"]
            if isinstance(budget, int) and not run.is_full_cache:
                by_curve.setdefault(run.curve, {})[budget] = run
            else:
                others.append(run)
        if by_curve:
            made.append(_by_budget(group, dict(sorted(by_curve.items())), is_alone=not others))
        if others:
            made.append(_without_budget(group, others))
    return made


def _by_budget(group: Sequence[Run], by_curve: Mapping[str, Mapping[int, Run]], is_alone: bool) -> Table:
    budgets = sorted({b for row in by_curve.values() for b in row})
    rows = [
        [Cell(curve), *(_with_interval(row[b]) if b in row else Cell("") for b in budgets)]
        for curve, row in by_curve.items()
    ]
    shown = [run for row in by_curve.values() for run in row.values()]
    what = "Perplexity" if fewer_is_better(group[0].record) else "Mean score"
    notes = [*guards(group[0].record), f"{what} and its 95 % interval. {_bytes_kept(by_curve, budgets)}"]
    notes += tie_rules(shown) + different_layers(group)
    if is_alone:
        notes += ways_of_reading(group)
    notes += [note for note in made_by(shown) if note not in notes]
    first = [next(iter(row.values())) for row in by_curve.values()]
    return Table(title(group), ["method / budget", *map(str, budgets)], rows, first, notes)


def _bytes_kept(by_curve: Mapping[str, Mapping[int, Run]], budgets: Sequence[int]) -> str:
    """Share of the full cache's bytes at each budget: of most methods, and of those that keep another share."""
    parts = []
    for budget in budgets:
        shares = {
            curve: 100 * row[budget].record["bytes"]["kv_ratio"] for curve, row in by_curve.items() if budget in row
        }
        middle = sorted(shares.values())[len(shares) // 2]
        usual = [share for share in shares.values() if _is_near(share, middle)]
        text = f"{budget}: {_range(min(usual), max(usual))} %"
        odd = [f"{curve} {share:.1f} %" for curve, share in shares.items() if not _is_near(share, middle)]
        parts.append(f"{text} ({', '.join(odd)})" if odd else text)
    return f"Bytes kept of the full cache: {', '.join(parts)}."


EQUAL_BYTES = 0.05
"""Largest relative difference of the bytes of methods that are compared as if they kept the same."""


def _is_near(share: float, middle: float) -> bool:
    return abs(share - middle) <= EQUAL_BYTES * middle


def _range(low: float, high: float) -> str:
    texts = f"{low:.1f}", f"{high:.1f}"
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} to {texts[1]}"


def _without_budget(group: Sequence[Run], others: list[Run]) -> Table:
    column = "perplexity" if fewer_is_better(group[0].record) else "score"
    rows = [
        [Cell(run.label), _with_interval(run), number(100 * run.record["bytes"]["kv_ratio"], 1, " %")] for run in others
    ]
    notes = guards(group[0].record) + ways_of_reading(group) + made_by(group)
    return Table(title(group), ["method", column, "KV kept"], rows, others, notes)


def _with_interval(run: Run) -> Cell:
    estimate: Mapping[str, Any] = average(run.record)
    mean, ends = (".2f", ".1f") if fewer_is_better(run.record) else (".1f", ".0f")
    text = fixed(estimate["mean"], mean)
    if estimate["low"] is not None:
        text += f" [{fixed(estimate['low'], ends)}, {fixed(estimate['high'], ends)}]"
    return Cell(text, estimate["mean"], estimate["low"], estimate["high"], estimate["n"])
