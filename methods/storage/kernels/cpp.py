"""Kernels in C++ for a CPU: compiled for the processor at hand, by the part of torch that compiles its own CPU code.

It finds the compiler and torch's OpenMP threads, and keeps what it has compiled on disk.
"""

from __future__ import annotations

import os
import shutil
import sys
from ctypes import CDLL
from pathlib import Path

import torch

SCALARS = {torch.float32: "float", torch.bfloat16: "uint16_t"}
"""Types that kernels read, by the dtype of the tensors."""
FLAGS = ("-march=native", "-ffp-contract=fast")
VECTORS = Path(__file__).with_name("vectors.h")


class CompilerError(Exception):
    """There is no C++ compiler, or it failed."""


def has_compiler() -> bool:
    """Whether there is a C++ compiler: the one that ``CXX`` names, or else the system's usual one."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is not None


def compile_kernels(source: Path, dtype: torch.dtype, **macros: int) -> CDLL:
    """The functions of a source file, behind ``vectors.h``.

    Args:
        source: The file.
        dtype: A key of :data:`SCALARS`.
        macros: Values of macros.

    Raises:
        CompilerError: In one line.
    """
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    defined = {**macros, "SCALAR": SCALARS[dtype]}
    text = "".join(f"#define {name} {value}\n" for name, value in defined.items())
    text += VECTORS.read_text(encoding="utf-8") + source.read_text(encoding="utf-8")
    try:
        return CppCodeCache.load(text, extra_flags=FLAGS)
    except (InvalidCxxCompiler, CppCompileError) as error:
        raise CompilerError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
