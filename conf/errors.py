"""What a user sees when a value cannot be used: the key, the value, and what is allowed, in one line.

Every room may import this module; it imports nothing of the project.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class InputError(ValueError):
    """A config value, a file or a download that cannot be used.

    The command line prints ``str(error)`` on one line and exits with status 2; nothing is half-written.

    Args:
        key: the config key (``method.budget``) or the file with its line (``qasper.jsonl:12``).
        value: what was found there.
        allowed: what would work, as a phrase that completes "must be ..." or a whole sentence.
    """

    def __init__(self, key: str, value: object, allowed: str):
        self.key, self.value, self.allowed = key, value, allowed
        super().__init__(" ".join(f"{key}={value}: {allowed}".split()))

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:  # it crosses from a measuring process to its parent
        return type(self), (self.key, str(self.value), self.allowed)


def one_of(value: str, options: Iterable[str], what: str = "one of") -> str:
    """``"must be one of a, b, c; did you mean b?"`` for an unknown name, nearest names first."""
    names = sorted(options)
    return f"must be {what} {', '.join(names)}{near(value, names)}"


def near(value: str, options: Iterable[str]) -> str:
    """``"; did you mean b?"``, or nothing where no option is like ``value``."""
    found = difflib.get_close_matches(str(value), list(options), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raise :class:`InputError` unless ``condition`` holds."""
    if not condition:
        raise InputError(key, value, allowed)


def is_list(value: Any) -> bool:
    """Whether a value is a list or another sequence that is no text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def as_typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if is_list(value):
        return f"[{','.join(map(as_typed, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{k}:{as_typed(v)}' for k, v in value.items())}}}"
    return str(value)
