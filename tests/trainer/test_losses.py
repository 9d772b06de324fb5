from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rtx.trainer.losses import bce, info_nce


def info_nce_by_definition(queries, documents, scale):
    """The formula in float64 numpy, a row at a time."""
    total = 0.0
    for i, query in enumerate(queries):
        scores = [
            scale * float(query @ document) / (np.linalg.norm(query) * np.linalg.norm(document))
            for document in documents
        ]
        total -= scores[i] - math.log(sum(math.exp(score) for score in scores))
    return total / len(queries)


@pytest.mark.parametrize("negatives", [0, 1, 7])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_info_nce_is_its_formula(negatives, scale):
    generator = np.random.default_rng(negatives)
    queries = generator.normal(size=(5, 8)) * 3.0
    documents = generator.normal(size=(5 + negatives, 8))
    expected = info_nce_by_definition(queries, documents, scale)
    # float64 all the way: 1e-12 is some thousand rounding errors.
    assert info_nce(torch.tensor(queries), torch.tensor(documents), scale=scale).item() == pytest.approx(
        expected, abs=1e-12
    )
    single = info_nce(torch.tensor(queries).float(), torch.tensor(documents).float(), scale=scale)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected, rel=1e-5)


def test_info_nce_of_known_cosines():
    # cos 1 with its own document, 0 with the other: log(1 + e^-20).
    assert info_nce(torch.eye(2) * 5, torch.eye(2)).item() == pytest.approx(math.log1p(math.exp(-20)), abs=1e-7)
    # A document that answers both: nothing tells them apart.
    same = torch.ones(2, 3)
    assert info_nce(same, same).item() == pytest.approx(math.log(2), abs=1e-6)


def test_given_negatives_pull_only_apart():
    query = torch.tensor([[1.0, 0.0]], requires_grad=True)
    documents = torch.tensor([[0.6, 0.8], [0.8, 0.6]], requires_grad=True)
    info_nce(query, documents).backward()
    # Downhill turns the query towards its document (upwards), away from the negative.
    assert query.grad[0, 1] < 0
    assert documents.grad[1] @ torch.tensor([1.0, 0.0]) > 0


def test_losses_are_in_float32_under_autocast_and_in_half_precision():
    generator = torch.Generator().manual_seed(0)
    queries, documents = torch.randn(4, 16, generator=generator), torch.randn(6, 16, generator=generator)
    logits, labels = torch.randn(4, generator=generator), torch.tensor([0.0, 1.0, 0.5, 1.0])
    expected = info_nce(queries, documents), bce(logits, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce(queries, documents), expected[0])
        assert torch.equal(bce(logits, labels), expected[1])
    half = info_nce(queries.bfloat16(), documents.bfloat16())
    assert half.dtype == torch.float32
    assert torch.equal(half, info_nce(queries.bfloat16().float(), documents.bfloat16().float()))


def test_bce_is_its_formula():
    logits, labels = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 0.0, 0.25])
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    y = labels.double().numpy()
    expected = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    assert bce(logits, labels).item() == pytest.approx(expected, abs=1e-6)
    # From raw logits there is no overflow.
    assert bce(torch.tensor([-200.0]), torch.tensor([1.0])).item() == 200.0
