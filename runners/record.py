"""A run's folder: ``samples.jsonl`` grows by one line per example, ``record.json`` is written last.

``<results_dir>/<task>/<model>/<method>/<hash of what decides the numbers>``. A run that is started again continues
after the last complete line; a folder with a ``record.json`` is done. Both files are read by ``kvbench.analysis``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock

from ..conf.errors import InputError

SCHEMA = 1
"""Version of both files; readers refuse one they do not know."""

SAMPLES, RECORD = "samples.jsonl", "record.json"


def identity_hash(identity: Mapping[str, Any]) -> str:
    """12 hexadecimal digits of the sha256 of ``identity`` as canonical JSON."""
    text = json.dumps({"schema": SCHEMA, **identity}, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class RunFolder:
    """One run on disk. Use as a context manager: it holds a lock, so that two processes cannot write one run.

    Args:
        root: ``results_dir``.
        task, model, method: names, as folders.
        identity: what decides the run's numbers; hashed into the last folder's name.

    Raises:
        InputError: another process holds the run; a line of ``samples.jsonl`` before the last is not JSON.
    """

    def __init__(self, root: Path, task: str, model: str, method: str, identity: Mapping[str, Any]):
        self.identity = dict(identity)
        self.hash = identity_hash(identity)
        self.path = root / task / model / method / self.hash
        self._lock = filelock.FileLock(self.path / ".lock", timeout=0)

    def __enter__(self) -> RunFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise InputError("results_dir", self.path, "another process is writing this run; wait for it") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        (self.path / ".lock").unlink(missing_ok=True)
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    @property
    def done(self) -> bool:
        """Whether ``record.json`` is there."""
        return (self.path / RECORD).is_file()

    def record(self) -> dict[str, Any]:
        """The finished run's record."""
        return json.loads((self.path / RECORD).read_text(encoding="utf-8"))

    def samples(self) -> list[dict[str, Any]]:
        """Complete rows so far; what a killed process left of its last line is cut off the file.

        Only call with the lock held, or on a finished run.
        """
        path = self.path / SAMPLES
        if not path.exists():
            return []
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
        rows = []
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                found = line[:40].decode(errors="replace")
                problem = InputError(f"{path}:{number}", found, "not JSON; delete the folder to start over")
                raise problem from None
        return rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one example's row; it is on disk when this returns."""
        line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
        try:
            with (self.path / SAMPLES).open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _disk_error(error, self.path) from error

    def finish(self, record: Mapping[str, Any]) -> Path:
        """Write ``record.json``, whole or not at all."""
        target, partial = self.path / RECORD, self.path / (RECORD + ".partial")
        try:
            with partial.open("w", encoding="utf-8") as file:
                json.dump({"schema": SCHEMA, **record}, file, indent=1, ensure_ascii=False, allow_nan=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise _disk_error(error, self.path) from error
        return target


def _disk_error(error: OSError, path: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError("results_dir", path, "the disk is full; free some space and run again: it continues here")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return InputError("results_dir", path, "cannot be written")
    return error
