"""Allocation of storages: with reserved tokens, the final size at once."""

from __future__ import annotations

import pytest
import torch
from tiny_models import prompt_ids, tiny_model

from kvbench.methods.cache.cache import stored_bytes
from kvbench.methods.cache.kv_shape import KVShape
from kvbench.methods.cache.method import Method
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.scorers.attention_sums import AttentionSums
from kvbench.methods.policies.scorers.last_query import LastQuery
from kvbench.methods.policies.streaming_llm import StreamingLLM
from kvbench.methods.storage.base import LayerStorage, Storage
from kvbench.methods.storage.buffer import FREE_SLOTS, GROWTH, Buffer, take_slots
from kvbench.methods.storage.dense import COMPACTION_INTERVAL_STEPS, Dense
from kvbench.methods.storage.kivi import Kivi
from kvbench.methods.storage.minicache.storage import MiniCache
from kvbench.methods.storage.minicache_kivi import MiniCacheKivi
from kvbench.methods.storage.packed import QuantizedBuffer, quantize
from kvbench.methods.storage.ragged import Ragged
from kvbench.runners.engine import decode, prefill

HEADS, DIM, LAYERS = 2, 128, 4
SHAPE = KVShape(LAYERS, HEADS, DIM, 2, HEADS)


def numbers(n: int, seed: int = 0) -> torch.Tensor:
    """[1, HEADS, n, DIM] in 16 bits."""
    return torch.randn(1, HEADS, n, DIM, generator=torch.Generator().manual_seed(seed)).bfloat16()


def filled(storage: Storage, prompt: int, new: int, reserved: int) -> list[LayerStorage]:
    """Layers after a prompt and ``new`` single tokens, of which ``reserved`` were announced."""
    layers = list(storage.new_layers(LAYERS))
    for i, layer in enumerate(layers):
        layer.reserved = reserved
        layer.write(numbers(prompt, i), numbers(prompt, i + 9))
    for token in range(new):
        for i, layer in enumerate(layers):
            layer.append(numbers(1, token + i), numbers(1, token + i + 9))
            layer.flush()
    return layers


STORAGES = [Dense(), Ragged(), Kivi(2), Kivi(4), Kivi(8), Kivi(2, residual=32), MiniCache(), MiniCacheKivi()]


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: f"{s.name}-{getattr(s, 'residual', 0)}")
@pytest.mark.parametrize(("prompt", "new"), [(161, 338), (512, 256), (40, 100), (130, 1)])
def test_final_bytes_match_the_formula(storage, prompt, new):
    """Within 1 %, the slots that recent tokens have spare, and for pairs of layers the places of tokens that may have
    to be retained (33 of keys and values)."""
    layers = filled(storage, prompt, new, new)
    stored = stored_bytes(t for layer in layers for t in layer.tensors())
    formula = storage.bytes_formula([prompt + new] * LAYERS, HEADS, SHAPE, new)
    places = 0
    if isinstance(storage, MiniCache):
        pairs = (LAYERS - storage.first_pair(LAYERS)) // 2
        places = pairs * 2 * HEADS * 33 * (2 * DIM * 2 + 4)
    assert stored >= sum(layer.logical_bytes for layer in layers)
    spare = 0 if isinstance(storage, Dense | Ragged) else LAYERS * HEADS * 2 * FREE_SLOTS * DIM * 2
    assert stored <= 1.01 * formula + places + spare
    if not places:
        assert stored >= formula


@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: f"{s.name}-{getattr(s, 'residual', 0)}")
def test_unannounced_tokens_do_not_reallocate_every_step(storage):
    layers = filled(storage, 161, 4, 4)
    tensors, addresses = [], set()
    for token in range(2 * GROWTH):
        for layer in layers:
            layer.append(numbers(1, token), numbers(1, token + 1))
            layer.flush()
        all_held = [t for layer in layers for t in layer.tensors()]
        codes = [t for t in all_held if t.dtype == torch.uint8]  # beside them the recent tokens are few
        held = max(codes or all_held, key=lambda t: t.nbytes)
        tensors.append(held)  # kept, so that no address is used again
        addresses.add(held.data_ptr())
    assert len(addresses) <= 12


def test_a_buffer_copies_its_input():
    x = torch.arange(12.0).view(1, 4, 3)
    held = Buffer(x, 1, 6)
    assert held.whole.shape == (1, 6, 3)
    x.zero_()
    assert held.used.flatten().tolist() == list(range(12))
    held.append(torch.full((1, 2, 3), 7.0), 0)
    address = held.whole.data_ptr()
    held.append(torch.full((1, 1, 3), 8.0), 20)
    assert (held.whole.shape[1], held.length, held.slack) == (20, 7, 13 * 3 * 4)
    assert held.whole.data_ptr() != address
    held.shrink_to_fit()
    assert held.whole.shape[1] == 7 and held.slack == 0
    assert held.used[0, :, 0].tolist() == [0, 3, 6, 9, 7, 7, 8]


