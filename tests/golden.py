"""The inputs that the golden kept-index sets of the published implementations were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.prompt import Prompt

LENGTH, DIM = 40, 8
NEWER_LENGTH, NEWER_DIM = 96, 16


def swapped(ours: list[int], published: list[int], scores: torch.Tensor) -> tuple[list[int], list[int]]:
    """(kept here alone, kept by the published code alone), once it is sure that they differ within one tie.

    Args:
        ours, published: tokens that one head keeps, the protected last ones included.
        scores: [T - w], pooled.
    """
    here, there = sorted(set(ours) - set(published)), sorted(set(published) - set(ours))
    if here or there:
        cut = min(float(scores[t]) for t in ours if t < len(scores))
        assert all(abs(float(scores[t]) - cut) < 1e-6 for t in here + there), "not a tie where the budget ends"
    return here, there


def golden_prompt(
    query_heads: int = 4, kv_heads: int = 4, window: int = 4, layer_idx: int = 0, num_layers: int = 1
) -> Prompt:
    """A prompt by closed formulas, so that no tensor has to be stored; the values equal the keys."""
    h, t, d = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (query_heads, LENGTH, DIM)), indexing="ij")
    query = 1.5 * torch.sin(1.7 * (h + 1) + 0.9 * (t + 1) * (d + 1) + 0.31 * t * h)
    h, t, d = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (kv_heads, LENGTH, DIM)), indexing="ij")
    keys = 1.5 * torch.cos(0.6 * (h + 1) * (d + 1) + 1.3 * t + 0.17 * t * t * (d + 1))
    return Prompt(query[None, :, -window:], keys[None], keys[None].clone(), LogitRule(DIM**-0.5), layer_idx, num_layers)


def newer_entries() -> dict[str, Any]:
    """Of ``golden_newer.json``: queries, keys and values of two layers, and what published code scores and keeps."""
    path = Path(__file__).resolve().parent / "golden" / "golden_newer.json"
    entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return entries


def newer_prompt(layer: dict[str, Any], window: int, index: int = 0) -> Prompt:
    """The prompt [1, H, 96, 16] of a layer, with the last ``window`` queries."""
    query, keys, values = (torch.tensor(layer[name])[None] for name in "qkv")
    return Prompt(query[:, :, NEWER_LENGTH - window :], keys, values, LogitRule(NEWER_DIM**-0.5), index, 2)
