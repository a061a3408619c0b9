"""Options: dataclass fields whose annotations declare the allowed values, and the function that checks them.

``window: PositiveInt = 32`` in a scorer makes ``SnapKV(window=0)`` raise ``InputError: method.scorer.window=0: must be
a whole number >= 1``. An int is also a number; a bool is not, and 2.0 is not a whole number. Fields of other types
(parts, tensors) are not checked.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, reduce
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from .errors import InputError
from .wording import as_typed, is_list, near

WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}


class Constraint(ABC):
    """Metadata of ``typing.Annotated``: a condition on the values of a type."""

    @abstractmethod
    def holds(self, value: Any) -> bool:
        """Return whether a value of the type is allowed."""

    @abstractmethod
    def words(self, kind: str) -> str:
        """Return the allowed values in words, for a message; ``kind`` is the type in words."""


@dataclass(frozen=True)
class Bounds(Constraint):
    """Bounds of a number: ``ge`` and ``le`` are inclusive, ``gt`` and ``lt`` exclusive."""

    ge: float = -math.inf
    le: float = math.inf
    gt: float = -math.inf
    lt: float = math.inf

    def holds(self, value: Any) -> bool:
        return bool(self.ge <= value <= self.le and (self.gt < value < self.lt))

    def words(self, kind: str) -> str:
        if math.isfinite(self.ge) and math.isfinite(self.le):
            return f"{kind} between {self.ge} and {self.le}"
        limits = {">=": self.ge, "above": self.gt, "at most": self.le, "below": self.lt}
        return f"{kind} " + " and ".join(f"{sign} {limit}" for sign, limit in limits.items() if math.isfinite(limit))


@dataclass(frozen=True, eq=False)
class OneOf(Constraint):
    """Allowed values that a ``Literal`` cannot list, such as the keys of a mapping."""

    options: Iterable[Any]

    def holds(self, value: Any) -> bool:
        return any(type(value) is type(option) and value == option for option in self.options)

    def words(self, kind: str) -> str:
        return f"one of {', '.join(map(str, sorted(self.options)))}"


@dataclass(frozen=True)
class Wording(Constraint):
    """Description of the allowed values, for a message; with ``pattern``, a text must match it as a whole."""

    text: str
    pattern: str = ""

    def holds(self, value: Any) -> bool:
        return not self.pattern or re.fullmatch(self.pattern, value, re.DOTALL) is not None

    def words(self, kind: str) -> str:
        return self.text


@dataclass(frozen=True)
class Entries(Constraint):
    """A list of at least one entry; without duplicates if ``differ``."""

    differ: bool = False

    def holds(self, value: Any) -> bool:
        return len(value) > 0 and not (self.differ and len(set(value)) < len(value))

    def words(self, kind: str) -> str:
        return f"{kind} (at least one{', none twice' if self.differ else ''})"


PositiveInt = Annotated[int, Bounds(ge=1)]
NonNegativeInt = Annotated[int, Bounds(ge=0)]
PositiveFloat = Annotated[float, Bounds(gt=0)]
NonNegativeFloat = Annotated[float, Bounds(ge=0)]
Share = Annotated[float, Bounds(ge=0, le=1)]
Text = Annotated[str, Wording("text that is not blank", r".*\S.*")]


class Options:
    """A dataclass whose fields are keys of the configuration, checked at construction."""

    key_prefix: ClassVar[str] = ""
    """Prefix of the fields' keys (``method.scorer.``); declared by each family of parts."""
    other_keys: ClassVar[Mapping[str, str]] = {}
    """Field -> its key, if that is not the prefix and the field's name."""

    def __post_init__(self) -> None:
        """Raise InputError unless every field has an allowed value."""
        for name, hint in field_types(type(self)).items():  # type: ignore[arg-type]  # mypy: a class is not Hashable
            check(getattr(self, name), self.other_keys.get(name, self.key_prefix + name), hint)


def argument_names(part: Options) -> list[str]:
    """Return the names of a part's arguments; a part without options need not be a dataclass.

    Raises:
        InputError: The class declares options and is no dataclass.
    """
    cls = type(part)
    options = [name for name, hint in inspect.get_annotations(cls).items() if "ClassVar" not in str(hint)]
    if options and "__dataclass_fields__" not in vars(cls):
        problem = f"declares {', '.join(options)}: write @dataclass(frozen=True) above the class"
        raise InputError(part.key_prefix.rstrip("."), cls.__name__, problem)
    return [field.name for field in fields(part) if field.init] if is_dataclass(part) else []


@cache
def field_types(cls: type, include_extras: bool = True) -> Mapping[str, Any]:
    """Return the resolved annotations of init fields; skips names that exist only under TYPE_CHECKING."""
    types: dict[str, Any] = {}
    for field in fields(cls):
        owner = next(base for base in cls.__mro__ if field.name in inspect.get_annotations(base))
        annotation = SimpleNamespace(__annotations__={field.name: inspect.get_annotations(owner)[field.name]})
        try:
            if field.init:
                types |= get_type_hints(annotation, vars(sys.modules[owner.__module__]), None, include_extras)
        except NameError:
            continue
    return types


def check(value: Any, key: str, hint: Any) -> None:
    """Raise InputError, with the allowed values in words, unless a value fits an annotation."""
    if fits(value, hint):
        return
    options = _options(hint)
    unknown = [entry for entry in value if entry not in options] if is_list(value) and options else []
    if unknown:  # in a list of choices the message names the first one that is not allowed
        value, hint = unknown[0], Annotated[Any, OneOf(options)]
    problem = f"must be {in_words(hint)}{near(value, map(str, options)) if isinstance(value, str) else ''}"
    if isinstance(value, int | float) and fits(as_typed(value), hint):
        problem += f"; for this text write '{key}=\"{as_typed(value)}\"'"
    raise InputError(key, as_typed(value), problem)


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value fits an annotation and its constraints; True for types that are not checked."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(value, args[0]) and all(c.holds(value) for c in args[1:])
    if origin in (Union, UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return OneOf(args).holds(value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return is_list(value) and all(fits(entry, args[0]) for entry in value)
    if hint in (int, float):
        is_number = isinstance(value, int) or (hint is float and isinstance(value, float) and math.isfinite(value))
        return is_number and not isinstance(value, bool)
    return hint not in WORDS or isinstance(value, hint)


def in_words(hint: Any) -> str:
    """Return the values that an annotation allows, in words: ``a whole number >= 1, or null``."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return reduce(lambda words, constraint: constraint.words(words), args[1:], in_words(args[0]))
    if origin in (Union, UnionType):
        return ", or ".join(in_words(arg) for arg in args if not (arg is int and float in args))  # float includes int
    if origin is Literal:
        return OneOf(args).words("")
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list, each {in_words(args[0])}"
    return WORDS.get(hint, str(hint))


def _options(hint: Any) -> Sequence[Any]:
    """Return the values that an annotation lists."""
    if isinstance(hint, OneOf):
        return list(hint.options)
    if get_origin(hint) is Literal:
        return get_args(hint)
    return [option for arg in get_args(hint) for option in _options(arg)]
