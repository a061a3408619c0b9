"""What every method must do, whatever it is: each YAML in conf/method goes through all of these.

A new method gets them for free. ``VARIANTS`` adds settings of a method that take another path through the code.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import cache as memoize
from importlib.resources import files

import hydra
import pytest
import torch
from contract_settings import marked_slow, own_settings
from hydra.utils import instantiate
from sharing_models import shared_model
from spy import watch
from tiny_models import SHAPE, left_pad, prompt_ids, tiny_model

from kvbench.conf.errors import InputError
from kvbench.methods.cache.fan_out import FanOutCache
from kvbench.methods.cache.forward import text_seeds
from kvbench.methods.cache.kv_shape import kv_shape
from kvbench.methods.cache.method import Method
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.pyramid_infer.policy import PyramidInfer
from kvbench.methods.storage import buffer, dense
from kvbench.methods.storage.buffer import Growing
from kvbench.runners.engine import decode, decoding, feed, generate, prefill, score
from kvbench.runners.engine.prepacked import has_blocked_products
from kvbench.runners.engine.weights import prepack_linear_weights

NAMES = sorted(p.name.removesuffix(".yaml") for p in files("kvbench.conf").joinpath("method").iterdir() if p.is_file())
PYRAMID = "pyramid_infer policy.strategy=constant policy.min_context=0"
VARIANTS = [
    "snapkv scorer.granularity=query_head",
    "snapkv scorer.pooling=avg scorer.kernel=5 scorer.group_reduce=max scorer.score_dtype=model",
    "snapkv schedule=ring scorer.window=8 recent=9 allocator=adaptive storage=ragged",
    "snapkv schedule=hold scorer.window=8 sinks=2 allocator=pyramid storage=fp8",
    "criticalkv schedule=hold scorer.scorer.window=8 scorer.scorer.kernel=1 allocator=global storage=ragged",
    "kvzip schedule=hold scorer.chunk=25 scorer.instruction_first=null scorer.instruction_next=null",
    "tova schedule=hold",
    "random schedule=hold allocator=adaptive storage=ragged",
    "criticalkv scorer.scorer.window=8 allocator=global storage=ragged",
    "snapkv_d scorer.window=20 schedule.n=3",
    "rkv schedule.n=4",
    "scissorhands schedule.n=0.1",
    "kvzip scorer.chunk=25 scorer.instruction_first=null scorer.instruction_next=null allocator=uniform storage=dense "
    "schedule=ring recent=9",
    "snapkv schedule=every_step scorer.window=8 sinks=2 allocator=pyramid",
    "streaming_llm policy.mode=prefill_evict",
    "streaming_llm policy.mode=prefill_evict policy.reposition=false",
    "streaming_llm policy.mode=prefill_evict policy.reposition=false policy.prefill_only=true",
    "streaming_llm policy.reposition=false",
    "streaming_llm policy.mode=prefill_evict storage=ragged",
    "streaming_llm policy.sinks=0",
    "pyramidkv allocator.beta=3 scorer.pooling=avg",
    "ada_kv scorer.window=8 allocator.floor=0.0",
    "ada_kv scorer.window=8 allocator.layers=pyramid scorer.granularity=query_head",
    "ada_kv scorer.window=8 schedule=every_n schedule.n=4",
    "key_diff recent=8 allocator=pyramid sinks=3",
    "key_diff allocator=adaptive allocator.floor=0.0 storage=ragged",
    "expected_attention allocator=uniform storage=dense",
    "expected_attention schedule=every_n schedule.n=4",
    "key_norm scorer=position sinks=4 schedule=every_step",
    "random allocator=adaptive allocator.layers=pyramid storage=ragged recent=8",
    "random schedule=every_n schedule.n=2 recent=8",
    "h2o schedule=after_prefill",
    "h2o schedule=every_n schedule.n=4 sinks=2",
    "h2o allocator=adaptive allocator.floor=0.5 storage=ragged",
    "snapkv scorer.window=8 allocator=global storage=ragged",
    "h2o allocator=global storage=ragged sinks=1",
    "expected_attention allocator=global allocator.floor=0.0 schedule=every_n schedule.n=3 storage=ragged",
    "h2o recent=0",
    "cam scorer.receivers=3 schedule=every_n schedule.n=4",
    "cam scorer.bernoulli=false sinks=4 recent=36 allocator=adaptive",
    "tova schedule=after_prefill",
    "tova storage=ragged",
    "snapkv scorer.window=8 allocator=adaptive allocator.layers=pyramid storage=ragged schedule=every_step",
    "key_diff recent=8",
    f"{PYRAMID} policy.recent_ratio=0.03 policy.gen_window=3",
    f"{PYRAMID} policy.recent_ratio=0.03 policy.gen_window=3 policy.trigger=published",
    f"{PYRAMID} policy.trigger=never storage=kivi4 storage.residual=8 storage.group=8",
    f"{PYRAMID} policy.interval=2",
    "kivi storage.residual=16 storage.group=8",
    "minicache storage=minicache_kivi4 storage.residual=16 storage.group=8",
    "snapkv storage=kivi2 storage.residual=16 storage.group=8",
    "snapkv scorer.window=8 storage=fp8 storage.format=e5m2 storage.scale=head",
    "h2o storage=fp8",
    "ada_kv scorer.window=8 storage=turboquant storage.bits=3",
    "lagkv scorer.lag=8 schedule=every_n schedule.n=4",
    "lagkv scorer.lag=8 scorer.cross_scoring=true allocator=adaptive storage=ragged",
    "finch scorer.window=8 schedule=every_n schedule.n=3",
    "chunkkv scorer@method.scorer.scorer=key_diff scorer.chunk=5 schedule=every_n schedule.n=4",
    "chunkkv scorer@method.scorer.scorer=expected_attention scorer.chunk=5",
    "chunkkv scorer.scorer.granularity=query_head scorer.chunk=5 scorer.scorer.window=8 allocator=pyramid",
    "key_norm allocator=whole_layers allocator.first=1",
    "duo_attention sinks=4 recent=7 storage=fp8",
    "duo_attention sinks=4 recent=6 storage=dense schedule=hold",
    "duo_attention schedule=streaming_heads sinks=4 recent=8",
]
METHODS = NAMES + VARIANTS
SLOW = {*VARIANTS} - {*VARIANTS[::3]}
"""Variants that only ``make slow`` runs."""


def cases(texts: Iterable[str], *values: object) -> list:
    """Parameters of a test: each text with ``values``."""
    return marked_slow(texts, SLOW, *values)


BUDGET = 40  # below LONG
LONG, MIDDLE, SHORT = 70, 55, 13


@memoize
def make(text: str, budget: float | str = BUDGET) -> Method:
    """The method that ``text`` names, at ``budget``; settings as they are typed after ``method.`` or ``method/``."""
    name, *settings = text.split()
    own = {} if settings else own_settings(name)
    if budget == BUDGET:
        budget = own.pop("budget", BUDGET)
    overrides = [f"method={name}", f"method.budget={budget}"]
    overrides += [f"method.{key}={value}" for key, value in own.items()]
    groups = ("scorer=", "scorer@", "allocator=", "schedule=", "storage=")
    overrides += [("method/" if setting.startswith(groups) else "method.") + setting for setting in settings]
    with hydra.initialize_config_module("kvbench.conf", version_base="1.3"):
        return instantiate(hydra.compose("config", overrides=overrides).method)


def differs_in_the_scorer_alone(name: str) -> bool:
    """Whether a method is SnapKV but for the tokens that it keeps of a prompt."""
    policies = [make(n).policy for n in (name, "snapkv")]
    if name == "snapkv" or not all(isinstance(policy, EvictionPolicy) for policy in policies):
        return False
    parts = [(type(p.allocator), type(p.schedule), p.scorer.repeats_prompt, p.scorer.prefill_only) for p in policies]
    return parts[0] == parts[1] and make(name).storage == make("snapkv").storage and make(name).sharing is None


SCORERS = {"chunkkv", "cur", "finch", "key_diff", "key_norm", "lagkv", "random"}
"""SnapKV's steps and buffers with other scorers: tests of what follows the compression are slow."""


