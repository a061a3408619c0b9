"""The commands of the papers' pages are commands: each composes, and makes the run that its row waits for."""

from __future__ import annotations

import shlex
from fnmatch import fnmatch
from functools import cache
from types import SimpleNamespace

import hydra
import pytest
from hydra.utils import instantiate

from kvbench.analysis.papers.claims import has_settings
from kvbench.analysis.papers.compare import commands
from kvbench.analysis.papers.paper import names, paper
from kvbench.runners.config.loader import packaged_choices


@cache
def compose(*overrides: str):
    with hydra.initialize_config_module("kvbench.conf", version_base="1.3"):
        return hydra.compose("config", list(overrides))


@pytest.mark.parametrize("name", names())
def test_a_row_s_overrides_make_a_run_of_its_label(name):
    seen = set()
    for table in paper(name).tables:
        for row in table.rows:
            words = [word for word in row.run.split() if not word.startswith("method.budget=")]
            if row.label is None or (key := tuple(words)) in seen:
                continue
            seen.add(key)
            method = instantiate(compose("model=scratch", *row.run.split()).method)
            assert method.label == row.label, row
            record = {"identity": {"method": method.identity()}}
            assert has_settings(record, row.settings), (row.settings, record)


def jobs_of(overrides: list[str]) -> list[list[str]]:
    """Overrides of each job: a command that sweeps over campaigns is one job for each that a pattern matches."""
    sweep = next((word for word in overrides if word.startswith("campaign=glob([")), None)
    if sweep is None:
        return [overrides]
    patterns = sweep.removeprefix("campaign=glob([").removesuffix("])").split(",")
    points = [p for p in packaged_choices()["campaign"] if any(fnmatch(p, pattern) for pattern in patterns)]
    assert points, sweep
    return [[f"campaign={point}" if word == sweep else word for word in overrides] for point in points]


@pytest.mark.parametrize("name", names())
def test_every_command_composes(name):
    for line in commands(paper(name), [], "results"):
        words = shlex.split(line)
        if words[:2] == ["kvbench", "run"]:
            for overrides in jobs_of(words[2:]):
                assert SimpleNamespace(**compose(*overrides)).results_dir == "results"
