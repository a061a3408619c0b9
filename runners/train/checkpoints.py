"""Checkpoints of a training: written atomically, and checked by their sha256 when they are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ...models.base import file_sha256

CHECKPOINTS, STATE, WEIGHTS, OPTIMIZER = "checkpoints", "state.json", "model.safetensors", "optimizer.pt"
KEPT_CHECKPOINTS = 2
"""Number of checkpoints that are kept: the newest, and the one before in case the newest is damaged."""


@dataclass
class TrainState:
    """Progress of a training; stored in each checkpoint.

    Attributes:
        step: Optimizer steps done.
        seconds: Time spent on them, without validations and checkpoints.
        curve: Points of the training curve: step, tokens, loss (mean since the last point), lr, gradient norm.
        validations: Step and result of each validation.
        losses: Losses since the last point of the curve.
    """

    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def save_checkpoint(run: Path, model: torch.nn.Module, optimizer: Any, state: TrainState) -> None:
    """Write a checkpoint atomically, and delete all but the newest :data:`KEPT_CHECKPOINTS`."""
    target = run / CHECKPOINTS / f"step-{state.step:07d}"
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    # named_parameters has a tied parameter once
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, partial / WEIGHTS)
    torch.save(getattr(optimizer, "optimizer", optimizer).state_dict(), partial / OPTIMIZER)
    hashes = {f.name: file_sha256(f) for f in sorted(partial.iterdir())}
    (partial / STATE).write_text(json.dumps({"sha256": hashes, "progress": asdict(state)}))
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)
    for old in checkpoints_of(run)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)


def load_checkpoint(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> TrainState:
    """Load a checkpoint into the model and the optimizer."""
    state = json.loads((folder / STATE).read_text())
    model.load_state_dict(load_file(folder / WEIGHTS, device=str(device)), strict=False)  # tied weights are stored once
    optimizer.load_state_dict(torch.load(folder / OPTIMIZER, map_location=device, weights_only=True))
    return TrainState(**state["progress"])


def damage(folder: Path) -> str | None:
    """Description of the damage of a checkpoint; None if it is complete."""
    try:
        hashes: Mapping[str, str] = json.loads((folder / STATE).read_text())["sha256"]
        return next(
            (f"{name} is not what was written" for name, h in hashes.items() if file_sha256(folder / name) != h), None
        )
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def checkpoints_of(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(f for f in (run / CHECKPOINTS).glob("step-*") if f.suffix != ".partial")


def step_of(checkpoint: Path) -> int:
    """Number of optimizer steps before a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def remove_checkpoints(run: Path) -> None:
    """Delete all checkpoints of a finished run."""
    shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
