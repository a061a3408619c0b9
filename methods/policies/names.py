"""Methods in ``conf/method`` and their parts, to check that a method built in Python matches its name."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

EVICTION = "kvbench.methods.policies.eviction_method.EvictionMethod"
BASE = re.compile(r"^defaults:\n  - (\w+)(?: #.*)?$", re.MULTILINE)
PART = re.compile(r"^  - (?:override )?(scorer|allocator|schedule): (\w+)(?: #.*)?$", re.MULTILINE)
"""The file on which a YAML builds, and a part that it chooses, each with the comment that says whose choice it is."""


@cache
def parts_of(name: str) -> dict[str, str]:
    """Return the scorer, allocator and schedule in ``conf/method/<name>.yaml``, and in the file on which it builds.

    Returns:
        {``scorer``, ``allocator`` or ``schedule``: its name}; empty if there is no such file.
    """
    text = _texts().get(name)
    if text is None:
        return {}
    base = BASE.search(text)
    return (parts_of(base[1]) if base is not None else {}) | dict(PART.findall(text))


@cache
def token_methods() -> dict[str, bool]:
    """Return {name in ``conf/method``: whether its policy evicts tokens}."""
    evicts, bases = {}, {}
    for name, text in _texts().items():
        base = BASE.search(text)
        evicts[name] = f"_target_: {EVICTION}\n" in text or re.search(r"^policy:\n", text, re.MULTILINE) is not None
        if base is not None:
            bases[name] = base[1]
    return {name: evicts[bases.get(name, name)] for name in evicts}


@cache
def _texts() -> dict[str, str]:
    """Return {name in ``conf/method``: text of its YAML}; searched as text, since only the CLI depends on Hydra."""
    paths = files("kvbench.conf").joinpath("method").iterdir()
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in paths if f.name.endswith(".yaml")}
