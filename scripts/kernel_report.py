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

from kvbench.methods.storage.kernels import dense, kivi, merged, online
from kvbench.methods.storage.kernels.launch import Tiling, default_tiling, padded

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "kernels.md"
TARGET = GPUTarget("cuda", 90, 32)
BYTES_PER_S = 3e12
TOKENS = 16384
HEADER = f"""# Kernels

Written by `python scripts/kernel_report.py --write`, not by hand. What the compiler makes for an H100 (sm_90) of the
Triton kernels of [a decode step](../explanation/engine.md), with the tile sizes that are used without tuning. Bytes and
time are for one layer of the shape of Llama-2-7B (32 heads, head_dim 128) and {TOKENS:,} tokens unless a row says
otherwise. The time is bytes / {BYTES_PER_S / 1e12:g} TB/s: a lower bound, not a measurement.

| kernel | tokens per tile | warps | registers | spilled bytes | shared KB | loads, bytes x instructions | MB | us |
|---|---:|---:|---:|---:|---:|---|---:|---:|
"""
FOOTER = """

Keys, values and codes are loaded 16 bytes at a time. The other loads are scales (4 bytes are those of two groups),
masks, counters and the query. A load stands once for each copy of a loop that the compiler makes to load tiles ahead.
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
        unaligned: Integers that need not be multiples of 16.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    sizes: Mapping[str, Any]
    tiling: Tiling
    bytes: float
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
) -> Entry:
    """A split of uncompressed keys and values."""
    value_dim = value_dim or dim
    size, pointer = dtype.itemsize, f"*{NAMES[dtype]}"
    types = dict.fromkeys(("query", "keys", "values"), pointer) | dict.fromkeys(
        ("sums", "maxima", "totals", "logits_out"), "*fp32"
    )
    types |= {"valid": "*u8", "starts": "*i64", "ends": "*i64", "scaling": "fp32", "softcap": "fp32"}
    tiling = default_tiling(max(padded(dim), padded(value_dim)), size)
    sizes: dict[str, Any] = {
        "D": dim, "DV": value_dim, "ROWS": padded(rows), "WIDE": padded(dim), "WIDE_V": padded(value_dim),
        "TOKENS": tiling.tokens, "HALF": dtype != torch.float32, "HAS_VALID": not ragged, "HAS_END": True,
        "RAGGED": ragged, "CAPPED": not plain, "LOGITS": logits,
    }  # fmt: skip
    sizes |= {"valid": None} if ragged else {"starts": None}
    if not logits:
        sizes["logits_out"] = None
    moved = heads * tokens * ((dim + value_dim) * size + (4 * rows if logits else 0)) + (0 if ragged else tokens)
    return Entry(name, dense.split_dense, types, sizes, tiling, moved)


def kivi_entry(name: str, bits: int, heads: int = 32, rows: int = 1) -> Entry:
    """A split of KIVI's codes, in blocks of 128 tokens and groups of 32, head_dim 128, bfloat16."""
    dtype, tiling = torch.bfloat16, kivi.default_tiling(128, 32)
    types = dict.fromkeys(("query", "keys", "values"), "*bf16") | dict.fromkeys(("sums", "maxima", "totals"), "*fp32")
    types |= dict.fromkeys(("key_codes", "value_codes"), "*i32") | dict.fromkeys(("packed", "rounded", "ends"), "*i64")
    types |= dict.fromkeys(("key_scales", "key_zeros", "value_scales", "value_zeros"), "*fp16")
    sizes = {
        "D": 128, "DV": 128, "ROWS": triton.next_power_of_2(rows), "WIDE": 128, "WIDE_V": 128,
        "TOKENS": tiling.tokens, "BLOCK": 128, "BITS": bits, "GROUP": 32, "GROUP_V": 32, 
        "OFFSET": kivi.offset_of(bits, dtype), "HALF": True, "CAPPED": False, "ON_DEVICE": True,
    }  # fmt: skip
    moved = 2 * heads * TOKENS * 128 * (bits / 8 + 2 * 2 / 32)
    floats = {"scaling": "fp32", "softcap": "fp32"}
    unaligned = ("rows", "ring")
    return Entry(name, kivi.split_kivi, types | floats, sizes, tiling, moved, unaligned)


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
    return Entry(name, merged.split_merged, types | floats, sizes, tiling, moved, ("rows", "heads", "new_count"))


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
        *(kivi_entry(f"KIVI, {bits} bits", bits) for bits in (2, 4, 8)),
        kivi_entry("KIVI, 4 bits, 8 heads of 4 query heads", 4, heads=8, rows=4),
        merged_entry("MiniCache, one layer of a pair"),
        *join_entries(),
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
