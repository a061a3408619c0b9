"""Published figures of speed and memory beside ours as one table, for ``kvbench table RESULTS --published``.

``kvbench paper NAME RESULTS`` has them by paper, with the published numbers of quality.
"""

from __future__ import annotations

from collections.abc import Sequence

from .load import Run
from .papers.claims import answers, claims, device
from .papers.verdict import NOT_RUN, verdict
from .tables import Cell, Table, different_layers


def published_table(runs: Sequence[Run]) -> Table:
    """Every claim, with ours where the runs for it are there, on each kind of hardware that has them."""
    rows: list[list[Cell]] = []
    used: list[Run] = []
    for claim in claims():
        head = [Cell(claim.paper), Cell(claim.claim), Cell(f"{claim.published:g} {claim.unit}", claim.published)]
        head.append(Cell(claim.published_on))
        matches = answers(claim, runs)
        for run, value in matches:
            share = value / claim.published
            said, remark = verdict(claim.published, value, None, None, claim.differences(run.record))
            ours = [Cell(f"{value:.3g} {claim.unit}" if value < 1000 else f"{value:,.0f} {claim.unit}", value)]
            words = f"{said} ({remark})" if remark else said
            rows.append([*head, *ours, Cell(device(run)), Cell(f"{share:.2f}", share), Cell(words)])
            used.append(run)
        if not matches:
            rows.append([*head, Cell("-"), Cell("-"), Cell("-"), Cell(NOT_RUN)])
    columns = ["paper", "claim", "published", "on", "ours", "device", "ours / published", "verdict"]
    table = Table("Published figures of speed and memory, and ours", columns, rows, used)
    table.notes.append("reproduced: 0.9 to 1.1 of the published figure; random weights of the same shape.")
    table.notes.append("not comparable: another card than the paper's, where the figure depends on it.")
    table.notes += different_layers(used)
    if not used:
        table.notes.append("None of these runs is here: kvbench run experiment=gpu_campaign makes them.")
    table.notes.append("`kvbench paper NAME` has each paper's numbers of quality as well.")
    return table
