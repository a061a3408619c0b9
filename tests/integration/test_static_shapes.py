"""Decode steps over tensors of fixed shape, for every storage and every method that has them.

Each is compared with the same method whose tensors grow, over steps in which blocks of tokens are quantized and merged,
in a batch whose rows have different lengths.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.resources import files
from importlib.util import find_spec

import pytest
import torch
from captured_ops import CapturedOps
from contract_settings import every_nth, marked_slow, own_settings
from sharing_models import shared_model
from tiny_models import SHAPE, left_pad, prompt_ids, tiny_model

from kvbench.conf.errors import InputError
from kvbench.methods.cache.logits import LogitRule
from kvbench.methods.cache.method import Method
from kvbench.methods.policies import eviction, local, streaming_llm
from kvbench.methods.policies.eviction_method import EvictionMethod
from kvbench.methods.sharing.cla import CLA
from kvbench.methods.sharing.framework import KVShare
from kvbench.methods.sharing.lckv import LCKV
from kvbench.methods.sharing.yoco import YOCO
from kvbench.methods.storage import dense
from kvbench.methods.storage.base import LayerStorage
from kvbench.methods.storage.kivi import Kivi
from kvbench.methods.storage.minicache.geometry import RETENTIONS
from kvbench.methods.storage.minicache.storage import MiniCache
from kvbench.methods.storage.minicache_kivi import MiniCacheKivi
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import decode, prefill

STEPS = 40
SMALL = "storage.residual=16 storage.group=8"  # several blocks within the steps
LENGTHS = (60, 33, 20)


@functools.cache
def method_of(text: str) -> Method:
    return named_method(text)


def yamls(folder: str) -> list[str]:
    return sorted(p.name.removesuffix(".yaml") for p in files("kvbench.conf").joinpath(folder).iterdir() if p.is_file())


def storage_settings(name: str) -> str:
    return f"{name} {SMALL}" if "kivi" in name else name


STORAGES = [f"full storage={storage_settings(name)}" for name in yamls("method/storage") if name != "hf_quantized"]
SNAPKV = "scorer.window=8 budget=40"
COMBINED = [
    *(f"snapkv {SNAPKV} storage={storage_settings(name)}" for name in ("kivi2", "ragged")),
    *(f"lckv sharing.encode=exact storage={storage_settings(name)}" for name in ("kivi2", "ragged")),
    f"ada_kv {SNAPKV} allocator.floor=0.0 storage={storage_settings('kivi4')}",
    f"ada_kv {SNAPKV} allocator.floor=0.0 storage=fp8 storage.scale=head",
]
PYRAMID = "policy.strategy=constant policy.prefill_decay_ratio=0.5 policy.min_context=0 policy.recent_ratio=0.1"
OF_METHODS = {
    "ada_kv": f"ada_kv {SNAPKV}",
    "kivi": f"kivi {SMALL}",
    "minicache": "minicache",
    "minicache_kivi4": f"minicache_kivi4 {SMALL}",
    "snapkv_kivi4": f"snapkv_kivi4 {SNAPKV} {SMALL}",
    "full": "full",
    "snapkv": f"snapkv {SNAPKV}",
    "pyramidkv": f"pyramidkv {SNAPKV}",
    "lckv": "lckv sharing.encode=exact",
    "kvshare": "kvshare sharing.encode=exact",
    "cla": "cla",
    "gqa": "gqa",
    "mha": "mha",
    "mqa": "mqa",
    "mla": "mla",
    "h2o": "h2o budget=24",
    "tova": "tova budget=24",
    "streaming_llm": "streaming_llm budget=24",
    "yoco": "yoco sharing.window=8",
    "pyramid_infer": f"pyramid_infer {PYRAMID} policy.gen_window=4",
}
WHILE_DECODING = [
    "h2o budget=40 sinks=2 recent=0",
    "h2o budget=24 schedule=every_n schedule.n=7",
    "tova budget=24 schedule=every_n schedule.n=3",
    "snapkv budget=24 scorer.window=8 schedule=every_n schedule.n=16",
    "scissorhands budget=24 schedule.n=0.25 scorer.history=4",
    "key_diff budget=24 schedule=every_n schedule.n=5 allocator=pyramid",
    "key_norm budget=24 schedule=every_step sinks=1",
    "expected_attention budget=24 schedule=every_n schedule.n=9",
    "lagkv budget=24 schedule=every_n schedule.n=7 scorer.lag=6",
    "chunkkv budget=24 schedule=every_n schedule.n=5 scorer.chunk=4 scorer.scorer.window=8",
    "criticalkv budget=24 schedule=ring recent=6 scorer.scorer.window=8 allocator=adaptive storage=ragged",
    "h2o budget=24 schedule=ring recent=6 sinks=2",
    "duo_attention budget=24 schedule=streaming_heads recent=6 sinks=2",
    "streaming_llm budget=40 policy.mode=prefill_evict policy.reposition=false",
    "streaming_llm budget=24 policy.mode=prefill_evict policy.prefill_only=true",
    "h2o budget=24 schedule=after_prefill",
    "h2o budget=24 storage=turboquant storage.bits=3",
    f"pyramid_infer {PYRAMID} policy.gen_window=3 policy.distance_weight=3.0 policy.gen_keep_ratio=0.5",
    f"pyramid_infer {PYRAMID} policy.gen_window=2 policy.gen_keep_ratio=1.0 policy.gen_decay_ratio=1.0",  # all stay
    f"pyramid_infer {PYRAMID} budget=50 policy.gen_window=5",  # two prompts are within the budget
    f"pyramid_infer {PYRAMID} policy.trigger=never",
    f"pyramid_infer {PYRAMID} policy.trigger=never storage=kivi8 {SMALL}",
]
"""Tokens leave while decoding; between two moves of the others together their slots are empty."""
CHANGING = {
    "no_cache": "every step runs the whole sequence again, which is one token longer each time",
    "hf_quantized": "transformers' quantized cache makes new, longer tensors at every step",
    "pyramid_infer policy.trigger=published": (
        "policy.trigger=published keeps a record of attention whose two sizes change from step to step"
    ),
}
"""The methods, storages and settings without static steps, and the reason that a record gives; there are no others."""


def case_of(name: str) -> str:
    """A method at settings of its own, or at a budget of 40 and those of its YAML for the contract tests."""
    return OF_METHODS.get(name) or " ".join([name, "budget=40", *(f"{k}={v}" for k, v in own_settings(name).items())])


METHODS = [case_of(name) for name in yamls("method") if name not in CHANGING]
CASES = [*STORAGES, *COMBINED, *METHODS, *WHILE_DECODING]
AS_ANOTHER = (
    *("kvquant", "turboquant", "fp8", "minicache", "minicache_kivi4", "kivi", "full"),  # their storages are cases
    *("mha", "mqa", "transformers", "kvshare"),  # as gqa, full and lckv
    # As snapkv: another scorer, or allocator, before the first step.
    *("pyramidkv", "random", "key_norm", "key_diff", "compactor", "cur", "finch", "chunkkv", "criticalkv"),
    *("expected_attention", "lagkv", "rkv"),
)
SLOW = {
    *COMBINED[::2],
    *WHILE_DECODING[::2],
    *(case_of(name) for name in AS_ANOTHER),
    *(f"full storage={storage_settings(name)}" for name in ("kivi4", "kivi8", "minicache_kivi2", "quest")),
}
"""Cases that only ``make slow`` runs: more of the same."""

SCORERS = {  # at windows that the prompts have
    name: {"snapkv": " scorer.window=6", "finch": " scorer.window=6", "lagkv": " scorer.lag=6"}.get(name, "")
    for name in yamls("method/scorer")
}
SCORERS |= {
    "chunkkv": " scorer.chunk=4 scorer.scorer.window=6",
    "criticalkv": " scorer.scorer.window=6",
    "rkv": " scorer.window=6",
    "scissorhands": " scorer.history=6",
}


def products() -> list[str]:
    """Every scorer x allocator x schedule while decoding, per head where the heads' lengths differ."""
    allocators = {name: name for name in yamls("method/allocator")}
    allocators["pyramid of heads"] = "adaptive allocator.layers=pyramid allocator.floor=0.0"
    schedules = {name: name for name in yamls("method/schedule")} | {"every_n": "every_n schedule.n=5"}
    for name in ("after_prefill", "ring", "streaming_heads"):  # no token leaves while decoding, or none by its score
        del schedules[name]
    out = []
    for scorer, settings in SCORERS.items():
        name = scorer if scorer in yamls("method") else "snapkv"  # not every scorer has snapkv's schedule
        part = method_of(f"{name} scorer={scorer}{settings}").policy.scorer
        heads_alike = part.scores_heads_alike
        if part.repeats_prompt:  # makes its product in test_contract.py
            continue
        for allocator in allocators.values():
            differ = allocator.startswith(("adaptive", "safeguard", "global"))
            if differ and heads_alike:  # refused: there are no heads to compare
                continue
            moved = " scorer.reposition=false" if part.repositions and allocator == "global" else ""  # refused
            parts = f"scorer={scorer}{settings}{moved} allocator={allocator} recent=6 sinks=1"
            storage = "ragged" if (differ or heads_alike) and not part.merges_values else "dense"
            fitting = [s for s in schedules.values() if s == "hold" or not part.prefill_only]
            fitting = [s for s in fitting if s != "hold" or not part.merges_values]
            out += [f"snapkv budget=22 storage={storage} schedule={s} {parts}" for s in fitting]
    return out


