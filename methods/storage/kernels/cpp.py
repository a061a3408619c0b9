"""Kernels in C++ for a CPU, compiled for the processor at hand by the part of torch that compiles its own CPU code.

It finds the compiler and torch's OpenMP threads, and keeps what it has compiled on disk.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from ctypes import CDLL
from pathlib import Path

import torch

SCALARS = {torch.float32: "float", torch.bfloat16: "uint16_t"}
"""Types in memory that kernels read, by dtype."""
FLAGS = ("-ffp-contract=fast",)
VECTORS = Path(__file__).with_name("vectors.h")


class CompilerError(Exception):
    """There is no C++ compiler, or it failed; the message is one line."""


@functools.cache
def compiler_problem() -> str | None:
    """Why kernels cannot be compiled here; None: they can. Found out once per process by compiling a small file."""
    try:
        _compile(f"#define SCALAR float\n{VECTORS.read_text(encoding='utf-8')}")
    except CompilerError as error:
        return str(error)
    return None


def compile_kernels(source: Path, dtype: torch.dtype, **macros: int) -> CDLL:
    """Compile and load a source file that includes the functions of ``vectors.h``.

    Args:
        source: The file.
        dtype: A key of :data:`SCALARS`.
        macros: Values of macros.

    Raises:
        CompilerError: There is no compiler, or it fails.
    """
    defined = {**macros, "SCALAR": SCALARS[dtype]}
    text = "".join(f"#define {name} {value}\n" for name, value in defined.items())
    return _compile(text + VECTORS.read_text(encoding="utf-8") + source.read_text(encoding="utf-8"))


def _compile(text: str) -> CDLL:
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        return CppCodeCache.load(f"// {_processor()}\n{text}", extra_flags=FLAGS)
    except (InvalidCxxCompiler, CppCompileError, OSError) as error:
        raise CompilerError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error


@functools.cache
def _processor() -> str:
    """Identifies the processor: what was compiled for another one must not be found in a cache that machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = [platform.processor()]
    kept = sorted({line for line in lines if line.partition("\t")[0].strip() in ("flags", "Features", "model name")})
    return f"{platform.machine()} {hashlib.sha256(repr(kept or lines[:1]).encode()).hexdigest()[:16]}"
