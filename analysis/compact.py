"""Records as a structure, which many of them have in common, and their values.

    template, values = pack(record, refer)
    record = Structure(template).build(...)
    record = LazyRecord(some_fields, lambda: Structure(template).build(...))

JSON repeats the name of every field in every record, and writes a number with 17 digits: reading it takes most of the
time of a large folder. Here the values are lists and an array, and a structure is compiled: one expression makes all
mappings of a record from its values.
"""

from __future__ import annotations

import ast
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS = ("number", "part", "other")
"""Floats; values that records share; all other values that are no container."""
Refer = Callable[[tuple[str, ...], Any], str | None]


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


def pack(record: Mapping[str, Any], refer: Refer) -> tuple[dict[str, Any], Values]:
    """Return a record with the places of its values in place of them, and the values.

    Args:
        record: A mapping of values that JSON can hold.
        refer: Given the names of the fields that lead to a value, and the value: stores what records share and returns
            a reference to it, without white space; None for all other values.
    """
    values = Values()
    slots = _slots(dict(record), (), values, refer)
    ends = (0, len(values.numbers), len(values.numbers) + len(values.parts))
    template: dict[str, Any] = _with_places(slots, dict(zip(KINDS, ends, strict=True)))
    return template, values


def _slots(value: Any, path: tuple[str, ...], values: Values, refer: Refer) -> Any:
    """Add what is in a value to ``values``; returns it with (kind, number among those) of each."""
    reference = refer(path, value)
    if reference is not None:
        values.parts.append(reference)
        return "part", len(values.parts) - 1
    if type(value) is float:
        values.numbers.append(value)
        return "number", len(values.numbers) - 1
    if isinstance(value, dict) and (value or not path):
        return {name: _slots(inner, (*path, name), values, refer) for name, inner in value.items()}
    if isinstance(value, list) and any(type(inner) in (float, dict, list) for inner in value):
        return [_slots(inner, (*path, ""), values, refer) for inner in value]
    values.others.append(value)
    return "other", len(values.others) - 1


def _with_places(slots: Any, first: Mapping[str, int]) -> Any:
    if isinstance(slots, dict):
        return {name: _with_places(inner, first) for name, inner in slots.items()}
    if isinstance(slots, list):
        return [_with_places(inner, first) for inner in slots]
    kind, number = slots
    return first[kind] + number


class Structure:
    """Makes records of one structure.

    Args:
        template: As :func:`pack` returns it.

    Attributes:
        build: Returns the record of a list of numbers, shared values and others, one after the other.
    """

    def __init__(self, template: Mapping[str, Any]) -> None:
        arguments = ast.arguments([], [ast.arg("values")], None, [], [], None, [])
        function = ast.Expression(ast.Lambda(arguments, _expression(template)))
        # The expression consists of names of fields as constants, and of places: nothing in it can be called.
        code = compile(ast.fix_missing_locations(function), "<structure of a record>", "eval")
        self.build: Callable[[list[Any]], dict[str, Any]] = eval(code)


def _expression(template: Any) -> ast.expr:
    """Source of a mapping, of a list, or of the value at a place."""
    if isinstance(template, dict):
        return ast.Dict([ast.Constant(name) for name in template], [_expression(v) for v in template.values()])
    if isinstance(template, list):
        return ast.List([_expression(inner) for inner in template], ast.Load())
    return ast.Subscript(ast.Name("values", ast.Load()), ast.Constant(int(template)), ast.Load())


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

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return self._kept() | dict(other)

    def __repr__(self) -> str:
        return repr(self._kept())

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self._kept(),)
