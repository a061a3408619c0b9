"""Request to repeat a prompt, in a model's tokens and chat template (KVzip, arXiv 2505.23416, its authors' code)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...conf.chat import in_chat_template, plain_tokens
from ...conf.errors import InputError, require

USER_TEXT = "what the user says"
"""Text by which the beginning and the end of the user's turn are found in a chat template."""


@dataclass(frozen=True)
class Request:
    """Token ids around the tokens that a forward repeats; by default none.

    Attributes:
        first, following: Requests before the first part of a prompt and before the others.
        prefix: What the chat template has before the user's text (system prompt and user tag); None: no template.
        reply: What it has after the text: the end of the user's turn and the beginning of the model's.
        may_join: Whether the last token of the prefix may be another one in a prompt, joined with the beginning of the
            user's text; a special token is not.
    """

    first: tuple[int, ...] = ()
    following: tuple[int, ...] = ()
    prefix: tuple[int, ...] | None = None
    reply: tuple[int, ...] = ()
    may_join: bool = True

    def prefix_length(self, prompt: Sequence[int]) -> int | None:
        """Return how many tokens of a prompt are before the user's text; None: it is not in the chat template."""
        if self.prefix is None:
            return None
        pairs = list(zip(self.prefix, prompt, strict=False))
        equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        needed = len(self.prefix) - (self.may_join and len(self.prefix) > 1)
        return equal if equal >= needed else None


def request_of(tokenizer: Any, first: str | None, following: str | None) -> Request:
    """Return a request in words as token ids; an empty line is put before each text.

    Args:
        tokenizer: The model's tokenizer; None: not known.
        first, following: Requests before the first part of a prompt and before the others; None or empty text: none.

    Raises:
        InputError: There is text and no tokenizer, or the chat template cannot be used.
    """
    if tokenizer is None:
        for key, text in (("instruction_first", first), ("instruction_next", following)):
            problem = "is text, and there is no tokenizer: set it to null, or pass tokenizer=... in Python"
            require(not text, f"method.scorer.{key}", text, problem)
        return Request()
    texts = [tuple(plain_tokens("\n\n" + text, tokenizer)) if text else () for text in (first, following)]
    if not getattr(tokenizer, "chat_template", None):
        return Request(texts[0], texts[1])
    before, found, after = in_chat_template(USER_TEXT, tokenizer).partition(USER_TEXT)
    if not found:
        template = " ".join(str(tokenizer.chat_template).split())[:60]
        raise InputError("model.chat_template", template, "leaves out what the user says")
    prefix, reply = (tuple(plain_tokens(text, tokenizer)) for text in (before, after))
    may_join = not {*prefix[-1:]} & {*tokenizer.all_special_ids}
    return Request(texts[0], texts[1], prefix, reply, may_join)
