"""Prefill, decode and generation: the drawing of tokens, and the real model against transformers' own generate."""

from __future__ import annotations

import copy
import json
from importlib.resources import files

import pytest
import torch
from tiny_models import SHAPE, left_pad, prompt_ids, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from kvbench.methods.cache import products
from kvbench.methods.cache.cpu_threads import split_kv_attention
from kvbench.methods.cache.fan_out import FanOutCache
from kvbench.methods.cache.layer import CacheLayer
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.method import Method
from kvbench.methods.cache.products import cached_attention, lower_right_attention
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.pyramid_infer.policy import PyramidInfer
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.methods.policies.streaming_llm import StreamingLLM
from kvbench.runners.engine import Sampling, decode, decoding, feed, generate, prefill, score
from kvbench.runners.engine.fused_decode import FusedStep, supports_fused_decode
from kvbench.runners.engine.weights import prepack_linear_weights


def full(model):
    return Method("full").new_cache(model)


def test_a_stop_id_ends_a_row_and_is_not_part_of_it():
    model, ids = tiny_model(), prompt_ids(20)
    free = generate(model, full(model), ids, max_new_tokens=10).tokens[0]
    stop = free[4]
    stopped = generate(model, full(model), ids, max_new_tokens=10, stop_ids=[stop])
    assert stopped.tokens[0] == free[: free.index(stop)]
    assert stopped.steps == free.index(stop)


def test_rows_end_on_their_own_and_do_not_disturb_each_other():
    model = tiny_model()
    prompts = [prompt_ids(20, 1), prompt_ids(12, 2)]
    ids, mask = left_pad(prompts)
    alone = [generate(model, full(model), p, max_new_tokens=10).tokens[0] for p in prompts]
    stop = alone[0][2]
    both = generate(model, full(model), ids, mask, max_new_tokens=10, stop_ids=[stop]).tokens
    assert both[0] == alone[0][: alone[0].index(stop)]
    assert both[1] == (alone[1][: alone[1].index(stop)] if stop in alone[1] else alone[1])


def test_min_new_tokens_holds_the_stop_back():
    model, ids = tiny_model(), prompt_ids(20)
    first = generate(model, full(model), ids, max_new_tokens=1).tokens[0][0]
    assert generate(model, full(model), ids, max_new_tokens=5, stop_ids=[first]).tokens[0] == []
    held = generate(model, full(model), ids, max_new_tokens=5, stop_ids=[first], min_new_tokens=1).tokens[0]
    assert len(held) >= 1
    assert first not in held


def test_members_of_a_fan_out_that_have_ended_are_left_out_and_the_others_go_on():
    model, ids = tiny_model(), prompt_ids(60)
    methods = [Method("full"), *(Method("snapkv", EvictionPolicy(SnapKV(window=4), b)) for b in (8, 16, 40))]
    alone = [generate(model, m.new_cache(model), ids, max_new_tokens=12).tokens[0] for m in methods]
    stop = alone[1][5]  # ends the second member early, whatever the others do
    cache = FanOutCache([m.new_cache(model) for m in methods])
    together = generate(model, cache, ids, max_new_tokens=12, stop_ids=[stop]).tokens
    for mine, theirs in zip(together, alone, strict=True):
        assert mine == (theirs[: theirs.index(stop)] if stop in theirs else theirs)
    assert cache.copies < len(methods)


def test_methods_that_read_the_prompt_by_themselves_go_on_with_the_others(monkeypatch):
    """In the order in which they were given; one may end and leave; each step is one forward for all."""
    model, ids = tiny_model(), prompt_ids(60)
    methods = [
        Method("streaming_llm", StreamingLLM(20)),
        Method("full"),
        Method("pyramid_infer", PyramidInfer(prefill_decay_ratio=0.2, recent_ratio=0.1, min_context=3, gen_window=2)),
        Method("snapkv", EvictionPolicy(SnapKV(window=4), 16)),
        Method("streaming_llm", StreamingLLM(12)),
    ]
    alone = [generate(model, m.new_cache(model), ids, max_new_tokens=12).tokens[0] for m in methods]
    assert len({tuple(tokens) for tokens in alone}) == len(methods)
    stop = alone[2][5]  # ends the third
    cache = FanOutCache([m.new_cache(model) for m in methods])
    assert [type(one).__name__ for one in cache.separate_prefills] == ["FanOutCache", *["KVCache"] * 3]
    rows = []
    forward = FusedStep.forward
    monkeypatch.setattr(FusedStep, "forward", lambda step, token: rows.append(len(token)) or forward(step, token))
    together = generate(model, cache, ids, max_new_tokens=12, stop_ids=[stop]).tokens
    ends = [tokens.index(stop) if stop in tokens else 12 for tokens in alone]
    assert together == [tokens[:end] for tokens, end in zip(alone, ends, strict=True)]
    assert rows == [sum(end > n for end in ends) for n in range(11)]


