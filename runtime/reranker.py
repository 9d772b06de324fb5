"""Query–document pairs to scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.errors import DataError, InvalidItemsError, ItemError, UsageError
from rtx.runtime.items import Item, read_pair
from rtx.runtime.session import OnInvalid, Session, items_of

# Where the sigmoid of a float32 is 0 or 1.
_LOGIT_LIMIT = 16.0


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document's place in the list that was given, and its score."""

    index: int
    score: float


class Reranker(Session):
    """Scores query–document pairs; safe to call from several threads, and from any number of tasks by the async forms.

    Args:
        preprocessor: prepares items by the model's contract.
        engine: runs the model.
        budget: how much goes through the engine at once.

    Raises:
        UsageError: the contract is an embedder's.
    """

    task = "rerank"

    @property
    def needs_first_stage(self) -> bool:
        """Whether it was trained on top of a first stage and has to be given that stage's scores."""
        return self.contract.first_stage_weight > 0

    def score(
        self,
        pairs: Iterable[object],
        *,
        first_stage: Sequence[float] | None = None,
        on_invalid: OnInvalid = "raise",
    ) -> NDArray[np.float32]:
        """Score (query, document) pairs.

        Args:
            pairs: tuples of two texts, or of what else the model takes as an item (see `rtx.runtime.items`).
            first_stage: the score that the first stage gave each pair's document. A model that was trained on top of a
                first stage (`contract.first_stage_weight`) needs them, any other leaves them aside.
            on_invalid: what a pair that cannot be used does: "raise" before anything is computed, or "nan".

        Returns:
            [len(pairs)] float32, higher is better, on the scale of the contract's activation.

        Raises:
            InvalidItemsError: lists every pair that cannot be scored.
            UsageError: the model needs scores of the first stage and there are none, or not one finite number a pair.
            EngineError: the engine failed.
        """
        given = items_of(pairs, "(query, document) pairs")
        added = self._first_stage_part(first_stage, len(given))
        return self._run(given, self.preprocessor.encode_pairs, self._read, on_invalid) + added

    def logits(self, pairs: Iterable[object]) -> NDArray[np.float32]:
        """What `score` is made of: the activation undone, and nothing of a first stage added.

        Args:
            pairs: as in `score`.

        Returns:
            [len(pairs)] float32. Undoing a sigmoid is exact to 1 % up to ±12; where it was 0 or 1, the logit is ±16.

        Raises:
            InvalidItemsError, EngineError: as `score`.
        """
        given = items_of(pairs, "(query, document) pairs")
        scores = self._run(given, self.preprocessor.encode_pairs, self._read, "raise")
        if self.contract.activation != "sigmoid":
            return scores
        exact = scores.astype(np.float64)
        with np.errstate(divide="ignore"):
            found: NDArray[np.float64] = np.log(exact) - np.log1p(-exact)
        return found.clip(-_LOGIT_LIMIT, _LOGIT_LIMIT).astype(np.float32)

    async def ascore(
        self,
        pairs: Iterable[object],
        *,
        first_stage: Sequence[float] | None = None,
        on_invalid: OnInvalid = "raise",
    ) -> NDArray[np.float32]:
        """As `score`, in common batches with all other requests that wait at the time."""
        given = items_of(pairs, "(query, document) pairs")
        added = self._first_stage_part(first_stage, len(given))
        return await self._arun(given, self.preprocessor.encode_pairs, self._read, on_invalid) + added

    def rank(
        self,
        query: object,
        documents: Iterable[object],
        *,
        first_stage: Sequence[float] | None = None,
        top_k: int | None = None,
    ) -> list[Ranked]:
        """Order documents by their score for a query.

        Args:
            query: a text, or what else the model takes.
            documents: the same.
            first_stage: the score that the first stage gave each document, as in `score`.
            top_k: how many to return; None for all.

        Returns:
            The best `top_k`, best first; equal scores keep the order of `documents`.

        Raises:
            DataError: the query cannot be used.
            InvalidItemsError: lists every document that cannot be scored.
            UsageError: `top_k` is less than 1, or as in `score`.
        """
        _check_top_k(top_k)
        pairs = [(query, document) for document in items_of(documents, "documents")]
        with _naming_the_query():
            return _best(self.score(pairs, first_stage=first_stage), top_k)

    async def arank(
        self,
        query: object,
        documents: Iterable[object],
        *,
        first_stage: Sequence[float] | None = None,
        top_k: int | None = None,
    ) -> list[Ranked]:
        """As `rank`, in common batches with all other requests that wait at the time."""
        _check_top_k(top_k)
        pairs = [(query, document) for document in items_of(documents, "documents")]
        with _naming_the_query():
            return _best(await self.ascore(pairs, first_stage=first_stage), top_k)

    def _read(self, index: int, pair: object) -> tuple[Item, Item] | ItemError:
        return read_pair(index, pair, self.contract)

    def _first_stage_part(self, scores: Sequence[float] | None, pairs: int) -> NDArray[np.float32]:
        """What the first stage's scores add to those of the graph: [pairs] float32."""
        weight = self.contract.first_stage_weight
        if not weight:
            return np.zeros(pairs, dtype=np.float32)
        if scores is None:
            raise UsageError(
                f"first_stage: this model adds {weight:g} times the first stage's score to its own; "
                "expected one number a document, such as the embedder's cosine, got none"
            )
        expected = f"first_stage: expected {pairs} finite numbers, one a document, got"
        try:
            given = np.asarray(scores)
        except (TypeError, ValueError) as wrong:
            raise UsageError(f"{expected} something else: {wrong}") from wrong
        if given.shape != (pairs,):
            raise UsageError(f"{expected} an array of shape {given.shape}")
        if pairs and given.dtype.kind not in "iuf":
            raise UsageError(f"{expected} {given.dtype} ({scores[0]!r} for item 0)")
        with np.errstate(over="ignore"):
            added: NDArray[np.float32] = np.float32(weight) * given.astype(np.float32)
        if len(bad := np.flatnonzero(~np.isfinite(added))):
            raise UsageError(f"{expected} {given[bad[0]]} for item {bad[0]}")
        return added


def _check_top_k(top_k: int | None) -> None:
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k: expected at least 1, got {top_k}")


@contextmanager
def _naming_the_query() -> Iterator[None]:
    """Where the one query of many pairs is bad, say so once and not of each pair."""
    try:
        yield
    except InvalidItemsError as invalid:
        of_query = [error.message for error in invalid.items if error.message.startswith("query: ")]
        if of_query:
            raise DataError(of_query[0]) from None
        raise


def _best(scores: NDArray[np.float32], top_k: int | None) -> list[Ranked]:
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [Ranked(int(index), float(scores[index])) for index in order]
