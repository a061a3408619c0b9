"""A sweep ends with the truth about every job, through every launcher, and run again it does only what is missing.

The launchers are the real ones: processes of joblib and submitit, and Slurm where there is one (or where this file can
start one). Each gets two jobs, of which one has a budget that cannot be.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_model import Done, kvbench, save_local_model, save_rows
from omegaconf import OmegaConf

from kvbench.conf.errors import InputError
from kvbench.runners import cli, sweep
from kvbench.runners.sweep import LOG, SweepLog

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = sorted((ROOT / "conf" / "hydra" / "launcher").glob("*.yaml"))
ONE_NODE_SLURM = ROOT / "scripts" / "one_node_slurm.sh"
WAIT_S = 120  # for one sweep: a submitter can wait for ever for a job that Slurm lost (docs/how-to/sweeps.md)

# The command itself ignores it; pytest sets the filters of warnings anew for each test.
pytestmark = pytest.mark.filterwarnings(r"ignore:\s*'hydra/launcher/\w+' is validated against ConfigStore")
needs_cluster_extra = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("joblib", "submitit", "hydra_plugins")),
    reason="the launchers are not installed: pip install 'kvbench[cluster]'",
)


# the log ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path, monkeypatch) -> SweepLog:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(LOG, "")  # put back at the end, whatever `begin` has set
    return SweepLog.begin("out", "basic", [["seed=0", f"method={name}"] for name in ("full", "snapkv", "a", "b")])


def test_the_end_of_a_sweep_names_what_is_missing_by_what_the_jobs_do_not_share(log):
    for job in range(3):
        log.started(job, ["seed=0", f"method={('full', 'snapkv', 'a')[job]}"])
    log.done(0)
    log.failed(1, "method.budget=0: must be more")
    outcome = log.read()
    assert not outcome.complete
    assert outcome.lines() == [
        "1 of 4 jobs done; 1 failed, 1 killed or still running, 1 never started",
        "  failed: method=snapkv: method.budget=0: must be more",
        "  killed or still running: method=a",
        sweep.REPEAT_HINT,
    ]


def test_what_was_noted_last_counts(log):
    """A job that Slurm queues again at its time limit starts twice, and may fail before it succeeds."""
    for job in range(4):
        log.started(job, [])
    log.failed(0, "stopped")
    log.started(0, [])
    assert log.read().jobs[0].state == "started"
    for job in range(4):
        log.done(job)
    assert log.read().complete
    assert log.read().lines() == ["4 of 4 jobs done"]


def test_a_sweeper_that_makes_up_its_jobs_as_it_goes(tmp_path, monkeypatch):
    monkeypatch.setenv(LOG, "")
    log = SweepLog.begin(tmp_path, "basic", None)
    assert not log.read().any_started
    log.started(0, ["seed=0"])
    log.done(0)
    log.started(1, ["seed=1"])
    assert log.read().lines()[:2] == [
        "1 of 2 jobs done; 1 killed or still running",
        "  killed or still running: seed=1",
    ]


def test_a_line_cut_short_leaves_its_job_unfinished(log):
    log.started(0, ["seed=0", "method=full"])
    log.done(0)
    log.path.write_bytes(log.path.read_bytes()[:-9])
    assert log.read().jobs[0].state == "started"


def test_a_job_finds_the_log_from_any_folder(log, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    SweepLog.of_job().started(2, ["method=a"])
    assert log.path.is_relative_to(tmp_path / "out" / ".sweeps")
    assert log.read().jobs[2].state == "started"
    assert [path.name for path in tmp_path.iterdir() if path.name != "elsewhere"] == ["out"]


def test_a_job_without_the_submitters_environment_is_refused(monkeypatch):
    monkeypatch.delenv(LOG, raising=False)
    assert SweepLog.current() is None
    with pytest.raises(InputError, match="inherit"):
        SweepLog.of_job()


def test_a_log_that_cannot_be_written_is_an_input_error(tmp_path, monkeypatch):
    monkeypatch.setenv(LOG, "")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"results_dir=.*file"):
        SweepLog.begin(tmp_path / "file", "basic", [])


def test_processes_do_not_write_over_one_another(log):
    source = (
        "import sys; from kvbench.runners.sweep import SweepLog\n"
        "for job in range(int(sys.argv[1]), int(sys.argv[1]) + 50): SweepLog.of_job().started(job, ['seed=0'])"
    )
    writers = [subprocess.Popen([sys.executable, "-c", source, str(first)]) for first in (0, 50, 100)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len(log.path.read_text().splitlines()) == 1 + 150
    assert log.read().count("started") == 150


def test_an_exception_becomes_one_line():
    assert sweep.describe(RuntimeError("two\n  lines")) == "RuntimeError: two lines"
    assert sweep.describe(KeyError()) == "KeyError"
    assert len(sweep.describe(ValueError("long " * 1000))) < 350


# what the command makes of it, without a model ----------------------------------------------------------------------


@pytest.fixture
def jobs(tmp_path, monkeypatch) -> list[str]:
    """The names of the methods that were run in place of a real run; the one called no_cache raises."""
    seen: list[str] = []

    def run(config) -> list[Path]:
        seen.append(config.method.name)
        if config.method.name == "no_cache":
            raise RuntimeError("a bug\nin two lines")
        return []

    monkeypatch.setattr(cli, "run", run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(LOG, "")
    return seen


def test_a_bug_in_one_job_is_a_traceback_and_the_others_go_on(jobs, tmp_path):
    done = kvbench("run", "-m", "method=no_cache,full")
    assert jobs == ["no_cache", "full"]
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "1 of 2 jobs done; 1 failed\n  failed: method=no_cache: RuntimeError: a bug in two lines" in done.stderr
    (log,) = (tmp_path / "results" / ".sweeps").glob("*.jsonl")
    assert 'raise RuntimeError("a bug' in json.loads(log.read_text().splitlines()[2])["traceback"]


def test_a_sweep_ends_with_one_table_of_all_its_runs(jobs, tmp_path, monkeypatch):
    """A table for each job would leave the comparison to the reader."""
    source = ROOT / "results" / "reference" / "make_run"
    runs = {path.parts[-3]: path.parent for path in source.rglob("record.json")}
    for path in runs.values():
        shutil.copytree(path, tmp_path / "results" / path.relative_to(source))

    def run(config) -> list[Path]:
        return [tmp_path / "results" / runs[config.method.name].relative_to(source)]

    monkeypatch.setattr(cli, "run", run)
    done = kvbench("run", "-m", "method=full,snapkv")
    assert done.returncode == 0
    table, end = done.stdout.split("next:")
    assert [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")] == [
        "method",
        "full",
        "snapkv 256",
    ]
    (common,) = {path.parents[1].relative_to(source) for path in runs.values()}
    assert end.startswith(f"   kvbench table results/{common}; kvbench plot results/{common}\n")
    assert "2 of 2 jobs done" in end


def test_a_single_run_is_not_a_sweep(jobs, tmp_path):
    with pytest.raises(RuntimeError, match="a bug"):
        kvbench("run", "method=no_cache")
    assert kvbench("run", "method=full") == Done(0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["overrides", "sweeper"])
def test_a_sweep_that_a_yaml_file_asks_for(where, jobs, tmp_path):
    """``hydra.mode: MULTIRUN`` in an experiment is a sweep without -m, its choices there or on the command line."""
    params = "\n  sweeper:\n    params:\n      method: full,no_cache" if where == "sweeper" else ""
    experiment = tmp_path / "conf" / "experiment"
    experiment.mkdir(parents=True)
    (experiment / "two.yaml").write_text(f"# @package _global_\nhydra:\n  mode: MULTIRUN{params}\n")
    choices = ["method=full,no_cache"] if where == "overrides" else []
    done = kvbench("run", "--config-dir", str(tmp_path / "conf"), "experiment=two", *choices)
    assert jobs == ["full", "no_cache"]
    assert done.returncode == 2
    assert "failed: method=no_cache: RuntimeError: a bug" in done.stderr


def test_ctrl_c_says_what_is_left(jobs, monkeypatch):
    def run(config) -> list[Path]:
        if config.method.name == "snapkv":
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr(cli, "run", run)
    done = kvbench("run", "-m", "method=full,snapkv,streaming_llm")
    assert done.returncode == cli.STOPPED
    assert "1 of 3 jobs done; 1 killed or still running, 1 never started" in done.stderr
    assert "  killed or still running: method=snapkv\n" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method=full,snapvk"], "method=snapvk: must be one of"),
        (["method=full,snapkv", "method.buget=1,2"], "did you mean budget"),
        (["method=full,snapkv", "hydra/launcher=submitit_slrum"], "did you mean submitit_slurm"),
        (["method=full,snapkv", "results_dir=/dev/null"], "cannot be written"),
    ],
)
def test_a_sweep_that_cannot_begin_is_one_line_and_leaves_no_log(overrides, said, jobs, tmp_path):
    done = kvbench("run", "-m", *overrides)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not jobs
    assert not list(tmp_path.rglob("*.jsonl"))


@needs_cluster_extra
def test_a_machine_without_slurm(jobs, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = kvbench("run", "-m", "method=full,snapkv", "hydra/launcher=submitit_slurm")
    assert done.returncode == 2
    assert done.stderr.startswith("error: hydra/launcher=submitit_slurm: RuntimeError: Could not detect")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.stem)
def test_a_launcher_that_is_not_installed(launcher, tmp_path):
    """In a process that finds no Hydra plugins."""
    source = (
        "import sys; sys.modules['hydra_plugins'] = None\n"
        "from kvbench.runners.cli import main\n"
        f"main(['-m', 'method=full,snapkv', 'hydra/launcher={launcher.stem}'])"
    )
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    expected = f"error: hydra/launcher={launcher.stem}: needs the cluster extra: pip install 'kvbench[cluster]'\n"
    assert done.stderr == expected
    assert not list(tmp_path.iterdir())


@needs_cluster_extra
@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.stem)
def test_our_launchers_have_every_key_of_the_plugins(launcher):
    """Ours stand in place of the plugins' own, so a key that is missing here could not be set."""
    from hydra_plugins.hydra_joblib_launcher.config import JobLibLauncherConf
    from hydra_plugins.hydra_submitit_launcher.config import LocalQueueConf, SlurmQueueConf

    plugins = {"joblib": JobLibLauncherConf, "submitit_local": LocalQueueConf, "submitit_slurm": SlurmQueueConf}
    ours, theirs = OmegaConf.load(launcher), OmegaConf.structured(plugins[launcher.stem])
    assert set(ours) == set(theirs)
    assert ours["_target_"] == theirs["_target_"]
    OmegaConf.merge(theirs, ours)  # of the same types


