"""CaM against a simulator with one Python list per head in float64, its properties, and the statistics of its draws."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from tiny_models import left_pad, prompt_ids, tiny_model

from kvbench.conf.errors import InputError
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.method import Method
from kvbench.methods.cache.prompt import Prompt
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.merging import Merging
from kvbench.methods.policies.model_layer import ModelLayer
from kvbench.methods.policies.policy import Step
from kvbench.methods.policies.schedules.every_n import EveryN
from kvbench.methods.policies.schedules.every_step import EveryStep
from kvbench.methods.policies.scorers.attention_sums import AttentionSums
from kvbench.methods.policies.scorers.cam import CaM
from kvbench.methods.policies.scorers.chunkkv import ChunkKV
from kvbench.methods.storage import dense
from kvbench.methods.storage.dense import DenseLayer
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import decode, prefill

D, SCALE, BUDGET, STEPS, LAYER, LAYERS = 8, 8**-0.5, 12, 22, 2, 3
TEXT_SEEDS = (123456789, -987654321)


class SplitMix64:
    """The generator of Steele et al. (2014) in Python's integers."""

    def __init__(self, seed: int):
        self.state = seed % 2**64

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        return self.hashed(self.state)

    @staticmethod
    def hashed(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)


class Row:
    """One sequence: positions, keys, values and attention sums of each head's tokens, as lists."""

    def __init__(self, prompt: Prompt, scorer: CaM, row: int, recent: int):
        self.scorer, self.recent, heads = scorer, recent, prompt.keys.shape[1]
        self.heads, self.groups = heads, prompt.query.shape[1] // heads
        self.random = SplitMix64(SplitMix64.hashed((TEXT_SEEDS[row] + scorer.seed * 1_000_003 + LAYER) % 2**64))
        self.keys = [list(prompt.keys[row, h].unbind()) for h in range(heads)]
        self.values = [list(prompt.values[row, h].unbind()) for h in range(heads)]
        self.sums = [[0.0] * prompt.length for _ in range(heads)]
        self.merges, self.alone = [0, 0], 0  # times not merged and merged, and evictions without a receiver
        for h in range(heads):
            for t in range(prompt.length):
                for query in prompt.query[row, h * self.groups : (h + 1) * self.groups, t]:
                    self.attend(h, query, t + 1)
            self.keep_prompt(h)

    def attend(self, h: int, query: torch.Tensor, seen: int) -> torch.Tensor:
        weights = (torch.stack(self.keys[h][:seen]) @ query * SCALE).softmax(0)
        for i, weight in enumerate(weights.tolist()):
            self.sums[h][i] += weight / self.groups
        return weights @ torch.stack(self.values[h][:seen])

    def keep_prompt(self, h: int) -> None:
        """Tokens of the prompt leave unmerged."""
        older = len(self.keys[h]) - self.recent
        best = sorted(range(older), key=lambda i: -self.sums[h][i])[: BUDGET - self.recent]
        kept = sorted([*best, *range(older, len(self.keys[h]))]) if older + self.recent > BUDGET else None
        for lists in (self.keys, self.values, self.sums) if kept is not None else ():
            lists[h] = [lists[h][i] for i in kept]

    def evict(self, at_once: bool) -> None:
        """Evict tokens over the budget, of each head as many; ``at_once``: by one draw per row, numbered by slot."""
        over = len(self.keys[0]) - BUDGET
        if over <= 0:
            return
        key = self.random.next()
        for h in range(self.heads):
            sums, values = self.sums[h], self.values[h]
            older = sorted(range(len(sums) - self.recent), key=lambda i: sums[i])
            victims = sorted(older[:over])
            kept = [i for i in range(len(sums)) if i not in victims]
            changed = {i: values[i].clone() for i in kept}
            for v in victims:
                receivers = [i for i in kept if i > v][: self.scorer.receivers]
                if not receivers:
                    self.alone += 1
                    continue
                ratio = sums[v] / (sum(sums[i] for i in receivers) / len(receivers))
                counter = (v + 1 if at_once else 0) * self.heads + h + 1
                bits = SplitMix64.hashed((key + counter * 0x9E3779B97F4A7C15) % 2**64)
                threshold = (bits >> 40) / 2**24 if self.scorer.bernoulli else 1.0
                merged = min(ratio, 1.0) > threshold if self.scorer.bernoulli else ratio > threshold
                self.merges[merged] += 1
                for i in receivers if merged else ():
                    changed[i] += values[v] / len(receivers)
            self.keys[h], self.sums[h] = [self.keys[h][i] for i in kept], [sums[i] for i in kept]
            self.values[h] = [changed[i] for i in kept]


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("scorer", "schedule", "recent", "length", "query_heads"),
    [
        (CaM(receivers=3), EveryStep(), 0.5, 30, 4),
        (CaM(), EveryStep(), 0.5, 9, 2),  # fewer kept tokens than receivers, and a prompt within the budget
        (
            CaM(receivers=5, bernoulli=False),
            EveryStep(),
            11,
            30,
            2,
        ),  # the token that leaves the window, as the authors'
        (CaM(receivers=2, seed=5), EveryStep(), 0, 14, 4),  # the newest token may leave: no receiver
        (CaM(receivers=3), EveryN(5), 0.5, 30, 4),
        (CaM(receivers=4, bernoulli=False), EveryN(4), 10, 30, 2),
    ],
    ids=str,
)
def test_the_cache_is_the_naive_simulators(scorer, schedule, recent, length, query_heads, monkeypatch):
    """Outputs of all steps, and the cache of two rows after them; gaps are closed every 4 steps."""
    monkeypatch.setattr(dense, "COMPACTION_INTERVAL_STEPS", 4)
    q, k, v = (numbers(2, h, length, D, seed=i) for i, h in enumerate((query_heads, 2, 2)))
    prompt = Prompt(3 * q, k, v, LogitRule(SCALE), LAYER, LAYERS, text_seeds=torch.tensor(TEXT_SEEDS))
    policy = EvictionPolicy(scorer, BUDGET, schedule=schedule, recent=recent)
    rows = [Row(prompt, scorer, row, policy.recent_of(BUDGET)) for row in range(2)]
    storage, (state,) = DenseLayer(), policy.new_states([ModelLayer(LAYER, LAYER, LAYERS, lambda: None)])
    kept = policy.select(prompt, state)
    slots = torch.arange(length).expand(2, 2, -1) if kept.slots is None else kept.slots
    storage.write(*(x.gather(2, slots[..., None].expand(-1, -1, -1, D)) for x in (k, v)))
    policy.after_prompt(state, storage, torch.tensor([length] * 2), kept.scores)
    for i in range(STEPS):
        query, key, value = (numbers(2, h, 1, D, seed=100 + 3 * i + j) for j, h in enumerate((query_heads, 2, 2)))
        storage.append(key, value)
        step = Step(3 * query, LogitRule(SCALE))
        out = policy.attend(state, storage, step)
        policy.after_attention(state, storage, step)
        for r, row in enumerate(rows):
            for h in range(2):
                row.keys[h].append(key[r, h, 0])
                row.values[h].append(value[r, h, 0])
                row.sums[h].append(0.0)
                for j in range(h * row.groups, (h + 1) * row.groups):
                    expected = row.attend(h, 3 * query[r, j, 0], len(row.keys[h]))
                    assert (out[r, j, 0] - expected).abs().max() < 1e-9
            if (i + 1) % schedule.interval == 0:
                row.evict(at_once=schedule.interval > 1)
    keys, values, valid = storage.read()
    for r, row in enumerate(rows):
        for h in range(2):
            real = slice(None) if valid is None else valid[r, h]
            assert torch.equal(keys[r, h][real], torch.stack(row.keys[h]))
            assert (values[r, h][real] - torch.stack(row.values[h])).abs().max() < 1e-9
            assert state.scores[r, h][real].tolist() == pytest.approx(row.sums[h], abs=1e-4)
    assert recent == 0 or min(sum(row.merges[i] for row in rows) for i in (0, 1)) > 3  # both happen
    assert any(row.alone for row in rows) == (recent == 0)


