"""StreamingLLM against a naive stream: one token at a time, keys stored before RoPE, positions counted in the cache."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest
import torch
import torch.nn.functional as F
from tiny_models import SHAPE, left_pad, prompt_ids, tiny_model
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvbench.conf.errors import InputError
from kvbench.methods.cache.method import Method
from kvbench.methods.cache.rotary import Rotary
from kvbench.methods.policies.streaming_llm import StreamingLLM
from kvbench.methods.storage.dense import Dense
from kvbench.methods.storage.kivi import Kivi
from kvbench.runners.engine import decode, feed, generate, prefill

BUDGET, SINKS = 20, 4


def naive_stream(model, ids: torch.Tensor, budget: int, sinks: int, reposition: bool = True) -> torch.Tensor:
    """Logits after every token of ids [1, T], by the paper's description and the model's own weights.

    Each layer's cache is a list of (position, key before RoPE, value). A step appends its own entry, rotates every key
    to its place in the cache (or leaves its true position), attends, and then drops the oldest entry after the sinks.
    """
    layers, rotary = model.model.layers, model.model.rotary_emb
    caches: list[list[tuple[int, torch.Tensor, torch.Tensor]]] = [[] for _ in layers]
    out = []
    for t in range(ids.shape[1]):
        hidden = model.model.embed_tokens(ids[:, t : t + 1])
        for layer, held in zip(layers, caches, strict=True):
            attention, residual = layer.self_attn, hidden
            x = layer.input_layernorm(hidden)
            shape = (1, 1, -1, attention.head_dim)
            q, k, v = (p(x).view(shape).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
            held.append((t, k, v))
            places = list(range(len(held))) if reposition else [position for position, _, _ in held]
            keys = torch.cat([k for _, k, _ in held], 2)
            values = torch.cat([v for _, _, v in held], 2)
            cos, sin = rotary(values, torch.tensor([places]))
            _, keys = apply_rotary_pos_emb(keys, keys, cos, sin)
            cos, sin = rotary(values, torch.tensor([[places[-1]]]))
            q, _ = apply_rotary_pos_emb(q, q, cos, sin)
            groups = q.shape[1] // keys.shape[1]
            keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
            weights = torch.softmax(q @ keys.transpose(-1, -2) * attention.scaling, -1)
            hidden = residual + attention.o_proj((weights @ values).transpose(1, 2).reshape(1, 1, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            if len(held) > budget:
                del held[sinks]
        out.append(model.lm_head(model.model.norm(hidden))[:, -1])
    return torch.stack(out)


@pytest.mark.parametrize("reposition", [True, False])
@pytest.mark.parametrize("sinks", [0, 1, 4])
@torch.no_grad()
def test_stream_matches_the_naive_stream(sinks, reposition):
    """ST4: rotating the query back for the sinks equals keys stored before RoPE with positions inside the cache."""
    model, ids = tiny_model(), prompt_ids(60)
    expected = naive_stream(model, ids, BUDGET, sinks, reposition)
    method = Method("streaming_llm", StreamingLLM(budget=BUDGET, sinks=sinks, reposition=reposition))
    for prompt in (1, 15, 40):
        cache = method.new_cache(model)
        ours = [prefill(model, cache, ids[:, :prompt])]
        ours += [decode(model, cache, ids[:, t]) for t in range(prompt, 60)]
        # RoPE's angles are float32 in transformers, whatever the model's dtype.
        assert (torch.stack(ours) - expected[prompt - 1 :]).abs().max() < 2e-4


def test_the_comparison_with_the_naive_stream_can_fail():
    model, ids = tiny_model(), prompt_ids(60)
    with torch.no_grad():
        placed = naive_stream(model, ids, BUDGET, SINKS, reposition=True)
        true = naive_stream(model, ids, BUDGET, SINKS, reposition=False)
    assert (placed - true).abs().max() > 0.1


@pytest.mark.parametrize("mode", ["true_stream", "prefill_evict"])
def test_multi_token_decode_matches_single_steps(mode):
    """ST5, in a left-padded batch; 300 tokens cross the block boundary inside the layer."""
    model = tiny_model()
    method = Method("streaming_llm", StreamingLLM(budget=BUDGET, mode=mode))
    ids, mask = left_pad([prompt_ids(50, 1), prompt_ids(9, 2)])
    more = torch.cat([prompt_ids(300, 3), prompt_ids(300, 4)])
    one_by_one, at_once = method.new_cache(model), method.new_cache(model)
    prefill(model, one_by_one, ids, mask)
    for t in range(300):
        last = decode(model, one_by_one, more[:, t])
    prefill(model, at_once, ids, mask)
    with torch.inference_mode():
        positions = at_once.tokens_seen[:, None] + torch.arange(300)
        out = model(input_ids=more, position_ids=positions, past_key_values=at_once, use_cache=True)
    assert (out.logits[:, -1] - last).abs().max() < 2e-4
    assert all((t == BUDGET).all() for t in at_once.tokens_held)


def naive_prefill_only(model, prompt, tokens, budget: int, sinks: int) -> torch.Tensor:
    """Logits after each of ``tokens``: full prefill, one eviction, then keys before RoPE at their places in the cache.

    The newest token's place is the number of held tokens before it, as it is in the paper's stream.
    """
    layers, rotary = model.model.layers, model.model.rotary_emb
    out = model(input_ids=prompt, output_hidden_states=True)
    kept = [*range(sinks), *range(prompt.shape[1] - budget + sinks, prompt.shape[1])]
    caches = []
    for layer, hidden in zip(layers, out.hidden_states[:-1], strict=True):
        x = layer.input_layernorm(hidden)
        shape = (1, prompt.shape[1], -1, layer.self_attn.head_dim)
        k, v = (p(x).view(shape).transpose(1, 2) for p in (layer.self_attn.k_proj, layer.self_attn.v_proj))
        caches.append([k[:, :, kept], v[:, :, kept]])
    logits = []
    for token in tokens:
        hidden = model.model.embed_tokens(token[None])
        for layer, held in zip(layers, caches, strict=True):
            attention, residual = layer.self_attn, hidden
            x = layer.input_layernorm(hidden)
            shape = (1, 1, -1, attention.head_dim)
            q, k, v = (p(x).view(shape).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
            held[0], held[1] = torch.cat([held[0], k], 2), torch.cat([held[1], v], 2)
            cos, sin = rotary(v, torch.arange(held[0].shape[2])[None])
            _, keys = apply_rotary_pos_emb(held[0], held[0], cos, sin)
            q, _ = apply_rotary_pos_emb(q, q, cos[:, -1:], sin[:, -1:])
            groups = q.shape[1] // keys.shape[1]
            keys, values = keys.repeat_interleave(groups, 1), held[1].repeat_interleave(groups, 1)
            weights = torch.softmax(q @ keys.transpose(-1, -2) * attention.scaling, -1)
            hidden = residual + attention.o_proj((weights @ values).transpose(1, 2).reshape(1, 1, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits.append(model.lm_head(model.model.norm(hidden))[:, -1])
    return torch.stack(logits)


@torch.no_grad()
@pytest.mark.parametrize("storage", ["dense", "kivi8"])
def test_prefill_only_evicts_once_and_counts_positions_in_the_cache(storage):
    """In a padded batch whose second row is too short for an eviction; also with multi-token steps."""
    model = tiny_model()
    held = Dense() if storage == "dense" else Kivi(bits=8, group=8, residual=16)
    selection = StreamingLLM(budget=BUDGET, mode="prefill_evict", prefill_only=True)
    method = Method("streaming_llm", selection, held)
    prompts = [prompt_ids(50, 1), prompt_ids(9, 2)]
    more = torch.cat([prompt_ids(30, 3), prompt_ids(30, 4)])
    expected = naive_prefill_only(model, prompts[0], more[0, :, None], BUDGET, SINKS)[:, 0]
    cache, several = (method.new_cache(model) for _ in range(2))
    ids, mask = left_pad(prompts)
    prefill(model, cache, ids, mask)
    prefill(model, several, ids, mask)
    ours = torch.stack([decode(model, cache, more[:, t]) for t in range(30)])
    assert (ours[:, 0] - expected).abs().max() < (2e-4 if storage == "dense" else 0.5)
    assert [t.flatten().unique().tolist() for t in cache.tokens_held] == [[9 + 30, BUDGET + 30]] * 3
    full = Method("full").new_cache(model)
    prefill(model, full, prompts[1])
    plain = torch.stack([decode(model, full, more[1:, t]) for t in range(30)])
    assert (ours[:, 1] - plain[:, 0]).abs().max() < (1e-9 if storage == "dense" else 0.5)
    if storage == "dense":
        together = torch.cat(list(feed(model, several, more)), dim=1).transpose(0, 1)
        assert (together - ours).abs().max() < 1e-9


def test_prefill_only_of_a_stream_is_one_line():
    with pytest.raises(InputError, match=r"method\.policy\.prefill_only=True: .*mode=prefill_evict$"):
        StreamingLLM(budget=BUDGET, prefill_only=True)


def test_budget_is_never_exceeded_and_sinks_are_kept():
    model, ids = tiny_model(), prompt_ids(70)
    cache = Method("streaming_llm", StreamingLLM(budget=BUDGET)).new_cache(model)
    prefill(model, cache, ids)
    sinks = [layer.storage.read()[0][:, :, :SINKS].clone() for layer in cache.layers]
    for step in range(30):
        decode(model, cache, prompt_ids(1, seed=step)[0])
        assert all((t == BUDGET).all() for t in cache.tokens_held)
    for layer, before in zip(cache.layers, sinks, strict=True):
        assert torch.equal(layer.storage.read()[0][:, :, :SINKS], before)


def test_memory_does_not_grow_with_the_stream():
    model = tiny_model()
    method = Method("streaming_llm", StreamingLLM(budget=BUDGET))
    sizes = []
    for length in (400, 1600):
        cache = method.new_cache(model)
        generate(model, cache, prompt_ids(length), max_new_tokens=20)
        sizes.append(cache.kv_bytes_stored)
    assert sizes[0] == sizes[1]


def test_evicted_tokens_do_not_affect_a_long_stream():
    """In true streaming with L layers, a token L windows back has no effect; after a full prefill it has."""
    model = tiny_model()
    ids = prompt_ids(400)
    changed = ids.clone()
    changed[0, 200] = 1 + changed[0, 200] % 99
    for mode, felt in (("true_stream", False), ("prefill_evict", True)):
        method = Method("streaming_llm", StreamingLLM(budget=BUDGET, mode=mode))
        a, b = (prefill(model, method.new_cache(model), x) for x in (ids, changed))
        assert bool((a - b).abs().max() > 1e-6) is felt


@pytest.mark.slow
@pytest.mark.real_model
@torch.inference_mode()
def test_a_real_model_needs_the_sinks(smollm2):
    """ST3, the paper's Table 2 in small: far beyond the window the loss stays finite, and explodes without sinks."""
    rows = files("kvbench.tasks").joinpath("data", "longbench_mini", "narrativeqa.jsonl").read_text(encoding="utf-8")
    prose = " ".join(json.loads(row)["context"] for row in rows.splitlines()[:2])
    ids = smollm2.tokenizer(prose, return_tensors="pt").input_ids[:, :1200]
    loss = {}
    for sinks in (0, 4):
        cache = Method("streaming_llm", StreamingLLM(budget=256, sinks=sinks)).new_cache(smollm2.model)
        logits = smollm2.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0]
        loss[sinks] = F.cross_entropy(logits[600:-1].float(), ids[0, 601:]).item()
        assert all((t == 256).all() for t in cache.tokens_held)
    assert loss[4] < 5.0
    assert loss[0] > loss[4] + 0.5


