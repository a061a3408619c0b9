"""CriticalKV: kept sets of kvpress, its rule in plain loops, and the output projection that it reads from a model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from contract_settings import every_nth
from golden import newer_entries, newer_prompt
from sharing_models import shared_model
from tiny_models import prompt_ids, tiny_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from kvbench.conf.errors import InputError
from kvbench.methods.cache.cache import KVCache
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.method import Method
from kvbench.methods.cache.output_projection import output_weights_of
from kvbench.methods.cache.prompt import Prompt
from kvbench.methods.cache.rotary import Rotary
from kvbench.methods.policies.allocators.adaptive import Adaptive, adaptive_budgets
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.model_layer import ModelLayer
from kvbench.methods.policies.schedules.every_n import EveryN
from kvbench.methods.policies.schedules.ring import Ring
from kvbench.methods.policies.scorers.chunkkv import ChunkKV
from kvbench.methods.policies.scorers.compactor import Compactor
from kvbench.methods.policies.scorers.criticalkv import CriticalKV
from kvbench.methods.policies.scorers.cur import CUR
from kvbench.methods.policies.scorers.expected_attention import ExpectedAttention
from kvbench.methods.policies.scorers.key_diff import KeyDiff
from kvbench.methods.policies.scorers.kvzip import KVzip
from kvbench.methods.policies.scorers.lagkv import LagKV
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.methods.sharing.cla import CLA
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import prefill

ENTRIES = newer_entries()
GOLDEN_ROPE = Rotary(10000.0 ** (-torch.arange(8) / 8))
SNAPKV = SnapKV(window=8, kernel=5, pooling="avg")
D, HIDDEN = 16, 24


def layer_with(weights: list[torch.Tensor], rotary: Rotary | None = None) -> ModelLayer:
    return ModelLayer(0, 0, 1, lambda: rotary, lambda: weights)  # type: ignore[arg-type, return-value]


def golden_layer(layer: dict) -> ModelLayer:
    """The file has W_O as [hidden, H_q * D]."""
    return layer_with([torch.tensor(layer["W_O"]).T.unflatten(0, (4, 16))], GOLDEN_ROPE)


def kept(policy: EvictionPolicy, prompt: Prompt, layer: ModelLayer) -> list[list[int]]:
    """Tokens that each head of the only row keeps."""
    chosen = policy.select(prompt, policy.new_state(layer))
    assert chosen.slots is not None
    valid = torch.ones_like(chosen.slots[0], dtype=torch.bool) if chosen.valid is None else chosen.valid[0]
    return [slots[real].tolist() for slots, real in zip(chosen.slots[0], valid, strict=True)]


def test_norms_of_projected_values_are_kvpress():
    for layer in ENTRIES["layers"]:
        prompt = newer_prompt(layer, 8)
        scorer = CriticalKV(SNAPKV, epsilon=1e-4)
        state = scorer.new_state(golden_layer(layer))
        norms = scorer.tie_scores(prompt, state) / (scorer.score(prompt, state) + 1e-4)
        torch.testing.assert_close(norms[0], torch.tensor(layer["criticalkv |v W_O|_1"]), rtol=1e-4, atol=0)


def random_case(groups: int = 2, heads: int = 2, length: int = 45) -> tuple[Prompt, list[torch.Tensor]]:
    g = torch.Generator().manual_seed(7)
    query, keys, values = (
        torch.randn(1, h, n, D, generator=g, dtype=torch.float64)
        for h, n in ((heads * groups, 8), (heads, length), (heads, length))
    )
    weight = torch.randn(heads * groups, D, HIDDEN, generator=g, dtype=torch.float64)
    return Prompt(2 * query, keys, values, LogitRule(D**-0.5), 0, 1), [weight]


@pytest.mark.parametrize(
    ("budget", "first_stage", "allocator"),
    every_nth(
        2,
        [
            *((20, 0.5, "uniform"), (20, 0.5, "adaptive"), (27, 0.3, "adaptive"), (27, 0.3, "uniform")),
            *((12, 0.0, "uniform"), (12, 0.0, "adaptive"), (20, 1.0, "adaptive"), (20, 1.0, "uniform")),
        ],
    ),
)
def test_criticalkv_is_the_naive_selection(budget, first_stage, allocator):
    prompt, (weight,) = random_case()
    scorer = CriticalKV(SNAPKV, first_stage)
    parts = {"allocator": Adaptive(0.2)} if allocator == "adaptive" else {}
    ours = kept(EvictionPolicy(scorer, budget, **parts), prompt, layer_with([weight]))
    free = budget - 8
    base = SNAPKV.score(prompt)[:, :, :37]
    counts = adaptive_budgets(base, free, 0.2, None)[0].tolist() if parts else [free, free]
    for h in range(2):
        scores, products = base[0, h].tolist(), []
        for t in range(37):
            norm = 0.0
            for j in (2 * h, 2 * h + 1):
                projected = [sum(prompt.values[0, h, t, d] * weight[j, d, e] for d in range(D)) for e in range(HIDDEN)]
                norm += sum(abs(float(x)) for x in projected) / 2
            products.append((scores[t] + 1e-4) * norm)
        first = sorted(range(37), key=lambda t: -scores[t])[: math.floor(first_stage * counts[h])]
        others = sorted((t for t in range(37) if t not in first), key=lambda t: -products[t])
        assert ours[h] == sorted([*first, *others[: counts[h] - len(first)], *range(37, 45)])


def test_criticalkv_worked_example():
    """b = (.4, .3, .2, .1) and N = (1, 1, 1, 10): stage 1 keeps 0, stage 2 prefers 1.001 to .3001 and .2001."""
    scores = torch.tensor([[[0.4, 0.3, 0.2, 0.1]]])
    products = (scores + 1e-4) * torch.tensor([1.0, 1.0, 1.0, 10.0])
    ranked, ties = CriticalKV(SNAPKV).ranking_scores(scores, products, 2)
    assert ranked[0, 0].topk(2).indices.sort().values.tolist() == [0, 3]
    assert ties[0, 0].tolist() == pytest.approx([0.4, 0, 0, 0])  # the first stage is ranked by its own scores
    by_head, _ = CriticalKV(SNAPKV).ranking_scores(scores, products, torch.tensor([[2]]))
    assert torch.equal(by_head, ranked)


def test_query_heads_are_weighed_one_by_one():
    prompt, (weight,) = random_case()
    scorer = CriticalKV(SnapKV(window=8, granularity="query_head"), first_stage=0.0, epsilon=0.0)
    state = scorer.new_state(layer_with([weight]))
    norms = scorer.tie_scores(prompt, state) / scorer.score(prompt, state)
    expected = torch.stack([(prompt.values[0, j // 2] @ weight[j]).abs().sum(-1) for j in range(4)])[:, :37]
    torch.testing.assert_close(norms[0, :, :37].double(), expected, rtol=1e-4, atol=0)


def test_layers_that_share_keys_weigh_them_by_all_their_projections():
    prompt, (weight,) = random_case(groups=4)
    readers = [weight[[0, 1, 4, 5]], weight[[2, 3, 6, 7]]]  # the heads of a KV head, reader by reader
    states = [CriticalKV(SNAPKV).new_state(layer_with(w)) for w in ([weight], readers)]
    one, two = (CriticalKV(SNAPKV).tie_scores(copy.copy(prompt), state) for state in states)
    torch.testing.assert_close(one, two)


# output projections ---------------------------------------------------------------------------------------------------


def weights_by_hand(model: nn.Module) -> list[torch.Tensor]:
    return [layer.self_attn.o_proj.weight.T.unflatten(0, (4, 16)) for layer in model.model.layers]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_output_weights_are_the_models(family):
    model = tiny_model(family)
    for layer, expected in enumerate(weights_by_hand(model)):
        (found,) = output_weights_of(model, layer, "criticalkv")
        assert torch.equal(found, expected)


def test_output_weights_of_other_modules_are_their_responses_without_bias():
    """GPT-2 has a Conv1D with a bias."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()
    for block in model.transformer.h:
        nn.init.normal_(block.attn.c_proj.bias)
    for layer, block in enumerate(model.transformer.h):
        (found,) = output_weights_of(model, layer, "criticalkv")
        torch.testing.assert_close(found, block.attn.c_proj.weight.unflatten(0, (4, 8)), rtol=0, atol=1e-6)


