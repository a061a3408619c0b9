"""Ada-KV: the published implementation's sets, and what must hold of heads that share a budget."""

from __future__ import annotations

import pytest
import torch
from golden import golden_prompt, swapped
from published import RoundedByHeadAdaptive, ada_kv, pyramidkv
from tiny_models import prompt_ids, tiny_model

from kvbench.conf.errors import InputError
from kvbench.methods.cache.kv_shape import kv_shape
from kvbench.methods.cache.method import Method
from kvbench.methods.policies.allocators.adaptive import Adaptive
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.methods.storage.dense import Dense
from kvbench.methods.storage.ragged import Ragged
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import decode, prefill


def kept_by_head(selection, prompt) -> list[list[int]]:
    kept = selection.select(prompt)
    valid = torch.ones_like(kept.slots, dtype=torch.bool) if kept.valid is None else kept.valid
    return [s[v].tolist() for s, v in zip(kept.slots[0], valid[0], strict=True)]


@pytest.mark.parametrize(
    ("floor", "differences"),
    [
        (0.0, [([9], [14]), ([], []), ([], []), ([], [])]),
        (0.2, [([9], [14]), ([34], [35]), ([32], [34]), ([], [])]),
        (0.5, [([8], [10]), ([], []), ([32], [34]), ([28], [26])]),
    ],
)
def test_golden_sets(golden, floor, differences):
    """Lengths, and up to one tied token a head, the tokens: of each head, the one kept here and the one kept there."""
    selection, prompt = (
        ada_kv(budget=12, window=4, kernel=7, floor=floor, allocator=RoundedByHeadAdaptive),
        golden_prompt(),
    )
    name = f"adakv floor={floor} base=12 w=4 k=7 maxpool"
    ours, theirs = kept_by_head(selection, prompt), golden[f"{name} kept"]
    assert [len(head) for head in ours] == golden[f"{name} head_lens"]
    assert [
        swapped(*head) for head in zip(ours, theirs, selection.scorer.score(prompt)[0][:, :36], strict=True)
    ] == differences


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_a_floor_of_one_is_snapkv(pooling):
    ada = ada_kv(budget=12, window=4, kernel=5, pooling=pooling, floor=1)
    snapkv = EvictionPolicy(SnapKV(window=4, kernel=5, pooling=pooling), 12)
    assert torch.equal(ada.select(golden_prompt()).slots, snapkv.select(golden_prompt()).slots)


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.37, 0.5, 1.0])
@pytest.mark.parametrize("base", [1, 3, 10, 24])
@pytest.mark.parametrize("seed", range(4))
def test_head_budgets_add_up_and_respect_the_floor(floor, base, seed):
    scores = torch.rand(3, 5, 30, generator=torch.Generator().manual_seed(seed)) ** 3
    caps = ada_kv(budget=40, floor=floor).allocator.head_budgets(scores, base)
    assert caps.sum(-1).tolist() == [5 * base] * 3
    assert int(caps.min()) >= int(floor * base)
    assert int(caps.max()) <= 30


SAFEGUARD_EXAMPLE = torch.tensor([[[0.4, 0.3, 0.2, 0.1], [0.05, 0.04, 0.03, 0.02]]])


@pytest.mark.parametrize(("floor", "counts"), [(0.0, [4, 0]), (0.5, [3, 1]), (1.0, [2, 2])])
def test_safeguard_worked_example(floor, counts):
    assert Adaptive(floor, rule="safeguard").head_budgets(SAFEGUARD_EXAMPLE, 2).tolist() == [counts]


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.37, 1.0])
@pytest.mark.parametrize("protected", [0, 3, 30])
@pytest.mark.parametrize("budget", [0, 1, 3, 10, 24])
def test_safeguarded_budgets_are_those_of_a_naive_choice(floor, protected, budget):
    """The best tokens of each head, the protected ones first, then the best of all others; with many ties."""
    g = torch.Generator().manual_seed(budget)
    scores, ties = torch.randint(0, 4, (2, 5, 30), generator=g).float(), torch.rand(2, 5, 30, generator=g)
    found = Adaptive(floor, rule="safeguard").head_budgets(scores, budget, ties, protected)
    n_safe = max(int(floor * (budget + protected)), 1) if floor else 0
    n_safe = min(max(n_safe - protected, 0), budget)
    for row in range(2):
        ranked = [sorted(range(30), key=lambda t, h=h: (-scores[row, h, t], -ties[row, h, t])) for h in range(5)]
        others = [(-scores[row, h, t], -ties[row, h, t], h) for h in range(5) for t in ranked[h][n_safe:]]
        best = [h for _, _, h in sorted(others)[: 5 * (budget - n_safe)]]
        assert found[row].tolist() == [n_safe + best.count(h) for h in range(5)]
        assert int(found[row].sum()) == 5 * budget and int(found[row].min()) >= n_safe


