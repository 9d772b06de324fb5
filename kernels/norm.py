"""The ops `layer_norm` and `rms_norm` of rows, and their references.

    layer_norm    (x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias     (Ba et al. 2016, arXiv 1607.06450)
    rms_norm      x / sqrt(mean(x^2) + epsilon) * weight                          (Zhang & Sennrich, arXiv 1910.07467)

The variance is that of the row, not an estimate of a larger one's. In float32 the difference to exact arithmetic is at
most a few roundings of the largest number of the row:

    |difference| <= (width / 8 + 8) * 2**-23 * max|x - mean| / sqrt(variance + epsilon) * |weight| + 2**-23 * |y|
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def layer_norm(
    x: NDArray[np.floating],
    weight: NDArray[np.floating],
    bias: NDArray[np.floating] | None = None,
    *,
    epsilon: float,
) -> NDArray[np.float64]:
    """Reference of the op, in float64: x [..., width]; weight, bias [width]."""
    wide = x.astype(np.float64)
    off = wide - wide.mean(axis=-1, keepdims=True)
    found: NDArray[np.float64] = off / np.sqrt((off**2).mean(axis=-1, keepdims=True) + epsilon) * weight
    return found if bias is None else found + bias


def rms_norm(x: NDArray[np.floating], weight: NDArray[np.floating], *, epsilon: float) -> NDArray[np.float64]:
    """Reference of the op, in float64: x [..., width]; weight [width]."""
    wide = x.astype(np.float64)
    found: NDArray[np.float64] = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + epsilon) * weight
    return found