PRODUCTS = ["key_norm budget=2 allocator=global allocator.floor=0.0 storage=ragged schedule=every_step", *products()]
"""The first one leaves a layer without tokens after a prompt."""


@pytest.fixture(autouse=True)
def short_interval(monkeypatch):
    """Tokens are moved together several times within the steps."""
    for module in (dense, eviction, local, streaming_llm):
        monkeypatch.setattr(module, "COMPACTION_INTERVAL_STEPS", 9)


def model_of(method: Method):
    if method.sharing is None:
        return tiny_model()
    return shared_model(method.sharing, "sdpa", torch.float64, std=0.07, **SHAPE | {"num_hidden_layers": 4})


def model_and_cache(text: str, rows: int = len(LENGTHS)):
    """The model, the cache behind prompts of different lengths, and the first token."""
    method = method_of(text)
    model = model_of(method)
    cache = method.new_cache(model)
    ids, mask = left_pad([prompt_ids(n, seed) for seed, n in enumerate(LENGTHS[:rows])])
    return model, cache, prefill(model, cache, ids, mask if rows > 1 else None).argmax(-1)


def test_the_lists_name_methods():
    assert {*OF_METHODS, *(text.split()[0] for text in CHANGING)} <= {*yamls("method")}
    assert case_of("lagkv") == "lagkv budget=40 scorer.lag=8"


