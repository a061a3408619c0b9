"""The mirror of a run: what it is sent, and that no failure of it can cost a run. No test uses the network."""

import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

from kvbench.conf.errors import InputError
from kvbench.runners.records.loggers import Logger, NoLogger, WandbLogger, numbers
from kvbench.runners.terminal import terminal_logging

wandb = pytest.importorskip("wandb", reason="needs the package wandb: pip install 'kvbench[wandb]'")

ROOT = Path(__file__).parents[2]
KEY = "a" * 40

ACCURACY: dict[str, Any] = {
    "schema": 1,
    "status": "done",
    "kind": "accuracy",
    "hash": "a33740052db0",
    "identity": {"method": {"name": "snapkv"}, "seed": 0},
    "config": {"batch_size": 1, "method": {"budget": 256}},
    "task": "longbench-mini",
    "model": "smollm2-135m",
    "method": "snapkv",
    "method_label": "snapkv 256",
    "budget": 256,
    "data": {"name": "longbench-mini", "examples": {"trec": 8}},
    "scores": {"trec": {"mean": 87.5, "low": 62.5, "high": 100.0, "n": 8}},
    "average": {"mean": 41.75, "low": 35.2, "high": 47.9, "n": 60},
    "bytes": {"kv_bytes_stored": 97540608.0, "kv_ratio": 1.0},
    "rode_with": ["full"],
    "finished": "2026-11-22T05:13:50Z",
    "sessions": [{"after_examples": 0}],
    "wall_s": 422.2,
    "provenance": {"hardware": {"cpu_count": 2}},
    "paired": {"with": "full", "difference": {"mean": -15.0, "low": -21.0, "high": -8.0, "n": 60}},
}
EFFICIENCY: dict[str, Any] = {
    "kind": "efficiency",
    "hash": "0123456789ab",
    "metrics": {
        "ttft_ms": {"median": 12.5, "min": 12.0, "max": 14.0, "repetitions": [12.0, 12.5, 14.0]},
        "mbu": {"median": float("nan")},
    },
    "memory": {"peak_decode": 1000, "reset": True},
    "bytes": {"kv_bytes_stored": 10, "by_layer": [5, 5]},
}
SAMPLES = [
    {"dataset": "trec", "id": "1", "prediction": "Food", "score": 1.0},
    {"dataset": "trec", "id": "2", "prediction": None, "score": 0, "stopped": "eos"},
]


def folder_of(results: Path, record: dict[str, Any] = ACCURACY) -> Path:
    folder = results / record["task"] / record["model"] / record["method"] / record["hash"]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No key, no settings and no current directory of whoever runs the tests; messages on the streams, as in a run."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with terminal_logging():
        yield
    wandb.teardown()  # it keeps the settings that it found first


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_record() -> None:
    assert numbers(ACCURACY) == {
        "budget": 256,
        "scores/trec/mean": 87.5,
        "scores/trec/low": 62.5,
        "scores/trec/high": 100.0,
        "scores/trec/n": 8,
        "average/mean": 41.75,
        "average/low": 35.2,
        "average/high": 47.9,
        "average/n": 60,
        "bytes/kv_bytes_stored": 97540608.0,
        "bytes/kv_ratio": 1.0,
        "wall_s": 422.2,
        "paired/difference/mean": -15.0,
        "paired/difference/low": -21.0,
        "paired/difference/high": -8.0,
        "paired/difference/n": 60,
    }
    assert numbers(EFFICIENCY) == {"metrics/ttft_ms": 12.5, "memory/peak_decode": 1000, "bytes/kv_bytes_stored": 10}


def test_every_reference_record_gives_numbers() -> None:
    records = sorted((ROOT / "results" / "reference").rglob("record.json"))
    assert records
    for path in records:
        record = json.loads(path.read_text("utf-8"))
        headlines = {"accuracy": "average/mean", "efficiency": "metrics/tpot_ms", "train": "validation/loss"}
        headline = headlines[record["kind"]]
        value = numbers(record)[headline]
        assert value > 0 or (value == 0 and record["kind"] == "accuracy"), path  # a method may find no needle at all
        held = "kv_bytes_per_token" if record["kind"] == "train" else "kv_bytes_stored"
        assert numbers(record)[f"bytes/{held}"] >= 0, path


class FakeRun:
    def __init__(self, world: "FakeWandb", settings: dict[str, Any]):
        self.world, self.settings = world, settings
        self.summary: dict[str, Any] = {}
        self.logged: dict[str, Any] = {}
        self.steps: list[int | None] = []
        self.finished = False

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.update(values)
        self.steps.append(step)

    def __enter__(self) -> "FakeRun":
        return self

    def __exit__(self, *_: object) -> None:
        self.finished = True
        if self.world.finish_fails and self.settings["mode"] == "online":
            raise TimeoutError("upload\ntook too long")


