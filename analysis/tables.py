"""Tables of finished runs, from their records alone: Markdown, CSV or LaTeX.

    kvbench table results/reference                  # Markdown, to read or to paste
    kvbench table results/reference -o table.tex     # LaTeX (booktabs)
    kvbench table results/reference -o cells.csv     # one row a number, with its interval and the run it came from
    kvbench table results/reference --by-budget      # scores alone: a row a method, a column a budget

Runs stand in one table only when nothing but the method differs: same model, same rows of the same data, same dtype,
device and seed. So a score on the bundled set, on a subset and on all of LongBench can never meet.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from ..conf.errors import InputError, one_of
from .load import (
    Run,
    average,
    by_compressed_layers,
    comparable,
    fewer_is_better,
    load,
    longbench_rows,
    setting,
    tie_rule,
)

MIB, GIB = 2**20, 2**30

# The LongBench paper's order and the short names that its tables (and SnapKV's) use.
LONGBENCH = {
    "narrativeqa": "NrtvQA",
    "qasper": "Qasper",
    "multifieldqa_en": "MF-en",
    "multifieldqa_zh": "MF-zh",
    "hotpotqa": "HotpotQA",
    "2wikimqa": "2WikiMQA",
    "musique": "Musique",
    "dureader": "DuReader",
    "gov_report": "GovReport",
    "qmsum": "QMSum",
    "multi_news": "MultiNews",
    "vcsum": "VCSUM",
    "trec": "TREC",
    "triviaqa": "TriviaQA",
    "samsum": "SAMSum",
    "lsht": "LSHT",
    "passage_count": "PCount",
    "passage_retrieval_en": "PRe",
    "passage_retrieval_zh": "PRz",
    "lcc": "Lcc",
    "repobench-p": "RB-P",
}


@dataclass(frozen=True)
class Cell:
    """One entry.

    Attributes:
        text: as printed.
        value, low, high, n: the number, its interval and the count behind it, for the CSV; None for words.
        better: +1 where larger is better, -1 where smaller is, 0 where neither is a merit.
        bold: the best of its column.
        measured: low and high are the least and greatest of repeated measurements, not an interval of a mean.
    """

    text: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    better: int = 0
    bold: bool = False
    measured: bool = False


@dataclass
class Table:
    """One group of comparable runs.

    Attributes:
        title: task and model.
        columns: headers; the first is the method's.
        rows: cells, row by row; ``runs`` holds the run of each.
        notes: sentences below the table.
    """

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    runs: list[Run]
    notes: list[str] = field(default_factory=list)


def tables(runs: Sequence[Run]) -> list[Table]:
    """One table for each group of comparable runs."""
    return [KINDS[group[0].record["kind"]](group) for group in comparable(runs) if group[0].record["kind"] in KINDS]


def accuracy_table(runs: Sequence[Run], by_set: bool = True) -> Table:
    """Scores by data set, their mean with its interval, the paired difference to the full cache, and bytes.

    Args:
        runs: one group of comparable runs, at least one.
        by_set: a column for each data set; without them the table fits a terminal.
    """
    done = [run for run in runs if run.done]
    names = list(done[0].record["scores"]) if done and by_set else []
    names.sort(key=lambda name: list(LONGBENCH).index(name) if name in LONGBENCH else len(LONGBENCH))
    further = list(done[0].record.get("averages", {})) if done else []
    loss = bool(done) and fewer_is_better(done[0].record)
    if loss and len(names) == 1:
        names = []
    mean, against = ("perplexity", "nats vs full") if loss else ("mean", "vs full")
    ends = [mean, "95 % interval", against, "95 % interval", "KV MiB", "KV kept", "run"]
    better, digits = (-1, 3) if loss else (1, 2)
    rows = []
    for run in runs:
        record, name = run.record, Cell(run.label)
        if not run.done:
            rows.append([name, *_out_of_memory(record, len(names) + len(further) + len(ends) - 1), _run(run)])
            continue
        difference = record.get("paired", {}).get("difference")
        held = record["bytes"]
        rows.append(
            [
                name,
                *(_score(average(record, n), better=better) for n in names),
                *(_score(record["averages"][n]) for n in further),
                _score(average(record), better=better),
                _interval(average(record)),
                Cell("-") if difference is None else _score(difference, f"+.{digits}f", better),
                Cell("-") if difference is None else _interval(difference, f"+.{digits}f"),
                _number(held["kv_bytes_stored"] / MIB, 2),
                _number(100 * held["kv_ratio"], 1, " %"),
                _run(run),
            ]
        )
    first = runs[0].record
    examples = sum(first["data"]["examples"].values())
    table = Table(
        _accuracy_title(runs), ["method", *(LONGBENCH.get(n, n) for n in names), *further, *ends], rows, list(runs)
    )
    if longbench_rows(first) == "mini":
        table.notes.append("Scores on the small bundled set, not LongBench scores.")
    elif longbench_rows(first) == "subset":
        table.notes.append("A part of LongBench's rows: not to be compared with published LongBench scores.")
    if examples < 30:
        table.notes.append(f"{examples} examples say little: mind the intervals.")
    quantised = [r.label for r in runs if r.record["identity"]["method"]["storage"]["class"] not in ("Dense", "Ragged")]
    if quantised and first["identity"]["dtype"] == "float32":
        table.notes.append(
            f"What {', '.join(quantised)} keeps is a share of a 32-bit cache; of a 16-bit one it is larger."
        )
    table.notes += _ways_of_reading(runs) + _made_by(runs)
    return _emphasised(table)


def _accuracy_title(runs: Sequence[Run]) -> str:
    record = runs[0].record
    examples = record["data"]["examples"]
    count = f"{sum(examples.values())} examples of {len(examples)} data sets"
    return f"{record['task']} / {record['model']}: {count}, {setting(record, runs)}"


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
        title = _accuracy_title(group)
        budgets = sorted({b for row in by_curve.values() for b in row})
        if by_curve:
            by_curve = dict(sorted(by_curve.items()))
            rows = [
                [Cell(curve), *(_with_interval(row[b]) if b in row else Cell("") for b in budgets)]
                for curve, row in by_curve.items()
            ]
            first = [next(iter(row.values())) for row in by_curve.values()]
            kept = [fmean(row[b].record["bytes"]["kv_ratio"] for row in by_curve.values() if b in row) for b in budgets]
            shares = ", ".join(f"{b}: {100 * k:.1f} %" for b, k in zip(budgets, kept, strict=True))
            what = "Perplexity" if fewer_is_better(group[0].record) else "Mean score"
            notes = [f"{what} and its 95 % interval. Bytes kept of the full cache, mean of the methods: {shares}."]
            shown = [run for row in by_curve.values() for run in row.values()]
            notes += _tie_rules(shown) + different_layers(group)
            if not others:
                notes += _ways_of_reading(group)
            made.append(Table(title, ["method / budget", *map(str, budgets)], rows, first, notes))
        if others:
            what_column = "perplexity" if fewer_is_better(group[0].record) else "score"
            rows = [
                [Cell(run.label), _with_interval(run), _number(100 * run.record["bytes"]["kv_ratio"], 1, " %")]
                for run in others
            ]
            notes = _ways_of_reading(group) + _made_by(group)
            made.append(Table(title, ["method", what_column, "KV kept"], rows, others, notes))
    return made


def efficiency_table(runs: Sequence[Run]) -> Table:
    """Times, throughput, bytes, peaks, and the speed-up against what the bytes allow."""
    if any("search" in run.record for run in runs):
        return search_table(runs)
    columns = [
        *("method", "TTFT ms", "TPOT ms", "min - max", "p90", "p99", "prefill tok/s", "decode tok/s", "KV MiB, batch"),
        *("peak prefill MiB", "peak decode MiB", "MBU", "speed-up", "by bytes"),
    ]
    metered = any((run.record.get("energy") or {}).get("joules") for run in runs)
    columns += ["J/token", "run"] if metered else ["run"]
    rows = []
    for run in runs:
        record, name = run.record, Cell(run.label)
        if not run.done:
            rows.append([name, *_out_of_memory(record, len(columns) - 2), _run(run)])
            continue
        paired = record.get("paired")
        tpot, steps = record["metrics"]["tpot_ms"], record["metrics"].get("step_ms")
        mbu = record["limit"]["mbu"]
        rows.append(
            [
                name,
                _metric(record, "ttft_ms", 1, -1),
                _metric(record, "tpot_ms", 2, -1),
                Cell(f"{tpot['min']:.2f} - {tpot['max']:.2f}"),
                *(Cell("-") if steps is None else _number(steps[p], 2) for p in ("p90", "p99")),
                _metric(record, "prefill_tokens_per_s", 0, 1),
                _metric(record, "decode_tokens_per_s", 1, 1),
                _number(record["bytes"]["kv_bytes_stored"] / MIB, 2),
                _peak(record, "peak_prefill"),
                _peak(record, "peak_decode"),
                Cell("-") if mbu is None else _number(mbu["median"], 2),
                Cell("-") if paired is None else _number(paired["decode_speed_up"], 2, " x"),
                Cell("-") if paired is None else _number(paired["decode_speed_up_by_bytes"], 2, " x"),
                *([_energy(record)] if metered else []),
                _run(run),
            ]
        )
    first = runs[0].record
    title = f"{first['task']} / {first['model']}: {setting(first, runs)}"
    table = Table(title, columns, rows, list(runs))
    repeats = first["identity"]["runner"]["repeats"]
    table.notes.append(f"Medians of {repeats} repetitions" + ("." if repeats >= 5 else ", which is few."))
    if any("step_ms" in run.record.get("metrics", {}) for run in runs):
        table.notes.append("p90, p99: of single decode steps, ms.")
    table.notes.append(
        "speed-up: TPOT of full / TPOT; by bytes: the same if a step took as long as reading the weights and the cache "
        "once; MBU: how near it came to that, at the bandwidth of a copy."
    )
    if first["identity"]["device"] == "cpu":
        table.notes.append("Peaks are of the whole process (resident set).")
    table.notes += _ways_of_decoding(runs) + _made_by(runs) + _problems(runs)
    return _emphasised(table)


def _energy(record: Mapping[str, Any]) -> Cell:
    """Joules per output token, what the idle device takes included."""
    joules = record["energy"].get("joules_per_output_token")
    return Cell("-") if joules is None else _number(joules, 3)


def search_table(runs: Sequence[Run]) -> Table:
    """The largest size of each method that fits into memory, and how fast it is there."""
    what = next(run.record["search"]["what"] for run in runs if "search" in run.record)
    name = {"batch_size": "largest batch", "prompt_tokens": "longest prompt"}[what]
    columns = [
        *("method", name, "/ full", "ended by", "output tok/s", "/ full", "total tok/s", "TTFT ms", "TPOT ms"),
        *("KV MiB, batch", "peak prefill MiB", "peak decode MiB", "run"),
    ]
    rows = []
    for run in runs:
        record = run.record
        if not run.done:
            rows.append([Cell(run.label), *_out_of_memory(record, len(columns) - 2), _run(run)])
            continue
        paired, found = record.get("paired"), record["search"]
        ratios = [Cell("-")] * 2
        if paired is not None:
            ratios = [_number(paired[key], 2, " x") for key in ("largest_ratio", "output_tokens_per_s_ratio")]
        size = found["measured_at"]
        rows.append(
            [
                Cell(run.label),
                Cell(f"{size:,}", size, better=1),
                ratios[0],
                Cell(found["stopped_by"]),
                _metric(record, "output_tokens_per_s", 1, 1),
                ratios[1],
                _metric(record, "total_tokens_per_s", 1, 1),
                _metric(record, "ttft_ms", 1, -1),
                _metric(record, "tpot_ms", 2, -1),
                _number(record["bytes"]["kv_bytes_stored"] / MIB, 2),
                _peak(record, "peak_prefill"),
                _peak(record, "peak_decode"),
                _run(run),
            ]
        )
    first = runs[0].record
    table = Table(f"{first['task']} / {first['model']}: {setting(first, runs)}", columns, rows, list(runs))
    limits = {run.record["search"]["limit_bytes"] for run in runs if "search" in run.record}
    given = ["what the device has" if limit is None else f"{limit / GIB:.4g} GiB" for limit in limits]
    table.notes.append(f"Memory: {', '.join(sorted(given))}. Times and bytes are those at the largest size.")
    tolerance = first["identity"]["task"]["tolerance"]
    if tolerance:
        table.notes.append(f"Sizes are found to within {100 * tolerance:g} %.")
    table.notes += _ways_of_decoding(runs) + _made_by(runs) + _problems(runs)
    return table


def _ways_of_reading(runs: Sequence[Run]) -> list[str]:
    """How prompts were read where it differs, in 16 bits: chunk size and a shared prefill each round differently."""
    dtype = runs[0].record["identity"]["dtype"]
    records = [run.record for run in runs if run.done]
    chunks = sorted({maker.get("chunk_size") or 0 for record in records for maker in _makers(record)})
    methods = sorted({1 + len(record["rode_with"]) for record in records if "rode_with" in record})
    ways = []
    if len(chunks) > 1:
        ways.append(f"in chunks of {', '.join(str(size) if size else 'all' for size in chunks)} tokens")
    if len(methods) > 1:
        ways.append(f"by {', '.join(map(str, methods))} methods in a command")
    if dtype == "float32" or not ways:
        return []
    return [f"Prompts were read {' and '.join(ways)}: in {dtype} each is another rounding."]


def _ways_of_decoding(runs: Sequence[Run]) -> list[str]:
    """Which runs played recorded steps, where not all are alike: some of the difference in time is that."""
    by_way: dict[str, list[str]] = {}
    for run in runs:
        if run.done and "decode" in run.record:
            by_way.setdefault(run.record["decode"], []).append(run.label)
    if len(by_way) < 2:
        return []
    ways = "; ".join(f"{way}: {', '.join(labels)}" for way, labels in sorted(by_way.items()))
    return [f"Decode steps were not run alike ({ways}): a part of the difference in time is that."]


def _problems(runs: Sequence[Run]) -> list[str]:
    """What could not be measured, a line each."""
    out = []
    for run in runs:
        problems = [run.record.get(part, {}).get("problem") for part in ("memory", "bandwidth")]
        out += [f"{run.label}: {problem}." for problem in problems if problem]
    return out


def at_best_rate(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Trainings by label, each at the learning rate with the least mean loss on held-out data, by seed.

    Where some rates were tried with fewer seeds than others, the seeds that all of them share decide.
    """
    out = {}
    for label in dict.fromkeys(run.label for run in runs):
        by_lr: dict[float, list[Run]] = {}
        for run in (r for r in runs if r.label == label):
            by_lr.setdefault(run.record["training"]["lr"], []).append(run)
        shared = set.intersection(*({r.record["identity"]["seed"] for r in tried} for tried in by_lr.values()))
        judged = {
            lr: [r for r in tried if not shared or r.record["identity"]["seed"] in shared]
            for lr, tried in by_lr.items()
        }
        best = min(judged, key=lambda lr: fmean(r.record["validation"]["loss"] for r in judged[lr]))
        out[label] = sorted(by_lr[best], key=lambda run: run.record["identity"]["seed"])
    return out


