"""FINCH: kept sets and keys of kvpress, its rules in plain loops, the length of the question, and moved keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden import newer_entries
from golden import newer_prompt as prompt_of
from random_prompts import D, kept, random_prompt
from tiny_models import SHAPE, left_pad, prompt_ids, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from kvbench.conf.errors import InputError
from kvbench.methods.cache.fan_out import FanOutCache
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.method import Method
from kvbench.methods.cache.prompt import Prompt
from kvbench.methods.cache.rotary import Rotary
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.model_layer import ModelLayer
from kvbench.methods.policies.scorers.finch import FINCH
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import decode, prefill

ROTARY = Rotary(10000.0 ** (-torch.arange(0, D, 2) / D))


@pytest.fixture(scope="session")
def published() -> list[dict[str, Any]]:
    """Of two layers: queries, keys and values, and what the published implementations score and keep of them."""
    layers: list[dict[str, Any]] = newer_entries()["layers"]
    return layers


@pytest.mark.parametrize("normalize", [True, False])
def test_finch_is_kvpress(published, normalize):
    name = f"finch r=0.5 question=8 normalize={normalize}"
    for layer in published:
        prompt = prompt_of(layer, 8)
        scores = FINCH(window=8, normalize=normalize).score(prompt)[0, :, :88]
        assert torch.allclose(scores, torch.tensor(layer["scores"][name])[:, :88], rtol=1e-4, atol=0)
        assert kept(FINCH(window=8, normalize=normalize), prompt, 48) == layer["kept"][name]


@pytest.mark.parametrize(("window", "normalize"), [(8, True), (3, False), (60, True)])
def test_finch_is_the_naive_average(window, normalize):
    """Also where the question is longer than the prompt."""
    prompt = random_prompt(window=window)
    length, w = prompt.length, prompt.query.shape[2]
    ours = FINCH(window=window, normalize=normalize).score(prompt)
    for h in range(2):
        total = torch.zeros(length, dtype=torch.float64)
        for query_head in (2 * h, 2 * h + 1):
            for i in range(w):
                position = length - w + i
                logits = prompt.keys[0, h, : position + 1] @ prompt.query[0, query_head, i] / math.sqrt(D)
                total[: position + 1] += logits.softmax(0) * (position if normalize else 1)
        assert torch.allclose(ours[0, h].double(), total / (2 * w), rtol=1e-5, atol=1e-9)


def test_finch_without_normalization_is_snapkv_without_pooling():
    prompt = random_prompt(window=8)
    ours, snapkv = FINCH(window=8, normalize=False), SnapKV(window=8, kernel=1)
    assert kept(ours, prompt, 20) == kept(snapkv, prompt, 20)
    assert kept(ours, prompt, 20)[0][-8:] == list(range(37, 45))


# chunks


def test_finch_in_chunks_is_kvpress(published):
    for layer in published:
        ours = kept(FINCH(window=8, chunk_length=24), prompt_of(layer, 8), 48)
        assert ours == layer["kept"]["finch r=0.5 question=8 chunk=24"]


@pytest.mark.parametrize(
    ("chunk", "budget", "shares"),
    [
        (15, 24, [8, 8, 8]),
        (10, 20, [5, 5, 4, 4, 2]),  # of 4.44 and 2.22, rounded up where most is lost; the question has more than the 2
        (3, 20, [2] * 5 + [1] * 10),
        (44, 25, [24, 1]),
        (45, 20, [20]),
        (100, 20, [20]),
    ],
)
def test_every_chunk_keeps_its_share(chunk, budget, shares):
    """Of the best of each chunk the highest scores stay, if the question's chunks hold more than their shares."""
    prompt = random_prompt(45)
    scores = FINCH(window=8).score(prompt)[0]
    for h, positions in enumerate(kept(FINCH(window=8, chunk_length=chunk), prompt, budget)):
        best = []
        for number, share in enumerate(shares):
            inside = range(number * chunk, min(45, (number + 1) * chunk))
            ranked = sorted((t for t in inside if t < 37), key=lambda t: -scores[h, t])
            best += ranked[: max(0, share - sum(t >= 37 for t in inside))]
        best = sorted(best, key=lambda t: -scores[h, t])[: budget - 8]
        assert positions == sorted(best) + list(range(37, 45))


