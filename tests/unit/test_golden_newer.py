"""Every entry of ``golden_newer.json``: scores and kept sets of kvpress and of LagKV's authors.

A new entry has to be added to :data:`CASES`, to the test that reads it, or, with a reason, to :data:`NOT_HERE`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import NEWER_LENGTH, golden_prompt, newer_entries, newer_prompt

from kvbench.methods.cache.prompt import ALL_QUERIES, Prompt
from kvbench.methods.cache.rotary import Rotary
from kvbench.methods.policies.allocators.adaptive import Adaptive
from kvbench.methods.policies.allocators.pyramid import Pyramid
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.model_layer import ModelLayer
from kvbench.methods.policies.ranking import keep_mask
from kvbench.methods.policies.schedules.after_prefill import AfterPrefill
from kvbench.methods.policies.scorers.attention_sums import AttentionSums
from kvbench.methods.policies.scorers.base import Scorer
from kvbench.methods.policies.scorers.chunkkv import ChunkKV
from kvbench.methods.policies.scorers.compactor import Compactor, chunk_attention
from kvbench.methods.policies.scorers.criticalkv import CriticalKV
from kvbench.methods.policies.scorers.cur import CUR
from kvbench.methods.policies.scorers.expected_attention import ExpectedAttention
from kvbench.methods.policies.scorers.key_diff import KeyDiff
from kvbench.methods.policies.scorers.key_norm import KeyNorm
from kvbench.methods.policies.scorers.lagkv import LagKV
from kvbench.methods.policies.scorers.last_query import LastQuery
from kvbench.methods.policies.scorers.leverage import Leverage
from kvbench.methods.policies.scorers.position import Position
from kvbench.methods.policies.scorers.snapkv import SnapKV

ENTRIES = newer_entries()
LAYERS: list[dict[str, Any]] = ENTRIES["layers"]
ROTARY = Rotary(10000.0 ** (-torch.arange(8) / 8))


class CountedInFirstStage(CriticalKV):
    """CriticalKV whose protected tokens take places of the first stage, as in kvpress."""

    def ranking_scores(self, scores, ties, count):
        protected = self.scorer.protected_sinks() + int(self.scorer.protected_recent())
        first = (self.first_stage * (torch.as_tensor(count) + protected)).long() - protected
        return ties.masked_fill(keep_mask(scores, first.expand(scores.shape[:2])), float("inf")), None


@dataclass(frozen=True)
class AttentionMeans(AttentionSums):
    """Accumulated attention over the number of queries that could attend to the token, as kvpress averages it."""

    default_schedule = AfterPrefill()
    default_recent = 0

    def score(self, prompt: Prompt, state: Any = None) -> torch.Tensor:
        return super().score(prompt, state) / torch.arange(prompt.length, 0, -1)


class ChunkAttention(Scorer):
    """The second score of Compactor alone."""

    may_be_negative, observation_window, prefill_only = True, ALL_QUERIES, True

    def __init__(self, chunk: int):
        self.chunk = chunk

    def score(self, prompt: Prompt, state: Any = None) -> torch.Tensor:
        return chunk_attention(prompt, self.chunk, published_padding=True)


@dataclass(frozen=True)
class Case:
    """How an entry's numbers are made here.

    Attributes:
        scorer, budget: Parts of the policy.
        options: Other parts.
        rtol, atol: Of scores.
        factor: Of our scores to the published ones.
    """

    scorer: Scorer
    budget: int = 48
    options: dict[str, Any] = field(default_factory=dict)
    rtol: float = 1e-4
    atol: float = 0.0
    factor: float = 1.0

    @property
    def policy(self) -> EvictionPolicy:
        return EvictionPolicy(self.scorer, self.budget, **self.options)

    def prompt(self, layer: dict[str, Any], index: int) -> Prompt:
        return newer_prompt(layer, min(NEWER_LENGTH, self.scorer.observation_window), index)


SNAPKV = SnapKV(window=8, kernel=5, pooling="avg")
EXPECTED = ExpectedAttention(epsilon=0.01)
E = "expected_attention r=0.5"


def expected(**options: Any) -> Case:
    return Case(ExpectedAttention(**options), rtol=1e-3, atol=1e-7)


CASES = {
    "knorm r=0.5": Case(KeyNorm()),
    "keydiff r=0.5": Case(KeyDiff()),
    "lagkv r=0.5 n_sink=4 lag=16": Case(LagKV(lag=16)),
    "lagkv r=0.5 n_sink=4 lag=20": Case(LagKV(lag=20)),
    "lagkv r=0.5 n_sink=4 lag=16 cross_scoring": Case(LagKV(lag=16, cross_scoring=True)),
    "lagkv r=0.5 n_sink=4 lag=128 (short prompt)": Case(LagKV()),
    # The authors keep 4 sinks, 8 tokens of each of 4 partitions, the last partition and 12 tokens after it.
    "lagkv official ratio=0.5 sink=4 lag=16 score_v_ratio=1.0": Case(LagKV(lag=16), 64),
    "lagkv official ratio=0.5 sink=4 lag=16 score_v_ratio=0.0": Case(LagKV(lag=16, value_weight=0.0), 64),
    f"{E} epsilon=0": expected(epsilon=0.0),
    f"{E} epsilon=0.01": expected(epsilon=0.01),
    f"{E} epsilon=0.02": expected(epsilon=0.02),
    f"{E} no vnorm": expected(value_norm=False),
    f"{E} n_sink=2 n_future=32 epsilon=0.01": expected(sinks=2, future=32, epsilon=0.01),
    "cur r=0.5 key local w=16": Case(CUR(norms="key")),
    "cur r=0.5 value local w=16": Case(CUR(norms="value")),
    "cur r=0.5 kv_avg local w=16": Case(CUR(norms="mean")),
    "cur r=0.5 kv_product local w=16": Case(CUR()),
    "cur r=0.5 kv_product local w=20": Case(CUR(local=20)),
    "cur r=0.5 kv_product global": Case(CUR(local=None)),
    "leverage r=0.5 sketch=8": Case(Leverage(8), rtol=1e-3, atol=2e-3),
    # 48 columns of 16 channels: the matrix is singular but for the ridge, and float32 loses digits.
    "leverage r=0.5 sketch=48": Case(Leverage(48), rtol=1e-3, atol=2e-3),
    **{f"non_causal r=0.5 chunk={n}": Case(ChunkAttention(n), rtol=1e-3, atol=1e-4) for n in (32, 40, 256)},
    "snapkv r=0.5 w=8 k=5 (base)": Case(SNAPKV, factor=8),  # the sum over the window, not the mean
    "tova r=0.5 (prompt only)": Case(LastQuery(), options={"recent": 1}),
    "streaming_llm r=0.5 n_sink=4 (prompt only)": Case(Position(), options={"sinks": 4}),
    "observed_attention r=0.5": Case(AttentionMeans()),
    "pyramidkv r=0.5 w=8 k=5 beta=20": Case(SNAPKV, options={"allocator": Pyramid(protected_tokens="counted")}),
    "criticalkv over snapkv w=8 k=5 r=0.5": Case(CountedInFirstStage(SNAPKV)),
    "criticalkv over expected_attention no vnorm r=0.5": Case(CountedInFirstStage(ExpectedAttention(value_norm=False))),
    "critical_adakv over snapkv w=8 k=5 r=0.5 alpha=0.2": Case(
        CountedInFirstStage(SNAPKV), options={"allocator": Adaptive(0.2, rule="safeguard")}
    ),
}
PADDED = "compactor r=0.5 chunk=32 sketch=8"
for text, blending in ((PADDED, None), (f"{PADDED} blending=0.35", 0.35)):
    compactor = Compactor(chunk=32, sketch=8, blending=blending, published_padding=True)
    CASES[text] = Case(compactor, rtol=1e-3, atol=2e-3)
for text, scorer in (("snapkv w=8 k=5", SNAPKV), ("knorm", KeyNorm())):
    for share, budget in ((0.5, 46), (0.7, 26)):  # kvpress' numbers of whole chunks, the last one of 6 tokens
        CASES[f"chunkkv over {text} r={share} chunk=10"] = Case(ChunkKV(scorer, 10), budget)
for text, scorer in (("knorm", KeyNorm()), ("expected_attention epsilon=0.01", EXPECTED), ("snapkv w=8 k=5", SNAPKV)):
    for share, budget in ((0.5, 48), (0.8, 19)):
        for floor in (0.0, 0.2, 1.0):
            adaptive = {"allocator": Adaptive(floor, rule="safeguard")}
            CASES[f"adakv over {text} r={share} alpha={floor}"] = Case(scorer, budget, adaptive)

READ_BY = {
    "finch r=0.5 question=8 ": "test_finch.py",
    "rkv ": "test_reasoning_scorers.py",
    "kvzip": "test_kvzip.py",
    "criticalkv |v W_O|_1": "test_criticalkv.py",
    "pyramidkv r=0.5 w=8 beta=20 kept": "test_golden_newer.py",
}
"""Start of an entry's name -> the file of the test that reads it."""
NOT_HERE = {
    f"{E} no covariance": "the score without the covariance of queries is no option here",
    "chunk (per-chunk top-k) over knorm r=0.5 chunk=20": "a budget per chunk is no allocator here",
    "block over keydiff r=0.5 block=16": "prefill in blocks with eviction in between is no schedule here",
    "merging over knorm r=0.5: values of the kept tokens (ascending), rows 0..5": "no merging by similarity of keys",
    "simlayerkv statistic n_last=1 n_initial=4 n_recent=32": "SimLayerKV is not here",
}
"""Entry -> why nothing here can be compared with it."""


