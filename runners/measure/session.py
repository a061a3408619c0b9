"""Loading the model of a job, once for all jobs of a measuring process that can share it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ...methods.policies.transformers_generate import TransformersGenerate
from ..engine.compiled import can_compile, compile_decoder
from ..engine.weights import prepare_linear_weights
from .generating import GeneratingJob
from .job import Job, LoadedJob


def load(job: Job) -> LoadedJob:
    """Load the model as the job runs it; see :mod:`..engine.compiled` and :mod:`..engine.weights`."""
    if job.device.startswith("cuda"):  # Triton kernels and graph captures run on the current device
        torch.cuda.set_device(torch.device(job.device).index or 0)
    loaded = job.source.load(job.device, job.dtype)
    model: Any = loaded.model
    if isinstance(job.method, TransformersGenerate):
        if model.config.get_text_config()._attn_implementation != job.method.attention:
            model.set_attn_implementation(job.method.attention)
        return GeneratingJob(job, loaded)
    if job.compiles and can_compile(model):
        return LoadedJob(job, loaded, compile_decoder(model))
    prepare_linear_weights(model, job.fuse_projections)
    return LoadedJob(job, loaded)


class Session:
    """What a measuring process keeps from one pass to the next: the model of the last job, and the idle power.

    Attributes:
        idle_watts: Power of the idle device, once it has been measured.
    """

    def __init__(self) -> None:
        self._last: LoadedJob | None = None
        self.idle_watts: float | None = None

    def load(self, job: Job) -> LoadedJob:
        """:func:`load`, without loading a model again that the last job has left."""
        if self._last is None or not same_model(self._last.job, job):
            self._last = None  # freed before the next one is loaded
            self._last = load(job)
        return replace(self._last, job=job)


def same_model(one: Job, other: Job) -> bool:
    """Whether two jobs run the same model in the same form, so that a process can load it once for both."""

    def model_of(job: Job) -> tuple[object, ...]:
        generates = isinstance(job.method, TransformersGenerate)
        return job.source, job.device, job.dtype, job.compiles, job.fuse_projections, generates and job.method

    return model_of(one) == model_of(other)
