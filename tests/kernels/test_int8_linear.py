"""The reference of `int8_linear`, against the exact product and the error bound of its docstring."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from rtx.kernels.int8_linear import (
    LEVELS,
    SMALLEST_SCALE,
    ZERO_POINT,
    Int8Weight,
    int8_linear,
    quantize_rows,
    quantize_weight,
)

EPSILON = 2.0**-24
"""Relative error of one float32 operation."""
UNDERFLOW = float(np.finfo(np.float32).smallest_subnormal)
"""Absolute error of one whose result is next to zero."""

# Subnormal numbers, values that differ by a factor of 1e20 in one row, zeros, equal values: whatever a float32 is.
VALUES = st.floats(-(2.0**20), 2.0**20, width=32, allow_subnormal=True)
SIDES = st.integers(1, 19)


@st.composite
def products(draw):
    """x [tokens, in], weight [in, out], bias [out]."""
    tokens, width, out = draw(SIDES), draw(SIDES), draw(SIDES)
    shapes = ((tokens, width), (width, out), (out,))
    return tuple(draw(hnp.arrays(np.float32, shape, elements=VALUES)) for shape in shapes)


def error_bound(
    x: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32] | None = None
) -> NDArray[np.float64]:
    """[tokens, out]: how far int8_linear may be from x @ weight + bias.

    The docstring's bound, with d = x - centre:

        x' = x + e, |e| <= scale_x / 2        W' = W + f, |f| <= scale_w / 2
        x' @ W' - x @ W = x @ f + e @ W + e @ f

    and on top of it the float32 operations. Those on the integers' side (two while quantising x, five after the
    product) are each off by EPSILON of |d'| @ |W'|, those on the centre's side (centre, column sum, product) by EPSILON
    of |centre| * sum |W'|, the two last additions by EPSILON of the sum of both and of the bias. What is too small for
    a float32 is lost besides.
    """
    a, w = np.abs(x.astype(np.float64)), np.abs(weight.astype(np.float64))
    high, low = x.max(axis=1, keepdims=True).astype(np.float64), x.min(axis=1, keepdims=True).astype(np.float64)
    scale_x = np.maximum((high - low) / 2 / LEVELS, SMALLEST_SCALE)
    scale_w = np.maximum(w.max(axis=0) / LEVELS, SMALLEST_SCALE)
    centre = (high + low) / 2
    rounded_w = w + scale_w
    rounding = a.sum(axis=1, keepdims=True) * scale_w / 2 + w.sum(axis=0) * scale_x / 2 + len(w) * scale_x * scale_w / 4
    arithmetic = (np.abs(x - centre) + scale_x) @ rounded_w + np.abs(centre) * rounded_w.sum(axis=0)
    relative = 10 * EPSILON * (arithmetic + (0 if bias is None else np.abs(bias)))
    return rounding + relative + 10 * UNDERFLOW


def error(x, weight, quantized=None, bias=None) -> NDArray[np.float64]:
    exact = x.astype(np.float64) @ weight.astype(np.float64) + (0 if bias is None else bias.astype(np.float64))
    return np.abs(int8_linear(x, quantized or quantize_weight(weight), bias).astype(np.float64) - exact)


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_by_hand():
    # The range of [0, 254] has steps of 1 about 127, and a weight of at most 127 has steps of 1: nothing is rounded.
    x = np.array([[0.0, 254.0, 100.0]], dtype=np.float32)
    weight = np.array([[127.0, 1.0], [-5.0, 127.0], [2.0, 0.0]], dtype=np.float32)
    quantized = quantize_weight(weight)
    assert quantized.values.tolist() == [[255, 129], [123, 255], [130, 128]]
    assert quantized.scale.tolist() == [1.0, 1.0]
    assert quantized.column_sum.tolist() == [124.0, 128.0]
    result = int8_linear(x, quantized, np.array([0.5, -1.0], dtype=np.float32))
    assert result.dtype == np.float32
    assert result.tolist() == [[254 * -5 + 100 * 2 + 0.5, 254 * 127 - 1.0]]


@given(products())
def test_the_error_is_within_its_bound(given_product):
    x, weight, bias = given_product
    assert (error(x, weight, bias=bias) <= error_bound(x, weight, bias)).all()


@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize(("width", "out"), [(1, 1), (3, 5), (384, 33), (1536, 17)])
def test_the_error_of_usual_activations(tokens, width, out):
    x, weight = normal(tokens, width), normal(width, out, seed=1)
    found = error(x, weight)
    assert (found <= error_bound(x, weight)).all()
    # 255 steps over a range of some 6 standard deviations, and independent errors: far below what they could add up to.
    if width >= 384:
        assert np.sqrt((found**2).mean()) < 0.02 * np.sqrt(width)


@given(products(), st.data())
def test_a_token_depends_on_itself_alone(given_product, data):
    x, weight, bias = given_product
    quantized = quantize_weight(weight)
    together = int8_linear(x, quantized, bias)
    rows = data.draw(st.permutations(range(len(x))))
    np.testing.assert_array_equal(int8_linear(x[rows], quantized, bias), together[rows])
    for row in range(len(x)):
        np.testing.assert_array_equal(int8_linear(x[row], quantized, bias), together[row])


@pytest.mark.parametrize("loud", [1e4, -1e30, np.inf, np.nan])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_loud_token_leaves_the_others_as_they_are(loud):
    x, quantized = normal(5, 48), quantize_weight(normal(48, 16, seed=1))
    quiet = int8_linear(x, quantized)
    x[2, 7] = loud
    result = int8_linear(x, quantized)
    others = [0, 1, 3, 4]
    np.testing.assert_array_equal(result[others], quiet[others])
    assert np.isfinite(result[2]).all() == np.isfinite(loud)
    if not np.isfinite(loud):
        assert not np.isfinite(result[2]).any()


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-42, -1e-38, 6e4])
@pytest.mark.filterwarnings("error")
def test_a_token_of_equal_values_is_its_value_times_the_column_sums(value):
    x, weight = np.full((2, 24), value, dtype=np.float32), normal(24, 8, seed=2)
    quantized = quantize_weight(weight)
    result = int8_linear(x, quantized)
    np.testing.assert_array_equal(result, np.float32(value) * np.stack([quantized.column_sum] * 2))
    assert (error(x, weight) <= error_bound(x, weight)).all()


def test_a_weight_of_zeros_gives_zeros_beside_columns_that_are_none():
    weight = normal(12, 3)
    weight[:, 1] = 0
    x = normal(4, 12, seed=3) + 5
    quantized = quantize_weight(weight)
    assert (quantized.values[:, 1] == ZERO_POINT).all()
    np.testing.assert_array_equal(int8_linear(x, quantized)[:, 1], np.zeros(4))
    np.testing.assert_array_equal(int8_linear(x, quantized)[:, 0], int8_linear(x, quantize_weight(weight[:, :1]))[:, 0])


def test_the_centre_meets_the_sums_of_the_rounded_weight():
    """One outlier pulls the centre to 30 while all other values are near zero: every rounding error of the weight that
    the integers' side does not see is multiplied by 30."""
    width = 64
    # In steps of the weight, every value but the largest is rounded down by 0.49.
    weight = (np.arange(width) % 4 + 0.49).astype(np.float32)[:, None]
    weight[0] = LEVELS
    x = 0.01 * normal(1, width)
    x[0, 1] = 60.0
    quantized = quantize_weight(weight)
    bound = error_bound(x, weight)
    assert (error(x, weight, quantized) <= bound).all()
    unrounded = Int8Weight(quantized.values, quantized.scale, weight.sum(axis=0))
    assert (error(x, weight, unrounded) > 10 * bound).all()


