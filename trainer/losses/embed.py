"""Losses of embedders: `loss(queries [queries, dim], documents [documents, dim], targets) -> scalar`.

Vectors may have any norm and floating type; the result is float32, or float64 if the queries are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from rtx.kernels import operators
from rtx.kernels.info_nce import MAX_DIM
from rtx.runtime.errors import UsageError, nearest
from rtx.trainer.loss_table import Direction, Distance, MarginStrategy, Partition, Similarity
from rtx.trainer.losses.arithmetic import at_least_float32, mean
from rtx.trainer.losses.targets import Targets

# Cosines of queries with documents from which on `info_nce` does without their matrix where it can: 256 MiB in float32,
# five times which PyTorch needs at its peak.
_LARGE = 1 << 26
_cosines_of_all: ContextVar[int] = ContextVar("cosines_of_all", default=0)


@at_least_float32
def info_nce(
    queries: Tensor,
    documents: Tensor,
    targets: Targets,
    /,
    *,
    scale: float = 20.0,
    directions: tuple[Direction, ...] = ("query_to_doc",),
    partition: Partition = "joint",
    false_negative_margin: float | None = None,
) -> Tensor:
    """Cross-entropy of picking each query's positive, its first document, among what else is in the batch.

    −mean_i(s·cos(q_i, d_i) − logsumexp over the candidates of s·cos): van den Oord et al. 2018, arXiv:1807.03748; with
    the other rows' documents as negatives: Henderson et al. 2017, arXiv:1705.00652 (multiple negatives ranking). The
    candidates of row i, by direction:

    - query_to_doc: q_i with all documents, its given negatives among them. Always needed.
    - doc_to_query: the positive of i with all queries.
    - query_to_query: q_i with all other queries.
    - doc_to_doc: the positive of i with all documents of other rows.

    All four together are the loss of GTE (Li et al. 2023, arXiv:2308.03281), where the positive counts twice. The
    symmetric loss, the mean of picking the document and picking the query, is
    `directions=("query_to_doc", "doc_to_query"), partition="per_direction"`.

    On an NVIDIA GPU a large batch in query_to_doc alone is computed by `rtx.kernels.operators.info_nce`, in the memory
    of the vectors and a 1,024th of their cosines.

    Args:
        queries: [queries, dim].
        documents: [documents, dim], the positive of a row first, then any number of negatives.
        targets: only the owners are looked at.
        scale: s, the inverse of the temperature.
        directions: which candidates there are.
        partition: one softmax over all of them, or one a direction and the mean of these. The latter only for
            directions with the positive among their candidates: query_to_doc and doc_to_query.
        false_negative_margin: leave out a candidate whose cosine is more than this above that of the row's query and
            positive, since it may well be another right answer (Qwen3 Embedding, arXiv:2506.05176, with 0.1). None
            leaves out nothing. The positive itself always stays.

    Raises:
        UsageError: a direction or partition that does not exist, or that do not go together.
    """
    _check_directions(directions, partition)
    if directions == ("query_to_doc",) and _without_matrix(queries, documents):
        return _info_nce_without_matrix(queries, documents, targets, scale, false_negative_margin)
    cosines = _cosines(queries, documents, targets, directions)
    beyond: dict[Direction, Tensor] = {}
    if false_negative_margin is not None:
        beyond = _beyond(cosines, _of_positives(cosines, targets) + false_negative_margin)
    return _contrast(cosines, beyond, targets, scale=scale, partition=partition)


@at_least_float32
def gist(
    queries: Tensor,
    documents: Tensor,
    targets: Targets,
    /,
    *,
    scale: float = 100.0,
    directions: tuple[Direction, ...] = ("query_to_doc", "query_to_query", "doc_to_doc"),
    guide_margin: float = 0.0,
    guide_margin_strategy: MarginStrategy = "absolute",
) -> Tensor:
    """InfoNCE without the candidates that a second model, the guide, finds about as near as the positive.

    Solatorio 2024, arXiv:2402.16829 (GISTEmbed). One softmax over all directions; see `info_nce` for their candidates.
    In the direction doc_to_doc, positives meet positives only, as they do there.

    Args:
        queries: [queries, dim].
        documents: [documents, dim], the positive of a row first, then any number of negatives.
        targets: with the guide's vectors of the same texts, which may have another width.
        scale: the inverse of the temperature.
        directions: which candidates there are; query_to_doc is always needed.
        guide_margin: m: a candidate is left out if its cosine in the guide is greater than p − m, where p is the cosine
            of the row's query and positive in the guide.
        guide_margin_strategy: "absolute" as above; "relative" for p − m·|p|.

    Raises:
        UsageError: no guide, or a direction or strategy that does not exist.
    """
    _check_directions(directions, "joint")
    _check_choice("guide_margin_strategy", guide_margin_strategy, MarginStrategy)
    if targets.guide is None:
        raise UsageError("gist: the targets have no guide's vectors; expected those of a second model")
    guided = _cosines(*targets.guide, targets, directions)
    positives = _of_positives(guided, targets)
    margin = guide_margin * positives.abs() if guide_margin_strategy == "relative" else guide_margin
    beyond = _beyond(guided, positives - margin)
    if "doc_to_doc" in beyond:
        beyond["doc_to_doc"] = beyond["doc_to_doc"] | (targets.place > 0)
    cosines = _cosines(queries, documents, targets, directions)
    return _contrast(cosines, beyond, targets, scale=scale, partition="joint")


@at_least_float32
def cosent(queries: Tensor, documents: Tensor, targets: Targets, /, *, scale: float = 20.0) -> Tensor:
    """How far the cosines of all pairs in the batch are from the order of their labels.

    log(1 + Σ exp(s·(cos_j − cos_i))) over all pairs i, j with label_i > label_j: Su 2022,
    kexue.fm/archives/8847; Huang et al. 2024, doi:10.1109/TASLP.2024.3402087.

    Args:
        queries: [queries, dim].
        documents: [documents, dim].
        targets: labels of any scale; only their order counts.
        scale: s.
    """
    # Pairs by label, the highest first: what has to be above a pair is then a prefix, and the sum takes n·log n steps.
    labels, order = targets.labels.sort(descending=True)
    scores = scale * _similarities(queries, documents, targets, "cosine")[order]
    above = torch.searchsorted(-labels, -labels)
    nothing = scores.new_full((1,), -torch.inf)
    prefixes = torch.cat([nothing, torch.logcumsumexp(-scores, dim=0)])
    return torch.logsumexp(torch.cat([scores.new_zeros(1), scores + prefixes[above]]), dim=0)


@at_least_float32
def triplet(
    queries: Tensor,
    documents: Tensor,
    targets: Targets,
    /,
    *,
    distance: Distance = "cosine",
    margin: float = 0.2,
) -> Tensor:
    """mean max(0, |q, d⁺| − |q, d⁻| + margin) over all given negatives: Schroff et al. 2015, arXiv:1503.03832.

    Args:
        queries: [queries, dim].
        documents: [documents, dim], the positive of a row first, then its negatives.
        targets: only the owners are looked at.
        distance: "cosine" is 1 − cos, between 0 and 2; "euclidean" is that of the vectors as they are.
        margin: how much farther a negative has to be, in that distance.

    Raises:
        UsageError: a distance that does not exist.
    """
    return mean(F.relu(targets.margins(_distances(queries, documents, targets, distance)) + margin))


@at_least_float32
def contrastive(
    queries: Tensor,
    documents: Tensor,
    targets: Targets,
    /,
    *,
    distance: Distance = "cosine",
    margin: float = 0.5,
) -> Tensor:
    """½·mean(y·D² + (1 − y)·max(0, margin − D)²): Hadsell et al. 2006, doi:10.1109/CVPR.2006.100.

    Args:
        queries: [queries, dim].
        documents: [documents, dim].
        targets: labels y in [0, 1].
        distance: D: "cosine" is 1 − cos, between 0 and 2; "euclidean" is that of the vectors as they are.
        margin: a document that does not answer has to be this far.

    Raises:
        UsageError: a distance that does not exist.
    """
    distances = _distances(queries, documents, targets, distance)
    near, far = distances.square(), F.relu(margin - distances).square()
    return 0.5 * mean(targets.labels * near + (1 - targets.labels) * far)


@at_least_float32
def online_contrastive(
    queries: Tensor,
    documents: Tensor,
    targets: Targets,
    /,
    *,
    distance: Distance = "cosine",
    margin: float = 0.5,
) -> Tensor:
    """The contrastive loss of the batch's hard pairs only, and their sum: Σ D² + Σ max(0, margin − D)².

    Hard are pairs with a label above ½ farther apart than the nearest of the others, and others nearer than the
    farthest of those. In a batch with one kind only, the mean distance stands for the missing bound. (The form of
    sentence-transformers.)

    Args:
        queries: [queries, dim].
        documents: [documents, dim].
        targets: labels in [0, 1].
        distance: D: "cosine" is 1 − cos, between 0 and 2; "euclidean" is that of the vectors as they are.
        margin: a document that does not answer has to be this far.

    Raises:
        UsageError: a distance that does not exist.
    """
    distances = _distances(queries, documents, targets, distance)
    positives, negatives = distances[targets.labels > 0.5], distances[targets.labels <= 0.5]
    farthest = positives.max() if len(positives) else negatives.mean()
    closest = negatives.min() if len(negatives) else positives.mean()
    hard_positives, hard_negatives = positives[positives > closest], negatives[negatives < farthest]
    return hard_positives.square().sum() + F.relu(margin - hard_negatives).square().sum()


@at_least_float32
def margin_mse(
    queries: Tensor,
    documents: Tensor,
    targets: Targets,
    /,
    *,
    similarity: Similarity = "dot",
    scale: float = 1.0,
) -> Tensor:
    """Mean squared difference between student and teacher of s(q, d⁺) − s(q, d⁻).

    Hofstätter et al. 2020, arXiv:2010.02666.

    Args:
        queries: [queries, dim].
        documents: [documents, dim], the positive of a row first, then its negatives.
        targets: labels are the teacher's scores.
        similarity: of the student.
        scale: factor of the similarity. Cosines, and dot products of normalised vectors, differ by 2 at most: a
            teacher whose scores differ by more can be matched with a factor only.

    Raises:
        UsageError: a similarity that does not exist.
    """
    scores = scale * _similarities(queries, documents, targets, similarity)
    return mean((targets.margins(scores) - targets.margins(targets.labels)).square())


@at_least_float32
def kl(
    queries: Tensor,
    documents: Tensor,
    targets: Targets,
    /,
    *,
    similarity: Similarity = "dot",
    scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """τ²·KL(softmax(teacher/τ) ‖ softmax(student/τ)) over each query's documents, mean over the queries.

    Hinton et al. 2015, arXiv:1503.02531; of a reranker's scores: Lin et al. 2020, arXiv:2010.11386.

    Args:
        queries: [queries, dim].
        documents: [documents, dim].
        targets: labels are the teacher's scores.
        similarity: of the student.
        scale: factor of the similarity, as in `margin_mse`.
        temperature: τ, of student and teacher.

    Raises:
        UsageError: a similarity that does not exist.
    """
    scores = scale * _similarities(queries, documents, targets, similarity)
    student = targets.log_softmax(scores / temperature)
    teacher = targets.log_softmax(targets.labels / temperature)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum() / len(queries)


@contextmanager
def as_part_of(cosines: int) -> Iterator[None]:
    """Losses inside are computed as those of a batch of so many queries times documents would be."""
    token = _cosines_of_all.set(cosines)
    try:
        yield
    finally:
        _cosines_of_all.reset(token)


def _without_matrix(queries: Tensor, documents: Tensor) -> bool:
    fits = queries.dtype == torch.float32 and 1 <= queries.shape[1] <= MAX_DIM
    cosines = _cosines_of_all.get() or len(queries) * len(documents)
    # Last, as it may have to compile.
    return fits and cosines >= _LARGE and operators.in_triton("info_nce", queries.device)


def _info_nce_without_matrix(
    queries: Tensor, documents: Tensor, targets: Targets, scale: float, margin: float | None
) -> Tensor:
    losses, _ = operators.info_nce(
        F.normalize(queries, dim=-1),
        F.normalize(documents, dim=-1),
        targets.first,
        scale=scale,
        false_negative_margin=margin,
    )
    return mean(losses)


def _cosines(
    queries: Tensor, documents: Tensor, targets: Targets, directions: Iterable[Direction]
) -> dict[Direction, Tensor]:
    """[queries, candidates] by direction, query_to_doc first."""
    queries, documents = F.normalize(queries, dim=-1), F.normalize(documents, dim=-1)
    positives = documents[targets.first]
    sides: dict[Direction, tuple[Tensor, Tensor]] = {
        "query_to_doc": (queries, documents),
        "doc_to_query": (positives, queries),
        "query_to_query": (queries, queries),
        "doc_to_doc": (positives, documents),
    }
    return {direction: rows @ others.T for direction, (rows, others) in sides.items() if direction in directions}


def _of_positives(cosines: Mapping[Direction, Tensor], targets: Targets) -> Tensor:
    """[queries]: of each query with its positive."""
    return cosines["query_to_doc"].gather(1, targets.first[:, None]).squeeze(1)


def _beyond(cosines: Mapping[Direction, Tensor], limits: Tensor) -> dict[Direction, Tensor]:
    """Which candidates are nearer than the limit of their row, [queries]."""
    return {direction: values > limits[:, None] for direction, values in cosines.items()}


def _contrast(
    cosines: Mapping[Direction, Tensor],
    beyond: Mapping[Direction, Tensor],
    targets: Targets,
    *,
    scale: float,
    partition: Partition,
) -> Tensor:
    """Cross-entropy of the positives among the candidates.

    Args:
        cosines: [queries, candidates] by direction, query_to_doc first.
        beyond: of the same shape: candidates to leave out as false negatives; a direction without it has none.
        targets: whose owners say which candidates belong to a row itself.
        scale: of the cosines.
        partition: see `info_nce`.
    """
    row = torch.arange(len(targets.first), device=targets.owner.device)
    itself, own = row[:, None] == row, row[:, None] == targets.owner
    scores = []
    for direction, values in cosines.items():
        out = beyond.get(direction)
        if direction == "query_to_query":
            out = itself if out is None else out | itself
        elif direction == "doc_to_doc":
            out = own if out is None else out | own
        elif out is not None:
            # However near: that is what the others are compared with.
            out = out & ~(itself if direction == "doc_to_query" else own & (targets.place == 0))
        scores.append(scale * values if out is None else (scale * values).masked_fill(out, -torch.inf))
    if partition == "joint":
        return F.cross_entropy(torch.cat(scores, dim=1), targets.first)
    # Which column is the positive: of the documents, of the queries.
    losses = [F.cross_entropy(values, place) for values, place in zip(scores, (targets.first, row), strict=False)]
    return torch.stack(losses).mean()


def _similarities(queries: Tensor, documents: Tensor, targets: Targets, similarity: Similarity) -> Tensor:
    """[documents]: of each document with its own query."""
    _check_choice("similarity", similarity, Similarity)
    if similarity == "cosine":
        queries, documents = F.normalize(queries, dim=-1), F.normalize(documents, dim=-1)
    return (queries[targets.owner] * documents).sum(dim=-1)


def _distances(queries: Tensor, documents: Tensor, targets: Targets, distance: Distance) -> Tensor:
    """[documents]: of each document from its own query."""
    _check_choice("distance", distance, Distance)
    if distance == "cosine":
        return 1 - _similarities(queries, documents, targets, "cosine")
    distances: Tensor = torch.linalg.vector_norm(queries[targets.owner] - documents, dim=-1)
    return distances


def _check_directions(directions: tuple[Direction, ...], partition: Partition) -> None:
    _check_choice("partition", partition, Partition)
    for direction in directions:
        _check_choice("directions", direction, Direction)
    if "query_to_doc" not in directions:
        raise UsageError(f"directions: expected query_to_doc among them, got {', '.join(directions) or 'none'}")
    alone = sorted({"query_to_query", "doc_to_doc"} & set(directions))
    if partition == "per_direction" and alone:
        raise UsageError(
            f"partition: per_direction takes query_to_doc and doc_to_query, not {' and '.join(alone)}: "
            "the positive is not among their candidates"
        )


def _check_choice(option: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise UsageError(f"{option}: '{value}' does not exist ({nearest(value, get_args(choices))})")
