"""Losses of rerankers: their values, by hand and by sentence-transformers, and what must not matter."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from sentence_transformers.cross_encoder import losses as theirs

from rtx.runtime.errors import UsageError
from rtx.trainer.losses import Targets, bce, cross_entropy, lambda_ndcg, listnet, ranknet
from rtx.trainer.losses.first_stage import first_stage
from rtx.trainer.losses.rerank import margin_mse

# Two orders of summation of a few hundred terms around 1 in float64.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
# Lists of different lengths, with one document, with equal labels, and with grades; all numbers exact in float32.
BINARY = [[1.0, 0.0, 0.0], [0.0], [0.0, 1.0, 1.0, 0.0, 0.0], [1.0], [0.0, 0.0], [1.0, 1.0]]
GRADED = [[2.0, 0.0, 1.0], [0.5], [0.0, 3.0, 0.25, 0.0, 1.0, 2.0], [1.0], [0.0, 0.0], [3.0, 0.5]]

LOSSES = {
    "bce": bce,
    "bce, weighted": functools.partial(bce, pos_weight=3.0),
    "cross_entropy": cross_entropy,
    "cross_entropy, scaled": functools.partial(cross_entropy, scale=4.0),
    "listnet": listnet,
    "ranknet": functools.partial(ranknet, sigma=2.0),
    "lambda_ndcg": lambda_ndcg,
    "lambda_ndcg at 2": functools.partial(lambda_ndcg, k=2, mu=3.0, sigma=0.5),
    "margin_mse": margin_mse,
}


def logits_of(labels, seed=0):
    """In float64, of either sign."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(len(row) for row in labels)
    return (2 * torch.randn(count, generator=generator, dtype=torch.float64)).requires_grad_()


def assert_same(ours, reference, logits):
    """Value and gradient."""
    torch.testing.assert_close(ours, reference, **CLOSE)
    assert ours.item() != 0
    (expected,) = torch.autograd.grad(reference, logits, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(ours, logits)[0], expected, **CLOSE)


def close(value):
    return pytest.approx(value, abs=1e-12)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


# sentence-transformers


@pytest.mark.parametrize("pos_weight", [1.0, 5.0])
def test_bce_equals_sentence_transformers(pos_weight, reference_of_logits):
    labels = [[1.0], [0.0], [0.25], [0.0], [1.0]]
    logits = logits_of(labels)

    def make(model):
        loss = theirs.BinaryCrossEntropyLoss(model, pos_weight=torch.tensor(pos_weight))
        return lambda inputs, rows: loss([inputs[0], [row[0] for row in inputs[1]]], torch.cat(rows))

    reference = reference_of_logits(make, logits, labels)
    assert_same(bce(logits, Targets.of(labels), pos_weight=pos_weight), reference, logits)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_cross_entropy_equals_sentence_transformers(scale, reference_of_logits):
    labels = [[1.0, 0.0, 0.0]] * 4
    logits = logits_of(labels)

    def make(model):
        loss = theirs.MultipleNegativesRankingLoss(model, scale=scale, activation_fn=None)
        # Its logits come column by column: the positives of all queries, then their first negatives, ...
        return lambda *_: loss.calculate_loss(list(logits.view(4, 3).T), 4)

    reference = reference_of_logits(make, logits, labels)
    assert_same(cross_entropy(logits, Targets.of(labels), scale=scale), reference, logits)


@pytest.mark.parametrize("labels", [BINARY, GRADED])
@pytest.mark.parametrize(
    ("ours", "make"),
    [
        (listnet, theirs.ListNetLoss),
        (ranknet, theirs.RankNetLoss),
        (functools.partial(ranknet, sigma=0.5), functools.partial(theirs.RankNetLoss, sigma=0.5)),
        (lambda_ndcg, theirs.LambdaLoss),
        *[(functools.partial(lambda_ndcg, k=k), functools.partial(theirs.LambdaLoss, k=k)) for k in (1, 2, 4, 6)],
        (
            functools.partial(lambda_ndcg, mu=2.0, sigma=3.0),
            lambda model: theirs.LambdaLoss(model, weighting_scheme=theirs.NDCGLoss2PPScheme(mu=2.0), sigma=3.0),
        ),
        (
            functools.partial(lambda_ndcg, mu=0.0, k=3),
            lambda model: theirs.LambdaLoss(model, weighting_scheme=theirs.LambdaRankScheme(), k=3),
        ),
    ],
)
def test_losses_of_lists_equal_sentence_transformers(labels, ours, make, reference_of_logits):
    for seed in range(3):
        logits = logits_of(labels, seed)
        assert_same(ours(logits, Targets.of(labels)), reference_of_logits(make, logits, labels), logits)


