"""Decode steps of a plain decoder through torch.compile, for one or two rows on a CPU (``runner.compile``).

With so few rows a product with a weight is little more than reading it, and libraries' products of matrices do not come
near the speed of that (docs/efficiency.md has the figures). Written out as sums they become loops that read a weight
once from front to back, and the small operations around them go into the same loops. Two functions are compiled for all
layers, of what stands before a layer's attention and of what stands behind it, and one for the output layer. The
attention is the cache's and stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ..conf.errors import InputError
from ..methods.cache.cache import KVCache
from ..methods.cache.forward import LayerCall
from ..methods.cache.logits import LogitRule
from ..methods.cache.rotary import rope
from .fused_decode import is_changed, supports_fused_decode
from .weights import let_go_of_files

P = ParamSpec("P")
R = TypeVar("R")

ROWS = 2
"""With more, oneDNN's products of matrices are faster than sums (measured: docs/efficiency.md)."""


class Affine(NamedTuple):
    """A linear layer's weight [out_features, in_features] and bias [out_features]."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class LayerWeights(NamedTuple):
    """Of one decoder layer; ``head_norms``: of queries and keys, where the model has them."""

    attention_norm: torch.Tensor
    query_key_value: Affine
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    output: Affine
    mlp_norm: torch.Tensor
    gate_and_up: Affine
    down: Affine


class CompiledStep:
    """Decode steps of one model: logits as :func:`.engine.decode` has them, to within rounding.

    Weights that meet the same input are laid one after another in one tensor, and the layers' own weights become views
    of it: each is held once, and the model can be used as before.

    Args:
        model: one that :func:`can_compile`; changed in place.

    Attributes:
        layers: weights of the decoder layers.
        output: of the output layer.
    """

    def __init__(self, model: PreTrainedModel):
        self._model: Any = model
        self.layers = [_weights_of(layer) for layer in self._model.model.layers]
        self.output, self._last_norm = _affine(self._model.lm_head), self._model.model.norm.weight.detach()
        first = self._model.model.layers[0]
        self._rule, epsilon, act = LogitRule(first.self_attn.scaling), model.config.rms_norm_eps, first.mlp.act_fn
        head_dim, heads = first.self_attn.head_dim, model.config.num_attention_heads

        def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            wide = x.float()
            return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)

        def before(
            x: torch.Tensor, weights: LayerWeights, cos_sin: tuple[torch.Tensor, torch.Tensor]
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            made = product(normed(x, weights.attention_norm), weights.query_key_value)
            made = made.view(*x.shape[:-1], -1, head_dim).transpose(1, 2)
            kv_heads = (made.shape[1] - heads) // 2
            query, key, value = made.split([heads, kv_heads, kv_heads], dim=1)
            if weights.head_norms is not None:
                query, key = normed(query, weights.head_norms[0]), normed(key, weights.head_norms[1])
            return rope(query, cos_sin), rope(key, cos_sin), value

        def behind(out: torch.Tensor, x: torch.Tensor, weights: LayerWeights) -> torch.Tensor:
            x = x + product(out.transpose(1, 2).reshape(*x.shape[:-1], -1), weights.output)
            gate, up = product(normed(x, weights.mlp_norm), weights.gate_and_up).chunk(2, dim=-1)
            return x + product(act(gate) * up, weights.down)

        def head(x: torch.Tensor, norm: torch.Tensor, output: Affine) -> torch.Tensor:
            return product(normed(x, norm), output)[:, -1]

        self._before, self._behind, self._head = _compiled(before), _compiled(behind), _compiled(head)

    @torch.inference_mode()
    def __call__(self, cache: KVCache, token: torch.Tensor) -> torch.Tensor:
        """[rows] int64, at most :data:`ROWS` -> logits [rows, vocabulary]."""
        base = self._model.model
        x = base.embed_tokens(token[:, None])
        cos_sin = base.rotary_emb(x, position_ids=cache.next_positions()[:, None])
        for number, weights in enumerate(self.layers):
            query, key, value = self._before(x, weights, cos_sin)
            out = cache.attend(number, LayerCall(query, key, value, self._rule), None)
            x = self._behind(out.contiguous(), x, weights)  # one layout, so that nothing is compiled for another
        logits: torch.Tensor = self._head(x, self._last_norm, self.output)
        return logits

    @torch.inference_mode()
    def prepare(self, rows: int) -> None:
        """Compile for so many rows, unless that is done.

        Raises:
            InputError: there is no C++ compiler.
        """
        base = self._model.model
        x = base.embed_tokens(torch.zeros(rows, 1, dtype=torch.int64))
        cos_sin = base.rotary_emb(x, position_ids=torch.zeros(rows, 1, dtype=torch.int64))
        try:
            query, _, _ = self._before(x, self.layers[0], cos_sin)
            x = self._behind(query.contiguous(), x, self.layers[0])
            self._head(x, self._last_norm, self.output)
        except Exception as error:
            if "InvalidCxxCompiler" not in f"{type(error).__name__} {error}":
                raise
            problem = "needs a C++ compiler that torch finds: g++, clang++, or the one that CXX names"
            raise InputError("runner.compile", True, problem) from error


def _compiled(part: Callable[P, R]) -> Callable[P, R]:
    """Whole, or it is an error: what was not compiled would be slower than the usual step, and nobody would know."""
    # Kinds of models, dtypes and numbers of rows in one process: they are counted together.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(part, dynamic=False, fullgraph=True)


def product(x: torch.Tensor, by: Affine) -> torch.Tensor:
    """A linear layer on x [rows, 1, in_features] as sums of products, in float32 or wider; for a compiler."""
    exact = torch.promote_types(x.dtype, torch.float32)
    weight = by.weight.to(exact)
    out = torch.stack([(weight * row.to(exact)).sum(-1) for row in x.squeeze(1)])
    if by.bias is not None:
        out = out + by.bias
    return out.to(x.dtype)[:, None]


def can_compile(model: PreTrainedModel) -> bool:
    """Whether a compiled step is what ``model(...)`` does: a plain decoder on the CPU, with nothing on its layers."""
    if model.device.type != "cpu" or not supports_fused_decode(model):
        return False
    parts = list(model.modules())
    return not any(map(is_changed, parts)) and all(type(p) is nn.Linear for p in parts if hasattr(p, "in_features"))


def compile_steps(model: PreTrainedModel) -> None:
    """Have :class:`.graph.Stepper` compile the steps of a model; see :class:`CompiledStep`."""
    let_go_of_files(model)
    model.compiled_step = CompiledStep(model)  # type: ignore[assignment]


def _weights_of(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
    return LayerWeights(
        layer.input_layernorm.weight.detach(),
        _joined((attention.q_proj, attention.k_proj, attention.v_proj)),
        None if norms is None else (norms[0].weight.detach(), norms[1].weight.detach()),
        _affine(attention.o_proj),
        layer.post_attention_layernorm.weight.detach(),
        _joined((mlp.gate_proj, mlp.up_proj)),
        _affine(mlp.down_proj),
    )


def _affine(layer: nn.Linear) -> Affine:
    return Affine(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())


def _joined(layers: Sequence[nn.Linear]) -> Affine:
    """The outputs of several layers as those of one; the layers' own weights become views."""

    def join(name: str) -> torch.Tensor | None:
        parts = [getattr(layer, name) for layer in layers]
        if parts[0] is None:
            return None
        whole = torch.cat([part.detach() for part in parts])
        for layer, part in zip(layers, whole.split([len(part) for part in parts]), strict=True):
            setattr(layer, name, nn.Parameter(part, requires_grad=False))
        return whole

    weight = join("weight")
    assert weight is not None
    return Affine(weight, join("bias"))
