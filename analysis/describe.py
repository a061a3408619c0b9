"""What is said of runs: settings in words, compressed layers, the rule for equal scores, and scores as shown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .load import Run

UNRANKED = ("Selection", "StreamingLLM")
"""Selections that rank no tokens. Records of the others name their rule, but for those from before there was one."""


def fewer_is_better(record: Mapping[str, Any]) -> bool:
    """Whether a run's scores are losses, in nats per token; they are shown as perplexity."""
    return record.get("unit") == "nats per token"


def has_current_intervals(record: Mapping[str, Any]) -> bool:
    """Whether the intervals of a record are made by the rules of :mod:`.intervals`; older ones name no construction.

    Records without scores have no intervals of an older rule.
    """
    if record["kind"] != "accuracy" or record["status"] != "done":
        return True
    paired = record.get("paired", {}).get("difference")
    return "method" in record["average"] and (paired is None or "method" in paired)


def average(record: Mapping[str, Any], name: str | None = None) -> Mapping[str, Any]:
    """A run's mean score with its interval as it is shown, or that of the data set ``name``."""
    estimate: Mapping[str, Any] = record["average"] if name is None else record["scores"][name]
    if not fewer_is_better(record):
        return estimate
    return {**estimate, **{k: None if estimate[k] is None else math.exp(estimate[k]) for k in ("mean", "low", "high")}}


def tie_rule(record: Mapping[str, Any]) -> str | None:
    """What ranked a run's tokens, down to equal scores; None: its method ranks none."""
    selection = record["identity"]["method"]["selection"]
    if selection["class"] in UNRANKED:
        return None
    return str(selection.get("ties", "score, then as the device sorts"))


def compressed_layers(record: Mapping[str, Any]) -> str | None:
    """How many attention layers a method works on, and what the other layers hold; None: the record does not say."""
    found = record.get("cache_layers")
    if found is None:
        return None
    spans: Counter[tuple[str, int]] = Counter()
    for local in found.get("local", ()):
        spans[local["kind"], local["tokens"]] += local["layers"]
    borrowing = found.get("reading_others", 0)
    held = [
        f"{'chunk' if kind == 'chunked_attention' else 'window'} of {tokens} tokens in {_layers(count)}"
        for (kind, tokens), count in sorted(spans.items())
    ]
    if borrowing:
        held.append(f"keys and values of another layer in {_layers(borrowing)}")
    if "recurrent" in found:
        held.append(f"recurrent state in {_layers(found['recurrent'])}")
    if "latents" in found:
        latents = found["latents"]
        numbers = f"{latents['latent_numbers_a_token']} latent numbers a token"
        held.append(numbers if latents["held"] == "latents" else f"{latents['held']} instead of {numbers}")
    attending = found["full_attention"] + spans.total() + borrowing
    share = f"{found['full_attention']} of {_layers(attending)} with attention"
    return f"{share} ({', '.join(held)})" if held else share


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def by_compressed_layers(runs: Iterable[Run]) -> dict[str, list[str]]:
    """Labels of the runs by :func:`compressed_layers`, without those whose records do not say.

    A method with an architecture of its own (``method.sharing``) differs in its layers by definition, and is left out.
    """
    labels: dict[str, list[str]] = {}
    for run in runs:
        if run.record["identity"]["method"].get("sharing") is not None:
            continue
        layers = compressed_layers(run.record)
        if layers is not None:
            labels.setdefault(layers, []).append(run.label)
    return labels


def longbench_rows(record: Mapping[str, Any]) -> str | None:
    """``mini`` for the bundled set, ``subset`` for a part of LongBench's rows, None for all of them and for other data.

    Told by the class of the task, because the name of a user's own data may hold the same words.
    """
    if record["identity"]["task"].get("class") not in ("LongBench", "LongBenchV2"):
        return None
    name, source = record["task"], record["identity"]["task"].get("source")  # the hash covers the source alone
    return next((part for part in ("mini", "subset") if f"-{part}" in name or source == f"longbench-{part}"), None)


def setting(record: Mapping[str, Any], runs: Iterable[Run]) -> str:
    """The settings of a group in words: dtype, device, batch size and the like.

    Args:
        record: of one run of the group.
        runs: those shown. The layers that methods work on are named where those are not simply all layers of the model.
    """
    identity, runs = record["identity"], list(runs)
    words = [identity["dtype"], f"on {identity['device']}"]
    hardware = identity.get("hardware")
    if hardware:
        words.append(f"({hardware['gpu'] or hardware['cpu']}, {hardware['torch_threads']} threads)")
    if identity.get("batch_size", 1) is not None:  # None: what was searched for
        words.append(f"batch {identity.get('batch_size', 1)}")
    if identity.get("runner", {}).get("compile"):
        words.append("compiled steps")
    limit = identity["task"].get("limit")
    if limit is not None:
        fewest = min([limit, *record["data"].get("examples", {}).values()])  # a data set may have fewer rows
        of_each = f"first {limit if fewest == limit else f'{fewest} to {limit}'} of each set"
        words.append(of_each if record["kind"] == "accuracy" else f"{limit} requests")
    words += [f"{key} {value}" for key, value in record.get("shown", {}).items() if value is not None]
    if identity["seed"] and len({run.record["identity"]["seed"] for run in runs}) <= 1:
        words.append(f"seed {identity['seed']}")
    layers = by_compressed_layers(runs)
    if len(layers) > 1:
        words.append("methods work on different layers")
    elif any("(" in text for text in layers):  # some layer holds something else
        words.append(f"methods work on {next(iter(layers))}")
    return ", ".join(words).replace(", (", " (").replace(f"{identity['dtype']}, on", f"{identity['dtype']} on")


def is_needle(run: Run) -> bool:
    """Whether a run has prompts of several lengths or depths to draw."""
    return bool(run.done and run.record["identity"]["task"].get("class") == "Needle")
