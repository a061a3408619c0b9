"""Train a model: from scratch, or from a checkpoint of the plain model whose layers learn to share.

    python run.py runner=train method=cla task=recall model=scratch
    python run.py runner=train method=yoco task=text model=smollm2-135m runner.init=mean runner.distill.weight=1

A run is as any other: its folder is named by what decides the numbers, it goes on where it was stopped, and
``record.json`` is written last. Beside it ``model/`` holds what was trained (``model=local model.path=...`` loads it;
with ``runner.train=kv`` it is ``model=uptrained``), and ``checkpoints/`` the last two states with the optimizer's, each
written whole or not at all and checked by its sha256 when it is read.

Under ``accelerate launch`` each process takes its part of every batch; one of them writes.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..conf.errors import InputError, is_whole, one_of, require
from ..methods.cache.kv_shape import kv_shape
from ..methods.cache.method import Method
from ..models.base import ModelSource, file_sha256
from ..models.kvshare.convert import INITS, converted
from ..models.scratch import ScratchModel
from ..models.uptrained import HOW, WEIGHTS, add_adapters, is_trained
from ..tasks.training import IGNORED, TrainingData
from . import provenance
from .record import RunFolder
from .runs import MethodRun, open_run, record_head
from .settings import Settings

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINTS, MODEL, STATE = "checkpoints", "model", "state.json"
KEPT = 2
"""Checkpoints that stay: the newest, and the one before in case that is damaged."""


@dataclass(frozen=True)
class Distill:
    """Learning from the model that was converted.

    Attributes:
        weight: share of the distillation loss; the rest is the plain loss. 0: no teacher.
        temperature: of the softened distributions.
        hidden_mse: weight of the squared difference of the hidden states before the last layer (SwiftKV: 1).
    """

    weight: float = 0.0
    temperature: float = 2.0
    hidden_mse: float = 0.0

    def __post_init__(self) -> None:
        at = "runner.distill."
        ok = isinstance(self.weight, int | float) and 0 <= self.weight <= 1
        require(ok, at + "weight", self.weight, "must be between 0 and 1")
        ok = isinstance(self.temperature, int | float) and self.temperature > 0
        require(ok, at + "temperature", self.temperature, "must be above 0")
        ok = isinstance(self.hidden_mse, int | float) and self.hidden_mse >= 0
        require(ok, at + "hidden_mse", self.hidden_mse, "must be >= 0")


@dataclass
class TrainRunner:
    """``runner=train``.

    Attributes:
        steps: optimizer steps.
        lr: largest learning rate; it rises over the share ``warmup`` of the steps and falls along a cosine to
            ``final_lr`` of itself.
        batch_tokens: tokens of an optimizer step, over all processes.
        sequence: tokens of a sequence (a task with sequences of its own length has its own).
        micro_batch: sequences that go through a process at a time; None: all of its part.
        weight_decay, beta1, beta2, clip: AdamW's, and the largest norm of the gradient. Norms and biases do not decay.
        activation_checkpointing: compute activations again in the backward pass instead of keeping them.
        init: how a source's projections are made of those it stands for: ``copy``, ``mean`` or ``gain_folded_mean``;
            for a checkpoint only.
        distill: see :class:`Distill`; for a checkpoint only.
        train: ``all``, or ``kv``: keys, values, the queries that meet them and the norms before them.
        adapter_rank: rank of low-rank adapters (LoRA) on the other projections, with ``train=kv``; 0: none.
        validate_every, validate_sequences: steps between validations, and on how many held-out sequences.
        save_every: steps between checkpoints.
        save_dtype: of the weights in ``model/``.
    """

    steps: int = 1000
    lr: float = 5e-4
    batch_tokens: int = 2048
    sequence: int = 128
    micro_batch: int | None = None
    warmup: float = 0.05
    final_lr: float = 0.1
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    activation_checkpointing: bool = False
    init: str = "mean"
    distill: Distill = field(default_factory=Distill)
    train: str = "all"
    adapter_rank: int = 0
    validate_every: int = 100
    validate_sequences: int = 256
    save_every: int = 200
    save_dtype: str = "float16"

    budgets = None  # what the command line looks for in a runner of methods
    pair_with = ()

    def __post_init__(self) -> None:
        at = "runner."
        for key in ("steps", "batch_tokens", "sequence", "validate_every", "validate_sequences", "save_every"):
            value = getattr(self, key)
            require(is_whole(value, 1), at + key, value, "must be a whole number >= 1")
        for key in ("warmup", "final_lr"):
            value = getattr(self, key)
            require(isinstance(value, int | float) and 0 <= value <= 1, at + key, value, "must be between 0 and 1")
        for key in ("beta1", "beta2"):
            value = getattr(self, key)
            require(isinstance(value, int | float) and 0 <= value < 1, at + key, value, "must be >= 0 and below 1")
        for key in ("lr", "clip"):
            value = getattr(self, key)
            require(isinstance(value, int | float) and value > 0, at + key, value, "must be above 0")
        decay = self.weight_decay
        require(isinstance(decay, int | float) and decay >= 0, at + "weight_decay", decay, "must be >= 0")
        micro = self.micro_batch
        require(micro is None or is_whole(micro, 1), at + "micro_batch", micro, "must be a whole number >= 1, or null")
        require(is_whole(self.adapter_rank, 0), at + "adapter_rank", self.adapter_rank, "must be a whole number >= 0")
        for key, allowed in (
            ("init", INITS),
            ("train", ("all", "kv")),
            ("save_dtype", ("float16", "bfloat16", "float32")),
        ):
            value = getattr(self, key)
            require(value in allowed, at + key, value, one_of(str(value), allowed))
        require(
            not self.adapter_rank or self.train == "kv", at + "adapter_rank", self.adapter_rank, "needs runner.train=kv"
        )

    def run(
        self, source: ModelSource, methods: Sequence[Method], task: Any, settings: Settings, say: Callable[[str], None]
    ) -> list[MethodRun]:
        """Train one model and write its record; a run that is done is only read.

        Args:
            source: ``model=scratch``, or the checkpoint to begin with.
            methods: one; its ``sharing`` is the architecture.
            task: what to train on.
            settings: the top-level configuration; ``dtype=bfloat16`` computes in it while the weights stay float32.
            say: prints a line for the person at the keyboard.
        """
        method = methods[0]
        if not isinstance(task, TrainingData):
            raise InputError("task", task.name, "is nothing to train on: use task=recall or task=text")
        if source.random_weights and not isinstance(source, ScratchModel):
            raise InputError("model", source.name, "cannot be trained; use model=scratch, or a checkpoint")
        if settings.torch_dtype == torch.float16:
            raise InputError("dtype", "float16", "is not trained in: use float32 or bfloat16")
        if isinstance(source, ScratchModel):
            for key, value, none in (
                ("distill", self.distill, Distill()),
                ("train", self.train, "all"),
                ("adapter_rank", self.adapter_rank, 0),
            ):
                require(
                    value == none, f"runner.{key}", value, "is for a checkpoint to begin with, not for model=scratch"
                )
        if not method.policy.capabilities.keeps_everything or not method.storage.is_exact:
            raise InputError("method", method.label, "is nothing to train for: only ways of sharing are")
        folder = open_run(
            "train", method, source, task.source(), task.identity(), settings, train=self._identity(source)
        )
        run = MethodRun(method, folder, source)
        accelerator = new_accelerator(settings)
        with folder if accelerator.is_main_process else nullcontext():
            if folder.done:
                say(f"{method.label}: already done, in {folder.path}")
            else:
                Training(self, source, method, task, settings, folder, accelerator, say).complete()
        accelerator.wait_for_everyone()
        return [run] if accelerator.is_main_process else []  # one process reports

    def _identity(self, source: ModelSource) -> dict[str, Any]:
        """What decides the numbers: not how often is looked and saved, and not how a batch is cut."""
        keys = asdict(self)
        for key in ("micro_batch", "activation_checkpointing", "validate_every", "save_every"):
            del keys[key]
        if isinstance(source, ScratchModel):
            for key in ("init", "distill", "train", "adapter_rank"):
                del keys[key]
        return keys

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class Progress:
    """Where a training stands; goes into each checkpoint.

    Attributes:
        step: optimizer steps done.
        seconds: spent on them, validations and checkpoints not counted.
        curve: a point every so often: step, tokens, loss (mean since the last point), lr, gradient norm.
        validations: step and what :meth:`Training.validate` found.
        losses: since the last point of the curve.
    """

    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class Training:
    """One training, in one process of possibly several."""

    def __init__(
        self,
        rule: TrainRunner,
        source: ModelSource,
        method: Method,
        task: TrainingData,
        settings: Settings,
        folder: RunFolder,
        accelerator: Accelerator,
        say: Callable[[str], None],
    ):
        self.rule, self.source, self.method, self.task = rule, source, method, task
        self.settings, self.folder, self.accelerator = settings, folder, accelerator
        self.say = say if accelerator.is_main_process else lambda _: None
        self.device = accelerator.device if settings.torch_device != "cpu" else torch.device("cpu")
        self.progress = Progress()
        self.made_by = provenance.collect(settings.torch_device)
        self.teacher: PreTrainedModel | None = None
        self.tokenizer: PreTrainedTokenizerBase
        self.model = self._model()
        self.length = task.sequence_length(rule.sequence)
        self.size = rule.batch_tokens // self.length
        processes = accelerator.num_processes
        require(
            self.size >= processes and self.size % processes == 0,
            "runner.batch_tokens",
            rule.batch_tokens,
            f"must be a multiple of {self.length * processes}: {processes} x a sequence of {self.length} tokens",
        )
        positions = self.model.config.max_position_embeddings
        allowed = f"must be at most the model's {positions} positions"
        require(self.length <= positions, "runner.sequence", self.length, allowed)

    # the model ----------------------------------------------------------------------------------------------------

    def _model(self) -> PreTrainedModel:
        """The model to train, float32, on the device."""
        rule, sharing = self.rule, self.method.sharing
        torch.manual_seed(self.settings.seed)  # of new weights, and of adapters
        if isinstance(self.source, ScratchModel):
            self.tokenizer = self.task.new_tokenizer()
            model: Any = self.source.build(sharing, self.tokenizer, self.settings.seed)
            model = model.to(self.device)
        else:
            loaded = self.source.load(str(self.device), torch.float32)
            assert loaded.tokenizer is not None
            self.tokenizer, model = loaded.tokenizer, loaded.model
            if rule.distill.weight or rule.distill.hidden_mse:
                self.teacher = loaded.model.eval().requires_grad_(False)
            if sharing is not None:
                model = converted(loaded.model, sharing, rule.init)
            elif self.teacher is not None:
                raise InputError("runner.distill", rule.distill.weight, "needs a method that shares, to learn it")
            if rule.train == "kv":
                model = self._keys_and_values_alone(model)
        model.train()
        if rule.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def _keys_and_values_alone(self, model: Any) -> Any:
        """Leave the rest of the model as it is but for low-rank adapters, where asked for."""
        if self.rule.adapter_rank:
            model = add_adapters(model, self.rule.adapter_rank)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_trained(name))
        return model

    # the loop -----------------------------------------------------------------------------------------------------

    def complete(self) -> None:
        """Train what is left, then write model and record.

        Raises:
            InputError: the loss is no number any more; the last good checkpoint is kept.
        """
        rule = self.rule
        decaying = [p for p in self.model.parameters() if p.requires_grad and p.dim() > 1]
        others = [p for p in self.model.parameters() if p.requires_grad and p.dim() <= 1]
        groups = [{"params": decaying, "weight_decay": rule.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=rule.lr, betas=(rule.beta1, rule.beta2))
        self._restore(optimizer)
        model, optimizer = self.accelerator.prepare(self.model, optimizer)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.model.parameters())
        self.say(
            f"training {self.method.label}: {trained:,} of {total:,} parameters, {rule.steps} steps of "
            f"{self.size} x {self.length} tokens on {self.device}"
        )
        if self.accelerator.is_main_process:
            session = {"after_steps": self.progress.step, "git": self.made_by["git"]}
            self.folder.begin_session(session | {"packages": self.made_by["packages"]})
        done, tokens = self.progress.step, self.size * self.length
        off = not self.accelerator.is_main_process
        bar = tqdm(
            total=rule.steps * tokens, initial=done * tokens, unit="tok", unit_scale=True, file=sys.stderr, disable=off
        )
        for step in range(done, rule.steps):
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = rule.lr_at(step)
            loss = self._accumulate(model, step)
            if not math.isfinite(loss):
                self._stop(step, "loss", loss)
            norm = float(self.accelerator.clip_grad_norm_(model.parameters(), rule.clip))
            if not math.isfinite(norm):
                self._stop(step, "gradient", norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.progress.step = step + 1
            self.progress.seconds += time.perf_counter() - started
            self.progress.losses.append(loss)
            last = step + 1 == rule.steps
            if (step + 1) % max(1, rule.steps // 200) == 0 or last:
                sums, self.progress.losses = self.progress.losses, []
                point = {"step": step + 1, "tokens": (step + 1) * tokens, "loss": sum(sums) / len(sums)}
                self.progress.curve.append(point | {"lr": rule.lr_at(step), "grad_norm": norm})
                bar.set_postfix(loss=f"{point['loss']:.3f}")
            if (step + 1) % rule.validate_every == 0 or last:
                self.progress.validations.append({"step": step + 1, **self.validate()})
            if (step + 1) % rule.save_every == 0 and not last:
                self._save(optimizer)
            bar.update(tokens)
        bar.close()
        if self.accelerator.is_main_process:
            self._finish()

    def _accumulate(self, model: Any, step: int) -> float:
        """Forward and backward of one optimizer step's batch; returns its mean loss over labels and processes."""
        ids, labels = self.task.batch(self.tokenizer, step, self.size, self.length, self.settings.seed)
        count = int((labels[:, 1:] != IGNORED).sum())
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        ids, labels = ids[rank::processes], labels[rank::processes]
        micro = self.rule.micro_batch or len(ids)
        total = 0.0
        for start in range(0, len(ids), micro):
            x = torch.from_numpy(ids[start : start + micro]).to(self.device)
            y = torch.from_numpy(labels[start : start + micro]).to(self.device)
            final = start + micro >= len(ids)
            with nullcontext() if final else self.accelerator.no_sync(model), self.accelerator.autocast():
                # Gradients are averaged over processes; the loss is the sum over labels, over all of them.
                loss = self._loss(model, x, y) * processes / count
            self.accelerator.backward(loss)
            total += float(loss.detach())
        mean = torch.tensor([total / processes], device=self.device)
        return float(self.accelerator.reduce(mean, "sum")[0])

    def _loss(self, model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Sum over the labels of one micro-batch."""
        distill, config = self.rule.distill, self.model.config
        further: dict[str, Any] = {}
        if self.teacher is not None and distill.hidden_mse:
            further["output_hidden_states"] = True
        weight = getattr(config, "kv_loss_weight", 0.0) if getattr(config, "refers_up", False) else 0.0
        out = model(x, labels=y if weight else None, use_cache=False, **further)
        logits, wanted = out.logits[:, :-1].float(), y[:, 1:]
        asked = wanted != IGNORED
        plain = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum")
        extra = 0.0
        if weight:  # what the model adds to its own mean loss
            own = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
            extra = (out.loss - own) * asked.sum()
        if self.teacher is None:
            return plain + extra
        with torch.no_grad():
            taught = self.teacher(x, use_cache=False, **further)
        t = distill.temperature
        student = F.log_softmax(logits[asked] / t, dim=-1)
        teacher = F.log_softmax(taught.logits[:, :-1].float()[asked] / t, dim=-1)
        loss = (1 - distill.weight) * plain + extra
        loss = loss + distill.weight * t * t * F.kl_div(student, teacher, log_target=True, reduction="sum")
        if distill.hidden_mse:
            far = F.mse_loss(out.hidden_states[-2].float(), taught.hidden_states[-2].float())
            loss = loss + distill.hidden_mse * far * asked.sum()
        return loss

    def _stop(self, step: int, what: str, value: float) -> None:
        saved = _checkpoints(self.folder.path)
        kept = (
            f"the checkpoint after step {_step(saved[-1])} is kept in {saved[-1]}" if saved else "no checkpoint was due"
        )
        raise InputError(
            "runner.lr",
            self.rule.lr,
            f"the {what} is {value} at step {step + 1}: {kept}; try a smaller one",
        )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss (nats per label), perplexity and accuracy on held-out sequences, in float32 or the autocast dtype."""
        ids, labels = self.task.validation(self.tokenizer, self.length, self.rule.validate_sequences)
        self.model.eval()
        loss = right = count = 0.0
        micro = self.rule.micro_batch or max(1, min(len(ids), self.size))
        for start in range(0, len(ids), micro):
            x = torch.from_numpy(ids[start : start + micro]).to(self.device)
            y = torch.from_numpy(labels[start : start + micro]).to(self.device)[:, 1:]
            with self.accelerator.autocast():
                logits = self.model(x, use_cache=False).logits[:, :-1].float()
            asked = y != IGNORED
            loss += float(F.cross_entropy(logits[asked], y[asked], reduction="sum"))
            right += float((logits.argmax(-1) == y)[asked].sum())
            count += float(asked.sum())
        self.model.train()
        mean = loss / count
        return {"loss": mean, "perplexity": math.exp(min(mean, 80.0)), "accuracy": right / count, "labels": count}

    # checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, optimizer: Any) -> None:
        """Write a checkpoint, whole or not at all, and let older ones go."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        home = self.folder.path / CHECKPOINTS
        final = home / f"step-{self.progress.step:07d}"
        partial = home / f"{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_weights(self.model), partial / "model.safetensors")
        torch.save(getattr(optimizer, "optimizer", optimizer).state_dict(), partial / "optimizer.pt")
        hashes = {f.name: file_sha256(f) for f in sorted(partial.iterdir())}
        (partial / STATE).write_text(json.dumps({"sha256": hashes, "progress": asdict(self.progress)}))
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)
        for old in _checkpoints(self.folder.path)[:-KEPT]:
            shutil.rmtree(old)

    def _restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Go on from the newest checkpoint that is whole."""
        for folder in reversed(_checkpoints(self.folder.path)):
            problem = damage(folder)
            if problem is not None:
                self.say(f"the checkpoint after step {_step(folder)} is damaged ({problem}): the one before it is used")
                continue
            state = json.loads((folder / STATE).read_text())
            weights = load_file(folder / "model.safetensors", device=str(self.device))
            self.model.load_state_dict(weights, strict=False)  # tied weights are stored once
            optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location=self.device, weights_only=True))
            self.progress = Progress(**state["progress"])
            self.say(f"goes on after step {self.progress.step} of {self.rule.steps}")
            return

    # the end ------------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Write ``model/`` and ``record.json``."""
        rule, progress = self.rule, self.progress
        target = self.folder.path / MODEL
        model = self.model
        parameters = sum(p.numel() for p in model.parameters())
        if rule.train == "kv" and not isinstance(self.source, ScratchModel):
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
            dtype = getattr(torch, rule.save_dtype)
            save_file(
                {n: p.detach().to("cpu", dtype).contiguous() for n, p in trained.items()},
                target / WEIGHTS,
            )
            model.config.save_pretrained(target)
            how = {"init": rule.init, "adapter_rank": rule.adapter_rank, "base": self.source.fingerprint()}
            (target / HOW).write_text(json.dumps(how) + "\n", encoding="utf-8")
        else:
            model.to(getattr(torch, rule.save_dtype)).save_pretrained(target)
            self.tokenizer.save_pretrained(target)
        shape = kv_shape(model.config, self.settings.torch_dtype)
        tokens = progress.step * self.size * self.length
        record = record_head("done", self.folder, self.method, self.task.source(), self.settings)
        record["sessions"] = self.folder.sessions()
        record |= {
            "training": {
                "steps": progress.step,
                "tokens": tokens,
                "lr": rule.lr,
                "seconds": progress.seconds,
                "tokens_per_s": tokens / max(progress.seconds, 1e-9),
                "sequence": self.length,
                "sequences_per_step": self.size,
                "parameters": parameters,
                "processes": self.accelerator.num_processes,
            },
            "curve": progress.curve,
            "validations": progress.validations,
            "validation": progress.validations[-1],
            "bytes": {
                "kv_bytes_per_token": kv_bytes_per_token(self.method, model.config, self.settings.torch_dtype),
                "kv_bytes_fixed": shape.fixed_bytes(1 << 30),
                "dtype": str(self.settings.torch_dtype).removeprefix("torch."),
            },
            "weights": {f.name: file_sha256(f) for f in sorted(target.iterdir())},
            "provenance": self.made_by,
        }
        self.folder.finish(record)
        shutil.rmtree(self.folder.path / CHECKPOINTS, ignore_errors=True)


