"""What a model asks of its attention is computed, or the model is refused: windows, caps, sinks, latents, states."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny_models import SHAPE, left_pad, prompt_ids, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from kvbench.conf.errors import InputError
from kvbench.methods.cache.attention import kvbench_attention, use_kvbench_attention
from kvbench.methods.cache.fan_out import FanOutCache
from kvbench.methods.cache.layout import layout_of, model_shape, rotary_of
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.method import Method
from kvbench.methods.cache.products import causal_attention, masked_attention, uncached_attention
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.no_cache import NoCache
from kvbench.methods.policies.scorers.attention_sums import AttentionSums
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.methods.policies.streaming_llm import StreamingLLM
from kvbench.methods.sharing.kv_map import SLIDING
from kvbench.methods.sharing.plan import CHUNKED, Span, plan_of
from kvbench.methods.storage.kivi import Kivi
from kvbench.methods.storage.minicache.storage import MiniCache
from kvbench.runners.engine import decode, feed, generate, prefill

PROMPT, STEPS = 64, 8


def model_of(kind: str, dtype: torch.dtype = torch.float64, **settings):
    """A random model of an architecture; sinks, where it has some, are drawn wide enough to matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE | {"num_hidden_layers": 4} | settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    for module in model.modules():
        if isinstance(getattr(module, "sinks", None), torch.nn.Parameter):
            torch.nn.init.normal_(module.sinks, std=1.5)
    model.generation_config.pad_token_id = 0
    return model


MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "window below the prompt": ("mistral", {"sliding_window": 20}),
    "window crossed while decoding": ("mistral", {"sliding_window": 68}),
    "soft cap and windows": (
        "gemma2",
        {"sliding_window": 24, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    ),
    "two kinds of RoPE": ("gemma3_text", {"sliding_window": 24}),
    "sinks": ("gpt_oss", {"sliding_window": 24, "dtype": torch.float32, **MOE}),
    "chunks": ("llama4_text", {"attention_chunk_size": 32, "intermediate_size_mlp": 96, "num_local_experts": 2}),
    "chunks crossed while decoding": (
        "llama4_text",
        {"attention_chunk_size": 68, "intermediate_size_mlp": 96, "num_local_experts": 2},
    ),
    "windows in the mask alone": ("phimoe", {"sliding_window": 32, "dtype": torch.float32, "num_local_experts": 4}),
    "latents": (
        "deepseek_v2",
        {
            "dtype": torch.float32,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 3,
            "moe_intermediate_size": 32,
            "num_key_value_heads": 4,
        },
    ),
    "recurrent layers": (
        "qwen3_next",
        {
            "dtype": torch.float32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
}


def build(name: str):
    kind, settings = MODELS[name]
    settings = dict(settings)
    if kind == "deepseek_v2":
        settings["head_dim"] = 8
    return model_of(kind, settings.pop("dtype", torch.float64), **settings)


def close(model) -> float:
    """Tolerance; the exponentials of a recurrence lose more of float32 than attention does."""
    if model.dtype == torch.float64:
        return 5e-6  # transformers' RoPE is in float32
    return 1e-3 if plan_of(model.config).recurrent else 1e-4


@torch.no_grad()
def own_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """The model's own eager attention and cache, [steps, vocabulary]: behind the prompt and each further token."""
    cache, out = DynamicCache(config=model.config.get_text_config()), []
    for start, end in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, PROMPT + STEPS))]:
        at = torch.arange(start, end)[None]
        out.append(model(ids[:, start:end], position_ids=at, past_key_values=cache, use_cache=True).logits[0, -1])
    return torch.stack(out)


def cached_logits(model, method: Method, ids: torch.Tensor, chunk_size: int | None = None) -> torch.Tensor:
    cache = method.new_cache(model)
    out = [prefill(model, cache, ids[:, :PROMPT], None, chunk_size)[0]]
    return torch.stack(out + [decode(model, cache, ids[:, t])[0] for t in range(PROMPT, PROMPT + STEPS)])


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def methods_on(model, *methods: Method) -> list[Method]:
    """``full`` and, where a layer attends over all tokens, the others; where none does, they are refused."""
    if model_shape(use_kvbench_attention(model)).layers:
        return [Method("full"), *methods]
    for method in methods:
        with pytest.raises(InputError, match=f"method={method.name}: works on layers that attend over all tokens"):
            method.new_cache(model)
    return [Method("full")]


