"""The folder of files that kvbench fetches for a user."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$KVBENCH_CACHE``, else ``$XDG_CACHE_HOME/kvbench``, else ``~/.cache/kvbench``."""
    if chosen := os.environ.get("KVBENCH_CACHE"):
        return Path(chosen).expanduser().absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "kvbench"
    return Path.home() / ".cache" / "kvbench"
