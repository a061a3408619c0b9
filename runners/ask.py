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
from ..tasks.base import Continuations, Example, Likelihood, Reply, Task, cut_at, question_tokens
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
    assert loaded.tokenizer is not None
    where = input_device(loaded.model, device)
    cache = caches[0] if len(caches) == 1 else FanOutCache(caches)
    held: list[tuple[int, int]] = []

    def note() -> None:
        held.extend((c.kv_bytes_stored, c.kv_bytes_logical) for c in caches)

    if items[0].scored:
        return _score(caches, cache, items, task, loaded, where, chunk_size, note, held)
    example = items[0].example
    input_ids, mask = left_padded([item.prompt for item in items], loaded.tokenizer.pad_token_id, where)
    question = torch.tensor([item.question for item in items], device=where) if items[0].question else None
    ends = [item.example.stop_strings for item in items]

    def until(row: int, tokens: list[int]) -> bool:
        text = loaded.tokenizer.decode(tokens, skip_special_tokens=True)  # type: ignore[union-attr]
        return any(string in text for string in ends[row])

    result = generate(
        loaded.model,
        cache,
        input_ids,
        mask,
        max_new_tokens=example.max_new_tokens,
        stop_ids=stop_ids(loaded, example.stop_tokens),
        min_new_tokens=example.min_new_tokens,
        sampling=sampling,
        chunk_size=chunk_size,
        after_prefill=note,
        question=question,
        until=until if any(ends) else None,
    )
    batch = len(items)
    return [
        [
            _written(tokens, item, loaded, _bytes(held[i], c, batch))
            for tokens, item in zip(result.tokens[i * batch : (i + 1) * batch], items, strict=True)
        ]
        for i, c in enumerate(caches)
    ]


def _written(tokens: list[int], item: Item, loaded: LoadedModel, bytes_held: dict[str, int]) -> Answer:
    text: str = loaded.tokenizer.decode(tokens, skip_special_tokens=True)  # type: ignore
    prediction = cut_at(text, item.example.stop_strings)
    return Answer({"prediction": prediction, "new_tokens": len(tokens), **bytes_held}, Reply(prediction, tokens))


def _score(
    caches: Sequence[KVCache],
    cache: KVCache,
    items: Sequence[Item],
    task: Task,
    loaded: LoadedModel,
    where: torch.device,
    chunk_size: int | None,
    note: Any,
    held: list[tuple[int, int]],
) -> list[list[Answer]]:
    """Every context is a row of its own; an item's rows come back together."""
    assert loaded.tokenizer is not None
    parts = [(number, c) for number, item in enumerate(items) for c in item.scored]
    input_ids, mask = left_padded([c.context for _, c in parts], loaded.tokenizer.pad_token_id, where)
    rows = score(
        loaded.model, cache, input_ids, mask, [c.asked for _, c in parts], chunk_size=chunk_size, after_prefill=note
    )
    out = []
    for i, c in enumerate(caches):
        found: list[list[Likelihood]] = [[] for _ in items]
        for (number, _), likelihoods in zip(parts, rows[i * len(parts) : (i + 1) * len(parts)], strict=True):
            found[number] += likelihoods
        out.append(
            [
                Answer(
                    {
                        "prediction": task.read_off(item.example, likelihoods),
                        "new_tokens": 0,
                        **_bytes(held[i], c, len(parts)),
                    },
                    None,
                )
                for item, likelihoods in zip(items, found, strict=True)
            ]
        )
    return out


def _bytes(held: tuple[int, int], cache: KVCache, rows: int) -> dict[str, int]:
    """Of one row, on average: after the prompt as noted, and at the end."""
    stored, logical = held
    return {
        "kv_bytes_stored": stored // rows,
        "kv_bytes_logical": logical // rows,
        "kv_bytes_stored_end": cache.kv_bytes_stored // rows,
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
