"""Decode steps of a Llama-like decoder through a compiler, for one or two rows on a CPU (``runner.compile``).

With so few rows a product with a weight costs little more than reading the weight, and a library's matrix products are
far from that speed (docs/explanation/engine.md). Written as sums, products become loops that read each weight
once from front to back, and the small operations around them are fused into the same loops. torch.compile makes two
functions for all layers, one for the part before the attention and one for the part after it, and one for the output
layer. Attention is computed by the cache, with a kernel in C++ where it supports the storage
(:mod:`...methods.storage.kernels.cpu`).
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ...conf.errors import InputError
from ...methods.cache.cache import KVCache
from ...methods.cache.forward import LayerCall
from ...methods.cache.kernel_use import cpu_kernels
from ...methods.cache.logits import LogitRule
from ...methods.cache.rotary import rope
from ...methods.storage.kernels import cpu
from .fused_decode import supports_fused_decode
from .fused_weights import Affine, fuse
from .step import COMPILED, DecodeStep
from .step_operations import is_changed
from .weights import copy_mapped_tensors

P = ParamSpec("P")
R = TypeVar("R")

MAX_ROWS = 2
"""With more rows, oneDNN's matrix products are faster than sums (measured: docs/explanation/engine.md)."""

COMPILER_ERRORS = ("InvalidCxxCompiler", "CppCompileError")


