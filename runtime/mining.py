"""Hard negatives: documents that a model ranks high for a query and that are not known to answer it.

queries with positives + corpus -> embed -> search -> [a reranker's scores] -> rules -> MinedQuery

Queries go through in blocks: memory holds the texts, the vectors of the corpus (beyond 1 GiB in a mapped file) and the
neighbours of one block, however many queries there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.bulk import calls, without_invalid
from rtx.runtime.contract import Contract, Similarity
from rtx.runtime.corpus import Corpus, Key, embed_corpus, embed_or_nan, key_of
from rtx.runtime.errors import DataError, InvalidItemsError, ItemError, UsageError
from rtx.runtime.evaluation import EmbeddingModel, RerankingModel
from rtx.runtime.faiss_search import load_faiss, search_faiss
from rtx.runtime.items import Content, count_images, read_item
from rtx.runtime.negatives import Rules, choose
from rtx.runtime.reranker import Reranker
from rtx.runtime.search import Hits, score_pairs, search

Index = Literal["exact", "faiss"]
INDEXES: tuple[Index, ...] = get_args(Index)
Progress = Callable[[str, int, int], object]

# Queries that are searched for together: enough to make a pass over the corpus worth it.
_QUERIES_PER_BLOCK = 1024
# Queries that are finished together, between two reports: with a reranker each is a hundred pairs.
_QUERIES_PER_STEP = 32
_PAIRS_PER_CALL = 2048
_NO_VECTOR = "the model gives it no finite vector"
_NO_SCORE = "the reranker gives it no finite score"


class Relevant(NamedTuple):
    """A query and a document that answers it.

    Attributes:
        query, positive: the texts, or images as `Content`.
        negatives: documents that do not answer it; they are part of the corpus where no other is given.
        where: names it in messages, as "train.jsonl:17".
    """

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    where: str = ""


class Positive(NamedTuple):
    """A document that answers a query.

    Attributes:
        text: its text.
        score: for the query; the reranker's where there is one.
        rank: by the embedder, 1 if no document that is not known to answer the query scores higher; None if all those
            that were looked at do.
        in_corpus: whether the corpus has it.
    """

    text: str
    score: float
    rank: int | None
    in_corpus: bool


class Negative(NamedTuple):
    """A document that was chosen: its text, its score (as a positive's), and its rank by the embedder, from 1."""

    text: str
    score: float
    rank: int


@dataclass(frozen=True)
class MinedQuery:
    """A query with its negatives.

    Attributes:
        query: its text.
        positives: in the order of the rows, at least one, no two the same text.
        negatives: highest score first.
        wanted: how many negatives were asked for.
        candidates: documents that the rules were applied to.
        dropped: by rule, how many candidates it left out that no rule before it did.
    """

    query: str
    positives: tuple[Positive, ...]
    negatives: tuple[Negative, ...]
    wanted: int
    candidates: int
    dropped: Mapping[str, int]


@dataclass(frozen=True)
class Unusable:
    """A row that could not be compared, and why."""

    row: Relevant
    message: str


Mined = Iterator[MinedQuery | Unusable]


def mine(
    model: EmbeddingModel,
    rows: Iterable[Relevant],
    *,
    corpus: Iterable[str] | None = None,
    rules: Rules | None = None,
    reranker: RerankingModel | None = None,
    index: Index = "exact",
    folder: Path | None = None,
    on_progress: Progress = lambda _what, _done, _total: None,
) -> Mined:
    """Find negatives for queries.

    Queries that are equal but for white space are one, and no positive of any of its rows becomes its negative, nor
    does its own text. So are documents: the corpus counts each once.

    Args:
        model: embeds queries with the prompt "query" and documents with "document"; its contract's similarity counts.
        rows: queries with their positives, one each; a query with several positives has several rows.
        corpus: the texts to take negatives from; None for all positives and negatives of the rows.
        rules: which documents become negatives; None for the three that rank highest.
        reranker: scores positives and candidates, those from rank `skip + 1` to `depth`, once more; the rules and the
            order of the negatives then go by its scores.
        index: "exact" compares in numpy, "faiss" in faiss, as exactly and faster.
        folder: where vectors go that take more than 1 GiB; None for the system's folder for temporary files.
        on_progress: called with what is done ("texts" embedded, then "queries" mined), how many and of how many.

    Returns:
        The queries in the order in which they first come, each as soon as it is mined; among them rows that could not
        be compared, because a vector or a score of theirs is not finite. Rows that say the same are one.

    Raises:
        InvalidItemsError: rows with a text that is empty or no valid Unicode, or an image that the model does not take,
            all listed.
        DataError: there is no row, or no corpus.
        UsageError: the index is not known.
        MissingExtraError: faiss is asked for and not installed.
        EngineError, ArtifactError: a model failed, or the vectors cannot be written.
    """
    if index not in INDEXES:
        raise UsageError(f"index: expected one of {', '.join(INDEXES)}, got {index!r}")
    if index == "faiss":
        load_faiss()
    rows = list(rows)
    _check_rows(rows, model.contract)
    if corpus is None:
        corpus = (text for row in rows for text in (row.positive, *row.negatives))
    queries = _queries(rows)
    searched = embed_corpus(
        model, corpus, folder=folder, on_progress=lambda done, total: on_progress("texts", done, total)
    )
    miner = _Miner(model, searched, rules or Rules(), reranker, search_faiss if index == "faiss" else search)
    return _mined(miner, queries, on_progress)


class _Query(NamedTuple):
    """The rows of one query, no two with the same positive."""

    key: Key
    rows: list[Relevant]

    @property
    def text(self) -> str:
        return self.rows[0].query


class _Block(NamedTuple):
    """Some queries with what the embedder knows of them.

    Attributes:
        queries: those whose vectors are finite.
        positives: [rows of all queries, in order] float32 scores, NaN where the positive's vector is not finite.
        faults: by row, why there is no vector, where more is known.
        hits: the neighbours of each query, known positives among them.
    """

    queries: list[_Query]
    positives: NDArray[np.float32]
    faults: dict[int, str]
    hits: Hits


def _check_rows(rows: Sequence[Relevant], contract: Contract) -> None:
    if not rows:
        raise DataError("there is no row; expected queries with a positive each")
    errors = []
    for index, row in enumerate(rows):
        for name, text in (("query", row.query), ("positive", row.positive)):
            checked = read_item(index, text, contract)
            if isinstance(checked, ItemError):
                errors.append(ItemError(index, f"{name}: {checked.message}"))
            elif not text.strip():
                errors.append(ItemError(index, f"{name}: is empty"))
    if errors:
        raise InvalidItemsError(errors, len(rows))


def _queries(rows: Iterable[Relevant]) -> list[_Query]:
    grouped: dict[Key, dict[Key, Relevant]] = {}
    for row in rows:
        grouped.setdefault(key_of(row.query), {}).setdefault(key_of(row.positive), row)
    return [_Query(key, list(positives.values())) for key, positives in grouped.items()]


def _mined(miner: _Miner, queries: Sequence[_Query], on_progress: Progress) -> Mined:
    for start in range(0, len(queries), _QUERIES_PER_BLOCK):
        some = queries[start : start + _QUERIES_PER_BLOCK]
        block, unusable = miner.search(some)
        yield from unusable
        done = start + len(some) - len(block.queries)
        for results in miner.finish(block):
            yield from results
            done += miner.step
            on_progress("queries", min(done, start + len(some)), len(queries))


@dataclass
class _Ranked:
    """One query's documents, those that are known to answer it apart.

    Attributes:
        query: the query.
        positives: [rows] float32 scores.
        faults: [rows], why a positive cannot be compared; "" where it can.
        ranks: [rows], as in Positive.
        places: [candidates] int64, positions in the corpus from rank `skip + 1` on, in order of rank.
        scores: [candidates] float32.
    """

    query: _Query
    positives: NDArray[np.float32]
    faults: list[str]
    ranks: list[int | None]
    places: NDArray[np.int64]
    scores: NDArray[np.float32]


class _Miner:
    """The models and the corpus; nothing in it changes from query to query."""

    def __init__(
        self,
        model: EmbeddingModel,
        corpus: Corpus,
        rules: Rules,
        reranker: RerankingModel | None,
        find: Callable[..., Hits],
    ) -> None:
        self._model = model
        self._corpus = corpus
        self._rules = rules
        self._reranker = reranker
        self._find = find
        self._similarity: Similarity = model.contract.similarity
        # A reranker may take a minute for the pages of one query.
        slow = reranker is not None and any(isinstance(text, Content) for text in corpus.texts)
        self.step = 1 if slow else _QUERIES_PER_STEP

    def search(self, queries: Sequence[_Query]) -> tuple[_Block, list[Unusable]]:
        """The neighbours of some queries; and the rows of those whose vectors are not finite."""
        vectors, reasons = embed_or_nan(self._model, [query.text for query in queries], prompt="query")
        finite = np.asarray(np.isfinite(vectors).all(axis=1))
        unusable = [
            Unusable(row, f"query: {reasons.get(place, _NO_VECTOR)}")
            for place, (query, usable) in enumerate(zip(queries, finite, strict=True))
            if not usable
            for row in query.rows
        ]
        some = [query for query, usable in zip(queries, finite, strict=True) if usable]
        vectors = vectors[finite]
        positives, faults = self._score_positives(some, vectors)
        # So deep that enough is left without the positives and the query itself.
        depth = self._rules.depth + max((len(query.rows) + 1 for query in some), default=0)
        hits = self._find(vectors, self._corpus.vectors, depth, similarity=self._similarity)
        return _Block(some, positives, faults, hits), unusable

    def finish(self, block: _Block) -> Iterator[list[MinedQuery | Unusable]]:
        """The results, some queries at a time."""
        ends = np.cumsum([len(query.rows) for query in block.queries]).tolist()
        starts = [0, *ends[:-1]]
        for first in range(0, len(block.queries), self.step):
            step = range(first, min(first + self.step, len(block.queries)))
            ranked = [self._rank(block, at, range(starts[at], ends[at])) for at in step]
            if self._reranker is not None:
                _rescore(ranked, self._reranker, self._corpus.texts)
            yield [result for found in ranked for result in self._choose(found)]

    def _score_positives(
        self, queries: Sequence[_Query], vectors: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], dict[int, str]]:
        """[rows of all queries] float32, with faults as in a _Block; positives that the corpus lacks are embedded."""
        rows = [row for query in queries for row in query.rows]
        places = [self._corpus.places.get(key_of(row.positive), -1) for row in rows]
        missing = [at for at, place in enumerate(places) if place < 0]
        documents = self._corpus.vectors[np.array(places, dtype=np.int64)]
        faults: dict[int, str] = {}
        if missing:
            texts = [rows[at].positive for at in missing]
            documents[missing], reasons = embed_or_nan(self._model, texts, prompt="document")
            faults = {missing[place]: reason for place, reason in reasons.items()}
        scores = np.full(len(rows), np.nan, dtype=np.float32)
        usable = np.flatnonzero(np.isfinite(documents).all(axis=1))
        owners = np.repeat(np.arange(len(queries)), [len(query.rows) for query in queries])
        scores[usable] = score_pairs(
            vectors, documents[usable], owners[usable], np.arange(len(usable)), similarity=self._similarity
        )
        return scores, faults

    def _rank(self, block: _Block, at: int, rows: range) -> _Ranked:
        query, hits, positives = block.queries[at], block.hits, block.positives[rows.start : rows.stop]
        places = self._corpus.places
        own = {places.get(key, -1) for key in (query.key, *(key_of(row.positive) for row in query.rows))}
        others = ~np.isin(hits.indices[at], list(own))
        depth, skip = self._rules.depth, self._rules.skip
        found, scores = hits.indices[at][others][:depth], hits.scores[at][others][:depth]
        above = (scores[None, :] > positives[:, None]).sum(axis=1).tolist()
        ranks = [None if count == depth else count + 1 for count in above]
        usable = np.isfinite(positives).tolist()
        faults = ["" if fine else block.faults.get(row, _NO_VECTOR) for row, fine in zip(rows, usable, strict=True)]
        return _Ranked(query, positives, faults, ranks, found[skip:], scores[skip:])

    def _choose(self, found: _Ranked) -> Iterator[MinedQuery | Unusable]:
        rules, texts, known = self._rules, self._corpus.texts, self._corpus.places
        positives: list[Positive] = []
        scores = found.positives.tolist()
        for row, score, fault, rank in zip(found.query.rows, scores, found.faults, found.ranks, strict=True):
            if fault:
                yield Unusable(row, f"positive: {fault}")
            else:
                positives.append(Positive(row.positive, score, rank, key_of(row.positive) in known))
        if not positives:
            return
        lowest = min(positive.score for positive in positives)
        choice = choose(found.scores, lowest, rules, draw=int.from_bytes(found.query.key))
        yield MinedQuery(
            found.query.text,
            tuple(positives),
            tuple(
                Negative(texts[found.places[at]], float(found.scores[at]), rules.skip + at + 1)
                for at in choice.places.tolist()
            ),
            wanted=rules.negatives,
            candidates=len(found.places),
            dropped=choice.dropped,
        )


