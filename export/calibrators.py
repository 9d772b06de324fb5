"""Where 8 bits of an activation end: the magnitude above which values are clipped, from a histogram of magnitudes.

    absmax       the largest of all: nothing is clipped
    percentile   that which 99.99 % do not exceed          (Wu et al. 2020, arXiv 2004.09602)
    entropy      of least Kullback-Leibler divergence      (Migacz 2017, "8-bit inference with TensorRT", GTC)
    mse          of least mean squared error               (Sung et al. 2015, arXiv 1511.06488)

A smaller limit makes finer steps for what is below it, and cuts off what is above. What is worth more depends on the
layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

Calibrator = Literal["absmax", "percentile", "entropy", "mse"]
CALIBRATORS: tuple[Calibrator, ...] = get_args(Calibrator)

LEVELS = 127
"""Steps on either side of zero. TensorRT has no zero point, and -128 is not used."""
PERCENTILE = 0.9999

_BINS = 2048
# Magnitudes that 8 bits can tell apart, and how many limits are tried.
_STEPS, _TRIED = LEVELS + 1, 128


class Histogram(NamedTuple):
    """Magnitudes of an activation.

    Attributes:
        counts: [bins] float64: how many lie in each of equally wide bins from 0 to `largest`.
        largest: of all magnitudes.
    """

    counts: NDArray[np.float64]
    largest: float

    @property
    def ends(self) -> NDArray[np.float64]:
        """[bins] float64: the upper end of each bin."""
        return np.arange(1, len(self.counts) + 1, dtype=np.float64) * (self.largest / len(self.counts))


def histogram(values: NDArray[np.float32], largest: float) -> Histogram:
    """Count magnitudes.

    Args:
        values: [...] float32, finite.
        largest: of all magnitudes that there are; `values` may be some of them.
    """
    counts, _ = np.histogram(np.abs(values), bins=_BINS, range=(0.0, largest or 1.0))
    return Histogram(counts.astype(np.float64), largest)


def limit_of(calibrator: Calibrator, found: Histogram) -> float:
    """The magnitude above which values are clipped; 0 where all are 0."""
    if found.largest == 0 or not found.counts.any():
        return found.largest
    return min(_CALIBRATORS[calibrator](found), found.largest)


def _absmax(found: Histogram) -> float:
    return found.largest


def _percentile(found: Histogram) -> float:
    below = found.counts.cumsum() / found.counts.sum()
    return float(found.ends[np.searchsorted(below, PERCENTILE)])


def _mse(found: Histogram) -> float:
    width = found.largest / len(found.counts)
    centres = found.ends - width / 2
    limits = found.largest * np.arange(1, _TRIED + 1)[:, np.newaxis] / _TRIED
    steps = limits / LEVELS
    error = (np.minimum(np.rint(centres / steps), LEVELS) * steps - centres) ** 2 @ found.counts
    return float(limits[error.argmin(), 0])


def _entropy(found: Histogram) -> float:
    """The distribution with everything above the limit in its last bin, against the one that `_STEPS` steps can hold.

    Only limits of at least as many bins as there are steps are tried: below, nothing is lost by rounding.
    """
    counts = found.counts
    tried = np.arange(_STEPS, len(counts) + 1, max(1, (len(counts) - _STEPS) // _TRIED))
    divergences = [_divergence(counts, int(bins)) for bins in tried]
    return float(found.ends[tried[int(np.argmin(divergences))] - 1])


def _divergence(counts: NDArray[np.float64], bins: int) -> float:
    inside = counts[:bins]
    clipped = inside.copy()
    clipped[-1] += counts[bins:].sum()
    step = np.arange(bins) * _STEPS // bins
    held = inside > 0
    sums, members = (np.bincount(step, weights=weights, minlength=_STEPS) for weights in (inside, held))
    rounded = np.where(held, (sums / np.maximum(members, 1))[step], 0.0)
    if not rounded.any():
        return np.inf
    p, q = clipped / clipped.sum(), rounded / rounded.sum()
    # What is clipped where nothing lies inside has no probability after rounding.
    there = p > 0
    return float((p[there] * np.log(p[there] / np.maximum(q[there], np.finfo(np.float64).tiny))).sum())


_CALIBRATORS: dict[Calibrator, Callable[[Histogram], float]] = {
    "absmax": _absmax,
    "percentile": _percentile,
    "entropy": _entropy,
    "mse": _mse,
}
