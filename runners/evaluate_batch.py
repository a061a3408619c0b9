"""Answers of several caches to one batch of examples, and the bytes that each cache stored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch

from ..analysis.costs import FURTHER_FORWARDS
from ..conf.errors import InputError
from ..methods.cache.fan_out import FanOutCache
from ..methods.cache.method import Method
from ..models.base import LoadedModel
from ..models.pretrained import input_device
from ..tasks.base import Continuations, Example, Likelihood, Reply, Task, cut_at, find_question, question_length
from .engine import Sampling, generate, left_padded, score
from .records.runs import BASELINE
from .stopping import stop_ids, stops


@dataclass(frozen=True)
class Item:
    """An example as token ids.

    Attributes:
        prompt: Tokens before the compression; with ``scored``, the longest of its contexts.
        question: Tokens between the compression and the answer.
        scored: Contexts and continuations of a task that is scored by likelihoods; ``question`` is then empty.
    """

    example: Example
    prompt: list[int]
    question: list[int]
    scored: tuple[Continuations, ...] = ()

    @property
    def kind(self) -> tuple[bool, int]:
        """Key by which items are grouped into batches."""
        return bool(self.scored), len(self.question)

    @property
    def read_tokens(self) -> int:
        """Number of tokens that are prefilled."""
        return sum(len(c.context) for c in self.scored) or len(self.prompt)

    @property
    def compressed_lengths(self) -> list[int]:
        """Lengths of the prompts that a method compresses, or of the text's beginning if there is no other."""
        if not self.scored:
            return [len(self.prompt)]
        return [len(c.context) for c in self._compressed]

    @property
    def _compressed(self) -> list[Continuations]:
        return [c for c in self.scored if not c.beginning] or list(self.scored)

    def steps(self, new_tokens: int) -> list[tuple[int, int]]:
        """Tokens of the compressed prompt, and tokens that followed it, when each token was predicted."""
        if self.scored:
            pairs = [(len(c.context), given, asked) for c in self._compressed for given, asked in c.asked]
            return [(prompt, len(given) + i) for prompt, given, asked in pairs for i in range(len(asked))]
        return [(len(self.prompt), len(self.question) + i) for i in range(max(1, new_tokens))]


@dataclass
class Answer:
    """Answer of one cache to one example.

    Attributes:
        fields: Fields of ``samples.jsonl``: the prediction, generated tokens, bytes after the prompt and at the end.
        reply: The generated reply; None if the task is scored by likelihoods.
    """

    fields: dict[str, Any]
    reply: Reply | None


def encode(task: Task, example: Example, loaded: LoadedModel, limit: int | None, split: bool) -> Item:
    """An example as token ids; ``split``: the method compresses before the question.

    Raises:
        InputError: It has no token, a token that the model has no embedding for, or more tokens than the model has
            positions; or there is no question to split off.
    """
    assert loaded.tokenizer is not None
    encoded = task.encode(example, loaded.tokenizer, limit)
    scored: tuple[Continuations, ...] = ()
    if encoded and isinstance(encoded[0], Continuations):
        scored = tuple(c for c in encoded if isinstance(c, Continuations))
        ids = max((c.context for c in scored), key=len)
        needed = [len(c.context) + len(given) + len(asked) - 1 for c in scored for given, asked in c.asked]
        to_come = max(needed) - len(ids)
    else:
        ids, to_come = [i for i in encoded if isinstance(i, int)], example.max_new_tokens
    name = f"{example.dataset}/{example.id}"
    if not ids or any(not c.context for c in scored):
        raise InputError("task", task.name, f"{name} is a prompt of no tokens, which a model cannot continue")
    embedding: Any = loaded.model.get_input_embeddings()
    rows, largest = embedding.weight.shape[0], _largest_id(ids, scored)
    if largest >= rows:
        allowed = f"its tokenizer encodes {name} with token {largest}, but its embedding has only {rows} rows"
        raise InputError("model", loaded.name, allowed)
    if len(ids) + to_come > loaded.max_positions:
        raise InputError(
            "task.max_length",
            limit,
            f"{name} has {len(ids)} prompt tokens and {to_come} may follow, but {loaded.name} "
            f"has {loaded.max_positions} positions; the prompts must be shorter (see conf/task for the keys that say "
            "how long they are)",
        )
    if not split:
        return Item(example, ids, [], scored)
    if scored:
        raise InputError(
            "runner.question", "after_compression", f"task={task.name} asks no questions: use with_context"
        )
    count = question_length(ids, example.question, loaded.tokenizer)
    return Item(example, ids[:-count], ids[-count:])


