"""What the compiler makes of the Triton kernels for an H100, on any machine: registers, spills, widths of loads.

    python scripts/kernel_report.py            compare with docs/reference/kernels.md
    python scripts/kernel_report.py --write    write it

Needs Triton, whose wheel has the assembler and disassembler, and no GPU. Beside it stand the bytes that a kernel must
move for one layer of a model, and the time that this takes at 3 TB/s.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvbench.methods.storage.kernels import (
    coded,
    dense,
    kivi,
    merged,
    merged_codes,
    online,
    outliers,
    prompt,
    step_operations,
    stream,
)
from kvbench.methods.storage.kernels.launch import Tiling, default_tiling, padded

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "kernels.md"
TARGET = GPUTarget("cuda", 90, 32)
BYTES_PER_S = 3e12
FLOPS_PER_S = 989e12
"""Peak of an H100 SXM in products of 16-bit matrices, by its data sheet."""
TOKENS = 16384
HEADER = f"""# Kernels

Written by `python scripts/kernel_report.py --write`, not by hand. What the compiler makes for an H100 (sm_90) of the
Triton kernels of [a decode step and of a prompt](../explanation/engine.md), with the tile sizes that are used without
tuning. Bytes and times are for one layer of the shape of Llama-2-7B (32 heads, head_dim 128) and {TOKENS:,} tokens
unless a row says otherwise. The times are bytes / {BYTES_PER_S / 1e12:g} TB/s and, for the kernels of a prompt,
products at {FLOPS_PER_S / 1e12:g} TFLOP/s: lower bounds, not measurements.

| kernel | tile | warps | registers | spilled bytes | shared KB | loads, bytes x instructions | MB | us | TFLOP | us |
|---|---:|---:|---:|---:|---:|---|---:|---:|---:|---:|
"""
FOOTER = """

Keys, values and codes are loaded 16 bytes at a time. The other loads are scales (4 bytes are those of two groups),
masks, counters, lookups and the query. A load stands once for each copy of a loop that the compiler makes to load tiles
ahead. The tile is in tokens.

## What was tried for MiniCache with codes

Registers at 2, 4 and 8 bits, by the same compiler. A tile multiplies codes and, for the tokens that are retained
unquantized, their own keys and values: in two products each, because float16 does not hold every retained number.

| idea | tile, warps, stages | registers | spills |
|---|---|---|---|
| as KIVI's kernel | 128 or 64, 8, 2 or 3 | 252, 178, 179 | none |
| fewer warps | 64, 4, 2 | 190, 250, 255 | none |
| smaller tiles: loads of 8 bytes at 2 bits | 32, 8, 2 | 127, 128, 164 | none |
| one stage: no tiles ahead | 64, 8, 1 | 134, 128, 178 | 24 bytes at 4 bits |
| more warps | 64, 16, 2 | 126, 128, 128 | 8 bytes at 8 bits |
| more warps and three stages | 64, 16, 3 | 126, 128, 128 | none |
| chosen: the same, each half of a tile a function of its own | 64, 16, 3 | 105, 124, 102 | none |

## What was tried for KIVI's kernel

Registers at 2, 4 and 8 bits, by the same compiler; more than 128 leave one block of eight warps or three of four on a
multiprocessor, and spilled registers cost memory traffic.

| idea | tile, warps | registers | spills |
|---|---|---|---|
| multiply codes, and scales into copies of the query and of the weights | 64, 4 | 224, 168, 253 | none |
| the same, in smaller tiles (packed tokens alone, without the recent ones) | 32, 4 | 148, 148, 156 | none |
| the same, by more warps (packed tokens alone) | 64, 8 | 128, 128, 163 | 16 bytes at 2 bits |
| the same, with a limit of 128 registers | 64, 4 | 128 | 120, 56, 136 bytes |
| the same, with a limit of 128 registers, in smaller tiles | 32, 4 | 128 | 8, 8, 0 bytes |
| dequantize a tile to float16 in registers | 64, 4 | 128, 128, 128 | 8 bytes at 2 bits |
| the same, with the query padded to 16 rows | 64, 4 | 168, 164, 162 | none |
| dequantized, in smaller tiles: loads of 8 bytes at 2 bits | 32, 4 | 84, 80, 96 | none |
| dequantized, by more warps: loads of 8 bytes at 2 bits | 64, 8 | 97, 97, 110 | none |
| chosen: the last one, with tiles of 128 tokens at 2 bits, and constant strides | 128 or 64, 8 | 113, 105, 97 | none |

