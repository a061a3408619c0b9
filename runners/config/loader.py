"""Hydra's view of the configuration: its groups, and the composition of a configuration from overrides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

import hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

CONF = "pkg://kvbench.conf"
OF_ANY_KEY = ("experiment", "campaign")
"""Groups whose files set keys of any part."""


def compose(overrides: Sequence[str]) -> DictConfig:
    """Compose the configuration with ``overrides``; within a run its ``--config-dir`` is searched too."""
    with config_loader():
        return hydra.compose("config", overrides=list(overrides))


@contextmanager
def config_loader() -> Iterator[ConfigLoader]:
    """Hydra's loader for ``kvbench.conf``; within a run the run's, which may include a ``--config-dir``."""
    outer = GlobalHydra.instance().hydra  # of a run, or of a program that calls kvbench
    if outer is not None:
        loader = outer.config_loader
        if any(f"{source.scheme()}://{source.path}" == CONF for source in loader.get_sources()):
            yield loader
            return
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_module("kvbench.conf", version_base="1.3"):
            yield GlobalHydra.instance().config_loader()
    finally:
        GlobalHydra.instance().hydra = outer


def groups(root: Traversable, prefix: str = "") -> Iterator[tuple[str, list[Traversable]]]:
    """(group, its YAML files) for every folder of the configuration."""
    for folder in sorted(
        (p for p in root.iterdir() if p.is_dir() and not p.name.startswith("_")), key=lambda p: p.name
    ):
        options = sorted((p for p in folder.iterdir() if p.name.endswith(".yaml")), key=lambda p: p.name)
        if options:
            yield prefix + folder.name, options
        yield from groups(folder, f"{prefix}{folder.name}/")


@cache
def packaged_choices() -> Mapping[str, Sequence[str]]:
    """The choices of every group of ``kvbench.conf``, by group."""
    found = groups(files("kvbench.conf"))
    return {group: [path.name.removesuffix(".yaml") for path in paths] for group, paths in found}


def plain_data(config: Any, key: str | None = None) -> Any:
    """A part of the configuration, or its value at ``key``, resolved, as plain data."""
    value = config if key is None else config[key]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
