"""Tables of the committed results that are no records, and of two views that ``kvbench table`` does not have.

    python scripts/result_tables.py engine results/reference/engine/*-epyc.json
    python scripts/result_tables.py distance results/reference/tiny_recall results/reference/recall_window

Each prints one table as Markdown. Nothing is measured and torch is not imported; the pages that show the tables name
the scripts that made the files.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

from kvbench.analysis.load import comparable, load
from kvbench.analysis.tables import MIB, at_best_rate

FORMS = {
    "linear": "`torch.nn.Linear`",
    "blocked": "in blocks",
    "joined": "in blocks, those with the same input joined (steps that are not compiled)",
    "cpp": "kernel in C++, joined (what compiled steps do)",
    "adding_up": "adding up",
}
"""Products of a step with the weights (``bench_decode_parts.py``)."""

ATTENTION = {
    "cpp_kernel": "the kernel in C++ (what compiled steps do)",
    "whole_heads": "PyTorch's flash kernel, a head a thread (what other steps do here)",
    "in_2_parts": "the same in two parts, joined by their log-sum-exp",
    "in_8_parts": "in eight parts",
    "batched_products": "two batched matrix products",
    "products_by_head": "two matrix products a head",
    "products_by_query": "two vector products a query",
    "sums_compiled": "torch.compile of the definition",
    "adding_up": "adding the same numbers up",
}

ENGINE = {
    "decode_speed_full_over_transformers": "decode speed of `full` / `transformers.generate`, one sequence",
    "decode_speed_full_over_transformers_batch_8": "the same, eight sequences",
    "snapkv_512_step_over_full": "step of SnapKV 512 / step of `full`, four sequences of 8192",
    "snapkv_512_bytes_over_full": "bytes that the first reads / bytes that the second reads",
    "compression_over_prefill": "SnapKV's compression time / prefill time",
    "fan_out_8_budgets_over_full": "wall time of one run of 8 budgets on a shared prompt / one run of `full`",
    "read_bandwidth_gb_per_s": "bandwidth of reading, GB/s",
    "copy_bandwidth_gb_per_s": "bandwidth of a copy, GB/s",
    "decode_bandwidth_over_read_bandwidth_compiled_short": (
        "decode bandwidth of `full` (weights + KV per step) / bandwidth of reading, 512 tokens, compiled"
    ),
    "decode_bandwidth_over_read_bandwidth_compiled": "the same, 4096 tokens",
    "decode_bandwidth_over_read_bandwidth_short": "without compiling, 512 tokens",
    "decode_bandwidth_over_read_bandwidth": "without compiling, 4096 tokens",
    "decode_bandwidth_over_copy_bandwidth": ("decode bandwidth without compiling, 4096 tokens / bandwidth of a copy"),
    "decode_speed_compiled_over_full": "decode speed of `full`, compiled / not, 4096 tokens",
    "decode_speed_compiled_over_full_short": "the same, 512 tokens",
}

RATIOS = (
    ("gqa2 / mha", "gqa2", "mha", "cla_table1.csv", "H128-GQA4", "H128-MHA", "CLA Table 1, 4 of 16 heads"),
    ("mqa / mha", "mqa", "mha", "cla_table1.csv", "H128-MQA", "H128-MHA", "CLA Table 1"),
    ("cla2 / its base", "cla2", "mha", "cla_table1.csv", "H128-MQA-CLA2", "H128-MQA", "CLA Table 1"),
    (
        "cla2 / its base, rates tuned",
        *("cla2", "mha", "cla_table3_5_7.csv", "H128-MQA-CLA2", "H128-MQA", "CLA Table 3"),
    ),
    ("cla3 / its base", "cla3", "mha", "cla_table1.csv", "H128-MQA-CLA3", "H128-MQA", "CLA Table 1"),
    ("yoco / mha", "yoco", "mha", "yoco_table5_6.csv", "YOCO_SWA", "Transformer", "YOCO Table 5, sliding window, 160M"),
    ("lckv-w2 / mha", "lckv-w2", "mha", "lckv_table2_3.csv", "LCKV w=2", "TinyLlama", "LCKV Table 3, 1.1B"),
)
"""What is compared, our two architectures, the file of a paper's numbers, its two models, and its source."""

Results = Mapping[str, Any]
"""Contents of files by the files' names without ending."""
Made = tuple[Sequence[str], Iterable[Sequence[str]]]
"""Heads of the columns, and rows."""


