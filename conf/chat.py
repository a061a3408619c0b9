"""A user's text in the chat template of a model's tokenizer."""

from __future__ import annotations

from typing import Any

from .errors import InputError


def in_chat_template(content: str, tokenizer: Any) -> str:
    """Return a conversation of one text of the user, up to where the model's answer begins.

    Raises:
        InputError: The chat template cannot be used.
    """
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            # Templates that do not know it ignore it; a generation limit of 32 tokens leaves no room to think aloud.
            enable_thinking=False,
        )
    except Exception as error:  # whatever a template of the model's makers, or of the user, does in jinja's sandbox
        template = " ".join(str(tokenizer.chat_template).split())[:60]
        raise InputError("model.chat_template", template, f"fails: {type(error).__name__}: {error}") from error
    return str(text)


def plain_tokens(text: str, tokenizer: Any) -> list[int]:
    """Return the ids of text alone; a template has written its special tokens itself, a second <s> would be wrong."""
    return list(tokenizer(text, truncation=False, add_special_tokens=False, verbose=False).input_ids)
