"""Weights of linear layers with the same input, stored one after another, so that one product computes all of them.

The layers' own weights are views of the one tensor: each weight is stored once, the names in the state dict and the
modules stay, and a call of a module computes what it did before. Whether weights lie one after another is read off the
tensors at the first step of each generation, so weights that were replaced before it are multiplied one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
"""Names of the layers of a Llama-like decoder layer that have the same input."""


class Affine(NamedTuple):
    """A linear layer's weight [out_features, in_features] and bias [out_features]."""

    weight: torch.Tensor
    bias: torch.Tensor | None


def are_fusable(layers: Sequence[Any]) -> bool:
    """Whether layers are plain linear ones of one input, dtype and device, all with a bias or all without."""
    if not all(type(layer) is nn.Linear for layer in layers):
        return False
    kinds = {(x.in_features, x.weight.dtype, x.weight.device, x.bias is None) for x in layers}
    return len(kinds) == 1


def fuse(layers: Sequence[nn.Linear]) -> Affine:
    """Store the weights of layers that :func:`are_fusable` one after another; the layers' own become views."""

    def concatenate(name: str) -> torch.Tensor | None:
        parts = [getattr(layer, name) for layer in layers]
        if parts[0] is None:
            return None
        whole = torch.cat([part.detach() for part in parts])
        for layer, part in zip(layers, whole.split([len(part) for part in parts]), strict=True):
            setattr(layer, name, nn.Parameter(part, requires_grad=False))
        return whole

    weight = concatenate("weight")
    assert weight is not None
    return Affine(weight, concatenate("bias"))


def fused(layers: Sequence[Any]) -> Affine | None:
    """Return the layers as one, with concatenated outputs; None if their weights do not lie one after another."""
    if not are_fusable(layers):
        return None
    weight = _as_one([layer.weight for layer in layers])
    if weight is None or layers[0].bias is None:
        return None if weight is None else Affine(weight, None)
    bias = _as_one([layer.bias for layer in layers])
    return None if bias is None else Affine(weight, bias)


def _as_one(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return tensors [n, ...] that lie one after another in one storage as one view of it; None if they do not."""
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        is_next = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not is_next or part.storage_offset() != end or not part.is_contiguous():
            return None
        end += part.numel()
    return first.detach().as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
