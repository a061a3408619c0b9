"""PyramidInfer against golden lengths, and against a naive model in float64 whose tokens are entries of a list."""

from __future__ import annotations

import copy
import gc
from itertools import pairwise

import pytest
import torch
from tiny_models import left_pad, prompt_ids, tiny_model

from kvbench.conf.errors import InputError
from kvbench.methods.cache.kv_shape import kv_shape
from kvbench.methods.cache.method import Method
from kvbench.methods.policies.pyramid_infer import records
from kvbench.methods.policies.pyramid_infer.policy import PyramidInfer
from kvbench.methods.policies.streaming_llm import StreamingLLM
from kvbench.methods.storage.dense import Dense
from kvbench.methods.storage.ragged import Ragged
from kvbench.runners.engine import decode, generate, prefill


@pytest.mark.parametrize(
    ("name", "options", "length", "layers"),
    [
        ("7B cfg: L=32 p=.9 interval=1 recent=.2 min=64 T=512", {}, 512, 32),
        ("13B cfg: L=40 p=.8 interval=2 T=512", {"prefill_decay_ratio": 0.8, "interval": 2}, 512, 40),
        ("70B cfg: L=80 p=.9 interval=3 T=512 (formula only)", {"interval": 3}, 512, 80),
        ("7B cfg T=4096 (formula only)", {}, 4096, 32),
    ],
)
def test_golden_lengths(golden, name, options, length, layers):
    lengths = golden["pyramidinfer prefill KV lengths per layer (formula == official code output)"][name]
    assert list(PyramidInfer(**options).layer_lengths(length, layers)) == lengths


@pytest.mark.parametrize(("p", "ratio"), [(0.9, 0.757), (0.8, 0.666), (0.7, 0.629), (0.5, 0.580), (0.2, 0.556)])
def test_golden_ratios(p, ratio):
    assert sum(PyramidInfer(prefill_decay_ratio=p).layer_lengths(512, 32)) / (32 * 512) == pytest.approx(
        ratio, abs=6e-4
    )


def test_the_first_generated_window_goes_after_147_steps():
    rule = PyramidInfer()
    assert rule.progress(512, 146, 32).lengths[0] == 512 + 146
    assert rule.progress(512, 147, 32).lengths[0] == 512 + 147 - 2
    assert rule.progress(512, 147, 32).lengths[-1] == 186 + 147 - 15


def test_bytes_after_256_tokens_with_either_trigger():
    """0.772 of the full cache by a layer's own length; 0.313 (and 136 tokens in the deepest) as published."""
    own, published = (PyramidInfer(trigger=t).progress(512, 256, 32).lengths for t in ("own_length", "published"))
    assert sum(own) / (32 * 768) == pytest.approx(0.772, abs=5e-4)
    assert sum(published) / (32 * 768) == pytest.approx(0.313, abs=3e-3)
    assert published[-1] == 136
    assert all(ours >= at_prompt for ours, at_prompt in zip(own, PyramidInfer().layer_lengths(512, 32), strict=True))


