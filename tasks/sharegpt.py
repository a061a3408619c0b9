"""ShareGPT: real conversations, as a workload and as prompts whose replies are compared with the full cache's.

With ``runner=efficiency`` the conversations give lengths, for measuring time and memory.

``lengths=sampled`` is the rule of vLLM's benchmark (``benchmark_serving.py``, now ``vllm bench serve``): conversations
of two turns or more, shuffled with the seed; the prompt is turn 0, as many tokens are generated as turn 1 has; too
short and too long ones are dropped. With the whole file and the same tokenizer the requests are the ones that vLLM
draws with that seed. ``lengths=fixed`` is the shape that the KIVI and MiniCache papers made of ShareGPT: 161 tokens in,
338 out.

With ``runner=accuracy`` the model replies to their first turns, and a reply is compared with what the full cache makes
the same model say: there is no right answer, but a method that loses nothing changes nothing.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..conf.errors import InputError, is_whole, one_of, require
from .base import Example, Reply, Source, Task, is_text, prompt_tokens, require_fit
from .hub import fetch_or_refuse
from .longbench_metrics import rouge
from .workload import Request, Workload, check_shape, random_tokens

FILE = "ShareGPT_V3_unfiltered_cleaned_split.json"
HUB_REPO = "anon8231489123/ShareGPT_Vicuna_unfiltered"
HUB_REVISION = "192ab2185289094fc556ec8ce5ce1e8e587154ca"
HUB_SHA256 = "35f0e213ce091ed9b9af2a1f0755e9d39f9ccec34ab281cd4ca60d70f6479ba4"
"""Of the file (672,837,942 bytes, 94,145 conversations) at :data:`HUB_REVISION`."""

MIN_TOKENS, MAX_PROMPT_TOKENS, MAX_TOTAL_TOKENS = 4, 1024, 2048
"""vLLM's limits: of prompt and answer each, of the prompt, and of both together."""

LENGTHS = ("sampled", "fixed")
METRICS = ("prefix", "tokens", "rouge")
PROMPT_CHARACTERS = (16, 4096)
"""Of a first turn that is replied to. Not in tokens, so that every model is asked the same."""
CHUNK_BYTES = 1 << 22
BLANKS = re.compile(r"[ \t\n\r]*")


