"""Interface of sharing architectures, which define the layers that own keys and values.

A new architecture is a frozen dataclass with :meth:`Sharing.source` in a new file, and one YAML in ``conf/method``. It
determines a model's config (:class:`.config.KVShareLlamaConfig`) and requires weights trained for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from ...conf.errors import InputError
from ...conf.identity import HasIdentity
from ...conf.options import NonNegativeInt, OneOf, PositiveInt
from .kv_map import FULL, check_map
from .plan import ENCODINGS

RUN_KEYS = ("iter_forward", "iter_backward", "kv_loss_weight", "encode")
"""Config keys for the encoding of sequences, which do not depend on the weights."""


@dataclass(frozen=True)
class Sharing(HasIdentity, ABC):
    """Map of layers to KV sources for any number of layers, with the other properties of the architecture."""

    key_prefix: ClassVar[str] = "method.sharing."

    @property
    @abstractmethod
    def label(self) -> str:
        """Short name, which also identifies trained weights: ``cla2``, ``yoco``, ``lckv-w2``."""

    @abstractmethod
    def source(self, layers: int) -> list[int]:
        """Return, for each of ``layers`` layers, the layer whose keys and values it attends over.

        Raises:
            InputError: The architecture needs more layers.
        """

    def layer_types(self, layers: int) -> list[str]:
        """Return the type of each layer; see :data:`.kv_map.LAYER_TYPES`."""
        return [FULL] * layers

    def extra_config(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        """Return additional config keys; ``shape`` is the config of the plain model."""
        return {}

    @property
    def shares(self) -> bool:
        """Whether some layer does not own keys and values."""
        return True

    @property
    def optional_keys(self) -> tuple[str, ...]:
        """Config keys for which trained weights may differ from :meth:`config_keys`."""
        return ()

    def fit(self, config: Any) -> None:
        """Check that a model's config has this architecture, apart from the encoding of sequences.

        Raises:
            InputError: The model has another architecture.
        """
        keys = self.config_keys(config.to_dict())
        layers = config.num_hidden_layers
        plain = {"kv_source_layers": list(range(layers)), "layer_types": [FULL] * layers, "separate_kv_norm": False}
        for key, required in ({"kv_lora_rank": None} | keys).items():
            actual = getattr(config, key, None)
            actual = plain.get(key) if actual is None else actual
            if key not in (*RUN_KEYS, *self.optional_keys) and actual != required:
                raise InputError(
                    "method.sharing", self.label, f"needs a model whose {key} is {required}; this one's is {actual}"
                )

    @property
    def passes(self) -> int | None:
        """Encoding passes over layers with a higher KV source; 0: one per token; None: set by the model's config."""
        return None

    @property
    def needs(self) -> str:
        """What the architecture needs beyond a model and a prompt; empty: nothing."""
        return ""

    @property
    def shares_heads(self) -> bool:
        """Whether the number of KV heads differs from the plain model's."""
        return False

    def config_keys(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config keys that turn the plain Llama config ``shape`` into this architecture."""
        layers = shape["num_hidden_layers"]
        source, types, extra = self.source(layers), self.layer_types(layers), self.extra_config(shape)
        try:
            check_map(source, types, layers, extra.get("sliding_window"))
        except ValueError as error:
            raise InputError("method.sharing", self.label, str(error)) from error
        return {"kv_source_layers": source, "layer_types": types} | extra


@dataclass(frozen=True, kw_only=True)
class Encoded(Sharing):
    """Architecture whose KV sources may be higher layers, so that sequences are encoded in several passes.

    Attributes:
        iter_forward, iter_backward: Passes without and with gradients (7 and 2 in arXiv 2405.10637).
        encode: ``iterative``, or ``exact`` for as many passes as tokens.
    """

    iter_forward: NonNegativeInt = 7
    iter_backward: PositiveInt = 2
    encode: Annotated[str, OneOf(ENCODINGS)] = "iterative"

    def extra_config(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("iter_forward", "iter_backward", "encode")}

    @property
    def passes(self) -> int | None:
        return 0 if self.encode == "exact" else self.iter_forward + self.iter_backward


class SharingWithinLayers(Sharing):
    """Each layer owns keys and values, and its query heads share them."""

    @property
    def shares(self) -> bool:
        return False

    @property
    def shares_heads(self) -> bool:
        return True

    def source(self, layers: int) -> list[int]:
        return list(range(layers))
