"""Weights prepared for inference: on a CPU in the layout of products with few rows, on CUDA fused for decode steps.

A decode step multiplies every weight by one row per request. In the decoders of :mod:`.fused_decode`, weights with the
same input become one tensor, as in other inference engines: each product has a launch cost, and a small one does not
use all threads. A weight is stored once, prepacked or not; only an output layer that is tied to the embedding needs its
table twice, because an embedding is looked up by rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import nn

from ...models.base import LoadedModel, ModelSource
from .fused_decode import LLAMA_LIKE
from .fused_weights import GATE_UP, QKV, are_fusable, fuse, fused
from .model_properties import is_spread
from .prepacked import FusedGateUpMLP, FusedQKV, PrepackedLinear, QKVSlice, has_blocked_products


def load(source: ModelSource, device: str, dtype: torch.dtype) -> LoadedModel:
    """Load a model for inference: :meth:`ModelSource.load`, then :func:`prepare_linear_weights`."""
    loaded = source.load(device, dtype)
    prepare_linear_weights(loaded.model)
    return loaded


def prepare_linear_weights(model: nn.Module, fuse_projections: bool = True) -> None:
    """Prepack the weights of a model on the CPU; on CUDA, fuse those of a Llama-like model with the same input.

    Args:
        model: A model for inference; changed in place.
        fuse_projections: Whether to fuse on CUDA.
    """
    prepack_linear_weights(model)
    device = next((p.device for p in model.parameters()), None)
    if fuse_projections and device is not None and device.type == "cuda":
        fuse_linear_weights(model)


def fuse_linear_weights(model: nn.Module) -> None:
    """Fuse the weights of each Llama-like decoder layer's query, key and value, and of its gate and up projections.

    Decode steps multiply by them as one (:class:`.step_operations.KernelOperations`). Prompts are multiplied by the
    layers themselves, as before. A model that accelerate has spread over devices is not changed.

    Args:
        model: A model for inference; the weights of its layers are replaced by views.
    """
    decoder: Any = model
    if type(model) not in LLAMA_LIKE or is_spread(decoder):
        return
    for layer in decoder.model.layers:
        for owner, names in ((layer.self_attn, QKV), (layer.mlp, GATE_UP)):
            layers: list[Any] = [getattr(owner, name, None) for name in names]
            if are_fusable(layers) and fused(layers) is None:
                fuse(layers)
        if decoder.device.type == "cuda":  # the freed parts are too small for the next layer's whole
            torch.cuda.empty_cache()


def prepack_linear_weights(model: nn.Module) -> None:
    """Replace the linear layers of a model on the CPU by :class:`PrepackedLinear`, one (or one fused group) at a time.

    At most one layer (or group) is stored in both layouts at any time. Layers on other devices, or of a dtype for which
    the machine's oneDNN has no blocked products, are not replaced. A model that accelerate has spread over devices is
    not changed, because its hooks move the weights.

    Args:
        model: A model for inference; changed in place.
    """
    if is_spread(model):
        return
    decoder: Any = model
    if type(model) in LLAMA_LIKE:
        for layer in decoder.model.layers:
            _fuse(layer)
    # Names, because a list of the layers would keep all of them alive until the last is replaced.
    names = [name for name, module in model.named_modules() if _can_prepack(module) and name]
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        model.set_submodule(name, PrepackedLinear(module))
    if names:
        copy_mapped_tensors(model)


def copy_mapped_tensors(model: nn.Module) -> None:
    """Copy the tensors that were not prepacked: one that is mapped from a file keeps the whole file resident."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.layout == torch.strided and tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def _can_prepack(layer: object) -> TypeGuard[nn.Linear]:
    return type(layer) is nn.Linear and layer.weight.device.type == "cpu" and has_blocked_products(layer.weight.dtype)


def _fuse(layer: Any) -> None:
    """Fuse the products of one Llama-like decoder layer that have the same input."""
    attention, mlp = layer.self_attn, layer.mlp
    sizes = [getattr(attention, name).out_features for name in QKV]
    whole = _remove_as_one(attention, QKV)
    if whole is not None:
        products = FusedQKV(PrepackedLinear(whole), sizes)
        for number, name in enumerate(QKV):
            setattr(attention, name, QKVSlice(products, number))
    del whole
    whole = _remove_as_one(mlp, GATE_UP)
    if whole is not None:
        layer.mlp = FusedGateUpMLP(PrepackedLinear(whole), mlp.down_proj, mlp.act_fn)


def _remove_as_one(owner: nn.Module, names: Sequence[str]) -> nn.Linear | None:
    """Remove several layers from their owner, and return one with all their outputs; None if they cannot be fused."""
    layers: list[Any] = [getattr(owner, name, None) for name in names]
    if not all(map(_can_prepack, layers)) or len({layer.bias is None for layer in layers}) > 1:
        return None
    outputs = sum(layer.out_features for layer in layers)
    whole = nn.Linear(layers[0].in_features, outputs, bias=layers[0].bias is not None, device="meta")
    whole.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
    if whole.bias is not None:
        whole.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]), requires_grad=False)
    for name in names:
        delattr(owner, name)
    return whole