def once_for_scorers(texts: Iterable[str], *values: object, slow: Collection[str] = ()) -> list:
    """As ``cases``, with ``SCORERS`` among the slow ones."""
    return marked_slow(texts, {*SLOW, *SCORERS, *slow}, *values)


@memoize
def model_for(text: str, family: str = "llama", dtype: torch.dtype = torch.float64, kv_heads: int = 2):
    """A tiny model that the method can be used on: of its architecture, where it is one."""
    sharing = make(text).sharing
    if sharing is None:
        return tiny_model(family, dtype, kv_heads)
    model = shared_model(
        sharing, "sdpa", dtype, std=0.07, **SHAPE | {"num_hidden_layers": 4, "num_key_value_heads": kv_heads}
    )
    model.generation_config.pad_token_id = 0
    return model


def logits_of(model, method, ids, tokens, mask=None, chunk_size=None):
    """Logits after the prompt and after each of ``tokens`` [steps, B], stacked; and the cache."""
    cache = method.new_cache(model)
    out = [prefill(model, cache, ids, mask, chunk_size)]
    out += [decode(model, cache, token) for token in tokens]
    return torch.stack(out), cache


@memoize
def full_logits(model, length: int, steps: int) -> torch.Tensor:
    """Logits of the full cache after a prompt of ``length`` tokens and after each of ``steps``."""
    return logits_of(model, Method("full"), prompt_ids(length), some_tokens(steps) if steps else [])[0]


