"""What is installed: extras, the contents of the wheel, and what a command says where a package is missing."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from kvbench.conf.extras import IMPORTS

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WHEEL_LIMIT_MB = 5
COMMAND = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None  # not found by find_spec, and importing it raises ModuleNotFoundError
from kvbench.runners.command import main
sys.exit(main(sys.argv[2:]))
"""


def without(modules: tuple[str, ...], *args: str) -> subprocess.CompletedProcess[str]:
    """``kvbench ARGS`` in a process in which the modules are not installed."""
    return subprocess.run(
        [sys.executable, "-c", COMMAND, ",".join(modules), *args], capture_output=True, text=True, cwd=ROOT
    )


def modules_of(extra: str) -> set[str]:
    """Top-level modules of the packages of an extra, those of kvbench's extras in it included."""
    found: set[str] = set()
    for requirement in PROJECT["project"]["optional-dependencies"][extra]:
        nested = re.fullmatch(r"kvbench\[(\w+)\]", requirement)
        name = re.split(r"[\[<>=]", requirement)[0].replace("-", "_")
        found |= modules_of(nested[1]) if nested else {name}
    return found


@pytest.mark.parametrize("extra", IMPORTS)
def test_the_messages_know_the_packages_of_each_extra(extra: str) -> None:
    assert set(IMPORTS[extra]) == modules_of(extra)


def test_every_extra_that_runs_something_brings_what_a_run_needs() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert all("kvbench[run]" in extras[name] for name in ("eval", "train", "cluster", "wandb", "quanto"))


@pytest.mark.parametrize(
    ("args", "output"),
    [
        (["--help"], "usage: kvbench COMMAND"),
        (["run", "--help"], "method.budget"),
        (["kv-size", "--model", "llama2-7b", "--tokens", "32k"], "17,179,869,184 bytes"),
    ],
)
def test_the_base_installation_is_enough_for(args: list[str], output: str) -> None:
    done = without(IMPORTS["run"], *args)
    assert (done.returncode, done.stderr) == (0, "") and output in done.stdout


def test_a_table_needs_the_analysis_extra_and_no_torch() -> None:
    only_run = tuple(set(IMPORTS["run"]) - set(IMPORTS["analysis"]))
    done = without(only_run, "table", "results/reference/make_run")
    assert (done.returncode, done.stderr) == (0, "") and "snapkv" in done.stdout


@pytest.mark.parametrize(
    ("missing", "args", "line"),
    [
        ("torch", ["run", "method=snapkv"], "package=torch: .*a run needs it: pip install 'kvbench[run]'"),
        (
            "matplotlib",
            ["plot", "results"],
            "package=matplotlib: .*plot needs it: pip install 'kvbench[analysis]'",
        ),
    ],
)
def test_a_missing_package_is_one_line_with_the_extra_to_install(missing: str, args: list[str], line: str) -> None:
    done = without((missing,), *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"error: {line}\n".replace("[", r"\[").replace("]", r"\]"), done.stderr), done.stderr


def test_a_public_name_that_lacks_its_package_names_the_extra() -> None:
    code = "import sys; sys.modules['torch'] = None; import kvbench; kvbench.compress"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: kvbench.compress needs the package torch: pip install 'kvbench[run]'"
    )


def folder_of(package: str, folders: dict[str, str]) -> str:
    """The folder of a package: its own entry's, or below its parent's."""
    if package in folders:
        return folders[package]
    parent, _, name = package.rpartition(".")
    return f"{folder_of(parent, folders)}/{name}"


def test_no_weights_are_package_data() -> None:
    """45 MB of small models belong to the repository and not to a package."""
    folders = PROJECT["tool"]["setuptools"]["package-dir"]
    files = [
        path
        for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for path in (ROOT / folder_of(package, folders)).glob(pattern)
        if path.is_file()
    ]
    assert files and not [path for path in files if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in files) < WHEEL_LIMIT_MB * 10**6


def test_sources_of_kernels_are_package_data() -> None:
    folders, data = (PROJECT["tool"]["setuptools"][key] for key in ("package-dir", "package-data"))
    packed = {
        path
        for package, patterns in data.items()
        for pattern in patterns
        for path in (ROOT / folder_of(package, folders)).glob(pattern)
    }
    sources = {
        path for top in ("methods", "runners") for kind in ("cpp", "h") for path in (ROOT / top).rglob(f"*.{kind}")
    }
    assert sources and sources <= packed


@pytest.mark.slow
def test_the_wheel_is_small_and_has_every_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", str(source)], check=True)
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("kvbench-*.whl")
    assert wheel.stat().st_size < WHEEL_LIMIT_MB * 10**6
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = PROJECT["tool"]["setuptools"]["package-dir"]
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        top = ".".join(package.split(".")[:2])
        folder = source / tops[top] / Path(*package.split(".")[2:])
        assert {f"{package.replace('.', '/')}/{path.name}" for path in folder.glob("*.py")} <= names, package
    assert {"kvbench/conf/config.yaml", "kvbench/py.typed", "kvbench/models/shapes/llama2-7b.json"} <= names


@pytest.mark.parametrize("path", sorted((ROOT / "docker").glob("*.Dockerfile")), ids=lambda p: p.name)
def test_a_dockerfile_copies_what_is_there_and_runs_the_command(path: Path) -> None:
    """Building one takes a daemon and minutes: a workflow does it every night."""
    text = path.read_text(encoding="utf-8")
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for source in re.findall(r"^COPY (\S+) ", text, re.M):
        assert (ROOT / source).exists() and source not in ignored, source
    needed = {".git", "requirements.lock", "pyproject.toml", *PROJECT["tool"]["setuptools"]["package-dir"].values()}
    assert not needed & set(ignored)
    (entry,) = re.findall(r'^ENTRYPOINT \["(.*)"\]$', text, re.M)
    assert entry in PROJECT["project"]["scripts"]
    build = {re.split("[>=]", name)[0] for name in PROJECT["build-system"]["requires"]}
    locked = {line.split("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert build <= locked, "--no-build-isolation needs them"
    assert f"-f docker/{path.name}" in text, "the first lines say how it is built"
