"""Methods that are one scoring function: against their formulas in plain loops, and against a simulation."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_model
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kvbench.conf.errors import InputError
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.prompt import Prompt
from kvbench.methods.cache.rotary import Rotary
from kvbench.methods.policies.allocators.adaptive import Adaptive
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.eviction_state import EvictionState
from kvbench.methods.policies.model_layer import ModelLayer
from kvbench.methods.policies.scorers.expected_attention import ExpectedAttention
from kvbench.methods.policies.scorers.key_diff import KeyDiff
from kvbench.methods.policies.scorers.random_tokens import RandomTokens
from kvbench.methods.storage.ragged import Ragged
from kvbench.runners.config.methods import named_method

D = 16  # of the tiny models


ROTARY = Rotary(LlamaRotaryEmbedding(tiny_model().config).inv_freq)


def rotated(x: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Llama's own RoPE on [1, H, T, D], positions from ``start``."""
    rope = LlamaRotaryEmbedding(tiny_model().config).double()
    cos, sin = rope(x, torch.arange(start, start + x.shape[2])[None])
    return apply_rotary_pos_emb(x, x, cos.double(), sin.double())[0]


def random_prompt(
    length: int = 40, query_heads: int = 4, kv_heads: int = 2, bias: float = 1.0
) -> tuple[Prompt, torch.Tensor]:
    """A prompt whose queries have a mean and a covariance worth the name; and the queries before RoPE."""
    length, g = 40, torch.Generator().manual_seed(3)
    mix = torch.randn(query_heads, D, D, generator=g, dtype=torch.float64) / math.sqrt(D)
    raw = torch.randn(1, query_heads, length, D, generator=g, dtype=torch.float64) @ mix
    raw = raw + bias * torch.randn(1, query_heads, 1, D, generator=g, dtype=torch.float64)
    k, v = (torch.randn(1, kv_heads, length, D, generator=g, dtype=torch.float64) for _ in range(2))
    return Prompt(rotated(raw), rotated(k), v, LogitRule(D**-0.5), 1, 3), raw


def test_key_diff_is_minus_the_cosine_to_the_mean_direction():
    prompt, _ = random_prompt()
    scores = KeyDiff().score(prompt)
    for h in range(2):
        directions = [k / k.norm() for k in prompt.keys[0, h]]
        anchor = sum(directions) / len(directions)
        for t, k in enumerate(prompt.keys[0, h]):
            assert scores[0, h, t].item() == pytest.approx(-float(k @ anchor / k.norm() / anchor.norm()), abs=1e-5)


def test_key_diff_keeps_the_outlier():
    keys = torch.ones(1, 1, 20, D)
    keys[0, 0, 7] *= -1
    keys[0, 0, 12, ::2] *= -1
    prompt = Prompt(torch.zeros(1, 1, 0, D), keys, keys, LogitRule(1.0), 0, 1)
    assert EvictionPolicy(KeyDiff(), 2).select(prompt).slots.tolist() == [[[7, 12]]]


def test_random_scores_depend_on_seed_layer_and_length_alone():
    prompt, _ = random_prompt()
    other = Prompt(prompt.query * 2, prompt.keys + 1, prompt.values, LogitRule(1.0), 1, 3)
    deeper = Prompt(prompt.query, prompt.keys, prompt.values, LogitRule(1.0), 2, 3)
    kept = EvictionPolicy(RandomTokens(), 20, recent=4).select(prompt).slots
    assert torch.equal(kept, EvictionPolicy(RandomTokens(), 20, recent=4).select(other).slots)
    assert not torch.equal(kept, EvictionPolicy(RandomTokens(), 20, recent=4).select(deeper).slots)
    assert not torch.equal(kept, EvictionPolicy(RandomTokens(seed=1), 20, recent=4).select(prompt).slots)
    assert not torch.equal(kept[:, 0], kept[:, 1])
    assert kept[0, 0, -4:].tolist() == [36, 37, 38, 39]


def test_random_tokens_are_uniform():
    """Each of 36 candidates is kept 16 times in 36, over 400 seeds: within five standard deviations."""
    prompt, _ = random_prompt()
    count = torch.zeros(40)
    for seed in range(400):
        count += torch.bincount(
            EvictionPolicy(RandomTokens(seed=seed), 20, recent=4).select(prompt).slots[0, 0], minlength=40
        )
    share = 16 / 36
    assert (count[:36] - 400 * share).abs().max() < 5 * math.sqrt(400 * share * (1 - share))


def in_state(rotary: Rotary) -> EvictionState:
    return EvictionState(ModelLayer(1, 1, 3, lambda: rotary), rotary)


def naive_expected(prompt: Prompt, raw: torch.Tensor, method: ExpectedAttention) -> torch.Tensor:
    """The paper's closed form in loops, with Llama's own rotation one future position at a time."""
    length, sinks = prompt.length, method.sinks
    future = [
        rotated(torch.eye(D, dtype=torch.float64)[None, :, None], length + i)[0, :, 0] for i in range(method.future)
    ]
    rotation = sum(future) / method.future  # rows: unit vectors turned, averaged
    out = torch.zeros(prompt.keys.shape[1], length, dtype=torch.float64)
    for j in range(prompt.query.shape[1]):
        h = j // prompt.groups
        queries = raw[0, j, sinks:]
        mean = queries.mean(0)
        covariance = (queries - mean).T @ (queries - mean) / len(queries)
        mean, covariance = mean @ rotation, rotation.T @ covariance @ rotation
        z = torch.tensor(
            [float((k @ mean) * D**-0.5 + k @ covariance @ k / (2 * D)) for k in prompt.keys[0, h, sinks:]],
            dtype=torch.float64,
        ).softmax(0)
        out[h, sinks:] += z / prompt.groups
    out = (out + method.epsilon) * prompt.values[0].norm(dim=-1)
    out[:, :sinks] = torch.inf
    return out


