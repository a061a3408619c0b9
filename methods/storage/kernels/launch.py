"""How kernels are launched: tile sizes, numbers of splits, and tuning.

A tiling is chosen by a rule (:func:`default_tiling`), so results are reproducible bit by bit. With
``KVBENCH_AUTOTUNE=1`` in the environment the candidates are timed at the first call of each shape, which for a captured
step is its warm-up.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from ...cache.kernel_use import MIN_DOT_SIZE

AUTOTUNE = "KVBENCH_AUTOTUNE"
"""Environment variable that turns on tuning."""
MAX_SPLITS = 128
"""Maximum number of splits of a head's tokens."""
PROCESSORS_WITHOUT_DEVICE = 132
"""Streaming multiprocessors assumed by the interpreter, those of an H100."""


@dataclass(frozen=True)
class Tiling:
    """Options of a split kernel.

    Attributes:
        tokens: Tokens per tile, a power of two.
        warps: Warps per program.
        stages: Tiles of keys and values that are loaded ahead.
        programs: Programs per streaming multiprocessor to aim for; determines the number of splits.
    """

    tokens: int
    warps: int = 4
    stages: int = 3
    programs: int = 2

    def chunk(self, segments: int, slots: int, longest: int, device: torch.device) -> int:
        """Return the number of tokens per split, a multiple of ``tokens``.

        Args:
            segments: Number of KV heads of all rows.
            slots: Mean number of slots per segment.
            longest: Largest number of slots of a segment.
            device: Device of the tensors.
        """
        splits = max(1, self.programs * processors(device) // segments)
        chunk = max(triton.cdiv(slots, splits), triton.cdiv(longest, MAX_SPLITS), self.tokens)
        return triton.cdiv(chunk, self.tokens) * self.tokens


def default_tiling(width: int, element_bytes: int) -> Tiling:
    """Return the tiling of keys and values of ``width`` padded channels: 16 KB tiles, 66 KB of shared memory."""
    return Tiling(min(128, max(16, 16384 // (width * element_bytes))))


def tilings(default: Tiling) -> list[Tiling]:
    """Return the candidates of the tuning."""
    sizes = sorted({max(16, default.tokens // 2), default.tokens, min(128, 2 * default.tokens)})
    candidates = [Tiling(t, w, s, p) for t in sizes for w in (2, 4, 8) for s in (2, 3, 4) for p in (1, 2, 4)]
    return [default, *(c for c in candidates if c != default and c.tokens * c.stages <= 4 * default.tokens)]


def block_tilings(default: Tiling, group: int) -> list[Tiling]:
    """Return the candidates of the tuning for blocks of packed codes: a tile has whole groups of ``group`` tokens."""
    sizes, warps = {max(MIN_DOT_SIZE, default.tokens // 2, group), default.tokens}, (default.warps // 2, default.warps)
    return [default, *(Tiling(t, w, s, p) for t in sizes for w in warps for s in (1, 2, 3) for p in (1, 2, 4))]


_tuned: dict[tuple[object, ...], Tiling] = {}


def tuned(
    key: tuple[object, ...], default: Tiling, candidates: Sequence[Tiling], run: Callable[[Tiling], object]
) -> Tiling:
    """Return the fastest tiling for a key; the default one if tuning is off or a graph is being captured.

    Args:
        key: Identifies the kernel, its compile-time sizes and the magnitude of its inputs.
        default: Tiling chosen by the rule.
        candidates: Tilings to time.
        run: Runs the kernel with a tiling; repeatable.
    """
    if os.environ.get(AUTOTUNE) != "1":
        return default
    if key not in _tuned:
        if torch.cuda.is_current_stream_capturing():
            return default
        times = {tiling: _time_ms(run, tiling) for tiling in candidates}
        _tuned[key] = min(times, key=times.__getitem__)
    return _tuned[key]


def _time_ms(run: Callable[[Tiling], object], tiling: Tiling) -> float:
    """Return the median time of a tiling, infinite if it needs more shared memory or registers than there are."""
    try:
        return float(do_bench(lambda: run(tiling), warmup=5, rep=20, return_mode="median"))
    except OutOfResources:
        return float("inf")


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors of a device."""
    if device.type != "cuda":
        return PROCESSORS_WITHOUT_DEVICE
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Return a context that launches on the device of ``x``; Triton uses the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def padded(size: int) -> int:
    """Return the size of a ``tl.dot`` operand for ``size`` rows or channels."""
    return max(MIN_DOT_SIZE, triton.next_power_of_2(size))


def half_operands(dtype: torch.dtype) -> bool:
    """Return whether products have operands in half precision; the interpreter multiplies no bfloat16 operands."""
    return dtype != torch.float32 and not (dtype == torch.bfloat16 and triton.knobs.runtime.interpret)
