"""transformers' own quantised cache (``QuantizedCache`` with the quanto backend), to compare with.

It resembles KIVI and is another method: the whole prompt is quantised at once, nothing of it stays as it is, keys and
values alike are rounded in groups of channels of one token, and whenever ``residual`` tokens have come since, the whole
cache is expanded and rounded again, so that old tokens are rounded once more each time. The layer class is
transformers'; here it gets rows of one length at a time, and its bytes are counted.

Needs the package optimum-quanto (``pip install 'kvbench[quanto]'``).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from filelock import FileLock, Timeout
from transformers.cache_utils import QuantoQuantizedLayer

from ...conf.errors import InputError
from ...conf.options import OneOf, PositiveInt
from ..cache.kv_shape import KVShape
from .base import Storage, StorageCapabilities
from .packed import channels_together
from .segments import SegmentedLayer, Segments

BUILD_TIMEOUT_S = 1800.0
"""Longest wait for another process that compiles optimum-quanto's extension."""


def build_extension(device_type: str) -> None:
    """Load optimum-quanto's extension for ``cpu`` or ``cuda``; compiles it the first time in an installation.

    torch guards the compilation with a file that outlives a process that is killed, and every later process waits for
    it without end. Here a lock of the operating system's is held, which ends with its process; whoever holds it knows
    that a file found inside is nobody's, and deletes it.

    Raises:
        InputError: another process is still compiling after :data:`BUILD_TIMEOUT_S`, or the compilation fails.
    """
    from optimum.quanto.library.extensions import get_extension, is_extension_available

    name = "quanto_cpp" if device_type == "cpu" else f"quanto_{device_type}"
    if not is_extension_available(name) or get_extension(name)._lib is not None:
        return
    extension = get_extension(name)
    folder = Path(extension.build_directory)
    lock = folder.with_name("kvbench-build.lock")  # beside it: optimum-quanto deletes the folder after torch's updates
    key, value = "method/storage", "hf_quantized"
    try:
        with FileLock(lock, timeout=BUILD_TIMEOUT_S):
            (folder / "lock").unlink(missing_ok=True)
            if not (folder / f"{name}.so").exists():
                print("kvbench: compiling optimum-quanto's extension, once (minutes)", file=sys.stderr, flush=True)
            extension.lib  # noqa: B018 (a property that compiles and loads)
    except Timeout as error:
        waited = f"another process has been compiling optimum-quanto's extension for {BUILD_TIMEOUT_S:.0f} s"
        raise InputError(key, value, f"{waited} and holds {lock}; wait for it or stop it") from error
    except (OSError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        allowed = f"optimum-quanto's extension cannot be compiled in {folder}: {reason}"
        raise InputError(key, value, allowed) from error


class HFSegments(Segments):
    """N heads of equal length in one of transformers' layers, [N, 1, S, D]."""

    def __init__(self, bits: int, group: int, residual: int):
        self.bits, self.group, self.residual = bits, group, residual
        self._layer: Any = None  # a QuantoQuantizedLayer once there are tokens; its tensors are typed too loosely
        self._now: tuple[torch.Tensor, torch.Tensor] | None = None  # what a step attends over, before it is rounded

    def __deepcopy__(self, memo: dict[int, Any]) -> HFSegments:
        """quanto's tensors cannot be copied deeply, and need not be: the layer replaces them, never writes to them."""
        other = HFSegments(self.bits, self.group, self.residual)
        other._layer, other._now = copy.copy(self._layer), self._now
        return other

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self._layer is None:
            build_extension(keys.device.type)
            group = channels_together(self.group, keys.shape[2], self.bits)
            self._layer = QuantoQuantizedLayer(self.bits, 0, 0, group, self.residual)
        self._now = self._layer.update(keys[:, None], values[:, None])

    def flush(self) -> None:
        self._now = None

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        layer, now = self._layer, self._now
        assert layer is not None, "read before append"
        if now is None:
            keys, values = (layer._dequantize(x) for x in (layer._quantized_keys, layer._quantized_values))
            if layer.keys.numel():
                keys, values = torch.cat([keys, layer.keys], dim=2), torch.cat([values, layer.values], dim=2)
        else:
            keys, values = now
        return keys[:, 0], values[:, 0]

    def take(self, index: torch.Tensor) -> Segments:
        if self._layer is not None:
            raise InputError(
                "batch_size",
                self._layer.keys.shape[0],
                "method/storage=hf_quantized cannot feed different numbers of tokens to the rows of a batch; use 1",
            )
        return HFSegments(self.bits, self.group, self.residual)

    @property
    def length(self) -> int:
        return 0 if self._layer is None else self._layer.get_seq_length()

    def tensors(self) -> list[torch.Tensor]:
        layer = self._layer
        if layer is None:
            return []
        quantized = [*plain_tensors(layer._quantized_keys), *plain_tensors(layer._quantized_values)]
        return quantized + [t for t in (layer.keys, layer.values) if t.numel()]

    @property
    def logical_bytes(self) -> int:
        """Without the padding of codes, which are packed by whole groups."""
        layer = self._layer
        if layer is None:
            return 0
        codes = scales = 0
        for x in (layer._quantized_keys, layer._quantized_values):
            codes += x.numel() * self.bits // 8
            scales += sum(t.nbytes for t in plain_tensors(x) if t.is_floating_point())
        return codes + scales + layer.keys.nbytes + layer.values.nbytes


def plain_tensors(x: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in memory behind a tensor subclass."""
    if not hasattr(x, "__tensor_flatten__"):
        return [x]
    names, _ = x.__tensor_flatten__()
    return [t for name in names for t in plain_tensors(getattr(x, name))]


@dataclass(frozen=True)
class HFQuantized(Storage):
    """transformers' quantised cache.

    Attributes:
        bits: of a code: 2 or 4.
        group: numbers that share a scale and a zero (64 by transformers' default); a narrower head is one group.
        residual: how many tokens come between two roundings of everything (128 by default).
    """

    id: ClassVar[str] = "HFQuantized"
    bits: Annotated[int, OneOf((2, 4))] = 4
    group: PositiveInt = 64
    residual: PositiveInt = 128

    @property
    def name(self) -> str:
        return f"hf_quantized{self.bits}"

    @cached_property
    def capabilities(self) -> StorageCapabilities:
        return StorageCapabilities(padding_bytes=2 * self.group)

    def new_layers(self, num_layers: int) -> Sequence[SegmentedLayer]:
        if find_spec("optimum") is None or find_spec("optimum.quanto") is None:
            raise InputError(
                "method/storage", self.name, "needs the package optimum-quanto: pip install 'kvbench[quanto]'"
            )
        new = partial(HFSegments, self.bits, self.group, self.residual)
        return [SegmentedLayer(new) for _ in range(num_layers)]

    def bytes_formula(self, tokens: Sequence[int], heads: int, shape: KVShape, new_tokens: int = 0) -> int:
        """Codes, and a scale and a zero in the compute dtype for each group; the latest tokens as they are.

        They are counted from the prompt's end: the step at which ``residual`` of them have come rounds everything.
        """
        size, recent = shape.element_bytes, new_tokens % self.residual
        old = sum(
            dim * self.bits // 8 + 2 * size * (dim // min(self.group, dim)) for dim in (shape.head_dim, shape.value_dim)
        )
        return sum(heads * ((n - recent) * old + recent * shape.token_channels * size) for n in tokens)
