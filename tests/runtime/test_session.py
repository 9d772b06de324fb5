"""An open model shared by tasks and threads, and how it is closed."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from rtx.runtime import session
from rtx.runtime.contract import Contract
from rtx.runtime.embedder import Embedder
from rtx.runtime.engine import Budget
from rtx.runtime.errors import EngineError, InvalidItemsError, UsageError
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.reranker import Reranker
from rtx.runtime.text import Batch

TEXTS = ["how do i reset the device?", "", "sort", "list the sort", "sort the list", "word " * 40]
TIMEOUT_S = 30  # of a wait that ends at once unless something is broken


class GatedEngine:
    """Runs a batch when it is told to; items whose first token is `bad` fail."""

    name = "gated"
    packed = False
    max_rows = staticmethod(lambda _: None)

    def __init__(self, bad: int | None = None) -> None:
        self.bad = bad
        self.running = threading.Event()
        self.allowed = threading.Event()
        self.closed = False

    def run(self, batch: Batch) -> NDArray[np.float32]:
        self.running.set()
        assert self.allowed.wait(TIMEOUT_S), "nobody let the engine run: the event loop stood still"
        if (batch["input_ids"][:, 1] == self.bad).any():
            raise EngineError("bad")
        return np.tile(np.array([0.6, 0.8], dtype=np.float32), (len(batch["input_ids"]), 1))

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def model(toy_bundle: Path) -> Iterator[Embedder]:
    with Embedder.open(toy_bundle, threads=1) as model:
        yield model


@pytest.fixture
def narrow(embed_contract: Contract) -> Contract:
    """The contract of GatedEngine."""
    return dataclasses.replace(embed_contract, dimension=2)


@pytest.fixture
def gated(narrow: Contract, toy_tokenizer: str) -> Iterator[tuple[Embedder, GatedEngine]]:
    bad = Tokenizer.from_str(toy_tokenizer).token_to_id("broken")
    engine = GatedEngine(bad)
    with Embedder(Preprocessor(narrow, toy_tokenizer), engine, budget=Budget(max_batch_items=2)) as model:
        yield model, engine
        engine.allowed.set()


def test_many_tasks_get_their_own_rows(model: Embedder):
    expected = model.embed(TEXTS)

    async def one(start: int) -> None:
        order = [(start + step) % len(TEXTS) for step in range(start % 5 + 1)]
        vectors = await model.aembed([TEXTS[index] for index in order])
        np.testing.assert_allclose(vectors, expected[order], atol=1e-6)

    async def many() -> None:
        await asyncio.gather(*(one(start) for start in range(100)))

    asyncio.run(many())
    asyncio.run(many())  # an event loop of its own, the same model


def test_a_long_call_is_prepared_window_by_window(narrow: Contract, toy_tokenizer: str, monkeypatch: Any):
    """At most one window is prepared while another runs: pages of a long call are not all in memory at once."""
    monkeypatch.setattr(session, "_WINDOW_ITEMS", 2)
    prepared: list[int] = []
    finished: list[int] = []

    class Counting(Preprocessor):
        def encode(self, items: Any, **options: Any) -> Any:
            prepared.append(len(items))
            assert sum(prepared) - sum(finished) <= 4
            return super().encode(items, **options)

    class Engine(GatedEngine):
        def run(self, batch: Batch) -> NDArray[np.float32]:
            finished.append(len(batch["input_ids"]))
            return super().run(batch)

    engine = Engine()
    engine.allowed.set()
    with Embedder(Counting(narrow, toy_tokenizer), engine) as model:
        assert asyncio.run(model.aembed(["sort"] * 9)).shape == (9, 2)
        assert prepared == [2, 2, 2, 2, 1]
        del finished[:], prepared[:]
        with pytest.raises(InvalidItemsError, match="2 of 9 items") as error:
            asyncio.run(model.aembed(["sort", "sort", 3, "sort", "sort", "sort", "sort", 4, "sort"]))
        assert [item.index for item in error.value.items] == [2, 7]
        assert (prepared, finished) == ([], [])
        vectors = asyncio.run(model.aembed(["sort", 3, "sort"], on_invalid="nan"))
        assert np.isnan(vectors).all(axis=1).tolist() == [False, True, False]


def test_many_threads_get_their_own_rows(model: Embedder):
    expected = model.embed(TEXTS)

    def one(start: int) -> None:
        order = [(start + step) % len(TEXTS) for step in range(4)]
        np.testing.assert_allclose(model.embed([TEXTS[index] for index in order]), expected[order], atol=1e-6)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(60)))


def test_the_event_loop_goes_on_while_a_batch_runs(gated: tuple[Embedder, GatedEngine]):
    model, engine = gated

    async def both() -> NDArray[Any]:
        task = asyncio.create_task(model.aembed(["sort"]))
        while not engine.running.is_set():
            await asyncio.sleep(0.001)
        engine.allowed.set()
        return await task

    np.testing.assert_allclose(asyncio.run(both()), [[0.6, 0.8]])


def test_the_event_loop_goes_on_while_texts_are_tokenised(narrow: Contract, toy_tokenizer: str):
    ticked = threading.Event()

    class Slow(Preprocessor):
        def encode(self, *arguments: Any, **options: Any) -> Any:
            assert ticked.wait(TIMEOUT_S), "the event loop stood still"
            return super().encode(*arguments, **options)

    async def both() -> NDArray[Any]:
        engine = GatedEngine()
        engine.allowed.set()
        with Embedder(Slow(narrow, toy_tokenizer), engine) as model:
            task = asyncio.create_task(model.aembed(["sort"]))
            await asyncio.sleep(0.001)
            ticked.set()
            return await task

    np.testing.assert_allclose(asyncio.run(both()), [[0.6, 0.8]])


def test_a_request_that_finds_the_engine_idle_changes_threads_once(narrow: Contract, toy_tokenizer: str):
    threads: list[str] = []

    class Watched(Preprocessor):
        def encode(self, *arguments: Any, **options: Any) -> Any:
            threads.append(threading.current_thread().name)
            return super().encode(*arguments, **options)

    class Engine(GatedEngine):
        def run(self, batch: Batch) -> NDArray[np.float32]:
            threads.append(threading.current_thread().name)
            return super().run(batch)

    engine = Engine()
    engine.allowed.set()
    with Embedder(Watched(narrow, toy_tokenizer), engine) as model:
        asyncio.run(model.aembed(["sort"]))
        prepared_in, ran_in = threads
        assert prepared_in == ran_in != threading.current_thread().name
        model.embed(["sort"])
        assert threads[2:] == [threading.current_thread().name] * 2


def test_a_task_cancelled_while_its_texts_are_tokenised_runs_nothing(narrow: Contract, toy_tokenizer: str):
    tokenising, cancelled = threading.Event(), threading.Event()

    class Slow(Preprocessor):
        def encode(self, *arguments: Any, **options: Any) -> Any:
            tokenising.set()
            assert cancelled.wait(TIMEOUT_S)
            return super().encode(*arguments, **options)

    async def cancel(model: Embedder) -> None:
        task = asyncio.create_task(model.aembed(["sort"]))
        await asyncio.to_thread(tokenising.wait, TIMEOUT_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        cancelled.set()
        await asyncio.get_running_loop().shutdown_default_executor()  # waits for the thread that tokenises

    engine = GatedEngine()
    engine.allowed.set()
    with Embedder(Slow(narrow, toy_tokenizer), engine) as model:
        asyncio.run(cancel(model))
        assert not engine.running.is_set()
        assert asyncio.run(model.aembed(["sort"])).shape == (1, 2)


def test_a_cancelled_task_and_a_failed_batch_leave_the_others_alone(gated: tuple[Embedder, GatedEngine]):
    model, engine = gated

    async def several() -> list[Any]:
        tasks = [asyncio.create_task(model.aembed(["sort"]))]
        while not engine.running.is_set():
            await asyncio.sleep(0.001)
        scheduler = model._started()
        for texts in (["list"], ["broken", "file"], ["tree", "list", "user"]):
            tasks.append(asyncio.create_task(model.aembed(texts)))
            waiting = len(scheduler._waiting)
            while len(scheduler._waiting) < waiting + len(texts):
                await asyncio.sleep(0.001)
        tasks[1].cancel()
        await asyncio.sleep(0)
        engine.allowed.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, cancelled, failed, last = asyncio.run(several())
    np.testing.assert_allclose(first, [[0.6, 0.8]])
    assert isinstance(cancelled, asyncio.CancelledError)
    assert isinstance(failed, EngineError)
    np.testing.assert_allclose(last, [[0.6, 0.8]] * 3)


# -- closing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("single", [np.zeros((4, 4, 3), np.uint8), bytearray(b"x"), memoryview(b"x"), "x"])
def test_a_single_item_is_no_list(model: Embedder, single: Any):
    with pytest.raises(UsageError, match=f"got a single {type(single).__name__}; put it in a list"):
        model.embed(single)


def test_a_closed_model_takes_no_more_work(toy_bundle: Path):
    with Embedder.open(toy_bundle, threads=1) as model:
        asyncio.run(model.aembed(["sort"]))
    model.close()
    with pytest.raises(EngineError, match=r"^toy\.rtx:fp32: the engine is closed$"):
        model.embed(["sort"])
    with pytest.raises(EngineError, match=r"^toy\.rtx:fp32: the model is closed; no further request is taken$"):
        asyncio.run(model.aembed(["sort"]))


def test_closing_cancels_those_who_wait(gated: tuple[Embedder, GatedEngine]):
    model, engine = gated

    async def several() -> list[Any]:
        tasks = [asyncio.create_task(model.aembed(["sort"]))]
        while not engine.running.is_set():
            await asyncio.sleep(0.001)
        tasks.append(asyncio.create_task(model.aembed(["list"])))
        while not model._started()._waiting:
            await asyncio.sleep(0.001)
        closing = asyncio.create_task(asyncio.to_thread(model.close))
        assert isinstance((await asyncio.gather(tasks[1], return_exceptions=True))[0], asyncio.CancelledError)
        assert not engine.closed  # a batch still runs on it
        engine.allowed.set()
        await closing
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, waiting = asyncio.run(several())
    np.testing.assert_allclose(first, [[0.6, 0.8]])
    assert isinstance(waiting, asyncio.CancelledError)
    assert engine.closed


def test_a_model_closed_before_its_first_request_starts_no_thread(gated: tuple[Embedder, GatedEngine]):
    model, engine = gated
    model.close()
    with pytest.raises(EngineError, match=r"^gated: the model is closed; no further request is taken$"):
        asyncio.run(model.aembed(["sort"]))
    assert engine.closed
    assert model._scheduler is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_of_a_process_that_has_served_serves(toy_bundle: Path):
    """As a server does that loads the model, tries it, and forks its workers."""
    code = """if True:
        import asyncio, os, signal, sys
        from rtx.runtime.embedder import Embedder
        model = Embedder.open(sys.argv[1], threads=1)
        asyncio.run(model.aembed(["open"]))
        if os.fork() == 0:
            signal.alarm(20)
            asyncio.run(model.aembed(["open"]))
            model.close()
            os._exit(0)
        sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
    """
    assert subprocess.run([sys.executable, "-c", code, toy_bundle], check=False).returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_of_a_process_that_is_serving_can_close(gated: tuple[Embedder, GatedEngine]):
    """What the parent is running at the time ends there, and is not waited for here."""
    model, engine = gated
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: asyncio.run(model.aembed(["sort"])))
        assert engine.running.wait(TIMEOUT_S)
        if (child := os.fork()) == 0:
            signal.alarm(20)
            model.close()
            os._exit(0 if engine.closed else 1)
        engine.allowed.set()
        assert running.result(TIMEOUT_S).shape == (1, 2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_other_kind_of_bundle_is_refused_before_its_graph_is_read(toy_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "toy.rtx"
    shutil.copytree(toy_bundle, bundle)
    for graph in (bundle / "onnx").iterdir():
        graph.unlink()
    with pytest.raises(UsageError, match="is an embedder: open it with Embedder"):
        Reranker.open(bundle)
