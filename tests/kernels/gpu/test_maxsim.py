"""`maxsim` in Triton's interpreter, against the reference in NumPy."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from rtx.kernels import maxsim as reference
from rtx.kernels.gpu.maxsim import maxsim

TYPES = [torch.float32, torch.float16]


def _batch(query_tokens: int, lengths: list[int], dim: int, kind: torch.dtype) -> tuple[Any, Any, Any]:
    random = torch.Generator().manual_seed(query_tokens * 1000 + dim)
    query, documents = (torch.randn(count, dim, generator=random).to(kind) for count in (query_tokens, sum(lengths)))
    return query, documents, torch.tensor(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize(
    ("query_tokens", "lengths", "dim"),
    [(1, [1], 1), (5, [3, 0, 17], 7), (33, [65, 1, 0, 31, 64], 64), (70, [129], 100), (0, [3, 0], 8), (3, [0, 0], 8)],
)
def test_it_agrees_with_the_reference(query_tokens: int, lengths: list[int], dim: int, kind: torch.dtype) -> None:
    query, documents, offsets = _batch(query_tokens, lengths, dim, kind)
    found = maxsim(query, documents, offsets)
    expected = reference.maxsim(query.numpy(), documents.numpy(), offsets.numpy())
    assert found.dtype == torch.float32
    assert (
        np.abs(found.numpy() - expected) <= reference.bound(query.numpy(), documents.numpy(), offsets.numpy())
    ).all()
    assert not found[np.array(lengths) == 0].any()


def test_products_that_are_all_negative_beat_padding() -> None:
    query, documents = torch.ones(3, 5), -torch.ones(4, 5)
    assert maxsim(query, documents, torch.tensor([0, 1, 4])).tolist() == [-15.0, -15.0]


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_a_document_has_the_same_bits_alone_as_in_a_batch(kind: torch.dtype) -> None:
    query, documents, offsets = _batch(33, [65, 7, 100], 33, kind)
    together = maxsim(query, documents, offsets)
    for document, (start, stop) in enumerate(pairwise(offsets.tolist())):
        alone = maxsim(query, documents[start:stop].clone(), torch.tensor([0, stop - start]))
        assert torch.equal(alone, together[document : document + 1])


@pytest.mark.filterwarnings("ignore:invalid value")  # of NumPy, which multiplies in the interpreter
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_product_that_is_not_finite_makes_its_document_nan_and_no_other(value: float) -> None:
    query, documents, offsets = _batch(35, [66, 7, 3], 5, torch.float32)
    right = maxsim(query, documents, offsets)
    documents[65, 2] = value
    found = maxsim(query, documents, offsets)
    assert found.isnan().tolist() == [True, False, False]
    assert torch.equal(found[1:], right[1:])
    query[34, 0] = value
    assert maxsim(query, documents, torch.tensor([0, 66, 66, 76])).isnan().tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(4)}, r"query: expected \[query_tokens, dim\] float16 or float32.* got \[4\] float32"),
        ({"query": torch.ones(2, 4, dtype=torch.float64)}, "query: expected .* got .* float64"),
        ({"query": torch.ones(4, 2).T}, "query: expected .* not contiguous"),
        ({"documents": torch.ones(3, 5)}, r"documents: expected \[tokens, 4\] float32, contiguous, on cpu.* \[3, 5\]"),
        ({"documents": torch.ones(3, 4, dtype=torch.float16)}, "documents: expected .* got .* float16"),
        ({"documents": torch.ones(3, 4, device="meta")}, "documents: expected .* on cpu.* on meta"),
        ({"offsets": torch.zeros(2, dtype=torch.int32)}, r"offsets: expected \[documents \+ 1\] int64.* int32"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, r"offsets: expected .* got \[0\]"),
    ],
)
def test_wrong_arguments(change: dict[str, torch.Tensor], message: str) -> None:
    arguments = {"query": torch.ones(2, 4), "documents": torch.ones(3, 4), "offsets": torch.tensor([0, 3])}
    with pytest.raises(ValueError, match=message):
        maxsim(**{**arguments, **change})
