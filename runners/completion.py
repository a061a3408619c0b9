"""``kvbench completion SHELL``: a script with which Tab completes commands, groups, choices and keys.

The script asks ``kvbench completion SHELL --candidates LINE`` what may follow the line; nothing heavy is imported for
the answer.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

BASH = """\
_kvbench_complete() {
    local line="${COMP_LINE:0:COMP_POINT}" IFS=$'\\n'
    local word="${line##* }" start=""
    COMPREPLY=($(command kvbench completion bash --candidates "$line" 2>/dev/null))
    # Where bash ends a word at "=", only what is behind the last one is replaced.
    if [[ "$COMP_WORDBREAKS" == *=* && "$word" == *=* ]]; then
        start="${word%"${word##*=}"}"
        COMPREPLY=("${COMPREPLY[@]#"$start"}")
    fi
}
complete -o nospace -o default -F _kvbench_complete kvbench
"""
ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n" + BASH
FISH = "complete --command kvbench --no-files --arguments '(kvbench completion fish --candidates (commandline -cp))'\n"
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the script of a shell, or what may follow a line."""
    parser = argparse.ArgumentParser(
        "kvbench completion", description='Tab completion: eval "$(kvbench completion bash)" in ~/.bashrc'
    )
    parser.add_argument("shell", choices=SCRIPTS)
    parser.add_argument("--candidates", metavar="LINE", help="print what may follow this line, one word a line")
    args = parser.parse_args(argv)
    if args.candidates is None:
        print(SCRIPTS[args.shell], end="")
    else:
        print("\n".join(candidates(args.candidates)))
    return 0


def candidates(line: str) -> list[str]:
    """Words that may stand where a line ends, in place of its last, incomplete word.

    A word that is complete ends with a blank; one that goes on ends with ``=``, ``.`` or ``,``'s next choice.
    """
    from .command import COMMANDS

    try:
        words = shlex.split(line)
    except ValueError:  # inside a quotation
        return []
    word = "" if not line or line[-1].isspace() else words.pop()
    if len(words) < 2:
        return [f"{name} " for name in COMMANDS if name.startswith(word)] if words else []
    return sorted(_overrides(words[2:], word)) if words[1] == "run" else []


def _overrides(before: Sequence[str], word: str) -> Iterator[str]:
    """Overrides of ``kvbench run`` that begin with ``word``."""
    from .config.loader import groups

    prefix = word[: len(word) - len(word.lstrip("+~"))]
    key, equals, value = word[len(prefix) :].partition("=")
    options = {
        group: [path.name.removesuffix(".yaml") for path in paths] for group, paths in groups(files("kvbench.conf"))
    }
    if equals:
        done, comma, last = value.rpartition(",")
        choices = options.get(key.partition("@")[0]) or _values(before, key)
        yield from (f"{prefix}{key}={done}{comma}{c}{'' if comma else ' '}" for c in choices if c.startswith(last))
        return
    yield from (f"{prefix}{group}=" for group in options if group.startswith(key))
    yield from (f"{prefix}{name}" for name in _keys(_composed(before), key))


def _composed(before: Sequence[str]) -> dict[str, Any]:
    """The configuration with the overrides so far; without them where they cannot be applied."""
    from .config.loader import compose, plain_data

    overrides = [o for o in before if "=" in o and not o.startswith(("-", "hydra"))]
    for tried in (overrides, []):
        try:
            composed = compose(tried)
        except Exception:  # an override that is wrong, or a sweep of several choices
            continue
        return {str(key): plain_data(composed, str(key)) for key in composed}
    return {}


def _keys(config: Any, key: str, above: str = "") -> Iterator[str]:
    """Keys that begin with ``key``: those of one level, ending with ``.`` where there is a level below, else ``=``."""
    first, dot, rest = key.partition(".")
    if not isinstance(config, dict):
        return
    if dot:
        yield from _keys(config.get(first), rest, f"{above}{first}.")
        return
    for name, value in config.items():
        if name.startswith(first) and name != "_target_":
            yield f"{above}{name}{'.' if isinstance(value, dict) else '='}"


def _values(before: Sequence[str], key: str) -> list[str]:
    """Values of a key that is switched on or off; the default of any other."""
    node: Any = _composed(before)
    for name in key.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    if isinstance(node, bool):
        return ["false", "true"]
    return [] if node is None or isinstance(node, dict | list) else [str(node)]
