"""Versions of the parts of a run whose results a change of the code affected.

A part that is not here has version 1. Raise the number with the change: a run's identity has it, so that older records
are other runs, and tables mark them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CURRENT_VERSIONS: Mapping[str, int] = {
    "Kivi": 2,  # scales in float16 for every dtype
    "MiniCacheKivi": 2,  # the same
    "RandomTokens": 2,  # scores depend on the prompt
}
"""Version by the part's ``id``, which records have as ``class``."""


def older_parts(identity: Mapping[str, Any]) -> list[str]:
    """Return the keys of the parts of a recorded identity whose version is older than today's, inner parts last."""
    older = []
    for key, value in identity.items():
        if isinstance(value, Mapping):
            if value.get("version", 1) < CURRENT_VERSIONS.get(str(value.get("class")), 1):
                older.append(key)
            older += older_parts(value)
    return older