def train_table(runs: Sequence[Run]) -> Table:
    """What was trained on the same data: a row for each architecture, at the learning rate that served it best.

    The row's numbers are means over the seeds (see :func:`at_best_rate`), and the spread is from the least to the
    greatest.
    """
    columns = ["method", "parameters", "KV bytes/token", "loss", "min - max", "perplexity", "accuracy"]
    columns += ["lr", "of", "seeds", "training s", "tok/s", "run"]
    rows, shown = [], []
    for label, best in at_best_rate(runs).items():
        lr = best[0].record["training"]["lr"]
        tried = {run.record["training"]["lr"] for run in runs if run.label == label}
        found = [run.record["validation"] for run in best]
        losses = [v["loss"] for v in found]
        training = [run.record["training"] for run in best]
        fixed = best[0].record["bytes"]["kv_bytes_fixed"]
        a_token = best[0].record["bytes"]["kv_bytes_per_token"]
        rows.append(
            [
                Cell(label),
                Cell(f"{training[0]['parameters']:,}", training[0]["parameters"]),
                Cell(f"{a_token}" + (f" + {fixed}" if fixed else ""), a_token, better=-1),
                Cell(f"{fmean(losses):.4f}", fmean(losses), min(losses), max(losses), len(losses), -1, measured=True),
                Cell(f"{min(losses):.4f} - {max(losses):.4f}"),
                _number(fmean(v["perplexity"] for v in found), 3),
                _number(fmean(v["accuracy"] for v in found), 3),
                Cell(f"{lr:g}", lr),
                Cell(" ".join(f"{x:g}" for x in sorted(tried))),
                Cell(" ".join(str(run.record["identity"]["seed"]) for run in best)),
                _number(fmean(t["seconds"] for t in training), 0),
                _number(fmean(t["tokens_per_s"] for t in training), 0),
                _run(best[0]),
            ]
        )
        shown.append(best[0])
    first = runs[0].record
    tokens = first["training"]["tokens"]
    table = Table(f"{first['task']} / {first['model']}: trained on {tokens:,} tokens", columns, rows, shown)
    if any(run.record["bytes"]["kv_bytes_fixed"] for run in shown):
        table.notes.append("KV bytes/token: + what windows and states take at any length.")
    return replace(table, notes=table.notes + _made_by(runs))


