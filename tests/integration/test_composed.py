"""Which classes a configuration may name, and that every choice of ``conf`` passes the checks of its own values."""

from __future__ import annotations

import json
import pickle
import re
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from contract_settings import every_nth
from hydra.core.global_hydra import GlobalHydra
from local_model import kvbench, save_local_model, save_rows
from omegaconf import OmegaConf

from kvbench.conf.errors import InputError
from kvbench.runners.cli import PARTS
from kvbench.runners.config import loader
from kvbench.runners.config.checks import check_targets, check_values, target_class
from kvbench.runners.config.loader import compose, groups, packaged_choices, plain_data
from kvbench.runners.config.methods import named_method, paired_methods
from kvbench.runners.records.record import folder_name


class Marker:
    """Unpickling it makes a file."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize(
    "target",
    [
        "builtins.open",
        "io.open",
        "os.makedirs",
        "os.system",
        "subprocess.Popen",
        "pathlib.Path",
        "pathlib.Path.touch",
        "pathlib.Path.write_text",
        "pandas.read_pickle",
        "joblib.load",
        "pip.main",
        "torch.load",
        "torch.nn.Linear",
        "hydra.utils.instantiate",
        "__main__.Path",
        "kvbench.runners.cli.os.system",
        "kvbench.runners.cli.Path",
        "kvbench.runners.cli.Path.touch",
        "kvbench.runners.config.methods.named_method",
        "kvbench.runners.config.help.help_text",
        "kvbench.runners.cli",
        "kvbench.methods.cache.method.Method.new_cache",
        "kvbench.no_such.Class",
        "no_such_module.Class",
        "Method",
        "",
        None,
        5,
    ],
)
def test_what_is_no_class_of_ours_is_refused(target):
    with pytest.raises(InputError, match=r"^method\.policy\._target_="):
        check_targets({"policy": {"_target_": target}}, "method")


@pytest.mark.parametrize(
    "overrides",
    [
        ["++logger._target_=builtins.open", "++logger.file=ran", "++logger.mode=w"],
        ["++logger._target_=os.makedirs", "++logger.name=ran"],
        ["++logger._target_=pathlib.Path.write_text", "++logger.self._target_=pathlib.Path", "++logger.data=x"],
        ["++logger._target_=pandas.read_pickle", "++logger.filepath_or_buffer=planted.pkl"],
        ["++logger._target_=joblib.load", "++logger.filename=planted.pkl"],
        ["++logger.x=[{_target_:pathlib.Path.touch,self:{_target_:pathlib.Path,_args_:[ran]}}]"],
        ["+method.scorer.x._target_=os.makedirs", "+method.scorer.x.name=ran"],
        ["+task.x={_target_:os.makedirs,name:ran}"],
        ["+task.x=\"${oc.create:'{_target_: os.makedirs, name: ran}'}\""],
        ["runner.pair_with=['snapkv scorer._target_=pandas.read_pickle']"],
        ["+hydra.callbacks.x={_target_:os.makedirs,name:ran}"],
        ["method=full,snapkv", "+hydra.callbacks.x={_target_:os.makedirs,name:ran}", "-m"],
    ],
)
def test_no_code_but_ours_runs_from_a_configuration(overrides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("planted.pkl").write_bytes(pickle.dumps(Marker()))
    done = kvbench("run", "model=scratch", *overrides)
    assert done.returncode == 2
    assert "_target_=" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not Path("ran").exists()


@pytest.mark.parametrize("group", ["job_logging", "hydra_logging"])
@pytest.mark.parametrize(
    ("handler", "key"),
    [
        ("{(): os.makedirs, name: ran}", "()"),
        ("{class: os.makedirs, name: ran}", "class"),
        ("{class: logging.FileHandler, filename: ext://os.sep}", "filename"),
    ],
)
def test_logging_calls_no_code_but_its_own_handlers(group, handler, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "own" / "hydra" / group / "own.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(f"version: 1\nroot: {{handlers: [x]}}\nhandlers:\n  x: {handler}\n")
    done = kvbench("run", "model=scratch", f"hydra/{group}=own", "--config-dir=own")
    assert done.returncode == 2
    assert f"hydra.*_logging.handlers.x.{key}=" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not Path("ran").exists()


def test_modules_of_ones_own_are_allowed_and_installed_ones_when_they_are_named(tmp_path, monkeypatch):
    source = "from pathlib import Path\nclass Mine:\n    pass\n"
    installed = tmp_path / "lib" / "site-packages"
    for folder, name in ((tmp_path, "module_of_mine"), (installed, "installed_module")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(folder)
    assert target_class("module_of_mine.Mine", "key").__name__ == "Mine"
    with pytest.raises(InputError, match="must be a class that module_of_mine itself defines"):
        target_class("module_of_mine.Path", "key")
    with pytest.raises(InputError, match="KVBENCH_ALLOW=installed_module in the environment allows this one"):
        target_class("installed_module.Mine", "key")
    assert "installed_module" not in sys.modules
    monkeypatch.setenv("KVBENCH_ALLOW", "another,installed_module")
    assert target_class("installed_module.Mine", "key").__name__ == "Mine"


def choices() -> list[tuple[str, str]]:
    return [(group, p.name.removesuffix(".yaml")) for group, found in groups(files("kvbench.conf")) for p in found]


def every_kind_of_choice() -> list:
    """Choices of the groups; the campaigns but each fourth one are slow."""
    found = [choice for choice in choices() if not choice[0].startswith("hydra")]
    campaigns = [choice for choice in found if choice[0] == "campaign"]
    return [choice for choice in found if choice[0] != "campaign"] + every_nth(4, campaigns)


@pytest.mark.parametrize(("group", "name"), every_kind_of_choice())
def test_every_choice_passes_the_checks(group, name):
    GlobalHydra.instance().clear()
    whole = ["experiment=gpu_campaign"] if group == "campaign" else []  # a campaign is a point of that experiment
    config = OmegaConf.to_container(compose([*whole, f"{group}={name}"]), resolve=True)
    check_targets(config, "config")
    for key in PARTS:
        check_values(config[key], key, target_class(config[key]["_target_"], key))


def test_names_of_folders():
    for name in ("snapkv", "llama-3.1 8B", "x" * 100, "Übung"):
        assert folder_name("model.name", name) == name
    for name in (
        "",
        " ",
        ".",
        "..",
        ".locks",
        "a/b",
        "a\\b",
        "../x",
        "/x",
        "a\0b",
        "a\nb",
        "x" * 101,
        "é" * 51,
        None,
        5,
    ):
        with pytest.raises(InputError, match=r"^model\.name="):
            folder_name("model.name", name)


def test_methods_beside_follow_the_budgets_unless_they_name_one(tmp_path, monkeypatch):
    model = save_local_model(tmp_path / "model")
    save_rows(tmp_path / "data", "qasper", 1, words=60)
    monkeypatch.chdir(tmp_path)
    done = kvbench(
        "run",
        "model=local",
        f"model.path={model}",
        "model.max_prompt_tokens=700",
        f"task.data_dir={tmp_path / 'data'}",
        "method=tova",
        "runner.budgets=[64,0.5]",
        "runner.pair_with=[full,snapkv,'h2o budget=48',pyramid_infer]",
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in tmp_path.rglob("record.json")]
    held = sorted((r["method"], r["identity"]["method"]["selection"].get("budget")) for r in records)
    assert held == [
        ("full", None),
        ("h2o", 48),
        ("pyramid_infer", None),
        ("snapkv", 0.5),
        ("snapkv", 64),
        ("tova", 0.5),
        ("tova", 64),
    ]


def test_a_mapping_names_the_methods_that_texts_name():
    """A budget of its own, budgets of its own, the runner's budgets, choices of a group, nested and dotted keys."""
    for entry, budgets, texts in (
        ({"method": "h2o", "budget": 48}, [64], ["h2o budget=48"]),
        ({"method": "h2o", "budgets": [48, 0.5]}, [64], ["h2o budget=48", "h2o budget=0.5"]),
        ({"method": "h2o"}, [64], ["h2o budget=64"]),
        ({"method": "full"}, [64], ["full"]),
        ({"method": "snapkv", "budget": 64, "storage": "kivi4"}, None, ["snapkv budget=64 storage=kivi4"]),
        (
            {"method": "kivi", "storage": "kivi2", "storage.residual": 32},
            None,
            ["kivi storage=kivi2 storage.residual=32"],
        ),
        (
            {"method": "pyramid_infer", "policy": {"strategy": "constant", "min_context": 0}},
            None,
            ["pyramid_infer policy.strategy=constant policy.min_context=0"],
        ),
    ):
        found = [method.identity() for method in paired_methods(entry, budgets)]
        assert found == [named_method(text).identity() for text in texts], entry


