"""Random weights in the shape of a known model: for time and memory, on machines that cannot fetch the real ones.

How long a step takes and how many bytes it holds depend on shapes and dtype, not on the values. Outputs mean nothing,
so a run on random weights never reports a score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig

from ..conf.errors import one_of, require
from .base import LoadedModel, ModelSource
from .pretrained import prompt_limit

# Each as published in the config.json of the model it is named after.
SHAPES: dict[str, PretrainedConfig] = {
    "llama2-7b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
    ),
    "llama2-13b": LlamaConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        vocab_size=32000,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
    ),
    "llama3-8b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        bos_token_id=128000,
        eos_token_id=128001,
    ),
    "mistral-7b": MistralConfig(  # v0.2: no sliding window
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        rms_norm_eps=1e-5,
        sliding_window=None,
    ),
    "tiny": LlamaConfig(  # for tests: every structure of the big ones (GQA, several layers), in milliseconds
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}


@dataclass
class RandomModel(ModelSource):
    """A model of a published shape with seeded random weights and no tokenizer.

    Attributes
    ----------
    shape : str
        A key of ``SHAPES``.
    seed : int
        Seed of the weights. The same seed gives the same weights on the same kind of device.
    name : str
        The name shown in tables; the shape's own by default.
    max_positions : int or None
        Positions to allow, tokens, when they are not the shape's own: time and memory can be measured beyond what the
        published model was made for.
    """

    random_weights: ClassVar[bool] = True

    shape: str
    seed: int = 0
    name: str = ""
    max_positions: int | None = None

    def __post_init__(self) -> None:
        require(self.shape in SHAPES, "model.shape", self.shape, one_of(self.shape, SHAPES))
        require(
            self.max_positions is None or self.max_positions > 0,
            "model.max_positions",
            self.max_positions,
            "must be at least 1, or null for the shape's own",
        )
        self.name = self.name or f"random-{self.shape}"

    def fingerprint(self) -> str:
        """``random:shape:seed=N``."""
        return f"random:{self.shape}:seed={self.seed}"

    def load(self, device: str, dtype: torch.dtype) -> LoadedModel:
        """Build the model on ``device`` in ``dtype``, with no copy of it anywhere else (7B in bfloat16: 13.5 GB)."""
        config = SHAPES[self.shape]
        positions = self.max_positions or config.max_position_embeddings
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.to_empty(device=device)
        model.tie_weights()
        generator = torch.Generator(device).manual_seed(self.seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # the norms' scales
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, config.initializer_range, generator=generator)
        # RoPE's frequencies are a buffer computed when the module is made; `to_empty` left memory as it was there
        with torch.device(device):
            model.model.rotary_emb = type(model.model.rotary_emb)(config)
        return LoadedModel(
            model=model.eval(),
            tokenizer=None,
            name=self.name,
            max_prompt_tokens=prompt_limit(positions, positions),
            max_positions=positions,
            fingerprint=self.fingerprint(),
            random_weights=True,
        )