def _largest_id(ids: Sequence[int], scored: Sequence[Continuations]) -> int:
    """Return the largest token id in the input of the model."""
    lists = [ids, *(part for c in scored for pair in c.asked for part in pair), *(c.context for c in scored)]
    return max(max(tokens, default=0) for tokens in lists)


def evaluate_batch(
    methods: Sequence[Method],
    items: Sequence[Item],
    task: Task,
    loaded: LoadedModel,
    device: str,
    sampling: Sampling,
    chunk_size: int | None,
    advance: Callable[[int], None] = lambda step: None,
) -> list[list[Answer]]:
    """Answer items of one kind with every method, in one shared prefill.

    Args:
        methods, items, task, loaded, device, sampling, chunk_size: The batch, and the options of the runner.
        advance: Called with 0 when a prompt has been compressed, then with the number of tokens after each decode step.

    Returns:
        The answers of each method, in the order of the items.
    """
    input_on = input_device(loaded.model, device)
    if not items[0].scored:
        return _SharedPrefill(methods, loaded, input_on, chunk_size, advance).replies(items, sampling)
    # As many contexts per prefill as items, so that a single example is not padded.
    scores: dict[tuple[int, int], list[Scored]] = {}  # (item, context) -> scores of each method
    for beginning in (True, False):
        contexts = [(i, k, c) for i, item in enumerate(items) for k, c in enumerate(item.scored)]
        contexts = [context for context in contexts if context[2].beginning == beginning]
        for start in range(0, len(contexts), len(items)):
            batch = contexts[start : start + len(items)]
            shared = _SharedPrefill([BASELINE] if beginning else methods, loaded, input_on, chunk_size, advance)
            for (i, k, _), scored in zip(batch, shared.likelihoods([c for *_, c in batch]), strict=True):
                scores[i, k] = scored * len(methods) if beginning else scored
    return [
        [_combined(task, item, [scores[i, k][m] for k in range(len(item.scored))]) for i, item in enumerate(items)]
        for m in range(len(methods))
    ]


@dataclass(frozen=True)
class Scored:
    """Likelihoods of the continuations of one context under one method, its bytes and its further forwards."""

    context: Continuations
    likelihoods: list[Likelihood]
    kv_bytes: dict[str, int]
    forwards: dict[str, int]