def test_a_safeguard_of_all_and_a_single_head_are_uniform():
    scores = torch.rand(2, 5, 30, generator=torch.Generator().manual_seed(0))
    assert Adaptive(1.0, rule="safeguard").head_budgets(scores, 7).tolist() == [[7] * 5] * 2
    assert Adaptive(0.2, rule="safeguard").head_budgets(scores[:, :1], 7).tolist() == [[7]] * 2


def test_a_safeguarded_head_with_larger_scores_gets_more_of_the_budget():
    scores = torch.rand(1, 4, 30, generator=torch.Generator().manual_seed(0))
    before, raised = Adaptive(0.2, rule="safeguard").head_budgets(scores, 8), scores.clone()
    raised[:, 2] += 0.3
    assert Adaptive(0.2, rule="safeguard").head_budgets(raised, 8)[0, 2] > before[0, 2]


def test_the_rule_is_chosen_by_name_and_recorded():
    method = named_method("ada_kv budget=64 allocator.rule=safeguard")
    assert method.policy.allocator == Adaptive(0.2, rule="safeguard")
    assert method.identity()["selection"]["allocator"]["rule"] == "safeguard"
    assert "rule" not in named_method("ada_kv budget=64").identity()["selection"]["allocator"]


def test_equal_heads_share_equally():
    scores = torch.rand(1, 1, 30, generator=torch.Generator().manual_seed(0)).expand(1, 4, 30)
    assert ada_kv(budget=40, floor=0.0).allocator.head_budgets(scores, 8).tolist() == [[8, 8, 8, 8]]


def test_kept_scores_are_at_least_those_of_snapkv():
    """A global choice is the best one for its total (theorem 3.1 of the paper, on the pooled votes)."""
    prompt = golden_prompt()
    ada = ada_kv(budget=12, window=4, kernel=5, pooling="avg", floor=0.0)
    scores = ada.scorer.score(prompt)[0]

    def mass(selection) -> float:
        return sum(
            float(scores[h, [t for t in kept if t < 36]].sum())
            for h, kept in enumerate(kept_by_head(selection, prompt))
        )

    assert mass(ada) > mass(EvictionPolicy(SnapKV(window=4, kernel=5, pooling="avg"), 12))


def test_the_pyramid_gives_each_layer_its_total():
    options = {"budget": 12, "window": 4, "beta": 4, "kernel": 5, "pooling": "avg"}
    budgets = pyramidkv(**options).layer_budgets(40, 4)
    for layer in range(4):
        prompt = golden_prompt(layer_idx=layer, num_layers=4)
        assert sum(map(len, kept_by_head(ada_kv(**options, layers="pyramid"), prompt))) == 4 * budgets[layer]


def test_heads_differ_and_only_dense_storage_is_padded():
    model, ids = tiny_model(), torch.cat([prompt_ids(70, s) for s in range(3)])
    shape, caches = kv_shape(model.config, model.dtype), {}
    for storage in (Ragged(), Dense()):
        method = Method("ada_kv", ada_kv(budget=24, window=4, floor=0.0), storage)
        cache = method.new_cache(model)
        prefill(model, cache, ids)
        caches[storage.name] = cache
        assert cache.kv_bytes_logical == 3 * method.bytes_formula(shape, 70)
    held = caches["ragged"].tokens_held[0]
    assert held.min() < 24 < held.max()
    assert caches["ragged"].kv_bytes_stored == caches["ragged"].kv_bytes_logical < caches["dense"].kv_bytes_stored
    token = torch.tensor([3, 4, 5])
    assert torch.allclose(decode(model, caches["ragged"], token), decode(model, caches["dense"], token), atol=1e-9)


@pytest.mark.parametrize(
    "options", [{"floor": 1.2}, {"floor": "x"}, {"floor": True}, {"layers": "cone"}, {"beta": 0}, {"rule": "x"}]
)
def test_bad_settings(options):
    with pytest.raises(InputError, match=r"method\.allocator\."):
        ada_kv(**options)
