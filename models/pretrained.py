"""The one call that turns a folder into a model and a tokenizer.

Every source goes through it, so the safety rules stand in one place: safetensors only (a pickle can run code when it is
opened), no code from the repository, and the padding that the caches are tested with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..conf.errors import InputError, require
from ..methods.sharing import model as _sharing  # noqa: F401  (AutoModelForCausalLM knows its classes from here on)


def load_pretrained(
    folder: Path,
    *,
    device: str,
    dtype: torch.dtype,
    tokenizer_class: Any = AutoTokenizer,
    chat_template: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM and its tokenizer with transformers, asking no network for anything.

    Parameters
    ----------
    folder : Path
        ``config.json``, ``*.safetensors`` and the tokenizer's files.
    device : str
        Where the weights go, ``cpu`` or ``cuda``.
    dtype : torch.dtype
        Weights are converted to it while they are read.
    tokenizer_class
        What loads the tokenizer; ``PreTrainedTokenizerFast`` takes ``tokenizer.json`` exactly as it is.
    chat_template : str, optional
        Jinja text that replaces the tokenizer's own chat template.

    Returns
    -------
    tuple
        The model in eval mode, and the tokenizer (pads on the left; pad falls back to eos).

    Raises
    ------
    InputError
        Files are missing, the weights exist only as a pickle, or the model needs code of its own.
    """
    safe = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = tokenizer_class.from_pretrained(folder, **safe)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, **safe)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # missing, torn, or of an unknown kind
        if "trust_remote_code" in str(error):
            reason = "it needs Python code from its own repository, which kvbench never runs"
        else:
            reason = " ".join(str(error).strip().splitlines()[:2])
        raise InputError("model", folder, f"cannot be loaded: {reason}") from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return model.to(device).eval(), tokenizer


def prompt_limit(max_prompt_tokens: int, max_positions: int) -> int:
    """``max_prompt_tokens``, refused when the model has fewer positions than that (both in tokens)."""
    require(
        2 <= max_prompt_tokens <= max_positions,
        "model.max_prompt_tokens",
        max_prompt_tokens,
        f"must be between 2 and the model's {max_positions} positions",
    )
    return max_prompt_tokens
