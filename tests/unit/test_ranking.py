"""The ranking of tokens equals two stable sorts, however a device's ``topk`` orders equal entries."""

from __future__ import annotations

import pytest
import torch
from published import RoundedByHeadAdaptive, ada_kv, pyramidkv
from spy import watch
from tiny_models import left_pad, prompt_ids, tiny_model

from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.method import Method
from kvbench.methods.cache.prompt import Prompt
from kvbench.methods.cache.rotary import Rotary
from kvbench.methods.policies import ranking
from kvbench.methods.policies.allocators.adaptive import Adaptive
from kvbench.methods.policies.decoding import evict_one
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.eviction_state import EvictionState
from kvbench.methods.policies.model_layer import ModelLayer
from kvbench.methods.policies.ranking import keep_mask, keep_slots, lowest_ranked_slot
from kvbench.methods.policies.scorers.attention_sums import AttentionSums
from kvbench.methods.policies.scorers.expected_attention import ExpectedAttention
from kvbench.methods.policies.scorers.key_diff import KeyDiff
from kvbench.methods.policies.scorers.last_query import LastQuery
from kvbench.methods.policies.scorers.random_tokens import RandomTokens
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.methods.storage.dense import Dense, DenseLayer
from kvbench.methods.storage.ragged import Ragged
from kvbench.runners.engine import prefill

N = 60
LAYER = ModelLayer(0, 0, 1, lambda: None)
INF = float("inf")


def make_scores(kind: str, seed: int = 0) -> torch.Tensor:
    """[2, 3, N] float32."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, N, generator=g)
    if kind == "coarse":  # as sums of bfloat16 numbers are: few distinct values, both zeros among them
        return (x * 1.5).round() / 4
    if kind == "bfloat16":
        return x.softmax(-1).bfloat16().float()
    if kind == "equal":
        return torch.zeros_like(x)
    if kind == "infinite":
        return torch.where(x.abs() > 1, x.sign() * INF, (2 * x).round())
    return x


def two_stable_sorts(scores: torch.Tensor, count: int, ties: torch.Tensor | None) -> torch.Tensor:
    """The first ``count`` of the tokens sorted by (score, tie score, lower index), in increasing order."""
    order = torch.arange(scores.shape[-1]).expand(scores.shape)
    if ties is not None:
        order = ties.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, scores.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    return order[..., :count].sort(dim=-1).values


@pytest.mark.parametrize("count", [0, 1, 7, 29, N - 1, N])
@pytest.mark.parametrize("ties", [None, "random", "coarse", "equal"])
@pytest.mark.parametrize("kind", ["random", "coarse", "bfloat16", "equal", "infinite"])
@pytest.mark.parametrize("host_types", [("cpu",), ()])
def test_ranking_matches_two_stable_sorts(monkeypatch, host_types, kind, ties, count):
    monkeypatch.setattr(ranking, "HOST_TYPES", host_types)
    scores = make_scores(kind)
    tie_scores = None if ties is None else make_scores(ties, seed=1)
    kept = keep_slots(scores, count, tie_scores)
    assert torch.equal(kept, two_stable_sorts(scores, count, tie_scores))
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, kept, True)
    assert torch.equal(keep_mask(scores, count, tie_scores), mask)


def test_one_order_of_equal_scores_serves_all_heads():
    scores, ties = make_scores("coarse"), make_scores("random", 1)[:, :1]
    assert torch.equal(keep_slots(scores, 9, ties), keep_slots(scores, 9, ties.expand_as(scores)))


def test_counts_may_differ_between_rankings():
    scores, ties = make_scores("coarse"), make_scores("coarse", 1)
    counts = torch.tensor([[0, 1, 7], [29, N - 1, N]])
    mask = keep_mask(scores, counts, ties)
    for row in range(2):
        for head in range(3):
            alone = keep_mask(scores[row, head], int(counts[row, head]), ties[row, head])
            assert torch.equal(mask[row, head], alone)


def test_signed_zeros_are_equal_and_nan_ranks_highest():
    assert keep_slots(torch.tensor([0.0, -0.0, 0.0, -1.0]), 2).tolist() == [0, 1]
    assert keep_slots(torch.tensor([-0.0, 0.0, -0.0, -1.0]), 2).tolist() == [0, 1]
    assert keep_slots(torch.ones(4), 2, torch.tensor([-0.0, 0.0, -1.0, 0.0])).tolist() == [0, 1]
    assert keep_slots(torch.tensor([1.0, torch.nan, 3.0]), 2).tolist() == [1, 2]


@pytest.mark.parametrize("kind", ["random", "coarse", "bfloat16", "equal"])
def test_lowest_ranked_slot_is_the_token_that_keep_slots_evicts(kind):
    scores = make_scores(kind)
    kept = keep_mask(scores, N - 1)
    assert torch.equal(~kept, torch.zeros_like(kept).scatter(-1, lowest_ranked_slot(scores), True))


def test_ranking_does_not_sync_with_a_gpu(monkeypatch):
    monkeypatch.setattr(ranking, "HOST_TYPES", ())
    scores, ties, counts = make_scores("coarse"), make_scores("random", 1), torch.full((2, 3), 9)
    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__int__", "__float__", "__bool__", "__index__"):

        def refuse(self, *args, name=name, **kwargs):
            raise AssertionError(f"{name} waits for the device")

        monkeypatch.setattr(torch.Tensor, name, refuse)
    keep_slots(scores, 9, ties)
    keep_mask(scores, counts, ties)
    lowest_ranked_slot(scores)


@pytest.fixture
def another_device(monkeypatch):
    """Replace ``topk``, ``argsort``, ``argmin`` and ``argmax`` by versions that prefer the last of equal entries."""

    def backwards(name):
        real = getattr(torch, name)

        def flip(x, k=None, dim=-1, *args, **kwargs):
            dim = kwargs.pop("dim", dim)
            last = x.shape[dim] - 1
            if name == "topk":
                out = real(x.flip(dim), k, dim, *args, **kwargs)
                return torch.return_types.topk((out.values, last - out.indices))
            if name == "argsort":
                if kwargs.get("stable"):
                    return real(x, dim=dim, **kwargs)
                return last - real(x.flip(dim), dim=dim, stable=True, **kwargs)
            return last - real(x.flip(dim), dim=dim, **kwargs)

        return flip

    for name in ("topk", "argsort", "argmin", "argmax"):
        fake = backwards(name)
        monkeypatch.setattr(torch, name, fake)
        if name == "topk":
            monkeypatch.setattr(torch.Tensor, name, fake)
        else:
            monkeypatch.setattr(torch.Tensor, name, lambda x, *a, fake=fake, **kw: fake(x, None, *a, **kw))


def test_the_simulated_device_breaks_ties_differently(another_device):
    scores = torch.tensor([1.0] + [0.0] * 3)
    assert int(scores.argmin()) == 3 and scores.argsort().tolist() == [3, 2, 1, 0]


def peaked_prompt(seed: int = 0, length: int = N, query_heads: int = 4, kv_heads: int = 2, window: int = 6) -> Prompt:
    """Float32; attention is so peaked that max pooling makes ties at most budgets."""
    g = torch.Generator().manual_seed(seed)
    make = lambda heads, n: torch.randn(2, heads, n, 16, generator=g)  # noqa: E731
    return Prompt(4 * make(query_heads, window), make(kv_heads, length), make(kv_heads, length), LogitRule(0.25), 1, 3)


def equal_keys(prompt: Prompt) -> Prompt:
    """Groups of four tokens with the same key and value: ties for methods that do not pool."""
    keys, values = (x[:, :, ::4].repeat_interleave(4, 2) for x in (prompt.keys, prompt.values))
    return Prompt(prompt.query, keys, values, prompt.rule, prompt.layer_idx, prompt.num_layers)


def kept_of(selection, prompt: Prompt) -> list[list[int]]:
    """Tokens of each row's heads."""
    rotary = Rotary(1e4 ** (-torch.arange(0, 1, 1 / 8)))
    state = selection.new_state(ModelLayer(1, 1, 3, lambda: rotary))
    kept = selection.select(prompt.last_queries(selection.capabilities.observation_window), state)
    valid = torch.ones_like(kept.slots, dtype=torch.bool) if kept.valid is None else kept.valid
    return [s[v].tolist() for s, v in zip(kept.slots.flatten(0, 1), valid.flatten(0, 1), strict=True)]


