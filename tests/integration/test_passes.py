"""Passes of several methods in one process, in turn with the full cache; transformers' generate beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from local_model import kvbench, save_local_model
from tiny_models import prompt_ids

from kvbench.conf.errors import InputError
from kvbench.methods.cache.layout import model_shape
from kvbench.methods.cache.method import Method
from kvbench.models.local import LocalModel
from kvbench.models.random import RandomModel
from kvbench.runners.config.methods import named_method
from kvbench.runners.engine import generate
from kvbench.runners.measure import passes, time_pass
from kvbench.runners.measure.fresh import Killed, MeasuringProcess
from kvbench.runners.measure.job import Job
from kvbench.runners.measure.memory_pass import memory_pass
from kvbench.runners.measure.passes import Passes
from kvbench.runners.measure.session import Session, load, same_model
from kvbench.tasks.shape import Shape

TINY = RandomModel("tiny", max_positions=4096)
DISTURBING = (
    "pyramid_infer policy.strategy=constant policy.min_context=0 budget=0.5",  # narrows the prompt between layers
    "streaming_llm budget=40",  # turns keys
    "minicache",
    "snapkv budget=40",
    "full",
)


def job_of(text: str, source=TINY, prompt: int = 130, new: int = 6, rows: int = 1, **options) -> Job:
    method, work = named_method(text), Shape(prompt, new)
    return Job(source, method, work, "cpu", torch.float32, 0, rows, None, 1, 3, **options)


@pytest.mark.slow
def test_a_method_leaves_nothing_to_the_next_one_of_its_process():
    """Tokens and bytes of each are those on a model that no other method has used."""
    session, ids = Session(), prompt_ids(130)
    models = set()
    for text in DISTURBING:
        shared, alone = session.load(job_of(text)), load(job_of(text))
        models.add(id(shared.model))
        made = [generate(one.model, one.new_cache(), ids, max_new_tokens=6).tokens for one in (shared, alone)]
        assert made[0] == made[1], text
        after, fresh = memory_pass(shared.job, session), memory_pass(shared.job)
        assert after["bytes"] == fresh["bytes"] and after["cache_layers"] == fresh["cache_layers"], text
    assert len(models) == 1


def test_a_model_is_kept_for_jobs_that_run_it_in_the_same_form():
    full, snapkv = job_of("full"), job_of("snapkv budget=40")
    assert same_model(full, snapkv)
    other_model = replace(full, source=RandomModel("tiny", seed=1))
    others = [replace(full, dtype=torch.float64), other_model, job_of("transformers")]
    assert not any(same_model(full, other) for other in others)
    assert not same_model(replace(full, compile=True), replace(job_of("no_cache"), compile=True))
    session = Session()
    models = [session.load(job).model for job in (full, snapkv, other_model, full)]
    assert models[0] is models[1] is not models[2] and models[3] is not models[0]


@pytest.fixture
def no_bandwidth(monkeypatch) -> None:
    monkeypatch.setattr(time_pass, "copy_bandwidth", lambda device: 1e9)


@pytest.mark.usefixtures("no_bandwidth")
def test_repetitions_are_interleaved_and_every_second_round_is_reversed(monkeypatch):
    order = []
    time_batch = time_pass.time_batch

    def spy(loaded, batch):
        order.append(loaded.job.method.name)
        return time_batch(loaded, batch)

    monkeypatch.setattr(time_pass, "time_batch", spy)
    made = time_pass.time_pass([job_of("snapkv budget=40"), job_of("full")])
    assert order == ["snapkv", "full", "full", "snapkv"] * 2  # a warm-up and three repetitions
    assert [len(one["metrics"]["tpot_ms"]["repetitions"]) for one in made] == [3, 3]
    assert made[0]["bytes_read_per_step"] < made[1]["bytes_read_per_step"]


@pytest.mark.usefixtures("no_bandwidth")
def test_no_memory_for_the_method_in_turn_leaves_the_other_one(monkeypatch):
    time_batch = time_pass.time_batch

    def fail(loaded, batch):
        if loaded.job.method.name == "full":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return time_batch(loaded, batch)

    monkeypatch.setattr(time_pass, "time_batch", fail)
    made = time_pass.time_pass([job_of("snapkv budget=40"), job_of("full")])
    assert made[1] is None and len(made[0]["metrics"]["tpot_ms"]["repetitions"]) == 3
    with pytest.raises(torch.OutOfMemoryError):
        time_pass.time_pass([job_of("full")])


class Processes:
    """Stand-ins of measuring processes.

    Attributes:
        asked: (number of the process, pass, names of the methods) of every call.
        fails: Whether a call is one that is killed.
    """

    def __init__(self, monkeypatch):
        self.asked, self.fails, self.started = [], lambda number, step, names: False, 0
        monkeypatch.setattr(passes, "MeasuringProcess", lambda: Process(self))
        monkeypatch.setattr(passes, "EnergyMeter", lambda device: SimpleNamespace(problem=None))
        monkeypatch.setattr(
            passes, "in_memory_process", lambda function, job, device: Process(self).call(function, job)
        )

    def measure(self, baseline: Job | None, *jobs: Job) -> list[dict]:
        with Passes(baseline) as measuring:
            return [measuring.measure(job) for job in jobs]


class Process:
    has_answered = False

    def __init__(self, processes: Processes):
        self._processes, self._number = processes, None

    def call(self, function, argument):
        if self._number is None:
            self._processes.started += 1
            self._number = self._processes.started
        self.has_answered = True
        jobs = argument if isinstance(argument, list) else [argument]
        call = self._number, function.__name__.strip("_").removesuffix("_pass"), [job.method.name for job in jobs]
        self._processes.asked.append(call)
        if self._processes.fails(*call):
            raise Killed("killed")
        times = {"ttft_ms": {"repetitions": [10.0 * self._number]}, "tpot_ms": {"repetitions": [1.0 * self._number]}}
        made = {"metrics": times, "bytes_read_per_step": 1, "bandwidth": {"copy_bytes_per_s": None}}
        return [dict(made) for _ in jobs] if call[1] == "time" else {}

    def close(self):
        self._number, self.has_answered = None, False

    def __exit__(self, *_):
        self.close()


@pytest.fixture
def processes(monkeypatch) -> Processes:
    return Processes(monkeypatch)


def on_cuda(text: str) -> Job:
    return replace(job_of(text), device="cuda")


def test_on_cuda_one_process_runs_all_passes_of_all_methods(processes):
    """The full cache is timed with the first method, and its own record needs no further time."""
    full, snapkv, h2o = map(on_cuda, ("full", "snapkv budget=40", "h2o budget=40"))
    made = processes.measure(full, snapkv, h2o, full)
    assert processes.asked == [
        (1, "time", ["snapkv", "full"]),
        (1, "memory", ["snapkv"]),
        (1, "energy", ["snapkv"]),
        (1, "time", ["h2o", "full"]),
        (1, "memory", ["h2o"]),
        (1, "energy", ["h2o"]),
        (1, "memory", ["full"]),
        (1, "energy", ["full"]),
    ]
    assert [one.get("interleaved") for one in made] == [{"with": "full", "ttft_ms": [10.0], "tpot_ms": [1.0]}] * 2 + [
        None
    ]


def test_on_a_cpu_memory_has_a_process_of_its_own_and_each_method_another(processes):
    full, snapkv = job_of("full"), job_of("snapkv budget=40")
    processes.measure(full, snapkv, full)
    assert processes.asked == [
        (1, "time", ["snapkv", "full"]),
        (1, "energy", ["snapkv"]),
        (2, "memory", ["snapkv"]),
        (3, "energy", ["full"]),
        (4, "memory", ["full"]),
    ]


def test_generate_shares_no_process_and_no_turn(processes):
    full, generates = on_cuda("full"), on_cuda("transformers cache=static")
    made = processes.measure(full, full, generates, full)
    assert [call for call in processes.asked if call[1] != "energy"] == [
        (1, "time", ["full"]),
        (1, "memory", ["full"]),
        (2, "time", ["transformers"]),
        (3, "memory", ["transformers"]),
        (4, "memory", ["full"]),
    ]
    assert "interleaved" not in made[1]


def test_without_memory_a_method_is_tried_again_alone(processes):
    full, snapkv, h2o = map(on_cuda, ("full", "snapkv budget=40", "h2o budget=40"))
    processes.fails = lambda number, step, names: "full" in names and "snapkv" in names
    made = processes.measure(full, h2o, snapkv)
    assert [call for call in processes.asked if call[1] == "time"] == [
        (1, "time", ["h2o", "full"]),
        (1, "time", ["snapkv", "full"]),
        (2, "time", ["snapkv"]),
    ]
    assert "interleaved" in made[0] and "interleaved" not in made[1]


@pytest.mark.parametrize(("baseline", "tries"), [("full", 2), (None, 1)])
def test_a_method_without_memory_in_a_process_of_its_own_is_out_of_memory(processes, baseline, tries):
    processes.fails = lambda number, step, names: step == "time"
    with pytest.raises(Killed):
        processes.measure(None if baseline is None else on_cuda(baseline), on_cuda("snapkv budget=40"))
    assert [number for number, _, _ in processes.asked] == list(range(1, tries + 1))


def memory_in_one_process(texts: tuple[str, ...], device: str = "cuda") -> dict[str, int]:
    """Memory of the last method, after time and memory of all of them were measured in one process, in bytes."""
    source = RandomModel("smollm2-135m", max_positions=8192)
    with MeasuringProcess() as process:
        for text in texts:
            job = replace(job_of(text, source, prompt=8000, new=20), device=device, dtype=torch.bfloat16)
            process.call(passes._time, [job])
            memory = process.call(passes._memory, job)["memory"]
    return {name: memory[name]["allocated"] for name in ("at_rest", "peak_prefill", "peak_decode")}


@pytest.mark.gpu
@pytest.mark.usefixtures("fork_server")
def test_a_method_s_peak_on_a_device_does_not_depend_on_the_method_before_it():
    """The full cache holds 184 MB of the prompt: a peak that is not reset, or a cache that is not freed, would show."""
    full, alone = memory_in_one_process(("full",)), memory_in_one_process(("snapkv budget=256",))
    after = memory_in_one_process(("full", "snapkv budget=256"))
    assert full["peak_decode"] - alone["peak_decode"] > 150e6
    assert after["at_rest"] == pytest.approx(alone["at_rest"], abs=64e6)  # libraries keep workspaces
    for peak in ("peak_prefill", "peak_decode"):
        assert after[peak] - after["at_rest"] == pytest.approx(alone[peak] - alone["at_rest"], abs=4e6)


# transformers' generate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_is_measured_to_the_bytes_of_the_full_cache_and_past_every_end_of_text(tmp_path, cache):
    """A trained model's end-of-text token does not end it either: its tokens are those of the engine."""
    source = LocalModel(path=str(save_local_model(tmp_path / "model")))
    job = job_of(f"transformers cache={cache}", source, prompt=50, new=40, rows=2)
    loaded = load(job)
    assert loaded.model.config.eos_token_id is not None
    (batch,) = loaded.batches()
    seen = []
    held, mode = loaded.new_cache(), None
    mode = loaded.answer(held, batch, lambda: seen.append(held.kv_bytes_logical))
    assert mode == f"generate with a {cache} cache" and len(seen) == 40
    found, shape = memory_pass(job)["bytes"], model_shape(loaded.model)
    full = Method("full")
    assert found["kv_bytes_logical"] == found["kv_bytes_formula"] == 2 * full.bytes_formula(shape, 50) == seen[0]
    assert found["kv_bytes_logical_end"] == found["kv_bytes_formula_end"] == 2 * full.bytes_formula(shape, 50, 39)
    stored = found["kv_bytes_stored"], found["kv_bytes_stored_end"]
    first = found["kv_bytes_formula" if cache == "dynamic" else "kv_bytes_formula_end"]
    assert stored == (first, found["kv_bytes_formula_end"])


