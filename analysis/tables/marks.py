"""Which cells of a table are bold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .cells import Cell, Table


def emphasized(table: Table) -> Table:
    """The best of every column in bold, among the rows of one budget; among all rows where no budget has two.

    The full cache is what the others are measured against and takes no part.
    """
    blocks: dict[Any, list[int]] = {}
    for i, run in enumerate(table.runs):
        if run.done and not run.is_full_cache and (run.examples is not None or run.record["kind"] != "accuracy"):
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
