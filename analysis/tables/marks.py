"""Significance in a table: blocks of rows at equal bytes, the best of each, differences from a reference.

Two scores are compared on the same examples, by flipping the signs of their differences; Holm's rule corrects for the
number of comparisons in a block or table (see :mod:`..stats`). Two times differ if their ranges do not overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..held import held_bytes
from ..load import Run, fewer_is_better
from ..stats import LEVEL, Comparison, Estimate, Groups, not_worse_than_best, paired_difference
from ..summaries import compare_all, score_bounds, shares_examples
from .cells import Cell, Table

EQUAL_BYTES = 0.05
"""Largest relative difference of the bytes of methods that are compared as if they kept the same."""
DAGGER = "†"
FLOOR_MARK = "°"
FLOOR_SHARE = 0.1
"""Largest share of examples with a score at which a data set says little about losses."""
MAX_TESTED = 2000
"""Runs of a page up to which differences are tested: a test takes about 10 ms."""

BLOCKS = f"Rows between two rules keep equal bytes, to within {100 * EQUAL_BYTES:g} %."
BEST = "Bold: the best of them and all that do not differ significantly from it, if any does."


READ = "KV read: bytes of the cache that a step reads, of what it reads of the full cache's."


def significant(reference: str) -> str:
    """What the dagger says, of a reference in words."""
    return f"{DAGGER}: differs from {reference} (sign flips of paired scores, Holm's rule, 5 %)."


# blocks ---------------------------------------------------------------------------------------------------------------


def in_blocks(runs: Sequence[Run]) -> tuple[list[Run], list[int]]:
    """Runs in the order of a table, and the number of each one's block.

    The full cache is first, then come the methods by their bytes; one begins a block if it takes more than the first
    of the block and :data:`EQUAL_BYTES` of that. Runs without numbers are last.
    """
    full = [run for run in runs if run.done and run.is_full_cache]
    lost = [run for run in runs if not run.done]
    others = sorted((run for run in runs if run.done and not run.is_full_cache), key=held_bytes)
    blocks: list[list[Run]] = []
    for run in others:
        if blocks and held_bytes(run) <= (1 + EQUAL_BYTES) * held_bytes(blocks[-1][0]):
            blocks[-1].append(run)
        else:
            blocks.append([run])
    ordered = [full, *(sorted(block, key=lambda run: run.label) for block in blocks), lost]
    numbered = [(run, number) for number, block in enumerate(ordered) for run in block]
    return [run for run, _ in numbered], [number for _, number in numbered]


def members_of(runs: Sequence[Run], blocks: Sequence[int]) -> list[list[int]]:
    """Places of the rows of each block that has at least two methods."""
    members: dict[int, list[int]] = {}
    for place, (run, block) in enumerate(zip(runs, blocks, strict=True)):
        if run.done and not run.is_full_cache:
            members.setdefault(block, []).append(place)
    return [places for places in members.values() if len(places) > 1]


# scores ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tests:
    """Comparisons of the scores of one table.

    Attributes:
        paired: Of each run by hash, the comparison with its reference and its p-value after Holm's rule.
        drift: Of each run by hash, the paired difference of its output tokens to its reference's.
        scores: Scores of each run by hash that can be compared.
    """

    paired: Mapping[str, tuple[Comparison, float]] = field(default_factory=dict)
    drift: Mapping[str, Estimate] = field(default_factory=dict)
    scores: Mapping[str, Groups] = field(default_factory=dict)

    def is_significant(self, run: Run) -> bool:
        """Whether a run's mean score differs from its reference's."""
        pair = self.paired.get(run.record["hash"])
        return pair is not None and pair[1] < 1 - LEVEL

    def best(self, runs: Sequence[Run], name: str | None = None) -> set[str]:
        """Return the hashes of the best run and of all not significantly different from it; empty if that is every run.

        Args:
            runs: Runs at equal bytes.
            name: Of a data set; default: the mean over all.
        """
        scores = {
            run.record["hash"]: self.scores[run.record["hash"]] for run in runs if run.record["hash"] in self.scores
        }
        if name is not None:
            scores = {key: {name: groups[name]} for key, groups in scores.items() if name in groups}
        if len(scores) < 2:
            return set()
        best = not_worse_than_best(scores, fewer_is_better(runs[0].record))
        return set() if len(best) == len(scores) else best


def tests_of(runs: Sequence[Run], reference_for: Callable[[Run, Sequence[Run]], Run | None]) -> Tests:
    """Compare the scores of a group of comparable runs; those without examples take no part.

    Args:
        runs: Runs of a table.
        reference_for: What returns the run among them that one is compared with, if there is one.
    """
    compared = [run for run in runs if run.done and run.examples is not None]
    if not compared:
        return Tests()
    scores = {run.record["hash"]: run.examples.by_data_set() for run in compared if run.examples is not None}
    pairs = [(run, other) for run in compared if (other := reference_for(run, compared)) is not None]
    return Tests(
        compare_all(
            {run.record["hash"]: (scores[run.record["hash"]], scores[other.record["hash"]]) for run, other in pairs},
            score_bounds(compared[0].record),
        ),
        {run.record["hash"]: drift for run, other in pairs if (drift := length_drift(run, other)) is not None},
        {run.record["hash"]: scores[run.record["hash"]] for run in compared if not run.is_full_cache},
    )


def length_drift(run: Run, reference: Run) -> Estimate | None:
    """Paired difference of the number of output tokens; None for tasks without output."""
    if run.examples is None or reference.examples is None:
        return None
    lengths, of_reference = run.examples.lengths(), reference.examples.lengths()
    if not any(lengths.values()) or not any(of_reference.values()):
        return None
    groups, baseline = _by_data_set(lengths), _by_data_set(of_reference)
    return paired_difference(groups, baseline, None) if shares_examples(groups, baseline) else None


def _by_data_set(lengths: Mapping[tuple[str, str], int]) -> dict[str, dict[str, float]]:
    out: dict[str, dict[str, float]] = {}
    for (dataset, name), length in lengths.items():
        out.setdefault(dataset, {})[name] = float(length)
    return out


def at_the_floor(full: Run | None) -> set[str]:
    """Data sets on which the full cache has no score, or nearly none: no method can lose there."""
    if full is None or full.examples is None or fewer_is_better(full.record):
        return set()
    shares = {
        name: sum(score > 0 for score in rows.values()) / len(rows)
        for name, rows in full.examples.by_data_set().items()
    }
    return {name for name, share in shares.items() if share <= FLOOR_SHARE}


def bold(cell: Cell) -> Cell:
    """The cell in bold."""
    return cell._replace(bold=True)


# times ----------------------------------------------------------------------------------------------------------------


def emphasized(table: Table) -> Table:
    """The best of every column in bold, among the rows of one block.

    The full cache is what the others are measured against and takes no part.
    """
    for places in members_of(table.runs, table.blocks):
        for column in range(len(table.columns)):
            cells = {i: table.rows[i][column] for i in places if table.rows[i][column].better}
            for i in _best(cells):
                table.rows[i][column] = bold(table.rows[i][column])
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
