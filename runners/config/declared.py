"""Types and bounds of options, read from the source of the classes that declare them.

``--help`` and the first check of a command use it, because importing those classes takes seconds, for most import
torch. Only annotations are evaluated: types of :mod:`typing`, the constraints of :mod:`...conf.options`, literals, and
names for them.
"""

from __future__ import annotations

import ast
import builtins
import importlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from ...conf import options
from ...conf.options import Constraint, in_words

IMPORTED = (
    "typing",
    "collections.abc",
    options.__name__,
    "kvbench.tasks.longbench_spec",
    "kvbench.models.shape_files",
)
"""Modules whose names are looked up by an import, which is fast."""


class UnknownNameError(Exception):
    """An annotation has a name that is no type of an option, such as a class of parts."""


class InitVar:
    """In place of :class:`dataclasses.InitVar`: an argument that is no field."""

    def __class_getitem__(cls, hint: Any) -> Any:
        return hint


def declared_types(target: str) -> Mapping[str, Any]:
    """Return the annotation of each option of the class that a ``_target_`` names.

    Options whose values are not checked (parts) are left out.
    """
    module, _, name = target.rpartition(".")
    return _options_of(module, name)


def allowed_values(target: str) -> Mapping[str, str]:
    """Return the allowed values, in words, of each of :func:`declared_types`."""
    return {key: in_words(hint) for key, hint in declared_types(target).items()}


@cache
def _options_of(module: str, name: str) -> Mapping[str, Any]:
    """Return the annotations of a class's options by name, those of its bases first."""
    source = _Source.find(module)
    found = None if source is None else source.find_definition(name)
    if found is None:
        return {}
    source, node = found
    if not isinstance(node, ast.ClassDef):
        return {}
    hints: dict[str, Any] = {}
    for base in reversed(node.bases):
        if isinstance(base, ast.Name):
            hints |= _options_of(source.name, base.id)
    fields = [
        (statement.target.id, statement.annotation)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    ]
    arguments = [(a.arg, a.annotation) for a in _arguments_of_init(node) if a.annotation is not None]
    for option, annotation in [*(a for a in arguments if a[0] not in dict(fields)), *fields]:
        hints.pop(option, None)
        try:
            hint = source.evaluate(annotation)
        except UnknownNameError:
            continue
        if not _is_class_var(annotation):
            hints[option] = hint
    return hints


def _arguments_of_init(node: ast.ClassDef) -> Sequence[ast.arg]:
    """Return the arguments of a class whose ``__init__`` is written out."""
    inits = [s for s in node.body if isinstance(s, ast.FunctionDef) and s.name == "__init__"]
    return [argument for init in inits for argument in (*init.args.args, *init.args.kwonlyargs)]


def _is_class_var(annotation: ast.expr) -> bool:
    return isinstance(annotation, ast.Subscript) and getattr(annotation.value, "id", "") == "ClassVar"


class _Source:
    """The source of a module, which is not imported.

    Attributes:
        name: Full name of the module.
        definitions: Statement of each name that the module defines or imports.
    """

    def __init__(self, name: str, spec: ModuleSpec):
        self.name, self.definitions = name, dict[str, ast.stmt]()
        self._package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
        assert spec.origin is not None
        for statement in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.ImportFrom):
                self.definitions |= {alias.asname or alias.name: statement for alias in statement.names}
            elif isinstance(statement, ast.ClassDef):
                self.definitions[statement.name] = statement
            elif isinstance(statement, ast.Assign | ast.AnnAssign):
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                self.definitions |= {target.id: statement for target in targets if isinstance(target, ast.Name)}

    @staticmethod
    @cache
    def find(name: str) -> _Source | None:
        """Return the source of a module by its full name; None: there is none."""
        spec: ModuleSpec | None = None
        path: Sequence[str] | None = None
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            if parts[:end] == ["kvbench"]:  # in a checkout its folders are beside the package
                path = list(importlib.import_module("kvbench").__path__)
                continue
            spec = PathFinder.find_spec(".".join(parts[:end]), path)
            if spec is None:
                return None
            path = spec.submodule_search_locations
        return _Source(name, spec) if spec is not None and (spec.origin or "").endswith(".py") else None

    def find_definition(self, name: str) -> tuple[_Source, ast.stmt] | None:
        """Return the module that defines a name, and the statement; None: it is in none of the project's."""
        statement = self.definitions.get(name)
        if not isinstance(statement, ast.ImportFrom):
            return None if statement is None else (self, statement)
        module = _Source.find(self._module_of(statement))
        original = next(alias.name for alias in statement.names if (alias.asname or alias.name) == name)
        return None if module is None else module.find_definition(original)

    def _module_of(self, statement: ast.ImportFrom) -> str:
        parts = self._package.split(".")
        base = parts[: len(parts) - statement.level + 1] if statement.level else []
        return ".".join([*base, *([statement.module] if statement.module else [])])

    def evaluate(self, node: ast.expr) -> Any:
        """Return the value of an annotation, or of an argument of a constraint in it.

        Raises:
            UnknownNameError: It has other names or operations.
        """
        match node:
            case ast.Constant(constant):
                return constant
            case ast.Name(name):
                return self._value_of(name)
            case ast.Tuple(elements) | ast.List(elements) | ast.Set(elements):
                return tuple(map(self.evaluate, elements))
            case ast.Dict(keys):
                return tuple(self.evaluate(key) for key in keys if key is not None)
            case ast.Subscript(base, index):
                return self.evaluate(base)[self.evaluate(index)]
            case ast.BinOp(left, ast.BitOr(), right):
                return self.evaluate(left) | self.evaluate(right)
            case ast.UnaryOp(ast.USub(), operand):
                return -self.evaluate(operand)
            case ast.Call(ast.Name("len"), [argument], []):
                return len(self.evaluate(argument))
            case ast.Call(function, arguments, keywords):
                called = self.evaluate(function)
                if isinstance(called, type) and issubclass(called, Constraint):
                    named = {k.arg: self.evaluate(k.value) for k in keywords if k.arg is not None}
                    return called(*map(self.evaluate, arguments), **named)
        raise UnknownNameError(ast.dump(node))

    def _value_of(self, name: str) -> Any:
        """Return the value of a name in an annotation."""
        statement = self.definitions.get(name)
        if isinstance(statement, ast.ImportFrom):
            module = self._module_of(statement)
            original = next(alias.name for alias in statement.names if (alias.asname or alias.name) == name)
            if module in IMPORTED:
                return getattr(importlib.import_module(module), original)
            if (module, original) == ("dataclasses", "InitVar"):
                return InitVar
            source = _Source.find(module)
            if source is not None:
                return source._value_of(original)
        elif isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            return self.evaluate(statement.value)
        elif statement is None and isinstance(getattr(builtins, name, None), type):
            return getattr(builtins, name)
        raise UnknownNameError(name)
