from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rtx.runtime.errors import DataError
from rtx.runtime.search import score_pairs, search

FLOAT_SIMILARITIES = ["cosine", "dot", "euclidean", "manhattan"]


def score(query: np.ndarray, document: np.ndarray, similarity: str) -> np.float32:
    """One pair, the slow way: exactly rounded sums."""
    x, y = query.astype(float).tolist(), document.astype(float).tolist()
    if similarity == "dot":
        return np.float32(math.fsum(a * b for a, b in zip(x, y, strict=True)))
    if similarity == "cosine":
        norms = math.sqrt(math.fsum(a * a for a in x)) * math.sqrt(math.fsum(b * b for b in y))
        return np.float32(math.fsum(a * b for a, b in zip(x, y, strict=True)) / norms if norms else 0.0)
    if similarity == "euclidean":
        return np.float32(-math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True))))
    return np.float32(-math.fsum(abs(a - b) for a, b in zip(x, y, strict=True)))


def brute_force(queries: np.ndarray, documents: np.ndarray, k: int, similarity: str) -> tuple[list, list]:
    """All pairs, sorted by score and then by position."""
    indices, scores = [], []
    for query in queries:
        ranked = sorted((-score(query, document, similarity), place) for place, document in enumerate(documents))[:k]
        indices.append([place for _, place in ranked])
        scores.append([-negative for negative, _ in ranked])
    return indices, scores


@pytest.mark.parametrize(
    ("similarity", "indices", "scores"),
    [
        ("cosine", [1, 0, 3, 2], [1.0, math.sqrt(0.5), 0.0, 0.0]),
        ("dot", [1, 0, 2, 3], [2.0, 1.0, 0.0, 0.0]),
        ("euclidean", [0, 1, 3, 2], [-1.0, -1.0, -1.0, -3.1622777]),
        ("manhattan", [0, 1, 3, 2], [-1.0, -1.0, -1.0, -4.0]),
    ],
)
def test_scores_and_ties_by_hand(similarity, indices, scores):
    # The query is (1, 0). Zero has cosine 0 with everything.
    query = np.array([[1, 0]], dtype=np.float32)
    documents = np.array([[1, 1], [2, 0], [0, 3], [0, 0]], dtype=np.float32)
    hits = search(query, documents, 4, similarity=similarity)
    expected = sorted(indices, key=lambda place: (-scores[indices.index(place)], place))
    assert hits.indices.tolist() == [expected]
    np.testing.assert_array_equal(hits.scores, np.array([scores], dtype=np.float32))
    assert (hits.indices.dtype, hits.scores.dtype) == (np.int64, np.float32)


# Few distinct values, so that ties are common; and halves of them, so that every sum is exact in any order.
SMALL = st.integers(-3, 3).map(lambda value: value / 2)


@st.composite
def small_problems(draw):
    dim = draw(st.integers(1, 6))
    matrix = lambda rows: hnp.arrays(np.float32, (rows, dim), elements=SMALL)  # noqa: E731
    return draw(matrix(draw(st.integers(1, 6)))), draw(matrix(draw(st.integers(1, 30)))), draw(st.integers(1, 35))


@pytest.mark.parametrize("similarity", ["dot", "euclidean", "manhattan"])
@given(problem=small_problems(), blocks=st.tuples(st.integers(1, 8), st.integers(1, 40)))
@settings(max_examples=60)
def test_equals_brute_force_with_many_ties(similarity, problem, blocks):
    queries, documents, k = problem
    hits = search(queries, documents, k, similarity=similarity, block_queries=blocks[0], block_documents=blocks[1])
    indices, scores = brute_force(queries, documents, k, similarity)
    assert hits.indices.tolist() == indices
    np.testing.assert_array_equal(hits.scores, np.array(scores, dtype=np.float32))


@pytest.mark.parametrize("similarity", FLOAT_SIMILARITIES)
@pytest.mark.parametrize("dim", [1, 3, 64, 384])
def test_equals_brute_force_on_random_vectors(similarity, dim):
    generator = np.random.default_rng(dim)
    queries = generator.standard_normal((3, dim)).astype(np.float32)
    documents = generator.standard_normal((200, dim)).astype(np.float32) + np.float32(0.5)
    hits = search(queries, documents, 10, similarity=similarity, block_documents=64)
    indices, scores = brute_force(queries, documents, 10, similarity)
    # The sums of one query in one dimension all tie for cosine; elsewhere ties are unlikely.
    assert hits.indices.tolist() == indices
    np.testing.assert_allclose(hits.scores, scores, rtol=1e-6)


