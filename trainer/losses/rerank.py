"""Losses of rerankers: `loss(logits [documents], targets) -> scalar`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rtx.trainer.losses.targets import Targets


def bce(logits: Tensor, targets: Targets) -> Tensor:
    """Binary cross-entropy of raw logits (no sigmoid before it), mean over the documents. Labels in [0, 1]."""
    with torch.autocast(logits.device.type, enabled=False):
        full = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.binary_cross_entropy_with_logits(full, targets.labels.to(full.dtype))
