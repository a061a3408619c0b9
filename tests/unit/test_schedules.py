"""Eviction while decoding, and budgets over all layers, against simulators with one Python list per head in float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from sharing_models import shared_model
from tiny_models import left_pad, prompt_ids, tiny_model

from kvbench.conf.errors import InputError
from kvbench.methods.cache.cache import KVCache
from kvbench.methods.cache.layout import model_shape
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.method import Method
from kvbench.methods.cache.prompt import Prompt
from kvbench.methods.policies.allocators.adaptive import Adaptive, safeguarded_budgets
from kvbench.methods.policies.allocators.global_budget import Global
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.model_layer import ModelLayer
from kvbench.methods.policies.policy import Step
from kvbench.methods.policies.prompt_ranks import prompt_ranks, shared_ranks
from kvbench.methods.policies.ranking import keep_mask
from kvbench.methods.policies.schedules.every_n import EveryN
from kvbench.methods.policies.schedules.every_step import EveryStep
from kvbench.methods.policies.schedules.hold import Hold
from kvbench.methods.policies.scorers.attention_sums import AttentionSums
from kvbench.methods.policies.scorers.key_norm import KeyNorm
from kvbench.methods.policies.scorers.last_query import LastQuery
from kvbench.methods.policies.scorers.position import Position
from kvbench.methods.policies.scorers.scissorhands import Scissorhands
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.methods.policies.streaming_llm import StreamingLLM
from kvbench.methods.sharing.cla import CLA
from kvbench.methods.storage.dense import DenseLayer
from kvbench.methods.storage.kivi import Kivi
from kvbench.methods.storage.ragged import Ragged
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import decode, prefill

D, SCALE = 8, 8**-0.5
BUDGET, LENGTH, STEPS = 12, 20, 17


def softmax_row(query: torch.Tensor, keys: list[torch.Tensor]) -> list[float]:
    return (torch.stack(keys) @ query * SCALE).softmax(0).tolist()


class Head:
    """One KV head with one query head, by lists: position, key, running score of each held token."""

    def __init__(self, queries: torch.Tensor, keys: torch.Tensor):
        self.queries = list(queries)
        self.held = list(range(len(keys)))
        self.keys = dict(enumerate(keys))
        self.sums = dict.fromkeys(self.held, 0.0)
        for t, query in enumerate(queries):
            for s, weight in enumerate(softmax_row(query, [keys[i] for i in range(t + 1)])):
                self.sums[s] += weight

    def step(self, position: int, query: torch.Tensor, key: torch.Tensor) -> None:
        self.held.append(position)
        self.keys[position], self.sums[position] = key, 0.0
        self.queries.append(query)
        for t, weight in zip(self.held, softmax_row(query, [self.keys[t] for t in self.held]), strict=True):
            self.sums[t] += weight

    def scores(self, scorer: str, window: int) -> dict[int, float]:
        if scorer == "sums":
            return self.sums
        if scorer == "norm":
            return {t: -float(self.keys[t].norm()) for t in self.held}
        out = dict.fromkeys(self.held, 0.0)  # attention of the last queries, each over the held tokens up to its own
        below = scorer == "below"  # how often it is below the mean; of equal tokens, the newer stays
        out |= {t: t / 1000 for t in self.held if below}
        for back in range(window):
            seen = self.held[: len(self.held) - back]
            for t, weight in zip(seen, softmax_row(self.queries[-1 - back], [self.keys[t] for t in seen]), strict=True):
                out[t] += -float(weight < 1 / len(seen)) if below else weight
        return out

    def evict(self, scorer: str, window: int, sinks: int, recent: int) -> None:
        if len(self.held) <= BUDGET:
            return
        middle = self.held[sinks : len(self.held) - recent]
        scores = self.scores(scorer, window)
        best = sorted(middle, key=lambda t: -scores[t])[: BUDGET - sinks - recent]
        self.held = sorted([*self.held[:sinks], *best, *self.held[len(self.held) - recent :]])


@pytest.mark.parametrize(("n", "interval"), [(1, 1), (3, 3), (5, 5), (0.25, 3), (0.5, 6)])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize(
    ("scorer", "rule", "window"),
    [
        *(("snapkv", SnapKV(window=4, kernel=1), 4), ("sums", AttentionSums(), 0), ("norm", KeyNorm(), 0)),
        *(("below", Scissorhands(), 20), ("below", Scissorhands(4), 4)),
    ],
)
def test_every_n_matches_the_naive_simulator(scorer, rule, window, n, interval, sinks):
    """Stored tokens are within the budget after every n-th step, with up to n - 1 more in between."""
    recent = 4
    policy = EvictionPolicy(rule, BUDGET, schedule=EveryN(n), sinks=sinks, recent=recent)
    g = torch.Generator().manual_seed(interval)
    q, k, v = (torch.randn(1, 2, LENGTH, D, generator=g, dtype=torch.float64) for _ in range(3))
    q = 3 * q
    heads = [Head(q[0, h], k[0, h]) for h in range(2)]
    for head in heads:
        head.evict(scorer, window, sinks, recent)
    storage, state = DenseLayer(), policy.new_state(ModelLayer(0, 0, 1, lambda: None))
    state.layers = [state]
    prompt = Prompt(q[:, :, LENGTH - window :] if window else q, k, v, LogitRule(SCALE), 0, 1)
    kept = policy.select(prompt, state)
    index = kept.slots[..., None].expand(-1, -1, -1, D)
    storage.write(k.gather(2, index), v.gather(2, index))
    policy.after_prompt(state, storage, torch.tensor([LENGTH]), kept.scores, prompt.query if window else None)
    for i in range(STEPS):
        new_q, new_k, new_v = (torch.randn(1, 2, 1, D, generator=g, dtype=torch.float64) for _ in range(3))
        storage.append(new_k, new_v)
        step = Step(3 * new_q, LogitRule(SCALE))
        policy.attend(state, storage, step)
        policy.after_attention(state, storage, step)
        keys, _, valid = storage.read()
        for h, head in enumerate(heads):
            head.step(LENGTH + i, 3 * new_q[0, h, 0], new_k[0, h, 0])
            if (i + 1) % interval == 0:
                head.evict(scorer, min(window, interval) if scorer == "below" else window, sinks, recent)
            real = slice(None) if valid is None else valid.expand(1, 2, -1)[0, h]
            assert torch.equal(keys[0, h][real], torch.stack([head.keys[t] for t in head.held])), f"step {i}, head {h}"
    assert policy.kept_tokens(LENGTH, STEPS, 1, 1) == [len(heads[0].held)] == [BUDGET + STEPS % interval]


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("length", [LENGTH, BUDGET - 2])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    ("scorer", "rule"),
    [("snapkv", SnapKV(window=4, kernel=1)), ("sums", AttentionSums()), ("norm", KeyNorm())],
)
def test_hold_evicts_what_ranked_lowest_in_the_prompt(scorer, rule, length, sinks, static):
    """Against lists: the prompt's tokens by their scores, then the prompt's last and the generated ones by age."""
    recent, steps = 4, 17  # more steps than tokens with a score
    policy = EvictionPolicy(rule, BUDGET, schedule=Hold(), sinks=sinks, recent=recent)
    q, k, v = (torch.randn(1, 2, length, D, dtype=torch.float64) for _ in range(3))
    q = 3 * q
    heads = []
    for h in range(2):
        head = Head(q[0, h], k[0, h])
        scores = head.scores(scorer, 4)
        heads.append((head.keys, sorted(range(sinks, length - recent), key=lambda t, s=scores: s[t])))
    storage, state = DenseLayer(), policy.new_state(ModelLayer(0, 0, 1, lambda: None))
    state.layers = [state]
    queries = q if scorer == "sums" else q[:, :, length - 4 :]
    kept = policy.select(Prompt(queries, k, v, LogitRule(SCALE), 0, 1), state)
    index = torch.arange(length).expand(1, 2, -1) if kept.slots is None else kept.slots
    storage.write(*(x.gather(2, index[..., None].expand(-1, -1, -1, D)) for x in (k, v)))
    policy.after_prompt(state, storage, torch.tensor([length]), kept.scores)
    if static:
        policy.make_static(state, storage, steps)
    first, last = list(range(sinks)), list(range(length - recent, length))
    held = [[*first, *sorted(scored[max(0, length - BUDGET) :]), *last] for _, scored in heads]
    for i in range(steps):
        new_q, new_k, new_v = (torch.randn(1, 2, 1, D, dtype=torch.float64) for _ in range(3))
        storage.append(new_k, new_v)
        step = Step(3 * new_q, LogitRule(SCALE))
        policy.attend(state, storage, step)
        policy.after_attention(state, storage, step)
        if static:
            storage.between_steps()
            policy.between_steps(state, storage)
        keys, _, valid = storage.read()
        for h, (known, scored) in enumerate(heads):
            known[length + i] = new_k[0, h, 0]
            held[h].append(length + i)
            if len(held[h]) > BUDGET:
                by_rank = [t for t in scored if t in held[h]] + [t for t in held[h] if t >= length - recent]
                held[h].remove(by_rank[0])
            real = slice(None) if valid is None else valid.expand(1, 2, -1)[0, h]
            assert torch.equal(keys[0, h][real], torch.stack([known[t] for t in held[h]])), f"step {i}, head {h}"
    assert policy.kept_tokens(length, steps, 1, 1) == [len(held[0])] == [BUDGET]


def test_ranks_are_the_order_in_which_a_smaller_budget_would_evict():
    """Scores and tie-breaking scores with many equal ones, against the kept set of every count."""
    g = torch.Generator().manual_seed(5)
    scores, ties = (torch.randint(4, (2, 3, 20), generator=g).float() for _ in range(2))
    for own_ties in (None, ties):
        rank = prompt_ranks(scores, own_ties, 2, 4)
        assert rank[..., 22:].tolist() == [[[22.0, 23.0, 24.0, 25.0]] * 3] * 2
        for count in range(21):
            assert torch.equal(rank[..., 2:22] >= 22 - count, keep_mask(scores, count, own_ties))


@pytest.mark.parametrize("n_sure", [0, 3])
def test_of_heads_that_share_a_budget_the_lowest_scores_leave_first(n_sure):
    """Two layers of two heads, many equal scores: at each of 8 steps four tokens leave, wherever they are."""
    g = torch.Generator().manual_seed(6)
    scores, ties = (torch.randint(5, (2, 1, 2, 20), generator=g).float() for _ in range(2))
    budgets = safeguarded_budgets(scores.view(1, 4, 20), 8, n_sure, ties.view(1, 4, 20)).view(2, 1, 2)
    kept = [keep_mask(scores[layer], budgets[layer], ties[layer]) for layer in range(2)]
    ranks = shared_ranks(list(scores), list(ties), kept, n_sure, 1, 3)
    assert all(x[..., 21:].tolist() == [[[21.0, 22.0, 23.0]] * 2] for x in ranks)
    left = {(layer, h, t) for layer in range(2) for h in range(2) for t in kept[layer][0, h].nonzero()[:, 0].tolist()}
    for step in range(8):
        leaving = set(sorted(left, key=lambda x: order_of_leaving(x, scores, ties, n_sure))[:4])
        assert {x for x in left if ranks[x[0]][0, x[1], 1 + x[2]] <= 13 + step} == leaving
        left -= leaving
    assert not left


def order_of_leaving(token, scores, ties, n_sure):
    """Sort key of (layer, head, index): sure ones last, each head's best at the end; of equal ones the last first."""
    layer, head, index = token
    own = [(scores[layer, 0, head, t].item(), ties[layer, 0, head, t].item(), -t) for t in range(20)]
    place = sum(x > own[index] for x in own)
    return max(0, n_sure - place), *own[index][:2], -layer, -head, -index


