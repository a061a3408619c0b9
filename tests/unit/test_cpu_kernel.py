"""The kernel in C++ for attention of decode steps on a CPU, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from kvbench.methods.cache import kernel_use
from kvbench.methods.cache.kernel_use import CPP, PYTORCH, STEP_ATTENTION, cpu_kernels
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.storage.kernels import cpu
from kvbench.methods.storage.kernels.cpp import compiler_problem
from kvbench.methods.storage.step_attention import step_attention, step_attention_with_weights

pytestmark = pytest.mark.skipif(compiler_problem() is not None, reason="the kernel needs a C++ compiler")

SHAPES = {  # rows, KV heads, query heads per KV head, channels of keys and of values
    "smollm2": (1, 3, 3, 64, 64),
    "llama 3": (1, 2, 4, 128, 128),
    "one head": (2, 1, 8, 64, 64),
    "no groups": (2, 5, 1, 96, 96),
    "channels in two passes": (1, 2, 3, 128, 128),
    "wide": (1, 2, 2, 256, 256),
    "unequal widths": (2, 2, 1, 192, 128),
    "many query heads": (1, 1, 16, 80, 16),
}
LENGTHS = (1, 15, 16, 63, 64, 65, 700, 3000)


def tensors(shape: str, length: int, dtype: torch.dtype):
    """(query, keys, values) as a step has them: a transposed query, and buffers with slots to spare."""
    torch.manual_seed(length)
    rows, heads, group, dim, value_dim = SHAPES[shape]
    query = 2 * torch.randn(rows, 1, heads * group, dim).to(dtype).transpose(1, 2)
    keys, values = (torch.randn(rows, heads, length + 7, d).to(dtype)[:, :, :length] for d in (dim, value_dim))
    return query, keys, values


def rules(query: torch.Tensor):
    """Plain, with a soft cap, with sinks, and with both."""
    scaling, sinks = query.shape[-1] ** -0.5, torch.randn(query.shape[1]).to(query.dtype)
    cap = 4.0
    return [LogitRule(scaling), LogitRule(scaling, cap), LogitRule(scaling, None, sinks), LogitRule(0.2, cap, sinks)]


def masks(keys: torch.Tensor):
    """No mask, one for all heads, and one for each; a whole block of the latter is empty."""
    rows, heads, length, _ = keys.shape
    made = [None]
    for count in (1, heads):
        valid = torch.rand(rows, count, length) < 0.6
        valid[:, -1:, 64:192] = False
        valid[..., 0] = True
        made.append(valid)
    return made


def definition(query, keys, values, rule, valid):
    """(output, weights) in float64."""
    rows, heads, _, dim = keys.shape
    grouped = query.double().reshape(rows, heads, -1, dim)
    logits = rule.logits(torch.einsum("bhgd,bhtd->bhgt", grouped, keys.double()))
    if valid is not None:
        logits = logits.masked_fill(~valid[:, :, None], float("-inf"))
    weights = rule.weights(logits, head_dims=2)
    return (weights @ values.double()).reshape(*query.shape[:3], -1), weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_definition(shape, dtype):
    for length in LENGTHS:
        query, keys, values = tensors(shape, length, dtype)
        for rule in rules(query):
            for valid in masks(keys):
                out, weights = cpu.attention(query, keys, values, rule, valid, weights=True)
                expected, expected_weights = definition(query, keys, values, rule, valid)
                assert out.dtype == dtype and weights.dtype == torch.float32
                torch.testing.assert_close(weights.double(), expected_weights, atol=2e-6, rtol=2e-5)
                rounding = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-5, "rtol": 2**-8}
                torch.testing.assert_close(out.double(), expected, **rounding)
                assert torch.equal(cpu.attention(query, keys, values, rule, valid)[0], out)


def test_bfloat16_is_rounded_to_nearest():
    """Half of the sum of two values is exact before it is rounded."""
    query, keys = torch.ones(1, 1, 1, 16, dtype=torch.bfloat16), torch.zeros(1, 1, 2, 16, dtype=torch.bfloat16)
    values = torch.randn(1, 1, 2, 16).bfloat16()
    out, _ = cpu.attention(query, keys, values, LogitRule(1.0))
    assert torch.equal(out[0, 0, 0], values[0, 0].float().mean(0).bfloat16())


@pytest.mark.parametrize("poison", [float("nan"), 3e38], ids=["nan", "overflow"])
@pytest.mark.parametrize("slot", [0, 5, 70, 199])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_number_that_is_not_finite_is_not_hidden(slot, poison, softcap):
    """As in PyTorch: NaN in one key makes the result NaN, and so does a logit that overflows, if nothing caps it."""
    query, keys, values = tensors("smollm2", 200, torch.float32)
    query = query.abs()
    keys[:, :, slot] = poison
    rule = LogitRule(1.0, softcap)
    found, weights = cpu.attention(query, keys, values, rule, weights=True)
    expected = step_attention(query, keys, values, rule)
    assert torch.equal(found.isnan(), expected.isnan())
    assert bool(found.isnan().any()) == (softcap is None or poison != poison)
    assert torch.equal(weights.isnan().any(-1).flatten(), expected.isnan().any(-1).flatten())


def test_without_a_token_or_a_sink_the_output_is_zero():
    """As :func:`cached_attention`, which is what a call without weights is in PyTorch."""
    query, keys, values = tensors("smollm2", 70, torch.float32)
    nothing = torch.zeros(1, 1, 70, dtype=torch.bool)
    out, _ = cpu.attention(query, keys, values, LogitRule(1.0), nothing)
    assert torch.equal(out, step_attention(query, keys, values, LogitRule(1.0), nothing)) and not out.any()


def test_a_sink_that_is_all_there_is_leaves_nothing():
    query, keys, values = tensors("smollm2", 70, torch.float32)
    nothing = torch.zeros(1, 1, 70, dtype=torch.bool)
    out, weights = cpu.attention(query, keys, values, LogitRule(1.0, None, torch.zeros(9)), nothing, weights=True)
    assert not out.any() and not weights.any()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_the_rounding_only(threads):
    query, keys, values = tensors("smollm2", 3000, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        out, _ = cpu.attention(query, keys, values, LogitRule(0.125))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(
        out.double(), definition(query, keys, values, LogitRule(0.125), None)[0], atol=1e-6, rtol=1e-5
    )


def test_threads_have_equally_many_parts_or_four_and_more():
    assert cpu.parts_of_head(3, 4096, 2) == 2
    assert cpu.parts_of_head(8, 4096, 2) == 1
    assert cpu.parts_of_head(3, 512, 2) == 2 and cpu.parts_of_head(3, 300, 2) == 1
    assert cpu.parts_of_head(3, 512, 5) == 2  # no parts of less than 256 tokens
    for heads in range(1, 12):
        for threads in range(1, 40):
            parts = heads * cpu.parts_of_head(heads, 1 << 16, threads)
            assert parts % threads == 0 or parts >= 4 * threads


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q, k, v: (q.double(), k.double(), v.double()), "float64 tensors"),
        (lambda q, k, v: (q.half(), k.half(), v.half()), "float16 tensors"),
        (lambda q, k, v: (q[..., :20], k[..., :20], v[..., :20]), "head_dim 20"),
        (lambda q, k, v: (q.repeat(1, 8, 1, 1), k, v), "24 > 16 query heads per KV head"),
        (lambda q, k, v: (q, k.mT.contiguous().mT, v), "channels that are not contiguous"),
    ],
)
def test_what_it_does_not_support_is_computed_in_pytorch_with_a_reason(change, reason, caplog):
    query, keys, values = change(*tensors("smollm2", 40, torch.float32))
    rule = LogitRule(0.125)
    kernel_use.forget_implementations()
    with cpu_kernels(), caplog.at_level("WARNING"):
        out = step_attention(query, keys, values, rule)
        again, _ = step_attention_with_weights(query, keys, values, rule)
    assert kernel_use.implementations() == {STEP_ATTENTION: f"{PYTORCH} ({reason})"}
    assert [r.getMessage() for r in caplog.records] == [f"step_attention: PyTorch instead of a C++ kernel: {reason}"]
    expected, _ = definition(query, keys, values, rule, None)
    tolerance = 1e-2 if query.dtype == torch.float16 else 1e-5
    for result in (out, again):
        torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=tolerance)


def test_it_is_used_only_where_it_is_asked_for():
    query, keys, values = tensors("smollm2", 40, torch.float32)
    kernel_use.forget_implementations()
    step_attention(query, keys, values, LogitRule(1.0))
    assert kernel_use.implementations() == {STEP_ATTENTION: PYTORCH}
    kernel_use.forget_implementations()
    with cpu_kernels():
        step_attention(query, keys, values, LogitRule(1.0))
        step_attention_with_weights(query, keys, values, LogitRule(1.0))
    assert kernel_use.implementations() == {STEP_ATTENTION: CPP}
