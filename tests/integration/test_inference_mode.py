"""A cache may be fed under inference mode or outside of it, and the next step may be the other way."""

from __future__ import annotations

import pytest
import torch
from sharing_models import RETENTION, shared_model
from test_contract import METHODS, make, model_for, once_for_scorers
from tiny_models import left_pad, prompt_ids, tiny_model

from kvbench.methods.cache.cache import KVCache
from kvbench.methods.cache.forward import text_seeds
from kvbench.methods.cache.method import Method
from kvbench.methods.storage.base import IN_PLACE, LayerStorage
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import decode, decode_step, prefill

HELD = [text for text in METHODS if text != "no_cache"]
STORAGES = ["full", "ada_kv", "kivi storage.residual=16 storage.group=8", "minicache"]


def forward(model, cache: KVCache, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits [B, vocabulary] of the model's own forward, as a user calls it."""
    if mask is None:
        n = ids.shape[1]
        positions = cache.next_positions()[:, None] + torch.arange(n)
    else:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    return out.logits[:, -1]


def prompt(text: str):
    vocabulary = model_for(text).config.vocab_size
    ids, mask = left_pad([prompt_ids(70, 1), prompt_ids(45, 2)])
    return ids % vocabulary, mask


# A user's forward refuses kvzip.
@pytest.mark.parametrize("text", once_for_scorers(text for text in HELD if "kvzip" not in text))
def test_steps_follow_a_prompt_in_either_mode(text):
    """The engine's prompt and a user's steps with autograd on, and the reverse."""
    model, method, (ids, mask) = model_for(text), make(text), prompt(text)
    engine, mine, theirs = (method.new_cache(model) for _ in range(3))
    theirs.text_seeds = text_seeds(ids, mask)  # which the engine does
    expected = prefill(model, engine, ids, mask)
    prefill(model, mine, ids, mask)
    torch.testing.assert_close(forward(model, theirs, ids, mask).detach(), expected, rtol=0, atol=1e-9)
    for _ in range(9):  # past a block of residual tokens
        token = expected.argmax(-1)
        expected = decode(model, engine, token)
        torch.testing.assert_close(forward(model, mine, token[:, None]).detach(), expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(decode(model, theirs, token), expected, rtol=0, atol=1e-9)
    assert not any(t.requires_grad for cache in (mine, theirs) for layer in cache.layers for t in layer.tensors())


@pytest.mark.parametrize("text", once_for_scorers(HELD))
def test_fork_and_generate_continue_an_engine_prefill(text):
    model, (ids, mask) = model_for(text), prompt(text)
    ids, mask = ids[:1], mask[:1]
    cache = make(text).new_cache(model)
    token = prefill(model, cache, ids).argmax(-1)
    fork = cache.fork()
    expected = []
    for _ in range(5):
        expected.append(int(token))
        token = decode(model, cache, token).argmax(-1)
    whole = torch.cat([ids, torch.tensor([expected[:1]])], dim=1)
    out = model.generate(
        whole, attention_mask=torch.ones_like(whole), past_key_values=fork, max_new_tokens=4, do_sample=False
    )
    assert out[0, ids.shape[1] :].tolist() == expected


@pytest.mark.parametrize("text", ["full", "snapkv"])
def test_a_static_cache_changes_outside_of_inference_mode(text):
    """Make the cache static, run a step and undo it; the next step gives the same result as the undone one."""
    model, (ids, mask) = model_for(text), prompt(text)
    expected_cache, cache = make(text).new_cache(model), make(text).new_cache(model)
    token = prefill(model, expected_cache, ids, mask).argmax(-1)
    prefill(model, cache, ids, mask)
    cache.make_static(3)
    for step in (lambda t: decode(model, cache, t), lambda t: forward(model, cache, t[:, None])):
        before = [t.clone() for t in cache.static_state()]
        step((token + 1) % 101)
        with torch.inference_mode():
            for tensor, value in zip(cache.static_state(), before, strict=True):
                tensor.copy_(value)
        cache.skip(-1)
        expected = decode(model, expected_cache, token)
        torch.testing.assert_close(step(token).detach(), expected, rtol=0, atol=1e-9)
        token = expected.argmax(-1)
    assert torch.equal(cache.tokens_seen, expected_cache.tokens_seen)


def test_a_decode_step_is_made_and_called_in_either_mode():
    model, ids = tiny_model(), prompt_ids(60)
    cache, other = (named_method("snapkv budget=20 scorer.window=4").new_cache(model) for _ in range(2))
    token = prefill(model, cache, ids).argmax(-1)
    prefill(model, other, ids)
    outside = decode_step(model, cache, token, 4)
    with torch.inference_mode():
        inside = decode_step(model, other, token, 4)
        expected = [inside(token).clone() for _ in range(2)]
    assert all(torch.equal(outside(token), e) for e in expected)


@pytest.mark.parametrize("text", STORAGES)
def test_a_storage_changes_outside_of_inference_mode(text):
    """Calls that a user's program may make after an engine prefill."""
    model = tiny_model()
    cache = make(text).new_cache(model)
    prefill(model, cache, prompt_ids(70))
    layers = [layer.storage for layer in cache.layers]
    new = torch.randn(1, 2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for storage in layers:
        held = int(storage.tokens[0, 0])
        storage.append(new, new)
        assert int(storage.tokens[0, 0]) == held + 3
    for storage in layers:  # minicache merges two layers once both have been written
        storage.flush()
        storage.shrink_to_fit()
    if text != "minicache":  # which cannot let tokens go by layer
        for storage in layers:
            slots = storage.read()[0].shape[2]
            stay = torch.arange(slots).remainder(2).eq(0).expand(1, 1, slots)
            storage.drop(stay.expand(1, 2, slots) if text == "ada_kv" else stay, compact_now=False)
            storage.drop(torch.ones(1, 1, storage.read()[0].shape[2], dtype=torch.bool), compact_now=True)
            storage.keep(torch.arange(-4, 0) + storage.read()[0].shape[2])  # the last ones, which all heads have
            assert storage.read()[0].shape[2] == 4


def test_every_storage_enters_inference_mode():
    """A third-party subclass inherits it."""

    class Mine(LayerStorage):
        def append(self, keys, values, valid=None):
            return torch.is_inference_mode_enabled()

    assert set(IN_PLACE) <= set(dir(LayerStorage))
    assert Mine.append(None, None, None)
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("sharing", [None, RETENTION])
def test_no_gradient_passes_through_a_cache(sharing):
    """An error is better than gradients of only a part of the model."""
    if sharing is None:
        model, method = tiny_model(), named_method("full")
    else:
        model, method = shared_model(sharing), Method("yoco", sharing=sharing)
    cache = method.new_cache(model)
    logits = forward(model, cache, prompt_ids(20) % 97, torch.ones(1, 20, dtype=torch.long))
    with pytest.raises(RuntimeError, match="no gradient passes through a kvbench cache"):
        logits.sum().backward()
    model.zero_grad()
    torch.testing.assert_close(
        decode(model, cache.fork(), torch.tensor([5])), decode(model, cache, torch.tensor([5])), rtol=0, atol=0
    )
