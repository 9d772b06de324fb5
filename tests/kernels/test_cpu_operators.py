"""The operators in C++ against their references, on every instruction set of this machine, and in ONNX Runtime."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from rtx.kernels import library
from rtx.kernels.int8_embedding import int8_embedding
from rtx.kernels.int8_linear import Int8Weight, int8_linear, pack_weight, quantize_rows, quantize_weight
from rtx.kernels.library import DOMAIN, ISAS, best_isa, library_file, load_library
from rtx.kernels.maxsim import maxsim
from rtx.kernels.norm import layer_norm, rms_norm
from rtx.kernels.pack_rows import pack_rows
from rtx.kernels.packed_attention import packed_attention
from rtx.kernels.packed_pool import packed_pool
from rtx.kernels.pool import MODES
from rtx.kernels.rotary_embedding import rotary_embedding

pytestmark = pytest.mark.skipif(library_file() is None, reason="the operators were not built")

FLOAT_STEP = 2.0**-23
EPSILON = 1e-5
NORMS = ("", "layer", "rms")
MODES_IN_C = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
ACTIVATIONS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "": lambda x: x,
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def available() -> list[str]:
    if library_file() is None:
        return []
    operators = load_library()
    best = operators.rtx_best_isa()
    found = [name for number, name in enumerate(ISAS) if operators.rtx_use_isa(number) == 0]
    assert operators.rtx_use_isa(best) == 0
    return found


@pytest.fixture(params=available())
def operators(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    """The library, set to an instruction set."""
    loaded = load_library()
    assert loaded.rtx_use_isa(ISAS.index(request.param)) == 0
    assert loaded.rtx_isa() == ISAS.index(request.param)
    yield loaded
    assert loaded.rtx_use_isa(loaded.rtx_best_isa()) == 0


def pointer(array: NDArray[Any] | None) -> ctypes.c_void_p | None:
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


def linear(
    operators: ctypes.CDLL,
    x: NDArray[np.float32],
    weight: Int8Weight,
    bias: NDArray[np.float32] | None = None,
    activation: str = "",
    *,
    split: Sequence[int] = (),
    gated: bool = False,
    norm: str = "",
    norm_at: str = "output",
    norm_weight: NDArray[np.float32] | None = None,
    norm_bias: NDArray[np.float32] | None = None,
    residual: NDArray[np.float32] | None = None,
) -> list[NDArray[np.float32]]:
    rows, columns = weight.values.shape
    parts = np.array(split or [columns], dtype=np.int64)
    y = [np.full((len(x), width), np.nan, dtype=np.float32) for width in (parts[:1] if gated else parts)]
    x = np.ascontiguousarray(x)
    operators.rtx_weight.restype = ctypes.c_void_p
    arrays = (pack_weight(weight, parts.tolist()), weight.scale, weight.column_sum, bias)
    packed = ctypes.c_void_p(
        operators.rtx_weight(*map(pointer, arrays), ctypes.c_int64(rows), pointer(parts), ctypes.c_int64(len(parts)))
    )
    numbers = (list(ACTIVATIONS).index(activation), int(gated), NORMS.index(norm), int(norm_at == "output"))
    operators.rtx_int8_linear(
        pointer(x),
        packed,
        *numbers,
        ctypes.c_float(EPSILON),
        *map(pointer, (norm_weight, norm_bias, residual)),
        ctypes.c_int64(len(x)),
        (ctypes.c_void_p * len(y))(*(one.ctypes.data for one in y)),
    )
    operators.rtx_drop_weight(packed)
    return y


def attention(
    operators: ctypes.CDLL,
    query: NDArray[np.float32],
    key: NDArray[np.float32],
    value: NDArray[np.float32],
    offsets: NDArray[np.int64],
    *,
    scale: float,
    causal: bool = False,
    window: int = -1,
    bfloat16: bool = False,
) -> NDArray[np.float32]:
    y = np.full_like(query, np.nan)
    sizes = (len(offsets) - 1, query.shape[1], key.shape[1], query.shape[2])
    operators.rtx_packed_attention(
        *map(pointer, (query, key, value, offsets)),
        *(ctypes.c_int64(size) for size in sizes),
        ctypes.c_float(scale),
        int(causal),
        ctypes.c_int64(window),
        int(bfloat16),
        pointer(y),
    )
    return y


def attention_tolerance(
    query: NDArray[np.float32],
    key: NDArray[np.float32],
    value: NDArray[np.float32],
    offsets: NDArray[np.int64],
    scale: float,
    bfloat16: bool,
) -> float:
    """As the contract has it."""
    length = int(np.diff(offsets).max())
    scores = query.shape[2] * scale * float(np.abs(query).max()) * float(np.abs(key).max())
    relative = scores * 2.0**-15 + 2.0**-7 if bfloat16 else 2 * scores * FLOAT_STEP
    return (relative + length * FLOAT_STEP) * float(np.abs(value).max())


def late_interaction(
    operators: ctypes.CDLL, query: NDArray[np.float32], documents: NDArray[np.float32], offsets: NDArray[np.int64]
) -> NDArray[np.float32]:
    scores = np.full(len(offsets) - 1, np.inf, dtype=np.float32)
    operators.rtx_maxsim(
        pointer(query),
        ctypes.c_int64(len(query)),
        *map(pointer, (documents, offsets)),
        ctypes.c_int64(len(scores)),
        ctypes.c_int64(query.shape[1]),
        pointer(scores),
    )
    return scores


def maxsim_tolerance(
    query: NDArray[np.float32], documents: NDArray[np.float32], offsets: NDArray[np.int64]
) -> NDArray[np.float64]:
    steps = (query.shape[1] + len(query)) * FLOAT_STEP
    return steps * maxsim(np.abs(query), np.abs(documents), offsets)


def assert_linear(
    operators: ctypes.CDLL, x: NDArray[np.float32], weight: Int8Weight, bias: NDArray[np.float32] | None = None
) -> None:
    """Integers are the same. What is done with them in float32 is five operations, each of which rounds once, on
    numbers that are at most the result, the centre's share and the bias together: these may cancel each other.
    """
    expected = int8_linear(x, weight, bias)
    centre = (x.max(axis=1, keepdims=True) + x.min(axis=1, keepdims=True)) / 2
    size = np.abs(expected) + 2 * np.abs(centre * weight.column_sum) + (0 if bias is None else 2 * np.abs(bias))
    (found,) = linear(operators, x, weight, bias)
    assert (np.abs(found - expected) <= 5 * FLOAT_STEP * size).all()


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 70),
    rows=st.integers(1, 130),
    columns=st.integers(1, 90),
    spread=st.floats(-8, 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_linear_is_the_reference(tokens: int, rows: int, columns: int, spread: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, rows)) * np.exp(spread * random.standard_normal((tokens, 1)))
    x = x.astype(np.float32)
    weight = quantize_weight(random.standard_normal((rows, columns)))
    bias = random.standard_normal(columns).astype(np.float32)
    operators = load_library()
    for number in range(len(ISAS)):
        if operators.rtx_use_isa(number) == 0:
            assert_linear(operators, x, weight, bias)
    operators.rtx_use_isa(operators.rtx_best_isa())


@pytest.mark.parametrize("shape", [(1, 1, 1), (8192, 33, 17), (7, 1536, 384), (200, 384, 1152), (97, 4, 16)])
def test_linear_of_odd_and_large_shapes(operators: ctypes.CDLL, shape: tuple[int, int, int]) -> None:
    tokens, rows, columns = shape
    random = np.random.default_rng(0)
    x = random.standard_normal((tokens, rows)).astype(np.float32)
    weight = quantize_weight(random.standard_normal((rows, columns)))
    assert_linear(operators, x, weight)


def test_the_largest_products_do_not_saturate(operators: ctypes.CDLL) -> None:
    """All bytes at their limits: what 16 bits between would cut off."""
    x = np.tile(np.array([-1.0, 1.0], dtype=np.float32), (3, 64))
    weight = quantize_weight(np.tile([[1.0], [-1.0]], (64, 20)))
    assert_linear(operators, x, weight)
    flipped = quantize_weight(np.tile([[-1.0], [1.0]], (64, 20)))
    assert_linear(operators, x, flipped)


def test_rows_that_go_wrong_elsewhere(operators: ctypes.CDLL) -> None:
    random = np.random.default_rng(1)
    x = random.standard_normal((9, 48)).astype(np.float32)
    x[0] = 3.5  # all equal
    x[1] = 0.0
    x[2] = 1e-42  # below the smallest normal number
    x[3, 5] = 1e30  # an outlier
    x[4] *= np.float32(1e-35)
    weight = quantize_weight(random.standard_normal((48, 40)))
    assert_linear(operators, x, weight)
    for place, value in ((0, np.nan), (1, np.nan), (47, np.nan), (5, np.inf), (30, -np.inf)):
        poisoned = x.copy()
        poisoned[6, place] = value
        (found,) = linear(operators, poisoned, weight)
        assert np.isnan(found[6]).all() or not np.isfinite(found[6]).any()
        others = [row for row in range(9) if row != 6]
        assert (found[others] == linear(operators, x, weight)[0][others]).all()


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name])
def test_activations(operators: ctypes.CDLL, activation: str) -> None:
    random = np.random.default_rng(2)
    x = random.standard_normal((37, 40)).astype(np.float32)
    weight = quantize_weight(random.standard_normal((40, 35)))
    plain = int8_linear(x, weight).astype(np.float64)
    (found,) = linear(operators, x, weight, activation=activation)
    np.testing.assert_allclose(found, ACTIVATIONS[activation](plain), atol=5e-6)


@pytest.mark.parametrize("split", [(48, 32), (40, 1, 39)])
def test_several_outputs(operators: ctypes.CDLL, split: tuple[int, ...]) -> None:
    random = np.random.default_rng(2)
    x = random.standard_normal((70, 50)).astype(np.float32)
    weight, bias = quantize_weight(random.standard_normal((50, 80))), random.standard_normal(80).astype(np.float32)
    found = linear(operators, x, weight, bias, split=split)
    assert [one.shape[1] for one in found] == list(split)
    (whole,) = linear(operators, x, weight, bias)
    assert (np.concatenate(found, axis=1) == whole).all()


@pytest.mark.parametrize("half", [40, 33])
def test_gated(operators: ctypes.CDLL, half: int) -> None:
    random = np.random.default_rng(2)
    x = random.standard_normal((70, 50)).astype(np.float32)
    weight = quantize_weight(random.standard_normal((50, 2 * half)))
    gate, up = np.split(int8_linear(x, weight).astype(np.float64), 2, axis=1)
    (found,) = linear(operators, x, weight, activation="silu", split=(half, half), gated=True)
    np.testing.assert_allclose(found, ACTIVATIONS["silu"](gate) * up, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("shape", [(1, 33, 20), (70, 48, 64), (130, 20, 33)])
def test_norms_and_residuals(operators: ctypes.CDLL, norm: str, shape: tuple[int, int, int]) -> None:
    tokens, rows, columns = shape
    random = np.random.default_rng(2)
    x = random.standard_normal((tokens, rows)).astype(np.float32) + 1
    weight = quantize_weight(random.standard_normal((rows, columns)))
    residual = random.standard_normal((tokens, columns)).astype(np.float32)
    some = {size: random.standard_normal((2, size)).astype(np.float32) for size in (rows, columns)}

    def reference(values: NDArray[Any], factor: NDArray[Any], bias: NDArray[Any]) -> NDArray[np.float64]:
        if norm == "rms":
            return rms_norm(values, factor, epsilon=EPSILON)
        return layer_norm(values, factor, bias, epsilon=EPSILON)

    bias = some[columns][1] if norm == "layer" else None
    (found,) = linear(operators, x, weight, residual=residual, norm=norm, norm_weight=some[columns][0], norm_bias=bias)
    expected = reference(int8_linear(x, weight) + residual, *some[columns])
    np.testing.assert_allclose(found, expected, atol=2e-5)

    bias = some[rows][1] if norm == "layer" else None
    given_ = {"norm": norm, "norm_at": "input", "norm_weight": some[rows][0], "norm_bias": bias}
    (found,) = linear(operators, x, weight, **given_)
    normalized = reference(x, *some[rows]).astype(np.float32)
    # A number at the edge of a step may fall on either side of it.
    step = np.ptp(normalized, axis=1, keepdims=True) / 255 * np.abs(weight.dequantize()).max(axis=0)
    assert (np.abs(found - int8_linear(normalized, weight)) <= 2 * step + 2e-5).all()
    y = np.empty_like(x)
    operators.rtx_normalize(
        pointer(x),
        ctypes.c_int64(tokens),
        ctypes.c_int64(rows),
        NORMS.index(norm),
        ctypes.c_float(EPSILON),
        pointer(some[rows][0]),
        pointer(bias),
        pointer(y),
    )
    np.testing.assert_allclose(y, reference(x, *some[rows]), atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_embedding(operators: ctypes.CDLL, norm: str) -> None:
    random = np.random.default_rng(8)
    table = quantize_rows(random.standard_normal((50, 37)))
    ids = random.integers(0, 50, 200)
    added = random.standard_normal((200, 37)).astype(np.float32)
    weight, bias = random.standard_normal((2, 37)).astype(np.float32)
    norms: dict[str, Any] = {
        "": None,
        "layer": lambda rows: layer_norm(rows, weight, bias, epsilon=EPSILON),
        "rms": lambda rows: rms_norm(rows, weight, epsilon=EPSILON),
    }
    for more in (None, added):
        y = np.empty((200, 37), dtype=np.float32)
        operators.rtx_int8_embedding(
            pointer(table.values),
            pointer(table.scale),
            ctypes.c_int64(37),
            pointer(ids),
            pointer(more),
            ctypes.c_int64(200),
            NORMS.index(norm),
            ctypes.c_float(EPSILON),
            pointer(weight),
            pointer(bias if norm == "layer" else None),
            pointer(y),
        )
        np.testing.assert_allclose(y, int8_embedding(table, ids, more, norm=norms[norm]), atol=1e-5)


@pytest.mark.parametrize("width", [2, 8, 64, 74])
def test_rotary_embedding(operators: ctypes.CDLL, width: int) -> None:
    random = np.random.default_rng(10)
    x = random.standard_normal((200, 3, width)).astype(np.float32)
    cos, sin = random.standard_normal((2, 200, width)).astype(np.float32)
    y = np.empty_like(x)
    sizes = (ctypes.c_int64(size) for size in x.shape)
    operators.rtx_rotary_embedding(*map(pointer, (x, cos, sin)), *sizes, pointer(y))
    np.testing.assert_allclose(y, rotary_embedding(x, cos, sin), atol=3e-6)


@pytest.mark.parametrize("mode", MODES)
def test_pool(mode: str) -> None:
    random = np.random.default_rng(9)
    offsets = np.cumsum([0, 3, 0, 1, 400, 2]).astype(np.int64)
    x = random.standard_normal((offsets[-1], 37)).astype(np.float32)
    taken = random.integers(0, 2, len(x))
    taken[:3] = 0  # a row in which nothing is pooled
    x[1] = np.nan
    for pooled in (None, taken):
        y = np.empty((5, 37), dtype=np.float32)
        load_library().rtx_packed_pool(
            pointer(x),
            ctypes.c_int64(37),
            pointer(offsets),
            ctypes.c_int64(5),
            pointer(pooled),
            MODES_IN_C.index(mode),
            pointer(y),
        )
        np.testing.assert_allclose(y, packed_pool(x, offsets, mode, pooled=pooled), atol=2e-5)
        assert pooled is None or not y[:2].any()


def test_a_token_is_the_same_in_every_batch(operators: ctypes.CDLL) -> None:
    random = np.random.default_rng(3)
    x = random.standard_normal((101, 96)).astype(np.float32)
    weight = quantize_weight(random.standard_normal((96, 80)))
    factor, bias = random.standard_normal((2, 80)).astype(np.float32)
    given_: dict[str, Any] = {"activation": "gelu", "norm": "layer", "norm_weight": factor, "norm_bias": bias}
    (together,) = linear(operators, x, weight, **given_)
    alone = np.concatenate([linear(operators, row[None], weight, **given_)[0] for row in x])
    assert (together == alone).all()


@pytest.mark.parametrize("heads", [(4, 4, 32), (6, 2, 40), (2, 1, 1), (2, 2, 64), (2, 2, 130)])
@pytest.mark.parametrize("seen", [{}, {"causal": True}, {"window": 0}, {"window": 20}, {"window": 7, "causal": True}])
@pytest.mark.parametrize(("bfloat16", "size"), [(False, 3), (True, 0.3), (True, 60)])
def test_attention_is_the_reference(
    operators: ctypes.CDLL, heads: tuple[int, int, int], seen: dict[str, Any], bfloat16: bool, size: float
) -> None:
    number, key_heads, width = heads
    random = np.random.default_rng(4)
    offsets = np.cumsum([0, 5, 1, 16, 0, 77, 33, 161, 300]).astype(np.int64)
    query = size * random.standard_normal((offsets[-1], number, width)).astype(np.float32)
    key, value = (random.standard_normal((offsets[-1], key_heads, width)).astype(np.float32) for _ in range(2))
    given_: dict[str, Any] = {"scale": width**-0.5, **seen}
    found = attention(operators, query, key, value, offsets, **given_, bfloat16=bfloat16)
    expected = packed_attention(query, key, value, offsets, **given_)
    tolerance = attention_tolerance(query, key, value, offsets, given_["scale"], bfloat16)
    assert np.abs(found - expected).max() <= tolerance
    if size < 10:  # where the bound is far above what happens: queries' and keys' second terms matter
        assert np.abs(found - expected).max() <= (2.0**-8 if bfloat16 else 2.0**-18) * np.abs(value).max()
    # The rows of a sequence are the same to the last bit, whatever is beside it.
    start, stop = offsets[4], offsets[5]
    sides = [side[start:stop] for side in (query, key, value)]
    alone = attention(operators, *sides, np.array([0, stop - start]), **given_, bfloat16=bfloat16)
    assert (found[start:stop] == alone).all()


def test_attention_rounds_nothing_unless_told(operators: ctypes.CDLL) -> None:
    random = np.random.default_rng(17)
    query, key, value = (random.standard_normal((200, 2, 64)).astype(np.float32) for _ in range(3))
    sides, offsets = (query, key, value), np.array([0, 200])
    exact = attention(operators, *sides, offsets, scale=0.125)
    rounded = attention(operators, *sides, offsets, scale=0.125, bfloat16=True)
    assert np.abs(exact - packed_attention(*sides, offsets, scale=0.125)).max() < 2e-6
    assert (exact != rounded).any() == (operators.rtx_isa() == ISAS.index("avx512-amx"))


def test_attention_in_bfloat16_with_a_row_that_is_not_finite(operators: ctypes.CDLL) -> None:
    random = np.random.default_rng(5)
    offsets = np.array([0, 70, 270], dtype=np.int64)
    query, key, value = (random.standard_normal((270, 1, 16)).astype(np.float32) for _ in range(3))
    expected = packed_attention(query, key, value, offsets, scale=1.0)
    query[3, 0, 5] = np.nan
    found = attention(operators, query, key, value, offsets, scale=1.0, bfloat16=True)
    assert np.isnan(found[3]).all()
    rest = np.arange(270) != 3
    np.testing.assert_allclose(found[rest], expected[rest], atol=0.02)
    for spoilt in (np.nan, np.inf):
        key[100, 0, 3] = spoilt
        found = attention(operators, query, key, value, offsets, scale=1.0, bfloat16=True)
        assert np.isnan(found[70:]).all()
        np.testing.assert_allclose(found[:3], expected[:3], atol=0.02)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_attention_over_values_of_any_size(operators: ctypes.CDLL, bfloat16: bool) -> None:
    random = np.random.default_rng(6)
    offsets = np.array([0, 150], dtype=np.int64)
    noise, others, value = (random.standard_normal((150, 1, 32)).astype(np.float32) for _ in range(3))
    # Scores near the bound below which no largest one is taken off: weights of 2^-58 or 2^58.
    for size, sign in ((1e-30, -1), (1e36, 1)):
        sides = (3 + 0.05 * noise, sign * (3 + 0.05 * others), np.float32(size) * value)
        found = attention(operators, *sides, offsets, scale=0.135, bfloat16=bfloat16)
        expected = packed_attention(*sides, offsets, scale=0.135)
        assert np.abs(found - expected).max() <= 2.0**-7 * np.abs(sides[2]).max()


def test_attention_on_what_goes_wrong_elsewhere(operators: ctypes.CDLL) -> None:
    random = np.random.default_rng(5)
    offsets = np.array([0, 8192 // 8, 8192 // 8 + 3], dtype=np.int64)
    query, key, value = (random.standard_normal((offsets[-1], 1, 16)).astype(np.float32) for _ in range(3))
    query[0] = 1e4  # scores beyond what an exponential bears
    key[1], key[2] = 1e4, -1e4
    found = attention(operators, query, key, value, offsets, scale=1.0)
    expected = packed_attention(query, key, value, offsets, scale=1.0)
    np.testing.assert_allclose(found[1:], expected[1:], atol=2e-5)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
    assert (found[0] == value[1]).all()
    key[5, 0, 3] = np.nan
    poisoned = attention(operators, query, key, value, offsets, scale=1.0)
    assert np.isnan(poisoned[: offsets[1]]).all()
    assert (poisoned[offsets[1] :] == found[offsets[1] :]).all()
    key[5, 0, 3], key[offsets[1], 0, 3] = 0.0, np.nan  # where fewer keys are left than a register holds
    assert np.isnan(attention(operators, query, key, value, offsets, scale=1.0)[offsets[1] :]).all()


@settings(max_examples=40, deadline=None)
@given(
    query_tokens=st.integers(0, 70),
    dim=st.integers(1, 140),
    lengths=st.lists(st.integers(0, 40), max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_maxsim_is_the_reference(query_tokens: int, dim: int, lengths: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    query = random.standard_normal((query_tokens, dim)).astype(np.float32)
    documents = random.standard_normal((offsets[-1], dim)).astype(np.float32)
    expected, tolerance = maxsim(query, documents, offsets), maxsim_tolerance(query, documents, offsets)
    operators = load_library()
    for number in range(len(ISAS)):
        if operators.rtx_use_isa(number) == 0:
            found = late_interaction(operators, query, documents, offsets)
            assert (np.abs(found - expected) <= tolerance).all()
            assert not found[np.array(lengths, dtype=int) == 0].any()
    operators.rtx_use_isa(operators.rtx_best_isa())


def test_maxsim_takes_one_document_at_a_time(operators: ctypes.CDLL) -> None:
    random = np.random.default_rng(12)
    lengths = [1, 7, 0, 8, 9, 33]
    offsets = np.cumsum([0, *lengths])
    query = random.standard_normal((37, 20)).astype(np.float32)
    documents = random.standard_normal((offsets[-1], 20)).astype(np.float32) - 3  # no product of some tokens is above 0
    found = late_interaction(operators, query, documents, offsets)
    assert (np.abs(found - maxsim(query, documents, offsets)) <= maxsim_tolerance(query, documents, offsets)).all()
    for place, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        alone = late_interaction(operators, query, documents[start:stop], np.array([0, stop - start]))
        assert alone[0] == found[place]
        for token, value in ((start, np.nan), (stop - 1, np.inf), (start, -np.inf), (stop - 1, 3e38)):
            if start == stop:
                continue
            poisoned = documents.copy()
            poisoned[token, token % 20] = value
            scores = late_interaction(operators, query, poisoned, offsets)
            assert np.isnan(scores[place])
            assert (np.delete(scores, place) == np.delete(found, place)).all()
    query[36, 3] = np.nan  # of the last token, where lanes are left over
    spoilt = late_interaction(operators, query, documents, offsets)
    assert np.isnan(spoilt).tolist() == [length > 0 for length in lengths]


def test_maxsim_of_a_long_document(operators: ctypes.CDLL) -> None:
    random = np.random.default_rng(13)
    offsets = np.array([0, 8192, 8193])
    query = random.standard_normal((32, 128)).astype(np.float32)
    documents = random.standard_normal((8193, 128)).astype(np.float32)
    documents[8191] = 5 * query[31]  # the best of all is the last
    found = late_interaction(operators, query, documents, offsets)
    assert (np.abs(found - maxsim(query, documents, offsets)) <= maxsim_tolerance(query, documents, offsets)).all()


def test_functions_of_vectors() -> None:
    operators = load_library()
    x = np.linspace(-20, 20, 40_000, dtype=np.float32)
    wide = x.astype(np.float64)
    exact = (np.exp(wide), *(ACTIVATIONS[name](wide) for name in ("gelu", "gelu_tanh", "silu")))
    for number, (expected, relative, absolute) in enumerate(
        zip(exact, (2e-7, 2e-7, 2e-7, 2e-7), (0, 5e-6, 8e-7, 8e-7), strict=True)
    ):
        found = np.empty_like(x)
        operators.rtx_map(number, pointer(x), ctypes.c_int64(len(x)), pointer(found))
        assert (np.abs(found - expected) <= relative * np.abs(expected) + absolute).all(), number
    edges = np.array([np.nan, np.inf, -np.inf, 0, 89, -200, 88.7, -87.3], dtype=np.float32)
    found = np.empty_like(edges)
    operators.rtx_map(0, pointer(edges), ctypes.c_int64(len(edges)), pointer(found))
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(found, np.exp(edges), rtol=1e-5, atol=1e-37)


# -- in ONNX Runtime -----------------------------------------------------------------------------------------------


def session(
    node: Any,
    inputs: dict[str, tuple[int, list[Any]]],
    constants: dict[str, NDArray[Any]],
    kind: int = TensorProto.FLOAT,
) -> Any:
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name in node.output if name],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library_file()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def linear_node(*inputs: str, outputs: int = 1, **attributes: Any) -> Any:
    plain = {"in_features": 8, "activation": "", "gated": 0, "norm": "", "norm_at": "output", "epsilon": EPSILON}
    names = [f"y{place}" for place in range(outputs)]
    return helper.make_node("Int8Linear", list(inputs), names, domain=DOMAIN, **{**plain, **attributes})


@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_in_a_graph(with_bias: bool) -> None:
    random = np.random.default_rng(6)
    weight = quantize_weight(random.standard_normal((40, 56)))
    bias = random.standard_normal(56).astype(np.float32)
    constants = {
        "w": pack_weight(weight),
        "s": weight.scale,
        "c": weight.column_sum,
        **({"b": bias} if with_bias else {}),
    }
    opened = session(
        linear_node("x", *constants, activation="gelu", in_features=40),
        {"x": (TensorProto.FLOAT, ["a", "b", 40])},
        constants,
    )
    x = random.standard_normal((3, 67, 40)).astype(np.float32)
    (found,) = opened.run(None, {"x": x})
    (expected,) = linear(load_library(), x.reshape(-1, 40), weight, bias if with_bias else None, "gelu")
    assert (found == expected.reshape(3, 67, 56)).all()
    assert opened.run(None, {"x": x[:, :0]})[0].shape == (3, 0, 56)


def test_outputs_of_a_graph() -> None:
    random = np.random.default_rng(6)
    weight = quantize_weight(random.standard_normal((40, 56)))
    constants: dict[str, NDArray[Any]] = {"w": pack_weight(weight), "s": weight.scale, "c": weight.column_sum}
    constants |= {"p": np.array([16, 30, 10]), "w": pack_weight(weight, [16, 30, 10])}
    node = linear_node("x", "w", "s", "c", "", "p", outputs=3, in_features=40)
    x = random.standard_normal((2, 20, 40)).astype(np.float32)
    found = session(node, {"x": (TensorProto.FLOAT, ["a", "b", 40])}, constants).run(None, {"x": x})
    (expected,) = linear(load_library(), x.reshape(-1, 40), weight)
    assert (np.concatenate(found, axis=-1) == expected.reshape(2, 20, 56)).all()


@pytest.mark.parametrize("tokens", [3, 700])
def test_norms_of_rows_whose_columns_are_divided_among_threads(tokens: int) -> None:
    random = np.random.default_rng(6)
    weight = quantize_weight(random.standard_normal((1024, 640)))
    factor, bias = random.standard_normal((2, 640)).astype(np.float32)
    constants: dict[str, NDArray[Any]] = {"w": pack_weight(weight), "s": weight.scale, "c": weight.column_sum}
    constants |= {"f": factor, "g": bias}
    node = linear_node("x", "w", "s", "c", "", "", "r", "f", "g", norm="layer", in_features=1024)
    kinds = {"x": (TensorProto.FLOAT, ["a", 1024]), "r": (TensorProto.FLOAT, ["a", 640])}
    opened = session(node, kinds, constants)
    x, residual = (random.standard_normal((tokens, width)).astype(np.float32) for width in (1024, 640))
    (expected,) = linear(load_library(), x, weight, norm="layer", norm_weight=factor, norm_bias=bias, residual=residual)
    for _ in range(5):
        assert (opened.run(None, {"x": x, "r": residual})[0] == expected).all()
    with pytest.raises(Exception, match="residual: expected as many numbers as the one output has"):
        opened.run(None, {"x": x, "r": residual[:2]})


def test_attention_in_a_graph() -> None:
    names = ["q", "k", "v", "o"]
    given_ = {"heads": 4, "key_heads": 2, "scale": 0.5, "causal": 1, "window": -1, "bfloat16": 0}
    node = helper.make_node("PackedAttention", names, ["y"], domain=DOMAIN, **given_)
    kinds = {name: (TensorProto.FLOAT, ["o", "n", None]) for name in names[:3]}
    opened = session(node, {**kinds, "o": (TensorProto.INT64, ["s"])}, {})
    random = np.random.default_rng(7)
    offsets = np.array([0, 9, 40], dtype=np.int64)
    query = random.standard_normal((40, 4, 8)).astype(np.float32)
    key, value = (random.standard_normal((40, 2, 8)).astype(np.float32) for _ in range(2))
    arrays = {"q": query.reshape(1, 40, 32), "k": key.reshape(1, 40, 16), "v": value.reshape(1, 40, 16), "o": offsets}
    (found,) = opened.run(None, arrays)
    expected = attention(load_library(), query, key, value, offsets, scale=0.5, causal=True)
    assert (found == expected.reshape(1, 40, 32)).all()
    for wrong in ([0, 9, 41], [0, 50, 40], [1, 40], [], [-5, 40]):
        with pytest.raises(Exception, match="offsets"):
            opened.run(None, {**arrays, "o": np.array(wrong, dtype=np.int64)})
    with pytest.raises(Exception, match="PackedAttention: expected query"):
        opened.run(None, {**arrays, "k": arrays["k"][:, :, :8]})


def test_maxsim_in_a_graph() -> None:
    node = helper.make_node("MaxSim", ["q", "d", "o"], ["y"], domain=DOMAIN)
    kinds = {name: (TensorProto.FLOAT, [f"{name}_tokens", None]) for name in "qd"}
    opened = session(node, {**kinds, "o": (TensorProto.INT64, ["n"])}, {})
    random = np.random.default_rng(14)
    # So many that threads share them, and of so different lengths that shares differ.
    offsets = np.cumsum([0, *random.integers(0, 90, 300)])
    query = random.standard_normal((20, 48)).astype(np.float32)
    documents = random.standard_normal((offsets[-1], 48)).astype(np.float32)
    (found,) = opened.run(None, {"q": query, "d": documents, "o": offsets})
    assert (found == late_interaction(load_library(), query, documents, offsets)).all()
    assert opened.run(None, {"q": query, "d": documents[:0], "o": offsets[:1]})[0].shape == (0,)
    for wrong in (offsets[:-1], offsets + 1, offsets[::-1], offsets[:0]):
        with pytest.raises(Exception, match="MaxSim: offsets: expected to rise"):
            opened.run(None, {"q": query, "d": documents, "o": np.ascontiguousarray(wrong)})
    with pytest.raises(Exception, match="MaxSim: expected query and documents"):
        opened.run(None, {"q": query[:, :40], "d": documents, "o": offsets})


def test_rows_are_packed() -> None:
    random = np.random.default_rng(11)
    mask = random.integers(0, 2, (5, 9))
    mask[1] = 0
    ids, types = random.integers(0, 100, (2, 5, 9))
    kinds = {name: (TensorProto.INT64, ["a", "b"]) for name in ("m", "i", "t")}
    names = ["o", "p", "ids", "types"]
    node = helper.make_node("PackRows", ["m", "i", "", "t"], ["o", "p", "ids", "", "types"], domain=DOMAIN, first=2)
    opened = session(node, kinds, {}, TensorProto.INT64)
    found = dict(zip(names, opened.run(names, {"m": mask, "i": ids, "t": types}), strict=True))
    expected = pack_rows(mask, ids, types, first=2)
    assert found["o"].tolist() == expected.offsets.tolist()
    for name, rows in zip(names[1:], (expected.positions, *expected.packed), strict=True):
        assert found[name].tolist() == [rows.tolist()]
    nothing = opened.run(names, {"m": 0 * mask, "i": ids, "t": types})
    assert [one.shape for one in nothing] == [(6,), (1, 0), (1, 0), (1, 0)]
    with pytest.raises(Exception, match="PackRows: rows: expected the shape of the mask"):
        opened.run(names, {"m": mask, "i": ids[:, :3], "t": types})


def test_embedding_and_pooling_in_a_graph() -> None:
    random = np.random.default_rng(8)
    table = quantize_rows(random.standard_normal((50, 16)))
    constants: dict[str, NDArray[Any]] = {"t": table.values, "s": table.scale}
    node = helper.make_node("Int8Embedding", ["t", "s", "i"], ["y"], domain=DOMAIN, norm="", epsilon=0.0)
    opened = session(node, {"i": (TensorProto.INT64, ["a", "b"])}, constants)
    ids = random.integers(0, 50, (2, 5))
    (found,) = opened.run(None, {"i": ids})
    assert (found == table.dequantize()[ids]).all()
    for wrong in (-1, 50):
        with pytest.raises(Exception, match=f"ids: expected 0 to 49, got {wrong}"):
            opened.run(None, {"i": np.array([[3, wrong]])})
    node = helper.make_node("PackedPool", ["x", "o"], ["y"], domain=DOMAIN, mode="mean")
    kinds = {"x": (TensorProto.FLOAT, ["a", "b", 16]), "o": (TensorProto.INT64, ["c"])}
    opened = session(node, kinds, {})
    offsets = np.array([0, 4, 10])
    (pooled,) = opened.run(None, {"x": found, "o": offsets})
    np.testing.assert_allclose(pooled, packed_pool(found.reshape(10, 16), offsets, "mean"), atol=1e-6)
    with pytest.raises(Exception, match="PackedPool: offsets: expected to rise"):
        opened.run(None, {"x": found, "o": offsets + 1})
    with pytest.raises(Exception, match=r"mode: expected cls, max, .* got middle"):
        session(helper.make_node("PackedPool", ["x", "o"], ["y"], domain=DOMAIN, mode="middle"), kinds, {})


def test_a_graph_that_does_not_fit_is_refused_when_it_is_loaded() -> None:
    weight = quantize_weight(np.eye(8))
    constants: dict[str, NDArray[Any]] = {"w": pack_weight(weight), "s": weight.scale, "c": weight.column_sum}
    inputs: dict[str, tuple[int, list[Any]]] = {"x": (TensorProto.FLOAT, ["a", 8])}

    def refused(message: str, node: Any, **others: NDArray[Any]) -> None:
        with pytest.raises(Exception, match=message):
            session(node, inputs, {**constants, **others})

    plain = ("x", "w", "s", "c")
    refused("activation: expected gelu, gelu_tanh or silu, got tanh", linear_node(*plain, activation="tanh"))
    refused("norm: expected layer or rms, got batch", linear_node(*plain, norm="batch"))
    refused("norm_at: expected input or output, got top", linear_node(*plain, norm_at="top"))
    lowest = pack_weight(weight)
    lowest[0, 1, 7, 3] = -128
    refused("values: expected integers from -127 to 127", linear_node(*plain), w=lowest)
    refused("values: expected 1024 of them for 8 in_features and 8 outputs", linear_node(*plain), w=lowest[:, :3])
    refused("in_features: expected 1 to 65536", linear_node(*plain, in_features=65537))
    refused("column_sum: expected 8 numbers", linear_node(*plain), c=weight.scale[:3])
    halves = linear_node(*plain, "", "p", gated=1)
    refused("split: expected parts that make up 8", halves, p=np.array([4, 5]))
    refused("split: .*two equal halves if gated", halves, p=np.array([3, 5]))
    refused("split: expected at most 3 outputs", linear_node(*plain, "", "p"), p=np.array([2, 2, 2, 2]))
    some = {name: array for name, array in constants.items() if name != "w"}
    with pytest.raises(Exception, match="input 1: expected a constant"):
        session(linear_node(*plain), {**inputs, "w": (TensorProto.INT8, [1, 16, 16, 4])}, some)
    opened = session(linear_node(*plain), {"x": (TensorProto.FLOAT, ["a", "b"])}, constants)
    with pytest.raises(Exception, match="Int8Linear: x: expected a last dimension of 8"):
        opened.run(None, {"x": np.zeros((2, 5), dtype=np.float32)})


# -- the library ---------------------------------------------------------------------------------------------------


def test_the_best_instruction_set_is_one_of_those_that_run() -> None:
    assert best_isa() in available()
    assert load_library().rtx_use_isa(99) == 1
    assert library.use_isa(None) == best_isa()
    assert library.use_isa("portable") == library.use_isa(None) == "portable"
    assert library.use_isa(best_isa()) == best_isa()


def test_without_a_library_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library_file", lambda: None)
    assert library.best_isa() is None
    with pytest.raises(FileNotFoundError, match="needs a C\\+\\+ compiler"):
        library.load_library()
