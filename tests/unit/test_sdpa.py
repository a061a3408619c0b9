"""Attention over a growing cache: the same numbers, and no plan of cuDNN's for each new shape."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import prompt_ids, tiny_model

from kvbench.methods.cache import sdpa
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import decode, prefill


class OnCuda(torch.Tensor):
    """A tensor on the CPU that says it is on CUDA."""

    is_cuda = True


@pytest.mark.parametrize("allowed", [True, False])
def test_cudnn_is_off_for_the_call_alone(monkeypatch, allowed):
    """Also where the call fails; a program that has switched it off finds it off."""
    seen = []

    def attention(query, key, value, **options):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        raise torch.OutOfMemoryError

    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", attention)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    x = torch.zeros(1, 1, 1, 8).as_subclass(OnCuda)
    try:
        torch.backends.cuda.enable_cudnn_sdp(allowed)
        with pytest.raises(torch.OutOfMemoryError):
            sdpa.sdpa_without_cudnn(x, x, x)
        assert seen == [False]
        assert torch.backends.cuda.cudnn_sdp_enabled() is allowed
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("name", ["full", "ada_kv budget=40", "streaming_llm budget=100"])
def test_steps_over_a_growing_cache_take_that_call(monkeypatch, name):
    calls = []
    real = sdpa.sdpa_without_cudnn
    monkeypatch.setattr(
        "kvbench.methods.cache.products.sdpa_without_cudnn", lambda *x, **how: calls.append(x) or real(*x, **how)
    )
    model = tiny_model()
    cache = named_method(name).new_cache(model)
    token = prefill(model, cache, prompt_ids(60)).argmax(-1)
    for step in (lambda: decode(model, cache, token), lambda: model(token[:, None], past_key_values=cache)):
        calls.clear()
        step()
        assert len(calls) >= len(cache.layers)


@pytest.mark.gpu
def test_a_growing_cache_never_asks_for_a_plan():
    from torch.profiler import ProfilerActivity, profile

    query = torch.randn(1, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for length in (300, 301):
            keys = torch.randn(1, 8, length, 64, device="cuda", dtype=torch.bfloat16)
            mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device="cuda")
            out = sdpa.sdpa_without_cudnn(query, keys, keys, attn_mask=mask)
            expected = F.scaled_dot_product_attention(query.float(), keys.float(), keys.float())
            torch.testing.assert_close(out.float(), expected, rtol=0, atol=2e-2)
    assert not any("cudnn" in event.key for event in found.key_averages())
