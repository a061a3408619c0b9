"""The one call that turns a folder into a model and a tokenizer.

Every source goes through it, so the safety rules stand in one place: safetensors only (a pickle can run code when it is
opened), no code from the repository, and the padding that the caches are tested with.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
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
    device_map: str | Mapping[str, str | int] | None = None,
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
    device_map : str or mapping, optional
        ``auto``: accelerate spreads the layers over the CUDA devices, then the CPU, then the disk; or module -> device.
        None: all on ``device``.

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
    spread: dict[str, Any] = {}
    if device_map is not None:
        # What fits nowhere else is read from the safetensors files; the folder is for what has to be converted.
        offload = tempfile.mkdtemp(prefix="kvbench-offload-")
        spread = {"device_map": plain_device_map(device_map), "offload_folder": offload}
        atexit.register(shutil.rmtree, offload, ignore_errors=True)
    try:
        tokenizer = tokenizer_class.from_pretrained(folder, **safe)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, **safe, **spread)
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
    if device_map is None:
        return model.to(device).eval(), tokenizer
    if getattr(model.config, "kv_source_layers", None) is not None:
        raise InputError("model.device_map", device_map, "is for models whose layers have keys and values of their own")
    return model.eval(), tokenizer


def plain_device_map(device_map: Any) -> Any:
    """A device map as plain data.

    Raises:
        InputError: it is nothing that :func:`load_pretrained` takes, or accelerate is not installed.
    """
    if device_map is None:
        return None
    known = ("auto", "balanced", "balanced_low_0", "sequential")
    require(
        device_map in known if isinstance(device_map, str) else isinstance(device_map, Mapping) and len(device_map) > 0,
        "model.device_map",
        device_map,
        f"must be null, one of {', '.join(known)}, or a device for each module: {{model.layers.0: 0, ...}}",
    )
    if find_spec("accelerate") is None:
        raise InputError("model.device_map", device_map, "needs accelerate: pip install 'kvbench[train]'")
    return device_map if isinstance(device_map, str) else dict(device_map)


def devices_of(model: PreTrainedModel, device: str) -> list[str]:
    """CUDA devices that a model spread by accelerate lies on; ``device`` alone where it is not spread."""
    placed = getattr(model, "hf_device_map", None)
    if placed is None:
        return [device]
    named = {f"cuda:{d}" if isinstance(d, int) else str(d) for d in placed.values()}
    return sorted(d for d in named if d.startswith("cuda")) or ["cpu"]


def input_device(model: PreTrainedModel, device: str) -> torch.device:
    """Where token ids go: to ``device``, or to the first one of a model that is spread."""
    return torch.device(devices_of(model, device)[0])


def prompt_limit(max_prompt_tokens: int, max_positions: int) -> int:
    """``max_prompt_tokens``, refused when the model has fewer positions than that (both in tokens)."""
    require(
        2 <= max_prompt_tokens <= max_positions,
        "model.max_prompt_tokens",
        max_prompt_tokens,
        f"must be between 2 and the model's {max_positions} positions",
    )
    return max_prompt_tokens
