"""What Embedder and Reranker share: a model that is open, and the ways of running items through it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.bundle import Bundle
from rtx.runtime.engine import Budget, Engine, run_items
from rtx.runtime.errors import InvalidItemsError, ItemError, UsageError
from rtx.runtime.scheduler import Scheduler
from rtx.runtime.text import Encoded, TextPreprocessor

OnInvalid = Literal["raise", "nan"]
Encode = Callable[[Sequence[object]], "list[Encoded | ItemError]"]

# Items tokenised at a time: bounds the memory that tokens take, whatever the length of a call.
_WINDOW_ITEMS = 4096


class Session:
    """An open model. Safe to use from several threads, and from any number of tasks by `arun`.

    Args:
        preprocessor: tokenises by the model's contract.
        engine: runs the model.
        budget: how much goes through the engine at once.
    """

    def __init__(self, preprocessor: TextPreprocessor, engine: Engine, budget: Budget | None = None) -> None:
        self.contract = preprocessor.contract
        self.preprocessor = preprocessor
        self.engine = engine
        self.budget = budget or Budget()
        self._scheduler: Scheduler | None = None
        self._starting = threading.Lock()

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str],
        *,
        variant: str | None = None,
        threads: int | None = None,
        budget: Budget | None = None,
        verify: bool = True,
    ) -> Self:
        opened = Bundle.open(bundle)
        engine = opened.engine(variant, threads=threads, verify=verify)
        return cls(opened.preprocessor(verify=verify), engine, budget)

    def run(
        self,
        items: Sequence[object],
        encode: Encode,
        check: Callable[[int, object], object],
        on_invalid: OnInvalid,
    ) -> NDArray[np.float32]:
        """Items through the model, in the caller's thread.

        Args:
            items: what `encode` takes.
            encode: tokenises some of the items.
            check: looks at one item without tokenising it, so that bad ones are found before anything is computed.
            on_invalid: "raise" lists all items that cannot be used, "nan" gives them rows of NaN.

        Returns:
            [len(items), dimension] or [len(items)] float32.
        """
        if on_invalid == "raise":
            _raise_for([found for i, item in enumerate(items) if isinstance(found := check(i, item), ItemError)], items)
        results = self._empty(len(items))
        for start in range(0, len(items), _WINDOW_ITEMS):
            encoded = encode(items[start : start + _WINDOW_ITEMS])
            rows, valid = _split(encoded, start, items, on_invalid)
            results[rows] = run_items(self.engine, self.preprocessor, valid, self.budget)
        return results

    async def arun(self, items: Sequence[object], encode: Encode, on_invalid: OnInvalid) -> NDArray[np.float32]:
        """As `run`, in common batches with all other requests that wait at the time."""
        encoded = await asyncio.to_thread(encode, items)
        rows, valid = _split(encoded, 0, items, on_invalid)
        results = self._empty(len(items))
        if valid:
            computed: NDArray[np.float32] = await asyncio.wrap_future(self._started().submit(valid))
            results[rows] = computed
        return results

    def close(self) -> None:
        """Give back the engine; requests that wait are cancelled."""
        if self._scheduler is not None:
            self._scheduler.close()
        self.engine.close()

    def _started(self) -> Scheduler:
        with self._starting:  # event loops of several threads may share the model
            if self._scheduler is None:
                self._scheduler = Scheduler(self._run_batch, self.budget)
            return self._scheduler

    def _run_batch(self, items: Sequence[Encoded]) -> NDArray[np.float32]:
        return self.engine.run(self.preprocessor.collate(items))

    def _empty(self, count: int) -> NDArray[np.float32]:
        shape = (count, self.contract.dimension) if self.contract.task == "embed" else (count,)
        return np.full(shape, np.nan, dtype=np.float32)


def items_of(items: object, what: str) -> Sequence[object]:
    """The items of a call as a sequence.

    Raises:
        UsageError: a single text was given where a list of them belongs: it would be read letter by letter.
    """
    if isinstance(items, str | bytes):
        raise UsageError(f"expected a list of {what}, got a single {type(items).__name__}; put it in a list")
    return items if isinstance(items, list | tuple) else list(items)  # type: ignore[call-overload]


def _split(
    encoded: Sequence[Encoded | ItemError], start: int, items: Sequence[object], on_invalid: OnInvalid
) -> tuple[list[int], list[Encoded]]:
    """Rows and items that can be run; `start` is where `encoded` begins in `items`."""
    if on_invalid == "raise":
        wrong = [(row, item) for row, item in enumerate(encoded, start) if isinstance(item, ItemError)]
        _raise_for([ItemError(row, item.message) for row, item in wrong], items)
    rows = [start + row for row, item in enumerate(encoded) if not isinstance(item, ItemError)]
    return rows, [item for item in encoded if not isinstance(item, ItemError)]


def _raise_for(errors: Sequence[ItemError], items: Sequence[object]) -> None:
    if errors:
        raise InvalidItemsError(errors, len(items))
