"""Sharing models under the engine: one cache layer for each source, whatever the method and the storage."""

from __future__ import annotations

import pytest
import torch
from contract_settings import marked_slow
from published import ada_kv, pyramidkv
from sharing_models import DOWNWARD, RETENTION, SHAPE, UPWARD, name_of, shared_model
from spy import Witness
from tiny_models import left_pad
from transformers import DynamicCache

from kvbench.conf.errors import InputError
from kvbench.methods.cache.fan_out import FanOutCache
from kvbench.methods.cache.kv_shape import kv_shape
from kvbench.methods.cache.layout import full_shape
from kvbench.methods.cache.method import Method
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.no_cache import NoCache
from kvbench.methods.policies.policy import KeepEverything
from kvbench.methods.policies.pyramid_infer.policy import PyramidInfer
from kvbench.methods.policies.scorers.attention_sums import AttentionSums
from kvbench.methods.policies.scorers.key_diff import KeyDiff
from kvbench.methods.policies.scorers.last_query import LastQuery
from kvbench.methods.policies.scorers.random_tokens import RandomTokens
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.methods.policies.streaming_llm import StreamingLLM
from kvbench.methods.sharing.cla import CLA
from kvbench.methods.sharing.lckv import LCKV
from kvbench.methods.sharing.yoco import YOCO
from kvbench.methods.storage.dense import Dense
from kvbench.methods.storage.kivi import Kivi
from kvbench.methods.storage.minicache.storage import MiniCache
from kvbench.methods.storage.ragged import Ragged
from kvbench.runners.engine import decode, generate, prefill

SHARINGS = [CLA(2), YOCO(window=8), DOWNWARD[-1], LCKV(2), UPWARD[2], UPWARD[3]]
SELECTIONS = [
    KeepEverything(),
    EvictionPolicy(SnapKV(window=4, kernel=3), 12),
    pyramidkv(budget=16, window=4, kernel=3),
    ada_kv(budget=16, window=4, kernel=3),
    EvictionPolicy(AttentionSums(), 12),
    EvictionPolicy(LastQuery(), 12),
    EvictionPolicy(KeyDiff(), 12, recent=2),
    EvictionPolicy(RandomTokens(), 12, recent=2),
    StreamingLLM(12, mode="prefill_evict"),
    StreamingLLM(12, mode="prefill_evict", reposition=False),
]
CLOSE = 1e-9


def pairs() -> list:
    """Each way of sharing with two selections, where consumers refer up with three, and each selection with CLA.

    The other pairs are slow.
    """
    return [
        pytest.param(
            sharing,
            selection,
            id=f"{name_of(sharing)}-{type(selection).__name__}",
            marks=()
            if sharing == CLA(2) or selection in SELECTIONS[:2] or (sharing == LCKV(2) and selection == SELECTIONS[4])
            else pytest.mark.slow,
        )
        for sharing in SHARINGS
        for selection in SELECTIONS
    ]


every_sharing = pytest.mark.parametrize("sharing", SHARINGS, ids=name_of)
every_pair = pytest.mark.parametrize(("sharing", "selection"), pairs())


def prompt(length, seed=0):
    return torch.randint(2, SHAPE["vocab_size"], (1, length), generator=torch.Generator().manual_seed(seed))


def method_of(selection, storage=None):
    return Method("x", selection, storage or (Ragged() if selection.capabilities.heads_differ else Dense()))


def tokens(step, batch=1):
    return torch.tensor([(7 * step + 11 * row) % 90 + 2 for row in range(batch)])


# the full cache ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("sharing", [*DOWNWARD, *UPWARD, RETENTION], ids=name_of)
def test_keeping_everything_is_transformers_own_cache(sharing, chunk_size):
    """Prompt, 10 steps and a further turn of several tokens. A prompt in chunks is only exact with enough passes."""
    exact = {"encode": "exact"} if sharing in UPWARD else {}
    model, x, turn = shared_model(sharing, **exact), prompt(25), prompt(5, 3)
    past = DynamicCache(config=model.config)
    theirs = [model(x, past_key_values=past).logits[:, -1]]
    theirs += [model(tokens(i)[None], past_key_values=past).logits[:, -1] for i in range(10)]
    theirs += [model(turn, past_key_values=past).logits]
    cache = Method("full").new_cache(model)
    ours = [prefill(model, cache, x, chunk_size=chunk_size)]
    ours += [decode(model, cache, tokens(i)) for i in range(10)]
    ours += [model(turn, past_key_values=cache, position_ids=torch.arange(35, 40)[None]).logits]
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < CLOSE