@pytest.mark.parametrize("rope", ["default", "linear", "llama3", "yarn"])
def test_rotation_matches_rope_at_the_shifted_position(rope):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": rope, "rope_theta": 10000.0}
    if rope != "default":
        parameters["factor"] = 4.0
    if rope in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = 256
    if rope == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(head_dim=16, num_attention_heads=4, hidden_size=64, rope_parameters=parameters)
    embedding = LlamaRotaryEmbedding(config)
    x = torch.randn(1, 2, 3, 16, generator=torch.Generator().manual_seed(0))
    at = lambda p: apply_rotary_pos_emb(x, x, *embedding(x, torch.tensor([p])))[0]  # noqa: E731
    turned = Rotary(embedding.inv_freq).rotate(at([5, 90, 700]), torch.tensor([[3, -40, 300]]))
    assert (turned - at([8, 50, 1000])).abs().max() < 1e-4


def test_models_without_a_constant_rotation_are_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=rope)).eval()
    with pytest.raises(InputError, match="reposition"):
        Method("streaming_llm", StreamingLLM(budget=16)).new_cache(model)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"budget": 4}, "method.policy.sinks"),
        ({"sinks": -1}, "method.policy.sinks"),
        ({"budget": 0.5}, "method.budget"),
        ({"budget": 0}, "method.budget"),
        ({"mode": "stream"}, "method.policy.mode"),
        ({"reposition": "yes"}, "method.policy.reposition"),
        ({"prefill_only": 1, "mode": "prefill_evict"}, "method.policy.prefill_only"),
        ({"prefill_only": True}, "method.policy.prefill_only"),
    ],
)
def test_invalid_values_name_the_key(options, key):
    with pytest.raises(InputError) as error:
        StreamingLLM(**options)
    assert error.value.key == key
