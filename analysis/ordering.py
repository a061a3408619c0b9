"""Order of runs, groups of comparable ones, and labels that tell the runs of a group apart."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .load import Run

Settings = Mapping[str, str]
"""A method's settings but for the budget, as texts."""
RECENT_AS_WINDOW = ("ExpectedAttention", "KeyDiff", "RandomTokens")
"""Scorers whose records call ``method.recent`` a window; a label says what is typed."""


def ordered(runs: Iterable[Run]) -> list[Run]:
    """The runs group by group, by method and budget, with labels that tell them apart."""
    known: dict[Hashable, Settings] = {}
    return [run for group in comparable(sorted(runs, key=_order)) for run in distinct(group, known)]


def _order(run: Run) -> tuple[Any, ...]:
    """The baseline first, then by budget, then by method: rows of one budget stand together."""
    budget = run.record["budget"]
    return (not run.is_full_cache, budget is not None, budget or 0, run.record["method"], run.label, run.record["hash"])


def comparable(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs that differ in their method alone, group by group: what may stand in one table."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group_key, []).append(run)
    return [groups[key] for key in sorted(groups)]


def by_budget(group: Sequence[Run]) -> Iterator[tuple[str, list[Run]]]:
    """Runs that are drawn together: those of one budget, each time with those that have none, the full cache first."""
    alone = sorted((r for r in group if r.record["budget"] is None), key=lambda r: (not r.is_full_cache, r.label))
    budgets = sorted({r.record["budget"] for r in group} - {None})
    for budget in budgets:
        yield f"budget {budget}", [*alone, *(r for r in group if r.record["budget"] == budget)]
    if not budgets:
        yield "", alone


def settings_key(record: Mapping[str, Any]) -> str:
    """Everything that decides a run's numbers but its method, as one text; kind and task come first."""
    rest = {k: v for k, v in record["identity"].items() if k != "method"}
    if record["kind"] == "train":  # architectures are compared at the learning rate that suits each, over seeds
        rest = {k: v for k, v in rest.items() if k != "seed"}
        rest["train"] = {k: v for k, v in rest["train"].items() if k != "lr"}
    return "\x00".join([record["kind"], record["task"], record["model"], json.dumps(rest, sort_keys=True)])


def distinct(group: Sequence[Run], known: dict[Hashable, Settings] | None = None) -> list[Run]:
    """Labels that tell a method's settings wherever the group has it with more than one.

    Args:
        group: Comparable runs.
        known: Settings by the id of a record's ``identity.method``, which many records share, and by their items; is
            added to.
    """
    known = {} if known is None else known
    settings = [_settings(run.record["identity"]["method"], known) for run in group]
    curves = [run.curve for run in group]
    by_curve: dict[str, dict[int, Settings]] = {}
    for curve, own in zip(curves, settings, strict=True):
        by_curve.setdefault(curve, {})[id(own)] = own
    varying = {curve: _varying(list(of_curve.values())) for curve, of_curve in by_curve.items()}
    out = []
    for run, curve, own in zip(group, curves, settings, strict=True):
        told = ", ".join(f"{_name(key, own)}={own[key]}" for key in varying[curve] if key in own)
        out.append(replace(run, label=_with_settings(run.label, told)) if told else run)
    return out


def _name(key: str, own: Settings) -> str:
    """The last part of a setting's key, as it is typed."""
    is_recent = key == "selection.window" and own.get("selection.class") in RECENT_AS_WINDOW
    return "recent" if is_recent else key.rpartition(".")[2]


def _with_settings(label: str, settings: str) -> str:
    """A label and further settings in parentheses, in those at its end if it has some."""
    return f"{label[:-1]}, {settings})" if label.endswith(")") else f"{label} ({settings})"


def without_settings(label: str) -> str:
    """A label without what stands in parentheses: the settings of a method that tell it from others of its name."""
    return re.sub(r" \([^()]*\)", "", label)


def _varying(settings: Sequence[Settings]) -> list[str]:
    """Keys that do not have the same value in all settings, or that some of them lack."""
    first = settings[0]
    keys = {key for own in settings for key in own}
    return sorted(key for key in keys if any(own.get(key, "None") != first.get(key, "None") for own in settings))


def _settings(method: Mapping[str, Any], known: dict[Hashable, Settings]) -> Settings:
    """Settings of a method; one object for all methods that differ in their budget alone."""
    if id(method) not in known:
        own = {key: str(value) for key, value in flat(method).items() if key != "selection.budget"}
        known[id(method)] = known.setdefault(tuple(own.items()), own)
    return known[id(method)]


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    out: dict[str, Any] = {}
    for key, value in nested.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return out