SHARED = [
    *(
        "key_diff allocator=adaptive allocator.floor=0.0 storage=ragged recent=3",
        "random recent=4 allocator=global storage=ragged",
    ),
    *("snapkv scorer.window=4 allocator=global storage=ragged sinks=2", "key_diff storage=fp8 sinks=1 recent=2"),
    "kvzip scorer.instruction_first=null scorer.instruction_next=null",
    "expected_attention allocator.floor=0.0",
]


@pytest.mark.parametrize("text", SHARED)
@pytest.mark.parametrize("steps", [1, 5])
def test_a_held_budget_leaves_what_a_smaller_one_would_keep(text, steps):
    """After s steps heads hold what a budget smaller by s keeps of the prompt, and all generated tokens."""
    model, prompts = tiny_model(), [prompt_ids(30, 1), prompt_ids(26, 2)]
    ids, mask = left_pad(prompts)
    held = named_method(f"{text} budget=14 hold_budget=true").new_cache(model)
    smaller = named_method(f"{text} budget={14 - steps}").new_cache(model)
    for cache in (held, smaller):
        prefill(model, cache, ids, mask)
        for i in range(steps):
            decode(model, cache, torch.tensor([3 + i, 40 + i]))
    for layer, row, head in itertools.product(range(len(held.layers)), range(2), range(2)):
        own, other = (keys_of(cache.layers[layer].storage, row, head) for cache in (held, smaller))
        assert own.shape == other.shape and torch.equal(own[:-steps], other[:-steps])  # generated ones see other tokens
    assert all(
        torch.stack([n.double().mean(1) for n in cache.tokens_held]).mean(0).tolist() == [14, 14]
        for cache in (held, smaller)
    )


