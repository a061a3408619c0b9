"""FP8: codes against the definition of the formats, scales, bytes, and tokens that leave without changing others."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import left_pad, prompt_ids, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from kvbench.conf.errors import InputError
from kvbench.methods.cache.kv_shape import kv_shape
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.method import Method
from kvbench.methods.cache.products import cached_attention
from kvbench.methods.storage.coded import CodedLayer
from kvbench.methods.storage.fp8 import Fp8, Fp8Codec
from kvbench.runners.config.methods import named_method
from kvbench.runners.config.settings import Settings
from kvbench.runners.engine import decode, prefill
from kvbench.runners.records.record import RunFolder
from kvbench.runners.records.runs import announce_needs, record_head
from kvbench.tasks.base import Source

EXPONENT_BITS = {"e4m3": 4, "e5m2": 5}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
SETTINGS = [("e4m3", "token"), ("e4m3", "one"), ("e4m3", "tensor"), ("e4m3", "head"), ("e5m2", "one"), ("e5m2", "head")]

DUO = "mean queries and keys of the prompt itself, in place of a calibration"


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def value_of(code: int, format: str) -> float:
    """A code's number by the definition of the format: sign, exponent, mantissa; NaN for what is not finite."""
    exponent_bits = EXPONENT_BITS[format]
    mantissa_bits, bias = 7 - exponent_bits, 2 ** (exponent_bits - 1) - 1
    exponent, mantissa = (code & 127) >> mantissa_bits, code & (2**mantissa_bits - 1)
    if exponent == 0:
        size = mantissa * 2.0 ** (1 - bias - mantissa_bits)
    else:
        size = (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)
    return math.nan if size > LARGEST[format] else math.copysign(size, -1 if code & 128 else 1)


def naive_codes(x: torch.Tensor, format: str) -> torch.Tensor:
    """The nearest finite number of each, of two equally near ones the one with an even code, by looking at all."""
    values = torch.tensor([value_of(code, format) for code in range(128)], dtype=torch.float64).nan_to_num(math.inf)
    distance = (x.abs().double()[..., None] - values).abs() + (torch.arange(128) % 2) * 1e-30
    tied = distance <= distance.amin(-1, keepdim=True) + 1e-25 * x.abs().double()[..., None]
    odd_last = torch.where(tied, torch.arange(128) % 2, 2)
    code = odd_last.argmin(-1)
    return (code + 128 * torch.signbit(x)).to(torch.uint8)


def layer_with(storage: Fp8, keys: torch.Tensor, values: torch.Tensor, valid=None) -> CodedLayer:
    layer = storage.new_layers(1)[0]
    layer.write(keys, values, valid)
    return layer


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_codes_are_the_nearest_numbers_of_the_format(format):
    """All finite numbers, everything half way between two of them, and random ones, bit by bit."""
    finite = torch.tensor([v for c in range(256) if not math.isnan(v := value_of(c, format))], dtype=torch.float64)
    assert len(finite) == (254 if format == "e4m3" else 248)
    ordered = finite.unique()
    half_way = (ordered[1:] + ordered[:-1]) / 2
    x = torch.cat([finite, half_way, 30 * numbers(500).double(), 2**-8 * numbers(200).double()]).float()
    codec = Fp8Codec(format, "one")
    (codes,) = codec.encode(x[None, None], [])
    assert codes.dtype == {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[format]
    assert torch.equal(codes.view(torch.uint8)[0, 0], naive_codes(x, format))
    back = codec.decode([codes], [], torch.float64)[0, 0]
    assert torch.equal(back, torch.tensor([value_of(int(c), format) for c in codes.view(torch.uint8)[0, 0]]).double())
    assert torch.equal(back[: len(finite)], finite)


@pytest.mark.parametrize(("format", "scale"), SETTINGS)
def test_stored_numbers_match_a_naive_construction(format, scale):
    """Each number by itself: divided by its scale as stored, rounded to the nearest code, and multiplied again."""
    x = numbers(2, 3, 20, 16) * torch.tensor([1.0, 30.0, 0.01])[:, None, None]
    valid = torch.arange(20) >= torch.tensor([0, 7])[:, None, None]
    x[1, :, :7] = 1e6  # padding, which no scale depends on
    layer = layer_with(Fp8(format, scale), x, x, valid)
    largest = (x.abs() * valid[..., None]).amax(-1)  # [B, H, S]
    wanted = {
        "one": torch.ones(2, 3, 20),
        "tensor": (largest.amax((1, 2), keepdim=True) / LARGEST[format]).expand(2, 3, 20),
        "head": (largest.amax(2, keepdim=True) / LARGEST[format]).expand(2, 3, 20),
        "token": (largest / LARGEST[format]).clamp(min=2**-14).half().float(),
    }[scale][..., None]
    codes = naive_codes((x / wanted).clamp(-LARGEST[format], LARGEST[format]), format)
    table = torch.tensor([value_of(c, format) for c in range(256)])
    keys, values, held = layer.read()
    for found in (keys, values):
        assert torch.equal(found[held], (table[codes.long()] * wanted)[valid.expand_as(held)])


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("format", "scale", "rms", "worst"),
    [
        ("e4m3", "one", 0.0265, 1 / 17),
        ("e4m3", "token", {64: 0.0250, 128: 0.0257}, 1 / 17),
        ("e5m2", "one", 0.0528, 1 / 9),
    ],
)
def test_errors_are_those_of_the_formats(format, scale, rms, worst, dim):
    x = numbers(1, 4000, dim)
    codec = Fp8Codec(format, scale)
    error = (codec.decode(codec.encode(x, []), [], torch.float32) - x).abs()
    assert float(error.norm() / x.norm()) == pytest.approx(rms if isinstance(rms, float) else rms[dim], rel=0.03)
    step = 1 if scale == "one" else x.abs().amax(-1, keepdim=True) / LARGEST[format]
    subnormal = step * {"e4m3": 2**-10, "e5m2": 2**-17}[format]
    assert (error <= torch.maximum(worst * x.abs(), torch.as_tensor(subnormal)) * 1.001).all()


