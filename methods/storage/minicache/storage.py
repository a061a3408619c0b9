"""MiniCache (Liu et al., 2024, arXiv 2405.14366): merge the keys and values of adjacent layers in the deeper half.

Section 4: from layer ``start``, layers are paired. For each token and head, the keys of a pair (and the values) are
decomposed into magnitude and direction. The two directions are merged by spherical interpolation (SLERP) with parameter
``t`` from the lower to the upper layer. Both magnitudes are stored, so each layer's vector is restored with its own
magnitude and the shared direction. Tokens whose directions differ most are retained unmerged in both layers.

The prompt's attention uses the original keys and values, so the first generated token is that of the full cache. The
prompt is merged after the upper layer's prefill, and a new token after the upper layer's step.

No code was published. Choices that the paper leaves open: a vector is one head of one token; tokens are retained per
head, and separately for keys and values. The option ``retention`` selects the rule: ``top_ratio`` retains the share
``gamma`` of the prompt (as in the paper's memory formula), ``range_distinct`` the tokens with an angle above ``d_max -
gamma (d_max - d_min)`` (as described in the text), and ``range_literal`` those below ``d_min + gamma (d_max - d_min)``
(the rule as printed, which retains the *most similar* tokens). Merging commutes with RoPE, so keys are merged after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar

import torch

from ....conf.errors import require
from ....conf.options import NonNegativeInt, OneOf, Share
from ...cache.kv_shape import KVShape
from ...cache.logits import LogitRule
from ..base import LayerStorage, Storage, StorageCapabilities
from ..dense import DenseLayer
from ..static import ALL_ROWS
from .geometry import RETENTIONS
from .pair import Pair
from .static import StaticPair, static_pair


class PairLayer(LayerStorage):
    """One layer of a pair, 0 for the lower and 1 for the upper. Shared bytes are counted in the lower layer."""

    def __init__(self, pair: Pair, layer: int):
        self.pair, self.layer = pair, layer

    def write(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        self.pair.reserved = self.reserved
        self.pair.append(self.layer, keys, values, valid)
        self.flush()

    def append(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        self.count_down(keys.shape[2])
        self.pair.growth, self.pair.reserved = self.growth, self.reserved
        self.pair.append(self.layer, keys, values, None if valid is None else valid[:, None])

    def attend(self, query: torch.Tensor, rule: LogitRule, valid: torch.Tensor | None) -> torch.Tensor:
        if query.shape[2] > 1 or not self.pair.length:
            return super().attend(query, rule, valid)
        heads = self.pair.head_count
        q = query[:, :, 0].unflatten(1, (heads, -1))  # [B, H, G, D]
        return self.pair.attend(self.layer, q, rule).flatten(1, 2)[:, :, None]

    def flush(self) -> None:
        if self.layer == 1:
            self.pair.merge()

    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return *self.pair.read(self.layer), self.pair.visible(self.layer)

    @property
    def static_problem(self) -> str | None:
        return None

    def make_static(self, steps: int, mask_heads: int = 1) -> None:
        rows = len(self.pair.example()[0])
        self.pair = static_pair([(ALL_ROWS, self.pair)], rows, steps)

    def static_state(self) -> list[torch.Tensor]:
        assert isinstance(self.pair, StaticPair), "static_state before make_static"
        return self.pair.static_state() if self.layer == 0 else []

    def between_steps(self) -> None:
        assert isinstance(self.pair, StaticPair), "between_steps before make_static"
        if self.layer == 1:
            self.pair.between_steps()

    def end_steps(self) -> None:
        assert isinstance(self.pair, StaticPair), "end_steps before make_static"
        if self.layer == 1:
            self.pair.end_steps()

    def keep(self, slots: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        raise NotImplementedError("MiniCache cannot evict tokens")

    def tensors(self) -> list[torch.Tensor]:
        return self.pair.tensors(self.layer)

    @property
    def tokens(self) -> torch.Tensor:
        keys, _, valid = self.read()
        if valid is None:
            return torch.full((keys.shape[0], 1), keys.shape[2], dtype=torch.int64, device=keys.device)
        return valid.sum(-1)

    @property
    def logical_bytes(self) -> int:
        """Bytes of the tokens, with the padding of shorter rows."""
        return self.pair.logical_bytes(self.layer)


@dataclass(frozen=True)
class MiniCache(Storage):
    """MiniCache storage.

    Attributes:
        start: First layer of the first pair; None: the middle layer. A last layer without a partner is not merged.
        t: SLERP parameter, 0 for the lower layer's direction and 1 for the upper layer's (0.6 in the paper).
        gamma: Share of tokens to retain (0.05 in the paper).
        retention: ``top_ratio``, ``range_distinct`` or ``range_literal``; see the module docstring.
    """

    id: ClassVar[str] = "MiniCache"
    start: NonNegativeInt | None = None
    t: Share = 0.6
    gamma: Share = 0.05
    retention: Annotated[str, OneOf(RETENTIONS)] = "top_ratio"

    @cached_property
    def capabilities(self) -> StorageCapabilities:
        return StorageCapabilities(requires_same_tokens_across_layers=True)

    def first_pair(self, num_layers: int) -> int:
        """Return the index of the first merged layer.

        Raises:
            InputError: The model has no such layer.
        """
        start = num_layers // 2 if self.start is None else self.start
        require(start <= num_layers, "method.storage.start", start, f"must be at most the model's {num_layers} layers")
        return start

    def new_layers(self, num_layers: int) -> Sequence[LayerStorage]:
        start = self.first_pair(num_layers)
        layers: list[LayerStorage] = [DenseLayer() for _ in range(start)]
        while len(layers) + 1 < num_layers:
            pair = Pair(self.t, self.gamma, self.retention)
            layers += [PairLayer(pair, 0), PairLayer(pair, 1)]
        return layers + [DenseLayer() for _ in range(num_layers - len(layers))]

    def bytes_formula(self, tokens: Sequence[int], heads: int, shape: KVShape, new_tokens: int = 0) -> int:
        """Return the bytes of unmerged layers and of pairs: directions, two magnitudes, retained tokens with slots.

        ``top_ratio`` retains a share of the prompt and no later token. For the range rules the number depends on the
        data, and the formula counts no retained tokens.
        """
        return self._bytes(tokens, heads, shape, new_tokens, readers=1)

    def bytes_read_formula(self, tokens: Sequence[int], heads: int, shape: KVShape, new_tokens: int = 0) -> int:
        """Return the bytes read per step: both layers of a pair read its directions and the retained slots."""
        return self._bytes(tokens, heads, shape, new_tokens, readers=2)

    def _bytes(self, tokens: Sequence[int], heads: int, shape: KVShape, new_tokens: int, readers: int) -> int:
        """Return the bytes by the formula, with the shared bytes of a pair counted ``readers`` times."""
        size, channels = shape.element_bytes, shape.token_channels
        start = self.first_pair(len(tokens))
        pairs = (len(tokens) - start) // 2
        total = heads * channels * size * (sum(tokens[:start]) + sum(tokens[start + 2 * pairs :]))
        for count in tokens[start : start + 2 * pairs : 2]:
            retained = count
            if self.gamma < 1:
                retained = math.ceil(self.gamma * (count - new_tokens)) if self.retention == "top_ratio" else 0
            shared = count * channels * size + 2 * retained * 4
            total += heads * (readers * shared + 2 * count * 2 * size + retained * 2 * channels * size)
        return total