@pytest.mark.parametrize("name", MODELS)
def test_full_snapkv_with_room_and_no_cache_are_the_model(name):
    model, ids = build(name), prompt_ids(PROMPT + STEPS)
    expected = own_logits(model, ids)
    exact_kivi = Method("kivi8", storage=Kivi(bits=8, group=4, residual=128))  # nothing is old enough to be rounded
    methods = methods_on(model, Method("snapkv", EvictionPolicy(SnapKV(window=8), 200)), exact_kivi)
    for method in (*methods, NoCache("no_cache")):
        assert error(cached_logits(model, method, ids), expected) < close(model), method.name
    if not layout_of(model).plan.recurrent:
        assert error(cached_logits(model, Method("full"), ids, 16), expected) < close(model)


@pytest.mark.parametrize("name", MODELS)
def test_a_padded_batch_several_tokens_and_a_fan_out_are_each_row_alone(name):
    model = build(name)
    prompts = [prompt_ids(PROMPT, 1), prompt_ids(37, 2), prompt_ids(9, 3)]
    ids, mask = left_pad(prompts)
    tokens = torch.cat([prompt_ids(STEPS, 10 + row) for row in range(3)])
    methods = methods_on(
        model,
        Method("snapkv", EvictionPolicy(SnapKV(window=4), 12)),
        Method("h2o", EvictionPolicy(AttentionSums(), 12)),
    )
    alone = {}
    for method in methods:
        for row, prompt in enumerate(prompts):
            cache = method.new_cache(model)
            out = [prefill(model, cache, prompt)[0]]
            alone[method.name, row] = torch.stack([*out, *(decode(model, cache, t[None])[0] for t in tokens[row])])
    fan_out = FanOutCache([method.new_cache(model) for method in methods])
    together = [prefill(model, fan_out, ids, mask)]
    together += [decode(model, fan_out, tokens[:, t].repeat(len(methods))) for t in range(STEPS)]
    for i, method in enumerate(methods):
        cache = method.new_cache(model)
        several = [prefill(model, cache, ids, mask)[:, None], *feed(model, cache, tokens)]
        several = torch.cat(several, dim=1)
        for row in range(3):
            expected = alone[method.name, row]
            assert error(torch.stack(together)[:, 3 * i + row], expected) < close(model)
            assert error(several[row], expected) < close(model)


@pytest.mark.parametrize("name", MODELS)
def test_generate_is_the_engine_and_bytes_are_the_formula(name):
    model = build(name)
    snapkv, minicache = (
        Method("snapkv", EvictionPolicy(SnapKV(window=4), 12)),
        Method("minicache", storage=MiniCache(0)),
    )
    for method in methods_on(model, snapkv, minicache):
        ids = torch.cat([prompt_ids(PROMPT, 1), prompt_ids(PROMPT, 2)])
        cache = method.new_cache(model)
        ours = generate(model, cache, ids, max_new_tokens=STEPS)
        theirs = model.generate(ids, past_key_values=method.new_cache(model), max_new_tokens=STEPS, do_sample=False)
        assert theirs[:, PROMPT:].tolist() == ours.tokens
        if method.storage.capabilities.lossless:
            assert cache.kv_bytes_logical == 2 * method.bytes_formula(model_shape(model), PROMPT, STEPS - 1)
        assert cache.kv_bytes_stored >= cache.kv_bytes_logical


def test_windows_and_chunks_store_only_visible_tokens():
    model = build("soft cap and windows")  # every other layer of four slides over 24 tokens
    cache = Method("snapkv", EvictionPolicy(SnapKV(window=4), 40)).new_cache(model)
    prefill(model, cache, prompt_ids(PROMPT))
    assert [int(t.max()) for t in cache.tokens_held] == [23, 40, 23, 40]
    a_token = 2 * 2 * 16 * 8
    assert cache.kv_bytes_logical == (2 * 23 + 2 * 40) * a_token
    model = build("chunks")
    chunks = Method("full").new_cache(model)  # 64 tokens are two whole chunks of 32: the next one sees none
    prefill(model, chunks, prompt_ids(PROMPT))
    assert [int(t.max()) for t in chunks.tokens_held] == [0, 0, 0, 64]


