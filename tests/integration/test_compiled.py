"""Compiled decode steps: the same logits as steps that are not, on weights that are held once."""

import copy
import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from local_model import kvbench
from tiny_models import SHAPE, left_pad, prompt_ids, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kvbench.conf.errors import InputError
from kvbench.methods.cache.kernel_use import CPP, PYTORCH, STEP_ATTENTION, forget_implementations, implementations
from kvbench.methods.cache.method import Method
from kvbench.methods.policies.eviction import EvictionPolicy
from kvbench.methods.policies.no_cache import NoCache
from kvbench.methods.policies.scorers.attention_sums import AttentionSums
from kvbench.methods.policies.scorers.snapkv import SnapKV
from kvbench.methods.sharing.yoco import YOCO
from kvbench.methods.storage.kernels.cpp import compiler_problem
from kvbench.methods.storage.kivi import Kivi
from kvbench.models.random import RandomModel
from kvbench.models.tiny import TinyModel
from kvbench.runners.engine import decode, decode_step, prefill
from kvbench.runners.engine.compiled import MAX_ROWS, Affine, can_compile, compile_decoder, product
from kvbench.runners.engine.step import COMPILED, EAGER, FUSED
from kvbench.runners.measure import passes
from kvbench.runners.measure.fresh import in_fresh_process
from kvbench.runners.measure.job import Job
from kvbench.runners.measure.session import load
from kvbench.runners.measure.time_pass import time_pass
from kvbench.tasks.shape import Shape

needs_compiler = pytest.mark.skipif(compiler_problem() is not None, reason="needs a C++ compiler")


@functools.cache
def pair(family: str, dtype: torch.dtype):
    """(a model as it is loaded, a copy of it, the copy's compiled decoder)."""
    if family == "qwen2":  # biases on queries, keys and values
        torch.manual_seed(0)
        plain = Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)).to(dtype).eval()
        for layer in plain.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                torch.nn.init.normal_(getattr(layer.self_attn, name).bias)
    else:
        plain = copy.deepcopy(tiny_model(family)).to(dtype)
    other = copy.deepcopy(plain)
    return plain, other, compile_decoder(other)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_product_is_the_layer(dtype, bias, rows):
    """Against float64, no further than one rounding of the result and float32's of 300 terms, which fill no vectors."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 300).to(dtype), torch.randn(50, 300).to(dtype)
    by = Affine(weight, torch.randn(50).to(dtype) if bias else None)
    exact = torch.nn.functional.linear(x.double(), weight.double(), by.bias.double() if bias else None)
    out = product(x, by)
    assert out.dtype == dtype and out.shape == (rows, 50)
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=300 * 2**-24)


@needs_compiler
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.inference_mode()
def test_a_compiled_step_gives_the_logits_of_the_model(family):
    """Two rows, one padded, then one row; several steps each."""
    plain, other, compiled = pair(family, torch.float32)
    ids, mask = left_pad([prompt_ids(30, 1), prompt_ids(12, 2)])
    for prompt, padding in ((ids, mask), (prompt_ids(25), None)):
        caches = [Method("full").new_cache(m) for m in (plain, other)]
        expected = prefill(plain, caches[0], prompt, padding)
        assert torch.equal(prefill(other, caches[1], prompt, padding), expected)  # the model is what it was
        token = expected.argmax(-1)
        step = decode_step(other, caches[1], token, 4, compiled=compiled)
        assert step.mode == COMPILED
        for _ in range(4):
            expected = decode(plain, caches[0], token)
            found = step(token)
            assert found.shape == expected.shape and expected.abs().max() > 1
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
            token = expected.argmax(-1)


@needs_compiler
@torch.inference_mode()
def test_in_bfloat16_a_compiled_step_is_no_further_from_the_truth():
    """The same weights in float64 are the truth; sums are rounded once, so they must not lose against products."""
    plain, other, compiled = pair("llama", torch.bfloat16)
    truth = copy.deepcopy(plain).double()
    models, ids = (truth, plain, other), prompt_ids(30)
    caches = [Method("full").new_cache(m) for m in models]
    first = [prefill(m, cache, ids) for m, cache in zip(models, caches, strict=True)]
    token = first[0].argmax(-1)
    step = decode_step(other, caches[2], token, 6, compiled=compiled)
    assert step.mode == COMPILED
    off = torch.zeros(2)
    for _ in range(6):
        exact = decode(truth, caches[0], token)
        off += torch.stack([(x - exact).abs().mean() for x in (decode(plain, caches[1], token), step(token))])
        token = exact.argmax(-1)
    assert 0 < off[1] < 1.2 * off[0]


@needs_compiler
@pytest.mark.parametrize(
    "method",
    [
        Method("snapkv", EvictionPolicy(SnapKV(window=4, kernel=3), 16)),
        Method("h2o", EvictionPolicy(AttentionSums(), 16)),
        Method("kivi4", storage=Kivi()),
    ],
    ids=lambda method: method.name,
)
@torch.inference_mode()
def test_every_cache_takes_compiled_steps(method):
    plain, other, compiled = pair("llama", torch.float32)
    ids = prompt_ids(60)
    caches = [method.new_cache(m) for m in (plain, other)]
    token = prefill(plain, caches[0], ids).argmax(-1)
    prefill(other, caches[1], ids)
    step = decode_step(other, caches[1], token, 20, compiled=compiled)
    assert step.mode == COMPILED
    forget_implementations()
    for _ in range(20):
        expected = decode(plain, caches[0], token)
        found = step(token)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
        token = expected.argmax(-1)
    if method.name != "kivi4":  # whose codes are attended to in PyTorch
        assert CPP in implementations()[STEP_ATTENTION]
    assert caches[0].kv_bytes_stored == caches[1].kv_bytes_stored


@needs_compiler
def test_what_cannot_be_compiled_runs_as_it_is():
    _, other, compiled = pair("llama", torch.float32)
    cache = Method("full").new_cache(other)
    many = prompt_ids(9).repeat(MAX_ROWS + 1, 1)
    token = prefill(other, cache, many).argmax(-1)
    assert decode_step(other, cache, token, 2, compiled=compiled).mode == FUSED
    bare = NoCache("no_cache").new_cache(other)
    token = prefill(other, bare, prompt_ids(9)).argmax(-1)
    assert decode_step(other, bare, token, 2, compiled=compiled).mode == EAGER
    for place, mode in ((other.model.layers[0], EAGER), (other.model.layers[1].mlp.down_proj, FUSED)):
        handle = place.register_forward_hook(lambda *_: None)
        try:
            cache = Method("full").new_cache(other)
            token = prefill(other, cache, prompt_ids(9)).argmax(-1)
            assert decode_step(other, cache, token, 2, compiled=compiled).mode == mode
        finally:
            handle.remove()


class Adapted(torch.nn.Linear):
    """An adapter's layer: its class is not the library's, its weight is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class OtherNorm(LlamaRMSNorm):
    """A norm of one's own."""


