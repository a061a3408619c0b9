"""Kernels of the small operations of a decode step, on a CUDA device or in Triton's interpreter."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from tiny_models import prompt_ids, tiny_model

from kvbench.methods.cache import kernel_use
from kvbench.methods.cache.rotary import rope
from kvbench.methods.storage import dense
from kvbench.methods.storage.static import NextSlot
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import prefill, step_operations
from kvbench.runners.engine.fused_decode import FusedStep
from kvbench.runners.engine.weights import fuse_linear_weights

pytest.importorskip("triton")
from kvbench.methods.storage.kernels import step_operations as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Dtypes and the largest relative difference from float64: a few roundings of the dtype."""
OF_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = DTYPES[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def exact_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    x = x.double()
    return weight.double() * x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()


@OF_DTYPE
@pytest.mark.parametrize("hidden", [96, 1100])
def test_residual_and_norm_match_float64(hidden, dtype):
    x, y = numbers(3, 1, hidden, seed=1, dtype=dtype), numbers(3, 1, hidden, seed=2, dtype=dtype)
    weight = numbers(hidden, seed=3, dtype=dtype)
    total, out = kernels.add_rms_norm(x, y, weight, 1e-5)
    if dtype != torch.bfloat16:  # to which the interpreter rounds towards zero
        assert torch.equal(total, x + y)
    close(total, x.double() + y.double())
    close(out, exact_norm(total, weight, 1e-5))
    close(kernels.rms_norm(x, weight, 1e-5), exact_norm(x, weight, 1e-5))


@OF_DTYPE
@pytest.mark.parametrize(("dim", "normed"), [(64, False), (80, True)])
def test_rope_matches_float64(dim, normed, dtype):
    """Queries and keys that are slices of one projection; with norms of the heads, as in Qwen 3."""
    whole = numbers(2, 1, 8, dim, seed=1, dtype=dtype)
    query, key = whole.split([5, 3], dim=2)
    angle = torch.linspace(0, 30, 2 * dim // 2, device=DEVICE).view(2, 1, dim // 2).repeat(1, 1, 2)
    cos_sin = angle.cos().to(dtype), angle.sin().to(dtype)
    weights = numbers(dim, seed=2, dtype=dtype), numbers(dim, seed=3, dtype=dtype)
    found = kernels.rotate(query, key, *cos_sin, weights if normed else None, 1e-5)
    for x, weight, out in zip((query, key), weights, found, strict=True):
        x = exact_norm(x, weight, 1e-5) if normed else x.double()
        expected = rope(x.transpose(1, 2), tuple(c.double() for c in cos_sin)).transpose(1, 2)
        assert out.is_contiguous()
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=4 * DTYPES[dtype])


@OF_DTYPE
def test_swiglu_matches_float64(dtype):
    both = numbers(3, 1, 2 * 1500, seed=1, dtype=dtype) * 4
    gate, up = both.chunk(2, -1)
    close(kernels.swiglu(gate, up), torch.nn.functional.silu(gate.double()) * up.double())


@pytest.mark.parametrize("mask_heads", [1, 3])
def test_a_token_is_written_into_its_slot(mask_heads):
    keys, values = torch.zeros(2, 3, 9, 40, device=DEVICE), torch.zeros(2, 3, 9, 24, device=DEVICE)
    valid = torch.zeros(2, mask_heads, 9, dtype=torch.bool, device=DEVICE)
    new_keys, new_values = numbers(2, 1, 3, 40).transpose(1, 2), numbers(2, 3, 1, 24)
    expected = [x.clone() for x in (keys, values, valid)]
    expected[0][:, :, 5], expected[1][:, :, 5], expected[2][:, :, 5] = new_keys[:, :, 0], new_values[:, :, 0], True
    kernels.write_token(new_keys, new_values, keys, values, valid, torch.tensor([5], device=DEVICE))
    assert all(map(torch.equal, (keys, values, valid), expected))


@OF_DTYPE
@pytest.mark.parametrize(("dim", "normed", "mask_heads"), [(64, False, 1), (80, True, 3)])
def test_rope_and_the_write_in_one_launch_equal_two(dim, normed, mask_heads, dtype):
    """Bit by bit, for parts of one projection and a cache whose rows are not next to one another."""
    whole = numbers(2, 1, 11, dim, seed=1, dtype=dtype)
    query, key, value = whole.split([5, 3, 3], dim=2)
    value = value[..., : dim - 8]
    angle = torch.linspace(0, 30, dim, device=DEVICE).view(2, 1, dim // 2).repeat(1, 1, 2)
    weights = (numbers(dim, seed=2, dtype=dtype), numbers(dim, seed=3, dtype=dtype)) if normed else None
    rotation = (angle.cos().to(dtype), angle.sin().to(dtype), weights, 1e-5)

    def empty() -> NextSlot:
        keys, values = (torch.zeros(2, 9, 3, n, dtype=dtype, device=DEVICE).transpose(1, 2) for n in (dim, dim - 8))
        valid = torch.zeros(2, mask_heads, 9, dtype=torch.bool, device=DEVICE)
        return NextSlot(keys, values, valid, torch.tensor([5], device=DEVICE))

    one, two = empty(), empty()
    rotated, _ = kernels.rotate(query, key, *rotation, (value, one))
    expected, new_keys = kernels.rotate(query, key, *rotation)
    kernels.write_token(new_keys.transpose(1, 2), value.transpose(1, 2), two.keys, two.values, two.valid, two.slot)
    assert torch.equal(rotated, expected) and two.keys[:, :, 5].count_nonzero() > 0
    for name in ("keys", "values", "valid"):
        assert torch.equal(getattr(one, name), getattr(two, name))


@OF_DTYPE
@pytest.mark.parametrize("size", [7, 10_000])
def test_the_greedy_token_is_the_first_of_equal_logits(size, dtype):
    logits = numbers(4, size, dtype=dtype).clamp(max=1)
    assert int((logits == 1).sum(-1).max()) > 1 or size == 7
    logits[1] = float("-inf")
    logits[2, 3:6] = 2
    logits[3, 5] = float("nan")
    expected = [int((row == row.max()).nonzero()[0]) for row in logits[:3]] + [5]
    assert kernels.greedy_tokens(logits).tolist() == expected


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_step_with_kernels_matches_pytorch(family):
    model, ids = tiny_model(family, torch.float32).to(DEVICE), prompt_ids(30).to(DEVICE)
    logits = []
    for operations in (step_operations.KernelOperations(), step_operations.StepOperations()):
        cache = named_method("full").new_cache(model)
        token = prefill(model, cache, ids).argmax(-1)
        step = FusedStep(model, cache)
        step._operations = operations
        logits.append(torch.stack([step(token + i) for i in range(3)]))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize(("text", "fuses"), [("full", True), ("tova budget=12", False), ("kivi", True)])
def test_a_static_step_with_kernels_matches_pytorch(text, fuses, monkeypatch):
    """In a dense cache RoPE writes the token, and nothing else does; fused projections are one product each."""
    model, ids = copy.deepcopy(tiny_model("qwen3", torch.float32)).to(DEVICE), prompt_ids(30).to(DEVICE)
    if fuses:
        fuse_linear_weights(model)
    linear, logits, widths = F.linear, [], set()
    kernel_use.forget_implementations()

    def spy(x, weight, bias=None):
        widths.add(len(weight))
        return linear(x, weight, bias)

    for operations in (step_operations.StepOperations(), step_operations.KernelOperations()):
        cache = named_method(text).new_cache(model)
        token = prefill(model, cache, ids).argmax(-1)
        step = FusedStep(model, cache)
        step._operations = operations
        cache.make_static(4)
        if isinstance(operations, step_operations.KernelOperations):
            assert (operations.next_slot(cache, 0) is None) == (text == "kivi")
            monkeypatch.setattr(dense, "write_token", lambda *_: pytest.fail("the cache writes the token"))
            monkeypatch.setattr(F, "linear", spy)
        logits.append(torch.stack([step(token + i) for i in range(4)]))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert widths & {32, 96, 64 + 32 + 32, 96 + 96} == ({128, 192} if fuses else {32, 96})  # of q, k, v; gate, up
    assert kernel_use.implementations()["projections"] == ("fused" if fuses else "separate")


def test_models_that_the_kernels_do_not_compute_are_recognized():
    problem = step_operations.model_problem
    assert problem(tiny_model("llama", torch.float64)) == "float64 tensors"
    model = tiny_model("qwen3", torch.float32)
    assert problem(model) is None
    handle = model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *_: None)
    try:
        assert problem(model) == "a hook on a norm or an MLP"
    finally:
        handle.remove()
    model.model.norm.double()
    try:
        assert problem(model) == "norms in another dtype"
    finally:
        model.model.norm.float()


def test_what_computed_an_operation_is_recorded_and_logged_once(caplog):
    """The CUDA device is only a name here: no kernel runs."""
    kernel_use.forget_implementations()
    cuda, reason = torch.device("cuda"), "head_dim 512 > 256"
    with caplog.at_level(logging.WARNING):
        assert kernel_use.uses_kernel_on(cuda, kernel_use.STEP_ATTENTION, None)
        for _ in range(3):
            assert not kernel_use.uses_kernel_on(cuda, kernel_use.PROMPT_SCORES, reason)
    assert not kernel_use.uses_kernel_on(torch.device("cpu"), kernel_use.STEP_OPERATIONS, None)
    assert kernel_use.implementations() == {
        "step_attention": "triton",
        "prompt_scores": f"pytorch ({reason})",
        "step_operations": "pytorch",
    }
    assert [record.getMessage() for record in caplog.records] == [
        f"prompt_scores: PyTorch instead of a Triton kernel: {reason}"
    ]
    kernel_use.forget_implementations()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_dtypes_without_a_kernel_are_named(dtype):
    x = torch.zeros(1, 8, 1, 64, dtype=dtype)
    assert kernel_use.step_attention_problem(x, 2, 64) == f"{str(dtype)[6:]} tensors"
    assert kernel_use.step_attention_problem(x.float(), 2, 64, 320) == "head_dim 320 > 256"
    assert kernel_use.step_attention_problem(torch.zeros(1, 130, 1, 64), 2, 64) == "65 > 64 query heads per KV head"
    assert kernel_use.step_attention_problem(x.float(), 2, 64) == "the CPU"
