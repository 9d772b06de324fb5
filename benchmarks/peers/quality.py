"""How far a peer's vectors are from the baseline's, and what that is worth in ranking."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.workloads import Judged
from rtx.runtime.golden import deviation
from rtx.runtime.metrics import ndcg_at_k, top_k_overlap
from rtx.runtime.search import search

Vectors = NDArray[np.float32]
K = 10
# Vectors further away than any int8 are of another model: pooled otherwise, cut elsewhere.
LEAST_MEAN_COSINE = 0.5


@dataclass(frozen=True)
class Quality:
    """A peer beside the baseline.

    Attributes:
        mean_cosine, min_cosine: to the baseline's vectors.
        overlap: mean share of the baseline's first K documents that it finds; None where nothing was ranked.
        ndcg: NDCG@K; None where nothing was judged.
        baseline_ndcg: of the baseline.
    """

    mean_cosine: float
    min_cosine: float
    overlap: float | None = None
    ndcg: float | None = None
    baseline_ndcg: float | None = None


@dataclass(frozen=True)
class Agreement:
    """A reranker's logits beside the baseline's: their correlation, and the largest difference."""

    correlation: float
    max_abs: float


def compare_vectors(found: Vectors, baseline: Vectors) -> Quality:
    """Vectors of the same texts: [texts, dimension] float32 each.

    What the baseline's vectors have in common is taken off first: of random weights it is nearly everything.
    """
    common = baseline.mean(axis=0)
    parity = deviation(found - common, baseline - common)
    return Quality(parity.mean_cosine, parity.min_cosine)


def compare_rankings(found: Vectors, baseline: Vectors, judged: Judged) -> Quality:
    """Vectors of the queries followed by those of the documents: [texts, dimension] float32 each."""
    parity = deviation(found, baseline)
    own, expected = (_ranked(vectors, judged) for vectors in (found, baseline))
    return Quality(
        parity.mean_cosine,
        parity.min_cosine,
        overlap=float(top_k_overlap(expected, own, K).mean()),
        ndcg=_ndcg(own, judged),
        baseline_ndcg=_ndcg(expected, judged),
    )


def compare_scores(found: Vectors, baseline: Vectors) -> Agreement:
    """Logits of the same pairs: [pairs] float32 each."""
    return Agreement(float(np.corrcoef(found, baseline)[0, 1]), float(np.abs(found - baseline).max()))


def _ranked(vectors: Vectors, judged: Judged) -> NDArray[np.int64]:
    queries = len(judged.queries)
    return search(vectors[:queries], vectors[queries:], K).indices


def _ndcg(ranked: NDArray[np.int64], judged: Judged) -> float:
    grades = (ranked == np.array(judged.answers)[:, None]).astype(np.int64)
    return float(ndcg_at_k(grades, np.ones((len(grades), 1), dtype=np.int64), K).mean())
