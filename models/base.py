"""Contract of a model source: a causal LM, its tokenizer, and the fingerprint of its weights.

To add a model, add a YAML under ``conf/model``; a new Python file is needed only for a new kind of source. Every source
loads safetensors only, and runs no code that comes with the weights.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..conf.errors import InputError
from ..conf.identity import HasIdentity
from ..methods.sharing.base import Sharing


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        model: A transformers causal LM in eval mode, on the requested device and in the requested dtype. Its attention
            implementation is transformers' default; the runner sets ``kvbench``.
        tokenizer: Pads on the left and always has a pad token. None for random weights.
        name: Name shown in tables and used in result paths.
        max_prompt_tokens: A task truncates its prompts to this many tokens, the chat template not counted (LongBench's
            ``model2maxlen``).
        max_positions: Positions that the model supports, in tokens: prompt and generation together.
        fingerprint: Identifies the weights; see :meth:`ModelSource.fingerprint`.
        random_weights: The outputs are meaningless: time and memory may be reported, scores may not.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    max_prompt_tokens: int
    max_positions: int
    fingerprint: str
    random_weights: bool = False


class ModelSource(HasIdentity, ABC):
    """Source of a model. Subclasses are dataclasses whose fields are the YAML keys under ``model.``.

    Attributes:
        name: Name shown in tables and used in result paths.
        random_weights: The outputs are meaningless, so that an accuracy run refuses the source before loading.
    """

    key_prefix: ClassVar[str] = "model."

    name: str
    random_weights: ClassVar[bool] = False
    omitted_at: ClassVar[Mapping[str, Any]] = {"device_map": None}

    @property
    def method_weights(self) -> str | None:
        """Fingerprint of weights that belong to the method (a member of a trained family); None for all others."""
        return None

    def identity(self) -> dict[str, Any]:
        """Everything that determines the model's outputs, as plain data: fingerprint, prompt limit, chat template."""
        return {"fingerprint": self.fingerprint(), **self.parameters()}

    def for_sharing(self, sharing: Sharing | None, method: str) -> ModelSource:
        """Source of the weights for a method: this one, or another member of its family.

        Args:
            sharing: which layers own keys and values under the method; None: as in the model.
            method: name of the method, for the error.

        Raises:
            InputError: this source has no weights trained for the method.
        """
        if sharing is None:
            return self
        raise InputError(
            "method",
            method,
            f"needs weights trained for it ({sharing.label}), and model={self.name} has none; train "
            f"some: python run.py runner=train method={method} task=text model={self.name}",
        )

    @abstractmethod
    def fingerprint(self) -> str:
        """Identify the weights without loading them.

        The runner hashes the fingerprint to decide whether a run is already done. It is therefore the same on every
        machine for the same weights, and differs when the weights differ. May fetch files; never allocates the model.

        Raises:
            InputError: the weights cannot be found or fetched.
        """

    @abstractmethod
    def load(self, device: str, dtype: torch.dtype) -> LoadedModel:
        """Load the model in eval mode onto ``device`` in ``dtype``; fetches it first if needed.

        Raises:
            InputError: the weights cannot be found, fetched or used.
        """
