"""``kvbench run`` and ``python run.py``: from the configuration to a finished run. The only file that knows Hydra."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NoReturn

import hydra
import hydra._internal.hydra
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from ..conf.errors import InputError, one_of, require
from .composed import check_results_dir, check_targets, check_values, renamed_key, target_class, unknown_key
from .sweep import LOG, SweepLog, describe, end_of_sweep
from .terminal import lasting_streams

CONF = "pkg://kvbench.conf"
USER_ERRORS = (InputError, HydraException, OmegaConfBaseException)
# Our launchers have the names of the plugins' own, so Hydra checks their types against those: as wanted, and no news.
# Here and not in `main`, because the processes of the launchers compose the configuration too.
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")
PARTS = ("model", "method", "task", "runner", "logger")
SETTINGS = ("seed", "batch_size", "device", "dtype", "results_dir")
STOPPED = 130  # exit status of a run that was interrupted, as the shell has it for Ctrl-C


def main(argv: Sequence[str] | None = None) -> None:
    """Run the configuration named on the command line.

    Exit status: 0 done; 2 an input that cannot be used (one line says which), or a sweep with jobs that are not done
    (its last lines say which); 130 interrupted (nothing lost). A reader or a terminal that goes away changes none of
    it.
    """
    if argv is not None:
        sys.argv = ["kvbench run", *argv]
    with lasting_streams():
        _main()


def _main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text())
        return
    try:
        Path.cwd()
    except OSError:
        _exit_with(InputError("current folder", os.environ.get("PWD", "?"), "has been deleted: cd to one that exists"))
    # Hydra's own handler prints several lines and exits 1; with this set it lets the exception through to us.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.environ.pop(LOG, None)  # a sweep started from within a job of another one has a log of its own
    status = 0
    try:
        _check_choices(sys.argv[1:])
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
        _say(error)
        status = 2
    except Exception as error:
        log = SweepLog.current()
        if log is None:
            raise
        # The jobs keep their exceptions to themselves (_sweep_job), so this is the launcher: no Slurm here, a partition
        # that does not exist, a killed worker. Its traceback is long and says little: it goes to the log.
        log.launcher_failed(error)
        print(f"error: hydra/launcher={log.read().launcher}: {describe(error)}", file=sys.stderr)
        status = 2
    status = end_of_sweep(status)
    if status:
        sys.exit(status)


class CheckedCallbacks(Callbacks):
    """Hydra's callbacks, which it builds before anything of ours runs, from a configuration that was checked."""

    def __init__(self, config: DictConfig | None = None) -> None:
        if config is not None:
            check_targets(OmegaConf.to_container(config.hydra.callbacks, resolve=True), "hydra.callbacks")
            for part in ("launcher", "sweeper"):  # Hydra itself takes only plugins for these, but anything in them
                plain = OmegaConf.to_container(config.hydra[part], resolve=True)
                assert isinstance(plain, dict)
                check_targets({k: v for k, v in plain.items() if k != "_target_"}, f"hydra.{part}")
        super().__init__(config)


hydra._internal.hydra.Callbacks = CheckedCallbacks  # type: ignore[misc]  # a class is replaced on purpose


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
def _hydra_main(config: DictConfig) -> None:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        _sweep_job(config)
        return
    launcher = HydraConfig.get().runtime.choices["hydra/launcher"]
    try:
        if launcher != "basic":  # Hydra would run it here, on the login node, and say nothing
            raise InputError("hydra/launcher", launcher, "starts the jobs of a sweep: add -m")
        run(config)
    except USER_ERRORS as error:  # here, because Hydra would print the overrides before letting it through
        _exit_with(error)


def _exit_with(error: Exception) -> NoReturn:
    """One line and exit status 2 for an input that cannot be used; anything else goes on as it is."""
    _say(error)
    sys.exit(2)


def _say(error: Exception) -> None:
    cause = _input_error(error)
    if cause is None:
        raise error
    print(f"error: {cause}", file=sys.stderr)


# sweeps -------------------------------------------------------------------------------------------------------------


