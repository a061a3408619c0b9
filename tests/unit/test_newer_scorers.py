"""LagKV and ChunkKV: their rules in plain loops; published sets are in ``test_golden_newer.py``."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from golden import newer_entries
from random_prompts import D, kept, random_prompt
from tiny_models import prompt_ids, tiny_model

from kvbench.conf.errors import InputError
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.prompt import Prompt
from kvbench.methods.policies.allocators.adaptive import Adaptive
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.scorers.attention_sums import AttentionSums
from kvbench.methods.policies.scorers.chunkkv import ChunkKV
from kvbench.methods.policies.scorers.expected_attention import ExpectedAttention
from kvbench.methods.policies.scorers.finch import FINCH
from kvbench.methods.policies.scorers.key_diff import KeyDiff
from kvbench.methods.policies.scorers.key_norm import KeyNorm
from kvbench.methods.policies.scorers.lagkv import LagKV
from kvbench.methods.policies.scorers.last_query import LastQuery
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.runners.config.methods import configured_method, named_method
from kvbench.runners.engine import decode, prefill


@pytest.fixture(scope="session")
def published() -> list[dict[str, Any]]:
    """Of two layers: queries, keys and values, and what the published implementations score and keep of them."""
    layers: list[dict[str, Any]] = newer_entries()["layers"]
    return layers


# LagKV ----------------------------------------------------------------------------------------------------------------


def naive_lagkv(prompt: Prompt, lag: int, sinks: int, value_weight: float) -> list[list[list[float]]]:
    """[head][partition][token of it]: the spread, by section 3 of the paper in loops."""
    out = []
    for h in range(prompt.keys.shape[1]):
        partitions = []
        for p in range((prompt.length - sinks) // lag - 1):
            start, total = sinks + p * lag, [0.0] * lag
            for x, weight in ((prompt.keys[0, h], 1.0), (prompt.values[0, h], value_weight)):
                following = x[start + lag : start + 2 * lag].tolist()
                spreads = []
                for token in x[start : start + lag].tolist():
                    scaled = []
                    for d, number in enumerate(token):
                        low, high = min(row[d] for row in following), max(row[d] for row in following)
                        scaled.append((number - low) / (high - low))
                    mean = sum(scaled) / len(scaled)
                    spreads.append(math.sqrt(sum((n - mean) ** 2 for n in scaled) / (len(scaled) - 1)))
                exps = [math.exp(s) for s in spreads]
                total = [t + weight * e / sum(exps) for t, e in zip(total, exps, strict=True)]
            partitions.append(total)
        out.append(partitions)
    return out


@pytest.mark.parametrize(("lag", "sinks", "value_weight"), [(8, 4, 1.0), (5, 0, 0.5), (20, 5, 0.0)])
def test_lagkv_scores_are_the_papers(lag, sinks, value_weight):
    prompt = random_prompt()
    expected = naive_lagkv(prompt, lag, sinks, value_weight)
    options = {"lag": lag, "sinks": sinks, "value_weight": value_weight}
    spread = LagKV(**options, cross_scoring=True).score(prompt)[0]
    ranks = LagKV(**options).score(prompt)[0]
    assert ranks.dtype == torch.float32
    end = sinks + lag * len(expected[0])
    for h, partitions in enumerate(expected):
        assert spread[h, sinks:end].tolist() == pytest.approx([s for part in partitions for s in part], abs=1e-6)
        assert ranks[h, sinks:end].tolist() == [sorted(part).index(s) for part in partitions for s in part]
    for scores in (spread, ranks):
        assert (scores[:, end:] > scores[:, sinks:end].max()).all()


def test_lagkv_worked_example():
    """Partitions (0, 0), (2, 1) and (0, 0), (1, 2): scaled (0, 0), (2, 0.5), spread 0 and 1.06066."""
    keys = torch.tensor([[0.0, 0.0], [2.0, 1.0], [0.0, 0.0], [1.0, 2.0]])[None, None]
    prompt = Prompt(keys[:, :, :0], keys, keys, LogitRule(1.0), 0, 1)
    scores = LagKV(lag=2, sinks=0, value_weight=0.0, cross_scoring=True).score(prompt)
    assert scores[0, 0, :2].tolist() == pytest.approx([0.2572, 0.7428], abs=1e-4)


def test_lagkv_does_not_depend_on_scale_or_offset_of_a_channel():
    prompt = random_prompt()
    scale, offset = torch.linspace(0.5, 3, D).double(), torch.linspace(-2, 5, D).double()
    moved = Prompt(prompt.query, prompt.keys * scale + offset, prompt.values * scale, prompt.rule, 0, 1)
    assert torch.equal(LagKV(lag=8).score(prompt), LagKV(lag=8).score(moved))


@pytest.mark.parametrize("length", [1, 4, 5, 19, 20, 21])
def test_lagkv_of_short_prompts_keeps_the_most_recent(length):
    """Below ``sinks + 2 x lag`` no partition has a next one."""
    scores = LagKV(lag=8).score(random_prompt(length))
    is_recency = scores[0, 0].tolist() == list(range(length))
    assert is_recency == (length < 20)


def test_lagkv_of_equal_tokens_keeps_the_later_ones():
    """A channel without width counts as zero, so nothing is NaN; of equal ranks the later token stays."""
    keys = torch.ones(1, 1, 36, D)
    prompt = Prompt(keys[:, :, :0], keys, keys, LogitRule(1.0), 0, 1)
    assert LagKV(lag=8).score(prompt).isfinite().all()
    assert kept(LagKV(lag=8), prompt, 15) == [[0, 1, 2, 3, 11, 19, 27, *range(28, 36)]]
    assert kept(LagKV(lag=8), prompt, 8) == [[0, 1, 2, 3, 32, 33, 34, 35]]  # less than sinks and last partition


def test_lagkv_keeps_sinks_and_the_last_tokens_while_decoding():
    """A limit below sinks and last partition: a scorer's largest score is not above that of a protected token."""
    method = named_method("lagkv budget=10 scorer.lag=6 schedule=every_n schedule.n=4")
    model = tiny_model()
    cache = method.new_cache(model)
    logits = prefill(model, cache, prompt_ids(40))
    before = [layer.storage.read()[0][:, :, :4].clone() for layer in cache.layers]
    for _ in range(8):
        logits = decode(model, cache, logits.argmax(-1))
    for layer, sinks in zip(cache.layers, before, strict=True):
        keys = layer.storage.read()[0]
        assert keys.shape[2] == 10 and torch.equal(keys[:, :, :4], sinks)


