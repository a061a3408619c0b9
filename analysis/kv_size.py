"""``kvbench kv-size``: the bytes of a KV cache as a calculation, a table or a heat map, for any model config.

In each layer, every token leaves one key and one value of ``head_dim`` numbers per KV head:

    KV bytes = batch x layers x kv_heads x tokens x head_dim x 2 x bits/8

Each way of shrinking the cache lowers one of these factors. Layers of sliding or chunked attention hold fewer tokens,
layers that share or keep a fixed state count nothing, and for multi-head latent attention (MLA) the latents' size is
shown beside that of the keys and values expanded from them, which this project's cache holds. The formula is arithmetic
on a config.json, so neither the model nor torch is needed.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..conf.errors import InputError, one_of, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DTYPE_BITS = {"float16": 16, "bfloat16": 16, "float32": 32, "int8": 8, "int4": 4}
# In these a `sliding_window` without `layer_types` holds for every layer; elsewhere the file leaves open for which.
EVERY_LAYER_SLIDES = ("mistral", "mixtral", "phi3", "phimoe", "starcoder2")
# Fields that say: the formula does not describe this model.
OTHER_CACHES = {
    "global_head_dim": "head_dim differs between layers",
    "attention_head_dim": "head_dim is given in a way of its own; use --layers, --kv-heads and --head-dim",
    "block_configs": "the number of KV heads differs between layers",
    "multi_query": "the KV heads are given in a way of its own; use --layers, --kv-heads and --head-dim",
    "is_encoder_decoder": "the decoder caches keys and values of the encoder too",
    "index_topk": "the indexer of sparse attention caches a key of its own besides",
    "indexer_head_dim": "the indexer of sparse attention caches a key of its own besides",
}
# Fields of hybrids that only `layer_types` puts in a form which all models share.
NEED_LAYER_TYPES = (
    *("attn_layer_indices", "attn_layer_period", "attn_type_list", "block_types", "full_attn_idxs"),
    *("hybrid_override_pattern", "layer_group_size", "layers_block_type", "linear_attn_config"),
)
FULL, SLIDING, CHUNKED, LINEAR = "full_attention", "sliding_attention", "chunked_attention", "linear_attention"
LEGACY_TYPES = {"attention": FULL, "mamba": LINEAR}
# What a layer of each type attends over; None: it has no keys and values.
ATTENDS: dict[str, str | None] = {
    FULL: FULL,
    SLIDING: SLIDING,
    CHUNKED: CHUNKED,
    "hybrid": FULL,
    "hybrid_sliding": SLIDING,
} | dict.fromkeys((LINEAR, "conv", "recurrent", "moe", "mlp"))
FIXED_STATE = (LINEAR, "conv", "recurrent", "hybrid", "hybrid_sliding")


@dataclass(frozen=True)
class KVConfig:
    """Properties of a model that determine the size of its KV cache.

    Attributes:
        layers: Layers with keys and values of their own.
        kv_heads: KV heads of a layer.
        head_dim: Numbers in one key of a head (MLA: expanded).
        query_heads: Query heads of a layer, as many as KV heads (MHA), more (GQA), or all for one KV head (MQA). Not in
            the formula.
        name: Name shown in tables and plots.
        sliding_layers: Layers, of ``layers``, that hold only the last ``sliding_window`` tokens.
        sliding_window: Tokens of the window.
        chunked_layers: Layers, of ``layers``, that attend within chunks of ``chunk`` tokens.
        chunk: Tokens of a chunk.
        value_dim: Numbers in one value of a head; 0: as in a key.
        latent_dims: ``(kv_lora_rank, qk_rope_head_dim)`` with MLA: numbers of a token and layer before expansion.
        states: Layers with a state of fixed size, such as ``"36 linear_attention"``. Not in the formula.
    """

    layers: int
    kv_heads: int
    head_dim: int
    query_heads: int | None = None
    name: str = "this shape"
    sliding_layers: int = 0
    sliding_window: int = 0
    chunked_layers: int = 0
    chunk: int = 0
    value_dim: int = 0
    latent_dims: tuple[int, ...] = ()
    states: tuple[str, ...] = ()

    @property
    def pair_dim(self) -> int:
        """Numbers in a key and a value."""
        return self.head_dim + (self.value_dim or self.head_dim)

    @classmethod
    def from_json(cls, config: Mapping[str, Any], name: str, where: str = "config.json") -> KVConfig:
        """Read the fields of a transformers ``config.json``, or of the ``text_config`` in it.

        Raises:
            InputError: a field is missing or not a number, or the formula does not hold for the model; names ``where``.
        """
        if isinstance(config.get("text_config"), dict):
            config = config["text_config"]

        def whole(field: str, default: int | None = None) -> int:
            value = default if config.get(field) is None else config[field]
            if value is None:
                raise InputError(where, field, "the config lacks this field; it must be that of a language model")
            require(type(value) is int and value > 0, f"{where}:{field}", value, "must be a whole number of at least 1")
            return value

        for field, reason in OTHER_CACHES.items():
            if config.get(field):
                raise InputError(f"{where}:{field}", config[field], f"the formula does not hold: {reason}")
        layers, query_heads = whole("num_hidden_layers"), whole("num_attention_heads")
        types = config.get("layer_types")
        if types is None:
            types = _types_without_layer_types(config, layers, where, whole)
        kinds = [LEGACY_TYPES.get(str(kind), str(kind)) for kind in (types if isinstance(types, list) else [types])]
        others = ", ".join(sorted(set(kinds) - set(ATTENDS)))
        require(not others, f"{where}:layer_types", others, f"the formula knows {', '.join(ATTENDS)}")
        allowed = f"must be {layers} entries, as num_hidden_layers says"
        require(len(kinds) == layers, f"{where}:layer_types", f"{len(kinds)} entries", allowed)
        states = tuple(f"{kinds.count(kind)} {kind}" for kind in FIXED_STATE if kind in kinds)
        source = config.get("kv_source_layers")
        if source is not None:  # kvbench's own models: the others attend over their source's keys and values
            whole_list = isinstance(source, list) and len(source) == layers
            require(whole_list, f"{where}:kv_source_layers", source, allowed)
            kinds = [kinds[i] for i, s in enumerate(source) if s == i]
        if config.get("num_kv_shared_layers"):  # the last ones attend over those of earlier layers
            shared = whole("num_kv_shared_layers")
            require(shared < layers, f"{where}:num_kv_shared_layers", shared, f"must be below the {layers} layers")
            kinds = kinds[: layers - shared]
        held = [ATTENDS[kind] for kind in kinds if ATTENDS[kind]]
        require(bool(held), f"{where}:layer_types", ", ".join(sorted(set(kinds))), "no layer has keys and values")
        latent = bool(config.get("kv_lora_rank"))
        if latent:  # num_key_value_heads and head_dim mean other things there
            kv_heads, head_dim = query_heads, whole("qk_nope_head_dim") + whole("qk_rope_head_dim")
        else:
            kv_heads = whole("num_key_value_heads", default=query_heads)
            head_dim = whole("head_dim", default=whole("hidden_size") // query_heads)
        return cls(
            layers=len(held),
            kv_heads=kv_heads,
            head_dim=head_dim,
            query_heads=query_heads,
            name=name,
            sliding_layers=held.count(SLIDING),
            sliding_window=whole("sliding_window") if SLIDING in held else 0,
            chunked_layers=held.count(CHUNKED),
            chunk=whole("attention_chunk_size") if CHUNKED in held else 0,
            value_dim=whole("v_head_dim") if latent else 0,
            latent_dims=(whole("kv_lora_rank"), whole("qk_rope_head_dim")) if latent else (),
            states=states,
        )

    def __str__(self) -> str:
        kind = "MHA" if self.kv_heads == self.query_heads else "MQA" if self.kv_heads == 1 else "GQA"
        kind = "MLA" if self.latent_dims else kind
        query = f", {kind}: query heads {self.query_heads}" if self.query_heads else ""
        local = [(self.sliding_layers, self.sliding_window), (self.chunked_layers, self.chunk)]
        limits = ", ".join(f"{layers} hold {tokens} tokens at most" for layers, tokens in local if layers)
        limits = limits and f" ({limits})"
        sizes = f"head_dim {self.head_dim}"
        if self.latent_dims:
            latent = " + ".join(map(str, self.latent_dims))
            sizes = f"expanded keys {self.head_dim} and values {self.value_dim} wide, latent {latent}"
        fixed = f"; not counted: the states of fixed size of {', '.join(self.states)} layers" if self.states else ""
        return f"{self.name}: layers {self.layers}{limits}{query}, KV heads {self.kv_heads}, {sizes}{fixed}"


def _types_without_layer_types(
    config: Mapping[str, Any], layers: int, where: str, whole: Callable[[str, int | None], int]
) -> list[str]:
    """The layer types that the other fields of a config imply; InputError if they leave them open."""
    for field in NEED_LAYER_TYPES:
        allowed = "only some of the layers hold keys and values; layer_types must say which"
        require(not config.get(field), f"{where}:{field}", config.get(field), allowed)
    if config.get("full_attention_interval"):
        interval = whole("full_attention_interval", None)
        return [LINEAR if (i + 1) % interval else FULL for i in range(layers)]
    if config.get("attention_chunk_size"):
        allowed = "layer_types must say which layers are chunked"
        is_llama4 = config.get("model_type") in ("llama4", "llama4_text")
        require(is_llama4, f"{where}:attention_chunk_size", config["attention_chunk_size"], allowed)
        interval = whole("no_rope_layer_interval", 4)
        rotated = config.get("no_rope_layers") or [(i + 1) % interval for i in range(layers)]  # 0: without RoPE
        require(isinstance(rotated, list), f"{where}:no_rope_layers", rotated, "must be a list with an entry per layer")
        return [CHUNKED if rope else FULL for rope in rotated]
    window = None if config.get("use_sliding_window") is False else config.get("sliding_window")
    clear = window is None or config.get("model_type") in EVERY_LAYER_SLIDES
    require(clear, f"{where}:sliding_window", window, "layer_types must say which layers slide")
    return [FULL if window is None else SLIDING] * layers


def layer_tokens(config: KVConfig, tokens: int) -> int:
    """Tokens held by a sequence of ``tokens``, summed over the layers.

    A sliding layer counts min(tokens, window). A chunked layer holds tokens mod chunk between steps, none at a chunk's
    end and a whole chunk at its peak: min(tokens, chunk) is counted, the most it has held up to there.
    """
    full_layers = config.layers - config.sliding_layers - config.chunked_layers
    sliding = config.sliding_layers * min(tokens, config.sliding_window)
    return full_layers * tokens + sliding + config.chunked_layers * min(tokens, config.chunk)


def kv_bytes(config: KVConfig, batch: int, tokens: int, bits: float) -> int:
    """Bytes of the keys and values of ``batch`` sequences of ``tokens`` tokens each, rounded up to a whole byte.

        batch x layers x kv_heads x tokens x head_dim x 2 x bits/8        (2: a key and a value)

    :func:`layer_tokens` says what a sliding or chunked layer counts. With MLA these are the expanded keys and values of
    every head, head_dim + value_dim numbers. ``bits`` per number is an average: a quantised cache has scales and zero
    points besides (4-bit numbers in groups of 32, each with a 16-bit scale and zero point: 5 bits).
    """
    return math.ceil(batch * layer_tokens(config, tokens) * config.kv_heads * config.pair_dim * bits / 8)


def latent_bytes(config: KVConfig, batch: int, tokens: int, bits: float) -> int:
    """The same for MLA's latents: kv_lora_rank + qk_rope_head_dim numbers a token and layer. 0 without MLA."""
    return math.ceil(batch * layer_tokens(config, tokens) * sum(config.latent_dims) * bits / 8)


