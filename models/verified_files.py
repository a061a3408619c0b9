"""Verification of cached files by sha256, repeated only when a file may have changed.

A file is hashed again when its size, modification time or inode differs from that of the last verification, which is
recorded in ``kvbench_verified.json``; in a read-only cache, once in each process.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .base import file_sha256

VERIFIED_FILE = "kvbench_verified.json"

_verified: dict[Path, dict[str, list[int]]] = {}
"""Verified states in this process: folder -> file -> :func:`_file_state`."""


def damaged_file(folder: Path, sha256: dict[str, str]) -> str | None:
    """Name of the first file whose content does not have its sha256; None: all are intact.

    Args:
        folder: folder of the files.
        sha256: expected sha256 by file name.

    Raises:
        OSError: a file is missing.
    """
    states = {name: _file_state(folder / name) for name in sha256}
    if states in (_verified.get(folder), _recorded_states(folder)):
        return None
    for name, expected in sha256.items():
        if file_sha256(folder / name) != expected:
            return name
    _verified[folder] = states
    try:
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".verified-", delete=False) as file:
            json.dump(states, file)
        Path(file.name).chmod(0o644)  # a group may share the cache
        os.replace(file.name, folder / VERIFIED_FILE)
    except OSError:
        pass  # a read-only cache
    return None


def _file_state(path: Path) -> list[int]:
    """Size in bytes, modification time in nanoseconds and inode, which change when a file is written or replaced."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _recorded_states(folder: Path) -> Any:
    try:
        return json.loads((folder / VERIFIED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
