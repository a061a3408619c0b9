"""Methods by name: as a text or a mapping in the configuration, or as keywords of the Python API."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import hydra
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ...conf.errors import InputError, require
from ...conf.wording import as_typed, one_of
from ...methods.cache.method import Method
from ..runner import PairedRunner, Runner
from .choices import check_choices, missing_key, unknown_override
from .errors import USER_ERRORS, causes, first_input_error, input_error_line
from .loader import compose, config_loader, packaged_choices, plain_data
from .parts import build


def named_method(text: str) -> Method:
    """The method of a text like ``"streaming_llm budget=256 policy.sinks=0"`` or ``"snapkv storage=kivi4"``."""
    return build(_named(text), "method", Method)


def methods_of(runner: Runner, config: DictConfig) -> list[Method]:
    """Return the methods of a run: the requested one at each budget, then those it is paired with.

    Args:
        config: Configuration of the requested method.
    """
    methods = [build(config, "method", Method)]
    if not isinstance(runner, PairedRunner):
        return methods
    if runner.budgets is not None:
        methods = [with_budget(config, budget) for budget in runner.budgets]
    for entry in runner.pair_with:
        methods += paired_methods(plain_data(entry), runner.budgets)
    return list({str(m.identity()): m for m in methods}.values())


def paired_methods(entry: str | Mapping[str, Any], budgets: Sequence[float] | None) -> list[Method]:
    """The methods that an entry of ``runner.pair_with`` names.

    Args:
        entry: A text as for :func:`named_method`, or a mapping with ``method`` (its name), optionally ``budgets``, and
            the options of :func:`configured_method`.
        budgets: ``runner.budgets``, for a method that has a budget and whose entry names none.
    """
    own: list[float] | None = None
    try:
        if isinstance(entry, str):
            config = _named(entry)
            has_budget = any(setting.startswith("budget=") for setting in entry.split())
        else:
            config, own = _mapped(entry)
            has_budget = "budget" in entry
        if own is not None:
            return [with_budget(config, budget, "budgets") for budget in own]
        if budgets is not None and not has_budget and config.get("budget") is not None:
            return [with_budget(config, budget) for budget in budgets]
        return [build(config, "method", Method)]
    except USER_ERRORS as error:
        cause, line = first_input_error(error), input_error_line(error)
        if line is None or (cause is not None and cause.key in ("runner.budgets", "runner.pair_with")):
            raise
        raise InputError("runner.pair_with", as_typed(entry), line) from error


def _mapped(entry: Mapping[str, Any]) -> tuple[DictConfig, list[float] | None]:
    """The configuration of a method that is given as a mapping, and its own budgets."""
    options, shown = dict(entry), as_typed(entry)
    name, budgets = options.pop("method", None), options.pop("budgets", None)
    require(isinstance(name, str), "runner.pair_with", shown, "must name a method: {method: snapkv, budget: 128}")
    is_one = budgets is None or "budget" not in options
    require(is_one, "runner.pair_with", shown, "has both budget and budgets: give one")
    is_list = budgets is None or (isinstance(budgets, list) and bool(budgets))
    require(is_list, "runner.pair_with", shown, "budgets must be a list: {method: snapkv, budgets: [128, 256]}")
    return _configured(name, options), budgets


def _named(text: str) -> DictConfig:
    """The configuration of a method that is given as text."""
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


def with_budget(method: DictConfig, budget: float, key: str = "runner.budgets") -> Method:
    """The method of a configuration, with a budget of the list ``key``, which an error names."""
    copy = method.copy()
    copy.budget = budget
    try:
        return build(copy, "method", Method)
    except InputError as error:
        if error.key != "method.budget":
            raise
        raise InputError(key, budget, error.allowed) from error


def configured_method(name: str, options: Mapping[str, Any]) -> Method:
    """``("snapkv", {"budget": 256, "storage": "kivi4", "scorer": {"window": 16}})`` -> that method.

    Raises:
        InputError: There is no such method or key, or the value cannot be used.
    """
    config = _configured(name, options)
    try:
        method: Method = build(config, "method", Method)
    except OmegaConfBaseException as error:
        raise InputError("method", name, str(error).split("\n")[0]) from None
    return method


def _configured(name: str, options: Mapping[str, Any]) -> DictConfig:
    """The configuration of a method that is given by its name and nested options."""
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
