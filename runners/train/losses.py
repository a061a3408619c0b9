"""Losses of a training step: cross-entropy, and distillation from the model that was converted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ...conf.options import NonNegativeFloat, Options, PositiveFloat, Share
from ...tasks.training import IGNORED


@dataclass(frozen=True)
class Distill(Options):
    """Distillation from the model that was converted.

    Attributes:
        weight: Weight of the distillation loss; that of the plain loss is 1 minus it. 0: no teacher.
        temperature: Temperature of the softened distributions.
        hidden_mse: Weight of the squared difference of the hidden states before the last layer (SwiftKV: 1).
    """

    key_prefix: ClassVar[str] = "runner.distill."
    weight: Share = 0.0
    temperature: PositiveFloat = 2.0
    hidden_mse: NonNegativeFloat = 0.0

    @property
    def needs_teacher(self) -> bool:
        """Whether any of the losses compares with the teacher."""
        return bool(self.weight or self.hidden_mse)


def training_loss(
    model: Any, teacher: PreTrainedModel | None, distill: Distill, kv_weight: float, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """Sum of the losses over the labels of one micro-batch.

    Args:
        model: The model that is trained, as prepared by accelerate.
        teacher: The model to learn from, or None.
        distill: Weights of the distillation losses.
        kv_weight: Weight of the loss that a model adds for layers with a higher KV source; 0: none.
        x: [B, T] token ids.
        y: [B, T] labels.
    """
    extra_outputs: dict[str, Any] = {}
    if teacher is not None and distill.hidden_mse:
        extra_outputs["output_hidden_states"] = True
    out = model(x, labels=y if kv_weight else None, use_cache=False, **extra_outputs)
    logits, labels = out.logits[:, :-1].float(), y[:, 1:]  # [B, T - 1, vocabulary], [B, T - 1]
    is_label = labels != IGNORED
    plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    kv_loss = 0.0
    if kv_weight:  # the loss that the model adds to its mean loss
        mean = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        kv_loss = (out.loss - mean) * is_label.sum()
    if teacher is None:
        return plain + kv_loss
    with torch.no_grad():
        target = teacher(x, use_cache=False, **extra_outputs)
    t = distill.temperature
    student_log_probs = F.log_softmax(logits[is_label] / t, dim=-1)
    teacher_log_probs = F.log_softmax(target.logits[:, :-1].float()[is_label] / t, dim=-1)
    loss = (1 - distill.weight) * plain + kv_loss
    divergence = F.kl_div(student_log_probs, teacher_log_probs, log_target=True, reduction="sum")
    loss = loss + distill.weight * t * t * divergence
    if distill.hidden_mse:
        difference = F.mse_loss(out.hidden_states[-2].float(), target.hidden_states[-2].float())
        loss = loss + distill.hidden_mse * difference * is_label.sum()
    return loss
