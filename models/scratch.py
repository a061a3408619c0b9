"""A small Llama of a given shape with new weights: what ``runner=train`` starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from ..conf.errors import InputError, require
from ..conf.options import NonNegativeFloat, PositiveFloat, PositiveInt
from ..methods.sharing.base import Sharing
from ..methods.sharing.heads import Heads
from .base import LoadedModel, ModelSource
from .kvshare.config import KVShareLlamaConfig
from .kvshare.model import KVShareLlamaForCausalLM

FFN_STEP = 8
"""The width of the feed-forward layers is a multiple of this."""


@dataclass
class ScratchModel(ModelSource):
    """A shape; the vocabulary is that of the task trained on.

    Attributes
    ----------
    name : str
        The name shown in tables and result paths.
    layers, hidden_size, heads, head_dim, intermediate_size : int
        Of the plain model with as many KV heads as query heads.
    kv_heads : int or None
        KV heads; None is as many as query heads. A method that says otherwise (``method=gqa``) is right.
    match_parameters : bool
        Widen the feed-forward layers by what shared projections save, so that all ways of sharing have (to a fraction
        of a per cent) the parameters of the plain model.
    max_positions : int
        Positions the model is made for, tokens.
    rope_theta : float
        Base of RoPE's frequencies.
    tie_embeddings : bool
        Use the embedding matrix as the output layer too.
    init_std : float
        Standard deviation of the new weights.
    """

    random_weights: ClassVar[bool] = True

    name: str = "scratch"
    layers: PositiveInt = 4
    hidden_size: PositiveInt = 128
    heads: PositiveInt = 4
    kv_heads: PositiveInt | None = None
    head_dim: PositiveInt = 64
    intermediate_size: PositiveInt = 336
    match_parameters: bool = True
    max_positions: PositiveInt = 2048
    rope_theta: PositiveFloat = 10000.0
    tie_embeddings: bool = False
    init_std: NonNegativeFloat = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        kv, allowed = self.kv_heads, f"must divide model.heads={self.heads}, or be null"
        require(kv is None or self.heads % kv == 0, "model.kv_heads", kv, allowed)
        allowed = f"must divide model.hidden_size={self.hidden_size}"
        require(self.hidden_size % self.heads == 0, "model.heads", self.heads, allowed)

    def for_sharing(self, sharing: Sharing | None, method: str) -> ModelSource:
        """Any: the weights are new."""
        return self

    def fingerprint(self) -> str:
        """``scratch``: the shape and the seed, which are recorded beside it, decide the weights."""
        return "scratch"

    def config(self, sharing: Sharing | None, vocabulary: int, special: dict[str, Any]) -> KVShareLlamaConfig:
        """The config for a way of sharing; ``special`` are the tokenizer's special ids."""
        shape = {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads or self.heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_positions,
            "vocab_size": vocabulary,
            "rope_parameters": {"rope_type": "default", "rope_theta": float(self.rope_theta)},
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.init_std,
            **special,
        }

        def made(arm: Sharing, width: int) -> KVShareLlamaConfig:
            keys = shape | {"intermediate_size": width}
            return KVShareLlamaConfig(**(keys | arm.config_keys(keys)))

        plain = Heads(self.kv_heads)
        config = made(sharing or plain, self.intermediate_size)
        if self.match_parameters:
            spare = parameters(made(plain, self.intermediate_size)) - parameters(config)
            width = spare / (3 * self.hidden_size * self.layers) / FFN_STEP
            config = made(sharing or plain, self.intermediate_size + FFN_STEP * round(width))
        return config

    def build(self, sharing: Sharing | None, tokenizer: PreTrainedTokenizerBase, seed: int) -> KVShareLlamaForCausalLM:
        """A new model on the CPU in float32; the same seed gives the same weights."""
        special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
        config = self.config(sharing, len(tokenizer), special)
        torch.manual_seed(seed)
        return KVShareLlamaForCausalLM(config)

    def load(self, device: str, dtype: torch.dtype) -> LoadedModel:
        """Not to be run as it is."""
        raise InputError("model", self.name, "has no weights before it is trained: runner=train")


def parameters(config: KVShareLlamaConfig) -> int:
    """How many a model of this config has; nothing is allocated."""
    with torch.device("meta"):
        return KVShareLlamaForCausalLM(config).num_parameters()
