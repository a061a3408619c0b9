"""R-KV, Scissorhands and the ring of SnapStream: kept sets of the authors, and their rules in plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from golden import newer_entries, newer_prompt
from tiny_models import left_pad, prompt_ids, tiny_model

from kvbench.conf.errors import InputError
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.method import Method
from kvbench.methods.cache.prompt import Prompt
from kvbench.methods.policies.allocators.adaptive import Adaptive
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.schedules.ring import Ring
from kvbench.methods.policies.scorers import rkv
from kvbench.methods.policies.scorers.attention_sums import AttentionSums
from kvbench.methods.policies.scorers.base import Scorer
from kvbench.methods.policies.scorers.key_norm import KeyNorm
from kvbench.methods.policies.scorers.rkv import RKV
from kvbench.methods.policies.scorers.scissorhands import Scissorhands
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.methods.storage.ragged import Ragged
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import decode, prefill

LAYERS = newer_entries()["layers"]
D = 16


def kept(scorer: Scorer, prompt: Prompt, budget: int) -> list[list[int]]:
    """Tokens that each head of the only row keeps."""
    slots = EvictionPolicy(scorer, budget).select(prompt).slots
    assert slots is not None
    sets: list[list[int]] = slots[0].tolist()
    return sets


def random_prompt(length: int = 45, window: int = 8, heads: int = 2, groups: int = 2) -> Prompt:
    g = torch.Generator().manual_seed(length)
    query, keys, values = (
        torch.randn(1, n, t, D, generator=g, dtype=torch.float64)
        for n, t in ((heads * groups, min(window, length)), (heads, length), (heads, length))
    )
    return Prompt(2 * query, keys, values, LogitRule(D**-0.5), 0, 1)


# R-KV -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "name"), [(0.07, "lambda=0.07 retain=0.2 last"), (0.1, "lambda=0.1 retain=0.1 last")]
)
@pytest.mark.parametrize("block", [512, 7])
def test_rkv_keeps_what_the_authors_code_keeps(monkeypatch, weight, name, block):
    monkeypatch.setattr(rkv, "BLOCK_KEYS", block)
    for layer in LAYERS:
        prompt = newer_prompt(layer, 8)
        assert kept(RKV(weight=weight), prompt, 40) == layer["kept"][f"rkv budget=40 w=8 k=7 {name}"]


def test_rkv_parts_are_the_authors():
    for layer in LAYERS:
        prompt = newer_prompt(layer, 8)
        importance, redundancy = RKV(weight=1.0).score(prompt)[0, :, :88], -RKV(weight=0.0).score(prompt)[0, :, :88]
        (name,) = (key for key in layer if key.startswith("rkv attention"))
        torch.testing.assert_close(importance, torch.tensor(layer[name]), rtol=1e-4, atol=1e-8)
        expected = torch.tensor(layer["rkv similarity softmax (threshold 0.5, last)"])[:, :88]
        torch.testing.assert_close(redundancy, expected, rtol=1e-4, atol=0)


def naive_rkv(prompt: Prompt, h: int, weight: float, similarity: float, kernel: int) -> list[float]:
    """Scores of the tokens before the window, of KV head ``h``, in loops."""
    length, w = prompt.length, prompt.query.shape[2]
    keys = [prompt.keys[0, h, t].tolist() for t in range(length)]
    columns = [0.0] * length
    for i in range(length):
        row = []
        for j in range(length):
            product = sum(a * b for a, b in zip(keys[i], keys[j], strict=True))
            row.append(
                0.0 if i == j else product / math.sqrt(sum(a * a for a in keys[i]) * sum(b * b for b in keys[j]))
            )
        similar = [j for j in range(length) if row[j] > similarity]
        row[similar[-1] if similar else 0] = 0.0
        columns = [c + x / length for c, x in zip(columns, row, strict=True)]
    exps = [math.exp(c) for c in columns]
    received = [0.0] * (length - w)
    for i in range(w):
        logits = []
        for t in range(length - w):
            each = [float(prompt.query[0, j, i] @ prompt.keys[0, h, t]) / math.sqrt(D) for j in (2 * h, 2 * h + 1)]
            logits.append(math.exp(max(each)))
        received = [r + x / sum(logits) / w for r, x in zip(received, logits, strict=True)]
    half = kernel // 2
    pooled = [max(received[max(0, t - half) : t + half + 1]) for t in range(length - w)]
    return [weight * pooled[t] - (1 - weight) * exps[t] / sum(exps) for t in range(length - w)]


@pytest.mark.parametrize(("weight", "similarity", "kernel"), [(0.07, 0.5, 7), (0.5, 0.2, 3), (0.9, 0.0, 1)])
def test_rkv_is_the_naive_score(weight, similarity, kernel):
    prompt = random_prompt()
    ours = RKV(8, kernel, weight, similarity).score(prompt)[0]
    for h in range(2):
        assert ours[h, :37].tolist() == pytest.approx(naive_rkv(prompt, h, weight, similarity, kernel), rel=1e-4)


def test_rkv_of_a_repeated_key_keeps_the_later_one():
    """Keys at right angles but for three equal ones: each leaves out the last of the others."""
    keys = torch.eye(16)[None, None, :12].clone()
    keys[0, 0, 7] = keys[0, 0, 5] = keys[0, 0, 3]
    prompt = Prompt(torch.zeros(1, 1, 2, 16), keys, keys, LogitRule(1.0), 0, 1)
    scores = RKV(window=2, kernel=1, weight=0.0).score(prompt)[0, 0, :10]
    assert scores[3] < scores[5] < scores[7] == scores[4]


def test_rkv_evicts_every_128_steps_by_default():
    assert RKV().default_schedule.interval == named_method("rkv").schedule.interval == 128
    assert named_method("snapkv_d").schedule.interval == 128
    assert named_method("snapkv_d").policy.scorer == named_method("snapkv").policy.scorer


# Scissorhands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", [1, 8, 30, 400])
def test_scissorhands_counts_queries_below_the_mean_attention(history):
    prompt = random_prompt(window=history)
    w = prompt.query.shape[2]
    ours = Scissorhands(history).score(prompt)[0]
    for h in range(2):
        counts = [0] * 45
        for i in range(w):
            seen = 45 - w + i + 1
            rows = [
                (prompt.keys[0, h, :seen] @ prompt.query[0, j, i] / math.sqrt(D)).softmax(0) for j in (2 * h, 2 * h + 1)
            ]
            for t, weight in enumerate(((rows[0] + rows[1]) / 2).tolist()):
                counts[t] -= weight < 1 / seen
        assert ours[h].tolist() == counts


def test_scissorhands_keeps_the_newer_of_equal_tokens():
    keys = torch.zeros(1, 1, 30, D)  # every weight is the mean
    prompt = Prompt(torch.zeros(1, 1, 8, D), keys, keys, LogitRule(1.0), 0, 1)
    assert kept(Scissorhands(8), prompt, 14) == [list(range(16, 30))]


def test_scissorhands_history_is_within_the_schedule():
    with pytest.raises(InputError, match=r"^method\.recent=10: must be at least 272"):
        named_method("scissorhands scorer.history=400")


# ring -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", [SnapKV(window=4), KeyNorm(), AttentionSums()], ids=lambda s: s.name)
@pytest.mark.parametrize("adaptive", [False, True], ids=["uniform", "adaptive"])
@pytest.mark.parametrize("lengths", [(40,), (40, 9, 23)])
def test_a_ring_keeps_the_prompts_tokens_and_the_most_recent(scorer, adaptive, lengths):
    """The cache of the same method that grows, without the tokens that have left the ring."""
    model, budget, recent, steps = tiny_model(), 14, 5, 12
    parts = {"allocator": Adaptive(0.2)} if adaptive else {}
    policies = [
        EvictionPolicy(scorer, budget, schedule=schedule, recent=recent, sinks=1, **parts)
        for schedule in (Ring(), named_method("snapkv").schedule)
    ]
    ids, mask = left_pad([prompt_ids(n, seed) for seed, n in enumerate(lengths)])
    ring, grows = (Method("x", policy, Ragged() if adaptive else named_method("full").storage) for policy in policies)
    caches = [method.new_cache(model) for method in (ring, grows)]
    for cache in caches:
        prefill(model, cache, ids, mask)
    keys = []
    for layer in caches[1].layers:  # of the prompt, row by row and head by head
        stored, _, valid = layer.storage.read()
        valid = torch.ones(*stored.shape[:3], dtype=torch.bool) if valid is None else valid.expand(stored.shape[:3])
        keys.append([[stored[b, h][valid[b, h]] for h in range(2)] for b in range(len(lengths))])
    new: list[list[torch.Tensor]] = [[] for _ in caches[0].layers]
    for i in range(steps):
        decode(model, caches[0], torch.arange(3 + i, 3 + i + len(lengths)))
        for number, layer in enumerate(caches[0].layers):
            new[number].append(layer.storage.read()[0][:, :, -1])
            stored, _, valid = layer.storage.read()
            valid = torch.ones(*stored.shape[:3], dtype=torch.bool) if valid is None else valid.expand(stored.shape[:3])
            for b, length in enumerate(lengths):
                for h in range(2):
                    limit = len(keys[number][b][h]) if length > budget else budget
                    every = torch.stack([*keys[number][b][h], *(step[b, h] for step in new[number])])
                    older = min(limit - recent, len(every))
                    ring_tokens = every[older:][-recent:]
                    assert torch.equal(stored[b, h][valid[b, h]], torch.cat([every[:older], ring_tokens]))
    assert all(len(layer.policy.state_tensors(layer.state)) == 0 for layer in caches[0].layers)


def test_a_ring_holds_something():
    with pytest.raises(InputError, match=r"^method\.recent=0: must be above 0"):
        EvictionPolicy(KeyNorm(), 64, schedule=Ring())


def test_snapstream_is_snapkv_while_the_ring_is_not_full():
    """A prompt and its continuation within the budget."""
    model = tiny_model()
    caches = [named_method(f"{name} budget=60 scorer.window=8").new_cache(model) for name in ("snapstream", "snapkv")]
    logits = [prefill(model, cache, prompt_ids(40)) for cache in caches]
    for i in range(20):
        logits = [decode(model, cache, torch.tensor([3 + i])) for cache in caches]
        assert torch.equal(*logits)
    for _ in range(2):  # the token that leaves is still seen by the one for which it leaves
        logits = [decode(model, cache, torch.tensor([3])) for cache in caches]
    assert not torch.equal(*logits)
