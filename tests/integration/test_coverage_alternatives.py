"""Other constructions than the one of ``analysis/intervals.py`` where its intervals hold the mean too seldom.

Each is computed for many samples at once. ``-m slow`` prints the table of docs/explanation/statistics.md and compares
it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.special import ndtr, ndtri, stdtrit
from test_coverage import PAGE, SIZES, Ends, covered, drawn, ours, populations, truth_of

SAMPLES = 4000
RESAMPLES = 1000
LOW = (
    ("LongBench, 16 sets: snapkv 1024 - full", 3),
    ("60 % zeros, 1 set", 5),
    ("60 % zeros, 1 set", 10),
)
"""Cells of the page in which our interval holds the mean in fewer than 93 of 100 samples."""
Bounds = tuple[float, float] | None


class Moments:
    """What the t construction needs of samples [count, set, n]; arrays are [count] or [count, set]."""

    def __init__(self, samples: np.ndarray) -> None:
        self.sets, self.n = samples.shape[1:]
        self.deviations = samples - samples.mean(axis=2, keepdims=True)
        self.equal = samples.min(axis=2) == samples.max(axis=2)
        self.mean = samples.mean(axis=(1, 2))
        self.variance = np.where(self.equal, 0.0, samples.var(axis=2, ddof=1))
        third = (self.deviations**3).sum(axis=2) * self.n / ((self.n - 1) * (self.n - 2))
        with np.errstate(divide="ignore", invalid="ignore"):
            self.degrees = self.degrees_of(np.full(self.equal.shape, self.n - 1.0))
            pooled = self.variance.sum(axis=1) / (~self.equal).sum(axis=1)
            total = self.variance.sum(axis=1) / self.n + pooled * self.equal.sum(axis=1) / self.n**2
            self.skewness = np.where(self.equal, 0.0, third).sum(axis=1) / self.n**2 / total**1.5
        self.error = np.sqrt(total) / self.sets
        medians = np.median(samples, axis=2, keepdims=True)
        self.unlike = (samples != medians).sum(axis=(1, 2))  # examples unlike the median of their set

    def degrees_of(self, of_sets: np.ndarray) -> np.ndarray:
        """Satterthwaite's degrees of freedom from those of each set."""
        squares = np.where(self.equal, 0.0, self.variance**2 / of_sets).sum(axis=1)
        return self.variance.sum(axis=1) ** 2 / squares


def t_with_skewness(m: Moments, factor: float | np.ndarray = 1.0, degrees: np.ndarray | None = None) -> Ends:
    """Our interval, with a factor for its term of the skewness, or other degrees of freedom."""
    q = stdtrit(m.degrees if degrees is None else degrees, 0.975)
    shift = factor * m.skewness * (2 * q * q + 1) / 6
    return m.mean - m.error * (q + np.maximum(-shift, 0)), m.mean + m.error * (q + np.maximum(shift, 0))


def with_hall(m: Moments) -> Ends:
    """P. Hall's cubic transformation (1992), and no narrower than t."""
    q, k = stdtrit(m.degrees, 0.975), m.skewness / 3
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = [m.mean - m.error * (np.cbrt(1 + 3 * k * (y - m.skewness / 6)) - 1) / k for y in (q, -q)]
    low, high = t_with_skewness(m, 0.0)
    return np.fmin(ends[0], low), np.fmax(ends[1], high)


def degrees_by_kurtosis(m: Moments) -> np.ndarray:
    """Degrees of freedom of each variance from the sample's kurtosis instead of n - 1, where that is fewer."""
    with np.errstate(divide="ignore", invalid="ignore"):
        kurtosis = (m.deviations**4).mean(axis=2) / (m.deviations**2).mean(axis=2) ** 2
    of_sets = 2 * m.n / (np.maximum(kurtosis, 1.0001) - (m.n - 3) / (m.n - 1))
    return np.maximum(m.degrees_of(np.clip(of_sets, 1, m.n - 1)), 1)


CONSTRUCTIONS: dict[str, Callable[[Moments], Ends]] = {
    "ours": t_with_skewness,
    "skewness term doubled": lambda m: t_with_skewness(m, 2.0),
    "skewness term x (1 + abs(skewness))": lambda m: t_with_skewness(m, 1 + np.abs(m.skewness)),
    "skewness term doubled where at most 3 examples are unlike": lambda m: t_with_skewness(
        m, np.where(m.unlike <= 3, 2.0, 1.0)
    ),
    "at most 2 degrees of freedom for each example that is unlike": lambda m: t_with_skewness(
        m, degrees=np.minimum(m.degrees, 2 * np.maximum(m.unlike, 0.5))
    ),
    "degrees of freedom x 0.8": lambda m: t_with_skewness(m, degrees=np.maximum(0.8 * m.degrees, 1)),
    "degrees of freedom by kurtosis": lambda m: t_with_skewness(m, degrees=degrees_by_kurtosis(m)),
    "Hall's transformation or t": with_hall,
}