@pytest.mark.slow
@pytest.mark.parametrize(("runner", "count"), [("all_methods", 63), ("equal_bytes", 169)])
def test_every_entry_of_a_runner_is_a_method_of_its_own(runner, count):
    entries = plain_data(compose([f"runner={runner}"]).runner.pair_with)
    methods = [method for entry in entries for method in paired_methods(entry, None)]
    assert len({str(method.identity()) for method in methods}) == len(methods) == count


@pytest.mark.slow
def test_equal_bytes_has_every_training_free_method():
    """A method that is added without an entry there would be missing from the joint table."""
    entries = plain_data(compose(["runner=equal_bytes"]).runner.pair_with)
    has = {entry if isinstance(entry, str) else entry["method"] for entry in entries}
    names = [name for group, name in choices() if group == "method"]
    trained = {name for name in names if "sharing" in compose([f"method={name}"]).method}
    not_scored_or_packaged = {"no_cache", "transformers", "hf_quantized"}
    assert has == set(names) - trained - not_scored_or_packaged


def test_the_folder_of_the_configuration_is_listed_once_for_all_entries(monkeypatch):
    listed = []
    monkeypatch.setattr(loader, "groups", lambda root, prefix="": listed.append(prefix) or groups(root, prefix))
    packaged_choices.cache_clear()
    for entry in ("full", "snapkv budget=64 storage=kivi4", {"method": "h2o"}):
        paired_methods(entry, None)
    assert listed.count("") == 1
    assert dict(packaged_choices()) == {group: [n for g, n in choices() if g == group] for group, _ in choices()}


