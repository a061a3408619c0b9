"""The reference pages that are read off the code: configuration, methods, commands, records and the Python API.

    python scripts/docs_reference.py            # list the pages that differ from the code
    python scripts/docs_reference.py --write    # write them into docs/reference

It takes seconds and imports no torch. tests/integration/test_docs.py checks that the pages are current.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import yaml

import kvbench
from kvbench.analysis.schema import FIELDS, RECORD, RESULTS, SAMPLES, SCHEMA
from kvbench.runners.command import COMMANDS
from kvbench.runners.config.help import documented_keys, value_and_allowed
from kvbench.runners.config.loader import OF_ANY_KEY, groups

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "reference"
WRITTEN = "Written by `python scripts/docs_reference.py --write`; not to be edited by hand."
EXPERIMENT_HEADER = "# @package _global_\n"

RECORD_FIELDS = {
    "schema": "version of the format",
    "status": "`done`, or `oom`: the run was out of memory and has no results",
    "kind": "`accuracy`, `efficiency` or `train`",
    "execution": "`real`: nothing is masked or simulated",
    "hash": "12 hexadecimal digits over `identity`; the name of the run's folder",
    "identity": "everything that decides the run's numbers",
    "config": "the configuration of the command that made the run",
    "task": "name of the data; sets of different names never stand in one table",
    "model": "name of the model",
    "method": "name of the method",
    "method_label": "name with its budget and storage, for tables",
    "budget": "tokens per layer or a fraction of the prompt; null where the method has none",
    "needs": "what the method needs beyond a model and a prompt; only where there is something",
    "data": "where the examples came from",
    "data.name": "as `task`",
    "data.revision": "commit of a hub repository, else null",
    "data.sha256": "sha256 of the bytes of each data set",
    "data.note": "what a reader must know about the data",
    "data.examples": "number of examples of each data set",
    "batch_size": "prompts per forward",
    "finished": "time in UTC",
    "provenance": "what made the run, without host names, users or paths",
    "provenance.git": "commit of the code, and whether its files differed from it",
    "provenance.packages": "versions",
    "provenance.python": "version",
    "provenance.hardware": "processor, GPU, threads, memory, preloaded libraries",
    "load_average_before": "load of the machine over the last minute before the run",
    "sessions": "a line for each process that worked on the run: its code and the number of examples before it",
    "rode_with": "methods that shared the prefill of each prompt",
    "cache_layers": "number of the model's layers of each kind; a method works on those with full attention",
    "cache_layers.full_attention": "layers that attend to all tokens",
    "wall_s": "seconds that this run and those that shared its prefill took",
    "prompt_tokens": "mean over the examples",
    "further_forwards": "forwards of the model that the compression takes after the prefill, mean over the prompts; "
    "only where a method makes any (`kvzip`). Their time is in `metrics.compression_ms` of an efficiency run",
    "further_forwards.forwards_per_prompt": "number of forwards; those that another budget shares count for each",
    "further_forwards.tokens_per_prompt": "tokens that they give to the model again, the request's included",
    "unit": "unit of the scores where it is not percent",
    "scores": "mean, 95 % interval and number of examples of each data set",
    "average": "mean over the data sets, each with the same weight",
    "average.mean": "percent, or in `unit`",
    "average.low": "lower end of the 95 % interval",
    "average.high": "upper end of the 95 % interval",
    "average.n": "number of examples",
    "average.method": "construction of the interval; empty where there is none",
    "average.reason": "why there is no interval; empty where there is one",
    "averages": "further averages that the task defines",
    "interval": "how the interval of `average` was made: [statistics](../explanation/statistics.md)",
    "interval.method": "its construction; each estimate names its own",
    "interval.level": "share of intervals that hold the mean",
    "interval.resamples": "null: nothing is resampled",
    "by_distance": "loss by distance from the compressed context (`task=perplexity`)",
    "by_distance.up_to_tokens": "upper ends of the ranges of distance",
    "by_distance.nats": "mean loss in each range",
    "accuracy_by_distance": "percent right by how many tokens back the answer is (`task=recall`)",
    "paired": "comparison with the full cache on the same examples or requests",
    "paired.with": "label of the run that it is compared with",
    "paired.hash": "hash of that run",
    "paired.difference": "mean difference of the scores and its 95 % interval",
    "paired.decode_speed_up": "TPOT of full / TPOT",
    "paired.decode_speed_up_interval": "geometric mean of the ratio over the repetitions and its 95 % interval",
    "paired.decode_speed_up_by_bytes": "the same if a step took as long as reading its bytes",
    "paired.prefill_slow_down": "TTFT / TTFT of full",
    "paired.kv_bytes_saved_end": "bytes of the cache after the last step, full less this run",
    "paired.peak_decode_bytes_saved": "peak of memory while decoding, full less this run",
    "paired.peak_prefill_bytes_saved": "peak of memory during the prefill, full less this run",
    "bytes": "bytes of the cache: means over the examples, or totals over the requests",
    "bytes.kv_bytes_stored": "every tensor of the cache once, when the prompt has been compressed",
    "bytes.kv_bytes_stored_end": "the same after the last step",
    "bytes.kv_bytes_logical": "bytes of real tokens, without padding and room to grow",
    "bytes.kv_bytes_logical_end": "the same after the last step",
    "bytes.kv_bytes_formula": "bytes by the method's formula",
    "bytes.kv_bytes_formula_end": "the same after the last step",
    "bytes.kv_bytes_full": "bytes of the full cache for the same tokens",
    "bytes.kv_ratio": "stored / full",
    "bytes.kv_bytes_mean": "bytes held when a token was predicted, mean over these tokens: by formula, with "
    "the padding that was stored after the prompt",
    "bytes.kv_bytes_read_mean": "bytes of the cache that a step reads, likewise",
    "bytes.kv_bytes_full_mean": "bytes of the full cache for the same tokens, likewise",
    "bytes.kv_ratio_mean": "mean / full mean: the share of the full cache's bytes that was held over the whole answer",
    "bytes.weight_bytes": "bytes of the model's weights",
    "bytes.kv_bytes_read_per_step": "bytes of the cache that the last step read: counted where a method reads a part "
    "of it (`quest`), else by formula; once for every layer of the model that attends to them",
    "bytes.weight_bytes_read": "bytes of the weights that a decode step reads",
    "bytes.requests": "number of requests that the bytes are of",
    "bytes.kv_bytes_per_token": "of a trained model: bytes that each token adds",
    "bytes.kv_bytes_fixed": "of a trained model: bytes of windows and states at any length",
    "bytes.dtype": "of a trained model: dtype of these bytes",
    "metrics": "medians, ranges and repetitions of each time and throughput: [metrics](metrics.md)",
    "metrics.ttft_ms": "time to the first token",
    "metrics.compression_ms": "part of it that scores the prompt, chooses what stays and stores it; null where "
    "there is no such part: tokens leave within the prompt's attention, or there is no cache",
    "metrics.tpot_ms": "time per output token",
    "metrics.prefill_tokens_per_s": "prompt tokens / TTFT",
    "metrics.decode_tokens_per_s": "tokens after the first / decode time",
    "metrics.output_tokens_per_s": "output tokens / latency",
    "metrics.total_tokens_per_s": "prompt and output tokens / latency",
    "metrics.step_ms": "percentiles of single decode steps",
    "repetitions": "times of every repetition",
    "interleaved": "repetitions of the full cache measured in turn with the run's own, if one process measured both",
    "interleaved.with": "label of the full cache",
    "interleaved.ttft_ms": "TTFT of each repetition",
    "interleaved.tpot_ms": "TPOT of each repetition",
    "decode": "how the steps ran: eager, compiled, cuda graph; on CUDA `eager: ` and why a step cannot be captured",
    "attention": "the same as `kernels.step_attention`",
    "kernels": "what computed each operation that has a kernel, in the same words",
    "kernels.step_attention": "attention of decode steps: triton, c++ (compiled steps on a CPU), or pytorch, with the "
    "reason if the kernel does not support a call",
    "kernels.step_operations": "norms, residuals, RoPE and activation of decode steps",
    "kernels.projections": "q, k and v, and gate and up, of decode steps on CUDA: fused, or separate products",
    "kernels.prompt_scores": "sums of a prompt's attention for scorers",
    "kernels.stream_prefill": "attention of a prompt under `streaming_llm`",
    "workload": "the requests",
    "workload.batches": "shapes of the batches",
    "workload.prompt_tokens": "of all requests",
    "workload.output_tokens": "of all requests",
    "bytes_read_per_step": "bytes that a decode step must read: weights and cache, mean over the steps",
    "bandwidth": "bandwidth of a copy, measured in the same process",
    "bandwidth.copy_bytes_per_s": "bytes read and written per second",
    "bandwidth.problem": "why it could not be measured, else null",
    "memory": "marks of memory, from a process of its own",
    "memory.what": "what was measured: the allocator's bytes (CUDA) or the resident set (CPU)",
    "memory.problem": "why it could not be measured, else null",
    "memory.at_rest": "with the model loaded and no cache",
    "memory.peak_prefill": "highest mark during the prefill",
    "memory.peak_decode": "highest mark after it",
    "energy": "energy of the device, where it has a counter",
    "energy.problem": "why it could not be measured",
    "limit": "lower bound of a decode step's time, and how near the steps came to it",
    "limit.bytes_read_per_step": "as `bytes_read_per_step`",
    "limit.tpot_ms_floor": "bytes / bandwidth of a copy",
    "limit.mbu": "floor / TPOT: memory bandwidth utilisation",
    "training": "the training",
    "training.steps": "optimizer steps",
    "training.tokens": "tokens trained on",
    "training.lr": "largest learning rate",
    "training.seconds": "wall-clock time",
    "training.tokens_per_s": "tokens / seconds",
    "training.sequence": "tokens of a sequence",
    "training.sequences_per_step": "sequences of an optimizer step",
    "training.parameters": "parameters of the model",
    "training.processes": "number of processes",
    "curve": "training loss by step",
    "validations": "every validation",
    "validation": "the last validation",
    "validation.step": "step that it was made at",
    "validation.loss": "nats per token",
    "validation.perplexity": "its exponential",
    "validation.accuracy": "share of tokens whose most probable prediction is right",
    "validation.labels": "tokens that it is over",
    "weights": "sha256 of each file of the trained model",
}
"""What each field of a record is; fields of fields are listed where their names are fixed."""
NEWER_FIELDS = {
    **dict.fromkeys(("interval", "interval.method", "interval.level", "interval.resamples"), "accuracy"),
    "paired.decode_speed_up_interval": "efficiency",
    "bytes.kv_bytes_read_per_step": "efficiency",
    "metrics.compression_ms": "efficiency",
    "needs": "accuracy efficiency train",
    **dict.fromkeys((f for f in RECORD_FIELDS if f.split(".")[0] == "further_forwards"), "accuracy efficiency"),
    **dict.fromkeys((f for f in RECORD_FIELDS if f.split(".")[0] == "kernels"), "efficiency"),
}
"""Fields that the committed records are too old to have, with the kinds of runs that have them."""
OPEN_FIELDS = ("identity", "config", "scores", "averages", "weights", "accuracy_by_distance", "cache_layers")
"""Fields whose keys follow from the run."""


def pages() -> dict[str, str]:
    """Content of every page by its name."""
    made = {
        "config": config_page(),
        "methods": methods_page(),
        "commands": commands_page(),
        "record": record_page(),
        "api": api_page(),
    }
    return {f"{name}.md": text.rstrip() + "\n" for name, text in made.items()}


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; what looks like HTML in it is text."""

    def cell(value: object) -> str:
        return str(value).replace("|", "\\|").replace("<", "&lt;")

    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def first_comment(text: str) -> str:
    """The first line of a YAML file of ``conf``, which says what the choice is."""
    return text.removeprefix(EXPERIMENT_HEADER).splitlines()[0].lstrip("# ")


