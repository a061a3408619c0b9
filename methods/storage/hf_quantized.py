"""transformers' quantized cache (``QuantizedCache`` with the quanto backend), for comparison.

It differs from KIVI: the whole prompt is quantized at once, with no recent tokens left out; keys and values are both
quantized in groups of channels of one token; and after every ``residual`` new tokens the whole cache is dequantized and
quantized again, which adds rounding error to old tokens. The layer class is transformers'; this module gives it rows of
one length and counts its bytes.

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
from .packed import value_group_size
from .segmented import SegmentedLayer
from .segments import Segments

BUILD_TIMEOUT_S = 1800.0
"""Maximum time to wait for another process that compiles optimum-quanto's extension."""


def build_extension(device_type: str) -> None:
    """Load optimum-quanto's extension for ``cpu`` or ``cuda``, compiling it on first use.

    torch guards the compilation with a lock file that remains after a killed process, and every later process would
    wait for it forever. This function holds an operating system lock, which is released with its process, and deletes
    a stale lock file.

    Raises:
        InputError: Another process is still compiling after :data:`BUILD_TIMEOUT_S`, or the compilation fails.
    """
    from optimum.quanto.library.extensions import get_extension, is_extension_available

    name = "quanto_cpp" if device_type == "cpu" else f"quanto_{device_type}"
    if not is_extension_available(name) or get_extension(name)._lib is not None:
        return
    extension = get_extension(name)
    folder = Path(extension.build_directory)
    lock = folder.with_name("kvbench-build.lock")  # optimum-quanto deletes the folder itself after torch updates
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
    """Segments of equal length in a layer of transformers, [N, 1, S, D]."""

    static_problem = "transformers' quantized cache makes new, longer tensors at every step"

    def __init__(self, bits: int, group: int, residual: int):
        self.bits, self.group, self.residual = bits, group, residual
        self._layer: Any = None  # a QuantoQuantizedLayer after the first append; its tensors are typed too loosely
        self._current: tuple[torch.Tensor, torch.Tensor] | None = None  # keys and values of the current step

    def __deepcopy__(self, memo: dict[int, Any]) -> HFSegments:
        """Share quanto's tensors, which do not support deepcopy and are never modified in place."""
        other = HFSegments(self.bits, self.group, self.residual)
        other._layer, other._current = copy.copy(self._layer), self._current
        return other

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self._layer is None:
            build_extension(keys.device.type)
            group = value_group_size(self.group, keys.shape[2], self.bits)
            self._layer = QuantoQuantizedLayer(self.bits, 0, 0, group, self.residual)
        self._current = self._layer.update(keys[:, None], values[:, None])

    def flush(self) -> None:
        self._current = None

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        layer, current = self._layer, self._current
        assert layer is not None, "read before append"
        if current is None:
            keys, values = (layer._dequantize(x) for x in (layer._quantized_keys, layer._quantized_values))
            if layer.keys.numel():
                keys, values = torch.cat([keys, layer.keys], dim=2), torch.cat([values, layer.values], dim=2)
        else:
            keys, values = current
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
        """Bytes without the padding of codes, which are packed in whole groups."""
        layer = self._layer
        if layer is None:
            return 0
        codes = scales = 0
        for x in (layer._quantized_keys, layer._quantized_values):
            codes += x.numel() * self.bits // 8
            scales += sum(t.nbytes for t in plain_tensors(x) if t.is_floating_point())
        return codes + scales + layer.keys.nbytes + layer.values.nbytes


def plain_tensors(x: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors of a tensor subclass."""
    if not hasattr(x, "__tensor_flatten__"):
        return [x]
    names, _ = x.__tensor_flatten__()
    return [t for name in names for t in plain_tensors(getattr(x, name))]


@dataclass(frozen=True)
class HFQuantized(Storage):
    """transformers' quantized cache.

    Attributes:
        bits: Bits per code: 2 or 4.
        group: Elements that share a scale and a zero point (transformers' default: 64). A narrower head is one group.
        residual: Number of new tokens between two quantizations of the whole cache (default: 128).
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
        """Return the bytes of codes, a scale and a zero point in the compute dtype per group, and recent tokens.

        The recent tokens are those since the prompt or since the last quantization, after ``residual`` tokens.
        """
        size, recent = shape.element_bytes, new_tokens % self.residual
        old = sum(
            dim * self.bits // 8 + 2 * size * (dim // min(self.group, dim)) for dim in (shape.head_dim, shape.value_dim)
        )
        return sum(heads * ((n - recent) * old + recent * shape.token_channels * size) for n in tokens)
