"""The Triton kernel for FP8 and TurboQuant codes against attention over what the storage reads back."""

from __future__ import annotations

import pytest
import torch

from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.products import cached_attention

pytest.importorskip("triton")
from kvbench.methods.cache.rotary import Rotary
from kvbench.methods.storage import coded
from kvbench.methods.storage.fp8 import Fp8
from kvbench.methods.storage.kvquant import KVQuant
from kvbench.methods.storage.turboquant import TurboQuant

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
CASES = [  # storage, D, D_v, dtype, group, static, drops
    (Fp8(), 64, 64, torch.float32, 3, True, False),
    (Fp8("e4m3", "one"), 16, 24, torch.float16, 1, False, False),
    (Fp8("e5m2", "head"), 64, 32, torch.bfloat16, 2, True, True),
    (Fp8("e4m3", "tensor"), 80, 80, torch.float32, 1, False, False),
    (Fp8("e4m3"), 17, 16, torch.float32, 1, True, False),  # keys byte by byte, values in pairs
    (TurboQuant(2), 64, 64, torch.float16, 3, False, False),
    (TurboQuant(3, value_bits=4), 64, 32, torch.float32, 1, True, True),
    (TurboQuant(4, value_bits=3, rotation="dense"), 80, 80, torch.float32, 2, True, False),
    (KVQuant(4, 1), 64, 64, torch.bfloat16, 3, False, False),
    (KVQuant(3, 2), 64, 32, torch.float32, 1, True, False),
    (KVQuant(2, 3, sinks=0), 80, 80, torch.float16, 2, True, False),
]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_matches_attention_over_the_stored_numbers(case, monkeypatch):
    """Heads of different lengths, with a soft cap and a sink where the layer is static, and holes where tokens left."""
    check(*case, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("length", "dim"), [(1, 64), (150, 64), (150, 128), (150, 256), (3000, 128)])
@pytest.mark.parametrize(
    "storage", [Fp8(), Fp8("e5m2", "one"), TurboQuant(2), TurboQuant(3), TurboQuant(4), KVQuant(3, 2)], ids=repr
)
def test_kernel_over_the_grid(storage, length, dim, monkeypatch):
    for dtype in TOLERANCE:
        check(storage, dim, dim, dtype, 4, True, True, monkeypatch, length)


def check(storage, dim, value_dim, dtype, group, is_static, drops, monkeypatch, length=150):
    monkeypatch.setattr(coded, "uses_kernel", lambda *_, **__: True)
    layer = storage.new_layers(1)[0]
    layer.bind(lambda: Rotary(10000.0 ** (-torch.arange(0, dim, 2) / dim)))
    pads = torch.tensor([[0, 3], [121, 50]], device=DEVICE).clamp(max=length - 1)
    valid = torch.arange(length, device=DEVICE) >= pads[..., None]
    keys, values = numbers(2, 2, length, dim, dtype=dtype), numbers(2, 2, length, value_dim, seed=1, dtype=dtype)
    layer.write(keys, values, valid)
    if drops:
        layer.make_static_within(length, 4)
    elif is_static:
        layer.make_static(4)
    layer.append(numbers(2, 2, 1, dim, seed=2, dtype=dtype), numbers(2, 2, 1, value_dim, seed=3, dtype=dtype))
    if drops:
        keep = layer.valid & (numbers(*layer.valid.shape, seed=4) > -1)
        keep[..., 0] = True
        layer.drop(keep, compact_now=False)
    rule = LogitRule(dim**-0.5, 3.0, numbers(2 * group, seed=5)) if is_static else LogitRule(dim**-0.5)
    query = numbers(2, 2 * group, 1, dim, seed=6, dtype=dtype)
    found = layer.attend(query, rule, None)
    assert found.dtype == dtype
    read, read_values, valid = layer.read()
    plain = LogitRule(rule.scaling, rule.softcap, None if rule.sinks is None else rule.sinks.double())
    expected = cached_attention(query.double(), read.double(), read_values.double(), plain, valid)
    largest = max(1.0, float(expected.abs().max()))  # a rotation spreads the rounding of the largest channel
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype] * largest)