def some_tokens(steps: int, batch: int = 1) -> torch.Tensor:
    return torch.stack([prompt_ids(batch, seed=50 + i)[0] for i in range(steps)])


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_methods_whose_steps_are_snapkvs_differ_in_the_scorer_alone(name):
    assert differs_in_the_scorer_alone(name)


@pytest.mark.parametrize("text", cases(METHODS))
def test_a_budget_that_holds_everything_changes_nothing(text):
    model, ids, tokens = model_for(text), prompt_ids(LONG), some_tokens(6)
    method = make(text, budget=1000)
    if not method.storage.capabilities.lossless:
        tokens = []  # what follows the first token reads rounded tokens
    full = full_logits(model, LONG, len(tokens))
    ours, _ = logits_of(model, method, ids, tokens)
    assert (ours - full).abs().max() < 1e-5


@pytest.mark.parametrize("text", once_for_scorers(name for name in NAMES if name != "no_cache"))
def test_a_decode_step_asks_the_device_for_nothing(text, monkeypatch):
    """A number that the host waits for in every step empties a GPU's queue; the first step may make room to grow.

    A policy that scores again what is stored counts it on the host, at the steps at which it evicts.
    """
    model, policy, asked = model_for(text), make(text).policy, []
    rescoring_steps = policy.schedule.steps_between(BUDGET) if getattr(policy, "rescores", False) else 1000
    cache = make(text).new_cache(model)
    prefill(model, cache, *left_pad([prompt_ids(LONG, 1), prompt_ids(MIDDLE, 2)]))
    for i, token in enumerate(some_tokens(20, batch=2)):
        if i == 1:
            for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__int__", "__float__", "__bool__", "__index__"):
                theirs = getattr(torch.Tensor, name)

                def ask(self, *args, theirs=theirs, name=name, **how):
                    asked.append(name)
                    return theirs(self, *args, **how)

                monkeypatch.setattr(torch.Tensor, name, ask)
        decode(model, cache, token)
        if (i + 1) % rescoring_steps == 0:
            asked.clear()
        assert asked == []


KIVIS = {"minicache_kivi4", "snapkv_kivi4"}  # as kivi, and as a variant whose blocks are smaller