def test_the_fake_graph_replays_recorded_host_values():
    x, number = torch.zeros(2), 1
    with CapturedOps() as captured:
        y = (x + number) * 2
    x.fill_(5)
    number = 7
    captured.replay()
    assert captured.now(y).tolist() == [12, 12] and y.tolist() == [2, 2]
    with pytest.raises(AssertionError, match="wait for the device"), CapturedOps():
        bool(x.sum())


def addresses(cache) -> list[tuple[int, torch.Size]]:
    return [(t.data_ptr(), t.shape) for layer in cache.layers for t in layer.tensors()]


@torch.inference_mode()
@pytest.mark.parametrize("text", STORAGES)
def test_eager_static_steps_match_dynamic_steps(text):
    """One sequence: logits, tokens and bytes; and no tensor is replaced, changes its shape or is added."""
    model, grows, token = model_and_cache(text, 1)
    _, static, _ = model_and_cache(text, 1)
    assert static.static_problem is None
    static.make_static(STEPS)
    before, stored = addresses(static), static.kv_bytes_stored
    for _ in range(STEPS):
        expected = decode(model, grows, token)
        torch.testing.assert_close(decode(model, static, token), expected, rtol=0, atol=1e-9)
        static.between_steps()
        assert addresses(static) == before
        assert static.kv_bytes_logical == grows.kv_bytes_logical
        token = expected.argmax(-1)
    assert all(bool((a == b).all()) for a, b in zip(static.tokens_held, grows.tokens_held, strict=True))
    assert static.kv_bytes_stored == stored >= static.kv_bytes_logical


