"""Which rows make a batch. Free of torch, and of the texts: rows are kept apart by their hashes.

A pass over the data is a function of the data, the seed and the number of the pass alone, so that a resumed run sees
the same batches. It is planned window by window, as it is asked for; all that is held is a permutation, 4 bytes a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.errors import DataError, UsageError
from rtx.trainer.config import Mixing
from rtx.trainer.data import TrainingData
from rtx.trainer.store import TextHashes

# Of a window: so many batches, or as many as so many rows make. A row that has to wait for another batch finds one
# among them, and the sets that tell which are held for one window.
_WINDOW_BATCHES = 64
_WINDOW_ROWS = 32768
# Rows beyond a window, one for so many of it, that take the place of those that wait.
_AHEAD = 4


class BatchSampler:
    """Every row once a pass, in batches of near-equal size, those of several processes together.

    With `no_duplicates`, no query and no positive occurs twice in a batch, and none is another row's negative: in-batch
    negatives would tell the model that a text does not match itself. A row that fits no batch of its window comes with
    a later one; one that fits none until the end of the pass is left out of it, and so are some earlier where far too
    many wait. The first document of a row is its positive.

    Args:
        data: what to draw from.
        batch_size: most rows of a batch, over all processes.
        seed: of the shuffling.
        no_duplicates: keep rows that share a text apart; for losses with in-batch negatives.
        mixing: "joined" draws a batch from all sources as one; with the others a batch has rows of one source:
            "proportional" takes every source to its end, in an order that is shuffled, "in_turn" takes one batch of
            each in turn and ends with the source that has fewest.
        process: number of this process, from 0.
        processes: how many share every batch. Each has consecutive rows of it, at least one; the numbers differ by at
            most one. A batch that has fewer rows than there are processes, because all others share their texts, is
            filled up with any others, so that their number is always as `len` says.

    Raises:
        UsageError: a batch would have no row for some process.
        DataError: a source has fewer rows than there are processes.
    """

    def __init__(
        self,
        data: TrainingData,
        *,
        batch_size: int,
        seed: int,
        no_duplicates: bool,
        mixing: Mixing = "joined",
        process: int = 0,
        processes: int = 1,
    ) -> None:
        if batch_size < processes:
            raise UsageError(f"batch_size: {batch_size} rows for {processes} processes; expected at least one for each")
        # What skips the batches of a resumed run is a sampler in torch's terms, which has these two.
        self.batch_size, self.drop_last = batch_size, False
        self._data = data
        self._seed = seed
        self._no_duplicates = no_duplicates
        self._mixing = mixing
        self._process, self._processes = process, processes
        self._epoch = 0
        self._pools = _pools(data, joined=mixing == "joined")
        for pool, source in zip(self._pools, data.sources, strict=False):
            if len(pool) < processes:
                name = "training data" if mixing == "joined" else source.name
                raise DataError(f"{name}: has {len(pool)} rows; expected at least {processes}, one a process")

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        batches = [self._batches_of(pool) for pool in self._pools]
        return min(batches) * len(batches) if self._mixing == "in_turn" else sum(batches)

    def __iter__(self) -> Iterator[list[int]]:
        """This process's rows of each batch, as positions in the data."""
        for batch in self.plan(self._epoch):
            bounds = [len(batch) * number // self._processes for number in (self._process, self._process + 1)]
            yield batch[bounds[0] : bounds[1]]

    def plan(self, epoch: int) -> Iterator[list[int]]:
        """The batches of a pass with the rows of all processes."""
        generator = np.random.default_rng([self._seed, epoch])
        counts = np.array([self._batches_of(pool) for pool in self._pools])
        if self._mixing == "in_turn":
            order = np.tile(np.arange(len(counts)), counts.min())
        else:
            order = np.repeat(np.arange(len(counts)), counts)
            generator.shuffle(order)
        plans = [self._plan_pool(pool, generator.spawn(1)[0]) for pool in self._pools]
        for number in order:
            batch = next(plans[number])
            if len(batch) < self._processes:
                batch += self._fill(batch, self._pools[number], generator)
            yield batch

    def _fill(self, batch: list[int], pool: range, generator: np.random.Generator) -> list[int]:
        """Other rows of the pool, so that every process has one."""
        missing = self._processes - len(batch)
        drawn = generator.choice(len(pool), size=min(len(pool), self._processes + missing), replace=False) + pool.start
        return [row for row in drawn.tolist() if row not in batch][:missing]

    def _batches_of(self, pool: range) -> int:
        # Rather somewhat fewer batches than one that cannot be shared.
        return min(-(-len(pool) // self.batch_size), len(pool) // self._processes)

    def _plan_pool(self, pool: range, generator: np.random.Generator) -> Iterator[list[int]]:
        batches = self._batches_of(pool)
        order = np.arange(pool.start, pool.stop, dtype=np.uint32)
        generator.shuffle(order)
        rows = min(len(pool), batches * self.batch_size)
        ends = _Ends(rows, batches)
        if not self._no_duplicates:
            for number in range(batches):
                yield order[ends[number] : ends[number + 1]].tolist()
            return
        window = max(_WINDOW_BATCHES, _WINDOW_ROWS // self.batch_size)
        ahead = window * self.batch_size // _AHEAD
        waiting, read = order[:0], 0
        for first in range(0, batches, window):
            last = min(first + window, batches)
            room = [ends[batch + 1] - ends[batch] for batch in range(first, last)]
            until = min(ends[last] + ahead, rows)
            here, read = np.concatenate([waiting, order[read:until]]), until
            plan, left = plan_window(self._data.hashes(here), room, generator)
            for batch in plan:
                yield here[batch].tolist()
            # Not all: where one text is that of most rows, they would become more and more.
            waiting = here[left[: sum(room) + ahead]]


class _Ends:
    """Where the batches of near-equal size end in so many rows."""

    def __init__(self, rows: int, batches: int) -> None:
        self._size, self._larger = divmod(rows, batches)

    def __getitem__(self, batch: int) -> int:
        return batch * self._size + min(batch, self._larger)


def plan_window(
    texts: TextHashes, room: Sequence[int], generator: np.random.Generator
) -> tuple[list[list[int]], list[int]]:
    """Spread rows over batches so that no two that share a text meet, unless what they share are negatives.

    Args:
        texts: hashes of the rows' texts: query, positive, negatives.
        room: most rows of each batch; all together not more than there are rows.
        generator: decides which rows meet.

    Returns:
        The rows of each batch, none of which is empty, and the rows that are in no batch: those that fit first.
    """
    batches = len(room)
    plan: list[list[int]] = [[] for _ in room]
    anchors: list[set[int]] = [set() for _ in room]
    negatives: list[set[int]] = [set() for _ in room]
    held: Counter[int] = Counter()
    left: list[int] = []
    sharing = _that_share(texts)
    # Rows that are hard to place come first: the others fit into whatever room is left.
    constrained = np.flatnonzero(sharing).tolist()
    starts = generator.integers(batches, size=len(constrained)).tolist()
    for row, start in zip(constrained, starts, strict=True):
        first, *others = texts.values[texts.starts[row] : texts.starts[row + 1]].tolist()
        own, given = {first, others[0]}, {*others[1:]}
        # A text that is in every batch fits in none; the search would be long.
        tries = () if any(held[text] >= batches for text in own) else range(start, start + batches)
        for step in tries:
            batch = step % batches
            if (
                len(plan[batch]) < room[batch]
                and own.isdisjoint(anchors[batch])
                and own.isdisjoint(negatives[batch])
                and given.isdisjoint(anchors[batch])
            ):
                plan[batch].append(row)
                anchors[batch] |= own
                negatives[batch] |= given
                held.update(own)
                break
        else:
            left.append(row)
    free = iter(np.flatnonzero(~sharing).tolist())
    # The emptiest first: where rows are left over, the batches are still of near-equal size.
    for level in range(max(room)):
        short = [rows for rows, limit in zip(plan, room, strict=True) if len(rows) == level < limit]
        for rows, row in zip(short, islice(free, len(short)), strict=False):
            rows.append(row)
    return plan, [*free, *left]


def _that_share(texts: TextHashes) -> NDArray[np.bool_]:
    """[rows]: whether a row may have a text in common with another one that it must not meet then."""
    starts, counts = texts.starts[:-1], np.diff(texts.starts)
    anchors = texts.values[np.stack([starts, starts + 1])]
    given = np.ones(len(texts.values), dtype=np.bool_)
    given[starts] = given[starts + 1] = False
    negatives, owners = texts.values[given], np.repeat(np.arange(len(counts)), counts - 2)
    known, inverse, times = np.unique(anchors, return_inverse=True, return_counts=True)
    shared = (times[inverse.reshape(anchors.shape)] > 1) | np.isin(anchors, negatives)
    sharing: NDArray[np.bool_] = np.logical_or(shared[0], shared[1])
    sharing[owners[np.isin(negatives, known)]] = True
    return sharing


def _pools(data: TrainingData, *, joined: bool) -> list[range]:
    """The positions that batches are drawn from together."""
    if joined:
        return [range(len(data))]
    ends = np.cumsum([0, *(source.rows for source in data.sources)]).tolist()
    return [range(start, end) for start, end in pairwise(ends)]