def load(model: str) -> KVConfig:
    """The model of a published name, or of a path to a config.json or to its folder; InputError if there is none."""
    files = (resources.files("kvbench.models") / "shapes").iterdir()
    published = {file.name.removesuffix(".json"): file for file in files if file.name.endswith(".json")}
    if model in published:
        return KVConfig.from_json(json.loads(published[model].read_text(encoding="utf-8")), model)
    path = Path(model)
    try:
        path = path / "config.json" if path.is_dir() else path
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        allowed = f"{one_of(model, published)}; or a path to a config.json or to a folder with one"
        raise InputError("--model", model, allowed) from error
    except OSError as error:
        raise InputError("--model", path, f"cannot be read: {error}") from error
    except ValueError as error:
        raise InputError("--model", path, f"is not JSON: {error}") from error
    require(isinstance(config, dict), "--model", path, "must hold a JSON object, as a transformers config.json does")
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return KVConfig.from_json(config, name, where=str(path))


@dataclass(frozen=True)
class Grid:
    """Cells of a table or heat map: rows are batch sizes of one model, or models at one batch size (``by_model``)."""

    title: str
    rows: list[tuple[KVConfig, int]]
    tokens: list[int]
    bits: float
    by_model: bool

    def labels(self) -> list[str]:
        """Label of each row."""
        return [config.name if self.by_model else str(batch) for config, batch in self.rows]

    def sizes_bytes(self) -> list[list[int]]:
        """KV bytes of each cell, by row."""
        return [[kv_bytes(config, batch, tokens, self.bits) for tokens in self.tokens] for config, batch in self.rows]


