"""The op `info_nce`: cross-entropy of picking each query's positive among all documents, by the products of vectors.

    loss[i] = log sum_j exp(scale * (query[i] . document[j] - query[i] . document[positives[i]]))

which is logsumexp_j(scale * query[i] . document[j]) less the positive's own term: van den Oord et al. 2018,
arXiv:1807.03748. With a margin, a document whose product is more than that above the positive's is left out; the
positive never is. What is left out of a row takes no gradient from it.

In float32 a product of vectors of L2 norm 1 is off by at most dim * 2**-24, one that is left out or not by a hair
aside. A difference of two is off by twice that and its own rounding, 2 * 2**-24, and scale times as much is a row's:

    |difference| <= (2 * scale * (dim + 1) + loss[i] + documents) * 2**-23

A weight, exp of scale * (product - the positive's) - loss[i], is off by at most twice that, relatively. Those of a row
add up to 2 at most in magnitude, so that of gradients of a sum of losses with `upstream`,

    |difference| <= 2 * scale * (2 * the loss's + (queries + documents) * 2**-23) * upstream[i]
                    for query i; for a document with the sum of upstream

Where operands are rounded before they are multiplied, by r relatively, a product is off by another 2 * r: a loss by
4 * scale * r, and a gradient by twice as much for its weights and 2 * scale * 2 * r for itself.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

_STEP = 2.0**-23


class Contrast(NamedTuple):
    """What the reference gives, or how far from it float32 may be.

    Attributes:
        losses: [queries] float64.
        of_queries: [queries, dim] float64: gradient of sum_i upstream[i] * loss[i].
        of_documents: [documents, dim] float64.
    """

    losses: Float64
    of_queries: Float64
    of_documents: Float64


def info_nce(
    queries: NDArray[np.floating],
    documents: NDArray[np.floating],
    positives: NDArray[np.int64],
    *,
    scale: float,
    false_negative_margin: float | None = None,
    upstream: NDArray[np.floating] | None = None,
) -> Contrast:
    """Reference of the op, in float64, with its gradients.

    Args:
        queries: [queries, dim], at least one.
        documents: [documents, dim].
        positives: [queries]: which document is each query's positive.
        scale: factor of the products, the inverse of the temperature.
        false_negative_margin: of products; None leaves out nothing.
        upstream: [queries], each one's share in what the gradients are of; None for the mean of the losses.
    """
    wide_queries, wide_documents = queries.astype(np.float64), documents.astype(np.float64)
    products = wide_queries @ wide_documents.T
    row = np.arange(len(queries))
    apart = products - products[row, positives][:, None]
    if false_negative_margin is not None:
        out = apart > false_negative_margin
        out[row, positives] = False
        apart = np.where(out, -np.inf, apart)
    largest = apart.max(axis=1)
    losses = scale * largest + np.log(np.exp(scale * (apart - largest[:, None])).sum(axis=1))
    weights = np.exp(scale * apart - losses[:, None])
    weights[row, positives] -= 1
    weights *= scale * _shares(upstream, len(queries))[:, None]
    return Contrast(losses, weights @ wide_documents, weights.T @ wide_queries)


def bounds(
    losses: Float64,
    documents: int,
    dim: int,
    *,
    scale: float,
    upstream: NDArray[np.floating] | None = None,
    rounding: float = 0.0,
) -> Contrast:
    """How far from the reference float32 may be: [queries], [queries, 1] and [1, 1].

    Args:
        losses: [queries], of the reference.
        documents: how many.
        dim: of the vectors.
        scale, upstream: as of `info_nce`.
        rounding: of operands; 2**-10 of TF32.
    """
    shares = np.abs(_shares(upstream, len(losses)))
    of_losses = (2 * scale * (dim + 1) + losses + documents) * _STEP + 4 * scale * rounding
    of_weights = 2 * scale * (2 * of_losses + (len(losses) + documents) * _STEP + 2 * rounding)
    of_queries = of_weights * shares
    return Contrast(of_losses, of_queries[:, None], of_queries.sum(keepdims=True)[:, None])


def _shares(upstream: NDArray[np.floating] | None, queries: int) -> Float64:
    return np.full(queries, 1 / queries) if upstream is None else upstream.astype(np.float64)
