"""Mirrors of finished runs. The run's folder is the record; a mirror that fails does not affect the run.

A logger is called once for each finished run, after its ``record.json`` has been written.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ...conf.errors import InputError
from ...conf.options import Options, Text

log = logging.getLogger(__name__)

INIT_TIMEOUT_S = 20.0
"""Longest wait for the server before the run is kept offline; wandb's own is 90 s."""
FINISH_TIMEOUT_S = 60.0
"""Longest wait for the upload of one run; without a limit, wandb would wait forever."""

NOT_RESULTS = ("schema", "identity", "config", "data", "sessions", "provenance", "interval")
"""Parts of a record whose numbers are not results."""


class Logger(Options):
    """The interface of a logger; this one does nothing."""

    key_prefix: ClassVar[str] = "logger."

    def log(self, record: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """Mirror one finished run; a failure of the mirror raises no exception.

        Args:
            record: The content of its ``record.json``.
            samples: The rows of its ``samples.jsonl``, or none.
            folder: The run's folder, ``<results_dir>/<task>/<model>/<method>/<hash>``.
        """


class NoLogger(Logger):
    """``logger=none``: no mirror."""


@dataclass
class WandbLogger(Logger):
    """Weights & Biases, as a mirror.

    The run's id is the record's hash, so that logging a run again updates it. Its config is the record's identity and
    configuration, its summary the numbers of the record (:func:`numbers`). No console output, source code, command line
    or system metrics are sent. wandb's own files go to ``<results_dir>/.wandb``.

    Attributes:
        project: Project on the server.
        entity: User or team; None for the account's default.
        mode: ``online``, ``offline`` (send later with ``wandb sync``) or ``auto``: the variable WANDB_MODE,
            else online with an API key (WANDB_API_KEY or ``wandb login``) and offline without. A server that cannot be
            reached or refuses the key makes the rest of the process offline.
        group: Name to group runs by; None for ``<task>/<model>``.
        samples: Also send the rows of ``samples.jsonl``, predictions included, as a table.

    Raises:
        InputError: A key that cannot be used, or the package is missing; known before the run begins.
    """

    project: Text = "kvbench"
    entity: str | None = None
    mode: Literal["auto", "online", "offline"] = "auto"
    group: str | None = None
    samples: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            from wandb import init  # noqa: F401  (a folder `wandb` in the current directory can be imported as well)
        except Exception as error:
            allowed = f"the package wandb cannot be used ({_in_short(error)}): pip install 'kvbench[wandb]'"
            raise InputError("logger", "wandb", allowed) from error
        self._offline_because = ""
        self._said_where = False

    def log(self, record: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """See :meth:`Logger.log`. A failure is one warning; so is, once, the place of offline runs."""
        try:
            below_results = Path(record["task"], record["model"], record["method"], record["hash"])
            home = folder.resolve().parents[len(below_results.parts) - 1] / ".wandb"
            home.mkdir(parents=True, exist_ok=True)
            # wandb takes these from the environment only; without them it writes to the user's home as well.
            with _environment(
                WANDB_SILENT="true", WANDB_CACHE_DIR=str(home / "cache"), WANDB_DATA_DIR=str(home / "data")
            ):
                self._mirror(record, samples, home)
        except Exception as error:  # for any error, the run is done and its folder is written
            log.warning(
                f"wandb: run {record.get('hash')} is not mirrored: {_in_short(error)}; its record is in {folder}"
            )

    def _mirror(self, record: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], home: Path) -> None:
        import wandb

        if self._mode() == "disabled":
            return
        with self._start(record, home) as run:
            for step, point in sorted(history(record).items()):
                run.log(point, step=step)
            run.summary.update(numbers(record))
            if self.samples and samples:
                columns: list[Any] = list(dict.fromkeys(key for row in samples for key in row))
                table = wandb.Table(
                    columns=columns,
                    data=[[row.get(column) for column in columns] for row in samples],
                    allow_mixed_types=True,
                )
                run.log({"samples": table})
        if self._offline_because and not self._said_where:
            place = home / "wandb" / "offline-run-*"
            log.warning(f"wandb: {self._offline_because}; runs are kept offline, send them with: wandb sync {place}")
            self._said_where = True

    def _start(self, record: Mapping[str, Any], home: Path) -> Any:
        """A run on the server or, if that fails, one on disk."""
        import wandb

        if not self._offline_because:
            if self._mode() == "offline":
                self._offline_because = "mode is offline"
            else:
                try:
                    if _has_key():
                        return self._init("online", record, home)
                    self._offline_because = "no API key"
                except Exception as error:  # of wandb, of the network underneath it, of the key's form
                    self._offline_because = _in_short(error)
                    # wandb's background process still has the run's id and would reject it a second time.
                    wandb.teardown()
        return self._init("offline", record, home)

    def _init(self, mode: Literal["online", "offline"], record: Mapping[str, Any], home: Path) -> Any:
        import wandb

        settings: dict[str, Any] = {
            "init_timeout": INIT_TIMEOUT_S,
            "finish_timeout": FINISH_TIMEOUT_S,
            "finish_timeout_raises": True,
            "silent": True,
            "console": "off",
            "disable_git": True,
            "disable_code": True,
            "x_disable_meta": True,
            "x_disable_stats": True,
        }
        about = {key: record[key] for key in ("kind", "status", "task", "model", "method", "budget") if key in record}
        return wandb.init(
            project=self.project,
            entity=self.entity,
            id=record["hash"],
            name=f"{record.get('method_label', record['method'])} {record['hash']}",
            group=self.group or f"{record['task']}/{record['model']}",
            job_type=record.get("kind"),
            config={**about, "identity": record["identity"], "config": record["config"]},
            allow_val_change=True,
            resume="allow",
            reinit="create_new",
            mode=mode,
            dir=str(home),
            # Versions of wandb differ in their settings and reject unknown ones.
            settings=wandb.Settings(**{k: v for k, v in settings.items() if k in wandb.Settings.model_fields}),
        )

    def _mode(self) -> str:
        asked = os.environ.get("WANDB_MODE") if self.mode == "auto" else self.mode
        return "offline" if asked == "dryrun" else asked or "online"


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Results of a record as flat numbers: ``scores/qasper/mean``, ``bytes/kv_ratio``, ``metrics/ttft_ms``.

    Of a repeated measurement (a mapping with a ``median``) only the median; no lists and no infinite or NaN values.
    """

    def walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, float]]:
        if isinstance(value, Mapping):
            if "median" in value:
                yield from walk(value["median"], path)
                return
            for key, part in value.items():
                yield from walk(part, (*path, str(key)))
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            yield "/".join(path), value

    return dict(walk({key: value for key, value in record.items() if key not in NOT_RESULTS}, ()))


def history(record: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """A training's numbers by step: ``train/loss``, ``validation/perplexity``; empty for other kinds of runs."""
    out: dict[int, dict[str, float]] = {}
    for name, points in (("train", record.get("curve", ())), ("validation", record.get("validations", ()))):
        for point in points:
            values = {f"{name}/{key}": value for key, value in point.items() if key != "step" and math.isfinite(value)}
            out.setdefault(int(point["step"]), {}).update(values)
    return out


def _has_key() -> bool:
    """Return whether wandb finds an API key, without prompting for one or contacting the server."""
    import wandb

    try:
        from wandb.sdk.lib.wbauth import authenticate_session
    except ImportError:  # another version of wandb
        return bool(os.environ.get("WANDB_API_KEY"))
    host = wandb.setup().settings.base_url
    return authenticate_session(host=host, source="kvbench", prompt=False, update_session=False) is not None


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Within the block, set the environment variables that the user has not set."""
    added = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


def _in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'no detail')}"
