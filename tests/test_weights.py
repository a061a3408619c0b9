"""Weights in oneDNN's blocks: the same layers, stored once, in every model that a runner runs on the CPU."""

import copy
import weakref
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import prompt_ids, tiny_model
from torch import nn

from kvbench.methods.base import Method
from kvbench.methods.sharing.yoco import YOCO
from kvbench.models.base import LoadedModel
from kvbench.models.random import RandomModel
from kvbench.models.tiny import TinyModel
from kvbench.runners import weights
from kvbench.runners.engine import generate, prefill
from kvbench.runners.passes import bytes_read_per_step
from kvbench.runners.weights import BlockedLinear, has_blocked_products, lay_out, load

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
        out = BlockedLinear(linear)(x)
        exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    assert out.dtype == dtype and out.shape == exact.shape
    torch.testing.assert_close(out.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=200 * 2**-24)
    # rows of a transposed tensor, and rows that are not next to one another
    for other in (x.transpose(0, -1).contiguous().transpose(0, -1), torch.stack([x, -x], -1)[..., 0]):
        with torch.inference_mode():
            assert torch.equal(BlockedLinear(linear)(other), out)


@dataclass(frozen=True)
class Loads:
    """A source that has loaded already."""

    model: nn.Module

    def load(self, device: str, dtype: torch.dtype) -> LoadedModel:
        return LoadedModel(self.model, None, "one", 10, 20, "", random_weights=True)


def linear_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Linear | BlockedLinear)]


def a_model(family: str) -> nn.Module:
    if family == "yoco":  # trained, with layers of its own kinds
        return TinyModel(trained_on="recall").for_sharing(YOCO(window=16), "yoco").load("cpu", torch.float32).model
    return copy.deepcopy(tiny_model(family)).float()


@float32
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "yoco"])
def test_a_model_that_is_run_has_blocked_layers_and_its_own_weights(family):
    plain = a_model(family)
    blocked = load(Loads(copy.deepcopy(plain)), "cpu", torch.float32).model
    assert len(linear_layers(plain)) == len(linear_layers(blocked)) > 7
    assert all(type(layer) is BlockedLinear for layer in linear_layers(blocked))
    for ours, theirs in zip(linear_layers(blocked), linear_layers(plain), strict=True):
        assert torch.equal(ours.weight.to_dense(), theirs.weight)
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
    lay_out(blocked)
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
        return BlockedLinear(layer)

    monkeypatch.setattr(weights, "BlockedLinear", copied)
    lay_out(model)
    assert alive == [*reversed(range(len(old)))] and len(old) > 7


def test_what_is_not_for_the_cpu_s_kernels_stays(monkeypatch):
    model = RandomModel("tiny").load("cpu", torch.float32).model
    monkeypatch.setattr(weights, "has_blocked_products", lambda dtype: False)
    lay_out(model)
    assert not any(isinstance(m, BlockedLinear) for m in model.modules())
    monkeypatch.undo()
    model.hf_device_map = {"": "cpu"}  # accelerate's hooks move the weights
    assert not any(isinstance(m, BlockedLinear) for m in load(Loads(model), "cpu", torch.float32).model.modules())
    assert not has_blocked_products(torch.float64) and not has_blocked_products(torch.float16)

    class Mine(nn.Linear):
        """A layer that does something of its own."""

    model = nn.Sequential(Mine(8, 8), nn.Linear(8, 8, device="meta"), nn.Linear(8, 8).double())
    lay_out(model)
    assert not any(isinstance(m, BlockedLinear) for m in model)
