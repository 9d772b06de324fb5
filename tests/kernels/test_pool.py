"""The reference of `pool`, against values worked out by hand and against the op in PyTorch and ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rtx.kernels.pool import MODES, l2_normalize, pool, truncate

# Sums of at most 9 products of magnitude 1: a float32 sum of n terms is off by at most n * 2^-24 of their sum.
TOLERANCE = 9 * 2.0**-24 * 9

HIDDEN = np.array([[[1.0, -8.0], [2.0, 4.0], [4.0, 1.0], [100.0, -100.0]]], dtype=np.float32)
MASK = np.array([[1, 1, 1, 0]], dtype=np.int64)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("cls", [1.0, -8.0]),
        ("lasttoken", [4.0, 1.0]),
        ("max", [4.0, 4.0]),
        ("mean", [7 / 3, -1.0]),
        ("mean_sqrt_len_tokens", [7 / 3**0.5, -3 / 3**0.5]),
        ("weightedmean", [(1 * 1 + 2 * 2 + 3 * 4) / 6, (1 * -8 + 2 * 4 + 3 * 1) / 6]),
    ],
)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_each_mode_by_hand(mode: str, expected: list[float], padding: str) -> None:
    hidden, mask = (HIDDEN, MASK) if padding == "right" else (np.roll(HIDDEN, 1, axis=1), np.roll(MASK, 1, axis=1))
    result = pool(hidden, mask, [mode])
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, [expected], rtol=1e-6)


def test_modes_are_concatenated_in_the_order_given() -> None:
    result = pool(HIDDEN, MASK, ["lasttoken", "cls"])
    np.testing.assert_array_equal(result, [[4.0, 1.0, 1.0, -8.0]])


def test_a_left_out_prompt_keeps_the_positions_of_the_other_tokens() -> None:
    mask = np.array([[0, 1, 1, 0]])
    weighted = pool(HIDDEN, mask, ["weightedmean"], attention_mask=MASK)
    np.testing.assert_allclose(weighted, [[(2 * 2 + 3 * 4) / 5, (2 * 4 + 3 * 1) / 5]], rtol=1e-6)
    np.testing.assert_array_equal(pool(HIDDEN, mask, ["cls"], attention_mask=MASK), [[2.0, 4.0]])


@pytest.mark.parametrize("mode", MODES)
def test_nan_under_the_mask_counts_for_nothing(mode: str) -> None:
    poisoned = HIDDEN.copy()
    poisoned[:, 3] = np.nan
    np.testing.assert_array_equal(pool(poisoned, MASK, [mode]), pool(HIDDEN, MASK, [mode]))


@pytest.mark.parametrize("mode", MODES)
def test_a_row_without_tokens_gives_zeros(mode: str) -> None:
    np.testing.assert_array_equal(pool(HIDDEN, np.zeros_like(MASK), [mode]), np.zeros((1, 2)))


def test_sums_are_in_float32_whatever_comes_in() -> None:
    hidden = np.full((1, 4096, 1), 16.0, dtype=np.float16)
    # 4096 * 16 is beyond the largest float16, 65504.
    np.testing.assert_array_equal(pool(hidden, np.ones((1, 4096), dtype=np.int64), ["mean"]), [[16.0]])


@pytest.mark.parametrize("modes", [[], ["mean", "median"]])
def test_unknown_modes_are_named(modes: list[str]) -> None:
    with pytest.raises(ValueError, match=f"expected one or more of cls, .* got {modes[-1] if modes else 'none'}"):
        pool(HIDDEN, MASK, modes)


def test_l2_normalize_leaves_a_zero_vector_at_zero() -> None:
    vectors = np.array([[3.0, 4.0], [0.0, 0.0]], dtype=np.float32)
    np.testing.assert_allclose(l2_normalize(vectors), [[0.6, 0.8], [0.0, 0.0]], rtol=1e-7)


def test_truncate_cuts_and_normalises_again() -> None:
    vectors = np.array([[3.0, 4.0, 12.0]], dtype=np.float32) / 13
    np.testing.assert_allclose(truncate(vectors, 2, normalize=True), [[0.6, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(truncate(vectors, 2, normalize=False), [[3 / 13, 4 / 13]], rtol=1e-6)
    for dimension in (0, 4):
        with pytest.raises(ValueError, match=f"expected 1 to 3, got {dimension}"):
            truncate(vectors, dimension, normalize=True)


def _batch(rows: int, tokens: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Hidden states, and masks with padding on either side, a prompt left out and an empty row."""
    random = np.random.default_rng(seed)
    hidden = random.standard_normal((rows, tokens, 6)).astype(np.float32)
    attention = np.zeros((rows, tokens), dtype=np.int64)
    pooling = np.zeros((rows, tokens), dtype=np.int64)
    for row in range(rows):
        length = int(random.integers(1, tokens + 1))
        start = 0 if row % 2 else tokens - length
        attention[row, start : start + length] = 1
        pooling[row, start + int(random.integers(0, length)) : start + length] = 1
    pooling[0] = 0
    return hidden, attention, pooling


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prompt", ["pooled", "left out"])
def test_torch_pool_agrees_with_the_reference(mode: str, prompt: str) -> None:
    torch = pytest.importorskip("torch")
    from rtx.trainer import pooling

    hidden, attention, mask = _batch(7, 9)
    tensors = [torch.from_numpy(array) for array in (hidden, attention, mask)]
    if prompt == "pooled":
        expected, found = pool(hidden, attention, [mode]), pooling.pool(tensors[0], tensors[1], [mode])
    else:
        expected = pool(hidden, mask, [mode], attention_mask=attention)
        found = pooling.pool(tensors[0], tensors[1], [mode], pooling_mask=tensors[2])
        assert not expected[0].any()
    np.testing.assert_allclose(found.numpy(), expected, atol=TOLERANCE)


