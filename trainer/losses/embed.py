"""Losses of embedders: `loss(queries [queries, dim], documents [documents, dim], targets) -> scalar`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rtx.trainer.losses.targets import Targets


def info_nce(queries: Tensor, documents: Tensor, targets: Targets, *, scale: float = 20.0) -> Tensor:
    """Cross-entropy of picking each query's own document among all documents of the batch.

    −mean_i(s·cos(q_i, d_i) − logsumexp_j s·cos(q_i, d_j)): van den Oord et al. 2018, arXiv:1807.03748; with the other
    rows' documents as negatives: Henderson et al. 2017, arXiv:1705.00652 (multiple negatives ranking).
    """
    # bfloat16 numbers between 16 and 32 are 0.125 apart: scaled cosines of hard negatives would tie.
    with torch.autocast(queries.device.type, enabled=False):
        cosines = F.normalize(_full(queries), dim=-1) @ F.normalize(_full(documents), dim=-1).T
        return F.cross_entropy(scale * cosines, targets.first)


def _full(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
