"""Published numbers and the runs that answer them, cell by cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from ..load import Run, average, comparable, fewer_is_better, longbench_rows
from ..tables import at_best_rate
from .claims import Claim, answers, device, has_settings
from .paper import AVERAGE, Paper, PaperRow, PaperTable
from .verdict import NOT_REPRODUCED, REPRODUCED, verdict

SPEED = "Speed and memory"
"""Title of the figures of :mod:`.claims`."""

Numbers = tuple[float, float | None, float | None, int | None]
"""A mean, the ends of its interval, and the number of examples."""


@dataclass(frozen=True)
class Comparison:
    """One published number beside ours.

    Attributes:
        table, row, column: of the published number.
        published, unit: the number.
        verdict, remark: see :func:`.verdict.verdict`.
        ours: ours, if any.
        published_difference, our_difference: to the full cache of the same model, where both are there.
        differs: between the two, beside chance.
        device: what ours ran on.
        run: ours, the first of several seeds; None where there is none.
        reason: why there can be none.
    """

    table: str
    row: str
    column: str
    published: float
    unit: str
    verdict: str
    remark: str = ""
    ours: Numbers | None = None
    published_difference: float | None = None
    our_difference: Numbers | None = None
    differs: tuple[str, ...] = ()
    device: str = ""
    run: Run | None = None
    reason: str = ""


@dataclass(frozen=True)
class _Answer:
    """The run that comes nearest to a published row.

    Attributes:
        run: the run, or the first of its seeds.
        numbers: by our name of a column.
        difference: of the average to the full cache.
        differs: from the paper's run.
    """

    run: Run
    numbers: Mapping[str, Numbers]
    difference: Numbers | None = None
    differs: tuple[str, ...] = field(default=())


def compare(paper: Paper, runs: Sequence[Run]) -> list[Comparison]:
    """Every published number of a paper: its tables in their order, then its figures of speed and memory."""
    done = [run for run in runs if run.done]
    out = [one for table in paper.tables for one in _table(table, done)]
    for claim in paper.claims:
        found: list[tuple[Run | None, float | None]] = [*answers(claim, done)]
        out += [_claim(claim, run, value) for run, value in found or [(None, None)]]
    return out


def _claim(claim: Claim, run: Run | None, value: float | None) -> Comparison:
    differs = claim.differences(run.record) if run is not None else []
    said, remark = verdict(claim.published, value, None, None, differs)
    return Comparison(
        table=SPEED,
        row=_claim_row(claim),
        column="",
        published=claim.published,
        unit=claim.unit,
        verdict=said,
        remark=remark,
        ours=None if value is None else (value, None, None, None),
        differs=tuple(differs),
        device="" if run is None else device(run),
        run=run,
    )


def _claim_row(claim: Claim) -> str:
    return f"{claim.claim} ({claim.published_on})"


def _table(table: PaperTable, runs: Sequence[Run]) -> list[Comparison]:
    full = {row.model: row for row in table.rows if row.label == "full"}
    out = []
    for row in table.rows:
        answer = _answer(table, row, runs)
        for column, published in row.values.items():
            ours = None if answer is None else answer.numbers.get(table.columns.get(column, column))
            differs = () if answer is None else answer.differs
            if answer is not None and column == AVERAGE:
                differs += _missing_sets(table, answer)
            mean, low, high, _ = ours or (None, None, None, None)
            said, remark = verdict(published, mean, low, high, differs, is_sample=True)
            baseline = full.get(row.model)
            of_full = None if baseline is None or baseline is row else baseline.values.get(column)
            out.append(
                Comparison(
                    table=table.name,
                    row=row.name,
                    column=column,
                    published=published,
                    unit=table.unit,
                    verdict=said,
                    remark=remark,
                    ours=ours,
                    published_difference=None if of_full is None else published - of_full,
                    our_difference=answer.difference if answer is not None and column == AVERAGE else None,
                    differs=differs if ours else (),
                    device=_device(answer.run) if answer is not None and ours else "",
                    run=answer.run if answer is not None and ours else None,
                    reason=row.reason,
                )
            )
    return out


def _answer(table: PaperTable, row: PaperRow, runs: Sequence[Run]) -> _Answer | None:
    """The run that differs least from the paper's, with most examples; None where there is none of the method."""
    if row.label is None:
        return None
    found = _trained(table, row, runs) if table.kind == "train" else _scored(table, row, runs)
    return min(found, key=lambda one: (len(one.differs), -_examples(one), one.run.record["hash"]), default=None)


def _examples(answer: _Answer) -> int:
    return sum(n or 0 for *_, n in answer.numbers.values())


