"""Small trained models of this repository, one for each sharing architecture.

The members of a family have equal data, equal training tokens and (nearly) equal parameters.
``models/tiny/<training task>/<label>`` holds the files of ``save_pretrained`` and the record of the training
(``training.json``); ``scripts/train_family.py`` trains them again. An installed package does not hold their 45 MB of
weights: there they are read from ``tiny`` in the user's cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import ClassVar

import torch

from ..conf.errors import InputError, require
from ..conf.user_cache import cache_dir
from ..conf.wording import one_of
from ..methods.sharing.base import Sharing
from .base import LoadedModel, ModelSource
from .local import LocalModel


def family_folder(package: Path) -> Path:
    """The folder of the families: ``tiny`` of a checkout, else of the user's cache."""
    return package / "tiny" if (package / "tiny").is_dir() else cache_dir() / "tiny"


FAMILY = family_folder(Path(str(resources.files("kvbench.models"))))
PLAIN = "mha"
"""The member whose layers all have keys and values of their own, for methods without a sharing architecture."""


@dataclass
class TinyModel(ModelSource):
    """A member of a family of small trained models.

    Attributes:
        name: Name shown in tables and result paths.
        trained_on: Task of the training, ``recall`` (associative recall) or another folder of ``models/tiny``.
        member: ``mha``, ``cla2``, ``yoco`` ...; None: the one that the method needs, ``mha`` for a method without a
            sharing architecture. Set it to run a token method on a sharing model.
        by_method: The method has chosen the member; set by :meth:`for_sharing`.
    """

    location_fields: ClassVar[tuple[str, ...]] = ("member", "by_method")

    name: str = "tiny"
    trained_on: str = "recall"
    member: str | None = None
    by_method: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not FAMILY.is_dir():
            raise InputError(
                "model",
                self.name,
                "the small models are not in an installed package: "
                f"copy models/tiny of a checkout to {FAMILY}, or train one: "
                "kvbench run runner=train method=cla task=recall model=scratch",
            )
        kinds = sorted(f.name for f in FAMILY.iterdir() if f.is_dir())
        require(self.trained_on in kinds, "model.trained_on", self.trained_on, one_of(self.trained_on, kinds))
        if self.member is not None:
            require(self.member in self.members, "model.member", self.member, one_of(self.member, self.members))

    @property
    def members(self) -> list[str]:
        """Labels of all members."""
        return sorted(f.name for f in (FAMILY / self.trained_on).iterdir() if (f / "config.json").is_file())

    def for_sharing(self, sharing: Sharing | None, method: str) -> ModelSource:
        """Member that was trained for the method."""
        if self.member is not None:
            if sharing is not None:
                self._local.for_sharing(sharing, method)
            return self
        label = PLAIN if sharing is None else sharing.label
        if label not in self.members:
            raise InputError(
                "method",
                method,
                f"{label} is not among the small models trained on {self.trained_on} ({', '.join(self.members)}); "
                f"train it: python run.py runner=train method={method} task={self.trained_on} model=scratch",
            )
        return replace(self, member=label, by_method=True)

    @property
    def _local(self) -> LocalModel:
        member = self.member or PLAIN
        return LocalModel(str(FAMILY / self.trained_on / member), name=self.name)

    def fingerprint(self) -> str:
        """``sha256:`` over the member's files, or the name of the family if the method has chosen the member."""
        return f"tiny:{self.trained_on}" if self.by_method else self._local.fingerprint()

    @property
    def method_weights(self) -> str | None:
        """Fingerprint of the member, if the method has chosen it."""
        return self._local.fingerprint() if self.by_method else None

    def load(self, device: str, dtype: torch.dtype) -> LoadedModel:
        """See :meth:`ModelSource.load`."""
        local = self._local
        positions = local.config.max_position_embeddings
        return replace(local, max_prompt_tokens=positions - 1).load(device, dtype)
