"""How well a model ranks an evaluation set, and how two models differ on it.

embedder + evaluation set                -> Evaluation  ┐
reranker + evaluation set + candidates   -> Evaluation  ┴ compare -> Comparison
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.bulk import calls
from rtx.runtime.candidates import Candidate, Candidates, check_scored
from rtx.runtime.contract import Contract
from rtx.runtime.errors import DataError, EngineError, InvalidItemsError, ItemError, UsageError
from rtx.runtime.evalset import EvalSet, Problems
from rtx.runtime.items import Content, describe
from rtx.runtime.metrics import (
    Grades,
    Interval,
    accuracy_at_k,
    bootstrap_interval,
    map_at_k,
    mrr_at_k,
    ndcg_at_k,
    recall_at_k,
    ties_in_top_k,
    top_k_overlap,
)
from rtx.runtime.search import Hits, search

# Texts or pairs of one call of a model, between two reports of progress; of images there are fewer.
_CHUNK_ITEMS = 2048

Progress = Callable[[int, int], None]
"""Called with the number of texts or pairs that are done, and of all."""


class EmbeddingModel(Protocol):
    """What is evaluated as an embedder: `rtx.runtime.Embedder`, or anything with its `embed`."""

    @property
    def contract(self) -> Contract: ...

    def embed(self, items: Sequence[str], *, prompt: str | None = None) -> NDArray[Any]: ...


class LogitModel(Protocol):
    """What is evaluated at several weights of a first stage: `rtx.runtime.Reranker`, or anything with its `logits`."""

    def logits(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]: ...


class RerankingModel(Protocol):
    """What is evaluated as a reranker: `rtx.runtime.Reranker`, or anything with its `score`."""

    @property
    def needs_first_stage(self) -> bool: ...

    def score(
        self, pairs: Sequence[tuple[str, str]], *, first_stage: Sequence[float] | None = None
    ) -> NDArray[np.float32]: ...


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One model's rankings of one evaluation set and what they are worth.

    Attributes:
        evalset: name of the evaluation set.
        sha256: of its content.
        queries, documents: how many it has.
        unranked: queries for which no document was ranked; each is worth 0.
        k: the cutoff that most metrics are at.
        metrics: means over all queries by name: "ndcg@10", "mrr@10", "map@100", "recall@10", ...
        ties: mean number of neighbours with equal scores among the first k ranks of a query (`metrics.ties_in_top_k`).
        ndcg: [queries] float64, NDCG@k of each query in the set's order.
        indices: [queries, depth] int64, positions of documents in the corpus, best first, -1 where nothing was ranked.
        scores: [queries, depth] float32, -inf where nothing was ranked.
    """

    evalset: str
    sha256: str
    queries: int
    documents: int
    unranked: int
    k: int
    metrics: dict[str, float]
    ties: float
    ndcg: NDArray[np.float64] = field(repr=False)
    indices: NDArray[np.int64] = field(repr=False)
    scores: NDArray[np.float32] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: everything but the arrays."""
        names = ("evalset", "sha256", "queries", "documents", "unranked", "k", "metrics", "ties")
        return {name: getattr(self, name) for name in names}

    def candidates(self, evalset: EvalSet, depth: int) -> Candidates:
        """The first documents of each query with their scores, for a reranker."""
        documents = list(evalset.corpus)
        ranked = zip(evalset.queries, self.indices[:, :depth].tolist(), self.scores[:, :depth].tolist(), strict=True)
        return {
            query: [Candidate(documents[place], score) for place, score in zip(row, scores, strict=True) if place >= 0]
            for query, row, scores in ranked
        }


@dataclass(frozen=True)
class QueryChange:
    """NDCG@k of one query by two models."""

    query: str
    text: str
    reference: float
    other: float


@dataclass(frozen=True)
class Comparison:
    """What changes when `other` takes the place of `reference`.

    Attributes:
        evalset, sha256, queries, k: as in the two evaluations.
        reference, other: mean NDCG@k.
        difference: other - reference; below 0 is a loss.
        interval: paired bootstrap interval of the difference.
        confidence: of the interval.
        overlap: mean share of the first k documents that both found.
        ties_reference, ties_other: mean number of tied neighbours among the first k ranks.
        improved, fell: queries whose NDCG@k rose and fell; the others are equal.
        worst: the queries whose NDCG@k fell most, worst first.
    """

    evalset: str
    sha256: str
    queries: int
    k: int
    reference: float
    other: float
    difference: float
    interval: Interval
    confidence: float
    overlap: float
    ties_reference: float
    ties_other: float
    improved: int
    fell: int
    worst: tuple[QueryChange, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        plain = dict(vars(self))
        return plain | {"interval": list(self.interval), "worst": [dict(vars(change)) for change in self.worst]}


def evaluate_embedder(
    embedder: EmbeddingModel,
    evalset: EvalSet,
    *,
    k: int = 10,
    depth: int = 100,
    ignore_identical_ids: bool = True,
    progress: Progress | None = None,
) -> Evaluation:
    """Embed queries and corpus, search exactly by the contract's similarity, and measure the ranking.

    Args:
        embedder: the model.
        evalset: the evaluation set.
        k: cutoff of NDCG, MRR, recall and accuracy.
        depth: documents ranked a query, and the cutoff of MAP and of a second recall; at least k.
        ignore_identical_ids: leave out the document whose id is the query's own, unless it is judged for the query. In
            ArguAna and Quora the queries are taken from the corpus and would find themselves; BEIR does the same, but
            even where such a document is judged.
        progress: told after every 2,048 texts, or 128 images.

    Raises:
        InvalidItemsError: texts or images that the model cannot embed.
        DataError: the set has images, and the model takes none.
        EngineError: a vector is not finite.
        UsageError: k or depth is out of range.
    """
    _check_cutoffs(k, depth)
    if not embedder.contract.takes_images:
        _check_texts(evalset)
    total = len(evalset.queries) + len(evalset.corpus)

    def embed(side: str, texts: Mapping[str, str], done: int) -> NDArray[Any]:
        names = [f"{side} '{key}'" for key in texts]
        parts: list[NDArray[Any]] = []
        first = 0
        for part in calls(list(texts.values()), _CHUNK_ITEMS):
            with _naming(names[first : first + len(part)]):
                parts.append(embedder.embed(part, prompt=side))
            first += len(part)
            if progress is not None:
                progress(done + first, total)
        vectors = np.concatenate(parts)
        _check_finite(vectors, names)
        return vectors

    queries = embed("query", evalset.queries, 0)
    documents = embed("document", evalset.corpus, len(evalset.queries))
    own = _identical_places(evalset) if ignore_identical_ids else np.full(len(evalset.queries), -1)
    hits = search(queries, documents, depth + int((own >= 0).any()), similarity=embedder.contract.similarity)
    return _measure(_without(hits, own, depth), evalset, k, depth)


def evaluate_reranker(
    reranker: RerankingModel,
    evalset: EvalSet,
    candidates: Candidates,
    *,
    k: int = 10,
    depth: int = 100,
    ignore_identical_ids: bool = True,
    progress: Progress | None = None,
) -> Evaluation:
    """Score each query's candidates and measure the ranking; equal scores keep the order of the candidates.

    A relevant document that is no candidate counts as not found, so the candidates bound every metric.

    Args:
        reranker: the model.
        evalset: the evaluation set.
        candidates: documents by query id, from a first stage, with its scores where the model takes them. A query
            without candidates is worth 0.
        k, depth, ignore_identical_ids, progress: as in `evaluate_embedder`.

    Raises:
        InvalidItemsError: pairs that the model cannot score.
        DataError: a candidate is not in the corpus or is listed twice, or has no score and the model needs one.
        EngineError: a score is not finite.
        UsageError: k or depth is out of range.
    """
    if reranker.needs_first_stage:
        check_scored(candidates, evalset.name)

    def score(pairs: Sequence[tuple[str, str]], first_stage: Sequence[float]) -> NDArray[np.float32]:
        return reranker.score(pairs, first_stage=first_stage if reranker.needs_first_stage else None)

    places, scores, _ = _scored(score, evalset, candidates, k, depth, ignore_identical_ids, progress)
    return _measure(_rank(places, scores, depth), evalset, k, depth)


def evaluate_weights(
    reranker: LogitModel,
    evalset: EvalSet,
    candidates: Candidates,
    weights: Iterable[float],
    *,
    k: int = 10,
    depth: int = 100,
    ignore_identical_ids: bool = True,
    progress: Progress | None = None,
) -> dict[float, Evaluation]:
    """Measure a reranker's logits with the first stage's scores added at several weights; they are computed once.

    Args:
        reranker: the model, whatever it was trained on top of.
        evalset, k, depth, ignore_identical_ids, progress: as in `evaluate_embedder`.
        candidates: as in `evaluate_reranker`, with scores.
        weights: of the first stage's scores; 0 is the reranker by itself.

    Raises:
        InvalidItemsError, DataError, EngineError, UsageError: as `evaluate_reranker`.
    """
    check_scored(candidates, evalset.name)

    def score(pairs: Sequence[tuple[str, str]], _: Sequence[float]) -> NDArray[np.float32]:
        return reranker.logits(pairs)

    places, logits, given = _scored(score, evalset, candidates, k, depth, ignore_identical_ids, progress)
    return {
        weight: _measure(_rank(places, logits + np.float32(weight) * given, depth), evalset, k, depth)
        for weight in weights
    }


def _scored(
    score: Callable[[Sequence[tuple[str, str]], Sequence[float]], NDArray[np.float32]],
    evalset: EvalSet,
    candidates: Candidates,
    k: int,
    depth: int,
    ignore_identical_ids: bool,
    progress: Progress | None,
) -> tuple[list[list[int]], NDArray[np.float32], NDArray[np.float32]]:
    """Positions in the corpus, a row a query; scores and first-stage scores, [pairs] float32, query by query."""
    _check_cutoffs(k, depth)
    places, given = _candidate_places(evalset, candidates, ignore_identical_ids)
    texts = list(evalset.corpus.values())
    queries = list(evalset.queries.values())
    pairs = [(query, texts[place]) for query, row in zip(queries, places, strict=True) for place in row]
    first_stage = [value for row in given for value in row]
    ids = list(evalset.corpus)
    rows = zip(evalset.queries, places, strict=True)
    names = [f"query '{query}', document '{ids[at]}'" for query, row in rows for at in row]
    scores = np.empty(len(pairs), dtype=np.float32)
    done = 0
    for part in calls(pairs, _CHUNK_ITEMS):
        with _naming(names[done : done + len(part)]):
            scores[done : done + len(part)] = score(part, first_stage[done : done + len(part)])
        done += len(part)
        if progress is not None:
            progress(done, len(pairs))
    _check_finite(scores[:, None], names)
    return places, scores, np.array(first_stage, dtype=np.float32)


def evaluate_candidates(
    evalset: EvalSet, candidates: Candidates, *, k: int = 10, depth: int = 100, ignore_identical_ids: bool = True
) -> Evaluation:
    """Measure a first stage's own ranking: what a reranker of its candidates has to beat.

    Args:
        evalset, candidates, k, depth, ignore_identical_ids: as in `evaluate_reranker`.

    Raises:
        DataError, UsageError: as there.
    """
    _check_cutoffs(k, depth)
    places, _ = _candidate_places(evalset, candidates, ignore_identical_ids)
    ranks = np.concatenate([np.zeros(0), *(-np.arange(len(row), dtype=np.float32) for row in places)])
    return _measure(_rank(places, ranks.astype(np.float32), depth), evalset, k, depth)


def compare(
    reference: Evaluation,
    other: Evaluation,
    evalset: EvalSet,
    *,
    confidence: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
    worst: int = 10,
) -> Comparison:
    """Compare two models on the same evaluation set.

    Args:
        reference: what a change is measured from, such as the model in PyTorch.
        other: such as the model exported in int8.
        evalset: the set that both were evaluated on.
        confidence, samples, seed: of the bootstrap over queries (`metrics.bootstrap_interval`).
        worst: how many of the queries that fell most to name.

    Raises:
        UsageError: the evaluations are not of this set, or have different cutoffs.
    """
    if not reference.sha256 == other.sha256 == evalset.sha256 or reference.k != other.k:
        raise UsageError(
            f"cannot compare '{reference.evalset}' at {reference.k} with '{other.evalset}' at {other.k} on "
            f"'{evalset.name}': expected the same set, to the byte, and the same cutoff"
        )
    k = reference.k
    differences = other.ndcg - reference.ndcg
    order = np.argsort(differences, kind="stable")[:worst].tolist()
    ids = list(evalset.queries)
    return Comparison(
        evalset=evalset.name,
        sha256=evalset.sha256,
        queries=len(evalset.queries),
        k=k,
        reference=float(reference.ndcg.mean()),
        other=float(other.ndcg.mean()),
        difference=float(differences.mean()),
        interval=bootstrap_interval(differences, confidence=confidence, samples=samples, seed=seed),
        confidence=confidence,
        overlap=float(top_k_overlap(reference.indices, other.indices, k).mean()),
        ties_reference=reference.ties,
        ties_other=other.ties,
        improved=int((differences > 0).sum()),
        fell=int((differences < 0).sum()),
        worst=tuple(
            QueryChange(ids[place], _text(evalset, ids[place]), float(reference.ndcg[place]), float(other.ndcg[place]))
            for place in order
            if differences[place] < 0
        ),
    )


def _measure(hits: Hits, evalset: EvalSet, k: int, depth: int) -> Evaluation:
    grades, judged = _grades(hits.indices, evalset)
    ndcg = ndcg_at_k(grades, judged, k)
    per_query = {
        f"ndcg@{k}": ndcg,
        f"mrr@{k}": mrr_at_k(grades, k),
        f"map@{depth}": map_at_k(grades, judged, depth),
        f"recall@{k}": recall_at_k(grades, judged, k),
        f"recall@{depth}": recall_at_k(grades, judged, depth),
        "accuracy@1": accuracy_at_k(grades, 1),
        f"accuracy@{k}": accuracy_at_k(grades, k),
    }
    return Evaluation(
        evalset=evalset.name,
        sha256=evalset.sha256,
        queries=len(evalset.queries),
        documents=len(evalset.corpus),
        unranked=int((hits.indices < 0).all(axis=1).sum()),
        k=k,
        metrics={name: float(values.mean()) for name, values in per_query.items()},
        ties=float(ties_in_top_k(hits.scores, k).mean()),
        ndcg=ndcg,
        indices=hits.indices,
        scores=hits.scores,
    )


def _grades(indices: NDArray[np.int64], evalset: EvalSet) -> tuple[Grades, Grades]:
    """Grades of the ranked documents and of all judged ones, as `rtx.runtime.metrics` takes them."""
    places = {document: place for place, document in enumerate(evalset.corpus)}
    grades = np.zeros(indices.shape, dtype=np.int64)
    judged = np.zeros((len(evalset.queries), max(map(len, evalset.qrels.values()))), dtype=np.int64)
    for row, query in enumerate(evalset.queries):
        of_query = {places[document]: grade for document, grade in evalset.qrels[query].items()}
        grades[row] = [of_query.get(place, 0) for place in indices[row].tolist()]
        judged[row, : len(of_query)] = list(of_query.values())
    return grades, judged


def _identical_places(evalset: EvalSet) -> NDArray[np.int64]:
    """By query, the position of the document with its id if that is not judged for it, else -1."""
    places = {document: place for place, document in enumerate(evalset.corpus)}
    own = (-1 if query in evalset.qrels[query] else places.get(query, -1) for query in evalset.queries)
    return np.fromiter(own, dtype=np.int64, count=len(evalset.queries))


def _without(hits: Hits, own: NDArray[np.int64], depth: int) -> Hits:
    """The hits without each query's own document, `depth` at most; empty places at the end."""
    keep = hits.indices != own[:, None]
    # A stable sort by "is left out" moves what is left out to the end of its row.
    order = np.argsort(~keep, axis=1, kind="stable")
    indices = np.take_along_axis(np.where(keep, hits.indices, -1), order, axis=1)[:, :depth]
    scores = np.take_along_axis(np.where(keep, hits.scores, -np.inf), order, axis=1)[:, :depth]
    return Hits(indices, scores.astype(np.float32))


