"""KVzip: scores of kvpress, its rule by plain forwards of the model, and what it needs."""

from __future__ import annotations

import string
from typing import Any

import pytest
import torch
from golden import newer_entries
from sharing_models import shared_model
from tiny_models import left_pad, prompt_ids, tiny_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import kvbench
from kvbench.conf.errors import InputError
from kvbench.conf.versions import older_parts
from kvbench.methods.cache.compression import marked_by
from kvbench.methods.cache.fan_out import FanOutCache
from kvbench.methods.cache.forward import LayerCall
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.method import Method
from kvbench.methods.policies import repetition
from kvbench.methods.policies.policy import FurtherForwards
from kvbench.methods.policies.repetition import RepetitionCache
from kvbench.methods.policies.request import Request
from kvbench.methods.policies.scorers.kvzip import KVzip
from kvbench.methods.sharing.cla import CLA
from kvbench.methods.sharing.plan import plan_of
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import decode, generate, prefill

LAYERS, HEADS = 3, 2


@pytest.mark.parametrize("block", [512, 5])
def test_scores_are_kvpress(monkeypatch, block):
    monkeypatch.setattr(repetition, "BLOCK_QUERIES", block)
    plan = plan_of(tiny_model().config)
    for layer in newer_entries()["layers"]:
        given = layer["kvzip"]
        keys, values = (torch.tensor(layer[name])[None] for name in "kv")
        cache = RepetitionCache(plan, [(keys, values)], given["n_sink"])
        cache.start, cache.end = given["start"], given["end"]
        new = [torch.tensor(given[f"{name}_repeat"])[None] for name in "qkv"]
        cache.attend(0, LayerCall(*new, LogitRule(16**-0.5)), None)
        found = cache.scores[0][0]
        expected = torch.tensor(given["scores"]["kvzip"])
        torch.testing.assert_close(found[:, given["start"] : given["end"]], expected, rtol=1e-4, atol=1e-6)
        assert found[:, : given["start"]].abs().max() == found[:, given["end"] :].abs().max() == 0