@pytest.mark.parametrize(("format", "scale"), SETTINGS)
def test_what_is_larger_than_the_format_is_clamped_and_zeros_stay(format, scale):
    x = numbers(1, 1, 8, 16)
    layer = layer_with(Fp8(format, scale), x, x)
    layer.append(torch.full((1, 1, 1, 16), 1e6), torch.zeros(1, 1, 1, 16))
    keys, values, _ = layer.read()
    assert keys.isfinite().all() and (values[:, :, -1] == 0).all()
    if scale != "token":
        expected = LARGEST[format] if scale == "one" else float(x.abs().max())
        assert float(keys[0, 0, -1].max()) == pytest.approx(expected)


def test_a_large_channel_costs_the_others_nothing():
    """A scale of the vector lowers no exponent of small numbers, unlike a step of equal size for all channels."""
    x = numbers(1, 1, 200, 64)
    x[..., 5] *= 300
    keys, _, _ = layer_with(Fp8(), x, x).read()
    others = [c for c in range(64) if c != 5]
    assert float((keys - x)[..., others].norm() / x[..., others].norm()) == pytest.approx(0.0265, rel=0.05)


@pytest.mark.parametrize(("format", "scale"), SETTINGS)
def test_tokens_one_by_one_are_tokens_at_once_and_others_leave_alone(format, scale):
    keys, values = numbers(2, 3, 30, 16), numbers(2, 3, 30, 16, seed=1)
    at_once, singly = (layer_with(Fp8(format, scale), keys[:, :, :20], values[:, :, :20]) for _ in range(2))
    at_once.append(keys[:, :, 20:], values[:, :, 20:])
    for t in range(20, 30):
        singly.append(keys[:, :, t : t + 1], values[:, :, t : t + 1])
    whole = at_once.read()[:2]
    for found, expected in zip(singly.read(), whole, strict=False):
        assert torch.equal(found, expected)
    keep = numbers(2, 3, 30, seed=2) > 0
    singly.drop(keep, compact_now=True)
    left, _, valid = singly.read()
    for b in range(2):
        for h in range(3):
            assert torch.equal(left[b, h, valid[b, h]], whole[0][b, h, keep[b, h]])