class SweepStart(Callback):
    """What ``conf/config.yaml`` has Hydra call in the submitting process, before the launcher is built.

    It is the first to know that there is a sweep (``-m``, or ``hydra.mode: MULTIRUN`` in a YAML file) and where its
    ``results_dir`` is, and the last to run before a launcher hands its environment on.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse a launcher that is not installed, and begin the sweep's log."""
        launcher = config.hydra.runtime.choices["hydra/launcher"]
        try:
            if not _is_installed(config.hydra.launcher["_target_"]):
                raise InputError("hydra/launcher", launcher, "needs the cluster extra: pip install 'kvbench[cluster]'")
            check_results_dir(config.results_dir)
            jobs = _planned_jobs(config)
            SweepLog.begin(config.results_dir, launcher, jobs)
        except USER_ERRORS as error:  # out of here Hydra would make it a warning and go on
            _exit_with(error)
        print(f"sweep of {len(jobs) if jobs else 'some'} jobs, hydra/launcher={launcher}", flush=True)


def _is_installed(target: str) -> bool:
    try:
        return importlib.util.find_spec(target.rpartition(".")[0]) is not None
    except ModuleNotFoundError:
        return False


def _planned_jobs(config: DictConfig) -> list[list[str]] | None:
    """The overrides of each job, by number; None from a sweeper that decides as it goes."""
    sweeper = config.hydra.sweeper
    if sweeper["_target_"] != f"{BasicSweeper.__module__}.{BasicSweeper.__name__}":
        return None
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    swept = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    overrides = parser.parse_overrides([*swept, *config.hydra.overrides.task])
    (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    return jobs


def _sweep_job(config: DictConfig) -> None:
    """One job, in whichever process: what goes wrong is said and noted, and the other jobs go on."""
    job, overrides = HydraConfig.get().job.num, list(HydraConfig.get().overrides.task)
    log = SweepLog.of_job()
    log.started(job, overrides)
    try:
        with lasting_streams():  # in a launcher's own process, which has the streams of the first one
            run(config)
    except Exception as error:
        cause = _input_error(error) if isinstance(error, USER_ERRORS) else None
        if cause is None:
            traceback.print_exc()
            log.failed(job, describe(error), error)
        else:
            print(f"error: {cause} (in the job {' '.join(overrides)})", file=sys.stderr)
            log.failed(job, cause)
    else:
        log.done(job)


def run(config: DictConfig) -> None:
    """Build the parts that the configuration names and hand them to the runner."""
    from ..methods.cache.method import Method  # torch is imported here, after the configuration has been found to exist
    from ..models.base import ModelSource
    from ..tasks.base import Described
    from .loggers import Logger
    from .report import closing
    from .settings import Settings

    names = (*SETTINGS, *PARTS)
    for key in names:
        require(key in config, key, "(nothing)", f"must be given: leave ~{key} out")
    plain = {str(key): _plain(config, str(key)) for key in config}
    for key in plain.keys() - set(names):
        raise InputError(key, plain[key], unknown_key(dict.fromkeys(names), "", key))
    method: Method = build(config.method, "method", Method)
    runner: Any = build(config.runner, "runner")
    task = build(config.task, "task", Described)
    source = build(config.model, "model", ModelSource)
    logger = build(config.logger, "logger", Logger)
    values = {key: plain[key] for key in SETTINGS}
    settings = Settings(**values, config=recorded(config))
    check_values(values, "", Settings, ignored=["config"])
    methods = [method] if runner.budgets is None else [_with_budget(config.method, b) for b in runner.budgets]
    for text in runner.pair_with:
        methods += _paired(text, runner.budgets)
    distinct = list({str(m.identity()): m for m in methods}.values())
    runs = runner.run(source, distinct, task, settings, lambda line: print(line, flush=True))
    for run in runs:
        logger.log(run.folder.record(), run.folder.samples(), run.folder.path)
    print()
    print(closing([r.folder.path for r in runs], settings.results_dir))


def build(node: DictConfig, key: str, kind: type | None = None) -> Any:
    """The part that ``node``, at ``key`` of the configuration, describes: an object of the class ``kind``.

    A part's own complaints come first, because they say most; then what its annotations say.

    Raises:
        InputError: a class in it is not allowed or not of that kind, or a value is none that the part takes.
    """
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise InputError(key, node, f"must be a choice of {key}=NAME")
    plain = _plain(node)
    check_targets(plain, key)
    cls = target_class(plain["_target_"], f"{key}._target_")
    if kind is not None and not issubclass(cls, kind):
        raise InputError(f"{key}._target_", plain["_target_"], f"must be a {kind.__name__}")
    try:
        part = instantiate(node)
    except InstantiationException as error:
        if _input_error(error) is None:
            check_values(plain, key, cls)
        raise
    check_values(plain, key, cls)
    return part


def _plain(config: DictConfig, key: str | None = None) -> Any:
    """A part of the configuration, or the value at ``key``, as resolved plain data."""
    value = config if key is None else config[key]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def recorded(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration as it goes into a record: paths of this machine are cut to their last part."""
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items()}
        if isinstance(value, list):
            return [clean(v) for v in value]
        return Path(value).name if isinstance(value, str) and os.path.isabs(os.path.expanduser(value)) else value

    return {str(k): clean(v) for k, v in plain.items() if k != "results_dir"}


def _with_budget(method: DictConfig, budget: float) -> Any:
    copy = method.copy()
    copy.budget = budget
    try:
        return build(copy, "method")
    except (InputError, InstantiationException) as error:
        cause = _first_input_error(error)
        if cause is None or cause.key != "method.budget":
            raise
        raise InputError("runner.budgets", budget, cause.allowed) from error


def named_method(text: str) -> Any:
    """The method of a text like ``"streaming_llm budget=256 policy.sinks=0"`` or ``"snapkv storage=kivi4"``."""
    return build(_named(text), "method")


def _paired(text: str, budgets: Sequence[float] | None) -> list[Any]:
    """The methods that an entry of ``runner.pair_with`` stands for.

    One that has a budget and names none is run at ``runner.budgets``, so that equal budgets are compared.
    """
    config = _named(text)
    is_named = any(setting.startswith("budget=") for setting in text.split())
    if budgets is None or is_named or config.get("budget") is None:
        return [build(config, "method")]
    return [_with_budget(config, budget) for budget in budgets]


def _named(text: str) -> DictConfig:
    """The configuration of a method that is given as text."""
    name, *settings = text.split() or [""]
    require(bool(name), "runner.pair_with", repr(text), "must name a method")
    groups = {group for group, _ in _groups(files("kvbench.conf"))}
    overrides = [f"method={name}"]
    slash = {s for s in settings if "method/" + s.partition("=")[0] in groups}
    overrides += [f"method/{s}" if s in slash else f"method.{s}" for s in settings]
    _check_choices(overrides)
    try:
        node: DictConfig = _compose(overrides).method
    except ConfigCompositionException as error:
        is_no_file = any(isinstance(link, MissingConfigException) for link in _causes(error))
        cause = None if is_no_file else _unknown_key(overrides)
        if cause is None:
            raise
        raise InputError("runner.pair_with", text, cause) from error
    return node


def _compose(overrides: Sequence[str]) -> DictConfig:
    """The configuration with ``overrides``; within a run with the folders of its ``--config-dir``."""
    with _config_loader():
        return hydra.compose("config", overrides=list(overrides))


def configured_method(name: str, options: Mapping[str, Any]) -> Any:
    """``("snapkv", {"budget": 256, "storage": "kivi4", "scorer": {"window": 16}})`` -> that method.

    Raises:
        InputError: there is no such method or key, or the value cannot be used.
    """
    values = dict(_flat(options))
    choices: dict[str, Any] = {"method": name}  # by config group
    with _config_loader() as loader:
        for key in list(values):
            if loader.get_group_options(f"method/{key}"):
                choices[f"method/{key}"] = values.pop(key)
        for group, choice in choices.items():
            names = loader.get_group_options(group)
            if choice not in names:
                raise InputError(group, choice, one_of(str(choice), names))
        config = hydra.compose("config", overrides=[f"{group}={choice}" for group, choice in choices.items()])
    for key, value in values.items():
        problem = _missing_key(config, f"method.{key}")
        if problem is None and isinstance(OmegaConf.select(config, f"method.{key}"), DictConfig):
            problem = "has keys of its own: pass a dict of them"
        if problem is not None:
            raise InputError(f"method.{key}", value, problem)
        try:
            OmegaConf.update(config, f"method.{key}", value)
        except OmegaConfBaseException:
            raise InputError(f"method.{key}", value, "must be a number, text, bool, None or a list of them") from None
    try:
        return build(config.method, "method")
    except InstantiationException as error:
        raise _first_input_error(error) or error from None
    except OmegaConfBaseException as error:
        raise InputError("method", name, str(error).split("\n")[0]) from None


@contextmanager
def _config_loader() -> Iterator[ConfigLoader]:
    """Hydra's loader for ``kvbench.conf``: inside a run the run's own, which may have folders of the user's as well."""
    outer = GlobalHydra.instance().hydra  # of a run, or of a program that calls kvbench
    if outer is not None:
        loader = outer.config_loader
        if any(f"{source.scheme()}://{source.path}" == CONF for source in loader.get_sources()):
            yield loader
            return
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_module("kvbench.conf", version_base="1.3"):
            yield GlobalHydra.instance().config_loader()
    finally:
        GlobalHydra.instance().hydra = outer


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested options."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# errors -------------------------------------------------------------------------------------------------------------


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from, one after another."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def _first_input_error(error: BaseException) -> InputError | None:
    return next((link for link in _causes(error) if isinstance(link, InputError)), None)


def _input_error(error: BaseException) -> str | None:
    """The one line for the person at the keyboard, or None: not the user's doing."""
    given = _first_input_error(error)
    if given is not None:
        return str(given)
    for link in _causes(error):
        if isinstance(link, OverrideParseException):
            hint = "cannot be read; texts with blanks or signs need quotes of their own, as in 'key=[\"a b=1\",c]'"
            return f"{link.override}: {hint}"
        if isinstance(link, MissingMandatoryValue):
            return f"{link.full_key or str(link).rpartition(' ')[2]}=???: must be given on the command line"
        if isinstance(link, MissingConfigException) and link.missing_cfg_file:
            group, _, name = str(link.missing_cfg_file).rpartition("/")
            if not group:
                return (
                    f"--config-name={name}: must be config; an experiment of yours is experiment=NAME, see --config-dir"
                )
            return str(InputError(group, name, one_of(name, link.options or [])))
        if isinstance(link, InterpolationResolutionError):
            return (
                f"{link.full_key}: {_first_line(link).removeprefix('KeyError raised while resolving interpolation: ')}"
            )
    if isinstance(error, InstantiationException):
        return None  # a bug in a constructor: the traceback is what helps
    if isinstance(error, ConfigCompositionException):
        return _composition_error(error)
    return _first_line(error)


def _composition_error(error: ConfigCompositionException) -> str:
    """What to say of overrides that do not go together."""
    line = _first_line(error)
    swept = re.match("(?:Ambiguous value for argument|Sweep parameters) '(.*?)=(.*)'", line)
    if swept is not None:
        key, value = swept.groups()
        if key in {group for group, _ in _groups(files("kvbench.conf"))} or "(" in value:
            return f"{key}={value}: one run has one choice; add -m for a sweep over them"
        listed = "runner.budgets" if key == "method.budget" else key
        return f"{key}={value}: write '{listed}=[{value}]' for a list, or add -m for a sweep"
    unknown = _unknown_key(sys.argv[1:])
    if unknown is not None:
        return unknown
    if line.startswith("Error merging override ") and error.__cause__ is not None:
        reason = _first_line(error.__cause__).replace("Cannot merge DictConfig with ListConfig", "must be a list")
        return f"{line.removeprefix('Error merging override ')}: {reason}"
    return line


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[0].split())


def _check_choices(overrides: Sequence[str]) -> None:
    """Refuse what cannot be the name of a file in a group (``method=null``), at which Hydra itself fails."""
    options = {group: [p.name.removesuffix(".yaml") for p in found] for group, found in _groups(files("kvbench.conf"))}
    for override in overrides:
        key, _, value = override.partition("=")
        is_optional = key == "experiment" and value == "null"
        if key in options and not is_optional and re.fullmatch(r"|null|true|false|[-+\d.][\d.e]*|\{.*", value):
            raise InputError(key, value, one_of(value, options[key]))


def _unknown_key(overrides: Sequence[str]) -> str | None:
    """Which override names a key that does not exist, and which keys are there instead."""
    groups = {name for name, _ in _groups(files("kvbench.conf"))}
    chosen = [o for o in overrides if o.split("=", 1)[0].lstrip("+~") in groups and not o.startswith("-")]
    chosen = [o.split(",")[0] for o in chosen if "(" not in o]  # of a sweep's choices, the first will do
    try:
        config = _compose(chosen)
    except HydraException:  # the choices themselves do not fit; Hydra's own line says how
        return None
    for override in overrides:
        key, eq, _ = override.partition("=")
        if not eq or key in groups or key.startswith(("+", "~", "-", "hydra")):
            continue
        problem = _missing_key(config, key)
        if problem is not None:
            return f"{key}: {problem}"
    return None


def _missing_key(config: DictConfig, key: str) -> str | None:
    """Which part of a dotted key does not exist, and which keys are there instead; None: the key exists."""
    node: Any = config
    if (now := renamed_key(key)) is not None:
        return now
    path = key.split(".")
    for depth, part in enumerate(path):
        if not isinstance(node, DictConfig) or part not in node.keys():  # noqa: SIM118 (`in` is False for a ??? value)
            known = {str(k): node._get_node(k) for k in node} if isinstance(node, DictConfig) else {}
            return unknown_key(known, ".".join(path[:depth]), part)
        node = node._get_node(part)
    return None


# help ---------------------------------------------------------------------------------------------------------------


def _groups(root: Traversable, prefix: str = "") -> Iterator[tuple[str, list[Traversable]]]:
    """(group, its YAML files) for every folder of the configuration."""
    for folder in sorted(
        (p for p in root.iterdir() if p.is_dir() and not p.name.startswith("_")), key=lambda p: p.name
    ):
        options = sorted((p for p in folder.iterdir() if p.name.endswith(".yaml")), key=lambda p: p.name)
        if options:
            yield prefix + folder.name, options
        yield from _groups(folder, f"{prefix}{folder.name}/")


def help_text() -> str:
    """The groups with their choices, and the keys of the default choices; all read from the YAML files' comments."""
    root = files("kvbench.conf")
    # Where the jobs of a sweep run is Hydra's business, not a part of the experiment: its group comes last.
    groups = sorted(_groups(root), key=lambda group: group[0].startswith("hydra/"))
    lines = [
        "kvbench run GROUP=CHOICE ... KEY=VALUE ...      (python run.py takes the same)",
        "",
        "  kvbench run method=snapkv method.budget=512 task=longbench task.limit=5",
        "  kvbench run method=snapkv 'runner.budgets=[128,256,512]'     several budgets on one prefill",
        "  kvbench run -m method=full,snapkv,streaming_llm              one run after another",
        "",
        "Groups and their choices",
    ]
    for group, options in groups:
        lines.append(f"\n{group}=")
        width = max(len(o.name) for o in options) - len(".yaml")
        for option in options:
            first = option.read_text(encoding="utf-8").removeprefix("# @package _global_\n").splitlines()[0]
            lines.append(f"  {option.name.removesuffix('.yaml'):<{width}}  {first.lstrip('# ')}")
    lines.append("\nKeys")
    for path, prefix in [("config.yaml", ""), *_defaults(root)]:
        rows = list(_keys(root.joinpath(path).read_text(encoding="utf-8"), prefix))
        if rows:
            lines.append(f"\n{prefix.rstrip('.') or 'top level'} ({path})")
            width = max(len(key) for key, _ in rows)
            lines += [f"  {key:<{width}}  {comment}" for key, comment in rows]
    lines.append("\nkvbench run --cfg job prints the whole configuration of a command without running it;")
    lines.append("kvbench run --cfg hydra -p hydra.launcher hydra/launcher=submitit_slurm prints a launcher's keys.")
    return "\n".join(lines)


def _defaults(root: Traversable) -> Iterator[tuple[str, str]]:
    """(YAML file, key prefix) of the choices that a bare ``kvbench run`` makes."""
    for entry in OmegaConf.create(root.joinpath("config.yaml").read_text(encoding="utf-8")).defaults:
        if isinstance(entry, DictConfig):
            ((group, choice),) = entry.items()
            if isinstance(group, str) and choice is not None and " " not in group:  # not "override ..."
                yield f"{group}/{choice}.yaml", f"{group}."


def _keys(text: str, prefix: str) -> Iterator[tuple[str, str]]:
    """(key, "value   comment") of each YAML line that carries a comment."""
    parents: list[tuple[int, str]] = []
    for line in text.splitlines():
        stripped = line.strip()
        if not stripped or stripped.startswith(("#", "-")) or ":" not in stripped:
            continue
        indent = len(line) - len(line.lstrip())
        while parents and parents[-1][0] >= indent:
            parents.pop()
        key, _, rest = stripped.partition(":")
        value, _, comment = rest.partition(" #")
        if comment:
            yield prefix + ".".join([name for _, name in parents] + [key]), f"[{value.strip()}] {comment.strip()}"
        parents.append((indent, key))


if __name__ == "__main__":
    main()