def test_chunks_of_equal_tokens_keep_their_first_ones():
    same = torch.ones(1, 2, 40, D)
    prompt = Prompt(same[:, :, :8], same, same, LogitRule(0.25), 0, 1)
    assert (
        kept(FINCH(window=8, chunk_length=10), prompt, 20) == [[*range(5), *range(10, 15), 20, 21, *range(32, 40)]] * 2
    )


# positions


def rotate_to(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Vectors [H, N, D] without positions, at ``positions`` [N] or [H, N]."""
    return ROTARY.rotate(x[None], positions.expand(x.shape[:2])[None])[0]


def stored(layer: dict[str, Any], scorer: FINCH, budget: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept positions [H, C] of a published layer, and the keys that are stored for them [H, C, D]."""
    prompt, policy = prompt_of(layer, 8), EvictionPolicy(scorer, budget)
    state = policy.new_state(ModelLayer(0, 0, 1, lambda: ROTARY))
    slots = policy.select(prompt, state).slots
    assert slots is not None
    keys = prompt.keys.gather(2, slots[..., None].expand(-1, -1, -1, D))
    return slots[0], policy.stored_keys(keys, slots, prompt.length, state)[0]


def test_moved_keys_are_kvpress(published):
    """Theirs are at 0 .. C - 1 and the text goes on at C; ours at T - C .. T - 1, and it goes on at T."""
    name = "finch r=0.5 question=8 normalize=True rerotated keys, rows 0, 20, last"
    for layer in published:
        _, keys = stored(layer, FINCH(window=8), 48)
        theirs = rotate_to(keys, torch.tensor(-(96 - 48)))[:, [0, 20, 47]]
        assert torch.allclose(theirs, torch.tensor(layer[name]), rtol=1e-4, atol=1e-4)


def test_logits_of_moved_keys_are_those_of_a_prompt_of_the_kept_tokens(published):
    for layer in published:
        slots, keys = stored(layer, FINCH(window=8), 48)
        plain = rotate_to(torch.tensor(layer["k"]), -torch.arange(96))  # before RoPE
        own = plain.gather(1, slots[..., None].expand(-1, -1, D))
        query = rotate_to(torch.tensor(layer["q"])[:2], -torch.arange(96))[:, -5:]  # of later tokens
        ours = rotate_to(query, 96 + torch.arange(5)) @ keys.transpose(1, 2)
        alone = rotate_to(query, 48 + torch.arange(5)) @ rotate_to(own, torch.arange(48)).transpose(1, 2)
        assert torch.allclose(ours, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reposition", [True, False])
def test_after_a_prompt_steps_are_those_behind_the_kept_tokens(reposition):
    """One layer, whose keys depend on the tokens alone, and heads that keep the same ones."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": 1})).double().eval()
    options = f"scorer.chunk=1 scorer.scorer.window=6 scorer.scorer.reposition={str(reposition).lower()}"
    cache = named_method(f"chunkkv budget=20 scorer@method.scorer.scorer=finch {options}").new_cache(model)
    ids = torch.randperm(100)[None, :40] + 1  # no token twice
    prefill(model, cache, ids)
    plain = Method("full").new_cache(model)
    prefill(model, plain, ids)
    values, all_values = (c.layers[0].storage.read()[1][0, 0] for c in (cache, plain))
    slots = [all_values.eq(value).all(-1).nonzero()[0, 0].item() for value in values]
    assert len(slots) == 20 and slots == sorted(slots) != list(range(20, 40))
    alone = Method("full").new_cache(model)
    prefill(model, alone, ids[:, slots])
    for token in (3, 5, 8):
        ours, theirs = (decode(model, c, torch.tensor([token])) for c in (cache, alone))
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-4) == reposition


def test_moved_keys_need_a_prompt_that_is_compressed_layer_by_layer():
    with pytest.raises(
        InputError, match=r"method\.scorer\.reposition=True: moves keys when they are stored, which is before"
    ):
        named_method("finch allocator=global storage=ragged")
    assert named_method("finch allocator=global storage=ragged scorer.reposition=false")


# the question's length

QUESTIONS = [5, 12, 0, 5]
LENGTHS = [30, 44, 38, 41]


def held(method: str, ids: torch.Tensor, questions: list[int] | None, **options: Any) -> list[torch.Tensor]:
    """Keys of every layer after a prefill of one row."""
    model = tiny_model()
    cache = named_method(method).new_cache(model)
    prefill(model, cache, ids, question_tokens=questions, **options)
    return [layer.storage.read()[0][0] for layer in cache.layers]


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("others", [[], ["snapkv budget=16 scorer.window=8", "key_diff budget=16"]])
def test_the_question_is_the_window_of_each_row(chunk_size, others):
    """Rows of a padded batch, alone or with other methods, as each row by itself with its question as the window."""
    model, finch = tiny_model(), "finch budget=16 scorer.window=8"
    prompts = [prompt_ids(n, seed) for seed, n in enumerate(LENGTHS)]
    ids, mask = left_pad(prompts)
    caches = [named_method(text).new_cache(model) for text in (finch, *others)]
    together = caches[0] if len(caches) == 1 else FanOutCache(caches)
    prefill(model, together, ids, mask, chunk_size, question_tokens=QUESTIONS)
    for row, question in enumerate(QUESTIONS):
        window = f"budget=16 scorer.window={question or 8} scorer.question=false"
        for layer, keys in zip(caches[0].layers, held(f"finch {window}", prompts[row], None), strict=True):
            assert torch.allclose(layer.storage.read()[0][row], keys, rtol=0, atol=1e-6)
    for text, cache in zip(others, caches[1:], strict=True):  # which the question does not concern
        for layer, keys in zip(cache.layers, held(text, prompts[1], None), strict=True):
            assert torch.allclose(layer.storage.read()[0][1], keys, rtol=0, atol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize(
    "text",
    [
        *("finch budget=16 scorer.window=8 hold_budget=true", "key_norm budget=16 allocator=global storage=ragged"),
        *("duo_attention budget=16 sinks=2 recent=4", "random budget=16 recent=4 schedule=every_step", "cam budget=16"),
    ],
)
def test_prompts_of_one_length_may_have_questions_of_several(text):
    """What concerns one row, as its random draws and its place under a budget of all layers, stays its own."""
    model, lengths, questions = tiny_model(), [30, 30, 30, 41], [5, 12, 5, 0]
    prompts = [prompt_ids(n, seed) for seed, n in enumerate(lengths)]
    together, alone = named_method(text).new_cache(model), [named_method(text).new_cache(model) for _ in prompts]
    ids, mask = left_pad(prompts)
    prefill(model, together, ids, mask, question_tokens=questions)
    for cache, prompt, question in zip(alone, prompts, questions, strict=True):
        prefill(model, cache, prompt, question_tokens=[question])
    for step in range(6):
        ours = decode(model, together, torch.arange(3, 7) + step)
        theirs = [decode(model, cache, torch.tensor([3 + row + step])) for row, cache in enumerate(alone)]
        assert torch.allclose(ours, torch.cat(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrapper", ["chunkkv", "criticalkv"])
def test_a_wrapped_scorer_observes_the_question(wrapper):
    ids, text = prompt_ids(40), f"{wrapper} budget=16 scorer@method.scorer.scorer=finch scorer.scorer.window"
    for question, window in ((11, 11), (0, 8)):
        ours = held(f"{text}=8", ids, [question])
        expected = held(f"{text}={window} scorer.scorer.question=false", ids, None)
        assert all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))


def test_a_longer_question_than_the_budget_is_cut_to_its_end():
    slots = EvictionPolicy(FINCH(window=8), 16).select(
        Prompt(*(torch.randn(1, 2, 40, D) for _ in "qkv"), LogitRule(0.25), 0, 1, question_tokens=25)
    )
    assert slots.slots is not None and slots.slots[0].tolist() == [list(range(24, 40))] * 2


def test_recent_tokens_that_are_asked_for_are_kept_whatever_the_question():
    prompt = Prompt(*(torch.randn(1, 2, 40, D) for _ in "qkv"), LogitRule(0.25), 0, 1, question_tokens=3)
    for positions in kept(FINCH(window=8), prompt, 16, recent=12):
        assert positions[-12:] == list(range(28, 40))


def test_questions_are_counted_for_every_prompt():
    model = tiny_model()
    with pytest.raises(ValueError, match="question_tokens has 2 numbers for 1 prompts"):
        prefill(model, named_method("finch budget=64").new_cache(model), prompt_ids(40), question_tokens=[3, 4])


def test_runs_from_before_these_options_are_those_without_them():
    options = "scorer.question=false scorer.reposition=false"
    old = named_method(f"finch budget=64 {options}").identity()["selection"]
    assert old == {"class": "FINCH", "budget": 64, "window": 32, "normalize": True, "ties": old["ties"]}
    new = named_method("finch budget=64").identity()["selection"]
    assert new == old | {"question": True, "reposition": True}
