"""Loading a model and its tokenizer from a folder.

All sources with weights use :func:`load_pretrained`, which enforces the safety rules (safetensors only, since a pickle
can run code when it is opened; no code from the repository) and left padding.
"""

from __future__ import annotations

import atexit
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..conf.errors import InputError, require
from .kvshare import model as _kvshare  # noqa: F401  (registers its classes with AutoModelForCausalLM)


def load_pretrained(
    folder: Path,
    *,
    device: str,
    dtype: torch.dtype,
    tokenizer_class: Any = AutoTokenizer,
    chat_template: str | None = None,
    device_map: str | Mapping[str, str | int] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM and its tokenizer from a folder, without network access.

    Args:
        folder: ``config.json``, ``*.safetensors`` and the tokenizer's files.
        device: device of the weights, ``cpu`` or ``cuda``.
        dtype: dtype to which the weights are converted while they are read.
        tokenizer_class: class that loads the tokenizer; ``PreTrainedTokenizerFast`` takes ``tokenizer.json`` unchanged.
        chat_template: Jinja text that replaces the tokenizer's own chat template.
        device_map: ``auto``: accelerate places the layers on the CUDA devices, then the CPU, then the disk; or a
            mapping of module -> device. None: all on ``device``.

    Returns:
        The model in eval mode, and the tokenizer (pads on the left; its pad token is eos if it has none).

    Raises:
        InputError: files are missing or damaged, the weights exist only as a pickle or are not those of
            ``config.json``, the tokenizer has ids without an embedding, or the model needs code of its own.
    """
    check_folder(folder)
    local_only = {"local_files_only": True, "trust_remote_code": False}
    with refused_in_one_line(folder):
        tokenizer = tokenizer_class.from_pretrained(folder, **local_only)
        with _without_load_report():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # `_check_tensors` refuses such tensors by name
                output_loading_info=True,
                **local_only,
                **_placement(device_map),
            )
    model, loading = loaded
    _check_tensors(folder, loading)
    if device_map is not None and getattr(model.config, "kv_source_layers", None) is not None:
        raise InputError("model.device_map", device_map, "is for models whose layers have keys and values of their own")
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > rows:
        allowed = f"its tokenizer has {tokenizer.vocab_size} tokens and its embedding {rows} rows: not the model's own"
        raise InputError("model", folder, allowed)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= rows:  # pads are masked, but they are embedded
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return (model if device_map is not None else model.to(device)).eval(), tokenizer


def _placement(device_map: Any) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a device map."""
    if device_map is None:
        return {}
    # Layers on the disk are read from the safetensors files; the folder is for weights that have to be converted.
    offload = tempfile.mkdtemp(prefix="kvbench-offload-")
    atexit.register(shutil.rmtree, offload, ignore_errors=True)
    return {"device_map": plain_device_map(device_map), "offload_folder": offload}


def read_config(folder: Path) -> PretrainedConfig:
    """Config of a model folder.

    Raises:
        InputError: ``config.json`` is damaged, or its model type is unknown to transformers.
    """
    with refused_in_one_line(folder):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def check_folder(folder: Path) -> None:
    """Refuse a folder whose files would make transformers read weights outside it, or run code.

    Args:
        folder: folder of a model; any file may be missing.

    Raises:
        InputError: an index or ``config.json`` names weights that are not safetensors files of this folder, the folder
            is an adapter to other weights, or ``config.json`` requests a kernel from the hub, which is code.
    """
    if (folder / "adapter_config.json").exists():
        raise InputError("model", folder, "is an adapter to other weights: merge it into them (PEFT: merge_and_unload)")
    config = _json_object(folder / "config.json") if (folder / "config.json").exists() else {}
    for key, value in _items(config):
        if key.endswith(("_implementation", "_implementation_internal")) and isinstance(value, str) and "/" in value:
            allowed = f"its config.json requests {key}={value}, code from the hub, which kvbench never runs; delete it"
            raise InputError("model", folder, allowed)
    weights = config.get("transformers_weights")
    if weights is not None:
        suffixes = (".safetensors", ".safetensors.index.json")
        if not _is_file_of(folder, weights, suffixes):
            allowed = f"its config.json names the weights {weights}: must be a safetensors file in the folder itself"
            raise InputError("model", folder, allowed)
    for index in sorted(folder.glob("*.safetensors.index.json")):
        shards = _json_object(index).get("weight_map")
        if not isinstance(shards, dict) or not isinstance(_json_object(index).get("metadata", {}), dict):
            raise InputError("model", index, "must hold a weight_map: tensor -> file")
        for tensor, name in shards.items():
            if not _is_file_of(folder, name, (".safetensors",)):
                problem = "which does not exist" if _is_plain_name(name, (".safetensors",)) else "which is refused"
                allowed = f"names {name} for {tensor}, {problem}: must be *.safetensors files in the folder itself"
                raise InputError("model", index, allowed)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"is not JSON: {error}"
        raise InputError("model", path, str(reason)) from error
    require(isinstance(content, dict), "model", path, "must be a JSON object")
    return dict(content)


def _items(content: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values of nested JSON."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield key, value
            yield from _items(value)
    elif isinstance(content, list):
        for value in content:
            yield from _items(value)


def _is_plain_name(name: Any, suffixes: tuple[str, ...]) -> bool:
    return isinstance(name, str) and name.endswith(suffixes) and not set("/\\:\0") & set(name)


def _is_file_of(folder: Path, name: Any, suffixes: tuple[str, ...]) -> bool:
    return _is_plain_name(name, suffixes) and (folder / name).is_file()


def _check_tensors(folder: Path, loading: Mapping[str, Any]) -> None:
    """Refuse a model whose weights are not exactly those that its config describes.

    transformers initializes missing tensors at random and drops unexpected ones. Tied tensors, and those that the
    model's class declares ignorable, are not in its lists.
    """
    phrases = {
        "missing_keys": "lack {} of the model's tensors, such as {}",
        "unexpected_keys": "hold {} tensors that the model has no place for, such as {}",
        "mismatched_keys": "hold {} tensors of another shape, such as {}",
    }
    for kind, phrase in phrases.items():
        names = sorted(loading[kind])
        if names:
            first = names[0] if isinstance(names[0], str) else "{}, {} for {}".format(*map(_shape, names[0]))
            problem = phrase.format(len(names), first)
            allowed = (
                f"its weights {problem}; config.json and weights must be of one model (is num_hidden_layers right?)"
            )
            raise InputError("model", folder, allowed)


def _shape(part: Any) -> str:
    return part if isinstance(part, str) else str(list(part))


@contextmanager
def refused_in_one_line(folder: Path) -> Iterator[None]:
    """Within the block, exceptions about the files of a folder become an InputError; out-of-memory errors pass."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error):
            raise
        if "trust_remote_code" in str(error):
            reason = "it needs Python code from its own repository, which kvbench never runs"
        else:
            lines = " ".join(str(error).strip().splitlines()[:2])
            described = isinstance(error, OSError | ValueError | RuntimeError | ImportError) and lines
            reason = lines if described else f"{type(error).__name__} {lines}".strip()
        raise InputError("model", folder, f"cannot be loaded: {reason}") from error


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Within the block, suppress transformers' table of missing tensors; :func:`_check_tensors` reports them."""

    def is_shown(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return "LOAD REPORT" not in message or "CONVERSION" in message

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_shown)
    try:
        yield
    finally:
        logger.removeFilter(is_shown)


def plain_device_map(device_map: Any) -> Any:
    """Device map as plain data.

    Raises:
        InputError: :func:`load_pretrained` does not take the value, or accelerate is not installed.
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
    """CUDA devices of a model that accelerate has placed on several; else ``device`` alone."""
    device_map = getattr(model, "hf_device_map", None)
    if device_map is None:
        return [device]
    names = {f"cuda:{d}" if isinstance(d, int) else str(d) for d in device_map.values()}
    return sorted(d for d in names if d.startswith("cuda")) or ["cpu"]


def input_device(model: PreTrainedModel, device: str) -> torch.device:
    """Device of the token ids: ``device``, or the first device of a model on several."""
    return torch.device(devices_of(model, device)[0])


def prompt_limit(max_prompt_tokens: int, max_positions: int) -> int:
    """``max_prompt_tokens``, refused if the model has fewer positions (both in tokens)."""
    require(
        2 <= max_prompt_tokens <= max_positions,
        "model.max_prompt_tokens",
        max_prompt_tokens,
        f"must be between 2 and the model's {max_positions} positions",
    )
    return max_prompt_tokens