def capture_step(model, static, token) -> tuple[torch.Tensor, CapturedOps, torch.Tensor]:
    """(input of the step, its captured operations, its logits); the cache's state is as before."""
    held, captured = token.clone(), CapturedOps()
    before = [t.clone() for t in static.static_state()]
    with captured:
        logits = decode(model, static, held)
    for tensor, value in zip(static.static_state(), before, strict=True):
        tensor.copy_(value)
    return held, captured, logits


@torch.inference_mode()
@pytest.mark.parametrize("text", marked_slow(CASES, SLOW))
def test_replayed_steps_match_dynamic_steps(text):
    """A padded batch: captured once, with all that Python knew at that moment; nothing in it waits for the device."""
    model, grows, token = model_and_cache(text)
    _, static, _ = model_and_cache(text)
    check_replayed_steps(model, grows, static, token, 32 if SMALL in text else 20)


@torch.inference_mode()
@pytest.mark.parametrize("text", every_nth(9, PRODUCTS))
def test_every_product_of_parts_has_static_steps(text):
    """Replayed, with tensors that stay as they are; and a copy of the cache goes on with other tokens."""
    model, grows, token = model_and_cache(text)
    _, static, _ = model_and_cache(text)
    check_replayed_steps(model, grows, static, token)


def check_replayed_steps(model, grows, static, token, steps=11):
    """Captured and replayed steps of ``static`` against steps of ``grows``, and a copy of each on its way."""
    assert static.static_problem is None
    static.make_static(steps)
    shapes, stored = addresses(static), static.kv_bytes_stored
    held, captured, logits = capture_step(model, static, token)
    for step in range(steps):
        if step == 9:
            forks = grows.fork(), static.fork()
            for other in ((token + 1) % 90, (token + 2) % 90):
                expected, found = (decode(model, fork, other) for fork in forks)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
                forks[1].between_steps()
        expected = decode(model, grows, token)
        held.copy_(token)
        captured.replay()
        static.between_steps()
        torch.testing.assert_close(captured.now(logits), expected, rtol=0, atol=1e-9)
        assert all(bool((a == b).all()) for a, b in zip(static.tokens_held, grows.tokens_held, strict=True))
        assert static.kv_bytes_logical == grows.kv_bytes_logical
        token = expected.argmax(-1)
    assert addresses(static) == shapes and static.kv_bytes_stored == stored


SHARING = [
    CLA(2),
    LCKV(encode="exact"),
    KVShare(3, "sandwich", "middle", encode="exact"),
    YOCO(mixer="gated_retention"),
    YOCO(window=8),
]
ON_SHARED_LAYERS = [
    "full",
    "h2o budget=20",
    "h2o budget=20 allocator=adaptive storage=ragged",
    "tova budget=20 storage=ragged schedule=every_n schedule.n=3",
    "key_norm budget=20 schedule=every_n schedule.n=3 allocator=global storage=ragged",
    "streaming_llm budget=20 policy.mode=prefill_evict",
    "streaming_llm budget=20 policy.mode=prefill_evict policy.reposition=false storage=ragged",
]


SHARED_LAYER_CASES = [
    pytest.param(sharing, text, marks=[] if (i + j) % 3 == 0 else pytest.mark.slow, id=f"{sharing.label} {text}")
    for i, sharing in enumerate(SHARING)
    for j, text in enumerate(ON_SHARED_LAYERS)
]


