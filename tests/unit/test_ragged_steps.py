"""Eviction while decoding from heads of different lengths, against a simulator with one Python list per head.

Two layers of two KV heads with two query heads each, and a batch of two prompts, of which one may be within the budget.
The simulator attends, scores, allocates and evicts in float64 over lists of positions; the layers do it in float32,
with tensors that grow and with tensors of fixed shape.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch

from kvbench.methods.cache.forward import LayerCall, NewTokens, Rows
from kvbench.methods.cache.layer import CacheLayer
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.prompt import Prompt
from kvbench.methods.policies import eviction
from kvbench.methods.policies.allocators.adaptive import Adaptive
from kvbench.methods.policies.allocators.global_budget import Global
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.model_layer import ModelLayer
from kvbench.methods.policies.schedules.every_n import EveryN
from kvbench.methods.policies.scorers.attention_sums import AttentionSums
from kvbench.methods.policies.scorers.key_norm import KeyNorm
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.methods.sharing.plan import KVAccess
from kvbench.methods.storage.ragged import Ragged

D, SCALE, LAYERS, HEADS, GROUP, WINDOW = 8, 8**-0.5, 2, 2, 2, 4
BUDGET, SINKS, RECENT = 12, 1, 4
STEPS = 26
SCORERS = {"sums": AttentionSums(), "norm": KeyNorm(), "snapkv": SnapKV(window=WINDOW, kernel=1)}
ALLOCATORS = [Adaptive(floor=0.0), Adaptive(floor=0.3), Global(floor=0.1), Adaptive(floor=0.2, layers="pyramid")]


def attention(queries: torch.Tensor, keys: list[torch.Tensor]) -> torch.Tensor:
    """Weights [g, S] of a group's queries [g, D]."""
    return (queries @ torch.stack(keys).T * SCALE).softmax(-1)


