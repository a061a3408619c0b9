"""Tables of trainings: architectures on the same data, each at the learning rate that suits it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ..load import Run
from .cells import Cell, Table, number, out_of_memory_row, run_hash
from .notes import made_by


def at_best_rate(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Trainings by label, each at the learning rate with the least mean loss on held-out data, by seed.

    Where some rates were tried with fewer seeds than others, the seeds that all of them share decide.
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
    tried: dict[str, set[float]] = {}
    for run in (r for r in runs if r.done):
        tried.setdefault(run.label, set()).add(run.record["training"]["lr"])
    for label, best in at_best_rate(runs).items():
        lr = best[0].record["training"]["lr"]
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
                number(fmean(v["perplexity"] for v in found), 3),
                number(fmean(v["accuracy"] for v in found), 3),
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
    table.notes += made_by(runs)
    return table
