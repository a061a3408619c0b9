"""Names of the methods in ``conf/method``, so that a name typed in Python cannot stand for something else."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

KEEPS_EVERYTHING = "kvbench.methods.policies.base.Selection"


@cache
def allocators() -> dict[str, str]:
    """{name in ``conf/method``: the allocator that its YAML names}."""
    named = {name: re.search(r"^  - allocator: (\w+)$", text, re.MULTILINE) for name, text in _texts().items()}
    return {name: match[1] for name, match in named.items() if match is not None}


@cache
def token_methods() -> dict[str, bool]:
    """{name in ``conf/method``: whether its YAML has a selection that lets tokens leave}.

    A file that builds on another one is as that one.
    """
    found, built_on = {}, {}
    for name, text in _texts().items():
        target = re.search(r"^selection:\n  _target_: (\S+)", text, re.MULTILINE)
        base = re.search(r"^defaults:\n  - (\w+)$", text, re.MULTILINE)
        found[name] = target is not None and target[1] != KEEPS_EVERYTHING
        if base is not None:
            built_on[name] = base[1]
    return {name: found[built_on.get(name, name)] for name in found}


@cache
def _texts() -> dict[str, str]:
    """{name in ``conf/method``: text of its YAML}; only the command line knows YAML and Hydra."""
    found = files("kvbench.conf").joinpath("method").iterdir()
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in found if f.name.endswith(".yaml")}
