"""The log of a sweep, and its summary at the end.

The jobs of a sweep share no memory: joblib and submitit start processes, Slurm starts them on other machines. So they
share a file, ``<results_dir>/.sweeps/<id>.jsonl``, to which each appends when it starts and when it ends. Its path is
in the environment variable :data:`LOG`, which every launcher passes on to its jobs. A job without an end was killed or
is still running. The submitting process reads the file when the launcher returns.

Lines, each with ``event`` and ``time`` (UTC):
``sweep`` (``launcher``; ``jobs``: each one's overrides, null if the sweeper chooses them from earlier results),
``started`` (``job``: its number; ``overrides``; repeated after each time limit), ``done`` (``job``; ``runs``: the
folders of its runs, relative to ``results_dir``), ``failed``
(``job``, ``reason``, ``traceback`` or null), ``launcher`` (``reason``, ``traceback``: the error that ended it).
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from traceback import format_exception
from typing import Any

import filelock

from ..conf.errors import InputError
from .terminal import shown_path

LOG = "KVBENCH_SWEEP_LOG"
"""Environment variable with the absolute path of the log of the sweep that this process belongs to."""

REPEAT_HINT = "run the same command again: what is done is skipped, the rest continues or is tried again"


@dataclass
class Job:
    """State of one job in the log.

    Attributes:
        overrides: Overrides of the job.
        state: ``waiting`` (never started), ``started`` (and not ended), ``done`` or ``failed``.
        reason: Why it failed, in one line; empty otherwise.
        runs: Folders of its runs, once it is done.
    """

    overrides: list[str]
    state: str = "waiting"
    reason: str = ""
    runs: list[Path] = field(default_factory=list)


@dataclass
class Outcome:
    """State of all jobs in a log.

    Attributes:
        jobs: Jobs by number; jobs that never started are included only if they were known in advance.
        launcher: Name of the launcher (``hydra/launcher=``); empty if the log was lost.
    """

    jobs: dict[int, Job] = field(default_factory=dict)
    launcher: str = ""

    def count(self, state: str) -> int:
        """Number of jobs in a state."""
        return sum(job.state == state for job in self.jobs.values())

    @property
    def complete(self) -> bool:
        """Whether every job is done according to the log; False if the log was lost."""
        return bool(self.launcher) and self.count("done") == len(self.jobs)

    @property
    def any_started(self) -> bool:
        """Whether any job has started."""
        return self.count("waiting") < len(self.jobs)

    def lines(self) -> list[str]:
        """The summary: counts, then one line for each job that is not done."""
        shared = set.intersection(*(set(job.overrides) for job in self.jobs.values())) if self.jobs else set()

        def name(job: Job) -> str:
            own = [override for override in job.overrides if override not in shared]
            return " ".join(own or job.overrides)

        phrases = [("failed", "failed"), ("started", "killed or still running"), ("waiting", "never started")]
        counts = ", ".join(f"{self.count(state)} {phrase}" for state, phrase in phrases if self.count(state))
        if not self.launcher:
            return ["the sweep's log is lost, so nothing is known of its jobs", REPEAT_HINT]
        first = f"{self.count('done')} of {len(self.jobs)} jobs done" + (f"; {counts}" if counts else "")
        failed = [f"  failed: {name(job)}: {job.reason}" for job in self.jobs.values() if job.state == "failed"]
        unfinished = [f"  killed or still running: {name(job)}" for job in self.jobs.values() if job.state == "started"]
        return [first, *failed, *unfinished, *([] if self.complete else [REPEAT_HINT])]


@dataclass(frozen=True)
class SweepLog:
    """The log file, for the submitting process and for a job.

    Attributes:
        path: ``<results_dir>/.sweeps/<id>.jsonl``, absolute.
    """

    path: Path

    @classmethod
    def begin(cls, results_dir: str | Path, launcher: str, jobs: Sequence[Sequence[str]] | None) -> SweepLog:
        """Start a log, for this process and all processes that it starts.

        Args:
            results_dir: Folder of the run folders, relative to the working directory.
            launcher: Name of the launcher (``hydra/launcher=``).
            jobs: The overrides of each job, by number; None if they are not known in advance.

        Raises:
            InputError: The file cannot be written.
        """
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"  # sorted by time, and unique
        log = cls(Path(results_dir).absolute() / ".sweeps" / f"{name}.jsonl")
        log._append("sweep", launcher=launcher, jobs=None if jobs is None else [list(job) for job in jobs])
        os.environ[LOG] = str(log.path)
        return log

    @classmethod
    def current(cls) -> SweepLog | None:
        """The log of the sweep that this process belongs to, if it belongs to one."""
        path = os.environ.get(LOG)
        return cls(Path(path)) if path else None

    @classmethod
    def of_job(cls) -> SweepLog:
        """The log of the sweep that this job belongs to.

        Raises:
            InputError: The job was started without the environment of the process that submitted it.
        """
        log = cls.current()
        if log is None:
            raise InputError(
                LOG, "", "is not set in this job; it must inherit the submitter's environment (sbatch --export=ALL)"
            )
        return log

    def started(self, job: int, overrides: Sequence[str]) -> None:
        """Log the start of a job, the first or a repeated one."""
        self._append("started", job=job, overrides=list(overrides))

    def done(self, job: int, runs: Sequence[Path] = ()) -> None:
        """Log that a job has all of its results, in these run folders below ``results_dir``."""
        results = self.path.parents[1]
        self._append("done", job=job, runs=[os.path.relpath(folder, results) for folder in runs])

    def failed(self, job: int, reason: str, error: BaseException | None = None) -> None:
        """Log why a job failed, with the traceback of ``error`` if there is one."""
        self._append("failed", job=job, reason=reason, traceback=None if error is None else _traceback(error))

    def launcher_failed(self, error: BaseException) -> None:
        """Log the error that ended the launcher."""
        self._append("launcher", reason=describe(error), traceback=_traceback(error))

    def remove(self) -> None:
        """Delete the log of a sweep that never started."""
        self.path.unlink(missing_ok=True)

    def read(self) -> Outcome:
        """The state of every job, from the last line about it.

        An incomplete line (the disk was full) is skipped: its job then counts as not ended until the sweep is repeated.
        """
        outcome = Outcome()
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            if event["event"] == "sweep":
                outcome.launcher = event["launcher"]
                for number, overrides in enumerate(event["jobs"] or []):
                    outcome.jobs.setdefault(number, Job(overrides))
            elif "job" in event:
                job = outcome.jobs.setdefault(event["job"], Job(event.get("overrides", [])))
                job.state, job.reason = event["event"], event.get("reason", "")
                job.runs = [self.path.parents[1] / folder for folder in event.get("runs", [])]
        return outcome

    def _append(self, event: str, **fields: Any) -> None:
        noted = {"event": event, "time": datetime.now(UTC).isoformat(timespec="seconds"), **fields}
        line = (json.dumps(noted, ensure_ascii=False) + "\n").encode()
        # Appending is atomic on a local disk and not on NFS, where two machines can write at the same place. Taking a
        # lock also makes an NFS client look for the file's true end.
        lock = filelock.FileLock(self.path.parents[1] / ".locks" / "sweeps.lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            Path(lock.lock_file).parent.mkdir(exist_ok=True)
            with lock, open(self.path, "ab", buffering=0) as file:
                file.write(line)
                os.fsync(file.fileno())
        except OSError as error:
            problem = f"the sweep's log cannot be written: {error.strerror}"
            raise InputError("results_dir", self.path.parents[1], problem) from error


def describe(error: BaseException) -> str:
    """``ExceptionType: message`` in one line of limited length."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:300]}".removesuffix(": ")


def _traceback(error: BaseException) -> str:
    return "".join(format_exception(error))


def end_of_sweep(status: int) -> int:
    """Print the summary of the sweep of this process, if it is in one.

    Args:
        status: Exit status so far: 0, 2 if an error has been printed, 130 if interrupted.

    Returns:
        The exit status: 2 in place of 0 when a job is not done.
    """
    log = SweepLog.current()
    if log is None:
        return status
    outcome = log.read()
    if status == 2 and not outcome.any_started:  # the error has been printed
        return status
    folders = [folder for job in outcome.jobs.values() for folder in job.runs]
    if folders and outcome.count("done") > 1:
        from .records.report import joint_table  # imports what analysis needs

        print("", joint_table(folders), sep="\n", flush=True)
    where = sys.stdout if outcome.complete else sys.stderr
    print("", *outcome.lines(), f"sweep log: {shown_path(log.path)}", sep="\n", file=where, flush=True)
    return status or (0 if outcome.complete else 2)
