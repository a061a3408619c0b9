"""Output projection of attention layers, for scorers that weigh a value by what it adds to the hidden states.

The module is found by a forward of one token: it is the one that receives the output of a layer's attention. Its
weight is read from a linear layer, and from any other module (quantized, prepacked, with adapters) as its response to
unit vectors.

Legend: H_q query heads, D value channels.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...conf.errors import InputError
from ..sharing.plan import Plan
from .forward import LayerCall
from .layout import ProbeCache, layout_of, run_probe


@dataclass(frozen=True)
class OutputProjection:
    """Module that projects the attention output of a layer.

    Attributes:
        module: Name of the module in the model.
        query_heads: Number of query heads in its input.
        size: Number of channels of its input.
    """

    module: str
    query_heads: int
    size: int


class OutputProbe(ProbeCache):
    """Probe that finds the module to which each layer's attention output is passed.

    Attributes:
        found: Projections by layer of the model.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.found: dict[int, OutputProjection] = {}
        self._pending: tuple[int, int, torch.Tensor] | None = None  # layer, query heads, its output

    def attend(self, layer_idx: int, call: LayerCall, padding_mask: torch.Tensor | None) -> torch.Tensor:
        out = super().attend(layer_idx, call, padding_mask)  # [1, H_q, 1, D]
        self._pending = layer_idx, out.shape[1], out.flatten()
        return out

    def compare(self, name: str, args: tuple[Any, ...]) -> None:
        """Record a module whose input is the attention output that no module has received yet."""
        if self._pending is None or not args or not isinstance(args[0], torch.Tensor):
            return
        layer, query_heads, output = self._pending
        if args[0].numel() == output.numel() and torch.allclose(args[0].flatten(), output, 0, 0, equal_nan=True):
            self.found[layer], self._pending = OutputProjection(name, query_heads, len(output)), None


_projections: weakref.WeakKeyDictionary[PreTrainedModel, dict[int, OutputProjection]] = weakref.WeakKeyDictionary()


def output_weights_of(model: PreTrainedModel, layer_idx: int, method: str) -> list[torch.Tensor]:
    """Return the output projections [H_q, D, hidden] of all layers that attend over the keys of a layer.

    Raises:
        InputError: A layer's attention output passes through something else before the projection.
    """
    plan = layout_of(model).plan
    if model not in _projections:
        _projections[model] = _measure(model, plan)
    number = plan.cache_layer[layer_idx]
    readers = [layer for layer in plan.attending if plan.cache_layer[layer] == number]
    missing = [layer for layer in readers if layer not in _projections[model]]
    if missing:
        raise InputError(
            "method",
            method,
            f"weighs values by the output projection, and layer {missing[0]} of {type(model).__name__} changes the "
            "attention output before it is projected; use another scorer",
        )
    return [_weight(model, _projections[model][layer]) for layer in readers]


def _measure(model: PreTrainedModel, plan: Plan) -> dict[int, OutputProjection]:
    probe = OutputProbe(plan)
    leaves = [(name, module) for name, module in model.named_modules() if next(module.children(), None) is None]
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: probe.compare(name, args))
        for name, module in leaves
    ]
    try:
        run_probe(model, plan, None, probe)
    finally:
        for handle in handles:
            handle.remove()
    return probe.found


def _weight(model: PreTrainedModel, projection: OutputProjection) -> torch.Tensor:
    """Return the weight [H_q, D, hidden] of a projection, without its bias."""
    module = model.get_submodule(projection.module)
    if type(module) is nn.Linear:
        weight = module.weight.detach().T  # [H_q * D, hidden]
    else:
        device = next((x.device for x in (*module.parameters(), *module.buffers())), model.device)
        units = torch.eye(projection.size, dtype=model.dtype, device=device)
        weight = module(units) - module(torch.zeros_like(units))
    return weight.unflatten(0, (projection.query_heads, -1))
