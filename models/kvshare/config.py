"""The config of a Llama whose layers share keys and values."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from ...methods.sharing.kv_map import FULL, LINEAR, check_map
from ...methods.sharing.plan import ENCODINGS, UPWARD_STYLES


class KVShareLlamaConfig(LlamaConfig):
    """A Llama config and a layer -> KV-source map.

    Attributes:
        kv_source_layers: for each layer, the layer whose keys and values it attends over; None: its own.
        layer_types: ``full_attention``, ``sliding_attention`` or ``linear_attention`` (gated retention) for each layer;
            None: full attention everywhere.
        sliding_window: tokens that a sliding layer sees, the newest included.
        separate_kv_norm: keys and values have an RMSNorm of their own before them (CLA and YOCO have).
        iter_forward, iter_backward: passes over a cyclic segment without and with gradients when a prompt or a training
            sequence is encoded (m and b of Layer-Condensed KV, arXiv 2405.10637, section 3.2).
        kv_loss_weight: weight of the change of the shared keys and values in the last pass, as an additional loss.
        upward_style: ``fresh`` (a token is hidden from itself where the source is above) or ``paper`` (in every layer;
            the source attends over the pass before), the two published variants.
        encode: ``iterative``, or ``exact``: as many passes as tokens, which equals feeding them one by one.
        prefill_skip: leave out of the layers above the last KV layer the tokens whose outputs nobody asks for.
        retention_heads: heads of a gated-retention layer; None: as many as attention has.
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
        if self.layer_types is None:  # with a window and no types, the library would take every layer to slide
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
        """``kv_source_layers``, which has a value once the config is made."""
        assert self.kv_source_layers is not None
        return self.kv_source_layers

    @property
    def types(self) -> list[str]:
        """``layer_types``, likewise."""
        assert self.layer_types is not None
        return self.layer_types

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """Read by transformers: a cache that it makes has nothing for the layers marked ``reuse``."""
        assert self.kv_source_layers is not None
        shared = {s for i, s in enumerate(self.kv_source_layers) if s != i}
        return ["reuse" if s != i else ("store" if i in shared else None) for i, s in enumerate(self.kv_source_layers)]

    @property
    def refers_up(self) -> bool:
        """Some layer's source stands above it."""
        return any(s > i for i, s in enumerate(self.source))