# pages ----------------------------------------------------------------------------------------------------------------


def config_page() -> str:
    """Every key of every choice, from the comments of the YAML files."""
    root = files("kvbench.conf")
    parts = [
        f"# Configuration\n\n{WRITTEN}\n\nA command is `kvbench run GROUP=CHOICE ... KEY=VALUE ...`; `python run.py` "
        "takes the same. `kvbench run GROUP=CHOICE --help` prints the keys of a choice as below, and "
        "`kvbench run ... --cfg job` the configuration of a command without running it.",
        "## Top level\n\n" + _key_table(root.joinpath("config.yaml").read_text(encoding="utf-8"), ""),
    ]
    for group, options in sorted(groups(root), key=lambda item: item[0].startswith("hydra/")):
        prefix = "" if group in OF_ANY_KEY else group.replace("/", ".") + "."
        parts.append(f"## `{group}=`")
        for option in options:
            text = option.read_text(encoding="utf-8")
            parts.append(f"### `{group}={option.name.removesuffix('.yaml')}`\n\n{first_comment(text)}.")
            if keys := _key_table(text, prefix):
                parts.append(keys)
    return "\n\n".join(parts)


def _key_table(text: str, prefix: str) -> str:
    rows, plain = [], yaml.safe_load(text)
    for key, value, meaning in documented_keys(text, ""):
        if not key.endswith("_target_"):
            _, allowed = value_and_allowed(plain, key)
            rows.append([f"`{prefix}{key}`", f"`{value}`" if value else "", allowed, meaning])
    return table(("key", "default", "allowed", "meaning"), rows) if rows else ""


