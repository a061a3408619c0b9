"""Decorator that runs every modification of a cache under ``torch.inference_mode``.

PyTorch allows in-place changes of an inference tensor only under inference mode. The engine prefills under inference
mode, ``model.generate`` under ``no_grad`` and a plain forward with autograd, and the next step may come from another of
them. Every function that modifies a cache therefore enters inference mode itself.
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
    """Run ``function`` under inference mode; a caller outside of it gets a returned tensor as a normal tensor.

    No gradient passes through: ``backward`` raises if the caller's autograd would need one.
    """
    inner = torch.inference_mode()(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.is_inference_mode_enabled():  # entering it again would cost 3 us per layer and step
            return function(*args, **kwargs)
        result = inner(*args, **kwargs)
        return _normal_tensor(result, (*args, *kwargs.values())) if isinstance(result, torch.Tensor) else result

    return call


def _normal_tensor(result: torch.Tensor, arguments: tuple[Any, ...]) -> Any:
    out = result.clone()
    inputs = [x for a in arguments for x in ([a] if isinstance(a, torch.Tensor) else _fields_of(a))]
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
        out.requires_grad_().register_hook(_refuse_gradient)
    return out


def _fields_of(x: Any) -> list[Any]:
    """Return the field values of a dataclass, such as :class:`.forward.LayerCall`; for other types an empty list."""
    return list(vars(x).values()) if is_dataclass(x) else []


def _refuse_gradient(gradient: torch.Tensor) -> NoReturn:
    raise RuntimeError("no gradient passes through a kvbench cache: train without past_key_values")
