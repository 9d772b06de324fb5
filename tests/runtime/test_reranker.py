from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rtx.runtime.bundle import Bundle
from rtx.runtime.contract import Contract
from rtx.runtime.engine import Budget
from rtx.runtime.errors import DataError, EngineError, InvalidItemsError, UsageError
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.reranker import Ranked, Reranker
from rtx.runtime.text import Batch, Encoded

QUERY = "reset the device"
DOCUMENTS = [
    "boil water for coffee",
    "",
    "hold the button to reset the device",
    "the device",
    "Größe 東京 " * 40,
    "sort the list of words then send it",
]


@pytest.fixture(scope="module")
def model(toy_reranker_bundle: Path) -> Iterator[Reranker]:
    with Reranker.open(toy_reranker_bundle, threads=1) as model:
        yield model


class LengthEngine:
    """Scores a pair by the number of its tokens."""

    name = "length"
    packed = False
    max_rows = staticmethod(lambda _: None)

    def run(self, batch: Batch) -> NDArray[np.float32]:
        return batch["attention_mask"].sum(axis=1).astype(np.float32)

    def close(self) -> None:
        pass


@pytest.fixture
def by_length(rerank_contract: Contract, toy_tokenizer: str) -> Reranker:
    return Reranker(Preprocessor(rerank_contract, toy_tokenizer), LengthEngine())


def expected_scores(model: Reranker, toy_model: Any, toy_tokenizer: str) -> NDArray[Any]:
    encoded = Preprocessor(model.contract, toy_tokenizer).encode_pairs([(QUERY, text) for text in DOCUMENTS])
    return np.array([toy_model.score(item) for item in encoded if isinstance(item, Encoded)])


