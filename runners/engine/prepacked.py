"""Linear layers for inference on a CPU: prepacked weights, and fused products of layers with the same input.

torch.nn.Linear calls MKL in float32, which is optimized for large matrices and uses its generic kernels on processors
that are not Intel's: with few rows it can be several times slower than reading the weights (figures:
docs/explanation/engine.md). oneDNN, which is part of torch, multiplies by weights stored in the blocks that its kernels
read, as torch.compile does for a frozen model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

MLP_CHUNK_TOKENS = 1024
"""Number of tokens per chunk of a fused MLP, which limits the activations between its products."""


class PrepackedLinear(nn.Module):
    """A linear layer whose weight is stored in oneDNN's blocked layout; for inference only.

    It has no gradient, and few operations accept its ``weight``: it cannot be moved to another device, cast, saved or
    put into a state dict.

    Args:
        linear: The layer to replace, with a weight [out_features, in_features] on the CPU, of a dtype for which
            :func:`has_blocked_products`. The weight is copied and the bias is shared.
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
    """Query, key and value projections as one product, which is requested slice by slice.

    Args:
        whole: The layers as one, their outputs one after another.
        sizes: Output features of each layer.
    """

    def __init__(self, whole: PrepackedLinear, sizes: Sequence[int]):
        super().__init__()
        self.whole, self.sizes = whole, list(sizes)
        self._input: torch.Tensor | None = None
        self._slices: list[torch.Tensor | None] = []

    def slice_of(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., tokens, in_features] times the weight of one layer: [..., tokens, sizes[number]].

        The remaining slices are cached until they are requested; the buffer is released after the last one.
        """
        if x is not self._input or self._slices[number] is None:
            slices = self.whole(x).split(self.sizes, -1)
            # Copy the slices of a prompt, so that the cache, which keeps K/V, does not keep the query alive.
            self._slices = [part.contiguous() if x.shape[-2] > 1 else part for part in slices]
            self._input = x
        out, self._slices[number] = self._slices[number], None
        if all(part is None for part in self._slices):
            self._input = None
        assert out is not None
        return out


class QKVSlice(nn.Module):
    """The replacement of one of the layers that a :class:`FusedQKV` computes."""

    def __init__(self, fused: FusedQKV, number: int):
        super().__init__()
        self.fused, self.number = fused, number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.fused.slice_of(self.number, x)


class FusedGateUpMLP(nn.Module):
    """A gated MLP, ``down(act(gate(x)) * up(x))``, with gate and up as one product.

    Prompts run in chunks, so that the activations between the products are not stored for all tokens.

    Args:
        gate_and_up: Both layers as one, gate first.
        down: The output layer, prepacked or not.
        act: The activation function.
    """

    def __init__(self, gate_and_up: PrepackedLinear, down: nn.Module, act: nn.Module):
        super().__init__()
        self.gate_and_up, self.down, self.act = gate_and_up, down, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., hidden]."""
        if x.shape[:-1].numel() > MLP_CHUNK_TOKENS:
            chunks = x.flatten(0, -2).split(MLP_CHUNK_TOKENS)
            return torch.cat([self(chunk) for chunk in chunks]).view_as(x)
        gate, up = self.gate_and_up(x).chunk(2, -1)
        out: torch.Tensor = self.down(self.act(gate) * up)
        return out
