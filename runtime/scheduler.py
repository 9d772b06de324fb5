"""Batching across requests: what arrives while the engine is busy runs together when it is free.

There is no timer: an item that finds the engine idle runs at once, so a single query pays nothing for the queue.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.batching import next_batch
from rtx.runtime.engine import Budget
from rtx.runtime.errors import EngineError
from rtx.runtime.text import Encoded

# How far into the queue a batch looks for items of similar length.
_WINDOW_BATCHES = 16


@dataclass(eq=False)
class _Request:
    future: Future[NDArray[np.float32]]
    missing: int
    rows: list[NDArray[np.float32] | None] = field(default_factory=list)


class Scheduler:
    """One worker thread that runs the items of many requests in common batches.

    Args:
        run: a batch of items to results, [n, dimension] or [n] float32.
        budget: limits of one batch.
        packed: whether what runs it leaves padding out (`Engine.packed`): batches then hold what has waited longest,
            whatever its length.
    """

    def __init__(
        self, run: Callable[[Sequence[Encoded]], NDArray[np.float32]], budget: Budget, *, packed: bool = False
    ) -> None:
        self._run = run
        self._budget = budget
        self._packed = packed
        self._waiting: deque[tuple[Encoded, _Request, int]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="rtx-scheduler", daemon=True)
        self._worker.start()

    def submit(self, items: Sequence[Encoded]) -> Future[NDArray[np.float32]]:
        """Queue the items of one request; cancelling the future takes back those that have not started.

        Args:
            items: at least one.

        Returns:
            A future of [len(items), dimension] or [len(items)] float32, in the order of `items`.

        Raises:
            EngineError: the scheduler is closed.
        """
        assert items, "a request without items would wait forever"
        request = _Request(Future(), missing=len(items), rows=[None] * len(items))
        with self._changed:
            if self._closed:
                raise EngineError("the model is closed; no further request is taken")
            self._waiting.extend((item, request, position) for position, item in enumerate(items))
            self._changed.notify()
        return request.future

    def close(self) -> None:
        """Finish the batch that is running, cancel what waits, and stop the worker."""
        with self._changed:
            self._closed = True
            for _, request, _ in self._waiting:
                request.future.cancel()
            self._waiting.clear()
            self._changed.notify()
        if threading.current_thread() is not self._worker:
            self._worker.join()

    def _work(self) -> None:
        while (batch := self._take()) is not None:
            if not batch:
                continue
            try:
                results = self._run([item for item, _, _ in batch])
                assert len(results) == len(batch), f"{len(results)} results for {len(batch)} items"
            except BaseException as broken:  # noqa: BLE001 - whatever it is belongs to those who wait, not to this thread
                for _, request, _ in batch:
                    _settle(request, error=broken)
                continue
            for (_, request, position), row in zip(batch, results, strict=True):
                request.rows[position] = row
                request.missing -= 1
                if request.missing == 0:
                    _settle(request)

    def _take(self) -> list[tuple[Encoded, _Request, int]] | None:
        """The next batch; empty if all that waited was cancelled meanwhile, None when the scheduler is closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            window = min(len(self._waiting), self._budget.max_batch_items * _WINDOW_BATCHES)
            entries = [self._waiting.popleft() for _ in range(window)]
            entries = [entry for entry in entries if not entry[1].future.done()]
            if not entries:
                return []
            # Images that become vectors by themselves run apart from what has tokens.
            alike = [place for place, entry in enumerate(entries) if bool(entry[0].ids) == bool(entries[0][0].ids)]
            batch = next_batch(
                [entries[place][0].length for place in alike],
                max_batch_tokens=self._budget.max_batch_tokens,
                max_batch_items=self._budget.max_batch_items,
                packed=self._packed,
            )
            chosen = [alike[index] for index in batch]
            left = set(range(len(entries))) - set(chosen)
            self._waiting.extendleft(entries[index] for index in sorted(left, reverse=True))
            return [entries[index] for index in chosen]


def _settle(request: _Request, *, error: BaseException | None = None) -> None:
    # False: the caller cancelled while the batch ran. True keeps a later cancel from racing with the result.
    if request.future.done() or not request.future.set_running_or_notify_cancel():
        return
    if error is not None:
        request.future.set_exception(error)
    else:
        request.future.set_result(np.stack([row for row in request.rows if row is not None]))
