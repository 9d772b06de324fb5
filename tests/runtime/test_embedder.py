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
from tokenizers import Tokenizer, processors

from rtx.runtime import session
from rtx.runtime.bundle import Bundle
from rtx.runtime.contract import Contract
from rtx.runtime.embedder import Embedder
from rtx.runtime.engine import Budget
from rtx.runtime.errors import BundleError, EngineError, InvalidItemsError, UsageError
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.text import Batch

TEXTS = [
    "how do i reset the device?",
    "",
    "sort",
    "parse the file, then sort the list and save it to the path of the user",
    "Größe 東京 \U0001f600",
    "a\0b",
    " ".join(f"word{n}" for n in range(100)),
    "list the sort",
    "sort the list",
]
MIXED = ["sort", 7, "", None, "x\ud800", b"sort", "list", ["sort"]]
WRITE = Callable[[Path, Contract], Path]


class FixedEngine:
    """Gives every item the same vector, and counts batches."""

    name = "fixed"
    packed = False
    max_rows = staticmethod(lambda _: None)

    def __init__(self, vector: list[float]) -> None:
        self.vector = np.array(vector, dtype=np.float32)
        self.batches = 0
        self.closed = False

    def run(self, batch: Batch) -> NDArray[np.float32]:
        self.batches += 1
        return np.tile(self.vector, (len(batch["input_ids"]), 1))

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def model(toy_bundle: Path) -> Iterator[Embedder]:
    with Embedder.open(toy_bundle, threads=1) as model:
        yield model


@pytest.fixture
def fixed(embed_contract: Contract, toy_tokenizer: str) -> Callable[..., Embedder]:
    """A model that gives [3, 4, 0, 12] for every text; by its contract it does not normalise."""

    def build(vector: list[float] | None = None, **changes: Any) -> Embedder:
        vector = vector or [3, 4, 0, 12]
        contract = dataclasses.replace(embed_contract, **{"dimension": len(vector), "normalize": False, **changes})
        return Embedder(Preprocessor(contract, toy_tokenizer), FixedEngine(vector))

    return build


def reference(
    toy_model: Any, contract: Contract, tokenizer_json: str, prompt: str | None = None
) -> NDArray[np.float32]:
    encoded = Preprocessor(contract, tokenizer_json).encode(TEXTS, prompt=prompt)
    return np.array([toy_model.embed(item) for item in encoded], dtype=np.float32)


# -- vectors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [None, "query", "document"])
def test_vectors_are_those_of_the_reference(model: Embedder, toy_model: Any, toy_tokenizer: str, prompt: str | None):
    vectors = model.embed(TEXTS, prompt=prompt)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, reference(toy_model, model.contract, toy_tokenizer, prompt), atol=1e-6)


def test_the_order_of_words_counts(model: Embedder):
    one, other = model.embed(["sort the list", "list the sort"])
    assert 0.9 < float(one @ other) < 0.9999


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_item_alone_equals_the_item_in_any_batch(
    tmp_path: Path, write_bundle: WRITE, embed_contract: Contract, toy_model: Any, toy_tokenizer: str, side: str
):
    contract = dataclasses.replace(embed_contract, padding_side=side)
    bundle = Bundle.open(write_bundle(tmp_path / "toy.rtx", contract))
    expected = reference(toy_model, contract, toy_tokenizer)
    engine = bundle.engine(threads=1)
    alone = np.concatenate([Embedder(bundle.preprocessor(), engine).embed([text]) for text in TEXTS])
    np.testing.assert_allclose(alone, expected, atol=1e-6)

    @settings(max_examples=40)
    @given(st.lists(st.integers(0, len(TEXTS) - 1), max_size=20), st.integers(1, 600), st.integers(1, 20))
    def check(order: list[int], tokens: int, items: int) -> None:
        budget = Budget(max_batch_tokens=tokens, max_batch_items=items)
        vectors = Embedder(bundle.preprocessor(), engine, budget=budget).embed([TEXTS[index] for index in order])
        np.testing.assert_allclose(vectors, alone[order], atol=1e-6)

    check()


