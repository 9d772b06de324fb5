"""The op `maxsim`: late interaction of a query with documents that have a vector for each token (arXiv 2004.12832).

    score[document] = sum_q max_t query[q] . documents[t]       t in that document

A document without a token scores 0, and so does each one where the query has none. A document is scored by itself: what
else is in the batch does not change it by a bit. Where a product is not finite, as with NaN or infinity in a document,
the score is NaN, and that of no other document is.

In float32 each product is a sum of `dim` terms, one behind the other, and a score one of `query_tokens`. A maximum is
off by no more than the product that is off most:

    |difference| <= (dim + query_tokens) * 2**-23 * sum_q max_t |query[q]| . |documents[t]|
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


def maxsim(
    query: NDArray[np.floating], documents: NDArray[np.floating], offsets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Reference of the op, in float64.

    Args:
        query: [query_tokens, dim].
        documents: [tokens, dim].
        offsets: [documents + 1], rising from 0 to the number of tokens: where each document begins and the last ends.

    Returns:
        [documents] float64.
    """
    wide, found = query.astype(np.float64), np.zeros(len(offsets) - 1)
    for document, (start, stop) in enumerate(pairwise(offsets.tolist())):
        if start < stop:
            products = wide @ documents[start:stop].astype(np.float64).T
            found[document] = products.max(axis=1).sum() if np.isfinite(products).all() else np.nan
    return found


def bound(
    query: NDArray[np.floating], documents: NDArray[np.floating], offsets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """How far from the reference float32 may be, [documents]; arguments as of `maxsim`."""
    norms = np.linalg.norm(documents.astype(np.float64), axis=1)
    longest = [norms[start:stop].max(initial=0) for start, stop in pairwise(offsets.tolist())]
    size = np.linalg.norm(query.astype(np.float64), axis=1).sum()
    return np.asarray(sum(query.shape) * 2.0**-23 * size * np.array(longest))