def methods(results: Results) -> Made:
    """What each method costs, gains and holds, from ``bench_methods.py``."""
    (result,) = results.values()
    lengths = list(_first(result["methods"])["compression_over_prefill"])
    batches = list(_first(result["methods"])["bytes"])
    heads = [*(f"compression, {n}" for n in lengths), *(f"prefill / full, {n}" for n in lengths), "decode / full"]
    heads += [f"MiB, batch {batch}" for batch in batches] + ["room to grow", "logical - formula"]
    rows = []
    for label, row in result["methods"].items():
        held = list(row["bytes"].values())
        cells = [f"{row['compression_over_prefill'][n]:.3f}" for n in lengths]
        cells += [f"{row['prefill_over_full'][n]:.2f}" for n in lengths] + [f"{row['decode_over_full']:.2f}"]
        cells += [f"{one['stored'] / MIB:.2f}" for one in held]
        cells += [f"{(held[0]['stored'] - held[0]['logical']) / MIB:.2f}"]
        cells += [" and ".join(str(one["logical"] - one["formula"]) for one in held)]
        rows.append([label, *cells])
    return ["method", *heads], rows


def family(results: Results) -> Made:
    """Times of the small family over the plain model's, from ``bench_family.py``."""
    (result,) = results.values()
    names = {"train": "training step / plain", "prefill": "prefill / plain", "decode": "decode / plain"}
    rows = ([label, *(f"{row[key]:.2f}" for key in names)] for label, row in result["members"].items())
    return ["sharing", *names.values()], rows


def sharing(results: Results) -> Made:
    """What sharing costs and holds, from ``bench_sharing.py``."""
    (result,) = results.values()
    heads = [
        "prefill / plain",
        "decode / plain",
        "KV layers",
        "bytes/token",
        "MiB stored",
        "MiB by formula",
        "of plain",
    ]
    rows = []
    for label, row in result["sharing"].items():
        cells = [f"{row['prefill_over_plain']:.2f}", f"{row['decode_over_plain']:.2f}", str(row["kv_layers"])]
        cells += [str(row["bytes_per_token"]), f"{row['stored'] / MIB:.2f}", f"{row['formula'] / MIB:.2f}"]
        rows.append([label, *cells, f"{row['formula'] / row['plain']:.3f}"])
    return ["sharing", *heads], rows


def engine(results: Results) -> Made:
    """Ratios of ``bench_engine.py``, a column a file."""

    def cell(result: Mapping[str, Any], key: str) -> str:
        value = result.get(key)
        return "" if value is None else f"{value:.0f}" if key.endswith("_gb_per_s") else _digits(value)

    return ["ratio", *results], ([name, *(cell(one, key) for one in results.values())] for key, name in ENGINE.items())


def weights(results: Results) -> Made:
    """Milliseconds of all products of a step with the weights by number of rows, from ``bench_decode_parts.py``."""
    counts = list(_first(results)["weights_ms"]["linear"])
    rows = []
    for result in results.values():
        dtype = result["settings"]["dtype"]
        for key, name in FORMS.items():
            times = result["weights_ms"].get(key, {})
            rows.append([f"{name}, {dtype}", *(_digits(times[n]) if n in times else "" for n in counts)])
    return ["ms, by rows", *counts], rows


def steps(results: Results) -> Made:
    """Milliseconds of a whole step, eager and compiled, from ``bench_decode_parts.py``."""
    lengths = list(_first(results)["step_ms_by_length"])
    rows = []
    for result in results.values():
        times = [result["step_ms_by_length"][n] for n in lengths]
        rows.append([result["settings"]["dtype"], *(f"{t['eager']:.1f} / {t['compiled']:.1f}" for t in times)])
    return ["ms, eager / compiled", *(f"behind {n} tokens" for n in lengths)], rows


def attention(results: Results) -> Made:
    """Milliseconds and GB/s of one layer's attention, a column a file of ``bench_decode_parts.py``."""

    def cell(result: Mapping[str, Any], key: str) -> str:
        ms = result["attention_ms"].get(key)
        if ms is None:
            return ""
        return f"{ms:.2f} ({result['attention_bytes'] / ms / 1e6:.1f})"

    return ["attention of one layer, ms (GB/s)", *results], (
        [name, *(cell(result, key) for result in results.values())] for key, name in ATTENTION.items()
    )


def parts(results: Results) -> Made:
    """Milliseconds of one layer's attention by whole heads and in two parts, from ``bench_decode_parts.py``."""
    lengths = list(next(iter(_first(results)["attention_ms_by_heads_and_length"].values())))
    rows = []
    for result in results.values():
        for heads, by_length in result["attention_ms_by_heads_and_length"].items():
            times = [by_length[n] for n in lengths]
            name = f"{heads} head{'s' if heads != '1' else ''}, {result['settings']['dtype']}"
            rows.append([name, *(f"{t['whole_heads']:.2f} / {t['in_2_parts']:.2f}" for t in times)])
    return ["whole / in two parts, ms", *lengths], rows


def passes(results: Results) -> Made:
    """Loss by number of passes, from ``passes.py``."""
    (result,) = results.values()
    return ["passes", *result["loss"]], [["loss", *(f"{loss:.4f}" for loss in result["loss"].values())]]


