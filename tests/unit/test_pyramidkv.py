"""PyramidKV's budgets: the published code's, and what must hold of ours."""

from __future__ import annotations

import pytest
import torch
from golden import golden_prompt
from published import RoundedDownPyramid, pyramidkv
from tiny_models import prompt_ids, tiny_model

from kvbench.conf.errors import InputError
from kvbench.methods.cache.method import Method
from kvbench.methods.policies.allocators.pyramid import Pyramid
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.runners.engine import prefill


@pytest.mark.parametrize("layer", range(4))
def test_golden_sets(golden, layer):
    selection = pyramidkv(budget=12, window=4, beta=4, kernel=5, pooling="avg", allocator=RoundedDownPyramid)
    kept = selection.select(golden_prompt(layer_idx=layer, num_layers=4)).slots[0]
    assert kept.tolist() == golden[f"pyramidkv layer={layer}/4 C=12 w=4 beta=4 k=5 avgpool"]


@pytest.mark.parametrize(
    ("budget", "length"), [(128, 8192), (64, 8192), (2048, 8192), (2048, 5000), (2048, 4000), (128, 100)]
)
def test_published_budgets(golden, budget, length):
    ours = pyramidkv(budget=budget, window=8, beta=20, allocator=RoundedDownPyramid).layer_budgets(length, 32)
    assert list(ours) == golden["pyramidkv official kept tokens per layer"][f"C={budget} w=8 beta=20 L=32 T={length}"]


@pytest.mark.parametrize("budget", [9, 10, 12, 40, 64, 128, 500, 2048])
@pytest.mark.parametrize("length", [8192, 5000, 300])
@pytest.mark.parametrize("layers", [1, 2, 7, 30, 32])
@pytest.mark.parametrize("beta", [1, 3, 20])
def test_budgets_fall_and_add_up_exactly(budget, length, layers, beta):
    kept = pyramidkv(budget=budget, window=8, beta=beta).layer_budgets(length, layers)
    assert sum(kept) == layers * min(budget, length)
    assert list(kept) == sorted(kept, reverse=True)
    assert min(kept) > 8 or budget > length
    assert max(kept) <= length
    if beta == 1:
        assert len(set(kept)) == 1


def test_a_prompt_too_short_for_a_pyramid_is_snapkv():
    """budget <= T < 2 (budget - window): every layer alike, and the same tokens."""
    pyramid = pyramidkv(budget=30, window=4, kernel=5, pooling="avg")
    snapkv = EvictionPolicy(SnapKV(window=4, kernel=5, pooling="avg"), 30)
    prompt = golden_prompt(layer_idx=2, num_layers=4)
    assert torch.equal(pyramid.select(prompt).slots, snapkv.select(prompt).slots)


def test_layers_store_their_budgets():
    model = tiny_model()
    method = Method("pyramidkv", pyramidkv(budget=20, window=4, beta=4))
    cache = method.new_cache(model)
    prefill(model, cache, prompt_ids(90))
    held = [int(t[0, 0]) for t in cache.tokens_held]
    assert held == list(method.policy.layer_budgets(90, 3)) == [32, 20, 8]


@pytest.mark.parametrize("budget", [9, 40, 64, 500, 2048, 4000])
@pytest.mark.parametrize("length", [8192, 5000, 300])
def test_budgets_that_count_protected_tokens_are_kvpress_up_to_rounding(budget, length):
    """Its formula: also where it is uniform, since the last layer would keep less than the window of 8."""
    if length < budget:
        return
    low, high = budget / 20, 2 * budget - budget / 20
    if high >= length - 8:
        low, high = 2 * budget - (length - 8), length - 8
    flat = not length >= high >= low >= 8
    expected = [budget if flat else high - layer * (high - low) / 31 for layer in range(32)]
    found = Pyramid(20, protected_tokens="counted").layer_budgets(budget, 8, length, 32)
    assert sum(found) == 32 * budget
    assert all(abs(ours - theirs) < 1.5 for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("options", [{"beta": 0}, {"beta": 1.5}, {"beta": True}, {"window": 2000}])
def test_bad_settings(options):
    with pytest.raises(InputError, match=r"method\.(recent|allocator\.beta)"):
        pyramidkv(**options)
