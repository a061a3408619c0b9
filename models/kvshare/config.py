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
        kv_lora_rank: Numbers of a latent in place of keys and values, in every layer (:mod:`.latent`); None: layers
            have keys and values.
        qk_rope_head_dim, qk_nope_head_dim, v_head_dim: With latents: channels of the RoPE key (``head_dim`` too), of
            the other part of a head's key, and of a head's value.
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
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    qk_nope_head_dim: int | None = None
    v_head_dim: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        layers = self.num_hidden_layers
        if self.kv_source_layers is None:
            self.kv_source_layers = list(range(layers))
        if self.layer_types is None:  # given a window and no types, transformers makes every layer slide
            self.layer_types = [FULL] * layers
        if self.retention_heads is None and LINEAR in self.layer_types:
            self.retention_heads = self.num_attention_heads
        check_map(self.kv_source_layers, self.layer_types, layers, self.sliding_window)
        self._check_latents()
        for key, allowed in (("upward_style", UPWARD_STYLES), ("encode", ENCODINGS)):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} is {getattr(self, key)!r}; it must be one of {', '.join(allowed)}")
        if self.iter_forward < 0 or self.iter_backward < 1:
            raise ValueError(
                f"iter_forward={self.iter_forward} must be >= 0 and iter_backward={self.iter_backward} must be >= 1"
            )
        super().__post_init__(**kwargs)

    def _check_latents(self) -> None:
        """Check that latents are combined with nothing that they do not work with."""
        if self.kv_lora_rank is None:
            return
        missing = [k for k in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim") if getattr(self, k) is None]
        if missing:
            raise ValueError(f"kv_lora_rank is {self.kv_lora_rank} and {missing[0]} is missing")
        if self.head_dim != self.qk_rope_head_dim:
            raise ValueError(
                f"head_dim is {self.head_dim}; with latents it must be qk_rope_head_dim, which RoPE rotates"
            )
        if self.source != list(range(self.num_hidden_layers)) or {*self.types} != {FULL} or self.separate_kv_norm:
            raise ValueError("kv_lora_rank needs full attention, and keys and values of its own, in every layer")

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
