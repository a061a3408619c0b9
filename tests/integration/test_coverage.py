"""Coverage of the 95 % intervals by simulation: how often an interval holds the mean of what it was drawn from.

Populations are the recorded scores and paired differences of ``results/reference``, scores with many zeros, and rates.
The fast test draws from some of them; ``-m slow`` draws all and compares the tables of docs/explanation/statistics.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy.special import stdtrit
from scipy.stats import binomtest

from kvbench.analysis.stats import PERCENT_BOUNDS, macro_mean

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/explanation/statistics.md"
SIZES = (3, 5, 10, 30)
DIFFERENCE = (-100.0, 100.0)

Population = list[np.ndarray]
"""Values of each data set."""
Ends = tuple[np.ndarray, np.ndarray]
"""Lower and upper ends of many intervals."""


# populations ----------------------------------------------------------------------------------------------------------


@cache
def scores(folder: str, label: str) -> dict[str, dict[str, float]]:
    for path in (ROOT / "results/reference" / folder).rglob("record.json"):
        record = json.loads(path.read_text())
        if record["method_label"] == label:
            found: dict[str, dict[str, float]] = {}
            for line in (path.parent / "samples.jsonl").read_text().split("\n")[:-1]:
                row = json.loads(line)
                found.setdefault(row["dataset"], {})[row["id"]] = row["score"] * (1 if "unit" in record else 100)
            return found
    raise LookupError(label)


def recorded(folder: str, label: str, difference: bool) -> Population:
    own, full = scores(folder, label), scores(folder, "full")
    return [
        np.array([value - difference * full[name][key] for key, value in sorted(rows.items())])
        for name, rows in sorted(own.items())
    ]


def with_zeros(sets: int) -> Population:
    """F1-like scores: a share of zeros, the others from a beta distribution."""
    rng = np.random.default_rng(1)
    shares = np.linspace(0.3, 0.9, sets) if sets > 1 else [0.6]
    return [np.where(rng.random(2000) < share, 0.0, 100 * rng.beta(0.8, 1.5, 2000)) for share in shares]


def populations() -> dict[str, tuple[Population, tuple[float, float] | None]]:
    """Name -> (values, bounds)."""
    found: dict[str, tuple[Population, tuple[float, float] | None]] = {}
    for label in ("full", "snapkv 256", "streaming_llm 64"):
        found[f"LongBench, 16 sets: {label}"] = recorded("methods_longbench", label, False), PERCENT_BOUNDS
    for label in ("snapkv 256", "snapkv 1024", "h2o 64", "random 1024", "kivi4", "kivi2"):
        found[f"LongBench, 16 sets: {label} - full"] = recorded("methods_longbench", label, True), DIFFERENCE
    found["bundled, 8 sets: full"] = recorded("longbench-mini", "full", False), PERCENT_BOUNDS
    for label in ("snapkv 128", "snapkv 1024"):
        found[f"bundled, 8 sets: {label} - full"] = recorded("longbench-mini", label, True), DIFFERENCE
    for label in ("tova 1024", "snapkv 256"):
        found[f"needles, 3 sets: {label} - full"] = recorded("methods_needle", label, True), DIFFERENCE
    found["60 % zeros, 8 sets"] = with_zeros(8), PERCENT_BOUNDS
    found["60 % zeros, 1 set"] = with_zeros(1), PERCENT_BOUNDS
    found["nats, 1 set: full"] = recorded("perplexity", "full", False), None
    found["nats, 1 set: h2o 256 - full"] = recorded("perplexity", "h2o 256", True), None
    return found


def drawn(population: Population, n: int, count: int) -> np.ndarray:
    """``count`` samples of ``n`` examples of each set: [count, set, n]."""
    rng = np.random.default_rng(n)
    return np.stack([values[rng.integers(0, len(values), (count, n))] for values in population], axis=1)


# constructions: samples [count, set, n] -> ends -----------------------------------------------------------------------


def ours(samples: np.ndarray, bounds: tuple[float, float] | None) -> Ends:
    found = [macro_mean({str(i): row for i, row in enumerate(sample)}, bounds) for sample in samples.tolist()]
    ends = [(e.low, e.high) for e in found if e.low is not None and e.high is not None]
    none = [(np.nan, np.nan)] * (len(found) - len(ends))  # no interval: counted as a miss
    low, high = np.array(ends + none).T
    return low, high


def plain_t(samples: np.ndarray, pooled_degrees: float = 0.0) -> Ends:
    """t interval with Satterthwaite's degrees of freedom; variances drawn to their mean by ``pooled_degrees``."""
    n = samples.shape[2]
    variance = samples.var(axis=2, ddof=1)
    shared = variance.mean(axis=1, keepdims=True)
    of_means = (pooled_degrees * shared + (n - 1) * variance) / (pooled_degrees + n - 1) / n
    total = of_means.sum(axis=1)
    squares = np.maximum((of_means**2).sum(axis=1), 1e-300) / (n - 1 + pooled_degrees)
    half = stdtrit(np.maximum(total**2 / squares, 1.0), 0.975) * np.sqrt(total) / samples.shape[1]
    mean = samples.mean(axis=(1, 2))
    return mean - half, mean + half


