"""Steps over buffers of fixed size: the same logits as steps that grow, and how steps that are played are counted."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from captured_ops import CapturedOps
from test_static_shapes import CHANGING
from tiny_models import left_pad, prompt_ids, tiny_model

from kvbench.methods.cache.fan_out import FanOutCache
from kvbench.methods.cache.method import Method
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import captured, decode, decode_step, prefill
from kvbench.runners.engine.step import CUDA_GRAPH, EAGER, FUSED

STATIC = [
    "full",
    "snapkv budget=20 scorer.window=4",
    "pyramidkv budget=20 scorer.window=4",
    "key_diff budget=20",
    "kivi storage.residual=8 storage.group=8",
    "ada_kv budget=20 scorer.window=4",
    "minicache",
    "minicache_kivi4 storage.residual=8 storage.group=8",
    "pyramid_infer policy.min_context=0 policy.recent_ratio=0.05 policy.gen_window=2",  # thins out at step 5
]


def prompts(padded: bool):
    return left_pad([prompt_ids(60, 1), prompt_ids(33, 2)]) if padded else (prompt_ids(60), None)


@pytest.mark.parametrize("text", CHANGING)
def test_steps_of_changing_shapes_are_left_alone_and_a_record_says_why(text):
    if text == "hf_quantized":
        pytest.importorskip("optimum.quanto")
    model, method = tiny_model(), named_method(text)
    cache = method.new_cache(model)
    token = prefill(model, cache, prompt_ids(60)).argmax(-1)
    assert cache.static_problem == CHANGING[text]
    assert decode_step(OnCuda(model), cache, token, 4).recorded_mode == f"eager: {CHANGING[text]}"
    assert decode_step(OnCuda(model), cache, token, 4, capture=False).recorded_mode == "eager"
    assert decode_step(model, cache, token, 4).recorded_mode == "eager"


class FakeGraph:
    """Replays the operations of the captured step, and puts its logits where those of the capture are."""

    def __init__(self):
        self.ops = CapturedOps()

    def replay(self):
        self.ops.replay()
        logits = self.step()._logits
        logits.copy_(self.ops.now(logits))


class OnCuda:
    """A model that says that it is on CUDA, and is the one behind it."""

    def __init__(self, model):
        self._model = model
        self.device = torch.device("cuda")

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, **how):
        return self._model(**how)


def stand_in(monkeypatch, cache):
    """CUDA by a stand-in: a capture records the step without running it."""
    made = FakeGraph()

    @contextmanager
    def capturing(_):
        before = [t.clone() for t in cache.static_state()]
        with made.ops:
            yield
        for tensor, value in zip(cache.static_state(), before, strict=True):
            tensor.copy_(value)

    monkeypatch.setattr(captured.torch.cuda, "CUDAGraph", lambda: made)
    monkeypatch.setattr(captured, "capturing", capturing)
    return made


@pytest.mark.parametrize("text", [*STATIC[:2], *STATIC[4:], "cam budget=24"])
@torch.inference_mode()
def test_replayed_steps_are_counted_and_fed_as_eager_ones(monkeypatch, text):
    model, method = tiny_model(), named_method(text)
    ids, mask = prompts(True)
    plain, cache = method.new_cache(model), method.new_cache(model)
    token = prefill(model, plain, ids, mask).argmax(-1)
    prefill(model, cache, ids, mask)
    made = stand_in(monkeypatch, cache)
    step = decode_step(OnCuda(model), cache, token, 7)
    made.step = weakref.ref(step)
    assert step.mode == CUDA_GRAPH
    for _ in range(7):
        expected = decode(model, plain, token)
        torch.testing.assert_close(step(token), expected, rtol=0, atol=1e-10)
        token = expected.argmax(-1)
    assert torch.equal(cache.tokens_seen, plain.tokens_seen)
    assert [layer.seen for layer in cache.layers] == [layer.seen for layer in plain.layers]
    assert cache.kv_bytes_logical == plain.kv_bytes_logical


def test_what_a_step_changes_is_restored_from_copies_of_its_own():
    """Large tensors' are on the host (test_cuda.py shows that they take no memory of the device)."""
    small, large = torch.arange(4.0), torch.arange(float(captured.MAX_DEVICE_COPY_BYTES))
    expected = [small.clone(), large.clone()]
    copies = captured.saved([small, large])
    for tensor, copied in copies:
        tensor.zero_()
        tensor.copy_(copied)
    assert all(torch.equal(x, y) for x, y in zip((small, large), expected, strict=True))


