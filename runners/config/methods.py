"""Methods by name: as a text or a mapping in the configuration, or as keywords of the Python API."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

import hydra
from hydra.errors import ConfigCompositionException, InstantiationException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ...conf.errors import InputError, one_of, require
from .choices import check_choices, missing_key, unknown_override
from .errors import causes, first_input_error
from .loader import compose, config_loader, groups
from .parts import build


def named_method(text: str) -> Any:
    """The method of a text like ``"streaming_llm budget=256 policy.sinks=0"`` or ``"snapkv storage=kivi4"``."""
    return build(_named(text), "method")


def paired_methods(text: str, budgets: Sequence[float] | None) -> list[Any]:
    """The methods that an entry of ``runner.pair_with`` stands for.

    One that has a budget and names none is run at ``runner.budgets``, so that equal budgets are compared.
    """
    config = _named(text)
    is_named = any(setting.startswith("budget=") for setting in text.split())
    if budgets is None or is_named or config.get("budget") is None:
        return [build(config, "method")]
    return [with_budget(config, budget) for budget in budgets]


def _named(text: str) -> DictConfig:
    """The configuration of a method that is given as text."""
    name, *settings = text.split() or [""]
    require(bool(name), "runner.pair_with", repr(text), "must name a method")
    names = {group for group, _ in groups(files("kvbench.conf"))}
    is_choice = {s: "method/" + s.partition("=")[0] in names for s in settings}
    overrides = [f"method={name}", *(f"method/{s}" if is_choice[s] else f"method.{s}" for s in settings)]
    check_choices(overrides)
    try:
        node: DictConfig = compose(overrides).method
    except ConfigCompositionException as error:
        is_no_file = any(isinstance(link, MissingConfigException) for link in causes(error))
        cause = None if is_no_file else unknown_override(overrides)
        if cause is None:
            raise
        raise InputError("runner.pair_with", text, cause) from error
    return node


def with_budget(method: DictConfig, budget: float) -> Any:
    """The method of a configuration, with one of ``runner.budgets``."""
    copy = method.copy()
    copy.budget = budget
    try:
        return build(copy, "method")
    except (InputError, InstantiationException) as error:
        cause = first_input_error(error)
        if cause is None or cause.key != "method.budget":
            raise
        raise InputError("runner.budgets", budget, cause.allowed) from error


def configured_method(name: str, options: Mapping[str, Any]) -> Any:
    """``("snapkv", {"budget": 256, "storage": "kivi4", "scorer": {"window": 16}})`` -> that method.

    Raises:
        InputError: there is no such method or key, or the value cannot be used.
    """
    values = dict(_flat(options))
    choices: dict[str, Any] = {"method": name}  # by config group
    with config_loader() as loader:
        for key in list(values):
            if loader.get_group_options(f"method/{key}"):
                choices[f"method/{key}"] = values.pop(key)
        for group, choice in choices.items():
            names = loader.get_group_options(group)
            if choice not in names:
                raise InputError(group, choice, one_of(str(choice), names))
        config = hydra.compose("config", overrides=[f"{group}={choice}" for group, choice in choices.items()])
    for key, value in values.items():
        problem = missing_key(config, f"method.{key}")
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
        raise first_input_error(error) or error from None
    except OmegaConfBaseException as error:
        raise InputError("method", name, str(error).split("\n")[0]) from None


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested options."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