@pytest.mark.parametrize(("sinks", "epsilon", "future"), [(4, 0.0, 16), (0, 0.02, 5), (4, 0.01, 512)])
def test_expected_attention_is_the_papers_closed_form(sinks, epsilon, future):
    prompt, raw = random_prompt()
    method = ExpectedAttention(sinks=sinks, epsilon=epsilon, future=future)
    ours = method.score(prompt, ROTARY)
    ours[..., :sinks] = torch.inf  # protected by the policy, whatever their score
    expected = naive_expected(prompt, raw, method)[None]
    finite = expected.isfinite()
    assert torch.equal(finite, ours.isfinite())
    assert torch.allclose(ours.double()[finite], expected[finite], rtol=1e-5, atol=0)


def test_epsilon_is_the_authors_and_gives_long_values_a_chance():
    """Their evaluation's 0.01, on the command line as in Python; 0, their class's default, ranks by attention first."""
    policy = named_method("expected_attention").policy
    assert ExpectedAttention().epsilon == policy.scorer.epsilon == 0.01
    assert policy.allocator == Adaptive(floor=0.2) and named_method("expected_attention").storage == Ragged()
    prompt, _ = random_prompt()
    state, keys, values = ROTARY, 3 * prompt.keys, prompt.values.clone()  # attention that peaks
    prompt = Prompt(prompt.query, keys, values, prompt.rule, 1, 3)
    attention = ExpectedAttention(sinks=0, epsilon=0.0).score(prompt, state)[0, 0] / values[0, 0].norm(dim=-1)
    least = int(attention.argmin())
    values[:, :, least] *= 20
    kept = {
        e: EvictionPolicy(ExpectedAttention(sinks=0, epsilon=e), 6).select(prompt, in_state(state)).slots[0, 0].tolist()
        for e in (0.0, 0.01)
    }
    assert least in kept[0.01] and least not in kept[0.0]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("expected_attention", "expected_attention 1024 (epsilon 0.01, adaptive)"),
        ("expected_attention budget=0.5 allocator=uniform storage=dense scorer.epsilon=0", "(epsilon 0, uniform)"),
        ("expected_attention schedule=every_n schedule.n=32", "(epsilon 0.01, adaptive) + every 32"),
        ("expected_attention storage=kivi4", "(epsilon 0.01, adaptive) + kivi4"),
        ("snapkv scorer=expected_attention", "snapkv 1024 + expected_attention (epsilon 0.01, uniform)"),
        ("ada_kv", "ada_kv 1024"),
        ("key_diff allocator=adaptive storage=ragged", "key_diff 1024 + adaptive"),
    ],
)
def test_labels_name_epsilon_and_allocation(text, label):
    assert named_method(text).label.endswith(label)


def test_expected_attention_ranks_as_sampled_queries_do():
    """Queries drawn from the prompt's distribution and turned to future positions pay attention in the same order."""
    prompt, raw = random_prompt(query_heads=1, kv_heads=1, bias=2.0)
    prompt = Prompt(prompt.query, prompt.keys, torch.ones_like(prompt.values), prompt.rule, 1, 3)
    method = ExpectedAttention(sinks=0, future=8)
    ours = method.score(prompt, ROTARY)[0, 0].double()
    mean, centred = raw[0, 0].mean(0), raw[0, 0] - raw[0, 0].mean(0)
    factor = torch.linalg.cholesky(centred.T @ centred / 40 + 1e-9 * torch.eye(D, dtype=torch.float64))
    g = torch.Generator().manual_seed(0)
    drawn = mean + torch.randn(4000, D, generator=g, dtype=torch.float64) @ factor.T
    total = torch.zeros(40, dtype=torch.float64)
    for position in range(40, 48):
        turned = rotated(drawn[None, :, None], position)[0, :, 0]
        total += (turned @ prompt.keys[0, 0].T * D**-0.5).exp().sum(0)
    ranks = [x.argsort().argsort().double() for x in (ours, total)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.9


def test_sinks_are_kept():
    prompt, _ = random_prompt()
    kept = EvictionPolicy(ExpectedAttention(sinks=4), 6).select(prompt, in_state(ROTARY)).slots
    assert kept[0, :, :4].tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: ExpectedAttention(future=0), "scorer.future"),
        (lambda: ExpectedAttention(sinks=-1), "scorer.sinks"),
        (lambda: ExpectedAttention(epsilon=-1.0), "scorer.epsilon"),
        (lambda: EvictionPolicy(KeyDiff(), recent=-1), "recent"),
        (lambda: EvictionPolicy(RandomTokens(), recent=1.5), "recent"),
        (lambda: RandomTokens(seed=-1), "scorer.seed"),
    ],
)
def test_bad_settings(make, key):
    with pytest.raises(InputError, match=rf"method\.{key}"):
        make()
