"""Losses of embedders equal those of sentence-transformers on the same vectors: values and gradients, in float64."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.sentence_transformer.losses.contrastive import SiameseDistanceMetric
from sentence_transformers.util import pairwise_cos_sim

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


def columns_of(rows=6, negatives=2, dim=8, seed=0):
    """What sentence-transformers takes: queries, positives and negatives, [rows, dim] each, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, dim, generator=generator, dtype=torch.float64) * 1.5 + 0.7).requires_grad_()
        for _ in range(2 + negatives)
    ]


def by_row(columns):
    """Queries, and documents row by row, of such columns."""
    return columns[0], torch.stack(columns[1:], dim=1).flatten(0, 1)


def assert_same(ours, reference, leaves):
    """Value and gradient."""
    torch.testing.assert_close(ours, reference, **CLOSE)
    assert ours.item() != 0
    expected = torch.autograd.grad(reference, leaves, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves), expected, **CLOSE)


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize(
    ("directions", "partition"),
    [
        *[(("query_to_doc", *more), "joint") for size in range(4) for more in itertools.combinations(ALL[1:], size)],
        (ALL[:2], "per_direction"),
        (ALL[:1], "per_direction"),
    ],
)
def test_info_nce_equals_sentence_transformers(negatives, scale, directions, partition, reference_of_vectors):
    columns = columns_of(negatives=negatives)
    targets = Targets.of([(1.0,) + (0.0,) * negatives] * 6)
    ours = info_nce(*by_row(columns), targets, scale=scale, directions=directions[::-1], partition=partition)
    reference = reference_of_vectors(
        lambda model, _: theirs.MultipleNegativesRankingLoss(
            model, scale=scale, directions=directions, partition_mode=partition
        ),
        columns,
    )
    assert_same(ours, reference, columns)


@pytest.mark.parametrize("strategy", ["absolute", "relative"])
@pytest.mark.parametrize("margin", [0.0, 0.2])
@pytest.mark.parametrize("directions", [ALL[:1], ALL[:1] + ALL[2:], ALL[:1] + ALL[3:]])
@pytest.mark.parametrize("negatives", [0, 1])
def test_gist_equals_sentence_transformers(strategy, margin, directions, negatives, reference_of_vectors):
    columns = columns_of(negatives=negatives)
    guides = [column.detach() for column in columns_of(negatives=negatives, seed=1)]
    targets = Targets.of([(1.0,) + (0.0,) * negatives] * 6)._replace(guide=by_row(guides))
    ours = gist(
        *by_row(columns),
        targets,
        scale=50.0,
        directions=directions,
        guide_margin=margin,
        guide_margin_strategy=strategy,
    )
    reference = reference_of_vectors(
        lambda model, guide: theirs.GISTEmbedLoss(
            model,
            guide,
            temperature=0.02,
            margin_strategy=strategy,
            margin=margin,
            contrast_anchors="query_to_query" in directions,
            contrast_positives="doc_to_doc" in directions,
        ),
        columns,
        guides=guides,
    )
    assert_same(ours, reference, columns)
    # The guide has found something.
    assert ours.item() < info_nce(*by_row(columns), targets, scale=50.0, directions=directions).item()


def test_gist_has_the_options_of_sentence_transformers(reference_of_vectors):
    columns, guides = columns_of(negatives=1), columns_of(negatives=1, seed=1)
    targets = Targets.of([(1, 0)] * 6)._replace(guide=tuple(side.detach() for side in by_row(guides)))
    reference = reference_of_vectors(theirs.GISTEmbedLoss, columns, guides=[guide.detach() for guide in guides])
    assert_same(gist(*by_row(columns), targets), reference, columns)


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("labels", [(1, 0, 1, 0, 0, 1), (0.5, 0.25, 1, 0.75, 0, 0.125), (0.5, 0.5, 0.5, 1, 0, 0)])
def test_cosent_equals_sentence_transformers(scale, labels, reference_of_vectors):
    columns = columns_of(negatives=0)
    ours = cosent(*by_row(columns), Targets.of([[label] for label in labels]), scale=scale)
    reference = reference_of_vectors(
        lambda model, _: theirs.CoSENTLoss(model, scale=scale), columns, torch.tensor(labels, dtype=torch.float64)
    )
    assert_same(ours, reference, columns)


@pytest.mark.parametrize(
    ("distance", "theirs_distance"),
    [("cosine", theirs.TripletDistanceMetric.COSINE), ("euclidean", theirs.TripletDistanceMetric.EUCLIDEAN)],
)
@pytest.mark.parametrize("margin", [0.1, 1.0])
def test_triplet_equals_sentence_transformers(distance, theirs_distance, margin, reference_of_vectors):
    columns = columns_of(negatives=1)
    ours = triplet(*by_row(columns), Targets.of([(1, 0)] * 6), distance=distance, margin=margin)
    reference = reference_of_vectors(
        lambda model, _: theirs.TripletLoss(model, distance_metric=theirs_distance, triplet_margin=margin), columns
    )
    assert_same(ours, reference, columns)