@pytest.mark.parametrize("span", [Span(SLIDING, 5), Span(CHUNKED, 4), None])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_is_its_definition(span, softcap, with_sinks):
    """Token by token in float64: scale, cap, mask, sink, softmax, values of another width."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 4, 13, 8, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 2, 13, 8, generator=generator, dtype=torch.float64)
    value = torch.randn(2, 2, 13, 6, generator=generator, dtype=torch.float64)
    sinks = torch.randn(4, generator=generator, dtype=torch.float64) if with_sinks else None
    expected = torch.zeros(2, 4, 13, 6, dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            for i in range(13):
                seen = [j for j in range(i + 1) if span is None or j >= span.first_visible(i)]
                logits = torch.stack([query[b, h, i] @ key[b, h // 2, j] * 0.7 for j in seen])
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                total = logits.exp().sum() + (0 if sinks is None else sinks[h].exp())
                expected[b, h, i] = (logits.exp() / total) @ value[b, h // 2, seen]
    rule = LogitRule(0.7, softcap, sinks)
    torch.testing.assert_close(causal_attention(query, key, value, rule, span=span), expected)
    torch.testing.assert_close(causal_attention(query[:, :, 9:], key, value, rule, span=span), expected[:, :, 9:])
    mask = torch.ones(2, 17, dtype=torch.bool)
    mask[:, :4] = False
    padded = [torch.nn.functional.pad(x, (0, 0, 4, 0)) for x in (query, key, value)]
    out = uncached_attention(*padded, rule, mask, span=span)
    torch.testing.assert_close(out[:, :, 4:], expected)
    assert (out[:, :, :4] == 0).all()


def test_scores_have_the_cap_and_the_sinks_in_them():
    """H2O's sums over a prompt are those of the model's own weights: with sinks, rows add up to less than one."""
    from kvbench.methods.cache.prompt import Prompt
    from kvbench.methods.policies.scorers.attention_sums import attention_received

    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, h, 9, 8, generator=generator) for h in (4, 2))
    rule = LogitRule(1.0, 2.0, torch.tensor([0.5, -1.0, 2.0, 0.0]))
    identity = torch.eye(9).expand(1, 2, 9, 9)  # values that make the output the weights
    weights = causal_attention(query, key, identity, rule)[0]  # [H_q, n, T]
    expected = weights.sum(1).unflatten(0, (2, 2)).mean(1)
    found = attention_received(Prompt(query, key, key, rule, 0, 1))[0]
    torch.testing.assert_close(found, expected)
    assert float(found.sum()) < 0.95 * 2 * 9


def test_unknown_keywords_are_refused_by_name():
    model = use_kvbench_attention(copy.deepcopy(tiny_model()))
    attention = model.model.layers[1].self_attn
    own = attention.forward
    attention.forward = lambda *args, **kwargs: own(*args, **kwargs | {"position_bias": torch.zeros(1)})
    for run in (lambda: model(prompt_ids(5), use_cache=False), lambda: Method("full").new_cache(model)):
        with pytest.raises(InputError, match=r"model=LlamaAttention: position_bias=a tensor \[1\]: is not implemented"):
            run()
    model.model.layers[1].self_attn.forward = lambda *args, **kwargs: own(*args, **kwargs | {"position_bias": None})
    assert model(prompt_ids(5), use_cache=False).logits.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "settings", "problem"),
    [
        ("bloom", {"n_head": 4, "n_layer": 2}, "has its own attention code"),
        ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}, "has its own attention code"),
        ("roberta", {"is_decoder": True}, "does not count positions from 0"),
        ("mamba", {"state_size": 4}, "no attention layers"),
    ],
)
def test_models_that_cannot_work_are_refused_when_the_cache_is_made(kind, settings, problem):
    torch.manual_seed(0)
    shape = {key: value for key, value in SHAPE.items() if key != "head_dim"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape | settings)).eval()
    for method in (Method("full"), Method("snapkv", EvictionPolicy(SnapKV(window=4), 8)), NoCache("no_cache")):
        with pytest.raises(InputError, match=problem) as refused:
            method.new_cache(model)
        assert "\n" not in str(refused.value)


def test_an_encoder_decoder_is_refused():
    config = AutoConfig.for_model("t5", d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=32)
    from transformers import T5ForConditionalGeneration

    with pytest.raises(InputError, match="encoder-decoder"):
        Method("full").new_cache(T5ForConditionalGeneration(config))


def test_a_config_that_claims_a_window_its_code_does_not_have_is_refused():
    model = copy.deepcopy(tiny_model())
    model.config.sliding_window = 16
    with pytest.raises(InputError, match=r"layer 0 attends over all tokens by its code and over .*16.* by its config"):
        Method("full").new_cache(model)


def test_a_longer_text_read_before_changes_nothing_for_dynamic_rope():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = model_of("llama", max_position_embeddings=32, rope_parameters=rope)
    ids, longer = prompt_ids(PROMPT + STEPS), prompt_ids(200, 5)
    for method in (Method("full"), NoCache("no_cache")):
        first = cached_logits(model, method, ids)
        prefill(model, method.new_cache(model), longer)
        assert torch.equal(cached_logits(model, method, ids), first)


def test_longrope_keeps_a_compressed_cache_and_refuses_to_pass_its_length():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]}
    model = model_of("phi3", max_position_embeddings=272, original_max_position_embeddings=68, rope_parameters=rope)
    method, tokens = Method("snapkv", EvictionPolicy(SnapKV(window=4), 16)), []

    def generate_by_transformers(model, cache, ids, max_new_tokens):
        return model.generate(ids, past_key_values=cache, max_new_tokens=max_new_tokens, do_sample=False)

    for run in (generate_by_transformers, generate):  # above that length from the start
        cache = method.new_cache(model)
        out = run(model, cache, prompt_ids(80), max_new_tokens=STEPS)
        assert [int(t.max()) for t in cache.tokens_held] == [16 + STEPS - 1] * 4
        tokens.append(out[:, 80:].tolist() if isinstance(out, torch.Tensor) else out.tokens)
    assert tokens[0] == tokens[1]
    for run in (generate_by_transformers, generate):  # passed while decoding: transformers reads all tokens again
        with pytest.raises(InputError, match="beyond 68 tokens"):
            run(model, method.new_cache(model), prompt_ids(PROMPT), max_new_tokens=STEPS)


def test_a_used_cache_takes_further_turns_and_no_other_prompt():
    model, method = tiny_model(), Method("full")
    cache = method.new_cache(model)
    first = model.generate(prompt_ids(20), past_key_values=cache, max_new_tokens=4, do_sample=False)
    turn = torch.cat([first, prompt_ids(6, 3)], dim=1)
    again = model.generate(turn, past_key_values=cache, max_new_tokens=4, do_sample=False)
    fresh = model.generate(turn, past_key_values=method.new_cache(model), max_new_tokens=4, do_sample=False)
    assert again.tolist() == fresh.tolist()
    with pytest.raises(InputError, match="make a new one"):
        model.generate(prompt_ids(9, 7), past_key_values=cache, max_new_tokens=4, do_sample=False)
    with pytest.raises(InputError, match="make a new one"):
        prefill(model, cache, prompt_ids(50))
    new = method.new_cache(model)
    with pytest.raises(InputError, match="begins a new text in a used cache"):
        model.generate(prompt_ids(9), past_key_values=new, use_cache=False, max_new_tokens=4, do_sample=False)


def test_a_prompt_of_no_tokens_a_mask_of_four_dimensions_and_dropout_are_refused():
    model = copy.deepcopy(tiny_model())
    with pytest.raises(InputError, match="no tokens"):
        prefill(model, Method("full").new_cache(model), torch.zeros(1, 0, dtype=torch.int64))
    cache = Method("full").new_cache(model)
    with pytest.raises(InputError, match="attention_mask=of 4 dimensions"):
        model(prompt_ids(4), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool), past_key_values=cache)
    model.model.layers[0].self_attn.attention_dropout = 0.1
    model.train()
    with pytest.raises(InputError, match=r"dropout=0.1: is for training; call model.eval\(\)"):
        model(prompt_ids(4), use_cache=False)


def test_vision_towers_keep_their_attention_and_decoders_are_restored():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SHAPE), image_token_index=99)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    before = (model.config.text_config._attn_implementation, model.config.vision_config._attn_implementation)
    ids = torch.cat([torch.full((1, 4), 99), prompt_ids(8) % 90 + 1], dim=1)
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    how = {"pixel_values": pixels, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **how)
    with kvbench_attention(model):
        assert model.config.text_config._attn_implementation == "kvbench"
        assert model.config.vision_config._attn_implementation == before[1]
        found = model.generate(ids, past_key_values=Method("full").new_cache(model), **how)
    assert found.tolist() == expected.tolist()
    assert model.config.text_config._attn_implementation == before[0]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}),
        ("llama4_text", {"intermediate_size_mlp": 96, "num_local_experts": 2, "attention_chunk_size": 4096}),
        ("cohere", {}),
        ("gemma3_text", {"sliding_window": 4096}),
        ("phi", {"partial_rotary_factor": 0.5}),
        ("glm", {"partial_rotary_factor": 0.5}),
    ],
)
def test_the_rotation_of_keys_is_measured_layer_by_layer(kind, settings):
    """Rotated keys match the model's own keys at the other position, for every channel pairing."""
    from kvbench.methods.cache.layout import run_probe

    model = model_of(kind, **settings)
    use_kvbench_attention(model)
    plan = layout_of(model).plan
    (first, _), (second, _) = (run_probe(model, plan, position) for position in (5, 905))
    for layer in plan.attending:
        rotated = rotary_of(model, layer, "m").rotate(first.keys[layer][None, :, None], torch.tensor([[900]]))[0, :, 0]
        assert (rotated - second.keys[layer]).abs().max() < 1e-3 * second.keys[layer].abs().max()


