from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from rtx.runtime.candidates import Candidate
from rtx.runtime.contract import Contract
from rtx.runtime.errors import DataError, EngineError, UsageError
from rtx.runtime.evalset import EvalSet
from rtx.runtime.evaluation import Evaluation, compare, evaluate_embedder, evaluate_reranker, evaluate_weights


@dataclass
class TableEmbedder:
    """Looks vectors up by prompt and text, and notes what it was asked."""

    vectors: dict[tuple[str | None, str], list[float]]
    similarity: str = "dot"
    calls: list[int] = field(default_factory=list)

    @property
    def contract(self) -> Contract:
        return Contract(
            task="embed", inputs=("input_ids",), max_tokens=8, pad_token_id=0, dimension=2, similarity=self.similarity
        )

    def embed(self, items, *, prompt=None):
        self.calls.append(len(items))
        return np.array([self.vectors[prompt, item] for item in items], dtype=np.float32)


@dataclass
class TableReranker:
    scores: dict[tuple[str, str], float]
    needs_first_stage: bool = False

    def score(self, pairs, **_):
        return np.array([self.scores[pair] for pair in pairs], dtype=np.float32)


EVALSET = EvalSet(
    "tiny",
    {"q1": "left", "q2": "right", "q3": "both"},
    {"d1": "a", "d2": "b", "d3": "c", "d4": "d"},
    {"q1": {"d2": 1}, "q2": {"d1": 2, "d3": 1}, "q3": {"d4": 1, "d1": 0}},
)
# Dot products, documents d1 to d4: left 3 1 0 -1, right 0 2 2 1, both 3 3 2 0.
# Rankings, ties by position:       left d1 d2 d3 d4, right d2 d3 d4 d1, both d1 d2 d3 d4.
EMBEDDER = TableEmbedder(
    {
        ("query", "left"): [1, 0],
        ("query", "right"): [0, 1],
        ("query", "both"): [1, 1],
        ("document", "a"): [3, 0],
        ("document", "b"): [1, 2],
        ("document", "c"): [0, 2],
        ("document", "d"): [-1, 1],
    }
)


def test_embedder_by_hand():
    found = evaluate_embedder(EMBEDDER, EVALSET, k=3, depth=4)
    assert found.indices.tolist() == [[0, 1, 2, 3], [1, 2, 3, 0], [0, 1, 2, 3]]
    assert found.scores.tolist() == [[3, 1, 0, -1], [2, 2, 1, 0], [3, 3, 2, 0]]
    # q1: its document at rank 2. q2: grade 1 at rank 2 and grade 2 at rank 4. q3: its document at rank 4.
    ideal = 2 + 1 / math.log2(3)
    ndcg = [1 / math.log2(3), 1 / math.log2(3) / ideal, 0]
    np.testing.assert_allclose(found.ndcg, ndcg)
    expected = {
        "ndcg@3": sum(ndcg) / 3,
        "mrr@3": (1 / 2 + 1 / 2 + 0) / 3,
        "map@4": (1 / 2 + (1 / 2 + 2 / 4) / 2 + 1 / 4) / 3,
        "recall@3": (1 + 1 / 2 + 0) / 3,
        "recall@4": 1.0,
        "accuracy@1": 0.0,
        "accuracy@3": 2 / 3,
    }
    assert found.metrics == pytest.approx(expected)
    assert list(found.metrics) == list(expected)
    # q2 has d2 and d3 equal, q3 d1 and d2.
    assert found.ties == pytest.approx(2 / 3)
    assert (found.queries, found.documents, found.unranked, found.k) == (3, 4, 0, 3)
    assert (found.evalset, found.sha256) == ("tiny", EVALSET.sha256)


def test_default_metrics():
    found = evaluate_embedder(EMBEDDER, EVALSET)
    names = ["ndcg@10", "mrr@10", "map@100", "recall@10", "recall@100", "accuracy@1", "accuracy@10"]
    assert list(found.metrics) == names
    assert found.metrics["recall@10"] == 1


