"""``kvbench run --help``, read from the comments of the YAML files."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable

from omegaconf import DictConfig, OmegaConf

from .loader import groups


def help_text() -> str:
    """The groups with their choices, and the keys of the default choices; all read from the YAML files' comments."""
    root = files("kvbench.conf")
    # The launcher is Hydra's group and not part of the experiment, so it is listed last.
    by_group = sorted(groups(root), key=lambda group: group[0].startswith("hydra/"))
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
    lines.append("\nKeys")
    for path, prefix in [("config.yaml", ""), *_defaults(root)]:
        rows = list(documented_keys(root.joinpath(path).read_text(encoding="utf-8"), prefix))
        if rows:
            lines.append(f"\n{prefix.rstrip('.') or 'top level'} ({path})")
            width = max(len(key) for key, _ in rows)
            lines += [f"  {key:<{width}}  {comment}" for key, comment in rows]
    lines.append("\nkvbench run --cfg job prints the whole configuration of a command without running it;")
    lines.append("kvbench run --cfg hydra -p hydra.launcher hydra/launcher=submitit_slurm prints a launcher's keys.")
    return "\n".join(lines)


def _defaults(root: Traversable) -> Iterator[tuple[str, str]]:
    """(YAML file, key prefix) of the choices that a bare ``kvbench run`` makes."""
    for entry in OmegaConf.create(root.joinpath("config.yaml").read_text(encoding="utf-8")).defaults:
        if isinstance(entry, DictConfig):
            ((group, choice),) = entry.items()
            if isinstance(group, str) and choice is not None and " " not in group:  # not "override ..."
                yield f"{group}/{choice}.yaml", f"{group}."


def documented_keys(text: str, prefix: str) -> Iterator[tuple[str, str]]:
    """(key, "value   comment") of each YAML line that carries a comment."""
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
            yield prefix + ".".join([name for _, name in parents] + [key]), f"[{value.strip()}] {comment.strip()}"
        parents.append((indent, key))
