"""The model to train, its teacher and its optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...conf.errors import InputError
from ...methods.sharing.base import Sharing
from ...models.base import ModelSource
from ...models.kvshare.convert import convert
from ...models.scratch import ScratchModel
from ...models.uptrained import add_adapters, is_trained
from ...tasks.training import TrainingData

if TYPE_CHECKING:
    from .runner import TrainRunner


@dataclass(frozen=True)
class TrainedModel:
    """A model to train.

    Attributes:
        model: float32, on the device, in training mode.
        tokenizer: The model's tokenizer.
        teacher: The model to learn from, or None.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    teacher: PreTrainedModel | None


def new_model(
    options: TrainRunner,
    source: ModelSource,
    sharing: Sharing | None,
    task: TrainingData,
    seed: int,
    device: torch.device,
) -> TrainedModel:
    """Build a model from scratch, or convert a checkpoint.

    Args:
        options: The runner with its options.
        source: The checkpoint, or ``model=scratch``.
        sharing: The architecture; None: that of the source.
        task: The task, which provides the tokenizer of a model from scratch.
        seed: Seed of new weights and adapters.
        device: Device of the model.
    """
    torch.manual_seed(seed)
    teacher = None
    if isinstance(source, ScratchModel):
        tokenizer = task.new_tokenizer()
        model: Any = source.build(sharing, tokenizer, seed)
        model = model.to(device)
    else:
        loaded = source.load(str(device), torch.float32)
        assert loaded.tokenizer is not None
        tokenizer, model = loaded.tokenizer, loaded.model
        if options.distill.needs_teacher:
            teacher = loaded.model.eval().requires_grad_(False)
        if sharing is not None:
            model = convert(loaded.model, sharing, options.init)
        elif teacher is not None:
            raise InputError("runner.distill", options.distill.weight, "needs a method that shares, to learn it")
        if options.train == "kv":
            model = _train_kv_only(model, options.adapter_rank)
    model.train()
    if options.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return TrainedModel(model, tokenizer, teacher)


def _train_kv_only(model: Any, adapter_rank: int) -> Any:
    """Freeze everything except keys and values, and add low-rank adapters to other projections if configured."""
    if adapter_rank:
        model = add_adapters(model, adapter_rank)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name))
    return model


def new_optimizer(options: TrainRunner, model: PreTrainedModel) -> torch.optim.Optimizer:
    """AdamW over the parameters that are trained; norms and biases do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2))
