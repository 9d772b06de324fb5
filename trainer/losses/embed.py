"""Losses as pure functions of what the model gave: (outputs, targets) -> scalar.

For an embedder that is `loss(queries, documents)`, for a reranker `loss(logits, labels)`. Options are keywords: bind
them with functools.partial. Everything is computed in float32, under autocast too (in float64 if the inputs are).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def info_nce(queries: Tensor, documents: Tensor, *, scale: float = 20.0) -> Tensor:
    """Cross-entropy of picking each query's own document among all documents of the batch.

    −mean_i(s·cos(q_i, d_i) − logsumexp_j s·cos(q_i, d_j)): van den Oord et al. 2018, arXiv:1807.03748; with the other
    rows' documents as negatives: Henderson et al. 2017, arXiv:1705.00652 (multiple negatives ranking).

    Args:
        queries: [b, dim], of any norm and floating type.
        documents: [b + n, dim]: the positive of query i at row i, then any number of given negatives.
        scale: s, the inverse of the temperature.

    Returns:
        scalar, at least float32.
    """
    # bfloat16 numbers between 16 and 32 are 0.125 apart: scaled cosines of hard negatives would tie.
    with torch.autocast(queries.device.type, enabled=False):
        cosines = F.normalize(_full(queries), dim=-1) @ F.normalize(_full(documents), dim=-1).T
        own = torch.arange(len(queries), device=queries.device)
        return F.cross_entropy(scale * cosines, own)


def bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of raw logits (no sigmoid before it), mean over the pairs.

    Args:
        logits: [b], of any floating type.
        labels: [b] in [0, 1]: whether, or with what probability, the document answers the query.

    Returns:
        scalar, at least float32.
    """
    with torch.autocast(logits.device.type, enabled=False):
        return F.binary_cross_entropy_with_logits(_full(logits), labels.to(_full(logits).dtype))


def _full(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
