"""The projection of a composed model fitted to what the text embedder says of the pages: distillation in closed form.

Each training page has an image and a text layer. The text embedder's vector of the text is the target, the image
tower's pooled vector the input, and the projection between them the solution of a ridge regression:

    W = argmin Σ ‖W x_i - t_i‖² + λ ‖W‖²  =  (Xᵀ X + λ I)⁻¹ Xᵀ T, transposed

(Hoerl and Kennard, 1970). λ is the one by which the texts of documents that were held back find their pages best; the
one that comes nearest to the texts is a poor choice, since it draws all pages to one place. No step of training, and no
weight of either tower is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from rtx.runtime.embedder import Embedder
from rtx.runtime.errors import DataError, UsageError
from rtx.runtime.metrics import ndcg_at_k
from rtx.trainer.model import RetrievalModel

_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_DEPTH = 10
# One document in so many is held back to choose λ.
_HELD_BACK = 8


class Page(NamedTuple):
    """A training page: where it is from, the path of its image, and the text that stands on it."""

    document: str
    image: str
    text: str


class Fit(NamedTuple):
    """What came out.

    Attributes:
        strength: λ that was chosen.
        ndcg: NDCG@10 of finding a page with its own text, among those of the documents that were held back.
        pages: it was fitted to.
    """

    strength: float
    ndcg: float
    pages: int


def fit_projection(model: RetrievalModel, pages: Sequence[Page], *, bf16: bool = False) -> Fit:
    """Set the projection behind the image tower.

    Args:
        model: as `compose` gives it: pooling, one projection without bias, normalised vectors.
        pages: with text, of two documents at least.
        bf16: run both towers in bfloat16.

    Raises:
        DataError: all pages are of one document.
        UsageError: the image tower has not one projection, to a width no less than its own.
    """
    weight = _projection(model)
    width = weight.shape[1]
    with torch.no_grad():
        weight.copy_(torch.eye(*weight.shape))
    embedder = Embedder(model.preprocessor, model.engine())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        # The projection changes nothing now: these are pooled vectors, at length 1. Their own lengths are of no
        # consequence, since what the projection makes of them is brought to length 1 too.
        images = embedder.embed([{"image": page.image} for page in pages])[:, :width].astype(np.float64)
        texts = embedder.embed([page.text for page in pages]).astype(np.float64)
    strength, ndcg = _choose(images, texts, [page.document for page in pages])
    solved = _solve(images, texts, strength)
    with torch.no_grad():
        weight.copy_(torch.from_numpy(solved.T))
    return Fit(strength, ndcg, len(pages))


def _projection(model: RetrievalModel) -> torch.nn.Parameter:
    tower = model.image_tower
    weights = [] if tower is None else [weight for weight in tower.head.parameters() if weight.ndim == 2]
    if len(weights) != 1 or weights[0].shape[0] < weights[0].shape[1]:
        shapes = [tuple(weight.shape) for weight in weights]
        raise UsageError(f"expected one projection, to a width no less than the image tower's; got {shapes or 'none'}")
    return weights[0]


def _choose(images: NDArray[np.float64], texts: NDArray[np.float64], documents: Sequence[str]) -> tuple[float, float]:
    names = sorted(set(documents))
    if len(names) < 2:
        raise DataError(f"expected pages of two documents at least, got those of {len(names)}")
    held = np.isin(documents, names[::_HELD_BACK])
    found = {
        strength: _ndcg(images[held] @ _solve(images[~held], texts[~held], strength), texts[held])
        for strength in _STRENGTHS
    }
    best = max(found, key=lambda strength: found[strength])
    return best, found[best]


def _solve(images: NDArray[np.float64], texts: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
    """[pages, in], [pages, out] to [in, out]."""
    gram = images.T @ images + strength * np.eye(images.shape[1])
    return np.asarray(np.linalg.solve(gram, images.T @ texts))


def _ndcg(predicted: NDArray[np.float64], texts: NDArray[np.float64]) -> float:
    """NDCG@10 of finding each page, by its image, with its own text."""
    scores = texts @ (predicted / np.linalg.norm(predicted, axis=1, keepdims=True)).T
    own = (-scores).argsort(axis=1, kind="stable") == np.arange(len(texts))[:, np.newaxis]
    return float(ndcg_at_k(own.astype(np.int64), np.ones((len(texts), 1), dtype=np.int64), _DEPTH).mean())
