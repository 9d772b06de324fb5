from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rtx.kernels.quantize import dequantize_int8, quantize_binary, quantize_int8

ELEMENTS = st.floats(-2, 2, width=32)
MATRICES = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20), elements=ELEMENTS)


def unit_vectors(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_int8_codes_by_hand():
    # 127 * 0.1 = 12.7 and 127 * 0.3 = 38.1; 1.5 is clipped; 127 * 0.5 = 63.5 goes to the even neighbour.
    vectors = np.array([[0.1, -0.1, 0.3, 1.0, -1.0, 1.5, -1.5, 0.5, -0.5, 0.0]], dtype=np.float32)
    codes = quantize_int8(vectors)
    assert codes.dtype == np.int8
    assert codes.tolist() == [[13, -13, 38, 127, -127, 127, -127, 64, -64, 0]]


def test_int8_ranges_by_hand():
    # Dimension 0 spans [0, 2]: centre 1, half 1. Dimension 1 spans [-4, 0]. Dimension 2 never varies.
    ranges = np.array([[0, -4, 3], [2, 0, 3]], dtype=np.float32)
    vectors = np.array([[0, -4, 3], [2, 0, 3], [1, -2, 9], [1.5, -3, 3], [5, 5, 5]], dtype=np.float32)
    codes = quantize_int8(vectors, ranges)
    assert codes.tolist() == [[-127, -127, 0], [127, 127, 0], [0, 0, 0], [64, -64, 0], [127, 127, 0]]
    back = dequantize_int8(codes, ranges)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back[:3], [[0, -4, 3], [2, 0, 3], [1, -2, 3]], atol=1e-6)


def test_int8_rounds_half_to_even():
    ranges = np.array([[-127.0] * 6, [127.0] * 6], dtype=np.float32)
    assert quantize_int8(np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5], np.float32), ranges).tolist() == [
        0,
        2,
        2,
        0,
        -2,
        -2,
    ]


def test_int8_ranges_of_minus_one_to_one_are_the_default():
    vectors = unit_vectors(50, 32)
    ranges = np.stack([np.full(32, -1), np.full(32, 1)]).astype(np.float32)
    np.testing.assert_array_equal(quantize_int8(vectors, ranges), quantize_int8(vectors))


@given(MATRICES)
def test_int8_is_within_half_a_level_and_clips(vectors):
    back = quantize_int8(vectors).astype(np.float64) / 127
    assert np.abs(back - np.clip(vectors, -1, 1)).max() <= 0.5 / 127 + 1e-15


@given(MATRICES)
def test_codes_do_not_depend_on_the_batch(vectors):
    for code in (quantize_int8, quantize_binary):
        together = code(vectors)
        for row, vector in enumerate(vectors):
            np.testing.assert_array_equal(code(vector[None])[0], together[row])
            np.testing.assert_array_equal(code(vector), together[row])


@given(MATRICES)
def test_int8_of_the_negative_is_the_negative(vectors):
    np.testing.assert_array_equal(quantize_int8(-vectors), -quantize_int8(vectors))


@pytest.mark.parametrize("dim", [8, 384, 1000])
def test_int8_dot_products_are_as_far_off_as_the_docstring_says(dim):
    vectors = unit_vectors(300, dim)
    codes = quantize_int8(vectors).astype(np.int64)
    error = codes @ codes.T / 127**2 - vectors.astype(np.float64) @ vectors.astype(np.float64).T
    assert np.abs(error).max() <= math.sqrt(dim) / 127 + dim / (4 * 127**2)
    off_diagonal = error[~np.eye(300, dtype=bool)]
    assert off_diagonal.std() == pytest.approx(math.sqrt(1 / 6) / 127, rel=0.1)


def test_binary_by_hand():
    # The first dimension is the highest bit: 1 0 0 1 0 0 0 1 is 0x91, and 1 1 with six dimensions missing is 0xC0.
    # Zero and minus zero are not above zero.
    vectors = np.array([[0.1, -0.1, 0.0, 2.0, -0.0, -3.0, -1e-30, 1e-30, 1.0, 1.0]], dtype=np.float32)
    codes = quantize_binary(vectors)
    assert codes.dtype == np.uint8
    assert codes.tolist() == [[0x91, 0xC0]]


@given(MATRICES)
def test_binary_hamming_distance_counts_differing_signs(vectors):
    bits = np.unpackbits(quantize_binary(vectors), axis=1)
    distance = (bits[:, None] != bits[None, :]).sum(axis=2)
    expected = ((vectors > 0)[:, None] != (vectors > 0)[None, :]).sum(axis=2)
    np.testing.assert_array_equal(distance, expected)


def test_binary_is_ubinary_of_sentence_transformers():
    quantization = pytest.importorskip("sentence_transformers.util.quantization")
    vectors = unit_vectors(20, 100)
    np.testing.assert_array_equal(
        quantize_binary(vectors), quantization.quantize_embeddings(vectors, precision="ubinary")
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("code", [quantize_int8, quantize_binary])
def test_what_is_not_finite_has_no_code(code, bad):
    vectors = unit_vectors(4, 8)
    vectors[2, 5] = bad
    with pytest.raises(ValueError, match="1 are not finite, first at row 2"):
        code(vectors)


@pytest.mark.parametrize(
    "ranges",
    [np.zeros((2, 7)), np.zeros((8, 2)), np.array([[1.0] * 8, [0.0] * 8]), np.array([[0.0] * 8, [np.inf] * 8])],
)
def test_ranges_have_to_fit(ranges):
    with pytest.raises(ValueError, match=r"ranges: expected \[2, 8\] finite"):
        quantize_int8(unit_vectors(2, 8), ranges.astype(np.float32))


def test_no_vectors_give_no_codes():
    assert quantize_int8(np.zeros((0, 12), np.float32)).shape == (0, 12)
    assert quantize_binary(np.zeros((0, 12), np.float32)).shape == (0, 2)
