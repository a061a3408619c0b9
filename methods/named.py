"""Names of the methods in ``conf/method``, so that a name typed in Python cannot stand for something else."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

KEEPS_EVERYTHING = "kvbench.methods.selection.base.Selection"


@cache
def allocators() -> dict[str, str]:
    """{name in ``conf/method``: the allocator that its YAML names}."""
    found = {}
    for file in files("kvbench.conf").joinpath("method").iterdir():
        if file.name.endswith(".yaml"):
            named = re.search(r"^  - allocator: (\w+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            if named is not None:
                found[file.name.removesuffix(".yaml")] = named[1]
    return found


@cache
def token_methods() -> dict[str, bool]:
    """{name in ``conf/method``: whether its YAML has a selection that lets tokens leave}.

    Read as text, because only the command line knows YAML and Hydra; a file that builds on another one is as that one.
    """
    found, built_on = {}, {}
    for file in files("kvbench.conf").joinpath("method").iterdir():
        name, _, ending = file.name.rpartition(".")
        if ending != "yaml":
            continue
        text = file.read_text(encoding="utf-8")
        target = re.search(r"^selection:\n  _target_: (\S+)", text, re.MULTILINE)
        base = re.search(r"^defaults:\n  - (\w+)$", text, re.MULTILINE)
        found[name] = target is not None and target[1] != KEEPS_EVERYTHING
        if base is not None:
            built_on[name] = base[1]
    return {name: found[built_on.get(name, name)] for name in found}
