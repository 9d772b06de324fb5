from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future

import numpy as np
import pytest
from numpy.typing import NDArray

from rtx.runtime.engine import Budget
from rtx.runtime.errors import EngineError
from rtx.runtime.scheduler import Scheduler
from rtx.runtime.text import Encoded

TIMEOUT_S = 30


def item(value: int, length: int = 1) -> Encoded:
    return Encoded([value] * length, [0] * length)


class Gate:
    """Runs a batch as (first token, length) rows when it is told to, and keeps what was in it."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self.allowed = threading.Semaphore(0)
        self.fails_on: int | None = None

    def __call__(self, items: Sequence[Encoded]) -> NDArray[np.float32]:
        values = [item.ids[0] for item in items]
        self.batches.append(values)
        self.entered.release()
        assert self.allowed.acquire(timeout=TIMEOUT_S)
        if self.fails_on in values:
            raise EngineError(f"cannot run {self.fails_on}")
        return np.array([(item.ids[0], len(item.ids)) for item in items], dtype=np.float32)

    def wait_until_running(self) -> None:
        assert self.entered.acquire(timeout=TIMEOUT_S)

    def let(self, batches: int) -> None:
        self.allowed.release(batches)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def scheduler(gate: Gate) -> Iterator[Scheduler]:
    scheduler = Scheduler(gate, Budget(max_batch_tokens=12, max_batch_items=4))
    yield scheduler
    gate.let(1000)
    scheduler.close()


def rows(future: Future[NDArray[np.float32]]) -> list[list[float]]:
    return future.result(timeout=TIMEOUT_S).tolist()  # type: ignore[no-any-return]


def test_what_waits_together_runs_together(scheduler: Scheduler, gate: Gate):
    first = scheduler.submit([item(1)])
    gate.wait_until_running()
    later = [scheduler.submit([item(value)]) for value in (2, 3)] + [scheduler.submit([item(4), item(5), item(6)])]
    gate.let(3)
    assert rows(first) == [[1, 1]]
    assert [rows(future) for future in later] == [[[2, 1]], [[3, 1]], [[4, 1], [5, 1], [6, 1]]]
    # An idle engine takes a single item at once; of what came meanwhile at most four items run together.
    assert gate.batches == [[1], [2, 3, 4, 5], [6]]


def test_the_oldest_is_always_in_the_next_batch(scheduler: Scheduler, gate: Gate):
    first = scheduler.submit([item(1)])
    gate.wait_until_running()
    futures = [scheduler.submit([item(value, length)]) for value, length in ((2, 9), (3, 1), (4, 20), (5, 1), (6, 2))]
    gate.let(4)
    for future in (first, *futures):
        future.result(timeout=TIMEOUT_S)
    # 2 is the oldest and alone in its budget; 3 takes its nearest along; 4 is longer than the budget and runs alone.
    assert gate.batches == [[1], [2], [3, 5, 6], [4]]


def test_what_is_packed_runs_in_the_order_of_arrival(gate: Gate):
    scheduler = Scheduler(gate, Budget(max_batch_tokens=12, max_batch_items=4), packed=True)
    first = scheduler.submit([item(1)])
    gate.wait_until_running()
    futures = [scheduler.submit([item(value, length)]) for value, length in ((2, 9), (3, 3), (4, 20), (5, 1), (6, 2))]
    gate.let(4)
    for future in (first, *futures):
        future.result(timeout=TIMEOUT_S)
    # 2 and 3 have 12 tokens together, however different they are; 4 is longer than the budget and runs alone.
    assert gate.batches == [[1], [2, 3], [4], [5, 6]]
    scheduler.close()


def test_many_requests_get_their_own_rows_in_order():
    def run(items: Sequence[Encoded]) -> NDArray[np.float32]:
        return np.array([(item.ids[0], len(item.ids)) for item in items], dtype=np.float32)

    scheduler = Scheduler(run, Budget(max_batch_tokens=64, max_batch_items=7))
    random = np.random.default_rng(0)
    requests = [[(int(v), int(n)) for v, n in random.integers(1, 40, size=(count % 9 + 1, 2))] for count in range(200)]
    futures: list[Future[NDArray[np.float32]] | None] = [None] * len(requests)

    def submit(start: int) -> None:
        for index in range(start, len(requests), 4):
            futures[index] = scheduler.submit([item(value, length) for value, length in requests[index]])

    threads = [threading.Thread(target=submit, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    for request, future in zip(requests, futures, strict=True):
        assert future is not None
        assert [tuple(row) for row in rows(future)] == request
    scheduler.close()


def test_scores_are_stacked_too():
    scheduler = Scheduler(lambda items: np.array([len(item.ids) for item in items], dtype=np.float32), Budget())
    result = scheduler.submit([item(1, 3), item(1, 2)]).result(timeout=TIMEOUT_S)
    assert (result.tolist(), result.shape) == ([3.0, 2.0], (2,))
    scheduler.close()


def test_cancelled_items_do_not_run(scheduler: Scheduler, gate: Gate):
    running = scheduler.submit([item(1)])
    gate.wait_until_running()
    cancelled, kept = scheduler.submit([item(2), item(3)]), scheduler.submit([item(4)])
    assert cancelled.cancel()
    assert running.cancel()  # its batch runs to the end, and nobody is given the result
    gate.let(2)
    assert rows(kept) == [[4, 1]]
    assert gate.batches == [[1], [4]]
    for future in (cancelled, running):
        with pytest.raises(CancelledError):
            future.result(timeout=TIMEOUT_S)


def test_a_queue_in_which_all_was_cancelled_is_no_batch(scheduler: Scheduler, gate: Gate):
    scheduler.submit([item(1)])
    gate.wait_until_running()
    assert scheduler.submit([item(2)]).cancel()
    gate.let(1)
    # The worker has found nothing to run and waits again.
    last = scheduler.submit([item(3)])
    gate.let(1)
    assert rows(last) == [[3, 1]]
    assert [2] not in gate.batches


def test_an_error_reaches_the_requests_of_its_batch_and_no_others(scheduler: Scheduler, gate: Gate):
    gate.fails_on = 3
    first = scheduler.submit([item(1)])
    gate.wait_until_running()
    in_batch = scheduler.submit([item(2)])
    split = scheduler.submit([item(3), item(4), item(5), item(6), item(7)])
    after = scheduler.submit([item(8)])
    gate.let(3)
    assert rows(first) == [[1, 1]]
    for future in (in_batch, split):
        with pytest.raises(EngineError, match=r"^cannot run 3$"):
            future.result(timeout=TIMEOUT_S)
    assert rows(after) == [[8, 1]]
    # What was left of a request that has failed is not run.
    assert gate.batches == [[1], [2, 3, 4, 5], [8]]


def test_results_that_are_too_few_fail_the_batch_and_not_the_worker():
    scheduler = Scheduler(lambda _: np.zeros((0, 2), dtype=np.float32), Budget())
    for _ in range(2):
        with pytest.raises(AssertionError, match="0 results for 1 items"):
            scheduler.submit([item(1)]).result(timeout=TIMEOUT_S)
    scheduler.close()


def test_close_finishes_what_runs_and_cancels_what_waits(scheduler: Scheduler, gate: Gate):
    running = scheduler.submit([item(1)])
    gate.wait_until_running()
    split = scheduler.submit([item(2)])
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    with pytest.raises(CancelledError):
        split.result(timeout=TIMEOUT_S)
    assert closing.is_alive()  # it waits for the batch
    gate.let(1)
    closing.join(TIMEOUT_S)
    assert not closing.is_alive()
    assert rows(running) == [[1, 1]]
    assert gate.batches == [[1]]
    assert not scheduler._worker.is_alive()


def hand_in(scheduler: Scheduler, items: Sequence[Encoded]) -> tuple[threading.Thread, Future[NDArray[np.float32]]]:
    """`run_or_submit` in a thread, which is done when it has returned."""
    future: Future[NDArray[np.float32]] = Future()
    thread = threading.Thread(target=scheduler.run_or_submit, args=(items, future))
    thread.start()
    return thread, future


def test_a_request_that_finds_the_engine_idle_runs_where_it_is():
    threads: list[threading.Thread] = []

    def run(items: Sequence[Encoded]) -> NDArray[np.float32]:
        threads.append(threading.current_thread())
        return np.array([item.ids[0] for item in items], dtype=np.float32)

    scheduler = Scheduler(run, Budget(max_batch_tokens=12, max_batch_items=4))
    for values in ([1, 2], [3]):
        future: Future[NDArray[np.float32]] = Future()
        scheduler.run_or_submit([item(value) for value in values], future)
        assert future.done()
        assert future.result().tolist() == values
    assert threads == [threading.current_thread()] * 2
    # More than one batch is not worth the thread of who asks.
    future = Future()
    scheduler.run_or_submit([item(value) for value in range(6)], future)
    assert future.result(TIMEOUT_S).tolist() == list(range(6))
    assert threads[2:] == [scheduler._worker] * 2
    scheduler.close()


def test_what_arrives_while_a_request_runs_where_it_is_runs_together(scheduler: Scheduler, gate: Gate):
    here, first = hand_in(scheduler, [item(1)])
    gate.wait_until_running()
    later = [scheduler.submit([item(2)]), hand_in(scheduler, [item(3)])[1]]
    while len(scheduler._waiting) < 2:
        here.join(0.001)
    assert here.is_alive()
    gate.let(2)
    assert [rows(future) for future in (first, *later)] == [[[1, 1]], [[2, 1]], [[3, 1]]]
    assert gate.batches == [[1], [2, 3]]


def test_an_error_where_it_is_reaches_its_future_and_no_others(scheduler: Scheduler, gate: Gate):
    gate.fails_on = 1
    gate.let(2)
    here, future = hand_in(scheduler, [item(1)])
    here.join(TIMEOUT_S)
    with pytest.raises(EngineError, match=r"^cannot run 1$"):
        future.result(timeout=0)
    here, future = hand_in(scheduler, [item(2)])
    here.join(TIMEOUT_S)
    assert future.result(timeout=0).tolist() == [[2, 1]]


def test_a_cancelled_request_is_not_run_where_it_is(scheduler: Scheduler, gate: Gate):
    cancelled: Future[NDArray[np.float32]] = Future()
    assert cancelled.cancel()
    scheduler.run_or_submit([item(1)], cancelled)
    here, running = hand_in(scheduler, [item(2)])
    gate.wait_until_running()
    assert running.cancel()  # its batch runs to the end, and nobody is given the result
    gate.let(2)
    here.join(TIMEOUT_S)
    assert rows(scheduler.submit([item(3)])) == [[3, 1]]
    assert gate.batches == [[2], [3]]


def test_close_waits_for_what_runs_where_it_is(scheduler: Scheduler, gate: Gate):
    here, running = hand_in(scheduler, [item(1)])
    gate.wait_until_running()
    waiting = scheduler.submit([item(2)])
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    with pytest.raises(CancelledError):
        waiting.result(timeout=TIMEOUT_S)
    closing.join(0.02)
    assert closing.is_alive()
    gate.let(1)
    for thread in (here, closing):
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    assert rows(running) == [[1, 1]]
    with pytest.raises(EngineError, match=r"^the model is closed; no further request is taken$"):
        scheduler.run_or_submit([item(1)], Future())


def test_each_item_runs_once_and_one_batch_at_a_time():
    running, ran = threading.Lock(), []

    def run(items: Sequence[Encoded]) -> NDArray[np.float32]:
        assert running.acquire(blocking=False), "two batches at once"
        ran.extend(item.ids[0] for item in items)
        running.release()
        return np.array([item.ids[0] for item in items], dtype=np.float32)

    scheduler = Scheduler(run, Budget(max_batch_tokens=64, max_batch_items=5), packed=True)
    futures: dict[int, Future[NDArray[np.float32]]] = {start: Future() for start in range(0, 1600, 2)}

    def request(client: int) -> None:
        for start in range(2 * client, 1600, 16):
            (scheduler.submit if start % 3 == 0 else scheduler.run_or_submit)(
                [item(start), item(start + 1)], futures[start]
            )
            if start % 5 == 0:
                futures[start].exception(timeout=TIMEOUT_S)  # waits, so that the next may find the engine idle

    threads = [threading.Thread(target=request, args=(client,)) for client in range(8)]
    for thread in threads:
        thread.start()
    for start, future in futures.items():
        assert future.result(timeout=TIMEOUT_S).tolist() == [start, start + 1]
    scheduler.close()
    assert sorted(ran) == list(range(1600))


def test_after_close_nothing_is_taken():
    scheduler = Scheduler(lambda items: np.zeros((len(items), 2), dtype=np.float32), Budget())
    scheduler.close()
    scheduler.close()
    with pytest.raises(EngineError, match=r"^the model is closed; no further request is taken$"):
        scheduler.submit([item(1)])


def test_a_request_without_items_is_our_own_bug(scheduler: Scheduler):
    with pytest.raises(AssertionError, match="a request without items would wait forever"):
        scheduler.submit([])