def _candidate_places(
    evalset: EvalSet, candidates: Candidates, ignore_identical_ids: bool
) -> tuple[list[list[int]], list[list[float]]]:
    """Positions in the corpus and first-stage scores, a row a query."""
    places = {document: place for place, document in enumerate(evalset.corpus)}
    own = _identical_places(evalset).tolist()
    problems = Problems(f"candidates for '{evalset.name}'")
    rows, scores = [], []
    for query, own_place in zip(evalset.queries, own, strict=True):
        documents = candidates.get(query, [])
        if unknown := [found.document for found in documents if found.document not in places]:
            problems.add(f"query '{query}': not in the corpus: {', '.join(unknown[:3])}")
        if len({found.document for found in documents}) < len(documents):
            problems.add(f"query '{query}': documents are listed more than once")
        kept = [(places[found.document], found.score) for found in documents if found.document in places]
        kept = [(place, score) for place, score in kept if place != own_place or not ignore_identical_ids]
        rows.append([place for place, _ in kept])
        scores.append([score for _, score in kept])
    problems.raise_any()
    if not any(rows):
        raise DataError(f"candidates for '{evalset.name}': there is none for any query")
    return rows, scores


def _rank(places: list[list[int]], scores: NDArray[np.float32], depth: int) -> Hits:
    width = min(depth, max(map(len, places)))
    indices = np.full((len(places), width), -1, dtype=np.int64)
    ranked = np.full((len(places), width), -np.inf, dtype=np.float32)
    start = 0
    for row, of_query in enumerate(places):
        own_scores = scores[start : start + len(of_query)]
        order = np.argsort(-own_scores, kind="stable")[:width]
        indices[row, : len(order)] = np.asarray(of_query, dtype=np.int64)[order]
        ranked[row, : len(order)] = own_scores[order]
        start += len(of_query)
    return Hits(indices, ranked)