# the real thing -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_local_model(folder / "model")
    save_rows(folder / "data", "qasper", 2)
    return folder


def two_jobs(world: Path) -> list[str]:
    """The second cannot be: a budget of 0. ``results_dir`` is relative, and the same folder for all."""
    return [
        "-m",
        "model=local",
        f"model.path={world}/model",
        "model.max_prompt_tokens=700",
        f"task.data_dir={world}/data",
        "method=snapkv",
        "method.budget=40,0",
        "results_dir=out",
    ]


def sweep_in(folder: Path, *args: str) -> Done:
    """``python run.py ARGS`` in a process of its own, as the launchers start theirs from it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "run.py"), *args]
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that what it started can be stopped with it
    ) as process:
        try:
            out, errors = process.communicate(timeout=WAIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, errors = process.communicate()
            pytest.fail(f"no end after {WAIT_S} s\n{out}\n{errors}")
    return Done(process.returncode, out, errors)


def assert_one_done_one_failed(done: Done, folder: Path) -> None:
    assert done.returncode == 2, done.stderr
    assert "1 of 2 jobs done; 1 failed\n  failed: method.budget=0: method.budget=0: must be" in done.stderr
    assert sorted(path.parts[-3] for path in folder.rglob("record.json")) == ["full", "snapkv"]
    assert all(path.is_relative_to(folder / "out") for path in folder.rglob("record.json"))


def assert_again_does_nothing_twice(world: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same jobs once more; in this process, which has torch already: they find what the launcher's have left."""
    monkeypatch.setenv(LOG, "")
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("longbench*/**/*.json*")}
    assert any(path.name == "record.json" for path in before)
    monkeypatch.chdir(folder)
    done = kvbench("run", *two_jobs(world))
    assert_one_done_one_failed(done, folder)
    for name in ("snapkv 40", "full"):
        assert f"{name}: already done" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert len(list((folder / "out" / ".sweeps").iterdir())) == 2


