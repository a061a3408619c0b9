"""Latent attention: the absorbed form against the expanded one, transformers' DeepSeek-V3, and bytes."""

from __future__ import annotations

import json

import pytest
import torch
from sharing_models import LATENT, SHAPE, shared_model
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

from kvbench.analysis.kv_config import KVConfig, latent_bytes
from kvbench.conf.errors import InputError
from kvbench.methods.cache.kv_shape import kv_shape
from kvbench.methods.cache.layout import describe_layers, full_shape
from kvbench.methods.cache.method import Method
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.methods.policies.streaming_llm import StreamingLLM
from kvbench.methods.sharing.heads import Heads
from kvbench.methods.sharing.mla import MLA
from kvbench.methods.storage.kivi import Kivi
from kvbench.models.kvshare.convert import convert
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import decode, prefill

CLOSE = 1e-10  # float64
METHOD = Method("mla", sharing=LATENT)


def ids(length, seed=0, batch=1):
    return torch.randint(2, SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_absorbed_prefill_and_decode_match_an_expanded_forward():
    """In a left-padded batch; the expanded forward makes keys and values of all heads and has no cache."""
    model, steps = shared_model(LATENT), ids(4, 9, batch=2)
    x = ids(20, batch=2)
    x[1, :7] = 0
    mask = (torch.arange(20) >= torch.tensor([[0], [7]])).long()
    cache = METHOD.new_cache(model)
    out = [prefill(model, cache, x, mask)] + [decode(model, cache, token) for token in steps.T]
    model.set_attn_implementation("sdpa")
    for row, pads in enumerate((0, 7)):
        whole = model(torch.cat([x[row : row + 1, pads:], steps[row : row + 1]], dim=1), use_cache=False).logits[0, -5:]
        assert (torch.stack(out)[:, row] - whole).abs().max() < CLOSE


@torch.no_grad()
def test_logits_are_those_of_transformers_deepseek_v3_with_the_same_weights():
    """Expanded, absorbed, and over a cache of transformers; all layers are dense and RoPE pairs by halves."""
    model, x = shared_model(LATENT), ids(18, batch=2)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    latent = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    config = DeepseekV3Config(
        **{key: SHAPE[key] for key in sizes},
        **{key: getattr(LATENT, key) for key in latent},
        num_key_value_heads=SHAPE["num_attention_heads"],
        q_lora_rank=None,
        first_k_dense_replace=SHAPE["num_hidden_layers"],
        rope_interleave=False,
        rope_parameters=model.config.rope_parameters,
        rms_norm_eps=model.config.rms_norm_eps,
    )
    theirs = DeepseekV3ForCausalLM(config).double().eval()
    theirs.load_state_dict(model.state_dict())
    expected = theirs(x, use_cache=False).logits
    assert (model(x, use_cache=False).logits - expected).abs().max() < CLOSE
    for cache in (DynamicCache(config=model.config), METHOD.new_cache(model)):
        parts = [model(part, past_key_values=cache).logits for part in x.split([15, 1, 1, 1], dim=1)]
        assert (torch.cat(parts, dim=1) - expected).abs().max() < CLOSE


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 4])
def test_a_cache_holds_a_latent_and_a_rope_key_a_token(batch):
    model = shared_model(LATENT)
    cache, shape = METHOD.new_cache(model), kv_shape(model.config, model.dtype)
    prefill(model, cache, ids(20, batch=batch))
    held = 6 * 20 * (12 + 4) * 8 * batch  # layers, tokens, latent and RoPE key, float64
    assert cache.kv_bytes_stored == cache.kv_bytes_logical == batch * METHOD.bytes_formula(shape, 20) == held
    counted = KVConfig.from_json(json.loads(model.config.to_json_string(use_diff=False)), "mla")
    assert latent_bytes(counted, batch, 20, 64) == held
    decode(model, cache, ids(batch)[0])
    assert cache.kv_bytes_logical == cache.kv_bytes_read_per_step == batch * METHOD.bytes_formula(shape, 20, 1)
    expanded = 6 * 20 * 4 * (6 + 4 + 8) * 8
    assert Method("full").bytes_formula(full_shape(model, LATENT), 20) == expanded
    assert describe_layers(model)["latents"] == {"held": "latents", "latent_numbers_a_token": 16}


@torch.no_grad()
def test_token_methods_score_latents_by_the_models_own_attention():
    """SnapKV keeps the tokens that the last queries attend to most in the expanded form, as the mean of all heads."""
    model, x, w, budget = shared_model(LATENT), ids(30), 4, 12
    cache = Method("snapkv", EvictionPolicy(SnapKV(window=w, kernel=1), budget)).new_cache(model)
    prefill(model, cache, x)
    held = cache.layers[0].storage.read()[0][0, 0]  # [C, d_R + r]
    model.set_attn_implementation("eager")
    weights = model(x, output_attentions=True, use_cache=False).attentions[0][0, :, -w:, :-w]  # [H, w, T - w]
    best = weights.sum(1).mean(0).topk(budget - w).indices.sort().values
    kept = torch.cat([best, torch.arange(30 - w, 30)])
    full = METHOD.new_cache(model)
    prefill(model, full, x)
    assert torch.equal(held, full.layers[0].storage.read()[0][0, 0, kept])


@torch.no_grad()
def test_a_method_that_repositions_tokens_rotates_the_rope_key():
    """With one layer, which holds no other tokens' influence, this is a forward over the text of the kept tokens."""
    model, x = shared_model(LATENT, num_hidden_layers=1), ids(30)
    cache = Method("streaming_llm", StreamingLLM(budget=12, sinks=4, mode="prefill_evict")).new_cache(model)
    prefill(model, cache, x)
    out = decode(model, cache, ids(1, 5)[0])
    kept = torch.cat([x[:, :4], x[:, -8:], ids(1, 5)], dim=1)
    assert (out - model(kept, use_cache=False).logits[:, -1]).abs().max() < 1e-6  # float32 angles


def test_what_needs_keys_and_values_apart_is_refused():
    model = shared_model(LATENT)
    with pytest.raises(InputError, match=r"^method/storage=kivi4: stores keys and values apart"):
        Method("kivi", storage=Kivi(bits=4)).new_cache(model)
    with pytest.raises(InputError, match=r"^method=cam: changes stored values"):
        named_method("cam budget=48").new_cache(model)
    with pytest.raises(InputError, match=r"^method=criticalkv: weighs values by the output projection"):
        prefill(model, named_method("criticalkv budget=48").new_cache(model), ids(60))
    with pytest.raises(InputError, match="kv_lora_rank is None; this one's is 12"):
        Method("mha", sharing=Heads()).new_cache(model)
    with pytest.raises(InputError, match="kv_lora_rank is 8; this one's is 12"):
        Method("mla", sharing=MLA(8)).new_cache(model)
    with pytest.raises(InputError, match=r"^method\.sharing\.kv_lora_rank=12: differs from the model's None"):
        convert(shared_model(Heads()), LATENT, "mean")