@given(hnp.arrays(np.float32, st.tuples(SIDES, SIDES), elements=VALUES))
def test_weights_and_rows_are_off_by_half_a_step_at_most(matrix):
    half_a_step = 0.5 + LEVELS * 2 * EPSILON
    weight, rows = quantize_weight(matrix), quantize_rows(matrix)
    assert weight.values.dtype == np.uint8
    assert rows.values.dtype == np.int8
    assert (np.abs(weight.dequantize().astype(np.float64) - matrix) <= half_a_step * weight.scale).all()
    assert (np.abs(rows.dequantize().astype(np.float64) - matrix) <= half_a_step * rows.scale).all()
    # The integers are symmetric: 0 and -128 stand for nothing.
    assert weight.values.min() >= ZERO_POINT - LEVELS
    assert rows.values.min() >= -LEVELS


def test_the_integers_do_not_overflow_at_the_widest_layer():
    width = 132_000
    x = np.where(np.arange(width) == 0, -1.0, 1.0).astype(np.float32)
    result = int8_linear(x, quantize_weight(np.ones((width, 1), dtype=np.float32)))
    # As what MatMulInteger gives: 127 * 127 * (width - 2) has to fit into 32 bits.
    assert 128 * LEVELS * width < 2**31
    np.testing.assert_allclose(result, [width - 2], rtol=4 * EPSILON)


@pytest.mark.parametrize("quantize", [quantize_weight, quantize_rows])
@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.ones(3), r"expected a matrix, got shape \[3\]"),
        (np.array([[1.0, np.nan]]), "holds NaN or infinity"),
        (np.array([[-np.inf, 1.0]]), "holds NaN or infinity"),
    ],
)
def test_what_cannot_be_quantised_is_refused(quantize, matrix, message):
    with pytest.raises(ValueError, match=message):
        quantize(matrix)


def test_a_row_of_a_large_table_is_rounded_as_if_alone() -> None:
    # More rows than are widened at once.
    table = np.random.default_rng(0).standard_normal((9000, 3), dtype=np.float32)
    rounded = quantize_rows(table)
    for place in (0, 4095, 4096, 8191, 8192, 8999):
        alone = quantize_rows(table[place : place + 1])
        assert np.array_equal(rounded.values[place], alone.values[0])
        assert rounded.scale[place] == alone.scale[0]
