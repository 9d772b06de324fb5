"""Ranking quality: what a ranked list is worth, how sure a difference is, how far two rankings agree.

The metrics see grades, not documents: `grades` [queries, ranks] holds the grade of the document at each rank, best rank
first, 0 for a document that nobody judged and for a rank that is not filled; `judged` [queries, width] holds all grades
of a query in any order, padded with 0. A grade above 0 is relevant. All return one value a query, float64.

Definitions are those of trec_eval (https://github.com/usnistgov/trec_eval, measures ndcg_cut, map_cut, recall, success,
recip_rank), which BEIR reports through pytrec_eval. A query without a relevant document is worth 0 in each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Grades = NDArray[np.int64]
PerQuery = NDArray[np.float64]

_BOOTSTRAP_BLOCK_DRAWS = 1 << 22


def ndcg_at_k(grades: Grades, judged: Grades, k: int) -> PerQuery:
    """Normalised discounted cumulative gain of the first k ranks, with the grade itself as the gain.

    DCG@k = sum over ranks r = 1..k of max(grade_r, 0) / log2(r + 1), divided by the DCG@k of the best possible order of
    all judged documents (Järvelin and Kekäläinen 2002, ACM TOIS 20:422). trec_eval and BEIR take this linear gain; the
    exponential gain 2**grade - 1 of the learning-to-rank literature gives other values wherever grades exceed 1.
    """
    gains = np.maximum(_first_k(grades, k), 0)
    ideal = np.maximum(_first_k(-np.sort(-judged, axis=1), k), 0)
    discounts = 1 / np.log2(np.arange(2, k + 2))
    # Both sums have k terms in the same order, so that a perfect ranking is worth exactly 1.
    return _ratio((gains * discounts).sum(axis=1), (ideal * discounts).sum(axis=1))


def mrr_at_k(grades: Grades, k: int) -> PerQuery:
    """Reciprocal rank of the first relevant document, 0 if there is none in the first k ranks."""
    relevant = _first_k(grades, k) > 0
    return _ratio(relevant.max(axis=1), relevant.argmax(axis=1) + 1)


def map_at_k(grades: Grades, judged: Grades, k: int) -> PerQuery:
    """Average precision at k: precision at each relevant rank up to k, summed, over all relevant documents.

    As in trec_eval the divisor is their number even where it exceeds k. sentence-transformers divides by the smaller of
    that number and k, which gives a higher value there.
    """
    relevant = _first_k(grades, k) > 0
    precision = relevant.cumsum(axis=1) / np.arange(1, k + 1)
    return _ratio((precision * relevant).sum(axis=1), (judged > 0).sum(axis=1))


def recall_at_k(grades: Grades, judged: Grades, k: int) -> PerQuery:
    """Share of the relevant documents that is found in the first k ranks."""
    return _ratio((_first_k(grades, k) > 0).sum(axis=1), (judged > 0).sum(axis=1))


def accuracy_at_k(grades: Grades, k: int) -> PerQuery:
    """1 if a relevant document is in the first k ranks, else 0 (the hit rate; trec_eval calls it success)."""
    return np.asarray((_first_k(grades, k) > 0).max(axis=1), dtype=np.float64)


class Interval(NamedTuple):
    """The bounds of a confidence interval."""

    low: float
    high: float


def bootstrap_interval(
    differences: PerQuery, *, confidence: float = 0.95, samples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of a mean over queries.

    For two systems on the same queries, pass the difference of each query: queries are drawn with replacement as pairs,
    so that what makes a query hard for both does not widen the interval (Efron and Tibshirani 1993, "An Introduction to
    the Bootstrap", chapter 13; for retrieval metrics Sakai 2006, SIGIR). It covers the choice of queries, nothing else,
    and is too narrow below some 30 queries; of one query it is a point.

    Args:
        differences: [queries] float64, finite.
        confidence: share of resampled means inside, between 0 and 1.
        samples: number of resamples.
        seed: of the generator; the same seed and numpy version give the same interval.

    Raises:
        ValueError: no query, a value that is not finite, or a confidence outside (0, 1).
    """
    differences = np.asarray(differences, dtype=np.float64)
    if differences.ndim != 1 or not len(differences) or not np.isfinite(differences).all():
        raise ValueError(f"differences: expected [queries] finite and at least one, got shape {differences.shape}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a share between 0 and 1, got {confidence}")
    generator = np.random.default_rng(seed)
    means = np.empty(samples)
    block = max(1, _BOOTSTRAP_BLOCK_DRAWS // len(differences))
    for start in range(0, samples, block):
        drawn = generator.integers(len(differences), size=(min(block, samples - start), len(differences)))
        means[start : start + block] = differences[drawn].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(low), float(high))


def top_k_overlap(a: NDArray[np.int64], b: NDArray[np.int64], k: int) -> PerQuery:
    """Share of the first k documents that two rankings have in common, whatever their order.

    Args:
        a, b: [queries, ranks] document positions, best first, -1 where a rank is not filled.
        k: ranks to look at. Where fewer are filled, the share is of the longer of the two lists; two empty ones agree.

    Returns:
        [queries] float64 in [0, 1].
    """
    shares = np.ones(len(a))
    for query, (left, right) in enumerate(zip(a[:, :k], b[:, :k], strict=True)):
        left, right = left[left >= 0], right[right >= 0]
        if len(left) or len(right):
            shares[query] = len(np.intersect1d(left, right)) / max(len(left), len(right))
    return shares


def ties_in_top_k(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """How many neighbours among the first k ranks, and across the cut after them, have the same score.

    Each is a place where something other than the score decided the order. Coarse scores (half precision, binary codes)
    show up here before they show in NDCG.

    Args:
        scores: [queries, ranks] float32, best first, -inf where a rank is not filled.

    Returns:
        [queries] int64, from 0 to k.
    """
    following = np.pad(scores, ((0, 0), (0, 1)), constant_values=-np.inf)[:, 1 : k + 1]
    same = (scores[:, :k] == following) & (following != -np.inf)
    return np.asarray(same.sum(axis=1), dtype=np.int64)


def _first_k(grades: Grades, k: int) -> Grades:
    """The first k columns, filled up with 0 where there are fewer, in C order so that all rows are summed alike."""
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    missing = max(0, k - grades.shape[1])
    return np.ascontiguousarray(np.pad(grades[:, :k], ((0, 0), (0, missing))))


def _ratio(numerator: NDArray[Any], denominator: NDArray[Any]) -> PerQuery:
    """0 where the denominator is."""
    return np.asarray(np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator > 0))
