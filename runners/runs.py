"""What every runner's runs have in common: what identifies one, and how its record begins."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..methods.base import Method
from ..models.base import ModelSource
from ..tasks.base import Source
from .record import RunFolder
from .settings import Settings

BASELINE = Method("full")
"""The plain cache in the compute dtype: what every method is compared with."""


def open_run(
    kind: str,
    method: Method,
    source: ModelSource,
    data: Source,
    task: Mapping[str, Any],
    settings: Settings,
    **further: Any,
) -> RunFolder:
    """The folder of one run; ``task`` is the task's identity, ``further`` what else decides the numbers."""
    identity = {
        "kind": kind,
        "method": method.identity(),
        "model": source.identity(),
        "task": dict(task),
        "device": settings.torch_device.split(":")[0],
        "dtype": str(settings.torch_dtype).removeprefix("torch."),
        "seed": settings.seed,
        **further,
    }
    return RunFolder(Path(settings.results_dir), data.name, source.name, method.name, identity)


def record_head(status: str, folder: RunFolder, method: Method, data: Source, settings: Settings) -> dict[str, Any]:
    """The fields that a record of any kind begins with.

    Args:
        status: ``done``, or ``oom``: the run was out of memory.
        folder: the run's folder.
        method: the run's own method; the command's configuration may name another one.
        data: where the task's examples or requests came from.
        settings: the top-level configuration.
    """
    return {
        "status": status,
        "kind": folder.identity["kind"],
        "execution": "real",
        "hash": folder.hash,
        "identity": folder.identity,
        "config": {**settings.config, "method": folder.identity["method"]},
        "task": data.name,
        "model": folder.identity["model"]["name"],
        "method": method.name,
        "method_label": method.label,
        "budget": method.effective_budget,
        "data": {"name": data.name, "revision": data.revision, "sha256": dict(data.sha256), "note": data.note},
        "batch_size": settings.batch_size,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
