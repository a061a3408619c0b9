"""The machine-wide lock of a measurement."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

log = logging.getLogger(__name__)


@contextmanager
def measurement_lock(device: str) -> Iterator[None]:
    """Take the machine-wide lock for measurements on ``device``, because concurrent measurements distort each other."""
    kind = "cpu" if not device.startswith("cuda") else device.replace(":", "-")
    lock = filelock.FileLock(Path(tempfile.gettempdir()) / f"kvbench-{os.getuid()}-measuring-{kind}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.info(f"another process is measuring on the {kind}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