KINDS: Mapping[str, Callable[[Sequence[Run]], Table]] = {
    "accuracy": accuracy_table,
    "efficiency": efficiency_table,
    "train": train_table,
}


def _made_by(runs: Sequence[Run]) -> list[str]:
    """What a reader must know of who made a table's rows: changed files, or more than one version of something."""
    made = [maker for run in runs for maker in _makers(run.record)]
    notes = []
    if any(m.get("git", {}).get("dirty") for m in made):
        notes.append("Made by code that differs from its commit.")
    hardware = [m.get("hardware", {}) for m in made]
    for what, versions in (
        ("of more than one commit", {str(m.get("git", {}).get("sha"))[:7] for m in made}),
        ("of more than one torch", {m.get("packages", {}).get("torch") for m in made}),
        ("on more than one processor", {h.get("gpu") or h.get("cpu") for h in hardware}),
    ):
        if len(versions) > 1:
            notes.append(f"Runs {what}: {', '.join(sorted(map(str, versions)))}.")
    return notes + _tie_rules(runs) + different_layers(runs)


def different_layers(runs: Sequence[Run]) -> list[str]:
    """Which runs compressed which layers, where not all are alike."""
    layers = by_compressed_layers(runs)
    if len(layers) < 2:
        return []
    groups = "; ".join(f"{text}: {', '.join(labels)}" for text, labels in sorted(layers.items()))
    return [f"Methods did not work on the same layers. {groups}. A part of a difference is that."]


