"""Attention over packed codes in PyTorch, against attention over the dequantized numbers in float64."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.products import cached_attention
from kvbench.methods.storage.kivi import KiviSegments
from kvbench.methods.storage.minicache.merged import Directions
from kvbench.methods.storage.minicache.pair import Pair
from kvbench.methods.storage.minicache_kivi import QuantizedDirections
from kvbench.methods.storage.packed import (
    Quantized,
    dequantize_into,
    quantize,
    query_times_keys,
    weights_times_values,
)
from kvbench.methods.storage.segments import Segments


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def expanded(q: Quantized, bits: int) -> torch.Tensor:
    out = torch.empty(*q.codes.shape[:-1], q.codes.shape[-1] * 8 // bits, dtype=torch.float64)
    dequantize_into(q, bits, out)
    return out


CASES = [  # N, G, D, blocks, block, group of tokens, group of channels
    (3, 3, 64, 5, 128, 32, 32),
    (2, 1, 128, 2, 128, 32, 32),
    (4, 8, 96, 1, 320, 64, 32),  # a head that is no power of two; one long block
    (1, 5, 16, 3, 32, 32, 16),
]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("piece", [1 << 18, 5000])
def test_packed_products_match_dequantized_products(case, bits, piece, monkeypatch):
    segments, rows, dim, blocks, block, tokens, channels = case
    monkeypatch.setattr("kvbench.methods.storage.packed.CHUNK_ELEMENTS", piece)
    monkeypatch.setattr("kvbench.methods.storage.packed.GROUP_CHUNK_ELEMENTS", piece)
    keys = quantize(numbers(segments, blocks, dim, block), bits, tokens)
    values = quantize(numbers(segments, 200, dim, seed=1), bits, channels)
    query, weights = numbers(segments, rows, dim, seed=2), numbers(segments, rows, 150, seed=3)
    exact = expanded(keys, bits).permute(0, 2, 1, 3).flatten(2)  # [N, D, tokens]
    found = query_times_keys(query, keys, bits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), query.double() @ exact, rtol=1e-5, atol=1e-4)
    exact = expanded(values, bits)[:, :150]  # more are stored than are asked for: room to grow
    torch.testing.assert_close(
        weights_times_values(weights, values, bits).double(), weights.double() @ exact, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("length", [1, 100, 128, 300, 1000])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kivi_attention_matches_attention_over_read(length, bits):
    held = KiviSegments(bits, 32, 128)
    held.append(numbers(4, length, 32), numbers(4, length, 32, seed=1))
    held.flush()
    held.append(numbers(4, 1, 32, seed=2), numbers(4, 1, 32, seed=3))
    query = numbers(4, 3, 1, 32, seed=4)
    keys, values = held.read()
    expected = cached_attention(query, keys[:, None], values[:, None], LogitRule(0.2))
    torch.testing.assert_close(held.attend(query, LogitRule(0.2)), expected, rtol=1e-4, atol=1e-5)


def test_codes_are_contiguous():
    """Keys are quantized from a transposed view, and a step must not have to make their codes contiguous."""
    held = KiviSegments(4, 32, 128)
    held.append(numbers(4, 512, 64), numbers(4, 512, 64))
    held.flush()
    directions = QuantizedDirections(numbers(2, 2, 128, 64), 4, 32, True)
    assert all(t.is_contiguous() for t in [*held.tensors(), *directions.tensors()])


@pytest.mark.parametrize("storage", ["kivi", "minicache"])
def test_half_precision_rounds_no_logits(storage):
    """In bfloat16, queries that point: against float64, about as near as one kernel on what is expanded."""
    query, keys, values = (numbers(2, 2, n, 32, seed=s).bfloat16() for n, s in ((3, 1), (512, 2), (512, 3)))
    query = 4 * query
    if storage == "kivi":
        held = KiviSegments(8, 32, 128)
        held.append(keys.flatten(0, 1), values.flatten(0, 1))
        held.flush()
        q = query.flatten(0, 1)[:, :, None]
        found, (keys, values) = held.attend(q, LogitRule(0.2)), held.read()
        keys, values = keys[:, None], values[:, None]
    else:
        pair = Pair(0.6, 0.0, "top_ratio")
        for which in range(2):
            pair.append(which, keys, values, None)
        pair.merge()
        for which in range(2):
            pair.append(which, keys[:, :, :1], values[:, :, :1], None)
        q = query.flatten(1, 2)[:, :, None]
        found = pair.attend(0, query, LogitRule(0.2)).flatten(1, 2)[:, :, None]
        restored = pair.read(0)
        keys, values = (
            torch.cat(
                [m.directions.tensors()[0].double() * m.magnitudes.used[0].double()[..., None], new.used.double()],
                dim=2,
            )
            for m, new in zip((pair.keys, pair.values), pair.new[0], strict=True)
        )
        usual_of = cached_attention(q, *restored, LogitRule(0.2))
    if storage == "kivi":
        usual_of = cached_attention(q, keys, values, LogitRule(0.2))
    expected = cached_attention(q.double(), keys.double(), values.double(), LogitRule(0.2))
    error, usual = ((x.double() - expected).norm() / expected.norm() for x in (found, usual_of))
    assert error < 3 * usual  # 8-bit numbers are rounded once more where they are expanded


def test_the_dequantized_cache_is_never_in_memory(monkeypatch):
    """Expanded it is 16 times what a step may hold at once here."""
    held = KiviSegments(4, 32, 128)
    held.append(numbers(4, 8192, 64), numbers(4, 8192, 64))
    held.flush()
    largest = []
    monkeypatch.setattr("kvbench.methods.storage.packed.CHUNK_ELEMENTS", 4 * 8192 * 64 // 16)
    unpacked = torch.Tensor.mul_

    def spy(self, other):
        largest.append(self.numel())
        return unpacked(self, other)

    monkeypatch.setattr(torch.Tensor, "mul_", spy)
    monkeypatch.setattr(KiviSegments, "read", None)
    held.attend(numbers(4, 2, 1, 64), LogitRule(0.125))
    assert largest and max(largest) <= 4 * 8192 * 64 // 16

    shared = QuantizedDirections(numbers(1, 4, 8192, 64), 4, 32, is_keys=True)  # one long block
    monkeypatch.setattr("kvbench.methods.storage.packed.GROUP_CHUNK_ELEMENTS", 4 * 8192 * 64 // 16)
    largest.clear()
    shared.scores(numbers(1, 4, 2, 64))
    assert len(largest) > 8 and max(largest) <= 4 * 8192 * 64 // 16


def test_packed_attention_is_faster_than_dequantizing():
    """The median of the ratios of neighbouring rounds, on one thread: measured between 0.3 and 0.6.

    On a machine that others use, a second thread is waited for at each of the small operations, and a best time is
    one side's luck; a ratio of two rounds in a row meets the same weather on both sides.
    """
    held = KiviSegments(4, 32, 128)
    held.append(numbers(12, 8192, 64), numbers(12, 8192, 64))
    held.flush()
    query = numbers(12, 3, 1, 64)
    rule = LogitRule(0.125)
    works = (lambda: held.attend(query, rule), lambda: Segments.attend(held, query, rule))
    threads, ratios = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for _ in range(25):
                took = []
                for work in works:
                    start = time.perf_counter()
                    work()
                    took.append(time.perf_counter() - start)
                ratios.append(took[0] / took[1])
    finally:
        torch.set_num_threads(threads)
    assert statistics.median(ratios) < 0.8


@pytest.mark.parametrize("retention", ["top_ratio", "range_distinct"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["plain", "packed"])
@pytest.mark.parametrize("padded", [False, True])
def test_minicache_attention_matches_attention_over_read(retention, gamma, kind, padded):
    """Both layers of a pair, with retained tokens, later tokens, and rows of different lengths."""
    heads, dim, groups, n = 2, 32, 3, 64
    packed = lambda x, is_keys, room: QuantizedDirections(x, 4, 32, is_keys, room)  # noqa: E731
    directions = (lambda x, _, room: Directions(x, room)) if kind == "plain" else packed
    block = 1 if kind == "plain" else 32
    pair = Pair(0.6, gamma, retention, block, directions)
    valid = torch.arange(n)[None] >= torch.tensor([[0], [11]])
    layers = [(numbers(2, heads, n, dim, seed=i), numbers(2, heads, n, dim, seed=9 - i)) for i in range(2)]
    for which, (keys, values) in enumerate(layers):
        pair.append(which, keys, values, valid[:, None] if padded else None)
    pair.merge()
    for step in range(3):
        for which in range(2):
            new = numbers(2, heads, 1, dim, seed=20 + 2 * step + which), numbers(2, heads, 1, dim, seed=40 + step)
            pair.append(which, *new, None)
            query = numbers(2, heads, groups, dim, seed=60 + step)
            keys, values = pair.read(which)
            expected = cached_attention(
                query.flatten(1, 2)[:, :, None],
                keys,
                values,
                LogitRule(0.2),
                None if pair.valid is None else pair.valid,
            )
            found = pair.attend(which, query, LogitRule(0.2)).flatten(1, 2)[:, :, None]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        pair.merge()
