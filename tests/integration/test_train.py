"""runner=train: batches, schedules, checkpoints, conversion, records."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from local_model import kvbench
from safetensors.torch import load_file, save_file
from sharing_models import SHAPE, shared_model
from transformers import LlamaConfig, LlamaForCausalLM

from kvbench.analysis.load import read_runs
from kvbench.analysis.tables import markdown, tables, train_table
from kvbench.conf.errors import InputError
from kvbench.methods.cache.method import Method
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.methods.sharing.cla import CLA
from kvbench.methods.sharing.framework import KVShare
from kvbench.methods.sharing.heads import Heads
from kvbench.methods.sharing.lckv import LCKV
from kvbench.methods.sharing.yoco import YOCO
from kvbench.models.kvshare.convert import convert, shared_config
from kvbench.models.local import LocalModel
from kvbench.models.random import RandomModel
from kvbench.models.scratch import ScratchModel, count_parameters
from kvbench.models.uptrained import UptrainedModel
from kvbench.runners.config.settings import Settings
from kvbench.runners.train.loop import Training, new_accelerator
from kvbench.runners.train.losses import Distill
from kvbench.runners.train.runner import TrainRunner
from kvbench.tasks.copying import Copying
from kvbench.tasks.needle import Needle
from kvbench.tasks.recall import Recall
from kvbench.tasks.text import BLOCK, Text, stdlib_files
from kvbench.tasks.training import IGNORED

ROOT = Path(__file__).resolve().parents[2]

SMALL = ScratchModel(layers=2, hidden_size=32, heads=2, head_dim=16, intermediate_size=48)
RULE = TrainRunner(steps=6, batch_tokens=256, lr=1e-3, validate_every=3, validate_sequences=8, save_every=2)
CLA2 = Method("cla", sharing=CLA(2))


def train(folder, rule=RULE, method=CLA2, source=SMALL, task=None, seed=0):
    settings = Settings(results_dir=str(folder), device="cpu", dtype="float32", seed=seed)
    return rule.run(source, [method], task or Recall(), settings)[0].folder


@pytest.fixture
def corpus(tmp_path):
    """A file of 25 blocks of bytes, each block recognisable."""
    file = tmp_path / "corpus.txt"
    file.write_text("".join(f"{i:03d}" + chr(97 + i % 26) * (BLOCK - 3) for i in range(40)))
    return file


# data ----------------------------------------------------------------------------------------------------------------


def test_a_recall_sequence_can_be_answered_from_its_pairs_and_asks_for_nothing_else():
    task = Recall()
    tokenizer = task.new_tokenizer()
    seen = set()
    for ids, labels in (task.batch(tokenizer, 3, 50, 64, seed=1), task.validation(tokenizer, 64, 50)):
        for row, asked in zip(ids, labels, strict=True):
            words = tokenizer.decode(row).split()
            assert len(words) == 64
            pairs, order = {}, []
            for i in range(0, 64, 2):
                key, value = words[i], words[i + 1]
                assert key[0] == "k" and value[0] == "v"
                if asked[i + 1] == IGNORED:
                    assert key not in pairs and not order  # the pairs come first, each key once
                    pairs[key] = value
                else:
                    order.append(key)
                    assert pairs[key] == value and asked[i + 1] == row[i + 1]
                assert asked[i] == IGNORED
            seen.add(len(pairs))
    assert seen == set(range(1, 9))


def test_batches_depend_on_seed_and_step_alone():
    task = Recall()
    tokenizer = task.new_tokenizer()
    one, again, other = (task.batch(tokenizer, step, 4, 64, seed=2)[0] for step in (5, 5, 6))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert not np.array_equal(one, task.batch(tokenizer, 5, 4, 64, seed=3)[0])


def test_recall_as_a_task():
    task = Recall(sequences=5)
    tokenizer = task.new_tokenizer()
    examples = task.examples()
    assert examples == Recall(sequences=5).examples() and len({e.prompt for e in examples}) == 5
    ids = task.encode(examples[0], tokenizer, None)
    assert len(ids) == 63
    for example in Recall(sequences=40).examples():
        words = example.prompt.split()
        assert words[words.index(words[-1]) + 1] == example.answers[0]
        told = len(words) - 1 - example.meta["distance"]
        assert words[told - 1 : told + 1] == [words[-1], example.answers[0]] and words[-1] not in words[told:-1]
    assert task.score(examples[0], f" {examples[0].answers[0]}") == 1.0 and task.score(examples[0], "v99") == 0.0
    rows = [{"score": float(d < 20), "distance": d} for d in (1, 8, 9, 17, 31, 61)]
    assert task.conclude(rows)[0]["accuracy_by_distance"] == {
        "up_to_tokens": [8, 16, 32, 64],
        "accuracy": [100.0, 100.0, 50.0, 0.0],
        "n": [2, 1, 2, 1],
    }
    with pytest.raises(InputError, match="recall"):
        task.encode(examples[0], Text().new_tokenizer(), None)
    with pytest.raises(InputError, match=r"task.max_length=62: recall/0000 has 63 prompt tokens"):
        task.encode(examples[0], tokenizer, 62)


@pytest.mark.parametrize(
    "options",
    [{"pairs": 20}, {"length": 17}, {"length": 12}, {"keys": 0}, {"sequences": True}, {"max_length": 0}],
    ids=str,
)
def test_bad_recall_settings(options):
    with pytest.raises(InputError, match=r"^task\."):
        Recall(**options)


def test_a_copying_sequence_is_a_string_a_mark_and_the_string_again():
    task = Copying(span=9, symbols=5, sequences=4)
    tokenizer = task.new_tokenizer()
    for ids, labels in (task.batch(tokenizer, 3, 6, 0, seed=1), task.validation(tokenizer, 0, 6)):
        assert ids.shape == labels.shape == (6, task.sequence_length(0)) == (6, 19)
        for row, asked in zip(ids, labels, strict=True):
            words = tokenizer.decode(row).split()
            assert words[:9] == words[10:] and words[9] == "=" and "=" not in words[:9]
            assert (asked[:10] == IGNORED).all() and (asked[10:] == row[10:]).all()
    examples = task.examples()
    assert examples == Copying(span=9, symbols=5, sequences=4).examples() and len({e.prompt for e in examples}) == 4
    ids = task.encode(examples[0], tokenizer, None)
    assert tokenizer.decode(ids) == f"{examples[0].answers[0]} ="
    words = examples[0].answers[0].split()
    assert task.score(examples[0], " ".join(words)) == 1.0
    assert task.score(examples[0], " ".join([*words[:3], "s99", *words[4:]])) == 3 / 9
    assert task.score(examples[0], "") == 0.0
    with pytest.raises(InputError, match="copying"):
        task.encode(examples[0], Recall().new_tokenizer(), None)


@pytest.mark.parametrize("options", [{"symbols": 0}, {"span": 0}, {"span": 2.5}, {"sequences": True}, {"seed": -1}])
def test_bad_copying_settings(options):
    with pytest.raises(InputError, match=r"^task\."):
        Copying(**options)


def test_a_model_trained_on_copying_is_asked_through_a_compressed_cache(tmp_path):
    """From training to score: a model of two layers learns to repeat six symbols, and needs all of them for it."""
    small = ["task=copying", "task.symbols=4", "task.span=6", f"results_dir={tmp_path}"]
    shape = ["model.layers=2", "model.hidden_size=64", "model.heads=2", "model.head_dim=32"]
    train = ["runner=train", "method=mha", "model=scratch", "model.intermediate_size=128", "runner.steps=300"]
    done = kvbench("run", *small, *train, *shape, "runner.batch_tokens=416", "runner.lr=4e-3")
    assert done.returncode == 0, done.stderr
    (record,) = tmp_path.glob("copying/scratch/mha/*/record.json")
    model = ["model=local", f"model.path={record.parent / 'model'}", "task.sequences=24"]
    done = kvbench("run", *small, *model, "method=random", "method.budget=4", "method.recent=1")
    assert done.returncode == 0, done.stderr
    found = [json.loads(p.read_text()) for p in tmp_path.glob("copying/model/*/*/record.json")]
    scores = {r["method"]: r["average"]["mean"] for r in found}
    assert scores["full"] > 90
    assert scores["random"] < scores["full"] - 30


def test_text_is_cut_without_gaps_and_whole_blocks_are_held_out(corpus):
    task = Text(path=str(corpus))
    tokenizer = task.new_tokenizer()
    assert len(tokenizer) == 257 and tokenizer.decode(tokenizer("naïve\t\n✓").input_ids) == "naïve\t\n✓"
    trained, held_out = task._sequences(tokenizer, 100)
    assert held_out.shape == (2 * 40, 100) and trained.shape == (38 * 40, 100)
    told = [tokenizer.decode(row) for row in held_out]
    assert told[0].startswith("019t") and told[40].startswith("039")
    text = corpus.read_text()
    assert tokenizer.decode(trained[:40].reshape(-1)) == text[:4000]
    epoch = np.concatenate([task.batch(tokenizer, step, 40, 100, seed=0)[0] for step in range(38)])
    order = np.lexsort(epoch.T)
    assert np.array_equal(epoch[order], trained[np.lexsort(trained.T)])  # every sequence once
    second = task.batch(tokenizer, 38, 40, 100, seed=0)[0]
    assert not np.array_equal(second, epoch[:40])
    assert {tuple(r) for r in task.validation(tokenizer, 100, 7)[0]} <= {tuple(r) for r in held_out}


def test_the_standard_library_is_text_and_says_what_it_is():
    files = stdlib_files()
    assert len(files) > 200 and not any({"test", "site-packages"} & set(f.parts[-4:]) for f in files)
    source = Text(limit_bytes=100_000).source()
    assert source.name == "text-stdlib" and "characters" in source.note
    assert source.sha256 != Text(limit_bytes=90_000).source().sha256


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"path": "/nowhere"}, r"task\.path"),
        ({"path": None}, r"task\.path"),
        ({"dataset": "a/b"}, r"task\.path"),
        ({"limit_bytes": 0}, r"task\.limit_bytes"),
    ],
    ids=str,
)
def test_bad_text_settings(options, key):
    with pytest.raises(InputError, match=f"^{key}"):
        Text(**options).source()


def test_text_shorter_than_it_takes_and_files_that_do_not_match(tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(InputError, match=r"task\.path=.*has 11 tokens; 20 blocks"):
        train(tmp_path / "out", task=Text(path=str(tmp_path / "short.txt")))
    with pytest.raises(InputError, match=r"task\.pattern"):
        Text(path=str(tmp_path), pattern="*.md").source()
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="holds no text"):
        Text(path=str(tmp_path / "empty.txt")).source()


def test_a_hub_data_set_is_read_through_datasets(monkeypatch):
    import datasets

    def load(name, config, split):
        assert (name, config, split) == ("someone/texts", None, "train")
        return datasets.Dataset.from_dict({"text": ["one", "two"], "id": [1, 2]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert Text(path=None, dataset="someone/texts").source().note.startswith("2 documents, 6 characters")
    with pytest.raises(InputError, match=r"task\.column=body: must be one of text, id"):
        Text(path=None, dataset="someone/texts", column="body").source()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no network")))
    with pytest.raises(InputError, match=r"task\.dataset=someone/texts: cannot be loaded: no network"):
        Text(path=None, dataset="someone/texts").source()


# models --------------------------------------------------------------------------------------------------------------


def test_all_ways_of_sharing_have_the_plain_models_parameters():
    tokenizer = Recall().new_tokenizer()
    special = {"pad_token_id": 0}
    source = ScratchModel(layers=6)
    plain = count_parameters(source.config(Heads(), len(tokenizer), special))
    for sharing in (None, Heads(2), Heads(1), CLA(2), CLA(3), YOCO(window=16), LCKV(2), KVShare(3)):
        config = source.config(sharing, len(tokenizer), special)
        assert abs(count_parameters(config) / plain - 1) < 0.01
    loose = replace(source, match_parameters=False).config(CLA(2), len(tokenizer), special)
    assert count_parameters(loose) < 0.95 * plain


def test_the_same_seed_makes_the_same_model():
    tokenizer = Recall().new_tokenizer()
    a, b, c = (SMALL.build(CLA(2), tokenizer, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)


def plain_llama():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.15) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    return model


@torch.no_grad()
def test_converting_to_groups_of_one_changes_nothing():
    plain, x = plain_llama(), torch.arange(2, 30)[None]
    for how in ("copy", "mean", "gain_folded_mean"):
        model = convert(plain, KVShare(map=[0, 1, 2, 3, 4, 5]), how)
        assert (model(x).logits - plain(x).logits).abs().max() < (1e-5 if how == "gain_folded_mean" else 1e-12)
    normed = convert(plain, CLA(1, separate_kv_norm=True), "mean")
    assert (normed(x).logits - plain(x).logits).abs().max() < 1e-12


@torch.no_grad()
def test_the_three_ways_to_make_one_projection_of_many():
    plain = plain_llama()
    layers = [layer.self_attn.v_proj.weight for layer in plain.model.layers]
    gains = [layer.input_layernorm.weight for layer in plain.model.layers]
    made = {how: convert(plain, CLA(2), how).model.layers[2].self_attn.v_proj.weight for how in
            ("copy", "mean", "gain_folded_mean")}  # fmt: skip
    assert torch.equal(made["copy"], layers[2])
    assert torch.allclose(made["mean"], (layers[2] + layers[3]) / 2)
    folded = (layers[2] * gains[2] + layers[3] * gains[3]) / 2 / gains[2]
    assert torch.allclose(made["gain_folded_mean"], folded, atol=1e-6)
    yoco = convert(plain, YOCO(window=8), "copy")
    assert torch.equal(yoco.model.layers[3].kv_layernorm.weight, gains[3])
    assert not hasattr(yoco.model.layers[4].self_attn, "k_proj")


@torch.no_grad()
def test_going_on_from_a_model_that_shares():
    """YOCO in two stages: full attention below first, then windows; norms and whatever is left open stay as trained."""
    first = convert(plain_llama(), YOCO(mixer="full"), "mean")
    first.model.layers[3].kv_layernorm.weight.fill_(3.0)
    for how in ("copy", "mean", "gain_folded_mean"):
        second = convert(first, YOCO(window=8), how)
        assert (second.model.layers[3].kv_layernorm.weight == 3.0).all()
        assert torch.allclose(
            second.model.layers[3].self_attn.k_proj.weight, first.model.layers[3].self_attn.k_proj.weight
        )
    windowed = convert(second, YOCO(), "copy")
    x = torch.arange(2, 30)[None]
    assert windowed.config.sliding_window == 8 and torch.equal(windowed(x).logits, second(x).logits)
    normed = convert(plain_llama(), CLA(2, separate_kv_norm=True), "copy")
    assert torch.equal(convert(normed, CLA(2), "mean")(x).logits, normed(x).logits)
    with pytest.raises(InputError, match="to own keys and values"):
        convert(normed, CLA(1), "copy")


@torch.no_grad()
def test_biases_are_averaged_too():
    plain = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True)).eval()
    for i, layer in enumerate(plain.model.layers):
        layer.self_attn.v_proj.bias.fill_(float(i))
    assert (convert(plain, CLA(2), "mean").model.layers[2].self_attn.v_proj.bias == 2.5).all()
    assert (convert(plain, CLA(2), "copy").model.layers[2].self_attn.v_proj.bias == 2.0).all()


def test_what_cannot_be_converted():
    with pytest.raises(InputError, match=r"^runner\.init"):
        convert(plain_llama(), CLA(2), "sum")
    with pytest.raises(InputError, match="kv_heads"):
        convert(plain_llama(), Heads(1), "mean")
    with pytest.raises(InputError, match="only Llama"):
        shared_config(_qwen(), CLA(2))


def _qwen():
    from transformers import Qwen3Config

    return Qwen3Config()


# the loop ------------------------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_and_falls_along_a_cosine():
    rule = TrainRunner(steps=100, lr=1.0, warmup=0.1, final_lr=0.2)
    rates = [rule.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.6) and rates[99] == pytest.approx(0.2, abs=1e-3)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def validation(loaded, rule, task, length):
    """What a training would find of a loaded model."""
    training = Training.__new__(Training)
    training.options, training.task, training.model = rule, task, loaded.model
    training.tokenizer, training.length, training.size = loaded.tokenizer, length, 4
    training.device, training.accelerator = (
        torch.device("cpu"),
        new_accelerator(Settings(device="cpu", dtype="float32")),
    )
    return training.validate()


def test_a_run_learns_records_and_can_be_loaded(tmp_path):
    rule = replace(RULE, steps=60, lr=3e-3, validate_every=60)
    folder = train(tmp_path, rule)
    record = folder.record()
    curve = [point["loss"] for point in record["curve"]]
    assert len(curve) == 60 and sum(curve[-5:]) < sum(curve[:5])
    assert record["training"]["tokens"] == 60 * 256 and record["validation"]["labels"] == 8 * 24
    assert record["bytes"]["kv_bytes_per_token"] == 2 * 2 * 16 * 4  # one source of two heads, float32
    loaded = LocalModel(str(folder.path / "model"), max_prompt_tokens=63).load("cpu", torch.float32)
    assert loaded.model.config.kv_source_layers == [0, 0] and len(loaded.tokenizer) == 33
    again = validation(loaded, rule, Recall(), 64)  # the loss of the saved model is the recorded one, to float16
    assert again["loss"] == pytest.approx(record["validation"]["loss"], abs=2e-3)
    assert not (folder.path / "checkpoints").exists()


def cut_off_at(stop, folder, monkeypatch, rule=RULE):
    """Interrupt a training before its step ``stop`` (counted from 0)."""
    accumulate = Training._accumulate

    def cut(self, model, step):
        if step == stop:
            raise KeyboardInterrupt
        return accumulate(self, model, step)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_accumulate", cut)
        with pytest.raises(KeyboardInterrupt):
            train(folder, rule)


def test_a_run_cut_off_at_any_step_ends_with_the_same_weights(tmp_path, monkeypatch, caplog):
    whole = train(tmp_path / "a")
    for stop in (3, 5):
        cut_off_at(stop, tmp_path / "b", monkeypatch)
    caplog.set_level(logging.INFO)
    resumed = train(tmp_path / "b")
    assert "continues after step 4 of 6" in caplog.text
    a, b = whole.record(), resumed.record()
    assert a["weights"]["model.safetensors"] == b["weights"]["model.safetensors"]
    assert [p["loss"] for p in a["curve"]] == [p["loss"] for p in b["curve"]]
    assert len(b["sessions"]) == 3


def test_the_curve_of_a_run_that_was_cut_off_is_the_whole_runs(tmp_path, monkeypatch):
    """Points over two steps, and a checkpoint between them."""
    rule = replace(RULE, steps=400, batch_tokens=64, save_every=203, validate_every=400)
    whole = train(tmp_path / "a", rule)
    cut_off_at(205, tmp_path / "b", monkeypatch, rule)
    resumed = train(tmp_path / "b", rule)
    assert [p["loss"] for p in whole.record()["curve"]] == [p["loss"] for p in resumed.record()["curve"]]


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, monkeypatch, caplog):
    whole = train(tmp_path / "a")
    cut_off_at(5, tmp_path / "b", monkeypatch)
    (weights,) = tmp_path.glob("b/**/step-0000004/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    caplog.set_level(logging.INFO)
    resumed = train(tmp_path / "b")
    assert "after step 4 is damaged (model.safetensors is not what was written)" in caplog.text
    assert "continues after step 2 of 6" in caplog.text
    assert whole.record()["weights"] == resumed.record()["weights"]


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    loss = Training._loss
    calls = []

    def broken(self, model, x, y):
        calls.append(1)
        return loss(self, model, x, y) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(Training, "_loss", broken)
    with pytest.raises(
        InputError, match=r"runner\.lr=0\.001: the loss is nan at step 4: the checkpoint after step 2 is"
    ):
        train(tmp_path)
    assert not list(tmp_path.glob("**/record.json"))
    assert list(tmp_path.glob("**/step-0000002/model.safetensors"))


def test_a_batch_in_parts_is_the_batch(tmp_path):
    whole, parts = (train(tmp_path / str(m), replace(RULE, micro_batch=m)) for m in (None, 1))
    a, b = (folder.record() for folder in (whole, parts))
    assert a["hash"] == b["hash"]
    for x, y in zip(a["curve"], b["curve"], strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)


def test_labels_are_weighed_alike_whatever_the_part_they_stand_in():
    """Sequences with few pairs have more questions; a mean of the parts' means would weigh theirs less."""
    training = Training.__new__(Training)
    task = Recall()
    training.options, training.task, training.settings = replace(RULE, micro_batch=1), task, Settings()
    training.tokenizer, training.length, training.size = task.new_tokenizer(), 64, 4
    training.device, training.teacher = torch.device("cpu"), None
    training.accelerator = new_accelerator(Settings(device="cpu", dtype="float32"))
    model = training.model = SMALL.build(None, training.tokenizer, 0)
    ids, labels = (torch.from_numpy(x) for x in task.batch(training.tokenizer, 0, 4, 64, 0))
    expected = model(ids, labels=labels).loss
    assert training._accumulate(model, 0) == pytest.approx(float(expected), rel=1e-5)
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(ids, labels=labels).loss.backward()
    assert all(torch.allclose(a, p.grad, atol=1e-6) for a, p in zip(ours, model.parameters(), strict=True))


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """On the CPU, started as on GPUs: the same loss at every step."""
    command = "runner=train method=cla task=recall model=scratch model.layers=2 runner.steps=4 runner.batch_tokens=256"
    command += " runner.validate_sequences=8 device=cpu dtype=float32"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    records = []
    for name in ("one", "two"):
        arguments = [*command.split(), f"results_dir={tmp_path / name}"]
        if name == "one":
            done = kvbench("run", *arguments)
        else:
            done = subprocess.run([*launch, str(ROOT / "run.py"), *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        (path,) = tmp_path.glob(f"{name}/**/record.json")
        records.append(json.loads(path.read_text()))
    assert records[1]["training"]["processes"] == 2
    for x, y in zip(records[0]["curve"], records[1]["curve"], strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)


# uptraining ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path, corpus):
    """A folder with a small plain Llama over bytes."""
    tokenizer = Text(path=str(corpus)).new_tokenizer()
    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    return LocalModel(str(tmp_path / "plain"), max_prompt_tokens=100)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"distill": Distill(weight=1.0, hidden_mse=1.0)},
        {"distill": Distill(weight=0.5), "train": "kv", "adapter_rank": 2},
    ],
    ids=str,
)
def test_uptraining_from_a_checkpoint(tmp_path, corpus, checkpoint, changes):
    rule = replace(RULE, steps=4, sequence=64, **changes)
    folder = train(tmp_path / "out", rule, Method("yoco", sharing=YOCO(window=16)), checkpoint, Text(path=str(corpus)))
    record = folder.record()
    assert record["identity"]["train"]["init"] == "mean"
    if changes.get("train") == "kv":
        trained = load_file(folder.path / "model" / "trained.safetensors")
        assert any("lora_" in name for name in trained) and not any("embed" in name for name in trained)
        source = UptrainedModel(str(folder.path / "model"), checkpoint)
        loaded = source.load("cpu", torch.float32)
        assert loaded.model.config.kv_source_layers == [0, 1, 2, 3, 3, 3]
        assert not any("lora" in name for name in loaded.model.state_dict())
        assert source.for_sharing(YOCO(), "yoco") is source and source.fingerprint() != checkpoint.fingerprint()
        again = validation(loaded, rule, Text(path=str(corpus)), 64)
        assert again["loss"] == pytest.approx(record["validation"]["loss"], abs=2e-3)
    else:
        loaded = LocalModel(str(folder.path / "model"), max_prompt_tokens=100).load("cpu", torch.float32)
        assert loaded.model.config.kv_source_layers == [0, 1, 2, 3, 3, 3]