def _combined(task: Task, item: Item, scores: Sequence[Scored]) -> Answer:
    """Combine an item's contexts: bytes are the mean over the compressed ones, if any; further forwards are added."""
    prediction = task.read_off(item.example, [one for score in scores for one in score.likelihoods])
    stored = [s.kv_bytes for s in scores if not s.context.beginning] or [s.kv_bytes for s in scores]
    fields = {key: sum(kv_bytes[key] for kv_bytes in stored) // len(stored) for key in stored[0]}
    for key in FURTHER_FORWARDS if any(s.forwards for s in scores) else ():
        fields[key] = sum(s.forwards.get(key, 0) for s in scores)
    return Answer({"prediction": prediction, "new_tokens": 0, **fields}, None)


class _SharedPrefill:
    """Prefill of one batch, shared by several methods."""

    def __init__(
        self,
        methods: Sequence[Method],
        loaded: LoadedModel,
        device: torch.device,
        chunk_size: int | None,
        advance: Callable[[int], None],
    ):
        assert loaded.tokenizer is not None
        self._advance = advance
        self.loaded, self.device, self.chunk_size = loaded, device, chunk_size
        self.tokenizer = loaded.tokenizer
        self.caches = [method.new_cache(loaded.model, loaded.tokenizer) for method in methods]
        self.cache = self.caches[0] if len(self.caches) == 1 else FanOutCache(self.caches)
        self._observes_question = any(method.policy.capabilities.observes_question for method in methods)
        self._prompt_bytes: list[tuple[int, int]] = []  # stored and logical bytes of each cache after the prompt

    def replies(self, items: Sequence[Item], sampling: Sampling) -> list[list[Answer]]:
        """Generate the replies of each method, in the order of the items."""
        example = items[0].example
        input_ids, mask = self._padded([item.prompt for item in items])
        questions = [item.question for item in items]
        asked = items if self._observes_question and not questions[0] else []  # with the question in the prompt
        question_tokens = [find_question(x.prompt, x.example.question, self.tokenizer) or 0 for x in asked]
        ends = [item.example.stop_strings for item in items]
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
            after_prefill=self._record_prompt_bytes,
            question=torch.tensor(questions, device=self.device) if questions[0] else None,
            question_tokens=question_tokens or None,
            until=(lambda row, tokens: stops(tokens, ends[row], self.tokenizer)) if any(ends) else None,
            after_step=self._advance,
        )
        rows = iter(result.tokens)
        return [
            [
                self._reply(item, next(rows), self._bytes(number, len(items)) | self._forwards(number, row))
                for row, item in enumerate(items)
            ]
            for number in range(len(self.caches))
        ]

    def likelihoods(self, contexts: Sequence[Continuations]) -> list[list[Scored]]:
        """Return, for each context, the likelihoods of its continuations under every method."""
        input_ids, mask = self._padded([c.context for c in contexts])
        options: dict[str, Any] = {"chunk_size": self.chunk_size, "after_prefill": self._record_prompt_bytes}
        rows = score(self.loaded.model, self.cache, input_ids, mask, [c.asked for c in contexts], **options)
        kv_bytes = [self._bytes(number, len(contexts)) for number in range(len(self.caches))]
        return [
            [Scored(c, rows[n * len(contexts) + i], kv_bytes[n], self._forwards(n, i)) for n in range(len(self.caches))]
            for i, c in enumerate(contexts)
        ]

    def _reply(self, item: Item, tokens: list[int], costs: dict[str, int]) -> Answer:
        prediction = cut_at(self._text(tokens), item.example.stop_strings)
        return Answer({"prediction": prediction, "new_tokens": len(tokens), **costs}, Reply(prediction, tokens))

    def _padded(self, prompts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        return left_padded(prompts, self.tokenizer.pad_token_id, self.device)

    def _text(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)  # type: ignore[assignment]
        return text

    def _record_prompt_bytes(self) -> None:
        self._prompt_bytes = [(c.kv_bytes_stored, c.kv_bytes_logical) for c in self.caches]
        self._advance(0)

    def _forwards(self, number: int, row: int) -> dict[str, int]:
        """Return the forwards that a cache took for a row after the prefill; empty for a method that makes none."""
        forwards = self.caches[number].further_forwards
        return dict(zip(FURTHER_FORWARDS, astuple(forwards[row]), strict=True)) if forwards else {}

    def _bytes(self, number: int, rows: int) -> dict[str, int]:
        """Return the mean bytes per row of a cache, after the prefill and at the end."""
        stored, logical = self._prompt_bytes[number]
        return {
            "kv_bytes_stored": stored // rows,
            "kv_bytes_logical": logical // rows,
            "kv_bytes_stored_end": self.caches[number].kv_bytes_stored // rows,
        }


def row_seed(seed: int, example: Example) -> int:
    """Return the sampling seed of an example, independent of its batch and of the methods that share the batch."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{example.dataset}/{example.id}".encode()).digest()[:6], "big")
