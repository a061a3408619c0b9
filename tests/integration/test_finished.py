"""A command that is done is skipped before torch is imported, and only then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from local_model import kvbench, save_local_model, save_rows

from kvbench.runners.finished import ACCURACY, NO_LOGGER, FinishedCommand

RERUN = """
import sys
from kvbench.runners.cli import main
try:
    main(sys.argv[1:])
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """(folder, command, what its end said) of a finished command."""
    folder = tmp_path_factory.mktemp("done")
    save_local_model(folder / "model")
    save_rows(folder / "data", "qasper", 2)
    command = ["model=local", "model.path=model", "model.max_prompt_tokens=700", "task.data_dir=data"]
    command += ["method=snapkv", "method.budget=40", "results_dir=out"]
    before = Path.cwd()
    os.chdir(folder)
    try:
        ended = kvbench("run", *command)
    finally:
        os.chdir(before)
    assert ended.returncode == 0, ended.stderr
    return folder, command, ended.stdout[ended.stdout.index("**longbench") :]


def again(done: tuple[Path, list[str], str], *further: str) -> subprocess.CompletedProcess[str]:
    folder, command, _ = done
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
    environment.pop("KVBENCH_SWEEP_LOG", None)
    return subprocess.run(
        [sys.executable, "-c", RERUN, *command, *further], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_a_finished_command_says_the_same_again_without_torch(done):
    ended = again(done)
    assert (ended.returncode, ended.stderr) == (0, "False\n")
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("snapkv 40: already done, in out/longbench-subset/model/snapkv/")
    assert ended.stdout.endswith(done[2])


def plain(folder: Path) -> dict:
    """A configuration that can be kept, with files in ``folder``."""
    (folder / "data.jsonl").write_text("{}\n")
    return {
        "results_dir": str(folder / "out"),
        "runner": {"_target_": ACCURACY},
        "logger": {"_target_": NO_LOGGER},
        "model": {"_target_": "kvbench.models.hub.HubModel", "revision": "a" * 40},
        "task": {"_target_": "kvbench.tasks.jsonl.JsonlTask", "path": str(folder / "data.jsonl")},
    }


@pytest.fixture
def kept(tmp_path: Path) -> tuple[dict, Path]:
    """(configuration, run folder) of a command that is kept."""
    config, run = plain(tmp_path), tmp_path / "out" / "task" / "run"
    run.mkdir(parents=True)
    for name in ("record.json", "samples.jsonl"):
        (run / name).write_text("{}\n")
    FinishedCommand.of(config).write([run], "the end")
    assert FinishedCommand.of(config).read() == ([run], "the end")
    return config, run


@pytest.mark.parametrize(
    "change",
    [
        lambda config, run: (run / "samples.jsonl").write_text(""),
        lambda config, run: (run / "record.json").unlink(),
        lambda config, run: Path(config["task"]["path"]).write_text("{} \n"),
        lambda config, run: config["task"].update(limit=3),
        lambda config, run: next(run.parents[1].glob(".finished/*")).write_text("{"),
        lambda config, run: next(run.parents[1].glob(".finished/*")).write_text(json.dumps({"runs": 5, "text": ""})),
    ],
    ids=["rows", "record", "data", "option", "torn", "damaged"],
)
def test_whatever_has_changed_makes_it_run(kept, change):
    config, run = kept
    change(config, run)
    assert FinishedCommand.of(config).read() is None


def test_another_environment_or_default_model_makes_it_run(kept, monkeypatch, tmp_path):
    config, _ = kept
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "1")
        assert FinishedCommand.of(config).read() is None
    model = tmp_path / "cache" / "models" / "smollm2-135m"
    model.mkdir(parents=True)
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "cache"))
    before = FinishedCommand.of(config).path
    (model / "kvbench_source.json").write_text("{}")
    assert FinishedCommand.of(config).path != before


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [
        ("runner", "_target_", "kvbench.runners.efficiency.EfficiencyRunner"),
        ("logger", "_target_", "kvbench.runners.records.loggers.WandbLogger"),
        ("task", "_target_", "my_task.Mine"),
        ("model", "revision", "main"),
        ("task", "source", "auto"),
    ],
)
def test_what_depends_on_more_than_files_is_not_kept(tmp_path, group, key, value):
    """The commit, a mirror, code of one's own, a branch that moves, a hub that may be reached the next time."""
    config = plain(tmp_path)
    config[group][key] = value
    assert FinishedCommand.of(config).path is None
    FinishedCommand.of(config).write([tmp_path], "the end")
    assert FinishedCommand.of(config).read() is None
