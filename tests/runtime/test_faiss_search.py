from __future__ import annotations

import sys

import numpy as np
import pytest

from rtx.runtime.errors import DataError, MissingExtraError
from rtx.runtime.faiss_search import search_faiss
from rtx.runtime.search import search


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_search_by_faiss_equals_ours_in_any_blocks(similarity, block):
    pytest.importorskip("faiss")
    random = np.random.default_rng(0)
    queries = random.normal(size=(5, 16)).astype(np.float32)
    # Of all lengths, which count for some similarities and not for others.
    documents = (random.normal(size=(90, 16)) * random.uniform(0.01, 10, size=(90, 1))).astype(np.float32)
    for k in (1, 10, 89, 200):
        expected = search(queries, documents, k, similarity=similarity)
        found = search_faiss(queries, documents, k, similarity=similarity, block_documents=block)
        np.testing.assert_array_equal(found.indices, expected.indices)
        np.testing.assert_array_equal(found.scores, expected.scores)


def test_many_that_tie_are_in_order():
    pytest.importorskip("faiss")
    documents = np.repeat(np.array([[1, 0], [0, 1]], dtype=np.float32), [12, 30], axis=0)
    query = np.array([[0.5, 1]], dtype=np.float32)
    hits = search_faiss(query, documents, 35, block_documents=9)
    assert hits.indices[0].tolist() == [*range(12, 42), *range(5)]
    np.testing.assert_array_equal(hits.scores, search(query, documents, 35).scores)


def test_vectors_that_are_not_finite():
    pytest.importorskip("faiss")
    documents = np.ones((3, 2), dtype=np.float32)
    documents[1] = np.nan
    with pytest.raises(DataError, match="documents: 1 of 3 vectors are not finite, at rows 1"):
        search_faiss(documents[:1], documents, 2)


def test_without_faiss_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError) as raised:
        search_faiss(np.ones((1, 2), np.float32), np.ones((1, 2), np.float32), 1)
    assert str(raised.value) == (
        "searching with faiss needs the package 'faiss', which is not installed. "
        "Install it with: pip install 'rtx-retrieval[faiss]'"
    )
