"""transformers' own ``generate`` with its own cache: the baseline that a user has without this project."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from ...conf.errors import InputError, require
from ..cache.method import Method

PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
"""Package of each attention function that PyTorch does not have."""


@dataclass(frozen=True)
class TransformersGenerate(Method):
    """The method ``transformers``: ``model.generate`` as it is, timed and never scored.

    It holds what ``full`` holds, in transformers' cache and with transformers' attention. ``runner=efficiency`` times
    :meth:`generate` itself; a cache of :meth:`new_cache` is that of ``full``.

    Attributes:
        cache: ``dynamic``, which grows by a token at each step, or ``static``, of the final length from the start, with
            which ``generate`` compiles the decode steps on CUDA.
        attention: transformers' attention function.
    """

    cache: Literal["dynamic", "static"] = "dynamic"
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"

    def __post_init__(self) -> None:
        super().__post_init__()
        package = PACKAGES.get(self.attention)
        if package is None:
            return
        require(find_spec(package) is not None, "method.attention", self.attention, f"needs the package {package}")
        if self.cache == "static":
            allowed = "attends to the free slots of a static cache too: use sdpa, or method.cache=dynamic"
            raise InputError("method.attention", self.attention, allowed)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "generate": {"cache": self.cache, "attention": self.attention}}

    @property
    def label(self) -> str:
        attention = "" if self.attention == "sdpa" else f", {self.attention}"
        return f"{self.name} {self.cache}{attention}"