def test_continuations_are_scored_alike_alone_and_beside_others():
    model = tiny_model()
    ids, mask = left_pad([prompt_ids(60, 1), prompt_ids(41, 2)])
    asked = [[([3, 4], [5, 6, 7]), ([], [8])], [([9], [10, 11])]]
    methods = [
        Method("streaming_llm", StreamingLLM(20)),
        Method("full"),
        Method("snapkv", EvictionPolicy(SnapKV(window=4), 16)),
    ]
    alone = [one for m in methods for one in score(model, m.new_cache(model), ids, mask, asked)]
    both = score(model, FanOutCache([m.new_cache(model) for m in methods]), ids, mask, asked)
    for mine, theirs in zip(both, alone, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.log_probs == pytest.approx(b.log_probs, abs=1e-9)
    assert both[0] != both[2]


def test_sampling_is_seeded_and_top_p_of_almost_nothing_is_greedy():
    model, ids = tiny_model(), prompt_ids(20)
    draw = lambda **how: generate(model, full(model), ids, max_new_tokens=12, sampling=Sampling(**how)).tokens  # noqa: E731
    greedy = generate(model, full(model), ids, max_new_tokens=12).tokens
    assert draw(temperature=1.5, seeds=1) == draw(temperature=1.5, seeds=1)
    assert draw(temperature=1.5, seeds=1) != draw(temperature=1.5, seeds=2)
    assert draw(temperature=1.5, top_p=1e-6) == greedy
    assert draw(temperature=1e-6) == greedy


def test_a_rows_draws_depend_on_its_own_seed_alone():
    model = tiny_model()
    prompts = [prompt_ids(20, 1), prompt_ids(12, 2)]
    ids, mask = left_pad(prompts)
    hot = {"temperature": 1.5, "top_p": 0.9}
    alone = [
        generate(model, full(model), p, max_new_tokens=12, sampling=Sampling(**hot, seeds=[seed])).tokens[0]
        for p, seed in zip(prompts, (5, 6), strict=True)
    ]
    both = generate(model, full(model), ids, mask, max_new_tokens=12, sampling=Sampling(**hot, seeds=[5, 6]))
    assert both.tokens == alone
    fan_out = FanOutCache([full(model), Method("snapkv", EvictionPolicy(SnapKV(), 100)).new_cache(model)])
    members = generate(model, fan_out, ids, mask, max_new_tokens=12, sampling=Sampling(**hot, seeds=[5, 6]))
    assert members.tokens == alone + alone


def test_draws_follow_the_probabilities():
    from kvbench.runners.engine.sampling import Sampler

    draw = Sampler(Sampling(temperature=1.0, top_p=0.79, seeds=list(range(4000))), (), 0, 4000, torch.device("cpu"))
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)
    counts = torch.bincount(draw(logits, 0), minlength=4) / 4000
    # 0.79 is reached by the first two; what is left is drawn in proportion.
    assert counts[2:].sum() == 0
    assert abs(counts[0] - 0.625) < 0.03


def test_right_padding_is_refused():
    model, ids = tiny_model(), prompt_ids(20)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    with pytest.raises(ValueError, match="left padding"):
        prefill(model, full(model), ids, mask)


def test_a_model_that_goes_past_the_cache_is_noticed():
    """After a library upgrade, published code fell back to full attention in silence: every method scored like full."""
    model = tiny_model("qwen3")
    cache = full(model)
    attend = cache.attend
    cache.attend = lambda layer, *args: attend(layer, *args) if layer != 1 else args[0].query
    with pytest.raises(RuntimeError, match="did not route"):
        prefill(model, cache, prompt_ids(20))


