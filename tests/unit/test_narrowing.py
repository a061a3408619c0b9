"""Prompts that lose tokens between layers, by a policy that does nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from tiny_models import left_pad, prompt_ids, tiny_model

from kvbench.conf.errors import InputError
from kvbench.methods.cache.method import Method
from kvbench.methods.policies.policy import CachePolicy, Kept, PolicyCapabilities
from kvbench.runners.engine import decode, prefill


@dataclass(frozen=True)
class ForwardLastTokens(CachePolicy):
    """The first layer forwards the last ``count`` tokens of the prompt, the others all that they receive."""

    count: int

    @cached_property
    def capabilities(self) -> PolicyCapabilities:
        return PolicyCapabilities(attends_whole_prompt=False, narrows_prompt=True, spans_layers=True)

    def new_state(self, layer):
        return {"place": layer.place, "prompts": []}

    def select(self, prompt, state=None):
        state["prompts"].append((prompt.keys.shape[0], prompt.length, prompt.tokens_seen))
        return Kept()

    def next_layer_tokens(self, state):
        if state["place"] > 0:
            return [None] * len(state["prompts"])
        lengths = [(rows, length, min(self.count, length)) for rows, length, _ in state["prompts"]]
        return [torch.arange(length - n, length).expand(rows, -1) for rows, length, n in lengths]


@pytest.mark.parametrize("lengths", [[23], [23, 14, 23]], ids=str)
def test_forwarding_every_token_matches_the_full_cache(lengths):
    model = tiny_model()
    ids, mask = left_pad([prompt_ids(n, seed) for seed, n in enumerate(lengths)])
    cache, full = Method("x", ForwardLastTokens(99)).new_cache(model), Method("full").new_cache(model)
    assert torch.equal(prefill(model, cache, ids, mask), prefill(model, full, ids, mask))
    token = torch.arange(3, 3 + len(lengths))
    assert torch.equal(decode(model, cache, token), decode(model, full, token))


def test_rows_keep_their_own_last_tokens_and_all_layers_count_the_whole_prompt():
    model = tiny_model()
    ids, mask = left_pad([prompt_ids(n, seed) for seed, n in enumerate((23, 4, 14))])
    cache = Method("x", ForwardLastTokens(9)).new_cache(model)
    prefill(model, cache, ids, mask)
    assert [held[:, 0].tolist() for held in cache.tokens_held] == [[23, 4, 14], [9, 4, 9], [9, 4, 9]]
    assert [layer.seen for layer in cache.layers] == [23] * 3
    assert cache.layers[2].state["prompts"] == [(1, 9, 23), (1, 9, 14), (1, 4, 4)]
    alone = Method("x", ForwardLastTokens(9)).new_cache(model)
    last = prefill(model, alone, ids[2:, 9:])
    assert (last - prefill(model, Method("x", ForwardLastTokens(9)).new_cache(model), ids, mask)[2:]).abs().max() < 1e-9


def test_forwarded_tokens_keep_their_positions():
    """The keys of the second layer are a function of the first layer's output at the true positions."""
    model, ids = tiny_model(), prompt_ids(23)
    cache, full = Method("x", ForwardLastTokens(9)).new_cache(model), Method("full").new_cache(model)
    for one in (cache, full):
        prefill(model, one, ids)
    kept, whole = (one.layers[1].storage.read()[0] for one in (cache, full))
    assert (kept - whole[:, :, 14:]).abs().max() < 1e-12


def test_a_prompt_in_chunks_is_refused_by_the_policys_name():
    model = tiny_model()
    with pytest.raises(InputError, match=r"runner\.chunk_size=7: ForwardLastTokens narrows a prompt"):
        prefill(model, Method("x", ForwardLastTokens(9)).new_cache(model), prompt_ids(23), chunk_size=7)


def hooks(model) -> int:
    return sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in model.get_decoder().layers)


def test_the_model_has_hooks_only_while_a_cache_is_in_use():
    model, ids = tiny_model.__wrapped__(), prompt_ids(23)  # of its own: no cache of another test is in use on it
    unused = Method("x", ForwardLastTokens(9)).new_cache(model)
    copied = unused.fork()
    assert hooks(model) == 0
    seen = []
    watch = model.get_decoder().layers[-1].register_forward_pre_hook(lambda *_: seen.append(hooks(model)))
    for cache in (Method("x", ForwardLastTokens(9)).new_cache(model), copied):
        prefill(model, cache, ids)
        decode(model, cache, torch.tensor([3]))
        assert [held[0, 0].item() for held in cache.tokens_held] == [24, 10, 10]
    prefill(model, Method("full").new_cache(model), ids)
    watch.remove()
    count = len(model.get_decoder().layers)
    assert seen == [count + 1, 1, count + 1, 1, 1]  # with the one that counts
    assert hooks(model) == 0 and unused.on_first_forward is not None
