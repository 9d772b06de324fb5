"""`int8_linear` in Triton's interpreter, against integers in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from rtx.kernels.gpu.add_norm_quantize import add_norm_quantize
from rtx.kernels.gpu.int8_linear import ACTIVATIONS, MOST_INPUTS, int8_linear, transpose_weight
from rtx.kernels.int8_linear import multiply_rows, quantize_weight, rows_bound
from rtx.kernels.rounding import Rounding

# The interpreter computes activations for columns beyond the last, too, and NumPy tells of exp's overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Few tokens, many tokens; widths that no block divides, and some that it does.
SHAPES = [(1, 1, 1), (5, 33, 7), (3, 384, 130), (70, 160, 130), (130, 16, 200), (66, 33, 65)]


def _inputs(tokens: int, inputs: int, outputs: int) -> tuple[Any, Any, Any, Any, Any]:
    """Scales that bring most sums to between -4 and 4, where activations bend."""
    random = np.random.default_rng([tokens, inputs, outputs])
    xq = random.integers(-127, 128, (tokens, inputs), dtype=np.int8)
    wq = random.integers(-127, 128, (outputs, inputs), dtype=np.int8)
    scale_x = (random.uniform(0.5, 2, tokens) / 73 / inputs**0.5).astype(np.float32)
    scale_w = (random.uniform(0.5, 2, outputs) / 73).astype(np.float32)
    bias = random.standard_normal(outputs).astype(np.float32)
    return tuple(torch.from_numpy(array) for array in (xq, scale_x, wq, scale_w, bias))  # type: ignore[return-value]


def _activate(values: Any, activation: str) -> Any:
    if activation == "none":
        return values
    if activation == "silu":
        return functional.silu(values)
    return functional.gelu(values, approximate="tanh" if activation == "gelu_tanh" else "none")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_everything_agrees_with_exact_integers(
    activation: str, kind: torch.dtype, rounding: Callable[[torch.dtype], Rounding]
) -> None:
    for shape in SHAPES:
        xq, scale_x, wq, scale_w, bias = _inputs(*shape)
        bias = bias.to(kind)
        found = int8_linear(xq, scale_x, wq, scale_w, bias, activation=activation, dtype=kind)
        assert found.dtype == kind
        wide = bias.double().numpy()
        before = multiply_rows(xq.numpy(), scale_x.numpy(), wq.numpy(), scale_w.numpy(), wide)
        bound = torch.from_numpy(rows_bound(before, wide, activated=activation != "none"))
        expected = _activate(torch.from_numpy(before), activation)
        relative, absolute = rounding(kind)
        allowed = bound * (1 + relative) + relative * expected.abs() + absolute
        assert ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_exact(shape: tuple[int, int, int]) -> None:
    xq, scale_x, wq, scale_w, _ = _inputs(*shape)
    found = int8_linear(xq, torch.ones_like(scale_x), wq, torch.ones_like(scale_w), dtype=torch.float32)
    # 384 * 127 * 127 < 2**24: float32 holds each of the sums.
    expected = xq.numpy().astype(np.int64) @ wq.numpy().astype(np.int64).T
    np.testing.assert_array_equal(found.numpy(), expected)


def test_the_largest_sum_fits() -> None:
    xq = torch.full((1, MOST_INPUTS), -128, dtype=torch.int8)
    found = int8_linear(xq, torch.ones(1), xq, torch.ones(1), dtype=torch.float32)
    assert found.item() == float(np.float32(MOST_INPUTS * 128**2))
    assert MOST_INPUTS * 128**2 < 2**31 <= (MOST_INPUTS + 1) * 128**2


@pytest.mark.parametrize("inputs", [33, 64])
def test_a_quantised_weight_and_quantised_rows_give_the_layer(inputs: int) -> None:
    random = np.random.default_rng(inputs)
    x = torch.from_numpy(random.standard_normal((4, inputs))).float()
    matrix = random.standard_normal((inputs, 21)).astype(np.float32)
    bias = torch.from_numpy(random.standard_normal(21)).float()
    weight = quantize_weight(matrix)
    values = torch.from_numpy(weight.values)
    wq, scale_w = transpose_weight(values), torch.from_numpy(weight.scale)
    assert wq.is_contiguous()
    np.testing.assert_array_equal(wq.numpy().T, weight.values.astype(np.int16) - 128)
    assert torch.equal(values, torch.from_numpy(weight.values))

    rows = add_norm_quantize(x, None, torch.ones(inputs), norm="rms_norm", epsilon=1e-6, give_y=True)
    found = int8_linear(rows.codes, rows.scale, wq, scale_w, bias, dtype=torch.float32)
    wide = bias.double().numpy()
    expected = multiply_rows(rows.codes.numpy(), rows.scale.numpy(), wq.numpy(), scale_w.numpy(), wide)
    assert (np.abs(found.double().numpy() - expected) <= rows_bound(expected, wide)).all()

    # Without a centre, too, only the roundings to 8 bits differ from the layer (the bound of the contract).
    assert rows.y is not None
    y, scale = rows.y.double().numpy(), rows.scale.double().numpy()[:, None]
    layer = y @ matrix.astype(np.float64) + bias.double().numpy()
    steps = np.abs(y).sum(axis=1, keepdims=True) * weight.scale / 2 + np.abs(matrix).sum(axis=0) * scale / 2
    steps = steps + inputs * scale * weight.scale / 4
    off = np.abs(expected - layer)
    assert (off <= steps * 1.001).all()
    assert off.max() > 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_token_has_the_same_bits_alone_and_in_any_batch(activation: str) -> None:
    xq, scale_x, wq, scale_w, bias = _inputs(70, 160, 130)
    batch = int8_linear(xq, scale_x, wq, scale_w, bias, activation=activation)
    for rows in (slice(0, 1), slice(69, 70), slice(3, 20), slice(0, 65)):
        found = int8_linear(xq[rows], scale_x[rows], wq, scale_w, bias, activation=activation)
        assert torch.equal(found, batch[rows])
    one = int8_linear(xq[0], scale_x[0], wq, scale_w, bias, activation=activation)
    assert torch.equal(one, batch[0])
    folded = int8_linear(xq.reshape(2, 35, 160), scale_x.reshape(2, 35), wq, scale_w, bias, activation=activation)
    assert torch.equal(folded, batch.reshape(2, 35, 130))


def test_nan_for_a_scale_is_nan_for_its_token_alone() -> None:
    xq, scale_x, wq, scale_w, _ = _inputs(5, 33, 7)
    scale_x[2] = float("nan")
    found = int8_linear(xq, scale_x, wq, scale_w)
    assert found.isnan().all(dim=1).tolist() == [False, False, True, False, False]
    assert found.isnan().sum() == 7


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_from_zero_stay_finite(activation: str) -> None:
    xq = torch.tensor([[127], [-127]], dtype=torch.int8)
    one = torch.ones(1, 1, dtype=torch.int8)
    found = int8_linear(xq, torch.ones(2), one, torch.full((1,), 1e3), activation=activation, dtype=torch.float32)
    assert found.tolist() == [[127000.0], [-127000.0 if activation == "none" else 0.0]]


def test_nothing_in_gives_nothing() -> None:
    _, _, wq, scale_w, bias = _inputs(1, 33, 7)
    empty = torch.zeros(0, 33, dtype=torch.int8)
    assert int8_linear(empty, torch.zeros(0), wq, scale_w, bias).shape == (0, 7)


def test_wrong_arguments_are_named() -> None:
    right = dict(zip(("xq", "scale_x", "wq", "scale_w", "bias"), _inputs(5, 33, 7), strict=True))
    wrong: list[tuple[str, dict[str, Any]]] = [
        (r"xq: expected \[\.\.\., 1 to 131071\] int8, .* got \[5, 33\] uint8", {"xq": right["xq"].view(torch.uint8)}),
        (r"xq: .* got \[33, 5\] int8 on cpu, not contiguous", {"xq": right["xq"].T}),
        (r"xq: .* got \[1, 131072\]", {"xq": torch.zeros(1, MOST_INPUTS + 1, dtype=torch.int8)}),
        (r"scale_x: expected \[5\] float32, .* got \[4\] float32", {"scale_x": right["scale_x"][:4]}),
        (r"scale_x: .* got \[5\] float16", {"scale_x": right["scale_x"].half()}),
        (r"wq: expected \[out, in\] int8, got \[33\]", {"wq": right["wq"][0]}),
        (r"wq: expected \[33, 33\] int8, .* got \[33, 7\] int8 .*not contiguous", {"wq": right["wq"].T}),
        (r"wq: .* on cpu, got \[7, 33\] int8 on meta", {"wq": right["wq"].to("meta")}),
        (r"scale_w: expected \[7\] float32, .* got \[7, 1\]", {"scale_w": right["scale_w"][:, None]}),
        (r"bias: expected \[7\] float32 or .* got \[7\] float64", {"bias": right["bias"].double()}),
        (r"activation: expected one of none, .* got 'relu'", {"activation": "relu"}),
        (r"dtype: expected float32 or float16 or bfloat16, got int8", {"dtype": torch.int8}),
    ]
    for message, arguments in wrong:
        with pytest.raises(ValueError, match=message):
            int8_linear(**{**right, **arguments})
    with pytest.raises(ValueError, match=r"values: expected \[in, out\] uint8, got \[7, 33\] int8"):
        transpose_weight(right["wq"])
