"""Experiments and points of the campaign are composed, and their methods built, without running them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hydra.utils import instantiate

from kvbench.methods.cache.method import Method
from kvbench.runners.config.loader import compose, packaged_choices
from kvbench.runners.config.methods import methods_of, named_method

CHOICES = packaged_choices()
NOT_IN_SMOKE = {
    "no_cache": "reads the whole prompt again at every step",
    "hf_quantized": "needs a package that compiles its own kernels at the first call",
}
"""Training-free methods that experiment=gpu_smoke leaves out, and why."""


def methods_to_run(*overrides: str) -> list[Method]:
    config = compose(overrides)
    return methods_of(instantiate(config.runner), config.method)


@pytest.fixture(scope="module")
def smoke() -> list[Method]:
    return methods_to_run("experiment=gpu_smoke")


def test_the_smoke_run_covers_every_method_that_needs_no_training(smoke):
    training_free = {name for name in CHOICES["method"] if name not in NOT_IN_SMOKE}
    training_free = {name for name in training_free if named_method(name).sharing is None}
    missing = training_free - {method.name for method in smoke}
    assert not missing, "add them to conf/experiment/gpu_smoke.yaml"
    assert {"snapkv", "fp8", "quest", "transformers"} <= training_free and "cla" not in training_free


def test_the_smoke_run_covers_every_storage(smoke):
    choices = set(CHOICES["method/storage"]) - NOT_IN_SMOKE.keys()
    used = {method.storage.name for method in smoke}
    missing = {choice for choice in choices if named_method(f"full storage={choice}").storage.name not in used}
    assert not missing, "add them to conf/experiment/gpu_smoke.yaml"


def test_the_smoke_run_loads_one_model_and_names_no_method_twice(smoke):
    labels = [(method.label, method.budget) for method in smoke]
    assert len(set(labels)) == len(labels) and labels[0][0] == "full"
    assert all(method.sharing is None for method in smoke)


@pytest.mark.parametrize("name", CHOICES["experiment"])
def test_an_experiment_is_composed(name):
    assert methods_to_run(f"experiment={name}")


@pytest.mark.parametrize("point", CHOICES["campaign"])
def test_a_point_of_the_campaign_has_a_method_beside_what_it_is_compared_with(point):
    config = compose(["experiment=gpu_campaign", f"campaign={point}"])
    methods = methods_of(instantiate(config.runner), config.method)
    assert (config.device, config.dtype) == ("cuda", "bfloat16")
    assert len(methods) > 1 or point.startswith("full-")
    instantiate(config.workload)


def script(name: str) -> ModuleType:
    """A file of ``scripts/`` as a module."""
    path = Path(__file__).resolve().parents[2] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_runs_of_the_goals_answer_all_of_them():
    """From records with nothing measured: every goal has a value, and goals are missed where a number is too large."""
    module = script("gpu_goals")
    tasks: dict[str, dict[str, dict[str, object]]] = {}
    for overrides in module.RUNS:
        config = compose(overrides)
        task = tasks.setdefault(instantiate(config.workload).source().name, {})
        for method in methods_of(instantiate(config.runner), config.method):
            task[method.label] = {
                "metrics": {"tpot_ms": {"median": 5.0}},
                "limit": {"mbu": {"median": 0.8}},
                "paired": {"prefill_slow_down": 1.0, "decode_speed_up": 1.0, "decode_speed_up_by_bytes": 1.0},
                "search": {"measured_at": 10},
                "budget": method.budget,
            }
    verdicts = {goal.name: goal.verdict for goal in module.goals(tasks)}
    missed = {name for name, verdict in verdicts.items() if verdict == "missed"}
    assert "not run" not in verdicts.values()
    assert missed == {  # times are equal, and so are lengths
        "snapkv at 16k, 2 sequences: generate's TPOT / its own",
        "snapkv, longest prompt of 2 sequences on 80 GB / full",
    }
    assert "tova 2048 at 16k: TPOT / full" in verdicts and "fp8 at 16k: TPOT / full" not in verdicts
    assert {goal.verdict for goal in module.goals({})} == {"not run"}
