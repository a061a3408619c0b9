"""Random weights in the shape of a known model: for time and memory, on machines that cannot fetch the real ones.

How long a step takes and how many bytes it holds depend on shapes and dtype, not on the values. Outputs mean nothing,
so a run on random weights never reports a score.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib import resources
from typing import Annotated, ClassVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ..conf.options import OneOf, PositiveInt
from ..methods.sharing.base import Sharing
from .base import LoadedModel, ModelSource
from .kvshare.convert import shared_config
from .pretrained import prompt_limit

# One file a shape, as published in the config.json of the model it is named after (``tiny`` is for tests: every
# structure of the big ones, in milliseconds). ``kvbench kv-size`` reads the same files.
SHAPES: dict[str, PretrainedConfig] = {
    file.name.removesuffix(".json"): AutoConfig.for_model(**json.loads(file.read_text(encoding="utf-8")))
    for file in (resources.files("kvbench.models") / "shapes").iterdir()
    if file.name.endswith(".json")
}


@dataclass
class RandomModel(ModelSource):
    """A model of a published shape with seeded random weights and no tokenizer.

    Attributes
    ----------
    shape : str
        The name of a file under ``models/shapes``, without ``.json``.
    seed : int
        Seed of the weights. The same seed gives the same weights on the same kind of device.
    name : str
        The name shown in tables; the shape's own by default.
    max_positions : int or None
        Positions to allow, tokens, when they are not the shape's own: time and memory can be measured beyond what the
        published model was made for.
    sharing : Sharing or None
        Which layers own keys and values; set by the method.
    """

    location_fields: ClassVar[tuple[str, ...]] = ("sharing",)
    random_weights: ClassVar[bool] = True

    shape: Annotated[str, OneOf(SHAPES)]
    seed: int = 0
    name: str = ""
    max_positions: PositiveInt | None = None
    sharing: Sharing | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = self.name or f"random-{self.shape}"

    def for_sharing(self, sharing: Sharing | None, method: str) -> ModelSource:
        """Random weights of any architecture."""
        return self if sharing is None else replace(self, sharing=sharing)

    def fingerprint(self) -> str:
        """``random:shape:seed=N``."""
        shared = "" if self.sharing is None else f":{self.sharing.label}"
        return f"random:{self.shape}{shared}:seed={self.seed}"

    def load(self, device: str, dtype: torch.dtype) -> LoadedModel:
        """Build the model on ``device`` in ``dtype``, with no copy of it anywhere else (7B in bfloat16: 13.5 GB)."""
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
                if parameter.dim() == 1:  # the scales of the norms, and the biases some models add to q, k and v
                    parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
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