@pytest.mark.parametrize(
    ("distance", "theirs_distance"),
    [
        ("cosine", SiameseDistanceMetric.COSINE_DISTANCE),
        # Theirs adds 1e-6 to each difference of coordinates.
        ("euclidean", lambda x, y: F.pairwise_distance(x, y, eps=0.0)),
    ],
)
@pytest.mark.parametrize("margin", [0.5, 4.0])
def test_contrastive_equals_sentence_transformers(distance, theirs_distance, margin, reference_of_vectors):
    columns = columns_of(negatives=0)
    labels = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    targets = Targets.of(labels[:, None].tolist())
    for ours, other in ((contrastive, theirs.ContrastiveLoss), (online_contrastive, theirs.OnlineContrastiveLoss)):
        reference = reference_of_vectors(
            lambda model, _, other=other: other(model, distance_metric=theirs_distance, margin=margin), columns, labels
        )
        assert_same(ours(*by_row(columns), targets, distance=distance, margin=margin), reference, columns)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_online_contrastive_of_one_kind_only_equals_sentence_transformers(value, reference_of_vectors):
    columns, labels = columns_of(negatives=0), torch.full((6,), value, dtype=torch.float64)
    ours = online_contrastive(*by_row(columns), Targets.of(labels[:, None].tolist()), margin=1.5)
    reference = reference_of_vectors(lambda model, _: theirs.OnlineContrastiveLoss(model, margin=1.5), columns, labels)
    assert_same(ours, reference, columns)


def scores_of(negatives, rows=6):
    """A teacher's, exact in float32."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(-16, 16, (rows, 1 + negatives), generator=generator).double() / 4


@pytest.mark.parametrize("negatives", [1, 3])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_margin_mse_equals_sentence_transformers(negatives, similarity, reference_of_vectors):
    columns, scores = columns_of(negatives=negatives), scores_of(negatives)
    ours = margin_mse(*by_row(columns), Targets.of(scores.tolist()), similarity=similarity)
    options = {} if similarity == "dot" else {"similarity_fct": pairwise_cos_sim}
    reference = reference_of_vectors(lambda model, _: theirs.MarginMSELoss(model, **options), columns, scores)
    assert_same(ours, reference, columns)


@pytest.mark.parametrize("negatives", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_kl_equals_sentence_transformers(negatives, temperature, similarity, reference_of_vectors):
    columns, scores = columns_of(negatives=negatives), scores_of(negatives)
    options = {} if similarity == "dot" else {"similarity_fct": pairwise_cos_sim}
    ours = kl(*by_row(columns), Targets.of(scores.tolist()), similarity=similarity, temperature=temperature)
    reference = reference_of_vectors(
        lambda model, _: theirs.DistillKLDivLoss(model, temperature=temperature, **options), columns, scores
    )
    assert_same(ours, reference, columns)


MATRYOSHKAS = {
    "info_nce": (info_nce, lambda model, _: theirs.MultipleNegativesRankingLoss(model)),
    "gist": (gist, theirs.GISTEmbedLoss),
    "cosent": (cosent, lambda model, _: theirs.CoSENTLoss(model)),
    "triplet": (
        functools.partial(triplet, distance="euclidean", margin=5.0),
        lambda model, _: theirs.TripletLoss(model),
    ),
    "contrastive": (contrastive, lambda model, _: theirs.ContrastiveLoss(model)),
    "online_contrastive": (online_contrastive, lambda model, _: theirs.OnlineContrastiveLoss(model)),
    "margin_mse": (margin_mse, lambda model, _: theirs.MarginMSELoss(model)),
    "kl": (kl, lambda model, _: theirs.DistillKLDivLoss(model)),
}


@pytest.mark.parametrize("name", MATRYOSHKAS)
@pytest.mark.parametrize("weights", [None, (0.5, 1.0, 0.25)])
def test_matryoshka_equals_sentence_transformers(name, weights, reference_of_vectors):
    ours, make = MATRYOSHKAS[name]
    pairs = name in ("cosent", "contrastive", "online_contrastive")
    columns, guides = columns_of(negatives=0 if pairs else 1), columns_of(negatives=0 if pairs else 1, seed=1)
    guides = [guide.detach() for guide in guides]
    labels = torch.tensor([1, 0, 0, 1, 0, 1.0], dtype=torch.float64) if pairs else scores_of(1)
    targets = Targets.of(labels.view(6, -1).tolist())._replace(guide=by_row(guides))
    dimensions = (4, 8, 3)
    reference = reference_of_vectors(
        lambda model, guide: theirs.MatryoshkaLoss(model, make(model, guide), dimensions, weights),
        columns,
        labels,
        guides,
    )
    assert_same(matryoshka(ours, dimensions, weights)(*by_row(columns), targets), reference, columns)
