"""Attention of one token per row on a CPU, by a kernel in C++ that is compiled for the processor at hand.

For the steps of ``runner.compile`` (:mod:`....runners.engine.compiled`), which need a compiler. It computes what
:func:`..step_attention.step_attention` computes in PyTorch, in one pass over the stored numbers: the query heads of a
KV head share each load, and a head's tokens are divided over the threads (``step_attention.cpp``; figures:
docs/explanation/engine.md).

Legend: B batch rows, H KV heads, H_q query heads, S slots, D or D_v channels.
"""

from __future__ import annotations

import functools
from ctypes import CDLL, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch

from ...cache.kernel_use import MAX_KERNEL_CHANNELS
from ...cache.logits import LogitRule
from .cpp import SCALARS, compile_kernels

LANES = 16
"""Numbers in a vector; head dimensions must be multiples of it."""
MAX_GROUP = 16
"""Largest number of query heads per KV head; the sums of more would not stay in registers."""
MIN_PART_TOKENS = 256
"""Smallest number of tokens that is worth a part of its own."""


def problem(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> str | None:
    """Return why the kernel does not support a call; None: it does.

    Args:
        query: [B, H_q, 1, D].
        keys: [B, H, S, D].
        values: [B, H, S, D_v].
    """
    if query.dtype not in SCALARS or keys.dtype != query.dtype or values.dtype != query.dtype:
        return f"{str(keys.dtype).removeprefix('torch.')} tensors"
    widths = keys.shape[3], values.shape[3]
    if any(width % LANES or width > MAX_KERNEL_CHANNELS for width in widths):
        return f"head_dim {' and '.join(map(str, dict.fromkeys(widths)))}"
    if query.shape[1] // keys.shape[1] > MAX_GROUP:
        return f"{query.shape[1] // keys.shape[1]} > {MAX_GROUP} query heads per KV head"
    return None if all(x.stride(3) == 1 for x in (query, keys, values)) else "channels that are not contiguous"


def attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rule: LogitRule,
    valid: torch.Tensor | None = None,
    *,
    weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of a call without a :func:`problem`; 0 where a query attends to no token and no sink.

    Args:
        query: [B, H_q, 1, D].
        keys: [B, H, S, D], S at least 1.
        values: [B, H, S, D_v].
        rule: How logits are computed.
        valid: [B, 1 or H, S] bool, True where a slot holds a token; None: everywhere.
        weights: Whether to return the attention weights as well.

    Returns:
        (output [B, H_q, 1, D_v]; weights [B, H, H_q / H, S] in float32, or None).
    """
    (rows, heads, slots, _), query_heads = keys.shape, query.shape[1]
    out = query.new_empty(rows, query_heads, 1, values.shape[3])
    logits = query.new_empty(rows, heads, query_heads // heads, slots, dtype=torch.float32) if weights else None
    sinks = None if rule.sinks is None else rule.sinks.to(torch.float32).contiguous()
    if valid is not None:
        valid = valid.expand(rows, heads, slots)
        valid = valid if valid.stride(2) == 1 else valid.contiguous()
    threads = torch.get_num_threads()
    library = compiled(keys.shape[3], values.shape[3], query_heads // heads, query.dtype)
    library.step_attention(
        *(None if x is None else x.data_ptr() for x in (query, keys, values, valid, sinks, out, logits)),
        *(rows, heads, slots),
        *query.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        *((0, 0) if valid is None else valid.stride()[:2]),
        rule.scaling,
        rule.softcap or 0.0,
        parts_of_head(rows * heads, slots, threads),
        threads,
    )
    return out, logits


def parts_of_head(heads: int, slots: int, threads: int) -> int:
    """Number of parts of each head's tokens, at least :data:`MIN_PART_TOKENS` in each.

    The smallest with which all threads have equally many parts, or at least four; if there is none, the largest.
    """
    most = max(1, slots // MIN_PART_TOKENS)
    return next((n for n in range(1, most) if heads * n % threads == 0 or heads * n >= 4 * threads), most)


@functools.cache
def compiled(key_channels: int, value_channels: int, group: int, dtype: torch.dtype) -> CDLL:
    """The kernel for these sizes, compiled by the first process that needs it.

    Raises:
        CompilerError: There is no compiler, or it fails.
    """
    sizes = {"KEY_CHANNELS": key_channels, "VALUE_CHANNELS": value_channels, "GROUP": group}
    library = compile_kernels(Path(__file__).with_name("step_attention.cpp"), dtype, **sizes)
    library.step_attention.argtypes = [*[c_void_p] * 7, *[c_int64] * 13, *[c_float] * 2, c_int64, c_int]
    library.step_attention.restype = None
    return library
