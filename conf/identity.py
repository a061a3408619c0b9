"""Identity of a run's parts: the names and values that the hash of its record comes from.

A part (selection, storage, sharing, task, model) is recorded under its ``id`` and the keys of its parameters. Both stay
the same when a Python class or field is renamed, so that records and their hashes stay valid.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

from .errors import InputError
from .options import Options


class HasIdentity(Options):
    """A dataclass that is a part of a run."""

    id: ClassVar[str]
    """Name of the part in records. Declared by each class; one that declares none is recorded by its class name."""
    version: ClassVar[int] = 1
    """Raised by a change that changes numbers; above 1 it is part of the identity."""
    recorded_as: ClassVar[Mapping[str, str]] = {}
    """Field -> its key in records, for fields that were renamed since."""
    omitted_at: ClassVar[Mapping[str, Any]] = {}
    """Field -> the value at which it is left out, for fields that are newer than the first records."""
    location_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that say where data lies on this machine; they are never recorded."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "id" not in cls.__dict__:
            cls.id = cls.__name__

    def __post_init__(self) -> None:
        """Check the fields; a path becomes text."""
        for name in self.location_fields:
            if isinstance(value := getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
        super().__post_init__()

    def parameters(self) -> dict[str, Any]:
        """The fields that are arguments, as plain data, by their keys in records."""
        cls, names = type(self), list[str]()
        options = [n for n, hint in inspect.get_annotations(cls).items() if "ClassVar" not in str(hint)]
        if options and "__dataclass_fields__" not in vars(cls):
            problem = f"declares {', '.join(options)}: write @dataclass(frozen=True) above the class"
            raise InputError(self.key_prefix.rstrip("."), cls.__name__, problem)
        if is_dataclass(self):  # a part without options need not be one
            names = [f.name for f in fields(self) if f.init and f.name not in self.location_fields]
        missing = object()
        return {
            self.recorded_as.get(name, name): _plain(value)
            for name, value in ((name, getattr(self, name)) for name in names)
            if value != self.omitted_at.get(name, missing)
        }

    def identity(self) -> dict[str, Any]:
        """What decides this part's numbers, as plain data; ``class`` is the key under which records have the ``id``."""
        version = {"version": self.version} if self.version > 1 else {}
        return {"class": self.id, **self.parameters(), **version}


def _plain(value: Any) -> Any:
    """A field's value as recorded: a part by its identity, a tuple as a list."""
    if isinstance(value, HasIdentity):
        return value.identity()
    return list(value) if isinstance(value, tuple) else value
