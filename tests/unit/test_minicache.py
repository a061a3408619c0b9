"""MiniCache: the geometry by hand, what is retained, and two layers that share one cache."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiny_models import left_pad, prompt_ids, tiny_model
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kvbench.conf.errors import InputError
from kvbench.methods.cache.kv_shape import KVShape, kv_shape
from kvbench.methods.cache.method import Method
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.methods.storage.minicache.geometry import angle_between, slerp
from kvbench.methods.storage.minicache.pair import Pair
from kvbench.methods.storage.minicache.storage import MiniCache, PairLayer
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import decode, prefill


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


def pair_of(lower, upper, t=0.6, gamma=0.0, retention="top_ratio", valid=None):
    """Return both layers' restored (keys, values) after a prompt; keys and values are equal here."""
    pair = Pair(t, gamma, retention)
    layers = PairLayer(pair, 0), PairLayer(pair, 1)
    for layer, x in zip(layers, (lower, upper), strict=True):
        layer.write(x, x, valid)
    return layers


def test_golden_direction(golden):
    want = golden["minicache slerp current=[0,2,0,0] previous=[1,0,0,0] t=0.6"]
    lower, upper = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0.0, 1, 0, 0])
    assert slerp(lower, upper, 0.6).tolist() == pytest.approx(want["direction"], abs=1e-6)
    assert angle_between(lower, upper).item() == pytest.approx(want["angle"])