def keys_of(storage, row, head):
    """The keys [tokens, D] that a head of a row holds."""
    keys, _, valid = storage.read()
    return keys[row, head] if valid is None else keys[row, head][valid.expand(*keys.shape[:2], -1)[row, head]]


@torch.inference_mode()
@pytest.mark.parametrize(
    "text",
    [
        *("kvzip", "criticalkv scorer.scorer.window=4", "lagkv scorer.lag=4", "snapkv scorer.window=4 scorer.kernel=7"),
        *("key_diff allocator=adaptive storage=ragged", "key_norm allocator=global storage=ragged sinks=1"),
    ],
)
def test_a_held_row_of_a_batch_has_the_ranks_of_its_own_prompt(text):
    """Ranks in a padded batch are those of single runs, at each step; that of the newest token is its position."""
    if text == "kvzip":
        text = "kvzip scorer.instruction_first=null scorer.instruction_next=null"
    model, method = tiny_model(), named_method(f"{text} budget=14 hold_budget=true")
    prompts = [prompt_ids(30, 1), prompt_ids(26, 2)]
    together, alone = method.new_cache(model), [method.new_cache(model) for _ in prompts]
    ids, mask = left_pad(prompts)
    prefill(model, together, ids, mask)
    for cache, prompt in zip(alone, prompts, strict=True):
        prefill(model, cache, prompt)

    def ranks(cache, layer, row, head):
        one = cache.layers[layer]
        valid, scores = one.storage.valid, one.state.scores[row]
        mask = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid[row].expand_as(scores)
        return scores[head][mask[head]].tolist()

    for layer, row, head in itertools.product(range(len(together.layers)), range(2), range(2)):
        assert ranks(together, layer, row, head) == ranks(alone[row], layer, 0, head)
    for step in range(6):
        decode(model, together, torch.tensor([3 + step, 40 + step]))
        for row, cache in enumerate(alone):
            decode(model, cache, torch.tensor([[3 + step], [40 + step]][row]))
        for layer, row, head in itertools.product(range(len(together.layers)), range(2), range(2)):
            after = ranks(together, layer, row, head)
            assert after == ranks(alone[row], layer, 0, head) and after[-1] == len(prompts[row][0]) + step


