"""DuoAttention (Xiao et al., 2024, arXiv 2410.10819): some heads keep all tokens, the others first and recent ones.

The paper trains a gate for each KV head. Here, as in kvpress' variant without training, a head's reach is computed: the
mean query and the mean key before RoPE are placed at ``positions`` consecutive positions, and the attention of the last
query over these keys is summed up from the first key on. The mean of these sums is about 1 / 2 for a head that attends
to all distances alike and about 0 for one that attends to its neighbours only. kvpress takes the means over 50 texts
once; here they are those of the prompt itself, so that nothing is stored beside the model.

All tokens of a head have its reach as their score; of equal scores the more recent token is kept. With
``method/allocator=global`` and no floor, the heads of the largest reach keep all tokens until the budget of the cache
is used up, and the others the ``method.sinks`` first and ``method.recent`` last ones. With
``method/schedule=streaming_heads`` these others evict their oldest recent token at each step, as in the paper.

Legend: R rows of one prompt length, H_q query heads, H_kv KV heads, T tokens, P positions, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ....conf.options import PositiveInt
from ...cache.prompt import ALL_QUERIES, Prompt
from .base import Scorer

if TYPE_CHECKING:
    from ...cache.rotary import Rotary
    from ..model_layer import ModelLayer


@dataclass(frozen=True)
class DuoAttention(Scorer):
    """Reach of a head, the same for all of its tokens.

    Attributes:
        positions: Number of positions at which the mean key is placed.
    """

    id: ClassVar[str] = "DuoAttention"
    name: ClassVar[str] = "duo_attention"
    default_recent: ClassVar[int | float] = 256
    prefill_only: ClassVar[bool] = True
    ranks_whole_heads: ClassVar[bool] = True
    needs: ClassVar[str] = "mean queries and keys of the prompt itself, in place of a calibration"
    positions: PositiveInt = 500

    @property
    def observation_window(self) -> int:
        return ALL_QUERIES

    def protected_sinks(self) -> int:
        return 128

    def new_state(self, layer: ModelLayer) -> Rotary:
        return layer.rotary()

    def score(self, prompt: Prompt, state: Rotary) -> torch.Tensor:
        reach = prompt.cached(repr(self), lambda prompt: self._reach(prompt, state))  # [R, H_kv]
        return reach[..., None].expand(-1, -1, prompt.length)  # [R, H_kv, T]

    def tie_scores(self, prompt: Prompt, state: Rotary) -> torch.Tensor:
        """Return the positions: a head that cannot keep all tokens keeps the most recent ones."""
        index = torch.arange(prompt.length, dtype=torch.float32, device=prompt.keys.device)
        return index.expand(*prompt.keys.shape[:2], -1)

    def _reach(self, prompt: Prompt, rotary: Rotary) -> torch.Tensor:
        """Return the reach of each KV head, [R, H_kv]."""
        rows, length, device = prompt.query.shape[0], prompt.length, prompt.keys.device
        back = -torch.arange(length, device=device).expand(rows, -1)  # [R, T]
        query, key = (  # [R, H_q, 1, D] and [R, H_kv, 1, D], means before RoPE
            rotary.rotate(x.float(), back).mean(dim=2, keepdim=True) for x in (prompt.query, prompt.keys)
        )
        position = torch.arange(self.positions, device=device).expand(rows, -1)  # [R, P]
        query = rotary.rotate(query, position[:, -1:])
        keys = rotary.rotate(key.expand(-1, -1, self.positions, -1), position)  # [R, H_kv, P, D]
        keys = keys.repeat_interleave(prompt.groups, dim=1)  # [R, H_q, P, D]
        attention = prompt.rule.logits((query @ keys.mT)[:, :, 0]).softmax(dim=-1)  # [R, H_q, P]
        return prompt.reduce_groups(attention.cumsum(dim=-1).mean(dim=-1, keepdim=True))[..., 0]
