"""Experiments and points of the campaign are composed, and their methods built, without running them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig

from kvbench.methods.cache.method import Method
from kvbench.runners.config.loader import compose, packaged_choices
from kvbench.runners.config.methods import methods_of, named_method

CHOICES = packaged_choices()
POINTS = CHOICES["campaign"]
QUICK = ("kivi-32k", "quest-32k")
"""Points whose methods are built where the slow tests are not run; those that a claim names are in test_published."""
NOT_IN_SMOKE = {
    "no_cache": "reads the whole prompt again at every step",
    "hf_quantized": "needs a package that compiles its own kernels at the first call",
}
"""Training-free methods that experiment=gpu_smoke leaves out, and why."""


def script(name: str) -> ModuleType:
    """A file of ``scripts/`` as a module."""
    path = Path(__file__).resolve().parents[2] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


GOALS = script("gpu_goals")


def methods_to_run(config: DictConfig) -> list[Method]:
    return methods_of(instantiate(config.runner), config.method)


@pytest.fixture(scope="module")
def smoke() -> list[Method]:
    """Methods of experiment=gpu_smoke, at the budget of the goals."""
    assert GOALS.RUNS[0][0] == "experiment=gpu_smoke"
    return methods_to_run(compose(GOALS.RUNS[0]))


def test_the_smoke_run_covers_every_method_that_needs_no_training(smoke):
    made = [named_method(name) for name in CHOICES["method"] if name not in NOT_IN_SMOKE]
    training_free = {(method.name, method.storage.name) for method in made if method.sharing is None}
    missing = training_free - {(method.name, method.storage.name) for method in smoke}
    assert not missing, "add them to conf/experiment/gpu_smoke.yaml"
    assert {("fp8", "fp8"), ("snapkv", "kivi4"), ("snapkv", "dense")} <= training_free
    assert "cla" not in {name for name, _ in training_free}
    assert all(method.sharing is None for method in smoke) and smoke[0].name == "full"  # one model for all


def test_the_smoke_run_covers_every_storage(smoke):
    choices = set(CHOICES["method/storage"]) - NOT_IN_SMOKE.keys()
    used = {method.storage.name for method in smoke}
    missing = {choice for choice in choices if named_method(f"full storage={choice}").storage.name not in used}
    assert not missing, "add them to conf/experiment/gpu_smoke.yaml"


@pytest.mark.parametrize("name", CHOICES["experiment"])
def test_an_experiment_is_composed(name):
    config = compose([f"experiment={name}"])
    assert config.runner._target_ and config.method._target_


@pytest.mark.parametrize("point", POINTS)
def test_a_point_of_the_campaign_is_composed(point):
    config = compose(["experiment=gpu_campaign", f"campaign={point}"])
    assert (config.device, config.dtype) == ("cuda", "bfloat16")
    assert config.runner.pair_with and instantiate(config.workload)


@pytest.mark.parametrize("point", [pytest.param(p, marks=[] if p in QUICK else [pytest.mark.slow]) for p in POINTS])
def test_the_methods_of_a_point_of_the_campaign_are_built(point):
    methods = methods_to_run(compose(["experiment=gpu_campaign", f"campaign={point}"]))
    assert len(methods) > 1 or point.startswith("full-")


def test_the_runs_of_the_goals_answer_all_of_them(smoke):
    """From records with nothing measured: every goal has a value, and goals are missed where a number is too large."""
    tasks: dict[str, dict[str, dict[str, object]]] = {}
    for overrides in GOALS.RUNS:
        config = compose(overrides)
        task = tasks.setdefault(instantiate(config.workload).source().name, {})
        for method in smoke if overrides is GOALS.RUNS[0] else methods_of(instantiate(config.runner), config.method):
            record = {
                "method_label": method.label,
                "identity": {"method": method.identity()},
                "metrics": {"tpot_ms": {"median": 5.0}},
                "limit": {"mbu": {"median": 0.8}},
                "paired": {"prefill_slow_down": 1.0, "decode_speed_up": 1.0, "decode_speed_up_by_bytes": 1.0},
                "search": {"measured_at": 10},
                "budget": method.effective_budget,
            }
            assert task.setdefault(GOALS.name_of(record), record) is record
    verdicts = {goal.name: goal.verdict for goal in GOALS.goals(tasks)}
    missed = {name for name, verdict in verdicts.items() if verdict == "missed"}
    assert "not run" not in verdicts.values()
    assert missed == {  # times are equal, and so are lengths
        "snapkv at 16k, 2 sequences: generate's TPOT / its own",
        "snapkv, longest prompt of 2 sequences on 80 GB / full",
    }
    assert "tova 2048 at 16k: TPOT / full" in verdicts and "fp8 at 16k: TPOT / full" not in verdicts
    assert {goal.verdict for goal in GOALS.goals({})} == {"not run"}
