"""Names of the methods in ``conf/method``, so that a name typed in Python cannot stand for something else."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

EVICTION = "kvbench.methods.policies.eviction_method.EvictionMethod"


@cache
def parts_of(name: str) -> dict[str, str]:
    """{``scorer``, ``allocator``, ``schedule``: its name in the YAML ``conf/method/<name>.yaml``}; {}: no such file.

    A file that builds on another one has that one's parts where it names none.
    """
    text = _texts().get(name)
    if text is None:
        return {}
    base = re.search(r"^defaults:\n  - (\w+)$", text, re.MULTILINE)
    own = dict(re.findall(r"^  - (?:override )?(scorer|allocator|schedule): (\w+)$", text, re.MULTILINE))
    return (parts_of(base[1]) if base is not None else {}) | own


@cache
def token_methods() -> dict[str, bool]:
    """{name in ``conf/method``: whether its YAML has a policy that lets tokens leave}."""
    found, built_on = {}, {}
    for name, text in _texts().items():
        base = re.search(r"^defaults:\n  - (\w+)$", text, re.MULTILINE)
        found[name] = f"_target_: {EVICTION}\n" in text or re.search(r"^policy:\n", text, re.MULTILINE) is not None
        if base is not None:
            built_on[name] = base[1]
    return {name: found[built_on.get(name, name)] for name in found}


@cache
def _texts() -> dict[str, str]:
    """{name in ``conf/method``: text of its YAML}; only the command line knows YAML and Hydra."""
    found = files("kvbench.conf").joinpath("method").iterdir()
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in found if f.name.endswith(".yaml")}