def test_variants_are_opened_by_name(toy_bundle: Path, model: Embedder):
    with Embedder.open(toy_bundle, variant="int8", threads=1, verify=False) as int8:
        vectors, exact = int8.embed(TEXTS), model.embed(TEXTS)
    assert 1e-4 < np.abs(vectors - exact).max() < 0.05
    assert np.sum(vectors * exact, axis=1).min() > 0.99
    with pytest.raises(UsageError, match=r"has no variant 'int4' \(did you mean 'int8'\? known: fp32, int8\)"):
        Embedder.open(toy_bundle, variant="int4")
    with pytest.raises(UsageError, match="threads: expected at least 1, got 0"):
        Embedder.open(toy_bundle, threads=0)


def test_what_is_not_there_is_not_opened(tmp_path: Path):
    with pytest.raises(BundleError, match="does not exist; expected a bundle folder"):
        Embedder.open(tmp_path / "absent")


def test_a_reranker_is_no_embedder(toy_reranker_bundle: Path):
    with pytest.raises(UsageError, match="this model is a reranker: open it with Reranker, or use `rtx rerank`"):
        Embedder.open(toy_reranker_bundle)


def test_windows_of_a_long_call_do_not_show(model: Embedder, monkeypatch: pytest.MonkeyPatch):
    whole = model.embed(TEXTS * 3)
    monkeypatch.setattr(session, "_WINDOW_ITEMS", 4)
    np.testing.assert_allclose(model.embed(TEXTS * 3), whole, atol=1e-6)


# -- items ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_list_is_accepted(model: Embedder):
    expected = model.embed(["sort", "list"])
    for items in (("sort", "list"), (text for text in ("sort", "list")), {"sort": 1, "list": 2}.keys()):
        np.testing.assert_array_equal(model.embed(items), expected)
    np.testing.assert_array_equal(model.embed(np.array(["sort", "list"])), expected)


@pytest.mark.parametrize("items", ["sort", b"sort", {"text": "sort"}, None, 7])
def test_something_else_than_a_list_is_an_error(model: Embedder, items: Any):
    message = f"expected a list of items, got a single {type(items).__name__}; put it in a list"
    with pytest.raises(UsageError, match=f"^{message}$"):
        model.embed(items)
    with pytest.raises(UsageError, match=f"^{message}$"):
        asyncio.run(model.aembed(items))


def test_no_items_give_no_rows(model: Embedder, fixed: Callable[..., Embedder]):
    for vectors, shape, dtype in (
        (model.embed([]), (0, 32), np.float32),
        (asyncio.run(model.aembed([])), (0, 32), np.float32),
        (model.embed([], dimensions=8), (0, 8), np.float32),
        (model.embed([], precision="int8"), (0, 32), np.int8),
        (model.embed([], precision="binary"), (0, 4), np.uint8),
        (model.embed([], on_invalid="nan"), (0, 32), np.float32),
        (fixed().embed([], normalize=True), (0, 4), np.float32),
    ):
        assert (vectors.shape, vectors.dtype) == (shape, dtype)


def test_every_invalid_item_is_listed_before_anything_is_computed(
    fixed: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch
):
    model = fixed()
    monkeypatch.setattr(session, "_WINDOW_ITEMS", 2)
    for call in (lambda: model.embed(["sort", *MIXED]), lambda: asyncio.run(model.aembed(["sort", *MIXED]))):
        with pytest.raises(InvalidItemsError) as caught:
            call()
        assert str(caught.value) == (
            "5 of 9 items cannot be used:\n"
            "  item 2: expected a text (str), got int\n"
            "  item 4: expected a text (str), got NoneType\n"
            "  item 5: holds an unpaired surrogate at character 1; expected valid Unicode\n"
            "  item 6: expected a text (str), got bytes; this model takes no images\n"
            "  item 8: expected a text (str), got list"
        )
    assert model.engine.batches == 0  # type: ignore[attr-defined]