def _check_cutoffs(k: int, depth: int) -> None:
    if not 1 <= k <= depth:
        raise UsageError(f"k: expected 1 to {depth} (the documents that are ranked), got {k}")


def _check_finite(values: NDArray[Any], names: Sequence[str]) -> None:
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist()
    if bad:
        shown = "; ".join(names[row] for row in bad[:5])
        raise EngineError(f"the model's output is not finite for {len(bad)} of {len(names)} inputs, first: {shown}")


def _check_texts(evalset: EvalSet) -> None:
    for side, texts in (("query", evalset.queries), ("document", evalset.corpus)):
        found = next((key for key, text in texts.items() if isinstance(text, Content)), None)
        if found is not None:
            raise DataError(f"'{evalset.name}': {side} '{found}' is an image; this model takes texts only")


@contextmanager
def _naming(names: Sequence[str]) -> Iterator[None]:
    """Name the items of a call that cannot be used, instead of counting them."""
    try:
        yield
    except InvalidItemsError as invalid:
        named = [ItemError(error.index, f"{names[error.index]}: {error.message}") for error in invalid.items]
        raise InvalidItemsError(named, invalid.total) from invalid


def _text(evalset: EvalSet, query: str) -> str:
    text = evalset.queries[query]
    return describe(text) if isinstance(text, Content) else text