def test_a_recent_buffer_reallocates_rarely_and_frees_the_prompt():
    """128 recent tokens of a prompt of 1000, then one in and one out, 100 times, against a list."""
    tokens = list(range(1000))
    queue = Buffer(torch.tensor(tokens)[None, :, None].float(), 1, 1000 + FREE_SLOTS)
    queue.drop(872, FREE_SLOTS)  # no more than so many empty slots
    assert queue.whole.shape == (1, 128 + FREE_SLOTS, 1)
    held, kept = tokens[872:], [queue.whole]
    for new in range(100):
        queue.append(torch.full((1, 1, 1), -float(new)), 128 + FREE_SLOTS)
        queue.drop(1, FREE_SLOTS)
        held = [*held[1:], -new]
        assert queue.used.flatten().tolist() == held
        assert queue.slack == (queue.whole.shape[1] - 128) * 4 <= FREE_SLOTS * 4
        if queue.whole is not kept[-1]:
            kept.append(queue.whole)
    assert len(kept) <= 2 + 100 // FREE_SLOTS
    queue.shrink_to_fit()
    assert queue.slack == 0 and queue.used.flatten().tolist() == held
    queue.drop(128, 0)
    assert queue.whole.numel() == 0


@pytest.mark.parametrize("storage", [Kivi(4), Kivi(2, residual=32), MiniCacheKivi()], ids=lambda s: s.name)
def test_recent_tokens_are_not_copied_at_every_step(storage):
    """Steps in which any tensor of a layer is another one: those that make room, not all."""
    layers = filled(storage, 300, 2, 0)
    moves, before, steps = 0, [], 64
    for token in range(steps):
        for layer in layers:
            layer.append(numbers(1, token), numbers(1, token + 1))
            layer.flush()
        now = [t for t in layers[0].tensors() if t.dtype == torch.bfloat16 and t.shape[-1] == DIM]
        moves += [t.data_ptr() for t in now] != [t.data_ptr() for t in before]
        before = now  # kept, so that no address is used again
    assert 0 < moves <= steps // 3


@pytest.mark.parametrize("dim", [1, 2])
def test_quantised_groups_added_one_by_one_are_those_quantised_at_once(dim):
    """Along tokens (dimension 1 of values) and along groups of tokens of one channel (the last one, of keys)."""
    x = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(3))
    pieces = [quantize(piece, 4, 32) for piece in x.split(32, dim)]
    held = QuantizedBuffer(pieces[0], dim, 32)
    held.append(pieces[1], 32, 96)
    whole = quantize(x, 4, 32)
    assert held.tokens == 64 and held.slack == sum(t.nbytes for t in pieces[0].tensors())
    for mine, theirs in zip(held.used.tensors(), whole.tensors(), strict=True):
        assert torch.equal(mine, theirs)
    one = held.take(torch.tensor([1])).used
    assert all(torch.equal(mine[0], theirs[1]) for mine, theirs in zip(one.tensors(), whole.tensors(), strict=True))


@torch.inference_mode()
@pytest.mark.parametrize("announced", [False, True])
@pytest.mark.parametrize(
    "selection",
    [EvictionPolicy(AttentionSums(), 20), EvictionPolicy(LastQuery(), 20), StreamingLLM(20)],
    ids=lambda s: type(s).__name__,
)
def test_evicting_methods_allocate_at_most_one_compaction_interval(selection, announced):
    model = tiny_model()
    cache = Method("x", selection).new_cache(model)
    if announced:
        cache.reserve(200)
    prefill(model, cache, prompt_ids(60))
    most = []
    for i in range(200):
        decode(model, cache, torch.tensor([i % 90]))
        most += [layer.storage.tensors()[0].shape[2] for layer in cache.layers]
    assert max(most) <= 20 + COMPACTION_INTERVAL_STEPS


LAYOUTS = {
    "contiguous": torch.randn(2, 3, 11, 8),
    "heads after tokens": torch.randn(2, 11, 3, 8).transpose(1, 2),
    "part of a buffer": torch.randn(2, 3, 16, 8)[:, :, 2:13],
    "half of each row": torch.randn(2, 3, 11, 16)[..., 8:],
    "part of wider rows": torch.randn(2, 3, 11, 13)[..., 2:10],
    "one row for all": torch.randn(1, 1, 11, 8).expand(2, 3, 11, 8),
    "every other channel": torch.randn(2, 3, 11, 16)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_slots_are_taken_from_any_layout(layout, heads, count):
    x = LAYOUTS[layout]
    slots = torch.randint(0, 11, (2, heads, count))
    expected = x.gather(2, slots.expand(2, 3, count)[..., None].expand(2, 3, count, 8))
    assert torch.equal(take_slots(x, slots), expected)
    assert torch.equal(take_slots(x[0], slots[0].expand(3, count)), expected[0])


def test_no_slots_are_taken_from_an_empty_buffer():
    assert take_slots(torch.empty(2, 3, 0, 8), torch.empty(2, 3, 0, dtype=torch.int64)).shape == (2, 3, 0, 8)
