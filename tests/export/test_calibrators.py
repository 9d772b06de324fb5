"""Where an activation's 8 bits end: by definition, by what is known of distributions, and by brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtx.export.calibrators import CALIBRATORS, LEVELS, PERCENTILE, Calibrator, Histogram, histogram, limit_of


def normal(count: int, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(size=count).astype(np.float32)


def limits(values: np.ndarray[tuple[int], np.dtype[np.float32]]) -> dict[Calibrator, float]:
    found = histogram(values, float(np.abs(values).max()))
    return {name: limit_of(name, found) for name in CALIBRATORS}


def test_magnitudes_are_counted_once() -> None:
    found = histogram(np.array([-4.0, 0.0, 0.001, 1.0, 4.0], dtype=np.float32), 4.0)
    assert found.counts.sum() == 5
    assert (found.counts[0], found.counts[-1]) == (2, 2)
    assert found.ends[-1] == 4.0


def test_a_normal_distribution() -> None:
    values = normal(1_000_000)
    found = limits(values)
    assert found["absmax"] == np.abs(values).max()
    # Of |x| 99.99 % are below 3.89.
    assert found["percentile"] == pytest.approx(3.89, abs=0.05)
    # The best clipping of a normal distribution to 255 steps lies about here (Banner et al. 2018, arXiv 1810.05723).
    assert 3.5 < found["mse"] < 4.3
    assert 2.5 < found["entropy"] < 4.9


def test_one_outlier_takes_no_steps_from_the_others() -> None:
    values = normal(200_000)
    values[7] = 500.0
    found = limits(values)
    assert found["absmax"] == 500.0
    assert found["percentile"] < 4.5
    assert found["entropy"] < 50


def test_of_two_values_none_is_clipped() -> None:
    """A value that a tenth of all have is no outlier, whatever lies between."""
    values = np.where(np.arange(10_000) % 10 == 0, 8.0, 0.5).astype(np.float32)
    found = limits(values)
    assert found["absmax"] == found["percentile"] == 8.0
    assert found["mse"] == pytest.approx(8.0, rel=0.02)


def test_the_error_is_the_least_of_all_limits() -> None:
    values = normal(4096) ** 3
    largest = float(np.abs(values).max())

    def error(limit: float) -> float:
        step = limit / LEVELS
        return float(np.square(np.clip(np.rint(values / step), -LEVELS, LEVELS) * step - values).mean())

    tried = [error(largest * part / 200) for part in range(1, 201)]
    # Bins stand for what is in them.
    assert error(limits(values)["mse"]) < 1.05 * min(tried)


def test_the_divergence_is_that_of_the_definition() -> None:
    counts = np.histogram(np.abs(normal(20_000) ** 3), bins=320, range=(0, 20))[0].astype(np.float64)

    def divergence(bins: int) -> float:
        p = [*counts[: bins - 1], counts[bins - 1 :].sum()]
        q = [0.0] * bins
        for step in range(LEVELS + 1):
            members = [at for at in range(bins) if at * (LEVELS + 1) // bins == step and counts[at]]
            for at in members:
                q[at] = sum(counts[member] for member in members) / len(members)
        return sum(a / sum(p) * math.log(a * sum(q) / sum(p) / (b or 1e-300)) for a, b in zip(p, q, strict=True) if a)

    best = min(range(LEVELS + 1, len(counts) + 1), key=divergence)
    found = Histogram(counts, 20.0)
    assert limit_of("entropy", found) == pytest.approx(found.ends[best - 1])
    assert LEVELS + 1 < best < len(counts)


@given(st.lists(st.integers(0, 1_000_000), min_size=256, max_size=256), st.floats(1e-20, 1e20))
def test_a_limit_is_one(counts: list[int], largest: float) -> None:
    found = Histogram(np.array(counts, dtype=np.float64), largest)
    for name in CALIBRATORS:
        assert 0 < limit_of(name, found) <= largest


def test_nothing_but_zeros() -> None:
    assert set(limits(np.zeros(5, dtype=np.float32)).values()) == {0.0}


def test_the_percentile_is_of_magnitudes() -> None:
    assert PERCENTILE == 0.9999
    values = np.linspace(-1, 1, 1_000_000, dtype=np.float32)
    assert limits(values)["percentile"] == pytest.approx(PERCENTILE, abs=1 / 2048)