def calculation(grid: Grid) -> list[str]:
    """Lines: the formula, the same with the numbers of the grid's only cell, its size."""
    (config, batch), tokens, size = grid.rows[0], grid.tokens[0], grid.sizes_bytes()[0][0]
    terms = [("full", "tokens", config.layers - config.sliding_layers - config.chunked_layers, tokens)]
    terms += [("sliding", "min(tokens, window)", config.sliding_layers, min(tokens, config.sliding_window))]
    terms += [("chunked", "min(tokens, chunk)", config.chunked_layers, min(tokens, config.chunk))]
    is_local = config.sliding_layers + config.chunked_layers > 0
    if is_local:
        terms = [term for term in terms if term[0] == "full" or term[2]]
        layers_tokens = f"({' + '.join(f'{kind} layers x {held}' for kind, held, _, _ in terms)})"
        held_numbers = f"({' + '.join(f'{layers} x {held}' for _, _, layers, held in terms)})"
        factors, numbers = f"kv_heads x {layers_tokens}", f"{config.kv_heads} x {held_numbers}"
    else:
        layers_tokens, held_numbers = "layers x tokens", f"{config.layers} x {tokens}"
        factors, numbers = "layers x kv_heads x tokens", f"{config.layers} x {config.kv_heads} x {tokens}"
    pair, widths = "head_dim x 2", f"{config.head_dim} x 2"
    if config.value_dim:
        pair, widths = "(key width + value width)", f"({config.head_dim} + {config.value_dim})"

    def per_token(one_bytes: int) -> str:
        return "" if is_local else f"; {human(one_bytes)} per token"  # else not the same for all

    lines = [
        f"KV bytes = batch x {factors} x {pair} x bits/8",
        f"         = {batch} x {numbers} x {widths} x {grid.bits:g}/8",
        f"         = {size:,} bytes = {human(size)}{per_token(kv_bytes(config, 1, 1, grid.bits))}",
    ]
    if config.latent_dims:
        latent, numbers = latent_bytes(config, batch, tokens, grid.bits), " + ".join(map(str, config.latent_dims))
        lines += [
            f"latent   = batch x {layers_tokens} x (kv_lora_rank + qk_rope_head_dim) x bits/8",
            f"         = {batch} x {held_numbers} x ({numbers}) x {grid.bits:g}/8",
            f"         = {latent:,} bytes = {human(latent)}{per_token(latent_bytes(config, 1, 1, grid.bits))}",
        ]
    return lines


