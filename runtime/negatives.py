"""Which of the documents that a search found become a query's negatives. Pure: scores in, positions out.

candidates in order of rank -> margins -> limits -> sampling -> negatives
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.errors import UsageError

Sampling = Literal["top", "random"]
SAMPLINGS: tuple[Sampling, ...] = get_args(Sampling)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a negative has to be. Ranks count the documents that are not known to answer the query.

    A query with several positives is held to the one with the lowest score: a document above it is as likely an answer.

    Attributes:
        negatives: how many a query.
        skip: ranks at the top that are left out, as the first may answer the query without anyone having said so.
        depth: the last rank that is looked at.
        margin: a negative's score is at most the positive's less this.
        relative_margin: a negative's score is at most the positive's less this share of its absolute value; 0.05 is
            "TopK-PercPos" at 95 % in NV-Retriever (arXiv:2407.15831).
        max_score, min_score: limits of a negative's score, themselves allowed.
        sampling: "top" takes the highest scores of those that are left, "random" any of them.
        seed: of "random"; with another seed, others are drawn.

    Raises:
        UsageError: a value out of its range, or fewer ranks than negatives.
    """

    negatives: int = 3
    skip: int = 0
    depth: int = 100
    margin: float | None = None
    relative_margin: float | None = None
    max_score: float | None = None
    min_score: float | None = None
    sampling: Sampling = "top"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (("negatives", 1), ("skip", 0), ("depth", 1), ("seed", 0)):
            if getattr(self, name) < lowest:
                raise UsageError(f"{name}: expected at least {lowest}, got {getattr(self, name)}")
        for name in ("margin", "relative_margin", "max_score", "min_score"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UsageError(f"{name}: expected a finite number, got {value}")
        if self.sampling not in SAMPLINGS:
            raise UsageError(f"sampling: expected one of {', '.join(SAMPLINGS)}, got {self.sampling!r}")
        if self.depth - self.skip < self.negatives:
            raise UsageError(
                f"negatives: expected at most {max(0, self.depth - self.skip)}, the ranks from skip ({self.skip}) to "
                f"depth ({self.depth}), got {self.negatives}"
            )
        if self.max_score is not None and self.min_score is not None and self.min_score > self.max_score:
            raise UsageError(f"min_score: expected at most max_score ({self.max_score}), got {self.min_score}")


class Choice(NamedTuple):
    """What the rules make of one query's candidates.

    Attributes:
        places: [negatives] int64, positions among the candidates, highest score first.
        dropped: how many candidates each rule left out that no rule before it did.
    """

    places: NDArray[np.int64]
    dropped: Mapping[str, int]


def choose(scores: NDArray[np.float32], positive: float, rules: Rules, *, draw: int = 0) -> Choice:
    """Apply the rules to one query's candidates.

    Args:
        scores: [candidates] float32 in order of rank; one that is not finite never passes.
        positive: the lowest score of the query's positives, on the same scale.
        rules: those for margins, limits, sampling and number; ranks have been cut before.
        draw: names the query in the seed of random sampling, so that its draw does not depend on other queries.

    Returns:
        The negatives, fewer than asked for where fewer pass; equal scores are in order of rank.
    """
    exact = scores.astype(np.float64)
    passing = np.ones(len(exact), dtype=bool)
    dropped: dict[str, int] = {}
    for name, broken in _broken(exact, positive, rules).items():
        dropped[name] = int((passing & broken).sum())
        passing &= ~broken
    left = np.flatnonzero(passing)
    if rules.sampling == "random" and len(left) > rules.negatives:
        left = np.sort(np.random.default_rng((rules.seed, draw)).choice(left, rules.negatives, replace=False))
    order = np.argsort(-exact[left], kind="stable")[: rules.negatives]
    return Choice(left[order], dropped)


def _broken(scores: NDArray[np.float64], positive: float, rules: Rules) -> dict[str, NDArray[np.bool_]]:
    """By rule that is set, the candidates that break it."""
    broken = {"no score": ~np.isfinite(scores)}
    if rules.margin is not None:
        broken["margin"] = scores > positive - rules.margin
    if rules.relative_margin is not None:
        # Not positive * (1 - share): below 0, where logits and distances lie, that would lift the limit.
        broken["relative_margin"] = scores > positive - abs(positive) * rules.relative_margin
    if rules.max_score is not None:
        broken["max_score"] = scores > rules.max_score
    if rules.min_score is not None:
        broken["min_score"] = scores < rules.min_score
    return broken