@dataclass
class Head:
    """One KV head of one row: positions held, and the keys, values, queries and scores of the past."""

    held: list[int] = field(default_factory=list)
    keys: list[torch.Tensor] = field(default_factory=list)  # by position, [D]
    values: list[torch.Tensor] = field(default_factory=list)
    queries: list[torch.Tensor] = field(default_factory=list)  # [g, D]
    sums: list[float] = field(default_factory=list)
    limit: int = 0

    def feed(self, queries: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Append a token and return its attention [g, D]."""
        self.held.append(len(self.keys))
        self.keys.append(key)
        self.values.append(value)
        self.queries.append(queries)
        self.sums.append(0.0)
        weights = attention(queries, [self.keys[t] for t in self.held])
        for t, weight in zip(self.held, weights.mean(0).tolist(), strict=True):
            self.sums[t] += weight
        return weights @ torch.stack([self.values[t] for t in self.held])

    def scores(self, scorer: str) -> dict[int, float]:
        if scorer == "sums":
            return {t: self.sums[t] for t in self.held}
        if scorer == "norm":
            return {t: -float(self.keys[t].norm()) for t in self.held}
        out = dict.fromkeys(self.held, 0.0)
        for back in range(WINDOW):
            seen = self.held[: len(self.held) - back]
            weights = attention(self.queries[-1 - back], [self.keys[t] for t in seen]).mean(0)
            for t, weight in zip(seen, weights.tolist(), strict=True):
                out[t] += weight
        return out

    def evict(self, scorer: str, limit: int, recent: int) -> None:
        if len(self.held) > limit:
            scores, end = self.scores(scorer), len(self.held) - recent
            best = sorted(self.held[SINKS:end], key=lambda t: -scores[t])[: limit - SINKS - recent]
            self.held = sorted([*self.held[:SINKS], *best, *self.held[end:]])


def compress(heads: list[Head], scorer: str, budgets: list[int], floor: float) -> None:
    """The prompt's tokens of all heads in one ranking; ``budgets`` are the means of their layers."""
    free = sum(b - SINKS - RECENT for b in budgets)
    won = [0] * len(heads)
    candidates = []
    for number, head in enumerate(heads):
        scores = head.scores(scorer)
        candidates += [(-scores[t], number, t) for t in head.held[SINKS : len(head.held) - RECENT]]
    for _, number, _ in sorted(candidates)[:free]:
        won[number] += 1
    mean = free / len(heads)
    shares = [(1 - floor) * count + floor * mean for count in won]
    kept = [int(share + 1e-9) for share in shares]
    for number in sorted(range(len(heads)), key=lambda n: (kept[n] - shares[n], n))[: free - sum(kept)]:
        kept[number] += 1
    for head, count in zip(heads, kept, strict=True):
        head.limit = count + SINKS + RECENT
        head.evict(scorer, head.limit, RECENT)


class Reference:
    """All heads, [layer][row][head], and the same numbers for the layers under test."""

    def __init__(self, scorer: str, policy: EvictionPolicy, lengths: tuple[int, int], seed: int):
        self.scorer, self.policy, self.lengths = scorer, policy, lengths
        self.generator = torch.Generator().manual_seed(seed)
        self.heads = [[[Head() for _ in range(HEADS)] for _ in lengths] for _ in range(LAYERS)]
        self.prompts = [self.tokens(max(lengths)) for _ in range(LAYERS)]
        for layer, (query, key, value) in zip(self.heads, self.prompts, strict=True):
            for b, (row, length) in enumerate(zip(layer, lengths, strict=True)):
                for h, head in enumerate(row):
                    for t in range(max(lengths) - length, max(lengths)):
                        head.feed(query[b, h * GROUP : (h + 1) * GROUP, t], key[b, h, t], value[b, h, t])
        for b, length in enumerate(lengths):
            budgets = policy.limits(length, LAYERS)
            layers = [layer[b] for layer in self.heads]
            pools = [[head for heads in layers for head in heads]] if policy.allocator.spans_layers else layers
            for pool, budget in zip(pools, budgets, strict=False):
                for head in pool:
                    head.limit = budget
                if length > budget:
                    compress(pool, scorer, [budget] * len(pool), policy.allocator.floor)

    def tokens(self, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shapes = (HEADS * GROUP, HEADS, HEADS)
        q, k, v = (torch.randn(2, h, n, D, generator=self.generator, dtype=torch.float32).double() for h in shapes)
        return 3 * q, k, v

    def step(self, number: int, inputs: list[tuple[torch.Tensor, ...]], real: list[bool]) -> torch.Tensor:
        """Feed one token of each real row; returns the attention [L, B, H_q, D], zero in the other rows."""
        out = torch.zeros(LAYERS, 2, HEADS * GROUP, D, dtype=torch.float64)
        for i, (layer, (query, key, value)) in enumerate(zip(self.heads, inputs, strict=True)):
            for b, row in enumerate(layer):
                for h, head in enumerate(row):
                    group = slice(h * GROUP, (h + 1) * GROUP)
                    if real[b]:
                        out[i, b, group] = head.feed(query[b, group], key[b, h], value[b, h])
                    if number % self.policy.schedule.interval == 0:
                        head.evict(self.scorer, head.limit, RECENT)
        return out

    def check(self, layers: list[CacheLayer], what: str) -> None:
        """The same tokens in the same order in every head."""
        for i, layer in enumerate(layers):
            keys, values, valid = layer.storage.read()
            for b, row in enumerate(self.heads[i]):
                for h, head in enumerate(row):
                    real = slice(None) if valid is None else valid.expand(-1, HEADS, -1)[b, h]
                    for held, past in ((keys, head.keys), (values, head.values)):
                        expected = torch.stack([past[t] for t in head.held]).float()
                        assert torch.equal(held[b, h][real], expected), f"{what}: layer {i}, row {b}, head {h}"
            lengths = torch.tensor([[len(head.held) for head in row] for row in self.heads[i]])
            assert torch.equal(layer.tokens.expand(-1, HEADS), lengths)


def layers_after_prompt(reference: Reference) -> list[CacheLayer]:
    policy, lengths = reference.policy, reference.lengths
    storages = Ragged().new_layers(LAYERS)
    states = policy.new_states([ModelLayer(i, i, LAYERS, lambda: None) for i in range(LAYERS)])
    layers = [CacheLayer(i, LAYERS, policy, states[i], storages[i]) for i in range(LAYERS)]
    for layer, tensors in zip(layers, reference.prompts, strict=True):
        prompts = []
        for b, length in enumerate(lengths):
            q, k, v = (x[b : b + 1, :, max(lengths) - length :].float() for x in tensors)
            q = q[:, :, max(0, length - policy.capabilities.observation_window) :]
            prompt = Prompt(q, k, v, LogitRule(SCALE), layer.layer_idx, LAYERS)
            prompts.append((Rows(max(lengths) - length, torch.tensor([b])), prompt))
        layer.finish_prefill(prompts)
        layer.in_prefill = False
    return layers


def attend(layers: list[CacheLayer], inputs: list[tuple[torch.Tensor, ...]], valid: torch.Tensor | None = None):
    """Feed n tokens [B, heads, n, D] to every layer; returns [L, B, H_q, n, D]."""
    out = []
    for layer, tensors in zip(layers, inputs, strict=True):
        q, k, v = (x.float() for x in tensors)
        out.append(layer.attend(LayerCall(q, k, v, LogitRule(SCALE)), NewTokens([], valid, None), KVAccess()))
    return torch.stack(out)


def column(inputs: list[tuple[torch.Tensor, ...]], t: int) -> list[tuple[torch.Tensor, ...]]:
    return [tuple(x[:, :, t] for x in tensors) for tensors in inputs]


@torch.inference_mode()
@pytest.mark.parametrize(
    ("lengths", "interval"),
    [
        ((15, 9), 3),
        pytest.param((20, 15), 1, marks=pytest.mark.slow),
        pytest.param((20, 15), 3, marks=pytest.mark.slow),
        pytest.param((15, 9), 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("allocator", ALLOCATORS, ids=str)
@pytest.mark.parametrize("scorer", SCORERS)
def test_ragged_steps_match_the_naive_simulator(scorer, allocator, interval, lengths, monkeypatch):
    """Several tokens at once, of which a row has fewer; single tokens; and from then on static steps and their copy."""
    monkeypatch.setattr(eviction, "COMPACTION_INTERVAL_STEPS", 5)
    policy = EvictionPolicy(
        SCORERS[scorer], BUDGET, allocator=allocator, schedule=EveryN(interval), sinks=SINKS, recent=RECENT
    )
    reference = Reference(scorer, policy, lengths, seed=interval)
    layers = layers_after_prompt(reference)
    reference.check(layers, "prompt")
    number = 0
    for valid in ([[True] * 3, [False, False, True]], [[False] * 2, [True] * 2], [[True]] * 2, [[True]] * 2):
        real = torch.tensor(valid)
        inputs = [reference.tokens(real.shape[1]) for _ in range(LAYERS)]
        out = attend(layers, inputs, None if real.all() else real)
        for t in range(real.shape[1]):
            number += 1
            expected = reference.step(number, column(inputs, t), real[:, t].tolist())
            found = out[:, :, :, t].double() * real[:, t, None, None]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        reference.check(layers, f"step {number}")

    static = copy.deepcopy(layers)
    for layer in static:
        assert layer.static_problem is None
        layer.make_static(STEPS)
    shapes = [[(t.data_ptr(), t.shape) for t in layer.tensors()] for layer in static]
    branch: tuple[Reference, list[CacheLayer], int] | None = None
    for i in range(STEPS):
        number += 1
        inputs = [reference.tokens(1) for _ in range(LAYERS)]
        expected = reference.step(number, column(inputs, 0), [True, True])
        for held in (layers, static):
            found = attend(held, inputs)[:, :, :, 0].double()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        for layer in static:
            layer.between_steps()
        for held, what in ((layers, "dynamic"), (static, "static")):
            reference.check(held, f"{what} step {number}")
        assert shapes == [[(t.data_ptr(), t.shape) for t in layer.tensors()] for layer in static]
        if i == 7:
            branch = copy.deepcopy((reference, static, number))
    assert branch is not None
    reference, static, number = branch
    reference.generator.manual_seed(99)  # other tokens than the original
    for _ in range(9):
        number += 1
        inputs = [reference.tokens(1) for _ in range(LAYERS)]
        expected = reference.step(number, column(inputs, 0), [True, True])
        torch.testing.assert_close(attend(static, inputs)[:, :, :, 0].double(), expected, rtol=0, atol=1e-5)
        for layer in static:
            layer.between_steps()
        reference.check(static, f"copy, step {number}")


@pytest.mark.parametrize("kept", [(0, 5, 20, 20), (0, 0, 0, 0), (20, 20, 20, 20), (3, 3, 20, 0), (7, 7, 7, 7)], ids=str)
def test_tokens_leave_while_decoding_as_after_a_prompt(kept):
    """A head may lose all, some or none of its 20 tokens; the storage then is the same whichever way they leave."""
    generator = torch.Generator().manual_seed(0)
    keys, values, new = (torch.randn(2, HEADS, n, D, generator=generator) for n in (20, 20, 1))
    decoding, prompt = (Ragged().new_layers(1)[0] for _ in range(2))
    for layer, compact_now in ((decoding, False), (prompt, True)):
        layer.append(keys, values)
        layer.drop(torch.stack([torch.arange(20) >= 20 - n for n in kept]).view(2, HEADS, 20), compact_now)
        layer.append(new, new)
        keep = torch.ones(2, HEADS, layer.slots, dtype=torch.bool) if layer.valid is None else layer.valid.clone()
        keep[0, 0, -1] = False  # the new token of one head
        layer.drop(keep, compact_now)
        assert layer.tokens.flatten().tolist() == [kept[0], *(n + 1 for n in kept[1:])]
    for h, n in enumerate(kept):
        row, head = divmod(h, HEADS)
        expected = torch.cat([keys[row, head, 20 - n :], new[row, head]])[: n + (h > 0)]
        for layer in (decoding, prompt):
            assert torch.equal(layer.read()[0][row, head, layer.slots - len(expected) :], expected)
    assert decoding.logical_bytes == prompt.logical_bytes
    for left, expected in zip(decoding.read(), prompt.read(), strict=True):
        assert left is expected is None or torch.equal(left, expected)
