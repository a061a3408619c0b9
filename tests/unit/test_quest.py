"""Quest: page bounds, the choice of pages, attention over them, and the bytes that are held and read."""

from __future__ import annotations

import pytest
import torch
from tiny_models import left_pad, prompt_ids, tiny_model

from kvbench.conf.errors import InputError
from kvbench.methods.cache.kv_shape import kv_shape
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.method import Method
from kvbench.methods.cache.products import cached_attention
from kvbench.methods.storage.quest import Quest, QuestLayer, choose_pages, page_bounds, slots_of
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import decode, prefill


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_pages(query: torch.Tensor, keys: torch.Tensor, page: int, count: int, scaling: float) -> list[int]:
    """Pages of one head by the definition: query [g, D], keys [T, D], both in float64."""
    pages = [keys[i : i + page] for i in range(0, len(keys), page)]
    shares = torch.zeros(len(pages) - 1, dtype=torch.float64)
    for q in query:
        bounds = [float(torch.maximum(q * p.amin(0), q * p.amax(0)).sum()) * scaling for p in pages[:-1]]
        shares += torch.tensor(bounds, dtype=torch.float64).softmax(0) / len(query)
    order = sorted(range(len(pages) - 1), key=lambda p: (-float(shares[p]), p))
    return sorted([*order[: count - 1], len(pages) - 1])


def layers_with(length: int, page: int = 4, reads: int = 16, batch: int = 2) -> tuple[QuestLayer, torch.Tensor]:
    layer = Quest(page, reads, full_layers=0).new_layers(1)[0]
    keys = numbers(batch, 3, length, 16)
    layer.write(keys, numbers(batch, 3, length, 16, seed=1))
    return layer, keys


@pytest.mark.parametrize("length", [1, 4, 5, 30, 32])
def test_bounds_hold_for_every_token(length):
    keys, query = numbers(3, length, 16), numbers(3, 5, 16, seed=1)
    low, high = page_bounds(keys, 4)
    bound = query.clamp(min=0) @ high.transpose(1, 2) + query.clamp(max=0) @ low.transpose(1, 2)
    logits = query @ keys.transpose(1, 2)
    for p in range(low.shape[1]):
        assert (logits[..., 4 * p : 4 * p + 4].amax(-1) <= bound[..., p] + 1e-5).all()


@pytest.mark.parametrize("length", [3, 16, 17, 50])
@pytest.mark.parametrize("is_static", [False, True])
def test_chosen_pages_match_a_naive_choice(length, is_static):
    """While tokens are appended; attention is over the tokens of these pages and no others."""
    layer, keys = layers_with(length)
    values = layer.read()[1]
    if is_static:
        layer.make_static(20)
    rule = LogitRule(0.3, None, numbers(6, seed=9))
    for step in range(10):
        new = numbers(2, 3, 1, 16, seed=20 + step), numbers(2, 3, 1, 16, seed=60 + step)
        keys, values = (torch.cat(pair, dim=2) for pair in ((keys, new[0]), (values, new[1])))
        layer.append(*new)
        query = 3 * numbers(2, 6, 1, 16, seed=100 + step)
        found = layer.attend(query, rule, None)
        visible = torch.zeros(2, 3, keys.shape[2], dtype=torch.bool)
        for b in range(2):
            for h in range(3):
                q = query[b, 2 * h : 2 * h + 2, 0].double()
                pages = naive_pages(q, keys[b, h].double(), 4, 4, 0.3)
                for p in pages:
                    visible[b, h, 4 * p : 4 * p + 4] = True
        torch.testing.assert_close(found, cached_attention(query, keys, values, rule, visible), rtol=0, atol=1e-5)
        read, pages = int(visible.sum()), 6 * -(-keys.shape[2] // 4)
        assert layer.step_bytes_read == (read * 2 + pages * 2) * 16 * 4


def test_equal_pages_are_chosen_by_their_index():
    keys = numbers(1, 4, 16).repeat(1, 10, 1)
    pages = choose_pages(numbers(1, 2, 16, seed=1), page_bounds(keys, 4), torch.tensor([40]), 4, 4, 0.3)
    assert pages.tolist() == [[0, 1, 2, 9]]


def test_a_page_with_one_key_like_the_query_is_chosen():
    layer, _ = layers_with(64)
    query = numbers(1, 1, 16, seed=3)
    keys = 0.1 * numbers(2, 3, 64, 16)
    keys[:, :, 21] = 3 * query[0]
    layer.write(keys, keys)
    layer.append(keys[:, :, :1], keys[:, :, :1])
    layer.attend(query.expand(2, 6, 1, 16), LogitRule(1.0), None)
    ((pages, length),) = layer._reads
    assert slots_of(pages, length, 4)[1].shape == (6, 16)
    chosen = choose_pages(query.expand(6, 2, 16), layer._groups[0][1].bounds, torch.full((6,), 65), 4, 4, 1.0)
    assert (chosen == 21 // 4).any(1).all() and (chosen == 16).any(1).all()


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(("length", "reads"), [(5, 12), (50, 12), (50, 24), (60, 1000)])
def test_bytes_held_and_read_match_the_formulas(batch, length, reads):
    model = tiny_model()
    method, shape = Method("quest", storage=Quest(4, reads, full_layers=1)), kv_shape(model.config, model.dtype)
    cache = method.new_cache(model)
    prefill(model, cache, torch.cat([prompt_ids(length, seed) for seed in range(batch)]))
    number = shape.kv_heads * shape.head_dim * 2 * shape.element_bytes  # a key and a value of all heads of a layer
    pages = -(-length // 4)
    assert cache.kv_bytes_stored == cache.kv_bytes_logical == batch * number * (3 * length + 2 * pages)
    assert cache.kv_bytes_stored == batch * method.bytes_formula(shape, length)
    decode(model, cache, torch.arange(batch))
    assert cache.kv_bytes_logical == batch * method.bytes_formula(shape, length, 1)
    assert cache.kv_bytes_read_per_step == batch * method.read_formula(model)(length, 1)
    if reads < length:
        assert cache.kv_bytes_read_per_step < cache.kv_bytes_logical / 1.4


def test_enough_pages_are_the_full_cache():
    model, ids = tiny_model(), left_pad([prompt_ids(60, 1), prompt_ids(41, 2)])
    caches = [named_method(text).new_cache(model) for text in ("full", "quest storage.page=4 storage.reads=80")]
    for cache in caches:
        prefill(model, cache, *ids)
    for token in range(5):
        expected, found = (decode(model, cache, torch.tensor([token, token + 1])) for cache in caches)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_eviction_while_decoding_is_refused():
    with pytest.raises(InputError, match=r"method/storage=quest1024: reads a part of the tokens, and method=h2o"):
        named_method("h2o budget=24 storage=quest")
    assert named_method("snapkv budget=2048 storage=quest").label == "snapkv 2048 + quest1024"
