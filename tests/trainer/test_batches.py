from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest
import torch

from rtx.runtime.contract import Contract
from rtx.runtime.errors import DataError
from rtx.runtime.text import TextPreprocessor
from rtx.trainer.batches import BatchSampler, Collator
from rtx.trainer.data import Pair, TrainingData, Triple

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]


def preprocessor(**changes):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "find", "read", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    contract = Contract(
        **{"task": "embed", "inputs": ("input_ids", "attention_mask"), "max_tokens": 8, "pad_token_id": 0, **changes}
    )
    return TextPreprocessor(contract, tokenizer.to_str())


def data_of(examples):
    return TrainingData("embed" if isinstance(examples[0], Triple) else "rerank", examples, ())


def clash(one, two):
    """Whether one row's texts would be false negatives of the other's, told by their text."""
    first, second = ({one.query, one.positive}, set(one.negatives)), ({two.query, two.positive}, set(two.negatives))
    return bool(first[0] & second[0] or first[0] & second[1] or first[1] & second[0])


def random_triples(count, texts, seed):
    generator = np.random.default_rng(seed)
    return [
        Triple(f"q{q}", f"d{p}", tuple(f"d{n}" for n in negatives if n != p))
        for q, p, *negatives in generator.integers(texts, size=(count, 5)).tolist()
    ]


@pytest.mark.parametrize(("count", "texts", "batch_size"), [(100, 60, 8), (257, 1000, 32), (40, 5, 4), (7, 100, 64)])
def test_no_batch_holds_a_false_negative(count, texts, batch_size):
    examples = random_triples(count, texts, seed=count)
    sampler = BatchSampler(data_of(examples), batch_size=batch_size, seed=1)
    for epoch in range(3):
        plan = sampler.plan(epoch)
        assert len(plan) == len(sampler) == -(-count // batch_size)
        assert all(1 <= len(batch) <= batch_size for batch in plan)
        rows = list(chain.from_iterable(plan))
        assert len(rows) == len(set(rows))
        for batch in plan:
            for one, two in combinations(batch, 2):
                assert not clash(examples[one], examples[two])
        # A row is left out only where it fits nowhere.
        for row in set(range(count)) - set(rows):
            for batch in plan:
                full = len(batch) >= count // len(plan)
                assert full or any(clash(examples[row], examples[other]) for other in batch)


def test_rows_that_share_nothing_are_all_there_in_even_batches():
    sampler = BatchSampler(data_of([Triple(f"q{i}", f"d{i}", ("same",)) for i in range(65)]), batch_size=64, seed=0)
    plan = sampler.plan(0)
    assert sorted(chain.from_iterable(plan)) == list(range(65))
    # Not 64 and a lone one without any negative.
    assert sorted(map(len, plan)) == [32, 33]


def test_more_copies_than_batches_are_left_out():
    examples = [Triple("same", f"d{i}") for i in range(10)] + [Triple(f"q{i}", f"e{i}") for i in range(10)]
    plan = BatchSampler(data_of(examples), batch_size=5, seed=0).plan(0)
    assert [sum(row < 10 for row in batch) for batch in plan] == [1, 1, 1, 1]
    assert sorted(row for batch in plan for row in batch if row >= 10) == list(range(10, 20))


def test_the_plan_depends_on_seed_and_epoch_alone():
    data = data_of(random_triples(60, 40, seed=3))
    plans = {(s, e): BatchSampler(data, batch_size=8, seed=s).plan(e) for s in (0, 1) for e in (0, 1)}
    assert len({str(plan) for plan in plans.values()}) == 4
    torch.manual_seed(99)
    again = BatchSampler(data, batch_size=8, seed=1)
    again.set_epoch(1)
    assert list(again) == plans[1, 1]


def test_pairs_of_a_reranker_are_only_shuffled():
    data = data_of([Pair("q", "d", 1.0)] * 10)
    plan = BatchSampler(data, batch_size=4, seed=0).plan(0)
    assert sorted(chain.from_iterable(plan)) == list(range(10))
    assert list(chain.from_iterable(plan)) != list(range(10))


def unpack(side):
    """Token ids of each text, in the given order, from the padded chunks."""
    rows = [
        ids[mask.bool()].tolist()
        for chunk in side["chunks"]
        for ids, mask in zip(chunk["input_ids"], chunk["attention_mask"], strict=True)
    ]
    return [rows[place] for place in side["places"].tolist()]


def test_collate_puts_positives_first_and_applies_prompts_as_the_embedder_does():
    model = preprocessor(prompts={"query": "find ", "document": "read "})
    triples = [
        Triple("alpha", "beta", ("gamma",)),
        Triple("delta", "epsilon zeta"),
        Triple("eta", "theta", ("eta",) * 2),
    ]
    batch = Collator(model, chunk_tokens=64)(triples)
    ids = {word: model.encode([word], prompt=None)[0].ids[0] for word in ["find", "read", *WORDS]}
    assert unpack(batch["queries"]) == [[ids["find"], ids[word]] for word in ("alpha", "delta", "eta")]
    documents = ["beta", "epsilon zeta", "theta", "gamma", "eta", "eta"]
    assert unpack(batch["documents"]) == [[ids["read"], *(ids[word] for word in text.split())] for text in documents]
    assert unpack(batch["documents"]) == [item.ids for item in model.encode(documents, prompt="document")]


@pytest.mark.parametrize("chunk_tokens", [1, 6, 16, 1000])
def test_chunks_keep_to_their_tokens_and_lead_back_to_the_order(chunk_tokens):
    model = preprocessor()
    lengths = [3, 1, 8, 2, 2, 5, 1, 8]
    texts = [" ".join(WORDS[i : i + 1] * length) for i, length in enumerate(lengths)]
    batch = Collator(model, chunk_tokens=chunk_tokens)([Triple(text, WORDS[i]) for i, text in enumerate(texts)])
    assert unpack(batch["queries"]) == [item.ids for item in model.encode(texts, prompt="query")]
    for chunk in batch["queries"]["chunks"]:
        rows, columns = chunk["input_ids"].shape
        assert rows == 1 or rows * columns <= chunk_tokens


def test_collate_pairs_for_a_reranker():
    model = preprocessor(task="rerank")
    batch = Collator(model, chunk_tokens=64)([Pair("alpha beta", "gamma", 1.0), Pair("delta", "eta", 0.25)])
    assert batch["labels"].tolist() == [1.0, 0.25]
    assert unpack(batch["pairs"]) == [
        item.ids for item in model.encode_pairs([("alpha beta", "gamma"), ("delta", "eta")])
    ]


def test_a_text_without_tokens_is_named():
    with pytest.raises(DataError, match=r"training data: '\\t': gives no token; expected at least one"):
        Collator(preprocessor(), chunk_tokens=64)([Triple("alpha", "\t")])
