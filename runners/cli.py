"""``kvbench run`` and ``python run.py``: from the configuration to a finished run."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import hydra
import hydra._internal.hydra
import hydra._internal.logging_config
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ..conf.errors import InputError, require
from ..conf.extras import install, missing_module
from ..conf.options import check
from ..conf.wording import as_typed
from .config.arguments import quote_texts, split_arguments
from .config.checks import Folder, check_logging, check_targets, check_values, target_class, unknown_key
from .config.choices import check_choices
from .config.errors import USER_ERRORS, input_error_line, value_errors_of_hydra
from .config.first_check import check_declared_values
from .config.help import help_text
from .config.loader import CONF, plain_data
from .config.parts import build, recorded
from .finished import FinishedCommand
from .sweep import LOG, SweepLog, describe, end_of_sweep
from .terminal import lasting_streams, terminal_logging

# kvbench's launcher files have the names of Hydra's plugins, which makes Hydra warn. Filtered here and not in `main`,
# because the processes of the launchers compose the configuration too.
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")
PARTS = ("model", "method", "runner", "logger")
DATA_GROUPS = ("task", "workload")
"""Groups of what methods are run on; a runner takes one of them."""
SETTINGS = ("seed", "batch_size", "device", "dtype", "results_dir")
STOPPED = 130  # exit status of a run that was interrupted, as the shell has it for Ctrl-C


def main(argv: Sequence[str] | None = None) -> None:
    """Run the configuration named on the command line.

    Exit status: 0 done; 2 an input that cannot be used, or a sweep with jobs that are not done; 130 interrupted
    (nothing is lost). A closed pipe or terminal does not change it.
    """
    if argv is not None:
        sys.argv = ["kvbench run", *argv]
    with lasting_streams():
        _main()


def _main() -> None:
    try:
        Path.cwd()
    except OSError:
        _exit_with(InputError("current folder", os.environ.get("PWD", "?"), "has been deleted: cd to one that exists"))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's own handler would print several lines and exit 1
    os.environ.pop(LOG, None)  # a sweep started from within a job of another one has its own log
    status = 0
    try:
        options, overrides = split_arguments(quote_texts(sys.argv[1:]))
        check_choices(overrides)
        sys.argv[1:] = [*options, *overrides]
        if {"-h", "--help"} & set(options):
            print(help_text(sys.argv[1:]))
            return
        if (module := missing_module("run")) is not None:
            raise InputError("package", module, f"is not installed, and a run needs it: {install('run')}")
        with value_errors_of_hydra():
            _hydra_main()
    except KeyboardInterrupt:
        print("\nstopped; every complete example is kept: run the same command again to continue", file=sys.stderr)
        status = STOPPED
    except USER_ERRORS as error:
        log = SweepLog.current()
        if log is None or not log.read().any_started:
            if log is not None:
                log.remove()
            _exit_with(error)
        _print_error(error)
        status = 2
    except Exception as error:
        log = SweepLog.current()
        if log is None:
            raise
        # The jobs keep their exceptions to themselves (_sweep_job), so this is the launcher's. Its traceback is long.
        log.launcher_failed(error)
        print(f"error: hydra/launcher={log.read().launcher}: {describe(error)}", file=sys.stderr)
        status = 2
    status = end_of_sweep(status)
    if status:
        sys.exit(status)


class CheckedCallbacks(Callbacks):
    """Hydra's callbacks, which Hydra builds before kvbench's code runs, from a checked configuration."""

    def __init__(self, config: DictConfig | None = None) -> None:
        if config is not None:
            check_targets(OmegaConf.to_container(config.hydra.callbacks, resolve=True), "hydra.callbacks")
            for part in ("launcher", "sweeper"):  # Hydra itself takes only plugins for these, but anything in them
                plain = OmegaConf.to_container(config.hydra[part], resolve=True)
                assert isinstance(plain, dict)
                check_targets({k: v for k, v in plain.items() if k != "_target_"}, f"hydra.{part}")
        super().__init__(config)


hydra._internal.hydra.Callbacks = CheckedCallbacks  # type: ignore[misc]  # a class is replaced on purpose
_configure_logging = hydra._internal.logging_config.configure_logging


def checked_logging(config: dict[str, Any]) -> None:
    """Hydra's set-up of logging, by ``hydra.hydra_logging`` and ``hydra.job_logging``, once that has been checked."""
    check_logging(config, "hydra.*_logging")
    _configure_logging(config)


hydra._internal.logging_config.configure_logging = checked_logging


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
def _hydra_main(config: DictConfig) -> None:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        _sweep_job(config)
        return
    launcher = HydraConfig.get().runtime.choices["hydra/launcher"]
    try:
        if launcher != "basic":  # Hydra would silently run it here, on the login node
            raise InputError("hydra/launcher", launcher, "starts the jobs of a sweep: add -m")
        run(config)
    except USER_ERRORS as error:  # here, because Hydra would print the overrides before letting it through
        _exit_with(error)


def _exit_with(error: Exception) -> NoReturn:
    """Print one line and exit with status 2 for an error of the input; raise any other error."""
    _print_error(error)
    sys.exit(2)


def _print_error(error: Exception) -> None:
    cause = input_error_line(error)
    if cause is None:
        raise error
    print(f"error: {cause}", file=sys.stderr)


# sweeps -------------------------------------------------------------------------------------------------------------