@torch.inference_mode()
@pytest.mark.parametrize("sharing", [*DOWNWARD, *UPWARD[:2], RETENTION], ids=name_of)
def test_generate_takes_our_cache_and_no_cache_gives_the_same_text(sharing):
    exact = {"encode": "exact"} if sharing in UPWARD else {}
    model, x = shared_model(sharing, **exact), prompt(20)
    ours = generate(model, Method("full").new_cache(model), x, max_new_tokens=8).tokens[0]
    none = generate(model, NoCache("no_cache").new_cache(model), x, max_new_tokens=8).tokens[0]
    theirs = model.generate(
        x, past_key_values=Method("full").new_cache(model), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    assert ours == none == theirs[0, 20:].tolist()


# every method ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
@every_pair
def test_attention_covers_exactly_the_stored_tokens(sharing, selection):
    model = shared_model(sharing)
    prompts = [prompt(30, 1), prompt(21, 2), prompt(9, 3)]
    x, mask = left_pad(prompts)
    method = method_of(selection)
    cache = method.new_cache(model)
    full = [i for i, kind in enumerate(cache.plan.layer_types) if kind == "full_attention"]
    together = [prefill(model, cache, x, mask)] if not selection.capabilities.keeps_positions else []
    if selection.capabilities.keeps_positions:
        witnesses = {i: Witness(cache.layers[i], mask) for i in full}
        together = [prefill(model, cache, x, mask)]
    together += [decode(model, cache, tokens(i, 3)) for i in range(8)]
    assert len(cache.layers) == len(set(model.config.kv_source_layers))
    if selection.capabilities.keeps_positions:
        assert all(witnesses[i].steps == 9 for i in full)
    for row, p in enumerate(prompts):  # and a left-padded batch is each row alone
        alone = method.new_cache(model)
        logits = [prefill(model, alone, p)] + [decode(model, alone, tokens(i, 3)[row : row + 1]) for i in range(8)]
        if isinstance(selection, RandomTokens):
            continue
        for a, b in zip(together, logits, strict=True):
            assert (a[row] - b[0]).abs().max() < CLOSE
        for number, layer in enumerate(full):
            expected = selection.kept_tokens(p.shape[1], 8, len(full), alone.tokens_held[layer].shape[1])[number]
            assert alone.tokens_held[layer].double().mean() == expected


@torch.inference_mode()
@every_pair
def test_bytes_are_the_formulas(sharing, selection):
    model = shared_model(sharing)
    method, shape = method_of(selection), kv_shape(model.config, model.dtype)
    for length in (5, 30):
        cache = method.new_cache(model)
        prefill(model, cache, prompt(length))
        assert cache.kv_bytes_stored == cache.kv_bytes_logical == method.bytes_formula(shape, length)
        for i in range(9):
            decode(model, cache, tokens(i))
            assert cache.kv_bytes_logical == method.bytes_formula(shape, length, i + 1)
    plain = full_shape(model)
    assert method.bytes_formula(shape, 30) < Method("full").bytes_formula(plain, 30)


@torch.inference_mode()
@pytest.mark.parametrize("sharing", marked_slow([*SHARINGS, RETENTION], SHARINGS[1:3] + SHARINGS[4:]), ids=name_of)
def test_fan_out_members_match_separate_caches(sharing):
    model = shared_model(sharing)
    x, mask = left_pad([prompt(30, 1), prompt(22, 2)])
    made = [method_of(s) for s in SELECTIONS] + [Method("kivi", storage=Kivi(bits=4, residual=8, group=8))]
    alone = [generate(model, m.new_cache(model), x, mask, max_new_tokens=8).tokens for m in made]
    shape, held = kv_shape(model.config, model.dtype), []
    for method in made:
        own = method.new_cache(model)
        prefill(model, own, x, mask)
        for i in range(7):
            decode(model, own, tokens(i, 2))
        held.append(own.kv_bytes_logical)
    for chunk_size in (None, 11) if not model.config.has_upward_kv_refs else (None,):
        members = [m.new_cache(model) for m in made]
        together = generate(model, FanOutCache(members), x, mask, max_new_tokens=8, chunk_size=chunk_size).tokens
        assert together == [row for rows in alone for row in rows]
        assert [member.kv_bytes_logical for member in members] == held
        for method, member in zip(made, members, strict=True):
            assert member.kv_bytes_logical <= 2 * method.bytes_formula(shape, 30, 7)


@torch.inference_mode()
@pytest.mark.parametrize("sharing", [YOCO(window=8), RETENTION], ids=name_of)
def test_finished_members_do_not_affect_the_others(sharing):
    """Windows and retention states are rows of one batch, from which those of a member that has ended are taken out."""
    model = shared_model(sharing)
    x, mask = left_pad([prompt(20, 1), prompt(12, 2)])
    made = [
        Method("a"),
        Method("b", EvictionPolicy(SnapKV(window=4, kernel=3), 8)),
        Method("c", EvictionPolicy(AttentionSums(), 8)),
    ]
    fan_out, alone = FanOutCache([m.new_cache(model) for m in made]), [m.new_cache(model) for m in made]
    prefill(model, fan_out, x, mask)
    for cache in alone:
        prefill(model, cache, x, mask)
    members = [0, 1, 2]
    for step in range(6):
        if step in (2, 4):
            gone = 1 if step == 2 else 0
            fan_out.drop(gone)
            del members[gone]
        together = decode(model, fan_out, tokens(step, 2).repeat(len(members)))
        for i, member in enumerate(members):
            theirs = decode(model, alone[member], tokens(step, 2))
            assert (together[2 * i : 2 * i + 2] - theirs).abs().max() < CLOSE
        for gone_already in set(range(3)) - set(members):
            decode(model, alone[gone_already], tokens(step, 2))


@torch.inference_mode()
def test_encoding_passes_are_set_per_method():
    """Two caches of one model, made one after the other, encode as their methods say; the model's config stays."""
    model, x = shared_model(LCKV(2)), prompt(30)
    rules = {"few": LCKV(2, iter_forward=0, iter_backward=1), "exact": LCKV(2, encode="exact"), "own": None}
    made = {name: Method(name, sharing=rule).new_cache(model) for name, rule in rules.items()}
    logits = {name: prefill(model, cache, x) for name, cache in made.items()}
    expected = {"few": 1, "exact": 30, "own": 9}
    for name, passes in expected.items():
        assert (logits[name] - model(x, n_iter=passes, use_cache=False).logits[:, -1]).abs().max() < CLOSE
    assert (logits["few"] - logits["exact"]).abs().max() > 1e-3
    assert (model.config.iter_forward, model.config.encode) == (7, "iterative")
    with pytest.raises(ValueError, match="different numbers of passes"):
        FanOutCache([Method(name, sharing=rule).new_cache(model) for name, rule in rules.items()])


@torch.inference_mode()
def test_bytes_read_count_shared_layers_once_per_reader():
    for sharing, layers in ((CLA(2), 6), (YOCO(window=8), 3), (LCKV(2), 6)):
        model = shared_model(sharing)
        read = Method("full").read_formula(model)(30)
        a_token = 2 * 2 * 8 * 8
        assert read == layers * 30 * a_token + (6 - layers) * 7 * a_token


@torch.inference_mode()
@pytest.mark.parametrize("sharing", [CLA(2), YOCO(window=8), DOWNWARD[-1]], ids=name_of)
def test_true_stream_matches_single_tokens(sharing):
    model, x = shared_model(sharing), prompt(30)
    for rule in (StreamingLLM(8, sinks=2), StreamingLLM(8, sinks=2, reposition=False)):
        whole, single = (Method("x", rule).new_cache(model) for _ in range(2))
        ours = prefill(model, whole, x)
        theirs = prefill(model, single, x, chunk_size=1)
        assert (ours - theirs).abs().max() < CLOSE
        assert (decode(model, whole, tokens(1)) - decode(model, single, tokens(1))).abs().max() < CLOSE


@torch.inference_mode()
@every_pair
def test_multi_token_forward_matches_single_steps(sharing, selection):
    model, more = shared_model(sharing), prompt(6, 5)
    at_once, in_turn = (method_of(selection).new_cache(model) for _ in range(2))
    for cache in (at_once, in_turn):
        prefill(model, cache, prompt(30))
    ours = model(more, past_key_values=at_once, position_ids=torch.arange(30, 36)[None]).logits
    theirs = torch.stack([decode(model, in_turn, token) for token in more[0].split(1)], dim=1)
    assert (ours - theirs).abs().max() < CLOSE


@torch.inference_mode()
@pytest.mark.parametrize("sharing", [CLA(3), YOCO(window=8), LCKV(2), UPWARD[2]], ids=name_of)
def test_scores_use_the_queries_of_all_readers(sharing):
    """Against the attention that transformers' eager attention reports, averaged over the layers that share."""
    exact = {"encode": "exact"} if sharing in UPWARD else {}
    eager, x = shared_model(sharing, "eager", torch.float32, **exact), prompt(30)
    attentions = eager(x, output_attentions=True).attentions
    model, config = shared_model(sharing, dtype=torch.float32, **exact), eager.config
    rules = {
        "snapkv": EvictionPolicy(SnapKV(window=4, kernel=1), 10),
        "h2o": EvictionPolicy(AttentionSums(), 10),
        "tova": EvictionPolicy(LastQuery(), 10),
    }
    kept = {}
    for name, rule in rules.items():
        cache = Method(name, rule).new_cache(model)
        chosen = kept[name] = {}
        for number, layer in enumerate(cache.layers):
            if cache.plan.layer_types[number] == "full_attention":
                select = layer.policy.select
                owner = cache.plan.owners[number]
                layer.policy = Spy(select, layer.policy, chosen, owner)
        prefill(model, cache, x)
    for owner in kept["h2o"]:
        weights = []
        for i, source in enumerate(config.kv_source_layers):
            if source == owner:
                w = attentions[i][0]  # [H_q, T, T], with a first column for nothing where the layer is strict
                weights.append((w[..., -30:] if w.shape[-1] == 31 else w).unflatten(0, (2, 2)))
        weights = torch.cat(weights, dim=1).mean(1)  # [H_kv, T, T]
        votes = weights[:, -4:, :26].sum(1).topk(6).indices.sort().values
        assert kept["snapkv"][owner][0, :, :6].tolist() == votes.tolist()
        heavy = weights.sum(1)[:, :25].topk(5).indices.sort().values
        assert kept["h2o"][owner][0, :, :5].tolist() == heavy.tolist()
        last = weights[:, -1].mean(0).topk(10).indices.sort().values
        assert kept["tova"][owner][0, 0].tolist() == last.tolist()


class Spy:
    """A selection that notes what it keeps."""

    def __init__(self, select, selection, chosen, owner):
        self._select, self._selection, self._chosen, self._owner = select, selection, chosen, owner

    def __getattr__(self, name):
        return getattr(self._selection, name)

    def select(self, prompt, state=None):
        kept = self._select(prompt, state)
        self._chosen[self._owner] = kept.slots
        return kept


# storages, and what cannot be ------------------------------------------------------------------------------------


@torch.inference_mode()
@every_sharing
def test_kivi_quantizes_each_source_once(sharing):
    model, x = shared_model(sharing), prompt(40)
    method = Method("kivi", storage=Kivi(bits=8, residual=8, group=8))
    cache, full = method.new_cache(model), Method("full").new_cache(model)
    assert (prefill(model, cache, x) - prefill(model, full, x)).abs().max() < CLOSE
    for i in range(20):
        ours, theirs = (decode(model, c, tokens(i)) for c in (cache, full))
        assert 0 < (ours - theirs).abs().max() < 0.5
        assert cache.kv_bytes_logical == method.bytes_formula(kv_shape(model.config, model.dtype), 40, i + 1)


@torch.inference_mode()
def test_the_upper_half_of_yoco_runs_for_the_queries_that_a_method_wants():
    model, x = shared_model(YOCO(window=8)), prompt(40)
    for selection, queries in (
        (KeepEverything(), 1),
        (EvictionPolicy(SnapKV(window=4, kernel=3), 12), 4),
        (EvictionPolicy(LastQuery(), 12), 1),
        (EvictionPolicy(AttentionSums(), 12), 40),
    ):
        columns, cache = [], Method("x", selection).new_cache(model)
        hooks = [
            layer.mlp.register_forward_pre_hook(lambda _, args, seen=columns: seen.append(args[0].shape[1]))
            for layer in model.model.layers
        ]
        prefill(model, cache, x)
        for hook in hooks:
            hook.remove()
        assert columns == [40] * 3 + [queries] * 3


@pytest.mark.parametrize(
    ("method", "key"),
    [
        (Method("pyramid_infer", PyramidInfer()), "method"),
        (Method("minicache", storage=MiniCache()), "method/storage"),
        (Method("snapkv", EvictionPolicy(SnapKV(granularity="query_head"))), "method.scorer.granularity"),
    ],
)
def test_policies_that_span_layers_are_refused_for_shared_layers(method, key):
    with pytest.raises(InputError, match=f"^{key}="):
        method.new_cache(shared_model(CLA(2)))
    with pytest.raises(InputError, match=f"^{key}="):
        Method(method.name, method.policy, method.storage, CLA(2))


def test_a_stream_cannot_be_encoded_in_passes():
    with pytest.raises(InputError, match="attend over the keys of a higher layer"):
        Method("streaming_llm", StreamingLLM(8)).new_cache(shared_model(LCKV(2)))