Products of codes needed sums over all channels for the zeros, each of which goes through shared memory, and four
copies of the output's sums. Dequantized numbers need neither: two operations of two numbers each, and the scale of a
row stays in the thread that holds its codes.

## What was tried for FP8 and TurboQuant

By the same compiler, tiles of 64 tokens and 4 warps.

| idea | registers | shared KB | loads of keys and values |
|---|---:|---:|---|
| FP8, a number at a time | 128 | 38 | 8 bytes for one of them |
| chosen: pairs of numbers | 96 | 54 | 16 bytes |
| TurboQuant (2, 3, 4 bits), levels looked up in memory | 244, 230, 255 | 136 to 140 | 16 bytes, and 4 for each level |
| chosen: levels loaded once, then gathered | 128 | 30 to 38 | 16 bytes |

## What was tried for KVQuant

By the same compiler. Keys are rotated in registers, which takes the two halves of a key, a cosine and a sine for every
pair of channels; a table of cosines in memory would be read like 16-bit keys.

| idea | tile, warps | registers at 2, 3, 4 bits |
|---|---|---|
| the unquantized first token chosen in every tile | 64, 8 | 255, 255, 255 |
| the same, in smaller tiles | 32, 8 | 230, 231, 230 |
| the same, in the smallest tiles | 16, 4 | 240, 240, 246 |
| the first token before the loop | 32, 8 | 177, 209, 183 |
| the same, 32 pairs of channels at a time | 16, 4 | 168, 206, 168 |
| chosen: all pairs at a time | 16, 4 | 168, 215, 178 |

All are above 128, so three blocks of four warps run on a multiprocessor instead of four. A load of 16 bytes is 32 codes
of 4 bits, so no smaller tile needs fewer registers in a thread.
"""
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Entry:
    """One kernel with its compile-time sizes.

    Attributes:
        name: What it is, for the table.
        kernel: The Triton function.
        types: Types of the pointers and of the numbers that are not integers, by argument.
        sizes: Compile-time arguments.
        tiling: Options of the compiler.
        bytes: Bytes that it must move for one layer.
        flops: Operations of its matrix products, if they can take longer than its bytes.
        unaligned: Integers that need not be multiples of 16.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    sizes: Mapping[str, Any]
    tiling: Tiling
    bytes: float
    flops: float = 0.0
    unaligned: tuple[str, ...] = field(default=("rows", "heads", "end_n", "window", "ring", "parts", "valid_h"))


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a kernel: registers per thread, bytes spilled, shared memory, and loads by width."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    loads: Mapping[int, int]


