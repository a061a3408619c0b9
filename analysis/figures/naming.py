"""File names that people can read: what is shown and of what; settings that differ between two figures are in them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..load import flat
from .spec import FigureSpec

LEFT_OUT = ("method.", "kind", "model.fingerprint", "model.name", "task.sha256.", "task.source", "task.class")
MAX_VALUE = 24
FIRST = ("dtype", "device", "task.max_length", "task.limit", "seed", "batch_size")


def settings_hash(spec: FigureSpec) -> str:
    """Return 12 hexadecimal digits of all settings that the runs of a figure share."""
    shared = [{k: v for k, v in group[0].record["identity"].items() if k != "method"} for group in spec.groups]
    text = json.dumps([spec.kind, spec.parts, shared], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def file_names(specs: Sequence[FigureSpec], taken: Iterable[str] = ()) -> list[str]:
    """Return a name for each figure, without ending; no two are the same, nor one of ``taken``.

    Figures of one kind, task and model differ in their names by the settings that differ.
    """
    bases = [_base(spec) for spec in specs]
    names: list[str] = []
    used = set(taken)
    for base, spec in zip(bases, specs, strict=True):
        rivals = [other for other, its_base in zip(specs, bases, strict=True) if its_base == base]
        name = "-".join([base, *_differences(spec, rivals)])
        candidates = (name if n == 1 else f"{name}-{n}" for n in range(1, len(specs) + len(used) + 2))
        names.append(next(candidate for candidate in candidates if candidate not in used))
        used.add(names[-1])
    return names


def _base(spec: FigureSpec) -> str:
    """Return kind, task, model and what a figure says of itself."""
    task = () if spec.kind in ("length", "memory") else (spec.record["task"],)
    return _safe("-".join([spec.kind, *task, spec.record["model"], *spec.parts]))


def _differences(spec: FigureSpec, rivals: Sequence[FigureSpec]) -> list[str]:
    """Return as many settings as it takes to tell a figure from those of the same base name."""
    all_settings = [_settings(rival) for rival in rivals]
    keys = {key for settings in all_settings for key in settings}
    chosen: list[str] = []
    distinct = 1
    for key in sorted(keys, key=lambda key: (FIRST.index(key) if key in FIRST else len(FIRST), key)):
        found = len({tuple(settings.get(k) for k in (*chosen, key)) for settings in all_settings})
        if found > distinct:
            chosen, distinct = [*chosen, key], found
    own = _settings(spec)
    return [
        _safe(f"{key.rpartition('.')[2]}-{own[key]}") for key in chosen if own.get(key) not in (None, "None", "False")
    ]


def _settings(spec: FigureSpec) -> dict[str, str]:
    settings: dict[str, str] = {}
    for group in spec.groups:
        identity: Mapping[str, Any] = group[0].record["identity"]
        for key, value in flat(identity).items():
            if not key.startswith(LEFT_OUT):
                settings[key] = f"{len(value)}" if isinstance(value, list) else str(value)[:MAX_VALUE]
    return settings


def _safe(text: str) -> str:
    """Return the text with the characters that are awkward in file names and in LaTeX replaced."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")
