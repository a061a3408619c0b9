"""The energy pass: joules of a workload, by the driver's counter."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

from ...models.pretrained import devices_of
from .clock import now
from .energy import EnergyMeter
from .job import Job
from .session import Session

MIN_SECONDS = 2.0
"""Shortest measurement: the workload is repeated, because drivers update their counters a few times a second."""


@torch.inference_mode()
def energy_pass(job: Job, session: Session | None = None) -> dict[str, Any]:
    """Joules of the workload, and watts of the idle device, which are measured once in a session.

    Args:
        job: The method and its requests.
        session: What this process keeps between passes.
    """
    session = session or Session()
    meter = EnergyMeter(job.device)
    if meter.problem is not None:
        return {"energy": {"problem": meter.problem}}
    loaded = session.load(job)
    work = loaded.batches()
    meter = EnergyMeter(job.device, devices_of(loaded.model, job.device))

    def run_workload() -> None:
        for batch in work:
            loaded.answer(loaded.new_cache(), batch)
            gc.collect()

    run_workload()
    if session.idle_watts is None:
        idle = meter.over(lambda: time.sleep(MIN_SECONDS))
        session.idle_watts = idle.joules / idle.seconds
    repetitions = 0

    def repeat() -> None:
        nonlocal repetitions
        start = now(job.device)
        while not repetitions or now(job.device) - start < MIN_SECONDS:
            run_workload()
            repetitions += 1

    energy = meter.over(repeat)
    output = sum(b.output_tokens for b in work)
    return {
        "energy": {
            "problem": None,
            "what": meter.what,
            "joules": energy.joules / repetitions,
            "joules_per_output_token": energy.joules / repetitions / output,
            "watts": energy.joules / energy.seconds,
            "watts_idle": session.idle_watts,
            "repetitions": repetitions,
        }
    }