@dataclass
class ShareGPT(Workload, Task):
    """ShareGPT conversations.

    Attributes
    ----------
    data_dir : the JSON file, or the folder that holds it as :data:`FILE`; None for the hub, at a pinned revision.
    limit : conversations.
    lengths : ``sampled`` or ``fixed``, see the module docstring.
    prompt_tokens, new_tokens : the shape of ``fixed``.
    max_new_tokens : of a reply, with ``runner=accuracy``; so are all that follow.
    metric : ``prefix``: share of the reply before it leaves the full cache's. ``tokens``: share of places with the same
        token. ``rouge``: ROUGE-L F of the two texts. Every sample has all three.
    chat : use the model's chat template.
    seed : which conversations.
    max_length : prompt tokens that the model may be given; a longer prompt is an error.
    """

    id: ClassVar[str] = "ShareGPT"
    name = "sharegpt"
    location_fields = ("data_dir",)
    compares = True

    data_dir: str | None = None
    limit: int = 16
    lengths: str = "sampled"
    prompt_tokens: int = 161
    new_tokens: int = 338
    max_new_tokens: int = 256
    metric: str = "prefix"
    chat: bool = True
    seed: int = 0
    max_length: int | None = None

    def __post_init__(self) -> None:
        self.data_dir = None if self.data_dir is None else str(self.data_dir)
        self._loaded: tuple[Source, Conversations] | None = None
        require(is_whole(self.limit, 1), "task.limit", self.limit, "must be a whole number, 1 or more")
        require(self.lengths in LENGTHS, "task.lengths", self.lengths, one_of(self.lengths, LENGTHS))
        check_shape(self.prompt_tokens, self.new_tokens)
        require(is_whole(self.max_new_tokens, 1), "task.max_new_tokens", self.max_new_tokens, "must be 1 or more")
        require(self.metric in METRICS, "task.metric", self.metric, one_of(self.metric, METRICS))
        require(isinstance(self.chat, bool), "task.chat", self.chat, "must be true or false")
        require(is_whole(self.seed), "task.seed", self.seed, "must be a whole number")
        self.require_max_length()

    def identity(self) -> dict[str, Any]:
        """See :meth:`.Workload.identity`; the shape is left out where it decides nothing."""
        identity = super().identity()
        for key in self.scoring():
            del identity[key]
        if self.lengths == "sampled":
            del identity["prompt_tokens"], identity["new_tokens"]
        return identity

    def source(self) -> Source:
        """``sharegpt`` (``sharegpt-subset`` of a file that is cut) with the file's sha256.

        Or ``sharegpt-161+338`` for the fixed shape, which reads no file.

        Of a file that is cut, as copies in circulation are, the whole conversations are used; a line on stderr says so
        and the source's ``note`` keeps it for the record.

        Raises
        ------
        InputError
            There is no file, the hub cannot be reached, its file is not the pinned one, or it holds no conversations.
        """
        if self.lengths == "fixed":
            name = f"{self.name}-{self.prompt_tokens}+{self.new_tokens}"
            return Source(name=name, location="random token ids", revision=None, sha256={})
        return self._load()[0]

    def requests(self, tokenizer: Any, vocab_size: int, seed: int, count: int) -> list[Request]:
        """``task.limit`` requests whatever ``count`` is; see :meth:`.Workload.requests`.

        Ids of sampled requests are the conversations' own. Tokens are counted as vLLM counts them: with the special
        tokens that the tokenizer puts round a text, and without a chat template.

        Raises
        ------
        InputError
            Sampled lengths without a tokenizer; fewer than ``limit`` conversations within vLLM's limits.
        """
        if self.lengths == "fixed":
            return [
                Request(f"fixed-{i}", random_tokens(self.prompt_tokens, vocab_size, seed, i), self.new_tokens)
                for i in range(self.limit)
            ]
        if tokenizer is None:
            allowed = (
                "this model has no tokenizer; use task.lengths=fixed, task=shape task.tokens=random or another model"
            )
            raise InputError("task.lengths", self.lengths, allowed)
        conversations = self._load()[1]
        order = [index for index, turns in enumerate(conversations.turns) if turns >= 2]
        random.Random(seed).shuffle(order)
        requests: dict[str, Request] = {}
        for index in order:
            if len(requests) == self.limit:
                break
            identifier, question, answer = conversations.read(index)
            prompt, new_tokens = _ids(tokenizer, question), len(_ids(tokenizer, answer))
            if (
                min(len(prompt), new_tokens) < MIN_TOKENS
                or len(prompt) > MAX_PROMPT_TOKENS
                or len(prompt) + new_tokens > MAX_TOTAL_TOKENS
            ):
                continue
            if identifier in requests:
                identifier += f":{index}"
            requests[identifier] = Request(identifier, tuple(prompt), new_tokens)
        if len(requests) < self.limit:
            allowed = (
                f"only {len(requests)} of {len(order)} conversations of two turns or more are within vLLM's limits "
                f"({conversations.path.name} has {len(conversations.turns)} conversations)"
            )
            raise InputError("task.limit", self.limit, allowed)
        return list(requests.values())

    # as a task -----------------------------------------------------------------------------------------------------

    def scoring(self) -> dict[str, Any]:
        keys = ("max_new_tokens", "metric", "chat", "seed", "max_length")
        return {key: getattr(self, key) for key in keys}

    def examples(self) -> list[Example]:
        """The first turns of ``limit`` conversations of two turns or more, drawn with ``seed``.

        Raises
        ------
        InputError
            Fixed lengths, which are no text; fewer conversations with a first turn of usual length.
        """
        allowed = "is random tokens, to which there is no reply: use task.lengths=sampled, or runner=efficiency"
        require(self.lengths == "sampled", "task.lengths", self.lengths, allowed)
        conversations = self._load()[1]
        order = [index for index, turns in enumerate(conversations.turns) if turns >= 2]
        random.Random(f"replies {self.seed}").shuffle(order)
        examples: dict[str, Example] = {}
        for index in order:
            if len(examples) == self.limit:
                break
            identifier, question, _ = conversations.read(index)
            if PROMPT_CHARACTERS[0] <= len(question.strip()) <= PROMPT_CHARACTERS[1]:
                identifier += f":{index}" if identifier in examples else ""
                examples[identifier] = Example(
                    self.name, identifier, question, (), self.max_new_tokens, self.chat, meta={"row": index}
                )
        allowed = f"only {len(examples)} conversations have a first turn of {PROMPT_CHARACTERS[0]} to "
        allowed += f"{PROMPT_CHARACTERS[1]} characters and a second one"
        require(len(examples) == self.limit, "task.limit", self.limit, allowed)
        return list(examples.values())

    def encode(self, example: Example, tokenizer: Any, max_length: int | None) -> list[int]:
        ids = prompt_tokens(example.prompt, tokenizer, example.chat)
        require_fit(ids, self.limit_of(max_length), example)
        return ids

    def judge(self, example: Example, prediction: Any, reply: Reply | None, reference: Reply | None) -> dict[str, Any]:
        """How far a reply goes with the full cache's: all three metrics, and tokens before they part."""
        assert reply is not None and reference is not None
        ours, theirs = reply.tokens, reference.tokens
        longest = max(len(ours), len(theirs))
        same = [a == b for a, b in zip(ours, theirs, strict=False)]
        together = same.index(False) if False in same else len(same)
        found = {
            "prefix": together / longest if longest else 1.0,
            "tokens": sum(same) / longest if longest else 1.0,
            "rouge": 1.0 if reply.text == reference.text else rouge(reply.text, reference.text),
        }
        return {
            "score": found[self.metric],
            **{key: value for key, value in found.items() if key != self.metric},
            "tokens_together": together,
            "reference_tokens": len(theirs),
        }

    def _load(self) -> tuple[Source, Conversations]:
        if self._loaded is None:
            path = _fetch() if self.data_dir is None else _local_file(self.data_dir)
            conversations = Conversations(path)
            if self.data_dir is None and conversations.sha256 != HUB_SHA256:
                allowed = f"the sha256 must be {HUB_SHA256}; delete the file to fetch it again"
                raise InputError(str(path), conversations.sha256, allowed)
            if conversations.note:
                print(f"{path}: {conversations.note}", file=sys.stderr, flush=True)
            source = Source(
                # What is sampled from a part of the file is another sample, and must not stand beside it.
                name=f"{self.name}-subset" if conversations.note else self.name,
                location=self.data_dir or f"{HUB_REPO}/{FILE}",
                revision=None if self.data_dir else HUB_REVISION,
                sha256={self.name: conversations.sha256},
                note=conversations.note,
            )
            self._loaded = source, conversations
        return self._loaded


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, truncation=False, verbose=False).input_ids)


