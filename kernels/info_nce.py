"""The op `info_nce`: cross-entropy of picking each query's positive among all documents, by the products of vectors.

    loss[i] = log sum_j exp(scale * (query[i] . document[j] - query[i] . document[positives[i]]))

which is logsumexp_j(scale * query[i] . document[j]) less the positive's own term: van den Oord et al. 2018,
arXiv:1807.03748. With a margin, a document whose product is more than that above the positive's is left out; the
positive never is. What is left out of a row takes no gradient from it.

In float32 a product of vectors of L2 norm 1 is off by at most dim * 2**-24, one that is left out or not by a hair
aside. A difference of two is off by twice that and its own rounding, 2 * 2**-24, and scale times as much is a row's:

    |difference| <= L[i] = (2 * scale * (dim + 1) + loss[i] + documents) * 2**-23

A weight p[i, j] = exp(scale * (product - the positive's) - loss[i]) is off by at most twice that, relatively, and by
the rounding of exp, some 2**-20; what it is multiplied by is added up in float32. Of the gradients of a sum of losses
with `upstream`, of query i and likewise of a document over the queries,

    |difference| <= scale * upstream[i] * sum_j ((2 * L[i] + 2**-20) * p[i, j] + (count + 2) * 2**-23 * |w[i, j]|)
                                                * |document[j]|

where w is p, less 1 at the positive, and `count` says how many are added up.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

MAX_DIM = 4096
"""Numbers of a vector that the kernel takes."""

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
        positives: [queries]: which document is each query's positive. One that does not exist makes the query's loss,
            and what has a share in it, NaN.
        scale: factor of the products, the inverse of the temperature.
        false_negative_margin: of products; None leaves out nothing.
        upstream: [queries], each one's share in what the gradients are of; None for the mean of the losses.
    """
    losses, weights = _softmax(queries, documents, positives, scale, false_negative_margin)
    known = (positives >= 0) & (positives < len(documents))
    weights[np.flatnonzero(known), positives[known]] -= 1
    weights *= scale * _shares(upstream, len(queries))[:, None]
    return Contrast(losses, weights @ documents.astype(np.float64), weights.T @ queries.astype(np.float64))


def bounds(
    queries: NDArray[np.floating],
    documents: NDArray[np.floating],
    positives: NDArray[np.int64],
    *,
    scale: float,
    false_negative_margin: float | None = None,
    upstream: NDArray[np.floating] | None = None,
) -> Contrast:
    """How far from the reference float32 may be; arguments as of `info_nce`, all positives exist."""
    losses, weights = _softmax(queries, documents, positives, scale, false_negative_margin)
    shares = scale * np.abs(_shares(upstream, len(queries)))[:, None]
    of_losses = (2 * scale * (queries.shape[1] + 1) + losses + len(documents)) * _STEP
    off = (2 * of_losses[:, None] + 2.0**-20) * weights
    weights[np.arange(len(queries)), positives] -= 1
    sizes = np.abs(weights) * _STEP
    wide_queries, wide_documents = (np.abs(side.astype(np.float64)) for side in (queries, documents))
    return Contrast(
        of_losses,
        (shares * (off + (len(documents) + 2) * sizes)) @ wide_documents,
        (shares * (off + (len(queries) + 2) * sizes)).T @ wide_queries,
    )


def _softmax(
    queries: NDArray[np.floating],
    documents: NDArray[np.floating],
    positives: NDArray[np.int64],
    scale: float,
    margin: float | None,
) -> tuple[Float64, Float64]:
    """Losses [queries], and the softmax of what is not left out [queries, documents]."""
    products = queries.astype(np.float64) @ documents.astype(np.float64).T
    row = np.arange(len(queries))
    known = (positives >= 0) & (positives < len(documents))
    place = np.where(known, positives, 0)
    apart = products - np.where(known, products[row, place], np.nan)[:, None]
    if margin is not None:
        out = apart > margin
        out[row, place] = False
        apart = np.where(out, -np.inf, apart)
    largest = apart.max(axis=1)
    losses = scale * largest + np.log(np.exp(scale * (apart - largest[:, None])).sum(axis=1))
    return losses, np.exp(scale * apart - losses[:, None])


def _shares(upstream: NDArray[np.floating] | None, queries: int) -> Float64:
    return np.full(queries, 1 / queries) if upstream is None else upstream.astype(np.float64)