def phi3_with_longrope():
    """RoPE whose frequencies depend on how long the sequence is: beyond 64 tokens here."""
    factors = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0}
    config = Phi3Config(
        **SHAPE | {"max_position_embeddings": 256},
        original_max_position_embeddings=64,
        rope_parameters=factors | {"short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]},
    )
    torch.manual_seed(0)
    return Phi3ForCausalLM(config).double().eval()


def llama_with_dynamic_rope():
    """RoPE whose frequencies follow the length of the text beyond 64 tokens."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = LlamaConfig(**SHAPE | {"max_position_embeddings": 64}, rope_parameters=rope)
    torch.manual_seed(0)
    return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "phi3"])
def test_layers_that_read_in_pieces_give_what_they_give_in_one(family, chunk_size):
    """Padded, alone and in a fan-out; longrope sees the whole length whatever the pieces."""
    model = phi3_with_longrope() if family == "phi3" else tiny_model(family)
    methods = [Method("full"), Method("snapkv", EvictionPolicy(SnapKV(window=4), 20))]
    ids, mask = left_pad([prompt_ids(90, 1), prompt_ids(41, 2)])
    if family == "phi3":
        ids, mask = prompt_ids(90), None
    for make in (full, lambda m: FanOutCache([method.new_cache(m) for method in methods])):
        whole, pieces = make(model), make(model)
        expected = prefill(model, whole, ids, mask)
        torch.testing.assert_close(prefill(model, pieces, ids, mask, chunk_size), expected, rtol=0, atol=1e-9)
        token = expected.argmax(-1)
        for _ in range(3):
            expected = decode(model, whole, token)
            torch.testing.assert_close(decode(model, pieces, token), expected, rtol=0, atol=1e-9)
            token = expected.argmax(-1)
    assert all("forward" not in vars(layer) for layer in model.get_decoder().layers)  # nothing is left behind


def test_in_pieces_one_layer_at_a_time_holds_its_whole_keys(monkeypatch):
    """When a layer compresses, those below have done so and those above have not begun."""
    model = tiny_model()
    cache = Method("snapkv", EvictionPolicy(SnapKV(window=4), 20)).new_cache(model)
    finish_prefill, seen = CacheLayer.finish_prefill, []

    def look(self, prompts):
        seen.append([layer.layer_idx for layer in cache.layers if layer is not self and layer._keys is not None])
        finish_prefill(self, prompts)
        assert all(layer.storage.read()[0].shape[2] == 20 for layer in cache.layers[: self.layer_idx + 1])

    monkeypatch.setattr(CacheLayer, "finish_prefill", look)
    prefill(model, cache, prompt_ids(90), None, 16)
    assert seen == [[], [], []]


def test_an_error_in_a_piece_leaves_the_model_as_it_was():
    model = tiny_model()
    cache = full(model)
    cache.layers[1].attend = None
    with pytest.raises(TypeError):
        prefill(model, cache, prompt_ids(90), None, 16)
    assert all("forward" not in vars(layer) for layer in model.get_decoder().layers)
    assert prefill(model, full(model), prompt_ids(90)).isfinite().all()


def test_zero_new_tokens_are_refused():
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(tiny_model(), full(tiny_model()), prompt_ids(4), max_new_tokens=0)


QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea.",
    "How many days are there in a week?",
    "What does a bee make?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Hamlet?",
    "What is 7 times 8?",
    "List the planets of the solar system in order.",
    "Explain what a key-value cache is.",
    "Give a synonym of 'quick'.",
    "What is the boiling point of water?",
    "Complete: once upon a time",
    "Why is the sky blue?",
    "What language is spoken in Brazil?",
    "Write a haiku about snow.",
    "Which animal is the largest?",
    "Describe a chair in one sentence.",
    "What comes after Monday?",
    "Write a Python function that adds two numbers.",
]


@pytest.mark.real_model
@pytest.mark.parametrize(
    "blocked",
    [pytest.param(True, id="as it is run"), pytest.param(False, id="as it is loaded", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(("prompts", "tokens"), [(2, 8), pytest.param(20, 64, marks=pytest.mark.slow)])
def test_full_is_transformers_generate_token_for_token_alone_and_padded(smollm2, blocked, prompts, tokens):
    """Greedy tokens of the real model, each prompt alone and all in one left-padded batch."""
    from transformers import AutoModelForCausalLM

    ours, tokenizer = copy.deepcopy(smollm2.model), smollm2.tokenizer
    theirs = AutoModelForCausalLM.from_config(ours.config, attn_implementation="sdpa").eval()
    theirs.load_state_dict(ours.state_dict())
    if blocked:
        prepack_linear_weights(ours)
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in QUESTIONS[:prompts]
    ]
    greedy = {
        "max_new_tokens": tokens,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for chat in chats:
        ids = tokenizer(chat, return_tensors="pt", add_special_tokens=False).input_ids
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **greedy)[0, ids.shape[1] :].tolist()
        assert generate(ours, full(ours), ids, max_new_tokens=tokens).tokens[0] == expected
    batch = tokenizer(chats, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    expected = theirs.generate(**batch, **greedy)[:, batch.input_ids.shape[1] :].tolist()
    found = generate(ours, full(ours), batch.input_ids, batch.attention_mask, max_new_tokens=tokens)
    assert found.tokens == expected


@pytest.mark.slow
@pytest.mark.real_model
def test_a_planted_number_survives_snapkv_and_not_a_window_without_it(smollm2):
    """Quality that can be lost: SnapKV at a fifth of the bytes answers, a stream whose window has passed it cannot."""
    from kvbench.methods.policies.streaming_llm import StreamingLLM

    model, tokenizer = smollm2.model, smollm2.tokenizer
    rows = files("kvbench.tasks").joinpath("data", "longbench_mini", "narrativeqa.jsonl").read_text(encoding="utf-8")
    prose = json.loads(rows.splitlines()[0])["context"]
    before, after = prose[:3500], prose[3500:7000]
    question = "What is the secret number of the tower? Answer with the number only."
    text = f"{before}\nThe secret number of the tower is 58274.\n{after}\n\n{question}"
    message = [{"role": "user", "content": text}]
    chat = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(chat, return_tensors="pt", add_special_tokens=False).input_ids

    def answer(method):
        tokens = generate(model, method.new_cache(model), ids, max_new_tokens=24).tokens[0]
        return tokenizer.decode(tokens)

    assert ids.shape[1] > 1500
    assert "58274" in answer(Method("full"))
    assert "58274" in answer(Method("snapkv", EvictionPolicy(SnapKV(), 512)))
    assert "58274" not in answer(Method("streaming_llm", StreamingLLM(budget=512)))


def test_the_attention_that_pieces_take_on_cuda_is_the_masked_one():
    query, key, value = (torch.randn(2, h, n, 16, dtype=torch.float64) for h, n in ((4, 5), (2, 30), (2, 30)))
    torch.testing.assert_close(
        lower_right_attention(query, key, value, 0.3),
        cached_attention(query, key, value, LogitRule(0.3)),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_the_lean_step_is_the_library_s_forward(monkeypatch, family, joined):
    """To the bit, also where it takes query, key and value from one product and the library from the layers' places."""
    model = tiny_model(family)
    if joined:
        model = copy.deepcopy(model).float()
        prepack_linear_weights(model)
    ids, mask = left_pad([prompt_ids(30, 1), prompt_ids(12, 2)])
    caches = [full(model), full(model)]
    token = prefill(model, caches[0], ids, mask).argmax(-1)
    prefill(model, caches[1], ids, mask)
    assert supports_fused_decode(model)
    for _ in range(4):
        lean = decode(model, caches[0], token)
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "supports_fused_decode", lambda model: False)
            expected = decode(model, caches[1], token)
        assert torch.equal(lean, expected)
        token = expected.argmax(-1)


