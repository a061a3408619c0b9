"""Published figures beside ours: every claim can be answered by a run of the campaign, and the arithmetic by hand."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import hydra
import pytest
from hydra.utils import instantiate
from local_model import kvbench
from records import efficiency, save

from kvbench.analysis.load import Run, load
from kvbench.analysis.papers.claims import answers, claims, number
from kvbench.analysis.published import published_table
from kvbench.analysis.tables import main
from kvbench.models.random import SHAPES
from kvbench.runners.config.loader import packaged_choices
from kvbench.runners.config.methods import methods_of

CAMPAIGN = ("experiment=gpu_campaign",)
POINTS = packaged_choices()["campaign"]
QUICK = "minicache-batch1"
"""The point that is rehearsed where the slow tests are not run."""


def composed(overrides, **options):
    with hydra.initialize_config_module("kvbench.conf", version_base="1.3"):
        return hydra.compose("config", overrides=list(overrides), **options)


def record(method, budget, claim, tpot_ms=10.0, **more):
    made = efficiency(method, budget, tpot_ms)
    made["model"], made["task"] = claim.model, claim.task
    made["identity"] = copy.deepcopy(made["identity"]) | {"batch_size": claim.batch_size}
    made["identity"]["runner"] = {"repeats": 5, "memory_limit_gib": claim.memory_limit_gib}
    made["identity"]["hardware"] = {"cpu": None, "gpu": "NVIDIA A100-SXM4-80GB", "torch_threads": 1}
    made["hash"] += f"{method}{budget}"
    return made | more


def repeated(value):
    return {"median": value, "min": value, "max": value, "repetitions": [value] * 5}


def claim_of(paper, words):
    (found,) = (c for c in claims() if c.paper == paper and words in c.claim)
    return found


def row_of(table, words):
    return [[cell.text for cell in row] for row in table.rows if words in row[1].text]


def test_claims_name_what_there_is():
    for claim in claims():
        assert claim.published > 0 and claim.source and claim.published_on
        assert claim.model.removeprefix("random-") in SHAPES
        assert claim.compare in ("method", "method / against", "against / method", "percent less")
        assert bool(claim.against) == (claim.compare != "method")
        assert claim.unit in ("x", "%", "tokens", "sequences")


def test_a_speed_up_is_the_full_cache_s_time_over_the_method_s(tmp_path):
    claim = claim_of("SnapKV", "speed-up")
    folder = save(tmp_path, record("full", None, claim, 40.0), record("snapkv", 2048, claim, 10.0))
    ((paper, _, published, _, ours, device, share, verdict),) = row_of(published_table(load(folder)[0]), "speed-up")
    assert (paper, published, ours, device) == ("SnapKV", "3.6 x", "4 x", "NVIDIA A100-SXM4-80GB")
    assert (share, verdict) == ("1.11", "not reproduced (above: look again)")  # 0.9 to 1.1 is reproduced


@pytest.mark.parametrize(
    ("speed_up", "verdict"),
    [
        (3.2, "not reproduced (below)"),
        (3.3, "reproduced"),
        (3.9, "reproduced"),
        (10, "not reproduced (above: look again)"),
    ],
)
def test_a_verdict_has_two_sides(tmp_path, speed_up, verdict):
    claim = claim_of("SnapKV", "speed-up")
    folder = save(tmp_path, record("full", None, claim, 10.0 * speed_up), record("snapkv", 2048, claim, 10.0))
    assert [row[-1] for row in row_of(published_table(load(folder)[0]), "speed-up")] == [verdict]


@pytest.mark.parametrize("hardware", [{"cpu": "a cpu", "gpu": None}, {"cpu": None, "gpu": "NVIDIA H100 PCIe"}])
def test_a_time_of_another_card_is_not_compared(tmp_path, hardware):
    """Bytes are compared on any device, what fits into a limit on any GPU."""
    speed, batch, size = (
        claim_of(*c) for c in (("KIVI", "residual 128"), ("KIVI", "largest batch (2 bits)"), ("MiniCache", "merging"))
    )
    made = record("full", None, speed)
    made["identity"]["hardware"] = {**hardware, "torch_threads": 1}
    assert [found.partition(":")[0] for found in speed.differences(made)] == ["hardware"]
    assert bool(batch.differences(made)) == (hardware["gpu"] is None)
    assert size.differences(made) == []


def test_figures_from_other_layers_are_told(tmp_path):
    """One method's run compressed all layers, another's half of them."""
    runs = []
    for paper, method, budget in (("SnapKV", "snapkv", 2048), ("H2O", "h2o", 0.2)):
        claim = next(c for c in claims() if c.paper == paper and c.against and c.method == f"{method} {budget}")
        runs += [record(name, share, claim, 40.0) for name, share in (("full", None), (method, budget))]
    for made, layers in zip(runs, (32, 32, 16, 16), strict=True):
        made["cache_layers"] = {"full_attention": layers}
    notes = " ".join(published_table(load(save(tmp_path, *runs))[0]).notes)
    assert "did not work on the same layers. 16 of 16 layers with attention: h2o 0.2; 32 of 32" in notes


def test_what_falls_short_is_said_so_and_what_was_not_run_too(tmp_path):
    claim = claim_of("SnapKV", "speed-up")
    folder = save(tmp_path, record("full", None, claim, 12.0), record("snapkv", 2048, claim, 10.0))
    table = published_table(load(folder)[0])
    assert [r[-1] for r in row_of(table, "speed-up")] == ["not reproduced (below)"]
    assert {r[-1] for r in row_of(table, "longest input")} == {"not run"}
    assert len(table.rows) == len(claims())


def test_another_machine_is_no_baseline(tmp_path):
    claim = claim_of("SnapKV", "speed-up")
    full = record("full", None, claim, 40.0)
    full["identity"]["hardware"] = {"cpu": None, "gpu": "another", "torch_threads": 1}
    folder = save(tmp_path, full, record("snapkv", 2048, claim, 10.0))
    assert [r[-1] for r in row_of(published_table(load(folder)[0]), "speed-up")] == ["not run"]


def test_settings_tell_runs_of_one_label_apart(tmp_path):
    """KIVI's two residual lengths: 128 at 2.35, 32 at 3.47."""
    first = claim_of("KIVI", "residual 128")
    made = [record("full", None, first)]
    for residual, speed in ((128, 200.0), (32, 300.0)):
        one = record("kivi2", None, first)
        storage = {"class": "Kivi", "residual": residual}
        one["identity"]["method"] = {"name": "kivi", "selection": {"class": "Selection"}, "storage": storage}
        one["metrics"]["output_tokens_per_s"] = repeated(speed)
        one["hash"] += str(residual)
        made.append(one)
    made[0]["metrics"]["output_tokens_per_s"] = repeated(100.0)
    table = published_table(load(save(tmp_path, *made))[0])
    assert [r[4] for r in row_of(table, "residual 128")] == ["2 x"]
    assert [r[4] for r in row_of(table, "residual 32")] == ["3 x"]