def test_pads_and_free_slots_are_no_logical_bytes():
    loaded = load(job_of("transformers cache=static", rows=2))
    (batch,) = loaded.batches()
    requests = [batch.requests[0], replace(batch.requests[1], prompt=batch.requests[1].prompt[:30])]
    mask = torch.ones_like(batch.input_ids)
    mask[1, :100] = 0
    cache = loaded.new_cache()
    loaded.answer(cache, replace(batch, requests=requests, mask=mask))
    shape = model_shape(loaded.model)
    assert cache.kv_bytes_logical == sum(Method("full").bytes_formula(shape, n, 5) for n in (130, 30))
    assert cache.kv_bytes_stored == 2 * Method("full").bytes_formula(shape, 130, 5)


@pytest.mark.usefixtures("forked")
def test_generate_is_a_row_of_the_same_table_and_is_not_scored(tmp_path):
    ask = ("run", "model=random", "runner=efficiency", "method=transformers", "method.cache=static", "device=cpu")
    ask += ("runner.warmups=0", "runner.repeats=1", "workload.prompt_tokens=100", "workload.new_tokens=3")
    ask += ("runner.compile=false",)
    done = kvbench(*ask, f"results_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    records = {r["method_label"]: r for r in map(json.loads, (p.read_text() for p in tmp_path.rglob("record.json")))}
    assert set(records) == {"full", "transformers static"}
    assert records["transformers static"]["decode"] == "generate with a static cache"
    assert records["transformers static"]["attention"] == "transformers (sdpa)"
    assert records["transformers static"]["paired"]["decode_speed_up"] > 0
    assert all(f"| {label} " in done.stdout for label in records)
    assert kvbench("verify", str(tmp_path)).returncode == 0
    folder = save_local_model(tmp_path / "model")
    done = kvbench("run", "model=local", f"model.path={folder}", "method=transformers", f"results_dir={tmp_path}")
    assert done.returncode == 2 and "method=transformers: is timed, not scored" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("cache=paged", "method.cache=paged: must be one of dynamic, static"),
        ("attention=flash_attention_2", "method.attention=flash_attention_2: needs the package flash_attn"),
    ],
)
def test_what_generate_is_not_for_is_one_line(tmp_path, options, said):
    ask = ("run", "model=random", "runner=efficiency", "method=transformers", f"method.{options}")
    done = kvbench(*ask, f"results_dir={tmp_path}")
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_a_kernel_that_ignores_masks_is_refused_a_static_cache(monkeypatch):
    monkeypatch.setattr("kvbench.methods.policies.transformers_generate.find_spec", lambda name: object())
    with pytest.raises(InputError, match="free slots of a static cache"):
        named_method("transformers cache=static attention=flash_attention_2")
