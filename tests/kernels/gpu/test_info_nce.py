"""`info_nce` in Triton's interpreter, against the reference in NumPy and the trainer's loss in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rtx.kernels import info_nce as reference
from rtx.kernels.gpu.info_nce import info_nce, info_nce_backward

EPSILON = 2.0**-23


def _vectors(queries: int, documents: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(queries * 10_000 + documents * 100 + dim)
    left, right = (F.normalize(torch.randn(count, dim, generator=random), dim=1) for count in (queries, documents))
    return left, right, torch.randint(documents, (queries,), generator=random)


def _found(queries: Any, documents: Any, positives: Any, **options: Any) -> tuple[torch.Tensor, ...]:
    """Losses, and the gradients of their mean."""
    losses, of_positives = info_nce(queries, documents, positives, **options)
    upstream = torch.full_like(losses, 1 / len(losses))
    gradients = info_nce_backward(queries, documents, positives, losses, of_positives, upstream, **options)
    return losses, *gradients


def _check(queries: Any, documents: Any, positives: Any, **options: Any) -> None:
    expected = reference.info_nce(queries.numpy(), documents.numpy(), positives.numpy(), **options)
    allowed = reference.bounds(queries.numpy(), documents.numpy(), positives.numpy(), **options)
    for found, right, most in zip(_found(queries, documents, positives, **options), expected, allowed, strict=True):
        assert found.dtype == torch.float32
        assert (np.abs(found.numpy() - right) <= most).all()


@pytest.mark.parametrize(
    ("queries", "documents", "dim", "scale", "margin"),
    [
        (1, 1, 1, 20.0, None),
        (5, 1, 7, 20.0, 0.0),
        (1, 70, 64, 100.0, None),
        (5, 17, 100, 100.0, 0.1),
        (17, 33, 7, 20.0, -0.2),
        (33, 70, 64, 20.0, 0.05),
        (70, 33, 7, 100.0, 0.1),
    ],
)
def test_loss_and_gradients_agree_with_the_reference(
    queries: int, documents: int, dim: int, scale: float, margin: float | None
) -> None:
    _check(*_vectors(queries, documents, dim), scale=scale, false_negative_margin=margin)


def test_more_documents_than_a_run_and_columns_of_more_than_one_program() -> None:
    queries, documents, positives = _vectors(3, 1030, 40)
    positives[0] = 1029
    _check(queries, documents, positives, scale=20.0)


def test_a_copy_of_the_positive_ties_with_it_and_stays() -> None:
    queries, documents, positives = _vectors(5, 40, 64)
    documents[35] = documents[3]
    positives[:] = 3
    documents = documents.contiguous()
    losses, _, of_documents = _found(queries, documents, positives, scale=100.0, false_negative_margin=0.0)
    arguments = (queries.numpy(), documents.numpy(), positives.numpy())
    options = {"scale": 100.0, "false_negative_margin": 1e-9}
    off = np.abs(losses.numpy() - reference.info_nce(*arguments, **options).losses)
    assert (off <= reference.bounds(*arguments, **options).losses).all()
    assert of_documents[35].abs().max() > 0.1


def test_what_the_margin_leaves_out_takes_no_gradient() -> None:
    queries = torch.tensor([[1.0, 0.0]])
    documents = torch.tensor([[0.6, 0.8], [0.8, 0.6], [0.0, 1.0]])
    positives = torch.tensor([0])
    loss, _, gradient = _found(queries, documents, positives, scale=20.0, false_negative_margin=0.1)
    # Left are the positive, 0.6, and 0: log(1 + exp(-12)).
    assert loss.item() == pytest.approx(np.log1p(np.exp(-12.0)), rel=1e-2)
    assert not gradient[1].any()
    assert gradient[2].any()
    wide, _, of_all = _found(queries, documents, positives, scale=20.0, false_negative_margin=0.3)
    assert wide.item() == pytest.approx(np.log(1 + np.exp(4.0) + np.exp(-12.0)), abs=1e-5)
    assert of_all[1].any()


def test_a_query_has_the_same_loss_alone_as_among_others() -> None:
    queries, documents, positives = _vectors(37, 17, 33)
    options: dict[str, Any] = {"scale": 20.0, "false_negative_margin": 0.1}
    together, _ = info_nce(queries, documents, positives, **options)
    for row in (0, 5, 36):
        alone, _ = info_nce(queries[row : row + 1], documents, positives[row : row + 1], **options)
        assert torch.equal(alone[0], together[row])


def test_a_query_has_the_same_gradient_alone_as_among_others() -> None:
    queries, documents, positives = _vectors(37, 17, 33)
    losses, of_positives = info_nce(queries, documents, positives, scale=20.0)
    sides = (queries, documents, positives, losses, of_positives, torch.ones_like(losses))
    together, _ = info_nce_backward(*sides, scale=20.0)
    for row in (0, 5, 36):
        one = [side if side is documents else side[row : row + 1] for side in sides]
        alone, _ = info_nce_backward(*one, scale=20.0)
        assert torch.equal(alone[0], together[row])


def test_the_gradients_of_the_reference_are_those_of_its_loss() -> None:
    queries, documents, positives = (side.numpy() for side in _vectors(3, 5, 4))
    sides = [queries.astype(np.float64), documents.astype(np.float64)]
    options: dict[str, Any] = {"scale": 20.0, "false_negative_margin": 0.2}
    _, *gradients = reference.info_nce(sides[0], sides[1], positives, **options)
    step = 1e-6
    for side, gradient in zip(sides, gradients, strict=True):
        for place in np.ndindex(side.shape):
            kept, losses = side[place], []
            for moved in (kept + step, kept - step):
                side[place] = moved
                losses.append(reference.info_nce(sides[0], sides[1], positives, **options).losses.mean())
            side[place] = kept
            # Central: the third derivative, scale**3 at most, times step**2 / 6, and rounding of the loss / step.
            assert abs((losses[0] - losses[1]) / (2 * step) - gradient[place]) < 20**3 * step**2 + 1e-14 / step


def test_a_positive_that_does_not_exist_is_nan() -> None:
    queries, documents, _ = _vectors(2, 3, 4)
    for index in (-1, 3):
        losses, _ = info_nce(queries, documents, torch.tensor([0, index]), scale=2.0)
        assert losses.isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"queries": torch.ones(4)},
            r"queries: expected \[queries, 1 to 4096\] float32, contiguous, got \[4\] float32",
        ),
        ({"queries": torch.ones(2, 4, dtype=torch.float16)}, "queries: expected .* got .* float16"),
        ({"queries": torch.ones(0, 4)}, r"queries: expected .* got \[0, 4\]"),
        ({"documents": torch.ones(4, 3).T}, "documents: expected .* not contiguous"),
        ({"documents": torch.ones(3, 5)}, r"documents: expected \[documents, 4\] on cpu, as queries are, got \[3, 5\]"),
        ({"documents": torch.ones(3, 4, device="meta")}, "documents: expected .* on cpu.* got .* on meta"),
        ({"positives": torch.zeros(3, dtype=torch.int64)}, r"positives: expected \[2\] int64.* got \[3\]"),
        ({"positives": torch.zeros(2, dtype=torch.int32)}, "positives: expected .* got .* int32"),
    ],
)
def test_wrong_arguments(change: dict[str, torch.Tensor], message: str) -> None:
    vectors: dict[str, Any] = {
        "queries": torch.ones(2, 4),
        "documents": torch.ones(3, 4),
        "positives": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        info_nce(**{**vectors, **change}, scale=20.0)
