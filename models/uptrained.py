"""Models of ``runner.train=kv``: a checkpoint with the parameters (a few megabytes) that were trained from it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file

from ..conf.errors import InputError, require
from ..methods.sharing.base import Sharing
from .base import LoadedModel, ModelSource
from .kvshare.config import KVShareLlamaConfig
from .kvshare.convert import convert_to_config
from .local import LocalModel
from .pretrained import read_config, refused_in_one_line

TRAINED_WEIGHTS = "trained.safetensors"
CONVERSION_FILE = "uptrained.json"
"""File that holds the fingerprint of the base and how it was converted."""


@dataclass
class UptrainedModel(ModelSource):
    """A base model converted to share keys and values, with the parameters of an uptraining.

    Attributes:
        path: The run's folder ``model``, with ``config.json``, ``trained.safetensors`` and ``uptrained.json``.
        base: The checkpoint that the uptraining started from.
        name: Name shown in tables and result paths.
    """

    location_fields: ClassVar[tuple[str, ...]] = ("path", "base")

    path: str
    base: ModelSource
    name: str = "uptrained"

    def _check(self) -> None:
        """Check that the files exist, and that the base is the one of the training."""
        for file in ("config.json", TRAINED_WEIGHTS, CONVERSION_FILE):
            exists = (self._folder / file).is_file()
            require(exists, "model.path", self.path, f"has no {file}: not the folder model/ of an uptraining")
        expected, actual = self._conversion["base"], self.base.fingerprint()
        allowed = f"has other weights ({actual[:18]}) than the uptraining started from ({expected[:18]})"
        require(actual == expected, "model.base", self.base.name, allowed)

    @property
    def _folder(self) -> Path:
        return Path(self.path).expanduser().absolute()

    @property
    def _conversion(self) -> dict[str, Any]:
        """Content of ``uptrained.json``: fingerprint of the base, ``init`` and ``adapter_rank``."""
        with refused_in_one_line(self._folder):
            content: dict[str, Any] = json.loads((self._folder / CONVERSION_FILE).read_text(encoding="utf-8"))
            return {key: content[key] for key in ("base", "init", "adapter_rank")}

    def for_sharing(self, sharing: Sharing | None, method: str) -> ModelSource:
        """This source, if its config has the method's sharing."""
        self._check()
        if sharing is not None:
            sharing.fit(read_config(self._folder))
        return self

    def fingerprint(self) -> str:
        """``sha256:`` over the files of the folder, which include the base's fingerprint."""
        self._check()
        return LocalModel(self.path).fingerprint()

    def load(self, device: str, dtype: torch.dtype) -> LoadedModel:
        """See :meth:`ModelSource.load`; adapters are merged into their base weights."""
        self._check()
        loaded, conversion = self.base.load(device, dtype), self._conversion
        with refused_in_one_line(self._folder):
            config = KVShareLlamaConfig.from_pretrained(self._folder, local_files_only=True)
            tensors = load_file(self._folder / TRAINED_WEIGHTS, device=device)
            model: Any = convert_to_config(loaded.model, config, conversion["init"])
            if conversion["adapter_rank"]:
                model = add_adapters(model, conversion["adapter_rank"])
            expected = {name for name, _ in model.named_parameters() if is_trained(name)}
            for name in sorted(expected ^ tensors.keys()):
                lacks = f"its {TRAINED_WEIGHTS} lacks {name}"
                problem = lacks if name in expected else f"the model has no place for its {name}"
                raise InputError("model.path", self.path, problem)
            model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, strict=False)
        if conversion["adapter_rank"]:
            merge_adapters(model)
        return replace(loaded, model=model.to(device).eval(), name=self.name, fingerprint=self.fingerprint())


def is_trained(name: str) -> bool:
    """Whether ``runner.train=kv`` trains the parameter of this name: keys, values, queries, norms and adapters."""
    affected = ("q_proj", "k_proj", "v_proj", "kv_layernorm", "input_layernorm")
    return "lora_" in name or any(part in name.split(".") for part in affected)


def add_adapters(model: Any, rank: int) -> Any:
    """Add low-rank adapters (LoRA, arXiv 2106.09685) to the projections that uptraining freezes.

    Raises:
        InputError: the package peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        needed = "needs the package peft: pip install 'kvbench[train]'"
        raise InputError("runner.adapter_rank", rank, needed) from error
    targets = ["o_proj", "gate_proj", "up_proj", "down_proj"]
    return inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), model)


def merge_adapters(model: Any) -> None:
    """Merge each adapter into its base weight, and replace the LoRA layer by the plain layer."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
