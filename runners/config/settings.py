"""The top-level keys of the configuration, which every runner takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ...conf.errors import is_whole, require
from .checks import check_results_dir


@dataclass(frozen=True)
class Settings:
    """The top-level keys of the configuration.

    Attributes:
        seed: seed of sampling and of all other random numbers.
        batch_size: number of prompts per forward.
        device: ``auto`` (CUDA when there is one), ``cpu``, ``cuda``, ``cuda:1`` ...
        dtype: ``auto`` (float32 on the CPU, bfloat16 on CUDA), ``float32``, ``bfloat16`` or ``float16``.
        results_dir: folder of the run folders.
        config: the resolved configuration, as it is recorded.
    """

    seed: int = 0
    batch_size: int = 1
    device: str = "auto"
    dtype: str = "auto"
    results_dir: str = "results"
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(is_whole(self.seed, 0), "seed", self.seed, "must be a whole number >= 0")
        require(is_whole(self.batch_size, 1), "batch_size", self.batch_size, "must be a whole number >= 1")
        check_results_dir(self.results_dir)
        dtypes = ("auto", "float32", "bfloat16", "float16")
        require(self.dtype in dtypes, "dtype", self.dtype, f"must be one of {', '.join(dtypes)}")
        require(isinstance(self.device, str), "device", self.device, "must be auto, cpu, cuda or cuda:<number>")
        known = self.device in ("auto", "cpu", "cuda") or self.device.startswith("cuda:")
        require(known, "device", self.device, "must be auto, cpu, cuda or cuda:<number>")
        if self.device.startswith("cuda"):
            number = self.device.partition(":")[2] or "0"
            there = number.isdigit() and int(number) < torch.cuda.device_count()
            require(
                there, "device", self.device, f"{torch.cuda.device_count()} CUDA devices are visible; use device=cpu"
            )

    @property
    def torch_device(self) -> str:
        """The device with ``auto`` resolved."""
        return ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype with ``auto`` resolved."""
        if self.dtype == "auto":
            return torch.bfloat16 if self.torch_device.startswith("cuda") else torch.float32
        return getattr(torch, self.dtype)
