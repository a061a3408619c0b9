"""A run's folder: ``samples.jsonl`` grows by one line per example, ``record.json`` is written last.

``sessions.jsonl`` has a line for each process that worked on the run: its code, and the number of examples before it.

``<results_dir>/<task>/<model>/<method>/<hash of what decides the numbers>``. A run that is started again continues
after the last complete line; a folder with a ``record.json`` is done. Both files are read by ``kvbench.analysis``.
"""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any

import filelock

from ...analysis.entries import read_record
from ...analysis.schema import RECORD, SAMPLES, SCHEMA, identity_hash
from ...conf.errors import InputError, require
from ...conf.options import NonNegativeInt, fits

SESSIONS = "sessions.jsonl"
START_OVER = "delete the line to have its example run again, or the folder to start over"


def folder_name(key: str, name: Any) -> str:
    """``name``, if it can be the name of one folder on any file system.

    Raises:
        InputError: Names the key.
    """
    allowed = "must be a name of 1 to 100 characters that does not begin with a point and contains no / or \\"
    is_text = isinstance(name, str) and name.isprintable() and not set(name) & set("/\\")
    require(is_text and bool(name.strip()) and name[0] != "." and len(name.encode()) <= 100, key, name, allowed)
    return str(name)


class RunFolder:
    """One run on disk. As a context manager it is locked, so that two processes cannot write one run.

    Jobs of a sweep share the run of the full cache that they are paired with: see :func:`.runs.run_with_locks`.

    Args:
        root: ``results_dir``.
        task, model, method: Names, as folders.
        identity: Everything that decides the run's numbers; its hash is the name of the last folder.

    Raises:
        InputError: A name cannot be that of a folder; the folder cannot be written; a line of ``samples.jsonl`` before
            the last is damaged.
    """

    def __init__(self, root: Path, task: str, model: str, method: str, identity: Mapping[str, Any]):
        self.identity = dict(identity)
        self.hash = identity_hash(identity)
        names = {"task.name": task, "model.name": model, "method.name": method}
        self.path = root.joinpath(*(folder_name(key, name) for key, name in names.items()), self.hash)
        # Outside the run folders and never deleted: a lock file that is removed can be locked twice.
        self._lock = filelock.FileLock(root / ".locks" / f"{self.hash}.lock")

    def __enter__(self) -> RunFolder:
        self.acquire()
        return self

    def acquire(self, wait: bool = True) -> bool:
        """Lock the run; without ``wait`` False where another process is writing it."""
        try:
            Path(self._lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=-1 if wait else 0)
        except filelock.Timeout:
            return False
        except OSError as error:
            raise _disk_error(error, self.path) from error
        return True

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock."""
        self._lock.release()

    def finished_siblings(self) -> list[RunFolder]:
        """Other finished runs of the same model and method, on any task, in the order of their folders."""
        model, method = self.path.parts[-3:-1]
        root = self.path.parents[3]
        siblings = []
        for path in sorted(root.glob(f"*/{escape(model)}/{escape(method)}/*/{RECORD}")):
            record = read_record(path)
            if record["status"] == "done" and path.parent != self.path:
                siblings.append(RunFolder(root, path.parents[3].name, model, method, record["identity"]))
        return siblings

    @property
    def done(self) -> bool:
        """Whether the record of the complete run exists, and every row that it counts.

        A run that was out of memory is tried again, and one that has lost rows is completed.
        """
        return self._is_recorded and not self.lost_rows()

    @property
    def _is_recorded(self) -> bool:
        return (self.path / RECORD).is_file() and self.record()["status"] == "done"

    def lost_rows(self) -> int:
        """Number of examples that the finished record counts (``data.examples``) and ``samples.jsonl`` lacks."""
        data = self.record()["data"] if self._is_recorded else None
        counts = data.get("examples") if isinstance(data, dict) else None
        if not isinstance(counts, dict):  # a run of another kind, or not finished
            return 0
        there = {example_key(row) for _, row in self._lines(SAMPLES, damaged_too=True)}
        rows = Counter(key[0] for key in there if key is not None)
        return sum(max(0, count - rows[dataset]) for dataset, count in counts.items() if fits(count, int))

    def record(self) -> dict[str, Any]:
        """The finished run's record.

        Raises:
            InputError: It cannot be read, is not JSON, or of another schema.
        """
        try:
            return read_record(self.path / RECORD)
        except OSError as error:
            raise _unreadable(self.path / RECORD, error) from error

    def samples(self) -> list[dict[str, Any]]:
        """Complete rows so far.

        A last line that a killed process left incomplete is skipped, and removed from the file if the lock is held.

        Raises:
            InputError: A line is not a JSON object; names file and line.
        """
        return [row for _, row in self.numbered_samples()]

    def numbered_samples(self) -> list[tuple[str, dict[str, Any]]]:
        """:meth:`samples`, each with its place in the file (``.../samples.jsonl:12``)."""
        return self._lines(SAMPLES)

    def sessions(self) -> list[dict[str, Any]]:
        """The sessions that were passed to :meth:`begin_session`, in order.

        Raises:
            InputError: A line is not one that was written by it; names file and line.
        """
        lines = self._lines(SESSIONS)
        for place, session in lines:
            git, after = session.get("git"), session.get("after_examples", 0)
            if not isinstance(git, dict) or "sha" not in git or not fits(after, NonNegativeInt):
                raise InputError(place, _shortened(json.dumps(session)), f"is no session; {START_OVER}")
        return [session for _, session in lines]

    def begin_session(self, session: Mapping[str, Any]) -> None:
        """Append a line for a process that starts to work on this run."""
        self._append_line(self.path / SESSIONS, session)

    def _lines(self, name: str, damaged_too: bool = False) -> list[tuple[str, dict[str, Any]]]:
        """(file:line, JSON object) for each complete line; ``damaged_too``: {} for one that is none."""
        path = self.path / name
        try:
            data = path.read_bytes() if path.exists() else b""
            whole = data.rfind(b"\n") + 1
            if whole < len(data) and self._lock.is_locked:
                os.truncate(path, whole)
        except OSError as error:
            raise _unreadable(path, error) from error
        rows = []
        for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
            row: Any = None
            with suppress(ValueError, RecursionError):  # no UTF-8, no JSON, a number of 5,000 digits, nested too deeply
                row = json.loads(line)
            if not isinstance(row, dict):
                if not damaged_too:
                    shown = _shortened(line.decode(errors="replace"))
                    raise InputError(f"{path}:{number}", shown, f"is damaged (no JSON object); {START_OVER}")
                row = {}
            rows.append((f"{path}:{number}", row))
        return rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one example's row; it is on disk when this returns."""
        self._append_line(self.path / SAMPLES, row)

    def _append_line(self, path: Path, row: Mapping[str, Any]) -> None:
        line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _disk_error(error, self.path) from error

    def finish(self, record: Mapping[str, Any]) -> Path:
        """Write ``record.json`` atomically."""
        return self.write(RECORD, {"schema": SCHEMA, **record})

    def write(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write a JSON file of the run atomically."""
        target, partial = self.path / name, self.path / (name + ".partial")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with partial.open("w", encoding="utf-8") as file:
                json.dump(content, file, indent=1, ensure_ascii=False, allow_nan=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise _disk_error(error, self.path) from error
        return target

    def amend(self, key: str, value: Mapping[str, Any]) -> None:
        """Add ``key`` to the finished record; call with the lock held."""
        record = self.record()
        self.finish({**{k: v for k, v in record.items() if k != "schema"}, key: value})


def example_key(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """(data set, id) of a row of ``samples.jsonl``; None where it lacks one of them."""
    dataset, name = row.get("dataset"), row.get("id")
    return (dataset, name) if isinstance(dataset, str) and isinstance(name, str) else None


def _shortened(text: str) -> str:
    return text[:40]


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError("results_dir", path, f"cannot be read: {error.strerror}")


def _disk_error(error: OSError, path: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError("results_dir", path, "the disk is full; free some space and run again: it continues here")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT):
        return InputError("results_dir", path, "cannot be written")
    return error
