"""Output vectors in a quarter (int8) or a thirty-second (one bit a dimension) of their float32 size.

Both codes are fixed functions of one vector: nothing is estimated from the batch, so a vector has the same code alone,
in any batch and in any index, and codes that were written on different days can be compared.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

INT8_LIMIT = 127
"""Codes go from -127 to 127. -128 is not used, so that the negative of a code is a code."""


def quantize_int8(vectors: NDArray[np.float32], ranges: NDArray[np.float32] | None = None) -> NDArray[np.int8]:
    """Round each element to one of 255 equally spaced levels.

    Without `ranges` the levels span [-1, 1], which holds every element of a vector of L2 norm 1: code = round(127 * v),
    half to even. What lies outside the span is clipped.

    How to compare: for codes a, b of vectors x, y, `a @ b / 127**2` estimates `x @ y`; sum in int32 or wider. Each
    element is off by at most 1/254, so for unit vectors of `dim` elements the estimate is off by at most
    sqrt(dim)/127 + dim/(4 * 127**2) (Cauchy-Schwarz; 0.16 at 384). Where the rounding errors are independent and
    uniform, its error has a standard deviation of sqrt(1/6)/127 = 0.0032 whatever `dim` is. The norm of a code is not
    exactly 127: cosine of the codes takes that out, the plain product does not.

    Args:
        vectors: [..., dim] float32, finite.
        ranges: [2, dim] float32, the lowest and the highest value of each dimension, to be measured once on a
            calibration set and kept: codes made with different ranges cannot be compared. Such codes are no multiples
            of their vectors; compare them after `dequantize_int8`.

    Returns:
        [..., dim] int8.

    Raises:
        ValueError: a vector is not finite, or `ranges` is not [2, dim] with lowest <= highest.
    """
    _check_finite(vectors)
    centre, half = _levels(ranges, vectors.shape[-1])
    # A dimension that never varies has one level, code 0. float64 holds 127 times a float32 exactly, so that without
    # ranges the error of an element is the rounding's alone.
    codes = np.rint((vectors.astype(np.float64) - centre) / np.where(half > 0, half, np.inf) * INT8_LIMIT)
    return np.clip(codes, -INT8_LIMIT, INT8_LIMIT).astype(np.int8)


def dequantize_int8(codes: NDArray[np.int8], ranges: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """The vectors that the codes stand for, off by at most half a level: (highest - lowest) / 508 an element.

    Args:
        codes: [..., dim] int8 from `quantize_int8`.
        ranges: the same that the codes were made with.

    Returns:
        [..., dim] float32.

    Raises:
        ValueError: `ranges` is not [2, dim] with lowest <= highest.
    """
    centre, half = _levels(ranges, codes.shape[-1])
    return (codes.astype(np.float64) / INT8_LIMIT * half + centre).astype(np.float32)


def quantize_binary(vectors: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Keep the sign of each element: bit 1 where it is above zero, eight to a byte, the first in the highest bit.

    How to compare: by the Hamming distance h, the number of differing bits. For vectors rotated at random the angle
    between them is estimated by pi * h / dim (Charikar 2002, "Similarity estimation techniques from rounding
    algorithms"); for learned dimensions this is a heuristic. Distances take only dim + 1 values, so ties are common:
    rescore the best few hundred with the float32 query.

    The same bits as "ubinary" in sentence-transformers and "ubinary" vectors of vector databases.

    Args:
        vectors: [..., dim] float32, finite.

    Returns:
        [..., ceil(dim / 8)] uint8; where dim is no multiple of 8 the last bits are 0 and thus equal in all codes.

    Raises:
        ValueError: a vector is not finite.
    """
    _check_finite(vectors)
    return np.packbits(vectors > 0, axis=-1)


def _check_finite(vectors: NDArray[np.float32]) -> None:
    finite = np.isfinite(vectors)
    if not finite.all():
        rows = np.flatnonzero(~finite.reshape(-1, vectors.shape[-1]).all(axis=1))
        raise ValueError(f"vectors: {len(rows)} are not finite, first at row {rows[0]}; NaN and infinity have no code")


def _levels(ranges: NDArray[np.float32] | None, dim: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The value of code 0 and how far from it code 127 lies, each broadcastable to [dim]."""
    if ranges is None:
        return np.zeros(1), np.ones(1)
    if ranges.shape != (2, dim) or not np.isfinite(ranges).all() or (ranges[0] > ranges[1]).any():
        raise ValueError(f"ranges: expected [2, {dim}] finite with lowest <= highest, got shape {list(ranges.shape)}")
    lowest, highest = ranges.astype(np.float64)
    return (lowest + highest) / 2, (highest - lowest) / 2