@pytest.mark.parametrize(
    "text", once_for_scorers(METHODS, slow={*KIVIS, *(text for text in VARIANTS if "storage=" not in text)})
)
def test_room_for_what_is_to_come_is_made_once(text, monkeypatch):
    """No buffer is copied into a larger one twice if their number is known, and no more room is made than they take.

    Recent tokens that leave again, at most a storage's ``residual``, move in their own little room.
    """
    model, method = model_for(text), make(text)
    cache = method.new_cache(model)
    if cache.recomputes or method.policy.capabilities.evicts_while_decoding or method.storage.name.startswith("hf"):
        return  # no buffers; as many tokens as before; a library's own
    recent, growth, made, again = getattr(method.storage, "residual", 0), 24, {}, []
    steps = max(growth, recent) + 40
    monkeypatch.setattr(Growing, "growth", growth)

    def watched(x, used, capacity, dim=2, real=buffer.grown):
        if x.data_ptr() in made and used > recent:
            again.append(x.shape)
        out = real(x, used, capacity, dim)
        made[out.data_ptr()] = out  # kept, so that no address is used again
        return out

    for module in (buffer, dense):
        monkeypatch.setattr(module, "grown", watched)
    cache.reserve(steps)
    prefill(model, cache, prompt_ids(LONG))
    for token in some_tokens(steps):
        decode(model, cache, token)
    assert made and not again  # not even at the first step: the prompt was written to where there is room
    without = method.new_cache(model)
    prefill(model, without, prompt_ids(LONG))
    for token in some_tokens(steps):
        decode(model, without, token)
    assert again or recent >= growth  # a block or none in so many steps
    assert cache.kv_bytes_logical == without.kv_bytes_logical
    shape = kv_shape(model.config, model.dtype)
    spare = (
        shape.layers * shape.kv_heads * 2 * buffer.FREE_SLOTS * shape.head_dim * shape.element_bytes if recent else 0
    )
    assert cache.kv_bytes_stored <= without.kv_bytes_stored * 1.001 + spare


@pytest.mark.parametrize("text", cases(METHODS))
def test_the_first_token_is_the_full_caches(text):
    model, ids = model_for(text), prompt_ids(LONG)
    method = make(text)
    if not method.policy.capabilities.attends_whole_prompt:
        return  # its prompt tokens never saw the whole prompt: the first token may differ
    full = full_logits(model, LONG, 0)
    ours, _ = logits_of(model, method, ids, [])
    assert (ours - full).abs().max() < 1e-9


def exact_attention(text: str) -> bool:
    """Plain attention over what is held, bit for bit; methods that re-position, merge or round have their own tests."""
    method = make(text)
    keeps = method.policy.capabilities
    exact = keeps.keeps_positions and not keeps.merges_values and method.storage.capabilities.lossless
    return method.shares_prompt and exact


@pytest.mark.parametrize(
    ("text", "chunk_size"),
    [
        *cases(METHODS, None),
        *once_for_scorers(METHODS, 9, slow=VARIANTS),
    ],
)
def test_attention_is_over_exactly_the_tokens_held(text, chunk_size):
    """The masked-full-attention oracle, in a left-padded batch, over 8 decode steps and one of several tokens."""
    if not exact_attention(text):
        return
    model = model_for(text)
    prompts = [prompt_ids(LONG, 1), prompt_ids(MIDDLE, 2), prompt_ids(SHORT, 3)]
    ids, mask = left_pad(prompts)
    method = make(text)
    cache = method.new_cache(model)
    witnesses = watch(cache, mask)
    prefill(model, cache, ids, mask, chunk_size)
    for token in some_tokens(8, batch=3):
        decode(model, cache, token)
    if not method.policy.capabilities.evicts_while_decoding:
        several = torch.cat([prompt_ids(4, 7), prompt_ids(4, 8), prompt_ids(4, 9)])
        with torch.inference_mode():
            positions = cache.tokens_seen[:, None] + torch.arange(4)
            model(input_ids=several, position_ids=positions, past_key_values=cache, use_cache=True)
        fed = 12
    else:
        fed = 8
    assert all(w.steps >= 9 for w in witnesses)
    held: dict[torch.Tensor, int] = {}  # tokens held beyond the formula's, over all layers
    layers_differ = isinstance(method.policy, EvictionPolicy) and method.policy.allocator.spans_layers
    for layer, witness in enumerate(witnesses):
        for row, prompt in zip(witness.held_columns(), prompts, strict=True):
            expected = method.policy.kept_tokens(prompt.shape[1], fed, len(witnesses), len(row))[layer]
            lengths = [len(head) for head in row]
            held[prompt] = held.get(prompt, 0) + sum(lengths) - expected * len(row)
            assert layers_differ or held[prompt] == 0
            assert method.policy.capabilities.heads_differ or len(set(lengths)) == 1
    assert set(held.values()) == {0}


