"""One-line messages for errors caused by an input."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from ...conf.errors import InputError
from ...conf.wording import one_of
from .choices import unknown_override
from .loader import packaged_choices

USER_ERRORS = (InputError, HydraException, OmegaConfBaseException)


@contextmanager
def value_errors_of_hydra() -> Iterator[None]:
    """Turn a ValueError of Hydra, for arguments that do not go together, into a HydraException."""
    try:
        yield
    except ValueError as error:
        frames = list(traceback.walk_tb(error.__traceback__))
        if not frames[-1][0].f_globals["__name__"].startswith("hydra."):
            raise
        raise HydraException(str(error)) from error


def causes(error: BaseException) -> list[BaseException]:
    """The error and the errors it was raised from, in order."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def first_input_error(error: BaseException) -> InputError | None:
    """The first InputError among an error and its causes."""
    return next((link for link in causes(error) if isinstance(link, InputError)), None)


def input_error_line(error: BaseException) -> str | None:
    """The one-line message of an error caused by the input; None for any other error."""
    given = first_input_error(error)
    if given is not None:
        return str(given)
    for link in causes(error):
        if isinstance(link, OverrideParseException):
            hint = "cannot be read; texts with blanks or signs need inner quotes, as in 'key=[\"a b=1\",c]'"
            return f"{link.override}: {hint}"
        if isinstance(link, MissingMandatoryValue):
            return f"{link.full_key or str(link).rpartition(' ')[2]}=???: must be given on the command line"
        if isinstance(link, MissingConfigException) and link.missing_cfg_file:
            group, _, name = str(link.missing_cfg_file).rpartition("/")
            if not group:
                return (
                    f"--config-name={name}: must be config; an experiment of yours is experiment=NAME, see --config-dir"
                )
            if group == "task" and name in packaged_choices()["workload"]:
                return str(InputError(group, name, f"is a workload now: use runner=efficiency workload={name}"))
            return str(InputError(group, name, one_of(name, link.options or [])))
        if isinstance(link, MissingConfigException) and str(link).startswith("Primary config module"):
            return "--config-path: must be left out; YAML files of yours are found with --config-dir=FOLDER"
        if isinstance(link, InterpolationResolutionError):
            return (
                f"{link.full_key}: {_first_line(link).removeprefix('KeyError raised while resolving interpolation: ')}"
            )
    if isinstance(error, InstantiationException):
        return None  # a bug in a constructor: show the traceback
    if isinstance(error, ConfigCompositionException):
        return _composition_error(error)
    return _first_line(error)


def _composition_error(error: ConfigCompositionException) -> str:
    """The message for overrides that cannot be combined."""
    line = _first_line(error)
    swept = re.match("(?:Ambiguous value for argument|Sweep parameters) '(.*?)=(.*)'", line)
    if swept is not None:
        key, value = swept.groups()
        if key in packaged_choices() or "(" in value:
            return f"{key}={value}: one run has one choice; add -m for a sweep over them"
        listed = "runner.budgets" if key == "method.budget" else key
        return f"{key}={value}: write '{listed}=[{value}]' for a list, or add -m for a sweep"
    unknown = unknown_override(sys.argv[1:])
    if unknown is not None:
        return unknown
    if line.startswith("Could not override ") and len(lines := str(error).splitlines()) > 1:
        return f"{line.removesuffix('.')}; {lines[1].strip()[0].lower()}{lines[1].strip()[1:]}"
    if line.startswith("Error merging override ") and error.__cause__ is not None:
        reason = _first_line(error.__cause__).replace("Cannot merge DictConfig with ListConfig", "must be a list")
        return f"{line.removeprefix('Error merging override ')}: {reason}"
    return line


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[0].split())
