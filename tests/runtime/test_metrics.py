from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rtx.runtime.metrics import (
    accuracy_at_k,
    bootstrap_interval,
    map_at_k,
    mrr_at_k,
    ndcg_at_k,
    recall_at_k,
    ties_in_top_k,
    top_k_overlap,
)

# Grades of the ranked documents, and all grades of each query.
#   query 0: relevant documents at ranks 2 and 4, a third one was not found.
#   query 1: graded; found 1, 3, 0 where the best order is 3, 2, 1.
#   query 2: nothing relevant was found.
#   query 3: nothing relevant exists.
GRADES = np.array([[0, 1, 0, 1, 0], [1, 3, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
JUDGED = np.array([[1, 1, 1, 0], [2, 3, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]])


def log2(x: float) -> float:
    return math.log2(x)


def test_ndcg_by_hand():
    # query 0: DCG@5 = 1/log2(3) + 1/log2(5), ideal = 1 + 1/log2(3) + 1/2.
    # query 1: DCG@5 = 1 + 3/log2(3), ideal = 3 + 2/log2(3) + 1/2: the gain is the grade, not 2**grade - 1.
    expected = [
        (1 / log2(3) + 1 / log2(5)) / (1 + 1 / log2(3) + 0.5),
        (1 + 3 / log2(3)) / (3 + 2 / log2(3) + 0.5),
        0,
        0,
    ]
    np.testing.assert_allclose(ndcg_at_k(GRADES, JUDGED, 5), expected, rtol=1e-15)
    # The cut applies to the ideal order too. query 1 at 1: 1 of 3.
    np.testing.assert_allclose(ndcg_at_k(GRADES, JUDGED, 1), [0, 1 / 3, 0, 0])


def test_mrr_by_hand():
    np.testing.assert_array_equal(mrr_at_k(GRADES, 5), [1 / 2, 1, 0, 0])
    np.testing.assert_array_equal(mrr_at_k(GRADES, 1), [0, 1, 0, 0])


def test_map_by_hand():
    # query 0: precision 1/2 at rank 2 and 2/4 at rank 4, over 3 relevant documents. query 1: 1/1 and 2/2 over 3.
    np.testing.assert_allclose(map_at_k(GRADES, JUDGED, 5), [1 / 3, 2 / 3, 0, 0], rtol=1e-15)
    # trec_eval divides by all relevant documents even where there are more of them than ranks: 1/3, not 1/1.
    np.testing.assert_allclose(map_at_k(GRADES, JUDGED, 1), [0, 1 / 3, 0, 0], rtol=1e-15)


def test_recall_and_accuracy_by_hand():
    np.testing.assert_array_equal(recall_at_k(GRADES, JUDGED, 5), [2 / 3, 2 / 3, 0, 0])
    np.testing.assert_array_equal(recall_at_k(GRADES, JUDGED, 2), [1 / 3, 2 / 3, 0, 0])
    np.testing.assert_array_equal(accuracy_at_k(GRADES, 1), [0, 1, 0, 0])
    np.testing.assert_array_equal(accuracy_at_k(GRADES, 5), [1, 1, 0, 0])


def test_a_negative_grade_is_not_relevant_and_gains_nothing():
    grades, judged = np.array([[-1, 2]]), np.array([[2, -1]])
    np.testing.assert_allclose(ndcg_at_k(grades, judged, 2), [1 / log2(3)])
    np.testing.assert_array_equal(mrr_at_k(grades, 2), [0.5])
    np.testing.assert_array_equal(recall_at_k(grades, judged, 2), [1])


def test_fewer_ranks_than_k_count_as_not_relevant():
    few = np.array([[0, 1]])
    assert mrr_at_k(few, 10).tolist() == [0.5]
    assert map_at_k(few, np.array([[1]]), 10).tolist() == [0.5]
    assert ndcg_at_k(few, np.array([[1]]), 10).tolist() == pytest.approx([1 / log2(3)])


@pytest.mark.parametrize("k", [1, 3, 10])
def test_ndcg_equals_scikit_learn_on_graded_relevance(k):
    ndcg_score = pytest.importorskip("sklearn.metrics").ndcg_score
    generator = np.random.default_rng(0)
    for _ in range(30):
        truth = generator.integers(0, 4, size=20)
        truth[0] = 1
        order = generator.permutation(20)
        expected = ndcg_score(truth[None], -np.argsort(order)[None].astype(float), k=k)
        assert ndcg_at_k(truth[order][None], truth[None], k)[0] == pytest.approx(expected, abs=1e-12)


@st.composite
def rankings(draw):
    """Grades of all documents of some queries, in ranked order, with at least one relevant each."""
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 15)))
    grades = draw(hnp.arrays(np.int64, shape, elements=st.integers(-1, 4)))
    grades[:, draw(st.integers(0, shape[1] - 1))] = 1
    return grades


