"""First layers that keep the whole prompt."""

from __future__ import annotations

import pytest
import torch
from golden import golden_prompt
from tiny_models import prompt_ids, tiny_model

from kvbench.conf.errors import InputError
from kvbench.methods.cache.method import Method
from kvbench.methods.policies.allocators.whole_layers import WholeLayers
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.schedules.hold import Hold
from kvbench.methods.policies.scorers.key_norm import KeyNorm
from kvbench.runners.engine import decode, prefill


@pytest.mark.parametrize(("first", "expected"), [(1, [90, 20, 20]), (2, [90, 90, 20]), (5, [90, 90, 90])])
def test_only_the_other_layers_are_evicted(first, expected):
    model = tiny_model()
    method = Method("key_norm", EvictionPolicy(KeyNorm(), 20, allocator=WholeLayers(first)))
    cache = method.new_cache(model)
    prefill(model, cache, prompt_ids(90))
    assert [int(t[0, 0]) for t in cache.tokens_held] == list(method.policy.layer_budgets(90, 3)) == expected


def test_the_other_layers_keep_what_they_keep_by_themselves():
    whole, alike = EvictionPolicy(KeyNorm(), 20, allocator=WholeLayers(2)), EvictionPolicy(KeyNorm(), 20)
    prompts = [golden_prompt(layer_idx=layer, num_layers=4) for layer in range(4)]
    assert [whole.select(prompt).slots is None for prompt in prompts] == [True, True, False, False]
    assert all(torch.equal(whole.select(prompt).slots, alike.select(prompt).slots) for prompt in prompts[2:])


def test_a_held_budget_keeps_the_prompts_length_in_whole_layers():
    model, ids = tiny_model(), prompt_ids(97)
    method = Method("key_norm", EvictionPolicy(KeyNorm(), 20, allocator=WholeLayers(1), schedule=Hold()))
    cache = method.new_cache(model)
    prefill(model, cache, ids[:, :90])
    for token in ids[0, 90:]:
        decode(model, cache, token[None])
    assert [int(t[0, 0]) for t in cache.tokens_held] == [90, 20, 20]


def test_no_layer_is_an_error():
    with pytest.raises(InputError, match=r"method\.allocator\.first.*0"):
        WholeLayers(0)
