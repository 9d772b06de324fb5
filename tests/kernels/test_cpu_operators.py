"""The operators in C++ against their references, on every instruction set of this machine, and in ONNX Runtime."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from rtx.kernels import library
from rtx.kernels.int8_linear import Int8Weight, int8_linear, quantize_weight
from rtx.kernels.library import DOMAIN, ISAS, best_isa, library_file, load_library
from rtx.kernels.packed_attention import packed_attention

pytestmark = pytest.mark.skipif(library_file() is None, reason="the operators were not built")

FLOAT_STEP = 2.0**-23
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
) -> NDArray[np.float32]:
    rows, columns = weight.values.shape
    y = np.full((len(x), columns), np.nan, dtype=np.float32)
    arrays = (np.ascontiguousarray(x), weight.values, weight.scale, weight.column_sum, bias)
    sizes = (ctypes.c_int64(size) for size in (len(x), rows, columns))
    operators.rtx_int8_linear(*map(pointer, arrays), list(ACTIVATIONS).index(activation), *sizes, pointer(y))
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
) -> NDArray[np.float32]:
    y = np.full_like(query, np.nan)
    sizes = (len(offsets) - 1, query.shape[1], key.shape[1], query.shape[2])
    operators.rtx_packed_attention(
        *map(pointer, (query, key, value, offsets)),
        *(ctypes.c_int64(size) for size in sizes),
        ctypes.c_float(scale),
        int(causal),
        ctypes.c_int64(window),
        pointer(y),
    )
    return y


def assert_linear(
    operators: ctypes.CDLL, x: NDArray[np.float32], weight: Int8Weight, bias: NDArray[np.float32] | None = None
) -> None:
    """Integers are the same. What is done with them in float32 is five operations, each of which rounds once, on
    numbers that are at most the result, the centre's share and the bias together: these may cancel each other.
    """
    expected = int8_linear(x, weight, bias)
    centre = (x.max(axis=1, keepdims=True) + x.min(axis=1, keepdims=True)) / 2
    size = np.abs(expected) + 2 * np.abs(centre * weight.column_sum) + (0 if bias is None else 2 * np.abs(bias))
    assert (np.abs(linear(operators, x, weight, bias) - expected) <= 5 * FLOAT_STEP * size).all()


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
        found = linear(operators, poisoned, weight)
        assert np.isnan(found[6]).all() or not np.isfinite(found[6]).any()
        others = [row for row in range(9) if row != 6]
        assert (found[others] == linear(operators, x, weight)[others]).all()


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name])
def test_activations(operators: ctypes.CDLL, activation: str) -> None:
    random = np.random.default_rng(2)
    x = random.standard_normal((37, 40)).astype(np.float32)
    weight = quantize_weight(random.standard_normal((40, 35)))
    plain = int8_linear(x, weight).astype(np.float64)
    found = linear(operators, x, weight, activation=activation)
    np.testing.assert_allclose(found, ACTIVATIONS[activation](plain), atol=5e-6)


def test_a_token_is_the_same_in_every_batch(operators: ctypes.CDLL) -> None:
    random = np.random.default_rng(3)
    x = random.standard_normal((101, 96)).astype(np.float32)
    weight = quantize_weight(random.standard_normal((96, 80)))
    together = linear(operators, x, weight, activation="gelu")
    alone = np.concatenate([linear(operators, row[None], weight, activation="gelu") for row in x])
    assert (together == alone).all()


@pytest.mark.parametrize("heads", [(4, 4, 32), (6, 2, 40), (2, 1, 1), (3, 3, 130)])
@pytest.mark.parametrize("seen", [{}, {"causal": True}, {"window": 0}, {"window": 20}, {"window": 7, "causal": True}])
def test_attention_is_the_reference(operators: ctypes.CDLL, heads: tuple[int, int, int], seen: dict[str, Any]) -> None:
    number, key_heads, width = heads
    random = np.random.default_rng(4)
    offsets = np.cumsum([0, 5, 1, 16, 0, 77, 33]).astype(np.int64)
    query = 3 * random.standard_normal((offsets[-1], number, width)).astype(np.float32)
    key, value = (random.standard_normal((offsets[-1], key_heads, width)).astype(np.float32) for _ in range(2))
    scale = width**-0.5
    found = attention(operators, query, key, value, offsets, scale=scale, **seen)
    expected = packed_attention(query, key, value, offsets, scale=scale, **seen)
    sizes = 2 * width * scale * np.abs(query).max() * np.abs(key).max() + 77
    assert np.abs(found - expected).max() <= sizes * FLOAT_STEP * np.abs(value).max()
    # The rows of a sequence are the same to the last bit, whatever is beside it.
    start, stop = offsets[4], offsets[5]
    sides = [side[start:stop] for side in (query, key, value)]
    alone = attention(operators, *sides, np.array([0, stop - start]), scale=scale, **seen)
    assert (found[start:stop] == alone).all()


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


def test_functions_of_vectors() -> None:
    operators = load_library()
    x = np.linspace(-20, 20, 40_000, dtype=np.float32)
    wide = x.astype(np.float64)
    error = np.vectorize(math.erf)
    exact = (np.exp(wide), error(wide), *(ACTIVATIONS[name](wide) for name in ("gelu", "gelu_tanh", "silu")))
    for number, (expected, relative, absolute) in enumerate(
        zip(exact, (2e-7, 0, 2e-7, 2e-7, 2e-7), (0, 4e-7, 8e-7, 8e-7, 8e-7), strict=True)
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


def session(node: Any, inputs: dict[str, tuple[int, list[Any]]], constants: dict[str, NDArray[Any]]) -> Any:
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library_file()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_in_a_graph(with_bias: bool) -> None:
    random = np.random.default_rng(6)
    weight = quantize_weight(random.standard_normal((40, 56)))
    bias = random.standard_normal(56).astype(np.float32)
    constants = {"w": weight.values, "s": weight.scale, "c": weight.column_sum, **({"b": bias} if with_bias else {})}
    node = helper.make_node("Int8Linear", ["x", *constants], ["y"], domain=DOMAIN, activation="gelu")
    opened = session(node, {"x": (TensorProto.FLOAT, ["a", "b", 40])}, constants)
    x = random.standard_normal((3, 67, 40)).astype(np.float32)
    (found,) = opened.run(None, {"x": x})
    expected = linear(load_library(), x.reshape(-1, 40), weight, bias if with_bias else None, "gelu")
    assert (found == expected.reshape(3, 67, 56)).all()
    assert opened.run(None, {"x": x[:, :0]})[0].shape == (3, 0, 56)


def test_attention_in_a_graph() -> None:
    names = ["q", "k", "v", "o"]
    node = helper.make_node("PackedAttention", names, ["y"], domain=DOMAIN, scale=0.5, causal=1, window=-1)
    kinds = {name: (TensorProto.FLOAT, ["n", None, "w"]) for name in names[:3]}
    opened = session(node, {**kinds, "o": (TensorProto.INT64, ["s"])}, {})
    random = np.random.default_rng(7)
    offsets = np.array([0, 9, 40], dtype=np.int64)
    query = random.standard_normal((40, 4, 8)).astype(np.float32)
    key, value = (random.standard_normal((40, 2, 8)).astype(np.float32) for _ in range(2))
    given_ = {"q": query, "k": key, "v": value, "o": offsets}
    (found,) = opened.run(None, given_)
    assert (found == attention(load_library(), query, key, value, offsets, scale=0.5, causal=True)).all()
    for wrong in ([0, 9, 41], [0, 50, 40], [1, 40], [], [-5, 40]):
        with pytest.raises(Exception, match="offsets"):
            opened.run(None, {**given_, "o": np.array(wrong, dtype=np.int64)})
    with pytest.raises(Exception, match="PackedAttention: expected query"):
        opened.run(None, {**given_, "k": key[:, :, :4]})


def test_a_graph_that_does_not_fit_is_refused_when_it_is_loaded() -> None:
    weight = quantize_weight(np.eye(8))
    constants: dict[str, NDArray[Any]] = {"w": weight.values, "s": weight.scale, "c": weight.column_sum}
    inputs: dict[str, tuple[int, list[Any]]] = {"x": (TensorProto.FLOAT, ["a", 8])}

    def node(**attributes: Any) -> Any:
        return helper.make_node("Int8Linear", ["x", "w", "s", "c"], ["y"], domain=DOMAIN, **attributes)

    with pytest.raises(Exception, match="activation: expected gelu, gelu_tanh or silu, got tanh"):
        session(node(activation="tanh"), inputs, constants)
    with pytest.raises(Exception, match="values: expected bytes from 1 to 255"):
        session(node(activation=""), inputs, {**constants, "w": np.zeros((8, 8), dtype=np.uint8)})
    with pytest.raises(Exception, match="values: expected at most 65536 rows"):
        session(node(activation=""), inputs, {**constants, "w": np.ones((65537, 8), dtype=np.uint8)})
    with pytest.raises(Exception, match="one number for each of 8 columns"):
        session(node(activation=""), inputs, {**constants, "s": weight.scale[:3]})
    some = {name: array for name, array in constants.items() if name != "w"}
    with pytest.raises(Exception, match="input 1: expected a constant"):
        session(node(activation=""), {**inputs, "w": (TensorProto.UINT8, [8, 8])}, some)
    opened = session(node(activation=""), {"x": (TensorProto.FLOAT, ["a", "b"])}, constants)
    with pytest.raises(Exception, match="Int8Linear: x: expected a last dimension of 8"):
        opened.run(None, {"x": np.zeros((2, 5), dtype=np.float32)})


# -- the library ---------------------------------------------------------------------------------------------------


def test_the_best_instruction_set_is_one_of_those_that_run() -> None:
    assert best_isa() in available()
    assert load_library().rtx_use_isa(99) == 1


def test_without_a_library_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library_file", lambda: None)
    assert library.best_isa() is None
    with pytest.raises(FileNotFoundError, match="needs a C\\+\\+ compiler"):
        library.load_library()
