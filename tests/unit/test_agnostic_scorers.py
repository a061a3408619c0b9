"""CurDKV, leverage, Compactor, DuoAttention in float64 loops; published sets are in ``test_golden_newer.py``."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from golden import newer_entries
from spy import watch
from tiny_models import left_pad, prompt_ids, tiny_model

from kvbench.conf.errors import InputError
from kvbench.conf.versions import older_parts
from kvbench.methods.cache.fan_out import FanOutCache
from kvbench.methods.cache.kv_shape import kv_shape
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.prompt import Prompt
from kvbench.methods.cache.rotary import Rotary
from kvbench.methods.policies import eviction
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.model_layer import ModelLayer
from kvbench.methods.policies.schedules.every_step import EveryStep
from kvbench.methods.policies.scorers.base import Scorer
from kvbench.methods.policies.scorers.compactor import Compactor, chunk_attention
from kvbench.methods.policies.scorers.cur import CUR
from kvbench.methods.policies.scorers.duo_attention import DuoAttention
from kvbench.methods.policies.scorers.leverage import Leverage
from kvbench.methods.policies.scorers.random_tokens import RandomTokens
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import decode, prefill

ENTRIES = newer_entries()
LAYERS: list[dict[str, Any]] = ENTRIES["layers"]
ROTARY = Rotary(10000.0 ** (-torch.arange(8) / 8))
LAYER = ModelLayer(0, 0, 1, lambda: ROTARY)
D = 16


def kept(scorer: Scorer, prompt: Prompt, budget: int, **protected: int) -> list[list[int]]:
    """Tokens that each head of the only row keeps."""
    policy = EvictionPolicy(scorer, budget, **protected)
    slots = policy.select(prompt, policy.new_state(LAYER)).slots
    assert slots is not None
    sets: list[list[int]] = slots[0].tolist()
    return sets


def random_prompt(length: int = 45, heads: int = 2, groups: int = 2) -> Prompt:
    g = torch.Generator().manual_seed(length)
    query, keys, values = (
        torch.randn(1, n, length, D, generator=g, dtype=torch.float64) for n in (heads * groups, heads, heads)
    )
    return Prompt(query, keys, values, LogitRule(D**-0.5), 0, 1)


# CurDKV ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "local"), [(45, 16), (32, 16), (7, 16), (45, None)])
def test_cur_is_the_naive_product(length, local):
    """The last block is shorter than the others."""
    prompt = random_prompt(length)
    ours = CUR(local=local).score(prompt)
    for h in range(2):
        products = []
        for t in range(length):
            block = range(length) if local is None else range(t // local * local, min(length, (t // local + 1) * local))
            product = 1.0
            for x in (prompt.keys[0, h], prompt.values[0, h]):
                total = 1.0 if local is None else sum(float((x[i] ** 2).sum()) for i in block)
                product *= float((x[t] ** 2).sum()) / total
            products.append(product)
        assert ours[0, h].tolist() == pytest.approx([p / sum(products) for p in products], rel=1e-4)


def test_cur_of_zero_vectors_is_zero():
    zeros = torch.zeros(1, 1, 36, D)
    scores = CUR().score(Prompt(zeros[:, :, :0], zeros, zeros, LogitRule(1.0), 0, 1))
    assert torch.equal(scores, torch.zeros(1, 1, 36))


# leverage -------------------------------------------------------------------------------------------------------------


def test_leverage_is_the_naive_quadratic_form():
    prompt, scorer = random_prompt(), Leverage(sketch=12)
    ours = scorer.score(prompt, ROTARY)[0]
    sketch, scores = scorer.gaussian(0, 2, D).double(), []
    for h in range(2):
        keys = []
        for t, key in enumerate(prompt.keys[0, h].tolist()):  # rotate each pair of channels back by t positions
            turned = list(key)
            for i in range(8):
                angle = -t * 10000.0 ** (-i / 8)
                turned[i] = key[i] * math.cos(angle) - key[i + 8] * math.sin(angle)
                turned[i + 8] = key[i + 8] * math.cos(angle) + key[i] * math.sin(angle)
            keys.append(turned)
        x = torch.tensor(keys, dtype=torch.float64)
        x = (x - x.mean(0)) @ sketch[h] / math.sqrt(12)
        inverse = torch.linalg.inv(x.T @ x + 0.01 * torch.eye(12, dtype=torch.float64))
        scores.append([float(row @ inverse @ row) for row in x])
    flat = torch.tensor(scores, dtype=torch.float64)
    expected = (flat - flat.mean()) / flat.flatten().std()
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


def test_leverage_does_not_depend_on_an_offset_of_all_keys():
    """An offset before RoPE, that is; and the sum without a ridge is the rank of the keys."""
    prompt, position = random_prompt(), torch.arange(45)[None]
    before = ROTARY.rotate(prompt.keys, -position) + torch.linspace(-2, 5, D)
    moved = Prompt(prompt.query, ROTARY.rotate(before, position), prompt.values, prompt.rule, 0, 1)
    a, b = (Leverage().score(p, ROTARY) for p in (prompt, moved))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_leverage_of_equal_keys_is_zero():
    keys = torch.ones(1, 1, 20, D)
    keys = ROTARY.rotate(keys, torch.arange(20)[None])
    scores = Leverage().score(Prompt(keys[:, :, :0], keys, keys, LogitRule(1.0), 0, 1), ROTARY)
    assert scores.abs().max() < 1e-3


# Compactor ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [10, 20, 64])
def test_attention_within_chunks_is_the_naive_sum(chunk):
    """No factor on the logits, no causal mask; the last chunk is shorter, or there is only one."""
    prompt = random_prompt()
    totals = torch.zeros(2, 45, dtype=torch.float64)
    for h in range(2):
        for start in range(0, 45, chunk):
            tokens = range(start, min(45, start + chunk))
            for head in (2 * h, 2 * h + 1):
                for i in tokens:
                    logits = torch.stack([prompt.query[0, head, i] @ prompt.keys[0, h, t] for t in tokens])
                    totals[h, start : start + chunk] += logits.softmax(0) / 2
        totals[h] *= prompt.values[0, h].norm(dim=-1)
    padded = torch.nn.functional.pad(totals, (1, 1))
    pooled = torch.stack([padded[:, t : t + 3].sum(1) / 3 for t in range(45)], dim=1)
    expected = (pooled - pooled.mean()) / pooled.flatten().std()
    torch.testing.assert_close(chunk_attention(prompt, chunk)[0].double(), expected, rtol=1e-4, atol=1e-4)


def test_compactor_is_leverage_and_attention_of_the_tokens_between():
    prompt = random_prompt(60)
    middle = Prompt(*(x[:, :, 8:56] for x in (prompt.query, prompt.keys, prompt.values)), prompt.rule, 0, 1)
    leverage = Leverage().standardized_leverage(middle, ROTARY, torch.arange(8, 56))
    attention = chunk_attention(middle, 16)
    for blending, kept_tokens, factor in ((0.35, None, 0.35), (None, 24, 0.6), (None, None, 0.0)):
        scorer = Compactor(chunk=16, blending=blending)
        scores = scorer.score(
            Prompt(prompt.query, prompt.keys, prompt.values, prompt.rule, 0, 1, protected=4, kept=kept_tokens), ROTARY
        )
        torch.testing.assert_close(scores[:, :, 8:56], factor * leverage + attention)


@pytest.mark.parametrize("length", [1, 12, 13, 14])
def test_compactor_of_short_prompts_is_finite(length):
    assert Compactor().score(replace(random_prompt(length), protected=min(4, length)), ROTARY).isfinite().all()


@pytest.mark.parametrize("scorer", [Leverage(), Compactor(), DuoAttention()], ids=lambda s: s.name)
def test_keys_before_rope_are_not_there_while_decoding(scorer):
    with pytest.raises(
        InputError, match=r"^method/schedule=every_step: .*needs the complete prompt; use after_prefill"
    ):
        EvictionPolicy(scorer, 512, schedule=EveryStep())


# DuoAttention ---------------------------------------------------------------------------------------------------------


def rotated(vector: list[float], by: int) -> list[float]:
    """RoPE of the golden model, pair by pair."""
    out = list(vector)
    for i in range(8):
        angle = by * 10000.0 ** (-i / 8)
        out[i] = vector[i] * math.cos(angle) - vector[i + 8] * math.sin(angle)
        out[i + 8] = vector[i + 8] * math.cos(angle) + vector[i] * math.sin(angle)
    return out


def test_reach_is_the_naive_mean_of_attention_sums():
    prompt, places = random_prompt(), 60
    ours = DuoAttention(places).score(prompt, ROTARY)[0]
    for h in range(2):
        key = torch.tensor([rotated(k, -t) for t, k in enumerate(prompt.keys[0, h].tolist())]).mean(0).tolist()
        reach = 0.0
        for j in (2 * h, 2 * h + 1):
            query = torch.tensor([rotated(q, -t) for t, q in enumerate(prompt.query[0, j].tolist())]).mean(0).tolist()
            query = rotated(query, places - 1)
            exps = [
                math.exp(sum(a * b for a, b in zip(query, rotated(key, p), strict=True)) / math.sqrt(D))
                for p in range(places)
            ]
            reach += sum(sum(exps[: p + 1]) / sum(exps) for p in range(places)) / places / 2
        assert ours[h].tolist() == pytest.approx([reach] * 45, rel=1e-4)


def test_reach_of_uniform_attention_is_about_one_half():
    prompt = random_prompt()
    flat = replace(prompt, query=torch.zeros_like(prompt.query))
    assert DuoAttention(500).score(flat, ROTARY)[0].tolist()[0] == pytest.approx([501 / 1000] * 45)


def test_far_reaching_heads_keep_all_tokens_and_the_others_sinks_and_recent_ones():
    model, length, sinks, recent = tiny_model(), 70, 4, 8
    count = 2 * len(model.model.layers)
    budget = (3 * length + (count - 3) * (sinks + recent)) // count  # three heads keep all
    method = named_method(f"duo_attention budget={budget} sinks={sinks} recent={recent}")
    cache = method.new_cache(model)
    prefill(model, cache, prompt_ids(length))
    held = sorted(int(n) for layer in cache.tokens_held for n in layer[0].expand(2))
    assert sum(held) == budget * count
    assert held[-3:-1] == [length] * 2 and held[: count - 4] == [sinks + recent] * (count - 4)


def test_streaming_heads_keep_their_length_and_the_others_grow():
    """While decoding, in a batch: streaming heads hold first and last positions, one of them more, the others all."""
    model, lengths, sinks, recent, steps = tiny_model(), (70, 41), 4, 8, 13
    method = named_method(f"duo_attention budget=0.5 sinks={sinks} recent={recent} schedule=streaming_heads")
    assert method.label == "duo_attention 0.5 + streaming_heads"
    count = len(model.model.layers) * model.config.num_key_value_heads
    ids, mask = left_pad([prompt_ids(length, length) for length in lengths])
    cache = method.new_cache(model)
    witnesses = watch(cache, mask)
    prefill(model, cache, ids, mask)
    before = [witness.held_columns() for witness in witnesses]
    for step in range(steps):
        decode(model, cache, torch.full((2,), step))
    n_whole = [0, 0]
    for was, witness in zip(before, witnesses, strict=True):
        for row, heads in enumerate(witness.held_columns()):
            start = ids.shape[1] - lengths[row]
            seen = list(range(start, ids.shape[1] + steps))  # all columns but pads
            for kept, head in zip(was[row], heads, strict=True):
                is_whole = len(kept) == lengths[row]
                n_whole[row] += is_whole
                assert head == (seen if is_whole else [*kept[: len(kept) - recent], *seen[-recent:]])
    for row, length in enumerate(lengths):
        held = [len(head) for layer in before for head in layer[row]]
        assert sum(n == sinks + recent for n in held) >= count - n_whole[row] - 1
        budget, shape = (length + 1) // 2, kv_shape(model.config, model.dtype)
        assert n_whole[row] == count * (budget - sinks - recent) // (length - sinks - recent) > 0
        token = shape.token_channels * shape.element_bytes
        assert method.bytes_formula(shape, length, steps) == token * (count * budget + n_whole[row] * steps)


def test_streaming_heads_are_refused_where_no_head_keeps_all_or_heads_are_padded():
    with pytest.raises(InputError, match=r"method/schedule=streaming_heads: .*duo_attention.*global"):
        named_method("snapkv schedule=streaming_heads")
    with pytest.raises(InputError, match="floor=0"):
        named_method("duo_attention allocator.floor=0.1 schedule=streaming_heads")
    for storage in ("dense", "fp8", "turboquant"):
        with pytest.raises(InputError, match=f"method/storage={storage}.*: pads all heads.*use method/storage=ragged"):
            named_method(f"duo_attention schedule=streaming_heads storage={storage}")
    with pytest.raises(InputError, match="above 0: method/schedule=streaming_heads keeps that many"):
        named_method("duo_attention schedule=streaming_heads recent=0")


def test_a_held_budget_is_held_by_streaming_heads_too():
    assert named_method("duo_attention schedule=streaming_heads hold_budget=true").label == "duo_attention 0.5 + hold"


# random ---------------------------------------------------------------------------------------------------------------


def test_random_scores_are_drawn_for_each_prompt():
    prompt = random_prompt()
    a, b, again = (RandomTokens().score(replace(prompt, text_seeds=torch.tensor([n])), None) for n in (1, 2, 1))
    assert torch.equal(a, again) and not torch.equal(a, b)
    assert not torch.equal(a, RandomTokens(seed=1).score(replace(prompt, text_seeds=torch.tensor([1])), None))
    assert not torch.equal(a[0, 0], a[0, 1])


def test_the_engine_passes_a_hash_of_the_tokens_on(monkeypatch):
    """Prompts of one length keep other tokens; a prompt keeps the same ones in a padded batch and in a fan-out."""
    seen = []
    score = RandomTokens.score
    monkeypatch.setattr(
        RandomTokens, "score", lambda self, prompt, state: seen.append(prompt.text_seeds) or score(self, prompt, state)
    )
    model, prompts = tiny_model(), [prompt_ids(30, 1), prompt_ids(30, 2), prompt_ids(41, 3)]
    ids, mask = left_pad(prompts)
    method = named_method("random budget=20 recent=4")
    for cache in (method.new_cache(model), FanOutCache([method.new_cache(model), method.new_cache(model)])):
        seen.clear()
        prefill(model, cache, ids, mask)
        together = [seed for seeds in seen[:2] for seed in seeds.tolist()]  # rows of 41 tokens come first
        seen.clear()
        for prompt in prompts:
            prefill(model, method.new_cache(model), prompt)
        alone = [int(seeds) for seeds in seen[:: len(model.model.layers)]]
        assert together == [alone[2], *alone[:2]] and len(set(alone)) == 3


def draws_while_decoding(method, prompts: list[torch.Tensor], steps: int = 5) -> list[torch.Tensor]:
    """What ``random`` draws at each step in the last layer, after the prefill: [B, heads, slots] of each step."""
    model, scores = tiny_model(), []
    rescore = eviction.rescore
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eviction, "rescore", lambda *args: scores.append(rescore(*args)) or scores[-1])
        cache = method.new_cache(model)
        prefill(model, cache, *left_pad(prompts))
        assert not scores
        for step in range(steps):
            decode(model, cache, torch.full((len(prompts),), 5 + step))
    layers = len(model.model.layers)
    return [drawn for drawn, _ in scores[layers - 1 :: layers]]


@torch.inference_mode()
@pytest.mark.parametrize("more", ["", "allocator=adaptive storage=ragged recent=0"])
def test_random_scores_while_decoding_are_drawn_for_each_text_and_step(more):
    """All texts and all steps once had the draws of seed 0, and heads that are scored alone those of one another."""
    method = named_method(f"random budget=20 recent=4 schedule=every_step {more}")
    draws = draws_while_decoding(method, [prompt_ids(30, 1), prompt_ids(30, 2)])
    assert len(draws) == 5
    vectors = [head[head.isfinite()] for drawn in draws for row in drawn for head in row]
    for i, x in enumerate(vectors):
        for y in vectors[:i]:
            n = min(len(x), len(y), 5)
            assert n and not torch.equal(x[:n], y[:n])


@torch.inference_mode()
@pytest.mark.parametrize("schedule", ["every_step", "every_n schedule.n=2"])
def test_random_draws_of_a_batch_are_those_of_single_texts(schedule):
    method = named_method(f"random budget=20 recent=4 schedule={schedule}")
    prompts = [prompt_ids(30, 1), prompt_ids(41, 2), prompt_ids(30, 3)]
    together = draws_while_decoding(method, prompts)
    assert together
    for row, prompt in enumerate(prompts):
        for drawn, alone in zip(together, draws_while_decoding(method, [prompt]), strict=True):
            assert torch.equal(drawn[row][drawn[row].isfinite()], alone[0][alone[0].isfinite()])


def test_the_version_of_random_says_whether_it_draws_while_decoding():
    """Draws for a prompt did not change with those while decoding."""
    of_prompt, ring = (named_method(f"random budget=40 {more}").identity() for more in ("", "schedule=ring"))
    decoding = named_method("random budget=40 schedule=every_step").identity()
    assert of_prompt["selection"]["version"] == ring["selection"]["version"] == 2
    assert decoding["selection"]["version"] == 3
    assert not older_parts(of_prompt) and not older_parts(ring) and not older_parts(decoding)
    assert older_parts({"selection": decoding["selection"] | {"version": 2}}) == ["selection"]
