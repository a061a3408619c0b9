"""Where LongBench's rows come from: a folder, a ``data.zip``, the Hugging Face hub, or the set bundled with kvbench.

All four hold files ``<dataset>.jsonl`` in the official schema, so there is one reader: it walks through the lines as
bytes, checks each row, and hashes what it read.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import IO, Any, cast

from ..conf.errors import InputError
from .base import is_text
from .hub import DownloadFailed, fetch
from .longbench_metrics import unscorable
from .longbench_spec import SPECS, DatasetSpec

Opener = Callable[[], AbstractContextManager[IO[bytes]]]

HUB_REPOS = ("THUDM/LongBench", "zai-org/LongBench")
"""The data set's old and new owner; the hub redirects the old name, for now."""

HUB_REVISION = "5e628be450b7e67fb7ae6e201bd6d8f7056f7672"
HUB_SHA256 = "cb45b11a4133c6bc1d6a44b0f8e701335ff1e543195db1103472e575857f7f64"
"""Of ``data.zip`` (113,932,529 bytes) at :data:`HUB_REVISION`: the figures published on the hub's file page."""

UNREADABLE = (zipfile.BadZipFile, RuntimeError, lzma.LZMAError)
"""What zipfile raises over a damaged member, and over one that is encrypted or compressed in a way it does not know."""

FIELDS = ("input", "context", "answers", "length", "dataset", "language", "all_classes")
"""Fields every row must have. ``_id`` is official too, but copies in circulation have dropped it."""


@dataclass(frozen=True)
class DatasetFile:
    """The rows of one data set as read from one file.

    Attributes:
        rows: rows in file order, the first ``limit`` of them.
        total: rows in the file.
        sha256: sha256 of the file's uncompressed bytes.
    """

    rows: list[dict[str, Any]]
    total: int
    sha256: str


@dataclass(frozen=True)
class Store:
    """Files of one origin, by data set.

    Attributes:
        kind: ``data_dir``, ``hub`` or ``mini``.
        location: folder, archive or repository, for the record.
        files: stem (``qasper``, ``qasper_e``) -> function that opens its uncompressed bytes. Only files whose stem is a
            LongBench name are listed.
        revision: commit of a hub repository, else None.
    """

    kind: str
    location: str
    files: dict[str, Opener]
    revision: str | None = None

    def read(self, stem: str, spec: DatasetSpec, limit: int | None) -> DatasetFile:
        """Read ``<stem>.jsonl``: all of it is checked and hashed, the first ``limit`` rows are kept."""
        name = f"{self.location}: {stem}.jsonl"
        digest = hashlib.sha256()
        rows: list[dict[str, Any]] = []
        total = 0
        try:
            with self.files[stem]() as file:
                for number, line in numbered_lines(file, name):
                    digest.update(line)
                    if not line.strip():
                        continue
                    row = _parse_row(line, spec, f"{name}:{number}")
                    total += 1
                    if limit is None or len(rows) < limit:
                        rows.append(row)
        except (*UNREADABLE, OSError) as error:
            raise InputError(name, "unreadable", str(error)) from error
        if not total:
            raise InputError(name, "empty", "the file must hold at least one row")
        return DatasetFile(rows, total, digest.hexdigest())


def open_jsonl(path: Path) -> IO[bytes]:
    """A ``.jsonl`` or ``.jsonl.gz`` file, open to read its uncompressed bytes."""
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else open(path, "rb")


def numbered_lines(file: Iterable[bytes], name: str) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes); a compressed file that was cut or damaged is reported with the line it breaks at."""
    number = 0
    try:
        for number, line in enumerate(file, start=1):
            yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise InputError(
            f"{name}:{number + 1}", "damaged", f"the compressed file ends or breaks here: {error}"
        ) from error


def _parse_row(line: bytes, spec: DatasetSpec, where: str) -> dict[str, Any]:
    row = parse_json_line(line, where)
    missing = [field for field in FIELDS if field not in row]
    if missing:
        raise InputError(where, ", ".join(missing), "the row lacks these fields of the LongBench schema")
    for field in ("input", "context"):
        if not isinstance(row[field], str):
            raise InputError(where, field, "must be a string")
    if b"\\u" in line:
        for field, value in row.items():
            if not is_text(json.dumps(value, ensure_ascii=False)):
                raise InputError(where, field, "must be text: it has half of a character (a lone surrogate)")
    if isinstance(row["length"], bool) or not isinstance(row["length"], int):
        raise InputError(where, f"length:{row['length']}", "must be a whole number")
    problem = unscorable(spec, row["answers"], row["all_classes"])
    if problem:
        raise InputError(where, spec.name, problem)
    return row


def parse_json_line(line: bytes, where: str) -> dict[str, Any]:
    """One JSON object from one line of UTF-8; InputError naming ``where`` (file:line) for anything else."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number of 5,000 digits, nested too deeply
        raise InputError(where, _shorten(line), f"not a line of JSON ({error})") from error
    if not isinstance(row, dict):
        raise InputError(where, _shorten(line), "must be a JSON object")
    return row


