"""Scores of a run's examples, read from ``samples.jsonl`` and compared with what its record says."""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from .checks import agree
from .schema import SAMPLES


@dataclass(frozen=True, slots=True)
class Examples:
    """Score and output length of each example of a run.

    Attributes:
        keys: (data set, id) of each example, sorted; runs on the same data share the tuple. A data set that the task
            splits (LongBench-E by length) is that of its part: ``qasper/0-4k``.
        scores: In the unit of the record: percent, or nats per token.
        new_tokens: Number of output tokens; empty if a row lacks it.
    """

    keys: tuple[tuple[str, str], ...]
    scores: array[float]
    new_tokens: array[int]

    def by_data_set(self) -> dict[str, dict[str, float]]:
        """``{data set: {id: score}}``."""
        out: dict[str, dict[str, float]] = {}
        for (dataset, name), score in zip(self.keys, self.scores, strict=True):
            out.setdefault(dataset, {})[name] = score
        return out

    def lengths(self) -> dict[tuple[str, str], int]:
        """Number of output tokens by (data set, id)."""
        return dict(zip(self.keys, self.new_tokens, strict=False))


class Contradiction(ValueError):
    """Samples that give other numbers than their record has."""


def read_examples(folder: Path, record: Mapping[str, Any]) -> tuple[Examples | None, str | None]:
    """The examples of a finished accuracy run, or what makes them unfit for tests between runs.

    Raises:
        Contradiction: The rows are complete, and their means are not those of the record.
    """
    try:
        found, counts = _parse(folder / SAMPLES, 1.0 if "unit" in record else 100.0)
    except OSError as error:
        return None, "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
    except ValueError as error:
        return None, str(error)
    expected = record["data"]["examples"]
    for dataset in sorted(expected.keys() | counts.keys()):
        if counts[dataset] != expected.get(dataset, 0):
            return None, f"has {counts[dataset]} rows of {dataset}; the record counts {expected.get(dataset, 0)}"
    by_set = found.by_data_set()
    if record["scores"].keys() == by_set.keys():  # else these are rows of before they named their part of a data set
        for dataset, rows in by_set.items():
            mean, recorded = fmean(rows.values()), record["scores"][dataset]["mean"]
            if not agree(mean, recorded):
                raise Contradiction(f"scores.{dataset}.mean is {recorded:g}: {SAMPLES} gives {mean:g}")
    return found, None


def _parse(path: Path, factor: float) -> tuple[Examples, Counter[str]]:
    """The examples, and the number of rows of each data set.

    Raises:
        ValueError: A row is damaged or repeated.
    """
    rows: dict[tuple[str, str], tuple[float, int | None]] = {}
    counts: Counter[str] = Counter()
    for number, row in enumerate(_rows(path.read_bytes()), start=1):
        try:
            dataset = row["dataset"]
            key = (row.get("group", dataset), row["id"])
            score, length = row["score"], row.get("new_tokens")
            if not (isinstance(dataset, str) and isinstance(key[0], str) and isinstance(key[1], str)):
                raise TypeError
            if not _is_number(score):
                raise TypeError
        except (TypeError, KeyError, AttributeError):
            raise ValueError(f"line {number} is no row of an example") from None
        if key in rows:
            raise ValueError(f"line {number} repeats the example {'/'.join(key)}")
        counts[dataset] += 1
        rows[key] = (factor * score, length if isinstance(length, int) and 0 <= length < 2**31 else None)
    keys = tuple(sorted(rows))
    lengths = [rows[key][1] for key in keys]
    known = [length for length in lengths if length is not None]
    scores = array("d", (rows[key][0] for key in keys))
    return Examples(keys, scores, array("i", known if len(known) == len(keys) else ())), counts


def _rows(content: bytes) -> Iterable[Any]:
    """The rows of a file, those of damaged lines as None.

    All lines are read in one go. Each is in brackets and ends with a line break, which no JSON text may hold: so a line
    that is damaged cannot be made whole by another one.
    """
    lines = content.split(b"\n")  # bytes: str.splitlines would also split at U+2028 in a text
    if not lines[-1]:
        lines.pop()
    try:
        found = json.loads((b"[[" + b"\n],[".join(lines) + b"\n]]").decode()) if lines else []
        if len(found) == len(lines) and all(len(row) == 1 for row in found):
            return [row for (row,) in found]
    except (ValueError, RecursionError):
        pass
    return map(_row, lines)


def _row(line: bytes) -> Any:
    """What a line holds; None if it is damaged."""
    try:
        return json.loads(line.decode())  # for bytes, json guesses the encoding
    except (ValueError, RecursionError):
        return None


def _is_number(value: Any) -> bool:
    return type(value) in (float, int) and math.isfinite(value)
