"""Losses of rerankers: `loss(logits [documents], targets) -> scalar`.

Logits are raw (no sigmoid before the loss) and may have any floating type; the result is float32, or float64 if they
are. Lists may have any lengths. Pairwise losses are in bits: their logarithm is to base 2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rtx.trainer.losses.arithmetic import at_least_float32, mean
from rtx.trainer.losses.targets import Targets


@at_least_float32
def bce(logits: Tensor, targets: Targets, /, *, pos_weight: float = 1.0) -> Tensor:
    """Binary cross-entropy, mean over the documents: −w·y·log σ(x) − (1 − y)·log(1 − σ(x)).

    Args:
        logits: [documents].
        targets: labels y in [0, 1]: whether, or with what probability, a document answers its query.
        pos_weight: w; above 1 where answers are rare.
    """
    return F.binary_cross_entropy_with_logits(logits, targets.labels, pos_weight=logits.new_full((), pos_weight))


@at_least_float32
def cross_entropy(logits: Tensor, targets: Targets, /, *, scale: float = 1.0) -> Tensor:
    """Softmax cross-entropy: −Σ p·log softmax(s·x) over a query's documents, p the labels' shares of their sum.

    With one right document, that is the cross-entropy of picking it. The mean is over the queries that have one.

    Args:
        logits: [documents].
        targets: labels of at least 0.
        scale: s, the inverse of the temperature.
    """
    sums = targets.labels.new_zeros(len(targets.first)).index_add(0, targets.owner, targets.labels)
    shares = targets.labels / sums[targets.owner].clamp(min=torch.finfo(sums.dtype).tiny)
    return -(shares * targets.log_softmax(scale * logits)).sum() / (sums > 0).sum().clamp(min=1)


@at_least_float32
def listnet(logits: Tensor, targets: Targets, /) -> Tensor:
    """−Σ softmax(labels)·log softmax(x) over a query's documents, mean over the queries.

    Cao et al. 2007, doi:10.1145/1273496.1273513 (ListNet, of the first place).

    Args:
        logits: [documents].
        targets: labels of any scale, also a teacher's scores.
    """
    wanted = targets.log_softmax(targets.labels).exp()
    return -(wanted * targets.log_softmax(logits)).sum() / len(targets.first)


@at_least_float32
def ranknet(logits: Tensor, targets: Targets, /, *, sigma: float = 1.0) -> Tensor:
    """log₂(1 + exp(−σ·(x_i − x_j))), mean over all documents i, j of one query with label_i > label_j.

    Burges et al. 2005, doi:10.1145/1102351.1102363.

    Args:
        logits: [documents].
        targets: labels of any scale; only their order counts.
        sigma: σ.
    """
    better, worse = _ordered_pairs(targets)
    return mean(_bits(sigma * (logits[better] - logits[worse])))


@at_least_float32
def lambda_ndcg(
    logits: Tensor,
    targets: Targets,
    /,
    *,
    k: int | None = None,
    mu: float = 10.0,
    sigma: float = 1.0,
) -> Tensor:
    """RankNet with each pair weighted by what its order means for NDCG: the NDCGLoss2++ of LambdaLoss.

    Wang et al. 2018, doi:10.1145/3269206.3271784: (μ·δ_ij + ρ_ij)·|G_i − G_j|, where documents i, j stand at places
    i, j of the ranking by logits, D_m = log₂(1 + m), ρ_ij = |1/D_i − 1/D_j|, δ_ij = |1/D_|i−j| − 1/D_(|i−j|+1)|, and
    G is (2^label − 1) / the best DCG that the list can have. The mean is over the same pairs as RankNet's. Documents
    with equal logits are placed with the lower label first, so that what is not told apart counts as wrong.

    Args:
        logits: [documents].
        targets: labels are grades from 0 to at most 100.
        k: pairs with both documents below the place k do not count, and the best DCG is that of k documents. None for
            the whole list.
        mu: μ, the weight of NDCGLoss2 beside LambdaRank.
        sigma: σ, as in `ranknet`.
    """
    rank = _ranks(targets, -logits.detach(), targets.labels)
    ideal = _ranks(targets, -targets.labels)
    better, worse = _ordered_pairs(targets)
    # Of small labels, 2^label − 1 would keep few digits.
    gains = torch.expm1(targets.labels * math.log(2))
    best = gains / _discount(ideal + 1, gains.dtype)
    if k is not None:
        seen = torch.minimum(rank[better], rank[worse]) < k
        better, worse, best = better[seen], worse[seen], best * (ideal < k)
    best_dcg = gains.new_zeros(len(targets.first)).index_add(0, targets.owner, best)
    gained = (gains[better] - gains[worse]) / best_dcg[targets.owner[better]]
    apart = (rank[better] - rank[worse]).abs()
    delta = 1 / _discount(apart, gains.dtype) - 1 / _discount(apart + 1, gains.dtype)
    rho = (1 / _discount(rank[better] + 1, gains.dtype) - 1 / _discount(rank[worse] + 1, gains.dtype)).abs()
    return mean((mu * delta + rho) * gained * _bits(sigma * (logits[better] - logits[worse])))


@at_least_float32
def margin_mse(logits: Tensor, targets: Targets, /) -> Tensor:
    """Mean squared difference between student and teacher of x⁺ − x⁻: Hofstätter et al. 2020, arXiv:2010.02666.

    Args:
        logits: [documents], the positive of a row first, then its negatives.
        targets: labels are the teacher's scores.
    """
    return mean((targets.margins(logits) - targets.margins(targets.labels)).square())


def _ordered_pairs(targets: Targets) -> tuple[Tensor, Tensor]:
    """All (better, worse) of two documents of one query, the first with the higher label: [pairs] positions each."""
    # Padding that is not a number is neither better nor worse than anything.
    labels = targets.lists(targets.labels, torch.nan)
    query, better, worse = (labels[:, :, None] > labels[:, None, :]).nonzero(as_tuple=True)
    return targets.first[query] + better, targets.first[query] + worse


def _ranks(targets: Targets, *keys: Tensor) -> Tensor:
    """[documents] int64: place, from 0, of each document among those of its query, by rising keys, first key first."""
    order = torch.arange(len(targets.owner), device=targets.owner.device)
    for key in (*reversed(keys), targets.owner):
        order = order[torch.argsort(key[order], stable=True)]
    # Sorted by query last, the documents stand row by row again.
    return torch.empty_like(order).index_put((order,), targets.place)


def _discount(place: Tensor, dtype: torch.dtype) -> Tensor:
    """DCG's: log₂(1 + place), places from 1."""
    return torch.log2(1 + place.to(dtype))


def _bits(differences: Tensor) -> Tensor:
    """log₂(1 + exp(−difference)): what it costs to have a pair that far in the right order."""
    return -F.logsigmoid(differences) / math.log(2)