POOLED = [
    EvictionPolicy(SnapKV(window=6, kernel=7), 21),
    EvictionPolicy(SnapKV(window=6, kernel=5, group_reduce="max", granularity="query_head"), 21),
    pyramidkv(budget=20, window=6, beta=4),
    ada_kv(budget=21, window=6, floor=0.2),
]
OTHERS = [
    EvictionPolicy(AttentionSums(), 21),
    EvictionPolicy(LastQuery(), 21),
    EvictionPolicy(KeyDiff(), 21),
    EvictionPolicy(RandomTokens(), 21, recent=6),
]
OTHERS += [EvictionPolicy(ExpectedAttention(sinks=4), 21)]


@pytest.mark.parametrize("selection", POOLED + OTHERS, ids=str)
def test_kept_tokens_do_not_depend_on_the_devices_topk(selection, request):
    window = N if selection in OTHERS else 6
    prompts = [peaked_prompt(seed, window=window) for seed in range(4)]
    if selection in OTHERS:
        prompts = [equal_keys(p) for p in prompts]
    here = [kept_of(selection, p) for p in prompts]
    request.getfixturevalue("another_device")
    assert [kept_of(selection, p) for p in prompts] == here


def test_plain_topk_keeps_other_tokens(request):
    """The prompts above do have ties where the budget ends."""
    selection, prompts = POOLED[0], [peaked_prompt(seed) for seed in range(4)]
    scores = [selection.scorer.score(p)[..., : N - 6] for p in prompts]
    here = [set(x.flatten().tolist()) for s in scores for x in s.topk(15).indices.flatten(0, 1)]
    request.getfixturevalue("another_device")
    there = [set(x.flatten().tolist()) for s in scores for x in s.topk(15).indices.flatten(0, 1)]
    assert sum(a != b for a, b in zip(here, there, strict=True)) > len(here) // 2


