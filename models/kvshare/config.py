"""Config of a Llama whose layers share keys and values."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from ...methods.sharing.kv_map import FULL, LINEAR, check_map
from ...methods.sharing.plan import ENCODINGS, UPWARD_STYLES


class KVShareLlamaConfig(LlamaConfig):
    """Llama config with a layer -> KV-source map.

    Attributes:
        kv_source_layers: For each layer, the index of the layer whose keys and values it attends over; None: its own.
        layer_types: ``full_attention``, ``sliding_attention`` or ``linear_attention`` (gated retention) for each layer;
            None: full attention in all layers.
        sliding_window: Tokens that a sliding layer sees, the newest included.
        separate_kv_norm: Keys and values have an RMSNorm of their own (as in CLA and YOCO).
        iter_forward, iter_backward: Passes over a cyclic segment without and with gradients when a prompt or a training
            sequence is encoded (m and b of Layer-Condensed KV, arXiv 2405.10637, section 3.2).
        kv_loss_weight: Weight of an additional loss, the change of the shared keys and values in the last pass.
        upward_style: The published variant: ``fresh``: strictly causal attention in the layers whose source is above
            them; ``paper``: in every layer, and the source attends over the keys and values of the previous pass.
        encode: ``iterative``, or ``exact``: as many passes as tokens, which equals feeding them one by one.
        prefill_skip: Skip, in the layers above the last KV source, the tokens whose outputs are not requested.
        retention_heads: Heads of a gated-retention layer; None: as many as query heads.
    """

    model_type = "kvshare_llama"

    kv_source_layers: list[int] | None = None
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    separate_kv_norm: bool = False
    iter_forward: int = 7
    iter_backward: int = 2
    kv_loss_weight: float = 0.0
    upward_style: str = "fresh"
    encode: str = "iterative"
    prefill_skip: bool = True
    retention_heads: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        layers = self.num_hidden_layers
        if self.kv_source_layers is None:
            self.kv_source_layers = list(range(layers))
        if self.layer_types is None:  # given a window and no types, transformers makes every layer slide
            self.layer_types = [FULL] * layers
        if self.retention_heads is None and LINEAR in self.layer_types:
            self.retention_heads = self.num_attention_heads
        check_map(self.kv_source_layers, self.layer_types, layers, self.sliding_window)
        for key, allowed in (("upward_style", UPWARD_STYLES), ("encode", ENCODINGS)):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} is {getattr(self, key)!r}; it must be one of {', '.join(allowed)}")
        if self.iter_forward < 0 or self.iter_backward < 1:
            raise ValueError(
                f"iter_forward={self.iter_forward} must be >= 0 and iter_backward={self.iter_backward} must be >= 1"
            )
        super().__post_init__(**kwargs)

    @property
    def source(self) -> list[int]:
        """``kv_source_layers``, which is never None after construction."""
        assert self.kv_source_layers is not None
        return self.kv_source_layers

    @property
    def types(self) -> list[str]:
        """``layer_types``, which is never None after construction."""
        assert self.layer_types is not None
        return self.layer_types

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """``reuse``, ``store`` or None for each layer; transformers' caches hold nothing for ``reuse`` layers."""
        shared = {s for i, s in enumerate(self.source) if s != i}
        return ["reuse" if s != i else ("store" if i in shared else None) for i, s in enumerate(self.source)]

    @property
    def has_upward_kv_refs(self) -> bool:
        """Some layer's KV source is above it."""
        return any(s > i for i, s in enumerate(self.source))

    @property
    def is_paper_style(self) -> bool:
        """All layers are strictly causal: ``upward_style`` is ``paper``, and some layer's source is above it."""
        return self.upward_style == "paper" and self.has_upward_kv_refs
