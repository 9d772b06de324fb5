from __future__ import annotations

import pytest

from rtx.runtime.candidates import Candidate
from rtx.runtime.errors import UsageError
from rtx.runtime.evalset import EvalSet
from rtx.trainer.evaluation import Evaluator
from rtx.trainer.model import RetrievalModel

CORPUS = {"a": "the code", "b": "a list", "c": "the model"}
SET = EvalSet("small", {"q": "the code", "r": "the model"}, CORPUS, {"q": {"a": 1}, "r": {"c": 1}})


def test_an_embedder_is_measured_on_the_whole_corpus(tiny_checkpoint):
    model = RetrievalModel.load(tiny_checkpoint("bert")).train()
    seen = []
    # Queries are equal to their documents, so the cosine is 1 there and nowhere else.
    found = Evaluator(SET)(model, progress=lambda done, total: seen.append((done, total)))
    assert found.metrics["ndcg@10"] == found.metrics["accuracy@1"] == 1.0
    assert seen[-1] == (5, 5)
    assert model.training


def test_a_reranker_is_measured_on_candidates(tiny_checkpoint):
    model = RetrievalModel.load(tiny_checkpoint("bert", "rerank"))
    found = Evaluator(SET, candidates={"q": [Candidate("a")], "r": [Candidate("a"), Candidate("b")]})(model)
    assert found.metrics["accuracy@10"] == 0.5
    with pytest.raises(UsageError, match="'small': a reranker is measured on candidates; none were given"):
        Evaluator(SET)(model)


@pytest.mark.parametrize(
    "metric", ["ndcg@10", "map@100", "recall@100", "accuracy@1", "ndcg@3", "mrr@5", "map@5", "map@1000", "recall@1"]
)
def test_a_metric_is_there_under_its_name(tiny_checkpoint, metric):
    model = RetrievalModel.load(tiny_checkpoint("bert"))
    assert Evaluator(SET, metric=metric)(model).metrics[metric] == 1.0


@pytest.mark.parametrize("metric", ["ndgc@10", "ndcg", "ndcg@0", "ndcg@x", "precision@5"])
def test_an_unknown_metric_is_an_error(metric):
    with pytest.raises(UsageError, match=f"metric '{metric}' does not exist .*other cutoffs as in ndcg@20"):
        Evaluator(SET, metric=metric)


def test_the_hash_follows_the_set_and_the_candidates():
    hashes = [Evaluator(SET).sha256, Evaluator(SET, candidates={"q": [Candidate("a")]}).sha256]
    hashes.append(Evaluator(SET, candidates={"q": [Candidate("b")]}).sha256)
    hashes.append(Evaluator(SET.limit(1)).sha256)
    assert len(set(hashes)) == 4
    assert Evaluator(SET, metric="mrr@10").sha256 == hashes[0]
