"""``kvbench verify RESULTS``: compute the numbers of every record again and say which ones differ.

From ``samples.jsonl``: means, intervals, averages and bytes of an accuracy run, and its paired difference to the full
cache. From the repetitions: medians, ranges, memory-bandwidth utilization and gains of an efficiency run. From the
identity: the hash, which is the name of the run's folder. An interval is computed by the rule under which it was
written. Exit status: 0 all agree, 1 some differ, 2 there is no record.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..conf.errors import InputError
from .checks import problem_of
from .costs import KV_BYTES, STEP_BYTES, costs_of
from .entries import read_record
from .older_intervals import METHOD, with_older_intervals
from .repetitions import of_repetitions
from .schema import RECORD, SAMPLES, identity_hash
from .summaries import with_current_statistics

TOLERANCE = 1e-9
"""Largest relative difference: numbers may have been added up in another order."""
OTHER_FOLDER = "of differences to a run that is not here"
UNNAMED_SETS = "of averages whose data sets the record does not name"

Rows = list[dict[str, Any]]


@dataclass
class Verification:
    """What the records of a folder were compared with.

    Attributes:
        counts: Number of records by what they were computed from.
        intervals: Number of intervals by their construction.
        left_out: Number of intervals that were not computed, by the reason.
        differing: A line for each number that differs or cannot be computed.
        notes: A line for each part of a record that was not compared.
    """

    counts: Counter[str] = field(default_factory=Counter)
    intervals: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    differing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(folder: Path) -> Verification:
    """Compute every record under ``folder`` again.

    Raises:
        InputError: There is no record.
    """
    paths = sorted(folder.rglob(RECORD))
    if not paths:
        raise InputError("RESULTS", folder, f"holds no finished run ({RECORD})")
    found, records = Verification(), {}
    for path in paths:
        try:
            records[path.parent] = read_record(path)
        except InputError as error:
            found.differing.append(f"{path}: {error.allowed}")
        except OSError as error:
            found.differing.append(f"{path}: cannot be read: {error.strerror}")
    folders = {record["hash"]: place for place, record in records.items() if isinstance(record["hash"], str)}
    by_hash = {key: (place, records[place]) for key, place in folders.items()}
    for place, record in records.items():
        problems: list[str] = []
        try:
            problems += _of_identity(place, record)
            source = _compare(place, record, by_hash, problems, found)
            found.counts[source] += 1
        except InputError as error:
            problems.append(f"{error.value} {error.allowed}".removeprefix(f"{place}/"))
        except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            problems.append(problem_of(record) or f"is damaged: {type(error).__name__} {error}")
        found.differing += [f"{place / RECORD}: {problem}" for problem in problems]
    return found


def _compare(
    place: Path,
    record: Mapping[str, Any],
    others: Mapping[str, tuple[Path, Mapping[str, Any]]],
    problems: list[str],
    found: Verification,
) -> str:
    """Append what differs to ``problems``, count intervals; returns what the record was computed from."""
    kind, paired = record["kind"], record.get("paired")
    if record["status"] != "done":
        return "their hash alone (out of memory)"
    baseline = others.get(paired.get("hash")) if paired else None
    if paired and baseline is None:
        found.notes.append(f"{place / RECORD}: paired with {paired.get('hash')}, which is not here: not compared")
    if kind == "accuracy":
        rows = read_rows(place, record)
        reference = None if baseline is None else scores_of(read_rows(*baseline), baseline[1])
        problems += _of_samples(record, rows, reference, found)
        return "samples"
    if kind == "efficiency":
        expected = of_repetitions(record, None if baseline is None else baseline[1])
        problems += differences(record, expected, "the repetitions give")
        _count_intervals(record, expected, found)
        return "repetitions"
    expected = {"validation": {"perplexity": math.exp(record["validation"]["loss"])}}
    problems += differences(record, expected, "the loss gives")
    return "their loss"


def differences(recorded: Any, computed: Any, source: str, path: str = "") -> list[str]:
    """A line for each number of ``computed`` that ``recorded`` has otherwise or lacks."""
    if isinstance(computed, Mapping):
        if not isinstance(recorded, Mapping):
            return [f"{path or 'the record'} is {recorded!r}, not a mapping"]
        lines = []
        for key, value in computed.items():
            name = f"{path}.{key}" if path else str(key)
            if key in recorded:
                lines += differences(recorded[key], value, source, name)
            else:
                lines.append(f"{name} is missing: {source} {_shown(value)}")
        return lines
    numbers = [isinstance(x, int | float) and not isinstance(x, bool) for x in (recorded, computed)]
    equal = math.isclose(recorded, computed, rel_tol=TOLERANCE, abs_tol=1e-9) if all(numbers) else recorded == computed
    return [] if equal else [f"{path} is {_shown(recorded)}: {source} {_shown(computed)}"]


def _shown(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)[:60]


# identity -------------------------------------------------------------------------------------------------------------


def _of_identity(place: Path, record: Mapping[str, Any]) -> Iterator[str]:
    computed = identity_hash(record["identity"])
    if record["hash"] != computed:
        yield f"hash is {record['hash']}: the identity gives {computed}"
    if place.name != computed:
        yield f"lies in a folder named {place.name}: the identity gives {computed}"


# samples --------------------------------------------------------------------------------------------------------------


def read_rows(place: Path, record: Mapping[str, Any]) -> Rows:
    """Rows of ``samples.jsonl``, as many as the record counts, in the order of the data and not of the batches.

    Raises:
        InputError: The file cannot be read, a row is damaged or there twice, or rows are missing or too many.
    """
    path = place / SAMPLES
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError("RESULTS", path, f"cannot be read: {error.strerror}") from error
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        row: Any = None
        with suppress(ValueError, RecursionError):
            row = json.loads(line) if line else {}
        if row == {}:
            continue
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("dataset", "id")):
            raise InputError("RESULTS", f"{path}:{number}", "is no row of an example")
        for key in ("score", "prompt_tokens", *KV_BYTES, *(key for key in STEP_BYTES if key in row)):
            value = row.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError("RESULTS", f"{path}:{number}", f"has {key}={value!r}, which is no number")
        if rows.setdefault((row["dataset"], row["id"]), row) is not row:
            raise InputError("RESULTS", f"{path}:{number}", f"has {row['dataset']}/{row['id']} a second time")
    counts = Counter(dataset for dataset, _ in rows)
    for name in sorted(counts.keys() | record["data"]["examples"].keys()):
        wanted = record["data"]["examples"].get(name, 0)
        if counts[name] != wanted:
            raise InputError("RESULTS", path, f"has {counts[name]} rows of {name}: the record counts {wanted}")
    return sorted(rows.values(), key=lambda row: (row.get("row", 0), row["id"]))


def scores_of(rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Scores by data set and example, in the unit of the record."""
    factor = 1.0 if "unit" in record else 100.0
    out: dict[str, dict[str, float]] = {}
    for row in rows:
        out.setdefault(row.get("group", row["dataset"]), {})[f"{row['dataset']}/{row['id']}"] = factor * row["score"]
    return out


