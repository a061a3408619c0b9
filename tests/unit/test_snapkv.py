"""SnapKV against its specification: golden index sets of the published implementation, and the paper's invariants."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from golden import golden_prompt, swapped
from published import ada_kv, pyramidkv
from published import snapkv as snapkv_policy
from tiny_models import prompt_ids, tiny_model

from kvbench.conf.errors import InputError
from kvbench.methods.cache import prompt_attention
from kvbench.methods.cache.fan_out import FanOutCache
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.method import Method
from kvbench.methods.cache.prompt import Prompt
from kvbench.methods.cache.prompt_attention import window_attention
from kvbench.methods.policies.budget import resolve_budget
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.scorers import snapkv
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.methods.storage.ragged import Ragged
from kvbench.runners.engine import decode, generate, prefill

AVERAGE_CASES = [
    ("snapkv_mha C=12 w=4 k=5 avgpool", 4, {"kernel": 5}),
    ("snapkv_mha C=12 w=4 k=1 avgpool", 4, {"kernel": 1}),
    ("snapkv_gqa_kvhead agg=mean C=12 w=4 k=5 avgpool", 2, {"kernel": 5}),
    ("snapkv_gqa_kvhead agg=max C=12 w=4 k=5 avgpool", 2, {"kernel": 5, "group_reduce": "max"}),
    (
        "snapkv_gqa_expanded C=12 w=4 k=5 avgpool (per query head)",
        2,
        {"kernel": 5, "granularity": "query_head"},
    ),
]


@pytest.mark.parametrize(("name", "kv_heads", "options"), AVERAGE_CASES)
def test_golden_sets_with_average_pooling(golden, name, kv_heads, options):
    selection = snapkv_policy(12, window=4, pooling="avg", **options)
    assert selection.select(golden_prompt(4, kv_heads)).slots[0].tolist() == golden[name]


@pytest.mark.parametrize(
    ("kernel", "differences"),
    [
        (5, [([], []), ([13], [16]), ([], []), ([25], [24])]),
        (7, [([], []), ([15], [18]), ([], []), ([], [])]),
    ],
)
def test_golden_sets_with_max_pooling(golden, kernel, differences):
    """Max pooling ties a peak with its neighbours, so one tied token per head may differ from the published set."""
    selection, prompt = EvictionPolicy(SnapKV(window=4, kernel=kernel, pooling="max"), 12), golden_prompt(4, 4)
    kept, scores = selection.select(prompt).slots[0].tolist(), selection.scorer.score(prompt)[0][:, :36]
    published = golden[f"snapkv_mha C=12 w=4 k={kernel} maxpool"]
    assert [swapped(*head) for head in zip(kept, published, scores, strict=True)] == differences


def random_prompt(seed=0, rows=2, query_heads=4, kv_heads=2, length=50, dim=8, window=6) -> Prompt:
    g = torch.Generator().manual_seed(seed)
    make = lambda heads, n: torch.randn(rows, heads, n, dim, generator=g, dtype=torch.float64)  # noqa: E731
    return Prompt(make(query_heads, window), make(kv_heads, length), make(kv_heads, length), LogitRule(dim**-0.5), 0, 1)


def naive_window_sums(prompt: Prompt, row: int, query_head: int, kv_head: int) -> list[float]:
    """The published rule in plain loops: attention of each window query, summed per token before the window."""
    prefix = prompt.length - prompt.query.shape[2]
    keys = prompt.keys[row, kv_head].tolist()
    votes = [0.0] * prefix
    for i, query in enumerate(prompt.query[row, query_head].tolist()):
        visible = keys[: prefix + i + 1]
        logits = [sum(a * b for a, b in zip(query, key, strict=True)) * prompt.rule.scaling for key in visible]
        norm = sum(math.exp(x) for x in logits)
        votes = [vote + math.exp(logits[s]) / norm for s, vote in enumerate(votes)]
    return votes


def naive_pool(votes: list[float], kernel: int, how: str) -> list[float]:
    half, pooled = kernel // 2, []
    for s in range(len(votes)):
        around = [votes[c] for c in range(s - half, s + half + 1) if 0 <= c < len(votes)]
        pooled.append(max(around) if how == "max" else sum(around) / kernel)
    return pooled


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("reduce", ["mean", "max", "sum"])
def test_kept_tokens_match_naive_loops(pooling, reduce):
    prompt, w, kernel, budget = random_prompt(), 6, 5, 20
    kept = (
        EvictionPolicy(SnapKV(window=w, kernel=kernel, pooling=pooling, group_reduce=reduce), budget)
        .select(prompt)
        .slots
    )
    combine = {"mean": lambda p: sum(p) / 2, "max": max, "sum": sum}[reduce]
    for row in range(2):
        for head in range(2):
            pair = [naive_window_sums(prompt, row, j, head) for j in (2 * head, 2 * head + 1)]
            pooled = naive_pool([combine(p) for p in zip(*pair, strict=True)], kernel, pooling)
            best = sorted(pooled, reverse=True)[: budget - w]
            ours = [pooled[s] for s in kept[row, head, : budget - w].tolist()]
            assert sorted(ours, reverse=True) == pytest.approx(best, rel=1e-9)
            assert kept[row, head, budget - w :].tolist() == list(range(prompt.length - w, prompt.length))


def test_a_planted_needle_and_its_neighbours_are_kept():
    prompt = random_prompt()
    needle = 17
    prompt.keys[:, :, needle] = 20 * prompt.query.mean(2).unflatten(1, (2, 2)).mean(2)
    kept = EvictionPolicy(SnapKV(window=6, kernel=5, pooling="max"), 14).select(prompt).slots
    for head in kept[0].tolist():
        assert set(range(needle - 2, needle + 3)) <= set(head)


def test_window_queries_are_causal():
    prompt = random_prompt()
    before = window_attention(prompt)
    prompt.keys[:, :, -2] += 5.0  # the second-last key: visible to the last two queries alone
    after = window_attention(prompt)
    assert torch.equal(before[:, :, :-2], after[:, :, :-2])
    assert not torch.equal(before[:, :, -2:], after[:, :, -2:])


def test_granularities_agree_for_multi_head_attention():
    prompt = random_prompt(query_heads=4, kv_heads=4)
    options = {"budget": 20, "window": 6, "kernel": 5, "pooling": "avg"}
    per_kv = snapkv_policy(granularity="kv_head", **options).select(prompt).slots
    assert torch.equal(per_kv, snapkv_policy(granularity="query_head", **options).select(prompt).slots)


def test_equal_query_heads_score_as_one_head():
    """GQA with equal query heads in each group gives the scores of multi-head attention."""
    prompt = random_prompt(query_heads=2, kv_heads=2)
    doubled = Prompt(prompt.query.repeat_interleave(2, 1), prompt.keys, prompt.values, prompt.rule, 0, 1)
    options = {"budget": 20, "window": 6, "kernel": 5, "pooling": "avg"}
    assert torch.equal(snapkv_policy(**options).select(prompt).slots, snapkv_policy(**options).select(doubled).slots)


def test_reduce_groups_takes_neighbouring_query_heads():
    scores = torch.tensor([[[1.0], [3.0], [10.0], [20.0]]])
    prompt = random_prompt(query_heads=4, kv_heads=2)
    assert prompt.reduce_groups(scores).flatten().tolist() == [2.0, 15.0]
    assert prompt.reduce_groups(scores, "max").flatten().tolist() == [3.0, 20.0]
    assert prompt.reduce_groups(scores, "sum").flatten().tolist() == [4.0, 30.0]


@pytest.mark.parametrize("path", sorted(Path(snapkv.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_scorers_reduce_over_a_group_by_the_prompt_s_function(path):
    assert "prompt.groups" not in path.read_text(encoding="utf-8").replace("repeat_interleave(prompt.groups", "")


def test_a_budget_of_the_whole_prompt_is_bit_identical_to_full():
    model, ids = tiny_model(), prompt_ids(60)
    a, b = Method("full").new_cache(model), Method("snapkv", EvictionPolicy(SnapKV(), 60)).new_cache(model)
    assert torch.equal(prefill(model, a, ids), prefill(model, b, ids))
    for step in range(4):
        token = prompt_ids(1, seed=step)[0]
        assert torch.equal(decode(model, a, token), decode(model, b, token))


def test_each_step_adds_one_token_at_the_true_position():
    model, ids = tiny_model(), prompt_ids(60)
    cache = Method("snapkv", EvictionPolicy(SnapKV(), 40)).new_cache(model)
    prefill(model, cache, ids)
    for step in range(5):
        assert all((t == 40 + step).all() for t in cache.tokens_held)
        assert cache.next_positions().tolist() == [60 + step]
        decode(model, cache, prompt_ids(1, seed=step)[0])


def test_second_generation_compresses_as_the_first():
    """In the published code the second call kept a stale length and compressed nothing."""
    model, method = tiny_model(), Method("snapkv", EvictionPolicy(SnapKV(), 40))
    outputs = []
    for _ in range(2):
        cache = method.new_cache(model)
        outputs.append(generate(model, cache, prompt_ids(60), max_new_tokens=5).tokens)
        assert all((t == 44).all() for t in cache.tokens_held)  # the fifth token is never fed
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(("fraction", "length", "kept"), [(0.5, 60, 30), (0.1, 4, 1), (0.1, 60, 6), (1.0, 60, 60)])
def test_a_fraction_is_of_each_rows_own_prompt(fraction, length, kept):
    assert resolve_budget(fraction, length) == kept
    model = tiny_model()
    cache = Method("snapkv", EvictionPolicy(SnapKV(), fraction)).new_cache(model)
    prefill(model, cache, prompt_ids(length))
    assert all((t == kept).all() for t in cache.tokens_held)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"budget": 0}, "method.budget"),
        ({"budget": -3}, "method.budget"),
        ({"budget": 1.5}, "method.budget"),
        ({"budget": 0.0}, "method.budget"),
        ({"budget": True}, "method.budget"),
        ({"budget": "many"}, "method.budget"),
        ({"budget": 16}, "method.budget"),
        ({"window": 0}, "method.scorer.window"),
        ({"kernel": 4}, "method.scorer.kernel"),
        ({"kernel": 0}, "method.scorer.kernel"),
        ({"pooling": "median"}, "method.scorer.pooling"),
        ({"granularity": "layer"}, "method.scorer.granularity"),
        ({"group_reduce": "min"}, "method.scorer.group_reduce"),
    ],
)
def test_invalid_values_name_the_key(options, key):
    with pytest.raises(InputError) as error:
        snapkv_policy(**options)
    assert error.value.key == key
    assert "\n" not in str(error.value)


def test_score_dtype_model_rounds_the_attention_before_the_sum():
    g = torch.Generator().manual_seed(3)
    query, keys = (torch.randn(1, h, n, 16, generator=g).bfloat16() for h, n in ((4, 8), (2, 200)))
    prompt = Prompt(query, keys, keys, LogitRule(0.25), 0, 1)
    rounded = SnapKV(window=8, kernel=1, score_dtype="model").score(prompt)[..., :192]
    attention = window_attention(prompt).bfloat16()
    expected = attention.double().sum(2)[..., :192].unflatten(1, (2, 2)).mean(2)
    assert ((rounded.double() - expected).abs() <= expected * 2**-8).all()  # one rounding of the sum
    exact = SnapKV(window=8, kernel=1).score(prompt)[..., :192]
    assert not torch.equal(rounded, exact)
    assert EvictionPolicy(SnapKV(window=8, score_dtype="model"), 20).select(prompt).slots.shape == (1, 2, 20)


def test_methods_sharing_a_prefill_compute_window_attention_once(monkeypatch):
    """Five budgets of SnapKV and two methods with its scorer compute window attention once per layer."""
    calls = []
    monkeypatch.setattr(
        prompt_attention, "window_attention", lambda prompt: calls.append(1) or window_attention(prompt)
    )
    model = tiny_model()
    methods = [Method("x", EvictionPolicy(SnapKV(window=8), b)) for b in (10, 20, 30, 40, 50)]
    methods += [Method("x", pyramidkv(budget=20, window=8)), Method("x", ada_kv(budget=20, window=8), Ragged())]
    prefill(model, FanOutCache([m.new_cache(model) for m in methods]), prompt_ids(60))
    assert len(calls) == model.config.num_hidden_layers
