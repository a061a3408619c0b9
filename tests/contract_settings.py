"""Settings of methods in the test suites, and which cases of them are slow."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from importlib.resources import files
from typing import Any

import pytest


def own_settings(name: str) -> dict[str, str]:
    """A method's settings in the suites, from the line ``# contract tests: key=value ...`` of its YAML.

    Budgets there are 40 of prompts of 13 to 70 tokens, which a method's defaults may not allow.
    """
    text = files("kvbench.conf").joinpath("method", f"{name}.yaml").read_text()
    found = re.search(r"^# contract tests: (.*)$", text, re.MULTILINE)
    return {} if found is None else dict(setting.split("=") for setting in found[1].split())


def marked_slow(texts: Iterable[Any], slow: Collection[Any], *values: object) -> list:
    """Parameters of a test: each text, or other value, with ``values``; those in ``slow`` only run with ``-m slow``."""
    return [pytest.param(text, *values, marks=pytest.mark.slow if text in slow else ()) for text in texts]


def every_nth(n: int, values: Iterable[Any]) -> list:
    """Parameters of a test: values, or tuples of values; all but each ``n``-th only run with ``-m slow``."""
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*row, marks=() if i % n == 0 else pytest.mark.slow) for i, row in enumerate(rows)]
