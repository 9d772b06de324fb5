"""Query–document pairs to scores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.errors import UsageError
from rtx.runtime.session import OnInvalid, Session, items_of
from rtx.runtime.text import check_pair


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document's place in the list that was given, and its score."""

    index: int
    score: float


class Reranker(Session):
    """Scores query–document pairs; safe to call from several threads, and from any number of tasks by the async forms.

    Args:
        preprocessor: tokenises by the model's contract.
        engine: runs the model.
        budget: how much goes through the engine at once.

    Raises:
        UsageError: the contract is an embedder's.
    """

    task = "rerank"

    def score(self, pairs: Iterable[object], *, on_invalid: OnInvalid = "raise") -> NDArray[np.float32]:
        """Score (query, document) pairs.

        Args:
            pairs: tuples of two texts.
            on_invalid: what a pair that is not two valid texts does: "raise" before anything is computed, or "nan".

        Returns:
            [len(pairs)] float32, higher is better, on the scale of the contract's activation.

        Raises:
            InvalidItemsError: lists every pair that cannot be scored.
            EngineError: the engine failed.
        """
        return self._run(
            items_of(pairs, "(query, document) pairs"), self.preprocessor.encode_pairs, check_pair, on_invalid
        )

    async def ascore(self, pairs: Iterable[object], *, on_invalid: OnInvalid = "raise") -> NDArray[np.float32]:
        """As `score`, in common batches with all other requests that wait at the time."""
        return await self._arun(items_of(pairs, "(query, document) pairs"), self.preprocessor.encode_pairs, on_invalid)

    def rank(self, query: object, documents: Iterable[object], *, top_k: int | None = None) -> list[Ranked]:
        """Order documents by their score for a query.

        Returns:
            The best `top_k` (None for all), best first; equal scores keep the order of `documents`.

        Raises:
            InvalidItemsError: lists every document that cannot be scored; a bad query makes all of them so.
            UsageError: `top_k` is less than 1.
        """
        _check_top_k(top_k)
        scores = self.score([(query, document) for document in items_of(documents, "documents")])
        return _best(scores, top_k)

    async def arank(self, query: object, documents: Iterable[object], *, top_k: int | None = None) -> list[Ranked]:
        """As `rank`, in common batches with all other requests that wait at the time."""
        _check_top_k(top_k)
        scores = await self.ascore([(query, document) for document in items_of(documents, "documents")])
        return _best(scores, top_k)


def _check_top_k(top_k: int | None) -> None:
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k: expected at least 1, got {top_k}")


def _best(scores: NDArray[np.float32], top_k: int | None) -> list[Ranked]:
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [Ranked(int(index), float(scores[index])) for index in order]