def ties(results: Results) -> Made:
    """What the choice among equal scores changes, from ``measure_ties.py``."""
    (result,) = results.values()
    rows = []
    for budget in dict.fromkeys(row["budget"] for row in result["rows"]):
        rule, *others = (row for row in result["rows"] if row["budget"] == budget)
        found = [row["difference"] for row in others]
        rows.append(
            [
                str(budget),
                " / ".join(f"{100 * row['kept_tokens_changed']:.1f} %" for row in others),
                " / ".join(str(row["texts_changed"]) for row in others),
                f"{rule['mean_score']:.1f}",
                " / ".join(map(_difference, found)),
            ]
        )
    heads = ("budget", "kept tokens that change", f"texts that change, of {result['examples']}", "score of the rule")
    return [*heads, "difference"], rows


def distance(paths: Sequence[Path]) -> Made:
    """Right answers of the recall task in percent, by tokens since the answer was given, of runs in results folders."""
    runs = [run for run in load(*paths)[0] if "accuracy_by_distance" in run.record]
    found = [(run, run.record["accuracy_by_distance"]) for run in runs]
    upto, counts = found[0][1]["up_to_tokens"], found[0][1]["n"]
    rows = [
        [f"{run.record['task']}: {run.label}", *(f"{value:.0f}" for value in one["accuracy"])] for run, one in found
    ]
    return ["task and cache", *(f"up to {n}" for n in upto)], [*rows, ["questions", *map(str, counts)]]


def ratios(paths: Sequence[Path]) -> Made:
    """Perplexities of architectures as ratios, a paper's and those of the records in a results folder."""
    trained = [run for run in load(*paths)[0] if run.record["kind"] == "train"]
    (group,) = (group for group in comparable(trained) if group[0].record["task"].startswith("text"))
    ours = {
        runs[0].record["method_label"]: fmean(run.record["validation"]["perplexity"] for run in runs)
        for runs in at_best_rate(group, reported=True).values()
    }
    rows = []
    for name, method, base, file, model, of, source in RATIOS:
        text = (files("kvbench.analysis") / "papers" / "data" / file).read_text(encoding="utf-8")
        read = list(csv.DictReader(text.splitlines()))
        value, reference = (_published(read, one) for one in (model, of))
        words, ratio = f"{value:g} / {reference:g}", value / reference
        if "loss" in read[0]:
            words, ratio = f"loss {value:g} / {reference:g}", math.exp(value - reference)
        rows.append([name, words, source, f"{ratio:.3f}", f"{ours[method] / ours[base]:.3f}"])
    return ["perplexity of", "published", "source", "published ratio", "ours"], rows


def _published(read: Sequence[Mapping[str, str]], model: str) -> float:
    """The first number of a model in a paper's table."""
    return next(float(row.get("perplexity") or row["loss"]) for row in read if row["model"] == model and _number(row))


def _number(row: Mapping[str, str]) -> str:
    return row.get("perplexity") or row.get("loss") or ""


def _digits(value: float) -> str:
    """Three significant digits."""
    return f"{value:#.3g}".rstrip(".")


def _difference(found: Mapping[str, float]) -> str:
    """A paired difference with its interval, if it has a width."""
    mean, low, high = (_signed(found[key]) for key in ("mean", "low", "high"))
    return mean if found["low"] == found["high"] else f"{mean} [{low}, {high}]"


def _signed(value: float) -> str:
    """A difference with one digit; a rounded zero has no sign."""
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def _first(results: Results) -> Any:
    return next(iter(results.values()))


OF_FILES: Mapping[str, Callable[[Results], Made]] = {
    made.__name__: made for made in (methods, family, sharing, engine, weights, steps, attention, parts, passes, ties)
}
OF_RUNS: Mapping[str, Callable[[Sequence[Path]], Made]] = {made.__name__: made for made in (distance, ratios)}


def markdown(made: Made, words: int = 1) -> str:
    """A table whose first columns hold words and the others numbers."""
    heads, rows = made
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * words}{'---:|' * (len(heads) - words)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def main(argv: Sequence[str] | None = None) -> int:
    """Print one table."""
    described = "\n".join(f"  {name:<10} {(made.__doc__ or '').strip()}" for name, made in (OF_FILES | OF_RUNS).items())
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=f"{__doc__}\ntables:\n{described}", formatter_class=formatter)
    parser.add_argument("table", choices=[*OF_FILES, *OF_RUNS])
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="JSON files, or results folders")
    args = parser.parse_args(argv)
    if args.table in OF_RUNS:
        print(markdown(OF_RUNS[args.table](args.paths), words=3 if args.table == "ratios" else 1))
    else:
        print(markdown(OF_FILES[args.table]({p.stem: json.loads(p.read_text(encoding="utf-8")) for p in args.paths})))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
