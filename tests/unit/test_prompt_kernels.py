"""Kernels of the prefill against float64 and against PyTorch, on a CUDA device or in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import left_pad, prompt_ids, tiny_model

from kvbench.methods.cache import prefill as prefill_module
from kvbench.methods.cache import prompt_kernel
from kvbench.methods.cache.layer import CacheLayer
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.products import causal_attention
from kvbench.methods.cache.prompt import Prompt
from kvbench.methods.policies import streaming_llm
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import decode, feed, prefill

pytest.importorskip("triton")
from kvbench.methods.storage.kernels import prompt as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
LENGTHS = (60, 22)


def make_prompt(rows, heads, group, dim, length, window, dtype, rule, strict=False, seed=0) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    query, keys = (
        torch.randn(rows, h, n, dim, generator=generator).to(DEVICE, dtype)
        for h, n in ((heads * group, window), (heads, length))
    )
    strictly_causal = None if not strict else torch.arange(group, device=DEVICE) % 2 == 0
    return Prompt(query, keys, keys, rule, 0, 1, strictly_causal)


def exact_weights(prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [R, H_q, w, T] and log-sum-exp [R, H_q, w] in float64."""
    query, keys, rule = prompt.query.double(), prompt.keys.double(), prompt.rule
    heads, w, length = query.shape[1], query.shape[2], keys.shape[2]
    logits = query @ keys.repeat_interleave(prompt.groups, 1).transpose(2, 3) * rule.scaling
    if rule.softcap is not None:
        logits = rule.softcap * (logits / rule.softcap).tanh()
    position = torch.arange(length - w, length, device=query.device)[:, None]
    seen = torch.arange(length, device=query.device) <= position
    if prompt.strictly_causal is not None:
        strict = prompt.strictly_causal.repeat(heads // prompt.groups)[:, None, None]
        seen = seen & ~(strict & (torch.arange(length, device=query.device) == position))
    logits = logits.masked_fill(~seen, float("-inf"))
    lse = logits.logsumexp(-1)
    if rule.sinks is not None:
        lse = torch.logaddexp(lse, rule.sinks.double()[:, None])
    return (logits - lse[..., None]).exp().nan_to_num(0.0), lse


SINKS = torch.linspace(-1, 2, 6, device=DEVICE)
SUMS = [  # rows, heads, group, dim, T, w, dtype, rule, strict, weighted
    (1, 2, 3, 32, 90, 90, F32, LogitRule(0.2), False, False),
    (2, 1, 2, 16, 70, 70, F32, LogitRule(0.5, 2.0), True, True),
    (1, 2, 3, 96, 200, 8, BF16, LogitRule(0.1, None, SINKS), False, True),
    (2, 3, 1, 128, 130, 33, F16, LogitRule(0.08), False, False),
]


@pytest.mark.parametrize(
    ("case", "has_logsumexp"), [(case, i == 0) for i, case in enumerate([SUMS[0], *SUMS])], ids=str
)
def test_sums_of_attention_match_float64(case, has_logsumexp):
    *shape, strict, weighted = case
    prompt = make_prompt(*shape, strict)
    weights = torch.linspace(0.5, 2, prompt.query.shape[2], device=DEVICE) if weighted else None
    expected, lse = exact_weights(prompt)
    if has_logsumexp:
        prompt = replace(prompt, logsumexp=lse.float())
    expected = (expected if weights is None else expected * weights[:, None].double()).sum(2)
    tolerance = {"rtol": 1e-4 if prompt.query.dtype == F32 else 3e-2, "atol": 1e-4}
    found = kernels.attention_sums(prompt, prompt.strictly_causal, weights, per_query_head=True)
    torch.testing.assert_close(found.double(), expected, **tolerance)
    found = kernels.attention_sums(prompt, prompt.strictly_causal, weights, per_query_head=False)
    expected = expected.unflatten(1, (-1, prompt.groups)).mean(2)
    torch.testing.assert_close(found.double(), expected, **tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 300])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_sums_of_attention_over_the_grid(length, dim, group):
    for i, dtype in enumerate((F32, F16, BF16)):
        rule = LogitRule(0.1, (None, 3.0)[i % 2], torch.zeros(2 * group, device=DEVICE) if i == 2 else None)
        case = (
            1,
            2,
            group,
            dim,
            length,
            (length, max(1, length // 3))[i % 2],
            dtype,
            rule,
            i == 1 and length > 1,
            True,
        )
        test_sums_of_attention_match_float64(case, i == 0)


@pytest.fixture
def kernels_in_the_prefill(monkeypatch):
    """Scorers and streams use the kernels on the CPU as well; returns a function that turns them off again."""
    monkeypatch.setattr(prompt_kernel, "uses_kernel", lambda prompt: True)
    monkeypatch.setattr(streaming_llm, "_uses_kernel", lambda query, values: True)
    return monkeypatch.undo


PYRAMID = "policy.strategy=constant policy.prefill_decay_ratio=0.5 policy.min_context=0 policy.recent_ratio=0.1"
SCORED = [
    "h2o budget=24",
    "finch budget=20 scorer.window=5",
    f"pyramid_infer {PYRAMID}",
]
MORE_SCORED = [
    "snapkv budget=20 scorer.window=8",
    "snapkv budget=20 scorer.window=8 scorer.granularity=query_head",
    "ada_kv budget=20 scorer.window=8",
]


@pytest.mark.parametrize("text", [*SCORED, *(pytest.param(text, marks=pytest.mark.slow) for text in MORE_SCORED)])
def test_kernels_keep_the_same_tokens(text, kernels_in_the_prefill):
    """Rows of different lengths, in float32."""
    model = tiny_model("llama", F32).to(DEVICE)
    ids, mask = (x.to(DEVICE) for x in left_pad([prompt_ids(n, seed) for seed, n in enumerate(LENGTHS)]))
    caches = []
    for _ in range(2):
        caches.append(named_method(text).new_cache(model))
        prefill(model, caches[-1], ids, mask)
        kernels_in_the_prefill()  # the second time in PyTorch
    for by_kernel, by_pytorch in zip(*(cache.layers for cache in caches), strict=True):
        for found, expected in zip(by_kernel.tensors(), by_pytorch.tensors(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 31])
def test_a_prompt_has_the_log_sum_exp_of_the_prefill(chunk_size, monkeypatch):
    """In padded and in chunked prompts; on the CPU a stand-in computes what the flash kernel returns."""
    calls, prompts = [], []

    def with_logsumexp(query, keys, values, scaling):
        calls.append(query.shape)
        prompt = Prompt(query, keys, values, LogitRule(scaling), 0, 1)
        return causal_attention(query, keys, values, prompt.rule), exact_weights(prompt)[1].float()

    def finish(layer, groups):
        prompts.extend(prompt for _, prompt in groups)
        finish_prefill(layer, groups)

    finish_prefill = CacheLayer.finish_prefill
    monkeypatch.setattr(prefill_module, "flash_attention_with_logsumexp", with_logsumexp)
    monkeypatch.setattr(CacheLayer, "finish_prefill", finish)
    model = tiny_model("llama", F32)
    ids, mask = left_pad([prompt_ids(n, seed) for seed, n in enumerate(LENGTHS)])
    prefill(model, named_method("h2o budget=24").new_cache(model), ids, mask, chunk_size)
    assert calls and len(prompts) == 3 * len(LENGTHS)
    for prompt in prompts:
        torch.testing.assert_close(prompt.logsumexp.double(), exact_weights(prompt)[1], rtol=0, atol=1e-5)
        window = prompt.last_queries(7)
        assert torch.equal(window.logsumexp, prompt.logsumexp[:, :, -7:])
    calls.clear()
    prefill(model, named_method("snapkv budget=24 scorer.window=8").new_cache(model), ids, mask, chunk_size)
    assert not calls  # few queries: not worth another attention kernel


STREAMS = [
    "streaming_llm budget=24",
    pytest.param("streaming_llm budget=24 policy.sinks=0", marks=pytest.mark.slow),
    pytest.param("streaming_llm budget=30 policy.reposition=false", marks=pytest.mark.slow),
]


@torch.inference_mode()
@pytest.mark.parametrize("text", STREAMS)
def test_a_stream_by_the_kernel_matches_pytorch(text, kernels_in_the_prefill, monkeypatch):
    """A prompt of several steps in rows of different lengths, a second prompt with pads, and decode steps."""
    model = tiny_model("llama", F32).to(DEVICE)
    ids, mask = (x.to(DEVICE) for x in left_pad([prompt_ids(n, seed) for seed, n in enumerate((75, 22))]))
    method, results = named_method(text), []
    for block in (40, 20):
        monkeypatch.setattr(streaming_llm, "KERNEL_BLOCK", block)
        monkeypatch.setattr(streaming_llm, "BLOCK", 25)
        cache = method.new_cache(model)
        logits = [prefill(model, cache, ids, mask)]
        more = ids[:, -17:].clamp(min=1)
        logits += [x[:, -1] for x in feed(model, cache, more)]
        logits += [decode(model, cache, ids[:, -1 - i]) for i in range(2)]
        results.append((torch.stack(logits), cache.tokens_held))
        if block == 40:
            kernels_in_the_prefill()
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=2e-3)
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_stream_kernel_matches_masked_attention(dtype, softcap):
    """With holes among the tokens, fewer sinks in one row, sink logits, and values of another width."""
    from kvbench.methods.cache.band import Band, ranks
    from kvbench.methods.storage.kernels.stream import stream_attention

    generator = torch.Generator().manual_seed(0)
    rows, heads, group, dim, value_dim, slots, new = 2, 2, 2, 48, 32, 150, 100

    def numbers(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    query, rotated = numbers(rows, heads * group, new, dim), numbers(rows, heads * group, new, dim)
    keys, values = numbers(rows, heads, slots, dim), numbers(rows, heads, slots, value_dim)
    valid = torch.rand(rows, slots, generator=generator).to(DEVICE) > 0.1
    valid[:, slots - new :] = True
    valid[1, slots - new : slots - new + 9] = False  # pads among the new tokens
    rank = ranks(valid[:, None], slots, torch.device(DEVICE))
    sinks = torch.tensor([[4], [2]], device=DEVICE)
    is_sink = (rank < sinks) & valid
    position = torch.where(is_sink, rank, rank + 13)
    band = Band(position, position[:, slots - new :], valid, is_sink, 4, torch.tensor([[40], [25]], device=DEVICE))
    rule = LogitRule(0.2, softcap, SINKS[: heads * group])
    found = stream_attention(query, rotated, keys, values, band, rule)
    k, v = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    logits = torch.where(
        is_sink[:, None, None], rotated.double() @ k.transpose(2, 3), query.double() @ k.transpose(2, 3)
    )
    logits = replace(rule, sinks=None).logits(logits).masked_fill(~band.visible()[:, None], float("-inf"))
    weights = rule.weights(logits)
    expected = (weights @ v).masked_fill(~valid[:, None, slots - new :, None], 0.0)
    found = found.masked_fill(~valid[:, None, slots - new :, None], 0.0)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=6e-3 if dtype == F16 else 4e-2)
