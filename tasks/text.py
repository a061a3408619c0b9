"""Text to train a language model on: files, a hub data set, or the standard library of the Python that runs this.

Documents are tokenised, joined into one stream and cut into blocks; every twentieth block is held out. Sequences are
cut from the other blocks without any padding, and their order is drawn anew for each pass over the data.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..conf.errors import InputError, require
from ..conf.options import PositiveInt
from .base import Source
from .training import Tokens, TrainingData

BLOCK = 4096
"""Tokens of a block: what is held out is whole blocks, so that no held-out sentence stands in the training data."""
HELD_OUT = 20
"""One block of this many is held out."""
STDLIB = "stdlib"
BYTES = "bytes"


@dataclass
class Text(TrainingData):
    """Language modelling.

    Attributes:
        path: ``stdlib`` (the standard library's ``*.py`` without its tests), a text file, a folder, or null with
            ``dataset``.
        pattern: files of a folder.
        dataset, config, split, column: a hub data set instead, and where its text is.
        limit_bytes: stop reading after so many; null: read everything.
        tokenizer: of a model trained from scratch: ``bytes``, or a folder or hub name with a tokenizer.
    """

    id: ClassVar[str] = "Text"
    name = "text"
    location_fields: ClassVar[tuple[str, ...]] = ("path", "tokenizer")

    path: str | None = STDLIB
    pattern: str = "*.txt"
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    column: str = "text"
    limit_bytes: PositiveInt | None = None
    tokenizer: str = BYTES

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = "must be given, or task.dataset with task.path=null"
        require((self.path is None) != (self.dataset is None), "task.path", self.path, allowed)
        self._cut: tuple[Any, int, tuple[Tokens, Tokens]] | None = None  # tokenizer, length, what came of them

    def source(self) -> Source:
        """``text-stdlib`` or ``text-`` and the first 6 digits of its sha256."""
        return self._source

    @cached_property
    def _source(self) -> Source:
        whole = hashlib.sha256()
        for document in self._documents:
            whole.update(document.encode())
        digest = whole.hexdigest()
        place = self.path or self.dataset or ""
        name = "text-stdlib" if self.path == STDLIB else f"text-{digest[:6]}"
        characters = sum(len(d) for d in self._documents)
        note = f"{len(self._documents)} documents, {characters} characters."
        hashes = {"text": digest}
        if self.tokenizer != BYTES:
            whole = hashlib.sha256(self.new_tokenizer().backend_tokenizer.to_str().encode())
            hashes["tokenizer"] = whole.hexdigest()
        return Source(name, Path(place).name if self.path else place, None, hashes, note)

    @cached_property
    def _documents(self) -> list[str]:
        if self.dataset is not None:
            documents = self._from_hub()
        else:
            assert self.path is not None
            files = stdlib_files() if self.path == STDLIB else self._files(Path(self.path).expanduser())
            documents = [f.read_text(encoding="utf-8", errors="replace") for f in files]
        if self.limit_bytes is not None:
            kept, left = [], self.limit_bytes
            for document in documents:
                kept.append(document[:left])
                left -= len(kept[-1].encode())
                if left <= 0:
                    break
            documents = kept
        require(any(documents), "task.path", self.path or self.dataset, "holds no text")
        return documents

    def _files(self, path: Path) -> list[Path]:
        if path.is_file():
            return [path]
        require(path.is_dir(), "task.path", self.path, "is neither a file nor a folder")
        found = sorted(path.rglob(self.pattern))
        require(bool(found), "task.pattern", self.pattern, f"matches no file under {self.path}")
        return found

    def _from_hub(self) -> list[str]:
        from datasets import load_dataset

        try:
            rows = load_dataset(self.dataset, self.config, split=self.split)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError("task.dataset", self.dataset, f"cannot be loaded: {reason}") from error
        require(
            self.column in rows.column_names,
            "task.column",
            self.column,
            f"must be one of {', '.join(rows.column_names)}",
        )
        return list(rows[self.column])

    # as training data ----------------------------------------------------------------------------------------------

    def new_tokenizer(self) -> Any:
        """One token for each byte, and one for padding; or the tokenizer that was named."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        if self.tokenizer != BYTES:
            try:
                tokenizer: Any = AutoTokenizer.from_pretrained(Path(self.tokenizer).expanduser())
            except Exception as error:  # transformers raises whatever a damaged folder makes it do
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise InputError("task.tokenizer", self.tokenizer, f"cannot be loaded: {reason}") from error
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            tokenizer.padding_side = "left"
            return tokenizer
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left")

    def sequence_length(self, wanted: int) -> int:
        return wanted

    def batch(self, tokenizer: Any, step: int, size: int, length: int, seed: int) -> tuple[Tokens, Tokens]:
        sequences, _ = self._sequences(tokenizer, length)
        first = step * size
        rows = []
        for number in range(first, first + size):
            epoch, place = divmod(number, len(sequences))
            rows.append(sequences[order_of(seed, epoch, len(sequences))[place]])
        ids = np.stack(rows)
        return ids, ids

    def validation(self, tokenizer: Any, length: int, sequences: int) -> tuple[Tokens, Tokens]:
        _, held_out = self._sequences(tokenizer, length)
        step = max(1, len(held_out) // sequences)  # from all over the text
        ids = held_out[::step][:sequences]
        return ids, ids

    def _sequences(self, tokenizer: Any, length: int) -> tuple[Tokens, Tokens]:
        """[N, length] to train on, and held out."""
        if self._cut is None or self._cut[0] is not tokenizer or self._cut[1] != length:
            encoded = tokenizer(self._documents, add_special_tokens=False, verbose=False).input_ids
            end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            stream = np.concatenate([np.asarray(ids + end, dtype=np.int64) for ids in encoded])
            block = max(BLOCK, length)
            whole = len(stream) // block
            require(
                whole >= HELD_OUT,
                "task.path",
                self.path or self.dataset,
                f"has {len(stream)} tokens; {HELD_OUT} blocks of {block} are needed, so that one can be held out",
            )
            blocks = stream[: whole * block].reshape(whole, block)[:, : block // length * length]
            kept = np.arange(whole) % HELD_OUT != HELD_OUT - 1
            self._cut = tokenizer, length, (blocks[kept].reshape(-1, length), blocks[~kept].reshape(-1, length))
        return self._cut[2]


@lru_cache(maxsize=2)
def order_of(seed: int, epoch: int, count: int) -> Tokens:
    """In which order ``count`` sequences come in a pass over the data."""
    return np.random.default_rng([4, seed, epoch]).permutation(count)


def stdlib_files() -> list[Path]:
    """The standard library's modules, without tests and what is installed beside them."""
    home = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "site-packages", "dist-packages", "idle_test", "__pycache__"}
    return sorted(f for f in home.rglob("*.py") if not left_out & set(f.relative_to(home).parts))
