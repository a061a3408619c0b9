"""What a model is to the rest of kvbench: a causal LM, its tokenizer, and what identifies its weights.

Adding a model is one YAML under ``conf/model``; a Python file beside this one is needed only where the weights are
*found* in a new way. Whoever loads weights here takes safetensors only and runs no code that came with them.
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
    """A model ready to run.

    Attributes
    ----------
    model : PreTrainedModel
        A transformers causal LM in eval mode, on the device and in the dtype asked for. The attention implementation
        is still the stock one: the runner sets ``kvbench``.
    tokenizer : PreTrainedTokenizerBase or None
        Pads on the left, and always has a pad token. None for random weights.
    name : str
        The name shown in tables and used in result paths.
    max_prompt_tokens : int
        A task truncates its prompt to this many tokens, chat wrapper not counted (LongBench's ``model2maxlen``).
    max_positions : int
        Positions the model was made for, tokens: prompt and generation together.
    fingerprint : str
        Identifies the weights; see :meth:`ModelSource.fingerprint`.
    random_weights : bool
        True when the outputs mean nothing: time and memory may be reported, scores may not.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    max_prompt_tokens: int
    max_positions: int
    fingerprint: str
    random_weights: bool = False


class ModelSource(HasIdentity, ABC):
    """Where a model comes from. Subclasses are dataclasses whose fields are the YAML keys under ``model.``.

    Attributes
    ----------
    name : str
        The name shown in tables and used in result paths.
    random_weights : bool
        True for a source whose outputs mean nothing, so that a runner of scores can refuse it before loading.
    """

    key_prefix: ClassVar[str] = "model."

    name: str
    random_weights: ClassVar[bool] = False
    omitted_at: ClassVar[Mapping[str, Any]] = {"device_map": None}

    @property
    def method_weights(self) -> str | None:
        """Fingerprint of the weights, where they belong to the method and not to the model: a member of a family."""
        return None

    def identity(self) -> dict[str, Any]:
        """What decides this model's outputs, as plain data: fingerprint, prompt limit, chat template and the like."""
        return {"fingerprint": self.fingerprint(), **self.parameters()}

    def for_sharing(self, sharing: Sharing | None, method: str) -> ModelSource:
        """The source of weights for a method: this one, or another member of its family.

        Parameters
        ----------
        sharing
            Which layers own keys and values under the method; None: as the model has it.
        method : str
            The method's name, for the error.

        Raises
        ------
        InputError
            There are no weights trained for it here.
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

        The runner hashes this to decide whether a run is already done, so it is the same on every machine for the
        same weights and differs when the weights differ. May fetch files; never allocates the model.

        Raises
        ------
        InputError
            The weights cannot be found or fetched.
        """

    @abstractmethod
    def load(self, device: str, dtype: torch.dtype) -> LoadedModel:
        """Load the model in eval mode onto ``device`` in ``dtype``; fetches it first where needed.

        Raises
        ------
        InputError
            The weights cannot be found, fetched or used.
        """