@pytest.fixture(autouse=True)
def published_sketch(monkeypatch):
    """The normal numbers that the published scores were made with."""

    def gaussian(self: Leverage, layer_idx: int, heads: int, dim: int) -> torch.Tensor:
        return torch.tensor(ENTRIES["sketch_gaussian"][str(self.sketch)])

    monkeypatch.setattr(Leverage, "gaussian", gaussian)


def layer_of(entry: dict[str, Any], index: int) -> ModelLayer:
    """The model's layer, whose W_O the file has as [hidden, H_q * D]."""
    weight = torch.tensor(entry["W_O"]).T.unflatten(0, (4, 16))
    return ModelLayer(index, index, 2, lambda: ROTARY, lambda: [weight])  # type: ignore[arg-type, return-value]


def for_each(names: list[str]) -> Callable[..., Any]:
    return pytest.mark.parametrize(("name", "index"), [(name, index) for name in names for index in range(2)])


@for_each(
    [name for name in CASES if name in LAYERS[0]["scores"] and not name.startswith(("lagkv", "stream", "critical"))]
)
def test_scores_are_the_published_ones(name, index):
    """Of the tokens that neither side protects."""
    case, entry = CASES[name], LAYERS[index]
    policy = case.policy
    recent = policy.recent_of(case.budget)
    prompt = replace(case.prompt(entry, index), protected=recent, kept=case.budget)
    scores = policy.scorer.score(prompt, policy.scorer.new_state(layer_of(entry, index)))[0]
    end = NEWER_LENGTH - recent
    found, wanted = (x[:, policy.sinks : end] for x in (scores / case.factor, torch.tensor(entry["scores"][name])))
    torch.testing.assert_close(found.expand_as(wanted), wanted, rtol=case.rtol, atol=case.atol)


