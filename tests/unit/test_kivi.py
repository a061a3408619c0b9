"""KIVI: the quantizer, the times at which tokens are quantized, and the bytes."""

from __future__ import annotations

import pytest
import torch
from tiny_models import prompt_ids, tiny_model

from kvbench.conf.errors import InputError
from kvbench.methods.cache.kv_shape import KVShape, kv_shape
from kvbench.methods.cache.method import Method
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.scorers.attention_sums import AttentionSums
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.methods.storage.kivi import Kivi, KiviSegments
from kvbench.methods.storage.minicache_kivi import MiniCacheKivi
from kvbench.methods.storage.packed import Quantized, dequantize_into, pack, quantize, value_group_size
from kvbench.runners.engine import decode, generate, prefill


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dequantize(q: Quantized, bits: int, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(*q.codes.shape[:-1], q.codes.shape[-1] * 8 // bits, dtype=dtype)
    dequantize_into(q, bits, out)
    return out


def unpack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes are what a scale of 1 and a smallest value of 0 restore."""
    groups = torch.ones(*codes.shape[:-1], 1)
    return dequantize(Quantized(codes, groups, 0 * groups), bits, torch.float32).to(torch.uint8)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [8, 24, 64])
def test_packing_is_lossless(bits, count):
    codes = torch.randint(0, 2**bits, (3, 5, count), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 5, count * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)


def test_golden_group(golden):
    want = golden["kivi"]["2bit group [-1.0,0.2,0.9,2.0]"]
    q = quantize(torch.tensor([-1.0, 0.2, 0.9, 2.0]), bits=2, group=4)
    assert unpack(q.codes, 2).tolist() == want["q"]
    assert (q.zero.item(), q.scale.item()) == (want["zero"], want["scale"])
    assert dequantize(q, 2, torch.float32).tolist() == pytest.approx(want["dequant"])


@pytest.mark.parametrize("magnitude", [2.0**-10, 1.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantization_error_is_at_most_half_a_step(bits, dtype, magnitude):
    """Of the step that the group's own range gives: what 16-bit scales and zeros add is below a hundredth of one."""
    x = (5 * magnitude * numbers(4, 6, 640)).to(dtype)
    q = quantize(x, bits, 32)
    assert q.scale.dtype == q.zero.dtype == torch.float16
    groups, back = (t.double().unflatten(-1, (-1, 32)) for t in (x, dequantize(q, bits, torch.float64)))
    step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
    assert ((back - groups).abs() / step[..., None]).max() <= 0.505


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantization_error_bound_far_from_zero(bits):
    """A narrow group whose smallest value float16 does not have: its zero lies below, and its step reaches the top."""
    x = 100.01 + numbers(4, 64).double().sigmoid() / 50
    q = quantize(x, bits, 32)
    error = (dequantize(q, bits, torch.float64) - x).abs().unflatten(-1, (-1, 32))
    assert (error <= q.scale.double()[..., None] / 2 + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_numbers_beyond_float16_are_clamped(bits, dtype):
    x = torch.tensor([[-3e38, -1e6, 0.0, 3e38], [1e6, 1e6, 1e6, 1e6], [-1e6, -1e6, -1e6, -1e6]]).to(dtype)
    x = x.repeat(1, 2)
    q = quantize(x, bits, 8)
    assert q.scale.isfinite().all() and q.zero.isfinite().all()
    back = dequantize(q, bits, torch.float32)
    assert back[0, 0] == back[2, 0] == -65504 and back[0, 3] > 65504 and back[1].min() > 65504
    constant = torch.full((1, 8), 3e-9, dtype=dtype)  # below float16's smallest number
    assert (dequantize(quantize(constant, bits, 8), bits, torch.float32) - constant).abs().max() < 6e-8


def test_numbers_on_the_grid_and_constant_groups_are_exact():
    grid = torch.arange(16.0).repeat(2, 4)
    assert torch.equal(dequantize(quantize(grid, 4, 16), 4, torch.float32), grid)
    constant = torch.full((2, 32), 0.75)
    assert torch.equal(dequantize(quantize(constant, 2, 32), 2, torch.float32), constant)


def filled(keys: torch.Tensor, values: torch.Tensor, bits: int = 2, residual: int = 32) -> KiviSegments:
    segments = KiviSegments(bits, 16, residual)
    segments.append(keys, values)
    segments.flush()
    return segments


@pytest.mark.parametrize("length", [100, 128, 129, 300, 512])
def test_golden_split_into_rounded_and_recent_tokens(golden, length):
    keys, values = numbers(1, length, 32), numbers(1, length, 32, seed=1)
    segments = filled(keys, values, residual=128)
    k, v = segments.read()
    want = golden["kivi"]["split of T tokens (R=128)"][str(length)]
    exact_keys = int((k == keys).all(-1)[0].sum())
    exact_values = int((v == values).all(-1)[0].sum())
    assert sorted([exact_keys, exact_values, length - exact_keys, length - exact_values]) == sorted(want.values())
    assert torch.equal(k[:, length - length % 128 :], keys[:, length - length % 128 :])
    assert torch.equal(v[:, max(0, length - 128) :], values[:, max(0, length - 128) :])


def test_outliers_affect_only_their_own_group():
    keys, values = numbers(2, 64, 32), numbers(2, 64, 32, seed=1)
    plain = filled(keys, values).read()
    big_keys, big_values = keys.clone(), values.clone()
    big_keys[:, :, 5] *= 1000
    big_values[:, 7] *= 1000
    changed = filled(big_keys, big_values).read()
    others = [c for c in range(32) if c != 5]
    assert torch.equal(plain[0][:, :, others], changed[0][:, :, others])
    tokens = [t for t in range(64) if t != 7]
    assert torch.equal(plain[1][:, tokens], changed[1][:, tokens])


@pytest.mark.parametrize("prompt", [1, 20, 32, 33, 70])
def test_single_appends_match_one_append(prompt):
    """Blocks start at multiples of the residual length, however the tokens are appended."""
    keys, values = numbers(2, 110, 32), numbers(2, 110, 32, seed=1)
    grown = filled(keys[:, :prompt], values[:, :prompt])
    for t in range(prompt, 110):
        grown.append(keys[:, t : t + 1], values[:, t : t + 1])
        grown.flush()
    whole = filled(keys, values)
    for a, b in zip(grown.read(), whole.read(), strict=True):
        assert torch.equal(a, b)
    assert grown.logical_bytes == whole.logical_bytes
    assert grown.length == 110


def test_a_token_is_quantized_after_its_own_step():
    keys, values = numbers(2, 32, 32), numbers(2, 32, 32, seed=1)
    segments = filled(keys[:, :31], values[:, :31])
    segments.append(keys[:, 31:], values[:, 31:])
    assert torch.equal(segments.read()[0], keys)
    segments.flush()
    assert not torch.equal(segments.read()[0], keys)


@pytest.mark.parametrize(("bits", "ratio"), [(2, 3.0), (4, 5.0), (8, 9.0)])
def test_bytes_of_a_long_sequence_approach_the_published_bits(bits, ratio):
    """bits + 32 / group per number: two 16-bit numbers for each group of 32."""
    shape = KVShape(layers=1, kv_heads=1, head_dim=128, element_bytes=2, query_heads=1)
    length = 128 * 8000
    quantised = Kivi(bits).bytes_formula([length], 1, shape)
    assert 8 * quantised / (2 * length * 128) == pytest.approx(ratio, rel=1e-3)


@pytest.mark.parametrize(("length", "bits", "ratio"), [(512, 2, 3.46), (512, 4, 2.51), (4096, 2, 5.0), (4096, 4, 3.09)])
def test_published_ratios_at_finite_lengths(length, bits, ratio):
    shape = KVShape(layers=32, kv_heads=32, head_dim=128, element_bytes=2, query_heads=32)
    full = 2 * 32 * 32 * 128 * 2 * length
    assert full / Kivi(bits).bytes_formula([length] * 32, 32, shape) == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("length", [5, 16, 17, 70])
def test_measured_bytes_match_the_formula(bits, length):
    model = tiny_model()
    method = Method("kivi", storage=Kivi(bits, group=8, residual=16))
    shape = kv_shape(model.config, model.dtype)
    cache = method.new_cache(model)
    prefill(model, cache, torch.cat([prompt_ids(length, s) for s in range(2)]))
    assert cache.kv_bytes_stored == cache.kv_bytes_logical == 2 * method.bytes_formula(shape, length)
    for i in range(40):
        decode(model, cache, torch.tensor([3 + i, 4]))
        assert cache.kv_bytes_logical == 2 * method.bytes_formula(shape, length, i + 1)


def test_error_decreases_with_more_bits():
    model, ids = tiny_model(dtype=torch.float32), prompt_ids(90)
    tokens = generate(model, Method("full").new_cache(model), ids, max_new_tokens=20).tokens[0]

    def logits(method: Method) -> torch.Tensor:
        cache = method.new_cache(model)
        return torch.stack([prefill(model, cache, ids), *(decode(model, cache, torch.tensor([t])) for t in tokens)])

    full = logits(Method("full"))
    errors = [(logits(Method("kivi", storage=Kivi(b, 8, 8))) - full)[1:].norm().item() for b in (2, 4, 8)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


def test_on_top_of_snapkv_the_bytes_of_both_are_saved():
    model = tiny_model()
    shape = kv_shape(model.config, model.dtype)
    method = Method("snapkv", EvictionPolicy(SnapKV(window=8), 40), Kivi(4, group=8, residual=8))
    cache = method.new_cache(model)
    prefill(model, cache, prompt_ids(90))
    assert (
        cache.kv_bytes_stored
        == method.bytes_formula(shape, 90)
        < Method("snapkv", EvictionPolicy(SnapKV(window=8), 40)).bytes_formula(shape, 90)
    )
    assert [int(t[0, 0]) for t in cache.tokens_held] == [40] * 3
    assert method.label == "snapkv 40 + kivi4"


def test_invalid_compositions_are_refused():
    with pytest.raises(InputError, match=r"method/storage=kivi4: holds rounded tokens, and method=h2o"):
        Method("h2o", EvictionPolicy(AttentionSums(), 10), Kivi())


@pytest.mark.parametrize(
    "options", [{"bits": 3}, {"bits": 2, "group": 2}, {"group": 24}, {"residual": 100}, {"residual": 0}, {"group": 0}]
)
def test_bad_settings(options):
    with pytest.raises(InputError, match=r"method\.storage\."):
        Kivi(**options)


def test_a_group_that_does_not_divide_the_head_is_refused():
    model = tiny_model()
    with pytest.raises(InputError, match=r"method\.storage\.group=12: must divide the model's head_dim of 16"):
        prefill(model, Method("kivi", storage=Kivi(4, 12, 12)).new_cache(model), prompt_ids(40))


def test_a_head_whose_codes_do_not_fill_bytes():
    with pytest.raises(InputError, match=r"method\.storage\.bits=2: does not fill whole bytes with .* head_dim of 6"):
        value_group_size(32, 6, 2)
    assert value_group_size(32, 6, 4) == 6
    assert value_group_size(32, 64, 2) == 32


def test_a_storage_whose_numbers_changed_is_another_run():
    """Records of scales in bfloat16 are not reused, nor shown as these; a storage that never changed says nothing."""
    assert Method("kivi", storage=Kivi(4)).identity()["storage"]["version"] == 2
    assert Method("minicache", storage=MiniCacheKivi()).identity()["storage"]["version"] == 2
    assert all("version" not in part for part in (Method("full").identity()[p] for p in ("selection", "storage")))