def test_output_weights_of_shared_keys_are_those_of_all_readers():
    model = shared_model(CLA(2))
    found = output_weights_of(model, 0, "criticalkv")
    assert len(found) == 2 and not torch.equal(*found)


class Doubled(nn.Module):
    """A projection of twice the attention output."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(2 * x)


def test_an_attention_output_that_is_changed_before_its_projection_is_refused():
    model = copy.deepcopy(tiny_model())
    model.model.layers[1].self_attn.o_proj = Doubled(model.model.layers[1].self_attn.o_proj)
    cache = named_method("criticalkv budget=24 scorer.scorer.window=8").new_cache(model)
    assert isinstance(cache, KVCache)
    with pytest.raises(InputError, match=r"^method=criticalkv: .*layer 1 of LlamaForCausalLM changes") as error:
        prefill(model, cache, prompt_ids(60))
    assert "\n" not in str(error.value)


# settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CriticalKV(KeyDiff()), "key_diff: has negative scores; method/scorer=criticalkv multiplies"),
        (lambda: CriticalKV(ChunkKV(KeyDiff())), "chunkkv: has negative scores"),
        (lambda: CriticalKV(CriticalKV(SNAPKV)), "criticalkv: ranks tokens in two stages"),
        (lambda: ChunkKV(CriticalKV(SNAPKV)), "criticalkv: is more than a score"),
        (lambda: CriticalKV(KVzip()), "kvzip: has no score during the prefill"),
        (lambda: CriticalKV(SNAPKV, first_stage=1.5), "first_stage=1.5: must be"),
        (
            lambda: CriticalKV(ExpectedAttention()),
            r"expected_attention: weighs .* add method.scorer.scorer.value_norm=false$",
        ),
        (lambda: CriticalKV(CUR()), "cur: weighs tokens by their values, .* add method.scorer.scorer.norms=key$"),
        (lambda: CriticalKV(CUR("value")), "cur: weighs tokens by their values"),
        (
            lambda: CriticalKV(ChunkKV(ExpectedAttention())),
            "chunkkv: weighs .* add method.scorer.scorer.scorer.value_norm=false$",
        ),
        (
            lambda: named_method("criticalkv scorer@method.scorer.scorer=expected_attention"),
            "method/scorer@method.scorer.scorer=expected_attention: weighs tokens by their values",
        ),
        (
            lambda: EvictionPolicy(CriticalKV(SNAPKV), 64, schedule=EveryN(4)),
            "method/schedule=every_n: scores tokens again while decoding, and method/scorer=criticalkv needs",
        ),
    ],
)
def test_what_cannot_be_weighed_is_refused(make, message):
    with pytest.raises(InputError, match=message.replace("/", r"\/")) as error:
        make()
    assert "\n" not in str(error.value)


def test_criticalkv_combines_with_a_ring_and_with_other_scorers():
    ring = EvictionPolicy(CriticalKV(SNAPKV), 24, schedule=Ring())
    cache = Method("x", ring).new_cache(tiny_model())
    prefill(tiny_model(), cache, prompt_ids(60))
    assert [int(t.max()) for t in cache.tokens_held] == [24] * 3
    text = "criticalkv budget=24 scorer@method.scorer.scorer=expected_attention scorer.scorer.value_norm=false"
    method = named_method(text)
    assert method.label == "criticalkv 24 over expected_attention (epsilon 0.01, uniform)"
    assert method.policy.scorer.scorer == ExpectedAttention(value_norm=False) and method.policy.sinks == 4


@pytest.mark.parametrize(
    ("base", "settings", "expected"),
    [
        ("expected_attention", "scorer.scorer.value_norm=false", ExpectedAttention(value_norm=False)),
        ("lagkv", "", LagKV()),
        ("cur", "scorer.scorer.norms=key", CUR("key")),
        ("snapkv", "", SnapKV()),
    ],
)
@pytest.mark.parametrize("wrapper", ["criticalkv", "chunkkv"])
def test_a_wrapped_scorer_has_its_own_sinks(wrapper, base, settings, expected):
    text = f"{wrapper} scorer@method.scorer.scorer={base} {settings}"
    method = named_method(text)
    assert method.policy.scorer.scorer == expected and method.sinks == expected.protected_sinks()
    assert "sinks" not in {**method.identity()["selection"], "scorer": None}  # the scorer's default
    typed = named_method(f"{text} sinks=2").policy
    assert typed.sinks == 2 and typed.scorer.scorer.protected_sinks() == (0 if base == "snapkv" else 2)


def test_a_wrapped_compactor_has_its_own_sinks():
    method = named_method("chunkkv scorer@method.scorer.scorer=compactor")
    assert method.policy.scorer.scorer == Compactor() and (method.sinks, method.recent) == (8, 4)


def test_an_unweighed_scorer_protects_the_same_tokens_below_criticalkv():
    """With all of the budget in the first stage it keeps what it keeps alone, sinks out of the statistics."""
    model, ids = tiny_model(), prompt_ids(60)
    inner = "scorer@method.scorer.scorer=expected_attention scorer.scorer.value_norm=false scorer.first_stage=1.0"
    texts = (
        f"criticalkv budget=24 {inner}",
        "expected_attention budget=24 scorer.value_norm=false allocator=uniform storage=dense",
    )
    keys = []
    for text in (*texts, f"{texts[0]} sinks=0"):
        cache = named_method(text).new_cache(model)
        prefill(model, cache, ids)
        keys.append([layer.storage.read()[0] for layer in cache.layers])
    assert all(torch.equal(a, b) for a, b in zip(keys[0], keys[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(keys[0], keys[2], strict=True))