def methods_page() -> str:
    """The methods and the parts that they are made of."""
    root = files("kvbench.conf")
    by_group = dict(groups(root))
    rows = []
    for option in by_group["method"]:
        text = option.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        chosen: dict[str, str] = {}
        for entry in content.get("defaults", []):
            if isinstance(entry, dict):
                chosen |= {re.sub(r"^override |.*/", "", str(key)): str(value) for key, value in entry.items()}
            elif entry != "_self_":
                chosen["as"] = str(entry)
        parts = ", ".join(f"{part} `{choice}`" for part, choice in chosen.items())
        rows.append([f"`{option.name.removesuffix('.yaml')}`", first_comment(text), parts])
    sections = [
        f"# Methods and their parts\n\n{WRITTEN}\n\n[Methods](../explanation/methods.md) has the rule of each, and "
        "[configuration](config.md) its keys.",
        "## `method=`\n\n" + table(("name", "what it is", "parts"), rows),
    ]
    for group in ("scorer", "allocator", "schedule", "storage"):
        rows = [
            [f"`{option.name.removesuffix('.yaml')}`", first_comment(option.read_text(encoding="utf-8"))]
            for option in by_group[f"method/{group}"]
        ]
        sections.append(f"## `method/{group}=`\n\n" + table(("name", "what it is"), rows))
    return "\n\n".join(sections)