@for_each([name for name in CASES if name in LAYERS[0]["kept"]])
def test_kept_sets_are_the_published_ones(name, index):
    """All of them, also those whose ``margin`` is below 1e-4."""
    case, entry = CASES[name], LAYERS[index]
    policy = case.policy
    kept = policy.select(case.prompt(entry, index), policy.new_state(layer_of(entry, index)))
    assert kept.slots is not None
    valid = torch.ones_like(kept.slots) if kept.valid is None else kept.valid
    found = [slots[real.bool()].tolist() for slots, real in zip(kept.slots[0], valid[0], strict=True)]
    assert found == entry["kept"][name]


def test_budgets_of_the_pyramid_are_the_published_ones():
    budgets = Pyramid(protected_tokens="counted").layer_budgets(48, 8, NEWER_LENGTH, 2)
    assert list(budgets) == [layer["pyramidkv r=0.5 w=8 beta=20 kept"] for layer in LAYERS] == [88, 8]


def test_every_entry_is_read():
    inputs = {"q", "k", "v", "W_O", "scores", "kept", "margin"}
    for entry in LAYERS:
        names = {*entry["scores"], *entry["kept"], *(set(entry) - inputs)}
        names |= set(ENTRIES) - {"_about", "_made_by", "shapes", "layers", "sketch_gaussian"}
        by_others = {name for name in names - set(CASES) - set(NOT_HERE) if name.startswith(tuple(READ_BY))}
        assert names == set(CASES) | set(NOT_HERE) | by_others
        assert set(entry["margin"]) <= names
    assert_read_by(READ_BY)


def test_every_entry_of_the_first_file_is_read(golden):
    files = {
        "snapkv_": "test_snapkv.py",
        "pyramidkv ": "test_pyramidkv.py",
        "h2o_prefill ": "test_evicting.py",
        "tova ": "test_evicting.py",
        "streamingllm ": "test_golden_newer.py",
        "adakv floor=": "test_ada_kv.py",
        "minicache slerp ": "test_minicache.py",
        "pyramidinfer prefill KV lengths": "test_pyramid_infer.py",
        "kivi": "test_kivi.py",
    }
    others = {"inputs", "tie_note"}  # and margins, by which it was seen that no float decides
    assert all(name in others or name.startswith((*files, "tie_margin ")) for name in golden)
    assert_read_by(files)


def assert_read_by(files: dict[str, str]) -> None:
    """Check that each name, or its start, is in the text of the test's file."""
    for start, file in files.items():
        assert start in (Path(__file__).parent / file).read_text(encoding="utf-8"), start


def test_position_keeps_the_tokens_of_streaming_llm(golden):
    kept = EvictionPolicy(Position(), 12, sinks=4).select(golden_prompt(window=1)).slots
    assert kept is not None and kept[0].tolist() == golden["streamingllm sinks=4 recent=8"]
