"""Exact nearest-neighbour search in numpy: deterministic, in bounded memory.

A matrix product is fast, but the last bits of its sums depend on the shape of the block, the place in it and the number
of threads: two equal documents can get different scores. So the product only finds candidates, with a bound on its
error, and each candidate's score is computed once more in float64, by itself. A score is thus a function of its two
vectors alone, equal vectors tie exactly, and the result does not depend on block sizes, threads or the BLAS library.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.contract import Similarity
from rtx.runtime.errors import DataError

Vectors = NDArray[Any]

# Elements of a block of documents in float64 (32 MiB), of a block of estimates in float32 (16 MiB), and of the pairs
# that are rescored together (16 MiB).
_BLOCK_ELEMENTS = 1 << 22
_RESCORE_ELEMENTS = 1 << 21
# Rows of queries whose Manhattan distances are summed at a time, so that the sums stay in the cache.
_MANHATTAN_ROWS = 32

_UNIT_ROUNDOFF = 2.0**-24


class Hits(NamedTuple):
    """The best documents of each query, best first.

    Attributes:
        indices: [queries, k] int64, positions of documents.
        scores: [queries, k] float32, higher is better.
    """

    indices: NDArray[np.int64]
    scores: NDArray[np.float32]


def search(
    queries: Vectors,
    documents: Vectors,
    k: int,
    *,
    similarity: Similarity | Literal["hamming"] = "cosine",
    block_queries: int | None = None,
    block_documents: int | None = None,
) -> Hits:
    """Find the k best documents of each query, comparing all.

    Args:
        queries: [queries, dim] float32, int8, or for "hamming" packed bits, uint8 [queries, bytes].
        documents: [documents, dim], likewise.
        k: documents a query; all of them where there are fewer.
        similarity: "cosine" (0 where a vector is zero) and "dot" give the product, "euclidean", "manhattan" and
            "hamming" the negative distance.
        block_queries, block_documents: rows compared at a time; they change memory and speed, never the result.

    Returns:
        Hits, with min(k, documents) columns. Equal scores are in the order of the documents. (Scores are taken to lie
        within float32's normal range: products that underflow to 0 all look equal, but are not ordered as ties.)

    Raises:
        DataError: a vector is not finite.
        ValueError: shapes or types do not fit, or k or a block is below 1.
    """
    _check(queries, documents, k, similarity)
    dim = max(1, queries.shape[1])
    block_documents = block_documents or min(max(256, _BLOCK_ELEMENTS // dim), 1 << 15)
    block_queries = block_queries or max(1, _BLOCK_ELEMENTS // block_documents)
    k = min(k, len(documents))
    compare = _COMPARISONS[similarity](queries, documents)
    indices = np.empty((len(queries), k), dtype=np.int64)
    scores = np.empty((len(queries), k), dtype=np.float32)
    for start in range(0, len(queries), block_queries):
        rows = slice(start, start + block_queries)
        indices[rows], scores[rows] = _search_block(compare, queries[rows], documents, k, block_documents)
    return Hits(indices, scores)


def score_pairs(
    queries: Vectors,
    documents: Vectors,
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    *,
    similarity: Similarity | Literal["hamming"] = "cosine",
) -> NDArray[np.float32]:
    """The scores of some pairs: to the bit those that `search` gives them.

    Args:
        queries, documents, similarity: as for `search`.
        rows, columns: [pairs], positions of queries and documents.

    Returns:
        [pairs] float32.

    Raises:
        DataError: a vector is not finite.
        ValueError: shapes or types do not fit.
    """
    _check(queries, documents, 1, similarity)
    compare = _COMPARISONS[similarity](queries, documents)
    scores = np.empty(len(rows), dtype=np.float32)
    block = max(1, _RESCORE_ELEMENTS // max(1, queries.shape[1]))
    for start in range(0, len(rows), block):
        some = slice(start, start + block)
        left, right = compare.exact_form(queries[rows[some]]), compare.exact_form(documents[columns[some]])
        own = np.arange(len(left))
        scores[some] = compare.exact_pairs(left, right, own, own)
    return scores


def _search_block(compare: _Comparison, queries: Vectors, documents: Vectors, k: int, block: int) -> Hits:
    exact_queries = compare.exact_form(queries)
    estimate_queries = compare.query_form(exact_queries)
    best = np.full((len(queries), k), -np.inf, dtype=np.float32)
    found = _Found(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    for start in range(0, len(documents), block):
        exact_documents = compare.exact_form(documents[start : start + block])
        estimates = compare.estimate(estimate_queries, compare.document_form(exact_documents))
        pool = np.concatenate([best, estimates], axis=1)
        best = np.partition(pool, pool.shape[1] - k, axis=1)[:, pool.shape[1] - k :]
        # k documents have an estimate of at least the lowest in `best`, so their scores are at most one slack below it.
        # A document among the best k scores no less, and its own estimate may lie another slack lower.
        lowest = best.min(axis=1, keepdims=True).astype(np.float64) - 2 * compare.slack
        rows, columns = np.nonzero(estimates >= np.nextafter(lowest.astype(np.float32), np.float32(-np.inf)))
        new = _Found(rows, columns + start, compare.exact_pairs(exact_queries, exact_documents, rows, columns))
        found = _keep_best(found, new, k)
    shape = (len(queries), k)
    return Hits(found.documents.reshape(shape), found.scores.reshape(shape))


class _Found(NamedTuple):
    """Scored pairs, sorted by query, then score, then document."""

    queries: NDArray[np.int64]
    documents: NDArray[np.int64]
    scores: NDArray[np.float32]


def _keep_best(found: _Found, new: _Found, k: int) -> _Found:
    queries = np.concatenate([found.queries, new.queries])
    documents = np.concatenate([found.documents, new.documents])
    scores = np.concatenate([found.scores, new.scores])
    order = np.lexsort((documents, -scores, queries))
    queries = queries[order]
    rank = np.arange(len(queries)) - np.searchsorted(queries, queries)
    kept = order[rank < k]
    return _Found(queries[rank < k], documents[kept], scores[kept])


class _Comparison(ABC):
    """One similarity, twice: an estimate for whole blocks in float32, and the exact score of a pair.

    Estimates are made from vectors scaled to norms of at most 1, so nothing overflows, and `slack` bounds how far one
    can lie from the true value on that scale. A sum of `dim` products of vectors x, y, in any order, with or without
    fused multiply-add, is off by at most dim * u * |x| * |y| to first order, u = 2**-24 (Higham 2002, "Accuracy and
    Stability of Numerical Algorithms", section 3.1). Scaling, the remaining operations and the final rounding of the
    exact score to float32 cost some u more; the constants below leave room for them and for the higher orders.
    """

    slack: float

    def exact_form(self, block: Vectors) -> Vectors:
        """The block in C order, because the layout of an array decides in which order numpy sums its rows."""
        return block.astype(np.float64, order="C")

    @abstractmethod
    def query_form(self, exact: Vectors) -> NDArray[np.float32]: ...

    @abstractmethod
    def document_form(self, exact: Vectors) -> NDArray[np.float32]: ...

    def estimate(self, queries: NDArray[np.float32], documents: NDArray[np.float32]) -> NDArray[np.float32]:
        """[queries, documents] float32 that order as the scores do, up to the slack."""
        return queries @ documents.T

    @abstractmethod
    def exact(self, queries: Vectors, documents: Vectors) -> NDArray[np.float64]:
        """Scores of row i with row i. Sums run along rows that are contiguous, so that no row depends on another."""

    def exact_pairs(
        self, queries: Vectors, documents: Vectors, rows: NDArray[np.int64], columns: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        scores = np.empty(len(rows), dtype=np.float32)
        block = max(1, _RESCORE_ELEMENTS // max(1, queries.shape[1]))
        for start in range(0, len(rows), block):
            part = slice(start, start + block)
            # Adding zero turns -0.0, the distance to an equal vector, into 0.0.
            scores[part] = self.exact(queries.take(rows[part], axis=0), documents.take(columns[part], axis=0)) + 0.0
        return scores


class _Cosine(_Comparison):
    def __init__(self, queries: Vectors, documents: Vectors) -> None:  # noqa: ARG002 - each vector has its own scale
        self.slack = (queries.shape[1] + 16) * _UNIT_ROUNDOFF

    def exact_form(self, block: Vectors) -> Vectors:
        exact = super().exact_form(block)
        return exact / _nonzero(_norms(exact))[:, None]

    def query_form(self, exact: Vectors) -> NDArray[np.float32]:
        return exact.astype(np.float32)

    document_form = query_form

    def exact(self, queries: Vectors, documents: Vectors) -> NDArray[np.float64]:
        return np.asarray((queries * documents).sum(axis=1))


class _Dot(_Comparison):
    def __init__(self, queries: Vectors, documents: Vectors) -> None:
        self.slack = (queries.shape[1] + 16) * _UNIT_ROUNDOFF
        self._scale = _largest(_norms, documents)

    def query_form(self, exact: Vectors) -> NDArray[np.float32]:
        return (exact / _nonzero(_norms(exact))[:, None]).astype(np.float32)

    def document_form(self, exact: Vectors) -> NDArray[np.float32]:
        return (exact / self._scale).astype(np.float32)

    def exact(self, queries: Vectors, documents: Vectors) -> NDArray[np.float64]:
        return np.asarray((queries * documents).sum(axis=1))


class _Euclidean(_Comparison):
    """Estimates the negative squared distance, -|x|**2 - |y|**2 + 2xy."""

    def __init__(self, queries: Vectors, documents: Vectors) -> None:
        self.slack = (2 * queries.shape[1] + 64) * _UNIT_ROUNDOFF
        self._scale = max(_largest(_norms, queries), _largest(_norms, documents))

    def query_form(self, exact: Vectors) -> NDArray[np.float32]:
        return (exact / self._scale).astype(np.float32)

    document_form = query_form

    def estimate(self, queries: NDArray[np.float32], documents: NDArray[np.float32]) -> NDArray[np.float32]:
        estimates = queries @ documents.T
        estimates *= 2
        estimates -= (_norms(queries.astype(np.float64)) ** 2).astype(np.float32)[:, None]
        estimates -= (_norms(documents.astype(np.float64)) ** 2).astype(np.float32)
        return estimates

    def exact(self, queries: Vectors, documents: Vectors) -> NDArray[np.float64]:
        return -_norms(queries - documents)


class _Manhattan(_Comparison):
    def __init__(self, queries: Vectors, documents: Vectors) -> None:
        self.slack = (2 * queries.shape[1] + 64) * _UNIT_ROUNDOFF
        self._scale = max(_largest(_sums, queries), _largest(_sums, documents))

    def query_form(self, exact: Vectors) -> NDArray[np.float32]:
        return (exact / self._scale).astype(np.float32)

    document_form = query_form

    def estimate(self, queries: NDArray[np.float32], documents: NDArray[np.float32]) -> NDArray[np.float32]:
        distances = np.zeros((len(queries), len(documents)), dtype=np.float32)
        columns = np.ascontiguousarray(documents.T)
        buffer = np.empty((_MANHATTAN_ROWS, len(documents)), dtype=np.float32)
        for start in range(0, len(queries), _MANHATTAN_ROWS):
            part = queries[start : start + _MANHATTAN_ROWS]
            total, apart = distances[start : start + _MANHATTAN_ROWS], buffer[: len(part)]
            for dimension, column in enumerate(columns):
                np.subtract(part[:, dimension, None], column, out=apart)
                np.abs(apart, out=apart)
                total += apart
        return -distances

    def exact(self, queries: Vectors, documents: Vectors) -> NDArray[np.float64]:
        return -_sums(queries - documents)


class _Hamming(_Comparison):
    """Packed bits as vectors of -1 and 1. Their product is an exact integer: the bits, less twice the distance."""

    def __init__(self, queries: Vectors, documents: Vectors) -> None:  # noqa: ARG002 - bits need no scale
        self.slack = 0.0

    def exact_form(self, block: Vectors) -> Vectors:
        return block

    def query_form(self, exact: Vectors) -> NDArray[np.float32]:
        return np.unpackbits(exact, axis=1).astype(np.float32) * 2 - 1

    document_form = query_form

    def exact(self, queries: Vectors, documents: Vectors) -> NDArray[np.float64]:
        return -_sums(np.unpackbits(np.bitwise_xor(queries, documents), axis=1))


_COMPARISONS: dict[str, Callable[[Vectors, Vectors], _Comparison]] = {
    "cosine": _Cosine,
    "dot": _Dot,
    "euclidean": _Euclidean,
    "manhattan": _Manhattan,
    "hamming": _Hamming,
}


def _check(queries: Vectors, documents: Vectors, k: int, similarity: str) -> None:
    if similarity not in _COMPARISONS:
        raise ValueError(f"similarity: expected one of {', '.join(_COMPARISONS)}, got {similarity!r}")
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise ValueError(
            f"expected queries [q, dim] and documents [n, dim], got {list(queries.shape)} and {list(documents.shape)}"
        )
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    for name, vectors in (("queries", queries), ("documents", documents)):
        if (vectors.dtype == np.uint8) != (similarity == "hamming"):
            raise ValueError(f"{name}: packed bits (uint8) and similarity 'hamming' go together, got {vectors.dtype}")
        rows = [
            start + row
            for start, block in _blocks(vectors)
            for row in np.flatnonzero(~np.isfinite(block).all(axis=1)).tolist()
        ]
        if rows:
            shown = ", ".join(map(str, rows[:10]))
            raise DataError(f"{name}: {len(rows)} of {len(vectors)} vectors are not finite, at rows {shown}")


def _blocks(vectors: Vectors) -> list[tuple[int, Vectors]]:
    size = max(1, _BLOCK_ELEMENTS // max(1, vectors.shape[1]))
    return [(start, vectors[start : start + size]) for start in range(0, len(vectors), size)]


def _norms(exact: Vectors) -> NDArray[np.float64]:
    return np.asarray(np.sqrt((exact * exact).sum(axis=1)))


def _sums(exact: Vectors) -> NDArray[np.float64]:
    return np.asarray(np.abs(exact).sum(axis=1, dtype=np.float64))


def _nonzero(scales: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(scales > 0, scales, 1.0)


def _largest(measure: Callable[[Vectors], NDArray[np.float64]], vectors: Vectors) -> float:
    """The largest norm of any row, 1 if all rows are zero."""
    sizes = [float(measure(block.astype(np.float64)).max(initial=0)) for _, block in _blocks(vectors)]
    return max(sizes, default=0.0) or 1.0