def char_tokenizer(template: bool = False) -> Any:
    """One token a character, within the tiny models' vocabulary; with a chat template ``[be exact]U:...;A:``."""
    backend = Tokenizer(models.WordLevel({char: 1 + i for i, char in enumerate(string.printable)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    if template:
        tokenizer.chat_template = "[be exact]U:{{ messages[0]['content'] }};A:"
    return tokenizer


def ids_of(text: str) -> list[int]:
    return [1 + string.printable.index(char) for char in text]


def in_turn(length: int, seed: int = 0) -> torch.Tensor:
    """A prompt of ``length`` tokens in the template of :func:`char_tokenizer`."""
    return torch.cat([torch.tensor([ids_of(BEFORE)]), prompt_ids(length - len(BEFORE), seed)], dim=1)


BEFORE, AFTER = "[be exact]U:", ";A:"
SILENT = "scorer.instruction_first=null scorer.instruction_next=null"
WORDS = "scorer.instruction_first=Again scorer.instruction_next=From"
FIRST, NEXT = ids_of("\n\nAgain"), ids_of("\n\nFrom")


def naive_scores(
    ids: torch.Tensor, chunk: int, first: int, requests: tuple[list[int], list[int]] = ([], []), reply: str = ""
) -> torch.Tensor:
    """[layers, KV heads, T], by forwards of the plain model over the prompt and what repeats it.

    Args:
        ids: The prompt.
        chunk: Tokens of a chunk.
        first: Number of tokens before the first chunk.
        requests: Ids before the first chunk and before the others.
        reply: Text between a request and its chunk.
    """
    model = tiny_model()
    model.set_attn_implementation("eager")
    length = ids.shape[1]
    scores = torch.zeros(LAYERS, HEADS, length, dtype=torch.float64)
    for start in range(first, length, chunk):
        end = min(length, start + chunk)
        before = requests[0] if start == first else requests[1] + ids[0, max(0, start - 8) : start].tolist()
        new = torch.tensor([[*before, *ids_of(reply), *ids[0, start:end].tolist()]])
        weights = model(torch.cat([ids, new], 1), output_attentions=True).attentions
        columns = [*range(first), *range(start, end), *range(length, length + new.shape[1])]
        for number, one in enumerate(weights):
            rows = one[0, :, length:][..., columns].double()  # [H_q, N, C]
            rows = rows / rows.sum(-1, keepdim=True)
            largest = rows[..., first : first + end - start].amax(1).unflatten(0, (HEADS, 2)).amax(1)
            scores[number, :, start:end] = largest
    return scores


def kept_tokens(cache, full) -> list[list[list[int]]]:
    """Positions that each head of each layer holds, of the only row, found by their keys in a full cache."""
    out = []
    for layer, whole in zip(cache.layers, full.layers, strict=True):
        keys, _, valid = layer.storage.read()
        every = whole.storage.read()[0]
        heads = []
        for h in range(HEADS):
            held = keys[0, h] if valid is None else keys[0, h][valid.expand(1, HEADS, -1)[0, h]]
            heads.append([int((every[0, h] == key).all(-1).nonzero()) for key in held])
        out.append(heads)
    return out


def check_kept(ids: torch.Tensor, method: Method, tokenizer: Any, scores: torch.Tensor, first: int) -> None:
    """Check that a cache holds ``first`` tokens, the last ones and those of the largest scores over all heads."""
    model, length, recent = tiny_model(), ids.shape[1], method.policy.recent
    full = Method("full").new_cache(model)
    prefill(model, full, ids)
    cache = method.new_cache(model, tokenizer)
    prefill(model, cache, ids)
    candidates = {
        (layer, h, t): float(scores[layer, h, t])
        for layer in range(LAYERS)
        for h in range(HEADS)
        for t in range(first, length - recent)
    }
    count = LAYERS * HEADS * (method.policy.budget - first - recent)
    best = sorted(candidates, key=lambda place: -candidates[place])[:count]
    for layer, heads in enumerate(kept_tokens(cache, full)):
        for h, held in enumerate(heads):
            chosen = sorted(t for number, head, t in best if (number, head) == (layer, h))
            assert held == [*range(first), *chosen, *range(length - recent, length)]


@torch.inference_mode()
@pytest.mark.parametrize(("chunk", "more"), [(100, ""), (20, ""), (20, "recent=6")])
def test_kept_tokens_are_the_best_of_the_whole_cache(chunk, more):
    ids, method = prompt_ids(55), named_method(f"kvzip budget=20 scorer.chunk={chunk} {SILENT} {more}")
    check_kept(ids, method, None, naive_scores(ids, chunk, 4), first=4)


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [100, 20])
@pytest.mark.parametrize("template", [False, True])
def test_a_request_in_words_is_before_each_chunk(chunk, template):
    """In the chat template the chunk is the model's answer; what is before the user's text stays whole."""
    ids = in_turn(55)
    first, reply = (len(BEFORE), AFTER) if template else (4, "")
    scores = naive_scores(ids, chunk, first, (FIRST, NEXT), reply)
    method = named_method(f"kvzip budget=20 scorer.chunk={chunk} {WORDS}")
    check_kept(ids, method, char_tokenizer(template), scores, first)
    silent = named_method(f"kvzip budget=20 scorer.chunk={chunk} {SILENT}")
    check_kept(ids, silent, char_tokenizer(template), naive_scores(ids, chunk, first), first)


@torch.inference_mode()
def test_a_prompt_that_is_not_in_the_template_has_no_turn_to_end():
    ids, method = prompt_ids(55), named_method(f"kvzip budget=20 scorer.chunk=20 {WORDS}")
    check_kept(ids, method, char_tokenizer(template=True), naive_scores(ids, 20, 4, (FIRST, NEXT)), first=4)


@torch.inference_mode()
def test_rows_in_and_out_of_the_template_are_each_alone():
    model, tokenizer = tiny_model(), char_tokenizer(template=True)
    prompts = [prompt_ids(45, 1), in_turn(45, 2), in_turn(13, 3), in_turn(40, 4)]
    method = named_method(f"kvzip budget=20 scorer.chunk=15 {WORDS}")
    together, tokens = method.new_cache(model, tokenizer), torch.tensor([3, 4, 5, 6])
    prefill(model, together, *left_pad(prompts))
    logits = decode(model, together, tokens)
    for row, prompt in enumerate(prompts):
        cache = method.new_cache(model, tokenizer)
        prefill(model, cache, prompt)
        torch.testing.assert_close(decode(model, cache, tokens[row : row + 1])[0], logits[row])
        assert cache.further_forwards == [together.further_forwards[row]]
    # Chunks of 15: of 45 - 4 tokens, of 45 - 12, none within the budget, of 40 - 12; the request of 7 or 6 and 8 more.
    assert [f.count for f in together.further_forwards] == [3, 3, 0, 2]
    assert [f.tokens for f in together.further_forwards] == [
        41 + 7 + 2 * (6 + 8),
        33 + 7 + 2 * (6 + 8) + 3 * len(AFTER),
        0,
        28 + 7 + (6 + 8) + 2 * len(AFTER),
    ]


@torch.inference_mode()
def test_further_forwards_are_counted_and_part_of_the_compression():
    """The count is that of the forwards that run, also for the member of a fan-out that reuses another one's."""
    model, forwards, marks = tiny_model(), [], []
    methods = [named_method(f"kvzip budget={budget} scorer.chunk=15 {WORDS}") for budget in (20, 30)]
    caches = [method.new_cache(model, char_tokenizer()) for method in (*methods, Method("full"))]
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: forwards.append((kwargs["input_ids"].shape[1], len(marks))), with_kwargs=True
    )
    with marked_by(lambda device: marks.append(device)):
        prefill(model, FanOutCache(caches), prompt_ids(45, 1))
    hook.remove()
    further = [tokens for tokens, n_marks in forwards if n_marks % 2]  # within a compression
    assert len(further) == len(forwards) - 1 == 3
    for cache in caches[:2]:
        assert cache.further_forwards == [FurtherForwards(3, sum(further))]
    assert not caches[2].further_forwards


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(InputError, match=r"^method\.scorer\.instruction_first=Write .*: is text, and .* null") as error:
        named_method("kvzip").new_cache(tiny_model())
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"^method\.scorer\.instruction_next=Write"):
        named_method("kvzip scorer.instruction_first=null").new_cache(tiny_model())
    with kvbench.compress(tiny_model(), "kvzip", tokenizer=char_tokenizer(), budget=20) as cache:
        prefill(tiny_model(), cache, prompt_ids(30))
    tokens = len("\n\n" + KVzip().instruction_first) + 26
    assert cache.further_forwards == [FurtherForwards(1, tokens)]


@pytest.mark.parametrize(("template", "problem"), [("{{ 1 / 0 }}", "fails: ZeroDivisionError"), ("[U]", "leaves out")])
def test_a_template_without_a_place_for_the_request_is_refused(template, problem):
    tokenizer = char_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=r"^model\.chat_template=.*" + problem):
        named_method("kvzip").new_cache(tiny_model(), tokenizer)


def test_the_last_token_before_the_users_text_may_be_joined_with_it():
    request = Request(prefix=(5, 6, 7))
    assert [request.prefix_length(ids) for ids in ((5, 6, 7, 1), (5, 6, 1, 1), (5, 1, 1), (1, 6, 7))] == [
        3,
        2,
        None,
        None,
    ]
    assert (
        Request(prefix=(5, 6), may_join=False).prefix_length((5, 1)) is None
    )  # a special token is joined with nothing
    assert Request(prefix=(5,)).prefix_length((1, 2)) is None
    assert Request(prefix=()).prefix_length((1, 2)) == 0
    assert Request().prefix_length((1, 2)) is None


def test_what_kvzip_needs_is_stated():
    assert named_method("kvzip").needs == "further forwards over the prompt, and a tokenizer for its request"
    assert named_method(f"kvzip {SILENT}").needs == "further forwards over the prompt"
    e5m2 = named_method(f"kvzip {SILENT} storage=turboquant")
    assert e5m2.needs == "further forwards over the prompt; a head_dim that is a power of two"


def test_records_without_a_request_in_words_are_of_an_older_version():
    identity = named_method("kvzip").identity()
    assert not older_parts(identity) and identity["selection"]["instruction_first"] == KVzip().instruction_first
    old = {"class": "KVzip", "budget": 0.5, "chunk": 2000, "repeated": 8, "sinks": 4, "instruction": []}
    assert older_parts({"selection": old}) == ["selection"]


@torch.inference_mode()
@pytest.mark.parametrize("allocator", ["uniform", "pyramid"])
def test_other_allocators_keep_the_best_of_each_head(allocator):
    model, ids = tiny_model(), prompt_ids(55)
    scores = naive_scores(ids, 25, 4)
    full = Method("full").new_cache(model)
    prefill(model, full, ids)
    method = named_method(f"kvzip budget=20 scorer.chunk=25 {SILENT} allocator={allocator} storage=dense")
    cache = method.new_cache(model)
    prefill(model, cache, ids)
    counts = method.policy.layer_budgets(55, LAYERS)
    assert (len(set(counts)) > 1) == (allocator == "pyramid")
    for layer, heads in enumerate(kept_tokens(cache, full)):
        for h, held in enumerate(heads):
            sinks = min(4, counts[layer])
            best = scores[layer, h, 4:].topk(counts[layer] - sinks).indices.sort().values + 4
            assert held == [*range(sinks), *best.tolist()]


@torch.inference_mode()
def test_rows_and_members_of_a_fan_out_are_each_alone():
    """Of a padded batch, two rows of one length; the third is within the budget."""
    model, prompts = tiny_model(), [prompt_ids(45, 1), prompt_ids(45, 2), prompt_ids(13, 3)]
    ids, mask = left_pad(prompts)
    methods = [
        named_method(f"kvzip budget=20 scorer.chunk=15 {SILENT} {more}") for more in ("", "schedule=ring recent=5")
    ]
    together = FanOutCache([method.new_cache(model) for method in (*methods, Method("full"))])
    tokens = torch.tensor([3, 4, 5])
    prefill(model, together, ids, mask)
    logits = [decode(model, together, tokens.repeat(3)) for _ in range(6)]
    for number, method in enumerate(methods):
        for row, prompt in enumerate(prompts):
            cache = method.new_cache(model)
            prefill(model, cache, prompt)
            for step in logits:
                torch.testing.assert_close(decode(model, cache, tokens[row : row + 1])[0], step[3 * number + row])


@torch.inference_mode()
def test_members_of_a_fan_out_repeat_a_prompt_once_if_they_score_the_same():
    """Two budgets score alike; other chunks, and a storage of 8 bits, do not."""
    model, ids = tiny_model(), prompt_ids(45, 1)
    settings = ["budget=20 scorer.chunk=15", "budget=30 scorer.chunk=15", "budget=20 scorer.chunk=45"]
    methods = [named_method(f"kvzip {SILENT} {one}") for one in settings]
    methods.append(named_method(f"kvzip {SILENT} budget=20 scorer.chunk=15 allocator=uniform storage=fp8"))
    caches = [method.new_cache(model) for method in methods]
    forwards = []
    hook = model.register_forward_hook(lambda *_: forwards.append(None))
    prefill(model, FanOutCache(caches), ids)
    hook.remove()
    # The prompt; three chunks of 15, once for both budgets; one chunk of 45; three over tokens of 8 bits.
    assert len(forwards) == 1 + 3 + 1 + 3
    for method, cache in zip(methods, caches, strict=True):
        alone = method.new_cache(model)
        prefill(model, alone, ids)
        for layer, other in zip(cache.layers, alone.layers, strict=True):
            for x, y in zip(layer.storage.read(), other.storage.read(), strict=True):
                assert (x is None and y is None) or torch.equal(x, y)


def test_without_the_engine_the_prompt_cannot_be_given_again():
    model = tiny_model()
    cache = named_method(f"kvzip {SILENT} budget=20").new_cache(model)
    with pytest.raises(InputError, match=r"^method/scorer=kvzip: gives the prompt to the model again") as error:
        model.generate(prompt_ids(30), past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert "\n" not in str(error.value)
    assert len(
        generate(
            model, named_method(f"kvzip {SILENT} budget=20").new_cache(model), prompt_ids(30), max_new_tokens=3
        ).tokens
    )


def test_models_that_cannot_repeat_a_prompt_are_refused(monkeypatch):
    shared = shared_model(CLA(2))
    with pytest.raises(InputError, match=r"^method/scorer=kvzip: repeats the prompt"):
        prefill(shared, named_method(f"kvzip {SILENT} budget=10").new_cache(shared), prompt_ids(30) % 90)
    model = tiny_model()
    monkeypatch.setattr(model.config, "max_position_embeddings", 45)
    with pytest.raises(InputError, match=r"^method/scorer=kvzip: repeats 18 tokens behind a prompt of 30, and"):
        prefill(model, named_method(f"kvzip {SILENT} budget=10 scorer.chunk=16").new_cache(model), prompt_ids(30))


@pytest.mark.parametrize("text", ["kvzip storage=kivi4", "kvzip schedule=every_n", "kvzip schedule=every_step"])
def test_settings_that_cannot_be_are_refused(text):
    with pytest.raises(InputError):
        named_method(text)
