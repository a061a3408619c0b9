"""Split-KV attention of one token on a CPU: the slots of a head are divided among threads."""

from __future__ import annotations

import torch

MIN_SPLIT_TOKENS, MIN_SPLIT_SPEEDUP = 4096, 1.5
"""Split KV only for at least this many cached tokens, and if whole heads per thread would take at least this many times
as long as an even split (measured on two threads: docs/explanation/engine.md)."""


def kv_splits(rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> int:
    """Return the number of splits of each head's slots that keeps all threads busy; 1: do not split.

    PyTorch's kernel assigns whole heads to threads, so eight heads use only eight of sixteen threads.
    """
    threads = torch.get_num_threads()
    head_count = keys.shape[0] * keys.shape[1]
    heads_per_thread = -(-head_count // threads)
    speedup = heads_per_thread * threads / head_count
    can_view = all(x.stride(0) == x.shape[1] * x.stride(1) and x.stride(3) == 1 for x in (keys, values))
    can_view = can_view and keys.shape[3] == values.shape[3]
    is_long = keys.shape[2] >= MIN_SPLIT_TOKENS
    return threads if rows.device.type == "cpu" and is_long and speedup >= MIN_SPLIT_SPEEDUP and can_view else 1


def split_kv_attention(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, splits: int
) -> torch.Tensor:
    """Attend over each split of the slots with its own softmax, and combine the splits by their log-sum-exp.

    Args:
        rows: [B, H, R, D] queries on a CPU, all of which attend to all slots.
        keys, values: [B, H, S, D] with S >= ``splits``.
        scaling: Factor on the logits.
        splits: Number of splits.

    Returns:
        [B, H, R, D].
    """
    batch, heads, n, dim = rows.shape
    size = keys.shape[2] // splits
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    queries = rows.reshape(batch * heads, 1, n, dim)

    def attend(start: int, end: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return outputs [B * H, count, R, D] and log-sum-exps [B * H, count, R]; splits are the kernel's heads."""
        split = [x[:, :, start:end].view(batch * heads, count, -1, dim) for x in (keys, values)]
        result: tuple[torch.Tensor, torch.Tensor] = flash(queries.expand(-1, count, -1, -1), *split, scale=scaling)
        return result

    out, log_sum = attend(0, size * splits, splits)
    if size * splits < keys.shape[2]:  # the remaining slots are one more split
        remainder = attend(size * splits, keys.shape[2], 1)
        out, log_sum = (torch.cat(pair, dim=1) for pair in zip((out, log_sum), remainder, strict=True))
    weights = log_sum.softmax(1)[..., None]  # [B * H, splits, R, 1]
    return (out * weights).sum(1).to(rows.dtype).view(batch, heads, n, dim)