def test_nothing_that_sits_on_a_model_is_passed_by():
    model = copy.deepcopy(tiny_model())
    assert supports_fused_decode(model)
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: None)
    assert not supports_fused_decode(model)
    handle.remove()
    handle = model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda *_: None)
    assert not supports_fused_decode(model)
    handle.remove()
    assert supports_fused_decode(model)
    model.model.layers[0].self_attn.forward = model.model.layers[0].self_attn.forward
    assert not supports_fused_decode(model)
    assert not supports_fused_decode(phi3_with_longrope())


@pytest.mark.parametrize("length", [1024, 1025, 1499])
@pytest.mark.parametrize(("rows", "heads", "parts"), [(1, 3, 2), (1, 1, 4), (2, 3, 5)])
def test_attention_in_parts_is_attention(length, rows, heads, parts):
    """Against the definition in float64; keys and values are the beginning of longer buffers, as in a cache."""
    generator = torch.Generator().manual_seed(length)
    query = 3 * torch.randn(rows, heads, 6, 16, generator=generator, dtype=torch.float64)
    keys, values = (
        torch.randn(rows, heads, length + 37, 16, generator=generator, dtype=torch.float64)[:, :, :length]
        for _ in range(2)
    )
    expected = (0.3 * query @ keys.transpose(2, 3)).softmax(-1) @ values
    assert (split_kv_attention(query, keys, values, 0.3, parts) - expected).abs().max() < 1e-12
    single = split_kv_attention(query.float(), keys.float(), values.float(), 0.3, parts)
    assert (single - expected).abs().max() < 1e-5