def test_similarity_is_the_contracts():
    # Euclidean distances of "left" (1, 0) to d1 to d4: 2, 2, sqrt(5), sqrt(5).
    found = evaluate_embedder(replace(EMBEDDER, similarity="euclidean"), EVALSET)
    assert found.indices[0].tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(found.scores[0], -np.sqrt(np.array([4, 4, 5, 5], dtype=np.float32)))


def test_progress_and_chunks(monkeypatch):
    monkeypatch.setattr("rtx.runtime.evaluation._CHUNK_ITEMS", 3)
    model = replace(EMBEDDER, calls=[])
    seen = []
    found = evaluate_embedder(model, EVALSET, k=3, depth=4, progress=lambda done, total: seen.append((done, total)))
    assert model.calls == [3, 3, 1]
    assert seen == [(3, 7), (6, 7), (7, 7)]
    np.testing.assert_array_equal(found.scores, evaluate_embedder(EMBEDDER, EVALSET, k=3, depth=4).scores)


def self_retrieval(**qrels: dict[str, int]) -> tuple[EvalSet, TableEmbedder]:
    """As in ArguAna and Quora: the query is a document of the corpus, and nearest to itself."""
    texts = {"d1": "a", "d2": "b", "d3": "c"}
    evalset = EvalSet("self", {"d1": "a"}, texts, {"d1": {"d2": 1} | qrels.get("d1", {})})
    vectors = {"a": [1.0, 0.0], "b": [0.9, 0.1], "c": [0.5, 0.5]}
    return evalset, TableEmbedder({(side, t): v for t, v in vectors.items() for side in ("query", "document")})


def test_a_query_does_not_find_itself():
    evalset, model = self_retrieval()
    found = evaluate_embedder(model, evalset, k=2, depth=2)
    assert found.indices.tolist() == [[1, 2]]
    assert found.metrics["mrr@2"] == 1
    with_itself = evaluate_embedder(model, evalset, k=2, depth=2, ignore_identical_ids=False)
    assert with_itself.indices.tolist() == [[0, 1]]
    assert with_itself.metrics["mrr@2"] == 0.5


def test_a_query_finds_itself_where_that_is_judged():
    # Ids may be plain numbers on both sides, and then mean nothing by being equal.
    evalset, model = self_retrieval(d1={"d1": 1})
    assert evaluate_embedder(model, evalset, k=2, depth=2).indices.tolist() == [[0, 1]]


def test_depth_above_the_corpus_leaves_empty_places_at_the_end():
    evalset, model = self_retrieval()
    found = evaluate_embedder(model, evalset, k=3, depth=10)
    assert found.indices.tolist() == [[1, 2, -1]]
    assert found.scores[0, 2] == -np.inf
    assert found.ties == 0
    assert [candidate.document for candidate in found.candidates(evalset, 10)["d1"]] == ["d2", "d3"]


def test_vectors_that_are_not_finite_are_an_error_that_names_the_texts():
    broken = replace(EMBEDDER, vectors=EMBEDDER.vectors | {("document", "c"): [np.nan, 0]})
    with pytest.raises(EngineError, match="not finite for 1 of 4 inputs, first: document 'd3'"):
        evaluate_embedder(broken, EVALSET)


@pytest.mark.parametrize(("k", "depth"), [(0, 100), (11, 10)])
def test_cutoffs_out_of_range(k, depth):
    with pytest.raises(UsageError, match=f"k: expected 1 to {depth} .* got {k}"):
        evaluate_embedder(EMBEDDER, EVALSET, k=k, depth=depth)


def unscored(**documents):
    return {query: [Candidate(document) for document in found] for query, found in documents.items()}


