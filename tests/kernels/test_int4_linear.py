"""The reference of `int4_linear`, against the exact product and the error bound of its docstring."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rtx.kernels.int4_linear import BLOCK, int4_linear, pack, quantize_weight

EPSILON = 2.0**-24
VALUES = st.floats(-(2.0**20), 2.0**20, width=32, allow_subnormal=True)


@given(st.integers(1, 70), st.integers(1, 9), st.data())
def test_it_is_off_by_half_a_step_and_some_roundings(inputs, out, data):
    x = data.draw(hnp.arrays(np.float32, (3, inputs), elements=VALUES))
    weight = data.draw(hnp.arrays(np.float32, (inputs, out), elements=VALUES))
    quantized = quantize_weight(weight)
    exact = x.astype(np.float64) @ weight.astype(np.float64)
    scale = np.repeat(quantized.scale.astype(np.float64), BLOCK, axis=1)[:, :inputs].T
    # The zero point is rounded too: at the ends of a range that moves a weight by up to another half step.
    rounding = np.abs(x).astype(np.float64) @ (scale * 1.001)
    arithmetic = (inputs + 8) * EPSILON * (np.abs(x).astype(np.float64) @ (np.abs(weight) + scale))
    # What is too small for a float32 is lost besides.
    underflow = (inputs + 8) * float(np.finfo(np.float32).smallest_subnormal)
    assert (np.abs(int4_linear(x, quantized) - exact) <= rounding + arithmetic + underflow).all()


def test_a_large_value_widens_its_own_block_alone():
    weight = np.random.default_rng(0).normal(size=(2 * BLOCK, 4)).astype(np.float32)
    before = quantize_weight(weight).dequantize()
    weight[3, 2] = 1e4
    after = quantize_weight(weight).dequantize()
    changed = np.argwhere(before != after)
    assert set(changed[:, 1]) == {2}
    assert changed[:, 0].max() < BLOCK


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_equal_weights_are_kept(value):
    weight = np.full((40, 3), value, dtype=np.float32)
    assert np.allclose(quantize_weight(weight).dequantize(), weight, rtol=1e-6)


def test_zero_is_exact():
    weight = np.random.default_rng(1).normal(size=(33, 5)).astype(np.float32)
    weight[::3] = 0
    assert (quantize_weight(weight).dequantize()[::3] == 0).all()


def test_the_first_of_two_numbers_is_in_the_low_bits():
    assert pack(np.array([[1, 2, 3], [15, 0, 7]], dtype=np.uint8)).tolist() == [[0x21, 0x03], [0x0F, 0x07]]


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_weight(np.array([[np.nan]], dtype=np.float32))
    with pytest.raises(ValueError, match=r"expected a matrix, got shape \[3\]"):
        quantize_weight(np.zeros(3, dtype=np.float32))
