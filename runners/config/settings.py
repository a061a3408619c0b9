"""The top-level keys of the configuration, which every runner takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch

from ...conf.errors import require
from ...conf.options import NonNegativeInt, Options, PositiveInt, Wording
from .checks import Folder


@dataclass(frozen=True)
class Settings(Options):
    """The top-level keys of the configuration.

    Attributes:
        seed: Seed of sampling and of all other random numbers.
        batch_size: Number of prompts per forward.
        device: ``auto`` (CUDA when there is one), ``cpu``, ``cuda``, ``cuda:1`` ...
        dtype: ``auto`` (float32 on the CPU, bfloat16 on CUDA), ``float32``, ``bfloat16`` or ``float16``.
        results_dir: Folder of the run folders.
        config: The resolved configuration, as it is recorded.
    """

    seed: NonNegativeInt = 0
    batch_size: PositiveInt = 1
    device: Annotated[str, Wording("auto, cpu, cuda or cuda:<number>", r"auto|cpu|cuda(:\d+)?")] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    results_dir: Folder = "results"
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device.startswith("cuda"):
            number, count = int(self.device.partition(":")[2] or 0), torch.cuda.device_count()
            require(number < count, "device", self.device, f"{count} CUDA devices are visible; use device=cpu")

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