class NoFloat8Products(TorchDispatchMode):
    """Products of float8 tensors run in PyTorch and round every sum to 8 bits without a word."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.matmul):
            assert all(x.element_size() > 1 for x in args if isinstance(x, torch.Tensor))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("format", "scale"), SETTINGS)
@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, 0.3])])
def test_attention_is_over_the_stored_numbers(format, scale, is_static, sinks):
    """In chunks of a few tokens, on heads of different lengths, with a soft cap and sinks."""
    keys, values, query = numbers(2, 3, 30, 16), numbers(2, 3, 30, 16, seed=1), numbers(2, 6, 1, 16, seed=2)
    valid = torch.arange(30) >= torch.tensor([[0, 3, 9], [21, 5, 0]])[..., None]
    layer = layer_with(Fp8(format, scale), keys, values, valid)
    if is_static:
        layer.make_static(4)
    layer.append(numbers(2, 3, 1, 16, seed=3), numbers(2, 3, 1, 16, seed=4))
    rule = LogitRule(0.3, 5.0, sinks)
    with NoFloat8Products(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvbench.methods.storage.coded.CHUNK_ELEMENTS", 7 * 16 * 6)
        found = layer.attend(query, rule, None)
    torch.testing.assert_close(found, cached_attention(query, *layer.read()[:2], rule, layer.valid), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("format", "scale"), SETTINGS)
@pytest.mark.parametrize("batch", [1, 4])
def test_measured_bytes_match_the_formula(format, scale, batch):
    """And the formula is a byte a number, 2 bytes a vector (scale=token), 4 bytes a head (tensor, head)."""
    model = tiny_model()
    method, shape = Method("fp8", storage=Fp8(format, scale)), kv_shape(model.config, model.dtype)
    cache = method.new_cache(model)
    prefill(model, cache, torch.cat([prompt_ids(50, seed) for seed in range(batch)]))
    heads, dim = shape.layers * shape.kv_heads, shape.head_dim
    expected = heads * (50 * 2 * (dim + 2 * (scale == "token")) + 8 * (scale in ("tensor", "head")))
    assert cache.kv_bytes_stored == cache.kv_bytes_logical == batch * expected
    assert method.bytes_formula(shape, 50) == expected
    kinds = {t.dtype for layer in cache.layers for t in layer.tensors() if t.element_size() == 1}
    assert kinds == {torch.float8_e4m3fn if format == "e4m3" else torch.float8_e5m2}
    decode(model, cache, torch.arange(batch))
    assert cache.kv_bytes_logical == batch * method.bytes_formula(shape, 50, 1)


def test_tokens_that_leave_while_decoding_are_the_uncompressed_methods():
    """H2O over FP8 evicts by the attention over rounded keys; what stays is what was stored, never rounded again."""
    model, method = tiny_model(), named_method("h2o budget=24 storage=fp8")
    cache = method.new_cache(model)
    prefill(model, cache, *left_pad([prompt_ids(60, 1), prompt_ids(41, 2)]))
    layer = cache.layers[1].storage
    vectors = {tuple(v) for v in layer.read()[0].flatten(0, 2).tolist()}
    for token in range(20):
        decode(model, cache, torch.tensor([token, token + 1]))
    assert [t.unique().tolist() for t in cache.tokens_held] == [[24]] * 3
    left = {tuple(v) for v in layer.read()[0].flatten(0, 2).tolist()}
    assert len(left & vectors) > 20 and len(left - vectors) <= 2 * 2 * 20


def test_invalid_settings_are_refused():
    with pytest.raises(InputError, match=r"method\.storage\.scale=token: must be one, tensor or head with .*e5m2"):
        Fp8("e5m2", "token")
    with pytest.raises(InputError, match=r"method/storage=fp8_head: computes its constants from the complete prompt"):
        named_method("streaming_llm budget=24 storage=fp8 storage.scale=head")
    assert named_method("streaming_llm budget=24 storage=fp8").label == "streaming_llm 24 + fp8"


def test_what_a_method_needs_is_stated():
    assert named_method("fp8").needs == "" and named_method("fp8").label == "fp8"
    head = named_method("snapkv budget=64 storage=fp8 storage.format=e5m2 storage.scale=head")
    assert head.needs == "scales from the prompt's largest keys and values"
    assert head.label == "snapkv 64 + fp8_e5m2_head"


@pytest.mark.parametrize(
    ("text", "needs"),
    [
        ("full", ""),
        ("snapkv", ""),
        ("chunkkv", ""),
        ("chunkkv scorer@method.scorer.scorer=duo_attention sinks=128 recent=256", DUO),
        ("duo_attention", DUO),
        ("criticalkv", "the weights of the output projections"),
        ("kvzip", "further forwards over the prompt, and a tokenizer for its request"),
        ("no_cache", "a forward over the whole text for each token"),
        ("cla", ""),
        ("lckv", "9 passes over a prompt in the layers that share keys and values"),
        ("lckv sharing.encode=exact", "a pass for each token over a prompt in the layers that share keys and values"),
        ("snapkv storage=turboquant", "a head_dim that is a power of two"),
        ("criticalkv storage=turboquant", "the weights of the output projections; a head_dim that is a power of two"),
    ],
)
def test_what_each_part_needs_is_stated(text, needs):
    assert named_method(text).needs == needs


def test_needs_are_announced_and_recorded(caplog, tmp_path):
    """Before anything else of a run, once each; a method without needs has no field."""
    methods = [named_method(text) for text in ("full", "fp8 storage.scale=head", "fp8 storage.scale=head", "kvzip")]
    with caplog.at_level("INFO"):
        announce_needs(methods)
    assert caplog.messages == [
        "fp8_head: needs scales from the prompt's largest keys and values",
        "kvzip 1024: needs further forwards over the prompt, and a tokenizer for its request",
    ]
    settings = Settings(results_dir=str(tmp_path))
    folder = RunFolder(tmp_path, "data", "model", "fp8", {"kind": "accuracy", "method": {}, "model": {"name": "tiny"}})
    heads = [record_head("done", folder, m, Source("data", "here", None, {}, ""), settings) for m in methods[:2]]
    assert [head.get("needs") for head in heads] == [None, "scales from the prompt's largest keys and values"]
