"""Finished commands, so that one that is given again is skipped before torch is imported.

A file ``<results_dir>/.finished/<digest>.json`` holds what a finished command printed at its end, and the state of the
files of its runs. The digest covers whatever could make the same command another run: its configuration, kvbench's
files, versions of packages, the files and folders that the configuration names, the default model, the machine, and the
environment. If anything differs, or a run's file has changed, the command runs as usual and finds out what is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..conf.user_cache import cache_dir

ACCURACY = "kvbench.runners.accuracy.AccuracyRunner"
"""The only runner whose commands are kept: others have the commit or the time in their runs' identity."""
NO_LOGGER = "kvbench.runners.records.loggers.NoLogger"
CODE = ("conf", "methods", "models", "tasks", "runners", "analysis")
PACKAGES = ("torch", "transformers", "lm-eval", "datasets", "hydra-core")
VARIABLES = re.compile(r"(KVBENCH|HF|CUDA|TRANSFORMERS|XDG)_\w+|HOME")
COMMIT = re.compile(r"[0-9a-f]{40}")
RUN_FILES = ("record.json", "samples.jsonl")
MOST_FILES = 10_000
"""A folder with more files is not looked through: the command is then not kept."""


@dataclass(frozen=True)
class FinishedCommand:
    """What is kept of a command.

    Attributes:
        path: The file; None if the command cannot be kept.
    """

    path: Path | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> FinishedCommand:
        """The place of a command with this resolved configuration."""
        results = Path(str(config["results_dir"]))
        if not _can_be_kept(config):
            return cls(None)
        code = Path(__file__).resolve().parents[1]
        named = sorted({value for value in _texts(config) if value and os.path.exists(os.path.expanduser(value))})
        model = cache_dir() / "models" / "smollm2-135m" / "kvbench_source.json"
        try:
            state = {
                "config": config,
                "code": [_state(code / folder) for folder in CODE],
                "packages": [_version(name) for name in PACKAGES],
                "named": [[name, _state(Path(name).expanduser())] for name in named if Path(name) != results],
                "model": _state(model),
                "machine": [platform.node(), os.getcwd()],
                "environment": {k: v for k, v in sorted(os.environ.items()) if VARIABLES.fullmatch(k)},
            }
        except OSError:
            return cls(None)
        text = json.dumps(state, sort_keys=True, default=str)
        return cls(results / ".finished" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json")

    def read(self) -> tuple[list[Path], str] | None:
        """(run folders, text at the end) of a command whose runs are all as it left them; else None."""
        try:
            kept = json.loads(self.path.read_text(encoding="utf-8")) if self.path is not None else None
            if kept is None or any(_run_state(Path(folder)) != state for folder, state in kept["runs"]):
                return None
            return [Path(folder) for folder, _ in kept["runs"]], str(kept["text"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, folders: Sequence[Path], text: str) -> None:
        """Keep a command that has ended; nothing happens where the file cannot be written."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(exist_ok=True)
            kept = {"runs": [[str(folder), _run_state(folder)] for folder in folders], "text": text}
            scratch = self.path.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps(kept), encoding="utf-8")
            os.replace(scratch, self.path)
        except OSError:
            return


def _can_be_kept(config: Mapping[str, Any]) -> bool:
    """Whether the digest can cover all that the command depends on."""
    targets = [value for key, value in _items(config) if key == "_target_"]
    revisions = [value for key, value in _items(config) if key == "revision" and value is not None]
    task = config.get("task") or {}
    return (
        (config.get("runner") or {}).get("_target_") == ACCURACY
        and (config.get("logger") or {}).get("_target_") == NO_LOGGER
        and all(isinstance(target, str) and target.startswith("kvbench.") for target in targets)
        and all(COMMIT.fullmatch(str(revision)) for revision in revisions)
        and not (task.get("source") == "auto" and task.get("data_dir") is None)  # depends on what can be reached
    )


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key), inner
            yield from _items(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _items(inner)


def _texts(value: Any) -> Iterator[str]:
    """Every text, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def _state(path: Path) -> Any:
    """Sizes and times of a file, or of all files of a folder.

    Raises:
        OSError: The folder has too many files.
    """
    if not path.is_dir():
        return _stamp(path)
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        found += [[name, _stamp(Path(folder, name))] for name in sorted(names)]
        if len(found) > MOST_FILES:
            raise OSError("too many files")
    return found


def _stamp(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _run_state(folder: Path) -> list[list[int] | None]:
    return [_stamp(folder / name) for name in RUN_FILES]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
