"""``runner=train``: options of a training, and what can be trained."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch

from ...conf.errors import InputError, require
from ...conf.options import Bounds, NonNegativeFloat, NonNegativeInt, OneOf, Options, PositiveFloat, PositiveInt, Share
from ...methods.cache.method import Method
from ...models.base import ModelSource
from ...models.kvshare.convert import INITS
from ...models.scratch import ScratchModel
from ...tasks.base import Described
from ...tasks.training import TrainingData
from ..config.settings import Settings
from ..records.runs import MethodRun, open_run
from .loop import Training, new_accelerator
from .losses import Distill

log = logging.getLogger(__name__)

CHECKPOINT_ONLY = ("init", "distill", "train", "adapter_rank")
"""Options that only apply to a checkpoint to start from."""
NO_INFLUENCE = ("micro_batch", "activation_checkpointing", "validate_every", "save_every")
"""Options that do not change the numbers of a run."""


@dataclass
class TrainRunner(Options):
    """``runner=train``.

    Attributes:
        steps: Optimizer steps.
        lr: Peak learning rate; it rises over the share ``warmup`` of the steps and falls along a cosine to
            ``final_lr`` of itself.
        batch_tokens: Tokens of an optimizer step, over all processes.
        sequence: Tokens of a sequence (a task with sequences of its own length overrides it).
        micro_batch: Sequences per forward of a process; None: its whole part of the batch.
        weight_decay, beta1, beta2, clip: AdamW's, and the largest norm of the gradient. Norms and biases do not decay.
        activation_checkpointing: Recompute activations in the backward pass instead of keeping them.
        init: Initialization of a source's projections from those it replaces: ``copy``, ``mean`` or
            ``gain_folded_mean``; for a checkpoint only.
        distill: See :class:`Distill`; for a checkpoint only.
        train: ``all``, or ``kv``: keys, values, their queries and the norms before them.
        adapter_rank: Rank of low-rank adapters (LoRA) on the other projections, with ``train=kv``; 0: none.
        validate_every, validate_sequences: Steps between validations, and number of held-out sequences.
        save_every: Steps between checkpoints.
        save_dtype: Dtype of the weights in ``model/``.
    """

    key_prefix: ClassVar[str] = "runner."
    steps: PositiveInt = 1000
    lr: PositiveFloat = 5e-4
    batch_tokens: PositiveInt = 2048
    sequence: PositiveInt = 128
    micro_batch: PositiveInt | None = None
    warmup: Share = 0.05
    final_lr: Share = 0.1
    weight_decay: NonNegativeFloat = 0.0
    beta1: Annotated[float, Bounds(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Bounds(ge=0, lt=1)] = 0.95
    clip: PositiveFloat = 1.0
    activation_checkpointing: bool = False
    init: Annotated[str, OneOf(INITS)] = "mean"
    distill: Distill = field(default_factory=Distill)
    train: Literal["all", "kv"] = "all"
    adapter_rank: NonNegativeInt = 0
    validate_every: PositiveInt = 100
    validate_sequences: PositiveInt = 256
    save_every: PositiveInt = 200
    save_dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        is_allowed = not self.adapter_rank or self.train == "kv"
        require(is_allowed, "runner.adapter_rank", self.adapter_rank, "needs runner.train=kv")

    def data_group(self) -> str:
        """See :meth:`..runner.Runner.data_group`."""
        return "task"

    def run(
        self, source: ModelSource, methods: Sequence[Method], task: Described, settings: Settings
    ) -> list[MethodRun]:
        """Train one model and write its record; a finished run is only read.

        Args:
            source: ``model=scratch``, or the checkpoint to start from.
            methods: One method; its ``sharing`` is the architecture.
            task: The data to train on.
            settings: The top-level configuration; ``dtype=bfloat16`` computes in it while the weights stay float32.
        """
        method = methods[0]
        task = self._checked(source, method, task, settings)
        folder = open_run(
            "train", method, source, task.source(), task.identity(), settings, train=self._identity(source)
        )
        run = MethodRun(method, folder, source)
        accelerator = new_accelerator(settings)
        with folder if accelerator.is_main_process else nullcontext():
            if folder.done:
                log.info(f"{method.label}: already done, in {folder.path}")
            else:
                Training(self, source, method, task, settings, folder, accelerator).complete()
        accelerator.wait_for_everyone()
        return [run] if accelerator.is_main_process else []  # only the main process reports

    def _checked(self, source: ModelSource, method: Method, task: Described, settings: Settings) -> TrainingData:
        """The task, if this model and method can be trained on it; otherwise InputError."""
        if not isinstance(task, TrainingData):
            raise InputError("task", task.name, "has no training data: use task=recall or task=text")
        if source.random_weights and not isinstance(source, ScratchModel):
            raise InputError("model", source.name, "cannot be trained; use model=scratch, or a checkpoint")
        if settings.torch_dtype == torch.float16:
            raise InputError("dtype", "float16", "is not trained in: use float32 or bfloat16")
        if isinstance(source, ScratchModel):
            for key, default in (("distill", Distill()), ("train", "all"), ("adapter_rank", 0)):
                value = getattr(self, key)
                allowed = "is for a checkpoint to begin with, not for model=scratch"
                require(value == default, f"runner.{key}", value, allowed)
        if not method.policy.capabilities.keeps_everything or not method.storage.capabilities.lossless:
            raise InputError("method", method.label, "cannot be trained: only sharing methods can")
        return task

    def _identity(self, source: ModelSource) -> dict[str, Any]:
        """The options that decide the numbers, not how often results are saved or how a batch is split."""
        ignored = NO_INFLUENCE + (CHECKPOINT_ONLY if isinstance(source, ScratchModel) else ())
        return {key: value for key, value in asdict(self).items() if key not in ignored}

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))