CANDIDATES = unscored(q1=["d3", "d2", "d1"], q2=["d1", "d2", "d3", "d4"], q3=[])
RERANKER = TableReranker(
    {
        ("left", "c"): 0.5,
        ("left", "b"): 0.5,
        ("left", "a"): 0.25,
        ("right", "a"): 1.0,
        ("right", "b"): -1.0,
        ("right", "c"): 2.0,
        ("right", "d"): -2.0,
    }
)


def test_reranker_by_hand():
    found = evaluate_reranker(RERANKER, EVALSET, CANDIDATES, k=2, depth=3)
    # q1: d3 and d2 tie and keep the order of the candidates. q2 is cut to the best three. q3 has no candidates.
    assert found.indices.tolist() == [[2, 1, 0], [2, 0, 1], [-1, -1, -1]]
    assert found.scores.tolist() == [[0.5, 0.5, 0.25], [2, 1, -1], [-np.inf] * 3]
    ideal = 2 + 1 / math.log2(3)
    np.testing.assert_allclose(found.ndcg, [1 / math.log2(3), (1 + 2 / math.log2(3)) / ideal, 0])
    assert found.metrics["mrr@2"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert found.metrics["recall@3"] == pytest.approx(2 / 3)
    assert found.unranked == 1
    assert found.ties == pytest.approx(1 / 3)
    assert found.candidates(EVALSET, 2) == {
        "q1": [Candidate("d3", 0.5), Candidate("d2", 0.5)],
        "q2": [Candidate("d3", 2.0), Candidate("d1", 1.0)],
        "q3": [],
    }


def test_reranker_is_given_the_scores_of_the_first_stage():
    class Recorder(TableReranker):
        def score(self, pairs, *, first_stage=None):
            given.append(first_stage)
            return super().score(pairs)

    given = []
    scored = {"q1": [Candidate("d3", 0.5), Candidate("d2", 0.25)], "q2": [Candidate("d1", -1.0)]}
    evaluate_reranker(Recorder(RERANKER.scores, needs_first_stage=True), EVALSET, scored)
    evaluate_reranker(Recorder(RERANKER.scores), EVALSET, scored)
    assert given == [[0.5, 0.25, -1.0], None]
    missing = scored | {"q1": [Candidate("d3"), Candidate("d2", 1.0)]}
    with pytest.raises(DataError) as caught:
        evaluate_reranker(Recorder(RERANKER.scores, needs_first_stage=True), EVALSET, missing)
    assert str(caught.value).splitlines() == [
        "candidates for 'tiny': a reranker on top of a first stage needs its scores: 1 problem:",
        "  query 'q1': document 'd3' has no score",
    ]
    assert len(given) == 2


def test_reranker_leaves_out_the_query_itself():
    evalset, _ = self_retrieval()
    model = TableReranker({("a", "a"): 9.0, ("a", "b"): 1.0, ("a", "c"): 2.0})
    candidates = unscored(d1=["d1", "d2", "d3"])
    assert evaluate_reranker(model, evalset, candidates, k=2).indices.tolist() == [[2, 1]]
    kept = evaluate_reranker(model, evalset, candidates, k=2, ignore_identical_ids=False)
    assert kept.indices.tolist() == [[0, 2, 1]]


def test_reranker_reports_progress_in_pairs(monkeypatch):
    monkeypatch.setattr("rtx.runtime.evaluation._CHUNK_ITEMS", 4)
    seen = []
    evaluate_reranker(RERANKER, EVALSET, CANDIDATES, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 7), (7, 7)]


def test_candidates_that_do_not_fit_are_named():
    with pytest.raises(DataError) as caught:
        evaluate_reranker(RERANKER, EVALSET, unscored(q1=["d1", "d9", "d8"], q2=["d1", "d1"]))
    assert str(caught.value).splitlines() == [
        "candidates for 'tiny': 2 problems:",
        "  query 'q1': not in the corpus: d9, d8",
        "  query 'q2': documents are listed more than once",
    ]
    with pytest.raises(DataError, match="candidates for 'tiny': there is none for any query"):
        evaluate_reranker(RERANKER, EVALSET, unscored(other=["d1"]))


