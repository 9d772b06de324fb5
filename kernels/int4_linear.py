"""The op `int4_linear`: y = x @ W + b with the weight in 4 bits and everything else in float32.

    W[in, out] ≈ scale[out, block] * (Wq[out, in] - zero[out, block])       Wq, zero in 0 … 15, block = in // BLOCK

Each output channel has a scale and a zero point for every BLOCK inputs, so that a large value widens the steps of its
own block only. The range of a block is widened to hold 0, which is then exact. What is multiplied is the rounded weight
in float32: y differs from x @ W + b by

    |difference| <= sum_in |x| * scale / 2

and the roundings of a float32 product. On memory: 4 bits and 36 / BLOCK more a weight, one seventh of float32.

It pays where a model does not fit otherwise, or where single rows are bound by reading weights; with many rows the
weights are unpacked for each of them, and a CPU takes longer than in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
LEVELS = 15
# Below this a range counts as empty: division by a subnormal scale would overflow.
SMALLEST_SCALE = 1e-30


class Int4Weight(NamedTuple):
    """A quantised weight; inputs are padded to whole blocks.

    Attributes:
        values: [out, blocks, BLOCK] uint8, 0 to 15.
        scale: [out, blocks] float32.
        zero: [out, blocks] uint8, 0 to 15.
        inputs: how many there are without padding.
    """

    values: NDArray[np.uint8]
    scale: NDArray[np.float32]
    zero: NDArray[np.uint8]
    inputs: int

    def dequantize(self) -> NDArray[np.float32]:
        """[in, out] float32: the weight that the integers stand for; off by at most scale / 2 but for roundings."""
        steps = self.values.astype(np.float32) - self.zero[..., np.newaxis].astype(np.float32)
        rows = (steps * self.scale[..., np.newaxis]).reshape(len(self.values), -1)
        return np.ascontiguousarray(rows[:, : self.inputs].T)


def quantize_weight(weight: NDArray[np.floating]) -> Int4Weight:
    """Round a weight [in, out] to 4 bits, each output channel by the range of every BLOCK inputs.

    Raises:
        ValueError: the weight is not two-dimensional, or holds NaN or infinity.
    """
    if weight.ndim != 2:
        raise ValueError(f"expected a matrix, got shape {list(weight.shape)}")
    if not np.isfinite(weight).all():
        raise ValueError("holds NaN or infinity")
    inputs, out = weight.shape
    blocks = -(-inputs // BLOCK)
    wide = np.zeros((out, blocks * BLOCK), dtype=np.float32)
    wide[:, :inputs] = weight.T
    wide = wide.reshape(out, blocks, BLOCK)
    low, high = np.minimum(wide.min(axis=2), 0), np.maximum(wide.max(axis=2), 0)
    # Halved first: the difference of two large numbers may not be a float32.
    scale = np.maximum(high / LEVELS - low / LEVELS, np.float32(SMALLEST_SCALE)).astype(np.float32)
    zero = np.clip(np.rint(-low / scale), 0, LEVELS)
    wide /= scale[..., np.newaxis]
    np.rint(wide, out=wide)
    wide += zero[..., np.newaxis]
    np.clip(wide, 0, LEVELS, out=wide)
    return Int4Weight(wide.astype(np.uint8), scale, zero.astype(np.uint8), inputs)


def pack(nibbles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two numbers of 4 bits a byte along the last axis, the first in the low bits: [..., n] to [..., ceil(n / 2)]."""
    even = nibbles[..., ::2]
    odd = np.zeros_like(even)
    odd[..., : nibbles.shape[-1] // 2] = nibbles[..., 1::2]
    return np.bitwise_or(even, np.left_shift(odd, 4, dtype=np.uint8), dtype=np.uint8)


def int4_linear(
    x: NDArray[np.float32], weight: Int4Weight, bias: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Reference of the op.

    Args:
        x: [..., in] float32.
        weight: of a matrix [in, out].
        bias: [out] float32, or None.

    Returns:
        [..., out] float32.
    """
    y: NDArray[np.float32] = x @ weight.dequantize()
    return y if bias is None else y + bias
