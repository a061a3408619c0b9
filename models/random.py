"""Random weights in the shape of a published model, for measurements of time and memory without its weights.

Time and memory depend on shapes and dtype, not on values. The outputs are meaningless, so a run on random weights never
reports a score.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ..conf.options import OneOf, PositiveInt
from ..methods.sharing.base import Sharing
from .base import LoadedModel, ModelSource
from .kvshare.convert import shared_config
from .pretrained import prompt_limit
from .shape_files import SHAPE_FILES

SHAPES: dict[str, PretrainedConfig] = {
    name: AutoConfig.for_model(**json.loads(file.read_text(encoding="utf-8"))) for name, file in SHAPE_FILES.items()
}


@dataclass
class RandomModel(ModelSource):
    """A model of a published shape with seeded random weights and no tokenizer.

    Attributes:
        shape: Name of a file under ``models/shapes``, without ``.json``.
        seed: Seed of the weights. The same seed gives the same weights on the same kind of device.
        name: Name shown in tables; empty: ``random-`` and the shape.
        max_positions: Positions to allow, in tokens; None: the shape's own. Time and memory can be measured beyond the
            positions that the published model supports.
        sharing: Which layers own keys and values; set by the method.
    """

    location_fields: ClassVar[tuple[str, ...]] = ("sharing",)
    random_weights: ClassVar[bool] = True

    shape: Annotated[str, OneOf(SHAPE_FILES)]
    seed: int = 0
    name: str = ""
    max_positions: PositiveInt | None = None
    sharing: Sharing | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = self.name or f"random-{self.shape}"

    def for_sharing(self, sharing: Sharing | None, method: str) -> ModelSource:
        """Random weights with the method's sharing."""
        return self if sharing is None else replace(self, sharing=sharing)

    def fingerprint(self) -> str:
        """``random:shape:seed=N``."""
        shared = "" if self.sharing is None else f":{self.sharing.label}"
        return f"random:{self.shape}{shared}:seed={self.seed}"

    def load(self, device: str, dtype: torch.dtype) -> LoadedModel:
        """Build the model on ``device`` in ``dtype``, without a second copy (7B in bfloat16: 13.5 GB)."""
        config = SHAPES[self.shape]
        if self.sharing is not None:
            config = shared_config(config, self.sharing)
        positions = self.max_positions or config.max_position_embeddings
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.to_empty(device=device)
        model.tie_weights()
        generator = torch.Generator(device).manual_seed(self.seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:  # gains of the norms, and biases of q, k and v
                    parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                else:
                    parameter.normal_(0.0, config.initializer_range, generator=generator)
        # The RoPE frequencies are a buffer that the constructor computes, and `to_empty` leaves it uninitialized.
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
