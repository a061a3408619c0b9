"""Files of figures: PDF, SVG, PNG and CSV, an index of them, and which earlier ones to remove."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from ...conf.errors import InputError
from ..processes import each_result
from .draw import draw
from .naming import file_names, settings_hash
from .spec import FigureSpec
from .style import Style

MANIFEST, INDEX = "manifest.json", "index.md"
FORMATS = ("pdf", "svg", "png", "csv")
MIN_JOBS_A_PROCESS = 3
COLUMNS = ("curve", "budget", "panel", "place", "x low", "x high", "low", "high", "on the front", "runs")


@dataclass(frozen=True)
class Job:
    """One figure to be written.

    Attributes:
        spec: The figure.
        name: Of its files, without ending.
        entry: Its entry of the manifest.
    """

    spec: FigureSpec
    name: str
    entry: dict[str, Any]


def plan(specs: Sequence[FigureSpec], folder: Path, source: str, style: Style, formats: Sequence[str]) -> list[Job]:
    """Return a job for each figure; names that figures of other results have in this folder are not used again."""
    old = read_manifest(folder)
    taken = {name for name, entry in old.items() if entry.get("source") != source}
    jobs = []
    for spec, name in zip(specs, file_names(specs, taken), strict=True):
        entry = {
            "kind": spec.kind,
            "title": spec.title,
            "caption": " ".join(spec.caption),
            "files": [f"{name}.{ending}" for ending in formats],
            "settings_hash": settings_hash(spec),
            "style": style.name,
            "width_inches": style.inches,
            "source": source,
            "runs": sorted({str(path) for point in spec.points for path in point.runs}),
        }
        entry["content_hash"] = _content_hash(spec, entry)
        jobs.append(Job(spec, name, entry))
    return jobs


def out_of_date(jobs: Sequence[Job], folder: Path) -> list[Job]:
    """Return the figures whose files are missing, or made from other numbers or by other code."""
    old = read_manifest(folder)
    return [
        job
        for job in jobs
        if old.get(job.name, {}).get("content_hash") != job.entry["content_hash"]
        or not all((folder / file).is_file() for file in job.entry["files"])
    ]


def write_all(jobs: Sequence[Job], folder: Path, style: Style) -> Iterator[tuple[str, str]]:
    """Draw and write figures, on all cores where the system can fork.

    Yields:
        What happened to each figure, ``wrote`` or ``unchanged``, and why it failed.

    Raises:
        InputError: ``folder`` cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("-o", folder, f"cannot be written: {error.strerror}") from error
    todo = out_of_date(jobs, folder)
    largest_first = sorted(range(len(todo)), key=lambda number: -len(todo[number].spec.points))
    work = [partial(_write, todo[number], folder, style) for number in largest_first]
    made = dict(zip(largest_first, each_result(work, MIN_JOBS_A_PROCESS), strict=True))
    yield from _statuses(jobs, todo, (made[number] for number in range(len(todo))))


def _statuses(jobs: Sequence[Job], todo: Sequence[Job], failures: Iterable[str]) -> Iterator[tuple[str, str]]:
    found = iter(failures)
    names = {job.name for job in todo}
    for job in jobs:
        yield ("wrote", next(found)) if job.name in names else ("unchanged", "")


def _write(job: Job, folder: Path, style: Style) -> str:
    """Draw a figure and write its files; returns why it failed, or nothing."""
    try:
        files, made = {}, None
        with mpl.rc_context(style.rc()):
            for name in job.entry["files"]:
                ending = name.rpartition(".")[2]
                if ending == "csv":
                    files[name] = points_csv(job.spec)
                    continue
                made = made or draw(job.spec, style)
                files[name] = _image(made, ending, job, style)
        for name, content in files.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    except Exception as error:  # one figure that fails does not stop the others
        return f"{type(error).__name__}: {error}"
    return ""