@pytest.mark.parametrize("similarity", FLOAT_SIMILARITIES)
def test_result_does_not_depend_on_blocks_neighbours_or_position(similarity):
    # Documents in clusters so tight that float32 sums in another order would change their ranks.
    generator = np.random.default_rng(5)
    centres = generator.standard_normal((5, 129))
    documents = np.repeat(centres, 60, axis=0) + generator.normal(scale=3e-7, size=(300, 129))
    documents = (1000 * documents).astype(np.float32)
    queries = (10 * centres + generator.normal(scale=1.0, size=centres.shape)).astype(np.float32)
    whole = search(queries, documents, 40, similarity=similarity)
    for block_queries, block_documents in [(1, 1), (1, 300), (2, 7), (5, 64), (3, 299)]:
        blocked = search(
            queries,
            documents,
            40,
            similarity=similarity,
            block_queries=block_queries,
            block_documents=block_documents,
        )
        np.testing.assert_array_equal(blocked.indices, whole.indices)
        np.testing.assert_array_equal(blocked.scores, whole.scores)
    # Neither does the layout of the arrays in memory.
    transposed = search(np.asfortranarray(queries), np.asfortranarray(documents), 40, similarity=similarity)
    np.testing.assert_array_equal(transposed.indices, whole.indices)
    np.testing.assert_array_equal(transposed.scores, whole.scores)
    for row in range(len(queries)):
        alone = search(queries[row : row + 1], documents, 40, similarity=similarity)
        np.testing.assert_array_equal(alone.scores[0], whole.scores[row])
    # In another order of the documents each keeps its score, bit for bit.
    order = generator.permutation(len(documents))
    shuffled = search(queries, documents[order], len(documents), similarity=similarity)
    everything = search(queries, documents, len(documents), similarity=similarity)
    for row in range(len(queries)):
        scores = dict(zip(everything.indices[row].tolist(), everything.scores[row].tolist(), strict=True))
        assert [scores[place] for place in order[shuffled.indices[row]].tolist()] == shuffled.scores[row].tolist()


@pytest.mark.parametrize("similarity", FLOAT_SIMILARITIES)
def test_equal_documents_tie_and_keep_their_order(similarity):
    generator = np.random.default_rng(6)
    documents = np.tile(generator.standard_normal((1, 200)), (500, 1)).astype(np.float32)
    documents[123] = 0
    hits = search(documents[:1] * 2, documents, 499, similarity=similarity, block_documents=77)
    assert hits.indices[0].tolist() == [place for place in range(500) if place != 123]
    assert len(set(hits.scores[0].tolist())) == 1


@pytest.mark.parametrize("similarity", FLOAT_SIMILARITIES)
@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e18])
def test_the_scale_of_vectors_does_not_change_the_order(similarity, scale):
    generator = np.random.default_rng(7)
    queries, documents = generator.standard_normal((4, 32)), generator.standard_normal((100, 32))
    expected = search(queries.astype(np.float32), documents.astype(np.float32), 10, similarity=similarity)
    scaled = search(
        (queries * scale).astype(np.float32), (documents * scale).astype(np.float32), 10, similarity=similarity
    )
    np.testing.assert_array_equal(scaled.indices, expected.indices)


def test_int8_vectors_are_compared_exactly():
    generator = np.random.default_rng(8)
    queries = generator.integers(-127, 128, size=(5, 1024)).astype(np.int8)
    documents = generator.integers(-127, 128, size=(300, 1024)).astype(np.int8)
    hits = search(queries, documents, 20, similarity="dot", block_documents=100)
    products = queries.astype(np.int64) @ documents.astype(np.int64).T
    expected = np.lexsort((np.broadcast_to(np.arange(300), products.shape), -products), axis=1)[:, :20]
    np.testing.assert_array_equal(hits.indices, expected)
    np.testing.assert_array_equal(hits.scores, np.take_along_axis(products, expected, axis=1))


