"""The clock and the memory meter, against things whose time and size are known."""

from __future__ import annotations

import atexit
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvbench.conf.errors import InputError
from kvbench.models import pretrained
from kvbench.runners.config.settings import Settings
from kvbench.runners.measure import bandwidth, energy, memory
from kvbench.runners.measure.bandwidth import copy_bandwidth, read_bandwidth
from kvbench.runners.measure.clock import Stopwatch, now
from kvbench.runners.measure.energy import EnergyMeter
from kvbench.runners.measure.fresh import Killed, MeasuringProcess, in_forked_process, in_fresh_process
from kvbench.runners.measure.memory import MemoryMeter, is_out_of_memory, malloc_trim_env
from kvbench.runners.records import provenance

MIB = 2**20
pytestmark = pytest.mark.usefixtures("fork_server")

PHASES = """
import json, torch
from kvbench.runners.measure.memory import MemoryMeter

meter = MemoryMeter("cpu")
meter.reset()
at_rest = meter.peak().allocated
first = [torch.ones(5, 2**20) for _ in range(10)]     # 200 MiB, in blocks that glibc likes to keep
peak_first = meter.peak().allocated
del first
meter.reset()
second = torch.ones(15, 2**20)                        # 60 MiB
peak_second = meter.peak().allocated
print(json.dumps([at_rest, peak_first, peak_second]))
"""


def test_the_clock_sees_a_sleep():
    """Against the sleep's own promise (never shorter) and another clock around it (never longer)."""
    outer = time.monotonic()
    start = now("cpu")
    time.sleep(0.2)
    measured = now("cpu") - start
    assert 0.2 <= measured <= time.monotonic() - outer + 1e-3


def test_the_stopwatch_sees_each_sleep():
    watch = Stopwatch("cpu")
    watch.mark()
    for seconds in (0.2, 0.05):
        time.sleep(seconds)
        watch.mark()
    first, second = watch.seconds()
    assert first >= 0.2 and 0.05 <= second < first


def rapl(folder: Path, package: int, joules: float, wraps_at: float = 200.0) -> None:
    """A processor package's counter as the kernel shows it, in microjoules."""
    path = folder / f"intel-rapl:{package}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    (path / "max_energy_range_uj").write_text(f"{int(wraps_at * 1e6)}\n")


def test_energy_is_what_the_counters_of_all_packages_gained(tmp_path, monkeypatch):
    """Two packages: one gains 5 J, the other one starts again at 200 J and gains 3. Subdomains do not count twice."""
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    rapl(tmp_path, 0, 100.0)
    rapl(tmp_path, 1, 199.0)
    (tmp_path / "intel-rapl:0:0").mkdir()

    def work() -> None:
        rapl(tmp_path, 0, 105.0)
        rapl(tmp_path, 1, 2.0)
        time.sleep(0.1)

    meter = EnergyMeter("cpu")
    used = meter.over(work)
    assert meter.problem is None
    assert used.joules == pytest.approx(5 + 3)
    assert used.seconds >= 0.1


def test_a_machine_without_a_counter_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    assert "no energy counter can be read (there is no" in EnergyMeter("cpu").problem


def test_a_device_is_asked_through_its_driver(monkeypatch):
    """NVML by a stand-in: the device is found by its identity, whatever number it is visible under; millijoules."""
    asked, counter = [], iter((7_000, 8_000, 20_500))
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "handle",
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counter),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    meter = EnergyMeter("cuda:1")
    assert meter.over(lambda: None).joules == pytest.approx(12.5)
    assert set(asked) == {"GPU-1234"}


def test_the_meter_sees_an_allocation_and_that_it_was_freed():
    """The second phase's peak must not hide under the first one's: the fault that makes all methods look alike."""
    done = subprocess.run(
        [sys.executable, "-c", PHASES], env=os.environ | malloc_trim_env(), capture_output=True, text=True, check=True
    )
    at_rest, first, second = (int(x) for x in done.stdout.strip("[] \n").split(","))
    assert first - at_rest == pytest.approx(200 * MIB, rel=0.05)
    assert second - at_rest == pytest.approx(60 * MIB, rel=0.05)


def test_memory_is_measured_under_glibc_s_allocator(monkeypatch):
    """Another one would keep what is freed; what else is preloaded stays. A record names all of it, without paths."""
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2 /opt/trace.so:/opt/libtcmalloc_minimal.so.4")
    assert malloc_trim_env()["LD_PRELOAD"] == "/opt/trace.so"
    named = provenance.collect("cpu")["hardware"]["preloaded"]
    assert named == ["libjemalloc.so.2", "trace.so", "libtcmalloc_minimal.so.4"]
    monkeypatch.delenv("LD_PRELOAD")
    assert malloc_trim_env()["LD_PRELOAD"] == ""
    assert provenance.collect("cpu")["hardware"]["preloaded"] == []


def test_a_machine_without_a_resettable_peak_is_said_so(monkeypatch):
    def refuse() -> None:
        raise PermissionError("clear_refs")

    monkeypatch.setattr(memory, "_reset_resident_peak", refuse)
    meter = MemoryMeter("cpu")
    meter.reset()
    assert meter.peak() is None
    assert "clear_refs" in meter.problem


class ClockOfOurOwn:
    """10 ms from each mark to the next, but 50 ms to the first one of them."""

    def __init__(self, device: str):
        self.marks = 0

    def mark(self) -> None:
        self.marks += 1

    def seconds(self) -> list[float]:
        assert self.marks == 4
        return [0.05, 0.01, 0.01]


def test_bandwidth_is_what_a_copy_moves(monkeypatch):
    """A copy that takes 10 ms on a clock of our own: 2 x size / 10 ms."""
    monkeypatch.setattr(bandwidth, "Stopwatch", ClockOfOurOwn)
    assert copy_bandwidth("cpu", size=1000, copies=3) == pytest.approx(2 * 1000 / 0.01)


def test_read_bandwidth_counts_what_is_read_once(monkeypatch):
    monkeypatch.setattr(bandwidth, "Stopwatch", ClockOfOurOwn)
    assert read_bandwidth("cpu", size=4 << 20, repeats=3) == pytest.approx((4 << 20) / 0.01)


@pytest.mark.parametrize("slower", ["sum", "mv"])
def test_read_bandwidth_is_that_of_the_faster_way(monkeypatch, slower):
    """Two clocks are made, one for each way, in the order in which the ways are gone."""
    order = iter(("sum", "mv"))

    class Clock(ClockOfOurOwn):
        def seconds(self):
            return [0.04] if next(order) == slower else [0.02]

    monkeypatch.setattr(bandwidth, "Stopwatch", Clock)
    assert read_bandwidth("cpu", size=4 << 20, repeats=1) == pytest.approx((4 << 20) / 0.02)


@pytest.mark.gpu
def test_the_clocks_wait_for_what_is_queued_on_the_device():
    """The device spins for so many cycles, then for twice as many: by events as by the host's clock that waits."""
    cycles = 200_000_000  # a tenth of a second or so
    torch.cuda._sleep(1000)
    by_host = []
    for factor in (1, 2):
        start = now("cuda")
        torch.cuda._sleep(factor * cycles)
        queued = time.perf_counter() - start
        by_host.append(now("cuda") - start)
        assert queued < by_host[-1] / 4  # what a clock says that does not wait
    watch = Stopwatch("cuda")
    watch.mark()
    for factor in (1, 2):
        torch.cuda._sleep(factor * cycles)
        watch.mark()
    by_events = watch.seconds()
    assert by_host[1] / by_host[0] == pytest.approx(2, rel=0.1)
    assert by_events == pytest.approx(by_host, rel=0.1)


@pytest.mark.gpu
def test_the_meter_sees_what_the_device_s_allocator_gave():
    meter = MemoryMeter("cuda")
    meter.reset()
    at_rest = meter.peak().allocated
    first = torch.ones(50, MIB, device="cuda")  # 200 MiB
    peak_first = meter.peak()
    del first
    meter.reset()
    second = torch.ones(15, MIB, device="cuda")  # 60 MiB
    peak_second = meter.peak()
    assert second.numel() and peak_first.allocated - at_rest == 200 * MIB
    assert peak_second.allocated - at_rest == 60 * MIB
    assert peak_first.reserved >= peak_first.allocated and peak_second.reserved < peak_first.reserved