def test_re_positioning_needs_a_rotation():
    model = model_of("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=256)
    with pytest.raises(InputError, match="method=streaming_llm: re-positions tokens"):
        Method("streaming_llm", StreamingLLM(budget=16)).new_cache(model)
    ids = prompt_ids(PROMPT + STEPS)
    assert (
        cached_logits(model, Method("streaming_llm", StreamingLLM(budget=16, reposition=False)), ids).isfinite().all()
    )


def test_re_positioning_changes_nothing_where_no_layer_has_rope():
    model = model_of("smollm3", no_rope_layers=[0, 0, 0, 0])
    ids = prompt_ids(PROMPT + STEPS)
    with_it, without = (
        cached_logits(model, Method("streaming_llm", StreamingLLM(budget=16, reposition=r)), ids) for r in (True, False)
    )
    torch.testing.assert_close(with_it, without)


def test_shared_keys_are_stored_once():
    settings = {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 24,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 101,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [96] * 4,
    }
    model, ids = model_of("gemma3n_text", **settings), prompt_ids(PROMPT + STEPS)
    assert error(cached_logits(model, Method("full"), ids), own_logits(model, ids)) < 1e-6
    cache, theirs = Method("full").new_cache(model), DynamicCache(config=model.config)
    prefill(model, cache, ids[:, :PROMPT])
    assert len(cache.layers) == 2
    assert cache.kv_bytes_logical == (23 + PROMPT) * 2 * 2 * 16 * 8
    with kvbench_attention(model):
        pass
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=theirs, use_cache=True)
    held = sum(x.nbytes for layer in theirs.layers for x in (layer.keys, layer.values) if x is not None)
    assert cache.kv_bytes_logical == held  # transformers' window, too, holds one token less than it shows


