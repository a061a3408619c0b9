"""Prompts of different lengths as one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def left_padded(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stack prompts with padding on the left.

    Returns:
        Token ids [B, T] and their mask [B, T], 1 for a real token; the mask is None if all prompts are equally long.
    """
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    if all(len(p) == width for p in prompts):
        return ids, None
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask
