"""KVzip: scores of kvpress, its rule by plain forwards of the model, and what it needs."""

from __future__ import annotations

import pytest
import torch
from golden import newer_entries
from sharing_models import shared_model
from tiny_models import left_pad, prompt_ids, tiny_model

from kvbench.conf.errors import InputError
from kvbench.methods.cache.fan_out import FanOutCache
from kvbench.methods.cache.forward import LayerCall
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.method import Method
from kvbench.methods.policies import repetition
from kvbench.methods.policies.repetition import RepetitionCache
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


def naive_scores(ids: torch.Tensor, chunk: int, sinks: int, instruction: list[int]) -> torch.Tensor:
    """[layers, KV heads, T], by forwards of the plain model over the prompt and what repeats it."""
    model = tiny_model()
    model.set_attn_implementation("eager")
    length = ids.shape[1]
    scores = torch.zeros(LAYERS, HEADS, length, dtype=torch.float64)
    for start in range(sinks, length, chunk):
        end = min(length, start + chunk)
        before = [] if start == sinks else ids[0, max(0, start - 8) : start].tolist()
        new = torch.tensor([[*instruction, *before, *ids[0, start:end].tolist()]])
        weights = model(torch.cat([ids, new], 1), output_attentions=True).attentions
        columns = [*range(sinks), *range(start, end), *range(length, length + new.shape[1])]
        for number, one in enumerate(weights):
            rows = one[0, :, length:][..., columns].double()  # [H_q, N, C]
            rows = rows / rows.sum(-1, keepdim=True)
            largest = rows[..., sinks : sinks + end - start].amax(1).unflatten(0, (HEADS, 2)).amax(1)
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


@torch.inference_mode()
@pytest.mark.parametrize(
    ("chunk", "settings", "instruction"),
    [(100, "", []), (20, "", []), (20, "scorer.instruction=[5,6,7]", [5, 6, 7]), (20, "recent=6", [])],
)
def test_kept_tokens_are_the_best_of_the_whole_cache(chunk, settings, instruction):
    model, ids, budget, sinks = tiny_model(), prompt_ids(55), 20, 4
    recent = 6 if "recent" in settings else 0
    scores = naive_scores(ids, chunk, sinks, instruction)
    full = Method("full").new_cache(model)
    prefill(model, full, ids)
    cache = named_method(f"kvzip budget={budget} scorer.chunk={chunk} {settings}").new_cache(model)
    prefill(model, cache, ids)
    candidates = {
        (layer, h, t): float(scores[layer, h, t])
        for layer in range(LAYERS)
        for h in range(HEADS)
        for t in range(sinks, 55 - recent)
    }
    best = sorted(candidates, key=lambda place: -candidates[place])[: LAYERS * HEADS * (budget - sinks - recent)]
    for layer, heads in enumerate(kept_tokens(cache, full)):
        for h, held in enumerate(heads):
            chosen = sorted(t for number, head, t in best if (number, head) == (layer, h))
            assert held == [*range(sinks), *chosen, *range(55 - recent, 55)]


@torch.inference_mode()
@pytest.mark.parametrize("allocator", ["uniform", "pyramid"])
def test_other_allocators_keep_the_best_of_each_head(allocator):
    model, ids = tiny_model(), prompt_ids(55)
    scores = naive_scores(ids, 25, 4, [])
    full = Method("full").new_cache(model)
    prefill(model, full, ids)
    method = named_method(f"kvzip budget=20 scorer.chunk=25 allocator={allocator} storage=dense")
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
    methods = [named_method(f"kvzip budget=20 scorer.chunk=15 {more}") for more in ("", "schedule=ring recent=5")]
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
    methods = [named_method(f"kvzip {one}") for one in settings]
    methods.append(named_method("kvzip budget=20 scorer.chunk=15 allocator=uniform storage=fp8"))
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
    cache = named_method("kvzip budget=20").new_cache(model)
    with pytest.raises(InputError, match=r"^method/scorer=kvzip: gives the prompt to the model again") as error:
        model.generate(prompt_ids(30), past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert "\n" not in str(error.value)
    assert len(
        generate(model, named_method("kvzip budget=20").new_cache(model), prompt_ids(30), max_new_tokens=3).tokens
    )


def test_models_that_cannot_repeat_a_prompt_are_refused(monkeypatch):
    shared = shared_model(CLA(2))
    with pytest.raises(InputError, match=r"^method/scorer=kvzip: repeats the prompt"):
        prefill(shared, named_method("kvzip budget=10").new_cache(shared), prompt_ids(30) % 90)
    model = tiny_model()
    monkeypatch.setattr(model.config, "max_position_embeddings", 45)
    with pytest.raises(InputError, match=r"^method/scorer=kvzip: repeats 18 tokens behind a prompt of 30, and"):
        prefill(model, named_method("kvzip budget=10 scorer.chunk=16").new_cache(model), prompt_ids(30))


@pytest.mark.parametrize("text", ["kvzip storage=kivi4", "kvzip schedule=every_n", "kvzip schedule=every_step"])
def test_settings_that_cannot_be_are_refused(text):
    with pytest.raises(InputError):
        named_method(text)