def test_torch_pool_ignores_nan_under_the_mask_and_sums_in_float32() -> None:
    torch = pytest.importorskip("torch")
    from rtx.trainer import pooling

    hidden, attention, _ = _batch(5, 9)
    hidden[attention == 0] = np.nan
    low = torch.from_numpy(hidden).to(torch.bfloat16)
    found = pooling.pool(low, torch.from_numpy(attention), MODES)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), pool(low.float().numpy(), attention, MODES), atol=TOLERANCE)


def test_a_gradient_flows_to_pooled_tokens_alone() -> None:
    torch = pytest.importorskip("torch")
    from rtx.trainer import pooling

    array, attention, mask = _batch(5, 9)
    hidden = torch.from_numpy(array).requires_grad_()
    pooling.pool(hidden, torch.from_numpy(attention), MODES, pooling_mask=torch.from_numpy(mask)).sum().backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()
    moved = (hidden.grad != 0).any(dim=-1).numpy()
    np.testing.assert_array_equal(moved, mask != 0)


def test_torch_pool_traces_once_for_all_shapes_and_runs_in_onnx_runtime() -> None:
    torch = pytest.importorskip("torch")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from rtx.trainer import pooling

    class Pool(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, hidden: Any, attention_mask: Any, pooling_mask: Any) -> Any:
            return pooling.l2_normalize(pooling.pool(hidden, attention_mask, MODES, pooling_mask=pooling_mask))

    rows, tokens = torch.export.Dim("rows"), torch.export.Dim("tokens")
    arguments = tuple(torch.from_numpy(array) for array in _batch(3, 5))
    shapes = ({0: rows, 1: tokens},) * 3
    program = torch.onnx.export(
        Pool().eval(), arguments, dynamo=True, opset_version=20, dynamic_shapes=shapes, verbose=False
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    for rows_of_batch, tokens_of_batch in ((1, 1), (4, 8), (9, 3)):
        hidden, attention, mask = _batch(rows_of_batch, tokens_of_batch, seed=rows_of_batch)
        (found,) = session.run(None, dict(zip(names, (hidden, attention, mask), strict=True)))
        expected = l2_normalize(pool(hidden, mask, MODES, attention_mask=attention))
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)
