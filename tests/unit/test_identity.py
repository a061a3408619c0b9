"""A run's hash comes from the ids, versions and parameters of its parts, not from Python names."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import OmegaConf

from kvbench.analysis.ordering import RECENT_AS_WINDOW
from kvbench.conf.identity import HasIdentity
from kvbench.conf.versions import CURRENT_VERSIONS
from kvbench.methods.cache.method import Method
from kvbench.methods.policies.allocators.adaptive import Adaptive
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.policy import KeepEverything
from kvbench.methods.policies.schedules.after_prefill import AfterPrefill
from kvbench.methods.policies.scorers.base import Scorer
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.runners.records.record import identity_hash

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted((ROOT / "results").rglob("record.json"))
NEWER = {"ties": "", "version": 0, "score_dtype": "float32", "instruction_first": "", "instruction_next": ""}
"""Keys that some records were made before. All but ``score_dtype`` are meant to change the hash."""

ABSENT = {"prefill_only": False, "instruction": []}
"""Keys that some records have with the value at which others, and those of today, leave them out."""
RETIRED = ("PyramidKV", "AdaKV")
"""Now SnapKV with an allocator. Their records are older than the rule for ties, so no run of today has their hash."""


def targets() -> dict[str, type[HasIdentity]]:
    """Class of every part that a YAML under conf/ names."""
    found = {}
    for path in (ROOT / "conf").rglob("*.yaml"):
        text = OmegaConf.to_container(OmegaConf.load(path))
        for target in _targets(text):
            module, name = target.rsplit(".", 1)
            kind = getattr(importlib.import_module(module), name)
            if isinstance(kind, type) and issubclass(kind, HasIdentity):
                found[target] = kind
    return found


def _targets(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "_target_" in value:
            yield value["_target_"]
        for inner in value.values():
            yield from _targets(inner)


def recorded_parts() -> list[tuple[str, dict[str, Any]]]:
    """(selection, storage or sharing; its identity), each distinct one of the committed records."""
    found = {}
    for path in RECORDS:
        for part, value in json.loads(path.read_text())["identity"]["method"].items():
            if isinstance(value, dict) and value["class"] not in RETIRED:
                found[part, json.dumps(value, sort_keys=True)] = (part, value)
    return list(found.values())


def rebuilt(kind: type[HasIdentity], recorded: dict[str, Any]) -> HasIdentity:
    """The part of a recorded identity. A scorer's is its policy's.

    What the record lacks has the value at which it is not recorded, or its default.
    """
    names = {key: name for name, key in kind.recorded_as.items()}
    removed = ("class", "version", "ties", "instruction")
    values = {**kind.omitted_at} | {names.get(k, k): v for k, v in recorded.items() if k not in removed}
    for name in ("allocator", "schedule"):
        if name in values:
            (part,) = (part for part in targets().values() if part.id == values[name]["class"])
            values[name] = rebuilt(part, values[name])
    if not issubclass(kind, Scorer):
        return kind(**values)
    if "scorer" in values:  # of a wrapper
        inner = values["scorer"]
        (part,) = (part for part in targets().values() if part.id == inner["class"])
        values["scorer"] = part(**{k: v for k, v in inner.items() if k not in ("class", "version", "ties")})
    own = {f.name for f in fields(kind)}
    policy = {k: v for k, v in values.items() if k not in own}
    if kind.recent_recorded_as in policy:
        policy["recent"] = policy.pop(kind.recent_recorded_as)
    if policy.pop("prefill_only", False):
        policy["schedule"] = AfterPrefill()
    return EvictionPolicy(kind(**{k: v for k, v in values.items() if k in own}), **policy)


def test_every_record_lies_under_the_hash_of_its_identity():
    assert len(RECORDS) > 200
    for path in RECORDS:
        record = json.loads(path.read_text())
        assert identity_hash(record["identity"]) == record["hash"] == path.parent.name, path


def test_parts_of_committed_records_have_the_same_identity_today():
    """So a renamed class, field or default that changes a hash fails here."""
    kinds = {kind.id: kind for kind in [*targets().values(), KeepEverything]}
    for part, recorded in recorded_parts():
        kind = kinds[recorded["class"]]
        today = rebuilt(kind, recorded).identity()
        recorded = {key: v for key, v in recorded.items() if v != ABSENT.get(key, kind.omitted_at.get(key, ...))}
        newer = {key: today.pop(key) for key in NEWER if key in today and key not in recorded}
        assert today == recorded, part
        assert newer.get("score_dtype", NEWER["score_dtype"]) == NEWER["score_dtype"]


def test_every_part_declares_an_id_of_its_own():
    parts = {kind for kind in targets().values() if kind.__module__.split(".")[1] in ("methods", "tasks")}
    assert len(parts) > 25
    for kind in parts:
        assert f'id: ClassVar[str] = "{kind.id}"' in Path(importlib.import_module(kind.__module__).__file__).read_text()
    assert len({kind.id for kind in parts}) == len(parts)


def test_renamed_class_and_field_have_the_same_identity():
    @dataclass(frozen=True)
    class ObservationWindow(SnapKV):
        id: ClassVar[str] = SnapKV.id

    assert (
        Method("x", EvictionPolicy(ObservationWindow(), 64)).identity()
        == Method("x", EvictionPolicy(SnapKV(), 64)).identity()
    )

    @dataclass(frozen=True)
    class Renamed(HasIdentity):
        id: ClassVar[str] = "Part"
        recorded_as: ClassVar[dict[str, str]] = {"n_recent": "window"}
        omitted_at: ClassVar[dict[str, Any]] = {"newer": None}
        location_fields: ClassVar[tuple[str, ...]] = ("path",)
        n_recent: int = 8
        newer: str | None = None
        path: str = ""

    adaptive = EvictionPolicy(SnapKV(), allocator=Adaptive(floor=0.5)).identity()
    assert adaptive["allocator"] == {"class": "adaptive", "floor": 0.5, "layers": "uniform", "beta": 20}
    assert "allocator" not in EvictionPolicy(SnapKV()).identity()
    assert Renamed(path="/data").identity() == {"class": "Part", "window": 8}
    assert Renamed(newer="x").identity() == {"class": "Part", "window": 8, "newer": "x"}
    assert rebuilt(Renamed, {"class": "Part", "window": 4}) == Renamed(n_recent=4)


def test_version_above_one_is_part_of_the_identity():
    @dataclass(frozen=True)
    class Second(HasIdentity):
        id: ClassVar[str] = "Part"
        version: ClassVar[int] = 2

    assert Second().identity() == {"class": "Part", "version": 2}


def test_every_version_above_one_is_in_the_table_of_versions():
    """The readers of records know today's versions from there."""
    declared = {kind.id: kind.version for kind in targets().values() if kind.version > 1}
    assert declared == CURRENT_VERSIONS


def test_labels_know_the_scorers_whose_records_call_recent_tokens_a_window():
    kinds = [kind for kind in targets().values() if issubclass(kind, Scorer)]
    assert {kind.id for kind in kinds if kind.recent_recorded_as == "window"} == set(RECENT_AS_WINDOW)
