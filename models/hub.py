"""Models of the Hugging Face hub at a given commit."""

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
# Not downloaded: pickles, and copies of the weights for other software.
_ALLOWED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_WEIGHT_COPIES = ["consolidated*", "original/*", "onnx/*"]
_ALTERNATIVE = "use model=smollm2-135m, or model=local model.path=FOLDER"


class SourceUnavailable(Exception):
    """A source cannot be reached; the text gives the reason in a few words."""


def ask_hub(repo_id: str, revision: str, deadline_s: float = 10.0) -> str:
    """Commit that ``revision`` names, from a single request.

    The hub client's download functions try six times, 23 s for each file, before they report that there is no network.
    This sends one request, and its deadline also covers name resolution, which socket timeouts do not.

    Args:
        repo_id: a model repository, ``owner/name``.
        revision: a branch, tag or commit.
        deadline_s: longest wait in seconds.

    Raises:
        SourceUnavailable: no answer, or offline mode.
        RepositoryNotFoundError: the hub has no such repository.
        RevisionNotFoundError: the repository has no such revision.
    """
    if constants.HF_HUB_OFFLINE:
        raise SourceUnavailable("HF_HUB_OFFLINE is set")
    answer: list[str | Exception] = []

    def ask() -> None:
        try:
            answer.append(str(HfApi().model_info(repo_id, revision=revision, timeout=5).sha))
        except Exception as error:  # raised in the caller's thread, below
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(deadline_s)
    if not answer:
        raise SourceUnavailable(f"no answer within {deadline_s:.0f} s")
    result = answer[0]
    if isinstance(result, RepositoryNotFoundError | RevisionNotFoundError):
        raise result
    if isinstance(result, Exception):  # classes of the client's HTTP library, which change between releases
        raise SourceUnavailable(_first_line(result))
    return result


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@dataclass
class HubModel(ModelSource):
    """A model repository on the hub.

    Attributes:
        repo_id: ``owner/name``.
        max_prompt_tokens: Prompts are truncated to this many tokens.
        name: Name shown in tables.
        revision: Commit (recommended: no request is sent once the files are cached), branch or tag.
        chat_template: Jinja text for a model whose tokenizer has no chat template, or whose paper used another; None:
            the tokenizer's own.
        device_map: ``auto`` for a model that is larger than one GPU; see :func:`.pretrained.load_pretrained`.
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
        """Commit of the weights: ``revision`` if it is one, else the hub's answer, else the commit in the hub's cache.

        Raises:
            InputError: no such repository or revision, or a branch name that neither the hub nor the cache resolves.
        """
        if _COMMIT.fullmatch(self.revision):
            return self.revision
        try:
            return ask_hub(self.repo_id, self.revision)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            has_repo = isinstance(error, RevisionNotFoundError)
            key, value = ("model.revision", self.revision) if has_repo else ("model.repo_id", self.repo_id)
            allowed = "is not on the hub, or is private: log in with `hf auth login`"
            raise InputError(key, value, allowed) from error
        except SourceUnavailable as error:
            cached = try_to_load_from_cache(self.repo_id, "config.json", revision=self.revision)
            if isinstance(cached, str):
                return Path(cached).parent.name  # .../snapshots/<commit>/config.json
            raise InputError(
                "model.repo_id",
                self.repo_id,
                f"the hub cannot be reached ({error}) and {constants.HF_HUB_CACHE} has no copy; {_ALTERNATIVE}",
            ) from error

    def fingerprint(self) -> str:
        """``owner/name@commit``."""
        return f"{self.repo_id}@{self.commit()}"

    def fetch(self) -> Path:
        """Folder of the files in the hub's cache; missing files are downloaded.

        Raises:
            InputError: the repository is gated, or a file is missing and cannot be downloaded.
        """
        commit = self.commit()
        try:
            ask_hub(self.repo_id, commit)
            online = True
        except (RepositoryNotFoundError, RevisionNotFoundError, SourceUnavailable):
            online = False  # the cache may have the files
        try:
            folder = snapshot_download(
                self.repo_id,
                revision=commit,
                allow_patterns=_ALLOWED_FILES,
                ignore_patterns=_WEIGHT_COPIES,
                local_files_only=not online,
            )
        except Exception as error:  # classes of the hub client and of its HTTP library
            if isinstance(error, GatedRepoError):
                reason = f"is gated: accept its licence at https://huggingface.co/{self.repo_id}, then `hf auth login`"
            elif online:
                reason = f"could not be fetched into {constants.HF_HUB_CACHE}: {_first_line(error)}"
            else:
                reason = f"is not in {constants.HF_HUB_CACHE}, and the hub does not provide it; {_ALTERNATIVE}"
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
