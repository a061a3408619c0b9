"""Training: from scratch, or from a checkpoint of the plain model whose layers learn to share keys and values.

    python run.py runner=train method=cla task=recall model=scratch
    python run.py runner=train method=yoco task=text model=smollm2-135m runner.init=mean runner.distill.weight=1

A run is like any other: its folder is named by what decides the numbers, it continues where it was stopped, and
``record.json`` is written last. In the same folder ``model/`` has the trained weights (``model=local model.path=...``
loads it; with ``runner.train=kv`` it is ``model=uptrained``), and ``checkpoints/`` the last two states with the
optimizer's, each written atomically and checked by its sha256 when it is read.

Under ``accelerate launch`` each process takes its part of every batch; one of them writes.
"""

from .losses import Distill
from .runner import TrainRunner

__all__ = ["Distill", "TrainRunner"]
