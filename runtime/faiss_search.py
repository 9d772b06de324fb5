"""Exact nearest-neighbour search by faiss, block by block: the matrix product and the selection in one fused kernel.

faiss finds the documents; their scores are computed once more as `rtx.runtime.search` does. So a score is the same to
the bit by either way, and so are the documents, unless more than a few are as near as the k-th to float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtx.kernels.pool import l2_normalize
from rtx.runtime.contract import Similarity
from rtx.runtime.errors import MissingExtraError
from rtx.runtime.search import Hits, score_pairs

# Elements of a block of documents, in float32 64 MiB.
_BLOCK_ELEMENTS = 1 << 24
# Neighbours beyond the k-th that are scored too: room for those whose order float32 got wrong.
_SPARE = 16


def load_faiss() -> Any:
    """The module `faiss`.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import faiss
    except ImportError as missing:
        raise MissingExtraError("faiss", "faiss", "searching with faiss") from missing
    return faiss


def search_faiss(
    queries: NDArray[np.float32],
    documents: NDArray[np.float32],
    k: int,
    *,
    similarity: Similarity = "cosine",
    block_documents: int | None = None,
) -> Hits:
    """Find the k best documents of each query, comparing all.

    Args:
        queries: [queries, dim] float32.
        documents: [documents, dim] float32, in memory or mapped from a file; no more than a block is copied.
        k: documents a query; all of them where there are fewer.
        similarity: as in `rtx.runtime.search.search`.
        block_documents: rows compared at a time.

    Returns:
        Hits, with min(k, documents) columns. Equal scores are in the order of the documents.

    Raises:
        MissingExtraError: faiss is not installed.
        DataError: a vector is not finite.
        ValueError: shapes or types do not fit.
    """
    faiss = load_faiss()
    metric = {
        "cosine": faiss.METRIC_INNER_PRODUCT,
        "dot": faiss.METRIC_INNER_PRODUCT,
        "euclidean": faiss.METRIC_L2,
        "manhattan": faiss.METRIC_L1,
    }[similarity]
    k, wide = min(k, len(documents)), min(k + _SPARE, len(documents))
    block = block_documents or max(256, _BLOCK_ELEMENTS // max(1, queries.shape[1]))
    indices = np.empty((len(queries), 0), dtype=np.int64)
    keys = np.empty((len(queries), 0), dtype=np.float32)
    left = _prepared(queries, similarity)
    for start in range(0, len(documents), block):
        right = _prepared(documents[start : start + block], similarity)
        found_keys, found = faiss.knn(left, right, min(wide, len(right)), metric=metric)
        # Distances count the other way.
        keys = np.concatenate([keys, found_keys if metric == faiss.METRIC_INNER_PRODUCT else -found_keys], axis=1)
        indices = np.concatenate([indices, found + start], axis=1)
        best = np.argsort(-keys, axis=1, kind="stable")[:, :wide]
        keys, indices = np.take_along_axis(keys, best, axis=1), np.take_along_axis(indices, best, axis=1)
    rows = np.repeat(np.arange(len(queries)), wide)
    scores = score_pairs(queries, documents, rows, indices.ravel(), similarity=similarity).reshape(indices.shape)
    order = np.lexsort((indices, -scores), axis=1)[:, :k]
    return Hits(np.take_along_axis(indices, order, axis=1), np.take_along_axis(scores, order, axis=1))


def _prepared(vectors: NDArray[np.float32], similarity: Similarity) -> NDArray[np.float32]:
    return np.ascontiguousarray(l2_normalize(vectors) if similarity == "cosine" else vectors)
