"""Index of a large results folder: what its files held when they were last read, so that they are not read again.

Reading 100,000 records and their samples takes minutes. The index is an SQLite file in the user's cache folder
(``$XDG_CACHE_HOME/kvbench`` or ``~/.cache/kvbench``), never in the results folder. An entry counts while modification
time and size of ``record.json`` and ``samples.jsonl`` are unchanged. Folders of fewer than :data:`MIN_RECORDS` records
have none, and where it cannot be read or written the records are read as if there were none.

Parts that many records have in common (settings of the task, provenance) are stored once and are one object in memory.
What orders and groups the runs is read at once, the rest of a record when it is first needed: a command that shows some
runs of a large folder, or shares them out among processes, builds each record where it is shown.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from array import array
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..conf.errors import InputError
from .compact import LazyRecord, Structure, Values, pack
from .describe import has_current_intervals
from .examples import Examples
from .ordering import settings_key

MIN_RECORDS = 500
"""Number of records from which on a folder has an index."""
BATCH = 250
"""Entries that are made, written and parsed together."""

SHARED = ("data", "sessions", "provenance", "cache_layers", "shown")
"""Fields of a record that many records have in common; so has each field of ``identity`` that is a mapping."""

HEAD = ("status", "kind", "hash", "identity", "task", "model", "method", "method_label", "budget", "finished")
"""Fields of a record that are read at once."""

TABLES = (
    "CREATE TABLE IF NOT EXISTS parts (digest TEXT PRIMARY KEY, content TEXT)",
    "CREATE TABLE IF NOT EXISTS entries (path TEXT PRIMARY KEY, stamp TEXT, skipped TEXT, note TEXT,"
    " is_current INTEGER, settings TEXT, head TEXT, structure TEXT, numbers BLOB, parts TEXT, others TEXT, keys TEXT,"
    " scores BLOB, new_tokens BLOB)",
)


class Entry(NamedTuple):
    """What one run folder holds.

    Attributes:
        record: The record without what tables and figures do not need; None if it is skipped.
        examples: Scores of the examples; None if there are none that fit the record.
        skipped: Why the record is not shown.
        note: What is wrong with the samples.
        settings: :func:`.ordering.settings_key` of the record; None if it was not worked out.
        is_current: :func:`.describe.has_current_intervals` of the record; None if it was not worked out.
    """

    record: Mapping[str, Any] | None
    examples: Examples | None = None
    skipped: str | None = None
    note: str | None = None
    settings: str | None = None
    is_current: bool | None = None


class Encoded(NamedTuple):
    """Entries as the index stores them.

    Attributes:
        rows: Columns of each entry by its path, but for the path and the stamp.
        parts: What records have in common, by digest, as JSON.
    """

    rows: dict[str, tuple[Any, ...]]
    parts: dict[str, str]


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
        modules = ("schema", "checks", "describe", "examples", "entries", "index", "compact", "ordering")
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
                base.execute("BEGIN")  # the parts of all entries, even while another process adds some
                self._parts = {digest: json.loads(text) for digest, text in base.execute("SELECT * FROM parts")}
                cursor = base.execute("SELECT * FROM entries")
                while rows := cursor.fetchmany(BATCH):
                    self.size += len(rows)
                    found |= self._decoded([row for row in rows if stamps.get(row[0]) == row[1]])
        except (sqlite3.Error, OSError, ValueError, LookupError, TypeError):  # damaged, locked, or of someone else
            return {}
        return found

    def add(self, made: Encoded, stamps: Mapping[str, str]) -> dict[str, Entry]:
        """Add entries to the file; without effect on it if it cannot be written.

        Args:
            made: Some entries.
            stamps: Path -> times and sizes of its files.

        Returns:
            The entries as :meth:`read` gives them: with what they have in common stored once.
        """
        rows = [(path, stamps[path], *columns) for path, columns in made.rows.items()]
        self._change(
            (f"INSERT OR REPLACE INTO entries VALUES ({', '.join('?' * len(rows[0]))})", rows),
            ("INSERT OR IGNORE INTO parts VALUES (?, ?)", list(made.parts.items())),
        )
        self._parts |= {digest: json.loads(text) for digest, text in made.parts.items() if digest not in self._parts}
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

    def _decoded(self, rows: Sequence[tuple[Any, ...]]) -> dict[str, Entry]:
        entries = {}
        heads = json.loads("[" + ",".join(row[6] for row in rows) + "]")
        for (path, _, skipped, note, is_current, settings, _, *columns), head in zip(rows, heads, strict=True):
            structure, numbers, parts, others, *examples = columns
            record = None
            if head is not None:
                build = partial(self._record, path, structure, numbers, parts, others)
                record = LazyRecord(self._built(*head), build)
            key = None if settings is None else self._parts[settings]
            known = None if is_current is None else bool(is_current)
            entries[path] = Entry(record, self._examples(*examples), skipped, note, key, known)
        return entries

    def _record(self, path: str, structure: str, numbers: bytes, parts: str, others: str) -> dict[str, Any]:
        try:
            return self._built(structure, array("d", numbers), parts.split(), json.loads(others))
        except (ValueError, LookupError, TypeError):
            self._path.unlink(missing_ok=True)
            allowed = f"is damaged at {path} and has been deleted: run the command again"
            raise InputError("results_dir", self._path, allowed) from None

    def _built(
        self, structure: str, numbers: Sequence[float], parts: Sequence[str], others: Sequence[Any]
    ) -> dict[str, Any]:
        if structure not in self._structures:
            self._structures[structure] = Structure(self._parts[structure])
        return self._structures[structure].build([*numbers, *map(self._parts.__getitem__, parts), *others])

    def _examples(self, name: str | None, scores: bytes, new_tokens: bytes) -> Examples | None:
        if name is None:
            return None
        keys = self._parts[name]
        if isinstance(keys, list):  # JSON has no tuples
            keys = self._parts[name] = tuple((dataset, example) for dataset, example in keys)
        return Examples(keys, array("d", scores), array("i", new_tokens))


def encoded(entries: Mapping[str, Entry]) -> Encoded:
    """Entries by path as an index stores them."""
    parts: dict[str, str] = {}
    return Encoded({path: _columns(entry, parts) for path, entry in entries.items()}, parts)


def _columns(entry: Entry, parts: dict[str, str]) -> tuple[Any, ...]:
    """Columns of an entry but for the first two; what it shares is added to ``parts``."""

    def refer(value: Any) -> str:
        text = json.dumps(value, separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()[:24]
        parts[digest] = text
        return digest

    def packed(record: Mapping[str, Any]) -> tuple[str, Values]:
        template, values = pack(record, lambda path, value: refer(value) if _is_shared(path, value) else None)
        return refer(template), values

    def text(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"))

    examples, record = entry.examples, entry.record
    of_examples: tuple[Any, ...] = (None, None, None)
    if examples is not None:
        of_examples = refer(examples.keys), examples.scores.tobytes(), examples.new_tokens.tobytes()
    if record is None:
        return entry.skipped, entry.note, None, None, "null", None, None, None, None, *of_examples
    structure, head = packed({name: record[name] for name in HEAD if name in record})
    in_head = text([structure, list(head.numbers), head.parts, head.others])
    structure, values = packed(record)
    of_record = (structure, values.numbers.tobytes(), " ".join(values.parts), text(values.others))
    known = (has_current_intervals(record), refer(settings_key(record)))
    return entry.skipped, entry.note, *known, in_head, *of_record, *of_examples


def _is_shared(path: tuple[str, ...], value: Any) -> bool:
    """Whether a field of a record is stored as a part."""
    if len(path) == 1:
        return path[0] in SHARED
    return len(path) == 2 and path[0] == "identity" and isinstance(value, dict)
