"""ShareGPT's file of conversations: where it is, and reading single conversations from it."""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

from ..conf.errors import InputError
from .base import Source, is_text
from .hub import fetch_or_refuse

log = logging.getLogger(__name__)

FILE = "ShareGPT_V3_unfiltered_cleaned_split.json"
HUB_REPO = "anon8231489123/ShareGPT_Vicuna_unfiltered"
HUB_REVISION = "192ab2185289094fc556ec8ce5ce1e8e587154ca"
HUB_SHA256 = "35f0e213ce091ed9b9af2a1f0755e9d39f9ccec34ab281cd4ca60d70f6479ba4"
"""sha256 of the file (672,837,942 bytes, 94,145 conversations) at :data:`HUB_REVISION`."""

CHUNK_BYTES = 1 << 22
BLANKS = re.compile(r"[ \t\n\r]*")


def load(data_dir: str | None, group: str) -> tuple[Source, Conversations]:
    """The conversations, and where they come from: ``sharegpt``, or ``sharegpt-subset`` of a file that is cut.

    Of a file that is cut, as copies in circulation are, the complete conversations are used; a warning reports it and
    the source's ``note`` keeps it for the record.

    Args:
        data_dir: the JSON file, or the folder that holds it as :data:`FILE`; None for the hub, at a pinned revision.
        group: config group of the part that reads it, for error messages.

    Raises:
        InputError: there is no file, the hub cannot be reached, its file is not the pinned one, or it has no
            conversations.
    """
    key = f"{group}.data_dir"
    path = _fetch(key) if data_dir is None else _local_file(data_dir, key)
    conversations = Conversations(path, group)
    if data_dir is None and conversations.sha256 != HUB_SHA256:
        allowed = f"the sha256 must be {HUB_SHA256}; delete the file to fetch it again"
        raise InputError(str(path), conversations.sha256, allowed)
    if conversations.note:
        log.warning(f"{path}: {conversations.note}")
    source = Source(
        # A sample of a part of the file is another sample, and must not be compared with one of the whole.
        name="sharegpt-subset" if conversations.note else "sharegpt",
        location=data_dir or f"{HUB_REPO}/{FILE}",
        revision=None if data_dir else HUB_REVISION,
        sha256={"sharegpt": conversations.sha256},
        note=conversations.note,
    )
    return source, conversations