class FakeWandb:
    """wandb at its edge: ``init`` and what it returns; key and server as the test wants them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.runs: list[FakeRun] = []
        self.tried: list[str] = []
        self.server_says: Exception | None = None
        self.disk_says: Exception | None = None
        self.finish_fails = False
        monkeypatch.setattr(wandb, "init", self.init)

    def init(self, **settings: Any) -> FakeRun:
        self.tried.append(settings["mode"])
        problem = self.server_says if settings["mode"] == "online" else self.disk_says
        if problem:
            raise problem
        self.runs.append(FakeRun(self, settings))
        return self.runs[-1]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    return FakeWandb(monkeypatch)


def test_a_run_is_its_hash_and_its_record(
    fake: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    logger = WandbLogger(entity="team")
    before = dict(os.environ)
    logger.log(ACCURACY, SAMPLES, folder_of(tmp_path / "results"))
    (run,) = fake.runs
    given = run.settings
    assert (given["id"], given["resume"], given["mode"]) == ("a33740052db0", "allow", "online")
    assert (given["project"], given["entity"]) == ("kvbench", "team")
    assert (given["group"], given["name"]) == ("longbench-mini/smollm2-135m", "snapkv 256 a33740052db0")
    assert given["config"]["identity"] == ACCURACY["identity"]
    assert given["config"]["config"] == ACCURACY["config"]
    assert given["dir"] == str(tmp_path / "results" / ".wandb")
    assert given["settings"].init_timeout <= 30
    assert given["settings"].x_disable_meta and given["settings"].disable_git, "no paths and no command line are sent"
    assert run.summary == numbers(ACCURACY)
    assert run.logged == {}, "predictions are sent only when asked for"
    assert run.finished
    assert capsys.readouterr() == ("", "")
    assert {**os.environ, "WANDB_SERVICE": ""} == {**before, "WANDB_SERVICE": ""}, "but for the variable wandb sets"


def test_samples_become_a_table_when_asked_for(fake: FakeWandb, tmp_path: Path) -> None:
    WandbLogger(samples=True, mode="offline").log(ACCURACY, SAMPLES, folder_of(tmp_path))
    table = fake.runs[0].logged["samples"]
    assert table.columns == ["dataset", "id", "prediction", "score", "stopped"]
    assert table.data == [["trec", "1", "Food", 1.0, None], ["trec", "2", None, 0, "eos"]]
    WandbLogger(samples=True, mode="offline").log(ACCURACY, [], folder_of(tmp_path))
    assert fake.runs[1].logged == {}


def test_a_trainings_curve_goes_step_by_step(fake: FakeWandb, tmp_path: Path) -> None:
    curve = [{"step": 5, "loss": 3.0, "lr": 0.1}, {"step": 10, "loss": 2.0, "lr": 0.2}]
    record = {**ACCURACY, "kind": "train", "curve": curve, "validations": [{"step": 10, "loss": 2.5}]}
    WandbLogger(mode="offline").log(record, [], folder_of(tmp_path))
    (run,) = fake.runs
    assert run.steps == [5, 10]
    assert run.logged == {"train/loss": 2.0, "train/lr": 0.2, "validation/loss": 2.5}


def test_the_group_is_the_users_if_there_is_one(fake: FakeWandb, tmp_path: Path) -> None:
    WandbLogger(group="table 1", mode="offline").log(ACCURACY, [], folder_of(tmp_path))
    assert fake.runs[0].settings["group"] == "table 1"


# --- online or offline ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "key", "variable", "expected"),
    [
        ("auto", None, None, "offline"),
        ("auto", "environment", None, "online"),
        ("auto", "netrc", None, "online"),
        ("auto", "environment", "offline", "offline"),
        ("auto", "environment", "dryrun", "offline"),
        ("auto", "environment", "disabled", None),
        ("auto", None, "online", "offline"),
        ("online", "environment", "offline", "online"),
        ("online", None, None, "offline"),
        ("offline", "environment", None, "offline"),
        ("offline", None, "online", "offline"),
    ],
)
def test_online_needs_a_key_and_nobody_against_it(
    fake: FakeWandb,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mode: str,
    key: str | None,
    variable: str | None,
    expected: str | None,
) -> None:
    """wandb on its own asks for a key at the terminal: an unattended run would wait there for ever."""
    if key == "environment":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    elif key == "netrc":
        (tmp_path / "home" / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    WandbLogger(mode=mode).log(ACCURACY, [], folder_of(tmp_path))
    assert fake.tried == ([expected] if expected else [])
    said = capsys.readouterr().err
    assert said.count("\n") == (expected == "offline")
    if expected == "offline":
        assert f"wandb sync {tmp_path}/.wandb/wandb/offline-run-*" in said
        by_choice = mode == "offline" or (mode == "auto" and variable in ("offline", "dryrun"))
        assert said.startswith("wandb: mode is offline" if by_choice else "wandb: no API key")


@pytest.mark.parametrize(
    "problem",
    [
        ConnectionError("dial tcp: lookup api.wandb.ai: no such host\nwhile retrying"),
        TimeoutError("context deadline exceeded"),
        ValueError("401: the API key is not valid"),
    ],
)
def test_a_server_that_is_not_there_is_asked_once(
    fake: FakeWandb,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    problem: Exception,
) -> None:
    """Twenty seconds for each run of a sweep would add up."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    fake.server_says = problem
    logger = WandbLogger()
    logger.log(ACCURACY, [], folder_of(tmp_path))
    logger.log(ACCURACY, [], folder_of(tmp_path))
    assert fake.tried == ["online", "offline", "offline"]
    assert [run.summary for run in fake.runs] == [numbers(ACCURACY)] * 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"wandb: {type(problem).__name__}: {str(problem).splitlines()[0]}; runs are kept offline")