class Logits:
    """A reranker by its logits, also where it has a sigmoid: what a margin and a distilled model can be measured in."""

    def __init__(self, reranker: Reranker) -> None:
        self._reranker = reranker

    @property
    def needs_first_stage(self) -> bool:
        return self._reranker.needs_first_stage

    def score(
        self, pairs: Sequence[tuple[str, str]], *, first_stage: Sequence[float] | None = None
    ) -> NDArray[np.float32]:
        """[pairs] float32, with what a first stage adds. Raises as `Reranker.score`."""
        if self.needs_first_stage:
            return self._reranker.score(pairs, first_stage=first_stage)
        return self._reranker.logits(pairs)


def _rescore(ranked: Sequence[_Ranked], reranker: RerankingModel, texts: Sequence[str]) -> None:
    """Put a reranker's scores in the place of the embedder's."""
    pairs: list[tuple[tuple[str, str], float]] = []
    for found in ranked:
        documents = [row.positive for row in found.query.rows] + [texts[place] for place in found.places]
        # A positive without a vector is left out later, whatever its score.
        first_stage = np.nan_to_num(np.concatenate([found.positives, found.scores])).tolist()
        pairs += [((found.query.text, document), score) for document, score in zip(documents, first_stage, strict=True)]

    def score(some: Sequence[tuple[tuple[str, str], float]]) -> NDArray[np.float32]:
        return reranker.score([pair for pair, _ in some], first_stage=[score for _, score in some])

    scores = np.full(len(pairs), np.nan, dtype=np.float32)
    start = 0
    for some in calls(pairs, _PAIRS_PER_CALL, lambda scored: count_images(scored[0])):
        found_scores, rows, _ = without_invalid(score, some)
        scores[np.array(rows, dtype=np.int64) + start] = found_scores
        start += len(some)
    start = 0
    for found in ranked:
        middle, end = start + len(found.positives), start + len(found.positives) + len(found.places)
        found.positives, found.scores = scores[start:middle], scores[middle:end]
        finite = np.isfinite(found.positives).tolist()
        found.faults = [fault or ("" if ok else _NO_SCORE) for fault, ok in zip(found.faults, finite, strict=True)]
        start = end
