"""Attention of a decode step: by a kernel if one supports the call, otherwise by PyTorch.

All compute the same; :mod:`..cache.kernel_use` records which one was used.

Legend: B batch rows, H stored heads, H_q query heads, S slots, D or D_v channels.
"""

from __future__ import annotations

import torch

from ..cache.kernel_use import (
    CPP,
    KERNEL_DTYPES,
    MIN_DOT_SIZE,
    STEP_ATTENTION,
    TRITON,
    device_problem,
    runs_cpu_kernels,
    step_attention_problem,
    uses_kernel_on,
)
from ..cache.logits import LogitRule
from ..cache.products import cached_attention, query_key_products


def uses_kernel(query: torch.Tensor, heads: int, *widths: int, layout_problem: str | None = None) -> bool:
    """Return whether a Triton kernel supports a call, and record it.

    Args:
        query: [B, H_q, 1, D].
        heads: Number of KV heads H.
        widths: Channels of keys and values.
        layout_problem: Why no kernel reads the tensors, or None.
    """
    problem = (layout_problem or step_attention_problem(query, heads, *widths)) if query.is_cuda else None
    return uses_kernel_on(query.device, STEP_ATTENTION, problem)


def kernel_of(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> str | None:
    """Return which kernel computes a call, :data:`TRITON` or :data:`CPP`, or None, and record it."""
    if runs_cpu_kernels(query.device):
        from .kernels.cpu import problem

        return CPP if uses_kernel_on(query.device, STEP_ATTENTION, problem(query, keys, values), CPP) else None
    return TRITON if uses_kernel(query, keys.shape[1], keys.shape[3], values.shape[3]) else None


def runs_kernels(device: torch.device) -> bool:
    """Return whether a CUDA device runs Triton kernels."""
    return device_problem(device) is None


def step_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rule: LogitRule,
    valid: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one token per row over stored keys and values.

    Args:
        query: [B, H_q, 1, D].
        keys: [B, H, S, D].
        values: [B, H, S, D_v].
        rule: How logits are computed.
        valid: [B, 1 or H, S] bool, True where a slot holds a token; None: everywhere.
        end: [1] int64 on the device, one past the last slot that may hold a token; None: S.

    Returns:
        [B, H_q, 1, D_v].
    """
    kernel = kernel_of(query, keys, values)
    if kernel == CPP:
        from .kernels import cpu

        return cpu.attention(query, keys, values, rule, valid)[0]
    if kernel == TRITON:
        from .kernels.dense import attention, rectangular

        return attention(query, rectangular(keys, values, valid, end), rule)[0]
    return cached_attention(query, keys, values, rule, valid)


def step_attention_with_weights(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rule: LogitRule,
    visible: torch.Tensor | None = None,
    may_average: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute :func:`step_attention` and return the attention weights as well.

    Args:
        query, keys, values, rule: See :func:`step_attention`.
        visible: [B, 1 or H, S] bool, True where the query attends to a slot; None: everywhere.
        may_average: Only the mean of the weights over the query heads of a KV head is needed.

    Returns:
        (output [B, H_q, 1, D_v]; weights [B, H, g, S] in float32 with g = H_q / H, or their mean [B, H, 1, S] if a
        kernel averages them).
    """
    kernel = kernel_of(query, keys, values)
    if kernel == CPP:
        from .kernels import cpu

        out, heads_weights = cpu.attention(query, keys, values, rule, visible, weights=True)
        assert heads_weights is not None
        return out, heads_weights
    if kernel == TRITON:
        from .kernels.dense import attention, rectangular

        kind = "mean" if may_average else "heads"
        out, slot_weights = attention(query, rectangular(keys, values, visible), rule, weights=kind)
        assert slot_weights is not None
        return out, slot_weights
    batch, query_heads, _, dim = query.shape
    grouped = query.reshape(batch, keys.shape[1], -1, dim)  # [B, H, g, D]
    logits = rule.logits(query_key_products(grouped, keys))  # [B, H, g, S]
    if visible is not None:
        logits = logits.masked_fill(~visible[:, :, None], float("-inf"))
    weights = rule.weights(logits, head_dims=2)
    out = (weights.to(values.dtype) @ values).reshape(batch, query_heads, 1, -1)  # [B, H_q, 1, D_v]
    return out, weights.float()


def write_token(
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    valid: torch.Tensor,
    slot: torch.Tensor,
) -> None:
    """Write one token per row into a slot and mark it as valid, in place; in one launch where there is a kernel.

    Args:
        new_keys, new_values: [B, H, 1, D] and [B, H, 1, D_v].
        keys, values: [B, H, S, D] and [B, H, S, D_v].
        valid: [B, 1 or H, S] bool.
        slot: [1] int64, on the device.
    """
    if keys.is_cuda and keys.dtype in KERNEL_DTYPES and runs_kernels(keys.device):
        from .kernels import step_operations

        step_operations.write_token(new_keys, new_values, keys, values, valid, slot)
        return
    keys.index_copy_(2, slot, new_keys)
    values.index_copy_(2, slot, new_values)
    valid.index_fill_(2, slot, True)


def packed_problem(bits: int, block: int, *groups: int) -> str | None:
    """Return why the kernels for packed codes do not support a layout; None: they do.

    Args:
        bits: Bits per code.
        block: Tokens per block, which is divided into tiles.
        groups: Tokens and channels per group.
    """
    for size in (block, *groups):
        if size & (size - 1) or size * bits % 32:
            return f"blocks or groups of {size} codes of {bits} bits"
    return f"blocks of {block} tokens" if block < MIN_DOT_SIZE else None


def ragged_step_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    valid: torch.Tensor | None,
    shape: tuple[int, int],
    longest: int,
    rule: LogitRule,
    pages: tuple[torch.Tensor, int] | None = None,
) -> torch.Tensor | None:
    """Attention of one token per row over heads of different lengths, by one kernel call.

    Args:
        query: [B, H_q, 1, D].
        keys: [slots, D], the slots of all heads of all rows one after another.
        values: [slots, D_v].
        starts: [B * H] int64, first slot of each head.
        ends: [B * H] int64, one past the last token of each head, counted from its first slot.
        valid: [B, H, longest] bool, True where a slot of a head holds a token; None: in all slots before the end.
        shape: Rows B and heads H.
        longest: Largest number of slots of a head.
        rule: How logits are computed.
        pages: Pages of each head to attend to, [B * H, K] int64 with -1 for no page, and the tokens per page; None:
            all tokens.

    Returns:
        [B, H_q, 1, D_v]; None: no kernel supports the call.
    """
    if not uses_kernel(query, shape[1], keys.shape[1], values.shape[1]):
        return None
    from .kernels.dense import attention, paged, ragged

    stored = ragged(keys, values, shape, longest, starts, ends, valid)
    return attention(query, stored if pages is None else paged(stored, *pages), rule)[0]