def test_scores_that_are_not_finite_are_an_error_that_names_the_pairs():
    broken = TableReranker(RERANKER.scores | {("right", "b"): math.inf})
    with pytest.raises(EngineError, match="not finite for 1 of 7 inputs, first: query 'q2', document 'd2'"):
        evaluate_reranker(broken, EVALSET, CANDIDATES)


def test_compare_by_hand():
    reference = evaluate_embedder(EMBEDDER, EVALSET, k=3, depth=4)
    other = evaluate_reranker(RERANKER, EVALSET, CANDIDATES, k=3, depth=4)
    found = compare(reference, other, EVALSET, seed=1)
    # q1: d1 d2 d3 against d3 d2 d1, the same NDCG. q2: d2 d3 d4 against d3 d1 d2, a gain. q3: nothing before and after.
    ideal = 2 + 1 / math.log2(3)
    gain = (1 + 2 / math.log2(3)) / ideal - 1 / math.log2(3) / ideal
    assert found.difference == pytest.approx(gain / 3)
    assert (found.reference, found.other) == (pytest.approx(reference.ndcg.mean()), pytest.approx(other.ndcg.mean()))
    assert (found.improved, found.fell, found.worst) == (1, 0, ())
    # q3 ranked nothing: an overlap of 0.
    assert found.overlap == pytest.approx((1 + 2 / 3 + 0) / 3)
    # Of three queries one differs: means of resamples are multiples of gain / 3, from none (8/27) to all three (1/27).
    assert found.interval == (0, pytest.approx(gain))
    assert (found.ties_reference, found.ties_other) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    back = compare(other, reference, EVALSET)
    assert back.difference == -found.difference
    assert (back.improved, back.fell) == (0, 1)
    [worst] = back.worst
    assert (worst.query, worst.text) == ("q2", "right")
    assert worst.reference - worst.other == pytest.approx(gain)


def evaluation(ndcg: list[float], evalset: EvalSet, indices: list[list[int]]) -> Evaluation:
    found = np.array(indices)
    return Evaluation(
        evalset=evalset.name,
        sha256=evalset.sha256,
        queries=len(evalset.queries),
        documents=len(evalset.corpus),
        unranked=0,
        k=10,
        metrics={"ndcg@10": float(np.mean(ndcg))},
        ties=0.0,
        ndcg=np.array(ndcg),
        indices=found,
        scores=np.zeros(found.shape, dtype=np.float32),
    )


def test_worst_queries_come_in_order_and_those_that_did_not_fall_are_left_out():
    names = [f"q{i}" for i in range(5)]
    evalset = EvalSet("five", {n: f"text {n}" for n in names}, {"d": "x"}, {n: {"d": 1} for n in names})
    reference = evaluation([1.0, 1.0, 0.5, 0.75, 0.25], evalset, [[0]] * 5)
    other = evaluation([0.75, 0.25, 0.5, 0.5, 0.5], evalset, [[0]] * 5)
    assert [change.query for change in compare(reference, other, evalset).worst] == ["q1", "q0", "q3"]
    assert [change.query for change in compare(reference, other, evalset, worst=1).worst] == ["q1"]
    found = compare(reference, other, evalset)
    assert (found.improved, found.fell, found.queries) == (1, 3, 5)


def test_only_rankings_of_the_same_set_and_cutoff_compare():
    reference = evaluate_embedder(EMBEDDER, EVALSET)
    with pytest.raises(UsageError, match="cannot compare 'tiny' at 10 with 'tiny' at 5 on 'tiny'"):
        compare(reference, evaluate_embedder(EMBEDDER, EVALSET, k=5), EVALSET)
    changed = replace(EVALSET, qrels=EVALSET.qrels | {"q1": {"d1": 1}})
    with pytest.raises(UsageError, match="expected the same set, to the byte, and the same cutoff"):
        compare(reference, reference, changed)


