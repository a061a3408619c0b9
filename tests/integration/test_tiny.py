"""The family of trained models: each method takes its own member, and all of them stand in one table."""

from __future__ import annotations

import shutil

import pytest
import torch

from kvbench.analysis.load import comparable, read_runs
from kvbench.conf.errors import InputError
from kvbench.methods.cache.method import Method
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.methods.sharing.cla import CLA
from kvbench.methods.sharing.heads import Heads
from kvbench.methods.sharing.yoco import YOCO
from kvbench.models import tiny
from kvbench.models.scratch import ScratchModel
from kvbench.models.tiny import TinyModel
from kvbench.runners.accuracy import AccuracyRunner
from kvbench.runners.config.settings import Settings
from kvbench.runners.train.runner import TrainRunner
from kvbench.tasks.recall import Recall

MEMBERS = {"mha": Heads(), "mqa": Heads(1), "cla2": CLA(2), "yoco": YOCO(window=16)}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Four members, hardly trained."""
    home, runs = tmp_path_factory.mktemp("family"), tmp_path_factory.mktemp("runs")
    rule = TrainRunner(steps=2, batch_tokens=128, validate_sequences=2)
    source = ScratchModel(layers=4, hidden_size=32, heads=2, head_dim=16, intermediate_size=32)
    settings = Settings(results_dir=str(runs), device="cpu", dtype="float32")
    for label, sharing in MEMBERS.items():
        (run,) = rule.run(source, [Method(label, sharing=sharing)], Recall(), settings)
        shutil.copytree(run.folder.path / "model", home / "recall" / label)
    return home


@pytest.fixture
def source(family, monkeypatch):
    monkeypatch.setattr(tiny, "FAMILY", family)
    return TinyModel()


def test_an_installed_package_reads_the_family_from_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "cache"))
    folder = tiny.family_folder(tmp_path / "site-packages")
    assert folder == tmp_path / "cache" / "tiny"
    monkeypatch.setattr(tiny, "FAMILY", folder)
    with pytest.raises(InputError, match=f"model=tiny: .*copy models/tiny of a checkout to {folder}, or train one"):
        TinyModel()


def test_a_method_takes_its_own_member(source):
    assert source.for_sharing(CLA(2), "cla").member == "cla2"
    assert source.for_sharing(None, "snapkv").member == "mha"
    assert source.for_sharing(YOCO(), "yoco").load("cpu", torch.float32).model.config.sliding_window == 16
    with pytest.raises(InputError, match=r"^method=cla: cla3 is not among .*runner=train method=cla task=recall"):
        source.for_sharing(CLA(3), "cla")


def test_a_named_member_serves_token_methods_and_refuses_other_architectures(source):
    named = TinyModel(member="yoco")
    assert named.for_sharing(None, "snapkv") is named
    with pytest.raises(InputError, match="kv_source_layers"):
        named.for_sharing(CLA(2), "cla")
    with pytest.raises(InputError, match=r"^model\.member=cla4: must be one of"):
        TinyModel(member="cla4")
    with pytest.raises(InputError, match=r"^model\.trained_on"):
        TinyModel(trained_on="poems")


def test_members_stand_in_one_table_with_their_bytes(source, tmp_path):
    methods = [Method(label, sharing=sharing) for label, sharing in MEMBERS.items() if label != "mha"]
    methods += [Method("full"), Method("snapkv", EvictionPolicy(SnapKV(), 40))]
    settings = Settings(results_dir=str(tmp_path), device="cpu", dtype="float32")
    runs = AccuracyRunner().run(source, methods, Recall(sequences=4), settings)
    (group,) = comparable(read_runs([run.folder.path for run in runs]))
    records = {run.label: run.record for run in group}
    assert set(records) == {"mqa", "cla2", "yoco", "full", "snapkv 40"}
    assert [run.label for run in group if run.is_full_cache] == ["full"]
    a_token = 2 * 2 * 16 * 4  # keys and values, two heads of 16 channels, float32
    full = 63 * 4 * a_token
    for label, stored in {
        "full": full,
        "mqa": full // 2,
        "cla2": full // 2,
        "yoco": 63 * a_token + 2 * 15 * a_token,
        "snapkv 40": 40 * 4 * a_token,
    }.items():
        held = records[label]["bytes"]
        assert held["kv_bytes_stored"] == held["kv_bytes_formula"] == stored, label
        assert held["kv_bytes_full"] == full
        assert label == "full" or records[label]["paired"]["with"] == "full"
    fingerprints = {label: record["identity"]["method"].get("weights") for label, record in records.items()}
    assert fingerprints["full"] == fingerprints["snapkv 40"] and len(set(fingerprints.values())) == 4


def test_other_weights_are_another_run(source, family, tmp_path):
    identity = source.for_sharing(CLA(2), "cla").method_weights
    other = tmp_path / "other"
    shutil.copytree(family, other)
    (other / "recall" / "cla2" / "config.json").write_text(
        (family / "recall" / "cla2" / "config.json")
        .read_text()
        .replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "FAMILY", other)
        assert TinyModel().for_sharing(CLA(2), "cla").method_weights != identity
