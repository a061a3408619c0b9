"""Values and names as error messages and help show them."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def one_of(value: str, options: Iterable[str], what: str = "one of") -> str:
    """``"must be one of a, b, c; did you mean b?"`` for an unknown name, nearest names first."""
    names = sorted(options)
    return f"must be {what} {', '.join(names)}{near(value, names)}"


def near(value: str, options: Iterable[str]) -> str:
    """``"; did you mean b?"``, or nothing where no option is like ``value``."""
    found = difflib.get_close_matches(str(value), list(options), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(found)}?" if found else ""


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
