"""Which items run together: lengths in, index lists out. Pure functions, so that no model is needed to test them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def plan_batches(
    lengths: Sequence[int], *, max_batch_tokens: int, max_batch_items: int, packed: bool = False
) -> list[list[int]]:
    """Cut items into batches that stay within a token budget.

    With padding: batches of similar length, longest first, so that the first batch shows the peak memory. Packed: in
    the order of the call, which costs nothing where there is no padding. An item longer than the budget runs alone.

    Args:
        lengths: tokens of each item.
        max_batch_tokens: limit on what a batch costs: `rows * longest row`, or packed the sum of its lengths.
        max_batch_items: limit on the rows of a batch. Packed, it is what bounds the token ids, which are padded all the
            same: to `max_batch_items * max_batch_tokens`.
        packed: whether the engine leaves padding out (`Engine.packed`).

    Returns:
        Lists of positions in `lengths`; together they hold each position exactly once.
    """
    batches: list[list[int]] = []
    if packed:
        start = 0
        while start < len(lengths):
            stop = _fill(lengths, start, max_batch_tokens, max_batch_items)
            batches.append(list(range(start, stop)))
            start = stop
        return batches
    # A stable sort: equal lengths keep the order of the call, which makes a plan reproducible.
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
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


def next_batch(
    lengths: Sequence[int], *, max_batch_tokens: int, max_batch_items: int, packed: bool = False
) -> list[int]:
    """The batch to run now out of a queue: the item that has waited longest, and others with it.

    With padding these are the ones whose length is nearest to its own; packed, the next ones that have waited longest.

    Args:
        lengths: tokens of each waiting item, oldest first; not empty.
        max_batch_tokens: as in `plan_batches`; the oldest item runs even if it is longer.
        max_batch_items: limit on the rows of the batch.
        packed: whether the engine leaves padding out (`Engine.packed`).

    Returns:
        Positions in `lengths`, the oldest item's (0) first.
    """
    if packed:
        return list(range(_fill(lengths, 0, max_batch_tokens, max_batch_items)))
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


def _fill(lengths: Sequence[int], start: int, max_batch_tokens: int, max_batch_items: int) -> int:
    """Where a packed batch that begins at `start` ends."""
    stop, tokens = start + 1, lengths[start]
    while stop < min(len(lengths), start + max_batch_items) and tokens + lengths[stop] <= max_batch_tokens:
        tokens += lengths[stop]
        stop += 1
    return stop
