"""Models of the Hugging Face hub, at a commit."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from ..conf.errors import InputError
from ..conf.options import PositiveInt, Wording
from .base import LoadedModel, ModelSource
from .pretrained import load_pretrained, plain_device_map, prompt_limit

_COMMIT = re.compile(r"[0-9a-f]{40}")
# Pickles are not even downloaded, nor the second copies of the weights that some repositories hold for other software.
_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_COPIES = ["consolidated*", "original/*", "onnx/*"]
_INSTEAD = "use model=smollm2-135m, or model=local model.path=FOLDER"


class OutOfReach(Exception):
    """A source did not answer; the text says why, in a few words."""


def ask_hub(repo_id: str, revision: str, deadline_s: float = 10.0) -> str:
    """The commit that ``revision`` names, asked once.

    The hub's own download functions try six times, 23 s for every file, before they notice that there is no network;
    this asks once, and gives up on a silent resolver too, which no socket timeout covers.

    Parameters
    ----------
    repo_id, revision : str
        A model repository, and a branch, tag or commit.
    deadline_s : float
        Longest wait, seconds.

    Raises
    ------
    OutOfReach
        No answer, or offline mode.
    RepositoryNotFoundError, RevisionNotFoundError
        The hub answered, and has no such thing.
    """
    if constants.HF_HUB_OFFLINE:
        raise OutOfReach("HF_HUB_OFFLINE is set")
    answer: list[str | Exception] = []

    def ask() -> None:
        try:
            answer.append(str(HfApi().model_info(repo_id, revision=revision, timeout=5).sha))
        except Exception as error:  # handed to the caller's thread, below
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(deadline_s)
    if not answer:
        raise OutOfReach(f"no answer within {deadline_s:.0f} s")
    result = answer[0]
    if isinstance(result, RepositoryNotFoundError | RevisionNotFoundError):
        raise result
    if isinstance(result, Exception):  # the HTTP library's own classes, which change between releases of the client
        raise OutOfReach(_first_line(result))
    return result


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@dataclass
class HubModel(ModelSource):
    """A model repository on the hub.

    Attributes
    ----------
    repo_id : str
        ``owner/name``.
    revision : str
        Commit (recommended: then nothing is asked of the hub once the files are here), branch or tag.
    max_prompt_tokens : int
        Prompts are truncated to this, tokens.
    name : str
        The name shown in tables.
    chat_template : str or None
        Jinja text for models whose tokenizer has no chat template, or whose paper used another; None keeps the
        tokenizer's own.
    device_map : str, mapping or None
        ``auto`` for a model that is larger than one GPU; see :func:`.pretrained.load_pretrained`.
    """

    repo_id: Annotated[str, Wording("owner/name", r"[\w-][\w.-]*/[\w-][\w.-]*")]
    max_prompt_tokens: PositiveInt
    name: str
    revision: str = "main"
    chat_template: str | None = None
    device_map: str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.device_map = plain_device_map(self.device_map)
        super().__post_init__()

    def commit(self) -> str:
        """The commit of the weights: ``revision`` itself, else the hub's answer, else what the hub cache has.

        Raises
        ------
        InputError
            No such repository or revision, or a branch name that neither the hub nor the cache resolves.
        """
        if _COMMIT.fullmatch(self.revision):
            return self.revision
        try:
            return ask_hub(self.repo_id, self.revision)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            what = "model.revision" if isinstance(error, RevisionNotFoundError) else "model.repo_id"
            raise InputError(
                what,
                self.revision if what == "model.revision" else self.repo_id,
                "is not on the hub, or is private: log in with `hf auth login`",
            ) from error
        except OutOfReach as error:
            cached = try_to_load_from_cache(self.repo_id, "config.json", revision=self.revision)
            if isinstance(cached, str):
                return Path(cached).parent.name  # .../snapshots/<commit>/config.json
            raise InputError(
                "model.repo_id",
                self.repo_id,
                f"the hub is out of reach ({error}) and {constants.HF_HUB_CACHE} has no copy; {_INSTEAD}",
            ) from error

    def fingerprint(self) -> str:
        """``owner/name@commit``."""
        return f"{self.repo_id}@{self.commit()}"

    def fetch(self) -> Path:
        """The folder of the files in the hub's own cache, completed from the hub where it can be reached.

        Raises
        ------
        InputError
            The repository is gated, or something is missing and the hub does not give it.
        """
        commit = self.commit()
        try:
            ask_hub(self.repo_id, commit)
            online = True
        except (RepositoryNotFoundError, RevisionNotFoundError, OutOfReach):
            online = False  # the cache may hold it all the same
        try:
            folder = snapshot_download(
                self.repo_id,
                revision=commit,
                allow_patterns=_FILES,
                ignore_patterns=_COPIES,
                local_files_only=not online,
            )
        except Exception as error:  # the hub client's own classes, and those of its HTTP library
            if isinstance(error, GatedRepoError):
                reason = f"is gated: accept its licence at https://huggingface.co/{self.repo_id}, then `hf auth login`"
            elif online:
                reason = f"could not be fetched into {constants.HF_HUB_CACHE}: {_first_line(error)}"
            else:
                reason = f"is not in {constants.HF_HUB_CACHE}, and the hub does not answer for it; {_INSTEAD}"
            raise InputError("model.repo_id", self.repo_id, reason) from error
        return Path(folder)

    def load(self, device: str, dtype: torch.dtype) -> LoadedModel:
        """See :meth:`ModelSource.load`."""
        folder = self.fetch()
        model, tokenizer = load_pretrained(
            folder, device=device, dtype=dtype, chat_template=self.chat_template, device_map=self.device_map
        )
        positions = model.config.max_position_embeddings
        return LoadedModel(
            model=model,
            tokenizer=tokenizer,
            name=self.name,
            max_prompt_tokens=prompt_limit(self.max_prompt_tokens, positions),
            max_positions=positions,
            fingerprint=f"{self.repo_id}@{folder.name}",  # .../snapshots/<commit>
        )
