"""Versions of the parts of a run whose results a change of the code affected.

A part that is not here has version 1. Raise the number with the change: a run's identity has it, so that older records
are other runs, and tables mark them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CURRENT_VERSIONS: Mapping[str, int] = {
    "KVzip": 2,  # a request in words; the chat template's beginning stays
    "Kivi": 2,  # scales in float16 for every dtype
    "MiniCacheKivi": 2,  # the same
    "RKV": 2,  # products in float32; a key without similar ones leaves out no token
    "RandomTokens": 2,  # scores depend on the prompt
}
"""Version by the part's ``id``, which records have as ``class``."""
RESCORING_VERSIONS: Mapping[str, int] = {
    "RandomTokens": 3,  # drawn anew for each text at each eviction
}
"""Version of scorers whose scores while decoding are newer than those of a prompt."""


def older_parts(identity: Mapping[str, Any]) -> list[str]:
    """Return the keys of the parts of a recorded identity whose version is older than today's, inner parts last."""
    older = []
    for key, value in identity.items():
        if isinstance(value, Mapping):
            if value.get("version", 1) < _current_version(value):
                older.append(key)
            older += older_parts(value)
    return older


def _current_version(part: Mapping[str, Any]) -> int:
    """Return today's version of a recorded part; a record names the schedule of a scorer if it has another one."""
    name, schedule = str(part.get("class")), part.get("schedule")
    rescores = isinstance(schedule, Mapping) and schedule.get("class") in ("every_step", "every_n")
    versions, scorer = [CURRENT_VERSIONS.get(name, 1)], part if rescores else None
    while isinstance(scorer, Mapping):  # a scorer may build on another one
        versions.append(RESCORING_VERSIONS.get(str(scorer.get("class")), 1))
        scorer = scorer.get("scorer")
    return max(versions)