FANS = {
    "full snapkv": ["full", STATIC[1]],
    "eviction": [
        "h2o budget=24",
        "snapkv budget=20 scorer.window=4 allocator=adaptive storage=ragged schedule=every_n",
    ],
    "separate prefills": ["streaming_llm budget=24", "full", "kivi storage.residual=8 storage.group=8"],
}


@pytest.mark.parametrize("texts", FANS.values(), ids=FANS)
@torch.inference_mode()
def test_the_steps_of_a_fan_out_are_captured(monkeypatch, texts):
    """Each member's rows are what the method gives alone."""
    model, methods = tiny_model(), [named_method(text) for text in texts]
    ids, mask = prompts(True)
    alone, token = [], []
    for method in methods:
        alone.append(method.new_cache(model))
        token.append(prefill(model, alone[-1], ids, mask).argmax(-1))
    fan_out = FanOutCache([method.new_cache(model) for method in methods])
    prefill(model, fan_out, ids, mask)
    made = stand_in(monkeypatch, fan_out)
    step = decode_step(OnCuda(model), fan_out, torch.cat(token), 9)
    made.step = weakref.ref(step)
    assert step.recorded_mode == CUDA_GRAPH
    for _ in range(9):
        expected = [decode(model, cache, t) for cache, t in zip(alone, token, strict=True)]
        torch.testing.assert_close(step(torch.cat(token)), torch.cat(expected), rtol=0, atol=1e-10)
        token = [logits.argmax(-1) for logits in expected]
    step.finish()
    assert [layer.seen for layer in fan_out.layers] == [layer.seen for layer in alone[0].layers]
    assert fan_out.kv_bytes_logical == sum(cache.kv_bytes_logical for cache in alone)
    with pytest.raises(ValueError, match="cannot be dropped"):
        fan_out.drop(0)


@torch.inference_mode()
def test_a_captured_cache_is_freed_with_its_step(monkeypatch):
    """Two caches at once would not fit at the largest batch."""
    model = tiny_model()
    cache = Method("full").new_cache(model)
    token = prefill(model, cache, prompt_ids(30)).argmax(-1)
    made = stand_in(monkeypatch, cache)
    step = decode_step(OnCuda(model), cache, token, 4)
    made.step = weakref.ref(step)
    step(token)
    held = weakref.ref(cache.layers[0].storage)
    monkeypatch.undo()
    gc.disable()
    try:
        del step, cache, made  # a real graph holds no tensors of Python
        assert held() is None
    finally:
        gc.enable()


def test_length_dependent_rope_is_not_captured():
    model = OnCuda(tiny_model())
    model.config = copy.deepcopy(model.config)
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    cache = Method("full").new_cache(tiny_model())
    token = prefill(tiny_model(), cache, prompt_ids(30)).argmax(-1)
    assert decode_step(model, cache, token, 4).mode == EAGER


def test_a_cpu_step_is_fused_and_not_captured():
    model = tiny_model()
    cache = Method("snapkv", EvictionPolicy(SnapKV(window=4), 20)).new_cache(model)
    token = prefill(model, cache, prompt_ids(60)).argmax(-1)
    step = decode_step(model, cache, token, 20)
    assert step.mode == FUSED
    assert step(token).shape == (1, 101)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(60,), (60, 45, 60)])
@pytest.mark.parametrize("text", STATIC)
def test_a_captured_step_on_the_device(text, lengths, dtype):
    """One row, and rows of different lengths; bfloat16 rounds weights and outputs, in another order in each kernel."""
    model, method = tiny_model(dtype=dtype).cuda(), named_method(text)
    plain, cache = method.new_cache(model), method.new_cache(model)
    ids, mask = (x.cuda() for x in left_pad([prompt_ids(n, seed) for seed, n in enumerate(lengths)]))
    token = prefill(model, plain, ids, mask).argmax(-1)
    prefill(model, cache, ids, mask)
    step = decode_step(model, cache, token, 9)
    assert step.mode == CUDA_GRAPH
    with torch.inference_mode():
        for _ in range(9):
            expected = decode(model, plain, token)
            close = 1e-3 if dtype == torch.float32 else 3e-2 * float(expected.abs().max())
            torch.testing.assert_close(step(token), expected, rtol=0, atol=close)
            token = expected.argmax(-1)
    model.cpu()
