"""Bytes that a cache held and that the steps read, as means over the steps of an example, by the method's formula.

The formula is the one that tests compare with measured bytes, method by method. It knows the generated tokens of each
example of a batch, where a measurement knows only the whole batch, and costs no time on the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from statistics import fmean

from transformers import PreTrainedModel

from ...analysis.costs import STEP_BYTES
from ...methods.cache.layout import full_shape, model_shape
from ...methods.cache.method import Method
from .runs import BASELINE


def step_bytes(
    method: Method, model: PreTrainedModel, steps: Iterable[tuple[int, int]], padding: int = 0
) -> dict[str, int]:
    """Return the fields :data:`...analysis.costs.STEP_BYTES` of one example, in bytes of one sequence.

    Args:
        method: The method of the run.
        model: The model, of which only the configuration and the dtype matter.
        steps: For each predicted token, the tokens of the compressed prompt and the tokens that followed it, when the
            token was predicted.
        padding: Bytes that the cache stored after the prompt beyond its real tokens: heads of different lengths in a
            storage for equal ones, shorter prompts in a batch. They are held, and read, until the end. What is stored
            later beyond the real tokens, room to grow and places of evicted tokens, is left out.
    """
    counts = Counter(steps)
    shape, full = model_shape(model), full_shape(model, method.sharing)
    formulas: tuple[Callable[[int, int], int], ...] = (
        partial(method.bytes_formula, shape),
        method.read_formula(model),
        partial(BASELINE.bytes_formula, full),
    )
    weights = list(counts.values())
    means = [fmean((formula(*step) for step in counts), weights) for formula in formulas]
    added = (padding, padding, 0)
    return {name: round(mean + more) for name, mean, more in zip(STEP_BYTES, means, added, strict=True)}
