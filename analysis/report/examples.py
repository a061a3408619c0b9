"""Examples of runs for the page: read once, their texts kept once, compressed a group at a time."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from numbers import Real
from statistics import fmean
from typing import Any

SIGNIFICANT_DIGITS = 7
"""Digits of a number in the page; the records hold all of them."""


def number(value: Any) -> float | int | None:
    """A finite number with the digits that the page shows; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{float(value):.{SIGNIFICANT_DIGITS}g}")


class Examples:
    """The examples of one group: each text once, and for each run its scores and the numbers of its texts."""

    def __init__(self, with_predictions: bool) -> None:
        self.with_predictions = with_predictions
        self.texts: dict[str, int] = {}
        self.examples: dict[tuple[str, str], int] = {}
        self.prompt_tokens: list[Any] = []
        self.runs: dict[str, dict[int, list[Any]]] = {}

    def add(self, run_id: str, rows: Iterable[Mapping[str, Any]], percent: bool) -> None:
        """Add a run; ``percent``: its scores are shares, shown in percent."""
        mine: dict[int, list[Any]] = {}
        for row in rows:
            key = (str(row["dataset"]), str(row["id"]))
            if key not in self.examples:
                self.examples[key] = len(self.examples)
                self.prompt_tokens.append(number(row.get("prompt_tokens")))
            score = number(row["score"])
            if score is not None and percent:
                score = number(100 * score)
            mine[self.examples[key]] = [score, self._text(row.get("prediction")), number(row.get("new_tokens"))]
        self.runs[run_id] = mine

    def _text(self, prediction: Any) -> int:
        if prediction is None or not self.with_predictions:
            return -1
        text = prediction if isinstance(prediction, str) else json.dumps(prediction, ensure_ascii=False)
        return self.texts.setdefault(text, len(self.texts))

    def packed(self) -> str:
        """All of them as base64 of zlib-compressed JSON."""
        nothing = [None, -1, None]
        order = range(len(self.examples))
        content = {
            "texts": list(self.texts),
            "examples": [[*key, tokens] for key, tokens in zip(self.examples, self.prompt_tokens, strict=True)],
            "runs": {
                run_id: [list(column) for column in zip(*(mine.get(i, nothing) for i in order), strict=True)]
                for run_id, mine in self.runs.items()
            },
        }
        raw = json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")
        return base64.b64encode(zlib.compress(raw, 9)).decode("ascii")


def needle_map(rows: Iterable[Mapping[str, Any]], group: dict[str, Any]) -> list[list[float | int | None]]:
    """``[depth, length, mean score, n]`` of each cell; an example is named by its depth, its data set by its length.

    The group's axes grow by the lengths and depths that are found.
    """
    cells: dict[tuple[float, int], list[float]] = {}
    for row in rows:
        try:
            depth, length = float(str(row["id"]).split("-")[1]), int(str(row["dataset"]).rpartition("-")[2])
        except (IndexError, ValueError):
            continue
        score = number(row["score"])
        if score is not None:
            cells.setdefault((depth, length), []).append(100 * score)
    group["depths"] = sorted({*group["depths"], *(depth for depth, _ in cells)})
    group["lengths"] = sorted({*group["lengths"], *(length for _, length in cells)})
    return [[depth, length, number(fmean(scores)), len(scores)] for (depth, length), scores in sorted(cells.items())]
