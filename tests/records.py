"""Records as runs leave them, made by hand: what the tables and plots are tested with."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from kvbench.analysis.schema import identity_hash


def estimate(mean: float, n: int = 20, half: float | None = 1.0) -> dict[str, Any]:
    """A mean with its interval."""
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"mean": mean, "low": low, "high": high, "n": n, "method": "t", "reason": ""}


def head(kind: str, method: str, budget: int | None, task: str, further: dict[str, Any]) -> dict[str, Any]:
    selection = {"class": "Selection"} if budget is None else {"class": "SnapKV", "budget": budget, "window": 32}
    identity = {"name": method, "selection": selection, "storage": {"class": "Dense"}}
    model = {"name": "m", "fingerprint": "f"}
    common = {"kind": kind, "model": model, "device": "cpu", "dtype": "float32", "seed": 0}
    return {
        "schema": 1,
        "status": "done",
        "kind": kind,
        "hash": f"{kind[0]}-{method}-{budget}",
        "identity": {**common, "method": identity, **further},
        "task": task,
        "model": "m",
        "method": method,
        "method_label": method if budget is None else f"{method} {budget}",
        "budget": budget,
        "data": {"name": task, "examples": {"lcc": 20, "qasper": 20}},
    }


def accuracy(method: str, budget: int | None, mean: float, task: str = "longbench", **identity: Any) -> dict[str, Any]:
    """An accuracy record: lcc one point above the mean, qasper one below."""
    made = head(
        "accuracy", method, budget, task, {"task": {"class": "LongBench", "name": task, "limit": None}, **identity}
    )
    ratio = 1.0 if budget is None else budget / 4096
    made["scores"] = {"lcc": estimate(mean + 1), "qasper": estimate(mean - 1)}
    made["average"] = estimate(mean, 40)
    made["averages"] = {}
    made["bytes"] = {"kv_bytes_stored": 2**26 * ratio, "kv_ratio": ratio}
    if method != "full":
        made["paired"] = {"with": "full", "difference": estimate(mean - 22.0)}
    return made


def efficiency(method: str, budget: int | None, tpot_ms: float, prompt_tokens: int = 4096) -> dict[str, Any]:
    """An efficiency record of one batch of one request with 65 output tokens."""
    task = f"shape-{prompt_tokens}+65"
    further = {
        "task": {"prompt_tokens": prompt_tokens, "new_tokens": 65, "class": "Shape", "source": task},
        "batch_size": 1,
        "hardware": {"cpu": "a cpu", "gpu": None, "torch_threads": 2},
        "runner": {"warmups": 1, "repeats": 5, "chunk_size": None},
    }
    made = head("efficiency", method, budget, task, further)

    def spread(value: float) -> dict[str, Any]:
        return {"median": value, "min": value * 0.9, "max": value * 1.1, "repetitions": [value] * 5}

    made["metrics"] = {
        "ttft_ms": spread(1000.0),
        "tpot_ms": spread(tpot_ms),
        "prefill_tokens_per_s": spread(4096.0),
        "decode_tokens_per_s": spread(1000 / tpot_ms),
        "output_tokens_per_s": spread(900 / tpot_ms),
    }
    made["bytes"] = {"kv_bytes_stored": 2**26 if budget is None else 2**14 * budget}
    made["memory"] = {
        "problem": None,
        "peak_prefill": {"allocated": 900 * 2**20, "reserved": None},
        "peak_decode": {"allocated": 600 * 2**20, "reserved": None},
    }
    made["bandwidth"] = {"copy_bytes_per_s": 1e10, "problem": None}
    made["limit"] = {"mbu": spread(0.5)}
    made["workload"] = {"prompt_tokens": prompt_tokens, "output_tokens": 65}
    if method != "full":
        made["paired"] = {"with": "full", "decode_speed_up": 1.5, "decode_speed_up_by_bytes": 2.0}
    return made


def save(folder: Path, *records: dict[str, Any]) -> Path:
    """Write each into a run folder of its own below ``folder``, with samples that give its scores; returns ``folder``.

    The hash is that of the identity; a record that must have another one is written by hand.
    """
    for record in records:
        record["hash"] = identity_hash(record["identity"])
        path = folder / record["task"] / record["method"] / record["hash"]
        path.mkdir(parents=True)
        (path / "record.json").write_text(json.dumps(record))
        if record["kind"] == "accuracy" and record["status"] == "done":
            (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples(record)))
    return folder


def samples(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows whose means are the record's scores: the same spread for every method, and a small one of its own."""
    noise = random.Random(record["hash"])
    rows = []
    for dataset, n in record["data"]["examples"].items():
        scale = 1.0 if "unit" in record else 100.0
        offsets = [10 * ((i % 5) - 2) + noise.uniform(-3, 3) for i in range(n)]
        middle = sum(offsets) / n
        for i, offset in enumerate(offsets):
            score = (record["scores"][dataset]["mean"] + offset - middle) / scale
            rows.append({"dataset": dataset, "id": f"{i:03}", "score": score, "new_tokens": 8 + i % 3})
    return rows


def with_samples(record: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The accuracy record with the scores of these rows, which are for :func:`save_samples`."""
    scale = 1.0 if "unit" in record else 100.0
    by_set: dict[str, list[float]] = {}
    for row in rows:
        by_set.setdefault(row["dataset"], []).append(scale * row["score"])
    record["scores"] = {name: estimate(sum(scores) / len(scores), len(scores)) for name, scores in by_set.items()}
    record["average"] = estimate(sum(one["mean"] for one in record["scores"].values()) / len(by_set), len(rows))
    record["data"] = record["data"] | {"examples": {name: len(scores) for name, scores in by_set.items()}}
    return record


def save_samples(folder: Path, record: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the rows into ``samples.jsonl`` beside this record, which :func:`save` wrote below ``folder``."""
    path = folder / record["task"] / record["method"] / record["hash"] / "samples.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
