from __future__ import annotations

import math

import pytest

from rtx.trainer.examples import Example, RowChecker

PAIR = {"query": "q", "document": "d", "label": 1}
TRIPLE = {"query": "q", "positive": "p", "negatives": ["n", "m"]}
LIST = {"query": "q", "documents": ["a", "b", "c"], "labels": [2, 0, 0.5]}
SCORED = {**TRIPLE, "scores": [7.5, -1, 0.25]}


def example_of(row, needs=None):
    checked = RowChecker(needs).check(row)
    assert checked.problems == ()
    return checked.example


def problem_of(row, needs=None):
    checked = RowChecker(needs).check(row)
    assert checked.example is None
    return "; ".join(checked.problems)


@pytest.mark.parametrize(
    ("negatives", "expected"),
    [
        ({}, ()),
        ({"negative": "n1"}, ("n1",)),
        ({"negatives": ["n2", "n3"]}, ("n2", "n3")),
        ({"negative_2": "n5", "negative_10": "n6", "negative_1": "n4"}, ("n4", "n5", "n6")),
        ({"negative": "a", "negative_1": "b", "negatives": ["c"]}, ("a", "b", "c")),
        ({"negative": "", "negatives": None, "negative_1": None, "source": "web"}, ()),
        ({"negatives": '["n2", "n3"]'}, ("n2", "n3")),
    ],
)
def test_all_spellings_of_negatives(negatives, expected):
    row = {"query": "q", "positive": "p", **negatives}
    assert example_of(row, "positives") == Example("q", ("p", *expected), (1.0,) + (0.0,) * len(expected))


def test_the_three_forms_and_scores():
    assert example_of(PAIR) == Example("q", ("d",), (1.0,))
    assert example_of(TRIPLE) == Example("q", ("p", "n", "m"), (1.0, 0.0, 0.0))
    assert example_of(LIST) == Example("q", ("a", "b", "c"), (2.0, 0.0, 0.5))
    assert example_of(SCORED) == Example("q", ("p", "n", "m"), (7.5, -1.0, 0.25))
    assert [RowChecker(None).check(row).form for row in (PAIR, TRIPLE, LIST)] == ["document", "positive", "documents"]
    # As csv has them.
    cells = {"query": "q", "documents": '["a", "b"]', "labels": "[1, 0]", "positive": "", "label": ""}
    assert example_of(cells, "lists") == Example("q", ("a", "b"), (1.0, 0.0))
    assert example_of({**PAIR, "label": "0.25"}, "labels") == Example("q", ("d",), (0.25,))


# What a loss takes: the others are refused with the columns that it expects.
TAKES = {
    "positives": (TRIPLE, SCORED),
    "negatives": (TRIPLE, SCORED),
    "labels": (PAIR, TRIPLE, {**LIST, "labels": [1, 0, 0.5]}),
    "lists": (TRIPLE, LIST, {**TRIPLE, "scores": [3, 2, 1]}),
    "scores": (SCORED,),
}
REFUSES = {
    "positives": ((PAIR, "document, label, query"), (LIST, "documents, labels, query")),
    "negatives": ((PAIR, "document, label, query"), (LIST, "documents, labels, query")),
    "labels": (),
    "lists": ((PAIR, "document, label, query"),),
    "scores": ((PAIR, "document, label, query"), (LIST, "documents, labels, query")),
}
EXPECTED = {
    "positives": "query, positive and, where there are any, negative(s)",
    "negatives": "query, positive and negative(s)",
    "lists": "query, documents, labels; or query, positive, negative(s)",
    "scores": "query, positive, negative(s) and scores",
}


@pytest.mark.parametrize("needs", TAKES)
def test_what_each_kind_of_loss_takes(needs):
    for row in TAKES[needs]:
        assert example_of(row, needs) == example_of(row)
    for row, columns in REFUSES[needs]:
        assert problem_of(row, needs) == f"has the columns {columns}; expected {EXPECTED[needs]}"


def test_columns_that_do_not_fit_are_told_once():
    checker = RowChecker("positives")
    assert checker.check(PAIR).problems != ()
    assert checker.check(PAIR) == (None, "document", ())
    # The same columns with another one filled, as in csv.
    checker = RowChecker("positives")
    assert checker.check({"query": "q", "positive": "", "document": "d"}).example is None
    assert checker.check({"query": "q", "positive": "p", "document": ""}).example == Example("q", ("p",), (1.0,))