def bootstraps(samples: np.ndarray, resamples: int = 500) -> tuple[Ends, Ends]:
    """Percentile and studentized bootstrap, stratified by set."""
    rng = np.random.default_rng(0)
    count, sets, n = samples.shape
    percentile, studentized = np.empty((2, count)), np.empty((2, count))
    for i, sample in enumerate(samples):
        values = sample[np.arange(sets)[None, :, None], rng.integers(0, n, (resamples, sets, n))]
        means, center = values.mean(axis=(1, 2)), sample.mean()
        percentile[:, i] = np.quantile(means, (0.025, 0.975))
        errors = np.sqrt((values.var(axis=2, ddof=1) / n).sum(axis=1)) / sets
        own = np.sqrt((sample.var(axis=1, ddof=1) / n).sum()) / sets
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.nan_to_num((means - center) / errors, nan=0.0, posinf=1e9, neginf=-1e9)
        high, low = np.quantile(t, (0.025, 0.975))
        studentized[:, i] = center - low * own, center - high * own
    return (percentile[0], percentile[1]), (studentized[0], studentized[1])


def covered(ends: Ends, truth: float) -> float:
    low, high = ends
    return 100 * float(np.mean((low <= truth + 1e-9) & (truth <= high + 1e-9)))


def truth_of(population: Population) -> float:
    return float(np.mean([values.mean() for values in population]))


# rates ----------------------------------------------------------------------------------------------------------------

RATES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 0.95, 0.99)
SHAPES = ((1, 3), (1, 10), (1, 30), (3, 8), (8, 3), (16, 10))
"""Numbers of data sets and of examples of each."""
UNEQUAL = {
    "3 x 8, rates 1, 0.5, 0": (8, (1.0, 0.5, 0.0)),
    "3 x 8, rates 0.99, 0.9, 0.8": (8, (0.99, 0.9, 0.8)),
    "3 x 8, rates 0.3, 0.15, 0.05": (8, (0.3, 0.15, 0.05)),
    "16 x 10, rates 0 to 1": (10, tuple(np.linspace(0, 1, 16))),
    "13 x 10, eight of rate 1": (10, (*[1.0] * 8, 0.9, 0.8, 0.5, 0.2, 0.0)),
}


def rate_coverage(
    rates: Sequence[float], n: int, count: int, ends: Callable[[np.ndarray], Ends] | None = None
) -> float:
    samples = 100.0 * (np.random.default_rng(3).random((count, len(rates), n)) < np.array(rates)[None, :, None])
    # The interval depends on the counts alone, so each combination is worked out once.
    counts, place = np.unique(np.sort(samples.mean(axis=2), axis=1), axis=0, return_inverse=True)
    first = np.array([np.flatnonzero(place.ravel() == i)[0] for i in range(len(counts))])
    low, high = (ends or (lambda x: ours(x, PERCENT_BOUNDS)))(samples[first])
    return covered((low[place.ravel()], high[place.ravel()]), 100 * float(np.mean(rates)))