def run(model, method, prompts, steps=12):
    ids, mask = left_pad(prompts)
    cache = method.new_cache(model)
    out = [prefill(model, cache, ids, mask)]
    out += [decode(model, cache, torch.tensor([3 + i, 40 + i])) for i in range(steps)]
    return torch.stack(out), cache


@pytest.mark.parametrize("budget", [11, 0.5])
def test_position_with_sinks_is_streaming_llm_at_true_positions(budget):
    model, prompts = tiny_model(), [prompt_ids(30, 1), prompt_ids(17, 2)]
    product = EvictionPolicy(Position(), budget, schedule=EveryStep(), sinks=4)
    published = StreamingLLM(budget, mode="prefill_evict", reposition=False)
    ours, cache = run(model, Method("x", product), prompts)
    theirs, other = run(model, Method("x", published), prompts)
    assert (ours - theirs).abs().max() < 1e-9
    assert cache.kv_bytes_logical == other.kv_bytes_logical


@pytest.mark.parametrize("scorer", [AttentionSums(), LastQuery()], ids=lambda s: s.name)
def test_every_step_is_every_n_of_one(scorer):
    model, prompts = tiny_model(), [prompt_ids(30, 1), prompt_ids(9, 2)]
    a, b = (
        run(model, Method("x", EvictionPolicy(scorer, 11, schedule=s)), prompts)[0] for s in (EveryStep(), EveryN(1))
    )
    assert (a - b).abs().max() < 1e-9


@pytest.mark.parametrize(
    "text",
    [
        *("scissorhands", "scissorhands scorer.history=3", "h2o schedule=every_n", "snapkv schedule=every_n"),
        *("tova schedule=every_n", "ada_kv schedule=every_n", "h2o schedule=every_n allocator=adaptive storage=ragged"),
    ],
)
def test_rows_with_budgets_of_their_own_evict_at_steps_of_their_own(text):
    """Half of the prompt is kept; the rows evict every 10, 6 and 3 steps, as each of them alone."""
    window = " scorer.window=4" if text.startswith(("snapkv", "ada_kv")) else ""
    method = named_method(f"{text} budget=0.5 schedule.n=0.5 recent=3{window}")
    model, lengths, steps = tiny_model(), (40, 24, 9), 21

    def generated(lengths: Sequence[int]) -> tuple[torch.Tensor, list[list[float]], KVCache]:
        cache, held = method.new_cache(model), []
        logits = [prefill(model, cache, *left_pad([prompt_ids(n, n) for n in lengths]))]
        for i in range(steps):
            logits.append(decode(model, cache, torch.full((len(lengths),), 3 + i)))
            held.append(cache.tokens_held[0].double().mean(1).tolist())
        return torch.stack(logits, dim=1), held, cache

    together, held, cache = generated(lengths)
    for row, (length, budget, interval) in enumerate(zip(lengths, (20, 12, 5), (10, 6, 3), strict=True)):
        alone, held_alone, _ = generated([length])
        assert (together[row] - alone[0]).abs().max() < 1e-9
        expected = [budget + (i + 1) % interval for i in range(steps)]
        assert [h[row] for h in held] == [h[0] for h in held_alone] == expected
        assert [sum(method.policy.kept_tokens(length, i + 1, 1, 1)) for i in range(steps)] == expected
    assert cache.kv_bytes_logical == sum(method.bytes_formula(model_shape(model), n, steps) for n in lengths)


