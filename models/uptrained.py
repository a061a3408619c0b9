"""What ``runner.train=kv`` leaves behind, on the checkpoint that it began with: a few megabytes to ship."""

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
from .kvshare.convert import convert_to
from .local import LocalModel
from .pretrained import read_config, refused_in_one_line

WEIGHTS, HOW = "trained.safetensors", "uptrained.json"


@dataclass
class UptrainedModel(ModelSource):
    """A base model, converted, with the weights of an uptraining.

    Attributes
    ----------
    path : str
        The run's folder ``model``: ``config.json``, ``trained.safetensors`` and ``uptrained.json``.
    base : ModelSource
        The checkpoint that the uptraining began with.
    name : str
        The name shown in tables and result paths.
    """

    location_fields: ClassVar[tuple[str, ...]] = ("path", "base")

    path: str
    base: ModelSource
    name: str = "uptrained"

    def _check(self) -> None:
        """What is asked for is there, and the base is what it was trained on."""
        for file in ("config.json", WEIGHTS, HOW):
            require(
                (self._folder / file).is_file(), "model.path", self.path, f"has no {file}: no model/ of an uptraining"
            )
        wanted = self._how["base"]
        found = self.base.fingerprint()
        if found != wanted:
            raise InputError(
                "model.base", self.base.name, f"has other weights ({found[:18]}) than were trained on ({wanted[:18]})"
            )

    @property
    def _folder(self) -> Path:
        return Path(self.path).expanduser().absolute()

    @property
    def _how(self) -> dict[str, Any]:
        """How the base was converted, as the training wrote it."""
        with refused_in_one_line(self._folder):
            found: dict[str, Any] = json.loads((self._folder / HOW).read_text(encoding="utf-8"))
            return {key: found[key] for key in ("base", "init", "adapter_rank")}

    def for_sharing(self, sharing: Sharing | None, method: str) -> ModelSource:
        """This one, if it shares as the method says."""
        self._check()
        if sharing is not None:
            sharing.fit(read_config(self._folder))
        return self

    def fingerprint(self) -> str:
        """``sha256:`` over what was trained; it names the base's fingerprint."""
        self._check()
        return LocalModel(self.path).fingerprint()

    def load(self, device: str, dtype: torch.dtype) -> LoadedModel:
        """See :meth:`ModelSource.load`; adapters are merged into the weights that they stand on."""
        self._check()
        loaded, how = self.base.load(device, dtype), self._how
        with refused_in_one_line(self._folder):
            config = KVShareLlamaConfig.from_pretrained(self._folder, local_files_only=True)
            tensors = load_file(self._folder / WEIGHTS, device=device)
            model: Any = convert_to(loaded.model, config, how["init"])
            if how["adapter_rank"]:
                model = add_adapters(model, how["adapter_rank"])
            wanted = {name for name, _ in model.named_parameters() if is_trained(name)}
            for name in sorted(wanted ^ tensors.keys()):
                problem = f"its {WEIGHTS} lacks {name}" if name in wanted else f"the model has no place for its {name}"
                raise InputError("model.path", self.path, problem)
            model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, strict=False)
        if how["adapter_rank"]:
            merge_adapters(model)
        return replace(loaded, model=model.to(device).eval(), name=self.name, fingerprint=self.fingerprint())


def is_trained(name: str) -> bool:
    """Whether ``runner.train=kv`` trains the parameter of this name: keys, values, queries, norms and adapters."""
    affected = ("q_proj", "k_proj", "v_proj", "kv_layernorm", "input_layernorm")
    return "lora_" in name or any(part in name.split(".") for part in affected)


def add_adapters(model: Any, rank: int) -> Any:
    """Low-rank adapters (LoRA, arXiv 2106.09685) on the projections that uptraining leaves as they are.

    Raises:
        InputError: the package peft is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        needed = "needs the package peft: pip install 'kvbench[train]'"
        raise InputError("runner.adapter_rank", rank, needed) from error
    targets = ["o_proj", "gate_proj", "up_proj", "down_proj"]
    return inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), model)


def merge_adapters(model: Any) -> None:
    """Add each adapter to the weight that it stands on, and leave the plain layer in its place."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