# ChunkKV --------------------------------------------------------------------------------------------------------------

SNAPKV = SnapKV(window=8, kernel=5, pooling="avg")


def naive_chunks(scores: torch.Tensor, chunk: int, sinks: int, recent: int, budget: int) -> list[int]:
    """Tokens that stay of the scores [H, T] of another scorer, chunk by chunk."""
    length = scores.shape[1]
    protected = {*range(sinks), *range(length - recent, length)}
    totals = scores.double().sum(0).tolist()
    largest = max(totals[t] for t in range(length) if t not in protected)
    totals = [largest if t in protected else total for t, total in enumerate(totals)]
    chunks = [range(start, min(start + chunk, length)) for start in range(0, length, chunk)]
    chunks.sort(key=lambda tokens: -sum(totals[t] for t in tokens) / len(tokens))
    ranked = [t for tokens in chunks for t in tokens if t not in protected]
    return sorted([*protected, *ranked[: budget - len(protected)]])


@pytest.mark.parametrize("budget", [20, 27, 44])
@pytest.mark.parametrize("chunk", [1, 4, 7, 20])
@pytest.mark.parametrize(
    "scorer", [SNAPKV, KeyDiff(), LagKV(lag=8), FINCH(window=8), AttentionSums(), LastQuery()], ids=lambda s: s.name
)
def test_chunkkv_is_the_naive_selection(scorer, chunk, budget):
    prompt = random_prompt(window=45 if isinstance(scorer, AttentionSums) else max(1, scorer.observation_window))
    recent = scorer.protected_recent()
    sinks, recent = scorer.protected_sinks(), recent if isinstance(recent, int) else 0
    scores = scorer.score(prompt, None)[0]
    expected = naive_chunks(scores, chunk, sinks, recent, budget)
    assert kept(ChunkKV(scorer, chunk), prompt, budget, recent=recent) == [expected] * 2


def test_chunkkv_of_a_prompt_shorter_than_a_chunk_ranks_tokens():
    prompt = random_prompt(15, 0)
    expected = naive_chunks(KeyDiff().score(prompt)[0], 1, 0, 0, 6)
    assert kept(ChunkKV(KeyDiff(), 20), prompt, 6) == [expected] * 2


def test_chunkkv_of_chunks_of_one_is_the_other_scorer_for_all_heads():
    """FINCH's published code keeps the same tokens in all heads."""
    prompt = random_prompt(window=8)
    scorer = FINCH(window=8)
    best = scorer.score(prompt)[0, :, :37].sum(0).topk(12).indices.sort().values.tolist()
    assert kept(ChunkKV(scorer, 1), prompt, 20) == [[*best, *range(37, 45)]] * 2