@pytest.mark.parametrize("text", cases(METHODS))
def test_a_left_padded_batch_is_each_row_alone(text):
    model, method = model_for(text), make(text)
    prompts = [prompt_ids(LONG, 1), prompt_ids(MIDDLE, 2), prompt_ids(SHORT, 3)]
    ids, mask = left_pad(prompts)
    tokens = some_tokens(6, batch=3)
    together, _ = logits_of(model, method, ids, tokens, mask)
    for row, prompt in enumerate(prompts):
        alone, _ = logits_of(model, method, prompt, tokens[:, row : row + 1])
        assert (together[:, row] - alone[:, 0]).abs().max() < 1e-9


@pytest.mark.parametrize("text", cases(METHODS))
def test_several_tokens_after_the_prompt_are_one_after_another_and_a_copy_goes_its_own_way(text, monkeypatch):
    """In a left-padded batch; what one copy of the cache is fed, the other one does not see. Nothing of the model is
    copied with it: a model's weights can take gigabytes, and those of some layouts cannot be copied at all."""
    monkeypatch.setattr(decoding, "MAX_TOKENS_PER_FEED", 4)
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", lambda self, memo: pytest.fail("a weight is copied"))
    model, method = model_for(text), make(text)
    ids, mask = left_pad([prompt_ids(LONG, 1), prompt_ids(MIDDLE, 2)])
    tokens = some_tokens(7, batch=2)
    expected, _ = logits_of(model, method, ids, tokens, mask)
    cache = method.new_cache(model)
    prefill(model, cache, ids, mask)
    other = cache.fork()
    for _ in feed(model, other, some_tokens(11, batch=2).flip(0).T):
        pass
    fed = torch.cat(list(feed(model, cache, tokens.T)), dim=1)
    assert fed.shape[:2] == (2, 7)
    assert (fed.transpose(0, 1) - expected[1:]).abs().max() < 1e-9


@pytest.mark.parametrize("text", cases(METHODS))
def test_continuations_are_scored_through_the_compressed_cache(text):
    """Each token's log-probability is that of decoding it after the tokens before it, whatever else is asked beside."""
    model, method = model_for(text), make(text)
    prompts = [prompt_ids(LONG, 1), prompt_ids(MIDDLE, 2)]
    ids, mask = left_pad(prompts)
    asked = [
        [([5], [7, 8, 9]), ([5], [11]), ([], [3, 4])],
        [([6, 2], [10])],
    ]
    found = score(model, method.new_cache(model), ids, mask, asked)
    assert [len(row) for row in found] == [3, 1]
    for prompt, pairs, row in zip(prompts, asked, found, strict=True):
        for (given, scored), likelihood in zip(pairs, row, strict=True):
            tail = torch.tensor([*given, *scored])
            logits, _ = logits_of(model, method, prompt, tail[:-1, None])
            predictions = logits[:, 0].log_softmax(-1)[len(given) :]
            expected = predictions.gather(-1, tail[len(given) :, None])[:, 0]
            assert torch.allclose(torch.tensor(likelihood.log_probs).double(), expected, atol=1e-5)
            assert likelihood.greedy == (predictions.argmax(-1) == tail[len(given) :]).tolist()


@pytest.mark.parametrize("text", cases(METHODS))
def test_two_sequences_in_either_order(text):
    """State that outlives a batch (SnapKV's and H2O's published code has some) would make the second one differ."""
    model, method = model_for(text), make(text)
    first, second = prompt_ids(LONG, 1), prompt_ids(MIDDLE, 2)
    tokens = some_tokens(4)
    a, b = (logits_of(model, method, ids, tokens)[0] for ids in (first, second))
    b_again, a_again = (logits_of(model, method, ids, tokens)[0] for ids in (second, first))
    assert torch.equal(a, a_again)
    assert torch.equal(b, b_again)