@torch.inference_mode()
@pytest.mark.parametrize(("sharing", "text"), SHARED_LAYER_CASES)
def test_models_that_share_layers_have_static_steps(sharing, text):
    """References to lower and to higher layers, windows, and the states of gated retention."""
    method = replace(method_of(text), sharing=sharing)
    model = model_of(method)
    ids, mask = left_pad([prompt_ids(n, seed) % 90 for seed, n in enumerate(LENGTHS)])
    grows, static = method.new_cache(model), method.new_cache(model)
    token = prefill(model, grows, ids, mask).argmax(-1)
    prefill(model, static, ids, mask)
    check_replayed_steps(model, grows, static, token)


def offered(name: str) -> Iterator[tuple[str, Method]]:
    """A method with every storage, and every schedule where it has one; without what is refused."""
    method = method_of(case_of(name))
    policies: list[Method] = [method]
    if isinstance(method, EvictionMethod):
        for schedule in yamls("method/schedule"):
            with suppress(InputError):
                policies.append(replace(method, schedule=method_of(f"key_norm schedule={schedule}").schedule))
    for storage in yamls("method/storage"):
        if storage == "hf_quantized" and find_spec("optimum") is None:
            continue
        part = method_of(f"full storage={storage_settings(storage)}").storage
        for made in policies:
            with suppress(InputError):
                yield storage, replace(made, storage=part)


@pytest.mark.parametrize("name", marked_slow(yamls("method"), {*AS_ANOTHER} - {"full"}))
def test_only_the_named_methods_have_no_static_steps(name):
    """Every YAML with every storage and schedule that it can be used with; the reason is the listed one."""
    for storage, method in offered(name):
        model = model_of(method)
        try:
            cache = method.new_cache(model)
        except InputError:  # latents, on a storage that holds keys and values apart
            assert name == "mla" and storage != "dense"
            continue
        prefill(model, cache, prompt_ids(44) % 90)
        assert cache.static_problem == CHANGING.get("no_cache" if name == "no_cache" else storage), method.label


SETTINGS = [
    *(method_of(text).storage for text in STORAGES),
    Kivi(8, group=1, residual=1),
    Kivi(4, group=8, residual=80),  # the first block is full after 30 steps, or never
    MiniCacheKivi(start=1, gamma=0.3, bits=8, group=1, residual=1),
    MiniCacheKivi(start=0, gamma=0.3, group=8, residual=80),
    MiniCacheKivi(start=0, group=8, residual=200),
    *(MiniCache(start=0, gamma=0.3, retention=retention) for retention in RETENTIONS),
    *(MiniCacheKivi(start=0, gamma=0.3, retention=r, group=8, residual=64) for r in RETENTIONS[1:]),
    *(MiniCache(start=0, gamma=gamma) for gamma in (0.0, 1.0)),
]
SLOW_SETTINGS = [
    *(method_of(f"full storage={storage_settings(name)}").storage for name in ("kivi4", "kivi8", "minicache_kivi2")),
    MiniCacheKivi(start=0, group=8, residual=200),
    *(MiniCacheKivi(start=0, gamma=0.3, retention=r, group=8, residual=64) for r in RETENTIONS[1:]),
    MiniCache(start=0, gamma=0.0),
]
RULES = [LogitRule(0.3), LogitRule(0.3, softcap=0.5), LogitRule(0.3, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]))]


