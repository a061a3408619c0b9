"""H2O and TOVA against naive simulators in float64 that recompute everything from stored rows."""

from __future__ import annotations

import pytest
import torch
from golden import golden_prompt
from tiny_models import left_pad, prompt_ids, tiny_model

from kvbench.conf.errors import InputError
from kvbench.methods.cache import prompt_sums
from kvbench.methods.cache.fan_out import FanOutCache
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.method import Method
from kvbench.methods.cache.prompt import Prompt
from kvbench.methods.cache.prompt_sums import attention_received
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.model_layer import ModelLayer
from kvbench.methods.policies.policy import Step
from kvbench.methods.policies.pyramid_infer.policy import PyramidInfer
from kvbench.methods.policies.schedules.after_prefill import AfterPrefill
from kvbench.methods.policies.scorers import attention_sums, last_query
from kvbench.methods.policies.scorers.attention_sums import AttentionSums
from kvbench.methods.policies.scorers.expected_attention import ExpectedAttention
from kvbench.methods.policies.scorers.last_query import LastQuery
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.methods.policies.streaming_llm import StreamingLLM
from kvbench.methods.storage import dense
from kvbench.methods.storage.dense import DenseLayer
from kvbench.runners.engine import decode, prefill

D = 8


def h2o(*args, **options):
    return EvictionPolicy(AttentionSums(), *args, **options)


def tova(*args, **options):
    return EvictionPolicy(LastQuery(), *args, **options)


def test_golden_sets_of_h2o(golden):
    kept = EvictionPolicy(AttentionSums(), 12, recent=1 / 3).select(golden_prompt(window=40))
    assert kept.slots[0].tolist() == golden["h2o_prefill recent=4 heavy=8 (full causal accumulation)"]
    assert torch.equal(kept.scores, attention_received(golden_prompt(window=40)).gather(-1, kept.slots))


def test_golden_set_of_tova(golden):
    kept = EvictionPolicy(LastQuery(), 12).select(golden_prompt(window=1)).slots[0]
    assert kept.tolist() == [golden["tova cache=12 (prefill reduce)"]] * 4


def random_prompt(query_heads: int, kv_heads: int, length: int, seed: int = 0) -> Prompt:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(1, h, length, D, generator=g, dtype=torch.float64) for h in (query_heads, kv_heads, kv_heads)
    )
    return Prompt(3 * q, k, v, LogitRule(D**-0.5), 0, 1)


