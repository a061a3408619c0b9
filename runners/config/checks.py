"""Checks of the composed configuration: the classes that it names, and the type of every value.

A part is a mapping with a ``_target_``; its keys are the parameters of that class, and their annotations are the types
of the values.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

from ...conf.errors import InputError, require
from ...conf.options import Options, Wording, check, field_types, fits
from ...conf.wording import as_typed, near, one_of

ALLOW = "KVBENCH_ALLOW"
"""Environment variable: installed packages whose classes a configuration may name, separated by commas."""
INSTALLED = {"site-packages", "dist-packages"}
LOGGING_CALLS = ("()", "class", "queue", "listener")
"""Keys of a logging configuration whose values are called."""
LOGGING_CLASSES = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler", "logging.Formatter")
LARGEST = 2**53
"""Whole numbers up to this are exact in every JSON reader."""
EXAMPLE_COUNTS = ("limit", "stretches", "sequences", "depths", "limit_bytes")
"""Keys that set how much of a task's data is used; a task has one of them."""
RENAMED = {
    "method.selection.window": "method.scorer.window (snapkv, pyramidkv, ada_kv) or method.recent",
    **{
        f"method.selection.{key}": f"method.scorer.{key}"
        for key in ("kernel", "pooling", "granularity", "group_reduce", "score_dtype", "future", "epsilon", "seed")
    },
    "method.selection.recent_share": "method.recent, a share of the budget such as 0.5",
    "method.selection.sinks": "method.sinks (expected_attention) or method.policy.sinks",
    "method.selection.prefill_only": "method/schedule=after_prefill (h2o, tova) or method.policy.prefill_only",
    "method.selection.floor": "method.allocator.floor",
    "method.selection.beta": "method.allocator.beta",
    "method.selection.layers": "method.allocator.layers",
    "method.selection.budget": "method.budget",
}
"""Keys of the release before this one, and where they are now."""
OLD_GROUP = "method.selection"
Folder = Annotated[str, Wording("text, the name of a folder; . for the current one", r".*\S.*")]


# classes ------------------------------------------------------------------------------------------------------------


def check_targets(values: Any, key: str) -> None:
    """Refuse every ``_target_`` in a plain configuration that is no class of an allowed package.

    Args:
        values: The resolved value of ``key``.
        key: Key for the error message.

    Raises:
        InputError: Names the key, and how a package is allowed.
    """
    if isinstance(values, Mapping):
        if "_target_" in values:
            target_class(values["_target_"], f"{key}._target_")
        for name, value in values.items():
            check_targets(value, f"{key}.{name}")
    elif isinstance(values, list):
        for place, value in enumerate(values):
            check_targets(value, f"{key}[{place}]")


def check_logging(values: Any, key: str) -> None:
    """Refuse a logging configuration (``logging.config``) that calls anything but Python's plain handlers.

    Args:
        values: the resolved value of ``key``.
        key: key for the error message.

    Raises:
        InputError: as :func:`check_targets`; or a value is imported from another place than ``sys``.
    """
    if isinstance(values, Mapping):
        for name, value in values.items():
            if name in LOGGING_CALLS and not isinstance(value, Mapping) and value not in LOGGING_CLASSES:
                target_class(value, f"{key}.{name}")
            check_logging(value, f"{key}.{name}")
    elif isinstance(values, list):
        for place, value in enumerate(values):
            check_logging(value, f"{key}[{place}]")
    elif isinstance(values, str) and values.startswith("ext://"):
        require(values in ("ext://sys.stdout", "ext://sys.stderr"), key, values, "must be ext://sys.stdout or stderr")


def target_class(target: Any, key: str) -> type:
    """The class that a ``_target_`` names.

    Raises:
        InputError: It is of another package, or no class that its package itself defines. A function is none: it would
            be called with arguments from the configuration.
    """
    module, _, name = target.rpartition(".") if isinstance(target, str) else ("", "", "")
    package = module.partition(".")[0]
    if not package:
        raise InputError(key, as_typed(target), "must be the full name of a class, as in my_module.MyScorer")
    allowed = "must be a class of kvbench, or of a module that is neither Python's own nor an installed package"
    require(package not in sys.stdlib_module_names, key, target, allowed)
    if package not in ("kvbench", *os.environ.get(ALLOW, "").split(",")) and _is_installed(package):
        raise InputError(key, target, f"{allowed}; {ALLOW}={package} in the environment allows this one")
    try:
        target_object = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(key, target, f"cannot be imported: {error}") from error
    is_defined_there = isinstance(target_object, type) and target_object.__module__.partition(".")[0] == package
    require(is_defined_there, key, target, f"must be a class that {package} itself defines")
    return target_object


