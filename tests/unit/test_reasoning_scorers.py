"""R-KV, SnapKV-D, Scissorhands and SnapStream's ring: kept sets of the authors, and their rules in plain loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from golden import newer_entries, newer_prompt
from random_prompts import D, kept, random_prompt
from tiny_models import left_pad, prompt_ids, tiny_model

from kvbench.conf.errors import InputError
from kvbench.methods.cache.layout import model_shape
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.method import Method
from kvbench.methods.cache.prompt import Prompt
from kvbench.methods.policies.allocators.adaptive import Adaptive
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.schedules.ring import Ring
from kvbench.methods.policies.scorers import rkv
from kvbench.methods.policies.scorers.attention_sums import AttentionSums
from kvbench.methods.policies.scorers.key_norm import KeyNorm
from kvbench.methods.policies.scorers.rkv import RKV
from kvbench.methods.policies.scorers.scissorhands import Scissorhands
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.methods.storage.ragged import Ragged
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import decode, prefill

LAYERS = newer_entries()["layers"]
RKV_BASELINE = SnapKV(window=8, kernel=7, pooling="max", group_reduce="max_logits", softmax="prefix")


def golden_importance(layer: dict) -> torch.Tensor:
    """Importance of the tokens before the window by the authors' code, [H_kv, 88]."""
    (name,) = (key for key in layer if key.startswith("rkv attention"))
    return torch.tensor(layer[name])


# R-KV -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "name"), [(0.07, "lambda=0.07 retain=0.2 last"), (0.1, "lambda=0.1 retain=0.1 last")]
)
@pytest.mark.parametrize("block", [512, 7])
def test_rkv_keeps_what_the_authors_code_keeps(monkeypatch, weight, name, block):
    monkeypatch.setattr(rkv, "BLOCK_KEYS", block)
    for layer in LAYERS:
        prompt = newer_prompt(layer, 8)
        ours = kept(RKV(weight=weight, shields_first=True), prompt, 40)
        assert ours == layer["kept"][f"rkv budget=40 w=8 k=7 {name}"]


def test_rkv_parts_are_the_authors():
    for layer in LAYERS:
        prompt = newer_prompt(layer, 8)
        redundancy = -RKV(weight=0.0, shields_first=True).score(prompt)[0, :, :88]
        for importance in (RKV(weight=1.0).score(prompt), RKV_BASELINE.score(prompt) / 8):
            torch.testing.assert_close(importance[0, :, :88], golden_importance(layer), rtol=1e-4, atol=1e-8)
        expected = torch.tensor(layer["rkv similarity softmax (threshold 0.5, last)"])[:, :88]
        torch.testing.assert_close(redundancy, expected, rtol=1e-4, atol=0)


def naive_rkv(
    prompt: Prompt, h: int, weight: float, similarity: float, kernel: int, shields_first: bool
) -> list[float]:
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
        if similar or shields_first:
            row[similar[-1] if similar else 0] = 0.0
        columns = [c + x / length for c, x in zip(columns, row, strict=True)]
    exps = [math.exp(c) for c in columns]
    pooled = naive_sums(prompt, h, "max_logits", "prefix", kernel)
    return [weight * pooled[t] / w - (1 - weight) * exps[t] / sum(exps) for t in range(length - w)]


def naive_sums(prompt: Prompt, h: int, group_reduce: str, softmax: str, kernel: int) -> list[float]:
    """Attention of the window to the tokens before it, of KV head ``h``, summed and max-pooled, in loops."""
    length, w, heads = prompt.length, prompt.query.shape[2], (2 * h, 2 * h + 1)
    received = [0.0] * (length - w)
    for i in range(w):
        seen = length - w + (i + 1 if softmax == "all" else 0)
        logits = [
            [float(prompt.query[0, j, i] @ prompt.keys[0, h, t]) / math.sqrt(D) for t in range(seen)] for j in heads
        ]
        if group_reduce == "max_logits":
            logits = [[max(pair) for pair in zip(*logits, strict=True)]]
        for row in logits:
            total = sum(map(math.exp, row))
            received = [r + math.exp(x) / total / len(logits) for r, x in zip(received, row, strict=False)]
    half = kernel // 2
    return [max(received[max(0, t - half) : t + half + 1]) for t in range(length - w)]