@pytest.mark.parametrize(
    ("text", "kv_heads"),
    [*cases(METHODS, 2), *(case for n in (1, 4) for case in once_for_scorers(METHODS, n, slow=VARIANTS))],
)
def test_bytes_are_the_formulas(text, kv_heads):
    model = model_for(text, kv_heads=kv_heads)
    method, shape = make(text), kv_shape(model.config, model.dtype)
    capabilities = method.policy.capabilities
    for length, batch in ((SHORT, 1), (BUDGET, 1), (LONG, 1), (LONG, 4)):
        ids = torch.cat([prompt_ids(length, seed) for seed in range(batch)])
        cache = method.new_cache(model)
        prefill(model, cache, ids)
        padding = cache.kv_bytes_stored - batch * method.bytes_formula(shape, length)
        if not (capabilities.heads_differ and capabilities.evicts_while_decoding):  # padded running scores
            assert 0 <= padding <= shape.layers * method.storage.capabilities.padding_bytes
        assert padding >= 0
        assert cache.kv_bytes_logical == batch * method.bytes_formula(shape, length)
        for token in some_tokens(3, batch):
            decode(model, cache, token)
        assert cache.kv_bytes_logical == batch * method.bytes_formula(shape, length, new_tokens=3)
        assert cache.kv_bytes_stored >= cache.kv_bytes_logical


@pytest.mark.parametrize("text", cases(METHODS))
@pytest.mark.parametrize("length", [1, 5, BUDGET, BUDGET + 1])
def test_prompts_around_the_window_and_the_budget(text, length):
    model, ids = model_for(text), prompt_ids(length)
    logits, _ = logits_of(model, make(text), ids, some_tokens(3))
    assert torch.isfinite(logits).all()
    if length + 3 <= BUDGET and make(text).storage.capabilities.lossless:
        full = full_logits(model, length, 3)
        assert (logits - full).abs().max() < 1e-5


@pytest.mark.parametrize("text", once_for_scorers(METHODS))
def test_generation_far_beyond_the_budget(text):
    model = model_for(text)
    cache, steps = make(text).new_cache(model), BUDGET + 24
    result = generate(model, cache, prompt_ids(LONG), max_new_tokens=steps)
    assert len(result.tokens[0]) == steps


@pytest.mark.parametrize(
    ("text", "family"),
    [
        *cases(METHODS, "llama"),
        *(case for family in ("mistral", "qwen3") for case in once_for_scorers(METHODS, family, slow=VARIANTS)),
    ],
)
def test_architectures_and_plain_generate(text, family):
    """The same tokens through our engine and through ``model.generate``, alone and in a padded batch."""
    if make(text).sharing is not None and family != "llama":
        return
    model, method = model_for(text, family), make(text)
    ids, mask = left_pad([prompt_ids(LONG, 1), prompt_ids(MIDDLE, 2)])
    ours = generate(model, method.new_cache(model), ids, mask, max_new_tokens=6).tokens
    cache = method.new_cache(model)
    cache.text_seeds = text_seeds(ids, mask)  # which the engine does
    how = {"use_cache": False} if cache.recomputes else {"past_key_values": cache}
    if isinstance(method.policy, EvictionPolicy) and method.policy.scorer.repeats_prompt:
        with pytest.raises(InputError, match=r"model\.generate does not"):
            model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **how)
        return
    theirs = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **how)
    assert theirs[:, ids.shape[1] :].tolist() == ours


@pytest.mark.parametrize("text", cases(METHODS))
def test_a_prompt_in_chunks_is_a_prompt_in_one_piece(text):
    model, method = model_for(text), make(text)
    ids, mask = left_pad([prompt_ids(LONG, 1), prompt_ids(SHORT, 2)])
    tokens = some_tokens(4, batch=2)
    whole, _ = logits_of(model, method, ids, tokens, mask)
    if method.new_cache(model).recomputes:
        return
    if isinstance(method.policy, PyramidInfer):
        with pytest.raises(InputError, match=r"runner\.chunk_size"):
            logits_of(model, method, ids, tokens, mask, 7)
        return
    for chunk_size in (1, 7, 64) if text in NAMES and text not in SCORERS else (7, 64):
        chunked, _ = logits_of(model, method, ids, tokens, mask, chunk_size)
        assert (chunked - whole).abs().max() < 1e-9


