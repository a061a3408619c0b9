"""Provenance of a record: code, packages and machine, without host names, users or paths."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "kvbench",
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "hydra-core",
    "lm-eval",
    "numpy",
    "scipy",
    "rouge",
    "jieba",
    "rapidfuzz",
    "gguf",
    "triton",
    "flash-attn",
)
CODE = ("conf", "methods", "models", "tasks", "runners", "analysis")


def collect(device: str) -> dict[str, Any]:
    """Everything needed to judge or repeat a run, as plain data."""
    return {
        "git": _git(),
        "packages": _packages(),
        "python": platform.python_version(),
        "hardware": _hardware(device),
    }


def _git() -> dict[str, Any]:
    """Commit of the running code, and whether its files differ from that commit."""
    root = Path(__file__).resolve().parent

    def ask(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A new file counts as a change too; tests, scripts, notes and results are not part of the running code.
    code = [f":(top){folder}/*.{ending}" for folder in CODE for ending in ("py", "yaml")]
    if ask("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {"sha": None, "dirty": None}  # an installed copy: the repository around it, if any, is another one
    changed = ask("status", "--porcelain", "--untracked-files=all", "--", *code)
    return {"sha": ask("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}


def code_id(git: dict[str, Any]) -> str:
    """Identifier of the code: its commit, with a hash of the sources if they differ from the commit."""
    if git["sha"] is not None and git["dirty"] is False:
        return str(git["sha"])
    root, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for folder in CODE:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return f"{git['sha'] or 'installed'}+{digest.hexdigest()[:12]}"


def _packages() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _hardware(device: str) -> dict[str, Any]:
    info: dict[str, Any] = {
        "device": device,
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "system": platform.system(),
        "preloaded": [Path(path).name for path in preloaded()],
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(torch.device(device))
        info["gpu"] = properties.name
        info["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        info["cuda"] = torch.version.cuda
    return info


def preloaded() -> list[str]:
    """Paths of the libraries that ``LD_PRELOAD`` puts before all others: another allocator changes times and memory."""
    return [path for path in re.split("[ :]", os.environ.get("LD_PRELOAD", "")) if path]


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None