CHANGES = {
    "linear layer": lambda model: setattr(model.model.layers[1].self_attn.o_proj, "__class__", Adapted),
    "norm": lambda model: setattr(model.model.norm, "__class__", OtherNorm),
    "epsilon": lambda model: setattr(model.model.layers[1].post_attention_layernorm, "variance_epsilon", 1e-3),
    "activation": lambda model: setattr(model.model.layers[1].mlp, "act_fn", torch.nn.ReLU()),
    "unknown activation": lambda model: setattr(model.config, "hidden_act", "relu"),
    "one dtype": lambda model: model.model.norm.to(torch.bfloat16),
    "float64": lambda model: model.double(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_that_computes_something_else_is_not_compiled(change):
    model = copy.deepcopy(tiny_model("llama")).float()
    assert can_compile(model)
    change(model)
    assert not can_compile(model)


def config_of(**different):
    """A model with biases, odd sizes, and heads that are wider than their share of the hidden state."""
    torch.manual_seed(0)
    sizes = SHAPE | {"hidden_size": 52, "intermediate_size": 77, "head_dim": 16, "initializer_range": 0.3}
    config = LlamaConfig(**sizes | {"attention_bias": True, "mlp_bias": True} | different)
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter)
    return model


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh"])
@torch.inference_mode()
def test_every_part_of_a_layer_is_the_model_s(act, threads):
    """One row and two, one of them padded, in float32 and bfloat16, against the model in float64."""
    plain = config_of(hidden_act=act)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
            model = copy.deepcopy(plain).to(dtype)
            truth = copy.deepcopy(model).double()
            decoder = compile_decoder(model)
            for ids, mask in ((prompt_ids(25), None), left_pad([prompt_ids(30, 1), prompt_ids(12, 2)])):
                caches = [Method("full").new_cache(m) for m in (truth, model)]
                token = prefill(truth, caches[0], ids, mask).argmax(-1)
                prefill(model, caches[1], ids, mask)
                step = decode_step(model, caches[1], token, 3, compiled=decoder)
                assert step.mode == COMPILED
                for _ in range(3):
                    expected = decode(truth, caches[0], token)
                    error = (step(token) - expected).abs().max() / expected.abs().max()
                    assert error < tolerance
                    token = expected.argmax(-1)
    finally:
        torch.set_num_threads(before)


def job(source, method: Method | None = None) -> Job:
    return Job(source, method or Method("full"), Shape(20, 4), "cpu", torch.float32, 0, 1, None, 1, 1, compile=True)


def test_weights_are_held_once_and_a_model_of_another_build_is_laid_out():
    loaded = load(job(RandomModel("tiny")))
    assert loaded.compiled is not None
    model = loaded.model
    attention = model.model.layers[0].self_attn
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in model.parameters())
    joined = {p.weight.untyped_storage().data_ptr() for p in (attention.q_proj, attention.k_proj, attention.v_proj)}
    assert len(joined) == 1
    shared = load(job(TinyModel(trained_on="recall").for_sharing(YOCO(window=16), "yoco")))
    bare = load(job(RandomModel("tiny"), NoCache("no_cache")))
    assert shared.compiled is None and bare.compiled is None