class Conversations:
    """A JSON list ``[{"id": ..., "conversations": [{"from": ..., "value": ...}, ...]}, ...]`` on disk.

    The file is walked through once, object by object, and only where each one lies is kept: its text would take several
    hundred megabytes of the process whose memory is measured, for the sake of a few dozen conversations.

    Attributes
    ----------
    path : the file.
    turns : turns of each whole conversation, in file order.
    sha256 : of all the file's bytes.
    note : what is wrong with the file, in words; empty for a whole one.

    Raises
    ------
    InputError
        Unreadable; not such a list; no whole conversation in it; text behind the list; a turn among the first two
        without text.
    """

    def __init__(self, path: Path):
        self.path = path
        self.turns: list[int] = []
        self.note = ""
        self._spans: list[tuple[int, int]] = []  # first byte and length of each whole conversation
        try:
            self._scan()
        except OSError as error:
            raise InputError("task.data_dir", path, f"unreadable: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise InputError("task.data_dir", path, f"must be UTF-8: {error.reason}") from error
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
        return InputError("task.data_dir", self.path, what)


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


# --- where the file is ------------------------------------------------------------------------------------------------


def _local_file(path: str) -> Path:
    place = Path(path).expanduser()
    file = place / FILE if place.is_dir() else place
    if not file.is_file():
        raise InputError("task.data_dir", path, f"must be ShareGPT's JSON file or a folder that holds {FILE}")
    return file


def _fetch() -> Path:
    """The hub's file at the pinned revision."""
    instead = f"give {FILE} as task.data_dir (with runner=efficiency, task.lengths=fixed needs none)"
    how = {"what": "ShareGPT (673 MB)", "key": "task.data_dir", "instead": instead}
    return fetch_or_refuse((HUB_REPO,), FILE, HUB_REVISION, **how)[0]