def test_masked_attention_gives_values_of_another_width():
    query, key, value = (torch.randn(1, 2, 3, d) for d in (8, 8, 5))
    assert masked_attention(query, key, value, LogitRule(1.0), None).shape == (1, 2, 3, 5)


def test_a_record_says_which_layers_a_method_works_on(tmp_path):
    from local_model import kvbench, save_local_model, save_rows
    from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

    folder, data, results = tmp_path / "gemma", tmp_path / "data", tmp_path / "results"
    tokenizer = AutoTokenizer.from_pretrained(save_local_model(folder))
    shape = SHAPE | {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, "num_hidden_layers": 4}
    types = ["sliding_attention", "full_attention"] * 2
    Gemma3ForCausalLM(Gemma3TextConfig(**shape, sliding_window=32, layer_types=types)).save_pretrained(folder)
    save_rows(data, "qasper", 2)
    run = (
        "run",
        "model=local",
        f"model.path={folder}",
        "model.max_prompt_tokens=200",
        "method=snapkv",
        "method.budget=40",
    )
    done = kvbench(*run, "task=longbench", f"task.data_dir={data}", "task.datasets=[qasper]", f"results_dir={results}")
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in results.rglob("record.json")]
    assert {record["method"] for record in records} == {"full", "snapkv"}
    windows = [{"kind": "sliding_attention", "tokens": 32, "layers": 2}]
    assert all(record["cache_layers"] == {"full_attention": 2, "local": windows} for record in records)