def test_a_key_of_a_wrong_form(
    fake: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    WandbLogger().log(ACCURACY, [], folder_of(tmp_path))
    assert fake.tried == ["offline"]
    said = capsys.readouterr().err
    assert said.startswith("wandb: AuthenticationError: WANDB_API_KEY invalid") and said.count("\n") == 1


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_missing_package_is_known_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError) as error:
        WandbLogger()
    text = str(error.value)
    assert text.startswith("logger=wandb: the package wandb cannot be used (")
    assert text.endswith("pip install 'kvbench[wandb]'") and "\n" not in text


def test_a_folder_called_wandb_is_not_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb leaves one in every directory it was used in, and Python imports a folder as a namespace package."""
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    with pytest.raises(InputError, match=r"pip install 'kvbench\[wandb\]'"):
        WandbLogger()


def test_whatever_happens_is_one_line(
    fake: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An hour of measuring must not end in the traceback of a mirror."""
    folder = folder_of(tmp_path)

    def said() -> str:
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    fake.disk_says = OSError(28, "No space left on device")
    WandbLogger(mode="offline").log(ACCURACY, [], folder)
    reason = "OSError: [Errno 28] No space left on device"
    assert said() == f"wandb: run a33740052db0 is not mirrored: {reason}; its record is in {folder}\n"

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    fake.finish_fails = True
    WandbLogger().log(ACCURACY, [], folder)
    assert "is not mirrored: TimeoutError: upload; its record is in" in said()

    WandbLogger().log({"hash": "x"}, [], folder)
    assert "run x is not mirrored: KeyError: 'task'" in said()

    (tmp_path / "file").write_text("")
    WandbLogger().log(ACCURACY, [], tmp_path / "file" / "/".join(folder.parts[-4:]))
    assert "is not mirrored: NotADirectoryError" in said()


def test_an_interrupted_run_stays_interrupted(fake: FakeWandb, tmp_path: Path) -> None:
    fake.disk_says = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        WandbLogger(mode="offline").log(ACCURACY, [], folder_of(tmp_path))


# --- the YAML and the real package ------------------------------------------------------------------------------------


def test_the_yaml_has_the_keys_and_defaults_of_the_class(tmp_path: Path) -> None:
    files = {path.stem: OmegaConf.load(path) for path in (ROOT / "conf" / "logger").glob("*.yaml")}
    assert set(files) == {"none", "wandb"}
    none, mirror = (hydra.utils.instantiate(files[name]) for name in ("none", "wandb"))
    assert isinstance(none, NoLogger) and isinstance(none, Logger)
    none.log(ACCURACY, SAMPLES, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    assert mirror == WandbLogger()
    assert list(files["wandb"]) == ["_target_", *WandbLogger.__dataclass_fields__]


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"mode": "ofline"}, "logger.mode=ofline: must be one of auto, offline, online; did you mean offline"),
        ({"project": ""}, "logger.project=: must be text that is not blank"),
        ({"samples": "yes"}, "logger.samples=yes: must be true or false"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(keys: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError) as error:
        WandbLogger(**keys)
    assert str(error.value).startswith(text)


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_real_wandb_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Quiet, and all of its files below the results: a `wandb` folder appears in nobody's current directory."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    results = tmp_path / "results"
    logger = WandbLogger(samples=True)
    logger.log(ACCURACY, SAMPLES, folder_of(results))
    efficiency = ACCURACY | EFFICIENCY
    logger.log(efficiency, [], folder_of(results, efficiency))
    out, err = capfd.readouterr()
    place = results / ".wandb" / "wandb"
    assert out == ""
    assert err == f"wandb: mode is offline; runs are kept offline, send them with: wandb sync {place}/offline-run-*\n"
    runs = sorted(place.glob("offline-run-*/run-*.wandb"))
    assert {path.name for path in runs} == {"run-a33740052db0.wandb", "run-0123456789ab.wandb"}
    assert b"kv_bytes_stored" in b"".join(path.read_bytes() for path in runs)
    assert any("samples" in path.name for path in files_below(place)), "the table"
    assert files_below(tmp_path / "here") == []
    assert not any(ROOT.as_posix().encode() in path.read_bytes() for path in runs), "no path of this machine"


def test_the_real_wandb_without_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A well-formed key and a port of this machine that nobody listens on."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("kvbench.runners.records.loggers.INIT_TIMEOUT_S", 1.0)
    WandbLogger().log(ACCURACY, [], folder_of(tmp_path))
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and "; runs are kept offline, send them with: wandb sync" in err
    assert len(list(tmp_path.glob(".wandb/wandb/offline-run-*/run-a33740052db0.wandb"))) == 1