def has_compiler() -> bool:
    """Whether there are a C++ compiler and Python's headers, which torch.compile needs on a CPU."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return shutil.which(compiler) is not None and Path(sysconfig.get_paths()["include"], "Python.h").exists()


class LayerWeights(NamedTuple):
    """Weights of one decoder layer; ``head_norms`` are those of queries and keys, if the model has them."""

    attention_norm: torch.Tensor
    query_key_value: Affine
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    output: Affine
    mlp_norm: torch.Tensor
    gate_and_up: Affine
    down: Affine


class CompiledDecoder:
    """Compiled decode steps of one model: the logits of :func:`..decoding.decode`, up to rounding.

    Weights with the same input are concatenated in one tensor, and the layers' own weights become views of it: each
    weight is stored once, and the model can be used as before.

    Args:
        model: Model that :func:`can_compile`; changed in place.

    Attributes:
        layers: Weights of the decoder layers.
        output: Weight of the output layer.
    """

    def __init__(self, model: PreTrainedModel):
        self.model: Any = model
        self.layers = [_weights_of(layer) for layer in self.model.model.layers]
        self.output, self._last_norm = _affine(self.model.lm_head), self.model.model.norm.weight.detach()
        first = self.model.model.layers[0]
        self._rule, epsilon, act = LogitRule(first.self_attn.scaling), model.config.rms_norm_eps, first.mlp.act_fn
        head_dim, heads = first.self_attn.head_dim, model.config.num_attention_heads

        def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            x32 = x.float()
            return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)

        def before_attention(
            x: torch.Tensor, weights: LayerWeights, cos_sin: tuple[torch.Tensor, torch.Tensor]
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            qkv = product(rms_norm(x, weights.attention_norm), weights.query_key_value)
            qkv = qkv.view(*x.shape[:-1], -1, head_dim).transpose(1, 2)  # [rows, heads, 1, D]
            kv_heads = (qkv.shape[1] - heads) // 2
            query, key, value = qkv.split([heads, kv_heads, kv_heads], dim=1)
            if weights.head_norms is not None:
                query, key = rms_norm(query, weights.head_norms[0]), rms_norm(key, weights.head_norms[1])
            return rope(query, cos_sin), rope(key, cos_sin), value

        def after_attention(out: torch.Tensor, x: torch.Tensor, weights: LayerWeights) -> torch.Tensor:
            x = x + product(out.transpose(1, 2).reshape(*x.shape[:-1], -1), weights.output)
            gate, up = product(rms_norm(x, weights.mlp_norm), weights.gate_and_up).chunk(2, dim=-1)
            return x + product(act(gate) * up, weights.down)

        def head(x: torch.Tensor, norm: torch.Tensor, output: Affine) -> torch.Tensor:
            return product(rms_norm(x, norm), output)[:, -1]

        self._before, self._after, self._head = _compile(before_attention), _compile(after_attention), _compile(head)

    @torch.inference_mode()
    def __call__(self, cache: KVCache, token: torch.Tensor) -> torch.Tensor:
        """[rows] int64, at most :data:`MAX_ROWS` rows -> logits [rows, vocabulary]."""
        base = self.model.model
        x = base.embed_tokens(token[:, None])
        cos_sin = base.rotary_emb(x, position_ids=cache.next_positions()[:, None])
        for number, weights in enumerate(self.layers):
            query, key, value = self._before(x, weights, cos_sin)
            with cpu_kernels():
                out = cache.attend(number, LayerCall(query, key, value, self._rule), None)
            x = self._after(out.contiguous(), x, weights)  # one layout, to avoid recompiling
        logits: torch.Tensor = self._head(x, self._last_norm, self.output)
        return logits

    @torch.inference_mode()
    def prepare(self, rows: int) -> None:
        """Compile for this number of rows, unless already compiled.

        Raises:
            InputError: There is no C++ compiler, or it fails.
        """
        base = self.model.model
        x = base.embed_tokens(torch.zeros(rows, 1, dtype=torch.int64))
        cos_sin = base.rotary_emb(x, position_ids=torch.zeros(rows, 1, dtype=torch.int64))
        try:
            query, key, value = self._before(x, self.layers[0], cos_sin)
            if cpu.problem(query, key, value) is None:
                cpu.attention(query, key, value, self._rule)
            x = self._after(query.contiguous(), x, self.layers[0])
            self._head(x, self._last_norm, self.output)
        except Exception as error:
            kind = next((k for k in COMPILER_ERRORS if k in f"{type(error).__name__} {error}"), None)
            if kind is None:
                raise
            problem = "needs a C++ compiler that torch finds and that works: g++, clang++, or the one that CXX names"
            raise InputError(
                "runner.compile", True, f"{problem} ({kind}); false: steps that are not compiled"
            ) from error


def _compile(part: Callable[P, R]) -> Callable[P, R]:
    """Compile as a full graph: a graph break is an error instead of a silently slower step."""
    # The limit counts all model classes, dtypes and numbers of rows of a process together.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(part, dynamic=False, fullgraph=True)


def product(x: torch.Tensor, by: Affine) -> torch.Tensor:
    """A linear layer on x [rows, 1, in_features], written as sums in float32 or wider for the compiler."""
    acc_dtype = torch.promote_types(x.dtype, torch.float32)
    weight = by.weight.to(acc_dtype)
    out = torch.stack([(weight * row.to(acc_dtype)).sum(-1) for row in x.squeeze(1)])  # [rows, out_features]
    if by.bias is not None:
        out = out + by.bias
    return out.to(x.dtype)[:, None]


def can_compile(model: PreTrainedModel) -> bool:
    """Whether a compiled step computes what ``model(...)`` does: a Llama-like decoder on the CPU without hooks."""
    if model.device.type != "cpu" or not supports_fused_decode(model):
        return False
    modules = list(model.modules())
    return not any(map(is_changed, modules)) and all(type(m) is nn.Linear for m in modules if hasattr(m, "in_features"))


def compile_decoder(model: PreTrainedModel) -> CompiledDecoder:
    """The compiled decoder of a model that :func:`can_compile`; its weights are copied out of mapped files first."""
    copy_mapped_tensors(model)
    return CompiledDecoder(model)


class CompiledStep(DecodeStep):
    """A compiled step of one cache.

    Args:
        decoder: The model's compiled decoder.
        rows: Number of rows.
    """

    mode = COMPILED

    def __init__(self, decoder: CompiledDecoder, cache: KVCache, rows: int):
        super().__init__(cache)
        self._decoder = decoder
        decoder.prepare(rows)

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        return self._decoder(self.cache, token)


def _weights_of(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
    return LayerWeights(
        layer.input_layernorm.weight.detach(),
        fuse((attention.q_proj, attention.k_proj, attention.v_proj)),
        None if norms is None else (norms[0].weight.detach(), norms[1].weight.detach()),
        _affine(attention.o_proj),
        layer.post_attention_layernorm.weight.detach(),
        fuse((mlp.gate_proj, mlp.up_proj)),
        _affine(mlp.down_proj),
    )


def _affine(layer: nn.Linear) -> Affine:
    return Affine(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