@pytest.mark.parametrize(
    ("needs", "row", "problem"),
    [
        ("negatives", {"query": "q", "positive": "p"}, "has no negative; expected at least one"),
        ("lists", {"query": "q", "positive": "p"}, "has no negative; expected at least one"),
        ("lists", {"query": "q", "documents": ["a"], "labels": [1]}, "documents: has 1; expected at least 2"),
        ("labels", {"query": "q", "documents": [], "labels": []}, "documents: has 0; expected at least 1"),
        ("scores", TRIPLE, "has no scores; it has negatives, positive, query"),
        ("scores", {**SCORED, "scores": [1, 2]}, "scores: has 2 for 3 documents; expected one each"),
        ("scores", {"query": "q", "positive": "p", "scores": [1]}, "has no negative; expected at least one"),
        ("scores", {**SCORED, "scores": "7"}, "scores: expected a list of numbers (in csv: a JSON list)"),
        ("scores", {**SCORED, "scores": 7}, "scores: expected a list of numbers, got int"),
        ("scores", {**SCORED, "scores": [1, None, 2]}, "scores[1]: expected a finite number of float32, got None"),
        ("scores", {**SCORED, "scores": [1, math.inf, 2]}, "scores[1]: expected a finite number of float32, got inf"),
        # Larger than any float32 is, than any float, and what is no number of a csv file.
        ("scores", {**SCORED, "scores": [1, -1e39, 2]}, "scores[1]: expected a finite number of float32, got -1e+39"),
        ("labels", {**PAIR, "label": 10**400}, f"label: expected a number from 0 to 1, got 1{'0' * 17}...{'0' * 19}"),
        ("labels", {**PAIR, "label": "x"}, "label: expected a number from 0 to 1, got 'x'"),
        ("labels", SCORED, "scores[0]: expected a number from 0 to 1, got 7.5; "
                           "scores[1]: expected a number from 0 to 1, got -1"),
        ("labels", {**LIST, "labels": [1, 0]}, "labels: has 2 for 3 documents; expected one each"),
        ("labels", {"query": "q", "documents": ["a"]}, "has no labels; it has documents, query"),
        ("lists", {**LIST, "labels": [1, 0, -1]}, "labels[2]: expected a finite number of float32, at least 0, got -1"),
        ("lists", {"query": "q"}, "has no documents; it has query; has no labels; it has query"),
        ("positives", {"query": "q"}, "has no positive; it has query"),
        ("positives", {"query": "q", "positive": " "}, "positive: is empty"),
        (None, {**TRIPLE, **PAIR}, "has positive and document; expected one of them"),
        (None, {**TRIPLE, "query": "\ud800"},
         "query: holds an unpaired surrogate at character 0; expected valid Unicode"),
        (None, ["q", "p"], "expected a mapping of columns, got list"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_row(needs, row, problem):
    assert problem_of(row, needs) == problem


@pytest.mark.parametrize(
    ("label", "shown"), [(1.5, "1.5"), ("yes", "'yes'"), (None, "None"), (float("nan"), "nan"), ([1], "[1]")]
)
def test_labels_are_numbers_from_0_to_1(label, shown):
    assert problem_of({**PAIR, "label": label}, "labels") == f"label: expected a number from 0 to 1, got {shown}"


@pytest.mark.parametrize(
    ("needs", "name", "close"),
    [
        ("positives", "negatve", "negative"),
        ("positives", "Negative", "negative"),
        ("positives", "negative1", "negative"),
        ("positives", "negativs", "negatives"),
        ("scores", "score", "scores"),
    ],
)
def test_a_misspelt_column_is_not_left_out_in_silence(needs, name, close):
    problem = problem_of({**SCORED, name: "n"}, needs)
    assert problem == f"column '{name}' is not known; did you mean '{close}'?"


def test_columns_of_another_meaning_are_left_out():
    others = {"id": 1.5, "query_id": 2, "positive_id": 3, "negative_ids": [4], "title": "t", "score": 3}
    assert example_of({"query": "q", "positive": "p", **others}, "positives") == Example("q", ("p",), (1.0,))
    others = {"document_id": 5, "label_source": "web", "score": 3}
    assert example_of({**PAIR, **others}, "labels") == Example("q", ("d",), (1.0,))


def test_scores_of_a_first_stage():
    checker = RowChecker(None, with_first_stage=True)
    for row, given, expected in (
        (TRIPLE, [0.5, "0.25", -1], (0.5, 0.25, -1.0)),
        (LIST, "[3, 2, 1]", (3.0, 2.0, 1.0)),
        (PAIR, "0.5", (0.5,)),
        (PAIR, [0.5], (0.5,)),
    ):
        found = checker.check({**row, "first_stage": given})
        assert found.problems == ()
        assert found.example == example_of(row)._replace(first_stage=expected)
    # Where none is needed, whatever is there is left aside.
    assert example_of({**TRIPLE, "first_stage": "x"}) == example_of(TRIPLE)


def test_scores_of_a_first_stage_that_do_not_fit():
    checker = RowChecker("lists", with_first_stage=True)
    for given, problem in (
        ({"first_stage": [1, 2]}, "first_stage: has 2 for 3 documents; expected one each"),
        ({"first_stage": [1, 2, None]}, "first_stage[2]: expected a finite number of float32, got None"),
        # A cosine may be below 0, where a label may not.
        ({"first_stage": [1, math.nan, -1]}, "first_stage[1]: expected a finite number of float32, got nan"),
        ({}, "has no first_stage; it has documents, labels, query"),
        ({"first_stages": [1, 2, 3]}, "column 'first_stages' is not known; did you mean 'first_stage'?"),
    ):
        assert problem in checker.check({**LIST, **given}).problems