@pytest.mark.parametrize("inner", ["snapkv", "key_diff", "expected_attention", "lagkv"])
def test_chunkkv_is_chosen_over_a_scorer_by_name(inner):
    method = named_method(f"chunkkv budget=64 scorer@method.scorer.scorer={inner} scorer.chunk=10 sinks=2")
    chosen = named_method(f"snapkv scorer={inner} sinks=2").policy.scorer
    assert method.policy.scorer == ChunkKV(chosen, 10)
    settings = " (epsilon 0.01, uniform)" if inner == "expected_attention" else ""
    assert method.label == f"chunkkv 64 over {inner}{settings}"
    assert method.identity()["selection"]["scorer"] == chosen.identity()
    same = configured_method(
        "chunkkv", {"budget": 64, "scorer@method.scorer.scorer": inner, "scorer": {"chunk": 10}, "sinks": 2}
    )
    assert same == method
    model = tiny_model()
    cache = named_method(f"chunkkv budget=40 scorer@method.scorer.scorer={inner} sinks=2").new_cache(model)
    assert prefill(model, cache, prompt_ids(70)).isfinite().all()
    assert {layer.storage.read()[0].shape[2] for layer in cache.layers} == {40}


def test_labels_name_the_inner_scorer_beside_other_parts():
    text = "budget=64 allocator=pyramid schedule=every_n schedule.n=8 recent=32"
    assert named_method(f"chunkkv {text}").label == "chunkkv 64 over snapkv + pyramid + every 8"
    assert named_method("key_diff budget=64 scorer=chunkkv").label == "key_diff 64 + chunkkv over snapkv"


def test_a_chunk_settings_change_the_identity():
    identities = [EvictionPolicy(ChunkKV(s, c), 64).identity() for s in (KeyDiff(), KeyNorm()) for c in (10, 20)]
    assert len({json.dumps(one) for one in identities}) == 4
    assert identities[0]["class"] == "ChunkKV" and identities[0]["scorer"] == {"class": "KeyDiff"}


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (partial(LagKV, lag=0), "scorer.lag"),
        (partial(LagKV, sinks=-1), "scorer.sinks"),
        (partial(LagKV, value_weight=-1.0), "scorer.value_weight"),
        (partial(FINCH, window=0), "scorer.window"),
        (partial(ChunkKV, KeyDiff(), 0), "scorer.chunk"),
        (partial(ChunkKV, ExpectedAttention(), True), "scorer.chunk"),
        (partial(EvictionPolicy, ChunkKV(KeyDiff()), allocator=Adaptive()), "allocator"),
        (partial(configured_method, "chunkkv", {"scorer@method.scorer.scorer": "keydiff"}), "scorer@"),
        (partial(named_method, "chunkkv scorer@method.scorer.scorer=7"), "scorer@"),
    ],
)
def test_bad_settings(make, key):
    with pytest.raises(InputError, match=rf"method[./]{key}"):
        make()


def test_the_authors_setting_of_lagkv_is_typed_as_the_page_says():
    page = (Path(__file__).parents[2] / "docs" / "explanation" / "methods.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"kvbench run method=(lagkv [^`]*)`", page)
    scorer = named_method(command.replace("method.", "")).policy.scorer
    assert (scorer.sinks, scorer.lag) == (16, 1024)
    assert (LagKV().sinks, LagKV().lag) == (4, 128)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chunkkv scorer.scorer.window=0", "method.scorer.scorer.window=0: must be a whole number >= 1"),
        ("chunkkv scorer.scorer.kernel=6", "method.scorer.scorer.kernel=6: must be an odd number"),
        (
            "chunkkv scorer@method.scorer.scorer=chunkkv scorer.scorer.scorer.window=0",
            "method.scorer.scorer.scorer.window=0: must be a whole number >= 1",
        ),
        ("chunkkv scorer@method.scorer.scorer=chunkkv scorer.scorer.chunk=0", "method.scorer.scorer.chunk=0: must be"),
        ("chunkkv scorer.chunk=0", "method.scorer.chunk=0: must be a whole number >= 1"),
        ("chunkkv budget=0", "method.budget=0: must be a whole number of tokens >= 1"),
    ],
)
def test_an_error_of_a_nested_part_names_its_whole_key(text, message):
    name, *options = text.split()
    with pytest.raises(InputError) as error:
        named_method(text)
    assert str(error.value).startswith(message)
    with pytest.raises(InputError) as error:
        configured_method(name, dict(yaml.safe_load(option.replace("=", ": ", 1)).popitem() for option in options))
    assert str(error.value).startswith(message)


def test_a_name_in_place_of_the_inner_scorer_says_how_to_choose_one():
    with pytest.raises(InputError, match=r"use method/scorer@method\.scorer\.scorer=key_diff$"):
        named_method("chunkkv scorer.scorer=key_diff")
    with pytest.raises(InputError, match=r"use method/scorer@method\.scorer\.scorer=NAME; did you mean key_diff"):
        named_method("chunkkv scorer.scorer=keydiff")
