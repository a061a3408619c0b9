"""The small operations between the matrix products of a fused decode step: by Triton kernels on CUDA, or by PyTorch.

A step of a large model launches some 20 small PyTorch kernels a layer for norms, residuals, RoPE, the write into the
cache and the activation; here they are four. Projections whose weights are fused (:mod:`.fused_weights`) are one
product.

Legend: B rows (one token each), H query heads and K KV heads of D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ...methods.cache.cache import KVCache
from ...methods.cache.kernel_use import (
    FUSED,
    KERNEL_DTYPES,
    PROJECTIONS,
    SEPARATE,
    STEP_OPERATIONS,
    device_problem,
    record_implementation,
    uses_kernel_on,
)
from ...methods.storage.static import NextSlot
from .fused_weights import GATE_UP, QKV, Affine, fused
from .prepacked import QKVSlice

MAX_KERNEL_HIDDEN = 1 << 15
"""Largest hidden size that the norm's kernel supports."""
SILU = ("SiLU", "SiLUActivation")
"""Classes of the activation x * sigmoid(x)."""


def is_changed(module: torch.nn.Module) -> bool:
    """Whether a module has a hook, or a forward that was set on the instance."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


class OneTokenRope:
    """Llama's RoPE (:func:`...methods.cache.rotary.rope`) of one token per row; its tensors are shared by all layers.

    Args:
        cos_sin: Cosines and sines [B or 1, 1, D], as transformers' rotary embedding returns them.
    """

    def __init__(self, cos_sin: tuple[torch.Tensor, torch.Tensor]):
        self.cos, sin = (c[:, :, None] for c in cos_sin)
        first, second = sin.chunk(2, dim=-1)
        self.sin = torch.cat([-first, second], dim=-1)  # negated here instead of half of x in every layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, 1, H, D], rotated."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([second, first], dim=-1) * self.sin


class StepOperations:
    """The operations in PyTorch, by the model's own modules."""

    def next_slot(self, cache: KVCache, layer_idx: int) -> NextSlot | None:
        """Return where :meth:`qkv` stores a layer's new key and value; None: the cache stores them."""
        return None

    def rope(self, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> Any:
        """Return what :meth:`qkv` needs of the cosines and sines, for all layers of a step."""
        return OneTokenRope(cos_sin)

    def qkv(
        self, attention: Any, h: torch.Tensor, rope: Any, slot: NextSlot | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value [B, 1, heads, D] of ``h`` [B, 1, hidden]; query and key are rotated.

        With a ``slot`` the rotated key and the value are in it, and the key that is returned is not rotated.
        """
        heads = (*h.shape[:-1], -1, attention.head_dim)
        if not isinstance(attention.q_proj, QKVSlice) or hasattr(attention, "q_norm"):
            query, key = attention.q_proj(h).view(heads), attention.k_proj(h).view(heads)
            if hasattr(attention, "q_norm"):
                query, key = attention.q_norm(query), attention.k_norm(key)
            return rope(query), rope(key), attention.v_proj(h).view(heads)
        fused = attention.q_proj.fused
        sizes = [size // attention.head_dim for size in fused.sizes]
        query_and_key, value = fused.whole(h).view(heads).split([sizes[0] + sizes[1], sizes[2]], dim=2)
        query, key = rope(query_and_key).split(sizes[:2], dim=2)
        return query, key, value

    def norm(self, x: torch.Tensor, norm: Any) -> torch.Tensor:
        """RMSNorm of x [B, 1, hidden]."""
        out: torch.Tensor = norm(x)
        return out

    def add_norm(self, x: torch.Tensor, y: torch.Tensor, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """x + y and its RMSNorm, [B, 1, hidden]."""
        x = x + y
        return x, norm(x)

    def mlp(self, mlp: Any, h: torch.Tensor) -> torch.Tensor:
        """The gated MLP of ``h`` [B, 1, hidden]."""
        out: torch.Tensor = mlp(h)
        return out


class KernelOperations(StepOperations):
    """The operations by Triton kernels (:mod:`...methods.storage.kernels.step_operations`)."""

    def __init__(self) -> None:
        from ...methods.storage.kernels import step_operations

        self._kernels = step_operations
        self._fused: dict[nn.Module, Affine | None] = {}

    def next_slot(self, cache: KVCache, layer_idx: int) -> NextSlot | None:
        use, layer = cache.plan.uses[layer_idx], cache.layers[cache.plan.cache_layer[layer_idx]]
        slot: NextSlot | None = layer.next_slot if use.is_owner and not use.strictly_causal else None
        return slot

    def rope(self, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> Any:
        return cos_sin

    def qkv(
        self, attention: Any, h: torch.Tensor, rope: Any, slot: NextSlot | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = (*h.shape[:-1], -1, attention.head_dim)
        query, key, value = (x.view(heads) for x in self._products(attention, QKV, h))
        norms, epsilon = None, 0.0
        if hasattr(attention, "q_norm"):
            norms, epsilon = (attention.q_norm.weight, attention.k_norm.weight), attention.q_norm.variance_epsilon
        if slot is not None:
            query, _ = self._kernels.rotate(query, key, rope[0], rope[1], norms, epsilon, (value, slot))
        else:
            query, key = self._kernels.rotate(query, key, rope[0], rope[1], norms, epsilon)
        return query, key, value

    def _products(self, owner: nn.Module, names: Sequence[str], h: torch.Tensor) -> Sequence[torch.Tensor]:
        """``h`` [B, 1, hidden] times the weights of an owner's layers, as one product if they are fused."""
        layers: list[Any] = [getattr(owner, name) for name in names]
        if owner not in self._fused:
            self._fused[owner] = None if any(map(is_changed, layers)) else fused(layers)
            record_implementation(PROJECTIONS, SEPARATE if self._fused[owner] is None else FUSED)
        whole = self._fused[owner]
        if whole is None:
            return [layer(h) for layer in layers]
        return F.linear(h, whole.weight, whole.bias).split([layer.out_features for layer in layers], -1)

    def norm(self, x: torch.Tensor, norm: Any) -> torch.Tensor:
        return self._kernels.rms_norm(x, norm.weight, norm.variance_epsilon)

    def add_norm(self, x: torch.Tensor, y: torch.Tensor, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self._kernels.add_rms_norm(x, y, norm.weight, norm.variance_epsilon)

    def mlp(self, mlp: Any, h: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = mlp.down_proj(self._kernels.swiglu(*self._products(mlp, GATE_UP, h)))
        return out


def step_operations(model: PreTrainedModel) -> StepOperations:
    """The operations of a Llama-like model's decode steps; records which implementation it is."""
    problem = kernel_problem(model) if model.device.type == "cuda" else None
    return KernelOperations() if uses_kernel_on(model.device, STEP_OPERATIONS, problem) else StepOperations()


def kernel_problem(model: PreTrainedModel) -> str | None:
    """Why the kernels do not compute what the model's modules do; None: they do."""
    return model_problem(model) or device_problem(model.device)


def model_problem(model: Any) -> str | None:
    """Why the kernels are not for a Llama-like model on any device; None: they are."""
    if model.dtype not in KERNEL_DTYPES:
        return f"{str(model.dtype).removeprefix('torch.')} tensors"
    if model.config.hidden_size > MAX_KERNEL_HIDDEN:
        return f"hidden size {model.config.hidden_size} > {MAX_KERNEL_HIDDEN}"
    norms, others = [model.model.norm], []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
        if type(getattr(mlp, "act_fn", None)).__name__ not in SILU or not hasattr(mlp, "gate_proj"):
            return "an MLP without SwiGLU"
        others += [mlp, mlp.act_fn]
    if any(getattr(norm, "weight", None) is None or norm.weight.dtype != model.dtype for norm in norms):
        return "norms in another dtype"
    return "a hook on a norm or an MLP" if any(map(is_changed, norms + others)) else None


def greedy_tokens(logits: torch.Tensor) -> torch.Tensor:
    """Index of the largest logit of each row, the first of equal ones: [B, vocabulary] -> [B] int64."""
    if logits.is_cuda and logits.dtype in KERNEL_DTYPES and device_problem(logits.device) is None:
        from ...methods.storage.kernels.step_operations import greedy_tokens as kernel

        return kernel(logits)
    return logits.argmax(-1)
