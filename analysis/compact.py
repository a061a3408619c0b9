"""Records as a structure, which many of them have in common, and their values.

    program, values = pack(record, refer)
    record = Structure(program).build(...)
    record = LazyRecord(some_fields, lambda: Structure(program).build(...))

JSON repeats the name of every field in every record, and writes a number with 17 digits: reading it takes most of the
time of a large folder. Here a structure is a program: a list of steps, each of which makes one mapping or list from the
values that are there; numbers are an array.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

Slot = tuple[str, int]
"""Kind of a value (:data:`KINDS`) and its number among those."""
KINDS = ("number", "part", "other", "made")
"""Floats; values that records share; all other values that are no container; results of earlier steps."""


@dataclass(slots=True)
class Values:
    """Values of one record, in the order in which its structure names them.

    Attributes:
        numbers: Floats.
        parts: References to values that records share.
        others: Whole numbers, texts, truth values, null, and lists of these.
    """

    numbers: array[float] = field(default_factory=lambda: array("d"))
    parts: list[str] = field(default_factory=list)
    others: list[Any] = field(default_factory=list)


def pack(record: Mapping[str, Any], refer: Callable[[tuple[str, ...], Any], str | None]) -> tuple[list[Any], Values]:
    """Return the steps that make a record, as JSON can hold them, and its values.

    Args:
        record: A mapping of values that JSON can hold.
        refer: Given the names of the fields that lead to a value, and the value: stores what records share and returns
            a reference to it, without white space; None for all other values.
    """
    values = Values()
    steps: list[tuple[list[str] | None, list[Slot]]] = []
    _slot(dict(record), (), values, steps, refer)
    sizes = (len(values.numbers), len(values.parts), len(values.others))
    first = dict(zip(KINDS, (0, sizes[0], sizes[0] + sizes[1], sum(sizes)), strict=True))
    return [[names, [first[kind] + number for kind, number in slots]] for names, slots in steps], values


def _slot(
    value: Any,
    path: tuple[str, ...],
    values: Values,
    steps: list[tuple[list[str] | None, list[Slot]]],
    refer: Callable[[tuple[str, ...], Any], str | None],
) -> Slot:
    """Add a value to ``values``, or the steps that make it to ``steps``, and return its slot."""
    reference = refer(path, value)
    if reference is not None:
        values.parts.append(reference)
        return "part", len(values.parts) - 1
    if type(value) is float:
        values.numbers.append(value)
        return "number", len(values.numbers) - 1
    if isinstance(value, dict) and value:
        steps.append((list(value), [_slot(v, (*path, name), values, steps, refer) for name, v in value.items()]))
    elif isinstance(value, list) and any(type(inner) in (float, dict, list) for inner in value):
        steps.append((None, [_slot(v, (*path, ""), values, steps, refer) for v in value]))
    else:
        values.others.append(value)
        return "other", len(values.others) - 1
    return "made", len(steps) - 1


class Structure:
    """Makes records of one structure.

    Args:
        program: As :func:`pack` returns it.
    """

    def __init__(self, program: Any) -> None:
        self._steps = [(None if names is None else tuple(names), _getter(places)) for names, places in program]

    def build(self, values: list[Any]) -> dict[str, Any]:
        """Return the record.

        Args:
            values: Numbers, shared values and others, one after the other; results of steps are appended to it.
        """
        for names, get in self._steps:
            found = get(values)
            values.append(list(found) if names is None else dict(zip(names, found)))  # noqa: B905 (strict is slow)
        made: dict[str, Any] = values[-1]
        return made


def _getter(places: list[int]) -> Callable[[list[Any]], tuple[Any, ...]]:
    """Return a function that takes the values at some places; ``itemgetter`` of one place gives no tuple."""
    if len(places) == 1:
        (place,) = places
        return lambda values: (values[place],)
    return itemgetter(*places)


class LazyRecord(Mapping[str, Any]):
    """A record whose fields, but for a few, are built when one of them is first read.

    Args:
        head: The fields that are there.
        build: Returns all fields in their order, those of the head included.
    """

    __slots__ = ("_build", "_fields")

    def __init__(self, head: dict[str, Any], build: Callable[[], dict[str, Any]]) -> None:
        self._fields = head
        self._build: Callable[[], dict[str, Any]] | None = build

    def whole(self) -> dict[str, Any]:
        """All fields. They are not kept, so that many records need not be in memory together."""
        return self._fields if self._build is None else self._build()

    def _kept(self) -> dict[str, Any]:
        if self._build is not None:
            self._fields, self._build = self._build(), None
        return self._fields

    def __getitem__(self, name: str) -> Any:
        return self._fields[name] if name in self._fields else self._kept()[name]

    def __contains__(self, name: object) -> bool:
        return name in self._fields or name in self._kept()

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept())

    def __len__(self) -> int:
        return len(self._kept())

    def __repr__(self) -> str:
        return repr(self._kept())

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self._kept(),)