class Conversations:
    """A JSON list ``[{"id": ..., "conversations": [{"from": ..., "value": ...}, ...]}, ...]`` on disk.

    The file is parsed once, object by object, and only the positions of the objects are kept: the text would take
    several hundred megabytes of the process whose memory is measured, for a few dozen conversations.

    Args:
        path: the file.
        group: config group of the part that reads it, for error messages.

    Attributes:
        path: the file.
        turns: number of turns of each complete conversation, in file order.
        sha256: sha256 of all the file's bytes.
        note: description of the file's damage; empty for a complete one.

    Raises:
        InputError: the file is unreadable, is not such a list, has no complete conversation, has text after the list,
            or one of the first two turns of a conversation has no text.
    """

    def __init__(self, path: Path, group: str):
        self.path = path
        self._key = f"{group}.data_dir"
        self.turns: list[int] = []
        self.note = ""
        self._spans: list[tuple[int, int]] = []  # first byte and length of each whole conversation
        try:
            self._scan()
        except OSError as error:
            raise InputError(self._key, path, f"unreadable: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise InputError(self._key, path, f"must be UTF-8: {error.reason}") from error
        if not any(self.turns):
            raise self._wrong("holds no whole conversation")

    def read(self, index: int) -> tuple[str, str, str]:
        """Id and texts of turns 0 and 1 of a conversation of two turns or more."""
        start, length = self._spans[index]
        with open(self.path, "rb") as file:
            file.seek(start)
            entry = json.loads(file.read(length))
        question, answer = entry["conversations"][:2]
        return str(entry.get("id") or f"conversation-{index}"), question["value"], answer["value"]

    def _scan(self) -> None:
        parse = json.JSONDecoder().raw_decode
        with open(self.path, "rb") as file:
            text = _Window(file)
            if not text.skip_to("["):
                raise self._wrong("must be a JSON list of conversations")
            closed = text.skip_to("]")
            while not closed:
                text.skip_blanks()
                try:
                    entry, end = parse(text.buffer, text.position)
                except json.JSONDecodeError:
                    # Not whole, or not all here yet: the window doubles, so that a long object costs its length twice.
                    if text.grow():
                        continue
                    break
                except (ValueError, RecursionError) as error:  # a number of 5,000 digits, nested too deeply
                    raise self._wrong(f"item {len(self.turns)} cannot be read: {error}") from error
                start = text.byte
                text.advance(end)
                self._add(entry, (start, text.byte - start))
                closed = text.skip_to("]")
                if not closed and not text.skip_to(","):
                    break
            if closed and text.skip_blanks():
                raise self._wrong(f"text follows the end of the list at byte {text.byte}")
            if not closed:
                whole = f"its {len(self.turns)} whole conversations are used"
                self.note = f"the file is cut or damaged after byte {text.byte}; {whole}"
            self.sha256 = text.sha256()

    def _add(self, entry: Any, span: tuple[int, int]) -> None:
        turns = entry.get("conversations", []) if isinstance(entry, dict) else None
        if not isinstance(turns, list):
            raise self._wrong(f"item {len(self.turns)} is not a conversation (an object with a list `conversations`)")
        for turn in turns[:2]:
            if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
                raise self._wrong(f"item {len(self.turns)} has a turn without a text `value`")
            if not is_text(turn["value"]):
                raise self._wrong(f"item {len(self.turns)} has half of a character (a lone surrogate)")
        self.turns.append(len(turns))
        self._spans.append(span)

    def _wrong(self, what: str) -> InputError:
        return InputError(self._key, self.path, what)


class _Window:
    """Text of a binary UTF-8 file, read forwards, with the byte each position lies at.

    A character that the end of the file cuts through is left out.
    """

    def __init__(self, file: Any):
        self.buffer, self.position = "", 0
        self.byte = 0  # of `position`, in the file
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._digest = hashlib.sha256()

    def grow(self) -> bool:
        """Drop what lies behind, read as much again as lies ahead; False at the end of the file."""
        self.buffer, self.position = self.buffer[self.position :], 0
        block = self._file.read(max(CHUNK_BYTES, len(self.buffer)))
        self._digest.update(block)
        self.buffer += self._decoder.decode(block)
        return bool(block)

    def advance(self, position: int) -> None:
        self.byte += len(self.buffer[self.position : position].encode())
        self.position = position

    def skip_blanks(self) -> bool:
        """Go to the next character that is not a blank; False at the end of the file."""
        while True:
            self.advance(BLANKS.match(self.buffer, self.position).end())  # type: ignore[union-attr]
            if self.position < len(self.buffer):
                return True
            if not self.grow():
                return False

    def skip_to(self, character: str) -> bool:
        """Go behind ``character`` if nothing but blanks lies before it."""
        if not self.skip_blanks() or self.buffer[self.position] != character:
            return False
        self.advance(self.position + 1)
        return True

    def sha256(self) -> str:
        """Of the whole file."""
        while block := self._file.read(CHUNK_BYTES):
            self._digest.update(block)
        return self._digest.hexdigest()


def _local_file(path: str, key: str) -> Path:
    place = Path(path).expanduser()
    file = place / FILE if place.is_dir() else place
    if not file.is_file():
        raise InputError(key, path, f"must be ShareGPT's JSON file or a folder that holds {FILE}")
    return file


def _fetch(key: str) -> Path:
    """The hub's file at the pinned revision."""
    instead = f"give {FILE} as {key}" + (" (workload.lengths=fixed needs none)" if key.startswith("workload.") else "")
    return fetch_or_refuse((HUB_REPO,), FILE, HUB_REVISION, what="ShareGPT (673 MB)", key=key, instead=instead)[0]
