"""``scripts/bench_decode_parts.py``: steps without a part run, and its forms of attention are attention."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import prompt_ids, tiny_model

from kvbench.methods.cache.cache import KVCache
from kvbench.methods.storage.kernels.cpp import compiler_problem
from kvbench.runners.engine.prepacked import PrepackedLinear
from kvbench.runners.engine.weights import prepack_linear_weights

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def parts(monkeypatch):
    """The script; it imports another one."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_decode_parts

    yield bench_decode_parts
    for name in ("bench_decode_parts", "bench_engine"):
        sys.modules.pop(name)


@torch.inference_mode()
def test_a_step_runs_without_each_part_and_is_put_together_again(parts):
    model = copy.deepcopy(tiny_model("llama")).float()
    prepack_linear_weights(model)
    before = KVCache.attend, PrepackedLinear.forward
    times = parts.steps_without(model, prompt_ids(9), 1)
    assert times.keys() == {"whole", "without_attention", "without_linear_layers", "without_both"}
    assert all(ms > 0 for ms in times.values())
    assert (KVCache.attend, PrepackedLinear.forward) == before


def test_the_forms_of_attention_agree(parts):
    torch.manual_seed(0)
    query, keys, values = torch.randn(1, 3, 3, 64), torch.randn(1, 3, 100, 64), torch.randn(1, 3, 100, 64)
    expected = parts.whole_heads(query.double(), keys.double(), values.double())
    forms = [parts.parts(2), parts.batched_products, parts.products_by_head, parts.products_by_query, parts.sums]
    forms += [parts.cpp_kernel] if compiler_problem() is None else []
    for form in forms:
        torch.testing.assert_close(form(query, keys, values).double(), expected, atol=1e-5, rtol=1e-5)
