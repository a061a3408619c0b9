"""Runs of any runner: the identity of a run, the head of its record, and locks between processes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ...methods.cache.method import Method
from ...models.base import ModelSource
from ...tasks.base import Source
from ..config.settings import Settings
from .record import RunFolder, identity_hash

log = logging.getLogger(__name__)

BASELINE = Method("full")
"""The full cache in the compute dtype, which every method is compared with."""


def open_run(
    kind: str,
    method: Method,
    source: ModelSource,
    data: Source,
    task: Mapping[str, Any],
    settings: Settings,
    **further: Any,
) -> RunFolder:
    """The folder of one run.

    Args:
        kind: Kind of the run: ``accuracy``, ``efficiency`` or ``train``.
        method, source, data: Parts of the run.
        task: Identity of the task or workload.
        settings: The top-level configuration.
        further: Everything else that decides the run's numbers.
    """
    weights = {} if source.method_weights is None else {"weights": source.method_weights}
    identity = {
        "kind": kind,
        "method": method.identity() | weights,
        "model": source.identity(),
        "task": dict(task),
        "device": settings.torch_device.split(":")[0],
        "dtype": str(settings.torch_dtype).removeprefix("torch."),
        "seed": settings.seed,
        **further,
    }
    return RunFolder(Path(settings.results_dir), data.name, source.name, method.name, identity)


def record_head(status: str, folder: RunFolder, method: Method, data: Source, settings: Settings) -> dict[str, Any]:
    """The fields that a record of any kind begins with.

    Args:
        status: ``done``, or ``oom``: the run was out of memory.
        folder: The run's folder.
        method: The run's own method; the command's configuration may name another one.
        data: Where the task's examples or requests came from.
        settings: The top-level configuration.
    """
    return {
        "status": status,
        "kind": folder.identity["kind"],
        "execution": "real",
        "hash": folder.hash,
        "identity": folder.identity,
        "config": {**settings.config, "method": folder.identity["method"]},
        "task": data.name,
        "model": folder.identity["model"]["name"],
        "method": method.name,
        "method_label": method.label,
        "budget": method.effective_budget,
        **({"needs": method.needs} if method.needs else {}),
        "data": {"name": data.name, "revision": data.revision, "sha256": dict(data.sha256), "note": data.note},
        "batch_size": settings.batch_size,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def announce_needs(methods: Sequence[Method]) -> None:
    """Log what each method needs beyond a model and a prompt, before anything else of a run."""
    for line in dict.fromkeys(f"{method.label}: needs {method.needs}" for method in methods if method.needs):
        log.info(line)


@dataclass(eq=False)  # runs are compared by identity
class MethodRun:
    """One method's run on disk, and where its model comes from."""

    method: Method
    folder: RunFolder
    source: ModelSource


def find_reusable_runs(folder: RunFolder, chosen_by: Sequence[str]) -> list[RunFolder]:
    """Finished runs with the same rows, the newest first: they differ from ``folder`` only in the choice of examples.

    Args:
        folder: A run.
        chosen_by: Keys of the task's identity that choose examples. The data's name follows from them; its sha256 must
            be the same for every data set that both runs have.
    """

    def without_choice(identity: Mapping[str, Any]) -> str:
        task = {k: v for k, v in identity["task"].items() if k not in (*chosen_by, "source", "sha256")}
        return identity_hash({**identity, "task": task})

    def agree(a: Mapping[str, str], b: Mapping[str, str]) -> bool:
        return all(a[name] == b[name] for name in a.keys() & b.keys())

    sha256, wanted = folder.identity["task"]["sha256"], without_choice(folder.identity)
    runs = [
        other
        for other in folder.finished_siblings()
        if without_choice(other.identity) == wanted and agree(other.identity["task"]["sha256"], sha256)
    ]
    return sorted(runs, key=lambda other: (other.record()["finished"], other.hash), reverse=True)


R = TypeVar("R", bound=MethodRun)


def distinct_sources(runs: Sequence[MethodRun]) -> list[ModelSource]:
    """The models of ``runs``, each once, in order; methods that share K/V have their own weights."""
    sources: list[ModelSource] = []
    for run in runs:
        if run.source not in sources:
            sources.append(run.source)
    return sources


def finished_baseline(runs: Sequence[R]) -> R | None:
    """The run of the plain full cache among ``runs``, if it is there and done."""
    return next((r for r in runs if r.method.identity() == BASELINE.identity() and r.folder.done), None)


def run_with_locks(runs: Sequence[R], work: Callable[[list[R]], None]) -> None:
    """Complete the runs that no other process is writing, then wait for the others.

    Jobs of a sweep share the run of the full cache: the first job does it while the others do their own runs. All locks
    are released before the process waits for another one, so no two jobs can wait for each other. Work that the other
    process left incomplete is done here.

    Args:
        runs: All runs of a command.
        work: Completes some of the runs: those that are done (to read them) and those locked for this process.
    """
    order = {id(run): place for place, run in enumerate(runs)}
    left = sorted(runs, key=lambda run: run.folder.path)
    wait = False
    while left:
        locked: list[R] = []
        busy: list[R] = []
        with ExitStack() as locks:
            for run in left:
                if run.folder.done:
                    locked.append(run)
                elif run.folder.acquire(wait=wait and not locked):
                    locks.callback(run.folder.release)
                    locked.append(run)
                else:
                    busy.append(run)
            if locked:
                work(sorted(locked, key=lambda run: order[id(run)]))
        for run in busy:
            log.info(f"another process is writing {run.folder.path}; waiting for it")
        left, wait = busy, True
