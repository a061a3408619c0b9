"""Results of a training: the folder ``model/`` and the fields of its record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ...methods.cache.kv_shape import kv_shape
from ...methods.cache.method import Method
from ...models.uptrained import CONVERSION_FILE, TRAINED_WEIGHTS

MODEL = "model"


def save_trained_parameters(target: Path, model: PreTrainedModel, dtype: torch.dtype, base: dict[str, Any]) -> None:
    """Write the trained parameters of an uptrained model, for ``model=uptrained``.

    Args:
        target: The folder; replaced.
        model: The model, of which the parameters that require gradients were trained.
        dtype: Dtype of the written weights.
        base: The model that they are added to, and how it was converted.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    save_file({n: p.detach().to("cpu", dtype).contiguous() for n, p in trained.items()}, target / TRAINED_WEIGHTS)
    model.config.save_pretrained(target)
    (target / CONVERSION_FILE).write_text(json.dumps(base) + "\n", encoding="utf-8")


def kv_bytes(method: Method, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The field ``bytes`` of a record."""
    return {
        "kv_bytes_per_token": kv_bytes_per_token(method, config, dtype),
        "kv_bytes_fixed": kv_shape(config, dtype).fixed_bytes(1 << 30),
        "dtype": str(dtype).removeprefix("torch."),
    }


def kv_bytes_per_token(method: Method, config: Any, dtype: torch.dtype) -> int:
    """Bytes that each further token adds to the cache of a long sequence, by the formula."""
    shape, long = kv_shape(config, dtype), 1 << 20
    return method.bytes_formula(shape, long + 1) - method.bytes_formula(shape, long)
