"""What Embedder and Reranker share: a model that is open, and the ways of running items through it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import ClassVar, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.bundle import Bundle
from rtx.runtime.contract import Contract, Task
from rtx.runtime.engine import Budget, Engine, run_batch, run_items
from rtx.runtime.errors import EngineError, InvalidItemsError, ItemError, UsageError
from rtx.runtime.images import ImageLimits
from rtx.runtime.items import count_images
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.scheduler import Scheduler
from rtx.runtime.text import Encoded

A = TypeVar("A")
B = TypeVar("B")

OnInvalid = Literal["raise", "nan"]
Check = Callable[[int, object], object]
Encode = Callable[[Sequence[object]], "list[Encoded | ItemError]"]
_Rows = slice | list[int]

# Items prepared at a time, the next ones while the model runs: bounds the memory that tokens and images take, whatever
# the length of a call. Smaller windows, so that shorter calls overlap too, gain nothing: tokenising takes 1 to 2 % of
# MiniLM's time, and on a CPU the cores that it would use are the model's.
_WINDOW_ITEMS = 4096
_WINDOW_IMAGES = 32


# What to do with a model that was opened as the other kind.
_OTHER_KIND: dict[Task, str] = {
    "embed": "this model is an embedder: open it with Embedder, or use `rtx embed`",
    "rerank": "this model is a reranker: open it with Reranker, or use `rtx rerank`",
}


class Session:
    """An open model. Safe to use from several threads, and from any number of tasks.

    Args:
        preprocessor: prepares items by the model's contract.
        engine: runs the model.
        budget: how much goes through the engine at once.

    Raises:
        UsageError: the contract is of the other task.
    """

    task: ClassVar[Task]

    def __init__(self, preprocessor: Preprocessor, engine: Engine, *, budget: Budget | None = None) -> None:
        self._check_task(preprocessor.contract)
        self.contract = preprocessor.contract
        self.preprocessor = preprocessor
        self.engine = engine
        self.budget = budget or Budget()
        self._scheduler: Scheduler | None = None
        self._scheduler_process = 0
        self._closed = False
        self._starting = threading.Lock()

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str],
        *,
        variant: str | None = None,
        threads: int | None = None,
        device: str = "cpu",
        budget: Budget | None = None,
        limits: ImageLimits | None = None,
        verify: bool = True,
    ) -> Self:
        """Open a bundle.

        Args:
            bundle: folder that `rtx export` wrote.
            variant: name of a variant; None for the bundle's default, the fastest that passed its gate.
            threads: threads of one run; None for all cores that the process may use.
            device: "cpu"; "cuda" or "cuda:N" for ONNX Runtime on an NVIDIA GPU; "tensorrt" or "tensorrt:N" for the
                bundle's engines on one. On a GPU the default variant is fp16 or else fp32.
            budget: how much goes through the engine at once; None for `Budget.of(device)`.
            limits: how large images may be, and where they may come from.
            verify: compare the files that are read with the hashes in the manifest.

        Raises:
            BundleError: the folder is no bundle, is damaged, or of a version that this rtx does not read.
            UsageError: there is no such variant, it does not run on that device, or the bundle is of the other task.
            MissingExtraError: onnxruntime is not installed, or not the one that the device needs.
            EngineError: the graph could not be loaded, or the device cannot be used.
        """
        opened = Bundle.open(bundle)
        cls._check_task(opened.manifest.contract)
        preprocessor = opened.preprocessor(limits=limits, verify=verify)
        engine = opened.engine(variant, threads=threads, device=device, verify=verify)
        return cls(preprocessor, engine, budget=budget or Budget.of(device))

    def close(self) -> None:
        """Give back the engine; requests that wait are cancelled."""
        with self._starting:
            self._closed = True
        # Not a fork's: what its parent was running at the time would never end here.
        if self._scheduler is not None and self._scheduler_process == os.getpid():
            self._scheduler.close()
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @classmethod
    def _check_task(cls, contract: Contract) -> None:
        if contract.task != cls.task:
            raise UsageError(_OTHER_KIND[contract.task])

    def _run(
        self,
        items: Sequence[object],
        encode: Encode,
        check: Check,
        on_invalid: OnInvalid,
    ) -> NDArray[np.float32]:
        """Items through the model, in the caller's thread.

        Args:
            items: what `encode` takes.
            encode: prepares some of the items.
            check: looks at one item without preparing it, so that bad ones are found before anything is computed.
            on_invalid: "raise" lists all items that cannot be used, "nan" gives them rows of NaN.

        Returns:
            [len(items), dimension] or [len(items)] float32.

        Raises:
            InvalidItemsError: lists every item that cannot be used.
            UsageError: `on_invalid` is neither.
            EngineError: the engine failed.
        """
        _check_on_invalid(on_invalid)
        windows = list(_windows(items))
        if len(windows) == 1:  # all of it is prepared before anything runs: there is no need to look at it before
            rows, valid, invalid = _split(encode(items), 0)
            _raise_for(invalid if on_invalid == "raise" else [], items)
            return self._placed(rows, self._run_items(valid), len(items))
        if on_invalid == "raise":
            _raise_for(_invalid(items, check), items)
        results = self._empty(len(items))
        wrong: list[ItemError] = []
        prepared = one_ahead(encode, [items[window] for window in windows])
        for window, encoded in zip(windows, prepared, strict=True):
            rows, valid, invalid = _split(encoded, window.start)
            wrong += invalid if on_invalid == "raise" else []
            if not wrong:  # a fault that only preparing finds: nothing more is computed, the others are still listed
                results[rows] = self._run_items(valid)
        _raise_for(wrong, items)
        return results

    async def _arun(
        self,
        items: Sequence[object],
        encode: Encode,
        check: Check,
        on_invalid: OnInvalid,
    ) -> NDArray[np.float32]:
        """As `_run`, in common batches with all other requests that wait at the time."""
        _check_on_invalid(on_invalid)
        windows = list(_windows(items))
        if len(windows) == 1:
            return await self._arun_at_once(items, encode, on_invalid)
        if on_invalid == "raise":
            _raise_for(_invalid(items, check), items)
        results = self._empty(len(items))
        wrong: list[ItemError] = []
        running: tuple[_Rows, asyncio.Future[NDArray[np.float32]]] | None = None
        try:
            for window in windows:
                rows, valid, invalid = _split(await asyncio.to_thread(encode, items[window]), window.start)
                wrong += invalid if on_invalid == "raise" else []
                if running is not None:
                    results[running[0]], running = await running[1], None
                if valid and not wrong:
                    running = rows, asyncio.wrap_future(self._started().submit(valid))
            _raise_for(wrong, items)
            if running is not None:
                results[running[0]], running = await running[1], None
        finally:
            if running is not None:
                running[1].cancel()
        return results

    async def _arun_at_once(
        self, items: Sequence[object], encode: Encode, on_invalid: OnInvalid
    ) -> NDArray[np.float32]:
        """As `_arun` for what is prepared at once: in one other thread and back, if the engine is idle."""
        future: Future[NDArray[np.float32]] = Future()

        def start() -> _Rows:
            rows, valid, invalid = _split(encode(items), 0)
            _raise_for(invalid if on_invalid == "raise" else [], items)
            if valid:
                self._started().run_or_submit(valid, future)
            else:
                future.set_result(self._empty(0))
            return rows

        try:
            rows = await asyncio.to_thread(start)
            # One that closing has cancelled is awaited all the same: that raises what asyncio knows as cancelled.
            done = future.done() and not future.cancelled()
            found = future.result() if done else await asyncio.wrap_future(future)
        finally:
            future.cancel()  # takes back what has not started; nothing happens to one that is done
        return self._placed(rows, found, len(items))

    def _started(self) -> Scheduler:
        with self._starting:  # event loops of several threads may share the model
            if self._closed:
                raise EngineError(f"{self.engine.name}: the model is closed; no further request is taken")
            # A fork has the scheduler of the process it is a copy of, but not its thread.
            if self._scheduler is None or self._scheduler_process != os.getpid():
                self._scheduler_process = os.getpid()
                self._scheduler = Scheduler(self._run_batch, self.budget, packed=self.engine.packed)
            return self._scheduler

    def _run_items(self, items: Sequence[Encoded]) -> NDArray[np.float32]:
        return run_items(self.engine, self.preprocessor, items, self.budget)

    def _run_batch(self, items: Sequence[Encoded]) -> NDArray[np.float32]:
        return run_batch(self.engine, self.preprocessor, items)

    def _placed(self, rows: _Rows, found: NDArray[np.float32], count: int) -> NDArray[np.float32]:
        """`found` in its rows of a call of `count` items, NaN in all others."""
        if len(found) == count:
            return found
        results = self._empty(count)
        results[rows] = found
        return results

    def _empty(self, count: int) -> NDArray[np.float32]:
        return np.full(self.contract.output_shape(count), np.nan, dtype=np.float32)


def items_of(items: Iterable[object], what: str) -> Sequence[object]:
    """The items of a call as a sequence.

    Raises:
        UsageError: something else was given where a list belongs: a single text would be read letter by letter, a
            mapping key by key, an image row by row.
    """
    if isinstance(items, list | tuple):
        return items
    single = isinstance(items, str | bytes | bytearray | memoryview | Mapping) or not isinstance(items, Iterable)
    if single or (isinstance(items, np.ndarray) and items.ndim < 4 and items.dtype.kind in "biuf"):
        raise UsageError(f"expected a list of {what}, got a single {type(items).__name__}; put it in a list")
    return list(items)


def _invalid(items: Sequence[object], check: Check) -> list[ItemError]:
    return [found for index, item in enumerate(items) if isinstance(found := check(index, item), ItemError)]


def _windows(items: Sequence[object]) -> Iterator[slice]:
    """What is prepared at a time."""
    start = images = 0
    for place, item in enumerate(items):
        more = count_images(item)
        if place - start >= _WINDOW_ITEMS or (images and images + more > _WINDOW_IMAGES):
            yield slice(start, place)
            start, images = place, 0
        images += more
    if start < len(items):
        yield slice(start, len(items))


def one_ahead(function: Callable[[A], B], inputs: Sequence[A]) -> Iterator[B]:
    """`map`, with the next result computed in another thread while the caller works on the last one."""
    if len(inputs) < 2:
        yield from map(function, inputs)
        return
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(function, inputs[0])
        for following in inputs[1:]:
            result, future = future.result(), pool.submit(function, following)
            yield result
        yield future.result()


def _check_on_invalid(on_invalid: str) -> None:
    if on_invalid not in ("raise", "nan"):
        raise UsageError(f"on_invalid: expected 'raise' or 'nan', got {on_invalid!r}")


def _split(encoded: Sequence[Encoded | ItemError], start: int) -> tuple[_Rows, list[Encoded], list[ItemError]]:
    """Rows and items that can be run, and errors; `start` is the row of the first of `encoded`."""
    valid = [item for item in encoded if not isinstance(item, ItemError)]
    if len(valid) == len(encoded):
        return slice(start, start + len(valid)), valid, []
    rows = [row for row, item in enumerate(encoded, start) if not isinstance(item, ItemError)]
    invalid = [ItemError(row, item.message) for row, item in enumerate(encoded, start) if isinstance(item, ItemError)]
    return rows, valid, invalid


def _raise_for(errors: Sequence[ItemError], items: Sequence[object]) -> None:
    if errors:
        raise InvalidItemsError(errors, len(items))
