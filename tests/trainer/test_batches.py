from __future__ import annotations

import pickle

import pytest

from rtx.runtime.contract import Contract
from rtx.runtime.errors import DataError
from rtx.runtime.preprocessor import Preprocessor
from rtx.trainer.batches import Collator, NumberedRows
from rtx.trainer.data import Example, TrainingData

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]


def preprocessor(**changes):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "find", "read", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    contract = Contract(
        **{"task": "embed", "inputs": ("input_ids", "attention_mask"), "max_tokens": 8, "pad_token_id": 0, **changes}
    )
    return Preprocessor(contract, tokenizer.to_str())


def collate(model, examples):
    return Collator(model, task=model.contract.task)(list(enumerate(examples)))


def test_texts_are_tokenised_row_by_row_with_prompts_as_the_embedder_does():
    model = preprocessor(prompts={"query": "find ", "document": "read "})
    examples = [
        Example("alpha", ("beta", "gamma"), (1.0, 0.0)),
        Example("delta", ("epsilon zeta",), (1.0,)),
        Example("eta", ("theta", "eta", "eta"), (1.0, 0.0, 0.5)),
    ]
    batch = collate(model, examples)
    ids = {word: model.encode([word], prompt=None)[0].ids[0] for word in ["find", "read", *WORDS]}
    queries, documents = batch.sides
    assert [item.ids for item in queries] == [[ids["find"], ids[word]] for word in ("alpha", "delta", "eta")]
    texts = ["beta", "gamma", "epsilon zeta", "theta", "eta", "eta"]
    assert [item.ids for item in documents] == [[ids["read"], *(ids[word] for word in text.split())] for text in texts]
    assert documents == model.encode(texts, prompt="document")
    assert batch.targets.owner.tolist() == [0, 0, 1, 2, 2, 2]
    assert batch.targets.labels.tolist() == [1, 0, 1, 1, 0, 0.5]
    assert batch.tokens == 2 * 3 + sum(1 + len(text.split()) for text in texts)


def test_pairs_of_a_reranker():
    model = preprocessor(task="rerank")
    batch = collate(model, [Example("alpha beta", ("gamma", "zeta"), (1.0, 0.25)), Example("delta", ("eta",), (0.0,))])
    (pairs,) = batch.sides
    assert pairs == model.encode_pairs([("alpha beta", "gamma"), ("alpha beta", "zeta"), ("delta", "eta")])
    assert batch.targets.labels.tolist() == [1.0, 0.25, 0.0]


def test_a_text_without_tokens_is_named():
    with pytest.raises(DataError, match=r"training data: row 0: '\\t': gives no token; expected at least one"):
        collate(preprocessor(), [Example("alpha", ("\t",), (1.0,))])


def test_rows_know_their_place_also_in_another_process():
    data = TrainingData.from_rows([{"query": "a", "positive": "b"}, {"query": "c", "positive": "d"}], needs="positives")
    rows = pickle.loads(pickle.dumps(NumberedRows(data)))
    assert len(rows) == 2
    assert rows[1] == (1, Example("c", ("d",), (1.0,)))