def test_saved_memory_is_in_percent(tmp_path):
    claim = claim_of("MiniCache", "memory saved")
    full, mini = record("full", None, claim), record("minicache_kivi4", None, claim)
    for made, bytes_ in ((full, 100), (mini, 60)):
        made["memory"]["peak_decode"]["allocated"] = bytes_ * 2**30
    table = published_table(load(save(tmp_path, full, mini))[0])
    assert [r[4] for r in row_of(table, "memory saved")][:1] == ["40 %"]


def test_numbers_are_found_by_their_path():
    made = {"a": {"b": 6}, "c": 3, "d": None}
    assert number(made, "a.b") == 6 and number(made, "a.b / c") == 2
    assert number(made, "a.x") is None and number(made, "d.x") is None


def test_the_command_prints_it_and_refuses_a_csv(tmp_path, capsys):
    claim = claim_of("SnapKV", "speed-up")
    folder = save(tmp_path, record("full", None, claim, 40.0), record("snapkv", 2048, claim, 10.0))
    assert main([str(folder), "--published"]) == 0
    assert "| SnapKV | " in capsys.readouterr().out.replace("SnapKV      ", "SnapKV")
    assert main([str(folder), "--published", "--format", "csv"]) == 2
    assert "--published=csv" in capsys.readouterr().err


