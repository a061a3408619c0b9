"""Overrides that cannot be applied: choices that no group has, and keys that no part has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig

from ...conf.errors import InputError, require
from ...conf.wording import one_of
from .checks import renamed_key, unknown_key
from .loader import OF_ANY_KEY, compose, packaged_choices


def check_choices(overrides: Sequence[str]) -> None:
    """Refuse values that cannot name a file of a group (``method=null``), on which Hydra's message is not useful."""
    options = packaged_choices()
    for override in overrides:
        key, _, value = override.partition("=")
        require(bool(key), key, value, "must be KEY=VALUE")
        is_optional = key in OF_ANY_KEY and value == "null"
        names = options.get(key.partition("@")[0])  # group@place
        if names and not is_optional and re.fullmatch(r"|null|true|false|[-+\d.][\d.e]*|\{.*", value):
            raise InputError(key, value, one_of(value, names))


def group_choices(overrides: Sequence[str]) -> list[str]:
    """The overrides that choose a file of a group; of a sweep's choices the first."""
    names = packaged_choices().keys()
    keys = [override.partition("=")[0].lstrip("+~").partition("@")[0] for override in overrides]
    chosen = [o for key, o in zip(keys, overrides, strict=True) if key in names and not o.startswith("-")]
    return [o.split(",")[0] for o in chosen if "(" not in o]


def unknown_override(overrides: Sequence[str]) -> str | None:
    """The message for the first override of a key that does not exist; None if all exist."""
    names = packaged_choices().keys()
    try:
        config = compose(group_choices(overrides))
    except HydraException:  # the choices themselves are wrong; Hydra's message names them
        return None
    for override in overrides:
        key, eq, _ = override.partition("=")
        if not eq or key in names or key.startswith(("+", "~", "-", "hydra")):
            continue
        problem = missing_key(config, key)
        if problem is not None:
            return f"{key}: {problem}"
    return None


def missing_key(config: DictConfig, key: str) -> str | None:
    """The message for a dotted key that does not exist, with the keys that do; None if it exists."""
    if (now := renamed_key(key)) is not None:
        return now
    node: Any = config
    path = key.split(".")
    if path[0] == "task" and "task" not in config and "workload" in config:
        return f"is workload.{'.'.join(path[1:])} now, with runner=efficiency"
    for depth, part in enumerate(path):
        if not isinstance(node, DictConfig) or part not in node.keys():  # noqa: SIM118 (`in` is False for a ??? value)
            known = {str(k): node._get_node(k) for k in node} if isinstance(node, DictConfig) else {}
            return unknown_key(known, ".".join(path[:depth]), part)
        node = node._get_node(part)
    return None
