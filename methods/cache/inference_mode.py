"""Caches change under ``torch.inference_mode`` alone, whoever calls.

PyTorch lets a tensor that was made under inference mode be changed in place only under it. A cache's tensors are made
by whoever feeds the prompt: the engine (inference mode), ``model.generate`` (``no_grad``) or a plain forward (autograd
on), and the next step may be another one's. So everything that changes a cache enters inference mode by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def under_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` under inference mode; to a caller outside of it a tensor is returned as an ordinary one.

    No gradient passes: where a caller's autograd would need one, ``backward`` raises.
    """
    inner = torch.inference_mode()(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.is_inference_mode_enabled():  # entering it again for each layer would cost a step 3 us a time
            return function(*args, **kwargs)
        result = inner(*args, **kwargs)
        return _ordinary(result, (*args, *kwargs.values())) if isinstance(result, torch.Tensor) else result

    return call


def _ordinary(result: torch.Tensor, arguments: tuple[Any, ...]) -> Any:
    out = result.clone()
    given = [x for a in arguments for x in ([a] if isinstance(a, torch.Tensor) else _fields_of(a))]
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in given):
        out.requires_grad_().register_hook(_refuse_gradient)
    return out


def _fields_of(x: Any) -> list[Any]:
    """Values of a dataclass, which carries tensors to a cache (:class:`.forward.LayerCall`); else nothing."""
    return list(vars(x).values()) if is_dataclass(x) else []


def _refuse_gradient(gradient: torch.Tensor) -> NoReturn:
    raise RuntimeError("no gradient passes through a kvbench cache: train without past_key_values")