@dataclass(frozen=True)
class Fixed(CaM):
    """CaM that always or never merges."""

    merged: bool = True

    def is_merged(self, score, mean, uniform):
        return torch.full_like(score, self.merged, dtype=torch.bool)


def after_steps(policy: EvictionPolicy, steps: int = 30, dtype: torch.dtype = torch.float64):
    """Logits of a padded batch, and its cache, after a prompt and so many steps."""
    model = tiny_model(dtype=dtype)
    cache = Method("cam", policy).new_cache(model)
    ids, mask = left_pad([prompt_ids(40, 1), prompt_ids(26, 2)])
    logits = [prefill(model, cache, ids, mask)]
    logits += [decode(model, cache, torch.tensor([3 + i, 70 - i])) for i in range(steps)]
    return torch.stack(logits), cache


@functools.cache
def plain() -> torch.Tensor:
    return after_steps(EvictionPolicy(AttentionSums(), 20))[0]


def test_without_merges_it_is_h2o_bit_by_bit_and_with_them_it_is_not():
    assert torch.equal(after_steps(EvictionPolicy(Fixed(merged=False), 20))[0], plain())
    always = after_steps(EvictionPolicy(Fixed(), 20))[0]
    assert torch.equal(always[0], plain()[0]) and (always - plain()).abs().max() > 1e-3