@cache
def campaign(part: str) -> list[Run]:
    """What a part of the campaign would run, as records with nothing measured: a record a method of each point."""
    made = []
    for point in [point for point in POINTS if point.startswith(f"{part}-")]:
        config = composed([*CAMPAIGN, f"campaign={point}"])
        assert (config.device, config.dtype) == ("cuda", "bfloat16")
        task, model = (instantiate(config[part]) for part in ("workload", "model"))
        searched = config.workload._target_.endswith("MaxBatch")
        for one in methods_of(instantiate(config.runner), config.method):
            identity = {
                "method": one.identity(),
                "model": model.for_sharing(one.sharing, one.name).identity(),
                "batch_size": None if searched else config.batch_size,
                "runner": {"memory_limit_gib": config.runner.memory_limit_gib},
                "hardware": {"gpu": "a gpu", "cpu": None, "torch_threads": 1},
                "task": task.identity(),
            }
            head = {"status": "done", "kind": "efficiency", "model": model.name, "task": task.source().name}
            numbers = {
                "search": {"measured_at": 10, "limit_bytes": None},
                "batch_size": 4,
                "metrics": {
                    name: {"median": value}
                    for name, value in (("tpot_ms", 5.0), ("ttft_ms", 6.0), ("output_tokens_per_s", 7.0))
                },
                "bytes": {"kv_bytes_stored_end": 8.0},
                "memory": {"peak_decode": {"allocated": 9.0}},
            }
            made.append({**head, **numbers, "identity": identity, "method_label": one.label, "budget": None})
    return [Run(Path(), record, record["method_label"]) for record in made]


def test_the_part_of_the_campaign_that_a_claim_names_answers_it():
    """Its points, composed but not run: one run of the method and one to compare it with, for every claim."""
    for claim in claims():
        assert len(answers(claim, campaign(claim.part))) == 1, claim


def test_a_limit_that_the_claim_does_not_have_answers_nothing(tmp_path):
    claim = next(c for c in claims() if c.paper == "LCKV" and c.claim.startswith("largest batch"))
    assert claim.memory_limit_gib == 24
    made = [
        record(m, None, claim, search={"measured_at": n, "limit_bytes": None})
        for m, n in (("full", 1), ("lckv-w2", 20))
    ]
    for one in made:
        one["identity"]["runner"] = {"memory_limit_gib": 80}
    assert not [r for r in row_of(published_table(load(save(tmp_path, *made))[0]), claim.claim) if r[-1] != "not run"]


def test_two_runs_that_answer_alike_answer_nothing(tmp_path):
    claim = claim_of("SnapKV", "speed-up")
    full = [record("full", None, claim, t) for t in (40.0, 80.0)]
    full[1]["identity"]["method"]["note"] = "other"
    folder = save(tmp_path, *full, record("snapkv", 2048, claim, 10.0))
    assert [r[-1] for r in row_of(published_table(load(folder)[0]), "speed-up")] == ["not run"]


def rehearsal(point: str) -> list[str]:
    """Overrides that bring a point of the campaign to toy size on a CPU."""
    config = composed([*CAMPAIGN, f"campaign={point}"])
    sizes = {"prompt_tokens": 200, "new_tokens": 4, "limit": 1, "start": 2, "most": 3, "step": 1}
    overrides = [f"workload.{key}={size}" for key, size in sizes.items() if key in config.workload]
    overrides += ["device=cpu", "dtype=float32", "model.shape=tiny", "model.max_positions=4096", "batch_size=1"]
    overrides += ["runner.repeats=1", "runner.warmups=0", "runner.pair_with=[]"]
    return overrides + (["method.budget=40"] if config.method.budget is not None and point[0] in "sc" else [])


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("point", [pytest.param(p, marks=[] if p == QUICK else [pytest.mark.slow]) for p in POINTS])
def test_a_point_of_the_campaign_is_rehearsed_and_is_not_repeated(tmp_path, point):
    ask = ("run", *CAMPAIGN, f"campaign={point}", *rehearsal(point), f"results_dir={tmp_path}")
    done = kvbench(*ask)
    assert done.returncode == 0 and "1 of 1 jobs done" in done.stdout, done.stderr
    runs, problems = load(tmp_path)
    assert not problems and len(runs) == 1 and runs[0].done
    assert "already done" in kvbench(*ask).stdout


def test_the_points_of_the_campaign_are_the_jobs_of_its_experiment(tmp_path):
    """Hydra's pattern is all of them; a part of it is a part of them."""
    params = composed([CAMPAIGN[0]], return_hydra_config=True).hydra.sweeper.params
    assert params == {"campaign": "glob(*)"}
    done = kvbench("run", *CAMPAIGN, "campaign=glob([yoco-*,h2o-*])", "model.shape=none", f"results_dir={tmp_path}")
    assert done.returncode == 2 and done.stdout.startswith("sweep of 3 jobs")
