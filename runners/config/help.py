"""``kvbench run --help``: the comments of the YAML files, and the annotations of the classes that they name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf

from ...conf.wording import as_typed
from .choices import group_choices
from .declared import allowed_values
from .first_check import SETTINGS
from .loader import OF_ANY_KEY, config_loader, groups

FOLDER = "--config-dir"


@dataclass(frozen=True)
class Key:
    """A documented key of the configuration.

    Attributes:
        name: Dotted key, as it is typed.
        default: Its value, as it is typed.
        allowed: Allowed values in words; empty if they are not declared.
        meaning: Comment in the YAML file.
    """

    name: str
    default: str
    allowed: str
    meaning: str


def help_text(arguments: Sequence[str] = ()) -> str:
    """Return the keys of the groups chosen in a command's arguments; without one, all groups and the default keys.

    Raises:
        HydraException: A choice does not exist.
    """
    chosen = group_choices(arguments)
    lines = [] if chosen else _catalogue()
    wanted = [choice.partition("=")[0].partition("@")[0] for choice in chosen]
    for title, keys in documented_choices(chosen, _own_folder(arguments)):
        group = title.rpartition("/")[0]
        if keys and (not chosen or any(f"{group}/".startswith(f"{name}/") for name in wanted)):
            lines.append(f"\n{keys[0].name.rpartition('.')[0] or 'top level'} ({title})")
            width = max(len(key.name) for key in keys)
            for key in keys:
                default = ", ".join(filter(None, (key.default, key.allowed)))
                lines.append(f"  {key.name:<{width}}  [{default}] {key.meaning}")
    lines.append("\nkvbench run --cfg job prints the whole configuration of a command without running it;")
    if chosen:
        lines.append("kvbench run --help lists the groups and their choices.")
    else:
        lines.append("kvbench run GROUP=CHOICE --help the keys of a choice, as in kvbench run method=h2o --help;")
        lines.append("kvbench run --cfg hydra -p hydra.launcher hydra/launcher=submitit_slurm a launcher's keys.")
    return "\n".join(lines).lstrip("\n")


def _catalogue() -> list[str]:
    # The launcher is Hydra's group and not part of the experiment, so it is listed last.
    by_group = sorted(groups(files("kvbench.conf")), key=lambda group: group[0].startswith("hydra/"))
    lines = [
        "kvbench run GROUP=CHOICE ... KEY=VALUE ...      (python run.py takes the same)",
        "",
        "  kvbench run method=snapkv method.budget=512 task=longbench task.limit=5",
        "  kvbench run method=snapkv 'runner.budgets=[128,256,512]'     several budgets on one prefill",
        "  kvbench run -m method=full,snapkv,streaming_llm              one run after another",
        "",
        "Groups and their choices",
    ]
    for group, options in by_group:
        lines.append(f"\n{group}=")
        width = max(len(o.name) for o in options) - len(".yaml")
        for option in options:
            first = option.read_text(encoding="utf-8").removeprefix("# @package _global_\n").splitlines()[0]
            lines.append(f"  {option.name.removesuffix('.yaml'):<{width}}  {first.lstrip('# ')}")
    return [*lines, "\nKeys: [default, allowed values] meaning"]


def _own_folder(arguments: Sequence[str]) -> Path | None:
    """Return the folder of ``--config-dir``."""
    for argument, following in itertools.pairwise([*arguments, ""]):
        name, eq, value = argument.partition("=")
        if name == FOLDER:
            return Path(value if eq else following).absolute()
    return None


def documented_choices(choices: Sequence[str], own_folder: Path | None = None) -> Iterator[tuple[str, list[Key]]]:
    """Return the documented keys of a configuration, for each YAML file in the order of the composition.

    Args:
        choices: Overrides of groups, ``method=h2o``.
        own_folder: Folder of the user's YAML files, searched first.

    Yields:
        (name of the file; the keys that it sets last).
    """
    search = [] if own_folder is None else [f"hydra.searchpath=['file://{own_folder}']"]
    with config_loader():
        config = hydra.compose("config", overrides=[*choices, *search], return_hydra_config=True)
    chosen = {str(group): choice for group, choice in config.hydra.runtime.choices.items() if choice is not None}
    plain: Any = OmegaConf.to_container(config, resolve=False)
    roots: list[Traversable] = [*([] if own_folder is None else [own_folder]), files("kvbench.conf")]
    rows: dict[str, tuple[str, Key]] = {}
    names = ["config.yaml"]
    # The file of a group comes after those of the groups below it, whose keys it may set, and those of any key at last.
    for group in sorted(chosen, key=lambda name: (name in OF_ANY_KEY, -name.count("/"))):
        if not group.startswith("hydra"):
            names += _with_bases(f"{group.partition('@')[0]}/{chosen[group]}.yaml", roots)
    for name in names:
        group = next((g for g in chosen if name == f"{g.partition('@')[0]}/{chosen[g]}.yaml"), name.rpartition("/")[0])
        package = group.partition("@")[2] or group.replace("/", ".")
        prefix = f"{package}." if package not in ("", *OF_ANY_KEY) else ""
        for key, _, meaning in documented_keys(_text(name, roots), prefix):
            value, allowed = value_and_allowed(plain, key)
            rows.pop(key, None)
            rows[key] = (name, Key(key, as_typed(value), allowed, meaning))
    for name in names:
        yield name, [key for file, key in rows.values() if file == name]


def value_and_allowed(plain: Mapping[str, Any], key: str) -> tuple[Any, str]:
    """Return the value of a dotted key of a configuration, and what its class allows, in words."""
    *parents, name = key.split(".")
    node: Any = plain
    for parent in parents:
        node = node[parent]
    target = node.get("_target_", "" if parents else SETTINGS)
    return node.get(name), allowed_values(target).get(name, "") if target else ""


def _text(name: str, roots: Sequence[Traversable]) -> str:
    return next(path.read_text(encoding="utf-8") for root in roots if (path := root.joinpath(name)).is_file())


def _with_bases(name: str, roots: Sequence[Traversable]) -> list[str]:
    """Return the name of a YAML file after those of the files of its group on which it builds."""
    bases = re.findall(r"^  - (\w+)(?: #.*)?$", _text(name, roots), re.MULTILINE)
    folder = name.rpartition("/")[0]
    found = [_with_bases(f"{folder}/{base}.yaml", roots) for base in bases if base != "_self_"]
    return [*itertools.chain(*found), name]


def documented_keys(text: str, prefix: str) -> Iterator[tuple[str, str, str]]:
    """(key, value, comment) of each YAML line that carries a comment."""
    parents: list[tuple[int, str]] = []
    for line in text.splitlines():
        stripped = line.strip()
        if not stripped or stripped.startswith(("#", "-")) or ":" not in stripped:
            continue
        indent = len(line) - len(line.lstrip())
        while parents and parents[-1][0] >= indent:
            parents.pop()
        key, _, rest = stripped.partition(":")
        value, _, comment = rest.partition(" #")
        if comment:
            yield prefix + ".".join([name for _, name in parents] + [key]), value.strip(), comment.strip()
        parents.append((indent, key))