@pytest.mark.parametrize("count", range(1, 16))
def test_the_peak_of_a_tie_is_kept_first(count):
    """One peak at 20, its pooled value on 17 to 23, and a smaller one at 40: the peak, its neighbours from the left."""
    votes = torch.zeros(1, 1, N)
    votes[0, 0, 20], votes[0, 0, 40] = 1.0, 0.5
    pooled = torch.nn.functional.max_pool1d(votes, 7, 1, 3)
    order = [20, 17, 18, 19, 21, 22, 23, 40, 37, 38, 39, 41, 42, 43, 0]
    assert keep_slots(pooled, count, votes)[0, 0].tolist() == sorted(order[:count])


def test_no_peak_is_dropped_for_its_neighbours():
    """A token whose unpooled score equals the pooled score at the budget's end is kept in every head."""
    selection, dropped = POOLED[0], 0
    for seed in range(20):
        prompt = peaked_prompt(seed)
        votes, pooled = selection.scorer.tie_scores(prompt), selection.scorer.score(prompt)
        for row in range(2):
            for head, kept in enumerate(selection.select(prompt).slots[row, :, :15].tolist()):
                cut = pooled[row, head, kept].min()
                peaks = [t for t in range(N - 6) if votes[row, head, t] == cut == pooled[row, head, t]]
                assert set(peaks[:1]) <= set(kept)
                plain = pooled[row, head].topk(15).indices.tolist()
                dropped += not set(peaks) <= set(plain)
    assert dropped > 0  # by plain topk


@pytest.mark.parametrize("kernel", [1, 5, 7])
@pytest.mark.parametrize("allocator", [Adaptive, RoundedByHeadAdaptive])
def test_ada_kv_with_a_floor_of_one_is_snapkv(kernel, allocator):
    for seed in range(10):
        prompt = peaked_prompt(seed)
        ada = ada_kv(budget=21, window=6, kernel=kernel, floor=1, allocator=allocator)
        assert kept_of(ada, prompt) == kept_of(EvictionPolicy(SnapKV(window=6, kernel=kernel), 21), prompt)


def test_a_tie_across_heads_goes_to_the_lower_head():
    scores = torch.ones(1, 3, 4)
    assert ada_kv(budget=40, floor=0.0).allocator.head_budgets(scores, 2).tolist() == [[4, 2, 0]]
    ties = torch.zeros(1, 3, 4)
    ties[0, 2, 1:3] = 1.0
    assert ada_kv(budget=40, floor=0.0).allocator.head_budgets(scores, 2, ties).tolist() == [[4, 0, 2]]


@pytest.mark.parametrize("selection", POOLED, ids=str)
def test_kept_sets_are_the_same_in_any_batch_and_any_chunks(selection):
    """Float32 and max pooling, alone, four together (two of them padded), whole and in chunks of 17."""
    model = tiny_model(dtype=torch.float32)
    storage = Ragged() if selection.capabilities.heads_differ else Dense()
    method = Method("x", selection, storage)
    prompts = [prompt_ids(n, seed) for seed, n in enumerate((70, 70, 70, 55))]

    def held(ids, mask=None, chunk_size=None):
        cache = method.new_cache(model)
        witnesses = watch(cache, mask, tolerance=1e-3)
        prefill(model, cache, ids, mask, chunk_size)
        return [w.held_columns() for w in witnesses]

    alone = [held(p) for p in prompts]
    for chunk_size in (None, 17):
        together = held(*left_pad(prompts), chunk_size)
        for row, prompt in enumerate(prompts):
            pads = 70 - prompt.shape[1]
            mine = [[[c - pads for c in head] for head in layer[row]] for layer in together]
            assert mine == [layer[0] for layer in alone[row]]
    assert held(prompts[0], chunk_size=17) == alone[0]


@pytest.mark.parametrize(
    "selection", [EvictionPolicy(LastQuery(), 8), EvictionPolicy(AttentionSums(), 8, recent=0.25)], ids=str
)
def test_lowest_score_ties_evict_the_higher_index(selection, request):
    """Tokens 3 to 5 have the lowest score; index 5 is evicted, although ``argmin`` may return 3, 4 or 5."""
    scores = torch.tensor([[[5.0, 4.0, 2.0, 1.0, 1.0, 1.0, 3.0, 2.0, 0.0]]])

    def held_after_eviction() -> list[float]:
        storage, state = DenseLayer(), EvictionState(LAYER)
        keys = torch.arange(9.0)[None, None, :, None]
        storage.write(keys, keys)
        selection.after_prompt(state, storage, torch.tensor([9]), None)
        worth = scores if selection.recent_of(8) else scores.masked_fill(scores == 0, 9.0)
        evict_one(state, storage, worth, sinks=0, compact_now=True)
        held, _, valid = storage.read()
        return held[0, 0, valid[0, 0] if valid is not None else slice(None), 0].tolist()

    assert held_after_eviction() == [0, 1, 2, 3, 4, 6, 7, 8]
    request.getfixturevalue("another_device")
    assert held_after_eviction() == [0, 1, 2, 3, 4, 6, 7, 8]