def test_draws_depend_on_the_seed_alone():
    first, again, other = (after_steps(EvictionPolicy(CaM(seed=n), 20))[0] for n in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_merge_keeps_the_sum_of_values_and_the_keys(dtype):
    """Whatever the number of receivers is: an evicted value is divided by it."""
    storage, heads, slots = DenseLayer(), 2, 40
    keys, values = (numbers(3, heads, slots, D, seed=i).to(dtype) for i in range(2))
    storage.write(keys, values)
    merging = Merging(Fixed(receivers=7), 0)
    merging.begin(torch.zeros(3, dtype=torch.int64))
    kept = numbers(3, heads, slots, seed=3) > 0
    kept[..., -1] = True
    kept[0, 0, 5:-1] = False  # one receiver for many
    merging.merge(storage, torch.ones(3, heads, slots), torch.ones_like(kept), kept, in_place=False)
    after = storage.read()[1]
    assert after.dtype == dtype and torch.equal(storage.read()[0], keys)
    sums = after.masked_fill(~kept[..., None], 0).sum(2)
    torch.testing.assert_close(sums, values.sum(2), rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-4)


def test_merges_are_bernoulli_with_the_ratio_of_the_attention():
    """Frequencies over many rows within four standard errors; rows, heads, layers and events are not correlated."""
    rows, probabilities = 20_000, torch.tensor([0.0, 0.05, 0.3, 0.8, 1.0, 2.5])
    merging = Merging(CaM(receivers=2), 1)
    merging.begin(torch.arange(rows))
    scores = torch.ones(rows, len(probabilities), 4)
    scores[..., 1] = probabilities * 3  # of the receivers in slots 2 and 3: 5 and 1
    scores[..., 2] = 5.0
    kept = torch.tensor([True, False, True, True]).expand_as(scores)
    victim, evicted = torch.ones(rows, len(probabilities), 1, dtype=torch.int64), torch.ones(rows, 1, 1).bool()
    merged: list[torch.Tensor] = []
    for _ in range(2):
        storage = DenseLayer()
        storage.write(*torch.tensor([0.0, 2.0, 0.0, 0.0])[:, None].expand(2, rows, len(probabilities), 4, 1))
        merging.merge_one(storage, scores, kept, victim, evicted, in_place=False)
        values = storage.read()[1][..., 0]
        assert torch.equal(values[..., 2], values[..., 3]) and not values[..., 0].any()
        merged.append(values[..., 2])
    p = probabilities.clamp(max=1).double()
    for drawn in merged:
        error = (drawn.double().mean(0) - p).abs()
        assert (error <= 4 * (p * (1 - p) / rows).sqrt()).all()
    pairs = torch.cat([merged[0][:, 1:4], merged[1][:, 1:4]], dim=1).T  # heads and events
    neighbours = torch.stack([merged[0][:-1, 2], merged[0][1:, 2]])  # rows of seeds n and n + 1
    for table in (pairs, neighbours):
        assert (torch.corrcoef(table) - torch.eye(len(table))).abs().max() < 4 * rows**-0.5
    uniform = merging._uniform(torch.zeros(rows, 2, 1, dtype=torch.int64), evicted, False).flatten()
    counts = torch.histc(uniform, 50, 0, 1)
    assert uniform.min() >= 0 and uniform.max() < 1
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 49 + 4 * (2 * 49) ** 0.5  # chi-squared


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: named_method("cam storage=fp8"), r"method/storage=fp8: cannot change .* use method/storage=dense"),
        (lambda: named_method("cam storage=kivi4"), r"method/storage=kivi4: cannot change the values"),
        (lambda: named_method("cam storage=ragged"), r"method/storage=ragged: cannot change the values"),
        (
            lambda: named_method("cam schedule=after_prefill"),
            r"method/schedule=after_prefill: .* every_step or every_n",
        ),
        (lambda: named_method("cam schedule=ring"), r"method/schedule=ring: evicts no token by its attention"),
        (lambda: named_method("cam scorer.receivers=0"), r"method\.scorer\.receivers=0: must be a whole number >= 1"),
        (lambda: ChunkKV(CaM()), r"=cam: is more than a score"),
        (lambda: named_method("criticalkv scorer@method.scorer.scorer=cam"), r"=cam: merges values while decoding"),
    ],
)
def test_what_cannot_merge_is_refused_in_one_line(build: Callable[[], object], message: str):
    with pytest.raises(InputError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def test_the_identity_names_the_rule_of_merging():
    method = named_method("cam budget=64 scorer.receivers=16")
    identity = method.identity()["selection"]
    assert identity["class"] == "CaM" and identity["receivers"] == 16 and identity["bernoulli"] is True
    assert method.label == "cam 64" and replace(method, budget=65).label == "cam 65"
