"""Records of a results folder, read and checked one by one, with the scores of their examples."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..conf.errors import InputError
from .checks import problem_of
from .examples import Contradiction, Examples, read_examples
from .index import BATCH, MIN_RECORDS, Encoded, Entry, Index, encoded
from .processes import each_result
from .schema import FIELDS, RECORD, RESULTS, SAMPLES, SCHEMA

REFERENCE = "reference"
"""Folder of the committed runs below the results folder."""
MAX_UNSHARED = 2000
"""Number of folders from which on several processes search them."""
NOT_LOADED = ("config", "curve", "repetitions", "validations")
"""Fields that :func:`read_entries` leaves out, because no table needs them and they are most of a record's size.

Of ``rode_with`` it keeps the number of entries.
"""


def read_record(path: Path) -> dict[str, Any]:
    """One ``record.json``; its numbers are not checked.

    Raises:
        InputError: it cannot be read, is not JSON, or of another schema, or lacks a field that every record has.
    """
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError("results_dir", path, f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        problem = "is not JSON; remove this file and run the command again: it continues from the rows that are there"
        raise InputError("results_dir", path, problem) from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else None
        raise InputError("results_dir", path, f"has schema {found}; this version reads {SCHEMA}")
    wanted = FIELDS + (RESULTS.get(str(record.get("kind")), ()) if record.get("status") == "done" else ())
    missing = [field for field in wanted if field not in record]
    if missing:
        problem = f"lacks {', '.join(missing)}; remove this file and run the command again"
        raise InputError("results_dir", path, problem)
    return record


def read_entries(folder: Path) -> dict[str, Entry]:
    """What each ``record.json`` under a folder holds, by the path of its run folder below it; empty: the folder itself.

    Raises:
        InputError: there is none.
    """
    stamps = _stamps(folder)
    if not stamps:
        raise InputError(
            "RESULTS", folder, f"holds no finished run ({RECORD}); `kvbench run results_dir={folder}` makes some"
        )
    if len(stamps) < MIN_RECORDS:
        return {below: _entry(folder / below) for below in stamps}
    index = Index(folder)
    found = index.read(stamps)
    if len(found) < index.size:
        index.remove_others(found)
    new = [below for below in stamps if below not in found]
    batches = [partial(_entries, folder, new[start : start + BATCH]) for start in range(0, len(new), BATCH)]
    for made in each_result(batches):
        found |= index.add(made, stamps)
    return {below: found[below] for below in stamps}


def _stamps(folder: Path) -> dict[str, str]:
    """Times and sizes of the files of each run folder below a folder, in the order of their paths."""
    root = os.fspath(folder)
    found, left = _scanned(root, [""], MAX_UNSHARED)
    work = [partial(_scanned, root, left[start : start + BATCH]) for start in range(0, len(left), BATCH)]
    for more, _ in each_result(work):
        found |= more
    return dict(sorted(found.items(), key=lambda item: item[0].replace("/", "\0")))  # by the names of the folders


def _scanned(root: str, folders: Sequence[str], limit: float = math.inf) -> tuple[dict[str, str], list[str]]:
    """Search some folders below ``root`` and all below them, level by level.

    Returns:
        Times and sizes by run folder, and the folders that are left once ``limit`` are known that were not searched.
    """
    found: dict[str, str] = {}
    left = deque(folders)
    while left and len(left) < limit:
        below = left.popleft()
        path, files = os.path.join(root, below), {}
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    name = entry.name
                    if not entry.is_dir(follow_symlinks=False):
                        files[name] = entry
                    elif below or name != REFERENCE:
                        left.append(f"{below}/{name}" if below else name)
        except OSError:
            continue
        if RECORD in files and not _is_folder(files[RECORD]):
            found[below] = f"{_stamp(files[RECORD])} {_stamp(files.get(SAMPLES))}"
    return found, list(left)


def _is_folder(file: os.DirEntry[str]) -> bool:
    try:
        return file.is_dir()
    except OSError:  # a link to itself
        return True


def _stamp(file: os.DirEntry[str] | None) -> str:
    try:
        status = None if file is None else file.stat()
    except OSError:
        status = None
    return "-" if status is None else f"{status.st_mtime_ns}:{status.st_size}"


def _entries(folder: Path, names: Sequence[str]) -> Encoded:
    """Entries of some run folders below ``folder``, by name, as small as the index has them."""
    return encoded({below: _entry(folder / below) for below in names})


def _entry(folder: Path) -> Entry:
    """One record with its samples, checked."""
    try:
        record = read_record(folder / RECORD)
    except InputError as error:
        return Entry(None, skipped=error.allowed)
    problem = problem_of(record)
    if problem is not None:
        return Entry(None, skipped=problem)
    examples = note = None
    if _is_scored(record):
        try:
            examples, note = read_examples(folder, record)
        except Contradiction as error:
            return Entry(None, skipped=str(error))
    for field in NOT_LOADED:
        record.pop(field, None)
    if "rode_with" in record:  # names of all other methods of the command: a folder would grow with their square
        record["rode_with"] = len(record["rode_with"])
    return Entry(record, examples, note=note)


def co_batched(record: Mapping[str, Any]) -> int | None:
    """Number of other methods that shared a run's prefill; None if the record does not say."""
    others = record.get("rode_with")
    return others if others is None or isinstance(others, int) else len(others)


def examples_of(folder: Path, record: Mapping[str, Any]) -> Examples | None:
    """The examples of a run; None where it has none, or none that fit its record."""
    try:
        return read_examples(folder, record)[0] if _is_scored(record) else None
    except Contradiction:
        return None


def _is_scored(record: Mapping[str, Any]) -> bool:
    return bool(record["kind"] == "accuracy" and record["status"] == "done")
