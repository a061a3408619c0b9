"""Which implementation computes an operation: a kernel if one supports the call, otherwise PyTorch.

Kernels are in Triton on CUDA, and in C++ on a CPU whose steps are compiled. All compute the same. A record says for
each operation which one was used (:func:`implementations`), with the reason if no kernel supports a call, and the log
says it once.

Legend: B batch rows, H KV heads, H_q query heads, D channels.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch

from .logits import LogitRule

TRITON, CPP, PYTORCH = "triton", "c++", "pytorch"

STEP_ATTENTION = "step_attention"
"""Attention of decode steps."""
STEP_OPERATIONS = "step_operations"
"""Norms, residuals, RoPE and the activation of fused decode steps."""
PROJECTIONS, FUSED, SEPARATE = "projections", "fused", "separate"
"""Products of decode steps by kernels for queries, keys and values, and for gate and up: as one each, or one by one."""
PROMPT_SCORES = "prompt_scores"
"""Sums of a prompt's attention weights, for scorers."""
STREAM_PREFILL = "stream_prefill"
"""Attention of a prompt under StreamingLLM's ``true_stream``."""

MAX_KERNEL_CHANNELS = 256
"""Largest head dimension that the attention kernels support."""
MAX_KERNEL_GROUP = 64
"""Largest number of query heads per KV head that the kernels of decode steps support."""
MIN_DOT_SIZE = 16
"""Smallest side of a matrix that kernels multiply; the query heads of a KV head are padded to it."""
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_COMPUTE_CAPABILITY = (8, 0)

_used: dict[str, set[str]] = {}
_has_cpu_kernels = False


@contextmanager
def cpu_kernels() -> Iterator[None]:
    """Attention of decode steps on a CPU by a kernel in C++, where it supports the call; needs a compiler."""
    global _has_cpu_kernels
    before, _has_cpu_kernels = _has_cpu_kernels, True
    try:
        yield
    finally:
        _has_cpu_kernels = before


def runs_cpu_kernels(device: torch.device) -> bool:
    """Whether a device is a CPU and its kernels are in use; see :func:`cpu_kernels`."""
    return _has_cpu_kernels and device.type == "cpu"


def forget_implementations() -> None:
    """Forget which implementations were used so far."""
    _used.clear()


def implementations() -> dict[str, str]:
    """Return what computed each operation since the last forget.

    It is ``triton``, ``c++``, ``pytorch`` or ``pytorch (reason)``; of products that have the same input, ``fused`` or
    ``separate``. An operation that ran in several ways has them joined by ``and``.
    """
    return {operation: " and ".join(sorted(used)) for operation, used in sorted(_used.items())}


def record_implementation(operation: str, text: str) -> None:
    """Record what computed an operation."""
    _used.setdefault(operation, set()).add(text)


def uses_kernel_on(device: torch.device, operation: str, problem: str | None, kernel: str = TRITON) -> bool:
    """Return whether a kernel computes an operation, and record it.

    Args:
        device: Device of the tensors.
        operation: Name of the operation, for records.
        problem: Why no kernel supports the call; None: one does, if the device runs ``kernel``.
        kernel: Kind of the kernel.
    """
    used = _used.setdefault(operation, set())
    if device.type != "cuda" and kernel == TRITON:
        used.add(PYTORCH)
        return False
    text = kernel if problem is None else f"{PYTORCH} ({problem})"
    if problem is not None and text not in used:
        logging.getLogger(__name__).warning(
            "%s: PyTorch instead of a %s kernel: %s", operation, kernel.title(), problem
        )
    used.add(text)
    return problem is None


def attention_problem(query: torch.Tensor, *widths: int) -> str | None:
    """Return why no attention kernel supports a call on CUDA; None: one does.

    Args:
        query: [B, H_q, n, D].
        widths: Channels of keys and values.
    """
    if query.dtype not in KERNEL_DTYPES:
        return f"{str(query.dtype).removeprefix('torch.')} tensors"
    if max(widths) > MAX_KERNEL_CHANNELS:
        return f"head_dim {max(widths)} > {MAX_KERNEL_CHANNELS}"
    return device_problem(query.device)


def step_attention_problem(query: torch.Tensor, heads: int, *widths: int) -> str | None:
    """Return why no kernel supports the attention of a decode step; see :func:`attention_problem`.

    Args:
        query: [B, H_q, 1, D].
        heads: Number of KV heads H.
        widths: Channels of keys and values.
    """
    if query.shape[1] // heads > MAX_KERNEL_GROUP:
        return f"{query.shape[1] // heads} > {MAX_KERNEL_GROUP} query heads per KV head"
    return attention_problem(query, *widths)


def device_problem(device: torch.device) -> str | None:
    """Return why a device runs no kernels; None: it does."""
    return "the CPU" if device.type != "cuda" else _cuda_problem(device)


@functools.cache
def _cuda_problem(device: torch.device) -> str | None:
    """Return why a CUDA device runs no kernels; found out once per process by running a small one."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < MIN_COMPUTE_CAPABILITY:
        return "compute capability below 8.0"
    from ..storage.kernels.dense import attention, rectangular

    x = torch.zeros(1, 1, 1, 64, dtype=torch.float16, device=device)
    try:
        attention(x, rectangular(x, x), LogitRule(1.0))
    except Exception as error:  # no C compiler, an old driver: Triton raises many types
        return f"Triton fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None