@pytest.mark.gpu
@pytest.mark.parametrize(("measured", "moved"), [(copy_bandwidth, 2), (read_bandwidth, 1)])
def test_the_device_s_bandwidth_is_that_of_a_copy_timed_by_hand(measured, moved):
    """Many copies (or products) at a time by the host's clock; reading is compared with a sum, which reads as much."""
    size = 1 << 30
    source = torch.ones(size // 4, device="cuda")
    target = torch.empty_like(source)
    work = (lambda: target.copy_(source)) if moved == 2 else (lambda: source.sum())
    work()
    start = now("cuda")
    for _ in range(20):
        work()
    by_hand = 20 * moved * size / (now("cuda") - start)
    assert measured("cuda", size) == pytest.approx(by_hand, rel=0.25)


def test_no_room_to_measure_bandwidth_is_no_crash(monkeypatch):
    def full(*args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(bandwidth.torch, "empty", full)
    assert copy_bandwidth("cpu") is None
    monkeypatch.setattr(bandwidth.torch, "ones", full)
    assert read_bandwidth("cpu") is None


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_a_fresh_process_is_another_one_with_its_own_environment():
    assert in_fresh_process(os.getenv, "KVBENCH_TEST", {"KVBENCH_TEST": "here"}) == "here"
    assert os.getenv("KVBENCH_TEST") is None


def leave_traces(name: str) -> tuple[int, bool, int, bool, float]:
    """Change what a later measurement could see; return what this process saw before: its id, state and memory."""
    seen = os.getpid(), name in os.environ, torch.get_num_threads(), torch.cuda.is_initialized(), float(torch.rand(1))
    os.environ[name] = "1"
    torch.set_num_threads(7)
    torch.manual_seed(5)
    return seen


SLOW = """
import os, time
from pathlib import Path

def write_pid_and_sleep(path):
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)
"""


def imported_of(modules: set[str]) -> set[str]:
    return modules & sys.modules.keys()


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_forked_process_does_not_affect_the_next(monkeypatch):
    """Each starts from the same state, with this process's environment of the moment."""
    first, second = (in_forked_process(leave_traces, "KVBENCH_TRACE") for _ in range(2))
    assert first[0] != second[0] != os.getpid()
    assert first[1:] == second[1:] and not first[1] and not first[3]
    monkeypatch.setenv("KVBENCH_TRACE", "1")
    assert in_forked_process(leave_traces, "KVBENCH_TRACE")[1]


def test_a_process_keeps_what_a_call_leaves_for_the_next_one(monkeypatch):
    with MeasuringProcess() as process:
        assert not process.has_answered
        first, second = (process.call(leave_traces, "KVBENCH_TRACE") for _ in range(2))
        assert process.has_answered and first[0] == second[0] and second[1]
        with pytest.raises(FileNotFoundError):
            process.call(os.stat, "no-such-file")
        process.close()
        assert process.call(leave_traces, "KVBENCH_TRACE")[0] != first[0]


def exit_functions(_: object) -> int:
    return atexit._ncallbacks()


def test_a_process_runs_its_own_exit_functions_and_none_of_the_server_s():
    """A model that is spread over devices leaves a folder, which is deleted when its process ends."""
    assert in_forked_process(exit_functions, None) == 0
    pytest.importorskip("accelerate")
    folder = Path(in_forked_process(pretrained._placement, {"": "cpu"})["offload_folder"])
    assert folder.name.startswith("kvbench-offload-") and not folder.exists()


def test_a_forked_process_has_imported_the_measuring_code():
    modules = {"torch", "kvbench.runners.measure.time_pass", "transformers.models.llama.modeling_llama"}
    assert in_forked_process(imported_of, modules) == modules


def test_a_forked_process_ends_with_its_caller(tmp_path):
    """A job that Slurm ends must not leave a measurement on the device."""
    started = tmp_path / "started"
    (tmp_path / "slow.py").write_text(SLOW)
    text = "import slow; from kvbench.runners.measure import fresh; fresh.PRELOADED = ()"
    text += f"; fresh.in_forked_process(slow.write_pid_and_sleep, {str(started)!r})"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    caller = subprocess.Popen([sys.executable, "-c", text], env=os.environ | {"PYTHONPATH": path})
    wait_until(lambda: started.exists() and started.read_text())
    caller.kill()
    caller.wait()
    wait_until(lambda: not Path("/proc", started.read_text()).exists())


@pytest.mark.parametrize("call", [in_fresh_process, in_forked_process])
def test_an_error_in_a_measuring_process_comes_back_as_it_was(call):
    with pytest.raises(FileNotFoundError, match="no-such-file"):
        call(os.stat, "no-such-file")
    with pytest.raises(InputError, match=r"device=cuda:99: .*CUDA devices are visible"):
        call(functools.partial(Settings, 0, 1), "cuda:99")  # the error of a key, with key and value


@pytest.mark.parametrize("call", [in_fresh_process, in_forked_process])
def test_a_killed_process_is_told_from_a_broken_one(call):
    with pytest.raises(Killed):
        call(signal.raise_signal, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="status -15"):
        call(signal.raise_signal, signal.SIGTERM)