def test_invalid_items_can_be_rows_of_nan(model: Embedder):
    valid = model.embed(["sort", "", "list"])
    for vectors in (
        model.embed(MIXED, on_invalid="nan"),
        asyncio.run(model.aembed(MIXED, on_invalid="nan")),
    ):
        assert np.flatnonzero(np.isnan(vectors).any(axis=1)).tolist() == [1, 3, 4, 5, 7]
        assert np.isnan(vectors[[1, 3, 4, 5, 7]]).all()
        np.testing.assert_allclose(vectors[[0, 2, 6]], valid, atol=1e-6)
    cut = model.embed(MIXED, on_invalid="nan", dimensions=8)
    assert np.flatnonzero(np.isnan(cut).all(axis=1)).tolist() == [1, 3, 4, 5, 7]
    assert np.isnan(model.embed([None, 3], on_invalid="nan")).all()


def test_a_vector_is_its_callers_to_keep(model: Embedder):
    """And not a view on memory of the engine, which could not be given back as long as somebody has the vector."""
    for vectors in (model.embed(["sort"]), asyncio.run(model.aembed(["sort"]))):
        assert vectors.flags.owndata


def test_what_only_tokenising_finds_is_listed_across_windows(
    embed_contract: Contract, toy_tokenizer: str, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = Tokenizer.from_str(toy_tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    contract = dataclasses.replace(embed_contract, dimension=2)
    model = Embedder(Preprocessor(contract, tokenizer.to_str()), FixedEngine([0.6, 0.8]))
    monkeypatch.setattr(session, "_WINDOW_ITEMS", 2)
    items = ["sort", "list", "", "find", "file", "", " "]
    for call in (lambda: model.embed(items), lambda: asyncio.run(model.aembed(items))):
        with pytest.raises(InvalidItemsError) as caught:
            call()  # runs the first window, and none behind the first bad item
        assert [(item.index, item.message) for item in caught.value.items] == [
            (index, "gives no token; expected at least one") for index in (2, 5, 6)
        ]
    assert model.engine.batches == 2  # type: ignore[attr-defined]
    vectors = model.embed(items, on_invalid="nan")
    assert np.flatnonzero(np.isnan(vectors).all(axis=1)).tolist() == [2, 5, 6]


# -- prompts -------------------------------------------------------------------------------------------------------


def test_prompts_go_before_the_text(model: Embedder):
    plain = model.embed(["find code: sort", "code: sort", "sort"])
    for prompt, row in (("query", 0), ("document", 1), (None, 2)):
        np.testing.assert_allclose(model.embed(["sort"], prompt=prompt), plain[[row]], atol=1e-6)


def test_an_unknown_prompt_names_the_nearest(model: Embedder):
    message = r"^prompt 'documents' does not exist \(did you mean 'document'\? known: document, query\)$"
    with pytest.raises(UsageError, match=message):
        model.embed([], prompt="documents")
    with pytest.raises(UsageError, match=message):
        asyncio.run(model.aembed([], prompt="documents"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_left_out_of_pooling(
    tmp_path: Path, write_bundle: WRITE, embed_contract: Contract, toy_model: Any, toy_tokenizer: str, side: str
):
    inputs = ("input_ids", "attention_mask", "token_type_ids", "pooling_mask")
    changes: dict[str, Any] = {"inputs": inputs, "include_prompt": False, "padding_side": side}
    contract = dataclasses.replace(embed_contract, **changes, default_prompt="query")
    with Embedder.open(write_bundle(tmp_path / "toy.rtx", contract), threads=1) as model:
        for prompt in (None, "query", "document"):
            expected = reference(toy_model, contract, toy_tokenizer, prompt)
            np.testing.assert_allclose(model.embed(TEXTS, prompt=prompt), expected, atol=1e-6)


# -- dimensions, precision, normalisation --------------------------------------------------------------------------


def test_fewer_dimensions_are_normalised_again(model: Embedder):
    full, cut = model.embed(TEXTS), model.embed(TEXTS, dimensions=5)
    np.testing.assert_allclose(cut, full[:, :5] / np.linalg.norm(full[:, :5], axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_array_equal(model.embed(TEXTS, dimensions=32), full)


def test_a_model_that_does_not_normalise_is_left_alone_unless_asked(fixed: Callable[..., Embedder]):
    model = fixed()
    assert model.embed(["x"]).tolist() == [[3, 4, 0, 12]]
    assert model.embed(["x"], normalize=False).tolist() == [[3, 4, 0, 12]]
    assert model.embed(["x"], dimensions=2).tolist() == [[3, 4]]
    np.testing.assert_allclose(model.embed(["x"], dimensions=2, normalize=True), [[0.6, 0.8]], atol=1e-7)
    np.testing.assert_allclose(model.embed(["x"], normalize=True) * 13, [[3, 4, 0, 12]], atol=1e-5)


def test_int8_is_the_unit_vector_times_127(model: Embedder, fixed: Callable[..., Embedder]):
    codes = model.embed(TEXTS, precision="int8")
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(codes, np.rint(model.embed(TEXTS) * np.float64(127)))
    # 127 * [3, 4] / 5 = [76.2, 101.6]
    assert fixed().embed(["x"], dimensions=2, precision="int8", normalize=True).tolist() == [[76, 102]]


def test_binary_is_the_signs(model: Embedder, fixed: Callable[..., Embedder]):
    codes = model.embed(TEXTS, precision="binary")
    assert (codes.shape, codes.dtype) == ((len(TEXTS), 4), np.uint8)
    np.testing.assert_array_equal(np.unpackbits(codes, axis=1), model.embed(TEXTS) > 0)
    assert fixed([3, -4, 0, 12]).embed(["x"], precision="binary").tolist() == [[0b10010000]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dimensions": 0}, "dimensions: expected 1 to 4, got 0"),
        ({"dimensions": 5}, "dimensions: expected 1 to 4, got 5"),
        ({"precision": "int4"}, "precision: expected 'float32', 'int8' or 'binary', got 'int4'"),
        ({"on_invalid": "skip"}, "on_invalid: expected 'raise' or 'nan', got 'skip'"),
        (
            {"on_invalid": "nan", "precision": "binary"},
            "on_invalid='nan' needs precision='float32': binary has no NaN",
        ),
        (
            {"precision": "int8"},
            "precision='int8' needs vectors of norm 1: this model does not normalise, so pass normalize=True",
        ),
    ],
)
def test_arguments_are_checked_before_the_first_text(
    fixed: Callable[..., Embedder], arguments: dict[str, Any], message: str
):
    model = fixed()
    for call in (lambda: model.embed([None], **arguments), lambda: asyncio.run(model.aembed([None], **arguments))):
        with pytest.raises(UsageError) as caught:
            call()
        assert str(caught.value) == message


def test_a_model_that_normalises_cannot_be_asked_not_to(model: Embedder):
    message = r"^normalize=False: this model normalises inside the graph; its vectors always have norm 1$"
    with pytest.raises(UsageError, match=message):
        model.embed(["x"], normalize=False)


def test_numbers_that_a_code_cannot_hold_are_the_engines_fault(fixed: Callable[..., Embedder]):
    model = fixed([1, float("nan"), 0, 0])
    np.testing.assert_array_equal(model.embed(["x"]), [[1, np.nan, 0, 0]])
    with pytest.raises(EngineError, match=r"^fixed: gave vectors that are not finite, which binary cannot hold$"):
        model.embed(["x"], precision="binary")


@pytest.mark.parametrize(
    "arguments",
    [{}, {"prompt": "query"}, {"dimensions": 7}, {"precision": "int8"}, {"precision": "binary", "dimensions": 9}],
)
def test_aembed_is_embed(model: Embedder, arguments: dict[str, Any]):
    expected, vectors = model.embed(TEXTS, **arguments), asyncio.run(model.aembed(TEXTS, **arguments))
    assert vectors.dtype == expected.dtype
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
