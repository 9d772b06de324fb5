"""What a benchmark runs: lengths are as asked for, and the same every time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rtx.runtime.contract import Contract
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.workload import DOCUMENTS_PER_QUERY, count_tokens, make_workload


@pytest.fixture
def embedder(embed_contract: Contract, toy_tokenizer: str) -> Preprocessor:
    return Preprocessor(embed_contract, toy_tokenizer)


@pytest.fixture
def reranker(rerank_contract: Contract, toy_tokenizer: str) -> Preprocessor:
    return Preprocessor(rerank_contract, toy_tokenizer)


def test_items_have_the_number_of_tokens_that_they_stand_for(embedder: Preprocessor) -> None:
    work = make_workload(embedder)
    assert list(work.by_length) == [16, 64]  # the contract ends at 64
    for tokens, items in work.by_length.items():
        assert count_tokens(embedder, items) == [tokens] * len(items)
    assert all(len(call) == 1 for call in work.queries)
    lengths = [count_tokens(embedder, call, prompt="query")[0] for call in work.queries]
    assert min(lengths) >= 6
    assert max(lengths) <= 16


def test_the_mix_is_log_uniform_and_every_prefix_is_like_the_whole(
    embed_contract: Contract, toy_tokenizer: str
) -> None:
    long = Preprocessor(dataclasses.replace(embed_contract, max_tokens=512), toy_tokenizer)
    work = make_workload(long)
    assert list(work.by_length) == [16, 64, 128, 256, 512]
    assert list(work.mix_tokens) == count_tokens(long, work.mix)
    assert min(work.mix_tokens) >= 16
    assert max(work.mix_tokens) <= 256
    expected = (256 - 16) / np.log(256 / 16)
    assert np.mean(work.mix_tokens) == pytest.approx(expected, rel=0.02)
    for count in (32, 64, 128):
        assert np.mean(work.mix_tokens[:count]) == pytest.approx(expected, rel=0.06)


def test_it_is_the_same_every_time_and_another_with_another_seed(embedder: Preprocessor) -> None:
    assert make_workload(embedder) == make_workload(embedder)
    assert make_workload(embedder) != make_workload(embedder, seed=1)


def test_pairs_count_both_sides(reranker: Preprocessor) -> None:
    work = make_workload(reranker)
    for tokens, items in work.by_length.items():
        assert count_tokens(reranker, items) == [tokens] * len(items)
    assert all(isinstance(query, str) and isinstance(document, str) for query, document in work.mix)
    for call in work.queries:
        assert len(call) == DOCUMENTS_PER_QUERY
        assert len({query for query, _ in call}) == 1
        assert len({document for _, document in call}) == DOCUMENTS_PER_QUERY
    first, second = ({document for _, document in call} for call in work.queries[:2])
    assert not first & second


def test_given_texts_are_what_is_run(embedder: Preprocessor, reranker: Preprocessor) -> None:
    documents = [" ".join(["parse", "file"] * size) for size in range(1, 21)] + ["", "  ", "\ud800"]
    queries = ["sort the list", "find text"]
    work = make_workload(embedder, documents=documents, queries=queries, source="20 texts")
    assert sorted(work.mix) == sorted(documents[:20])
    assert {call[0] for call in work.queries} == set(queries)
    assert work.source == "20 texts"
    # Short and long ones in turn, not by length: a prefix is a sample.
    assert np.mean([len(text) for text in work.mix[:10]]) == pytest.approx(
        np.mean([len(text) for text in work.mix]), rel=0.15
    )
    pairs = make_workload(reranker, documents=documents, queries=queries)
    assert {query for query, _ in pairs.mix} == set(queries)
    assert sorted(document for _, document in pairs.mix) == sorted(documents[:20])


def test_more_texts_than_needed_are_sampled_over_all_lengths(embedder: Preprocessor) -> None:
    work = make_workload(embedder, documents=["x" * size for size in range(1, 2001)])
    assert len(work.mix) == len(set(work.mix)) == 256
    assert np.mean([len(text) for text in work.mix]) == pytest.approx(1000, rel=0.02)


def test_queries_come_from_documents_where_there_are_none(embedder: Preprocessor) -> None:
    work = make_workload(embedder, documents=["how do i reset the device when the button is off and the light red"])
    assert {call[0] for call in work.queries} == {"how do i reset the device when the"}


def test_a_contract_shorter_than_the_shortest_length(embed_contract: Contract, toy_tokenizer: str) -> None:
    short = Preprocessor(dataclasses.replace(embed_contract, max_tokens=12, prompts={}), toy_tokenizer)
    work = make_workload(short)
    assert list(work.by_length) == [12]
    assert set(work.mix_tokens) == {12}


def test_a_prompt_longer_than_a_length_gives_the_length_that_it_is(
    embed_contract: Contract, toy_tokenizer: str
) -> None:
    prompt = "find the code that is in the file and in the list and in the map and in the tree: "
    contract = dataclasses.replace(embed_contract, prompts={"document": prompt})
    work = make_workload(Preprocessor(contract, toy_tokenizer))
    shortest = min(work.by_length)
    assert 20 < shortest < 30
    assert list(work.by_length) == [shortest, 64]


def test_a_tokenizer_without_words_still_gives_texts(rerank_contract: Contract) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "1": 1, "2": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    contract = dataclasses.replace(rerank_contract, task="embed", max_tokens=16)
    work = make_workload(Preprocessor(contract, tokenizer.to_str()))
    assert work.by_length.keys() == {16}
