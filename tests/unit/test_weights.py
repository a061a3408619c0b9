"""Weights in oneDNN's blocks: the same layers, stored once, in every model that a runner runs on the CPU."""

import copy
import gc
import itertools
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import SHAPE, prompt_ids, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from kvbench.methods.cache.method import Method
from kvbench.methods.sharing.yoco import YOCO
from kvbench.models.base import LoadedModel
from kvbench.models.random import RandomModel
from kvbench.models.tiny import TinyModel
from kvbench.runners.engine import generate, prefill, weights
from kvbench.runners.engine.fused_weights import GATE_UP, QKV, are_fusable, fuse, fused
from kvbench.runners.engine.prepacked import FusedGateUpMLP, FusedQKV, PrepackedLinear, QKVSlice, has_blocked_products
from kvbench.runners.engine.weights import fuse_linear_weights, load, prepack_linear_weights
from kvbench.runners.measure.time_pass import bytes_read_per_step

float32 = pytest.mark.skipif(not has_blocked_products(torch.float32), reason="torch has no oneDNN here")
bfloat16 = pytest.mark.skipif(not has_blocked_products(torch.bfloat16), reason="oneDNN has no bfloat16 here")


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=float32), pytest.param(torch.bfloat16, marks=bfloat16)]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 7), (65,), (1, 300)])
def test_a_blocked_layer_is_the_layer(dtype, bias, shape):
    """Against float64 products; no further from them than the dtype's own rounding of sums of 200 terms."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(200, 77, bias=bias).to(dtype)
    x = torch.randn(*shape, 200, generator=generator).to(dtype)
    with torch.inference_mode():
        out = PrepackedLinear(linear)(x)
        exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    assert out.dtype == dtype and out.shape == exact.shape
    torch.testing.assert_close(out.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=200 * 2**-24)
    # rows of a transposed tensor, and rows that are not next to one another
    for other in (x.transpose(0, -1).contiguous().transpose(0, -1), torch.stack([x, -x], -1)[..., 0]):
        with torch.inference_mode():
            assert torch.equal(PrepackedLinear(linear)(other), out)


@dataclass(frozen=True)
class Loads:
    """A source that has loaded already."""

    model: nn.Module

    def load(self, device: str, dtype: torch.dtype) -> LoadedModel:
        return LoadedModel(self.model, None, "one", 10, 20, "", random_weights=True)


def linear_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Linear | PrepackedLinear)]


def weight_of(model: nn.Module, name: str) -> torch.Tensor:
    """The weight that had this name, wherever it is now."""
    owner, _, last = name.rpartition(".")
    parent = model.get_submodule(owner)
    if isinstance(parent, FusedGateUpMLP):
        gate, up = parent.gate_and_up.weight.to_dense().chunk(2)
        return {"gate_proj": gate, "up_proj": up}.get(last, parent.down.weight.to_dense())
    layer = getattr(parent, last)
    if isinstance(layer, QKVSlice):
        return layer.fused.whole.weight.to_dense().split(layer.fused.sizes)[layer.number]
    return layer.weight.to_dense()


def a_model(family: str) -> nn.Module:
    if family == "yoco":  # trained, with layers of its own kinds
        return TinyModel(trained_on="recall").for_sharing(YOCO(window=16), "yoco").load("cpu", torch.float32).model
    return copy.deepcopy(tiny_model(family)).float()


@float32
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "yoco"])
def test_a_model_that_is_run_has_blocked_layers_and_its_own_weights(family):
    plain = a_model(family)
    blocked = load(Loads(copy.deepcopy(plain)), "cpu", torch.float32).model
    assert all(type(layer) is PrepackedLinear for layer in linear_layers(blocked))
    names = [name for name, module in plain.named_modules() if isinstance(module, nn.Linear)]
    assert len(names) > 7
    joined = 0
    for name in names:
        ours, theirs = weight_of(blocked, name), plain.get_submodule(name).weight
        joined += isinstance(blocked.get_submodule(name.rpartition(".")[0]), FusedGateUpMLP)
        assert torch.equal(ours, theirs)
    assert joined == (0 if family == "yoco" else 3 * plain.config.num_hidden_layers)
    ids = prompt_ids(40, 1) % plain.config.vocab_size
    method = Method("yoco", sharing=YOCO(window=16)) if family == "yoco" else Method("full")
    one, other = (prefill(m, method.new_cache(m), ids) for m in (plain, blocked))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    one, other = (generate(m, method.new_cache(m), ids, max_new_tokens=12).tokens for m in (plain, blocked))
    assert one == other


@float32
@pytest.mark.parametrize("tied", [True, False])
def test_a_weight_is_held_once_and_a_tied_table_twice(tied):
    """Bytes held; bytes that a step reads are the same in either form."""
    plain = RandomModel("tiny").load("cpu", torch.float32).model
    config = copy.deepcopy(plain.config)
    config.tie_word_embeddings = tied
    plain = type(plain)(config).eval()
    blocked = copy.deepcopy(plain)
    prepack_linear_weights(blocked)
    table = plain.get_input_embeddings().weight
    held, before = (sum(p.nbytes for p in m.parameters()) for m in (blocked, plain))
    assert (plain.get_output_embeddings().weight is table) == tied
    assert held == before + (table.nbytes if tied else 0)
    work: Any = [SimpleNamespace(requests=[SimpleNamespace(prompt=range(30))], steps=5)]
    read = [bytes_read_per_step(work, m, Method("full")) for m in (plain, blocked)]
    assert read[0] == read[1] > 0


@float32
def test_layers_are_replaced_one_at_a_time(monkeypatch):
    """When the second is being copied, the first is gone."""
    model = RandomModel("tiny").load("cpu", torch.float32).model
    old = [weakref.ref(layer) for layer in linear_layers(model)]
    alive = []

    def copied(layer):
        alive.append(sum(ref() is not None and ref() is not layer for ref in old))
        return PrepackedLinear(layer)

    monkeypatch.setattr(weights, "PrepackedLinear", copied)
    prepack_linear_weights(model)
    layers = model.config.num_hidden_layers
    gone = [3, 2] * layers + [1, 1] * layers + [1]  # joined ones; outputs, downs; the head
    assert alive == [len(old) - n for n in itertools.accumulate(gone)] and alive[-1] == 0 and len(old) > 7


@float32
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says which files are mapped")
@torch.inference_mode()
def test_a_model_from_a_file_does_not_hold_the_file_beside_its_weights(tmp_path):
    """Or the resident set, which is the memory that a CPU run reports, has every weight twice."""
    tiny_model("llama", torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = model(prompt_ids(20)).logits
    assert str(tmp_path) in Path("/proc/self/maps").read_text()  # as the library loads it
    prepack_linear_weights(model)
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    torch.testing.assert_close(model(prompt_ids(20)).logits, before, rtol=0, atol=1e-4)


def joined_products(bias: bool = False) -> tuple[FusedQKV, list[nn.Linear]]:
    layers = [nn.Linear(24, size, bias=bias) for size in (32, 16, 8)]
    whole = nn.Linear(24, 56, bias=bias)
    with torch.no_grad():
        whole.weight.copy_(torch.cat([m.weight for m in layers]))
        if bias:
            whole.bias.copy_(torch.cat([m.bias for m in layers]))
    return FusedQKV(PrepackedLinear(whole), [32, 16, 8]), layers


@float32
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_joined_products_are_the_layers_in_any_order_and_nothing_is_kept(bias):
    shared, layers = joined_products(bias)
    parts = [QKVSlice(shared, number) for number in range(3)]
    a, b, prompt = torch.randn(2, 1, 24), torch.randn(2, 1, 24), torch.randn(2, 9, 24)
    # each once; one twice; others between; one alone, then another input; a prompt
    for number, x in [(0, a), (1, a), (2, a), (0, b), (0, b), (2, a), (1, b), (2, b), (0, prompt), (1, prompt)]:
        torch.testing.assert_close(parts[number](x), layers[number](x), rtol=1e-5, atol=1e-6)
    out = parts[2](prompt)
    assert out.untyped_storage().nbytes() == out.nbytes == 2 * 9 * 8 * 4  # of a prompt: no more than itself
    assert shared._input is None and not any(part is not None for part in shared._slices)


@float32
@torch.inference_mode()
def test_products_are_computed_once_for_what_meets_them(monkeypatch):
    shared, _ = joined_products()
    calls = []
    real = PrepackedLinear.forward
    monkeypatch.setattr(PrepackedLinear, "forward", lambda self, x: calls.append(x.shape) or real(self, x))
    for x in torch.randn(3, 1, 1, 24).unbind():
        for number in (0, 1, 2):
            shared.slice_of(number, x)
    assert len(calls) == 3


@float32
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 700), (1, 2500)])
@torch.inference_mode()
def test_a_joined_mlp_is_the_mlp_whole_and_in_pieces(shape):
    plain = tiny_model("llama", torch.float32)
    joined = copy.deepcopy(plain)
    prepack_linear_weights(joined)
    mlp, other = plain.model.layers[1].mlp, joined.model.layers[1].mlp
    assert isinstance(other, FusedGateUpMLP)
    x = torch.randn(*shape, plain.config.hidden_size)
    torch.testing.assert_close(other(x), mlp(x), rtol=1e-4, atol=1e-5)


def a_qwen2(**changes: Any) -> nn.Module:
    """A model with biases of query, key and value and of nothing else."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE | changes)).double().eval()
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(bias)
    return model