def test_a_method_in_text_is_checked_too():
    with pytest.raises(InputError, match=r"^runner\.pair_with=snapkv windw=8: method\.windw: method has no key windw"):
        named_method("snapkv windw=8")
    with pytest.raises(InputError, match="must name a method"):
        named_method(" ")


@pytest.mark.parametrize(
    ("entry", "shown", "problem"),
    [
        ({"method": "snapkv", "budgets": [0]}, "{method:snapkv,budgets:[0]}", "budgets=0: must be a whole number"),
        ({"method": "snapkv", "budget": 0}, "{method:snapkv,budget:0}", "method.budget=0: must be a whole number"),
        ("snapkv budget=0", "snapkv budget=0", "method.budget=0: must be a whole number"),
        ({"method": "fulll"}, "{method:fulll}", "method=fulll: must be one of"),
        ("fulll budget=4", "fulll budget=4", "method=fulll: must be one of"),
        ("5", "5", "method=5: must be one of"),
        ("snapkv budget={a", "snapkv budget={a", "method.budget={a: cannot be read"),
    ],
)
def test_an_error_in_a_paired_method_names_its_entry(entry, shown, problem):
    with pytest.raises(InputError, match="^" + re.escape(f"runner.pair_with={shown}: {problem}")):
        paired_methods(entry, None)
    with pytest.raises(InputError, match=r"^runner\.budgets=0: must be a whole number"):
        paired_methods("snapkv", [0])
