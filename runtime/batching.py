"""Which items run together: lengths in, index lists out. Pure functions, so that no model is needed to test them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def plan_batches(lengths: Sequence[int], *, max_batch_tokens: int, max_batch_items: int) -> list[list[int]]:
    """Cut items into batches of similar length whose padded size stays within a token budget.

    Longest first, so that the first batch shows the peak memory. An item longer than the budget runs alone.

    Args:
        lengths: tokens of each item.
        max_batch_tokens: limit on `rows * longest row` of a batch, padding included.
        max_batch_items: limit on the rows of a batch.

    Returns:
        Lists of positions in `lengths`; together they hold each position exactly once.
    """
    # A stable sort: equal lengths keep the order of the call, which makes a plan reproducible.
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    batches: list[list[int]] = []
    current: list[int] = []
    for index in order:
        longest = lengths[current[0]] if current else lengths[index]
        if current and (len(current) >= max_batch_items or (len(current) + 1) * longest > max_batch_tokens):
            batches.append(current)
            current = []
        current.append(index)
    if current:
        batches.append(current)
    return batches


def next_batch(lengths: Sequence[int], *, max_batch_tokens: int, max_batch_items: int) -> list[int]:
    """The batch to run now out of a queue: the item that has waited longest, and those whose length is nearest to it.

    Args:
        lengths: tokens of each waiting item, oldest first; not empty.
        max_batch_tokens: limit on `rows * longest row`, padding included; the oldest item runs even if it is longer.
        max_batch_items: limit on the rows of the batch.

    Returns:
        Positions in `lengths`, the oldest item's (0) first.
    """
    by_distance = np.argsort(np.abs(np.asarray(lengths, dtype=np.int64) - lengths[0]), kind="stable").tolist()
    batch = [0]
    longest = lengths[0]
    for index in by_distance:
        if index == 0:
            continue
        longest_with = max(longest, lengths[index])
        if len(batch) >= max_batch_items or (len(batch) + 1) * longest_with > max_batch_tokens:
            break
        batch.append(index)
        longest = longest_with
    return batch
