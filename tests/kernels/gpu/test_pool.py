"""`pool` in Triton's interpreter, against the reference in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rtx.kernels import pool as reference
from rtx.kernels.gpu.pool import OUTPUTS, pool
from rtx.kernels.pool import MODES
from rtx.kernels.quantize import quantize_binary, quantize_int8

TYPES = [torch.float32, torch.float16, torch.bfloat16]


def _batch(rows: int, tokens: int, width: int, kind: torch.dtype = torch.float32) -> tuple[Any, Any, Any]:
    """Hidden states, NaN where nothing is pooled; masks with padding on either side, holes, and an empty row."""
    random = np.random.default_rng([rows, tokens, width])
    attention = np.zeros((rows, tokens), dtype=np.int64)
    for row in range(rows):
        length = int(random.integers(1, tokens + 1))
        start = 0 if row % 2 else tokens - length
        attention[row, start : start + length] = 1
    mask = attention * (random.random((rows, tokens)) < 0.8)
    mask[1:2] = 0
    hidden = torch.from_numpy(random.standard_normal((rows, tokens, width)).astype(np.float32)).to(kind)
    hidden[torch.from_numpy(mask == 0)] = np.nan
    return hidden, torch.from_numpy(mask), torch.from_numpy(attention)


def _expected(hidden: Any, mask: Any, mode: str, attention: Any, dimension: int) -> tuple[Any, Any]:
    """The reference's vector, and how far in float32 another one may be from it."""
    arguments = (hidden.float().numpy()[..., :dimension], mask.numpy(), [mode])
    options = {"attention_mask": attention.numpy()}
    return reference.pool(*arguments, **options), reference.bound(*arguments, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_each_mode_agrees_with_the_reference(mode: str, kind: torch.dtype) -> None:
    for shape in ((1, 1, 1), (5, 19, 33), (3, 7, 384)):
        hidden, mask, attention = _batch(*shape, kind)
        found = pool(hidden, mask, mode, attention_mask=attention)
        expected, bound = _expected(hidden, mask, mode, attention, shape[2])
        assert found.dtype == torch.float32
        assert (np.abs(found.numpy() - expected) <= bound).all()
        assert not found[1:2].any()


@pytest.mark.parametrize("mode", MODES)
def test_cut_and_normalised_vectors_agree_with_the_reference(mode: str) -> None:
    hidden, mask, attention = _batch(4, 9, 33)
    for dimension in (1, 7, 32, 33):
        found = pool(hidden, mask, mode, attention_mask=attention, dimension=dimension, normalize=True).numpy()
        pooled, bound = _expected(hidden, mask, mode, attention, dimension)
        expected = reference.l2_normalize(pooled)
        assert (np.abs(found - expected) <= reference.normalized_bound(pooled, bound)).all()
        assert not found[1].any()


def test_columns_behind_the_cut_are_not_read() -> None:
    hidden, mask, _ = _batch(2, 5, 33)
    poisoned = hidden.clone()
    poisoned[..., 7:] = np.nan
    for normalize in (False, True):
        found = [pool(states, mask, "mean", dimension=7, normalize=normalize) for states in (hidden, poisoned)]
        assert torch.equal(*found)


@pytest.mark.parametrize("width", [1, 7, 33, 768])
def test_codes_are_those_of_the_vector(width: int) -> None:
    hidden, mask, _ = _batch(3, 5, width)
    vectors = pool(hidden, mask, "mean", normalize=True)
    codes = {output: pool(hidden, mask, "mean", normalize=True, output=output) for output in OUTPUTS}
    assert {output: code.dtype for output, code in codes.items()} == OUTPUTS
    assert torch.equal(codes["float32"], vectors)
    assert torch.equal(codes["float16"], vectors.half())
    np.testing.assert_array_equal(codes["int8"].numpy(), quantize_int8(vectors.numpy()))
    np.testing.assert_array_equal(codes["binary"].numpy(), quantize_binary(vectors.numpy()))


def test_int8_rounds_half_to_even_and_clips() -> None:
    # The float32 that are nearest to code + 1/2, and their neighbours: 127 * v in float32 would meet the tie itself.
    halves = ((np.arange(-130, 130) + 0.5) / 127).astype(np.float32)
    values = np.concatenate([halves, np.nextafter(halves, np.float32(2)), np.nextafter(halves, np.float32(-2))])
    values = np.concatenate([values, np.array([0.5, -0.5, 1, -1, 3e38, -3e38, 0.0, -0.0], np.float32)])
    hidden, mask = torch.from_numpy(values)[None, None], torch.ones(1, 1, dtype=torch.int64)
    found = pool(hidden, mask, "cls", output="int8").numpy()
    np.testing.assert_array_equal(found, quantize_int8(values[None]))
    assert found[0, -8:].tolist() == [64, -64, 127, -127, 127, -127, 0, 0]
    # 127 * v is exactly a half only where v is a multiple of 1/2: 63.5 has the even neighbour 64, above.


def test_what_has_no_code() -> None:
    hidden = torch.tensor([[[np.nan, np.inf, -np.inf, 0.25]]])
    mask = torch.ones(1, 1, dtype=torch.int64)
    assert pool(hidden, mask, "cls", output="int8").tolist() == [[0, 127, -127, 32]]
    assert pool(hidden, mask, "cls", output="binary").tolist() == [[0b01010000]]
    # A pooled NaN is told, not passed over.
    assert pool(hidden, mask, "max").isnan().tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("mode", MODES)
def test_a_row_has_the_same_bits_alone_and_at_any_padding(mode: str) -> None:
    hidden, mask, attention = _batch(4, 9, 33, torch.float16)
    batch = pool(hidden, mask, mode, attention_mask=attention, normalize=True)
    for row in range(4):
        columns = attention[row].nonzero().squeeze(1)
        alone = [tensor[row : row + 1, columns].contiguous() for tensor in (hidden, mask, attention)]
        for left, right in ((0, 0), (3, 0), (0, 130), (130, 1)):
            padded = [
                torch.nn.functional.pad(tensor, (*((0, 0) if tensor.dim() == 3 else ()), left, right))
                for tensor in alone
            ]
            found = pool(padded[0], padded[1], mode, attention_mask=padded[2], normalize=True)
            assert torch.equal(found, batch[row : row + 1])


def test_sums_are_in_float32_whatever_comes_in() -> None:
    hidden = torch.full((1, 150, 1), 500.0, dtype=torch.float16)
    # 150 * 500 is beyond the largest float16, 65504.
    assert pool(hidden, torch.ones(1, 150, dtype=torch.bool), "mean").tolist() == [[500.0]]


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_masks_of_other_types(kind: torch.dtype) -> None:
    hidden, mask, attention = _batch(3, 9, 7)
    expected = pool(hidden, mask, "weightedmean", attention_mask=attention)
    assert torch.equal(pool(hidden, mask.to(kind), "weightedmean", attention_mask=attention.to(kind)), expected)


def test_no_rows_and_no_tokens() -> None:
    assert pool(torch.zeros(0, 3, 5), torch.zeros(0, 3, dtype=torch.int64), "mean").shape == (0, 5)
    for mode in MODES:
        assert pool(torch.zeros(2, 0, 5), torch.zeros(2, 0, dtype=torch.int64), mode).tolist() == [[0.0] * 5] * 2


def test_wrong_arguments_are_named() -> None:
    hidden, mask = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.int64)
    wrong: list[tuple[str, Any, Any, dict[str, Any]]] = [
        (r"mode: expected one of cls, .* got 'median'", hidden, mask, {"mode": "median"}),
        (r"output: expected one of float32, .* got 'int4'", hidden, mask, {"output": "int4"}),
        (r"hidden: expected \[rows, tokens, width\] .* got \[3, 4\] float32 on cpu", hidden[0], mask, {}),
        (r"hidden: .* got \[2, 3, 4\] float64", hidden.double(), mask, {}),
        (r"hidden: .* not contiguous", hidden.transpose(0, 1).contiguous().transpose(0, 1), mask, {}),
        (r"mask: expected \[2, 3\] of integers, .* got \[2, 2\] int64", hidden, mask[:, :2], {}),
        (r"mask: .* got \[2, 3\] float32", hidden, mask.float(), {}),
        (r"attention_mask: .* got \[1, 3\] int64", hidden, mask, {"attention_mask": mask[:1]}),
        (r"mask: .* on cpu, got \[2, 3\] int64 on meta", hidden, mask.to("meta"), {}),
        (r"dimension: expected 1 to 4, got 0", hidden, mask, {"dimension": 0}),
        (r"dimension: expected 1 to 4, got 5", hidden, mask, {"dimension": 5}),
    ]
    for message, states, given, options in wrong:
        with pytest.raises(ValueError, match=message):
            pool(states, given, **{"mode": "mean", **options})