def table(grid: Grid) -> list[str]:
    """Lines of a Markdown table, aligned so that it reads well as plain text; MLA's latents have a row of their own."""
    cells = [["model" if grid.by_model else "batch", *(f"{in_k(tokens)} tokens" for tokens in grid.tokens)]]
    for (config, batch), label, row in zip(grid.rows, grid.labels(), grid.sizes_bytes(), strict=True):
        cells.append([label, *map(human, row)])
        if config.latent_dims:
            latent = (latent_bytes(config, batch, tokens, grid.bits) for tokens in grid.tokens)
            cells.append([f"{label}, latent", *map(human, latent)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * (width - 1) + ":" for width in widths])
    rows = (" | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return [f"| {row} |" for row in rows]


def page(grid: Grid, body: list[str]) -> str:
    """``body`` between its title and what the models are."""
    models = dict.fromkeys(f"* {config}" for config, _ in grid.rows)
    return "\n".join([f"{grid.title} (k = 1024)", "", *body, "", *models, ""])


def csv_table(grid: Grid) -> str:
    """A row for each cell, in bytes; ``latent_bytes`` is empty without MLA."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    sizes = ["layers", "kv_heads", "head_dim", "value_dim"]
    writer.writerow(["model", *sizes, "bits", "batch", "tokens", "kv_bytes", "latent_bytes"])
    for config, batch in grid.rows:
        value_dim = config.value_dim or config.head_dim
        model = (config.name, config.layers, config.kv_heads, config.head_dim, value_dim, f"{grid.bits:g}")
        for tokens in grid.tokens:
            cell = (config, batch, tokens, grid.bits)
            latent = latent_bytes(*cell) if config.latent_dims else ""
            writer.writerow([*model, batch, tokens, kv_bytes(*cell), latent])
    return file.getvalue()


def heat_map(grid: Grid) -> Figure:
    """Rows against tokens; each cell is labelled with its size, its colour is the logarithm of that."""
    from matplotlib.colors import LogNorm  # only here: a table need not wait for matplotlib
    from matplotlib.figure import Figure

    sizes = grid.sizes_bytes()
    # From one power of two to another, so that the scale has ticks even when all cells are alike
    low = min(map(min, sizes)).bit_length() - 1
    high = max((max(map(max, sizes)) - 1).bit_length(), low + 1)
    norm = LogNorm(2.0**low, 2.0**high)
    width_inches = max(5.5, 2.8 + 0.95 * len(grid.tokens) + 0.08 * max(map(len, grid.labels())))
    figure = Figure(figsize=(width_inches, max(3.0, 1.5 + 0.45 * len(sizes))), layout="constrained")
    figure.suptitle(textwrap.fill(grid.title, int(10 * width_inches)), fontsize=11)
    axes = figure.subplots()
    image = axes.imshow(
        [list(map(float, row)) for row in sizes], norm=norm, aspect="auto", origin="upper" if grid.by_model else "lower"
    )
    for y, row in enumerate(sizes):
        for x, size in enumerate(row):
            color = "white" if norm(size) < 0.6 else "black"
            axes.text(x, y, human(size), ha="center", va="center", fontsize=9, color=color)
    axes.set_xticks(range(len(grid.tokens)), [in_k(tokens) for tokens in grid.tokens])
    axes.set_yticks(range(len(sizes)), grid.labels())
    axes.set_xlabel("tokens per sequence (k = 1024)")
    axes.set_ylabel("model" if grid.by_model else "batch (sequences)")
    ticks = [2**exponent for exponent in range(low, high + 1, math.ceil((high - low) / 8))]
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("KV cache (log scale)", labelpad=10)
    bar.set_ticks(ticks, labels=[human(tick) for tick in ticks])
    bar.minorticks_off()
    return figure


def human(size_bytes: int) -> str:
    """``16 GiB``, ``22.5 KiB``: three digits, in the largest unit it reaches."""
    power = min((size_bytes.bit_length() - 1) // 10, 4)
    value = size_bytes / 1024**power
    digits = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{digits} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def in_k(tokens: int) -> str:
    """``32k`` for 32768; a number that is no multiple of 1024 stays as it is."""
    return str(tokens) if tokens % 1024 else f"{tokens // 1024}k"


def counts(flag: str, text: str) -> list[int]:
    """``4k,32k`` as [4096, 32768]: ascending, each once."""
    matches = [re.fullmatch(r"([1-9][0-9]{0,8})(k?)", part.strip().lower()) for part in text.split(",")]
    allowed = "must be whole numbers of at least 1 with commas between them, as 1,2,4 or 4k,32k,128k (k = 1024)"
    require(None not in matches, flag, text, allowed)
    return sorted({int(match[1]) * (1024 if match[2] else 1) for match in matches if match})


def grid_of(args: argparse.Namespace) -> Grid:
    """What the command line asks for; InputError for what cannot be."""
    shape = [args.layers, args.kv_heads, args.head_dim]
    if shape != [None] * 3:
        allowed = "must be left out, or else --layers, --kv-heads and --head-dim"
        require(args.model is None, "--model", args.model, allowed)
        for flag, size in zip(("--layers", "--kv-heads", "--head-dim"), shape, strict=True):
            allowed = "must be at least 1, as --layers, --kv-heads and --head-dim together describe a model"
            require(size is not None and size > 0, flag, size, allowed)
        models = [KVConfig(*shape)]
    else:
        models = [load(name.strip()) for name in (args.model or "llama2-7b").split(",")]
    batches = counts("--batch", args.batch)
    by_model = len(models) > 1
    require(not by_model or len(batches) == 1, "--batch", args.batch, "must be one number for several models")
    require(args.bits is None or 0 < args.bits <= 64, "--bits", args.bits, "must be above 0 and at most 64")
    stored_as = f"at {args.bits:g} bits" if args.bits else f"in {args.dtype}"
    return Grid(
        title=f"KV cache {f'by model, batch {batches[0]},' if by_model else f'of {models[0].name}'} {stored_as}",
        rows=[(model, batch) for model in models for batch in batches],
        tokens=counts("--tokens", args.tokens),
        bits=args.bits or DTYPE_BITS[args.dtype],
        by_model=by_model,
    )


def write(path: Path, grid: Grid) -> None:
    """The table or heat map that the ending of ``path`` names; the whole file or InputError."""
    endings = (".svg", ".png", ".csv", ".md")
    require(path.suffix in endings, "-o", path, f"must end in {', '.join(endings)}")
    file = io.BytesIO()
    if path.suffix in (".csv", ".md"):
        file.write((csv_table(grid) if path.suffix == ".csv" else page(grid, table(grid))).encode())
    else:
        from matplotlib import rc_context

        undated = {"Date": None} if path.suffix == ".svg" else {}
        with rc_context({"svg.hashsalt": "kvbench"}):  # undated and with this, the same grid gives the same file
            heat_map(grid).savefig(file, format=path.suffix[1:], dpi=150, metadata=undated)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue())
    except OSError as error:
        raise InputError("-o", path, f"cannot be written: {error}") from error


EXAMPLES = """examples:
  kvbench kv-size --tokens 32k                        LLaMA-2-7B, the formula with its numbers: 16 GiB
  kvbench kv-size --model llama3-8b --batch 1,4,16    a table, batch x tokens
  kvbench kv-size --model llama2-70b --bits 2 --batch 1,2,4,8 --tokens 4k,16k,64k -o kv.svg
                                                      a heat map
  kvbench kv-size --model llama2-7b,llama3-8b,./mine --dtype bfloat16 -o kv.md
                                                      models x tokens; mine/ holds a config.json
  kvbench kv-size --layers 32 --kv-heads 1 --head-dim 128
                                                      any shape, here of multi-query attention"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, like every other problem; argparse would print the usage too and leave the process."""
        raise argparse.ArgumentError(None, message)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0, or 2 when something could not be used."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="kvbench kv-size", description=__doc__, epilog=EXAMPLES, formatter_class=formatter)
    add = parser.add_argument
    add("--model", metavar="NAME|PATH,...", help="published shapes, config.json files or their folders (llama2-7b)")
    add("--layers", type=int, metavar="N", help="instead of a model: its layers")
    add("--kv-heads", type=int, metavar="N", help="KV heads of each layer")
    add("--head-dim", type=int, metavar="N", help="numbers in one key")
    stored = parser.add_mutually_exclusive_group()
    stored.add_argument("--dtype", choices=DTYPE_BITS, default="float16", help="of a stored number (float16)")
    stored.add_argument("--bits", type=float, metavar="B", help="of a stored number on average, scales included")
    add("--batch", default="1", metavar="N,...", help="sequences at once (1)")
    add("--tokens", default="4k,32k,128k", metavar="N,...", help="tokens per sequence, k = 1024 (4k,32k,128k)")
    add("-o", "--output", type=Path, metavar="FILE", help="a heat map (.svg, .png) or a table (.csv, .md)")
    try:
        args = parser.parse_args(argv)
        grid = grid_of(args)
        if args.output:
            write(args.output, grid)
            print(f"wrote {args.output}")
        else:
            single = len(grid.rows) == len(grid.tokens) == 1
            print(page(grid, calculation(grid) if single else table(grid)), end="")
    except (InputError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