def pooled(method: str) -> Callable[[np.ndarray], Ends]:
    """Interval of scipy for one binomial count of all examples."""

    def ends(samples: np.ndarray) -> Ends:
        found = []
        for sample in samples:
            interval = binomtest(round(sample.sum() / 100), sample.size).proportion_ci(0.95, method=method)
            found.append((100 * interval.low, 100 * interval.high))
        low, high = np.array(found).T
        return low, high

    return ends


# tests ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(
    "name",
    [
        "LongBench, 16 sets: full",
        "LongBench, 16 sets: h2o 64 - full",
        "bundled, 8 sets: snapkv 128 - full",
        "60 % zeros, 8 sets",
        "nats, 1 set: h2o 256 - full",
    ],
)
def test_intervals_hold_the_mean_in_93_to_97_of_100_samples(name: str, n: int) -> None:
    """Within what 1,000 samples leave open (a standard error of 0.7)."""
    population, bounds = populations()[name]
    assert 93 - 0.7 <= covered(ours(drawn(population, n, 1000), bounds), truth_of(population)) <= 97 + 1.4


@pytest.mark.parametrize(("sets", "n"), SHAPES)
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.99])
def test_intervals_of_rates_hold_near_0_and_1(sets: int, n: int, rate: float) -> None:
    assert rate_coverage([rate] * sets, n, 2000 if sets < 16 else 600) >= 92


@pytest.mark.parametrize("name", UNEQUAL)
def test_intervals_of_unequal_rates_hold(name: str) -> None:
    n, rates = UNEQUAL[name]
    assert rate_coverage(rates, n, 600) >= 94


def test_the_percentile_bootstrap_would_fail() -> None:
    """The simulation can tell: the intervals of older records are too narrow at three examples a set."""
    population, _ = populations()["bundled, 8 sets: snapkv 128 - full"]
    percentile, _ = bootstraps(drawn(population, 3, 300))
    assert covered(percentile, truth_of(population)) < 88


def means_table() -> list[str]:
    lines = [
        "| values | n a set | percentile | studentized | t | t, pooled | ours |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, (population, bounds) in populations().items():
        truth = truth_of(population)
        for n in SIZES:
            samples = drawn(population, n, 4000)
            ends = [*bootstraps(samples[:1000]), plain_t(samples), plain_t(samples, 1.0), ours(samples, bounds)]
            lines.append(f"| {name} | {n} | " + " | ".join(f"{covered(e, truth):.1f}" for e in ends) + " |")
    return lines


def rates_table() -> list[str]:
    lines = ["| sets x examples | interval | " + " | ".join(map(str, RATES)) + " |", "|---|---|" + "---:|" * len(RATES)]
    for sets, n in SHAPES:
        rows = {
            "percentile": lambda x: bootstraps(x)[0],
            "Wilson": pooled("wilson"),
            "exact": pooled("exact"),
            "ours": None,
        }
        for label, ends in rows.items():
            found = [rate_coverage([rate] * sets, n, 4000, ends) for rate in RATES]
            lines.append(f"| {sets} x {n} | {label} | " + " | ".join(f"{c:.1f}" for c in found) + " |")
    lines += ["", "| sets x examples | Wilson | exact | ours |", "|---|---:|---:|---:|"]
    for name, (n, rates) in UNEQUAL.items():
        found = [rate_coverage(rates, n, 4000, ends) for ends in (pooled("wilson"), pooled("exact"), None)]
        lines.append(f"| {name} | " + " | ".join(f"{c:.1f}" for c in found) + " |")
    return lines


@pytest.mark.slow
def test_the_page_has_the_coverage_of_every_construction() -> None:
    made = "\n".join(means_table()), "\n".join(rates_table())
    print("\n\n".join(made))
    page = PAGE.read_text(encoding="utf-8")
    assert all(table in page for table in made)
