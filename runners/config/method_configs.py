"""Configurations of the methods of a run: composed, with their budgets, but not built, which would import torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ...conf.errors import InputError, require
from ...conf.wording import as_typed, one_of
from .choices import check_choices, missing_key, unknown_override
from .errors import USER_ERRORS, causes, first_input_error, input_error_line
from .loader import compose, config_loader, packaged_choices

BUDGETS = "runner.budgets"


def paired_configs(
    entry: str | Mapping[str, Any], budgets: Sequence[float] | None
) -> list[tuple[DictConfig, str | None]]:
    """Return the configurations that an entry of ``runner.pair_with`` names.

    Args:
        entry: A text as for :func:`named_config`, or a mapping with ``method`` (its name), optionally ``budgets``, and
            the options of :func:`configured_config`.
        budgets: ``runner.budgets``, for a method that has a budget and whose entry names none.

    Returns:
        (configuration of a method, the list that its budget is from or None) for each.
    """
    if isinstance(entry, str):
        config, entry_budgets = named_config(entry), None
        has_budget = any(setting.startswith("budget=") for setting in entry.split())
    else:
        config, entry_budgets = _mapped(entry)
        has_budget = "budget" in entry
    if entry_budgets is not None:
        return [(with_budget(config, budget), "budgets") for budget in entry_budgets]
    if budgets is not None and not has_budget and config.get("budget") is not None:
        return [(with_budget(config, budget), BUDGETS) for budget in budgets]
    return [(config, None)]


@contextmanager
def errors_of_entry(entry: str | Mapping[str, Any]) -> Iterator[None]:
    """Turn an error of the configuration into one that names the entry of ``runner.pair_with``."""
    try:
        yield
    except USER_ERRORS as error:
        cause, line = first_input_error(error), input_error_line(error)
        if line is None or (cause is not None and cause.key in (BUDGETS, "runner.pair_with")):
            raise
        raise InputError("runner.pair_with", as_typed(entry), line) from error


@contextmanager
def errors_of_budget(list_key: str | None) -> Iterator[None]:
    """Turn an error of ``method.budget`` into one that names the list that the budget is from."""
    try:
        yield
    except InputError as error:
        if error.key != "method.budget" or list_key is None:
            raise
        raise InputError(list_key, error.value, error.allowed) from error


def with_budget(method: DictConfig, budget: float) -> DictConfig:
    """Return a copy of the configuration of a method with another budget."""
    copy = method.copy()
    copy.budget = budget
    return copy


def _mapped(entry: Mapping[str, Any]) -> tuple[DictConfig, list[float] | None]:
    """Return the configuration of a method that is given as a mapping, and its own budgets."""
    options, shown = dict(entry), as_typed(entry)
    name, budgets = options.pop("method", None), options.pop("budgets", None)
    require(isinstance(name, str), "runner.pair_with", shown, "must name a method: {method: snapkv, budget: 128}")
    is_one = budgets is None or "budget" not in options
    require(is_one, "runner.pair_with", shown, "has both budget and budgets: give one")
    is_list = budgets is None or (isinstance(budgets, list) and bool(budgets))
    require(is_list, "runner.pair_with", shown, "budgets must be a list: {method: snapkv, budgets: [128, 256]}")
    return configured_config(name, options), budgets


def named_config(text: str) -> DictConfig:
    """Return the configuration of a method that is given as text."""
    name, *settings = text.split() or [""]
    require(bool(name), "runner.pair_with", repr(text), "must name a method")
    names = packaged_choices()
    is_choice = {s: "method/" + re.split("[@=]", s)[0] in names for s in settings}  # scorer=, scorer@PLACE=
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


def configured_config(name: str, options: Mapping[str, Any]) -> DictConfig:
    """Return the configuration of a method that is given by its name and nested options."""
    values = dict(_flat(options))
    choices: dict[str, Any] = {"method": name}  # by config group
    with config_loader() as loader:
        for key in list(values):
            if loader.get_group_options(f"method/{key.partition('@')[0]}"):
                choices[f"method/{key}"] = values.pop(key)
        for group, choice in choices.items():
            names = loader.get_group_options(group.partition("@")[0])
            if choice not in names:
                raise InputError(group, choice, one_of(str(choice), names))
        config = hydra.compose("config", overrides=[f"{group}={choice}" for group, choice in choices.items()])
    for key, value in values.items():
        problem = missing_key(config, f"method.{key}")
        if problem is None and isinstance(OmegaConf.select(config, f"method.{key}"), DictConfig):
            problem = "is a group of keys: pass a dict of them"
        if problem is not None:
            raise InputError(f"method.{key}", value, problem)
        try:
            OmegaConf.update(config, f"method.{key}", value)
        except OmegaConfBaseException:
            raise InputError(f"method.{key}", value, "must be a number, text, bool, None or a list of them") from None
    node: DictConfig = config.method
    return node


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested options."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
