"""The op `add_norm_quantize`: what stands between two linear layers in 8 bits, and its reference.

    sum     x + residual                                              [rows, width]
    y       layer_norm or rms_norm of the sum                         (`rtx.kernels.norm`)
    scale   max|y| / 127, at least SMALLEST_SCALE                     [rows], one for each row
    codes   rint(y / scale), half to even, -127 to 127                [rows, width]

The codes are symmetric, y ≈ scale * codes, without the centre that `rtx.kernels.int8_linear` takes off on CPUs: y of a
norm lies about zero but for its bias, and tensor cores multiply signed by signed.

What every implementation has to keep:
    - x and residual have one type, and are added in float32. The norm is of that sum, not of what is left of it in the
      type of x, in which it is given back (the new residual stream of pre-norm models).
    - Scale and codes are those of y in float32, not of what is left of it in the type of x.
    - Every row is by itself: what else is in the batch does not change a bit.
    - A row that holds NaN or infinity, or whose squares overflow float32, has NaN for a scale, and no other row has.

With u = 2**-24, r = 1 / sqrt(variance + epsilon) (mean square for rms_norm), off = sum - mean (sum for rms_norm), the
float32 y differs from exact arithmetic by at most

    t = (width / 8 + 16) * u * (r * max|sum| * (1 + |off| * r) + |off| * r) * |weight| + 2 * u * |y|

(a sum in float32 is off by u * max|sum| an element, its mean by (width / 8 + 8) times that where 8 or more partial sums
are kept or added in pairs; the first summand is what that moves off, the second what it moves r, the third the sum of
squares; then two roundings of y). It follows for the scale, with T the largest t of the row, and for the codes

    |scale - exact| <= T / 127 + u * scale          |scale * codes - exact y| <= (1 / 2 + 2**-16) * scale + t
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtx.kernels.int8_linear import LEVELS, SMALLEST_SCALE
from rtx.kernels.norm import layer_norm, rms_norm

NORMS = ("layer_norm", "rms_norm")

_STEP = 2.0**-24


class Normalised(NamedTuple):
    """What the reference gives.

    Attributes:
        sum: [..., width] float64.
        y: [..., width] float64.
        scale: [...] float32.
        codes: [..., width] int8.
    """

    sum: NDArray[np.float64]
    y: NDArray[np.float64]
    scale: NDArray[np.float32]
    codes: NDArray[np.int8]


def add_norm_quantize(
    x: NDArray[np.floating],
    residual: NDArray[np.floating] | None,
    weight: NDArray[np.floating],
    bias: NDArray[np.floating] | None = None,
    *,
    norm: str,
    epsilon: float,
) -> Normalised:
    """Reference of the op, in float64.

    Args:
        x: [..., width].
        residual: as x; None for zeros.
        weight: [width].
        bias: [width], of layer_norm; None for zeros.
        norm: of NORMS.
        epsilon: added to the variance or the mean square.

    Raises:
        ValueError: `norm` does not exist, or has no bias and got one.
    """
    if norm not in NORMS or (norm == "rms_norm" and bias is not None):
        raise ValueError(f"norm: expected layer_norm, or rms_norm without a bias, got '{norm}'")
    total: NDArray[np.float64] = x.astype(np.float64)
    if residual is not None:
        total = total + residual.astype(np.float64)
    y = (
        layer_norm(total, weight, bias, epsilon=epsilon)
        if norm == "layer_norm"
        else rms_norm(total, weight, epsilon=epsilon)
    )
    scale = np.maximum(np.abs(y).max(axis=-1) / LEVELS, SMALLEST_SCALE).astype(np.float32)
    codes = np.clip(np.rint(np.nan_to_num(y / scale[..., None])), -LEVELS, LEVELS).astype(np.int8)
    off = total - total.mean(axis=-1, keepdims=True) if norm == "layer_norm" else total
    held = (off**2).sum(axis=-1) <= np.finfo(np.float32).max
    return Normalised(total, y, np.where(held, scale, np.float32(np.nan)), codes)


def bound(found: Normalised, weight: NDArray[np.floating], *, norm: str, epsilon: float) -> NDArray[np.float64]:
    """How far from the reference's y float32 may be: t of the contract, [..., width].

    Args:
        found: what the reference gave.
        weight, norm, epsilon: what it was given.
    """
    total = found.sum
    off = total - total.mean(axis=-1, keepdims=True) if norm == "layer_norm" else total
    r = 1 / np.sqrt((off**2).mean(axis=-1, keepdims=True) + epsilon)
    largest = np.abs(total).max(axis=-1, keepdims=True)
    parts = (total.shape[-1] / 8 + 16) * _STEP * (r * largest * (1 + np.abs(off) * r) + np.abs(off) * r)
    found_bound: NDArray[np.float64] = parts * np.abs(weight) + 2 * _STEP * np.abs(found.y)
    return found_bound
