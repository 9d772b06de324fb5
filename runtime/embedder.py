"""Texts and images to vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rtx.kernels.pool import l2_normalize, truncate
from rtx.kernels.quantize import quantize_binary, quantize_int8
from rtx.runtime.errors import EngineError, ItemError, UsageError
from rtx.runtime.items import Item, read_item
from rtx.runtime.session import OnInvalid, Session, items_of

Precision = Literal["float32", "int8", "binary"]

CODES: Mapping[Precision, Callable[[NDArray[np.float32]], NDArray[Any]]] = {
    "float32": lambda vectors: vectors,
    "int8": quantize_int8,
    "binary": quantize_binary,
}
"""By precision, what makes it of finite float32 vectors."""


class Embedder(Session):
    """Embeds texts and images; safe to call from several threads, and from any number of tasks by `aembed`.

    Args:
        preprocessor: prepares items by the model's contract.
        engine: runs the model.
        budget: how much goes through the engine at once.

    Raises:
        UsageError: the contract is a reranker's.
    """

    task = "embed"

    def embed(
        self,
        items: Iterable[object],
        *,
        prompt: str | None = None,
        dimensions: int | None = None,
        precision: Precision = "float32",
        normalize: bool | None = None,
        on_invalid: OnInvalid = "raise",
    ) -> NDArray[Any]:
        """Embed texts and images.

        Args:
            items: texts, and where the model takes images also those, or mappings of both (see `rtx.runtime.items`).
            prompt: name of a prompt of the contract ("query", "document", ...); None for its default.
            dimensions: keep the first so many (Matryoshka), normalised again if the model normalises.
            precision: "int8" is a vector of norm 1 times 127, rounded; "binary" the signs, 8 to a byte.
            normalize: None leaves vectors as the model makes them; True scales each to norm 1.
            on_invalid: what an item that cannot be used does: "raise" before anything is computed, or "nan" for a row
                of NaN (float32 only) while all others are embedded.

        Returns:
            [len(items), dimensions] float32 or int8; for "binary" uint8 [len(items), ceil(dimensions / 8)].

        Raises:
            InvalidItemsError: lists every item that cannot be embedded.
            UsageError: an argument does not fit the model.
            EngineError: the engine failed, or gave numbers that `precision` cannot hold.
        """
        self._check(prompt, dimensions, precision, normalize, on_invalid)
        vectors = self._run(
            items_of(items, "items"),
            lambda some: self.preprocessor.encode(some, prompt=prompt),
            self._read,
            on_invalid,
        )
        return self._finish(vectors, dimensions, precision, normalize)

    async def aembed(
        self,
        items: Iterable[object],
        *,
        prompt: str | None = None,
        dimensions: int | None = None,
        precision: Precision = "float32",
        normalize: bool | None = None,
        on_invalid: OnInvalid = "raise",
    ) -> NDArray[Any]:
        """As `embed`, in common batches with all other requests that wait at the time."""
        self._check(prompt, dimensions, precision, normalize, on_invalid)
        vectors = await self._arun(
            items_of(items, "items"),
            lambda some: self.preprocessor.encode(some, prompt=prompt),
            self._read,
            on_invalid,
        )
        return self._finish(vectors, dimensions, precision, normalize)

    def _read(self, index: int, item: object) -> Item | ItemError:
        return read_item(index, item, self.contract)

    def _check(
        self,
        prompt: str | None,
        dimensions: int | None,
        precision: Precision,
        normalize: bool | None,
        on_invalid: OnInvalid,
    ) -> None:
        """All that can be said about the arguments before the first item is looked at."""
        self.contract.prompt_text(prompt)
        if dimensions is not None and not 1 <= dimensions <= self.contract.dimension:
            raise UsageError(f"dimensions: expected 1 to {self.contract.dimension}, got {dimensions}")
        if precision not in CODES:
            raise UsageError(f"precision: expected 'float32', 'int8' or 'binary', got {precision!r}")
        if on_invalid == "nan" and precision != "float32":
            raise UsageError(f"on_invalid='nan' needs precision='float32': {precision} has no NaN")
        if normalize is False and self.contract.normalize:
            raise UsageError("normalize=False: this model normalises inside the graph; its vectors always have norm 1")
        if precision == "int8" and not (normalize or self.contract.normalize):
            raise UsageError(
                "precision='int8' needs vectors of norm 1: this model does not normalise, so pass normalize=True"
            )

    def _finish(
        self, vectors: NDArray[np.float32], dimensions: int | None, precision: Precision, normalize: bool | None
    ) -> NDArray[Any]:
        if dimensions is not None and dimensions < self.contract.dimension:
            vectors = np.ascontiguousarray(truncate(vectors, dimensions, normalize=self.contract.normalize))
        if normalize and not self.contract.normalize:
            vectors = l2_normalize(vectors)
        if precision != "float32" and not np.isfinite(vectors).all():
            raise EngineError(f"{self.engine.name}: gave vectors that are not finite, which {precision} cannot hold")
        return CODES[precision](vectors)