def _of_samples(record: Mapping[str, Any], rows: Rows, baseline: Any, found: Verification) -> Iterator[str]:
    scores, source = scores_of(rows, record), "the samples give"
    computed = with_current_statistics(record, scores, baseline)
    if record["scores"].keys() != computed["scores"].keys():
        yield f"scores is of {', '.join(record['scores'])}: {source} {', '.join(computed['scores'])}"
        return
    expected: dict[str, Any] = {
        **({"further_forwards": None} if "further_forwards" in record else {}),  # a record has them if its rows do
        **costs_of(rows),
        "averages": {name: made for name, made in computed["averages"].items() if "of" in record["averages"][name]},
        **({"interval": computed["interval"]} if "method" in record["average"] else {}),
        **with_older_intervals(record, computed, scores, baseline),
    }
    if "averages" not in record:
        del expected["averages"]
    yield from differences(record, expected, source)
    _count_intervals(record, expected, found)
    for path, estimate in _estimates(record):
        if estimate["low"] is not None and not estimate["low"] - 1e-9 <= estimate["mean"] <= estimate["high"] + 1e-9:
            yield f"{path} has its mean {estimate['mean']:g} outside of [{estimate['low']:g}, {estimate['high']:g}]"


def _count_intervals(record: Mapping[str, Any], expected: Mapping[str, Any], found: Verification) -> None:
    """Count the intervals of a record that were computed again, and those that could not be."""
    computed = {path for path, _ in _estimates(expected)}
    for path, estimate in _estimates(record):
        if path not in computed:
            found.left_out[OTHER_FOLDER if path.startswith("paired") else UNNAMED_SETS] += 1
        elif estimate["low"] is not None:
            found.intervals[estimate.get("method", METHOD)] += 1


def _estimates(value: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(value, Mapping):
        if {"mean", "low", "high"} <= value.keys():
            yield path, value
        else:
            for key in value:
                if path or key in ("scores", "average", "averages", "paired"):
                    yield from _estimates(value[key], f"{path}.{key}" if path else str(key))


# command --------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0 where all agree, 1 where something differs, 2 where there is no record."""
    parser = argparse.ArgumentParser(prog="kvbench verify", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", metavar="RESULTS", type=Path, help="folder with finished runs")
    args = parser.parse_args(argv)
    try:
        found = verify(args.results)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in found.notes:
        print(f"note: {line}")
    for line in found.differing:
        print(f"differs: {line}")
    print(f"{found.counts.total()} records computed again: {_listed(found.counts, 'from ')}")
    print(f"{found.intervals.total()} intervals computed again: {_listed(found.intervals)}")
    if found.left_out:
        print(f"{found.left_out.total()} intervals not computed again: {_listed(found.left_out)}")
    agree = "what was computed again agrees" if found.left_out or found.notes else "all agree"
    print(f"{len(found.differing)} differences" if found.differing else agree)
    return 1 if found.differing else 0


def _listed(counts: Mapping[str, int], preposition: str = "") -> str:
    return ", ".join(f"{count} {preposition}{what}" for what, count in sorted(counts.items())) or "none"


if __name__ == "__main__":
    sys.exit(main())
