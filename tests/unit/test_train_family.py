"""The script that trains the family of small models."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from kvbench.analysis.load import Run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("train_family", ROOT / "scripts/train_family.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_rate_is_chosen_among_the_trainings_on_one_task(script, monkeypatch):
    """Arms have one label on both tasks, whose trainings may be in one folder and whose losses are of other sizes."""
    losses = {("recall", 0.0005): 0.0, ("recall", 0.001): 0.1, ("text-stdlib", 0.001): 1.4, ("text-stdlib", 0.002): 1.3}
    runs = []
    for (task, lr), loss in losses.items():
        record = {"kind": "train", "task": task, "status": "done", "method_label": "mha", "hash": f"{task}{lr}"}
        record |= {"identity": {"seed": 0, "train": {"lr": lr}}, "training": {"lr": lr}, "validation": {"loss": loss}}
        runs.append(Run(Path(), record, "mha"))
    monkeypatch.setattr(script, "load", lambda folder: (runs, []))
    for task, rate in (("recall", 0.0005), ("text", 0.002)):
        assert [run.record["training"]["lr"] for run in script.best(task, "results")["mha"]] == [rate]


@pytest.mark.parametrize(
    ("task", "lr", "loss", "helps"),
    [
        ("recall", 2.5e-4, 0.85, True),
        ("recall", 2.5e-4, 5e-6, False),  # nothing is left to learn
        ("recall", 5e-4, 1.75, False),  # the least rate is not the best
        ("recall", 1.25e-4, 0.5, True),  # given again: it is trained already, and read
        ("text", 1e-3, 1.4, False),
    ],
)
def test_a_lower_rate_is_tried_below_the_best_if_something_is_left_to_learn(script, task, lr, loss, helps):
    record = {"training": {"lr": lr}, "validation": {"loss": loss}}
    assert script.lower_rate_may_help(task, record) is helps