def test_a_share_of_the_budget_is_not_a_number_of_steps():
    one, all_of_it = EveryN(1), EveryN(1.0)
    assert one.evicts_every_step and not all_of_it.evicts_every_step
    assert (one.steps_between(64), all_of_it.steps_between(64), EveryN(0.001).steps_between(64)) == (1, 64, 1)
    assert EvictionPolicy(SnapKV(), 64, schedule=all_of_it).kept_tokens(100, 63, 1, 1) == [127]
    assert Method("snapkv", EvictionPolicy(SnapKV(), 64, schedule=EveryN(0.5))).label == "snapkv 64 + every 0.5 budgets"


@pytest.mark.parametrize("n", [0, -3, 0.0, -0.5, 1.5, True, "half", None, float("nan")])
def test_other_intervals_are_refused(n):
    message = r"^method\.schedule\.n=.*: must be a whole number >= 1, or a share of the budget in \(0, 1\]"
    with pytest.raises(InputError, match=message) as error:
        EveryN(n)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("floor", [0.0, 0.3, 1.0])
def test_a_global_budget_is_one_ranking_over_all_layers_and_heads(floor):
    """Norms of keys, of two prompts of different lengths in one batch, against a sort in Python."""
    model, prompts, recent, sinks, budget = tiny_model(), [prompt_ids(30, 1), prompt_ids(26, 2)], 3, 2, 12
    full, free = Method("full").new_cache(model), budget - recent - sinks
    ids, mask = left_pad(prompts)
    prefill(model, full, ids, mask)
    policy = EvictionPolicy(KeyNorm(), budget, allocator=Global(floor), recent=recent, sinks=sinks)
    _, cache = run(model, Method("x", policy, Ragged()), prompts, steps=0)
    heads = 2
    for row, length in enumerate((30, 26)):
        norms = {}  # (layer, head, token) -> score
        for number, layer in enumerate(full.layers):
            keys = layer.storage.read()[0][row, :, 30 - length :]
            for h in range(heads):
                norms |= {(number, h, t): -float(keys[h, t].float().norm()) for t in range(sinks, length - recent)}
        count = len(full.layers) * heads
        won = sorted(norms, key=lambda where: -norms[where])[: count * free]
        places = [(number, h) for number in range(len(full.layers)) for h in range(heads)]
        shares = [(1 - floor) * sum(w[:2] == p for w in won) + floor * free for p in places]
        budgets = [int(s + 1e-9) for s in shares]
        for p in sorted(range(count), key=lambda p: (budgets[p] - shares[p], p))[: count * free - sum(budgets)]:
            budgets[p] += 1
        held = [int(n) for layer in cache.tokens_held for n in layer[row].expand(heads)]
        assert held == [b + sinks + recent for b in budgets]
    assert cache.kv_bytes_logical == 2 * Method("x", policy).bytes_formula(model_shape(model), 30)


def test_policies_with_different_parts_have_different_labels_and_hashes():
    plain = Method("snapkv", EvictionPolicy(SnapKV(), 64))
    parts = (
        ({"schedule": EveryN(16)}, "snapkv 64 + every 16"),
        ({"allocator": Global()}, "snapkv 64 + global"),
        ({"allocator": Adaptive(), "schedule": EveryStep()}, "snapkv 64 + adaptive + every_step"),
    )
    hashes = [str(plain.identity())]
    for options, label in parts:
        method = Method("snapkv", EvictionPolicy(SnapKV(), 64, **options), Ragged())
        assert method.label == label
        hashes.append(str(method.identity()["selection"]))
    assert Method("snapkv", EvictionPolicy(KeyNorm(), 64)).label == "snapkv 64 + key_norm"
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: EveryN(0), "method.schedule.n"),
        (lambda: EvictionPolicy(LastQuery(), 64, allocator=Adaptive()), "method/allocator"),
        (lambda: EvictionPolicy(Position(), 64, allocator=Global()), "method/allocator"),
        (lambda: EvictionPolicy(SnapKV(window=32), 64, schedule=EveryN(4), recent=8), "method.recent"),
        (lambda: Method("x", EvictionPolicy(SnapKV(), 64, schedule=EveryN(4)), Kivi()), "method/storage"),
        (lambda: Method("x", EvictionPolicy(SnapKV(), 64, allocator=Global()), Kivi()), "method/storage"),
    ],
)
def test_invalid_combinations_are_refused(make, key):
    with pytest.raises(InputError) as error:
        make()
    assert error.value.key == key and "\n" not in str(error.value)


