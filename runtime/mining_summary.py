"""What a mining run found, added up query by query."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from rtx.runtime.mining import MinedQuery

_EXAMPLES = 3
# Last ranks of the classes of the positives' histogram.
_RANKS = (1, 3, 10, 30, 100, 300, 1000)
DEEPER = "deeper"


@dataclass
class Spread:
    """Of numbers that are added one by one: how many, their mean, the lowest and the highest."""

    count: int = 0
    total: float = 0.0
    lowest: float = math.inf
    highest: float = -math.inf

    @property
    def mean(self) -> float:
        """NaN of no numbers."""
        return self.total / self.count if self.count else math.nan

    def add(self, values: Iterable[float]) -> None:
        for value in values:
            self.count += 1
            self.total += value
            self.lowest, self.highest = min(self.lowest, value), max(self.highest, value)


@dataclass
class Summary:
    """Totals of a run.

    Attributes:
        queries: that were mined.
        lines: that were written of them.
        short: queries with fewer negatives than wanted; of those, `none` have no negative at all.
        left_out: queries of which no line was written.
        unusable: rows that could not be compared.
        candidates: documents that the rules were applied to.
        dropped: by rule, how many of them it left out that no rule before it did.
        ranks: by class of rank ("1", "2-3", ..., "deeper"), how many positives have it.
        positives_in_corpus: positives that the corpus has.
        positives, negatives: spread of the scores; those of queries without a line are among the positives only.
        examples: the first few queries with negatives.
    """

    queries: int = 0
    lines: int = 0
    short: int = 0
    none: int = 0
    left_out: int = 0
    unusable: int = 0
    candidates: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    ranks: dict[str, int] = field(default_factory=dict)
    positives_in_corpus: int = 0
    positives: Spread = field(default_factory=Spread)
    negatives: Spread = field(default_factory=Spread)
    examples: list[MinedQuery] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ranks = dict.fromkeys((*(_class(rank) for rank in _RANKS), DEEPER), 0)

    def add(self, found: MinedQuery, *, lines: int) -> None:
        """Count a query of which so many lines were written."""
        self.queries += 1
        self.lines += lines
        self.short += len(found.negatives) < found.wanted
        self.none += not found.negatives
        self.left_out += not lines
        self.candidates += found.candidates
        self.dropped.update(found.dropped)
        for positive in found.positives:
            self.ranks[_class(positive.rank)] += 1
            self.positives_in_corpus += positive.in_corpus
        self.positives.add(positive.score for positive in found.positives)
        if lines:
            self.negatives.add(negative.score for negative in found.negatives)
            if found.negatives and len(self.examples) < _EXAMPLES:
                self.examples.append(found)


def _class(rank: int | None) -> str:
    first = 1
    for last in _RANKS:
        if rank is not None and rank <= last:
            return str(last) if first == last else f"{first}-{last}"
        first = last + 1
    return DEEPER
