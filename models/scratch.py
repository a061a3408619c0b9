"""A small Llama of a given shape with new weights, for ``runner=train``."""

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

FFN_WIDTH_STEP = 8
"""A change of the feed-forward layers' width is a multiple of this."""


@dataclass
class ScratchModel(ModelSource):
    """A Llama of a given shape; the vocabulary is that of the task that it is trained on.

    Attributes:
        name: Name shown in tables and result paths.
        layers, hidden_size, heads, head_dim, intermediate_size: Shape of the plain model.
        kv_heads: KV heads; None: as many as query heads. A method with its own number (``method=gqa``) overrides it.
        match_parameters: Widen the feed-forward layers by the parameters that shared projections save, so that all
            sharing architectures have the parameters of the plain model (to a fraction of a per cent).
        max_positions: Positions that the model supports, in tokens.
        rope_theta: Base of the RoPE frequencies.
        tie_embeddings: The embedding matrix is the output layer too.
        init_std: Standard deviation of the new weights.
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
        """This source: new weights can have any sharing."""
        return self

    def fingerprint(self) -> str:
        """``scratch``: the recorded shape and seed determine the weights."""
        return "scratch"

    def config(self, sharing: Sharing | None, vocabulary: int, special: dict[str, Any]) -> KVShareLlamaConfig:
        """Config of the model to train.

        Args:
            sharing: which layers own keys and values; None: the plain model.
            vocabulary: tokens of the vocabulary.
            special: ids of the tokenizer's special tokens, by key of the config.
        """
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

        def config_of(sharing: Sharing, width: int) -> KVShareLlamaConfig:
            keys = shape | {"intermediate_size": width}
            return KVShareLlamaConfig(**(keys | sharing.config_keys(keys)))

        plain = Heads(self.kv_heads)
        config = config_of(sharing or plain, self.intermediate_size)
        if self.match_parameters:
            saved = count_parameters(config_of(plain, self.intermediate_size)) - count_parameters(config)
            steps = round(saved / (3 * self.hidden_size * self.layers) / FFN_WIDTH_STEP)
            config = config_of(sharing or plain, self.intermediate_size + FFN_WIDTH_STEP * steps)
        return config

    def build(self, sharing: Sharing | None, tokenizer: PreTrainedTokenizerBase, seed: int) -> KVShareLlamaForCausalLM:
        """Build a new model on the CPU in float32; the same seed gives the same weights."""
        special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
        config = self.config(sharing, len(tokenizer), special)
        torch.manual_seed(seed)
        return KVShareLlamaForCausalLM(config)

    def load(self, device: str, dtype: torch.dtype) -> LoadedModel:
        """Refuse to load: there are no weights before training."""
        raise InputError("model", self.name, "has no weights before it is trained: runner=train")


def count_parameters(config: KVShareLlamaConfig) -> int:
    """Number of parameters of a model with this config; allocates nothing."""
    with torch.device("meta"):
        return KVShareLlamaForCausalLM(config).num_parameters()
