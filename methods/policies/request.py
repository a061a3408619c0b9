"""Forwards that repeat a prompt, and the request to do so in a model's chat template (KVzip, arXiv 2505.23416)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...conf.chat import in_chat_template, plain_tokens
from ...conf.errors import InputError

USER_TEXT = "what the user says"
"""Text by which the beginning and the end of the user's turn are found in a chat template."""


@dataclass(frozen=True)
class Request:
    """Token ids around the tokens that a forward repeats; by default none.

    Attributes:
        first, following: Requests before the first part of a prompt and before the others.
        prefix: What the chat template has before the user's text (system prompt and user tag); None: no template.
        reply: What it has after the text: the end of the user's turn and the beginning of the model's.
    """

    first: tuple[int, ...] = ()
    following: tuple[int, ...] = ()
    prefix: tuple[int, ...] | None = None
    reply: tuple[int, ...] = ()

    def prefix_length(self, prompt: Sequence[int]) -> int | None:
        """Return how many tokens of a prompt are before the user's text; None: it is not in the chat template.

        The last token of the prefix may be another one in a prompt, joined with the beginning of the user's text.
        """
        if self.prefix is None:
            return None
        pairs = list(zip(self.prefix, prompt, strict=False))
        equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        return equal if equal >= max(len(self.prefix) - 1, min(len(self.prefix), 1)) else None


def request_of(tokenizer: Any, first: str | None, following: str | None) -> Request:
    """Return a request in words as token ids; None or empty text: none.

    An empty line is put before each text.

    Raises:
        InputError: The chat template cannot be used.
    """
    texts = [tuple(plain_tokens("\n\n" + text, tokenizer)) if text else () for text in (first, following)]
    if not getattr(tokenizer, "chat_template", None):
        return Request(*texts)
    before, found, after = in_chat_template(USER_TEXT, tokenizer).partition(USER_TEXT)
    if not found:
        template = " ".join(str(tokenizer.chat_template).split())[:60]
        raise InputError("model.chat_template", template, "leaves out what the user says")
    return Request(*texts, *(tuple(plain_tokens(text, tokenizer)) for text in (before, after)))


@dataclass(frozen=True)
class Repetition:
    """A forward after the prefill that gives tokens of the prompt to the model again (:mod:`..repetition`).

    Attributes:
        scored: Positions of the prompt tokens that are given again, last, and scored.
        request: Token ids before all others.
        repeated: Positions of prompt tokens that follow the request and are not scored.
        reply: Token ids between these and the scored tokens.
    """

    scored: range
    request: Sequence[int] = ()
    repeated: range = range(0)
    reply: Sequence[int] = ()

    @property
    def tokens(self) -> int:
        """Number of tokens of the forward."""
        return len(self.request) + len(self.repeated) + len(self.reply) + len(self.scored)

    def input_ids(self, prompts: torch.Tensor) -> torch.Tensor:
        """Return the tokens of the forward, [R, tokens], for prompts [R, T]."""
        request, reply = (prompts.new_tensor(x).expand(len(prompts), -1) for x in (self.request, self.reply))
        repeated, scored = (prompts[:, x.start : x.stop] for x in (self.repeated, self.scored))
        return torch.cat([request, repeated, reply, scored], dim=1)


@dataclass(frozen=True)
class Repetitions:
    """All further forwards for prompts of one length.

    Attributes:
        name: Name of the scorer.
        sinks: Number of first tokens that no forward gives again and that are in the softmax of each.
        forwards: The forwards.
    """

    name: str
    sinks: int
    forwards: Sequence[Repetition]