def compile_entry(entry: Entry) -> Compiled:
    """Compile for an H100 and read the result."""
    arguments = entry.kernel.arg_names
    signature = {n: "constexpr" if n in entry.sizes else entry.types.get(n, "i32") for n in arguments}
    whole = [n for n in arguments if signature[n] == "i32" and n not in entry.unaligned]
    aligned = [i for i, n in enumerate(arguments) if signature[n].startswith("*") or n in whole]
    source = ASTSource(
        fn=entry.kernel,
        signature=signature,
        constexprs=dict(entry.sizes),
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": entry.tiling.warps, "num_stages": entry.tiling.stages}
    compiled = triton.compile(source, target=TARGET, options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    loads: Counter[int] = Counter()
    for operation in re.findall(r"\b(LDG(?:STS)?\.[A-Z0-9_.]*)", code):
        width = re.search(r"\.(128|64|U16|U8|S16|S8)\b", operation)
        loads[{"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[width[1]] if width else 4] += 1
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    return Compiled(registers, stack, compiled.metadata.shared, loads)


def _output(*command: object) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def dense_entry(
    name: str,
    dtype: torch.dtype = torch.bfloat16,
    heads: int = 32,
    rows: int = 1,
    dim: int = 128,
    value_dim: int | None = None,
    tokens: int = TOKENS,
    logits: bool = False,
    ragged: bool = False,
    plain: bool = True,
    page: int = 0,
) -> Entry:
    """A split of uncompressed keys and values."""
    value_dim = value_dim or dim
    size, pointer = dtype.itemsize, f"*{NAMES[dtype]}"
    types = dict.fromkeys(("query", "keys", "values"), pointer) | dict.fromkeys(
        ("sums", "maxima", "totals", "logits_out"), "*fp32"
    )
    types |= {"valid": "*u8", "scaling": "fp32", "softcap": "fp32"}
    types |= dict.fromkeys(("starts", "ends", "pages"), "*i64")
    tiling = default_tiling(max(padded(dim), padded(value_dim)), size)
    sizes: dict[str, Any] = {
        "D": dim, "DV": value_dim, "ROWS": padded(rows), "WIDE": padded(dim), "WIDE_V": padded(value_dim),
        "TOKENS": tiling.tokens, "HALF": dtype != torch.float32, "HAS_VALID": not ragged, "HAS_END": True,
        "RAGGED": ragged, "CAPPED": not plain, "LOGITS": logits, "PAGE": page,
    }  # fmt: skip
    sizes |= {"valid": None} if ragged else {"starts": None}
    if not logits:
        sizes["logits_out"] = None
    if not page:
        sizes["pages"] = None
    moved = heads * tokens * ((dim + value_dim) * size + (4 * rows if logits else 0)) + (0 if ragged else tokens)
    return Entry(name, dense.split_dense, types, sizes, tiling, moved)


def kivi_entry(name: str, bits: int, heads: int = 32, rows: int = 1, tiling: Tiling | None = None) -> Entry:
    """A split of KIVI's codes, in blocks of 128 tokens and groups of 32, head_dim 128, bfloat16."""
    tiling = tiling or kivi.default_tiling(128, 32, bits)
    types = dict.fromkeys(("query", "keys", "values"), "*bf16") | dict.fromkeys(("sums", "maxima", "totals"), "*fp32")
    types |= dict.fromkeys(("key_codes", "value_codes"), "*i32") | dict.fromkeys(("packed", "rounded", "ends"), "*i64")
    types |= dict.fromkeys(("key_scales", "key_zeros", "value_scales", "value_zeros"), "*fp16")
    sizes = {
        "D": 128, "DV": 128, "ROWS": triton.next_power_of_2(rows), "WIDE": 128, "WIDE_V": 128,
        "TOKENS": tiling.tokens, "BLOCK": 128, "BITS": bits, "GROUP": 32, "GROUP_V": 32, 
        "HALF": True, "HALF_RECENT": True, "CAPPED": False, "ON_DEVICE": True,
    }  # fmt: skip
    moved = 2 * heads * TOKENS * 128 * (bits / 8 + 2 * 2 / 32)
    floats = {"scaling": "fp32", "softcap": "fp32"}
    unaligned = ("rows", "ring")
    return Entry(name, kivi.split_kivi, types | floats, sizes, tiling, moved, unaligned=unaligned)


def merged_entry(name: str, retained: float = 0.05) -> Entry:
    """A split of the merged tokens of a MiniCache layer, of which a share is retained; bfloat16, head_dim 128."""
    pairs = ("directions", "magnitudes", "unmerged")
    types = {f"{kind}_{part}": "*bf16" for kind in ("key", "value") for part in pairs}
    types |= dict.fromkeys(("query", "new_keys", "new_values"), "*bf16") | {"valid": "*u8"}
    types |= dict.fromkeys(("key_entries", "value_entries"), "*i32") | dict.fromkeys(
        ("sums", "maxima", "totals"), "*fp32"
    )
    tiling = default_tiling(128, 2)
    sizes = {
        "D": 128, "DV": 128, "ROWS": padded(1), "WIDE": 128, "WIDE_V": 128, "TOKENS": tiling.tokens, "HALF": True,
        "HAS_VALID": True, "CAPPED": False,
    }  # fmt: skip
    moved = 2 * 32 * TOKENS * (128 * 2 + (1 - retained) * 2 + 4) + TOKENS
    floats = {"scaling": "fp32", "softcap": "fp32"}
    return Entry(
        name, merged.split_merged, types | floats, sizes, tiling, moved, unaligned=("rows", "heads", "new_count")
    )


def merged_codes_entry(name: str, bits: int, retained: float = 0.05) -> Entry:
    """As :func:`merged_entry`, with directions in codes: blocks of 128 tokens, groups of 32."""
    merged_types = dict(merged_entry(name).types)
    types = {n: t for n, t in merged_types.items() if "directions" not in n}
    types |= dict.fromkeys(("key_codes", "value_codes"), "*i32")
    types |= dict.fromkeys(("key_scales", "key_zeros", "value_scales", "value_zeros"), "*fp16")
    tiling = merged_codes.default_tiling(128, 32)
    sizes = {
        "D": 128, "DV": 128, "ROWS": padded(1), "WIDE": 128, "WIDE_V": 128, "TOKENS": tiling.tokens, "BITS": bits,
        "GROUP": 32, "GROUP_V": 32, "ALIGN": merged_codes.word_alignment(TOKENS * bits // 32),
        "HALF": True, "HALF_NEW": True, "HAS_VALID": True,
        "CAPPED": False,
    }  # fmt: skip
    codes = 128 * bits / 8 + 2 * 2 * 128 / 32
    moved = 2 * 32 * TOKENS * (codes + retained * 128 * 2 + (1 - retained) * 2 + 4) + TOKENS
    unaligned = ("rows", "heads", "new_count", "code_d", "scale_d", "key_entry_n", "value_entry_n")
    return Entry(name, merged_codes.split_merged_codes, types, sizes, tiling, moved, unaligned=unaligned)


def coded_entry(name: str, kind: int, token_scales: bool = True, heads: int = 32, rows: int = 1) -> Entry:
    """A split of FP8 numbers (``kind`` -4 or -5) or of indices of ``kind`` bits; bfloat16, head_dim 128."""
    tiling = default_tiling(128, 2)
    types = dict.fromkeys((f"{part}_{what}" for part in ("key", "value") for what in ("codes", "high")), "*u8")
    types |= dict.fromkeys(("key_codes", "value_codes"), "*i16" if kind < 0 else "*u8")
    types |= dict.fromkeys(("key_scale", "value_scale"), "*fp16" if token_scales else "*fp32")
    types |= dict.fromkeys(("key_table", "value_table", "sums", "maxima", "totals"), "*fp32")
    types |= {"query": "*bf16", "valid": "*u8", "starts": "*i64", "ends": "*i64"}
    types |= dict.fromkeys(("scaling", "softcap", "key_factor", "value_factor"), "fp32")
    sizes: dict[str, Any] = {
        "D": 128, "DV": 128, "ROWS": padded(rows), "WIDE": 128, "WIDE_V": 128, "TOKENS": tiling.tokens, "KEYS": kind,
        "VALUES": kind, "TOKEN_SCALES": token_scales, "SCALES": True, "HALF": True, "HAS_VALID": False, "CAPPED": False,
    }  # fmt: skip
    absent = ["valid", *(f"{part}_high" for part in ("key", "value") if kind != 3)]
    absent += [f"{part}_table" for part in ("key", "value") if kind < 0]
    sizes |= dict.fromkeys(absent)
    bits = 8 if kind < 0 else kind
    moved = 2 * heads * TOKENS * (128 * bits / 8 + (2 if token_scales else 0))
    return Entry(name, coded.split_coded, types, sizes, tiling, moved)


def outliers_entry(name: str, bits: int, tiling: Tiling | None = None) -> Entry:
    """A split of KVQuant's codes with an outlier each; bfloat16, head_dim 128."""
    tiling = tiling or outliers.outlier_tiling(128)
    parts = ("key", "value")
    types = dict.fromkeys((f"{part}_{what}" for part in parts for what in ("codes", "high", "channels")), "*u8")
    types |= dict.fromkeys((f"{part}_{what}" for part in parts for what in ("outliers", "middle", "half")), "*fp16")
    types |= dict.fromkeys(("query", "key_sink", "value_sink"), "*bf16") | {"starts": "*i64", "ends": "*i64"}
    types |= dict.fromkeys(("key_table", "value_table", "inv_freq", "sums", "maxima", "totals"), "*fp32")
    types |= {"scaling": "fp32", "softcap": "fp32"}
    sizes: dict[str, Any] = {
        "D": 128, "DV": 128, "ROWS": padded(1), "WIDE": 64, "WIDE_V": 128, "TOKENS": tiling.tokens, "KEYS": bits,
        "VALUES": bits, "M": 1, "M_V": 1, "SINKS": True, "ROTATED": True, "HALF": True, "CAPPED": False,
    }  # fmt: skip
    sizes |= dict.fromkeys(f"{part}_high" for part in parts if bits != 3)
    moved = 32 * TOKENS * (2 * (128 * bits / 8 + 3) + 4)
    return Entry(name, outliers.split_outliers, types, sizes, tiling, moved)


def join_entries() -> list[Entry]:
    """The two small kernels after a split, for 8 splits of 32 heads."""
    types = dict.fromkeys(("sums", "maxima", "totals", "logits", "sinks"), "*fp32") | {"ends": "*i64"}
    tiling, parts = Tiling(0), 8
    sizes = {"DV": 128, "WIDE_V": 128, "PARTS": parts, "STEP": 16, "SINKS": True}
    joined = Entry(
        "join of 8 splits", online.join_splits, types | {"out": "*bf16"}, sizes, tiling, 32 * parts * 130 * 4
    )
    sizes = {"ROWS": 1, "PARTS": parts, "TOKENS": dense.WEIGHT_TOKENS, "SINKS": True, "HAS_END": True, "MEAN": True}
    weights = Entry("logits to weights", online.slot_weights, types | {"out": "*fp32"}, sizes, tiling, 32 * TOKENS * 8)
    return [joined, weights]


def prompt_entries() -> list[Entry]:
    """The kernels of a prompt in bfloat16: sums of all queries and of a window of 32, and a stream of budget 1,024."""
    heads, dim, window, budget = 32, 128, 32, 1024
    half = {"D": dim, "WIDE": dim, "HALF": True, "CAPPED": False}
    types = dict.fromkeys(("query", "keys", "rotated", "values"), "*bf16") | {"scaling": "fp32", "softcap": "fp32"}
    sums = types | dict.fromkeys(("lse", "weights"), "*fp32") | {"out": "*fp32"}
    ints = ("count", "length", "heads", "group", "new", "slots", "blocks", "position_b", "query_position_b")
    queries, keys = (heads * n * dim * 2 for n in (TOKENS, TOKENS))
    held, passing = prompt.tile_sizes(dim, 2)
    sizes = half | {"STRICT": False, "strict": None, "ROWS": held, "TOKENS": passing}
    columns = half | {"STRICT": False, "strict": None, "ROWS": passing, "TOKENS": held}
    columns |= {"WEIGHTED": False, "weights": None}
    few = {"ROWS": window}
    causal, seen = heads * TOKENS**2 * dim, 2 * heads * window * TOKENS * dim
    banded = half | {"DV": dim, "WIDE_V": dim, "ROWS": stream.BLOCK, "TOKENS": 64, "SLOTS": 16}
    banded |= {"SINKS": False, "sinks": None}
    stream_types = types | {"positions": "*i32", "query_positions": "*i32", "out": "*bf16"}
    stream_types |= dict.fromkeys(("begins", "sink_slots", "recent"), "*i64")

    def entry(name: str, kernel: Any, own: Any, chosen: Any, moved: float, flops: float) -> Entry:
        warps = stream.WARPS if kernel is stream.banded_attention else prompt.WARPS
        return Entry(name, kernel, own, chosen, Tiling(0, warps), moved, flops, ints)

    return [
        entry("column sums of a prompt (H2O)", prompt.column_sums, sums, columns | {"MEAN": True},
              queries + keys + heads * TOKENS * 8, causal),
        entry("log-sum-exp of a prompt", prompt.query_logsumexp, sums, sizes,
              queries + keys + heads * TOKENS * 4, causal),
        entry("log-sum-exp of a window (SnapKV)", prompt.query_logsumexp, sums, sizes | few, keys, seen),
        entry("column sums of a window (SnapKV)", prompt.column_sums, sums, columns | few | {"MEAN": False},
              keys + heads * TOKENS * 4, seen),
        entry("stream of a prompt (StreamingLLM)", stream.banded_attention, stream_types, banded,
              3 * queries + 2 * keys, 4 * heads * TOKENS * budget * dim),
    ]  # fmt: skip


def step_entries() -> list[Entry]:
    """The small operations of a step of one row of Llama-2-7B, bfloat16."""
    hidden, intermediate, heads, dim, vocabulary, rows = 4096, 11008, 32, 128, 32000, 1
    kernels = step_operations
    half = ("x", "y", "weight", "total", "query", "key", "cos", "sin", "query_weight", "key_weight", "query_out")
    half += ("key_out", "gate", "up", "value", "new_keys", "new_values", "keys", "values")
    types = dict.fromkeys(half, "*bf16") | {"epsilon": "fp32", "valid": "*u8", "slot": "*i64", "logits": "*bf16"}
    ints = ("heads", "kv_heads", "valid_heads", "parts", "valid_h")
    rope = {"D": dim, "HALF_D": dim // 2, "WIDE": dim // 2, "NORM": False}
    blocks = triton.cdiv(vocabulary, kernels.VOCABULARY_BLOCK)
    largest = types | {"indices": "*i64"}

    def entry(name: str, kernel: Any, own: Any, sizes: Any, warps: int, numbers: float) -> Entry:
        return Entry(name, kernel, own, sizes, Tiling(0, warps, 3), 2 * rows * numbers, unaligned=ints)

    return [
        entry("residual and RMSNorm", kernels.add_norm_kernel, types | {"out": "*bf16"}, {"ADD": True, "BLOCK": hidden},
              8, 5 * hidden),
        entry("RoPE of queries and keys", kernels.rope_kernel, types | dict.fromkeys(("valid", "slot"), "*bf16"),
              rope | {"DV": 1, "WIDE_V": 1, "STORE": False}, 1, 4 * heads * dim),
        entry("RoPE and write into a slot", kernels.rope_kernel, types,
              rope | {"DV": dim, "WIDE_V": dim, "STORE": True}, 1, 6 * heads * dim),
        entry("SwiGLU", kernels.swiglu_kernel, types | {"out": "*bf16"}, {"BLOCK": kernels.SWIGLU_BLOCK}, 4,
              3 * intermediate),
        entry("write into a slot", kernels.write_kernel, types, {"D": dim, "DV": dim, "WIDE": dim, "WIDE_V": dim}, 1,
              4 * heads * dim),
        entry("largest logit of a block", kernels.largest_kernel, largest | {"out": "*fp32"},
              {"BLOCK": kernels.VOCABULARY_BLOCK, "CHAINED": False}, 4, vocabulary),
        entry("largest logit", kernels.largest_kernel, largest | {"logits": "*fp32", "out": "*i64"},
              {"BLOCK": triton.next_power_of_2(blocks), "CHAINED": True}, 4, 6 * blocks),
    ]  # fmt: skip


def entries() -> list[Entry]:
    """All rows of the table."""
    return [
        dense_entry("dense, bfloat16"),
        dense_entry("dense, float16", torch.float16),
        dense_entry("dense, float32", torch.float32),
        dense_entry("dense, soft cap", plain=False),
        dense_entry("dense, with logits for weights", logits=True),
        dense_entry("dense, 8 heads of 4 query heads", heads=8, rows=4),
        dense_entry("dense, head_dim 64", dim=64),
        dense_entry("dense, head_dim 96", dim=96),
        dense_entry("dense, head_dim 256", dim=256),
        dense_entry("dense, head_dim 192, values 128 (MLA)", dim=192, value_dim=128),
        dense_entry("ragged, 1,024 tokens a head", tokens=1024, ragged=True),
        dense_entry("pages of 16 tokens (Quest), 1,024 tokens a head", tokens=1024, ragged=True, page=16),
        *(kivi_entry(f"KIVI, {bits} bits", bits) for bits in (2, 4, 8)),
        kivi_entry("KIVI, 4 bits, 8 heads of 4 query heads", 4, heads=8, rows=4),
        kivi_entry("KIVI, 4 bits, other tiles", 4, tiling=Tiling(32, 4, 2)),
        kivi_entry("KIVI, 4 bits, other tiles", 4, tiling=Tiling(64, 4, 3)),
        kivi_entry("KIVI, 4 bits, other tiles", 4, tiling=Tiling(128, 8, 2)),
        kivi_entry("KIVI, 2 bits, other tiles", 2, tiling=Tiling(64, 8, 2)),
        merged_entry("MiniCache, one layer of a pair"),
        *(merged_codes_entry(f"MiniCache with codes of {bits} bits", bits) for bits in (2, 4, 8)),
        coded_entry("FP8 (e4m3), a scale per token", -4),
        coded_entry("FP8 (e4m3), a scale per head", -4, token_scales=False),
        coded_entry("FP8 (e5m2), a scale per token", -5),
        coded_entry("FP8 (e4m3), 8 heads of 4 query heads", -4, heads=8, rows=4),
        *(coded_entry(f"TurboQuant, {bits} bits", bits) for bits in (2, 3, 4)),
        *(outliers_entry(f"KVQuant, {bits} bits, an outlier", bits) for bits in (2, 3, 4)),
        *join_entries(),
        *prompt_entries(),
        *step_entries(),
    ]


def page() -> str:
    """The page, from compiling every kernel."""
    rows = []
    for entry in entries():
        made = compile_entry(entry)
        loads = ", ".join(f"{width} x {count}" for width, count in sorted(made.loads.items(), reverse=True))
        cells = [entry.name, entry.sizes.get("TOKENS", ""), entry.tiling.warps, made.registers, made.spilled_bytes]
        cells += [f"{made.shared_bytes / 1024:.0f}", loads]
        cells += [f"{entry.bytes / 1e6:.2f}", f"{1e6 * entry.bytes / BYTES_PER_S:.1f}"]
        cells += [f"{entry.flops / 1e12:.3f}", f"{1e6 * entry.flops / FLOPS_PER_S:.1f}"] if entry.flops else ["", ""]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return HEADER + "\n".join(rows) + FOOTER


def main() -> int:
    """Write or compare the page and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true")
    made = page()
    if parser.parse_args().write:
        PAGE.write_text(made, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == made:
        return 0
    print(made)
    print(f"{PAGE} differs; run with --write", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