def _scored(table: PaperTable, row: PaperRow, runs: Sequence[Run]) -> list[_Answer]:
    out: list[_Answer] = []
    for run in runs:
        record = run.record
        task = record["identity"]["task"]
        if record["kind"] != "accuracy" or task.get("class") != table.task or task.get("no_context") or task.get("e"):
            continue
        if record["method_label"] != row.label or not has_settings(record, row.settings):
            continue
        found = {name: numbers(average(record, name)) for name in table.sets if name in record["scores"]}
        mean = _mean(table, record, found)
        if mean is not None:
            found[AVERAGE] = mean
        difference = (record.get("paired") or {}).get("difference")
        whole = set(record["scores"]) == set(table.sets) or not table.sets
        paired = numbers(difference) if difference and whole and not fewer_is_better(record) else None
        out.append(_Answer(run, found, paired, (*table.differs, *_differences(table, row, record))))
    return [one for one in out if one.numbers]


def _mean(table: PaperTable, record: Mapping[str, Any], found: Mapping[str, Numbers]) -> Numbers | None:
    """Mean over the paper's data sets; with its interval where the run has exactly these."""
    if not table.sets or set(record["scores"]) == set(table.sets):
        return numbers(average(record))
    if not found:
        return None
    return fmean(mean for mean, *_ in found.values()), None, None, sum(n or 0 for *_, n in found.values())


def _missing_sets(table: PaperTable, answer: _Answer) -> tuple[str, ...]:
    there = sum(name in answer.numbers for name in table.sets)
    return () if there == len(table.sets) else (f"data sets: {there} of the paper's {len(table.sets)}",)


def _differences(table: PaperTable, row: PaperRow, record: Mapping[str, Any]) -> list[str]:
    """In which a scored run differs from the paper's: model, rows, length of the prompts, place of the question."""
    task = record["identity"]["task"]
    found = []
    if record["model"] != row.our_model:
        found.append(f"model: {record['model']}, not {row.model}")
    part = longbench_rows(record)
    if part is not None:
        of = "the bundled rows" if part == "mini" else "a part of LongBench's rows"
        found.append(f"data: {of}")
    elif task.get("limit") is not None:
        found.append(f"data: first {task['limit']} of each set")
    if task.get("max_length") is not None:
        found.append(f"prompts: at most {task['max_length']} tokens")
    if record["task"].endswith("-agnostic") != table.question_after_compression:
        found.append(
            "question: known when the prompt is compressed"
            if table.question_after_compression
            else "question: not known when the prompt is compressed"
        )
    return found


def _trained(table: PaperTable, row: PaperRow, runs: Sequence[Run]) -> list[_Answer]:
    """Means over the seeds that did not choose the learning rate, each architecture at its best, and their range."""
    out = []
    trained = [run for run in runs if run.record["kind"] == "train" and run.record["method_label"] == row.label]
    for group in comparable(trained):
        for best in at_best_rate(group, reported=True).values():
            found: dict[str, Numbers] = {}
            for metric in table.columns.values():
                values = [run.record["validation"].get(metric) for run in best]
                if all(value is not None for value in values):
                    found[metric] = (fmean(values), min(values), max(values), len(values))
            if found:
                record = best[0].record
                out.append(_Answer(best[0], found, None, (*table.differs, f"data: {record['task']}")))
    return out


def numbers(found: Mapping[str, Any]) -> Numbers:
    """An estimate of a record."""
    return found["mean"], found["low"], found["high"], found.get("n")


def _device(run: Run) -> str:
    identity = run.record["identity"]
    hardware = (run.record.get("provenance") or {}).get("hardware") or {}
    return f"{identity['dtype']} on {hardware.get('gpu') or hardware.get('cpu') or identity['device']}"


def commands(paper: Paper, found: Sequence[Comparison], results: str) -> list[str]:
    """What makes the runs that are missing: a command for each model and method, with all their budgets."""
    done = {(one.table, one.row) for one in found if one.verdict in (REPRODUCED, NOT_REPRODUCED)}
    budgets: dict[tuple[str, str, str], list[str]] = {}
    for table in paper.tables:
        for row in table.rows:
            known = row.label not in (None, "full") and row.our_model is not None
            if not known or (table.name, row.name) in done:
                continue
            words = row.run.split()
            budget = next((word.partition("=")[2] for word in words if word.startswith("method.budget=")), "")
            rest = " ".join(word for word in words if not word.startswith("method.budget="))
            model = "" if table.kind == "train" else f"model={row.our_model}"
            budgets.setdefault((model, table.run, rest), []).append(budget)
    out = []
    for (model, common, rest), values in budgets.items():
        some = [value for value in dict.fromkeys(values) if value]
        if len(some) > 1:
            told = f"'runner.budgets=[{','.join(some)}]'"
        else:
            told = f"method.budget={some[0]}" if some else ""
        words = [model, *(f"'{word}'" if "[" in word else word for word in common.split()), rest, told]
        out.append(" ".join(["kvbench run", f"results_dir={results}", *filter(None, words)]))
    parts = dict.fromkeys(c.part for c in paper.claims if (SPEED, _claim_row(c)) not in done)
    if parts:
        chosen = ",".join(f"{part}-*" for part in parts)
        out.append(f"kvbench run results_dir={results} experiment=gpu_campaign 'campaign=glob([{chosen}])'")
    return out
