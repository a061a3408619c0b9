"""The training loop: optimizer steps, validations and checkpoints of one process."""

from __future__ import annotations

import logging
import math
import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ...conf.errors import InputError, require
from ...methods.cache.method import Method
from ...models.base import ModelSource, file_sha256
from ...models.scratch import ScratchModel
from ...tasks.training import IGNORED, TrainingData
from ..config.settings import Settings
from ..records import provenance
from ..records.record import RunFolder
from ..records.runs import record_head
from .checkpoints import (
    TrainState,
    checkpoints_of,
    damage,
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
    step_of,
)
from .losses import training_loss
from .model import new_model, new_optimizer
from .output import MODEL, kv_bytes, save_trained_parameters

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .runner import TrainRunner

log = logging.getLogger(__name__)

MAX_CURVE_POINTS = 200


class Training:
    """A training in one process of possibly several.

    Args:
        options: The runner with its options.
        source, method, task, settings: See :meth:`.runner.TrainRunner.run`.
        folder: The run's folder.
        accelerator: This process's part in the training.
    """

    def __init__(
        self,
        options: TrainRunner,
        source: ModelSource,
        method: Method,
        task: TrainingData,
        settings: Settings,
        folder: RunFolder,
        accelerator: Accelerator,
    ):
        self.options, self.source, self.method, self.task = options, source, method, task
        self.settings, self.folder, self.accelerator = settings, folder, accelerator
        self.device = accelerator.device if settings.torch_device != "cpu" else torch.device("cpu")
        self.state = TrainState()
        self.made_by = provenance.collect(settings.torch_device)
        built = new_model(options, source, method.sharing, task, settings.seed, self.device)
        self.model, self.tokenizer, self.teacher = built.model, built.tokenizer, built.teacher
        self.length = task.sequence_length(options.sequence)
        self.size = options.batch_tokens // self.length
        processes = accelerator.num_processes
        require(
            self.size >= processes and self.size % processes == 0,
            "runner.batch_tokens",
            options.batch_tokens,
            f"must be a multiple of {self.length * processes}: {processes} x a sequence of {self.length} tokens",
        )
        positions = self.model.config.max_position_embeddings
        allowed = f"must be at most the model's {positions} positions"
        require(self.length <= positions, "runner.sequence", self.length, allowed)

    def complete(self) -> None:
        """Run the remaining steps, then write model and record.

        Raises:
            InputError: The loss is not finite any more; the last good checkpoint is kept.
        """
        optimizer = new_optimizer(self.options, self.model)
        self._restore(optimizer)
        model, optimizer = self.accelerator.prepare(self.model, optimizer)
        self._announce()
        first, tokens = self.state.step, self.size * self.length
        bar = tqdm(
            total=self.options.steps * tokens,
            initial=first * tokens,
            unit="tok",
            unit_scale=True,
            file=sys.stderr,
            disable=not self.accelerator.is_main_process,
        )
        for step in range(first, self.options.steps):
            norm = self._step(model, optimizer, step)
            is_last = step + 1 == self.options.steps
            if (step + 1) % max(1, self.options.steps // MAX_CURVE_POINTS) == 0 or is_last:
                bar.set_postfix(loss=f"{self._add_point(norm):.3f}")
            if (step + 1) % self.options.validate_every == 0 or is_last:
                self.state.validations.append({"step": step + 1, **self.validate()})
            if (step + 1) % self.options.save_every == 0 and not is_last:
                self._save(optimizer)
            bar.update(tokens)
        bar.close()
        if self.accelerator.is_main_process:
            self._finish()

    # one step -----------------------------------------------------------------------------------------------------

    def _step(self, model: Any, optimizer: Any, step: int) -> float:
        """One optimizer step; returns the norm of its gradient."""
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = self.options.lr_at(step)
        loss = self._accumulate(model, step)
        if not math.isfinite(loss):
            self._stop(step, "loss", loss)
        norm = float(self.accelerator.clip_grad_norm_(model.parameters(), self.options.clip))
        if not math.isfinite(norm):
            self._stop(step, "gradient", norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.state.step = step + 1
        self.state.seconds += time.perf_counter() - started
        self.state.losses.append(loss)
        return norm

    def _accumulate(self, model: Any, step: int) -> float:
        """Forward and backward of one optimizer step's batch; returns its mean loss over labels and processes."""
        ids, labels = self.task.batch(self.tokenizer, step, self.size, self.length, self.settings.seed)
        count = int((labels[:, 1:] != IGNORED).sum())
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        ids, labels = ids[rank::processes], labels[rank::processes]
        micro = self.options.micro_batch or len(ids)
        total = 0.0
        for start in range(0, len(ids), micro):
            x = torch.from_numpy(ids[start : start + micro]).to(self.device)
            y = torch.from_numpy(labels[start : start + micro]).to(self.device)
            is_last = start + micro >= len(ids)
            with nullcontext() if is_last else self.accelerator.no_sync(model), self.accelerator.autocast():
                # Gradients are averaged over processes; the loss is the sum over labels, over all of them.
                loss = self._loss(model, x, y) * processes / count
            self.accelerator.backward(loss)
            total += float(loss.detach())
        mean = torch.tensor([total / processes], device=self.device)
        return float(self.accelerator.reduce(mean, "sum")[0])

    def _loss(self, model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Sum over the labels of one micro-batch."""
        config = self.model.config
        kv_weight = getattr(config, "kv_loss_weight", 0.0) if getattr(config, "has_upward_kv_refs", False) else 0.0
        return training_loss(model, self.teacher, self.options.distill, kv_weight, x, y)

    def _stop(self, step: int, what: str, value: float) -> None:
        saved = checkpoints_of(self.folder.path)
        kept = (
            f"the checkpoint after step {step_of(saved[-1])} is kept in {saved[-1]}"
            if saved
            else "no checkpoint was due"
        )
        allowed = f"the {what} is {value} at step {step + 1}: {kept}; try a smaller one"
        raise InputError("runner.lr", self.options.lr, allowed)

    def _add_point(self, norm: float) -> float:
        """Add a point to the curve; returns the mean loss since the last one."""
        losses, self.state.losses = self.state.losses, []
        mean, step = sum(losses) / len(losses), self.state.step
        point = {"step": step, "tokens": step * self.size * self.length, "loss": mean}
        self.state.curve.append(point | {"lr": self.options.lr_at(step - 1), "grad_norm": norm})
        return mean

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss (nats per label), perplexity and accuracy on held-out sequences, in float32 or the autocast dtype."""
        ids, labels = self.task.validation(self.tokenizer, self.length, self.options.validate_sequences)
        self.model.eval()
        loss = correct = count = 0.0
        micro = self.options.micro_batch or max(1, min(len(ids), self.size))
        for start in range(0, len(ids), micro):
            x = torch.from_numpy(ids[start : start + micro]).to(self.device)
            y = torch.from_numpy(labels[start : start + micro]).to(self.device)[:, 1:]
            with self.accelerator.autocast():
                logits = self.model(x, use_cache=False).logits[:, :-1].float()
            is_label = y != IGNORED
            loss += float(F.cross_entropy(logits[is_label], y[is_label], reduction="sum"))
            correct += float((logits.argmax(-1) == y)[is_label].sum())
            count += float(is_label.sum())
        self.model.train()
        mean = loss / count
        return {"loss": mean, "perplexity": math.exp(min(mean, 80.0)), "accuracy": correct / count, "labels": count}

    # the run's folder ---------------------------------------------------------------------------------------------

    def _log(self, message: str) -> None:
        if self.accelerator.is_main_process:
            log.info(message)

    def _announce(self) -> None:
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.model.parameters())
        self._log(
            f"training {self.method.label}: {trained:,} of {total:,} parameters, {self.options.steps} steps of "
            f"{self.size} x {self.length} tokens on {self.device}"
        )
        if self.accelerator.is_main_process:
            session = {"after_steps": self.state.step, "git": self.made_by["git"]}
            self.folder.begin_session(session | {"packages": self.made_by["packages"]})

    def _save(self, optimizer: Any) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            save_checkpoint(self.folder.path, self.model, optimizer, self.state)

    def _restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Continue from the newest checkpoint that is complete."""
        for folder in reversed(checkpoints_of(self.folder.path)):
            problem = damage(folder)
            if problem is None:
                self.state = load_checkpoint(folder, self.model, optimizer, self.device)
                self._log(f"continues after step {self.state.step} of {self.options.steps}")
                return
            self._log(f"the checkpoint after step {step_of(folder)} is damaged ({problem}): the one before it is used")

    def _finish(self) -> None:
        """Write ``model/`` and ``record.json``."""
        options, state, model = self.options, self.state, self.model
        parameters = sum(p.numel() for p in model.parameters())
        target, dtype = self.folder.path / MODEL, getattr(torch, options.save_dtype)
        if options.train == "kv" and not isinstance(self.source, ScratchModel):
            base = {"init": options.init, "adapter_rank": options.adapter_rank, "base": self.source.fingerprint()}
            save_trained_parameters(target, model, dtype, base)
        else:
            model.to(dtype).save_pretrained(target)
            self.tokenizer.save_pretrained(target)
        tokens = state.step * self.size * self.length
        record = record_head("done", self.folder, self.method, self.task.source(), self.settings)
        record["sessions"] = self.folder.sessions()
        record |= {
            "training": {
                "steps": state.step,
                "tokens": tokens,
                "lr": options.lr,
                "seconds": state.seconds,
                "tokens_per_s": tokens / max(state.seconds, 1e-9),
                "sequence": self.length,
                "sequences_per_step": self.size,
                "parameters": parameters,
                "processes": self.accelerator.num_processes,
            },
            "curve": state.curve,
            "validations": state.validations,
            "validation": state.validations[-1],
            "bytes": kv_bytes(self.method, model.config, self.settings.torch_dtype),
            "weights": {f.name: file_sha256(f) for f in sorted(target.iterdir())},
            "provenance": self.made_by,
        }
        self.folder.finish(record)
        remove_checkpoints(self.folder.path)


def new_accelerator(settings: Settings) -> Accelerator:
    """Return this process's accelerator; with bfloat16 it computes in that dtype while the weights stay float32."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        needed = "needs the package accelerate: pip install 'kvbench[train]'"
        raise InputError("runner", "train", needed) from error
    AcceleratorState._reset_state()  # jobs of a sweep may differ in dtype and share a process
    mixed = "bf16" if settings.torch_dtype == torch.bfloat16 else "no"
    return Accelerator(mixed_precision=mixed, cpu=settings.torch_device == "cpu")
