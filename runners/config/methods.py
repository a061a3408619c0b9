"""Methods by name: as a text or a mapping in the configuration, or as keywords of the Python API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ...conf.errors import InputError
from ...methods.cache.method import Method
from ..runner import PairedRunner, Runner
from .loader import plain_data
from .method_configs import (
    BUDGETS,
    configured_config,
    errors_of_budget,
    errors_of_entry,
    named_config,
    paired_configs,
    with_budget,
)
from .parts import build


def named_method(text: str) -> Method:
    """The method of a text like ``"streaming_llm budget=256 policy.sinks=0"`` or ``"snapkv storage=kivi4"``."""
    return _build(named_config(text))


def methods_of(runner: Runner, config: DictConfig) -> list[Method]:
    """Return the methods of a run: the requested one at each budget, then those it is paired with.

    Args:
        config: Configuration of the requested method.
    """
    methods = [_build(config)]
    if not isinstance(runner, PairedRunner):
        return methods
    if runner.budgets is not None:
        methods = [_build(with_budget(config, budget), BUDGETS) for budget in runner.budgets]
    for entry in runner.pair_with:
        methods += paired_methods(plain_data(entry), runner.budgets)
    return list({str(m.identity()): m for m in methods}.values())


def paired_methods(entry: str | Mapping[str, Any], budgets: Sequence[float] | None) -> list[Method]:
    """Return the methods that an entry of ``runner.pair_with`` names; see :func:`.method_configs.paired_configs`."""
    with errors_of_entry(entry):
        return [_build(config, list_key) for config, list_key in paired_configs(entry, budgets)]


def _build(config: DictConfig, list_key: str | None = None) -> Method:
    with errors_of_budget(list_key):
        method: Method = build(config, "method", Method)
    return method


def configured_method(name: str, options: Mapping[str, Any]) -> Method:
    """``("snapkv", {"budget": 256, "storage": "kivi4", "scorer": {"window": 16}})`` -> that method.

    Raises:
        InputError: There is no such method or key, or the value cannot be used.
    """
    config = configured_config(name, options)
    try:
        return _build(config)
    except OmegaConfBaseException as error:
        raise InputError("method", name, str(error).split("\n")[0]) from None
