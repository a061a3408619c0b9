"""Packages that each extra of the distribution installs, and what to install where one is missing.

The base installation is small: it has ``--help``, ``kv-size`` and the configuration. Everything else is in an extra,
and a command that needs one says so in a line. ``pyproject.toml`` has the versions.
"""

from __future__ import annotations

from importlib.util import find_spec

IMPORTS = {
    "analysis": ("numpy", "pandas", "scipy", "matplotlib"),
    "run": (
        *("torch", "transformers", "safetensors", "huggingface_hub", "tqdm", "gguf"),
        *("jieba", "rapidfuzz", "numpy", "pandas", "scipy", "matplotlib"),
    ),
}
"""Top-level modules by extra; a module of both is in the smaller one first."""


def install(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'kvbench[{extra}]'"


def missing_module(extra: str) -> str | None:
    """The first module of an extra that is not installed; nothing is imported."""
    return next((name for name in IMPORTS[extra] if find_spec(name) is None), None)


def extra_of(module: str | None) -> str | None:
    """The extra that installs a module; None: it belongs to none."""
    top = (module or "").partition(".")[0]
    return next((extra for extra, names in IMPORTS.items() if top in names), None)
