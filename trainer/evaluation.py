"""Ranking quality of a model in training: the runtime's measurement, run on PyTorch."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property
from typing import Self

from rtx.runtime.candidates import Candidates, read_candidates
from rtx.runtime.embedder import Embedder
from rtx.runtime.engine import Budget
from rtx.runtime.errors import UsageError, nearest
from rtx.runtime.evalset import EvalSet, load_evalset
from rtx.runtime.evaluation import (
    Evaluation,
    Progress,
    evaluate_candidates,
    evaluate_embedder,
    evaluate_reranker,
)
from rtx.runtime.reranker import Reranker
from rtx.trainer.model import RetrievalModel

_K, _DEPTH = 10, 100
# The runtime's default is made for a CPU; elsewhere, large batches keep the device busy.
_BUDGET = Budget(max_batch_tokens=16384, max_batch_items=512)
# What is measured at the usual cutoffs; another cutoff moves all metrics but MAP there.
_USUAL = ("ndcg@10", "mrr@10", "map@100", "recall@10", "recall@100", "accuracy@1", "accuracy@10")


class Evaluator:
    """Measures models on one evaluation set.

    Args:
        evalset: queries, corpus and judgements.
        metric: name and cutoff of what decides which of two models is better: ndcg@10, mrr@10, map@100, recall@k, ...
        candidates: documents by query id, for a reranker; with scores for one that is on top of a first stage.

    Raises:
        UsageError: there is no such metric.
    """

    def __init__(self, evalset: EvalSet, *, metric: str = "ndcg@10", candidates: Candidates | None = None) -> None:
        self.evalset = evalset
        self.metric = metric
        self.candidates = candidates
        self._k, self._depth = _cutoffs(metric)

    @classmethod
    def from_beir(
        cls,
        path: str | os.PathLike[str],
        *,
        metric: str = "ndcg@10",
        candidates: str | os.PathLike[str] | None = None,
        split: str = "test",
    ) -> Self:
        """Read an evaluation set in the BEIR layout.

        Args:
            path: folder with corpus.jsonl, queries.jsonl and qrels.
            metric: as above.
            candidates: for a reranker, a first stage's ranking: a TREC run file or jsonl (rtx.runtime.candidates).
            split: which qrels.

        Raises:
            DataError: a file is missing or has lines that cannot be used.
            UsageError: there is no such metric.
        """
        evalset = load_evalset(path, split=split)
        listed = read_candidates(candidates, evalset) if candidates is not None else None
        return cls(evalset, metric=metric, candidates=listed)

    @cached_property
    def sha256(self) -> str:
        """Hash of what is measured on."""
        candidates = json.dumps(self.candidates, sort_keys=True)
        return hashlib.sha256(f"{self.evalset.sha256} {candidates}".encode()).hexdigest()

    def first_stage(self) -> Evaluation | None:
        """What the candidates' own order is worth; None without candidates."""
        if self.candidates is None:
            return None
        return evaluate_candidates(self.evalset, self.candidates, k=self._k, depth=self._depth)

    def __call__(self, model: RetrievalModel, *, progress: Progress | None = None) -> Evaluation:
        """Rank the corpus with an embedder, or the candidates with a reranker.

        Args:
            model: may be in training; it is measured in evaluation mode.
            progress: told now and then how many of how many texts or pairs are done.

        Raises:
            UsageError: a reranker, and there are no candidates.
            EngineError: the model's output is not finite.
        """
        budget = None if model.device.type == "cpu" else _BUDGET
        if model.task == "embed":
            embedder = Embedder(model.preprocessor, model.engine(), budget=budget)
            return evaluate_embedder(embedder, self.evalset, k=self._k, depth=self._depth, progress=progress)
        if self.candidates is None:
            raise UsageError(f"'{self.evalset.name}': a reranker is measured on candidates; none were given")
        reranker = Reranker(model.preprocessor, model.engine(), budget=budget)
        return evaluate_reranker(
            reranker, self.evalset, self.candidates, k=self._k, depth=self._depth, progress=progress
        )


def _cutoffs(metric: str) -> tuple[int, int]:
    """The k and the depth at which the runtime's measurement has this metric."""
    if metric in _USUAL:
        return _K, _DEPTH
    name, _, cutoff = metric.partition("@")
    names = {usual.partition("@")[0] for usual in _USUAL}
    if name not in names or not cutoff.isdecimal() or int(cutoff) < 1:
        raise UsageError(f"metric '{metric}' does not exist ({nearest(metric, _USUAL)}; other cutoffs as in ndcg@20)")
    if name == "map":
        return min(_K, int(cutoff)), int(cutoff)
    return int(cutoff), max(_DEPTH, int(cutoff))