def test_to_dict_is_json_without_arrays():
    reference = evaluate_embedder(EMBEDDER, EVALSET)
    plain = json.loads(json.dumps(reference.to_dict()))
    assert plain["metrics"]["recall@10"] == 1
    assert set(plain) == {"evalset", "sha256", "queries", "documents", "unranked", "k", "metrics", "ties"}
    other = evaluate_reranker(RERANKER, EVALSET, CANDIDATES)
    comparison = json.loads(json.dumps(compare(reference, other, EVALSET).to_dict()))
    assert comparison["interval"] == sorted(comparison["interval"])
    assert comparison["worst"][0]["text"] == "both"


@pytest.fixture(scope="module")
def static_model():
    """A random sentence-transformers model of one table of vectors, and an evaluation set with some structure."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    generator = np.random.default_rng(0)
    words = [f"w{i}" for i in range(300)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = generator.standard_normal((300, 16)).astype(np.float32)
    module = StaticEmbedding(tokenizer, embedding_weights=weights)
    model = sentence_transformers.SentenceTransformer(modules=[module], device="cpu")
    texts = [" ".join(generator.choice(words, size=8)) for _ in range(250)]
    queries = [" ".join(generator.permutation(texts[i].split())[:4]) for i in range(40)]
    qrels = {f"q{i}": {f"d{i}": 1, f"d{(7 * i) % 250}": 1, f"d{i + 40}": 1} for i in range(40)}
    evalset = EvalSet(
        "words", {f"q{i}": t for i, t in enumerate(queries)}, {f"d{i}": t for i, t in enumerate(texts)}, qrels
    )
    return model, evalset


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
def test_metrics_equal_those_of_sentence_transformers(static_model, similarity):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    model, evalset = static_model
    model.similarity_fn_name = similarity
    evaluator = InformationRetrievalEvaluator(
        evalset.queries,
        evalset.corpus,
        {query: set(grades) for query, grades in evalset.qrels.items()},
        accuracy_at_k=[1, 10],
        precision_recall_at_k=[10, 100],
        write_csv=False,
    )
    theirs = {name.removeprefix(f"{similarity}_"): value for name, value in evaluator(model).items()}

    class Wrapped:
        contract = replace(EMBEDDER, similarity=similarity).contract

        def embed(self, items, *, prompt=None):  # noqa: ARG002 - this model has no prompts
            return model.encode(list(items), convert_to_numpy=True)

    ours = evaluate_embedder(Wrapped(), evalset).metrics
    assert 0.2 < ours["ndcg@10"] < 0.9
    for name in ours:
        assert ours[name] == pytest.approx(theirs[name], abs=1e-12), name


def test_weights_of_the_first_stage():
    class Logits(TableReranker):
        def logits(self, pairs):
            asked.append(len(pairs))
            return self.score(pairs)

    asked: list[int] = []
    scored = {
        "q1": [Candidate("d3", 0.5), Candidate("d2", 0.25)],
        "q2": [Candidate("d1", 1.0), Candidate("d2", 0.5), Candidate("d3", 0.25)],
        "q3": [],
    }
    found = evaluate_weights(Logits(RERANKER.scores), EVALSET, scored, [0, 4], k=2, depth=3)
    assert list(found) == [0, 4]
    assert asked == [5]  # whatever the number of weights
    # By itself: a tie, and d3 before d1; with four times the first stage: d3 before d2, and d1 before d3.
    assert found[0].indices.tolist() == [[2, 1, -1], [2, 0, 1], [-1, -1, -1]]
    assert found[4].indices.tolist() == [[2, 1, -1], [0, 2, 1], [-1, -1, -1]]
    assert found[4].scores[:2].tolist() == [[2.5, 1.5, -np.inf], [5.0, 3.0, 1.0]]
    with pytest.raises(DataError, match="query 'q1': document 'd3' has no score"):
        evaluate_weights(Logits(RERANKER.scores), EVALSET, scored | {"q1": [Candidate("d3")]}, [0])
