"""Sentences below a table: what a reader must know of how its runs were made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...conf.versions import older_parts
from ..describe import by_compressed_layers, longbench_rows, tie_rule
from ..entries import co_batched
from ..load import Run
from .cells import OLDER

FEW_EXAMPLES = 30
PARTS = {"selection": "policy"}
"""Names of parts whose key in records is another one."""


def guards(record: Mapping[str, Any]) -> list[str]:
    """What the scores of a group must not be taken for; said in every form of output."""
    examples = sum(record["data"].get("examples", {}).values())
    warnings = []
    if longbench_rows(record) == "mini":
        warnings.append("Scores on the small bundled set, not LongBench scores.")
    elif longbench_rows(record) == "subset":
        warnings.append("A part of LongBench's rows: not to be compared with published LongBench scores.")
    if record["kind"] == "accuracy" and examples < FEW_EXAMPLES:
        warnings.append(f"{examples} examples say little: mind the intervals.")
    return warnings


def narrow_storage(runs: Sequence[Run]) -> list[str]:
    """Which runs' shares of the bytes are of a 32-bit cache."""
    quantized = [r.label for r in runs if r.record["identity"]["method"]["storage"]["class"] not in ("Dense", "Ragged")]
    if not quantized or runs[0].record["identity"]["dtype"] != "float32":
        return []
    return [f"What {', '.join(quantized)} keeps is a share of a 32-bit cache; of a 16-bit one it is larger."]


def made_by(runs: Sequence[Run]) -> list[str]:
    """Who made a table's rows, where a reader must know: changed files, or more than one version of something."""
    sessions = list({id(maker): maker for run in runs_by_makers(runs) for maker in makers(run.record)}.values())
    notes = []
    if any(m.get("git", {}).get("dirty") for m in sessions):
        notes.append("Made by code that differs from its commit.")
    hardware = [m.get("hardware", {}) for m in sessions]
    for what, versions in (
        ("of more than one commit", {str(m.get("git", {}).get("sha"))[:7] for m in sessions}),
        ("of more than one torch", {m.get("packages", {}).get("torch") for m in sessions}),
        ("on more than one processor", {h.get("gpu") or h.get("cpu") for h in hardware}),
    ):
        if len(versions) > 1:
            notes.append(f"Runs {what}: {', '.join(sorted(map(str, versions)))}.")
    return notes + tie_rules(runs) + different_layers(runs)


def older_versions(runs: Sequence[Run]) -> list[str]:
    """What the sign of runs with a part of an older version says."""
    parts = {PARTS.get(key, key) for run in runs for key in older_parts(run.record["identity"])}
    return [f"{OLDER}: {_older(sorted(parts))}."] if parts else []


def _older(parts: Iterable[str]) -> str:
    return f"older version of the {' or the '.join(parts)}, whose results may differ from today's"


def warnings_of(run: Run) -> list[str]:
    """What a number alone, in the CSV, must not be taken for."""
    parts = [PARTS.get(key, key) for key in older_parts(run.record["identity"])]
    return guards(run.record) + ([f"Made by an {_older(parts)}."] if parts else [])


def makers(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The processes that made a record's rows: one may have ended early, and rows may be those of other runs."""
    sessions = record.get("sessions")
    if not sessions or not all("after_examples" in session for session in sessions):
        return [record.get("provenance", {})]
    ends = [*(s["after_examples"] for s in sessions[1:]), sum(record["data"].get("examples", {}).values())]
    return [session for session, end in zip(sessions, ends, strict=True) if end > session["after_examples"]]


def runs_by_makers(runs: Sequence[Run]) -> list[Run]:
    """One run for each process or processes, since thousands of records share the mappings that describe them."""
    fields = ("sessions", "provenance", "data")
    return list({tuple(id(run.record.get(name)) for name in fields): run for run in runs}.values())


def different_layers(runs: Sequence[Run]) -> list[str]:
    """Which runs compressed which layers, where not all are alike."""
    layers = by_compressed_layers(runs)
    if len(layers) < 2:
        return []
    groups = "; ".join(f"{text}: {', '.join(labels)}" for text, labels in sorted(layers.items()))
    return [f"Methods did not work on the same layers. {groups}. A part of a difference is that."]


def tie_rules(runs: Sequence[Run]) -> list[str]:
    """Which rules chose between equally scored tokens, where not all runs were made under one."""
    by_rule: dict[str, list[str]] = {}
    for run in runs:
        rule = tie_rule(run.record)
        if rule is not None:
            by_rule.setdefault(rule, []).append(run.record["method_label"])
    if len(by_rule) < 2:
        return []
    rules = "; ".join(f"by {rule}: {', '.join(dict.fromkeys(labels))}" for rule, labels in sorted(by_rule.items()))
    return [f"Tokens were not ranked alike ({rules}): a part of a difference is the choice among equal scores."]


def missing_sets(runs: Sequence[Run]) -> list[str]:
    """Which runs lack a data set that others have: their means are of other data."""
    done = [run for run in runs if run.done]
    every = set().union(*(run.record["scores"] for run in done))
    lacking = [run.label for run in done if len(run.record["scores"]) < len(every)]
    return [f"Some data sets are missing, so these means are of other data: {', '.join(lacking)}."] if lacking else []


def ways_of_reading(runs: Sequence[Run]) -> list[str]:
    """How prompts were prefilled, if it differs, in 16 bits: chunks and a shared prefill each round differently."""
    dtype = runs[0].record["identity"]["dtype"]
    if dtype == "float32":
        return []
    done = [run for run in runs if run.done]
    chunks = sorted({m.get("chunk_size") or 0 for run in runs_by_makers(done) for m in makers(run.record)})
    methods = sorted({1 + count for run in done if (count := co_batched(run.record)) is not None})
    ways = []
    if len(chunks) > 1:
        ways.append(f"in chunks of {', '.join(str(size) if size else 'all' for size in chunks)} tokens")
    if len(methods) > 1:
        ways.append(f"for {', '.join(map(str, methods))} methods at once")
    if not ways:
        return []
    return [f"Prefill ran {' and '.join(ways)}: in {dtype} each way rounds differently."]


def ways_of_decoding(runs: Sequence[Run]) -> list[str]:
    """Which runs replayed captured steps, where not all are alike: some of the difference in time is that."""
    by_way: dict[str, list[str]] = {}
    for run in runs:
        if run.done and "decode" in run.record:
            by_way.setdefault(run.record["decode"], []).append(run.label)
    if len(by_way) < 2:
        return []
    ways = "; ".join(f"{way}: {', '.join(labels)}" for way, labels in sorted(by_way.items()))
    return [f"Decode steps were not run alike ({ways}): a part of the difference in time is that."]


def not_measured(runs: Sequence[Run]) -> list[str]:
    """What could not be measured, a line each."""
    out = []
    for run in runs:
        problems = [run.record.get(part, {}).get("problem") for part in ("memory", "bandwidth")]
        out += [f"{run.label}: {problem}." for problem in problems if problem]
    return out