def test_adapters_are_drawn_from_the_seed(tmp_path, corpus, checkpoint):
    rule = replace(RULE, steps=2, sequence=64, train="kv", adapter_rank=2)
    torch.manual_seed(5)
    first = train(tmp_path / "a", rule, CLA2, checkpoint, Text(path=str(corpus)))
    torch.manual_seed(6)
    second = train(tmp_path / "b", rule, CLA2, checkpoint, Text(path=str(corpus)))
    assert first.record()["weights"] == second.record()["weights"]


def test_distillation_and_the_loss_on_changing_keys_add_up(checkpoint, corpus):
    loaded = checkpoint.load("cpu", torch.float32)
    x = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    losses = {}
    for weight in (0.0, 1.0):
        for distill in (0.0, 1.0):
            training = Training.__new__(Training)
            training.options = replace(RULE, distill=Distill(weight=distill))
            training.teacher = loaded.model if distill else None
            rule = LCKV(2, iter_forward=0, iter_backward=2, kv_loss_weight=1e4 * weight)
            training.model = convert(loaded.model, rule, "mean")
            losses[weight, distill] = float(training._loss(training.model, x, x).detach())
    extra = losses[1.0, 0.0] - losses[0.0, 0.0]
    assert extra > 0.1 and abs(losses[0.0, 1.0] - losses[0.0, 0.0]) > 1e-3
    assert losses[1.0, 1.0] - losses[0.0, 1.0] == pytest.approx(extra, rel=1e-3)


