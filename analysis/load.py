"""Finished runs read back from a results folder: their records, and which of them may stand in one table.

    runs, problems = load(Path("results/reference"))
    for group in comparable(runs): ...

The format of ``record.json`` is fixed here, by its reader; ``kvbench.runners.records.record`` writes it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..conf.errors import InputError

SCHEMA = 1
"""Version of record.json and samples.jsonl; a record of another version is reported, not guessed at."""

RECORD, SAMPLES = "record.json", "samples.jsonl"
REFERENCE = "reference"
"""Folder of the committed runs below the results folder."""
HEADLINES = ("score", "kv_bytes_stored", "kv_ratio", "ttft_ms", "tpot_ms", "decode_tokens_per_s", "peak_decode_bytes")
"""Columns that :func:`frame` has whatever kinds of runs there are."""

FIELDS = ("status", "kind", "hash", "identity", "task", "model", "method", "method_label", "budget", "data")


RESULTS = {
    "accuracy": ("scores", "average", "bytes"),
    "train": ("training", "curve", "validation", "bytes", "weights"),
    "efficiency": ("metrics", "bytes", "memory", "limit", "bandwidth", "workload"),
}
"""Fields of a finished run by its kind."""

UNRANKED = ("Selection", "StreamingLLM")
"""Selections that rank no tokens. Records of the others name their rule, but for those from before there was one."""


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        path: its folder.
        record: ``record.json`` as it is.
        label: name for tables; see :func:`load`.
    """

    path: Path
    record: Mapping[str, Any]
    label: str

    @property
    def is_full_cache(self) -> bool:
        """Everything kept, uncompressed: the baseline (``full`` on another storage is not)."""
        method = self.record["identity"]["method"]
        plain = {"selection": {"class": "Selection"}, "storage": {"class": "Dense"}, "sharing": None}
        return all(method.get(part) == value for part, value in plain.items())

    @property
    def curve(self) -> str:
        """The label without its budget (``snapkv + kivi4``): what one curve of a figure is of."""
        budget = self.record["budget"]
        return self.label if budget is None else self.label.replace(f" {budget}", "", 1)

    @property
    def done(self) -> bool:
        """False for a run that was out of memory: it has no numbers."""
        return self.record["status"] == "done"

    def samples(self) -> list[dict[str, Any]]:
        """Rows of ``samples.jsonl``, one per example."""
        with (self.path / SAMPLES).open(
            encoding="utf-8"
        ) as file:  # str.splitlines would also split at U+2028 in a text
            return [json.loads(line) for line in file]


def read_record(path: Path) -> dict[str, Any]:
    """One ``record.json``.

    Raises:
        InputError: it is not JSON, or of another schema, or lacks a field that every record has.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise InputError("results_dir", path, "is not JSON; delete the folder to run it again") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else None
        raise InputError("results_dir", path, f"has schema {found}; this version reads {SCHEMA}")
    wanted = FIELDS + (RESULTS.get(str(record.get("kind")), ()) if record.get("status") == "done" else ())
    missing = [field for field in wanted if field not in record]
    if missing:
        raise InputError("results_dir", path, f"lacks {', '.join(missing)}; delete the folder to run it again")
    return record


def load(folder: Path) -> tuple[list[Run], list[str]]:
    """Every finished run under ``folder``, by method and budget, and a line for each record that cannot be read.

    The committed runs, in ``reference`` directly below a results folder, are read only if that folder is named.

    Runs of one table whose labels would be the same (``snapkv 512`` with two windows) are told apart by the settings
    in which they differ.

    Raises:
        InputError: no record there at all.
    """
    paths = [path for path in sorted(folder.rglob(RECORD)) if path.relative_to(folder).parts[0] != REFERENCE]
    if not paths:
        raise InputError(
            "RESULTS", folder, f"holds no finished run ({RECORD}); `kvbench run results_dir={folder}` makes some"
        )
    runs, problems = [], []
    for path in paths:
        try:
            record = read_record(path)
        except InputError as error:
            problems.append(f"skipped: {error}")
        else:
            runs.append(Run(path.parent, record, record["method_label"]))
    return _sorted(runs), problems


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """The runs in these folders, in the order and with the labels of :func:`load`.

    Raises:
        InputError: one of them has no record that can be read.
    """
    records = [(folder, read_record(folder / RECORD)) for folder in folders]
    return _sorted([Run(folder, record, record["method_label"]) for folder, record in records])


def _sorted(runs: list[Run]) -> list[Run]:
    return [run for group in comparable(sorted(runs, key=_order)) for run in _distinct(group)]


def _order(run: Run) -> tuple[Any, ...]:
    """The baseline first, then by budget, then by method: rows of one budget stand together."""
    budget = run.record["budget"]
    return (not run.is_full_cache, budget is not None, budget or 0, run.record["method"], run.label, run.record["hash"])


def comparable(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs that differ in their method alone, group by group: what may stand in one table."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(settings_key(run.record), []).append(run)
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
        held.append(f"{latents['held']} instead of {latents['latent_numbers_a_token']} latent numbers a token")
    attending = found["full_attention"] + spans.total() + borrowing
    share = f"{found['full_attention']} of {_layers(attending)} with attention"
    return f"{share} ({', '.join(held)})" if held else share


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def by_compressed_layers(runs: Iterable[Run]) -> dict[str, list[str]]:
    """Labels of the runs by :func:`compressed_layers`, without those whose records do not say.

    A method with an architecture of its own (``method.sharing``) differs in its layers by definition, and is left out.
    """
    found: dict[str, list[str]] = {}
    for run in runs:
        if run.record["identity"]["method"].get("sharing") is not None:
            continue
        layers = compressed_layers(run.record)
        if layers is not None:
            found.setdefault(layers, []).append(run.label)
    return found


def longbench_rows(record: Mapping[str, Any]) -> str | None:
    """``mini`` for the bundled set, ``subset`` for a part of LongBench's rows, None for all of them and for other data.

    Told by the class of the task, because the name of a user's own data may hold the same words.
    """
    if record["identity"]["task"].get("class") not in ("LongBench", "LongBenchV2"):
        return None
    return next((part for part in ("mini", "subset") if f"-{part}" in record["task"]), None)


def fewer_is_better(record: Mapping[str, Any]) -> bool:
    """Whether a run's scores are losses, in nats per token; they are shown as perplexity."""
    return record.get("unit") == "nats per token"


