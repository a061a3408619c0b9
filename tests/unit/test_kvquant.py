"""KVQuant without calibration: levels, ranges, outliers and rotations against a naive construction, and bytes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from packed_codes import unpack_codes
from tiny_models import prompt_ids, tiny_model

from kvbench.conf.errors import InputError
from kvbench.methods.cache.kv_shape import KVShape, kv_shape
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.method import Method
from kvbench.methods.cache.products import cached_attention
from kvbench.methods.cache.rotary import Rotary
from kvbench.methods.storage.coded import CodedLayer
from kvbench.methods.storage.kvquant import KVQuant, gaussian_levels
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import decode, prefill

# Positive levels and relative squared error without the outliers, by another program whose iteration ended at 5e-6.
LEVELS = {
    (0.01, 2): ("0.167990 0.554437", 0.0964),
    (0.01, 3): ("0.088542 0.272042 0.478659 0.744968", 0.0263),
    (0.01, 4): ("0.045144 0.136245 0.229915 0.328266 0.434194 0.552166 0.690158 0.865605", 0.0068),
    (0.001, 2): ("0.136706 0.455278", 0.1132),
    (0.001, 4): ("0.038147 0.115235 0.194869 0.279235 0.371466 0.476795 0.605749 0.787056", 0.0086),
}
DIM = 16
INV_FREQ = 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_with(keys: torch.Tensor, values: torch.Tensor, valid=None, rotary: bool = True, **options: int) -> CodedLayer:
    layer = KVQuant(**options).new_layers(1)[0]
    layer.bind(lambda: Rotary(INV_FREQ if rotary else torch.empty(0)))
    layer.write(keys, values, valid)
    return layer


@pytest.mark.parametrize(("share", "bits"), LEVELS)
def test_levels_are_optimal_for_a_gaussian_without_outliers(share, bits):
    levels = gaussian_levels(bits, share)
    text, error = LEVELS[share, bits]
    expected = torch.tensor([float(x) for x in text.split()]).double()
    torch.testing.assert_close(levels[2 ** (bits - 1) :], expected, rtol=1e-3, atol=0)
    assert torch.equal(levels, -levels.flip(0))
    top = torch.special.ndtri(torch.tensor(1 - share / 2).double())
    t = torch.linspace(-1, 1, 200_001).double()
    weight = (-((t * top) ** 2) / 2).exp()
    cell = torch.bucketize(t, (levels[1:] + levels[:-1]) / 2)
    mass, moment = (torch.zeros(2**bits).double().index_add_(0, cell, x) for x in (weight, weight * t))
    torch.testing.assert_close(levels, moment / mass, rtol=0, atol=5e-6)  # each is the mean of its cell
    weight = weight / weight.sum() * (1 - share)
    assert float((weight * (t - levels[cell]) ** 2).sum() * top**2) == pytest.approx(error, abs=1e-4)


def turned(vector: torch.Tensor, position: int) -> torch.Tensor:
    """A vector rotated by RoPE, as complex numbers of channels i and i + D / 2."""
    pair = torch.complex(*vector.double().view(2, -1))
    pair = pair * torch.polar(torch.ones(DIM // 2).double(), position * INV_FREQ.double())
    return torch.cat([pair.real, pair.imag])


def half_precision(x: float) -> float:
    return float(torch.tensor(x).half())


def quantized(
    vector: list[float], ranges: list[list[float]], deviations: list[float], m: int, levels: list[float]
) -> tuple[list[float], list[int], list[bool]]:
    """Return the numbers, the codes, and which numbers are on a boundary that float32 may cross, of one vector."""
    order = sorted(range(DIM), key=lambda c: -deviations[c])
    outliers, in_doubt = order[:m], [False] * DIM
    if deviations[order[m - 1]] - deviations[order[m]] < 1e-5:
        in_doubt[order[m - 1]] = in_doubt[order[m]] = True
    numbers, codes = [], []
    for channel, (x, (middle, half)) in enumerate(zip(vector, ranges, strict=True)):
        distances = [abs(level - (x - middle) / half) for level in levels]
        best, second = sorted(range(len(levels)), key=distances.__getitem__)[:2]
        in_doubt[channel] |= distances[second] - distances[best] < 1e-5
        numbers.append(half_precision(x) if channel in outliers else levels[best] * half + middle)
        codes.append(best)
    return numbers, codes, in_doubt


def key_ranges(raw: torch.Tensor, m: int, sinks: int, prompt: int) -> list[list[float]]:
    """Middle and half of the range of each channel, from the keys before RoPE of one head [T, D]."""
    ranges = []
    for channel in range(DIM):
        ordered = sorted(float(raw[p][channel]) for p in range(sinks, prompt))
        tail, last = m / DIM / 2, len(ordered) - 1
        low, high = ordered[math.floor(tail * last)], ordered[math.ceil((1 - tail) * last)]
        ranges.append([(low + high) / 2, (high - low) / 2])
    return ranges


def value_range(vector: list[float], m: int) -> tuple[list[float], list[float]]:
    """Middle and half of the range of the numbers that are no outliers, and the deviations from the mean."""
    deviations = [abs(x - sum(vector) / DIM) for x in vector]
    order = sorted(range(DIM), key=lambda c: -deviations[c])
    rest = [vector[c] for c in order[m:]]
    return [(min(rest) + max(rest)) / 2, (max(rest) - min(rest)) / 2], deviations


@pytest.mark.parametrize(("bits", "outliers", "sinks"), [(2, 1, 1), (3, 2, 1), (4, 1, 0)])
def test_codes_and_stored_numbers_match_a_naive_construction(bits, outliers, sinks):
    """Of a padded prompt and of tokens that follow one by one, with ranges that stay those of the prompt.

    Ranges are compared up to their rounding to float16; codes are those for the ranges as stored. A number on a
    boundary may get a neighbouring level, all others must be equal.
    """
    keys, values = numbers(2, 2, 46, DIM), numbers(2, 2, 46, DIM, seed=1)
    keys[..., 3] *= 20
    valid = torch.arange(40) >= torch.tensor([[0], [9]])[..., None]
    layer = layer_with(keys[:, :, :40], values[:, :, :40], valid, bits=bits, outliers=outliers, sinks=sinks)
    for t in range(40, 46):
        layer.append(keys[:, :, t : t + 1], values[:, :, t : t + 1])
    read, levels, n = layer.read(), gaussian_levels(bits, outliers / DIM).tolist(), 2 if bits == 3 else 1
    step, doubts, total = max(b - a for a, b in itertools.pairwise(levels)), 0, 0
    for index, segments in layer._groups:
        (key_constants, _), planes = segments.coded.constants, segments.coded.planes
        key_planes, value_planes = planes[: n + 2], planes[n + 2 :]
        for i, (b, h) in enumerate(divmod(int(head), 2) for head in index):
            pad = 9 * b
            raw = torch.stack([turned(k, -p) for p, k in enumerate(keys[b, h, pad:])])
            stored = torch.stack([c[i].double() for c in key_constants[1:]], dim=-1)  # [D, 2]
            expected = torch.tensor(key_ranges(raw, outliers, sinks, 40 - pad)).double()
            torch.testing.assert_close(stored, expected, rtol=2**-10, atol=2**-14)
            for p in range(46 - pad):
                value = values[b, h, pad + p].double().tolist()
                own, value_deviations = value_range(value, outliers)
                value_stored = [float(plane[i, p]) for plane in value_planes[-2:]]
                assert value_stored == pytest.approx(own, rel=2**-10, abs=2**-14)
                deviations = ((raw[p] - stored[:, 0]) / stored[:, 1]).abs().tolist()
                for found, x, parts, ranges, deviation in (
                    (turned(read[0][b, h, pad + p], -p), raw[p], key_planes, stored.tolist(), deviations),
                    (read[1][b, h, pad + p].double(), value, value_planes, [value_stored] * DIM, value_deviations),
                ):
                    out, codes, in_doubt = quantized(list(map(float, x)), ranges, deviation, outliers, levels)
                    clear = ~torch.tensor(in_doubt)
                    doubts, total = doubts + sum(in_doubt), total + DIM
                    off = (unpack_codes([x[i, p] for x in parts[:n]], bits, DIM) - torch.tensor(codes)).abs()
                    assert not off[clear].any() and int(off.max()) <= 1
                    if p >= sinks:
                        out, scale = torch.tensor(out).double(), 1e-5 * max(map(abs, out))
                        torch.testing.assert_close(found[clear], out[clear], rtol=0, atol=scale)
                        width = torch.tensor([half * step for _, half in ranges]).double()
                        assert ((found - out).abs() <= width + scale).all()
    assert doubts < 0.002 * total
    if sinks:
        assert torch.equal(read[0][0, :, 0], keys[0, :, 0]) and torch.equal(read[1][1, :, 9], values[1, :, 9])


@pytest.mark.parametrize(("dim", "outliers"), [(16, 1), (64, 1), (96, 1), (128, 2), (256, 3)])
def test_one_percent_of_the_channels_are_outliers_by_default(dim, outliers):
    keys, values = numbers(1, 1, 30, dim), numbers(1, 1, 30, dim, seed=1)
    default, explicit = (layer_with(keys, values, rotary=False, **kw) for kw in ({}, {"outliers": outliers}))
    for x, y in zip(default.read(), explicit.read(), strict=True):
        assert x is y is None or torch.equal(x, y)
    assert default.logical_bytes == explicit.logical_bytes
    shape = KVShape(layers=1, kv_heads=1, head_dim=dim, element_bytes=4, query_heads=1)
    formulas = [KVQuant(outliers=m).bytes_formula([30], 1, shape) for m in (None, outliers)]
    assert formulas[0] == formulas[1] == default.logical_bytes
    assert KVQuant().identity()["outliers"] is None


def test_a_large_channel_leaves_the_others_as_they_are():
    keys, values = numbers(1, 2, 60, DIM), numbers(1, 2, 60, DIM, seed=1)
    plain = layer_with(keys, values, rotary=False).read()[0]
    keys[..., 5] *= 1024
    changed = layer_with(keys, values, rotary=False).read()[0]
    others = [c for c in range(DIM) if c != 5]
    assert torch.equal(plain[..., others], changed[..., others])


def test_outliers_are_exact_and_unseen_or_constant_channels_finite():
    keys, values = numbers(1, 1, 50, DIM), numbers(1, 1, 50, DIM, seed=1)
    keys[0, 0, 20, 7], values[0, 0, 20, 2], keys[..., 1] = 80.0, -50.0, 0.25
    layer = layer_with(keys, values, rotary=False, bits=2)
    layer.append(1e5 * numbers(1, 1, 1, DIM, seed=2), 1e5 * numbers(1, 1, 1, DIM, seed=3))
    read, read_values, _ = layer.read()
    assert read[0, 0, 20, 7] == 80 and read_values[0, 0, 20, 2] == -50
    assert read.isfinite().all() and read_values.isfinite().all()
    one = layer_with(keys[:, :, :1], values[:, :, :1])
    one.append(keys[:, :, 1:2], values[:, :, 1:2])
    assert one.read()[0].isfinite().all() and torch.equal(one.read()[0][:, :, 0], keys[:, :, 0])


@pytest.mark.parametrize("is_static", [False, True])
def test_attention_is_over_the_stored_numbers(is_static):
    keys, values, query = numbers(2, 3, 30, DIM), numbers(2, 3, 30, 8, seed=1), numbers(2, 6, 1, DIM, seed=2)
    layer = layer_with(keys, values, (torch.arange(30) >= torch.tensor([[0], [21]]))[:, None], bits=3)
    if is_static:
        layer.make_static(4)
    layer.append(numbers(2, 3, 1, DIM, seed=3), numbers(2, 3, 1, 8, seed=4))
    rule = LogitRule(0.3, 5.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvbench.methods.storage.coded.CHUNK_ELEMENTS", 7 * DIM * 6)
        found = layer.attend(query, rule, None)
    torch.testing.assert_close(found, cached_attention(query, *layer.read()[:2], rule, layer.valid), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("bits", "outliers", "sinks"), [(2, 1, 1), (3, 2, 0), (4, 1, 1)])
@pytest.mark.parametrize("batch", [1, 4])
def test_measured_bytes_match_the_formula(bits, outliers, sinks, batch):
    model = tiny_model()
    method, shape = Method("kvquant", storage=KVQuant(bits, outliers, sinks)), kv_shape(model.config, model.dtype)
    cache = method.new_cache(model)
    prefill(model, cache, torch.cat([prompt_ids(50, seed) for seed in range(batch)]))
    dim = shape.head_dim
    a_head = 50 * (2 * (dim * bits // 8 + 3 * outliers) + 4) + 4 * dim + sinks * 2 * dim * shape.element_bytes
    assert method.bytes_formula(shape, 50) == shape.layers * shape.kv_heads * a_head
    assert cache.kv_bytes_stored == cache.kv_bytes_logical == batch * method.bytes_formula(shape, 50)
    decode(model, cache, torch.arange(batch))
    assert cache.kv_bytes_logical == batch * method.bytes_formula(shape, 50, 1)


def test_keys_of_a_model_are_read_back_near_to_what_they_were():
    """The rotation is the model's own, as measured from its keys."""
    model, ids = tiny_model(dtype=torch.float32), prompt_ids(90)
    caches = [named_method(text).new_cache(model) for text in ("full", "kvquant storage.outliers=2")]
    for cache in caches:
        prefill(model, cache, ids)
    for full, ours in zip(*(cache.layers for cache in caches), strict=True):
        for x, y in zip(full.storage.read()[:2], ours.storage.read()[:2], strict=True):
            assert (y - x).norm() / x.norm() < 0.1


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match=r"method/storage=kvquant4: rotates keys by the number .*snapkv drops"):
        named_method("snapkv budget=64 storage=kvquant")
    x = numbers(1, 1, 4, 16)
    with pytest.raises(InputError, match=r"method\.storage\.outliers=16: must be below the model's head_dim of 16"):
        layer_with(x, x, outliers=16)
    x = numbers(1, 1, 4, 20)
    with pytest.raises(InputError, match=r"method\.storage\.bits=3: does not fill whole bytes with .* head_dim of 20"):
        layer_with(x, x, bits=3)
    assert named_method("kvquant").needs == "ranges of the prompt's keys before RoPE"
    assert named_method("kvquant storage.bits=2").label == "kvquant2"
