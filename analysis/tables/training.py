"""Tables of trainings: architectures on the same data, each at the learning rate that suits it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ..load import Run
from .cells import Cell, Table, number, older_sign, out_of_memory_row, run_hash
from .notes import made_by, older_versions


def at_best_rate(runs: Sequence[Run], reported: bool = False) -> dict[str, list[Run]]:
    """Trainings by label, each at the learning rate with the least mean loss on held-out data, by seed.

    Where some rates were tried with fewer seeds than others, the seeds that all of them share decide.

    Args:
        runs: Trainings on the same data.
        reported: Without the seeds that decided, whose loss at the chosen rate is the least of several; all seeds
            where there is no other, or only one rate.
    """
    by_label: dict[str, dict[float, list[Run]]] = {}
    for run in (r for r in runs if r.done):
        by_label.setdefault(run.label, {}).setdefault(run.record["training"]["lr"], []).append(run)
    out = {}
    for label, by_lr in by_label.items():
        shared = set.intersection(*({r.record["identity"]["seed"] for r in tried} for tried in by_lr.values()))
        judged = {
            lr: [r for r in tried if not shared or r.record["identity"]["seed"] in shared]
            for lr, tried in by_lr.items()
        }
        best = min(judged, key=lambda lr: fmean(r.record["validation"]["loss"] for r in judged[lr]))
        trainings = sorted(by_lr[best], key=lambda run: run.record["identity"]["seed"])
        if reported and len(by_lr) > 1:
            trainings = [run for run in trainings if run.record["identity"]["seed"] not in shared] or trainings
        out[label] = trainings
    return out


def train_table(runs: Sequence[Run]) -> Table:
    """What was trained on the same data: a row for each architecture, at the learning rate that served it best.

    The row's numbers are means over the seeds that did not choose the rate (see :func:`at_best_rate`), and the spread
    is from the least to the greatest.
    """
    columns = ["method", "parameters", "KV bytes/token", "loss", "min - max", "perplexity", "accuracy"]
    columns += ["lr", "of", "seeds", "training s", "tok/s", "run"]
    rows, shown = [], []
    tried: dict[str, set[float]] = {}
    for run in (r for r in runs if r.done):
        tried.setdefault(run.label, set()).add(run.record["training"]["lr"])
    choosing: dict[str, set[int]] = {}  # seeds at the best rate that are not reported, by label
    whole = at_best_rate(runs)
    for label, best in at_best_rate(runs, reported=True).items():
        choosing[label] = {run.record["identity"]["seed"] for run in whole[label] if run not in best}
        lr = best[0].record["training"]["lr"]
        validations = [run.record["validation"] for run in best]
        losses = [v["loss"] for v in validations]
        training = [run.record["training"] for run in best]
        fixed = best[0].record["bytes"]["kv_bytes_fixed"]
        a_token = best[0].record["bytes"]["kv_bytes_per_token"]
        rows.append(
            [
                Cell(label + older_sign(best[0])),
                Cell(f"{training[0]['parameters']:,}", training[0]["parameters"]),
                Cell(f"{a_token}" + (f" + {fixed}" if fixed else ""), a_token, better=-1),
                Cell(f"{fmean(losses):.4f}", fmean(losses), min(losses), max(losses), len(losses), -1, measured=True),
                Cell(f"{min(losses):.4f} - {max(losses):.4f}"),
                number(fmean(v["perplexity"] for v in validations), 3),
                number(fmean(v["accuracy"] for v in validations), 3),
                Cell(f"{lr:g}", lr),
                Cell(" ".join(f"{x:g}" for x in sorted(tried[label]))),
                Cell(" ".join(str(run.record["identity"]["seed"]) for run in best)),
                number(fmean(t["seconds"] for t in training), 0),
                number(fmean(t["tokens_per_s"] for t in training), 0),
                run_hash(best[0]),
            ]
        )
        shown.append(best[0])
    lost = [run for run in runs if not run.done]
    rows += [out_of_memory_row(run, len(columns)) for run in lost]
    first = runs[0].record
    trained = f"trained on {shown[0].record['training']['tokens']:,} tokens" if shown else "trainings"
    table = Table(f"{first['task']} / {first['model']}: {trained}", columns, rows, shown + lost)
    if any(run.record["bytes"]["kv_bytes_fixed"] for run in shown):
        table.notes.append("KV bytes/token: + what windows and states take at any length.")
    if any(choosing.values()):
        seeds = " ".join(map(str, sorted(set.union(*choosing.values()))))
        table.notes.append(f"lr: chosen by seed {seeds}, whose loss is not in the row.")
    biased = [label for label in choosing if not choosing[label] and len(tried[label]) > 1]
    if biased:
        table.notes.append(f"Chosen by the seeds in the row, so that its loss is biased low: {', '.join(biased)}.")
    table.notes += older_versions(table.runs) + made_by(runs)
    return table