def held_bytes(model: nn.Module) -> int:
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_fused_weights_are_held_once_and_the_model_is_the_same(family):
    """Grouped queries with and without biases: names, values, bytes and a prompt's logits stay; the products agree."""
    plain = a_qwen2() if family == "qwen2" else tiny_model()
    model = copy.deepcopy(plain)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert held_bytes(plain) == sum(p.nbytes for p in plain.parameters())
    for _ in range(2):
        fuse_linear_weights(model)
        assert held_bytes(model) == held_bytes(plain) == sum(p.nbytes for p in model.parameters())
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(model(prompt_ids(20)).logits, plain(prompt_ids(20)).logits)
    x = torch.randn(3, 1, 64, dtype=torch.float64)
    layer = model.model.layers[1]
    for owner, names in ((layer.self_attn, QKV), (layer.mlp, GATE_UP)):
        layers = [getattr(owner, name) for name in names]
        whole = fused(layers)
        assert whole is not None and whole.weight.data_ptr() == layers[0].weight.data_ptr()
        expected = torch.cat([one(x) for one in layers], -1)
        torch.testing.assert_close(nn.functional.linear(x, *whole), expected, rtol=0, atol=1e-13)


def test_what_cannot_be_fused_is_left_alone():
    class Quantized(nn.Linear):
        pass

    layers = [nn.Linear(8, n) for n in (6, 4, 2)]
    fuse(layers)
    assert fused(layers) is not None
    assert fused(layers[::-1]) is None  # not in this order
    layers[1].weight = nn.Parameter(layers[1].weight.detach().clone())
    assert fused(layers) is None  # a weight that was replaced since
    assert not are_fusable([nn.Linear(8, 4), Quantized(8, 4)])
    assert not are_fusable([nn.Linear(8, 4), nn.Linear(8, 4, bias=False)])
    assert not are_fusable([nn.Linear(8, 4), nn.Linear(9, 4)])
    assert not are_fusable([nn.Linear(8, 4), nn.Linear(8, 4).double()])
    assert not are_fusable([nn.Linear(8, 4), None])
    model = a_qwen2()
    model.model.layers[0].self_attn.k_proj = Quantized(64, 32)
    model.hf_device_map = {}
    fuse_linear_weights(model)
    one = model.model.layers[1]
    assert fused([getattr(one.mlp, name) for name in GATE_UP]) is None  # spread over devices
    del model.hf_device_map
    fuse_linear_weights(model)
    found = [fused([getattr(layer.self_attn, name) for name in QKV]) is not None for layer in model.model.layers]
    assert found == [False, True, True] and fused([getattr(one.mlp, name) for name in GATE_UP]) is not None


def test_what_is_not_for_the_cpu_s_kernels_stays(monkeypatch):
    model = RandomModel("tiny").load("cpu", torch.float32).model
    monkeypatch.setattr(weights, "has_blocked_products", lambda dtype: False)
    prepack_linear_weights(model)
    assert not any(isinstance(m, PrepackedLinear) for m in model.modules())
    monkeypatch.undo()
    model.hf_device_map = {"": "cpu"}  # accelerate's hooks move the weights
    assert not any(isinstance(m, PrepackedLinear) for m in load(Loads(model), "cpu", torch.float32).model.modules())
    assert not has_blocked_products(torch.float64) and not has_blocked_products(torch.float16)

    class Mine(nn.Linear):
        """A layer that does something of its own."""

    model = nn.Sequential(Mine(8, 8), nn.Linear(8, 8, device="meta"), nn.Linear(8, 8).double())
    prepack_linear_weights(model)
    assert not any(isinstance(m, PrepackedLinear) for m in model)
