"""Index of a large results folder: what its files held when they were last read, so that they are not read again.

Reading 100,000 records and their samples takes minutes. The index is an SQLite file in the user's cache folder
(``$XDG_CACHE_HOME/kvbench`` or ``~/.cache/kvbench``), never in the results folder. An entry counts while modification
time and size of ``record.json`` and ``samples.jsonl`` are unchanged. Folders of fewer than :data:`MIN_RECORDS` records
have none, and where it cannot be read or written the records are read as if there were none.

Parts that many records have in common (settings of the task, provenance) are stored once and are one object in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from array import array
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .compact import Structure, Values, pack
from .examples import Examples

MIN_RECORDS = 500
"""Number of records from which on a folder has an index."""
BATCH = 250
"""Entries that are made, written and parsed together."""

SHARED = ("data", "sessions", "provenance", "cache_layers", "shown")
"""Fields of a record that many records have in common; so has each field of ``identity`` that is a mapping."""

TABLES = (
    "CREATE TABLE IF NOT EXISTS parts (digest TEXT PRIMARY KEY, content TEXT)",
    "CREATE TABLE IF NOT EXISTS entries (path TEXT PRIMARY KEY, stamp TEXT, skipped TEXT, note TEXT, structure TEXT,"
    " numbers BLOB, parts TEXT, others TEXT, keys TEXT, scores BLOB, new_tokens BLOB)",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """What one run folder holds.

    Attributes:
        record: The record without what tables and figures do not need; None if it is skipped.
        examples: Scores of the examples; None if there are none that fit the record.
        skipped: Why the record is not shown.
        note: What is wrong with the samples.
    """

    record: dict[str, Any] | None
    examples: Examples | None = None
    skipped: str | None = None
    note: str | None = None


def cache_folder() -> Path:
    """Folder of the user's indexes."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "kvbench"


class Index:
    """Entries by path, in a file of the cache folder.

    Args:
        results: The results folder; each has a file of its own.
    """

    def __init__(self, results: Path) -> None:
        # Entries made by other code are not used: the file's name has the digest of what made them.
        modules = ("schema", "checks", "examples", "entries", "index", "compact")
        code = hashlib.sha256(b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in modules))
        name = hashlib.sha256(f"{results.resolve()}\0{code.hexdigest()}".encode()).hexdigest()[:16]
        self._path = cache_folder() / f"index-{name}.sqlite"
        self._parts: dict[str, Any] = {}
        self._structures: dict[str, Structure] = {}
        self.size = 0  # entries in the file, those of changed and removed records included

    def read(self, stamps: Mapping[str, str]) -> dict[str, Entry]:
        """The entries that are up to date; none if the file cannot be read.

        Args:
            stamps: Path of each record below the folder -> times and sizes of its files.
        """
        found: dict[str, Entry] = {}
        try:
            if not self._path.is_file():
                return {}
            with closing(sqlite3.connect(f"{self._path.as_uri()}?mode=ro", uri=True)) as base:
                self._parts = {digest: json.loads(text) for digest, text in base.execute("SELECT * FROM parts")}
                cursor = base.execute("SELECT * FROM entries")
                while rows := cursor.fetchmany(BATCH):
                    self.size += len(rows)
                    found |= self._decoded([row for row in rows if stamps.get(row[0]) == row[1]])
        except (sqlite3.Error, OSError, ValueError, LookupError, TypeError):  # damaged, locked, or of someone else
            return {}
        return found

    def add(self, entries: Mapping[str, Entry], stamps: Mapping[str, str]) -> dict[str, Entry]:
        """Add entries to the file; without effect on it if it cannot be written.

        Args:
            entries: Some entries by path.
            stamps: Path -> times and sizes of its files.

        Returns:
            The entries as :meth:`read` gives them: with what they have in common stored once.
        """
        parts: dict[str, str] = {}
        rows = [self._encoded(path, stamps[path], entry, parts) for path, entry in entries.items()]
        self._change(
            ("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows),
            ("INSERT OR IGNORE INTO parts VALUES (?, ?)", list(parts.items())),
        )
        self._parts |= {digest: json.loads(text) for digest, text in parts.items() if digest not in self._parts}
        return self._decoded(rows)

    def remove_others(self, paths: Collection[str]) -> None:
        """Remove the entries of all other paths: of records that are gone or have changed."""
        if not self._path.is_file():
            return
        others: list[tuple[str]] = []
        with suppress(sqlite3.Error), closing(sqlite3.connect(f"{self._path.as_uri()}?mode=ro", uri=True)) as base:
            others += [(path,) for (path,) in base.execute("SELECT path FROM entries") if path not in paths]
        self._change(("DELETE FROM entries WHERE path = ?", others))

    def _change(self, *statements: tuple[str, Sequence[tuple[Any, ...]]]) -> None:
        """Run statements, each for many rows, in one transaction."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._path, timeout=1)) as base, base:
                for statement in TABLES:
                    base.execute(statement)
                for statement, rows in statements:
                    base.executemany(statement, rows)
        except (sqlite3.OperationalError, OSError, UnicodeError):  # read-only, locked, full, or a name not in Unicode
            return
        except sqlite3.DatabaseError:  # not SQLite's, or damaged
            with suppress(OSError):
                self._path.unlink()

    # one entry ------------------------------------------------------------------------------------------------------

    def _encoded(self, path: str, stamp: str, entry: Entry, parts: dict[str, str]) -> tuple[Any, ...]:
        def refer(value: Any) -> str:
            text = json.dumps(value, separators=(",", ":"))
            digest = hashlib.sha256(text.encode()).hexdigest()[:24]
            parts[digest] = text
            return digest

        structure, values = None, Values()
        if entry.record is not None:
            program, values = pack(entry.record, lambda path, value: refer(value) if _is_shared(path, value) else None)
            structure = refer(program)
        others = json.dumps(values.others, separators=(",", ":"))
        record = (structure, values.numbers.tobytes(), " ".join(values.parts), others)
        examples = entry.examples
        keys = None if examples is None else refer(examples.keys)
        blobs = (None, None) if examples is None else (examples.scores.tobytes(), examples.new_tokens.tobytes())
        return path, stamp, entry.skipped, entry.note, *record, keys, *blobs

    def _decoded(self, rows: Sequence[tuple[Any, ...]]) -> dict[str, Entry]:
        entries = {}
        of_all = json.loads("[" + ",".join(row[7] for row in rows) + "]")
        for (path, _, skipped, note, structure, numbers, parts, _, *examples), others in zip(rows, of_all, strict=True):
            record = None
            if structure is not None:
                if structure not in self._structures:
                    self._structures[structure] = Structure(self._parts[structure])
                values = [*array("d", numbers), *map(self._parts.__getitem__, parts.split()), *others]
                record = self._structures[structure].build(values)
            entries[path] = Entry(record, self._examples(*examples), skipped, note)
        return entries

    def _examples(self, name: str | None, scores: bytes, new_tokens: bytes) -> Examples | None:
        if name is None:
            return None
        keys = self._parts[name]
        if isinstance(keys, list):  # JSON has no tuples
            keys = self._parts[name] = tuple((dataset, example) for dataset, example in keys)
        return Examples(keys, array("d", scores), array("i", new_tokens))


def _is_shared(path: tuple[str, ...], value: Any) -> bool:
    """Whether a field of a record is stored as a part."""
    if len(path) == 1:
        return path[0] in SHARED
    return len(path) == 2 and path[0] == "identity" and isinstance(value, dict)