def new_accelerator(settings: Settings) -> Accelerator:
    """One process's part in the training; bfloat16 is computed in, the weights stay float32."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        needed = "needs the package accelerate: pip install 'kvbench[train]'"
        raise InputError("runner", "train", needed) from error
    AcceleratorState._reset_state()  # jobs of a sweep may differ in dtype and share a process
    mixed = "bf16" if settings.torch_dtype == torch.bfloat16 else "no"
    return Accelerator(mixed_precision=mixed, cpu=settings.torch_device == "cpu")


def kv_bytes_per_token(method: Method, config: Any, dtype: torch.dtype) -> int:
    """Bytes that each further token adds to a long sequence's cache, by the formula."""
    shape, long = kv_shape(config, dtype), 1 << 20
    return method.bytes_formula(shape, long + 1) - method.bytes_formula(shape, long)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None: nothing."""
    try:
        hashes: Mapping[str, str] = json.loads((folder / STATE).read_text())["sha256"]
        return next(
            (f"{name} is not what was written" for name, h in hashes.items() if file_sha256(folder / name) != h), None
        )
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def _checkpoints(run: Path) -> list[Path]:
    """Whole ones, oldest first."""
    return sorted(f for f in (run / CHECKPOINTS).glob("step-*") if f.suffix != ".partial")


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters; one that is tied to another stands there once."""
    return {name: p.detach().contiguous() for name, p in model.named_parameters()}
