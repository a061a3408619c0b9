"""Models of the Hugging Face hub, at a commit."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from ..conf.errors import InputError, require
from .base import LoadedModel, ModelSource
from .pretrained import load_pretrained, prompt_limit

_COMMIT = re.compile(r"[0-9a-f]{40}")


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
        raise OutOfReach(str(result).strip().splitlines()[0] if str(result).strip() else type(result).__name__)
    return result


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
    """

    repo_id: str
    max_prompt_tokens: int
    name: str
    revision: str = "main"
    chat_template: str | None = None

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.repo_id) is not None,
            "model.repo_id",
            self.repo_id,
            "must be owner/name",
        )
        require(
            self.max_prompt_tokens > 0, "model.max_prompt_tokens", self.max_prompt_tokens, "must be at least 1 token"
        )

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
                f"the hub is out of reach ({error}) and {constants.HF_HUB_CACHE} has no copy; "
                "use model=smollm2-135m, or model=local model.path=FOLDER",
            ) from error

    def fingerprint(self) -> str:
        """``owner/name@commit``."""
        return f"{self.repo_id}@{self.commit()}"

    def load(self, device: str, dtype: torch.dtype) -> LoadedModel:
        """See :meth:`ModelSource.load`; the files stay in the hub's own cache."""
        commit = self.commit()
        try:
            ask_hub(self.repo_id, commit)
            offline = False
        except (RepositoryNotFoundError, RevisionNotFoundError, OutOfReach):
            offline = True  # the cache may hold it; where it does not, load_pretrained says what is missing
        model, tokenizer = load_pretrained(
            self.repo_id,
            device=device,
            dtype=dtype,
            revision=commit,
            local_files_only=offline,
            chat_template=self.chat_template,
        )
        positions = model.config.max_position_embeddings
        return LoadedModel(
            model=model,
            tokenizer=tokenizer,
            name=self.name,
            max_prompt_tokens=prompt_limit(self.max_prompt_tokens, positions),
            max_positions=positions,
            fingerprint=f"{self.repo_id}@{commit}",
        )
