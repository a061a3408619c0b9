"""``kvbench kv-size``: the bytes of a KV cache as a calculation, a table or a heat map, for any model config.

In each layer, every token leaves one key and one value of ``head_dim`` numbers per KV head:

    KV bytes = batch x layers x kv_heads x tokens x head_dim x 2 x bits/8

Each way of shrinking the cache lowers one of these factors. Layers of sliding or chunked attention hold fewer tokens,
layers that share or keep a fixed state count nothing, and for multi-head latent attention (MLA) the latents' size is
shown beside that of the keys and values expanded from them. This project's cache holds the latents of its own ``mla``
models, and the expanded keys and values of transformers' models. The formula is arithmetic
on a config.json, so neither the model nor torch is needed.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..conf.errors import InputError, require
from .kv_config import KVConfig, kv_bytes, latent_bytes, load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DTYPE_BITS = {"float16": 16, "bfloat16": 16, "float32": 32, "float8": 8, "int8": 8, "int4": 4}


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


def formulas(grid: Grid) -> list[str]:
    """The formulas of all models without numbers, each once."""
    first = (calculation(replace(grid, rows=[row], tokens=grid.tokens[:1])) for row in grid.rows)
    return list(dict.fromkeys(line for lines in first for line in lines if not line.startswith(" ")))


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


def formula_and_table(grid: Grid) -> list[str]:
    """Lines of the formulas, then of the table."""
    return [*formulas(grid), "", *table(grid)]


def page(grid: Grid, body: list[str]) -> str:
    """A text between its title and what the models are."""
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
        file.write((csv_table(grid) if path.suffix == ".csv" else page(grid, formula_and_table(grid))).encode())
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
            print(page(grid, calculation(grid) if single else formula_and_table(grid)), end="")
    except (InputError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
