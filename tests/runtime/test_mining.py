from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtx.runtime import corpus as corpus_module
from rtx.runtime import mining
from rtx.runtime.contract import Contract
from rtx.runtime.errors import DataError, InvalidItemsError, ItemError, MissingExtraError, UsageError
from rtx.runtime.mining import MinedQuery, Relevant, Unusable, mine
from rtx.runtime.negatives import Rules

DIM = 4


@dataclass
class TableEmbedder:
    """Looks vectors up by prompt and text."""

    vectors: dict[tuple[str | None, str], np.ndarray]
    similarity: str = "cosine"
    calls: list[tuple[str | None, tuple[str, ...]]] = field(default_factory=list)

    @property
    def contract(self) -> Contract:
        return Contract(
            task="embed", inputs=("input_ids",), max_tokens=8, pad_token_id=0, dimension=DIM, similarity=self.similarity
        )

    def embed(self, items, *, prompt=None):
        self.calls.append((prompt, tuple(items)))
        if silent := [ItemError(at, "gives no token") for at, item in enumerate(items) if item == "<silent>"]:
            raise InvalidItemsError(silent, len(items))
        rows = [self.vectors[prompt, item] for item in items]
        return np.array(rows, dtype=np.float32).reshape(len(items), DIM)


@dataclass
class TableReranker:
    """Scores are a function of the two texts; some can be set."""

    needs_first_stage = False

    scores: dict[tuple[str, str], float] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def score(self, pairs, **_):
        self.asked += pairs
        return np.array([self.scores.get(pair, self.of(*pair)) for pair in pairs], dtype=np.float32)

    @staticmethod
    def of(query: str, document: str) -> float:
        return float(np.random.default_rng(list(f"{query} {document}".encode())).normal())


def world(seed: int, *, similarity: str = "cosine", queries: int = 9, documents: int = 30) -> TableEmbedder:
    """Random vectors; where sums of products are exact, small whole numbers, so that ties are common."""
    random = np.random.default_rng(seed)
    exact = similarity in ("dot", "manhattan")
    vectors: dict[tuple[str | None, str], np.ndarray] = {}
    for prompt, letter, count in (("query", "q", queries), ("document", "d", documents)):
        for number in range(count):
            drawn = random.integers(-2, 3, DIM) if exact else random.normal(size=DIM)
            vectors[prompt, f"{letter}{number}"] = drawn.astype(np.float32)
    return TableEmbedder(vectors, similarity)


def similarity_of(model: TableEmbedder, query: str, document: str) -> float:
    x, y = (model.vectors[key].astype(float) for key in (("query", query), ("document", document)))
    score = {
        "dot": lambda: x @ y,
        "cosine": lambda: x @ y / math.sqrt((x @ x) * (y @ y)),
        "euclidean": lambda: -math.sqrt(((x - y) ** 2).sum()),
        "manhattan": lambda: -np.abs(x - y).sum(),
    }[model.similarity]()
    return float(np.float32(score))


def brute_force(
    model: TableEmbedder, rows: Sequence[Relevant], corpus: Sequence[str], rules: Rules, reranker: TableReranker | None
) -> list[tuple[str, list[tuple[str, float]], list[tuple[str, float, int]]]]:
    """Query, its positives with scores, its negatives with scores and ranks; one document at a time."""
    found = []
    for query in dict.fromkeys(row.query for row in rows):
        positives = list(dict.fromkeys(row.positive for row in rows if row.query == query))
        others = [document for document in dict.fromkeys(corpus) if document not in positives and document != query]
        ranked = sorted(others, key=lambda document: -similarity_of(model, query, document))
        candidates = [(document, rank) for rank, document in enumerate(ranked, start=1)][rules.skip : rules.depth]

        def score(document: str, query: str = query) -> float:
            if reranker is None:
                return similarity_of(model, query, document)
            return float(np.float32(TableReranker.of(query, document)))

        lowest = min(map(score, positives))
        passing = [
            (document, score(document), rank)
            for document, rank in candidates
            if (rules.margin is None or score(document) <= lowest - rules.margin)
            and (rules.relative_margin is None or score(document) <= lowest - abs(lowest) * rules.relative_margin)
            and (rules.max_score is None or score(document) <= rules.max_score)
            and (rules.min_score is None or score(document) >= rules.min_score)
        ]
        best = sorted(passing, key=lambda entry: (-entry[1], entry[2]))[: rules.negatives]
        found.append((query, [(positive, score(positive)) for positive in positives], best))
    return found


