"""What bfloat16 changes in what is kept, on the real model's own queries and keys."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from contract_settings import every_nth
from test_contract import NAMES, make
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kvbench.methods.cache.kv_shape import kv_shape
from kvbench.methods.cache.layer import CacheLayer
from kvbench.methods.cache.method import Method
from kvbench.methods.cache.prompt import ALL_QUERIES, Prompt
from kvbench.methods.cache.rotary import Rotary
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.model_layer import ModelLayer
from kvbench.runners.engine import prefill

TEXT = Path(__file__).resolve().parents[2] / "LICENSE"
LAYERS = (0, 9, 19, 28)


@pytest.fixture(scope="module")
def prompts(smollm2) -> dict[torch.dtype, dict[int, Prompt]]:
    """What four layers see of 600 tokens of real text, with all queries, in both dtypes."""
    ids = torch.tensor([smollm2.tokenizer(TEXT.read_text(encoding="utf-8")).input_ids[:600]])
    seen: dict[torch.dtype, dict[int, Prompt]] = {}
    finish_prefill = CacheLayer.finish_prefill
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(smollm2.model).to(dtype)
        mine = seen.setdefault(dtype, {})

        def keep(self, groups, mine=mine):
            mine[self.layer_idx] = groups[0][1]
            finish_prefill(self, groups)

        cache = Method("full").new_cache(model)
        for layer in cache.layers:
            layer.observation_window = ALL_QUERIES
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CacheLayer, "finish_prefill", keep)
            prefill(model, cache, ids)
    assert kv_shape(smollm2.model.config, torch.float32).layers == 30
    return seen


def kept_sets(method: Method, prompt: Prompt, model) -> list[set[int]]:
    """Tokens that each head keeps, from the queries that the method asks for."""
    window = min(method.policy.capabilities.observation_window, prompt.length)
    query = prompt.query[:, :, prompt.length - window :]
    asked = Prompt(query, prompt.keys, prompt.values, prompt.rule, prompt.layer_idx, prompt.num_layers)
    index, projection = prompt.layer_idx, model.model.layers[prompt.layer_idx].self_attn.o_proj
    heads = prompt.query.shape[1]

    def output_weights() -> list[torch.Tensor]:
        return [projection.weight.detach().T.unflatten(0, (heads, -1)).to(prompt.values.dtype)]  # [H_q, D, hidden]

    def rotary() -> Rotary:
        return Rotary(LlamaRotaryEmbedding(model.config).inv_freq)

    state = method.policy.new_state(ModelLayer(index, index, prompt.num_layers, rotary, output_weights))
    if method.policy.capabilities.narrows_prompt:
        method.policy.select(asked, state)
        (chosen,) = method.policy.next_layer_tokens(state)
        return [set(range(prompt.length) if chosen is None else chosen[0].tolist())]
    kept = method.policy.select(asked, state)
    assert kept.slots is not None
    valid = torch.ones_like(kept.slots, dtype=torch.bool) if kept.valid is None else kept.valid
    return [set(s[v].tolist()) for s, v in zip(kept.slots[0], valid[0], strict=True)]


def selects_by_layer(method: Method) -> bool:
    """Whether a layer's tokens are selected when its prefill ends, without the scores of other layers."""
    policy = method.policy
    if isinstance(policy, EvictionPolicy) and (policy.allocator.spans_layers or policy.scorer.repeats_prompt):
        return False
    return not policy.capabilities.keeps_everything


@pytest.mark.parametrize("text", every_nth(3, NAMES))
def test_the_tokens_kept_in_bfloat16_are_those_of_float32(text, smollm2, prompts):
    """More than 95 % of them, over four layers."""
    if not selects_by_layer(make(text)):
        return
    method, model = make(text, budget=0.8 if text == "pyramid_infer" else 160), smollm2.model
    shared = total = 0
    for layer in LAYERS:
        exact, rounded = (kept_sets(method, prompts[d][layer], model) for d in (torch.float32, torch.bfloat16))
        for a, b in zip(exact, rounded, strict=True):
            shared += len(a & b)
            total += len(a)
    assert shared / total > 0.95