@pytest.mark.parametrize("t", [0.0, 0.3, 0.6, 1.0])
def test_slerp_divides_the_angle_by_t(t):
    a, b = unit(50, 16), unit(50, 16, seed=1)
    e, angle = slerp(a, b, t), angle_between(a, b)
    assert torch.allclose(e.norm(dim=-1), torch.ones(50, dtype=torch.float64))
    assert torch.allclose(angle_between(e, a), t * angle, atol=1e-9)
    assert torch.allclose(angle_between(e, b), (1 - t) * angle, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_small_angles_are_not_lost_and_nothing_is_divided_by_zero(dtype):
    a = torch.tensor([1.0, 0.0], dtype=dtype)
    for angle in (0.0, 1e-6, 1e-4, 2e-3, math.pi - 2e-3):
        b = torch.tensor([math.cos(angle), math.sin(angle)], dtype=dtype)
        assert angle_between(a, b).item() == pytest.approx(angle, rel=1e-3, abs=1e-7)
        e = slerp(a, b, 0.6)
        assert torch.isfinite(e).all()
        assert angle_between(a, e).item() == pytest.approx(0.6 * angle, rel=2e-2, abs=1e-6)


def test_equal_layers_are_restored_exactly():
    x = 3 * unit(2, 2, 20, 16)
    for layer in pair_of(x, x):
        assert torch.allclose(layer.read()[0], x, atol=1e-6)


def test_magnitudes_are_kept_and_the_error_is_the_chord():
    """|x - x'| = 2 |x| sin(share of the angle / 2), for either layer."""
    lower, upper = 2 * unit(2, 2, 20, 16), 5 * unit(2, 2, 20, 16, seed=1)
    a, b = (layer.read()[0] for layer in pair_of(lower, upper))
    angle = angle_between(lower / 2, upper / 5)
    for x, back, share in ((lower, a, 0.6), (upper, b, 0.4)):
        assert torch.allclose(back.norm(dim=-1), x.norm(dim=-1))
        expected = 2 * x.norm(dim=-1) * (share * angle / 2).sin()
        assert torch.allclose((back - x).norm(dim=-1), expected, atol=1e-9)


def test_merging_commutes_with_rope():
    rope = LlamaRotaryEmbedding(tiny_model().config).double()
    lower, upper = 2 * unit(1, 2, 20, 16), unit(1, 2, 20, 16, seed=1)
    cos, sin = rope(lower, torch.arange(20)[None])

    def turn(x: torch.Tensor) -> torch.Tensor:
        return apply_rotary_pos_emb(x, x, cos.double(), sin.double())[0]

    before = [turn(layer.read()[0]) for layer in pair_of(lower, upper, gamma=0.2)]
    after = [layer.read()[0] for layer in pair_of(turn(lower), turn(upper), gamma=0.2)]
    for a, b in zip(before, after, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("retention", ["top_ratio", "range_distinct", "range_literal"])
def test_retained_tokens_are_those_of_the_rule_and_exact_in_both_layers(retention):
    lower, upper = unit(1, 2, 40, 16), unit(1, 2, 40, 16, seed=1)
    angle = angle_between(lower, upper)[0]
    a, b = (layer.read()[0] for layer in pair_of(lower, upper, gamma=0.3, retention=retention))
    for h in range(2):
        low, high = angle[h].min(), angle[h].max()
        if retention == "top_ratio":
            expected = set(angle[h].topk(12).indices.tolist())
        elif retention == "range_distinct":
            expected = {t for t in range(40) if angle[h, t] > high - 0.3 * (high - low)}
        else:
            expected = {t for t in range(40) if angle[h, t] < low + 0.3 * (high - low)}
        exact = {t for t in range(40) if torch.equal(a[0, h, t], lower[0, h, t])}
        assert exact == {t for t in range(40) if torch.equal(b[0, h, t], upper[0, h, t])} == expected
        assert 0 < len(expected) < 40


def test_opposite_and_zero_vectors_are_retained():
    lower, upper = unit(1, 1, 6, 16), unit(1, 1, 6, 16, seed=1)
    upper[0, 0, 2] = -lower[0, 0, 2]
    upper[0, 0, 4] = 0
    for dtype in (torch.float64, torch.float16):
        a, b = (layer.read()[0] for layer in pair_of(lower.to(dtype), upper.to(dtype)))
        assert torch.isfinite(a).all() and torch.isfinite(b).all()
        for t in (2, 4):
            assert torch.equal(a[0, 0, t], lower[0, 0, t].to(dtype))
            assert torch.equal(b[0, 0, t], upper[0, 0, t].to(dtype))


def logits(method: Method, ids, tokens, mask=None):
    model = tiny_model()
    cache = method.new_cache(model)
    out = [prefill(model, cache, ids, mask), *(decode(model, cache, t) for t in tokens)]
    return torch.stack(out), cache


@pytest.mark.parametrize("storage", [MiniCache(gamma=1), MiniCache(start=3), MiniCache(start=2)], ids=str)
def test_everything_retained_or_no_pair_is_the_full_cache(storage):
    """The tiny model has 3 layers: from layer 2 on there is no pair, and the last layer stays as it is."""
    tokens = [torch.tensor([5]), torch.tensor([9]), torch.tensor([2])]
    ours, _ = logits(Method("minicache", storage=storage), prompt_ids(50), tokens)
    full, _ = logits(Method("full"), prompt_ids(50), tokens)
    assert (ours - full).abs().max() < 1e-9


def test_error_decreases_with_retention():
    lower, upper = unit(1, 2, 60, 16), unit(1, 2, 60, 16, seed=1)

    def error(gamma: float) -> float:
        a, b = (layer.read()[0] for layer in pair_of(lower, upper, gamma=gamma))
        return float((a - lower).norm() + (b - upper).norm())

    errors = [error(gamma) for gamma in (0.0, 0.05, 0.3, 0.7, 1.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0 < errors[-2]


@pytest.mark.parametrize("retention", ["top_ratio", "range_distinct", "range_literal"])
def test_a_padded_batch_is_each_row_alone(retention):
    method = Method("m", storage=MiniCache(start=0, gamma=0.3, retention=retention))
    prompts = [prompt_ids(30, 1), prompt_ids(11, 2), prompt_ids(4, 3)]
    ids, mask = left_pad(prompts)
    tokens = [torch.tensor([4 + i, 7 + i, 9 + i]) for i in range(6)]
    together, cache = logits(method, ids, tokens, mask)
    assert [t.tolist() for t in cache.tokens_held] == [[[36], [17], [10]]] * 3
    for row, prompt in enumerate(prompts):
        alone, _ = logits(method, prompt, [t[row : row + 1] for t in tokens])
        assert (together[:, row] - alone[:, 0]).abs().max() < 1e-9


def test_a_new_token_is_merged_after_the_upper_layers_step():
    lower, upper = unit(1, 2, 10, 16), unit(1, 2, 10, 16, seed=1)
    layers = pair_of(lower, upper)
    k, v = unit(1, 2, 1, 16, seed=2), unit(1, 2, 1, 16, seed=3)
    layers[0].append(k, v)
    assert torch.equal(layers[0].read()[0][:, :, -1:], k)
    layers[0].flush()
    layers[1].append(v, k)
    assert torch.equal(layers[1].read()[0][:, :, -1:], v)
    layers[1].flush()
    assert torch.allclose(layers[0].read()[0][0, :, -1], slerp(k, v, 0.6)[0, :, 0])
    assert [int(layer.tokens[0, 0]) for layer in layers] == [11, 11]


@pytest.mark.parametrize("retention", ["top_ratio", "range_distinct", "range_literal"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_single_appends_retain_as_one_append(retention, gamma):
    """More tokens than initially allocated, in rows and heads that retain different numbers."""
    lower, upper = unit(2, 2, 20, 16), unit(2, 2, 20, 16, seed=1)
    new, theirs = unit(2, 2, 80, 16, seed=2), unit(2, 2, 80, 16, seed=3)
    theirs[0, :, 1::3] = new[0, :, 1::3]
    theirs[:, :, ::7] = -new[:, :, ::7]  # opposite ones are retained by any rule
    one_by_one, mixed, at_once = (pair_of(lower, upper, gamma=gamma, retention=retention) for _ in range(3))
    for layers, ends in ((one_by_one, range(1, 81)), (mixed, [1, 2, 7, 8, 40, *range(41, 81)]), (at_once, [80])):
        for start, end in itertools.pairwise([0, *ends]):
            for layer, x in zip(layers, (new, theirs), strict=True):
                layer.append(x[:, :, start:end], x[:, :, start:end])
                layer.flush()
    for a, c, b, x in zip(one_by_one, mixed, at_once, (new, theirs), strict=True):
        for ours, between, wanted in zip(a.read()[:2], c.read()[:2], b.read()[:2], strict=True):
            assert torch.allclose(ours, wanted, rtol=0, atol=1e-12)
            assert torch.allclose(between, wanted, rtol=0, atol=1e-12)
        exact = (a.read()[0][:, :, 20:] == x).all(-1)
        assert exact[:, :, ::7].all() and (gamma < 1 or exact.all())
        assert a.logical_bytes == b.logical_bytes == c.logical_bytes


@pytest.mark.parametrize("start", [0, 1, None])
@pytest.mark.parametrize("gamma", [0.0, 0.05, 1.0])
def test_measured_bytes_match_the_formula(start, gamma):
    model = tiny_model()
    method, shape = Method("m", storage=MiniCache(start, gamma=gamma)), kv_shape(model.config, model.dtype)
    cache = method.new_cache(model)
    prefill(model, cache, torch.cat([prompt_ids(45, s) for s in range(2)]))
    assert cache.kv_bytes_stored == cache.kv_bytes_logical == 2 * method.bytes_formula(shape, 45)
    for i in range(3):
        decode(model, cache, torch.tensor([3, 4 + i]))
        assert cache.kv_bytes_logical == 2 * method.bytes_formula(shape, 45, i + 1)


@pytest.mark.parametrize(
    ("start", "gamma", "ratio"),
    [(16, 0.0, 1.326), (16, 0.05, 1.284), (8, 0.0, 1.585), (8, 0.05, 1.496), (0, 0.05, 1.793)],
)
def test_ratios_of_a_7b_model(start, gamma, ratio):
    """32 layers, 32 heads of 128, 16-bit numbers."""
    shape = KVShape(layers=32, kv_heads=32, head_dim=128, element_bytes=2, query_heads=32)
    full = 2 * 32 * 32 * 128 * 2 * 10000
    ours = MiniCache(start, gamma=gamma).bytes_formula([10000] * 32, 32, shape)
    assert full / ours == pytest.approx(ratio, abs=2e-3)


@torch.inference_mode()
@pytest.mark.parametrize("text", ["minicache", "minicache_kivi4 storage.residual=16 storage.group=8"])
def test_bytes_read_count_shared_tensors_once_per_layer(text):
    """Counted from the tensors that each layer's attention multiplies with; merging saves room, and little reading."""
    model, length = tiny_model(dtype=torch.float32), 64
    method = named_method(text)
    cache = method.new_cache(model)
    prefill(model, cache, prompt_ids(length))
    read = sum(cache.layers[0].storage.read()[i].nbytes for i in range(2)) if text == "minicache" else 0
    if text != "minicache":
        read = sum(t.nbytes for t in cache.layers[0].tensors())
    for layer in cache.layers[1:]:
        storage = layer.storage
        layer_of_pair, pair = (storage.layer, storage.pair) if text == "minicache" else pair_behind(storage)
        for merged in (pair.keys, pair.values):
            read += sum(t.nbytes for t in merged.directions.tensors()) + merged.retained.nbytes
            read += merged.magnitudes.used[layer_of_pair].nbytes + merged.unmerged[layer_of_pair].nbytes
    assert method.read_formula(model)(length) == read
    assert read > method.bytes_formula(kv_shape(model.config, model.dtype), length)


def pair_behind(storage):
    """(layer of the pair, pair) of a layer of segments."""
    ((_, segments),) = storage._groups
    return segments.layer, segments.pair


def test_invalid_compositions_are_refused():
    with pytest.raises(InputError, match=r"method/storage=minicache: shares tokens between layers"):
        Method("snapkv", EvictionPolicy(SnapKV()), MiniCache())


def test_a_start_beyond_the_model_is_refused():
    with pytest.raises(InputError, match=r"method\.storage\.start=4: must be at most the model's 3 layers"):
        Method("m", storage=MiniCache(start=4)).new_cache(tiny_model())


@pytest.mark.parametrize("options", [{"start": -1}, {"t": 1.5}, {"gamma": -0.1}, {"retention": "best"}])
def test_bad_settings(options):
    with pytest.raises(InputError, match=r"method\.storage\."):
        MiniCache(**options)