def causal_matrix(prompt: Prompt) -> torch.Tensor:
    """[H_q, T, T], row by row."""
    out = torch.zeros(prompt.query.shape[1], prompt.length, prompt.length, dtype=torch.float64)
    for j in range(out.shape[0]):
        for i in range(prompt.length):
            logits = prompt.keys[0, j // prompt.groups, : i + 1] @ prompt.query[0, j, i] * prompt.rule.scaling
            out[j, i, : i + 1] = logits.softmax(0)
    return out


@pytest.mark.parametrize("block", [1, 7, 64])
def test_blockwise_column_sums_match_the_full_matrix(monkeypatch, block):
    monkeypatch.setattr(prompt_sums, "QUERY_BLOCK", block)
    prompt = random_prompt(4, 2, 23)
    expected = causal_matrix(prompt).sum(1).unflatten(0, (2, 2)).mean(1)
    assert (attention_received(prompt)[0].double() - expected).abs().max() < 1e-5


def test_column_sums_are_causal_and_add_up_to_the_queries():
    prompt = random_prompt(2, 2, 19)
    sums = attention_received(prompt)
    assert sums.sum(-1)[0].tolist() == pytest.approx([19.0, 19.0], rel=1e-5)
    shorter = Prompt(prompt.query[:, :, :12], prompt.keys[:, :, :12], prompt.values[:, :, :12], prompt.rule, 0, 1)
    later = prompt.query.clone()
    later[:, :, 12:] += 5.0  # what later queries look at moves no earlier row
    changed = Prompt(later, prompt.keys, prompt.values, prompt.rule, 0, 1)
    assert torch.allclose(causal_matrix(changed)[:, :12], causal_matrix(prompt)[:, :12])
    assert torch.all(sums[0, :, :12] >= attention_received(shorter)[0] - 1e-5)


def stream(selection, prompt: Prompt, steps: int, query_heads: int, kv_heads: int):
    """Feed a prompt and ``steps`` tokens through one layer; yields (q, k, v, output, stored keys, scores)."""
    storage, state = DenseLayer(), selection.new_state(ModelLayer(0, 0, 1, lambda: None))
    kept = selection.select(prompt, state)
    slots = torch.arange(prompt.length).expand(1, kv_heads, -1) if kept.slots is None else kept.slots
    index = slots[..., None].expand(-1, -1, -1, D)
    storage.write(prompt.keys.gather(2, index), prompt.values.gather(2, index))
    selection.after_prompt(state, storage, torch.tensor([prompt.length]), kept.scores)
    g = torch.Generator().manual_seed(99)
    for _ in range(steps):
        q, k, v = (torch.randn(1, h, 1, D, generator=g, dtype=torch.float64) for h in (query_heads, kv_heads, kv_heads))
        q = 3 * q
        storage.append(k, v)
        step = Step(q, LogitRule(D**-0.5))
        out = selection.attend(state, storage, step)
        selection.after_attention(state, storage, step)
        keys, _, valid = storage.read()
        real = torch.ones(1, 1, keys.shape[2], dtype=torch.bool) if valid is None else valid
        real = real.expand(1, kv_heads, -1)[0]
        scores = None if state.scores is None else [state.scores[0, h][real[h]] for h in range(kv_heads)]
        yield q, k, v, out, [keys[0, h][real[h]] for h in range(kv_heads)], scores


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("length", [6, 12, 30])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("hidden", [1, 4])
def test_h2o_matches_the_naive_simulator(query_heads, kv_heads, length, share, hidden, monkeypatch):
    """A simulator with one Python list per head keeps the same positions; a step attends before it evicts."""
    monkeypatch.setattr(dense, "COMPACTION_INTERVAL_STEPS", hidden)  # gaps are closed at every step, or at every fourth
    budget, steps = 12, 15
    prompt = random_prompt(query_heads, kv_heads, length)
    recent, groups = int(share * budget), query_heads // kv_heads
    matrix = causal_matrix(prompt)
    keys = [list(prompt.keys[0, h]) for h in range(kv_heads)]
    values = [list(prompt.values[0, h]) for h in range(kv_heads)]
    sums = matrix.sum(1).unflatten(0, (kv_heads, groups)).mean(1)
    score = [sums[h].tolist() for h in range(kv_heads)]
    held = [list(range(length)) for _ in range(kv_heads)]

    def evict(h: int) -> None:
        while len(held[h]) > budget:
            older = held[h][: len(held[h]) - recent]
            held[h].remove(min(older, key=lambda t: score[h][t]))

    def evict_prompt(h: int) -> None:
        older = sorted(held[h][: length - recent], key=lambda t: -score[h][t])[: budget - recent]
        held[h] = sorted(older) + held[h][length - recent :]

    for h in range(kv_heads):
        if length > budget:
            evict_prompt(h)
    for i, (q, k, v, out, stored, scores) in enumerate(
        stream(EvictionPolicy(AttentionSums(), budget, recent=share), prompt, steps, query_heads, kv_heads)
    ):
        for h in range(kv_heads):
            keys[h].append(k[0, h, 0])
            values[h].append(v[0, h, 0])
            score[h].append(0.0)
            held[h].append(length + i)
            for j in range(groups):
                head = h * groups + j
                weights = (torch.stack([keys[h][t] for t in held[h]]) @ q[0, head, 0] * D**-0.5).softmax(0)
                expected = weights @ torch.stack([values[h][t] for t in held[h]])
                assert (out[0, head, 0] - expected).abs().max() < 1e-9
                for t, weight in zip(held[h], weights.tolist(), strict=True):
                    score[h][t] += weight / groups
            evict(h)
            assert torch.equal(stored[h], torch.stack([keys[h][t] for t in held[h]])), f"step {i}, head {h}"
            assert held[h][-1] == length + i or recent == 0
            assert scores[h].tolist() == pytest.approx([score[h][t] for t in held[h]], abs=1e-4)


@pytest.mark.parametrize("length", [6, 12, 30])
@pytest.mark.parametrize("hidden", [1, 4])
def test_tova_matches_the_naive_simulator(length, hidden, monkeypatch):
    monkeypatch.setattr(dense, "COMPACTION_INTERVAL_STEPS", hidden)
    budget, query_heads, kv_heads = 12, 4, 2
    prompt = random_prompt(query_heads, kv_heads, length)
    last = causal_matrix(prompt)[:, -1].mean(0)
    keys = [prompt.keys[0, :, t] for t in range(length)]  # [H_kv, D] each
    held = sorted(sorted(range(length), key=lambda t: -last[t])[:budget])
    for i, (q, k, _, _, stored, _) in enumerate(
        stream(EvictionPolicy(LastQuery(), budget), prompt, 15, query_heads, kv_heads)
    ):
        keys.append(k[0, :, 0])
        held.append(length + i)
        worth = torch.zeros(len(held), dtype=torch.float64)
        for j in range(query_heads):
            logits = torch.stack([keys[t][j // 2] for t in held]) @ q[0, j, 0] * D**-0.5
            worth += logits.softmax(0) / query_heads
        if len(held) > budget:
            del held[int(worth.argmin())]
        assert torch.equal(torch.stack(stored), torch.stack([keys[t] for t in held], dim=1)), f"step {i}"
        assert len(stored[0]) == min(length + i + 1, budget)


def test_h2o_without_heavy_hitters_is_a_sliding_window():
    model = tiny_model()
    cache = Method("h2o", EvictionPolicy(AttentionSums(), 10, recent=1.0)).new_cache(model)
    prefill(model, cache, prompt_ids(30))
    before = cache.layers[0].storage.read()[0].clone()
    decode(model, cache, torch.tensor([5]))
    after, _, valid = cache.layers[0].storage.read()
    assert valid.sum(-1).unique().tolist() == [10]
    assert torch.equal(after[:, :, 1:-1], before[:, :, 1:])
    assert not valid[:, :, 0].any()


@pytest.mark.parametrize(
    "selection",
    [
        EvictionPolicy(AttentionSums(), 0.5),
        EvictionPolicy(LastQuery(), 0.5),
        EvictionPolicy(AttentionSums(), 11),
        EvictionPolicy(LastQuery(), 11),
    ],
    ids=str,
)
def test_rows_of_different_lengths_have_their_own_limits(selection):
    """A fraction of each prompt, or one number that only the longer prompts reach."""
    model, method = tiny_model(), Method("x", selection)
    prompts = [prompt_ids(30, 1), prompt_ids(8, 2), prompt_ids(17, 3)]
    ids, mask = left_pad(prompts)
    cache = method.new_cache(model)
    prefill(model, cache, ids, mask)
    for i in range(12):
        decode(model, cache, torch.tensor([3 + i, 4 + i, 5 + i]))
        for held in cache.tokens_held:
            expected = [
                min(p.shape[1] + i + 1, 11 if selection.budget == 11 else int(p.shape[1] / 2 + 0.5)) for p in prompts
            ]
            assert held[:, 0].tolist() == expected


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (h2o, {"recent": 1.5}),
        (h2o, {"recent": "half"}),
        (h2o, {"recent": -1}),
        (h2o, {"budget": 0}),
        (h2o, {"sinks": -1}),
        (h2o, {"sinks": 8, "budget": 8}),
        (tova, {"sinks": True}),
        (PyramidInfer, {"prefill_only": "once"}),
    ],
)
def test_bad_settings(rule, options):
    with pytest.raises(InputError, match=r"method\."):
        rule(**options)


@pytest.mark.parametrize("rule", [h2o, tova], ids=lambda r: r.__name__)
def test_after_prefill_keeps_all_generated_tokens(rule):
    model, ids = tiny_model(), prompt_ids(30)
    caches = [
        Method("x", rule(11, **({"schedule": AfterPrefill()} if only else {}))).new_cache(model)
        for only in (False, True)
    ]
    for cache in caches:
        prefill(model, cache, ids)
    for every, once in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(every.storage.read()[0], once.storage.read()[0])
    for i in range(20):
        for cache in caches:
            decode(model, cache, torch.tensor([3 + i]))
    assert all((t == 11).all() for t in caches[0].tokens_held)
    assert all((t == 31).all() for t in caches[1].tokens_held)
    assert all(not list(layer.policy.state_tensors(layer.state)) for layer in caches[1].layers)


def test_pyramid_infer_trigger_never_keeps_all_generated_tokens():
    assert PyramidInfer(prefill_only=True) == PyramidInfer(trigger="never")
    ours, other = (Method("x", PyramidInfer(**o)).identity() for o in ({"prefill_only": True}, {"trigger": "never"}))
    assert ours == other


@pytest.mark.parametrize(
    "selection",
    [
        EvictionPolicy(AttentionSums(), 11),
        EvictionPolicy(AttentionSums(), 0.5),
        EvictionPolicy(LastQuery(), 11),
        StreamingLLM(11),
        StreamingLLM(0.5, mode="prefill_evict"),
    ],
    ids=str,
)
def test_result_is_independent_of_compaction_times(selection, monkeypatch):
    """In a padded batch over 20 steps, with a compaction at every step, at every fifth, and never."""
    model, method = tiny_model(), Method("x", selection)
    ids, mask = left_pad([prompt_ids(30, 1), prompt_ids(8, 2), prompt_ids(17, 3)])
    logits, held = {}, {}
    for hidden in (1, 5, 64):
        monkeypatch.setattr(dense, "COMPACTION_INTERVAL_STEPS", hidden)
        cache = method.new_cache(model)
        logits[hidden] = [prefill(model, cache, ids, mask)]
        logits[hidden] += [decode(model, cache, torch.tensor([3 + i, 4 + i, 5 + i])) for i in range(20)]
        held[hidden] = torch.stack([t.expand(-1, 2) for t in cache.tokens_held])
    for hidden in (5, 64):
        assert (torch.stack(logits[hidden]) - torch.stack(logits[1])).abs().max() < 1e-9
        assert torch.equal(held[hidden], held[1])


@pytest.mark.parametrize(
    ("scorer", "module", "work"),
    [
        (AttentionSums(), attention_sums, "attention_received"),
        (ExpectedAttention(), ExpectedAttention, "_scores"),
        (LastQuery(), last_query, "window_attention"),
        (SnapKV(window=4), SnapKV, "_window_sums"),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_budgets_that_share_a_prefill_share_the_scores(scorer, module, work, monkeypatch):
    """What is costly is worked out once a layer, whatever the number of budgets."""
    calls = []
    compute = getattr(module, work)
    monkeypatch.setattr(module, work, lambda *args: calls.append(args) or compute(*args))
    model, ids = tiny_model(), prompt_ids(40, 1)
    caches = [Method(f"{n}", EvictionPolicy(scorer, n)).new_cache(model) for n in (12, 16, 20)]
    prefill(model, FanOutCache(caches), ids)
    assert len(calls) == model.config.num_hidden_layers
    assert [int(cache.tokens_held[0][0, 0]) for cache in caches] == [12, 16, 20]