def test_one_after_another(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(LOG, "")
    done = kvbench("run", *two_jobs(world))
    assert_one_done_one_failed(done, tmp_path)
    assert "error: method.budget=0: must be" in done.stderr
    assert_again_does_nothing_twice(world, tmp_path, monkeypatch)


@pytest.mark.slow
@needs_cluster_extra
def test_joblib(world, tmp_path, monkeypatch):
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    assert_one_done_one_failed(sweep_in(tmp_path, *two_jobs(world), *launcher), tmp_path)
    assert_again_does_nothing_twice(world, tmp_path, monkeypatch)


@pytest.mark.slow
@needs_cluster_extra
def test_submitit_on_this_machine(world, tmp_path, monkeypatch):
    """What a job prints goes to a file of its own, and why it failed to the terminal."""
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=2"]
    assert_one_done_one_failed(sweep_in(tmp_path, *two_jobs(world), *launcher), tmp_path)
    printed = "".join(path.read_text() for path in (tmp_path / "multirun" / ".submitit").rglob("*_log.err"))
    assert "error: method.budget=0: must be" in printed
    assert_again_does_nothing_twice(world, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def slurm_partition() -> Iterator[str]:
    """The partition of a Slurm whose only node is this machine; started here, and ended, where that is possible."""

    def ask(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
        except (OSError, subprocess.TimeoutExpired):
            return ""

    started = False
    if not ask("sinfo", "--noheader"):
        if os.geteuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sinfo"))):
            pytest.skip("there is no Slurm here; as root, scripts/one_node_slurm.sh --install starts one for this test")
        start = subprocess.run([str(ONE_NODE_SLURM)], capture_output=True, text=True, timeout=90)
        if start.returncode == 2:
            pytest.skip(f"Slurm could not be started: {start.stderr.strip()}")
        assert start.returncode == 0, start.stderr
        started = True
    try:
        if ask("sinfo", "--noheader", "--format", "%n").split() != [socket.gethostname().split(".")[0]]:
            pytest.skip("this Slurm has other nodes, which may not see the test's folder; run this where it has one")
        yield ask("sinfo", "--noheader", "--format", "%R").split()[0]
    finally:
        if started:
            subprocess.run([str(ONE_NODE_SLURM), "stop"], capture_output=True, timeout=90, check=True)


@pytest.mark.slurm
@needs_cluster_extra
def test_slurm(slurm_partition, world, tmp_path, monkeypatch):
    name = f"kvbench-test-{os.getpid()}"
    launcher = [
        "hydra/launcher=submitit_slurm",
        f"hydra.launcher.partition={slurm_partition}",
        "hydra.launcher.cpus_per_task=1",
        "hydra.launcher.mem_gb=1",
        "hydra.launcher.timeout_min=5",
        f"hydra.launcher.name={name}",
    ]
    try:
        assert_one_done_one_failed(sweep_in(tmp_path, *two_jobs(world), *launcher), tmp_path)
    finally:
        subprocess.run(["scancel", f"--name={name}"], timeout=10)
    assert_again_does_nothing_twice(world, tmp_path, monkeypatch)


def test_the_slurm_script_says_what_it_takes():
    done = subprocess.run([str(ONE_NODE_SLURM), "strat"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "takes nothing, --install or stop" in done.stderr


def test_a_lost_log_is_not_taken_for_success(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(LOG, str(tmp_path / "gone.jsonl"))
    assert sweep.end_of_sweep(0) == 2
    assert "log is lost" in capsys.readouterr().err