TIMES = {
    "bytes_read_per_step": 1,
    "bandwidth": {"copy_bytes_per_s": 1},
    "metrics": {"tpot_ms": {"repetitions": [1.0]}},
}
TINY_RUN = ("run", "runner=efficiency", "method=full", "model=random", "workload.prompt_tokens=20")
MEASURE = (*TINY_RUN, "runner.compile=true")


ONCE = ("workload.new_tokens=4", "runner.warmups=0", "runner.repeats=1")


@needs_compiler
@pytest.mark.usefixtures("forked")
def test_a_record_says_that_steps_were_compiled_and_an_older_run_stays_the_same_run(tmp_path):
    """Compiled by default."""
    for wanted in ("null", "false"):
        done = kvbench(*TINY_RUN, *ONCE, f"results_dir={tmp_path}", f"runner.compile={wanted}")
        assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in tmp_path.rglob("record.json")]
    found = {r["decode"]: r for r in records}
    assert found.keys() == {COMPILED, EAGER}
    titles = [line for line in kvbench("table", str(tmp_path)).stdout.splitlines() if line.startswith("**")]
    assert len(titles) == 2 and ["compiled steps" in title for title in sorted(titles, key=len)] == [False, True]
    settings = {how: r["identity"]["runner"] for how, r in found.items()}
    assert settings[COMPILED]["compile"] is True and "compile" not in settings[EAGER]
    first = found[COMPILED]["repetitions"][0][0]
    assert first["recording_s"] > first["decode_s"] > 0  # compiling is in no other number
    assert [found[how]["kernels"][STEP_ATTENTION] for how in (COMPILED, EAGER)] == [CPP, PYTORCH]


@pytest.mark.parametrize("fails", [False, True], ids=["missing", "failing"])
def test_without_a_compiler_that_works_steps_are_eager_by_default(tmp_path, fails):
    """In a process of its own, with nothing compiled from before."""
    compiler = tmp_path / "compiler"
    if fails:
        compiler.write_text("#!/bin/sh\nexit 1\n")
        compiler.chmod(0o755)
    results = tmp_path / "results"
    ask = [*TINY_RUN, *ONCE, "runner.pair_with=[]", f"results_dir={results}"]
    env = os.environ | {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "kvbench.runners.command", *ask]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("decode steps are not compiled, which is slower") == 1
    (record,) = (json.loads(path.read_text()) for path in results.rglob("record.json"))
    assert record["decode"] == EAGER and "compile" not in record["identity"]["runner"]


def test_memory_is_measured_without_the_compiler(monkeypatch):
    """On a CPU the peak is that of the process."""
    measured = []
    monkeypatch.setattr(passes, "in_memory_process", lambda _, job, device: measured.append(job) or {})
    monkeypatch.setattr(passes.Passes, "_times", lambda self, job, other: TIMES)
    passes.Passes().measure(job(RandomModel("tiny")))
    assert [job.compile for job in measured] == [False]


@pytest.mark.slow
def test_no_compiler_is_an_error_of_one_line(tmp_path):
    """In a measuring process, with nothing compiled from before."""
    nothing = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    with pytest.raises(InputError, match=r"runner.compile=True: needs a C\+\+ compiler"):
        in_fresh_process(time_pass, [job(RandomModel("tiny"))], nothing)


@pytest.mark.parametrize("more", [("batch_size=3",), ("workload=max_batch",)])
def test_what_compiled_steps_are_not_for_is_refused(tmp_path, more):
    done = kvbench(*MEASURE, *more, f"results_dir={tmp_path}")
    assert done.returncode == 2 and done.stderr.startswith("error: runner.compile=True: is for device=cpu")
    assert len(done.stderr.splitlines()) == 1 and not any(tmp_path.iterdir())
    done = kvbench(*TINY_RUN, "runner.compile=2", f"results_dir={tmp_path}")
    assert done.returncode == 2 and "runner.compile=2: must be true or false" in done.stderr