def plain(mined: Iterable[MinedQuery | Unusable]) -> list[tuple[str, list[Any], list[Any]]]:
    return [
        (
            found.query,
            [(positive.text, positive.score) for positive in found.positives],
            [tuple(dataclasses.astuple(n)) if dataclasses.is_dataclass(n) else tuple(n) for n in found.negatives],
        )
        for found in mined
        if isinstance(found, MinedQuery)
    ]


def rows_of(seed: int, count: int = 14, *, queries: int = 9, documents: int = 30) -> list[Relevant]:
    random = np.random.default_rng(seed)
    return [Relevant(f"q{random.integers(queries)}", f"d{random.integers(documents)}") for _ in range(count)]


_margins = st.none() | st.sampled_from([-0.5, 0.0, 0.25, 1.0])


@given(
    seed=st.integers(0, 10_000),
    similarity=st.sampled_from(["cosine", "dot", "euclidean", "manhattan"]),
    ranks=st.tuples(st.integers(0, 5), st.integers(3, 40)),
    margins=st.tuples(_margins, _margins),
    limits=st.sampled_from([(None, None), (None, 0.5), (-1.0, None), (-2.0, 0.75)]),
    rescored=st.booleans(),
    own_corpus=st.booleans(),
)
@settings(max_examples=150)
def test_equals_brute_force(seed, similarity, ranks, margins, limits, rescored, own_corpus):
    rules = Rules(
        negatives=3,
        skip=ranks[0],
        depth=sum(ranks),
        margin=margins[0],
        relative_margin=margins[1],
        min_score=limits[0],
        max_score=limits[1],
    )
    model, rows = world(seed, similarity=similarity), rows_of(seed)
    corpus = [f"d{number}" for number in np.random.default_rng(seed).integers(0, 30, 25)] if own_corpus else None
    reranker = TableReranker() if rescored else None
    mined = list(mine(model, rows, corpus=corpus, rules=rules, reranker=reranker))
    searched = corpus if corpus is not None else [row.positive for row in rows]
    assert plain(mined) == brute_force(model, rows, searched, rules, reranker)


@given(seed=st.integers(0, 10_000), margin=_margins, relative=_margins, rescored=st.booleans())
@settings(max_examples=50)
def test_every_random_draw_keeps_every_rule(seed, margin, relative, rescored):
    rules = Rules(
        skip=1, depth=20, margin=margin, relative_margin=relative, max_score=0.9, min_score=-0.9, sampling="random"
    )
    model, rows = world(seed), rows_of(seed)
    corpus = [f"d{number}" for number in range(30)]
    reranker = TableReranker() if rescored else None
    everything = dataclasses.replace(rules, negatives=19, sampling="top")
    allowed = {query: negatives for query, _, negatives in brute_force(model, rows, corpus, everything, reranker)}
    for query, positives, negatives in plain(mine(model, rows, corpus=corpus, rules=rules, reranker=reranker)):
        assert set(negatives) <= set(allowed[query])
        assert len(set(negatives)) == len(negatives) == min(3, len(allowed[query]))
        assert [entry[1] for entry in negatives] == sorted((entry[1] for entry in negatives), reverse=True)
        for document, score, rank in negatives:
            assert 1 < rank <= 20
            assert document not in {row.positive for row in rows if row.query == query}
            assert -0.9 <= score <= 0.9
            lowest = min(score for _, score in positives)
            assert margin is None or score <= lowest - margin
            assert relative is None or score <= lowest - abs(lowest) * relative


