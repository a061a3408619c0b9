"""What a user who mistypes sees: one line with the key, the value and what is allowed; status 2; nothing written."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import Mock

import pytest
from local_model import kvbench, save_local_model, save_rows
from processes import start

from kvbench.runners.command import main
from kvbench.runners.config.arguments import split_arguments
from kvbench.runners.terminal import lasting_streams

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_local_model(folder / "model")
    torn = save_local_model(folder / "torn-model") / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:5000])
    save_rows(folder / "data", "qasper", 2)
    save_rows(folder / "torn", "qasper", 2)
    with (folder / "torn" / "qasper.jsonl").open("a") as file:
        file.write('{"input": "cut of')
    return folder


BAD_INPUT = [
    # overrides, what the one line must say
    (["method=snapvk"], ["method=snapvk", "did you mean snapkv"]),
    (["model=smolm2-135m"], ["model=smolm2-135m", "did you mean smollm2-135m"]),
    (["task=longbnch"], ["task=longbnch", "longbench"]),
    (["experiment=pareto_quik"], ["experiment=pareto_quik", "did you mean pareto_quick"]),
    (["hydra/launcher=joblib"], ["hydra/launcher=joblib", "add -m"]),
    (["logger=wandbb"], ["logger=wandbb", "did you mean wandb"]),
    (["runner=acuracy"], ["runner=acuracy", "did you mean accuracy"]),
    (["method/storage=dence"], ["method/storage=dence", "did you mean dense"]),
    (["task.datasets=[qaspr]"], ["task.datasets=qaspr", "did you mean qasper"]),
    (["method.buget=5"], ["method.buget", "did you mean budget"]),
    (["sed=5"], ["sed", "did you mean seed"]),
    (["method.budget=0"], ["method.budget=0", ">= 1"]),
    (["method.budget=-4"], ["method.budget=-4"]),
    (["method.budget=1.5"], ["method.budget=1.5", "(0, 1]"]),
    (["method.budget=16"], ["method.recent=32", "method.budget=16"]),
    (["method.selection.window=8"], ["method.selection.window", "is method.scorer.window", "or method.recent now"]),
    (["method=h2o", "method.selection.prefill_only=true"], ["is method/schedule=after_prefill (h2o, tova)"]),
    (["method=pyramid_infer", "method.selection.strategy=linear"], ["is method.policy.strategy now"]),
    (["method=snapkv", "method/allocator=adaptive", "method.selection.floor=0.5"], ["is method.allocator.floor now"]),
    (["method=tova", "method/allocator=adaptive"], ["method/allocator=adaptive", "scores all heads alike"]),
    (
        ["method=snapkv", "method/schedule=every_step", "method/storage=kivi4"],
        ["method/storage=kivi4", "while decoding"],
    ),
    (["method=snapkv", "method/schedule=every_n", "method.schedule.n=0"], ["method.schedule.n=0", "whole number >= 1"]),
    (
        ["method=snapkv", "method/schedule=every_n", "method.schedule.n=4", "method.recent=8"],
        ["method.recent=8", "at least 28"],
    ),
    (["method.scorer.kernel=6"], ["method.scorer.kernel=6", "odd"]),
    (["runner.budgets=[64,0]"], ["runner.budgets=0", ">= 1"]),
    (["runner.pair_with=[fulll]"], ["method=fulll", "full"]),
    (["runner.pair_with=fulll"], ["method=fulll", "full"]),
    (["runner.pair_with=[streaming_llm budget=256]"], ["runner.pair_with=[streaming_llm budget=256]", "quotes"]),
    (["runner.pair_with=null"], ["runner.pair_with=null", "[]"]),
    (["runner.budgets=[]"], ["runner.budgets=[]"]),
    (["runner.budgets=0"], ["runner.budgets=0", ">= 1"]),
    (["runner.temperature=hot"], ["runner.temperature=hot", "number"]),
    (["device=null"], ["device=null", "cuda"]),
    (["device=cuda:9"], ["device=cuda:9", "CUDA devices"]),
    (["results_dir={world}/model/config.json"], ["results_dir=", "cannot be written"]),
    (["model=local"], ["model.path", "must be given"]),
    (["model=local", "model.path={world}/torn-model"], ["model=", "torn-model", "cannot be loaded"]),
    (["runner.chunk_size=0"], ["runner.chunk_size=0"]),
    (["task.limit=0"], ["task.limit=0"]),
    (["batch_size=0"], ["batch_size=0"]),
    (["dtype=int8"], ["dtype=int8", "bfloat16"]),
    (["device=tpu"], ["device=tpu", "cuda"]),
    (["seed=-1"], ["seed=-1"]),
    (["model=random"], ["model=random-tiny", "runner=efficiency"]),
    (["task.data_dir=/no/such/folder"], ["task.data_dir=/no/such/folder"]),
    (["task.data_dir={world}/model"], ["task.data_dir=", "qasper"]),
    (["task.data_dir={world}/torn"], ["qasper.jsonl:3", "JSON"]),
    (["model=local", "model.path={world}/nowhere"], ["model.path", "nowhere"]),
    (["task.truncate=none", "task.max_length=20"], ["task.truncate=none", "20"]),
    (["model.max_prompt_tokens=1020"], ["task.max_length", "positions"]),
    # groups
    (["method=null"], ["method=null", "one of", "snapkv"]),
    (["method=5"], ["method=5", "one of", "snapkv"]),
    (["method={{a:1}}"], ["method={a:1}", "one of", "snapkv"]),
    (["task="], ["task=", "one of", "longbench"]),
    (["logger=null"], ["logger=null", "one of none, wandb"]),
    (["method.storage=kivi4"], ["method.storage=kivi4", "use method/storage=kivi4"]),
    (["method.storage=kvi4"], ["use method/storage=NAME", "did you mean kivi4"]),
    (["method.scorer=h2o"], ["method.scorer=h2o", "method/scorer="]),
    (["method.scorer=null"], ["method.scorer=null", "method/scorer="]),
    (["--config-name=foo"], ["--config-name=foo", "must be config"]),
    (["~method"], ["method=(nothing)", "leave ~method out"]),
    (["~seed"], ["seed=(nothing)", "leave ~seed out"]),
    (["~method", "runner.budgets=[64]"], ["method=(nothing)", "must be given"]),
    (["~method.name"], ["method.name=(nothing)", "must be given"]),
    (["~method.scorer"], ["method.scorer=(nothing)", "must be given"]),
    (["method/scorer@foo=snapkv"], ["method/scorer@foo", "did you mean to override method/scorer?"]),
    (["=5"], ["=5: must be KEY=VALUE"]),
    # options
    (["--method", "snapkv"], ["--method", "is no option", "KEY=VALUE"]),
    (["--limit=5"], ["--limit=5", "is no option", "KEY=VALUE"]),
    (["-x"], ["-x", "is no option"]),
    (["--cfg", "foo"], ["--cfg/-c: invalid choice: 'foo'", "job"]),
    (["--resolve"], ["--resolve", "--cfg"]),
    (["--shell-completion"], ["install", "query"]),
    (["--config-path=x"], ["--config-path", "--config-dir"]),
    (["--cfg", "job", "method=snapvk"], ["method=snapvk", "did you mean snapkv"]),
    (["seed=1", "-m", "method=snapvk"], ["method=snapvk", "did you mean snapkv"]),
    # keys that are not there
    (["+foo=1"], ["foo=1", "the configuration has no key foo", "seed"]),
    (["+method.foo=1"], ["method.foo=1", "method has no key foo", "budget"]),
    (["++task.foo=1"], ["task.foo=1", "task has no key foo", "limit"]),
    (["+method.scorer.wndow=8"], ["method.scorer has no key wndow", "did you mean window"]),
    (["+method._partial_=true"], ["method._partial_=true", "no key"]),
    (["method.window=8"], ["method has no key window", "did you mean method.scorer.window?"]),
    (["task=perplexity", "task.limit=5"], ["task has no key limit", "set by task.stretches here"]),
    (["task=perplexity", "+task.limit=5"], ["task has no key limit", "set by task.stretches here"]),
    (["task=recall", "task.limit=5"], ["task has no key limit", "set by task.sequences here"]),
    (["task=needle", "task.limit=5"], ["task has no key limit", "set by task.depths here"]),
    (["task.stretches=5"], ["task has no key stretches", "set by task.limit here"]),
    # lists
    (["method.budget=64,128"], ["method.budget=64,128", "'runner.budgets=[64,128]'", "-m"]),
    (["task.datasets=trec,qasper"], ["task.datasets=trec,qasper", "'task.datasets=[trec,qasper]'", "-m"]),
    (["runner.budgets=64,128"], ["'runner.budgets=[64,128]'", "-m"]),
    (["runner.pair_with=full,h2o"], ["'runner.pair_with=[full,h2o]'", "-m"]),
    (["method=lagkv,key_norm"], ["method=lagkv,key_norm", "add -m"]),
    (["seed=range(1,3)"], ["seed=range(1,3)", "add -m"]),
    (["task.datasets=5"], ["task.datasets=5", "a list, each one of", "or null"]),
    (["runner.budgets=abc"], ["runner.budgets=abc", "a list, each a number", "or null"]),
    (["runner.budgets=[64,true]"], ["runner.budgets=[64,true]", "a number"]),
    (["runner.pair_with={{a:b}}"], ["runner.pair_with={a:b}", "must name a method"]),
    (["runner.pair_with=[{{method:snapkv,budgets:128}}]"], ["{method:snapkv,budgets:128}", "budgets must be a list"]),
    (["runner.pair_with=[{{method:snapkv,budget:1,budgets:[2]}}]"], ["has both budget and budgets"]),
    (["runner.pair_with=[{{method:snapkv,windw:8}}]"], ["{method:snapkv,windw:8}", "method has no key windw"]),
    (["runner.pair_with=[{{method:fulll}}]"], ["{method:fulll}", "method=fulll", "full"]),
    (["runner.pair_with=[full,5]"], ["runner.pair_with=[full,5]", "text"]),
    (["runner.pair_with=[null]"], ["runner.pair_with=[null]", "text"]),
    (["runner.pair_with=['']"], ["runner.pair_with=''", "name a method"]),
    (["runner.pair_with=true"], ["runner.pair_with=true", "text"]),
    (["runner.pair_with=['full foo=1']"], ["runner.pair_with=full foo=1", "method has no key foo"]),
    (["runner.pair_with=['snapkv window=8']"], ["pair_with=snapkv window=8", "did you mean method.scorer.window"]),
    (["runner.pair_with=['5 budget=1']"], ["method=5", "one of"]),
    (["runner.pair_with=[snapkv]", "runner.budgets=[64,16]"], ["runner.budgets=16", "at least 32", "method.recent=32"]),
    (["++hydra.sweeper.params.seed={{a:1}}", "-m"], ["hydra.sweeper.params.seed={a:1}", "Cannot convert"]),
    (["++hydra.sweeper.params.seed='1,(2'", "-m"], ["seed=1,(2", "cannot be read"]),
    # types
    (["runner.temperature=inf"], ["runner.temperature=inf", "a number"]),
    (["runner.temperature=true"], ["runner.temperature=true", "a number"]),
    (["runner.chunk_size=true"], ["runner.chunk_size=true", "a whole number >= 1, or null"]),
    (["seed=true"], ["seed=true", "whole number"]),
    (["batch_size=true"], ["batch_size=true", "whole number"]),
    (["batch_size=1.5"], ["batch_size=1.5", "whole number"]),
    (["method.budget=99999999999999999999"], ["method.budget=99999999999999999999", "too large"]),
    (["method.budget=${{oops}}"], ["method.budget", "'oops' not found"]),
    (["method.budget=${{oc.env:NO_SUCH}}"], ["method.budget", "'NO_SUCH' not found"]),
    (["hydra.run.dir=null"], ["hydra.run.dir=null", "not Optional"]),
    (["results_dir=null"], ["results_dir=null", "text"]),
    (["results_dir=2026"], ["results_dir=2026", "write 'results_dir=\"2026\"'"]),
    (["results_dir=[a]"], ["results_dir=[a]", "text"]),
    (["results_dir={{a:1}}"], ["results_dir={a:1}", "text"]),
    (["results_dir=true"], ["results_dir=true", "text"]),
    (["results_dir="], ["results_dir=", "folder"]),
    (["results_dir=5", "method=full,snapkv", "-m"], ["results_dir=5", "text"]),
    (["model.path=null"], ["model.path=null", "text"]),
    (["model.path=5"], ["model.path=5", "text"]),
    (["model.path=[a]"], ["model.path=[a]", "text"]),
    (["model.chat_template=5"], ["model.chat_template=5", "text, or null"]),
    (["model.chat_template='{{{{ broken'"], ["model.chat_template={{ broken", "fails"]),
    (["model.max_prompt_tokens=abc"], ["model.max_prompt_tokens=abc", "whole number"]),
    (["model.max_positions=abc"], ["model.max_positions=abc", "whole number"]),
    (["model.max_positions=0"], ["model.max_positions=0", "a whole number >= 1, or null"]),
    (["model.max_positions=128", "model.max_prompt_tokens=null"], ["model.max_prompt_tokens=null", "128 positions"]),
    # names of folders
    (["model.name=null"], ["model.name=null", "text"]),
    (["model.name=5"], ["model.name=5", "text"]),
    (["model.name=../../x"], ["model.name=../../x", "no /"]),
    (["model.name=a/b"], ["model.name=a/b", "no /"]),
    (["model.name=.."], ["model.name=..", "begin with a point"]),
    (["model.name=" + 101 * "x"], ["model.name=" + 101 * "x", "1 to 100 characters"]),
    (["method.name=null"], ["method.name=null", "text"]),
    (["method.name=5"], ["method.name=5", "text"]),
    (["method.name=../x"], ["method.name=../x", "no /"]),
]


AGAIN = {
    *("method.budget=-4", "runner.budgets=0", "runner.pair_with=fulll", "runner.budgets=[]", "task.limit=0"),
    *("method=5", "method={{a:1}}", "task=", "method.selection=null", "~seed", "++task.foo=1"),
    *("task=perplexity +task.limit=5", "task=recall task.limit=5", "task=needle task.limit=5"),
    *("task.datasets=trec,qasper", "runner.budgets=64,128", "runner.pair_with=full,h2o", "runner.budgets=[64,true]"),
    *("runner.pair_with={{a:b}}", "runner.pair_with=[null]", "runner.pair_with=true", "runner.pair_with=[full,5]"),
    *("runner.temperature=true", "runner.chunk_size=true", "batch_size=true", "batch_size=1.5"),
    *("method.budget=${{oc.env:NO_SUCH}}", "results_dir=null", "results_dir=[a]", "results_dir={{a:1}}"),
    *("results_dir=true", "model.path=5", "model.path=[a]", "model.chat_template=5", "model.max_positions=abc"),
    *("method=null", "logger=null", "method.scorer=null", "~method.name", "results_dir=2026", "model.path=null"),
    *("+method.foo=1", "+foo=1", "method.budget=0", "method.budget=1.5", "batch_size=0", "runner.temperature=inf"),
    *("model=smolm2-135m", "task=longbnch", "runner=acuracy", "logger=wandbb", "seed=true", "model.max_positions=0"),
    *("runner.pair_with=[{{method:fulll}}]", "runner.pair_with=['5 budget=1']", "task.stretches=5", "--resolve"),
    *("model.name=null", "model.name=5", "model.name=a/b", "model.name=..", "method.name=null", "method.name=5"),
}
"""What is found by the same check as others of the list."""


def case(overrides: list[str], said: list[str]):
    text = " ".join(overrides)
    return pytest.param(overrides, said, id=text[:60], marks=[pytest.mark.slow] if text in AGAIN else [])


@pytest.mark.parametrize(("overrides", "said"), [case(*bad) for bad in BAD_INPUT])
def test_bad_input_is_one_line(world, tmp_path, monkeypatch, overrides, said):
    good = [
        "model=local",
        f"model.path={world}/model",
        "model.max_prompt_tokens=700",
        f"task.data_dir={world}/data",
        "task.datasets=[qasper]",
        f"results_dir={tmp_path / 'results'}",
    ]
    theirs = [o.format(world=world) for o in overrides]
    keys = {o.split("=")[0] for o in theirs}
    if "model" in keys:
        good = [o for o in good if not o.startswith("model")]
    if theirs == ["model.max_prompt_tokens=1020"]:  # truncation to nearly all positions leaves no room for the answer
        save_rows(world / "long", "qasper", 1, words=400)
        theirs.append(f"task.data_dir={world}/long")
        keys.add("task.data_dir")
    if "task" in keys:
        good = [o for o in good if not o.startswith("task")]
    good = [o for o in good if o.split("=")[0] not in keys]
    monkeypatch.chdir(tmp_path)
    done = kvbench("run", *good, *theirs)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(lines) == 1, done.stderr
    for words in said:
        assert words in lines[0]
    assert not list(tmp_path.rglob("record.json"))
    assert not list(tmp_path.rglob("samples.jsonl"))


def test_overrides_and_options_may_come_in_any_order():
    for arguments in (
        ["seed=3", "--cfg", "job", "-p", "method", "method=kivi"],
        ["-c", "job", "method=kivi", "-p", "task"],
    ):
        options, overrides = split_arguments(arguments)
        assert sorted([*options, *overrides]) == sorted(arguments) and overrides == [a for a in arguments if "=" in a]
        done = kvbench("run", *arguments)
        assert done.returncode == 0, done.stderr
        assert ("name: kivi" in done.stdout) == ("method" in options)


def test_help_lists_every_group_choice_and_key():
    out = kvbench("run", "--help").stdout
    for path in (ROOT / "conf").rglob("*.yaml"):
        if path.name != "config.yaml":
            assert path.stem in out
    for key in ("method.budget", "task.limit", "task.data_dir", "results_dir", "runner.budgets", "seed"):
        line = next(line for line in out.splitlines() if line.strip().startswith(key))
        assert len(line.split()) > 3, f"{key} has no explanation"


def test_a_sweep_goes_on_after_a_bad_job_and_says_so(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = kvbench(
        "run",
        "-m",
        "method=snapkv",
        "method.budget=40,0",
        "model=local",
        f"model.path={world}/model",
        "model.max_prompt_tokens=700",
        f"task.data_dir={world}/data",
        f"results_dir={tmp_path / 'results'}",
    )
    assert done.returncode == 2
    assert "method.budget=0" in done.stderr
    assert "1 failed" in done.stderr
    assert len(list(tmp_path.rglob("record.json"))) == 2


def test_a_current_folder_that_was_deleted_is_one_line(monkeypatch):
    monkeypatch.setattr(os, "getcwd", Mock(side_effect=FileNotFoundError(2, "No such file or directory")))
    done = kvbench("run", "method=full")
    assert done.returncode == 2
    assert done.stderr.startswith("error: current folder=")
    assert done.stderr.count("\n") == 1


def test_commands():
    assert kvbench("--help").returncode == 0
    unknown = kvbench("rnu")
    assert unknown.returncode == 2
    assert "run" in unknown.stderr


def test_run_py_from_any_folder_is_one_line_too_and_leaves_no_file_behind(tmp_path):
    """The real process: the exit status, and nothing of Hydra's (log files, output folders) where the user stands."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "run.py"), "method.scorer.kernel=4"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: method.scorer.kernel=4: must be an odd number")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("streams", ["reader gone", "disk full", "closed"])
