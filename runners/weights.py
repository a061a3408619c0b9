"""Weights as the engine wants them: on a CPU, laid out for products with few rows.

A step of decoding multiplies every weight by one row of each request. For that torch.nn.Linear calls MKL in float32,
which is made for large matrices and takes its generic kernels on processors that are not Intel's: it can be several
times slower than reading the weights (docs/efficiency.md has the figures). oneDNN, which is a part of torch, multiplies
by weights that are stored in the blocks its kernels read; torch.compile does the same for a frozen model. In
the decoders of :mod:`.fused_decode`, weights with the same input are one tensor, as in other inference engines: each
product costs a start, and a small one is not shared out well between threads. A weight is stored once, in the one form
or the other; only an output layer tied to the embedding needs its table twice, for a table is looked up by rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import nn

from ..models.base import LoadedModel, ModelSource
from .fused_decode import BUILT_ALIKE

PIECE_TOKENS = 1024
"""Tokens of a prompt for which a joined MLP holds what lies between its products."""


class PrepackedLinear(nn.Module):
    """A linear layer whose weight lies in oneDNN's blocks; for inference alone.

    It has no gradient, and its ``weight`` is of a kind that few operations take: it is not moved to another device,
    cast, saved or given to a state dict.

    Args:
        linear: the layer to stand for, with a weight of [out_features, in_features] on the CPU, of a type for which
            :func:`has_blocked_products`. The weight is copied and the bias shared.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        blocked = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.weight = nn.Parameter(blocked, requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


def has_blocked_products(dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN multiplies blocked weights of this dtype."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


class FusedQKV(nn.Module):
    """The product of one input with several weights, asked for one weight at a time.

    Args:
        whole: the layers as one, their outputs one after another.
        sizes: output features of each.
    """

    def __init__(self, whole: PrepackedLinear, sizes: Sequence[int]):
        super().__init__()
        self.whole, self.sizes = whole, list(sizes)
        self._input: torch.Tensor | None = None
        self._parts: list[torch.Tensor | None] = []

    def part(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., tokens, in_features] times one weight: [..., tokens, sizes[number]].

        The others of the same tensor are kept until they are asked for, each once; nothing is kept behind the last.
        """
        if x is not self._input or self._parts[number] is None:
            parts = self.whole(x).split(self.sizes, -1)
            # What a prompt's value is kept in must not hold its query too.
            self._parts = [part.contiguous() if x.shape[-2] > 1 else part for part in parts]
            self._input = x
        out, self._parts[number] = self._parts[number], None
        if all(part is None for part in self._parts):
            self._input = None
        assert out is not None
        return out


class QKVSlice(nn.Module):
    """Stands in the place of one of the layers of a :class:`FusedQKV`."""

    def __init__(self, shared: FusedQKV, number: int):
        super().__init__()
        self.shared, self.number = shared, number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.shared.part(self.number, x)


class FusedGateUpMLP(nn.Module):
    """A gated MLP, ``down(act(gate(x)) * up(x))``, with gate and up in one product.

    A prompt goes through in pieces, so that what lies between the products is not held for all of it.

    Args:
        gate_and_up: both layers as one, gate first.
        down: the layer behind them, in either form.
        act: between them.
    """

    def __init__(self, gate_and_up: PrepackedLinear, down: nn.Module, act: nn.Module):
        super().__init__()
        self.gate_and_up, self.down, self.act = gate_and_up, down, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., hidden]."""
        if x.shape[:-1].numel() > PIECE_TOKENS:
            return torch.cat([self(piece) for piece in x.flatten(0, -2).split(PIECE_TOKENS)]).view_as(x)
        gate, up = self.gate_and_up(x).chunk(2, -1)
        out: torch.Tensor = self.down(self.act(gate) * up)
        return out


def _for_blocks(layer: object) -> TypeGuard[nn.Linear]:
    return type(layer) is nn.Linear and layer.weight.device.type == "cpu" and has_blocked_products(layer.weight.dtype)


def _taken(owner: nn.Module, names: Sequence[str]) -> nn.Linear | None:
    """One layer of the outputs of several, which are removed from their owner; None if they cannot be joined."""
    layers: list[Any] = [getattr(owner, name, None) for name in names]
    if not all(map(_for_blocks, layers)) or len({layer.bias is None for layer in layers}) > 1:
        return None
    outputs = sum(layer.out_features for layer in layers)
    whole = nn.Linear(layers[0].in_features, outputs, bias=layers[0].bias is not None, device="meta")
    whole.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
    if whole.bias is not None:
        whole.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]), requires_grad=False)
    for name in names:
        delattr(owner, name)
    return whole


def _join(layer: Any) -> None:
    """Join the products of one decoder layer, built like Llama's, that have the same input."""
    attention, mlp = layer.self_attn, layer.mlp
    names = ("q_proj", "k_proj", "v_proj")
    sizes = [getattr(attention, name).out_features for name in names]
    whole = _taken(attention, names)
    if whole is not None:
        shared = FusedQKV(PrepackedLinear(whole), sizes)
        for number, name in enumerate(names):
            setattr(attention, name, QKVSlice(shared, number))
    del whole
    whole = _taken(mlp, ("gate_proj", "up_proj"))
    if whole is not None:
        layer.mlp = FusedGateUpMLP(PrepackedLinear(whole), mlp.down_proj, mlp.act_fn)


def prepack_linear_weights(model: nn.Module) -> None:
    """Replace the linear layers of a model on the CPU by :class:`PrepackedLinear`, one (or one joined) at a time.

    At no time is more than that held in both forms. Layers on other devices, or of a type that the machine's oneDNN
    does not multiply in blocks, stay. A model that accelerate spread over devices keeps what it has: its hooks move the
    weights themselves.

    Args:
        model: a model for inference; changed in place.
    """
    if getattr(model, "hf_device_map", None) is not None:
        return
    decoder: Any = model
    if type(model) in BUILT_ALIKE:
        for layer in decoder.model.layers:
            _join(layer)
    # A list of the layers themselves would keep all of them until the last is replaced.
    names = [name for name, module in model.named_modules() if _for_blocks(module) and name]
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        model.set_submodule(name, PrepackedLinear(module))
    if names:
        let_go_of_files(model)


def let_go_of_files(model: nn.Module) -> None:
    """Copy what was not laid out: one tensor that is mapped from a file keeps all of the file in the resident set."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.layout == torch.strided and tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def load(source: ModelSource, device: str, dtype: torch.dtype) -> LoadedModel:
    """Load a model for inference: :meth:`ModelSource.load`, then :func:`prepack_linear_weights`."""
    loaded = source.load(device, dtype)
    prepack_linear_weights(loaded.model)
    return loaded