def test_what_was_trained_needs_the_checkpoint_it_was_trained_on(tmp_path, corpus, checkpoint):
    rule = replace(RULE, steps=1, sequence=64, train="kv")
    folder = train(tmp_path / "out", rule, CLA2, checkpoint, Text(path=str(corpus)))
    source = UptrainedModel(str(folder.path / "model"), checkpoint)
    source.load("cpu", torch.float32)
    weights = load_file(folder.path / "model" / "trained.safetensors")
    lost = weights.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(weights, folder.path / "model" / "trained.safetensors")
    with pytest.raises(InputError, match=r"lacks model\.layers\.0\.self_attn\.q_proj\.weight"):
        source.load("cpu", torch.float32)
    weights |= {"model.layers.0.self_attn.q_proj.weight": lost, "extra": torch.ones(1)}
    save_file(weights, folder.path / "model" / "trained.safetensors")
    with pytest.raises(InputError, match="no place for its extra"):
        source.load("cpu", torch.float32)
    how = folder.path / "model" / "uptrained.json"
    how.write_text(how.read_text().replace("sha256:", "sha256:0"))
    with pytest.raises(InputError, match=r"^model\.base=plain: has other weights"):
        UptrainedModel(str(folder.path / "model"), checkpoint).fingerprint()
    how.unlink()
    with pytest.raises(InputError, match=r"^model\.path=.*has no uptrained.json"):
        UptrainedModel(str(folder.path / "model"), checkpoint).for_sharing(CLA(2), "cla")