def test_scores_are_those_of_the_reference(model: Reranker, toy_model: Any, toy_tokenizer: str):
    scores = model.score([(QUERY, text) for text in DOCUMENTS])
    assert (scores.shape, scores.dtype) == ((len(DOCUMENTS),), np.float32)
    np.testing.assert_allclose(scores, expected_scores(model, toy_model, toy_tokenizer), atol=1e-6)
    assert scores[2] > scores[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pair_alone_equals_the_pair_in_any_batch(
    tmp_path: Path,
    write_bundle: Callable[[Path, Contract], Path],
    rerank_contract: Contract,
    side: str,
):
    contract = dataclasses.replace(rerank_contract, padding_side=side)
    bundle = Bundle.open(write_bundle(tmp_path / "toy.rtx", contract))
    engine = bundle.engine(threads=1)
    pairs = [(QUERY, text) for text in DOCUMENTS] + [("", "x"), ("sort", "list")]
    alone = np.concatenate([Reranker(bundle.preprocessor(), engine).score([pair]) for pair in pairs])

    @settings(max_examples=30)
    @given(st.lists(st.integers(0, len(pairs) - 1), max_size=20), st.integers(1, 600), st.integers(1, 20))
    def check(order: list[int], tokens: int, items: int) -> None:
        budget = Budget(max_batch_tokens=tokens, max_batch_items=items)
        scores = Reranker(bundle.preprocessor(), engine, budget=budget).score([pairs[index] for index in order])
        np.testing.assert_allclose(scores, alone[order], atol=1e-6)

    check()


def test_rank_is_the_order_of_the_scores(model: Reranker):
    scores = model.score([(QUERY, text) for text in DOCUMENTS])
    ranked = model.rank(QUERY, DOCUMENTS)
    assert [entry.index for entry in ranked] == np.argsort(-scores).tolist()
    assert {entry.index for entry in ranked[:2]} == {2, 3}
    np.testing.assert_allclose([entry.score for entry in ranked], np.sort(scores)[::-1], atol=1e-6)
    assert model.rank(QUERY, DOCUMENTS, top_k=2) == ranked[:2]
    assert model.rank(QUERY, DOCUMENTS, top_k=100) == ranked
    assert model.rank(QUERY, (text for text in DOCUMENTS)) == ranked
    assert all(type(entry.index) is int and type(entry.score) is float for entry in ranked)


def test_ties_keep_the_order_of_the_documents(by_length: Reranker):
    # [CLS] sort [SEP] and one more for each word, and [SEP].
    assert by_length.rank("sort", ["list", "the list", "file", "the file", "menu"]) == [
        Ranked(1, 6.0),
        Ranked(3, 6.0),
        Ranked(0, 5.0),
        Ranked(2, 5.0),
        Ranked(4, 5.0),
    ]


def test_nothing_to_rank(model: Reranker):
    assert model.rank(QUERY, []) == []
    assert model.score([]).shape == (0,)
    assert asyncio.run(model.ascore([])).shape == (0,)


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_must_be_positive(model: Reranker, top_k: int):
    for call in (
        lambda: model.rank(QUERY, DOCUMENTS, top_k=top_k),
        lambda: asyncio.run(model.arank(QUERY, DOCUMENTS, top_k=top_k)),
    ):
        with pytest.raises(UsageError, match=f"^top_k: expected at least 1, got {top_k}$"):
            call()


def test_async_forms_give_the_same(model: Reranker):
    async def both() -> tuple[NDArray[Any], list[Ranked]]:
        pairs = [(QUERY, text) for text in DOCUMENTS]
        scores, ranked = await asyncio.gather(model.ascore(pairs), model.arank(QUERY, DOCUMENTS, top_k=3))
        return scores, ranked

    scores, ranked = asyncio.run(both())
    np.testing.assert_allclose(scores, model.score([(QUERY, text) for text in DOCUMENTS]), atol=1e-6)
    assert [entry.index for entry in ranked] == [entry.index for entry in model.rank(QUERY, DOCUMENTS, top_k=3)]


def test_every_invalid_pair_is_listed_or_a_nan(model: Reranker):
    pairs = [("a", "b"), ("a",), ("a", None), "ab", ("a", "b\ud800")]
    expected = (
        "4 of 5 items cannot be used:\n"
        "  item 1: expected a (query, document) pair, got tuple of 1\n"
        "  item 2: document: expected a text (str), got NoneType\n"
        "  item 3: expected a (query, document) pair, got str\n"
        "  item 4: document: holds an unpaired surrogate at character 1; expected valid Unicode"
    )
    for call in (lambda: model.score(pairs), lambda: asyncio.run(model.ascore(pairs))):
        with pytest.raises(InvalidItemsError) as caught:
            call()
        assert str(caught.value) == expected
    alone = model.score([("a", "b")])
    for scores in (model.score(pairs, on_invalid="nan"), asyncio.run(model.ascore(pairs, on_invalid="nan"))):
        assert np.isnan(scores).tolist() == [False, True, True, True, True]
        np.testing.assert_allclose(scores[:1], alone, atol=1e-6)


def test_invalid_documents_of_a_ranking_are_listed_and_its_query_is_named_once(model: Reranker):
    with pytest.raises(InvalidItemsError) as caught:
        model.rank(QUERY, ["a", 3, "b"])
    assert [str(item) for item in caught.value.items] == ["item 1: document: expected a text (str), got int"]
    for rank in (model.rank, lambda *given: asyncio.run(model.arank(*given))):
        with pytest.raises(DataError, match=r"^query: expected a text \(str\), got NoneType$"):
            rank(None, ["a", 3])


def test_something_else_than_a_list_is_an_error(model: Reranker):
    with pytest.raises(UsageError, match=r"^expected a list of documents, got a single str; put it in a list$"):
        model.rank(QUERY, "a document")
    with pytest.raises(UsageError, match=r"^expected a list of \(query, document\) pairs, got a single str; put it in"):
        model.score("ab")
    with pytest.raises(UsageError, match=r"^on_invalid: expected 'raise' or 'nan', got 'skip'$"):
        model.score([("a", "b")], on_invalid="skip")  # type: ignore[arg-type]


def test_an_embedder_is_no_reranker(toy_bundle: Path):
    with pytest.raises(UsageError, match="this model is an embedder: open it with Embedder, or use `rtx embed`"):
        Reranker.open(toy_bundle)


def test_variants_and_closing(toy_reranker_bundle: Path, model: Reranker):
    pairs = [(QUERY, text) for text in DOCUMENTS]
    with Reranker.open(toy_reranker_bundle, variant="int8", threads=1) as int8:
        assert 1e-5 < np.abs(int8.score(pairs) - model.score(pairs)).max() < 0.05
    with pytest.raises(EngineError, match=r"^toy-reranker\.rtx:int8: the engine is closed$"):
        int8.score(pairs)
    with pytest.raises(EngineError, match="the model is closed; no further request is taken"):
        asyncio.run(int8.ascore(pairs))


@pytest.fixture
def on_top(rerank_contract: Contract, toy_tokenizer: str) -> Reranker:
    """Adds four times the first stage's score to the number of tokens."""
    contract = dataclasses.replace(rerank_contract, activation="identity", first_stage_weight=4.0)
    return Reranker(Preprocessor(contract, toy_tokenizer), LengthEngine())


def test_the_first_stage_is_added(on_top: Reranker, by_length: Reranker):
    pairs = [(QUERY, text) for text in DOCUMENTS]
    first_stage = [0.5, -1.0, 0.25, 3.0, 0.0, 100.0]
    expected = by_length.score(pairs) + 4 * np.array(first_stage, dtype=np.float32)
    scores = on_top.score(pairs, first_stage=first_stage)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(asyncio.run(on_top.ascore(pairs, first_stage=first_stage)), expected)
    order = np.argsort(-expected, kind="stable").tolist()
    for ranked in (
        on_top.rank(QUERY, DOCUMENTS, first_stage=np.array(first_stage)),
        asyncio.run(on_top.arank(QUERY, DOCUMENTS, first_stage=first_stage)),
    ):
        assert [(found.index, found.score) for found in ranked] == [(index, expected[index]) for index in order]
    np.testing.assert_array_equal(on_top.logits(pairs), by_length.score(pairs))
    assert (on_top.needs_first_stage, by_length.needs_first_stage) == (True, False)
    # A model that was not trained so leaves them aside.
    np.testing.assert_array_equal(by_length.score(pairs, first_stage=first_stage), by_length.score(pairs))


def test_an_invalid_pair_is_nan_with_a_first_stage_too(on_top: Reranker):
    scores = on_top.score([("a", "b"), ("a", 3)], first_stage=[1.0, 1.0], on_invalid="nan")
    assert np.isfinite(scores).tolist() == [True, False]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "this model adds 4 times the first stage's score to its own; expected one number a document"),
        ([1.0], "expected 2 finite numbers, one a document, got an array of shape (1,)"),
        ([[1.0, 2.0]], "expected 2 finite numbers, one a document, got an array of shape (1, 2)"),
        ([1.0, float("nan")], "expected 2 finite numbers, one a document, got nan for item 1"),
        (["a", "b"], "expected 2 finite numbers, one a document, got <U1 ('a' for item 0)"),
        ([True, False], "expected 2 finite numbers, one a document, got bool (True for item 0)"),
        ([[1.0], [1.0, 2.0]], "expected 2 finite numbers, one a document, got something else"),
        ([10**400, 1], "expected 2 finite numbers, one a document, got object"),
        ([1e38, 1.0], "expected 2 finite numbers, one a document, got 1e+38 for item 0"),  # times the weight
        (0.5, "expected 2 finite numbers, one a document, got an array of shape ()"),
    ],
)
def test_scores_of_a_first_stage_that_do_not_fit(on_top: Reranker, given: Any, message: str):
    for call in (
        lambda: on_top.score([("a", "b"), ("a", "c")], first_stage=given),
        lambda: asyncio.run(on_top.arank("a", ["b", "c"], first_stage=given)),
    ):
        with pytest.raises(UsageError, match=r"^first_stage: ") as caught:
            call()
        assert message in str(caught.value)


def test_logits_end_where_a_sigmoid_in_float32_does(rerank_contract: Contract, toy_tokenizer: str):
    class Saturated(LengthEngine):
        def run(self, _batch: Batch) -> NDArray[np.float32]:
            return np.array([0.0, 0.5, 1.0, 1 / (1 + np.exp(-3.0))], dtype=np.float32)

    contract = dataclasses.replace(rerank_contract, activation="sigmoid")
    model = Reranker(Preprocessor(contract, toy_tokenizer), Saturated())
    assert model.logits([("q", "d")] * 4) == pytest.approx([-16, 0, 16, 3], abs=1e-5)