def test_a_draw_depends_on_the_seed_and_the_query_alone():
    model, corpus = world(3), [f"d{number}" for number in range(30)]
    rows = [Relevant(f"q{number}", f"d{number}") for number in range(9)]
    rules = Rules(sampling="random", seed=1)
    whole = plain(mine(model, rows, corpus=corpus, rules=rules))
    assert plain(mine(model, rows[4:6], corpus=corpus, rules=rules)) == whole[4:6]
    other = plain(mine(model, rows, corpus=corpus, rules=dataclasses.replace(rules, seed=2)))
    assert [entry[:2] for entry in other] == [entry[:2] for entry in whole]
    assert sum(a[2] != b[2] for a, b in zip(whole, other, strict=True)) >= 7
    ranks = {rank for _, _, negatives in whole for _, _, rank in negatives}
    assert max(ranks) > 15  # not the top alone
    assert len({tuple(rank for _, _, rank in negatives) for _, _, negatives in whole}) == 9


@pytest.mark.parametrize("rescored", [False, True])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_results_do_not_depend_on_blocks_or_on_where_vectors_are(monkeypatch, tmp_path, size, rescored):
    model, rows = world(5, queries=20, documents=60), rows_of(5, 40, queries=20, documents=60)
    reranker = TableReranker() if rescored else None
    rules = Rules(depth=25, margin=0.1, sampling="random")
    whole = list(mine(model, rows, rules=rules, reranker=reranker))
    for module, name in (
        (mining, "_QUERIES_PER_BLOCK"),
        (mining, "_QUERIES_PER_STEP"),
        (mining, "_PAIRS_PER_CALL"),
        (corpus_module, "_TEXTS_PER_CALL"),
    ):
        monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(corpus_module, "_MEMORY_BYTES", 0)
    model.calls.clear()
    assert list(mine(model, rows, rules=rules, reranker=reranker, folder=tmp_path)) == whole
    assert list(tmp_path.iterdir()) == []
    assert {len(texts) for prompt, texts in model.calls if prompt == "query"} <= {*range(1, size + 1)}
    assert {len(texts) for prompt, texts in model.calls if prompt == "document"} <= {*range(1, size + 1)}


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
def test_faiss_finds_the_same(similarity):
    pytest.importorskip("faiss")
    model = world(8, similarity=similarity, documents=200)
    rows = [Relevant(f"q{number}", f"d{number}") for number in range(9)]
    corpus = [f"d{number}" for number in range(200)]
    rules = Rules(negatives=30, depth=40, skip=2)
    exact = list(mine(model, rows, corpus=corpus, rules=rules))
    if similarity in ("cosine", "euclidean"):
        assert list(mine(model, rows, corpus=corpus, rules=rules, index="faiss")) == exact
        return
    # Whole numbers tie: which of the tied is the last that fits is faiss's choice, its score is not.
    for found, expected in zip(mine(model, rows, corpus=corpus, rules=rules, index="faiss"), exact, strict=True):
        assert [negative.score for negative in found.negatives] == [negative.score for negative in expected.negatives]


def test_without_faiss_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    model = world(0)
    with pytest.raises(MissingExtraError) as raised:
        mine(model, [Relevant("q0", "d0")], index="faiss")
    assert str(raised.value) == (
        "searching with faiss needs the package 'faiss', which is not installed. "
        "Install it with: pip install 'rtx-retrieval[faiss]'"
    )
    assert model.calls == []


class FakeSentenceTransformer:
    """As much of one as mining asks for, on the same table."""

    device = "cpu"

    def __init__(self, model: TableEmbedder) -> None:
        from sentence_transformers import util

        self._model = model
        self.similarity = util.cos_sim
        self.similarity_pairwise = util.pairwise_cos_sim

    def encode_document(self, texts, **_: object):
        return self._model.embed(texts, prompt="document")

    def encode_query(self, texts, **_: object):
        return self._model.embed(texts, prompt="query")


