"""Bytes over the steps of an example, by formula, against the bytes measured at each step."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch
from tiny_models import prompt_ids, tiny_model

from kvbench.analysis.costs import means_over_steps
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import decode, prefill
from kvbench.runners.evaluate_batch import Item
from kvbench.runners.records.step_bytes import step_bytes
from kvbench.tasks.base import Continuations

LENGTH, NEW = 40, 9
METHODS = [
    *("full", "no_cache", "snapkv budget=12 scorer.window=4", "snapkv budget=12 scorer.window=4 hold_budget=true"),
    *("h2o budget=12", "streaming_llm budget=12", "scissorhands budget=12 scorer.history=4 schedule.n=4"),
    *("quest storage.page=4 storage.reads=12", "kivi storage.residual=16 storage.group=8", "fp8"),
]


@torch.inference_mode()
@pytest.mark.parametrize("text", METHODS)
def test_means_over_the_steps_are_those_of_the_measured_bytes(text):
    model, method = tiny_model(), named_method(text)
    cache = method.new_cache(model)
    prefill(model, cache, prompt_ids(LENGTH))
    held, read = [], []
    for step in range(NEW):
        decode(model, cache, torch.tensor([3 + step]))
        held.append(cache.kv_bytes_logical)
        read.append(cache.kv_bytes_read_per_step)
    made = step_bytes(method, model, [(LENGTH, 1 + step) for step in range(NEW)])
    assert made["kv_bytes_mean"] == round(fmean(held))
    assert made["kv_bytes_read_mean"] == round(fmean(read))
    bytes_a_token = named_method("full").new_cache(model)
    prefill(model, bytes_a_token, prompt_ids(1))
    assert made["kv_bytes_full_mean"] == bytes_a_token.kv_bytes_logical * (LENGTH + (1 + NEW) / 2)


@torch.inference_mode()
def test_padding_of_heads_of_different_lengths_is_held_over_all_steps():
    """A storage for equal heads: its padding after the prompt is part of every step's bytes."""
    model, method = tiny_model(), named_method("key_diff budget=12 allocator=adaptive allocator.floor=0.0")
    cache = method.new_cache(model)
    prefill(model, cache, prompt_ids(LENGTH))
    padding = cache.kv_bytes_stored - cache.kv_bytes_logical
    assert padding > 0
    steps = [(LENGTH, step) for step in range(NEW)]
    bare, made = (step_bytes(method, model, steps, n) for n in (0, padding))
    assert made["kv_bytes_mean"] == bare["kv_bytes_mean"] + padding >= cache.kv_bytes_stored
    assert made["kv_bytes_read_mean"] == bare["kv_bytes_read_mean"] + padding
    assert made["kv_bytes_full_mean"] == bare["kv_bytes_full_mean"]


def test_a_token_is_predicted_from_what_the_cache_holds_before_it():
    """The first one from the prompt alone, or from the question behind it; scored ones from the given ones before."""
    assert Item(None, [1] * 5, []).steps(3) == [(5, 0), (5, 1), (5, 2)]
    assert Item(None, [1] * 5, [2] * 4).steps(2) == [(5, 4), (5, 5)]
    assert Item(None, [1] * 5, []).steps(0) == [(5, 0)]
    scored = Continuations([1] * 7, (([], [4, 5]), ([8, 9], [6])))
    assert Item(None, [1] * 7, [], (scored,)).steps(0) == [(7, 0), (7, 1), (7, 2)]


def test_a_record_has_them_if_all_of_its_rows_have_them():
    rows = [{"kv_bytes_mean": n, "kv_bytes_read_mean": n, "kv_bytes_full_mean": 4 * n} for n in (1, 3)]
    assert means_over_steps(rows) == {
        "kv_bytes_mean": 2.0,
        "kv_bytes_read_mean": 2.0,
        "kv_bytes_full_mean": 8.0,
        "kv_ratio_mean": 0.25,
    }
    assert means_over_steps([*rows, {}]) == {}
