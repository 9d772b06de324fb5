"""Losses of embedders: their values, by hand and by their formula, and what must not matter."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch

from rtx.runtime.errors import UsageError
from rtx.trainer.losses import (
    Targets,
    contrastive,
    cosent,
    gist,
    info_nce,
    kl,
    margin_mse,
    matryoshka,
    online_contrastive,
    triplet,
)

# Two orders of summation of a few hundred terms around 1 in float64.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
ALL = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")
# Exact in every type.
GRADES = (1.0, 0.25, 0.0)

LOSSES = {
    "info_nce": info_nce,
    "info_nce of all directions": functools.partial(info_nce, directions=ALL),
    "info_nce, symmetric": functools.partial(info_nce, directions=ALL[:2], partition="per_direction"),
    "info_nce with a margin": functools.partial(info_nce, directions=ALL, false_negative_margin=0.1),
    "gist": gist,
    "gist, relative": functools.partial(gist, directions=ALL, guide_margin=0.1, guide_margin_strategy="relative"),
    "cosent": cosent,
    "triplet": functools.partial(triplet, margin=1.0),
    "triplet, euclidean": functools.partial(triplet, distance="euclidean", margin=5.0),
    "contrastive": functools.partial(contrastive, margin=1.0),
    "contrastive, euclidean": functools.partial(contrastive, distance="euclidean", margin=5.0),
    "online_contrastive": functools.partial(online_contrastive, margin=1.0),
    "margin_mse": margin_mse,
    "margin_mse of cosines": functools.partial(margin_mse, similarity="cosine", scale=4.0),
    "kl": kl,
    "kl of cosines": functools.partial(kl, similarity="cosine", scale=4.0, temperature=2.0),
    "matryoshka": matryoshka(info_nce, [8, 4, 2], [1.0, 0.5, 0.25]),
}


def ragged(lengths=(3, 1, 4, 2), dim=8, guide_dim=5, seed=0):
    """Queries, documents and targets of rows of these lengths, in float64, with a guide."""
    generator = torch.Generator().manual_seed(seed)

    def vectors(count, width):
        # Of different norms, and not without a common direction, as real vectors are.
        return torch.randn(count, width, generator=generator, dtype=torch.float64) * 1.5 + 0.7

    queries, documents = vectors(len(lengths), dim), vectors(sum(lengths), dim)
    labels = [[GRADES[min(place, 2)] for place in range(length)] for length in lengths]
    guide = vectors(len(lengths), guide_dim), vectors(sum(lengths), guide_dim)
    return queries, documents, Targets.of(labels)._replace(guide=guide)


# By hand


EYE = torch.eye(3, dtype=torch.float64)


def at(*cosines):
    """[vectors, 2] of norms 1, 2, ... with these cosines to [1, 0]."""
    return torch.tensor(
        [[norm * c, norm * math.sqrt(1 - c * c)] for norm, c in enumerate(cosines, start=1)], dtype=torch.float64
    )


X = torch.tensor([[1.0, 0.0]], dtype=torch.float64)


def close(value):
    return pytest.approx(value, abs=1e-12)


def test_info_nce_by_hand():
    # cos 1 with its own document, 0 with the other.
    two = Targets.of([(1,), (1,)])
    assert info_nce(EYE[:2] * 5, EYE[:2], two).item() == close(math.log1p(math.exp(-20)))
    # One document answers both: nothing tells them apart.
    assert info_nce(torch.ones(2, 3), torch.ones(2, 3), two).item() == pytest.approx(math.log(2), abs=1e-6)
    # A row with a negative, at a temperature of 1/2.
    one = Targets.of([(1, 0)])
    assert info_nce(X, at(0.6, 0.8), one, scale=2.0).item() == close(math.log1p(math.exp(0.4)))


def test_directions_by_hand():
    # Two rows at right angles, and a negative that is the other row's query: of row 0, the candidates of each
    # direction have the cosines below; row 1 has the same of doc_to_query and query_to_query.
    queries, documents, targets = EYE[:2], EYE[[0, 1, 1]], Targets.of([(1, 0), (1,)])
    e = math.exp(1.0)

    def loss(*directions, **options):
        return info_nce(queries, documents, targets, scale=1.0, directions=directions, **options).item()

    # [1, 0, 0] and [0, 1, 1]
    assert loss("query_to_doc") == close(math.log((e + 2) * (2 * e + 1)) / 2 - 1)
    # and [1, 0], [0, 1]
    assert loss("query_to_doc", "doc_to_query") == close(math.log((2 * e + 3) * (3 * e + 2)) / 2 - 1)
    # and [0] each
    assert loss("query_to_doc", "query_to_query") == close(math.log((e + 3) * (2 * e + 2)) / 2 - 1)
    # and [0] of the other's positive; [0, 1] of the other's positive and negative
    assert loss("query_to_doc", "doc_to_doc") == close(math.log((e + 3) * (3 * e + 2)) / 2 - 1)
    symmetric = loss("query_to_doc", "doc_to_query", partition="per_direction")
    assert symmetric == close((math.log((e + 2) * (2 * e + 1)) / 2 - 1 + math.log(e + 1) - 1) / 2)


@pytest.mark.parametrize(
    ("margin", "left_out"), [(0.0, 2), (0.0999, 2), (0.1001, 1), (0.2999, 1), (0.3001, 0), (2.0, 0), (-3.0, 3)]
)
def test_a_negative_farther_above_the_positive_than_the_margin_is_left_out(margin, left_out):
    documents, targets = at(0.5, 0.8, 0.6, 0.1), Targets.of([(1, 0, 0, 0)])
    negatives = [0.8, 0.6, 0.1][left_out:]
    expected = math.log(sum(math.exp(c) for c in [0.5, *negatives])) - 0.5
    assert info_nce(X, documents, targets, scale=1.0, false_negative_margin=margin).item() == close(expected)


def test_a_negative_level_with_the_positive_stays():
    # A margin of 0 leaves out what is nearer than the positive, and this is as near.
    same = at(0.5)[[0, 0]]
    assert info_nce(X, same, Targets.of([(1, 0)]), false_negative_margin=0.0).item() == close(math.log(2))


def test_the_positive_stays_in_all_directions():
    # A margin below 0 would leave out the positive itself: it is all that is left, twice in two directions.
    queries, documents, targets = ragged()
    loss = info_nce(queries, documents, targets, directions=ALL[:2], false_negative_margin=-3.0)
    assert loss.item() == close(math.log(2))


def test_gist_by_hand():
    documents, targets = at(0.5, 0.8, 0.6, 0.1), Targets.of([(1, 0, 0, 0)])
    # The guide finds the last two nearer than the positive, 0.5 and 0.45 against 0.4; the model's own are not asked.
    targets = targets._replace(guide=(X, at(0.4, 0.3, 0.45, 0.5)))

    def loss(**options):
        return gist(X, documents, targets, scale=1.0, **options).item()

    def kept(*negatives):
        return close(math.log(sum(math.exp(c) for c in (0.5, *negatives))) - 0.5)

    assert loss() == kept(0.8)
    assert loss(guide_margin=0.11) == kept()
    assert loss(guide_margin=-0.06) == kept(0.8, 0.6)
    assert loss(guide_margin=0.2, guide_margin_strategy="relative") == kept(0.8)
    assert loss(guide_margin=0.26, guide_margin_strategy="relative") == kept()


def test_gist_needs_no_query_twice():
    # The guide has all vectors the same: nothing is nearer than the positive, and a query is no candidate of itself.
    same = torch.ones(2, 4, dtype=torch.float64)
    targets = Targets.of([(1,), (1,)])._replace(guide=(same, same))
    expected = info_nce(EYE[:2], EYE[:2], targets, directions=("query_to_doc", "query_to_query", "doc_to_doc"))
    # The positive's own cosine in the guide may come out as 1 or as the number before.
    loss = gist(EYE[:2], EYE[:2], targets, scale=20.0, guide_margin=-1e-9)
    assert loss.item() == close(expected.item()) == close(math.log(math.exp(20) + 3) - 20)


def test_cosent_by_hand():
    # Of the pairs with different labels, 0.75 before 0.25 is off by 0.3, 0.75 before 0.0 by -0.1, and so on.
    labels, cosines = (0.75, 0.25, 0.25, 0.0), (0.3, 0.6, -0.2, 0.2)
    off = [0.3, -0.5, -0.1, -0.4, 0.4]
    expected = math.log1p(sum(math.exp(2 * difference) for difference in off))
    assert cosent(X, at(*cosines), Targets.of([labels]), scale=2.0).item() == close(expected)
    # The order of the labels is all that counts.
    assert cosent(X, at(*cosines), Targets.of([(30, 2, 2, -1)]), scale=2.0).item() == close(expected)


def test_triplet_by_hand():
    # Two negatives of one row: max(0, (1 − 0.6) − (1 − 0.8) + 0.1) and max(0, 0.4 − 0.9 + 0.1).
    targets = Targets.of([(1, 0, 0)])
    assert triplet(X, at(0.6, 0.8, 0.1), targets, margin=0.1).item() == close((0.3 + 0.0) / 2)
    far = torch.tensor([[1.0, 3.0], [5.0, 3.0]], dtype=torch.float64)
    # Distances 3 and 5.
    euclidean = functools.partial(triplet, X, far, Targets.of([(1, 0)]), distance="euclidean")
    assert euclidean(margin=2.5).item() == close(0.5)
    assert euclidean(margin=2.0).item() == 0


def test_contrastive_by_hand():
    targets = Targets.of([(1, 0, 0, 0.25)])
    # ½·mean(0.4², (0.5 − 0.2)², 0 since 0.9 is beyond the margin, ¼·0.3² + ¾·0.2²)
    expected = (0.16 + 0.09 + 0.0 + 0.25 * 0.09 + 0.75 * 0.04) / 8
    assert contrastive(X, at(0.6, 0.8, 0.1, 0.7), targets).item() == close(expected)


def test_online_contrastive_by_hand():
    # Distances of answers 0.4 and 0.1, of others 0.2 and 0.9: hard are 0.4, beyond 0.2, and 0.2, within 0.4.
    targets = Targets.of([(1, 1, 0, 0)])
    loss = online_contrastive(X, at(0.6, 0.9, 0.8, 0.1), targets)
    assert loss.item() == close(0.4**2 + 0.3**2)
    # A label is above one half or it is not.
    loss = online_contrastive(X, at(0.6, 0.9, 0.8, 0.1), Targets.of([(0.75, 0.625, 0.5, 0.25)]))
    assert loss.item() == close(0.4**2 + 0.3**2)


def test_margin_mse_by_hand():
    documents = torch.tensor([[3.0, 1.0], [1.0, 5.0], [-1.0, 0.0]], dtype=torch.float64)
    targets = Targets.of([(2.5, 0.0, -3.0)])
    # Margins 2 and 4, of the teacher 2.5 and 5.5.
    assert margin_mse(X, documents, targets).item() == close((0.25 + 2.25) / 2)
    assert margin_mse(X, documents, targets, scale=1.5).item() == close((0.25 + 0.25) / 2)
    cosines = at(0.6, 0.1)
    assert margin_mse(X, cosines, Targets.of([(1, 0)]), similarity="cosine").item() == close(0.25)


def test_kl_by_hand():
    # Teacher ¾ and ¼, student ½ and ½.
    documents, targets = torch.ones(2, 2, dtype=torch.float64), Targets.of([(0, 0)])
    targets = targets._replace(labels=torch.tensor([math.log(3), 0.0], dtype=torch.float64))
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert kl(X, documents, targets).item() == close(expected)
    # Twice the scores at twice the temperature are the same distributions.
    twice = targets._replace(labels=targets.labels * 2)
    assert kl(X, documents * 2, twice, temperature=2.0).item() == close(4 * expected)
    # The student is right.
    right = torch.tensor([[math.log(3) / 2, 0.0], [0.0, 9.0]], dtype=torch.float64)
    assert kl(X, right, targets, scale=2.0).item() == close(0.0)


def test_matryoshka_by_hand():
    # In one dimension, all that is left of a vector is its sign.
    documents, targets = torch.tensor([[3.0, 4.0], [0.1, -9.0]], dtype=torch.float64), Targets.of([(1, 0)])
    loss = matryoshka(functools.partial(margin_mse), (2, 1), (1.0, 0.5))
    second = 0.1 / math.hypot(0.1, 9.0)
    assert loss(X * 7, documents, targets).item() == close((0.6 - second - 1) ** 2 + 0.5 * 1.0)


# By their formula, with rows of different lengths


def candidates_by_definition(queries, documents, owner, row, direction):
    """(cosine, whether it is the positive) of each candidate of a row."""
    first = owner.index(row)
    if direction == "query_to_doc":
        return [(float(queries[row] @ document), place == first) for place, document in enumerate(documents)]
    if direction == "doc_to_query":
        return [(float(documents[first] @ query), place == row) for place, query in enumerate(queries)]
    if direction == "query_to_query":
        return [(float(queries[row] @ query), False) for place, query in enumerate(queries) if place != row]
    return [
        (float(documents[first] @ document), False) for k, document in zip(owner, documents, strict=True) if k != row
    ]


@pytest.mark.parametrize(
    ("directions", "partition"), [(ALL[:1], "joint"), (ALL[:2], "joint"), (ALL, "joint"), (ALL[:2], "per_direction")]
)
@pytest.mark.parametrize("margin", [None, 0.0, 0.1])
def test_info_nce_is_its_formula(directions, partition, margin):
    queries, documents, targets = ragged(lengths=(3, 1, 4, 2, 1, 2), dim=4)
    unit = [side.numpy() / np.linalg.norm(side.numpy(), axis=1, keepdims=True) for side in (queries, documents)]
    owner, scale, expected, left_out = targets.owner.tolist(), 7.0, 0.0, 0
    for row in range(len(queries)):
        own = float(unit[0][row] @ unit[1][owner.index(row)])
        found = [candidates_by_definition(*unit, owner, row, direction) for direction in directions]
        kept = [[c for c, positive in of if positive or margin is None or c <= own + margin] for of in found]
        left_out += sum(map(len, found)) - sum(map(len, kept))
        groups = [list(itertools.chain(*kept))] if partition == "joint" else kept
        sums = [math.log(sum(math.exp(scale * c) for c in group)) for group in groups]
        expected += (sum(sums) / len(sums) - scale * own) / len(queries)
    assert (left_out > 0) == (margin is not None)
    ours = info_nce(
        queries,
        documents,
        targets,
        scale=scale,
        directions=directions,
        partition=partition,
        false_negative_margin=margin,
    )
    assert ours.item() == close(expected)


def test_losses_of_pairs_are_their_formula():
    queries, documents, targets = ragged()
    owner, labels = targets.owner.tolist(), targets.labels.tolist()
    dots = (queries[targets.owner] * documents).sum(-1).tolist()
    cosines = torch.cosine_similarity(queries[targets.owner], documents).tolist()
    pairs = list(itertools.product(range(len(owner)), repeat=2))
    off = [cosines[j] - cosines[i] for i, j in pairs if labels[i] > labels[j]]
    assert cosent(queries, documents, targets).item() == close(math.log1p(sum(math.exp(20 * o) for o in off)))
    given = [(i, j) for i, j in pairs if owner[i] == owner[j] and i == owner.index(owner[i]) and j != i]
    hinges = [max(0.0, cosines[j] - cosines[i] + 0.2) for i, j in given]
    assert triplet(queries, documents, targets).item() == close(sum(hinges) / len(hinges))
    squares = [(dots[i] - dots[j] - labels[i] + labels[j]) ** 2 for i, j in given]
    assert margin_mse(queries, documents, targets).item() == close(sum(squares) / len(squares))
    expected = 0.0
    for row in range(len(queries)):
        own = [place for place in range(len(owner)) if owner[place] == row]
        teacher = np.exp([labels[place] for place in own])
        student = np.exp([dots[place] for place in own])
        teacher, student = teacher / teacher.sum(), student / student.sum()
        expected += float((teacher * np.log(teacher / student)).sum()) / len(queries)
    assert kl(queries, documents, targets).item() == close(expected)


# What must not matter


def reordered(queries, documents, targets, rows, swap):
    """The same rows in another order, and with `swap`, their negatives too."""
    owner = targets.owner.tolist()
    places = []
    for row in rows:
        first, *others = [place for place in range(len(owner)) if owner[place] == row]
        places += [first, *(others[::-1] if swap else others)]
    lengths = torch.tensor([owner.count(row) for row in rows])
    guide = targets.guide[0][list(rows)], targets.guide[1][places]
    moved = Targets(torch.repeat_interleave(torch.arange(len(rows)), lengths), targets.labels[places], guide)
    return queries[list(rows)], documents[places], moved


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("swap", [False, True])
def test_order_does_not_matter(name, swap):
    batch = ragged(lengths=(3, 1, 4, 2))
    expected = LOSSES[name](*batch)
    torch.testing.assert_close(LOSSES[name](*reordered(*batch, rows=(2, 0, 3, 1), swap=swap)), expected, **CLOSE)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("margin_mse", "kl") and "euclid" not in name])
def test_norms_do_not_matter_to_cosines(name):
    queries, documents, targets = ragged()
    norms = torch.arange(1.0, 1 + len(documents), dtype=torch.float64)[:, None]
    expected = LOSSES[name](queries, documents, targets)
    torch.testing.assert_close(LOSSES[name](queries * 3, documents * norms, targets), expected, **CLOSE)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_in_float32_under_autocast_and_in_half_precision(name):
    loss = LOSSES[name]
    queries, documents, targets = ragged()
    queries, documents = queries.bfloat16(), documents.bfloat16()
    targets = targets._replace(guide=tuple(side.float() for side in targets.guide))
    expected = loss(queries.float(), documents.float(), targets)
    assert expected.dtype == torch.float32
    assert torch.equal(loss(queries, documents, targets), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(queries.float(), documents.float(), targets), expected)
        assert torch.equal(loss(queries, documents, targets), expected)
    # Of these lengths a float32 has its 7 digits of a scaled cosine.
    exact = loss(queries.double(), documents.double(), targets._replace(labels=targets.labels.double()))
    assert exact.dtype == torch.float64
    assert expected.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    queries, documents, targets = ragged(lengths=(3, 1, 2), dim=8)
    assert torch.autograd.gradcheck(
        lambda q, d: LOSSES[name](q, d, targets), (queries.requires_grad_(), documents.requires_grad_())
    )


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_keeps_more_than_a_matrix_of_the_batch(name):
    queries, documents, targets = ragged(lengths=(4,) * 32, dim=64)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        LOSSES[name](queries.requires_grad_(), documents.requires_grad_(), targets)
    # Of queries and documents, in all directions at once.
    assert max(kept) <= 2 * 32 * (32 + 128)


# The edges


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("lengths", [(1,), (1, 1), (2,)])
def test_smallest_batches_have_no_nan(name, lengths):
    queries, documents, targets = ragged(lengths=lengths)
    loss = LOSSES[name](queries.requires_grad_(), documents.requires_grad_(), targets)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(loss, [queries, documents]))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_equal_labels_and_equal_texts_have_no_nan(name, label):
    queries, documents, targets = ragged(lengths=(2, 2))
    targets = targets._replace(labels=torch.full((4,), label))
    # Equal vectors have a distance of 0, where the root has no slope.
    documents = queries[targets.owner].clone().requires_grad_()
    loss = LOSSES[name](queries.requires_grad_(), documents, targets)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(loss, [queries, documents]))


@pytest.mark.parametrize("directions", [ALL[:1], ALL[:1] + ALL[2:]])
def test_nothing_is_learned_where_every_negative_is_left_out(directions):
    queries, documents, targets = ragged()
    queries.requires_grad_()
    for loss in (
        functools.partial(info_nce, false_negative_margin=-3.0),
        functools.partial(gist, guide_margin=3.0),
    ):
        value = loss(queries, documents, targets, directions=directions)
        assert value.item() == close(0.0)
        assert torch.autograd.grad(value, queries)[0].abs().max() < 1e-12


def test_equal_labels_give_cosent_nothing_to_order():
    queries, documents, targets = ragged()
    queries.requires_grad_()
    loss = cosent(queries, documents, targets._replace(labels=torch.ones(10)))
    assert loss.item() == 0
    assert torch.equal(torch.autograd.grad(loss, queries)[0], torch.zeros_like(queries))


def test_a_large_scale_does_not_overflow():
    queries, documents, targets = ragged()
    queries, documents = queries.float(), documents.float()
    for loss in (info_nce, gist, cosent):
        value = loss(queries.requires_grad_(), documents, targets, scale=1e4)
        assert torch.isfinite(value)
        assert torch.isfinite(torch.autograd.grad(value, queries)[0]).all()


def test_given_negatives_pull_only_apart():
    query = torch.tensor([[1.0, 0.0]], requires_grad=True)
    documents = torch.tensor([[0.6, 0.8], [0.8, 0.6]], requires_grad=True)
    info_nce(query, documents, Targets.of([(1, 0)])).backward()
    # Downhill turns the query towards its document (upwards), away from the negative.
    assert query.grad[0, 1] < 0
    assert documents.grad[1] @ torch.tensor([1.0, 0.0]) > 0


def test_left_out_candidates_get_no_gradient():
    documents = at(0.5, 0.8, 0.1).requires_grad_()
    info_nce(X, documents, Targets.of([(1, 0, 0)]), false_negative_margin=0.1).backward()
    assert torch.equal(documents.grad[1], torch.zeros(2, dtype=torch.float64))
    assert documents.grad[2].abs().max() > 0


# What does not exist


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (functools.partial(info_nce, directions=("query_to_docs",)), r"directions: 'query_to_docs' .*'query_to_doc'\?"),
        (functools.partial(info_nce, directions=("doc_to_query",)), "directions: expected query_to_doc among them"),
        (functools.partial(info_nce, directions=()), "got none"),
        (functools.partial(info_nce, partition="each"), "partition: 'each' does not exist"),
        (
            functools.partial(info_nce, directions=ALL, partition="per_direction"),
            "not doc_to_doc and query_to_query",
        ),
        (functools.partial(gist, guide_margin_strategy="rel"), "guide_margin_strategy: 'rel' does not exist"),
        (functools.partial(triplet, distance="manhattan"), "distance: 'manhattan' does not exist"),
        (functools.partial(contrastive, distance="dot"), "distance: 'dot' does not exist"),
        (functools.partial(kl, similarity="cos"), "similarity: 'cos' does not exist"),
        (matryoshka(info_nce, [16, 8]), "matryoshka: dimension 16 is more than the model's 8"),
    ],
)
def test_an_unknown_option_is_an_error(loss, message):
    with pytest.raises(UsageError, match=message):
        loss(*ragged())


def test_gist_without_guide_is_an_error():
    queries, documents, targets = ragged()
    with pytest.raises(UsageError, match="no guide's vectors"):
        gist(queries, documents, targets._replace(guide=None))


@pytest.mark.parametrize(
    ("dimensions", "weights", "message"),
    [
        ([], None, "different dimensions of at least 1"),
        ([4, 0], None, "different dimensions"),
        ([4, 4], None, "different dimensions"),
        ([4, 2], [1.0], "expected 2 weights above 0"),
        ([4, 2], [1.0, 0.0], "weights above 0"),
        ([4], [math.inf], "weights above 0"),
    ],
)
def test_matryoshka_checks_its_dimensions(dimensions, weights, message):
    with pytest.raises(UsageError, match=message):
        matryoshka(info_nce, dimensions, weights)