class FakeCrossEncoder:
    def predict(self, pairs, **_: object):
        import torch

        return torch.from_numpy(TableReranker().score(pairs))


@pytest.mark.parametrize(
    ("options", "rescored"),
    [
        ({}, False),
        ({"skip": 4}, False),
        ({"margin": 0.05}, False),
        ({"relative_margin": 0.05}, False),
        ({"relative_margin": 0.1, "max_score": 0.8, "min_score": -0.2}, False),
        ({"margin": 0.3, "max_score": 1.5}, True),
        ({"relative_margin": 0.2}, True),
    ],
)
def test_equals_sentence_transformers_where_settings_coincide(options, rescored):
    pytest.importorskip("sentence_transformers")
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    model = world(11, queries=40, documents=80)
    # One positive a query, and as deep as the corpus: with several, it looks a few ranks further down.
    rows = [Relevant(f"q{number}", f"d{(7 * number) % 80}") for number in range(40)]
    corpus = [f"d{number}" for number in range(80)]
    rules = Rules(negatives=4, depth=79, **options)
    names = {"skip": "range_min", "margin": "absolute_margin"}
    theirs = mine_hard_negatives(
        Dataset.from_list([{"query": row.query, "positive": row.positive} for row in rows]),
        FakeSentenceTransformer(model),
        corpus=corpus,
        cross_encoder=FakeCrossEncoder() if rescored else None,
        range_max=79,
        num_negatives=4,
        output_format="n-tuple",
        output_scores=True,
        verbose=False,
        **{names.get(name, name): value for name, value in options.items()},
    )
    ours = [
        found
        for found in mine(model, rows, corpus=corpus, rules=rules, reranker=TableReranker() if rescored else None)
        if len(found.negatives) == 4  # it leaves out the others
    ]
    assert 10 < len(ours) <= 40
    assert [(row["query"], row["positive"]) for row in theirs] == [(f.query, f.positives[0].text) for f in ours]
    for row, found in zip(theirs, ours, strict=True):
        assert [row[f"negative_{number}"] for number in range(1, 5)] == [n.text for n in found.negatives]
        scores = [found.positives[0].score, *(n.score for n in found.negatives)]
        np.testing.assert_allclose(row["scores"], scores, atol=1e-6)


def plane(similarity: str = "dot") -> TableEmbedder:
    """Documents d1 to d9 whose score for every query is their number, q itself among them with 10."""
    vectors: dict[tuple[str | None, str], np.ndarray] = {}
    for text, value in {**{f"d{number}": number for number in range(1, 10)}, "q": 10}.items():
        vectors["document", text] = np.array([value, 0, 0, 0], dtype=np.float32)
    for query in ("q", "q  ", "r"):
        vectors["query", query] = np.array([1, 0, 0, 0], dtype=np.float32)
    return TableEmbedder(vectors, similarity)


DOCUMENTS = [f"d{number}" for number in range(1, 10)]


def negatives_of(found: MinedQuery | Unusable) -> list[str]:
    assert isinstance(found, MinedQuery)
    return [negative.text for negative in found.negatives]


def test_positives_of_any_row_and_the_query_are_no_negatives():
    rows = [Relevant("q", "d8"), Relevant("r", "d1"), Relevant("q  ", "d6"), Relevant("q", "d8 ")]
    q, r = mine(plane(), rows, corpus=["q", *DOCUMENTS, "d9\n"])
    assert negatives_of(q) == ["d9", "d7", "d5"]
    assert [positive.text for positive in q.positives] == ["d8", "d6"]
    assert negatives_of(r) == ["q", "d9", "d8"]  # of another query, its text is a document as any other
    assert [negative.rank for negative in q.negatives] == [1, 2, 3]


def test_margins_go_by_the_lowest_positive():
    rows = [Relevant("q", "d8"), Relevant("q", "d5")]
    (found,) = mine(plane(), rows, corpus=DOCUMENTS, rules=Rules(margin=1.0))
    assert negatives_of(found) == ["d4", "d3", "d2"]
    assert (found.candidates, dict(found.dropped)) == (7, {"no score": 0, "margin": 3})


