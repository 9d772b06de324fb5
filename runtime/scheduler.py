"""Batching across requests: what arrives while the engine is busy runs together when it is free.

There is no timer: an item that finds the engine idle runs at once and where it is, so a single query pays nothing for
the queue.
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
    """Runs the items of many requests in common batches, one batch at a time.

    A request that finds nothing running and nothing waiting, and fits into one batch, runs in the thread that hands it
    in; what has to wait is run by a worker thread.

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
        self._runs_in: threading.Thread | None = None  # who runs a batch now
        self._worker = threading.Thread(target=self._work, name="rtx-scheduler", daemon=True)
        self._worker.start()

    def submit(
        self, items: Sequence[Encoded], future: Future[NDArray[np.float32]] | None = None
    ) -> Future[NDArray[np.float32]]:
        """Queue the items of one request; cancelling the future takes back those that have not started.

        Args:
            items: at least one.
            future: of the results; None for a new one.

        Returns:
            The future of [len(items), dimension] or [len(items)] float32, in the order of `items`.

        Raises:
            EngineError: the scheduler is closed.
        """
        with self._changed:
            return self._queue(items, future or Future())

    def run_or_submit(self, items: Sequence[Encoded], future: Future[NDArray[np.float32]]) -> None:
        """Run the items of one request at once, in the caller's thread, if the engine is idle; else as `submit`.

        Args:
            items: at least one.
            future: of the results; done on return if they ran here. If it was cancelled before, nothing is run.

        Raises:
            EngineError: the scheduler is closed.
        """
        with self._changed:
            idle = self._runs_in is None and not self._waiting and not self._closed
            if not idle or len(self._first_batch(items)) < len(items):
                self._queue(items, future)
                return
            self._runs_in = threading.current_thread()
        try:
            if not future.cancelled():
                _settle(future, results=self._results(items))
        except BaseException as broken:  # noqa: BLE001 - whatever it is belongs to who waits for the future
            _settle(future, error=broken)
        finally:
            with self._changed:
                self._runs_in = None
                self._changed.notify_all()

    def close(self) -> None:
        """Finish the batch that is running, cancel what waits, and stop the worker."""
        here = threading.current_thread()
        with self._changed:
            self._closed = True
            for _, request, _ in self._waiting:
                request.future.cancel()
            self._waiting.clear()
            self._changed.notify_all()
            while self._runs_in not in (None, here):
                self._changed.wait()
        if here is not self._worker:
            self._worker.join()

    def _queue(self, items: Sequence[Encoded], future: Future[NDArray[np.float32]]) -> Future[NDArray[np.float32]]:
        assert items, "a request without items would wait forever"
        if self._closed:
            raise EngineError("the model is closed; no further request is taken")
        request = _Request(future, missing=len(items), rows=[None] * len(items))
        self._waiting.extend((item, request, position) for position, item in enumerate(items))
        self._changed.notify_all()
        return future

    def _work(self) -> None:
        while (batch := self._take()) is not None:
            if not batch:
                continue
            try:
                results = self._results([item for item, _, _ in batch])
            except BaseException as broken:  # noqa: BLE001 - whatever it is belongs to those who wait, not to this thread
                for _, request, _ in batch:
                    _settle(request.future, error=broken)
                continue
            for (_, request, position), row in zip(batch, results, strict=True):
                request.rows[position] = row
                request.missing -= 1
                if request.missing == 0:
                    _settle(request.future, results=np.stack([row for row in request.rows if row is not None]))

    def _results(self, items: Sequence[Encoded]) -> NDArray[np.float32]:
        results = self._run(items)
        assert len(results) == len(items), f"{len(results)} results for {len(items)} items"
        return results

    def _take(self) -> list[tuple[Encoded, _Request, int]] | None:
        """The next batch; empty if all that waited was cancelled meanwhile, None when the scheduler is closed."""
        with self._changed:
            if self._runs_in is self._worker:
                self._runs_in = None
                self._changed.notify_all()
            while not self._closed and (self._runs_in is not None or not self._waiting):
                self._changed.wait()
            if self._closed:
                return None
            window = min(len(self._waiting), self._budget.max_batch_items * _WINDOW_BATCHES)
            entries = [self._waiting.popleft() for _ in range(window)]
            entries = [entry for entry in entries if not entry[1].future.done()]
            if not entries:
                return []
            chosen = self._first_batch([item for item, _, _ in entries])
            left = set(range(len(entries))) - set(chosen)
            self._waiting.extendleft(entries[index] for index in sorted(left, reverse=True))
            self._runs_in = self._worker
            return [entries[index] for index in chosen]

    def _first_batch(self, items: Sequence[Encoded]) -> list[int]:
        """Which of the items, oldest first, run now."""
        # Images that become vectors by themselves run apart from what has tokens.
        alike = [place for place, item in enumerate(items) if bool(item.ids) == bool(items[0].ids)]
        batch = next_batch(
            [items[place].length for place in alike],
            max_batch_tokens=self._budget.max_batch_tokens,
            max_batch_items=self._budget.max_batch_items,
            packed=self._packed,
        )
        return [alike[index] for index in batch]


def _settle(
    future: Future[NDArray[np.float32]],
    *,
    results: NDArray[np.float32] | None = None,
    error: BaseException | None = None,
) -> None:
    # False: the caller cancelled while the batch ran. True keeps a later cancel from racing with the result.
    if future.done() or not future.set_running_or_notify_cancel():
        return
    if results is None:
        future.set_exception(error)
    else:
        future.set_result(results)
