"""The scale of an activation: what it rounds to, what is tried, and what is chosen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rtx.export.calibrators import CALIBRATORS, LEVELS
from rtx.export.scales import STRENGTHS, CalibrationOptions, Scale, Seen, choose_scale, quantize_columns
from rtx.runtime.errors import UsageError

BEST = CalibrationOptions()


def seen(rows: NDArray[np.float32]) -> Seen:
    return Seen(np.abs(rows).max(axis=0), rows)


def data(rows: int, channels: int, out: int, *, outlier: float = 1.0) -> tuple[Seen, NDArray[np.float32]]:
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, channels)).astype(np.float32)
    x[:, 3] *= outlier
    return seen(x), random.normal(size=(channels, out)).astype(np.float32)


def error(scale: Scale, rows: NDArray[np.float32], weight: NDArray[np.float32]) -> float:
    """By the formulas of the module, in float64."""
    migrated = np.ones(rows.shape[1]) if scale.migrated is None else scale.migrated.astype(np.float64)
    values, steps = quantize_columns((weight / migrated[:, np.newaxis]).astype(np.float32))
    x = np.clip(np.rint(rows * migrated / scale.step), -LEVELS, LEVELS) * scale.step
    exact = rows.astype(np.float64) @ weight
    off = np.linalg.norm(x @ (values * steps.astype(np.float64)) - exact, axis=1) / np.linalg.norm(exact, axis=1)
    return float(np.quantile(off, 0.99))


def test_the_error_is_that_of_the_layers() -> None:
    found, weight = data(300, 48, 40)
    for calibrator in CALIBRATORS:
        for strength in (0.0, 0.8):
            scale = choose_scale(found, weight, CalibrationOptions(calibrator=calibrator, migration=strength))
            assert (scale.calibrator, scale.migration) == (calibrator, strength)
            assert (scale.migrated is None) == (strength == 0)
            assert scale.error == pytest.approx(error(scale, found.rows, weight), rel=1e-3)


def test_the_best_of_all_is_chosen() -> None:
    found, weight = data(300, 48, 40, outlier=30.0)
    every = [
        choose_scale(found, weight, CalibrationOptions(calibrator=calibrator, migration=strength))
        for calibrator in CALIBRATORS
        for strength in STRENGTHS
    ]
    best = choose_scale(found, weight, BEST)
    assert best.error == min(scale.error for scale in every)


def test_migration_takes_an_outlier_out_of_the_step() -> None:
    found, weight = data(300, 48, 40, outlier=100.0)
    weight[3] *= 0.01  # its results are as large as those of others
    left = choose_scale(found, weight, CalibrationOptions(migration=0.0))
    moved = choose_scale(found, weight, BEST)
    assert moved.migration >= 0.5
    assert moved.error < left.error / 4
    assert moved.migrated is not None
    others = np.delete(moved.migrated, 3)
    assert moved.migrated[3] < others.min() / 5


def test_absmax_clips_nothing_and_a_percentile_does() -> None:
    found, weight = data(4000, 16, 8)
    whole, most = (
        choose_scale(found, weight, CalibrationOptions(calibrator=name, migration=0.0))
        for name in ("absmax", "percentile")
    )
    assert whole.clipped == 0
    assert 0 < most.clipped < 2e-4
    assert most.step < whole.step


def test_rows_from_first_to_last_are_tried() -> None:
    """Items come in their order, queries first: what is only in the last ones must count."""
    found, weight = data(906, 16, 8)
    found.rows[800:, 5] *= 200.0
    late = Seen(np.abs(found.rows).max(axis=0), found.rows)
    scale = choose_scale(late, weight, BEST)
    early = choose_scale(late._replace(rows=found.rows[:800]), weight, BEST)
    assert error(scale, found.rows[800:], weight) < 0.5 * error(early, found.rows[800:], weight) + 1e-3
    assert scale.error == pytest.approx(error(scale, found.rows, weight), rel=0.2)


def test_a_channel_that_was_silent_may_speak() -> None:
    found, weight = data(300, 48, 40)
    found.rows[:, 7] = 0.0
    silent = Seen(np.abs(found.rows).max(axis=0), found.rows)
    scale = choose_scale(silent, weight, CalibrationOptions(migration=1.0))
    assert scale.migrated is not None
    assert scale.migrated.max() < 1000 * np.median(scale.migrated)
    spoken = found.rows.copy()
    spoken[:, 7] = 0.01
    assert error(scale, spoken, weight) < 2 * error(scale, found.rows, weight)


def test_what_was_seen_of_all_rows_counts() -> None:
    """The rows that are kept are some of them: the largest may be in none."""
    found, weight = data(100, 16, 8)
    wider = Seen(found.largest * 3, found.rows)
    fixed = CalibrationOptions(calibrator="absmax", migration=0.0)
    ratio = choose_scale(wider, weight, fixed).step / choose_scale(found, weight, fixed).step
    assert ratio == pytest.approx(3, rel=2e-3)


@given(st.floats(1e-9, 1e6), st.integers(0, 3))
def test_steps_are_numbers_of_half_precision(size: float, seed: int) -> None:
    weight = (np.random.default_rng(seed).normal(size=(9, 5)) * size).astype(np.float32)
    values, steps = quantize_columns(weight)
    assert values.dtype == np.int8
    assert np.abs(values.astype(int)).max() <= LEVELS
    assert (steps.astype(np.float16).astype(np.float32) == steps).all()
    assert (steps > 0).all()
    if size < 1e5:  # what fits into half precision at all
        # To the nearest step, and nothing clipped.
        assert (np.abs(values * steps - weight) <= steps * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e30])
def test_activations_of_any_size(magnitude: float) -> None:
    found, weight = data(50, 16, 8)
    scale = choose_scale(seen(found.rows * np.float32(magnitude)), weight, BEST)
    assert np.isfinite(scale.step)
    assert 0 < scale.step <= float(np.finfo(np.float16).max)
    assert scale.migrated is None or (np.isfinite(scale.migrated) & (scale.migrated > 0)).all()


def test_options_out_of_range() -> None:
    with pytest.raises(UsageError, match="calibrator: expected one of absmax, percentile, entropy, mse, got 'max'"):
        CalibrationOptions(calibrator="max")  # type: ignore[arg-type]
    for strength in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="migration: expected 0 to 1, got"):
            CalibrationOptions(migration=strength)
