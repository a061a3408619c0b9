"""A model in a local folder: a user's checkpoint, or a copy of a hub repository for a machine without a network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig

from ..conf.errors import InputError, require
from ..conf.options import PositiveInt
from ..methods.sharing.base import Sharing
from .base import LoadedModel, ModelSource, file_sha256
from .pretrained import check_folder, load_pretrained, plain_device_map, prompt_limit, read_config

ANSWER_TOKENS = 512 + 256
"""Positions reserved when no prompt limit is given: LongBench's longest generation, 512, and the chat template."""
FINGERPRINTED_FILES = (
    *("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.spm", "*.codes", "*.tokenizer"),
    "additional_chat_templates/*.jinja",
)


@dataclass
class LocalModel(ModelSource):
    """A folder with ``config.json``, ``*.safetensors`` and a tokenizer, as ``save_pretrained`` writes it.

    Attributes:
        path: The folder.
        name: Name shown in tables and used in result paths; empty: the name of the folder.
        max_prompt_tokens: Prompts are truncated to this many tokens; None: the model's positions less 768 for the chat
            template and the answer.
        chat_template: Jinja text that replaces the tokenizer's own chat template.
        max_positions: Positions that the model supports, if its config has the length before RoPE scaling; None: as
            the config says.
        device_map: ``auto`` for a model that is larger than one GPU; see :func:`.pretrained.load_pretrained`.
    """

    location_fields: ClassVar[tuple[str, ...]] = ("path",)

    path: str
    name: str = ""
    max_prompt_tokens: PositiveInt | None = None
    chat_template: str | None = None
    max_positions: PositiveInt | None = None
    device_map: str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.device_map = plain_device_map(self.device_map)
        super().__post_init__()
        folder = self.folder
        self.name = self.name or folder.name
        require(folder.is_dir(), "model.path", self.path, "is not a folder")
        require((folder / "config.json").is_file(), "model.path", self.path, "has no config.json: not a model folder")
        if not any(folder.glob("*.safetensors")):
            pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
            raise InputError(
                "model.path",
                self.path,
                f"has only pickled weights ({pickles[0]}), which can run code when opened and are refused; "
                "save them with save_pretrained() to get *.safetensors"
                if pickles
                else "has no *.safetensors file",
            )
        check_folder(folder)

    @property
    def folder(self) -> Path:
        """``path``, absolute, with ``~`` expanded."""
        return Path(self.path).expanduser().absolute()

    def for_sharing(self, sharing: Sharing | None, method: str) -> ModelSource:
        """This source, if the config of the folder has the method's sharing."""
        if sharing is not None:
            sharing.fit(self.config)
        return self

    @property
    def config(self) -> PretrainedConfig:
        """Config in the folder's ``config.json``."""
        return read_config(self.folder)

    def fingerprint(self) -> str:
        """``sha256:`` over names and contents of all files that transformers may open.

        These are the configs, the weights with their index, and the tokenizer's files.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for file in sorted({file for pattern in FINGERPRINTED_FILES for file in self.folder.glob(pattern)}):
            try:
                digest.update(f"{file.relative_to(self.folder).as_posix()}\0{file_sha256(file)}\n".encode())
            except OSError as error:
                raise InputError("model.path", file, f"cannot be read: {error.strerror}") from error
        return f"sha256:{digest.hexdigest()}"

    def load(self, device: str, dtype: torch.dtype) -> LoadedModel:
        """See :meth:`ModelSource.load`."""
        model, tokenizer = load_pretrained(
            self.folder, device=device, dtype=dtype, chat_template=self.chat_template, device_map=self.device_map
        )
        positions = self.max_positions or model.config.max_position_embeddings
        limit = positions - ANSWER_TOKENS if self.max_prompt_tokens is None else self.max_prompt_tokens
        if self.max_prompt_tokens is None and limit < 2:
            allowed = (
                f"must be given: the model has {positions} positions, and null keeps {ANSWER_TOKENS} for the answer"
            )
            raise InputError("model.max_prompt_tokens", "null", allowed)
        return LoadedModel(
            model=model,
            tokenizer=tokenizer,
            name=self.name,
            max_prompt_tokens=prompt_limit(limit, positions),
            max_positions=positions,
            fingerprint=self.fingerprint(),
        )
