"""`packed_attention` in Triton's interpreter, against the reference in NumPy."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from rtx.kernels import packed_attention as reference
from rtx.kernels.gpu.packed_attention import packed_attention
from rtx.kernels.rounding import ROUNDING

TYPES = [torch.float32, torch.float16, torch.bfloat16]


def _batch(lengths: list[int], heads: int, key_heads: int, width: int, kind: torch.dtype) -> tuple[Any, ...]:
    random = torch.Generator().manual_seed(sum(lengths) * 1000 + width)
    sides = (
        torch.randn(sum(lengths), count, width, generator=random).to(kind) for count in (heads, key_heads, key_heads)
    )
    return *sides, torch.tensor(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "heads", "key_heads", "width", "options"),
    [
        ([1, 0, 5], 1, 1, 1, {}),
        ([65, 3], 2, 1, 33, {"causal": True}),
        ([5, 130], 2, 2, 16, {"window": 3}),
        ([70, 17], 3, 1, 96, {"causal": True, "window": 0}),
        ([129], 1, 1, 32, {"causal": True, "window": 40}),
        ([33, 64], 4, 2, 128, {"window": 1000}),
    ],
)
def test_it_agrees_with_the_reference(
    lengths: list[int], heads: int, key_heads: int, width: int, options: dict[str, Any], kind: torch.dtype
) -> None:
    query, key, value, offsets = _batch(lengths, heads, key_heads, width, kind)
    scale = width**-0.5
    found = packed_attention(query, key, value, offsets, scale=scale, **options)
    wide = [side.double().numpy() for side in (query, key, value)]
    expected = reference.packed_attention(wide[0], wide[1], wide[2], offsets.numpy(), scale=scale, **options)
    assert found.dtype == kind
    rounding = ROUNDING[str(kind).removeprefix("torch.")].relative
    bound = reference.bound(wide[0], wide[1], wide[2], scale=scale, longest=max(lengths), rounding=rounding)
    assert np.abs(found.double().numpy() - expected).max() <= bound


@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.float32, {"causal": True, "window": 9}), (torch.float16, {}), (torch.bfloat16, {"window": 5})],
    ids=str,
)
def test_a_sequence_has_the_same_bits_alone_as_in_a_batch(kind: torch.dtype, options: dict[str, Any]) -> None:
    *sides, offsets = _batch([7, 70, 33], 2, 1, 24, kind)
    together = packed_attention(sides[0], sides[1], sides[2], offsets, scale=0.2, **options)
    for start, stop in pairwise(offsets.tolist()):
        alone = [side[start:stop].clone() for side in sides]
        own = torch.tensor([0, stop - start])
        found = packed_attention(alone[0], alone[1], alone[2], own, scale=0.2, longest=100, **options)
        assert torch.equal(found, together[start:stop])


def test_large_scores_do_not_overflow_and_nan_stays_in_its_sequence() -> None:
    query, key, value, offsets = _batch([40, 20], 1, 1, 16, torch.float32)
    right = packed_attention(query, key, value, offsets, scale=1e4)
    assert right.isfinite().all()
    value[45] = np.nan
    found = packed_attention(query, key, value, offsets, scale=1e4)
    assert torch.equal(found[:40], right[:40])
    assert found[40:].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(3, 4)}, r"query: expected \[tokens, heads, 1 to 128\] float16.* got \[3, 4\] float32"),
        ({"query": torch.ones(3, 2, 129)}, r"query: expected .* got \[3, 2, 129\]"),
        ({"query": torch.ones(3, 2, 4, dtype=torch.float64)}, "query: expected .* got .* float64"),
        ({"key": torch.ones(2, 1, 4)}, r"key: expected \[3, key_heads, 4\] float32, .* got \[2, 1, 4\]"),
        ({"key": torch.ones(3, 4, 4), "value": torch.ones(3, 4, 4)}, "key: expected heads that divide .* 2, got 4"),
        ({"value": torch.ones(3, 2, 4)}, r"value: expected .* got \[3, 2, 4\]"),
        ({"value": torch.ones(4, 1, 3).permute(2, 1, 0)}, "value: expected .* not contiguous"),
        ({"offsets": torch.zeros(2)}, r"offsets: expected \[sequences \+ 1\] int64.* got \[2\] float32"),
    ],
)
def test_wrong_arguments(change: dict[str, torch.Tensor], message: str) -> None:
    sides = {"query": torch.ones(3, 2, 4), "key": torch.ones(3, 1, 4), "value": torch.ones(3, 1, 4)}
    arguments = {**sides, "offsets": torch.tensor([0, 3]), **change}
    with pytest.raises(ValueError, match=message):
        packed_attention(**arguments, scale=1.0)  # type: ignore[arg-type]