def _is_installed(package: str) -> bool:
    """Whether a top-level module is in a folder of installed packages."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # __main__ and the like, which have no file
        return True
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    return any(INSTALLED & set(Path(place).resolve().parts) for place in places if place)


# keys and values ----------------------------------------------------------------------------------------------------


def check_values(values: Mapping[str, Any], key: str, cls: type, ignored: Iterable[str] = ()) -> None:
    """Check the keys and the types of the values that a class is built from, and of the parts among them.

    Args:
        values: Plain data; classes in it have been checked by :func:`check_targets`.
        key: Key of the values; empty for the top of the configuration.
        cls: The class; its parameters are the keys.
        ignored: Parameters that are not keys.

    Raises:
        InputError: A key is missing or unknown, or a value has another type than its annotation.
    """
    parameters = {k: p for k, p in inspect.signature(cls).parameters.items() if k not in ignored}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    hints = _hints(cls)
    prefix = f"{key}." if key else ""
    for name, value in values.items():
        at = f"{prefix}{name}"
        if name in ("_target_", "_convert_"):
            continue
        if name not in parameters:
            if takes_any and not name.startswith("_"):
                continue
            known = {k: values.get(k) for k in parameters}
            raise InputError(at, as_typed(value), unknown_key(known, key, name))
        hint = hints.get(name, Any)
        if isinstance(value, Mapping) and "_target_" in value:
            part = target_class(value["_target_"], f"{at}._target_")
            if isinstance(hint, type) and not issubclass(part, hint):
                raise InputError(f"{at}._target_", value["_target_"], f"must be a {hint.__name__}")
            check_values(value, at, part)
        else:
            check_value(value, at, hint)
    for name, parameter in parameters.items():
        is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        is_needed = is_named and parameter.default is parameter.empty
        require(not is_needed or name in values, f"{prefix}{name}", "(nothing)", "must be given")


def unknown_key(values: Mapping[str, Any], where: str, name: str) -> str:
    """The message for a key that ``values``, the mapping at ``where``, does not have."""
    message = f"{where or 'the configuration'} has no key {name}; "
    prefix = f"{where}." if where else ""
    inside = [f"{prefix}{k}.{name}" for k, v in values.items() if isinstance(v, Mapping) and name in v]
    counts = [f"{prefix}{k}" for k in EXAMPLE_COUNTS if k in values and name in EXAMPLE_COUNTS]
    if counts:
        return f"{message}the number of examples is set by {counts[0]} here"
    if inside:
        return f"{message}did you mean {' or '.join(inside)}?"
    options = [k for k in values if k not in ("_target_", "config")]
    return message + one_of(name, options) if options else message.removesuffix("; ")


def renamed_key(key: str) -> str | None:
    """Where a key of the last release is now; None: it was no key."""
    if key in RENAMED:
        return f"is {RENAMED[key]} now"
    if key == OLD_GROUP or key.startswith(f"{OLD_GROUP}."):
        return f"is method.policy{key.removeprefix(OLD_GROUP)} now, or a key of method.scorer"
    return None


def _hints(cls: type) -> Mapping[str, Any]:
    """Types of a class's parameters; whatever else an option's annotation says is checked when the object is made."""
    if dataclasses.is_dataclass(cls):
        return field_types(cls, include_extras=False)
    try:
        return get_type_hints(inspect.getattr_static(cls, "__init__"))
    except NameError:  # an annotation that only a type checker can look up
        return {}


def check_value(value: Any, key: str, hint: Any) -> None:
    """Raise InputError unless a value of the configuration fits an annotation; one value counts as a list of one."""
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise InputError(key, value, "is too large: whole numbers are below 2**53")
    if not _is_part(hint):
        if not fits([value], hint):
            check(value, key, hint)
    elif value is not None or NoneType not in get_args(hint):
        raise InputError(key, as_typed(value), _how_to_set(key, value))


def _how_to_set(key: str, value: Any) -> str:
    """How a part is chosen, where a single value was given for it."""
    group, place = key.replace(".", "/"), ""
    outer, _, name = group.rpartition("/")
    if outer.endswith(f"/{name}"):  # a part of another one of its group: method.scorer.scorer
        group, place = outer, f"@{key}"
    folder = files("kvbench.conf").joinpath(group)
    if not folder.is_dir():
        return f"is a group of keys, which are set one by one: {key}.KEY=VALUE"
    options = [path.name.removesuffix(".yaml") for path in folder.iterdir()]
    if value in options:
        return f"is a group of keys: use {group}{place}={value}"
    return f"is a group of keys: use {group}{place}=NAME{near(str(value), options)}"


def _is_part(hint: Any) -> bool:
    kinds = get_args(hint) or (hint,)
    return any(isinstance(k, type) and (dataclasses.is_dataclass(k) or issubclass(k, Options)) for k in kinds)
