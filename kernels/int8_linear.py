"""The op `int8_linear`: y = x @ W + b in 8 bits, with one activation scale per token and one weight scale per channel.

    W ≈ scale_w[out] * (Wq - 128)                                     Wq uint8 [in, out], symmetric about 128
    x ≈ centre[t] + scale_x[t] * (xq - 128)                           xq uint8 [tokens, in], each token by itself
    y = scale_x[t] * scale_w[out] * (xq - 128) @ (Wq - 128) + centre[t] * column_sum[out] + b

The product is of integers and exact (|sum| <= 128 * 127 * in < 2**31 for in <= 132,000), so that y differs from
x @ W + b only by the two roundings, and by those of a few float32 operations:

    |difference| <= sum_in (|x| * scale_w / 2 + |W| * scale_x / 2 + scale_x * scale_w / 4)

xq is rint((x - centre) * (1 / scale_x)): one division a token, as divisions take longer than the product does on short
rows. That moves a number by 1e-5 of a step at most before it is rounded.

Every token is quantised by its own range: what else is in the batch does not change it. The centre makes use of all 255
steps where a token's values lie off zero. Its share of the product is a multiple of the column sums of the *rounded*
weight: with those of the weight before rounding, the rounding errors would meet x - centre instead of x, and where an
outlier pulls the centre away from the bulk that is the larger of the two (cosine .980 instead of .999 on MiniLM).

What the operator in kernels/cpu does around it, in one pass (`rtx::Int8Linear`), in this order:

    x       normalised first, where a norm comes before                       (pre-norm: ModernBERT, Qwen3)
    y       activation(y), or of two halves activation(y_1) * y_2             (gated: Shazeer, arXiv 2002.05202)
    y       + residual
    y       normalised, where a norm comes behind                             (post-norm: BERT)
    y       in up to three parts, where several layers read the same x        (query, key and value)

In standard operators both operands are unsigned because without VNNI x86 multiplies u8 by s8 with a saturating 16-bit
sum (vpmaddubsw), which is not exact; u8 by u8 is computed in 32 bits everywhere. The operator in kernels/cpu multiplies
u8 by s8 in ways that do not saturate, and takes at most 65,536 inputs, as its sums count bytes from 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtx.kernels.rounding import ROUNDING

ZERO_POINT = 128
LEVELS = 127
# Below this a range counts as empty: division by a subnormal scale would overflow.
SMALLEST_SCALE = 1e-30
# Rows of a table that are widened at once: a vocabulary of 152,000 by 2,048 would take 7 GiB by itself.
_ROWS = 4096
# Of the order in which the operator reads a weight.
_LANES, _QUAD, _DEPTH = 16, 4, 64


class Int8Weight(NamedTuple):
    """A quantised weight.

    Attributes:
        values: [in, out] uint8, zero point 128.
        scale: [out] float32.
        column_sum: [out] float32, of the weight that the integers stand for.
    """

    values: NDArray[np.uint8]
    scale: NDArray[np.float32]
    column_sum: NDArray[np.float32]

    def dequantize(self) -> NDArray[np.float32]:
        """[in, out] float32: the weight that the integers stand for; off by at most scale / 2."""
        return (self.values.astype(np.float32) - np.float32(ZERO_POINT)) * self.scale


class Int8Rows(NamedTuple):
    """Quantised rows of an embedding table.

    Attributes:
        values: [rows, dim] int8.
        scale: [rows, 1] float32.
    """

    values: NDArray[np.int8]
    scale: NDArray[np.float32]

    def dequantize(self) -> NDArray[np.float32]:
        """[rows, dim] float32: the table that the integers stand for; off by at most scale / 2."""
        return self.values.astype(np.float32) * self.scale


def quantize_weight(weight: NDArray[np.floating]) -> Int8Weight:
    """Round a weight [in, out] to 8 bits, each output channel by its largest magnitude.

    Raises:
        ValueError: the weight is not two-dimensional, or holds NaN or infinity.
    """
    wide = _finite_matrix(weight)
    scale = _scale(wide, axis=0)
    steps = np.rint(wide / scale)
    column_sum = (steps.sum(axis=0) * scale[0]).astype(np.float32)
    return Int8Weight((steps + ZERO_POINT).astype(np.uint8), scale[0], column_sum)


def pack_weight(weight: Int8Weight, parts: Sequence[int] = ()) -> NDArray[np.int8]:
    """A weight in the order in which the operator in kernels/cpu reads it, and ONNX files hold it for that.

    Columns come in panels of 16, rows four together, filled up with 0: of a panel's column n, row k stands at
    [k // 4, n, k % 4]. Each part begins with a panel of its own.

    Args:
        weight: of a matrix [in, out].
        parts: columns of each part; all of them if there is none.

    Returns:
        [panels, depth / 4, 16, 4] int8, depth the next multiple of 64 from `in`.
    """
    rows, columns = weight.values.shape
    depth = -(-rows // _DEPTH) * _DEPTH
    panels = []
    for start, stop in itertools.pairwise(itertools.accumulate(parts or [columns], initial=0)):
        count = -(-(stop - start) // _LANES)
        padded = np.zeros((depth, count * _LANES), dtype=np.int8)
        padded[:rows, : stop - start] = weight.values[:, start:stop].astype(np.int16) - ZERO_POINT
        panels.append(padded.reshape(depth // _QUAD, _QUAD, count, _LANES).transpose(2, 0, 3, 1))
    return np.ascontiguousarray(np.concatenate(panels))


def quantize_rows(table: NDArray[np.floating]) -> Int8Rows:
    """Round a table [rows, dim] to 8 bits, each row by its largest magnitude.

    Raises:
        ValueError: the table is not two-dimensional, or holds NaN or infinity.
    """
    values = np.empty(table.shape, dtype=np.int8)
    scale = np.empty((len(table), 1), dtype=np.float32)
    # At least one pass: what is no matrix is refused, however many rows it has.
    for start in range(0, max(1, len(table)), _ROWS):
        rows = slice(start, start + _ROWS)
        wide = _finite_matrix(table[rows])
        scale[rows] = _scale(wide, axis=1)
        values[rows] = np.rint(wide / scale[rows])
    return Int8Rows(values, scale)


def int8_linear(
    x: NDArray[np.float32], weight: Int8Weight, bias: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Reference of the op.

    Args:
        x: [..., in] float32.
        weight: of a matrix [in, out].
        bias: [out] float32, or None.

    Returns:
        [..., out] float32. A token that holds NaN or infinity gives NaN, and no other token does.
    """
    high, low = x.max(axis=-1, keepdims=True), x.min(axis=-1, keepdims=True)
    centre = (high + low) * np.float32(0.5)
    scale = np.maximum((high - low) * np.float32(0.5 / LEVELS), np.float32(SMALLEST_SCALE))
    steps = np.clip(np.rint((x - centre) * (np.float32(1) / scale)), -LEVELS - 1, LEVELS).astype(np.int64)
    product = steps @ (weight.values.astype(np.int64) - ZERO_POINT)
    y: NDArray[np.float32] = product.astype(np.float32) * weight.scale * scale + centre * weight.column_sum
    return y if bias is None else y + bias


def multiply_rows(
    xq: NDArray[np.int8],
    scale_x: NDArray[np.float32],
    wq: NDArray[np.int8],
    scale_w: NDArray[np.float32],
    bias: NDArray[np.floating] | None = None,
) -> NDArray[np.float64]:
    """Reference, in float64, of the product of rows that are in 8 bits already, without a centre, as
    `rtx.kernels.add_norm_quantize` gives them.

    Args:
        xq: [..., in].
        scale_x: [...].
        wq: [out, in], about 0.
        scale_w: [out].
        bias: [out], or None.

    Returns:
        [..., out] float64.
    """
    product = (xq.astype(np.int64) @ wq.astype(np.int64).T).astype(np.float64)
    product *= scale_x.astype(np.float64)[..., None] * scale_w.astype(np.float64)
    return product if bias is None else product + bias


def rows_bound(
    found: NDArray[np.float64], bias: NDArray[np.floating] | None = None, *, activated: bool = False
) -> NDArray[np.float64]:
    """How far from the reference's product, or an activation of it, float32 may be, of the same shape.

    The integer is rounded and multiplied by two scales: 3 roundings of the product; the sum with the bias is one more.
    No slope of gelu, gelu_tanh or silu is above 1.13, and each is z times a number up to 1, which some roundings and
    erf or exp, of 2 units in the last place, move by 8 * 2**-24 at most: what exp multiplies its argument's error by,
    |z|, sigmoid' takes away again (|z| sigmoid'(z) < 1 / 4).

    Args:
        found: what `multiply_rows` gave.
        bias: what it was given.
        activated: whether an activation follows.
    """
    step = ROUNDING["float32"].relative
    product = found if bias is None else found - bias
    moved: NDArray[np.float64] = step * (3.01 * np.abs(product) + np.abs(found))
    return moved * 1.13 + 8 * step * np.abs(found) if activated else moved


def _scale(wide: NDArray[np.float64], axis: int) -> NDArray[np.float32]:
    """Step width along an axis, which is kept. In float32 before anything is rounded by it: what is stored is used."""
    step: NDArray[np.float64] = np.abs(wide).max(axis=axis, keepdims=True) / LEVELS
    return np.maximum(step, SMALLEST_SCALE).astype(np.float32)


def _finite_matrix(matrix: NDArray[np.floating]) -> NDArray[np.float64]:
    if matrix.ndim != 2:
        raise ValueError(f"expected a matrix, got shape {list(matrix.shape)}")
    wide = matrix.astype(np.float64)
    if not np.isfinite(wide).all():
        raise ValueError("holds NaN or infinity")
    return wide
