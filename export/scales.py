"""The scale by which an activation gets into 8 bits, found on what was seen of it: a pure function of that.

    q = rint(x * migrated / step) within ±127        x ≈ q * step / migrated

Migration divides each channel of an activation by a number and multiplies the weights' rows by it, so that channels of
large values do not set the step for all of them (SmoothQuant, Xiao et al. 2022, arXiv 2211.10438):

    migrated[channel] ~ largest(W[channel]) ** (1 - strength) / largest(x[channel]) ** strength

Which calibrator and which strength a layer bears differs: each is tried on calibration rows. What is taken has the
least relative error that 99 % of the rows' results stay below. By the error of all rows together a few large results
decide, and by the mean the many that are alike; what is rare, such as a text of one sign, then loses most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtx.export.calibrators import CALIBRATORS, LEVELS, Calibrator, histogram, limit_of
from rtx.runtime.errors import UsageError

STRENGTHS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of migration: 0 leaves the activation as it is, 1 makes all of its channels equally large."""

# Rows that layers are tried on, and the share of them that counts.
_TRIED_ROWS, _SHARE = 512, 0.99
# Scales are in half precision where the graph is, and hold what fits into that.
_SMALLEST = float(np.finfo(np.float16).smallest_subnormal)
_LARGEST = float(np.finfo(np.float16).max)
# Of a channel, and of the median channel, in the formula of migration.
_LEAST_MAGNITUDE, _LEAST_SHARE = 1e-5, 1e-2


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """How scales are chosen.

    Attributes:
        calibrator: for all activations; None for the best of each.
        migration: strength, 0 to 1, for all activations; None for the best of each.

    Raises:
        UsageError: a value is out of range.
    """

    calibrator: Calibrator | None = None
    migration: float | None = None

    def __post_init__(self) -> None:
        if self.calibrator is not None and self.calibrator not in CALIBRATORS:
            raise UsageError(f"calibrator: expected one of {', '.join(CALIBRATORS)}, got '{self.calibrator}'")
        if self.migration is not None and not 0 <= self.migration <= 1:
            raise UsageError(f"migration: expected 0 to 1, got {self.migration}")


class Seen(NamedTuple):
    """What was seen of an activation.

    Attributes:
        largest: [channels] float32: of the magnitudes of each channel, over all rows.
        rows: [rows, channels] float32: some of them.
    """

    largest: NDArray[np.float32]
    rows: NDArray[np.float32]


@dataclass(frozen=True)
class Scale:
    """How an activation gets into 8 bits: rint(x * migrated / step), within ±127.

    Attributes:
        modules: that read it, as `RetrievalModel.named_modules` calls them.
        calibrator, migration: what the scale was found by.
        step: what one step is worth; in half precision to the last bit.
        migrated: [channels] float32, what each channel is multiplied by, likewise; None for no migration.
        clipped: share of values beyond the last step.
        error: of the layers' results, |in 8 bits - exact| / |exact|, that 99 % of calibration rows stay below.
    """

    modules: tuple[str, ...]
    calibrator: Calibrator
    migration: float
    step: float
    migrated: NDArray[np.float32] | None
    clipped: float
    error: float

    def to_dict(self) -> dict[str, Any]:
        """As report.json holds it."""
        numbers = {name: getattr(self, name) for name in ("calibrator", "migration", "step", "clipped", "error")}
        return {"modules": list(self.modules), **numbers}


Scales = Mapping[str, Scale]
"""By the name that an activation has in the plain graph."""


def choose_scale(
    seen: Seen, weight: NDArray[np.float32], options: CalibrationOptions, *, modules: tuple[str, ...] = ()
) -> Scale:
    """The scale of an activation that changes its layers' results least, of those that are allowed.

    Args:
        seen: of the activation.
        weight: [channels, out] float32, of all layers that read it.
        options: what is allowed.
        modules: for the record.
    """
    strengths = STRENGTHS if options.migration is None else (options.migration,)
    calibrators = CALIBRATORS if options.calibrator is None else (options.calibrator,)
    tried = np.linspace(0, len(seen.rows) - 1, min(len(seen.rows), _TRIED_ROWS)).astype(np.int64)
    rows = seen.rows[tried]
    exact = rows @ weight
    best: Scale | None = None
    for strength in strengths:
        migrated = _migration(seen.largest, np.abs(weight).max(axis=1), strength)
        factor = np.float32(1) if migrated is None else migrated
        moved = weight if migrated is None else weight / migrated[:, np.newaxis]
        values, step = quantize_columns(moved)
        rounded = values.astype(np.float32) * step
        every, largest = np.abs(seen.rows * factor), float((seen.largest * factor).max())
        found = histogram(every, largest)
        for calibrator in calibrators:
            width = _half(limit_of(calibrator, found) / LEVELS)
            trial = np.clip(np.rint(rows * factor / np.float32(width)), -LEVELS, LEVELS) * np.float32(width)
            error = _error(trial @ rounded, exact)
            if best is None or error < best.error:
                clipped = float((every > width * (LEVELS + 0.5)).mean())
                best = Scale(modules, calibrator, strength, width, migrated, clipped, error)
    assert best is not None
    return best


def quantize_columns(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round a weight [in, out] to 8 bits, each column by its largest magnitude.

    Returns:
        [in, out] int8 within ±127, and [out] float32: what one step is worth, in half precision to the last bit.
    """
    # Rounded up where half precision rounds: nothing is clipped.
    step = half_up(np.abs(weight).max(axis=0) / np.float32(LEVELS))
    return np.clip(np.rint(weight / step), -LEVELS, LEVELS).astype(np.int8), step


def half_up(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """Numbers of half precision, the next ones that are not below; none of them is 0, and none beyond 65504."""
    held = np.clip(numbers, _SMALLEST, _LARGEST)
    near = held.astype(np.float16)
    above = np.nextafter(near, np.float16(_LARGEST))
    return np.where(near < held, above, near).astype(np.float32)


def _migration(
    activation: NDArray[np.float32], weight: NDArray[np.float32], strength: float
) -> NDArray[np.float32] | None:
    """[channels] float32 that an activation is multiplied by; around 1, and in half precision to the last bit."""
    if strength == 0:
        return None
    # What was 0 in calibration need not be so for ever: its factor stays within reach of the others.
    x, w = (
        np.maximum(of.astype(np.float64), max(_LEAST_SHARE * float(np.median(of)), _LEAST_MAGNITUDE))
        for of in (activation, weight)
    )
    divisor = x**strength / w ** (1 - strength)
    factor: NDArray[np.float64] = np.exp(np.log(divisor).mean()) / divisor
    return np.clip(factor, 2.0**-14, _LARGEST).astype(np.float16).astype(np.float32)


def _half(number: float) -> float:
    return float(half_up(np.array([number], dtype=np.float32))[0])


def _error(found: NDArray[np.float32], exact: NDArray[np.float32]) -> float:
    off, size = (np.linalg.norm(of.astype(np.float64), axis=1) for of in (found - exact, exact))
    # A row of which nothing is left has no relative error.
    return float(np.quantile(off / np.where(size > 0, size, np.inf), _SHARE))