def _tie_rules(runs: Sequence[Run]) -> list[str]:
    """Which rules chose between equally scored tokens, where not all runs were made under one."""
    by_rule: dict[str, list[str]] = {}
    for run in runs:
        rule = tie_rule(run.record)
        if rule is not None:
            by_rule.setdefault(rule, []).append(run.record["method_label"])
    if len(by_rule) < 2:
        return []
    rules = "; ".join(f"by {rule}: {', '.join(dict.fromkeys(labels))}" for rule, labels in sorted(by_rule.items()))
    return [f"Tokens were not ranked alike ({rules}): a part of a difference is the choice among equal scores."]


def _makers(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The processes that made a record's rows: one may have ended early, and rows may be those of other runs."""
    sessions = record.get("sessions")
    if not sessions or "after_examples" not in sessions[0]:
        return [record.get("provenance", {})]
    ends = [*(s["after_examples"] for s in sessions[1:]), sum(record["data"]["examples"].values())]
    return [session for session, end in zip(sessions, ends, strict=True) if end > session["after_examples"]]


# cells --------------------------------------------------------------------------------------------------------------


def _score(estimate: Mapping[str, Any], form: str = ".2f", better: int = 1) -> Cell:
    low, high, n = estimate["low"], estimate["high"], estimate["n"]
    return Cell(f"{estimate['mean']:{form}}", estimate["mean"], low, high, n, better=better)


def _with_interval(run: Run) -> Cell:
    estimate = average(run.record)
    mean, ends = (".2f", ".1f") if fewer_is_better(run.record) else (".1f", ".0f")
    if estimate["low"] is None:
        return Cell(f"{estimate['mean']:{mean}}", estimate["mean"])
    return Cell(f"{estimate['mean']:{mean}} [{estimate['low']:{ends}}, {estimate['high']:{ends}}]", estimate["mean"])


def _interval(estimate: Mapping[str, Any], form: str = ".2f") -> Cell:
    if estimate["low"] is None:
        return Cell("one a set")
    return Cell(f"[{estimate['low']:{form}}, {estimate['high']:{form}}]")


def _number(value: float, digits: int, unit: str = "") -> Cell:
    return Cell(f"{value:.{digits}f}{unit}", value)


def _metric(record: Mapping[str, Any], name: str, digits: int, better: int) -> Cell:
    spread = record["metrics"][name]
    count = len(spread["repetitions"])
    return Cell(
        f"{spread['median']:.{digits}f}", spread["median"], spread["min"], spread["max"], count, better, measured=True
    )


def _peak(record: Mapping[str, Any], phase: str) -> Cell:
    peak = record["memory"][phase]
    return Cell("-") if peak is None else Cell(f"{peak['allocated'] / MIB:.0f}", peak["allocated"] / MIB, better=-1)


def _run(run: Run) -> Cell:
    return Cell(run.record["hash"])


def _out_of_memory(record: Mapping[str, Any], columns: int) -> list[Cell]:
    return [Cell("out of memory"), *(Cell("") for _ in range(columns - 1))]


def _emphasised(table: Table) -> Table:
    """The best of every column in bold, among the rows of one budget; among all rows where no budget has two.

    The full cache is what the others are measured against and takes no part.
    """
    blocks: dict[Any, list[int]] = {}
    for i, run in enumerate(table.runs):
        if run.done and not run.is_full_cache:
            blocks.setdefault(run.record["budget"], []).append(i)
    if all(len(block) < 2 for block in blocks.values()):
        blocks = {None: [i for block in blocks.values() for i in block]}
    for block in blocks.values():
        for column in range(len(table.columns)):
            cells = {i: table.rows[i][column] for i in block if table.rows[i][column].better}
            for i in _best(cells):
                table.rows[i][column] = replace(table.rows[i][column], bold=True)
    return table


def _best(cells: Mapping[Any, Cell]) -> list[Any]:
    """Keys of the best cells; none where all print alike, or where a measurement is not clear of the others' range."""
    merits = {i: cell.value * cell.better for i, cell in cells.items() if cell.value is not None}
    if len({cells[i].text for i in merits}) < 2:
        return []
    best = cells[max(merits, key=merits.__getitem__)]
    top = [i for i in merits if cells[i].text == best.text]
    for i in top:
        if cells[i].measured:
            worst_of_mine = min(cells[i].better * (cells[i].low or 0.0), cells[i].better * (cells[i].high or 0.0))
            others = [c for k, c in cells.items() if k not in top]
            if any(max(c.better * (c.low or 0.0), c.better * (c.high or 0.0)) >= worst_of_mine for c in others):
                return []
    return top


# formats ------------------------------------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    """A table that reads well as text too."""
    body = [[f"**{c.text}**" if c.bold else c.text for c in row] for row in table.rows]
    widths = [max(len(row[i]) for row in [table.columns, *body]) for i in range(len(table.columns))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    notes = [f"\n{' '.join(table.notes)}"] if table.notes else []
    return "\n".join([f"**{table.title}**", "", line(table.columns), rule, *map(line, body), *notes])


def latex(table: Table) -> str:
    """booktabs; the runs stand in a comment, because nobody prints a hash."""
    shown = slice(0, len(table.columns) - 1)

    def line(cells: Sequence[str]) -> str:
        return "  " + " & ".join(cells) + r" \\"

    body = [[rf"\textbf{{{_tex(c.text)}}}" if c.bold else _tex(c.text) for c in row[shown]] for row in table.rows]
    head = [_tex(c) for c in table.columns[shown]]
    runs = [f"% {run.label}: {run.path}" for run in table.runs]
    return "\n".join(
        [
            *runs,
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_tex(' '.join([table.title + '.', *table.notes]))}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            r"\toprule",
            line(head),
            r"\midrule",
            *map(line, body),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _tex(text: str) -> str:
    return "".join({c: f"\\{c}" for c in "%&_#$"}.get(c, c) for c in text)


def cells_csv(made: Sequence[Table]) -> str:
    """Long form: one row for each number of each table, with its interval and its run."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["task", "model", "setting", "method", "budget", "column", "value", "low", "high", "n", "run"])
    for table in made:
        for run, row in zip(table.runs, table.rows, strict=True):
            r = run.record
            head = [r["task"], r["model"], setting(r, table.runs), run.label, r["budget"]]
            for column, cell in zip(table.columns, row, strict=True):
                if cell.value is not None:
                    writer.writerow([*head, column, cell.value, cell.low, cell.high, cell.n, run.path])
            if not run.done:
                writer.writerow([*head, "status", r["status"], "", "", "", run.path])
    return out.getvalue().rstrip("\n")


FORMATS: Mapping[str, Callable[[Sequence[Table]], str]] = {
    "md": lambda made: "\n\n".join(map(markdown, made)),
    "csv": cells_csv,
    "tex": lambda made: "% needs \\usepackage{booktabs}\n" + "\n\n".join(map(latex, made)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """``kvbench table``; exit status 2 for an input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="kvbench table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="a results folder, or any folder below it")
    parser.add_argument("-o", "--output", type=Path, help="a file ending in .md, .csv or .tex; default: the terminal")
    parser.add_argument("--format", choices=sorted(FORMATS), help="default: as the file's ending says, else md")
    parser.add_argument(
        "--by-budget", action="store_true", help="scores alone, a row a method and a column a budget (md, tex)"
    )
    parser.add_argument(
        "--published", action="store_true", help="papers' figures of speed and memory beside the runs that answer them"
    )
    args = parser.parse_args(argv)
    try:
        ending = args.format or ("md" if args.output is None else args.output.suffix.removeprefix("."))
        if ending not in FORMATS:
            raise InputError("-o", args.output, one_of(ending, FORMATS, "a file ending in one of"))
        runs, problems = load(args.results)
        for problem in problems:
            print(problem, file=sys.stderr)
        if args.published and ending == "csv":
            raise InputError("--published", "csv", "mixes runs and claims: leave out --format and -o, or use md or tex")
        if args.by_budget and ending == "csv":
            raise InputError("--by-budget", "csv", "has a run in each cell: leave it out, the csv names every number")
        text = FORMATS[ending](_wanted(args, runs))
        if args.output is None:
            print(text)
        else:
            write(args.output, text + "\n")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _wanted(args: argparse.Namespace, runs: Sequence[Run]) -> list[Table]:
    if args.published:
        from .published import published_table  # it builds on this module

        return [published_table(runs)]
    return budget_tables(runs) if args.by_budget else tables(runs)


def write(path: Path, text: str) -> None:
    """Write a result for the user and say so.

    Raises:
        InputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError("-o", path, f"cannot be written: {error.strerror}") from error
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
