from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from rtx.runtime.contract import Contract
from rtx.runtime.engine import Budget, rows_taken, run_batch, run_items
from rtx.runtime.errors import EngineError, UsageError
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.text import Batch, Encoded


class CountingEngine:
    """Embeds an item as (its first token, its number of tokens) and keeps the shapes of all batches."""

    name = "counting"
    packed = False
    max_rows = staticmethod(lambda _: None)

    def __init__(self, change: Callable[[NDArray[np.float32]], NDArray[np.float32]] = lambda rows: rows) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.change = change

    def run(self, batch: Batch) -> NDArray[np.float32]:
        self.shapes.append(batch["input_ids"].shape)
        first = batch["input_ids"].max(axis=1)
        return self.change(np.stack([first, batch["attention_mask"].sum(axis=1)], axis=1).astype(np.float32))

    def close(self) -> None:
        pass


@pytest.fixture
def preprocessor(embed_contract: Contract, toy_tokenizer: str) -> Preprocessor:
    return Preprocessor(dataclasses.replace(embed_contract, dimension=2), toy_tokenizer)


def items(*lengths: int) -> list[Encoded]:
    return [Encoded([index + 1] * length, [0] * length) for index, length in enumerate(lengths)]


def test_items_run_by_length_and_come_back_in_order(preprocessor: Preprocessor):
    engine = CountingEngine()
    results = run_items(engine, preprocessor, items(2, 9, 3, 9, 1), Budget(max_batch_tokens=18, max_batch_items=9))
    assert results.tolist() == [[1, 2], [2, 9], [3, 3], [4, 9], [5, 1]]
    assert results.dtype == np.float32
    assert engine.shapes == [(2, 9), (3, 3)]


def test_a_batch_of_more_rows_than_the_engine_takes_is_run_in_parts(preprocessor: Preprocessor):
    engine = CountingEngine()
    engine.max_rows = lambda longest: 2 if longest.length > 3 else 3
    results = run_items(engine, preprocessor, items(2, 9, 3, 9, 1, 9), Budget(max_batch_tokens=99, max_batch_items=9))
    assert results[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert engine.shapes == [(2, 9), (2, 9), (2, 2)]
    engine.shapes.clear()
    run_batch(engine, preprocessor, items(9, 3, 3, 3, 3, 3))
    assert engine.shapes == [(2, 9), (3, 3), (1, 3)]
    engine.shapes.clear()  # a queue's, which begins with what has waited longest
    results = run_batch(engine, preprocessor, items(3, 3, 3, 3, 9))
    assert results[:, 0].tolist() == [1, 2, 3, 4, 5]
    assert engine.shapes == [(2, 9), (3, 3)]
    engine.shapes.clear()  # what it does not take is run all the same, for its own words on that
    engine.max_rows = lambda longest: 0 if longest.length > 3 else 3
    run_batch(engine, preprocessor, items(9, 3, 9, 3))
    assert engine.shapes == [(1, 9), (1, 9), (2, 3)]


def test_what_a_batch_is_padded_to_is_tokens_and_not_what_images_cost(preprocessor: Preprocessor):
    """With images among tokens, an item of few tokens may cost the most."""
    engine = CountingEngine()
    engine.max_rows = lambda longest: 2 if len(longest.ids) > 3 else 4
    mixed = [item._replace(image_tokens=50 * (len(item.ids) < 4)) for item in items(3, 9, 3, 3)]
    results = run_batch(engine, preprocessor, mixed)
    assert results[:, 1].tolist() == [3, 9, 3, 3]
    assert engine.shapes == [(2, 9), (2, 3)]


def test_rows_that_an_engine_was_built_for():
    buckets = [{"batch": (1, 4, 16), "tokens": (1, 8, 8)}, {"batch": (1, 1, 4), "tokens": (9, 9, 9)}]
    buckets.append({"batch": (1, 1, 2), "tokens": (10, 32, 32)})
    found = [rows_taken(buckets, item) for item in items(1, 8, 9, 10, 32, 33)]
    assert found == [16, 16, 4, 2, 2, 0]
    assert [rows_taken([{"batch": (1, 4, 16)}], item) for item in items(1, 99)] == [16, 16]
    assert rows_taken([{"images": (1, 2, 5)}], Encoded([], [], image_tokens=50)) == 5


def test_an_engine_that_packs_is_given_items_in_their_order(preprocessor: Preprocessor):
    engine = CountingEngine()
    engine.packed = True
    results = run_items(engine, preprocessor, items(2, 9, 3, 9, 1), Budget(max_batch_tokens=18, max_batch_items=9))
    assert results.tolist() == [[1, 2], [2, 9], [3, 3], [4, 9], [5, 1]]
    assert engine.shapes == [(3, 9), (2, 9)]  # 14 and 10 tokens


def test_no_items_run_nothing(preprocessor: Preprocessor, rerank_contract: Contract, toy_tokenizer: str):
    engine = CountingEngine()
    assert run_items(engine, preprocessor, [], Budget()).shape == (0, 2)
    assert run_items(engine, Preprocessor(rerank_contract, toy_tokenizer), [], Budget()).shape == (0,)
    assert engine.shapes == []


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda rows: rows[:1], "[1, 2] float32"),
        (lambda rows: rows[:, :1], "[3, 1] float32"),
        (lambda rows: rows[:, 0], "[3] float32"),
        (lambda rows: rows.astype(np.float16), "[3, 2] float16"),
        (lambda rows: rows.astype(np.float64), "[3, 2] float64"),
    ],
)
def test_what_the_contract_does_not_say_is_an_error(preprocessor: Preprocessor, change: object, got: str):
    engine, three = CountingEngine(change), items(4, 4, 4)  # type: ignore[arg-type]
    for run in (run_batch, functools.partial(run_items, budget=Budget())):
        with pytest.raises(EngineError) as caught:
            run(engine, preprocessor, three)
        assert str(caught.value) == f"counting: expected [3, 2] float32 from the engine, got {got}"


@pytest.mark.parametrize("name", ["max_batch_tokens", "max_batch_items"])
def test_a_budget_of_nothing_is_refused(name: str):
    with pytest.raises(UsageError, match=f"^{name}: expected at least 1, got 0$"):
        Budget(**{name: 0})
