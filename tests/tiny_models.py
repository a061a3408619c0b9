"""Tiny random models of the three architectures the contract tests run on, and small helpers around them."""

from __future__ import annotations

from functools import cache as memoize

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 101
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    # Large weights make peaked attention: with the default, every token gets the same share and no method can go wrong.
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@memoize
def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float64, kv_heads: int = 2):
    """A random causal LM; float64 by default, so that tolerances can be tight."""
    shape = SHAPE | {"num_key_value_heads": kv_heads}
    torch.manual_seed(0)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape))
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(**shape, sliding_window=None))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**shape))
    model.generation_config.pad_token_id = 0
    return model.to(dtype).eval()


def prompt_ids(length: int, seed: int = 0) -> torch.Tensor:
    """[1, length] ids, none of them the pad id 0."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(1, VOCABULARY, (1, length), generator=generator)


def left_pad(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) [B, T] of prompts of different lengths."""
    width = max(p.shape[1] for p in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, p in enumerate(prompts):
        ids[row, width - p.shape[1] :] = p
        mask[row, width - p.shape[1] :] = 1
    return ids, mask
