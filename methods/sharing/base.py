"""The contract of a way of sharing: which layers own keys and values, as a part of the model.

A new one is a frozen dataclass with :meth:`Sharing.source` in a file beside this one, and one YAML in ``conf/method``.
What it says becomes a model's config (:class:`.config.KVShareLlamaConfig`), and weights have to be trained for it.
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
"""Keys of the config that say how sequences are encoded, not what the weights were made for."""


@dataclass(frozen=True)
class Sharing(HasIdentity, ABC):
    """A layer -> KV-source map for any number of layers, and what else of the architecture goes with it."""

    key_prefix: ClassVar[str] = "method.sharing."

    @property
    @abstractmethod
    def label(self) -> str:
        """Short name, from which trained weights are found: ``cla2``, ``yoco``, ``lckv-w2``."""

    @abstractmethod
    def source(self, layers: int) -> list[int]:
        """For each of ``layers`` layers, the one whose keys and values it attends over.

        Raises:
            InputError: it cannot be done with so few layers.
        """

    def layer_types(self, layers: int) -> list[str]:
        """Type of each layer, see :data:`.plan.LAYER_TYPES`."""
        return [FULL] * layers

    def further(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        """Further keys of the config; ``shape`` are those of the plain model."""
        return {}

    @property
    def shares(self) -> bool:
        """Some layer has no keys and values of its own."""
        return True

    @property
    def left_open(self) -> tuple[str, ...]:
        """Keys of the config in which trained weights may differ from :meth:`config_keys`."""
        return ()

    def fit(self, config: Any) -> None:
        """Check a model's config against this way of sharing; how sequences are encoded is no part of it.

        Raises:
            InputError: the model was built in another way.
        """
        keys = self.config_keys(config.to_dict())
        layers = config.num_hidden_layers
        plain = {"kv_source_layers": list(range(layers)), "layer_types": [FULL] * layers, "separate_kv_norm": False}
        for key, wanted in keys.items():
            found = getattr(config, key, None)
            found = plain.get(key) if found is None else found
            if key not in (*RUN_KEYS, *self.left_open) and found != wanted:
                raise InputError(
                    "method.sharing", self.label, f"needs a model whose {key} is {wanted}; this one's is {found}"
                )

    @property
    def passes(self) -> int | None:
        """Passes over layers that refer up when several tokens are encoded; 0: as many as tokens; None: no say."""
        return None

    @property
    def shares_heads(self) -> bool:
        """The query heads of a layer share keys and values further than in the plain model."""
        return False

    def config_keys(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        """What makes a plain Llama's config keys ``shape`` this architecture."""
        layers = shape["num_hidden_layers"]
        source, types, further = self.source(layers), self.layer_types(layers), self.further(shape)
        try:
            check_map(source, types, layers, further.get("sliding_window"))
        except ValueError as error:
            raise InputError("method.sharing", self.label, str(error)) from error
        return {"kv_source_layers": source, "layer_types": types} | further


@dataclass(frozen=True, kw_only=True)
class Encoded(Sharing):
    """A way of sharing whose sources may stand above: how several tokens are encoded at once.

    Attributes:
        iter_forward, iter_backward: passes without and with gradients (7 and 2 in arXiv 2405.10637).
        encode: ``iterative``, or ``exact``: as many passes as tokens.
    """

    iter_forward: NonNegativeInt = 7
    iter_backward: PositiveInt = 2
    encode: Annotated[str, OneOf(ENCODINGS)] = "iterative"

    def further(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("iter_forward", "iter_backward", "encode")}

    @property
    def passes(self) -> int | None:
        return 0 if self.encode == "exact" else self.iter_forward + self.iter_backward