class SweepStart(Callback):
    """The callback that Hydra runs in the submitting process of a sweep, before the launcher is built.

    Here it is first known that there is a sweep (``-m``, or ``hydra.mode: MULTIRUN`` in a YAML file) and what its
    ``results_dir`` is; afterwards the launcher passes its environment on.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse a launcher that is not installed, and begin the sweep's log."""
        launcher = config.hydra.runtime.choices["hydra/launcher"]
        try:
            if not _is_installed(config.hydra.launcher["_target_"]):
                raise InputError("hydra/launcher", launcher, "needs the cluster extra: pip install 'kvbench[cluster]'")
            check(plain_data(config, "results_dir"), "results_dir", Folder)
            jobs = _planned_jobs(config)
            SweepLog.begin(config.results_dir, launcher, jobs)
        except USER_ERRORS as error:  # Hydra would turn an exception into a warning and continue
            _exit_with(error)
        print(f"sweep of {len(jobs) if jobs else 'some'} jobs, hydra/launcher={launcher}", flush=True)


def _is_installed(target: str) -> bool:
    try:
        return importlib.util.find_spec(target.rpartition(".")[0]) is not None
    except ModuleNotFoundError:
        return False


def _planned_jobs(config: DictConfig) -> list[list[str]] | None:
    """The overrides of each job, by number; None for a sweeper that chooses jobs from earlier results."""
    sweeper = config.hydra.sweeper
    if sweeper["_target_"] != f"{BasicSweeper.__module__}.{BasicSweeper.__name__}":
        return None
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    swept = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    overrides = parser.parse_overrides([*swept, *config.hydra.overrides.task])
    (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    return jobs


def _sweep_job(config: DictConfig) -> None:
    """Run one job, in any process; an error is printed and logged, and the other jobs continue."""
    job, overrides = HydraConfig.get().job.num, list(HydraConfig.get().overrides.task)
    log = SweepLog.of_job()
    log.started(job, overrides)
    try:
        with lasting_streams():  # in a launcher's own process, which has the streams of the first one
            folders = run(config)
    except Exception as error:
        cause = input_error_line(error) if isinstance(error, USER_ERRORS) else None
        if cause is None:
            traceback.print_exc()
            log.failed(job, describe(error), error)
        else:
            print(f"error: {cause} (in the job {' '.join(overrides)})", file=sys.stderr)
            log.failed(job, cause)
    else:
        log.done(job, folders)


def run(config: DictConfig) -> list[Path]:
    """Build the parts that the configuration names, and run the runner with its messages on the terminal.

    Returns:
        The run folders.
    """
    with terminal_logging():
        return _run(config)


def _run(config: DictConfig) -> list[Path]:
    finished = FinishedCommand.of({str(key): plain_data(config, str(key)) for key in config})
    if (kept := finished.read()) is not None:
        print(kept[1])
        return kept[0]
    check_declared_values(config)
    from ..models.base import ModelSource  # imports torch, so not before the configuration is composed
    from ..tasks.base import Described
    from .config.methods import methods_of
    from .config.settings import Settings
    from .records.loggers import Logger
    from .records.report import closing
    from .runner import Runner

    names = (*SETTINGS, *PARTS)
    for key in names:
        require(key in config, key, "(nothing)", f"must be given: leave ~{key} out")
    plain = {str(key): plain_data(config, str(key)) for key in config}
    for key in plain.keys() - {*names, *DATA_GROUPS}:
        raise InputError(key, plain[key], unknown_key(dict.fromkeys((*names, *DATA_GROUPS)), "", key))
    runner: Runner = build(config.runner, "runner", Runner)
    group = runner.data_group()
    _check_data_groups(plain, group)
    task = build(config[group], group, Described)
    source = build(config.model, "model", ModelSource)
    logger = build(config.logger, "logger", Logger)
    values = {key: plain[key] for key in SETTINGS}
    settings = Settings(**values, config=recorded(config))
    check_values(values, "", Settings, ignored=["config"])
    runs = runner.run(source, methods_of(runner, config.method), task, settings)
    for run in runs:
        logger.log(run.folder.record(), run.folder.samples(), run.folder.path)
    print()
    folders = [r.folder.path for r in runs]
    end = closing(folders)
    print(end)
    if finished.path is not None and all(run.folder.done for run in runs):  # one that was out of memory is tried again
        already_done = [f"{r.method.label}: already done, in {r.folder.path}" for r in runs]
        finished.write(folders, "\n".join([*already_done, "", end]))
    return folders


def _check_data_groups(plain: Mapping[str, Any], group: str) -> None:
    """Raise InputError unless the configuration has the runner's data group, and only that."""
    (other,) = set(DATA_GROUPS) - {group}
    if plain.get(other) is not None:
        name = as_typed(plain[other])
        if isinstance(plain[other], Mapping) and "_target_" in plain[other]:
            name = getattr(target_class(plain[other]["_target_"], f"{other}._target_"), "name", name)
        if group == "task":
            raise InputError("workload", name, "is timed, not scored: use runner=efficiency, or omit it")
        is_workload = files("kvbench.conf").joinpath("workload", f"{name}.yaml").is_file()
        instead = f"workload={name}" if is_workload else "workload=shape"
        raise InputError("task", name, f"is scored, not timed: use {instead}, or runner=accuracy")
    require(plain.get(group) is not None, group, "(nothing)", f"must be given: {group}=NAME")


if __name__ == "__main__":
    main()
