"""The op `info_nce`: cross-entropy of picking each query's positive among all documents, by the products of vectors.

    loss = mean_i log sum_j exp(scale * (query[i] . document[j] - query[i] . document[positives[i]]))

which is logsumexp_j(scale * query[i] . document[j]) less the positive's own term: van den Oord et al. 2018,
arXiv:1807.03748. With a margin, a document whose product is more than that above the positive's is left out; the
positive never is. What is left out of a row takes no gradient from it.

In float32 a product of vectors of L2 norm 1 is off by at most dim * 2**-24, one that is left out or not by a hair
aside. A difference of two is off by twice that and its own rounding, 2 * 2**-24, and scale times as much is a row's:

    |difference| <= (2 * scale * (dim + 1) + |loss| + documents) * 2**-23

A weight, exp of scale * (product - the positive's) - the row's loss, is off by at most twice that, relatively.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def info_nce(
    queries: NDArray[np.floating],
    documents: NDArray[np.floating],
    positives: NDArray[np.int64],
    *,
    scale: float,
    false_negative_margin: float | None = None,
) -> tuple[Float64, Float64, Float64]:
    """Reference of the op, in float64, with its gradients.

    Args:
        queries: [queries, dim], at least one.
        documents: [documents, dim].
        positives: [queries]: which document is each query's positive.
        scale: factor of the products, the inverse of the temperature.
        false_negative_margin: of products; None leaves out nothing.

    Returns:
        The loss [], its gradient of the queries [queries, dim], and of the documents [documents, dim].
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
    weights *= scale / len(queries)
    return losses.mean(), weights @ wide_documents, weights.T @ wide_queries
