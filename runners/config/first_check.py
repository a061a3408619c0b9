"""First check of a command: every value against its declared type, before the classes are imported with torch.

It takes a fraction of a second where that import takes several. What only a class itself knows, such as a window that
does not fit the budget, is checked when the part is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from ...conf.wording import is_list
from .checks import check_value
from .declared import declared_types
from .loader import plain_data
from .method_configs import BUDGETS, errors_of_budget, errors_of_entry, paired_configs, with_budget

SETTINGS = "kvbench.runners.config.settings.Settings"
"""Class of the top-level keys."""
PAIRED_RUNNERS = ("kvbench.runners.accuracy.AccuracyRunner", "kvbench.runners.efficiency.EfficiencyRunner")
"""Runners whose ``budgets`` and ``pair_with`` name methods."""


def check_declared_values(config: DictConfig) -> None:
    """Refuse every value of a composed configuration that the class it is for does not allow.

    Raises:
        InputError: The value does not fit the annotation.
    """
    plain = plain_data(config)
    _check_part({**plain, "_target_": SETTINGS}, "")
    runner = plain.get("runner")
    if "method" not in plain or not isinstance(runner, Mapping) or runner.get("_target_") not in PAIRED_RUNNERS:
        return
    budgets = _as_list(runner.get("budgets"))
    for budget in budgets or []:
        _check_method(with_budget(config.method, budget), BUDGETS)
    for entry in _as_list(runner.get("pair_with")) or []:
        with errors_of_entry(entry):
            for method, list_key in paired_configs(entry, budgets):
                _check_method(method, list_key)


def _check_method(method: DictConfig, list_key: str | None) -> None:
    with errors_of_budget(list_key):
        _check_part(plain_data(method), "method")


def _check_part(values: Any, key: str) -> None:
    """Check the values at a key and of the parts in it; classes that are not kvbench's are checked when built."""
    target = values.get("_target_")
    types = declared_types(target) if isinstance(target, str) and target.startswith("kvbench.") else {}
    prefix = f"{key}." if key else ""
    for name in (name for name in values if name in types):
        check_value(values[name], prefix + name, types[name])
    for name, value in values.items():
        if isinstance(value, Mapping) and "_target_" in value:
            _check_part(value, prefix + name)


def _as_list(value: Any) -> Any:
    """Return a single value as a list of one; None stays None."""
    return value if value is None or is_list(value) else [value]
