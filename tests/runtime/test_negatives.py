from __future__ import annotations

import math

import numpy as np
import pytest

from rtx.runtime.errors import UsageError
from rtx.runtime.negatives import Rules, choose

RANDOM = Rules(negatives=4, sampling="random")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negatives": 0}, "negatives: expected at least 1, got 0"),
        ({"skip": -1}, "skip: expected at least 0, got -1"),
        ({"depth": 0}, "depth: expected at least 1, got 0"),
        ({"skip": 98}, r"negatives: expected at most 2, the ranks from skip \(98\) to depth \(100\), got 3"),
        ({"skip": 200}, r"negatives: expected at most 0, the ranks from skip \(200\) to depth \(100\), got 3"),
        ({"margin": math.nan}, "margin: expected a finite number, got nan"),
        ({"relative_margin": math.inf}, "relative_margin: expected a finite number, got inf"),
        ({"min_score": 0.5, "max_score": 0.4}, r"min_score: expected at most max_score \(0.4\), got 0.5"),
        ({"sampling": "best"}, "sampling: expected one of top, random, got 'best'"),
    ],
)
def test_rules_that_cannot_be_kept(options, message):
    with pytest.raises(UsageError, match=f"^{message}$"):
        Rules(**options)


@pytest.mark.parametrize(
    ("positive", "options", "kept"),
    [
        (0.5, {}, [0, 1, 2, 3, 4]),
        (0.5, {"margin": 0.0}, [1, 2, 3, 4]),  # equal is allowed
        (0.5, {"margin": 0.25}, [2, 3, 4]),
        (0.5, {"margin": -0.25}, [0, 1, 2, 3, 4]),
        (0.5, {"relative_margin": 0.5}, [2, 3, 4]),
        # Below 0 a share of the positive's size comes off as well: -0.5 less half of 0.5.
        (-0.5, {"relative_margin": 0.5}, [4]),
        (0.5, {"max_score": 0.5, "min_score": 0.25}, [1, 2]),
    ],
)
def test_the_rules_by_hand(positive, options, kept):
    scores = np.array([0.75, 0.5, 0.25, -0.3, -0.75], dtype=np.float32)
    choice = choose(scores, positive, Rules(negatives=5, **options))
    assert choice.places.tolist() == kept
    assert sum(choice.dropped.values()) == 5 - len(kept)


def test_a_candidate_counts_for_the_first_rule_that_it_breaks():
    scores = np.array([0.9, 0.7, np.nan, 0.5, 0.1], dtype=np.float32)
    rules = Rules(negatives=1, margin=0.0, relative_margin=0.5, max_score=0.6, min_score=0.2)
    choice = choose(scores, 0.8, rules)
    assert dict(choice.dropped) == {"no score": 1, "margin": 1, "relative_margin": 2, "max_score": 0, "min_score": 1}
    assert choice.places.tolist() == []


def test_what_is_drawn_is_in_order_of_rank_where_scores_are_equal():
    drawn = {tuple(choose(np.zeros(9, np.float32), 1.0, RANDOM, draw=draw).places.tolist()) for draw in range(40)}
    assert all(places == tuple(sorted(places)) for places in drawn)
    assert len(drawn) > 20
    assert {place for places in drawn for place in places} == {*range(9)}
    assert choose(np.zeros(3, np.float32), 1.0, RANDOM).places.tolist() == [0, 1, 2]