def test_hamming_by_hand():
    # Distances of 0b10110000: to itself 0, to 0b00110000 1, to 0b01001111 8, to 0b10110001 1 (a tie with place 1).
    query = np.array([[0b10110000]], dtype=np.uint8)
    documents = np.array([[0b01001111], [0b00110000], [0b10110000], [0b10110001]], dtype=np.uint8)
    hits = search(query, documents, 4, similarity="hamming")
    assert hits.indices.tolist() == [[2, 1, 3, 0]]
    assert hits.scores.tolist() == [[0, -1, -1, -8]]
    assert not np.signbit(hits.scores[0, 0])


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 12),
    st.tuples(st.integers(1, 8), st.integers(1, 40)),
)
@settings(max_examples=30)
def test_hamming_equals_brute_force(seed, width, blocks):
    generator = np.random.default_rng(seed)
    queries = generator.integers(0, 256, size=(4, width)).astype(np.uint8)
    documents = generator.integers(0, 256, size=(50, width)).astype(np.uint8)
    hits = search(queries, documents, 9, similarity="hamming", block_queries=blocks[0], block_documents=blocks[1])
    for row, query in enumerate(queries):
        distances = [int.from_bytes((query ^ document).tobytes()).bit_count() for document in documents]
        expected = sorted(range(50), key=lambda place: (distances[place], place))[:9]
        assert hits.indices[row].tolist() == expected
        assert hits.scores[row].tolist() == [-distances[place] for place in expected]


def test_more_hits_than_documents_and_no_documents_and_no_queries():
    vectors = np.eye(3, dtype=np.float32)
    assert search(vectors, vectors, 10).indices.shape == (3, 3)
    assert search(vectors, vectors[:0], 10).scores.shape == (3, 0)
    assert search(vectors[:0], vectors, 2).indices.shape == (0, 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_named(bad):
    documents = np.ones((40, 2), dtype=np.float32)
    documents[[3, 17], 1] = bad
    with pytest.raises(DataError, match="documents: 2 of 40 vectors are not finite, at rows 3, 17"):
        search(documents[:1], documents, 1)


@pytest.mark.parametrize(
    ("queries", "documents", "k", "similarity", "message"),
    [
        (np.ones((1, 2)), np.ones((1, 3)), 1, "dot", r"got \[1, 2\] and \[1, 3\]"),
        (np.ones(2), np.ones((1, 2)), 1, "dot", r"got \[2\] and \[1, 2\]"),
        (np.ones((1, 2)), np.ones((1, 2)), 0, "dot", "k: expected at least 1, got 0"),
        (np.ones((1, 2)), np.ones((1, 2)), 1, "chebyshev", "similarity: expected one of cosine, dot"),
        (np.ones((1, 2)), np.ones((1, 2)), 1, "hamming", "packed bits .* got float64"),
        (np.ones((1, 2), np.uint8), np.ones((1, 2), np.uint8), 1, "dot", "packed bits .* got uint8"),
    ],
)
def test_arguments_that_do_not_fit(queries, documents, k, similarity, message):
    with pytest.raises(ValueError, match=message):
        search(queries, documents, k, similarity=similarity)


@pytest.mark.parametrize("similarity", FLOAT_SIMILARITIES)
def test_scores_of_pairs_are_those_of_a_search_to_the_bit(similarity, monkeypatch):
    random = np.random.default_rng(2)
    queries = random.normal(size=(6, 33)).astype(np.float32)
    documents = random.normal(size=(40, 33)).astype(np.float32)
    hits = search(queries, documents, 40, similarity=similarity, block_documents=7)
    rows, columns = np.repeat(np.arange(6), 40), hits.indices.ravel()
    for elements in (1, 100, 1 << 21):
        monkeypatch.setattr("rtx.runtime.search._RESCORE_ELEMENTS", elements)
        scores = score_pairs(queries, documents, rows, columns, similarity=similarity)
        np.testing.assert_array_equal(scores, hits.scores.ravel())
    with pytest.raises(DataError, match="documents: 1 of 1 vectors are not finite"):
        score_pairs(queries, np.full((1, 33), np.nan, np.float32), rows[:1], rows[:1], similarity=similarity)
