"""Parts of the composed configuration: objects of the classes that it names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ...conf.errors import InputError
from .checks import check_targets, check_values, target_class
from .errors import first_input_error, input_error_line
from .loader import plain_data


def build(node: DictConfig, key: str, kind: type[Any]) -> Any:
    """Build the object of class ``kind`` that ``node``, at ``key`` of the configuration, describes.

    Errors of the part's constructor are reported before type errors, because they are more specific.

    Raises:
        InputError: A class in it is not allowed or not of that kind, or the part does not accept a value.
    """
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise InputError(key, node, f"must be a choice of {key}=NAME")
    plain = plain_data(node)
    check_targets(plain, key)
    cls = target_class(plain["_target_"], f"{key}._target_")
    if not issubclass(cls, kind):
        raise InputError(f"{key}._target_", plain["_target_"], f"must be a {kind.__name__}")
    try:
        part = instantiate(node)
    except InstantiationException as error:
        if (cause := first_input_error(error)) is not None:
            raise _with_whole_key(cause, node, key) from error
        if input_error_line(error) is None:
            check_values(plain, key, cls)
        raise
    check_values(plain, key, cls)
    return part


def _with_whole_key(error: InputError, node: DictConfig, key: str) -> InputError:
    """The error of a part's constructor, which knows the keys of its family and not where the part is nested."""
    place, part = next((place, part) for place, part in _innermost_first(node, key) if not _can_be_built(part))
    prefix = getattr(target_class(part["_target_"], f"{place}._target_"), "key_prefix", "")
    if prefix == f"{place}." or not error.key.startswith(prefix):
        return error
    whole = f"{place}.{error.key.removeprefix(prefix)}"
    return InputError(whole, error.value, error.allowed.replace(error.key, whole))


def _innermost_first(node: DictConfig, key: str) -> Iterator[tuple[str, DictConfig]]:
    """The parts of a configuration with their keys, in the order in which they are built."""
    for name in node:
        child = node._get_node(name)
        if isinstance(child, DictConfig) and "_target_" in child:
            yield from _innermost_first(child, f"{key}.{name!s}")
    yield key, node


def _can_be_built(node: DictConfig) -> bool:
    try:
        instantiate(node)
    except InstantiationException:
        return False
    return True


def recorded(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration as it is recorded: absolute paths are reduced to their last component."""
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items()}
        if isinstance(value, list):
            return [clean(v) for v in value]
        return Path(value).name if isinstance(value, str) and os.path.isabs(os.path.expanduser(value)) else value

    return {str(k): clean(v) for k, v in plain.items() if k != "results_dir"}