def ends_of(construction: Callable[[Moments], Ends], samples: np.ndarray, m: Moments, bounds: Bounds) -> Ends:
    """Ends within the bounds; samples of which ``t`` cannot tell a variance or that are rates keep our interval."""
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = construction(m)
    other = m.equal.all(axis=1)
    if bounds is not None:
        low, high = np.maximum(low, bounds[0]), np.minimum(high, bounds[1])
        other |= np.isin(samples, bounds).all(axis=(1, 2))
    for i in np.flatnonzero(other):  # one by one: where there is no interval, `ours` puts it last
        low[i], high[i] = (end[0] for end in ours(samples[i : i + 1], bounds))
    return low, high


def bca(samples: np.ndarray) -> Ends:
    """Bias-corrected and accelerated bootstrap (B. Efron 1987), stratified by set."""
    rng = np.random.default_rng(0)
    count, sets, n = samples.shape
    ends = np.empty((2, count))
    for i, sample in enumerate(samples):
        drawn_places = rng.integers(0, n, (RESAMPLES, sets, n))
        means = sample[np.arange(sets)[None, :, None], drawn_places].mean(axis=(1, 2))
        below = (means < sample.mean()).mean() + (means == sample.mean()).mean() / 2
        bias = ndtri(np.clip(below, 1 / RESAMPLES, 1 - 1 / RESAMPLES))
        influence = sample - sample.mean(axis=1, keepdims=True)
        squares = (influence**2).sum()
        acceleration = (influence**3).sum() / (6 * squares**1.5) if squares > 0 else 0.0
        levels = [ndtr(bias + (bias + z) / (1 - acceleration * (bias + z))) for z in (ndtri(0.025), ndtri(0.975))]
        ends[:, i] = np.quantile(means, levels)
    return ends[0], ends[1]


@pytest.mark.parametrize(("name", "n"), LOW)
def test_the_construction_for_many_samples_is_ours(name: str, n: int) -> None:
    population, bounds = populations()[name]
    samples = drawn(population, n, 300)
    low, high = ends_of(t_with_skewness, samples, Moments(samples), bounds)
    expected = ours(samples, bounds)
    np.testing.assert_allclose(low, expected[0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(high, expected[1], rtol=1e-9, atol=1e-9)


def table() -> list[str]:
    """Coverage in the low cells, number of the 72 cells below 93 and above 97, and mean width against ours."""
    found: dict[str, list[tuple[str, int, float, float]]] = {label: [] for label in CONSTRUCTIONS}
    for name, (population, bounds) in populations().items():
        for n in SIZES:
            samples, truth = drawn(population, n, SAMPLES), truth_of(population)
            m = Moments(samples)
            for label, construction in CONSTRUCTIONS.items():
                ends = ends_of(construction, samples, m, bounds)
                found[label].append((name, n, covered(ends, truth), float(np.nanmean(ends[1] - ends[0]))))
    cells = {(name, n): populations()[name][0] for name, n in LOW}
    lines = [
        "| construction | snapkv 1024 - full, 3 a set | 60 % zeros, 5 | 60 % zeros, 10 | below 93 | above 97 | width |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for label, rows in found.items():
        coverage = {(name, n): value for name, n, value, _ in rows}
        widths = [width / own[3] for (*_, width), own in zip(rows, found["ours"], strict=True)]
        low, high = (sum(test(c) for c in coverage.values()) for test in (lambda c: c < 93, lambda c: c > 97))
        in_cells = " | ".join(f"{coverage[cell]:.1f}" for cell in LOW)
        lines.append(f"| {label} | {in_cells} | {low} | {high} | {np.mean(widths):.2f} |")
    of_bca = [covered(bca(drawn(p, n, SAMPLES)[:1000]), truth_of(p)) for (_, n), p in cells.items()]
    return [*lines, f"| BCa bootstrap | {' | '.join(f'{c:.1f}' for c in of_bca)} | | | |"]


@pytest.mark.slow
def test_the_page_has_what_other_constructions_give() -> None:
    made = "\n".join(table())
    print(made)
    assert made in PAGE.read_text(encoding="utf-8")
