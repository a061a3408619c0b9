"""Weights as the engine wants them: on a CPU, laid out for products with few rows.

A step of decoding multiplies every weight by one row of each request. For that torch.nn.Linear calls MKL in float32,
which is made for large matrices and takes its generic kernels on processors that are not Intel's: it can be several
times slower than reading the weights (docs/efficiency.md has the figures). oneDNN, which is a part of torch, multiplies
by weights that are stored in the blocks its kernels read; torch.compile does the same for a frozen model. A weight is
stored once, in the one form or the other; only an output layer tied to the embedding needs its table twice, for a table
is looked up by rows.
"""

from __future__ import annotations

import torch
from torch import nn

from ..models.base import LoadedModel, ModelSource


class BlockedLinear(nn.Module):
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


def lay_out(model: nn.Module) -> None:
    """Replace the linear layers of a model on the CPU by :class:`BlockedLinear`, one at a time.

    At no time is more than one weight held in both forms. Layers on other devices, or of a type that the machine's
    oneDNN does not multiply in blocks, stay. A model that accelerate spread over devices keeps what it has: its hooks
    move the weights themselves.

    Args:
        model: a model for inference; changed in place.
    """
    if getattr(model, "hf_device_map", None) is not None:
        return
    # Their names: a list of the layers would keep all of them until the last is replaced.
    for name in [name for name, module in model.named_modules() if type(module) is nn.Linear and name]:
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        if module.weight.device.type == "cpu" and has_blocked_products(module.weight.dtype):
            model.set_submodule(name, BlockedLinear(module))


def load(source: ModelSource, device: str, dtype: torch.dtype) -> LoadedModel:
    """A model to be run and not trained: :meth:`ModelSource.load` (its arguments, its errors), then :func:`lay_out`."""
    loaded = source.load(device, dtype)
    lay_out(loaded.model)
    return loaded