def rotated(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """RoPE of [H, D] at one position, with angles in float32 as the model has them."""
    half = x.shape[-1] // 2
    angle = position / theta ** (torch.arange(half, dtype=torch.float32) / half)
    cos, sin = angle.cos().double(), angle.sin().double()
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class NaiveLayer:
    """Tokens as list entries: {"id", "k", "v"}; a token's id is its position in the sequence."""

    def __init__(self, layer, theta: float):
        self.layer, self.theta = layer, theta
        self.tokens: list[dict] = []
        self.rows: dict[int, dict[int, float]] = {}  # query id -> token id -> attention, averaged over heads
        self.finalized_windows = 0
        self.finalized = 0

    def forward(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """One token [hidden] through the layer; it stays in ``tokens``."""
        attn, normed = self.layer.self_attn, self.layer.input_layernorm(x)
        q, k, v = (f(normed).view(-1, 16) for f in (attn.q_proj, attn.k_proj, attn.v_proj))
        q, k = rotated(q, position, self.theta), rotated(k, position, self.theta)
        self.tokens.append({"id": position, "k": k, "v": v})
        out, mean = [], torch.zeros(len(self.tokens), dtype=torch.float64)
        for j in range(q.shape[0]):
            head = j * k.shape[0] // q.shape[0]
            keys = torch.stack([t["k"][head] for t in self.tokens])
            weights = (keys @ q[j] / 4).softmax(0)
            mean += weights / q.shape[0]
            out.append(weights @ torch.stack([t["v"][head] for t in self.tokens]))
        self.rows[position] = dict(zip([t["id"] for t in self.tokens], mean.tolist(), strict=True))
        x = x + attn.o_proj(torch.cat(out))
        return x + self.layer.mlp(self.layer.post_attention_layernorm(x))

    def score(self, token: int, queries: list[int], heaviest: float) -> float:
        weights = torch.linspace(1.0, heaviest, len(queries), dtype=torch.float64).tolist()
        return sum(w * self.rows[q].get(token, 0.0) for w, q in zip(weights, queries, strict=True))

    def leave_all_but(self, candidates: list[int], count: int, queries: list[int], heaviest: float) -> None:
        best = sorted(candidates, key=lambda t: -self.score(t, queries, heaviest))[:count]
        self.tokens = [t for t in self.tokens if t["id"] not in candidates or t["id"] in best]


class NaiveModel:
    """A whole model with PyramidInfer's rule, from its description."""

    def __init__(self, model, rule: PyramidInfer):
        self.model, self.rule = model, rule
        theta = model.config.rope_parameters["rope_theta"]
        self.layers = [NaiveLayer(layer, theta) for layer in model.model.layers]
        self.length = 0
        self.prompt = 0

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(self.model.model.norm(x))

    def read(self, ids: list[int]) -> torch.Tensor:
        lengths = self.rule.layer_lengths(len(ids), len(self.layers))
        recent = int(self.rule.recent_ratio * len(ids)) + 1
        hidden = {i: self.model.model.embed_tokens(torch.tensor(token)) for i, token in enumerate(ids)}
        self.prompt = self.length = len(ids)
        for n, layer in enumerate(self.layers):
            assert len(hidden) == lengths[n]
            hidden = {i: layer.forward(x, i) for i, x in hidden.items()}
            layer.finalized = len(hidden)
            if n + 1 < len(self.layers) and lengths[n + 1] < len(hidden):
                here = list(hidden)
                queries, context = here[-recent:], here[:-recent]
                scores = {t: layer.score(t, queries, self.rule.distance_weight) for t in context}
                scores |= dict.fromkeys(here[: self.rule.sinks], float("inf"))
                best = sorted(context, key=lambda t: -scores[t])[: lengths[n + 1] - recent]
                assert set(here[: self.rule.sinks]) <= set(best) or len(best) < self.rule.sinks
                hidden = {i: x for i, x in hidden.items() if i in best or i in queries}
        return self.logits(hidden[len(ids) - 1])

    def step(self, token: int) -> torch.Tensor:
        x = self.model.model.embed_tokens(torch.tensor(token))
        position, self.length = self.length, self.length + 1
        recent = int(self.rule.recent_ratio * (len(self.layers[0].tokens) + 1))
        for n, layer in enumerate(self.layers):
            x = layer.forward(x, position)
            if self.rule.trigger == "own_length":
                self.evict_own(n, layer, recent)
            elif self.rule.trigger == "published":
                self.evict_published(n, layer, recent)
        return self.logits(x)

    def evict_own(self, n: int, layer: NaiveLayer, recent: int) -> None:
        size = self.rule.gen_window
        window = [self.prompt + layer.finalized_windows * size + i for i in range(size)]
        queries = list(range(window[-1] + 1, self.length))
        if len(queries) >= max(1, recent):
            layer.leave_all_but(
                window, self.rule.window_keep_count(n, len(self.layers)), queries, self.rule.distance_weight
            )
            layer.finalized_windows += 1

    def evict_published(self, n: int, layer: NaiveLayer, recent: int) -> None:
        if self.length - recent - layer.finalized < self.rule.gen_window:
            return
        ids = [t["id"] for t in layer.tokens]
        older = ids[: len(ids) - 1 - recent][-self.rule.gen_window :]
        queries = sorted(layer.rows)[-1 - recent :]
        layer.leave_all_but(older, self.rule.window_keep_count(n, len(self.layers)), queries, self.rule.distance_weight)
        layer.finalized = len(layer.tokens) - recent


RULES = [
    PyramidInfer(prefill_decay_ratio=0.5, strategy="constant", min_context=0, recent_ratio=0.1, gen_window=4),
    PyramidInfer(prefill_decay_ratio=0.3, strategy="linear", min_context=5, recent_ratio=0.0, gen_window=3),
    PyramidInfer(prefill_decay_ratio=0.2, min_context=3, sinks=1, recent_ratio=0.2, gen_window=2, distance_weight=3.0),
    PyramidInfer(
        prefill_decay_ratio=0.5, strategy="constant", min_context=0, recent_ratio=0.1, gen_window=4, trigger="published"
    ),
    PyramidInfer(prefill_decay_ratio=0.5, strategy="constant", min_context=0, interval=2, trigger="never"),
    PyramidInfer(budget=12, strategy="constant", min_context=0, recent_ratio=0.1, trigger="never"),
]


@torch.no_grad()
@pytest.mark.parametrize(
    ("rule", "lengths"),
    [
        pytest.param(rule, lengths, id=f"{i}-{lengths}", marks=() if (i + j) % 2 == 0 else pytest.mark.slow)
        for i, rule in enumerate(RULES)
        for j, lengths in enumerate(([23], [23, 14, 23], [21, 20, 20], [20, 21]))  # 20 and 21 meet: 11, then 7
    ],
)
def test_it_is_the_naive_model(rule, lengths, monkeypatch):
    """Logits of prompt and 24 steps, and the tokens held; alone, and as the rows of a left-padded batch."""
    monkeypatch.setattr(records, "GROWTH_COLUMNS", 5)
    model = tiny_model()
    prompts = [prompt_ids(length, seed) for seed, length in enumerate(lengths)]
    ids, mask = left_pad(prompts)
    naive = [NaiveModel(model, rule) for _ in prompts]
    cache = Method("x", rule).new_cache(model)
    ours = prefill(model, cache, ids, mask)
    theirs = torch.stack([n.read(p[0].tolist()) for n, p in zip(naive, prompts, strict=True)])
    assert (ours - theirs).abs().max() < 1e-8
    for i in range(24):
        tokens = [3 + i, 40 + i, 70 + i][: len(prompts)]
        ours = decode(model, cache, torch.tensor(tokens))
        theirs = torch.stack([n.step(t) for n, t in zip(naive, tokens, strict=True)])
        assert (ours - theirs).abs().max() < 1e-8, f"step {i}"
        for layer, held in enumerate(cache.tokens_held):
            assert held[:, 0].tolist() == [len(n.layers[layer].tokens) for n in naive]
            expected = [rule.kept_tokens(p.shape[1], i + 1, 3, 1)[layer] for p in prompts]
            assert held[:, 0].tolist() == expected


def test_without_dropping_it_is_the_full_model_bit_for_bit():
    model, ids = tiny_model(dtype=torch.float32), prompt_ids(60)
    rule = PyramidInfer(prefill_decay_ratio=1.0, trigger="never", min_context=0)
    ours = generate(model, Method("x", rule).new_cache(model), ids, max_new_tokens=20)
    assert ours.tokens == generate(model, Method("full").new_cache(model), ids, max_new_tokens=20).tokens
    a, b = (prefill(model, m.new_cache(model), ids) for m in (Method("x", rule), Method("full")))
    assert torch.equal(a, b)


def test_later_layers_project_fewer_tokens():
    model, ids = tiny_model(), prompt_ids(50)
    rule = PyramidInfer(prefill_decay_ratio=0.5, strategy="constant", min_context=0)
    seen = []
    handles = [
        layer.self_attn.k_proj.register_forward_hook(lambda _, x, __: seen.append(x[0].shape[1]))
        for layer in model.model.layers
    ]
    prefill(model, Method("x", rule).new_cache(model), ids)
    for handle in handles:
        handle.remove()
    assert seen == list(rule.layer_lengths(50, 3))
    assert seen[0] == 50 > seen[1] > seen[2]


def test_sinks_and_the_last_ones_survive_and_each_layer_holds_a_part_of_the_one_before(monkeypatch):
    model = tiny_model()
    rule = PyramidInfer(prefill_decay_ratio=0.4, strategy="constant", min_context=0, sinks=3)
    cache = Method("x", rule).new_cache(model)
    chosen = []
    select = PyramidInfer.select

    def watched(self, prompt, state=None):
        kept = select(self, prompt, state)
        chosen.extend(state.chosen)
        return kept

    monkeypatch.setattr(PyramidInfer, "select", watched)
    prefill(model, cache, prompt_ids(50))
    held = [list(range(50))]
    for forwarded in chosen:
        held.append([held[-1][i] for i in forwarded[0].tolist()])
    for earlier, later in pairwise(held):
        assert set(later) < set(earlier)
    for columns in held:
        assert columns == sorted(set(columns))
        assert columns[:3] == [0, 1, 2]
        assert columns[-11:] == list(range(39, 50))


def test_hooks_are_gone_after_the_prompt_and_leave_other_caches_alone():
    model, ids = tiny_model(), prompt_ids(40)
    rule = PyramidInfer(prefill_decay_ratio=0.5, strategy="constant", min_context=0)

    def all_hooks() -> int:
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.model.layers)

    def hooks() -> int:
        return all_hooks() - others

    gc.collect()  # caches of tests before this one
    before = prefill(model, Method("full").new_cache(model), ids)
    others = all_hooks()  # transformers leaves some where hidden states were asked for
    cache, interrupted = (Method("x", rule).new_cache(model) for _ in range(2))
    assert hooks() == 0
    counts = []
    counter = model.model.layers[1].register_forward_hook(lambda *_: counts.append(hooks() - 1))
    assert torch.equal(prefill(model, Method("full").new_cache(model), ids), before)
    assert cache.get_seq_length() == 0
    prefill(model, cache, ids)
    assert hooks() == 1
    with pytest.raises(InputError, match=r"runner\.chunk_size"):
        prefill(model, interrupted, ids, chunk_size=7)
    assert hooks() == 4
    del interrupted
    gc.collect()
    assert hooks() == 1
    prefill(model, Method("full").new_cache(model), ids)
    assert counts == [0, 3, 0]  # without the counting hook
    decode(model, cache, torch.tensor([7]))
    counter.remove()


@pytest.mark.parametrize("budget", [0.5, 0.4, 150])
def test_a_budget_is_the_mean_over_the_layers(budget):
    rule = PyramidInfer(budget=budget, strategy="constant", recent_ratio=0.1, min_context=16)
    for length in (300, 451, 700):
        wanted = budget if isinstance(budget, int) else round(budget * length)
        mean = sum(rule.layer_lengths(length, 30)) / 30
        assert wanted - 0.04 * length <= mean <= wanted
    assert rule.layer_lengths(100, 30) == (100,) * 30 or isinstance(budget, float)


def test_a_budget_that_cannot_be_met_says_what_can():
    with pytest.raises(InputError, match=r"method\.budget=64: cannot be met on a prompt of 1000 tokens.*at least \d+"):
        PyramidInfer(budget=64).layer_lengths(1000, 30)


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 0},
        {"prefill_decay_ratio": 1.5},
        {"strategy": "square"},
        {"interval": 0},
        {"recent_ratio": 1.0},
        {"min_context": -1},
        {"sinks": "four"},
        {"distance_weight": 0},
        {"trigger": "sometimes"},
        {"gen_window": 0},
        {"gen_keep_ratio": 2},
    ],
    ids=str,
)
def test_bad_settings(options):
    with pytest.raises(InputError, match=r"method\."):
        PyramidInfer(**options)


