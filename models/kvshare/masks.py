"""Attention masks of one forward: causal, sliding-window and strictly causal."""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from ...methods.cache.attention import ATTENTION_NAME
from ...methods.sharing.kv_map import FULL, LINEAR, SLIDING
from .config import KVShareLlamaConfig

STRICTLY_CAUSAL = "strictly_causal"
"""Key of the mask under which no token attends to itself, beside the layer types."""


def attention_masks(
    config: KVShareLlamaConfig,
    hidden: torch.Tensor,
    attention_mask: Any,
    position_ids: torch.Tensor,
    past: Any,
    n_seen: int,
) -> dict[str, Any]:
    """Masks by layer type, and by :data:`STRICTLY_CAUSAL` if some layer's KV source is above it.

    Args:
        config: config of the model.
        hidden: [B, n, hidden], embeddings of the new tokens.
        attention_mask: padding mask [B, n_seen + n], None, or a dict of finished masks (a static cache's).
        position_ids: [B or 1, n].
        past: the cache, or None.
        n_seen: tokens that the cache has seen.

    Raises:
        ValueError: the mask cannot be combined with upward references or with retention.
    """
    if isinstance(attention_mask, dict):
        if config.has_upward_kv_refs or LINEAR in config.types:
            raise ValueError("a static cache does not work with references to layers above or with retention")
        return dict(attention_mask)
    common = (config, hidden, attention_mask, past)
    masks: dict[str, Any] = {FULL: create_causal_mask(*common, position_ids=position_ids)}
    if SLIDING in config.types:
        masks[SLIDING] = create_sliding_window_causal_mask(*common, position_ids=position_ids)
    if config.has_upward_kv_refs:
        masks[STRICTLY_CAUSAL] = _strictly_causal_input(config, hidden, attention_mask, masks[FULL], n_seen)
    return masks


def _strictly_causal_input(
    config: KVShareLlamaConfig,
    hidden: torch.Tensor,
    attention_mask: torch.Tensor | None,
    causal: torch.Tensor | None,
    n_seen: int,
) -> torch.Tensor | None:
    """The strictly causal mask as the attention implementation takes it; None: the implementation's causal mask."""
    name = config._attn_implementation
    if name == ATTENTION_NAME:
        return causal  # the 2-D padding mask
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError("references to layers above need a 2-D attention mask")
    if name != "eager" and attention_mask is None and not n_seen:
        return None  # the kernel's own causal mask, without the last key and the first query
    if name not in ("eager", "sdpa"):
        raise ValueError(f"references to layers above with padding or a cache need eager or sdpa, not {name}")
    mask = strictly_causal_mask(attention_mask, n_seen, hidden.shape[1], hidden.device)
    if name == "eager":
        lowest = torch.finfo(hidden.dtype).min
        return torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device).masked_fill(~mask, lowest)
    return mask


def strictly_causal_mask(
    attention_mask: torch.Tensor | None, n_seen: int, n: int, device: torch.device
) -> torch.Tensor:
    """Bool mask [B or 1, 1, n, 1 + n_seen + n] under which no token attends to itself; True: visible.

    Column 0 belongs to a key and a value of zeros, visible only to queries that see nothing else. Their attention is
    then exactly zero in every kernel; a fully masked row would average over all values, later tokens included.
    """
    positions = torch.arange(n_seen + n, device=device)
    visible = (positions[None] < positions[n_seen:, None])[None, None]  # [1, 1, n, n_seen + n]
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None, :].bool()
    return torch.cat([~visible.any(-1, keepdim=True), visible], dim=-1)


def retention_mask(config: KVShareLlamaConfig, attention_mask: Any, n: int) -> torch.Tensor | None:
    """[B, n] bool, False for padding, for the retention layers; None: no padding, or no such layer.

    Raises:
        ValueError: the mask is not two-dimensional.
    """
    if LINEAR not in config.types or attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError("retention layers need a 2-D attention mask")
    return attention_mask[:, -n:].bool()