def test_a_student_that_is_its_teacher_has_nothing_to_learn(checkpoint, corpus):
    training = Training.__new__(Training)
    loaded = checkpoint.load("cpu", torch.float32)
    training.options = replace(RULE, distill=Distill(weight=1.0, hidden_mse=1.0))
    training.teacher = loaded.model
    x = torch.randint(0, 256, (2, 32))
    same = training.model = convert(loaded.model, CLA(1), "copy")
    assert abs(float(training._loss(same, x, x))) < 1e-3
    assert float(training._loss(convert(loaded.model, CLA(2), "mean"), x, x)) > 1e-3


# what is refused, and what is shown -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"method": Method("snapkv", EvictionPolicy(SnapKV(), 64))}, "method"),
        ({"task": Needle()}, "task"),
        ({"source": RandomModel("tiny")}, "model"),
        ({"rule": replace(RULE, batch_tokens=32)}, r"runner\.batch_tokens"),
        ({"source": replace(SMALL, max_positions=32)}, r"runner\.sequence"),
        ({"rule": replace(RULE, distill=Distill(weight=1.0))}, r"runner\.distill"),
        ({"rule": replace(RULE, train="kv")}, r"runner\.train"),
    ],
    ids=str,
)
def test_what_cannot_be_trained(tmp_path, changes, key):
    with pytest.raises(InputError, match=f"^{key}="):
        train(tmp_path, **changes)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"lr": 0},
        {"init": "zero"},
        {"train": "heads"},
        {"adapter_rank": 4},
        {"save_dtype": "int8"},
        {"warmup": 2},
        {"beta1": 1},
    ],
    ids=str,
)
def test_bad_runner_settings(options):
    with pytest.raises(InputError, match=r"^runner\."):
        TrainRunner(**options)