def _shorten(line: bytes) -> str:
    text = line.decode("utf-8", errors="replace").strip()
    return text if len(text) <= 40 else f"...{text[-37:]}"


# --- the four origins -------------------------------------------------------------------------------------------------


def open_data_dir(path: str) -> Store:
    """A folder with ``<dataset>.jsonl[.gz]`` in it or in its ``data/``, or a ``data.zip`` as the hub has it."""
    place = Path(path).expanduser()
    if place.is_file():
        if not zipfile.is_zipfile(place):
            raise InputError("task.data_dir", path, "must be a folder or LongBench's data.zip")
        return Store("data_dir", path, _zip_files(place, "task.data_dir", path))
    if not place.is_dir():
        raise InputError("task.data_dir", path, "no such folder or data.zip")
    files: dict[str, Opener] = {}
    for folder in (place, place / "data"):
        for suffix in (".jsonl", ".jsonl.gz"):
            for stem in _stems():
                file = folder / f"{stem}{suffix}"
                if stem not in files and file.is_file():
                    files[stem] = partial(open_jsonl, file)
    return Store("data_dir", path, files)


def open_mini() -> Store:
    """``longbench-mini``, bundled with kvbench; its location is given relative to the package, the same everywhere."""
    files = {stem: mini_folder() / f"{stem}.jsonl" for stem in _stems()}
    present: dict[str, Opener] = {stem: partial(file.open, "rb") for stem, file in files.items() if file.is_file()}
    return Store("mini", "kvbench.tasks/data/longbench_mini", present)


def mini_folder() -> Any:
    """Folder of the bundled set, as an ``importlib.resources`` traversable (a test points it elsewhere)."""
    return resources.files("kvbench.tasks") / "data" / "longbench_mini"


def open_hub() -> Store:
    """``data.zip`` of the hub at the pinned revision: from the local cache, else downloaded.

    Raises:
        HubUnavailable: the hub cannot be reached, or offline mode is set.
        InputError: the archive is not the pinned one, or the hub answers and the download fails.
    """
    try:
        archive, repo = fetch(HUB_REPOS, "data.zip", HUB_REVISION)
    except DownloadFailed as error:  # which must not quietly become another data set
        allowed = f"the download of LongBench's data.zip (114 MB) failed: {error}; run again, or task.source=mini"
        raise InputError("task.source", "hub", allowed) from error
    with open(archive, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != HUB_SHA256:
        raise InputError(str(archive), sha256, f"the sha256 must be {HUB_SHA256}; delete the file to fetch it again")
    files = _zip_files(archive, "task.source", f"hub:{repo}")
    return Store("hub", f"{repo}/data.zip", files, revision=HUB_REVISION)


def _stems() -> list[str]:
    return [stem for name, spec in SPECS.items() for stem in ((name, f"{name}_e") if spec.rows_e else (name,))]


def _zip_files(archive: Path, key: str, value: str) -> dict[str, Opener]:
    """Members ``data/<dataset>.jsonl`` of an archive.

    Nothing is unpacked to disk; an archive with a member whose path is outside its folder is refused all the same.
    """
    try:
        with zipfile.ZipFile(archive) as bundle:
            members = set(bundle.namelist())
    except (*UNREADABLE, OSError) as error:
        raise InputError(key, value, f"damaged zip archive: {error}") from error
    for member in sorted(members):
        path = member.replace("\\", "/")
        if path.startswith("/") or ".." in path.split("/") or path[1:2] == ":":
            raise InputError(key, value, f"the archive is refused: its member {member!r} points outside the archive")

    wanted = {stem: f"data/{stem}.jsonl" for stem in _stems()}
    return {stem: partial(_open_member, archive, member) for stem, member in wanted.items() if member in members}


@contextmanager
def _open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    with zipfile.ZipFile(archive) as bundle, bundle.open(member) as file:
        yield file
