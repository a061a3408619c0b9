"""Identity of a run's parts: the names and values from which the hash of its record is computed.

A part (selection, storage, sharing, task, model) is recorded under its ``id`` and the keys of its parameters. Neither
changes when a Python class or field is renamed, so records and their hashes remain valid.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

from .options import Options, argument_names


class HasIdentity(Options):
    """A dataclass for one part of a run."""

    id: ClassVar[str]
    """Name of the part in records, declared by each class; default: the class name."""
    version: ClassVar[int] = 1
    """Incremented when a code change affects results, in :mod:`.versions`; part of the identity if above 1."""
    recorded_as: ClassVar[Mapping[str, str]] = {}
    """Field -> its key in records, for renamed fields."""
    omitted_at: ClassVar[Mapping[str, Any]] = {}
    """Field -> the value at which it is not recorded, for fields added after the first records."""
    location_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that locate data on this machine; never recorded."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "id" not in cls.__dict__:
            cls.id = cls.__name__

    def __post_init__(self) -> None:
        """Convert paths to text, then check the fields."""
        for name in self.location_fields:
            if isinstance(value := getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
        super().__post_init__()

    def parameters(self) -> dict[str, Any]:
        """The fields that are arguments, as plain data, by their keys in records."""
        names = [name for name in argument_names(self) if name not in self.location_fields]
        missing = object()
        return {
            self.recorded_as.get(name, name): _plain(value)
            for name, value in ((name, getattr(self, name)) for name in names)
            if value != self.omitted_at.get(name, missing)
        }

    def identity(self) -> dict[str, Any]:
        """Return all that affects the part's results, as plain data; records store the ``id`` under ``class``."""
        version = {"version": self.version} if self.version > 1 else {}
        return {"class": self.id, **self.parameters(), **version}


def _plain(value: Any) -> Any:
    """Return a field's value as recorded: a part as its identity, a tuple as a list."""
    if isinstance(value, HasIdentity):
        return value.identity()
    return list(value) if isinstance(value, tuple) else value
