"""One batch of examples put to several caches: what each of them answers, and the bytes that it held."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..conf.errors import InputError
from ..methods.base import KVCache
from ..methods.fan_out import FanOutCache
from ..models.base import LoadedModel
from ..models.pretrained import input_device
from ..tasks.base import Continuations, Example, Reply, Task, cut_at, question_tokens
from .engine import Sampling, generate, left_padded, score


@dataclass(frozen=True)
class Item:
    """An example as token ids.

    Attributes:
        example: which.
        prompt: what is read before the method compresses; with ``scored``, the longest of their contexts.
        question: what comes after that and before the answer.
        scored: of a task that asks for likelihoods; then ``question`` is empty.
    """

    example: Example
    prompt: list[int]
    question: list[int]
    scored: tuple[Continuations, ...] = ()

    @property
    def kind(self) -> tuple[bool, int]:
        """Items of one kind can be asked together."""
        return bool(self.scored), len(self.question)

    @property
    def read_tokens(self) -> int:
        """Tokens read before compression."""
        return sum(len(c.context) for c in self.scored) or len(self.prompt)


@dataclass
class Answer:
    """What one cache gave for one example.

    Attributes:
        fields: of ``samples.jsonl``: the prediction, tokens generated, bytes after the prompt and at the end.
        reply: as generated; None where likelihoods were asked for.
    """

    fields: dict[str, Any]
    reply: Reply | None


def encode(task: Task, example: Example, loaded: LoadedModel, limit: int | None, split: bool) -> Item:
    """An example as token ids; ``split``: the method compresses before the question.

    Raises:
        InputError: it is longer than the model's positions, or there is no question to split off.
    """
    assert loaded.tokenizer is not None
    encoded = task.encode(example, loaded.tokenizer, limit)
    scored: tuple[Continuations, ...] = ()
    if encoded and isinstance(encoded[0], Continuations):
        scored = tuple(c for c in encoded if isinstance(c, Continuations))
        ids = max((c.context for c in scored), key=len)
        to_come = max(len(given) + len(asked) for c in scored for given, asked in c.asked) - 1
    else:
        ids, to_come = [i for i in encoded if isinstance(i, int)], example.max_new_tokens
    if len(ids) + to_come > loaded.max_positions:
        raise InputError(
            "task.max_length",
            limit,
            f"{example.dataset}/{example.id} has {len(ids)} prompt tokens and {to_come} may follow, but {loaded.name} "
            f"has {loaded.max_positions} positions; the prompts must be shorter (see conf/task for the keys that say "
            "how long they are)",
        )
    if not split:
        return Item(example, ids, [], scored)
    if scored:
        raise InputError(
            "runner.question", "after_compression", f"task={task.name} asks no questions: use with_context"
        )
    count = question_tokens(ids, example.question, loaded.tokenizer)
    return Item(example, ids[:-count], ids[-count:])


def ask(
    caches: Sequence[KVCache],
    items: Sequence[Item],
    task: Task,
    loaded: LoadedModel,
    device: str,
    sampling: Sampling,
    chunk_size: int | None,
) -> list[list[Answer]]:
    """Put items of one kind to every cache on one reading; the answers of each cache, in the order of the items."""
    reading = _Reading(caches, items, loaded, input_device(loaded.model, device), chunk_size)
    return reading.likelihoods(task) if items[0].scored else reading.replies(sampling)


class _Reading:
    """Items that several caches read together."""

    def __init__(
        self,
        caches: Sequence[KVCache],
        items: Sequence[Item],
        loaded: LoadedModel,
        device: torch.device,
        chunk_size: int | None,
    ):
        assert loaded.tokenizer is not None
        self.caches, self.items, self.loaded, self.device = caches, items, loaded, device
        self.tokenizer, self.chunk_size = loaded.tokenizer, chunk_size
        self.cache = caches[0] if len(caches) == 1 else FanOutCache(caches)
        self._held: list[tuple[int, int]] = []  # stored and logical bytes of each cache after the prompt

    def replies(self, sampling: Sampling) -> list[list[Answer]]:
        """What each cache writes, item by item."""
        example = self.items[0].example
        input_ids, mask = self._padded([item.prompt for item in self.items])
        questions = [item.question for item in self.items]
        ends = [item.example.stop_strings for item in self.items]
        result = generate(
            self.loaded.model,
            self.cache,
            input_ids,
            mask,
            max_new_tokens=example.max_new_tokens,
            stop_ids=stop_ids(self.loaded, example.stop_tokens),
            min_new_tokens=example.min_new_tokens,
            sampling=sampling,
            chunk_size=self.chunk_size,
            after_prefill=self._note,
            question=torch.tensor(questions, device=self.device) if questions[0] else None,
            until=(lambda row, tokens: any(s in self._text(tokens) for s in ends[row])) if any(ends) else None,
        )
        rows = iter(result.tokens)
        return [[self._reply(number, item, next(rows)) for item in self.items] for number in range(len(self.caches))]

    def likelihoods(self, task: Task) -> list[list[Answer]]:
        """What each cache makes of each item's continuations; every context is a row of its own."""
        contexts = [c for item in self.items for c in item.scored]
        input_ids, mask = self._padded([c.context for c in contexts])
        asked = [c.asked for c in contexts]
        how: dict[str, Any] = {"chunk_size": self.chunk_size, "after_prefill": self._note}
        rows = iter(score(self.loaded.model, self.cache, input_ids, mask, asked, **how))
        answers = []
        for number in range(len(self.caches)):
            mine = []
            for item in self.items:
                found = [likelihood for _ in item.scored for likelihood in next(rows)]
                fields = {"prediction": task.read_off(item.example, found), "new_tokens": 0}
                mine.append(Answer(fields | self._bytes(number, len(contexts)), None))
            answers.append(mine)
        return answers

    def _reply(self, number: int, item: Item, tokens: list[int]) -> Answer:
        prediction = cut_at(self._text(tokens), item.example.stop_strings)
        fields = {"prediction": prediction, "new_tokens": len(tokens), **self._bytes(number, len(self.items))}
        return Answer(fields, Reply(prediction, tokens))

    def _padded(self, prompts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        return left_padded(prompts, self.tokenizer.pad_token_id, self.device)

    def _text(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)  # type: ignore[assignment]
        return text

    def _note(self) -> None:
        self._held = [(c.kv_bytes_stored, c.kv_bytes_logical) for c in self.caches]

    def _bytes(self, number: int, rows: int) -> dict[str, int]:
        """Of one row of a cache, on average: after the prompt, and at the end."""
        stored, logical = self._held[number]
        return {
            "kv_bytes_stored": stored // rows,
            "kv_bytes_logical": logical // rows,
            "kv_bytes_stored_end": self.caches[number].kv_bytes_stored // rows,
        }


def row_seed(seed: int, example: Example) -> int:
    """Seed of one example's draws: the same whatever stands in its batch and whichever methods ride along."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{example.dataset}/{example.id}".encode()).digest()[:6], "big")


def stop_ids(loaded: LoadedModel, stop_tokens: Sequence[str]) -> list[int]:
    """Ids that end a generation: the model's own end-of-sequence ids, and the last token of each of ``stop_tokens``."""
    assert loaded.tokenizer is not None
    own = loaded.model.generation_config.eos_token_id
    ids = set(own if isinstance(own, list) else [own]) | {loaded.tokenizer.eos_token_id}
    for text in stop_tokens:
        ids.add(loaded.tokenizer.encode(text, add_special_tokens=False)[-1])
    return sorted(i for i in ids if i is not None)