def test_a_reranker_on_top_is_given_the_embedders_scores():
    class OnTop(TableReranker):
        needs_first_stage = True

        def score(self, pairs, *, first_stage=None):
            given.update(zip(pairs, first_stage, strict=True))
            return super().score(pairs) + 2 * np.array(first_stage, dtype=np.float32)

    given: dict[tuple[str, str], float] = {}
    rows = [Relevant("q", "d8"), Relevant("q", "d5")]
    (plain,) = mine(plane(), rows, corpus=DOCUMENTS)
    (found,) = mine(plane(), rows, corpus=DOCUMENTS, reranker=OnTop())
    embedders = {each.text: each.score for each in (*plain.positives, *plain.negatives)}
    for text, score in embedders.items():
        assert given["q", text] == pytest.approx(score)
    for each in (*found.positives, *found.negatives):
        assert each.score == pytest.approx(TableReranker.of("q", each.text) + 2 * given["q", each.text], abs=1e-5)


def test_ranks_count_what_is_not_known_to_answer():
    rows = [Relevant("q", text) for text in ("d9", "d6", "d2")]
    (found,) = mine(plane(), rows, corpus=DOCUMENTS, rules=Rules(skip=2, depth=5, negatives=3))
    assert [(negative.text, negative.rank) for negative in found.negatives] == [("d5", 3), ("d4", 4), ("d3", 5)]
    # d2 has d8, d7, d5, d4 and d3 before it, all that were looked at.
    assert [positive.rank for positive in found.positives] == [1, 3, None]
    model = plane()
    model.vectors["document", "as d6"] = model.vectors["document", "d6"]
    (deep,) = mine(model, rows, corpus=["as d6", *DOCUMENTS], rules=Rules(depth=50))
    assert [positive.rank for positive in deep.positives] == [1, 3, 7]


def test_without_a_corpus_positives_and_negatives_of_all_rows_are_it():
    rows = [Relevant("q", "d2", negatives=("d7", "")), Relevant("r", "d1", negatives=("d7", "d3"))]
    q, r = mine(plane(), rows)
    assert negatives_of(q) == ["d7", "d3", "d1"]
    assert negatives_of(r) == ["d7", "d3", "d2"]


def test_positives_that_the_corpus_lacks_are_scored():
    model = plane()
    (found,) = mine(model, [Relevant("q", "d6"), Relevant("q", "d5")], corpus=["d9", "d5", "d4"], rules=Rules(margin=0))
    assert [(positive.score, positive.rank, positive.in_corpus) for positive in found.positives] == [
        (6.0, 2, False),
        (5.0, 2, True),
    ]
    assert negatives_of(found) == ["d4"]
    embedded = [text for prompt, texts in model.calls for text in texts if prompt == "document"]
    assert sorted(embedded) == ["d4", "d5", "d6", "d9"]


def test_a_reranker_scores_what_is_looked_at_and_no_more():
    order = {"d5": 0.95, "d4": 0.9, "d3": 0.7, "d2": 0.8}
    reranker = TableReranker({("q", text): score for text, score in order.items()})
    rules = Rules(negatives=2, skip=1, depth=4, margin=0.1)
    (found,) = mine(plane(), [Relevant("q", "d5")], corpus=DOCUMENTS[:6], rules=rules, reranker=reranker)
    assert sorted(reranker.asked) == [("q", text) for text in ("d2", "d3", "d4", "d5")]
    assert [(negative.text, negative.rank) for negative in found.negatives] == [("d2", 4), ("d3", 3)]
    np.testing.assert_allclose([negative.score for negative in found.negatives], [0.8, 0.7], rtol=1e-6)
    assert found.positives[0].score == pytest.approx(0.95)
    assert found.positives[0].rank == 2  # the embedder's