@pytest.mark.parametrize("shields_first", [False, True])
@pytest.mark.parametrize(("weight", "similarity", "kernel"), [(0.07, 0.5, 7), (0.5, 0.2, 3), (0.9, 0.0, 1)])
def test_rkv_is_the_naive_score(weight, similarity, kernel, shields_first):
    prompt = random_prompt()
    ours = RKV(8, kernel, weight, similarity, shields_first).score(prompt)[0]
    for h in range(2):
        expected = naive_rkv(prompt, h, weight, similarity, kernel, shields_first)
        assert ours[h, :37].tolist() == pytest.approx(expected, rel=1e-4)


def test_rkv_of_a_repeated_key_keeps_the_later_one():
    """Keys at right angles but for three equal ones: each leaves out the last of the others."""
    keys = torch.eye(16)[None, None, :12].clone()
    keys[0, 0, 7] = keys[0, 0, 5] = keys[0, 0, 3]
    prompt = Prompt(torch.zeros(1, 1, 2, 16), keys, keys, LogitRule(1.0), 0, 1)
    scores = RKV(window=2, kernel=1, weight=0.0).score(prompt)[0, 0, :10]
    assert scores[3] < scores[5] < scores[7] == scores[4]


def test_keys_without_similar_ones_do_not_shield_the_first_token():
    """All cosines are 0.4, so all tokens are as redundant.

    With the published side effect every other key leaves out the first one, whose mean cosine is 0 instead of 0.36.
    """
    keys = (torch.eye(10) * 0.6 + torch.full((10, 10), 0.4)).double()
    keys = torch.linalg.cholesky(keys)[None, None]
    prompt = Prompt(torch.zeros(1, 1, 2, 10, dtype=torch.float64), keys, keys, LogitRule(1.0), 0, 1)
    plain, published = (-RKV(2, 1, 0.0, 0.5, shields).score(prompt)[0, 0, :8] for shields in (False, True))
    assert plain.tolist() == pytest.approx([0.1] * 8, rel=1e-5)
    total = 1 + 9 * math.exp(0.36)
    assert published.tolist() == pytest.approx([1 / total, *[math.exp(0.36) / total] * 7], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rkv_multiplies_in_float32(dtype):
    """Large logits: products rounded to the dtype of the model would change the scores by whole percents."""
    prompt = random_prompt()
    rounded = replace(prompt, query=(4 * prompt.query).to(dtype), keys=prompt.keys.to(dtype), memo={})
    exact = replace(rounded, query=rounded.query.float(), keys=rounded.keys.float(), memo={})
    for scorer in (RKV(), RKV(weight=1.0), RKV_BASELINE, SnapKV(8, group_reduce="max_logits")):
        assert torch.equal(scorer.score(rounded), scorer.score(exact))


def test_rkv_evicts_every_128_steps_by_default():
    assert RKV().default_schedule.interval == named_method("rkv").schedule.interval == 128


# SnapKV-D -------------------------------------------------------------------------------------------------------------


def test_snapkv_d_has_the_papers_settings():
    method = named_method("snapkv_d")
    assert method.policy.scorer == SnapKV(window=64, kernel=5, pooling="avg")
    assert method.policy.recent == 64 and method.schedule.interval == 1


def test_the_baseline_of_the_rkv_repository_is_snapkv_d_with_rkvs_importance():
    text = "scorer.window=8 scorer.kernel=7 scorer.pooling=max scorer.group_reduce=max_logits scorer.softmax=prefix"
    method = named_method(f"snapkv_d budget=40 schedule.n=128 {text}")
    assert method.policy.scorer == RKV_BASELINE and method.policy.recent == 8 and method.schedule.interval == 128
    for layer in LAYERS:
        importance = golden_importance(layer)  # [H_kv, 88]
        for h, ours in enumerate(kept(RKV_BASELINE, newer_prompt(layer, 8), 40)):
            worst = sorted(importance[h].tolist(), reverse=True)[31]
            assert ours[32:] == list(range(88, 96)) and min(float(importance[h, t]) for t in ours[:32]) == worst


@pytest.mark.parametrize("kernel", [1, 7])
@pytest.mark.parametrize("softmax", ["prefix", "all"])
@pytest.mark.parametrize("group_reduce", ["max_logits", "mean"])
def test_softmax_and_logits_of_groups_are_the_naive_ones(group_reduce, softmax, kernel):
    prompt = random_prompt()
    ours = SnapKV(8, kernel, "max", group_reduce=group_reduce, softmax=softmax).score(prompt)[0]
    for h in range(2):
        expected = naive_sums(prompt, h, group_reduce, softmax, kernel)
        assert ours[h, :37].tolist() == pytest.approx(expected, rel=1e-9) and not ours[h, 37:].any()


def test_the_largest_logits_are_not_the_largest_weights():
    prompt = random_prompt()
    by_weight, by_logit = (SnapKV(8, 1, group_reduce=how).score(prompt)[0, :, :37] for how in ("max", "max_logits"))
    assert (by_weight.sort().indices != by_logit.sort().indices).any()


def test_the_largest_logits_of_a_group_need_a_group():
    with pytest.raises(InputError, match=r"^method\.scorer\.group_reduce=max_logits: must be mean, max or sum"):
        SnapKV(granularity="query_head", group_reduce="max_logits")


def test_a_budget_within_the_window_holds_the_most_recent_tokens():
    """1/32 of 1,100 tokens is 34, below the window of 64; as a number of tokens it is refused."""
    model, method = tiny_model(), named_method("snapkv_d budget=0.03125")
    cache = method.new_cache(model)
    prefill(model, cache, prompt_ids(1100))
    for i in range(3):
        decode(model, cache, torch.tensor([3 + i]))
    full = named_method("full").new_cache(model)
    prefill(model, full, prompt_ids(1100))
    keys = full.layers[0].storage.read()[0]  # the first layer's do not depend on what is held
    assert torch.equal(cache.layers[0].storage.read()[0][:, :, -34:-3], keys[:, :, -31:])
    assert [int(t.max()) for t in cache.tokens_held] == [34] * 3
    with pytest.raises(InputError, match=r"^method\.budget=34: must be at least 64, [^\n]*\(method\.recent=64\)$"):
        named_method("snapkv_d budget=34")


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


def test_scissorhands_has_the_papers_settings():
    method = named_method("scissorhands")
    assert method.policy.scorer == Scissorhands(400) and method.schedule.n == 0.5 and method.policy.recent == 10


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        *(("budget=24", [12]), ("budget=24 scorer.history=5", [5]), ("budget=24 hold_budget=true", [1])),
        *(("budget=0.5 recent=2", [6, 3]), ("budget=0.5 recent=2 scorer.history=4", [4, 3])),
    ],
)
def test_scissorhands_stores_the_queries_since_the_last_eviction(text, rows):
    """A prompt of 24 tokens, and with a budget that is a share of it one of 10 in the same batch."""
    model, method = tiny_model(), named_method(f"scissorhands {text}")
    cache, lengths = method.new_cache(model), (24, 10)[: len(rows)]
    ids, mask = left_pad([prompt_ids(n, n) for n in lengths])
    prefill(model, cache, ids, mask)
    for _ in range(2):
        shapes = {tuple(layer.state.queries.shape) for layer in cache.layers}
        assert shapes == {(len(rows), 4, max(rows), 16)}
        decode(model, cache, torch.arange(3, 3 + len(rows)))
    shape = model_shape(model)
    assert cache.kv_bytes_logical == sum(method.bytes_formula(shape, n, 2) for n in lengths)
    query_bytes = shape.layers * 4 * 16 * shape.element_bytes
    stored = [method.policy.state_bytes(shape, 2, n, 2) for n in lengths]
    assert stored == [n * query_bytes for n in rows]


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