@torch.inference_mode()
@pytest.mark.parametrize("storage", marked_slow(SETTINGS, SLOW_SETTINGS), ids=repr)
def test_static_layers_match_dynamic_layers(storage):
    """Layers that are given the same numbers, read back after every step; one head begins empty."""
    layers = 4
    pairs = [storage.new_layers(layers) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    pads = [[0], [17]] if storage.capabilities.requires_same_tokens_across_layers else [[0, 30], [50, 17]]
    valid = torch.arange(50) >= torch.tensor(pads)[..., None]  # [B, 1 or H, S]

    def numbers(n: int) -> torch.Tensor:
        return torch.randn(2, 2, n, 16, generator=generator)

    for grows, static in zip(*pairs, strict=True):
        keys, values = numbers(50), numbers(50)
        grows.write(keys, values, valid)
        static.write(keys, values, valid)
    for static in pairs[1]:
        static.make_static(STEPS)
    for step in range(STEPS):
        new = [(numbers(1), numbers(1)) for _ in range(layers)]
        query = torch.randn(2, 4, 1, 16, generator=generator)
        outputs = []
        for held in pairs:
            for layer, (keys, values) in zip(held, new, strict=True):
                layer.append(keys, values)
                if step % 8 == 7:
                    outputs += [layer.attend(query, rule, None) for rule in RULES]
                layer.flush()
        half = len(outputs) // 2
        for expected, found in zip(outputs[:half], outputs[half:], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
        for static in pairs[1]:
            static.between_steps()
        for grows, static in zip(*pairs, strict=True):
            assert static.logical_bytes == grows.logical_bytes
            for found, expected in zip(real_tokens(static), real_tokens(grows), strict=True):
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if isinstance(storage, MiniCache) else 0)


@torch.inference_mode()
@pytest.mark.parametrize("is_known_before", [False, True])
def test_unmergeable_generated_tokens_are_retained_or_refused(is_known_before):
    """Opposite keys in two layers: 32 of them where the prompt has none, any number where it has some."""
    lower, upper = MiniCache(start=0, gamma=0.0).new_layers(2)
    x = torch.randn(1, 1, 60, 16, generator=torch.Generator().manual_seed(0))
    lower.write(x[:, :, :20], x[:, :, :20])
    other = x[:, :, :20].roll(1, 2)
    if is_known_before:
        other[:, :, 3] = -x[:, :, 3]
    upper.write(other, other)
    for layer in (lower, upper):
        layer.make_static(STEPS)

    def step(n: int) -> None:
        for layer, sign in ((lower, 1), (upper, -1)):
            layer.append(sign * x[:, :, n : n + 1], sign * x[:, :, n : n + 1])
            layer.flush()
        for layer in (lower, upper):
            layer.between_steps()

    for n in range(20, 60):  # the last step looks for no overflow: end_steps does
        step(n)
    if not is_known_before:
        with pytest.raises(InputError, match=r"more than 32 tokens that cannot be merged.*runner\.cuda_graph=false"):
            upper.end_steps()
        return
    upper.end_steps()
    for layer, sign in ((lower, 1), (upper, -1)):
        assert torch.equal(real_tokens(layer, 1, 1)[0][20:], sign * x[0, 0, 20:])


@torch.inference_mode()
@pytest.mark.parametrize(
    "storage", [MiniCache(start=0, gamma=0.0), MiniCacheKivi(start=0, gamma=0.0, bits=8, group=1, residual=1)], ids=repr
)
@pytest.mark.parametrize("steps", [32, 33])
def test_an_early_end_refuses_a_generated_token_that_found_no_place(storage, steps):
    """Opposite keys: the 33rd token has no place, and of 40 steps only the 32nd looks whether all have one."""
    layers = storage.new_layers(2)
    x = torch.randn(1, 1, 60, 16, generator=torch.Generator().manual_seed(0))
    for layer in layers:
        layer.write(x[:, :, :20], x[:, :, :20])
    for layer in layers:
        layer.make_static(STEPS)
    for n in range(20, 20 + steps):
        for layer, sign in zip(layers, (1, -1), strict=True):
            layer.append(sign * x[:, :, n : n + 1], sign * x[:, :, n : n + 1])
            layer.flush()
        for layer in layers:
            layer.between_steps()
    layers[0].end_steps()
    if steps == 32:
        layers[1].end_steps()
        return
    with pytest.raises(InputError, match=r"more than 32 tokens that cannot be merged.*runner\.cuda_graph=false"):
        layers[1].end_steps()


def real_tokens(layer: LayerStorage, rows: int = 2, heads: int = 2) -> list[torch.Tensor]:
    """Keys and values [tokens, D] of each row and head in turn."""
    keys, values, valid = layer.read()
    if valid is None:
        valid = torch.ones(keys.shape[:3], dtype=torch.bool)
    valid = valid.expand(keys.shape[:3])
    return [x[b, h][valid[b, h]] for x in (keys, values) for b in range(rows) for h in range(heads)]