def test_float16_is_not_trained_in(tmp_path):
    settings = Settings(results_dir=str(tmp_path), device="cpu", dtype="float16")
    with pytest.raises(InputError, match=r"^dtype=float16"):
        RULE.run(SMALL, [CLA2], Recall(), settings)


def test_trainings_of_one_process_may_differ_in_precision(tmp_path):
    for dtype in ("float32", "bfloat16"):
        settings = Settings(results_dir=str(tmp_path), device="cpu", dtype=dtype)
        RULE.run(SMALL, [CLA2], Recall(), settings)
    assert len(list(tmp_path.glob("**/record.json"))) == 2


def test_recall_is_not_trained_with_another_models_tokens(tmp_path, checkpoint):
    with pytest.raises(InputError, match=r"^model=.*has no token of its own"):
        train(tmp_path / "out", RULE, CLA2, checkpoint, Recall())


def test_a_tokenizer_is_known_by_its_content(tmp_path, corpus, checkpoint):
    here, there = checkpoint.path, tmp_path / "elsewhere"
    shutil.copytree(here, there)
    one, same = (Text(path=str(corpus), tokenizer=str(folder)) for folder in (here, there))
    assert one.identity() == same.identity() and "tokenizer" in one.identity()["sha256"]
    assert Text(path=str(corpus)).identity() != one.identity()


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(InputError, match=r"^runner=train: needs the package accelerate"):
        train(tmp_path)


