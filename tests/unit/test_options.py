"""Declared options: what fits an annotation, what the message says, and that every option of ``conf`` is declared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra

import kvbench
from kvbench.conf.errors import InputError
from kvbench.conf.identity import HasIdentity
from kvbench.conf.options import (
    Bounds,
    Entries,
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    Options,
    PositiveFloat,
    PositiveInt,
    Share,
    Text,
    Wording,
    check,
    field_types,
    fits,
)
from kvbench.methods.policies.budget import Budget, Recent
from kvbench.methods.policies.pyramid_infer.policy import PyramidInfer
from kvbench.runners.config.checks import target_class
from kvbench.runners.config.loader import OF_ANY_KEY, compose, groups, plain_data
from kvbench.runners.config.settings import Settings

if TYPE_CHECKING:
    from decimal import Decimal

INF, NAN = math.inf, math.nan
HALF_OPEN = Annotated[float, Bounds(ge=0, lt=1)]
FRACTION = Annotated[float, Bounds(gt=0, le=1)]
NAMES = Annotated[Sequence[Annotated[str, OneOf({"trec": 1, "qasper": 2})]], Entries(differ=True)] | None
WORDED = Annotated[str, Wording("owner/name", r"\w+/\w+")]


@pytest.mark.parametrize(
    ("hint", "allowed", "refused", "words"),
    [
        (int, [0, -5, 2**70], [True, 2.0, "2", None, NAN, [1], np.float64(2)], "a whole number"),
        (float, [0, -0.5, 1e300, 2**2000], [False, "1", None, INF, -INF, NAN, [1.0]], "a number"),
        (bool, [True, False], [0, 1, "true", None, 1.0], "true or false"),
        (PositiveInt, [1, 2**53], [0, -1, True, 1.0, "1", None, INF], "a whole number >= 1"),
        (PositiveInt | None, [1, None], [0, True, 1.5, "null"], "a whole number >= 1, or null"),
        (NonNegativeInt, [0, 1], [-1, False, 0.0], "a whole number >= 0"),
        (PositiveFloat, [1e-9, 3], [0, -1, True, INF, None], "a number above 0"),
        (NonNegativeFloat, [0, 0.0, 3], [-1e-9, NAN, True], "a number >= 0"),
        (Share, [0, 1, 0.5], [-0.1, 1.1, True, "0.5"], "a number between 0 and 1"),
        (HALF_OPEN, [0, 0.999], [1, 1.0, -0.1, NAN], "a number >= 0 and below 1"),
        (FRACTION, [1, 0.001], [0, 0.0, 1.001], "a number above 0 and at most 1"),
        (Text, ["x", " x ", "a\nb"], ["", " ", "\n", None], "text that is not blank"),
        (WORDED, ["a/b"], ["a", "a/b/c", 5, None], "owner/name"),
        (Literal["max", "avg"], ["max"], ["mean", "", None, 1, ["max"]], "one of avg, max"),
        (Literal["max"] | None, ["max", None], ["min"], "one of max, or null"),
        (Literal[1, 2], [1, 2], [True, 1.0, "1", None, 3], "one of 1, 2"),
        (Annotated[int, OneOf((2, 8))], [8], [4, 8.0, True, "8"], "one of 2, 8"),
        (Sequence[PositiveInt], [[1], (1, 2), []], [[0], [True], 1, "1", None], "a list, each a whole number >= 1"),
        (Sequence[str | int], [["a", 1]], [[1.5], "a"], "a list, each text, or a whole number"),
        (Annotated[Sequence[int], Entries()], [[1, 1]], [[], ()], "a list, each a whole number (at least one)"),
        (NAMES, [["trec"], None], [[], ["trec", "trec"], "trec"], "a list, each one of qasper, trec (at least one"),
        (Mapping[str, Any], [{}, {"a": 1}], [[], "a", None], "a mapping"),
        (int | float, [1, 1.5], [True, None, "1"], "a number"),
        (
            Budget,
            [1, 512, 0.001, 1.0],
            [0, -4, 0.0, 1.5, 2.0, True, "64", None, NAN],
            "a whole number of tokens >= 1, or",
        ),
        (Recent, [0, 8, 0.0, 1.0, 0.5], [-1, 1.5, -0.5, True, "8"], "a whole number of tokens >= 0, or a share"),
    ],
    ids=str,
)
def test_values_that_fit_and_words_for_those_that_do_not(hint, allowed, refused, words):
    for value in allowed:
        check(value, "key", hint)
    for value in refused:
        assert not fits(value, hint), value
        with pytest.raises(InputError, match=r"^key=") as error:
            check(value, "key", hint)
        assert error.value.allowed.startswith(f"must be {words}"), str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ("sampeld", Literal["sampled", "fixed"], "key=sampeld: must be one of fixed, sampled; did you mean sampled?"),
        ("kv_haed", Literal["kv_head"] | None, "key=kv_haed: must be one of kv_head, or null; did you mean kv_head?"),
        (["trec", "qaspr"], NAMES, "key=qaspr: must be one of qasper, trec; did you mean qasper?"),
        (["trec", 5], NAMES, "key=5: must be one of qasper, trec"),
        (
            ["trec", "trec"],
            NAMES,
            "key=[trec,trec]: must be a list, each one of qasper, trec (at least one, none twice), or null",
        ),
        (None, PositiveInt, "key=null: must be a whole number >= 1"),
        (True, PositiveInt, "key=true: must be a whole number >= 1"),
        ([64, True, None], Sequence[float], "key=[64,true,null]: must be a list, each a number"),
        ({"a": None}, PositiveInt, "key={a:null}: must be a whole number >= 1"),
        (2026, str, "key=2026: must be text; for this text write 'key=\"2026\"'"),
        (5, WORDED, "key=5: must be owner/name"),
        (True, str, "key=true: must be text; for this text write 'key=\"true\"'"),
    ],
)
def test_messages(value, hint, message):
    with pytest.raises(InputError) as error:
        check(value, "key", hint)
    assert str(error.value) == message


@dataclass
class Inner(Options):
    key_prefix: ClassVar[str] = "outer.inner."
    n: PositiveInt = 1


@dataclass
class Outer(Options):
    key_prefix: ClassVar[str] = "outer."
    other_keys: ClassVar[Mapping[str, str]] = {"origin": "source"}
    count: PositiveInt = 1
    origin: Literal["hub"] | None = None
    inner: Inner = field(default_factory=Inner)
    weights: torch.Tensor | None = None
    price: Decimal | None = None
    cache: list = field(init=False, default=5)


@dataclass
class Further(Outer):
    share: Share = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.count += 1


def test_parts_tensors_and_names_of_type_checkers_are_not_checked():
    assert Outer(inner="anything", weights=torch.ones(2), price=object()).cache == 5
    assert list(field_types(Outer)) == ["count", "origin", "inner", "weights"]


def test_keys_are_the_family_s_prefix_and_the_name_unless_the_class_says_otherwise():
    for make, key in (
        (lambda: Outer(count=0), "outer.count"),
        (lambda: Outer(origin="mini"), "source"),
        (lambda: Outer(inner=Inner(n=0)), "outer.inner.n"),
        (lambda: Further(share=2), "outer.share"),
        (lambda: Further(count=True), "outer.count"),
    ):
        with pytest.raises(InputError) as error:
            make()
        assert error.value.key == key
    assert Further(count=1).count == 2


def test_a_part_with_options_that_is_no_dataclass_is_told_to_be_one():
    class Plain(HasIdentity):
        id: ClassVar[str] = "plain"

    class Forgotten(HasIdentity):
        window: int = 4

    assert Plain().identity() == {"class": "plain"}
    with pytest.raises(InputError, match=r"Forgotten: declares window: write @dataclass\(frozen=True\)"):
        Forgotten().identity()


def test_a_part_s_path_is_kept_as_text():
    @dataclass
    class Placed(HasIdentity):
        location_fields: ClassVar[tuple[str, ...]] = ("path",)
        path: str | None = None

    assert Placed(Path("a") / "b").path == "a/b" and Placed().path is None
    with pytest.raises(InputError, match=r"^path=5: must be text, or null"):
        Placed(5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kvbench.SnapKV(window=True), "method.scorer.window=true: must be a whole number >= 1"),
        (lambda: kvbench.SnapKV(pooling=None), "method.scorer.pooling=null: must be one of avg, max"),
        (lambda: kvbench.EvictionPolicy(kvbench.SnapKV(), 0), "method.budget=0: must be a whole number of tokens >= 1"),
        (lambda: kvbench.EvictionPolicy(kvbench.SnapKV(), sinks=-1), "method.sinks=-1: must be a whole number >= 0"),
        (lambda: kvbench.StreamingLLM(budget=None), "method.budget=null: must be a whole number of tokens >= 1"),
        (lambda: kvbench.StreamingLLM(sinks=4.0), "method.policy.sinks=4.0: must be a whole number >= 0"),
        (lambda: kvbench.Method("full", budget="64"), "method.budget=64: must be a whole number of tokens >= 1"),
        (lambda: kvbench.Kivi(bits=True), "method.storage.bits=true: must be one of 2, 4, 8"),
        (lambda: Settings(batch_size=None), "batch_size=null: must be a whole number >= 1"),
        (lambda: Settings(device="cuda:x"), "device=cuda:x: must be auto, cpu, cuda or cuda:<number>"),
    ],
)
def test_the_python_api_checks_as_the_command_line_does(make, message):
    with pytest.raises(InputError) as error:
        make()
    assert str(error.value).startswith(message)


# every choice of conf ---------------------------------------------------------------------------------------------


def choices() -> list[tuple[str, str]]:
    named = [(group, p.name.removesuffix(".yaml")) for group, found in groups(files("kvbench.conf")) for p in found]
    return [(group, name) for group, name in named if not group.startswith("hydra") and group not in OF_ANY_KEY]


def parts(values: Any) -> Iterator[tuple[type, dict[str, Any]]]:
    """(class, values) of every part of a composed configuration."""
    if isinstance(values, dict):
        if "_target_" in values:
            yield target_class(values["_target_"], "key"), values
        for value in values.values():
            yield from parts(value)


def types_by_key(cls: type) -> dict[str, Any]:
    types = field_types(cls) if is_dataclass(cls) else {}
    return {cls.other_keys.get(name, name).rpartition(".")[2]: hint for name, hint in types.items()}


def is_declared(hint: Any) -> bool:
    """Whether an annotation says what values an option may have, or names a class of parts."""
    is_part = any(isinstance(kind, type) and issubclass(kind, Options) for kind in (hint, *get_args(hint)))
    return is_part or not fits(object(), hint)


ARGUMENTS = {(PyramidInfer, "prefill_only")}
"""Arguments that are no fields, so that ``__post_init__`` checks them."""


def test_every_option_of_conf_is_declared_and_its_default_fits():
    checked = set()
    names: dict[str, list[str]] = {}
    for group, name in choices():
        names.setdefault(group, []).append(name)
    places = [{g: n for g, n in names.items() if g.count("/") == depth} for depth in (0, 1)]  # method/x are of SnapKV
    assert sum(map(len, places)) == len(names)
    columns = [[[(group, name) for name in found] for group, found in place.items()] for place in places]
    for chosen in (row for of_place in columns for row in zip_longest(*of_place)):
        overrides = [f"{group}={name}" for group, name in filter(None, chosen)]  # a choice of each group at a time
        GlobalHydra.instance().clear()
        for cls, values in parts(plain_data(compose(overrides))):
            assert issubclass(cls, Options), cls
            types = types_by_key(cls)
            for key, value in values.items():
                if key == "_target_" or (cls, key) in ARGUMENTS or (isinstance(value, dict) and "_target_" in value):
                    continue
                assert is_declared(types[key]), (cls, key)
                check(value, f"{overrides}: {key}", types[key] if value != "???" else str)
                checked.add((cls, key))
    assert len(checked) > 200


def declared_choices(hint: Any) -> list[Any]:
    """The choices that an annotation lists, where they are few."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if isinstance(hint, OneOf):
        return list(hint.options) if len(list(hint.options)) <= 4 else []
    return [choice for arg in get_args(hint) for choice in declared_choices(arg)]


def test_help_names_every_choice_of_an_option():
    """``--help`` shows the comments of the YAML files: importing the classes takes seconds, for most import torch."""
    checked = 0
    for group, name in choices():
        text = files("kvbench.conf").joinpath(group, f"{name}.yaml").read_text(encoding="utf-8")
        for cls, values in parts(yaml.safe_load(text)):
            types = types_by_key(cls)
            for key in values.keys() & types.keys():
                (line, *_) = [line for line in text.splitlines() if line.strip().startswith(f"{key}:")]
                for choice in declared_choices(types[key]):
                    assert str(choice) in line, (group, name, key, choice)
                    checked += 1
    assert checked > 60
