"""Add the bytes over the steps to accuracy runs that were made before runs recorded them.

``kv_bytes_mean``, ``kv_bytes_read_mean`` and ``kv_bytes_full_mean`` follow from the method, the model and the numbers
of tokens of each example, so no run is made again. A run is changed only if its method, found among those of
``conf/runner`` or by its label, has the recorded identity, versions aside, and the bytes by formula that each of its
rows recorded; what is left as it is, is printed.

    python scripts/add_step_bytes.py RESULTS
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml

from kvbench.analysis.costs import STEP_BYTES, means_over_steps
from kvbench.conf.errors import InputError
from kvbench.methods.cache.layout import model_shape
from kvbench.methods.cache.method import Method
from kvbench.models.embedded import Embedded
from kvbench.runners.config.methods import named_method, paired_methods
from kvbench.runners.records.step_bytes import step_bytes

MODEL = "smollm2-135m"
PARTS = {"adaptive": "allocator=adaptive storage=ragged", "kivi4": "storage=kivi4"}
"""Parts of a label, and how they are given."""
Rows = list[dict[str, Any]]


@cache
def known_methods() -> dict[str, list[Method]]:
    """Methods of the lists in ``conf/runner``, by label; parameters that a label does not show may differ."""
    found: dict[str, list[Method]] = {}
    for name in ("equal_bytes", "all_methods"):
        path = files("kvbench.conf").joinpath("runner", f"{name}.yaml")
        for entry in yaml.safe_load(path.read_text(encoding="utf-8"))["pair_with"]:
            for method in paired_methods(entry, None):
                found.setdefault(method.label, []).append(method)
    return found


def candidates(label: str) -> Iterator[Method]:
    """Methods with this label."""
    yield from known_methods().get(label, [])
    head, *parts = label.split(" + ")
    name, *budget = head.split()
    if not files("kvbench.conf").joinpath("method", f"{name}.yaml").is_file():
        return
    settings = [f"budget={budget[0]}"] if budget else []
    for part in parts:
        every = f"schedule=every_n schedule.n={part.removeprefix('every ')}" if part.startswith("every ") else None
        settings.append(every or PARTS.get(part, part))
    try:
        yield named_method(" ".join([name, *settings]))
    except InputError:
        return


@cache
def loaded(dtype: str) -> Any:
    """The model whose runs are completed."""
    return Embedded(MODEL).load("cpu", getattr(torch, dtype)).model


def completed(record: Mapping[str, Any], rows: Rows) -> Rows | None:
    """The rows with the bytes over the steps; None: no method has the recorded bytes."""
    model = loaded(record["identity"]["dtype"])
    shape = model_shape(model)
    for method in candidates(record["method_label"]):
        made = []
        if without_versions(method.identity()) != without_versions(record["identity"]["method"]):
            continue
        for row in rows:
            question = row.get("question_tokens", 0)
            prompt = row["prompt_tokens"] - question
            if method.bytes_formula(shape, prompt) != row["kv_bytes_formula"]:
                break
            steps = [(prompt, question + i) for i in range(max(1, row["new_tokens"]))]
            padding = max(0, row["kv_bytes_stored"] - row["kv_bytes_logical"])
            made.append(row | step_bytes(method, model, steps, padding))
        else:
            return made
    return None


def without_versions(identity: Any) -> Any:
    """An identity as JSON without the versions of its parts, which do not change its bytes."""
    if not isinstance(identity, Mapping):
        return list(identity) if isinstance(identity, tuple) else identity
    return {key: without_versions(value) for key, value in identity.items() if key != "version"}


def problem(path: Path, record: Mapping[str, Any], rows: Rows) -> str | None:
    """Why a run cannot be completed."""
    if record["model"] != MODEL:
        return "is of another model"
    if not any(row["new_tokens"] for row in rows):
        return "is scored by likelihoods: its rows do not say how many tokens followed the prompt"
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Complete every accuracy run below a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    count = 0
    for path in sorted(parser.parse_args(arguments).results.rglob("record.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["kind"] != "accuracy" or record["status"] != "done" or "kv_bytes_mean" in record["bytes"]:
            continue
        samples = path.with_name("samples.jsonl")
        rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines() if line]
        reason = problem(path, record, rows)
        made = None if reason else completed(record, rows)
        if made is None:
            print(f"{path.parent}: {record['method_label']} {reason or 'has other bytes by formula today'}")
            continue
        samples.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
        record["bytes"] |= means_over_steps(made)
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        count += 1
    print(f"{count} runs completed with {', '.join(STEP_BYTES)}")


if __name__ == "__main__":
    main()
