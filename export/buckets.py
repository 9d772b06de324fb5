"""Buckets of lengths: what sizes of batches an engine is tuned for. Pure functions.

An engine of TensorRT has a profile for each bucket, a box of sizes with the one that it is tuned for. A batch of short
texts then does not run with what was tuned for long ones, and memory is bounded by the largest box.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from rtx.runtime.engine import Budget
from rtx.runtime.errors import UsageError

Range = tuple[int, int, int]
"""Least, best and largest size of an axis."""

MULTIPLE = 16
"""Ends of buckets are multiples of it: products are in tiles of so many rows."""
BUCKETS = 5
LARGEST = Budget.of("cuda")
"""Of a batch."""
_FIRST, _STEP = 32, 4
# Of what it may be at most, a batch has a fraction when it is tuned for: services are seldom full.
_BEST_PART = 4


def spread_lengths(most: int, count: int = BUCKETS) -> tuple[int, ...]:
    """Ends of buckets where nothing is known of the lengths: each four times the last, and the limit.

    Args:
        most: the limit on length.
        count: of buckets, at most.
    """
    ends = [end for end in (_FIRST * _STEP**power for power in range(count - 1)) if end < most]
    return (*ends, most)


def fit_lengths(lengths: Sequence[int], most: int, count: int = BUCKETS) -> tuple[int, ...]:
    """Ends of at most so many buckets in which texts of these lengths have the least padding.

    Args:
        lengths: tokens of texts as they are served; empty for `spread_lengths`. Longer ones than `most` are cut to it.
        most: the limit on length, which is the last end.
        count: of buckets, at most.

    Returns:
        Rising ends; texts as long as an end belong to its bucket. The sum over all texts of end - length is the least
        that multiples of 16 allow (by dynamic programming over the lengths that occur).
    """
    if not lengths:
        return spread_lengths(most, count)
    occurring = Counter(min(most, -(-length // MULTIPLE) * MULTIPLE) for length in lengths)
    ends = sorted({*occurring, most})
    # before[i]: texts in the first i ends; costs[i]: the least sum of ends over them, with a bucket that ends there.
    before = np.cumsum([0, *(occurring[end] for end in ends)])
    costs = np.full(len(ends) + 1, np.inf)
    costs[0] = 0.0
    cuts = []
    for _ in range(min(count, len(ends))):
        through = [costs[:stop] + (before[stop] - before[:stop]) * end for stop, end in enumerate(ends, 1)]
        cuts.append([0, *(int(found.argmin()) for found in through)])
        costs = np.array([0.0, *(found.min() for found in through)])
    chosen, stop = [], len(ends)
    for cut in reversed(cuts):
        if stop > 0:
            chosen.append(ends[stop - 1])
            stop = cut[stop]
    return tuple(reversed(chosen))


def check_lengths(lengths: Sequence[int], most: int) -> tuple[int, ...]:
    """Ends that a user gave, with the model's limit behind them.

    Raises:
        UsageError: they do not rise, or go beyond the limit.
    """
    if list(lengths) != sorted(set(lengths)) or min(lengths, default=2) < 2 or max(lengths, default=0) > most:
        raise UsageError(f"lengths: expected rising numbers from 2 to the model's limit of {most}, got {list(lengths)}")
    return tuple(dict.fromkeys((*lengths, most)))


def row_range(length: int) -> Range:
    """Rows of a batch of at most so many tokens each."""
    most = max(1, min(LARGEST.max_batch_items, LARGEST.max_batch_tokens // length))
    return 1, max(1, most // _BEST_PART), most


def length_ranges(ends: Sequence[int]) -> list[Range]:
    """Of each bucket, from behind the one before."""
    starts = [1, *(end + 1 for end in ends[:-1])]
    return [(min(start, end), end, end) for start, end in zip(starts, ends, strict=True)]