def test_the_table_takes_each_architecture_at_its_best_rate_over_seeds(tmp_path):
    for lr in (1e-4, 3e-3):
        for seed in (0, 1):
            train(tmp_path, replace(RULE, lr=lr), seed=seed)
    train(tmp_path, method=Method("mqa", sharing=Heads(1)))
    runs = read_runs(sorted(p.parent for p in tmp_path.glob("**/record.json")))
    table = train_table(runs)
    (made,) = tables(runs)
    assert markdown(made) == markdown(table)
    by_name = {row[0].text: row for row in table.rows}
    losses = {}
    for run in runs:
        if run.label == "cla2":
            losses.setdefault(run.record["training"]["lr"], []).append(run.record["validation"]["loss"])
    best = min(losses, key=lambda lr: sum(losses[lr]))
    row = by_name["cla2"]
    assert row[3].value == pytest.approx(sum(losses[best]) / 2)
    assert (row[7].text, row[8].text, row[9].text) == (f"{best:g}", "0.0001 0.003", "0 1")
    assert Path(table.runs[0].path).is_dir() and set(by_name) == {"cla2", "mqa"}
    assert "so that its loss is biased low: cla2." in " ".join(table.notes)
    chosen = min(losses, key=lambda lr: losses[lr][0])  # where only seed 0 was tried at every rate, it is not reported
    left = [
        run for run in runs if run.record["training"]["lr"] in (chosen, RULE.lr) or run.record["identity"]["seed"] == 0
    ]
    table = train_table(left)
    row = next(row for row in table.rows if row[0].text == "cla2")
    assert (row[3].value, row[9].text) == (pytest.approx(losses[chosen][1]), "1")
    assert "chosen by seed 0" in " ".join(table.notes)