@given(rankings(), st.integers(1, 20), st.randoms(use_true_random=False))
def test_properties_of_all_metrics(grades, k, random):
    judged = grades[:, random.sample(range(grades.shape[1]), grades.shape[1])]
    values = {
        "ndcg": ndcg_at_k(grades, judged, k),
        "map": map_at_k(grades, judged, k),
        "mrr": mrr_at_k(grades, k),
        "recall": recall_at_k(grades, judged, k),
        "accuracy": accuracy_at_k(grades, k),
    }
    for name, per_query in values.items():
        assert per_query.shape == (len(grades),), name
        assert ((per_query >= 0) & (per_query <= 1)).all(), name
    # Judged grades have no order.
    np.testing.assert_array_equal(ndcg_at_k(grades, grades, k), values["ndcg"])
    # The best order is worth exactly 1, and no other order more.
    best = -np.sort(-grades, axis=1)
    assert (ndcg_at_k(best, judged, k) == 1).all()
    # A query's value does not depend on the other queries.
    np.testing.assert_array_equal(ndcg_at_k(grades[:1], judged[:1], k), values["ndcg"][:1])
    # Something relevant is found if and only if each metric is above zero.
    for name in ("ndcg", "map", "mrr", "recall"):
        np.testing.assert_array_equal(values[name] > 0, values["accuracy"] == 1)


def test_k_below_one_is_refused():
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        mrr_at_k(GRADES, 0)


def test_bootstrap_interval_agrees_with_the_normal_approximation():
    # The mean of 2,000 values is nearly normal, so the 95 % interval is mean +- 1.96 sd / sqrt(n); 10,000 resamples
    # place its bounds to about 1 % of its width.
    differences = np.random.default_rng(1).normal(0.1, 0.5, size=2000)
    low, high = bootstrap_interval(differences)
    half = 1.96 * differences.std() / math.sqrt(2000)
    assert low == pytest.approx(differences.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(differences.mean() + half, abs=0.1 * half)


def test_bootstrap_interval_of_two_queries_by_hand():
    # Means of two draws from {0, 1}: 0, 1/2 and 1 with shares 1/4, 1/2 and 1/4. The middle 40 % is all 1/2, the middle
    # 60 % reaches both ends.
    differences = np.array([0.0, 1.0])
    assert bootstrap_interval(differences, confidence=0.4) == (0.5, 0.5)
    assert bootstrap_interval(differences, confidence=0.6) == (0.0, 1.0)


def test_bootstrap_interval_repeats_and_does_not_depend_on_the_block(monkeypatch):
    differences = np.random.default_rng(2).normal(size=301)
    first = bootstrap_interval(differences, samples=500, seed=7)
    assert bootstrap_interval(differences, samples=500, seed=7) == first
    assert bootstrap_interval(differences, samples=500, seed=8) != first
    monkeypatch.setattr("rtx.runtime.metrics._BOOTSTRAP_BLOCK_DRAWS", 700)
    assert bootstrap_interval(differences, samples=500, seed=7) == first


def test_bootstrap_interval_of_equal_differences_is_a_point():
    assert bootstrap_interval(np.full(50, 0.25)) == (0.25, 0.25)
    assert bootstrap_interval(np.array([0.25])) == (0.25, 0.25)


@pytest.mark.parametrize("differences", [np.array([]), np.array([1.0, np.nan]), np.zeros((2, 2))])
def test_bootstrap_interval_refuses_what_has_no_mean(differences):
    with pytest.raises(ValueError, match="differences: expected"):
        bootstrap_interval(differences)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_bootstrap_interval_refuses_a_confidence_that_is_no_share(confidence):
    with pytest.raises(ValueError, match="confidence: expected a share between 0 and 1"):
        bootstrap_interval(np.ones(3), confidence=confidence)


def test_top_k_overlap_by_hand():
    a = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [5, 6, -1, -1], [-1, -1, -1, -1], [7, -1, -1, -1]])
    b = np.array([[4, 3, 2, 1], [1, 9, 8, 2], [6, 7, 5, -1], [-1, -1, -1, -1], [-1, -1, -1, -1]])
    # row 2: two of the three that the longer list holds. row 3: both empty. row 4: one empty.
    np.testing.assert_allclose(top_k_overlap(a, b, 4), [1, 1 / 2, 2 / 3, 1, 0])
    np.testing.assert_allclose(top_k_overlap(a, b, 2), [0, 1 / 2, 1 / 2, 1, 0])


def test_ties_in_top_k_by_hand():
    inf = np.inf
    scores = np.array([[3, 3, 3, 2, 2, 1], [5, 4, 3, 3, 2, 1], [1, 1, -inf, -inf, -inf, -inf]], dtype=np.float32)
    # At 3, row 0 has the pairs (1, 2) and (2, 3); row 1 the pair (3, 4), across the cut; row 2 one pair: what is not
    # filled does not tie.
    assert ties_in_top_k(scores, 3).tolist() == [2, 1, 1]
    assert ties_in_top_k(scores, 2).tolist() == [2, 0, 1]
    assert ties_in_top_k(scores, 10).tolist() == [3, 1, 1]
