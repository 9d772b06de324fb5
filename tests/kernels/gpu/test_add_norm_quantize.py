"""`add_norm_quantize` in Triton's interpreter, against the reference in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rtx.kernels import add_norm_quantize as reference
from rtx.kernels.gpu.add_norm_quantize import MOST_COLUMNS, add_norm_quantize
from rtx.kernels.int8_linear import SMALLEST_SCALE
from rtx.kernels.rounding import ROUNDING, Rounding

STEP = ROUNDING["float32"].relative
TYPES = [torch.float32, torch.float16, torch.bfloat16]
EPSILON = 1e-5


def _inputs(rows: int, width: int, kind: torch.dtype, mean: float = 0.3) -> tuple[Any, Any, Any, Any]:
    """x and residual [rows, width] off zero, the first row with an outlier; weight and bias [width]."""
    random = np.random.default_rng([rows, width])
    x, residual = (torch.from_numpy(random.standard_normal((rows, width)) + mean).to(kind) for _ in range(2))
    x[0, -1] = 60.0
    weight = torch.from_numpy(random.standard_normal(width)).float()
    bias = torch.from_numpy(random.standard_normal(width)).float()
    return x, residual, weight, bias


def test_the_reference_by_hand() -> None:
    x, residual = np.array([[1.0, 2.0, 3.0, 5.0]]), np.array([[0.0, 1.0, 2.0, 2.0]])
    # The sum is 1, 3, 5, 7: mean 4, variance 5, mean square 21.
    found = reference.add_norm_quantize(x, residual, np.full(4, 5**0.5), norm="layer_norm", epsilon=0.0)
    np.testing.assert_allclose(found.y, [[-3, -1, 1, 3]], rtol=1e-15)
    np.testing.assert_allclose(found.scale, [3 / 127], rtol=1e-7)
    assert found.codes.tolist() == [[-127, -42, 42, 127]]
    found = reference.add_norm_quantize(x, residual, np.full(4, 22**0.5), norm="rms_norm", epsilon=1.0)
    np.testing.assert_allclose(found.y, [[1, 3, 5, 7]], rtol=1e-15)
    assert found.codes.tolist() == [[18, 54, 91, 127]]


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (2, 7), (5, 33), (3, 384), (2, 768)])
def test_everything_given_agrees_with_the_reference(
    kind: torch.dtype, norm: str, rows: int, width: int, rounding: Callable[[torch.dtype], Rounding]
) -> None:
    x, residual, weight, bias = _inputs(rows, width, kind)
    centred = norm == "layer_norm"
    found = add_norm_quantize(
        x, residual, weight, bias if centred else None, norm=norm, epsilon=EPSILON, give_sum=True, give_y=True
    )
    arrays = [tensor.double().numpy() for tensor in (x, residual, weight, bias)]
    expected = reference.add_norm_quantize(
        arrays[0], arrays[1], arrays[2], arrays[3] if centred else None, norm=norm, epsilon=EPSILON
    )
    assert found.sum is not None
    assert found.sum.dtype == kind
    relative, absolute = rounding(kind)
    total = (x.float() + residual.float()).double()
    assert ((found.sum.double() - total).abs() <= relative * total.abs() + absolute).all()
    if kind != torch.bfloat16:
        assert torch.equal(found.sum, total.to(kind))

    bound = reference.bound(expected, arrays[2], norm=norm, epsilon=EPSILON)
    assert found.y is not None
    assert found.y.dtype == kind
    off = np.abs(found.y.double().numpy() - expected.y)
    assert (off <= bound * (1 + relative) + relative * np.abs(expected.y) + absolute).all()

    assert found.scale.dtype == torch.float32
    exact = np.abs(expected.y).max(axis=1) / 127
    scale = found.scale.double().numpy()
    assert (np.abs(scale - exact) <= bound.max(axis=1) / 127 + 2 * STEP * exact).all()
    assert found.codes.dtype == torch.int8
    assert (np.abs(found.codes.numpy()).max(axis=1) == 127).all()
    off = np.abs(found.codes.numpy() * scale[:, None] - expected.y)
    assert (off <= (0.5 + 2.0**-16) * scale[:, None] + bound).all()


@pytest.mark.parametrize("norm", reference.NORMS)
def test_codes_are_those_of_y_in_float32(norm: str) -> None:
    x, residual, weight, _ = _inputs(4, 33, torch.float32)
    found = add_norm_quantize(x, residual, weight, norm=norm, epsilon=EPSILON, give_y=True)
    assert found.y is not None
    assert torch.equal(found.scale, found.y.abs().amax(dim=1) / 127)
    assert torch.equal(found.codes, torch.round(found.y / found.scale[:, None]).to(torch.int8))
    assert found.sum is None
    # In half precision as well: the same numbers, held by wider types.
    half = [tensor.half() for tensor in (x, residual)]
    narrow = add_norm_quantize(half[0], half[1], weight, norm=norm, epsilon=EPSILON, give_y=True)
    wide = add_norm_quantize(half[0].float(), half[1].float(), weight, norm=norm, epsilon=EPSILON)
    assert torch.equal(narrow.codes, wide.codes)
    assert torch.equal(narrow.scale, wide.scale)


def test_codes_round_half_to_even() -> None:
    # Ones have the mean square 1, so that y is the weight and the scale 1.
    weight = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.5, 125.5])
    found = add_norm_quantize(torch.ones(1, 9), None, weight, norm="rms_norm", epsilon=0.0)
    assert found.scale.tolist() == [1.0]
    assert found.codes.tolist() == [[127, 0, 2, 2, 0, -2, 126, -126, 126]]


def test_the_norm_is_of_the_sum_in_float32() -> None:
    # 2049 is no float16: rounded, both columns would be 2048 and y 0.
    x, residual = torch.full((1, 2), 2048.0).half(), torch.tensor([[1.0, 0.0]]).half()
    found = add_norm_quantize(x, residual, torch.ones(2), norm="layer_norm", epsilon=0.0, give_sum=True, give_y=True)
    assert found.sum is not None
    assert found.y is not None
    assert found.sum.tolist() == [[2048.0, 2048.0]]
    assert found.y.tolist() == [[1.0, -1.0]]
    assert found.codes.tolist() == [[127, -127]]


def test_a_mean_far_from_zero_does_not_take_the_variance_with_it() -> None:
    x, residual, weight, bias = _inputs(3, 384, torch.float32, mean=500.0)
    found = add_norm_quantize(x, residual, weight, bias, norm="layer_norm", epsilon=EPSILON, give_y=True)
    arrays = [tensor.numpy() for tensor in (x, residual, weight, bias)]
    expected = reference.add_norm_quantize(
        arrays[0], arrays[1], arrays[2], arrays[3], norm="layer_norm", epsilon=EPSILON
    )
    assert found.y is not None
    assert (
        np.abs(found.y.numpy() - expected.y) <= reference.bound(expected, arrays[2], norm="layer_norm", epsilon=EPSILON)
    ).all()
    # E[x^2] - E[x]^2 would subtract numbers of 10^6, and be off by 1e6 * 2**-24 of a variance of 2.
    assert np.abs(found.y.numpy() - expected.y)[1:].max() < 1e-3


@pytest.mark.parametrize("norm", reference.NORMS)
def test_a_row_of_zeros_has_the_smallest_scale(norm: str) -> None:
    found = add_norm_quantize(torch.zeros(2, 7), None, torch.ones(7), norm=norm, epsilon=EPSILON)
    assert found.codes.tolist() == [[0] * 7] * 2
    assert found.scale.tolist() == [float(np.float32(SMALLEST_SCALE))] * 2


@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_is_not_finite_is_told_by_the_scale_of_its_row_alone(norm: str, poison: float) -> None:
    x, residual, weight, _ = _inputs(3, 7, torch.float32)
    expected = add_norm_quantize(x, residual, weight, norm=norm, epsilon=EPSILON)
    x[1, 2] = poison
    found = add_norm_quantize(x, residual, weight, norm=norm, epsilon=EPSILON)
    assert found.scale.isnan().tolist() == [False, True, False]
    assert found.codes[1].tolist() == [0] * 7
    for row in (0, 2):
        assert torch.equal(found.codes[row], expected.codes[row])
        assert torch.equal(found.scale[row], expected.scale[row])


@pytest.mark.parametrize("norm", reference.NORMS)
def test_a_row_has_the_same_bits_alone(norm: str) -> None:
    x, residual, weight, _ = _inputs(5, 33, torch.bfloat16)
    batch = add_norm_quantize(x, residual, weight, norm=norm, epsilon=EPSILON, give_sum=True, give_y=True)
    for row in range(5):
        alone = add_norm_quantize(x[row], residual[row], weight, norm=norm, epsilon=EPSILON, give_sum=True, give_y=True)
        assert alone.scale.shape == ()
        for one, many in zip(alone, batch, strict=True):
            assert one is not None
            assert many is not None
            assert torch.equal(one, many[row])


def test_no_residual_is_one_of_zeros() -> None:
    x, _, weight, bias = _inputs(2, 33, torch.float16)
    arguments: dict[str, Any] = {"norm": "layer_norm", "epsilon": EPSILON, "give_sum": True, "give_y": True}
    without = add_norm_quantize(x[None], None, weight.half(), bias.half(), **arguments)
    zeros = add_norm_quantize(x[None], torch.zeros_like(x[None]), weight.half(), bias.half(), **arguments)
    assert without.codes.shape == (1, 2, 33)
    assert without.scale.shape == (1, 2)
    for one, other in zip(without, zeros, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    assert without.sum is not None
    assert torch.equal(without.sum, x[None])
    assert add_norm_quantize(x[:0], None, weight, norm="rms_norm", epsilon=EPSILON).codes.shape == (0, 33)


def test_wrong_arguments_are_named() -> None:
    x, residual, weight, bias = _inputs(2, 8, torch.float32)
    wide = torch.zeros(1, MOST_COLUMNS + 1)
    wrong: list[tuple[str, tuple[Any, ...], str]] = [
        (r"norm: expected one of layer_norm, rms_norm, got 'batch_norm'", (x, residual, weight), "batch_norm"),
        (r"bias: expected None, as rms_norm has none, got \[8\]", (x, residual, weight, bias), "rms_norm"),
        (r"x: expected \[\.\.\., 1 to 16384\] .* got \[1, 16385\]", (wide, None, weight), "rms_norm"),
        (r"x: .* got \[2, 8\] int64", (x.long(), residual, weight), "rms_norm"),
        (r"x: .* not contiguous", (x.T.contiguous().T, residual, weight), "rms_norm"),
        (r"residual: expected \[2, 8\] float32, .* got \[1, 8\] float32", (x, residual[:1], weight), "rms_norm"),
        (r"residual: expected \[2, 8\] float32, .* float16", (x, residual.half(), weight), "rms_norm"),
        (r"weight: expected \[8\] float32 or float16 or bfloat16, .* got \[7\]", (x, None, weight[:7]), "rms_norm"),
        (r"weight: .* got \[8\] float64", (x, None, weight.double()), "rms_norm"),
        (r"bias: expected \[8\] .* on cpu, got \[8\] .* meta", (x, None, weight, bias.to("meta")), "layer_norm"),
    ]
    for message, arguments, norm in wrong:
        with pytest.raises(ValueError, match=message):
            add_norm_quantize(*arguments, norm=norm, epsilon=EPSILON)
    with pytest.raises(ValueError, match="norm: expected layer_norm, or rms_norm without a bias, got 'rms_norm'"):
        reference.add_norm_quantize(np.ones((1, 2)), None, np.ones(2), np.ones(2), norm="rms_norm", epsilon=0.0)