@pytest.mark.parametrize("rule", [r for r in RULES if r.trigger != "never"], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_multi_token_forward_matches_single_steps(rule, padded):
    model = tiny_model()
    ids, mask = left_pad([prompt_ids(40, 1), prompt_ids(31, 2)] if padded else [prompt_ids(40, 1)])
    more = torch.cat([prompt_ids(32, 3 + i) for i in range(ids.shape[0])])
    at_once, in_turn = (Method("x", rule).new_cache(model) for _ in range(2))
    for cache in (at_once, in_turn):
        prefill(model, cache, ids, mask)
    with torch.inference_mode():
        positions = at_once.tokens_seen[:, None] + torch.arange(32)
        ours = model(input_ids=more, position_ids=positions, past_key_values=at_once, use_cache=True).logits
    theirs = torch.stack([decode(model, in_turn, more[:, i]) for i in range(32)], dim=1)
    assert (ours - theirs).abs().max() < 1e-9
    for a, b in zip(at_once.tokens_held, in_turn.tokens_held, strict=True):
        assert torch.equal(a, b)


@torch.inference_mode()
@pytest.mark.parametrize(
    "rule",
    [
        *(r for r in RULES if r.trigger == "own_length"),
        PyramidInfer(budget=20, strategy="constant", min_context=0, recent_ratio=0.1, gen_window=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("before", [0, 13])
def test_static_steps_hold_no_more_slots_than_they_need(rule, before):
    """From the prompt or from within a generation; slots for the longest row at its longest, before an eviction.

    The second row is below its limit where the rule has a budget, so rows evict at different steps.
    """
    model, steps = tiny_model(), 40
    ids, mask = left_pad([prompt_ids(40, 1), prompt_ids(11, 2)])
    grows, static = (Method("x", rule).new_cache(model) for _ in range(2))
    for cache in (grows, static):
        logits = prefill(model, cache, ids, mask)
        for i in range(before):
            logits = decode(model, cache, torch.tensor([i + 3, i + 5]))
    static.make_static(steps)
    token, max_slots = logits.argmax(-1), [0] * len(grows.layers)
    for _ in range(steps):
        held = [int(tokens.max()) for tokens in grows.tokens_held]
        max_slots = [max(a, b + 1) for a, b in zip(max_slots, held, strict=True)]
        logits = decode(model, grows, token)
        assert (decode(model, static, token) - logits).abs().max() < 1e-9
        static.between_steps()
        token = logits.argmax(-1)
    if not before:  # buffers that have grown have room
        assert [layer.storage.read()[0].shape[2] for layer in static.layers] == max_slots
        assert max(max_slots) < 40 + steps


def test_the_published_trigger_has_no_static_steps():
    model = tiny_model()
    for rule in RULES:
        cache = Method("x", rule).new_cache(model)
        prefill(model, cache, prompt_ids(23))
        assert (cache.static_problem is None) == (rule.trigger != "published")


@pytest.mark.parametrize("rule", [r for r in RULES if r.trigger == "own_length"], ids=str)
@pytest.mark.parametrize("still", [0, 1])
def test_a_row_whose_token_is_a_pad_stands_still(rule, still, monkeypatch):
    """A further turn of 30 tokens, three at a time, in which one row has nothing to say for a while."""
    monkeypatch.setattr(records, "GROWTH_COLUMNS", 2)
    model = tiny_model()
    real = torch.ones(2, 30, dtype=torch.bool)
    real[still, 10:25] = False
    told = torch.cat([prompt_ids(30, 5), prompt_ids(30, 6)])
    ids, mask = left_pad([prompt_ids(40, 1), prompt_ids(31, 2)])
    cache = Method("x", rule).new_cache(model)
    prefill(model, cache, ids, mask)
    logits = []
    for new in (slice(i, i + 3) for i in range(0, 30, 3)):
        positions = cache.next_positions()[:, None] + (real[:, new].cumsum(1) - 1).clamp_min(0)
        mask = torch.cat([mask, real[:, new].long()], dim=1)
        with torch.inference_mode():
            out = model(told[:, new], attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits.append(out.logits)
    logits = torch.cat(logits, dim=1)
    for row, prompt in enumerate((prompt_ids(40, 1), prompt_ids(31, 2))):
        alone = Method("x", rule).new_cache(model)
        prefill(model, alone, prompt)
        theirs = torch.cat([decode(model, alone, t[None]) for t in told[row, real[row]]])
        assert (logits[row, real[row]] - theirs).abs().max() < 1e-9


def test_nothing_of_the_prompts_reading_stays_in_memory_and_a_copy_goes_on_alone():
    model = tiny_model()
    rule = PyramidInfer(prefill_decay_ratio=0.5, strategy="constant", min_context=0, recent_ratio=0.1, gen_window=4)
    cache = Method("x", rule).new_cache(model)
    prefill(model, cache, prompt_ids(50))
    assert all(not layer.state.chosen and not layer.state.rows for layer in cache.layers)
    other = copy.deepcopy(cache)
    expected = torch.stack([decode(model, cache, torch.tensor([i + 1])) for i in range(12)])
    del cache
    gc.collect()
    assert torch.equal(torch.stack([decode(model, other, torch.tensor([i + 1])) for i in range(12)]), expected)


@pytest.mark.parametrize("selection", [RULES[0], StreamingLLM(12), StreamingLLM(0.5, mode="prefill_evict")], ids=str)
def test_on_ragged_storage_too(selection):
    model = tiny_model()
    ids, mask = left_pad([prompt_ids(40, 1), prompt_ids(23, 2)])
    made = []
    for storage in (Dense(), Ragged()):
        cache = Method("x", selection, storage).new_cache(model)
        logits = [prefill(model, cache, ids, mask)]
        made.append(torch.stack(logits + [decode(model, cache, torch.tensor([i + 1, i + 2])) for i in range(20)]))
    assert (made[0] - made[1]).abs().max() < 1e-9


def test_published_rows_are_all_that_is_stored():
    model = tiny_model()
    method = Method("x", RULES[3])
    cache, shape = method.new_cache(model), kv_shape(model.config, model.dtype)
    prefill(model, cache, prompt_ids(40))
    for n in range(1, 30):
        decode(model, cache, torch.tensor([n]))
        state = [t for layer in cache.layers for t in layer.policy.state_tensors(layer.state)]
        assert sum(t.untyped_storage().nbytes() for t in state) == rule_bytes(method, n, shape)


def rule_bytes(method, new_tokens, shape):
    return method.policy.state_bytes(shape, shape.kv_heads, 40, new_tokens)