def _image(figure: Figure, ending: str, job: Job, style: Style) -> bytes:
    """Return the bytes of a figure. The same numbers give the same bytes: nothing is dated."""
    about = f"{' '.join(job.spec.caption)} settings {job.entry['settings_hash']}"
    metadata: dict[str, dict[str, Any]] = {
        "pdf": {"Title": job.spec.title, "Subject": about, "CreationDate": None},
        "svg": {"Title": job.spec.title, "Description": about, "Date": None},
        "png": {"Title": job.spec.title, "Description": about.encode("latin-1", "replace").decode("latin-1")},
    }
    file = io.BytesIO()
    figure.savefig(file, format=ending, dpi=style.dpi, metadata=metadata[ending])
    return file.getvalue()


def points_csv(spec: FigureSpec) -> bytes:
    """Return the points, with the runs behind each."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    value = "score" if spec.kind == "heatmap" else spec.y_label  # the vertical axis of a heat map is a point's place
    writer.writerow([*COLUMNS[:4], spec.x_label, *COLUMNS[4:6], value, *COLUMNS[6:]])
    for p in spec.points:
        ends = (p.x, p.x_low, p.x_high, p.y, p.low, p.high, int(p.on_front))
        writer.writerow([p.curve, p.budget, p.panel.replace("\n", ": "), p.place, *ends, " ".join(map(str, p.runs))])
    return file.getvalue().encode()


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the entries by name; empty where there is no manifest that can be read."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["figures"]
        return {str(name): dict(entry) for name, entry in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def update_manifest(folder: Path, written: Sequence[Job], source: str, kinds: Sequence[str]) -> list[Path]:
    """Write manifest and index, and remove the files of earlier figures of the same results that are not made any more.

    Args:
        folder: Of the figures.
        written: Figures that are there now.
        source: Results that they are of, with the selection.
        kinds: Kinds of figures that were asked for; others stay.

    Returns:
        The files that were removed.
    """
    old = read_manifest(folder)
    new = {job.name: job.entry for job in written}
    gone = [name for name, e in old.items() if name not in new and e.get("source") == source and e.get("kind") in kinds]
    entries = {name: entry for name, entry in old.items() if name not in new and name not in gone} | new
    kept = {file for entry in entries.values() for file in entry["files"]}
    stale = [
        file for name in {*gone, *(new.keys() & old.keys())} for file in old[name].get("files", ()) if file not in kept
    ]
    removed = [folder / file for file in stale if Path(file).name == file and (folder / file).is_file()]
    try:
        for path in removed:
            path.unlink()
        entries = dict(sorted(entries.items()))
        text = json.dumps({"figures": entries}, indent=1, ensure_ascii=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
        (folder / INDEX).write_text(_index(entries), encoding="utf-8")
    except OSError as error:
        raise InputError("-o", folder, f"cannot be written: {error.strerror}") from error
    return removed


def _index(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the figures with their captions as Markdown."""
    lines = ["# Figures", ""]
    for name, entry in entries.items():
        shown = next((f for ending in ("svg", "png", "pdf") for f in entry["files"] if f.endswith(ending)), None)
        lines += [
            f"## {_plain(entry['title'])}",
            "",
            f"![{name}]({shown})" if shown else "",
            "",
            _plain(entry["caption"]),
            "",
        ]
        lines += [f"Files: {', '.join(f'[{file}]({file})' for file in entry['files'])}.", ""]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Return the text without what Markdown or a browser would read as markup."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|$#" else c for c in text.replace("\n", " "))


def _content_hash(spec: FigureSpec, entry: Mapping[str, Any]) -> str:
    """Return a hash of everything that decides the files: numbers, texts, style and the code that draws."""
    points = [repr(point) for point in spec.points]
    text = json.dumps([points, spec.x_label, spec.y_label, spec.labels, dict(entry), _code_hash()], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def _code_hash() -> str:
    parts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join([*parts, mpl.__version__.encode()])).hexdigest()
