"""Attention of one token on a CPU with all threads at work: a head's slots are split between them."""

from __future__ import annotations

import torch

WORTH_LENGTH, WORTH_GAIN = 4096, 1.5
"""Cached tokens, and time that whole heads take over that with all threads at work, from which on it pays to share a
head's slots between the threads of a CPU (measured on two threads: docs/explanation/engine.md)."""


def kv_splits(rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> int:
    """Parts into which to cut the slots of each head, so that every thread has as much to read; 1: leave them whole.

    PyTorch's kernel gives whole heads to threads: eight heads keep eight of sixteen threads at work.
    """
    threads = torch.get_num_threads()
    units = keys.shape[0] * keys.shape[1]
    rounds = -(-units // threads)
    gain = rounds * threads / units  # time / time with all threads at work
    in_order = all(x.stride(0) == x.shape[1] * x.stride(1) and x.stride(3) == 1 for x in (keys, values))
    in_order = in_order and keys.shape[3] == values.shape[3]
    worth = rows.device.type == "cpu" and keys.shape[2] >= WORTH_LENGTH and gain >= WORTH_GAIN and in_order
    return threads if worth else 1


def split_kv_attention(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, parts: int
) -> torch.Tensor:
    """Attention over slots that are cut into parts, each with a softmax of its own, joined by their log-sum-exp.

    Args:
        rows: [B, H, R, D] queries, all of which see all slots; on a CPU.
        keys, values: [B, H, S, D] with S >= ``parts``.
        scaling: factor on the logits.
        parts: how many.

    Returns:
        [B, H, R, D].
    """
    batch, heads, n, dim = rows.shape
    size = keys.shape[2] // parts
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    queries = rows.reshape(batch * heads, 1, n, dim)

    def attend(start: int, end: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """([units, parts, R, D], [units, parts, R]); the parts take the place of heads, which need not lie together."""
        cut = [x[:, :, start:end].view(batch * heads, parts, -1, dim) for x in (keys, values)]
        found: tuple[torch.Tensor, torch.Tensor] = flash(queries.expand(-1, parts, -1, -1), *cut, scale=scaling)
        return found

    out, log_sum = attend(0, size * parts, parts)
    if size * parts < keys.shape[2]:
        out, log_sum = (
            torch.cat(pair, dim=1) for pair in zip((out, log_sum), attend(size * parts, keys.shape[2], 1), strict=True)
        )
    weights = log_sum.softmax(1)[..., None]
    return (out * weights).sum(1).to(rows.dtype).view(batch, heads, n, dim)