@pytest.mark.parametrize("reranker", [None, TableReranker()])
def test_what_is_not_finite_is_left_out_and_named(monkeypatch, reranker):
    monkeypatch.setattr(mining, "_QUERIES_PER_STEP", 1)
    model = plane()
    for key in (("document", "d9"), ("document", "d7"), ("query", "r")):
        model.vectors[key] = np.array([np.inf, 0, 0, 0], dtype=np.float32)
    rows = [
        Relevant("q", "d7", where="t:1"),
        Relevant("q", "d5", where="t:2"),
        Relevant("r", "d5", where="t:3"),
        Relevant("q  q", "<silent>", where="t:4"),
    ]
    model.vectors["query", "q  q"] = np.array([1, 0, 0, 0], dtype=np.float32)
    told: list[tuple[str, int, int]] = []
    corpus = [*DOCUMENTS, "<silent>"]
    mined = list(mine(model, rows, corpus=corpus, reranker=reranker, on_progress=lambda *state: told.append(state)))
    assert told[1:] == [("queries", 2, 3), ("queries", 3, 3)]
    unusable = {found.row.where: found.message for found in mined if isinstance(found, Unusable)}
    assert unusable == {
        "t:1": "positive: the model gives it no finite vector",
        "t:3": "query: the model gives it no finite vector",
        "t:4": "positive: gives no token",
    }
    (found,) = (found for found in mined if isinstance(found, MinedQuery))
    assert [positive.text for positive in found.positives] == ["d5"]
    assert reranker is not None or negatives_of(found) == ["d8", "d6", "d4"]
    assert not {"d9", "d7"} & {*negatives_of(found)}


def test_scores_of_a_reranker_that_are_not_finite_are_left_out():
    reranker = TableReranker({("q", "d9"): math.nan, ("r", "d5"): math.inf, ("q", "d8"): 5.0, ("q", "d5"): 9.0})
    rows = [Relevant("q", "d5"), Relevant("r", "d5")]
    rules = Rules(negatives=1, depth=3)
    found, unusable = mine(plane(), rows, corpus=DOCUMENTS, rules=rules, reranker=reranker)
    assert negatives_of(found) == ["d8"]
    assert dict(found.dropped) == {"no score": 1}
    assert unusable == Unusable(rows[1], "positive: the reranker gives it no finite score")


def test_progress_counts_texts_and_then_queries(monkeypatch):
    monkeypatch.setattr(mining, "_QUERIES_PER_BLOCK", 3)
    monkeypatch.setattr(mining, "_QUERIES_PER_STEP", 2)
    monkeypatch.setattr(corpus_module, "_TEXTS_PER_CALL", 4)
    told: list[tuple[str, int, int]] = []
    rows = [Relevant(f"q{number}", f"d{number}") for number in range(5)]
    list(mine(world(0), rows, on_progress=lambda *state: told.append(state)))
    assert told == [("texts", 4, 5), ("texts", 5, 5), *(("queries", done, 5) for done in (2, 3, 5))]


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        ([], {}, DataError, "there is no row; expected queries with a positive each"),
        ([Relevant("q", "d1")], {"corpus": []}, DataError, "the corpus has no text that can be compared"),
        ([Relevant("q", "d1")], {"corpus": [" ", ""]}, DataError, "left out: 2 empty, 0 repeated, 0 without a vector"),
        ([Relevant("q", "d1")], {"index": "hnsw"}, UsageError, "index: expected one of exact, faiss, got 'hnsw'"),
    ],
)
def test_what_cannot_be_mined(rows, options, error, message):
    with pytest.raises(error, match=message):
        mine(plane(), rows, **options)


def test_all_rows_that_cannot_be_used_are_listed():
    with pytest.raises(InvalidItemsError) as raised:
        mine(plane(), [Relevant(" ", "d1"), Relevant("q", "d1"), Relevant("q", "\ud800")])
    assert [str(item) for item in raised.value.items] == [
        "item 0: query: is empty",
        "item 2: positive: holds an unpaired surrogate at character 0; expected valid Unicode",
    ]
