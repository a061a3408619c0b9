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
        ("recall", 5e-4, 1.75, True),  # no rate has solved the task
        ("recall", 1.25e-4, 0.5, True),  # given again: it is trained already, and read
        ("text", 1e-3, 1.4, False),
    ],
)
def test_a_lower_rate_may_help_if_something_is_left_to_learn(script, task, lr, loss, helps):
    record = {"training": {"lr": lr}, "validation": {"loss": loss}}
    assert script.lower_rate_may_help(task, record) is helps


@pytest.mark.parametrize(("loss", "tried"), [(0.8, [2.5e-4, 5e-4, 1e-3, 1.25e-4]), (1e-6, [2.5e-4, 5e-4, 1e-3])])
def test_all_rates_are_tried_with_seed_0_and_the_best_with_further_seeds(script, monkeypatch, loss, tried):
    """The loss rises with the rate, down to a loss of ``loss`` at 2.5e-4 and a little less below."""
    trained = []
    monkeypatch.setattr(script, "train", lambda task, arm, lr, seed, results: trained.append((arm, lr, seed)))

    def best(task, results):
        rates = {lr for arm, lr, seed in trained if arm == "yoco" and seed == 0}
        record = {"training": {"lr": min(rates)}, "validation": {"loss": loss}}
        return {"yoco": [Run(Path(), record, "yoco")]}

    monkeypatch.setattr(script, "best", best)
    monkeypatch.setattr("sys.argv", ["train_family.py", "recall", "results", "--only", "yoco", "--seeds", "2"])
    script.main()
    assert trained == [*(("yoco", lr, 0) for lr in tried), *(("yoco", min(tried), seed) for seed in (1, 2))]


def test_arms_that_say_nothing_on_recall_are_left_out(script, monkeypatch):
    installed = []
    monkeypatch.setattr(script, "install", lambda task, arms, results: installed.append(arms))
    for task in ("recall", "text"):
        monkeypatch.setattr("sys.argv", ["train_family.py", task, "results", "--install"])
        script.main()
    assert set(installed[1]) - set(installed[0]) == {"gqa", "mla112"}