def test_a_long_cache_is_read_by_all_threads_where_its_heads_do_not_share_out(monkeypatch):
    calls = []
    whole = products.split_kv_attention
    monkeypatch.setattr(products, "split_kv_attention", lambda *args: calls.append(args[-1]) or whole(*args))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)

    def attend(batch: int, heads: int, length: int, valid: torch.Tensor | None = None) -> None:
        query = torch.randn(batch, 2 * heads, 1, 16)
        keys, values = torch.randn(2, batch, heads, length, 16)
        cached_attention(query, keys, values, LogitRule(0.25), valid)

    attend(1, 3, 4096)
    assert calls == [6]
    attend(1, 6, 4096)  # shares out
    attend(1, 5, 4096)  # one thread of six is idle
    attend(1, 3, 512)  # too short to be worth it
    attend(1, 3, 4096, torch.ones(1, 1, 4096, dtype=torch.bool))  # the kernel takes no mask
    query, keys = torch.randn(1, 6, 1, 16), torch.randn(1, 3, 16, 4096).transpose(2, 3)
    out = cached_attention(query, keys, keys, LogitRule(0.25))  # channels do not lie together
    expected = (0.25 * query.view(1, 3, 2, 16) @ keys.transpose(2, 3)).softmax(-1) @ keys
    assert (out.view(1, 3, 2, 16) - expected).abs().max() < 1e-5
    assert calls == [6]


def test_a_question_after_compression_is_read_through_the_compressed_cache():
    """The context alone is compressed; the answer is the one of feeding the question token by token."""
    model, ids = tiny_model(), prompt_ids(80)
    method = Method("snapkv", EvictionPolicy(SnapKV(window=4), 16))
    cache = method.new_cache(model)
    prefill(model, cache, ids[:, :70])
    for token in ids[0, 70:]:
        logits = decode(model, cache, token[None])
    expected = []
    for _ in range(6):
        expected.append(int(logits.argmax()))
        logits = decode(model, cache, logits.argmax(-1))
    compressed = method.new_cache(model)
    asked = generate(model, compressed, ids[:, :70], max_new_tokens=6, question=ids[:, 70:])
    assert asked.tokens[0] == expected
    assert compressed.tokens_held[0].max() == 16 + 10 + 5
    assert generate(model, method.new_cache(model), ids, max_new_tokens=6).tokens[0] != expected


def test_a_model_whose_rope_follows_the_length_is_fed_token_by_token():
    """Several at once would all be turned as the last of them is, on the way over the model's first length."""
    model, ids = llama_with_dynamic_rope(), prompt_ids(80)
    cache = full(model)
    prefill(model, cache, ids[:, :50])
    expected = torch.stack([decode(model, cache, token[None]) for token in ids[0, 50:]], dim=1)
    cache = full(model)
    prefill(model, cache, ids[:, :50])
    assert (torch.cat(list(feed(model, cache, ids[:, 50:])), dim=1) - expected).abs().max() < 1e-9


def test_fewer_columns_go_together_where_rows_and_vocabulary_are_large(monkeypatch):
    model, ids = tiny_model(), prompt_ids(30)
    monkeypatch.setattr(decoding, "MAX_LOGITS_PER_FEED", 4 * model.config.vocab_size + 1)
    cache = full(model)
    prefill(model, cache, ids)
    assert [logits.shape[1] for logits in feed(model, cache, prompt_ids(10))] == [4, 4, 2]


def test_until_ends_a_row_after_the_token_that_completes_it():
    model, ids = tiny_model(), prompt_ids(20)
    free = generate(model, full(model), ids, max_new_tokens=10).tokens[0]
    stopped = generate(model, full(model), ids, max_new_tokens=10, until=lambda row, tokens: len(tokens) == 4)
    assert stopped.tokens[0] == free[:4]
    assert stopped.steps == 3