@pytest.mark.parametrize("text", cases(METHODS))
def test_bfloat16_agrees_with_float32(text):
    """Same tokens kept but for near-ties: the logits stay close on average, and nothing overflows."""
    ids, tokens = prompt_ids(LONG), some_tokens(4)
    exact, _ = logits_of(model_for(text, dtype=torch.float32), make(text), ids, tokens)
    rounded, _ = logits_of(model_for(text, dtype=torch.bfloat16), make(text), ids, tokens)
    assert torch.isfinite(rounded).all()
    similarity = torch.nn.functional.cosine_similarity(exact.flatten(), rounded.float().flatten(), dim=0)
    # A rounded score also shifts the budgets of heads, and each step evicts by sums over the steps before.
    compounds = make(text).policy.capabilities.heads_differ and make(text).policy.capabilities.evicts_while_decoding
    assert similarity > (0.8 if compounds else 0.95)


@pytest.mark.parametrize("text", cases(METHODS))
def test_going_on_together_changes_nothing(text):
    """Beside methods that read the prompt as one, whether this one rides on their reading or reads it by itself."""
    model, method = model_for(text), make(text)
    ids, mask = left_pad([prompt_ids(LONG, 1), prompt_ids(MIDDLE, 2)])
    if not method.shares_steps:
        with pytest.raises(ValueError, match="cannot share decode steps"):
            FanOutCache([method.new_cache(model), Method("full").new_cache(model)])
        return
    others = [replace(other, sharing=method.sharing) for other in (Method("full"), make("snapkv", budget=33))]
    together = [others[0], method, others[1]]
    fan_out = FanOutCache([m.new_cache(model) for m in together])
    result = generate(model, fan_out, ids, mask, max_new_tokens=8)
    for i, member in enumerate(together):
        alone = generate(model, member.new_cache(model), ids, mask, max_new_tokens=8)
        assert result.tokens[2 * i : 2 * i + 2] == alone.tokens


@pytest.mark.parametrize("text", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_with_the_layers_number(text, bad):
    model, method = copy.deepcopy(model_for(text)), make(text)
    if method.new_cache(model).recomputes or method.policy.capabilities.prefills_by_steps:
        return  # nothing is stored; or every token is attended to as it comes, and the logits show it
    layer = 1 if method.sharing is None else max(model.config.kv_source_layers)
    with torch.no_grad():
        attention = model.model.layers[layer].self_attn
        (attention.kv_a_proj_with_mqa if hasattr(attention, "kv_b_proj") else attention.v_proj).weight[3, 5] = bad
    with pytest.raises(InputError, match=rf"model=layer {layer}: gave .* NaN or infinite"):
        prefill(model, method.new_cache(model), prompt_ids(LONG))


@pytest.mark.skipif(not has_blocked_products(torch.float32), reason="torch has no oneDNN here")
@pytest.mark.parametrize("text", once_for_scorers(METHODS, slow=VARIANTS))
def test_a_cache_holds_its_own_bytes_on_weights_as_they_are_run(text):
    """Where products are joined, what a cache keeps of one does not keep the others too."""
    plain = model_for(text, dtype=torch.float32)
    run = copy.deepcopy(plain)
    prepack_linear_weights(run)
    held = []
    for model in (plain, run):
        _, cache = logits_of(model, make(text), prompt_ids(LONG), some_tokens(8))
        held.append((cache.kv_bytes_stored, cache.kv_bytes_logical))
    assert held[0] == held[1]


def test_settings_of_a_method_in_this_suite_stand_in_its_yaml():
    assert own_settings("lckv") == {"sharing.encode": "exact"}
    assert own_settings("pyramid_infer") == {"budget": "null"}
    assert own_settings("snapkv") == {}