def test_a_run_goes_on_without_its_terminal(streams, world, tmp_path, monkeypatch):
    """Processes of their own, because the streams of this one are pytest's. Exit status 0 comes with the record."""
    monkeypatch.chdir(tmp_path)
    command = ["run", "model=local", f"model.path={world}/model", "model.max_prompt_tokens=700"]
    command += [f"task.data_dir={world}/data", "task.datasets=[qasper]", "task.limit=1"]
    command += ["method=full", "runner.pair_with=[]", f"results_dir={tmp_path}/results"]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    output = {"reader gone": pipe, "disk full": Path("/dev/full"), "closed": None}[streams]
    process = start(main, command, output=output)
    if streams == "reader gone":
        with pipe.open() as reader:
            reader.readline()
        os.kill(process.pid, signal.SIGHUP)  # what a terminal sends when it is closed
    process.join()
    assert process.exitcode == 0
    (record,) = tmp_path.rglob("record.json")
    assert json.loads(record.read_text())["status"] == "done"


def test_a_reader_that_has_seen_enough_is_no_error_and_a_full_disk_is(tmp_path):
    command = f"{sys.executable} -m kvbench.runners.command"
    piped = ["bash", "-c", f"{command} --help | head -1; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(piped, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    full = subprocess.run(["bash", "-c", f"{command} --help > /dev/full"], cwd=tmp_path, capture_output=True, text=True)
    assert (full.returncode, full.stderr) == (2, "error: kvbench --help: standard output: No space left on device\n")


def test_a_stream_that_failed_is_asked_no_more():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with redirect_stdout(Gone()), lasting_streams() as out:
        print("a line")
        print("another")
    assert out.error.errno == errno.EPIPE