def test_a_model_without_such_weights_says_how_to_train_them(tmp_path):
    for model, message in (("smollm2-135m", "runner=train method=cla task=text model=smollm2-135m"),):
        done = kvbench("run", "method=cla", f"model={model}", "task=needle", f"results_dir={tmp_path}")
        assert done.returncode == 2 and message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_folder_of_another_architecture_is_refused(tmp_path):
    shared_model(CLA(2), dtype=torch.float32).save_pretrained(tmp_path)
    local = LocalModel(str(tmp_path))
    assert local.for_sharing(CLA(2), "cla") is local
    with pytest.raises(InputError, match=r"method\.sharing=yoco: needs a model whose kv_source_layers is"):
        local.for_sharing(YOCO(), "yoco")


@pytest.mark.slow
def test_every_recipe_is_rehearsed(tmp_path, monkeypatch):
    """All arms of the larger trainings, two steps each at toy size; the uptraining starts from a checkpoint.

    The script starts a process for each; here they run in this one.
    """
    spec = importlib.util.spec_from_file_location("train_recipes", ROOT / "scripts" / "train_recipes.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run_here(line, cwd, check, timeout=None):
        python, program, *arguments = line
        assert (python, program, cwd, check) == (sys.executable, "run.py", ROOT, True)
        done = kvbench("run", *arguments)
        assert done.returncode == 0, done.stderr[-2000:]

    there = SimpleNamespace(run=run_here, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(script, "subprocess", there)
    monkeypatch.setattr(sys, "argv", ["train_recipes.py", str(tmp_path), "--rehearse"])
    script.main()
    runs = {
        (r.record["model"], r.label): r for r in read_runs(p.parent for p in tmp_path.glob("text-*/**/record.json"))
    }
    scratch = {"full", "cla2", "cla3", "yoco", "lckv-w2", "pizza-bottom-4", "sandwich-middle-3"}
    assert {label for model, label in runs if model == "llama-50m"} == scratch
    assert {label for model, label in runs if model == "llama-110m"} == {"full", "lckv-w2"}
    (toy,) = {model for model, _ in runs} - {"llama-50m", "llama-110m"}  # the folder of the checkpoint
    uptrained = {label: r.record["identity"]["train"] for (model, label), r in runs.items() if model == toy}
    assert set(uptrained) == {"cla2", "cla3", "yoco-full", "yoco", "lckv-w2", "lckv-w10"}
    assert all(r.done and (r.path / "model" / "config.json").is_file() for r in runs.values())
    assert all(t["distill"]["weight"] == 1 and t["init"] == "mean" for t in uptrained.values())