def average(record: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
    """A run's mean score with its interval as it is shown, or that of the data set ``name``."""
    found: dict[str, Any] = dict(record["average"] if name is None else record["scores"][name])
    if fewer_is_better(record):
        found |= {k: None if found[k] is None else math.exp(found[k]) for k in ("mean", "low", "high")}
    return found


def _distinct(group: Sequence[Run]) -> list[Run]:
    """Labels that tell a method's settings wherever the group has it with more than one."""
    settings: dict[str, list[dict[str, Any]]] = {}  # of each curve
    for run in group:
        settings.setdefault(run.curve, []).append(_settings(run.record))
    out = []
    for run in group:
        same, mine = settings[run.curve], _settings(run.record)
        keys = sorted({k for s in same for k in s if len({str(other.get(k)) for other in same}) > 1})
        told = ", ".join(f"{k.rpartition('.')[2]}={mine[k]}" for k in keys if k in mine)
        out.append(Run(run.path, run.record, f"{run.label} ({told})" if told else run.label))
    return out


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """A method's settings but for the budget."""
    settings = flat(record["identity"]["method"])
    return {k: v for k, v in settings.items() if k != "selection.budget"}


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    out: dict[str, Any] = {}
    for key, value in nested.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return out


def setting(record: Mapping[str, Any], runs: Iterable[Run]) -> str:
    """The settings of a group in words: dtype, device, batch size and the like.

    Args:
        record: of one run of the group.
        runs: those shown. The layers that methods work on are named where those are not simply all layers of the model.
    """
    identity = record["identity"]
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
        words.append(f"first {limit} of each set" if record["kind"] == "accuracy" else f"{limit} requests")
    words += [f"{key} {value}" for key, value in record.get("shown", {}).items() if value is not None]
    if identity["seed"]:
        words.append(f"seed {identity['seed']}")
    layers = by_compressed_layers(runs)
    if len(layers) > 1:
        words.append("methods work on different layers")
    elif any("(" in text for text in layers):  # some layer holds something else
        words.append(f"methods work on {next(iter(layers))}")
    return ", ".join(words).replace(", (", " (").replace(f"{identity['dtype']}, on", f"{identity['dtype']} on")


def frame(runs: Sequence[Run]) -> pd.DataFrame:
    """Runs as a table for one's own analysis: a row a run, with what identifies it and its headline numbers.

    Columns that a kind of run has no number for are NaN there: ``score`` for an efficiency run, ``tpot_ms`` for an
    accuracy run.
    """
    rows = []
    for run in runs:
        record = run.record
        row: dict[str, Any] = {key: record[key] for key in ("kind", "status", "task", "model", "method", "budget")}
        row |= {"label": run.label, "dtype": record["identity"]["dtype"], "device": record["identity"]["device"]}
        row |= record.get("bytes", {})
        if "average" in record:
            shown = average(record)
            row |= {"score": shown["mean"], "score_low": shown["low"], "score_high": shown["high"]}
            row["score_unit"] = "perplexity" if fewer_is_better(record) else "percent"
        row |= {name: spread["median"] for name, spread in record.get("metrics", {}).items()}
        for phase in ("peak_prefill", "peak_decode"):
            if record.get("memory", {}).get(phase):
                row[f"{phase}_bytes"] = record["memory"][phase]["allocated"]
        row |= {"hash": record["hash"], "path": str(run.path)}
        rows.append(row)
    made = pd.DataFrame(rows)
    return made.reindex(columns=[*made.columns, *(c for c in HEADLINES if c not in made.columns)])