@pytest.mark.parametrize("negatives", [1, 3])
def test_margin_mse_equals_sentence_transformers(negatives, reference_of_logits):
    generator = torch.Generator().manual_seed(2)
    labels = (torch.randint(-16, 16, (5, 1 + negatives), generator=generator).double() / 4).tolist()
    logits = logits_of(labels)

    def make(model):
        loss = theirs.MarginMSELoss(model)
        return lambda inputs, rows: loss([inputs[0], *map(list, zip(*inputs[1], strict=True))], rows)

    reference = reference_of_logits(make, logits, labels)
    assert_same(margin_mse(logits, Targets.of(labels)), reference, logits)


# By hand


def test_bce_by_hand():
    logits, labels = double(2.0, -1.0, 0.5), [[1.0, 0.0], [0.25]]
    p, y = 1 / (1 + np.exp(-logits.numpy())), np.array([1.0, 0.0, 0.25])
    assert bce(logits, Targets.of(labels)).item() == close(-(y * np.log(p) + (1 - y) * np.log(1 - p)).mean())
    weighted = -(3 * y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    assert bce(logits, Targets.of(labels), pos_weight=3.0).item() == close(weighted)
    # From raw logits there is no overflow.
    assert bce(double(-200.0), Targets.of([[1.0]])).item() == 200.0


def test_cross_entropy_by_hand():
    # Logits ln 3, 0 and 0: the right one has 3/5.
    logits = double(math.log(3), 0.0, 0.0)
    assert cross_entropy(logits, Targets.of([(1, 0, 0)])).item() == close(-math.log(3 / 5))
    assert cross_entropy(logits, Targets.of([(1, 0, 0)]), scale=2.0).item() == close(-math.log(9 / 11))
    # Two right ones share: half of each. Three times the labels say the same.
    shared = -math.log(3 / 5) / 2 - math.log(1 / 5) / 2
    assert cross_entropy(logits, Targets.of([(1, 1, 0)])).item() == close(shared)
    assert cross_entropy(logits, Targets.of([(3, 3, 0)])).item() == close(shared)
    # A query without a right document says nothing, and does not count.
    assert cross_entropy(double(9.0, 8.0, *logits), Targets.of([(0, 0), (1, 0, 0)])).item() == close(-math.log(3 / 5))


def test_listnet_by_hand():
    # Wanted 3/4 and 1/4 (labels exact in float32 have no such shares, float64 ones do); given 2/3 and 1/3.
    targets = Targets.of([(0, 0)])._replace(labels=double(math.log(3), 0.0))
    expected = -0.75 * math.log(2 / 3) - 0.25 * math.log(1 / 3)
    assert listnet(double(math.log(2), 0.0), targets).item() == close(expected)
    # A list of one document counts with a loss of 0.
    both = Targets(torch.tensor([0, 0, 1]), double(math.log(3), 0.0, 5.0))
    assert listnet(double(math.log(2), 0.0, 7.0), both).item() == close(expected / 2)


def test_ranknet_by_hand():
    # In order: 2 before 1 by 1, 2 before 0 by -1, 1 before 0 by -2; and a pair of another query, which is level.
    logits, targets = double(1.0, 0.0, 2.0, 5.0, 5.0), Targets.of([(2, 1, 0), (0, 1)])
    expected = sum(math.log2(1 + math.exp(-2 * d)) for d in (1.0, -1.0, -2.0, 0.0)) / 4
    assert ranknet(logits, targets, sigma=2.0).item() == close(expected)


def lambda_ndcg_by_definition(logits, rows, k, mu, sigma):
    """Wang et al. 2018, a pair at a time. Returns the sum and the number of pairs."""
    losses, start = [], 0
    for labels in rows:
        x, start = logits[start : start + len(labels)], start + len(labels)
        depth = k or len(labels)
        best = sum((2**y - 1) / math.log2(1 + m) for m, y in enumerate(sorted(labels)[::-1][:depth], start=1))
        place = {n: m for m, n in enumerate(sorted(range(len(labels)), key=lambda n: (-x[n], labels[n])), start=1)}
        for i, j in itertools.product(range(len(labels)), repeat=2):
            if labels[i] > labels[j] and min(place[i], place[j]) <= depth:
                rho = abs(1 / math.log2(1 + place[i]) - 1 / math.log2(1 + place[j]))
                apart = abs(place[i] - place[j])
                delta = abs(1 / math.log2(1 + apart) - 1 / math.log2(2 + apart))
                weight = (rho + mu * delta) * (2 ** labels[i] - 2 ** labels[j]) / best
                losses.append(weight * math.log2(1 + math.exp(-sigma * (x[i] - x[j]))))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("labels", [BINARY, GRADED])
@pytest.mark.parametrize("k", [None, 1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_lambda_ndcg_is_its_formula(labels, k, tied):
    logits = logits_of(labels).detach()
    if tied:
        # Among three values there are many ties, also of documents with different labels.
        logits = logits.clamp(-1, 1).round()
    expected = lambda_ndcg_by_definition(logits.tolist(), labels, k, mu=4.0, sigma=1.5)
    assert lambda_ndcg(logits, Targets.of(labels), k=k, mu=4.0, sigma=1.5).item() == close(expected)


def test_lambda_ndcg_by_hand():
    # The right document is second: best DCG 1, rho 1 − 1/log₂3, delta 1/log₂2 − 1/log₂3 as well.
    step = 1 - 1 / math.log2(3)
    assert lambda_ndcg(double(0.0, 3.0), Targets.of([(1, 0)])).item() == close(11 * step * math.log2(1 + math.exp(3)))
    # Level with the other, it counts as second: the loss has a slope.
    logits = double(1.0, 1.0).requires_grad_()
    loss = lambda_ndcg(logits, Targets.of([(1, 0)]))
    assert loss.item() == close(11 * step)
    (slope,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(slope, double(-1.0, 1.0) * 11 * step / 2 / math.log(2))


def test_lambda_ndcg_of_tiny_and_of_large_grades():
    # Relative to the best DCG, a small grade is worth as much as a large one.
    for grade in (1e-40, 1e-30, 1e-6, 1.0, 100.0):
        targets = Targets.of([(grade, 0)])
        assert lambda_ndcg(torch.zeros(2), targets).item() == pytest.approx(11 * (1 - 1 / math.log2(3)), rel=1e-6)


def test_margin_mse_by_hand():
    # Margins 2 and 4, of the teacher 2.5 and 5.5; a list of one has none.
    targets = Targets.of([(2.5, 0.0, -3.0), (8.0,)])
    assert margin_mse(double(3.0, 1.0, -1.0, 4.0), targets).item() == close((0.25 + 2.25) / 2)


# What must not matter


@pytest.mark.parametrize("name", LOSSES)
def test_order_of_queries_and_of_documents_does_not_matter(name):
    logits, targets = logits_of(GRADED).detach(), Targets.of(GRADED)
    expected = LOSSES[name](logits, targets)
    # Queries 2, 5, 0, ...; their documents backwards, but the first, which margin_mse takes for the positive.
    rows = (2, 5, 0, 4, 1, 3)
    places = [[place for place, owner in enumerate(targets.owner.tolist()) if owner == row] for row in rows]
    order = [place for first, *others in places for place in (first, *others[::-1])]
    lengths = torch.tensor([len(row) for row in places])
    moved = Targets(torch.repeat_interleave(torch.arange(6), lengths), targets.labels[order])
    torch.testing.assert_close(LOSSES[name](logits[order], moved), expected, **CLOSE)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "margin_mse"])
def test_order_does_not_matter_where_logits_are_level(name):
    labels = [2.0, 1.0, 0.0, 1.0, 0.0]
    logits = double(1.0, 1.0, 1.0, 0.0, 0.0)
    expected = LOSSES[name](logits, Targets.of([labels]))
    for order in itertools.permutations(range(5)):
        other = LOSSES[name](logits[list(order)], Targets.of([[labels[place] for place in order]]))
        torch.testing.assert_close(other, expected, **CLOSE)


@pytest.mark.parametrize("name", LOSSES)
def test_a_longer_list_beside_it_does_not_matter(name):
    # Padding: the mean of two batches, each by the number of what it is a mean of, is that of both together.
    short, long = [[2.0, 0.0, 1.0]], [[2.0, 0.0, 1.0, 0.5, 0.0, 3.0, 0.0]]
    logits = logits_of(short + long).detach()
    together = LOSSES[name](logits, Targets.of(short + long))
    alone = LOSSES[name](logits[:3], Targets.of(short)), LOSSES[name](logits[3:], Targets.of(long))
    pairs = (3, sum(a > b for a, b in itertools.product(long[0], repeat=2)))
    if name == "lambda_ndcg at 2":
        # Pairs of which both are below the second place do not count.
        places = torch.argsort(logits[3:], descending=True).tolist()
        low = [long[0][place] for place in places[2:]]
        pairs = (3, pairs[1] - sum(a > b for a, b in itertools.product(low, repeat=2)))
    weights = {"bce": (3, 7), "cross_entropy": (1, 1), "listnet": (1, 1), "margin_mse": (2, 6)}
    first, second = weights.get(name.split(",")[0], pairs)
    expected = (first * alone[0] + second * alone[1]) / (first + second)
    torch.testing.assert_close(together, expected, **CLOSE)


@pytest.mark.parametrize("name", [name for name in LOSSES if "bce" not in name])
def test_a_constant_added_to_the_logits_of_a_query_does_not_matter(name):
    logits, targets = logits_of(GRADED).detach(), Targets.of(GRADED)
    added = logits + 100 * targets.owner
    torch.testing.assert_close(LOSSES[name](added, targets), LOSSES[name](logits, targets), **CLOSE)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_in_float32_under_autocast_and_in_half_precision(name):
    loss, targets = LOSSES[name], Targets.of(GRADED)
    if "bce" in name:
        targets = targets._replace(labels=targets.labels / 4)
    logits = logits_of(GRADED).detach().bfloat16()
    expected = loss(logits.float(), targets)
    assert expected.dtype == torch.float32
    assert torch.equal(loss(logits, targets), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(logits, targets), expected)
        assert torch.equal(loss(logits.float(), targets), expected)
    exact = loss(logits.double(), targets)
    assert exact.dtype == torch.float64
    assert expected.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    targets = Targets.of(BINARY)
    assert torch.autograd.gradcheck(lambda logits: LOSSES[name](logits, targets), logits_of(BINARY))


# The edges


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "labels", [[[1.0]], [[0.0]], [[1.0], [0.0]], [[0.0, 0.0, 0.0]], [[1.0, 1.0], [1.0]], [[0.0, 1.0], [0.0]]]
)
def test_nothing_is_nan(name, labels):
    count = sum(len(row) for row in labels)
    for logit in (0.0, 300.0, -1e6):
        for values in (torch.full((count,), logit), torch.linspace(-logit, logit, count)):
            logits = values.requires_grad_()
            loss = LOSSES[name](logits, Targets.of(labels))
            (gradient,) = torch.autograd.grad(loss, logits)
            assert torch.isfinite(loss)
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["cross_entropy", "ranknet", "lambda_ndcg", "lambda_ndcg at 2"])
def test_lists_that_say_nothing_teach_nothing(name):
    logits = logits_of([[0.0] * 4, [0.0]])
    loss = LOSSES[name](logits, Targets.of([[0.0] * 4, [0.0]]))
    assert loss.item() == 0
    assert torch.equal(torch.autograd.grad(loss, logits)[0], torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("name", ["cross_entropy", "listnet", "ranknet", "lambda_ndcg", "margin_mse"])
def test_a_document_by_itself_gets_no_gradient(name):
    logits = logits_of([[2.0, 0.0, 1.0], [1.0]])
    LOSSES[name](logits, Targets.of([[2.0, 0.0, 1.0], [1.0]])).backward()
    assert logits.grad[3] == 0
    assert (logits.grad[:3] != 0).all()


# On top of a first stage


@pytest.mark.parametrize("name", LOSSES)
def test_on_top_of_a_first_stage(name):
    labels = [[min(label, 1.0) for label in row] for row in GRADED]
    logits = logits_of(labels)
    scores = [[0.1 * place - 0.2 * number for place in range(len(row))] for number, row in enumerate(labels)]
    targets = Targets.of(labels, scores)
    added = 20.0 * double(*(score for row in scores for score in row)).float()
    ours = first_stage(LOSSES[name], 20)(logits, targets)
    assert_same(ours, LOSSES[name](logits + added, Targets.of(labels)), logits)


def test_a_first_stage_alone_is_the_loss_where_logits_are_equal():
    scores = [[0.9, 0.5, 0.1]]
    found = first_stage(cross_entropy, 2)(torch.zeros(3), Targets.of([(1, 0, 0)], scores))
    assert found.item() == pytest.approx(math.log(1 + math.exp(-0.8) + math.exp(-1.6)), abs=1e-6)


def test_a_first_stage_that_is_missing_or_weighs_nothing():
    with pytest.raises(UsageError, match="the data has no scores of a first stage; expected a column first_stage"):
        first_stage(cross_entropy, 20)(torch.zeros(2), Targets.of([(1, 0)]))
    for weight in (0, -1, math.inf, math.nan):
        with pytest.raises(UsageError, match=f"first_stage: expected a weight above 0, got {weight}"):
            first_stage(cross_entropy, weight)
