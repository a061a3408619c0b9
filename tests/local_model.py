"""A tiny random model with a tokenizer, saved as a folder, and LongBench rows for it: a whole run in seconds."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.core.global_hydra import GlobalHydra
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def save_local_model(folder: Path) -> Path:
    """A 2-layer Llama over bytes; 1024 positions."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        initializer_range=0.2,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_rows(folder: Path, dataset: str, count: int, words: int = 40) -> None:
    """``count`` rows in the official schema."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{dataset}.jsonl").open("w") as file:
        for i in range(count):
            row = {
                "input": f"What is number {i}?",
                "context": " ".join(f"w{i}-{j}" for j in range(words + i % 7)),
                "answers": [f"w{i}"],
                "length": words,
                "dataset": dataset,
                "language": "en",
                "all_classes": None,
                "_id": f"{dataset}-{i}",
            }
            file.write(json.dumps(row) + "\n")


@dataclass
class Done:
    """What a command left: exit status and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def kvbench(*args: str) -> Done:
    """``kvbench ARGS`` in this process: starting Python and torch anew for each case would take most of the time."""
    from kvbench.runners.command import main

    out, errors = io.StringIO(), io.StringIO()
    GlobalHydra.instance().clear()
    with redirect_stdout(out), redirect_stderr(errors):
        try:
            status = main(args) or 0
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Done(status, out.getvalue(), errors.getvalue())