class _Parsed(Exception):
    """Carries a command's parser out of its ``main``."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


def commands_page() -> str:
    """The commands with their arguments."""
    sections = [f"# Commands\n\n{WRITTEN}"]
    for name, (_, what) in COMMANDS.items():
        section = f"## `kvbench {name}`\n\n{what[0].upper()}{what[1:]}."
        if name == "run":
            section += " Its keys are on the page [configuration](config.md)."
        else:
            rows = [
                [f"`{', '.join(action.option_strings) or action.metavar or action.dest}`", _help_of(action)]
                for action in command_parser(name)._actions
                if action.dest != "help"
            ]
            section += "\n\n" + table(("argument", "meaning"), rows)
        sections.append(section)
    return "\n\n".join(sections)


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a command, caught when its ``main`` parses."""

    def catch(parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        raise _Parsed(parser)

    module = importlib.import_module(COMMANDS[name][0])
    with patch.object(argparse.ArgumentParser, "parse_args", catch):
        try:
            module.main([])
        except _Parsed as caught:
            return caught.parser
    raise LookupError(f"kvbench {name} has no parser")


def _help_of(action: argparse.Action) -> str:
    choices = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
    text = (action.help or "") % {"default": action.default, "prog": "kvbench"} if action.help else ""
    return " ".join(f"{text}{choices}".split())


def record_page() -> str:
    """The fields of ``record.json`` in the committed records, with the kinds of runs that have them.

    Raises:
        LookupError: a committed record has a field that :data:`RECORD_FIELDS` does not describe.
    """
    kinds: dict[str, set[str]] = defaultdict(set)
    for path in sorted((ROOT / "results" / "reference").rglob(RECORD)):
        record = json.loads(path.read_text(encoding="utf-8"))
        for field in _fields(record):
            kinds[field].add(record["kind"])
    if unknown := sorted(kinds.keys() - RECORD_FIELDS.keys()):
        raise LookupError(f"scripts/docs_reference.py: RECORD_FIELDS lacks {', '.join(unknown)}")
    rows = []
    for field, kind in NEWER_FIELDS.items():
        kinds[field].update(kind.split())
    for field, meaning in RECORD_FIELDS.items():
        if field in kinds:
            of = ", ".join(kind for kind in RESULTS if kind in kinds[field])
            rows.append([f"`{field}`", "all" if kinds[field] == set(RESULTS) else of, meaning])
    needed = ", ".join(f"`{field}`" for field in FIELDS)
    results = "; ".join(f"{kind}: " + ", ".join(f"`{f}`" for f in fields) for kind, fields in RESULTS.items())
    return f"""# Records

{WRITTEN}

A run is a folder `<results_dir>/<task>/<model>/<method>/<hash>`. `{RECORD}` is written last, so its presence means that
the run is done. `{SAMPLES}` has one row per example: `dataset`, `id`, `method`, `prediction`, `score`, `prompt_tokens`
and the bytes of its cache. `sessions.jsonl` has a line for each process that worked on the run. This version reads
schema {SCHEMA}; a record of another one is reported and not guessed at.

Every record must have {needed}. A finished run also has, {results}.

Names carry their unit: `_ms`, `_s`, `_bytes`, `_gib`, `_per_s`. A repeated measurement is a mapping with `median`, its
range and all repetitions.

{table(("field", "kinds", "meaning"), rows)}"""


def _fields(record: Mapping[str, Any]) -> Iterator[str]:
    """Names of a record's fields, and of their fields where the names are fixed."""
    for name, value in record.items():
        yield name
        if isinstance(value, dict) and name not in OPEN_FIELDS:
            yield from (f"{name}.{inner}" for inner in value)


def api_page() -> str:
    """The names of ``kvbench.__all__``, from the sources alone."""
    sections = [f"# Python API\n\n{WRITTEN}\n\n`import kvbench` imports a name when it is first used."]
    package = ROOT / "kvbench" / "__init__.py"
    where = {
        alias.asname or alias.name: (ROOT / Path(*node.module.split(".")[1:]), alias.name)
        for node in ast.walk(ast.parse(package.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kvbench.")
        for alias in node.names
    }
    functions, classes = [], []
    for name in kvbench.__all__:
        if name == "__version__":
            continue
        node = _definition(*where[name])
        entry = f"### `{_signature(node, name)}`\n\n{_summary(node)}"
        (classes if isinstance(node, ast.ClassDef) else functions).append(entry)
    return "\n\n".join([*sections, "## Functions", *functions, "## Classes", *classes])


def _definition(module: Path, name: str) -> ast.ClassDef | ast.FunctionDef:
    """The class or function ``name`` of a module, or of the module that a package imports it from."""
    path = module.with_suffix(".py") if module.with_suffix(".py").is_file() else module / "__init__.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return _definition(path.parent / Path(*(node.module or "").split(".")), name)
    raise LookupError(f"{path.relative_to(ROOT)} does not define {name}")


def _signature(node: ast.ClassDef | ast.FunctionDef, name: str) -> str:
    """``name(argument=default, ...)`` of a function, of a dataclass's own fields, or the bare name."""
    if isinstance(node, ast.FunctionDef):
        return f"{name}({ast.unparse(node.args)})"
    fields = [
        f"{item.target.id}" + (f"={ast.unparse(item.value)}" if item.value else "")
        for item in node.body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and not ast.unparse(item.annotation).startswith("ClassVar")
        and not item.target.id.startswith("_")
    ]
    is_dataclass = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    return f"{name}({', '.join(fields)})" if is_dataclass and fields else name


def _summary(node: ast.ClassDef | ast.FunctionDef) -> str:
    """The first paragraph of a docstring, with Markdown's code marks for Sphinx's."""
    text = (ast.get_docstring(node) or "").split("\n\n")[0]
    text = re.sub(r":\w+:`[~.]?([^`]*)`", r"`\1`", text).replace("``", "`")
    return " ".join(text.split())


def main() -> int:
    """List the pages that are not current, or write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the pages into docs/reference")
    write = parser.parse_args().write
    old = [
        name
        for name, text in pages().items()
        if not (PAGES / name).is_file() or (PAGES / name).read_text(encoding="utf-8") != text
    ]
    for name in old:
        if write:
            (PAGES / name).write_text(pages()[name], encoding="utf-8")
        print(f"{'wrote' if write else 'not current:'} docs/reference/{name}")
    return 0 if write or not old else 1


if __name__ == "__main__":
    sys.exit(main())