def test_rescoring_is_refused_for_shared_layers():
    """Every layer that attends over the shared keys would store queries, which the byte formula does not count."""
    method = Method("x", EvictionPolicy(SnapKV(window=4), 10, schedule=EveryN(3)))
    with pytest.raises(InputError, match=r"^method/schedule=every_n: .*after_prefill"):
        method.new_cache(shared_model(CLA(2)))
    model = shared_model(CLA(2))
    cache = Method("x", EvictionPolicy(KeyNorm(), 10, schedule=EveryN(3))).new_cache(model)
    with torch.inference_mode():
        prefill(model, cache, prompt_ids(30) % 90)
        for i in range(7):
            decode(model, cache, torch.tensor([3 + i]))
    assert [int(t.max()) for t in cache.tokens_held] == [11] * len(cache.layers)


HELD = [
    *("snapkv scorer.window=4", "key_diff", "ada_kv scorer.window=4", "rkv", "random recent=4", "h2o"),
    *(
        "kvzip scorer.instruction_first=null scorer.instruction_next=null",
        "criticalkv scorer.scorer.window=4",
        "compactor",
        "key_norm allocator=global storage=ragged",
        "lagkv",
    ),
    *("snapstream", "chunkkv scorer.scorer.window=4", "tova schedule=hold", "h2o schedule=hold"),
]


@pytest.mark.parametrize("text", HELD)
@pytest.mark.parametrize("lengths", [(30,), (30, 9)])
def test_a_held_budget_is_never_exceeded(text, lengths):
    method = named_method(f"{text} budget=14 hold_budget=true")
    model, cache = tiny_model(), method.new_cache(tiny_model())
    ids, mask = left_pad([prompt_ids(n, seed) for seed, n in enumerate(lengths)])
    prefill(model, cache, ids, mask)
    for step in range(8):
        decode(model, cache, torch.arange(3 + step, 3 + step + len(lengths)))
        held = torch.stack([n.double().mean(1) for n in cache.tokens_held])  # [layers, B]
        if method.policy.capabilities.heads_differ and method.policy.allocator.spans_layers:
            held = held.mean(0, keepdim=True)
        expected = torch.tensor([min(14, n + step + 1) for n in lengths]).double()
        assert torch.equal(held, expected.expand_as(held))
    shape = model_shape(model)
    assert cache.kv_bytes_logical == sum(method.bytes_formula(shape, n, 8) for n in lengths)


def test_holding_a_budget_is_a_schedule():
    held, typed = named_method("snapkv hold_budget=true"), named_method("snapkv schedule=hold")
    assert held.label == typed.label == "snapkv 1024 + hold" and held.identity() == typed.identity()
    schedules = ("after_prefill", "hold", "every_step", "ring recent=32")
    assert len({str(named_method(f"snapkv schedule={x}").identity()) for x in schedules}) == 4
    assert named_method("rkv hold_budget=true").label == "rkv 1024 + every_step"  # scores again while decoding anyway
    assert named_method("tova hold_budget=true").identity() == named_method("tova").identity()
    assert named_method("compactor hold_budget=true schedule=ring").label == "compactor 1024 + ring"


def test_a_budget_is_held_or_not():
    with pytest.raises(InputError, match=r"^method\.hold_budget=often: must be true or false"):
        named_method("snapkv hold_budget=often")
