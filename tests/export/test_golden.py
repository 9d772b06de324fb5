"""Golden items: texts that have gone wrong elsewhere, and some of the user's own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from rtx.export.golden import golden_items, make_golden
from rtx.runtime.contract import Contract
from rtx.runtime.errors import ExportError
from rtx.runtime.evalset import EvalSet
from rtx.runtime.golden import Golden
from rtx.runtime.items import Content
from rtx.runtime.preprocessor import Preprocessor
from rtx.trainer.model import RetrievalModel

CONTRACT = Contract(task="embed", inputs=("input_ids", "attention_mask"), max_tokens=64, pad_token_id=0)
EVALSET = EvalSet(
    "many",
    {f"q{i}": f"query number {i}" for i in range(40)},
    {f"d{i}": f"document number {i}" for i in range(50)},
    {f"q{i}": {f"d{i}": 1} for i in range(40)},
)


def test_texts_take_each_kind_of_prompt_and_are_the_same_in_every_run():
    items, prompts = golden_items(CONTRACT, EVALSET)
    assert len(items) == len(prompts)
    assert (items, prompts) == golden_items(CONTRACT, EVALSET)
    assert "" in items
    assert any("\x00" in item for item in items)
    queries = [item for item, prompt in zip(items, prompts, strict=True) if item in EVALSET.queries.values()]
    assert len(queries) == 16
    assert {prompts[items.index(query)] for query in queries} == {"query"}
    documents = [item for item in items if item in EVALSET.corpus.values()]
    assert len(documents) == 16
    assert {prompts[items.index(document)] for document in documents} == {"document"}
    assert prompts[:6] == [None, "query", "document"] * 2


def test_a_small_evaluation_set_is_taken_whole():
    small = EvalSet("small", {"q": "one"}, {"d": "two"}, {"q": {"d": 1}})
    items, _ = golden_items(CONTRACT, small)
    assert items[-2:] == ["one", "two"]


def test_pages_come_as_files_and_those_that_cannot_be_read_are_left_out(tmp_path: Path):
    for number in range(6):
        Image.new("RGB", (4, 5), (number, 0, 0)).save(tmp_path / f"{number}.png")
    files = [(tmp_path / f"{number}.png").read_bytes() for number in range(6)]
    names = [str(tmp_path / "gone.png"), "data:image/*;base64,iVBORw0KGgo=", str(tmp_path / "0.png")]
    pages = {name: Content.of("fig.", [name]) for name in names}
    items, _ = golden_items(CONTRACT, EvalSet("damaged", {"q": "one"}, pages, {"q": {names[-1]: 1}}))
    assert items[-2:] == ["one", {"text": "fig.", "image": files[:1]}]
    pages = {str(number): Content.of("", [str(tmp_path / f"{number}.png")]) for number in range(6)}
    items, _ = golden_items(CONTRACT, EvalSet("many", {"q": "one"}, pages, {"q": {"0": 1}}))
    found = items[items.index("one") + 1 :]
    assert len(found) == 4
    assert all(item["text"] == "" and item["image"][0] in files for item in found)


def test_a_reranker_gets_pairs():
    items, prompts = golden_items(dataclasses.replace(CONTRACT, task="rerank"), EVALSET)
    assert all(isinstance(item, tuple) and len(item) == 2 for item in items)
    assert set(prompts) == {None}
    assert any(query == "" for query, _ in items)
    assert any(document == "" for _, document in items)
    assert sum(query in EVALSET.queries.values() for query, _ in items) == 16


@pytest.mark.parametrize(("max_tokens", "least", "most"), [(16, 16, 60), (512, 512, 1100), (32768, 1500, 3000)])
def test_the_longest_text_goes_past_the_limit_but_not_past_the_memory(max_tokens, least, most):
    items, _ = golden_items(dataclasses.replace(CONTRACT, max_tokens=max_tokens), None)
    assert least < len(items[-1].split()) < most


@pytest.fixture(scope="module")
def without_special_tokens(tiny_checkpoint):
    """A model whose tokenizer puts nothing around a text: the empty text has no token."""
    model = RetrievalModel.load(tiny_checkpoint("qwen3"))
    tokenizer = Tokenizer.from_str(model.preprocessor.tokenizer_json)
    data = json.loads(tokenizer.to_str())
    data["post_processor"] = None
    return model, json.dumps(data)


def test_what_gives_no_token_is_left_out(without_special_tokens):
    model, tokenizer_json = without_special_tokens
    preprocessor = Preprocessor(dataclasses.replace(model.contract, template="$A"), tokenizer_json)
    golden = make_golden(preprocessor, model.engine(), ["", "a text", "", "other"], [None, "query", None, "document"])
    assert golden.items == ("a text", "other")
    assert golden.prompts == ("query", "document")
    assert golden.outputs.shape == (2, model.contract.dimension)
    assert list(golden.tokens) == golden.tokenize(preprocessor)
    # The bundle holds the same.
    copy = Golden.from_bytes(golden.to_bytes())
    assert (copy.items, copy.prompts, copy.tokens) == (golden.items, golden.prompts, golden.tokens)
    np.testing.assert_array_equal(copy.outputs, golden.outputs)


def test_an_empty_golden_set_is_impossible(without_special_tokens):
    model, tokenizer_json = without_special_tokens
    preprocessor = Preprocessor(dataclasses.replace(model.contract, template="$A"), tokenizer_json)
    with pytest.raises(ExportError, match="gives no token for any golden text"):
        make_golden(preprocessor, model.engine(), ["", ""], [None, None])


def test_outputs_are_those_of_each_item_alone(tiny_checkpoint):
    model = RetrievalModel.load(tiny_checkpoint("distilbert"))
    golden = make_golden(model.preprocessor, model.engine(), ["short", "a much longer text than that"], [None, None])
    for item, expected in zip(golden.tokens, golden.outputs, strict=True):
        np.testing.assert_array_equal(model.engine().run(model.preprocessor.collate([item]))[0], expected)
