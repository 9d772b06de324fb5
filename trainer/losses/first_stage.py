"""A reranker's loss on top of a first stage, so that the reranker learns what the first stage does not know yet."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rtx.runtime.errors import UsageError
from rtx.trainer.losses.arithmetic import full
from rtx.trainer.losses.targets import Targets

RerankLoss = Callable[[Tensor, Targets], Tensor]


@dataclass(frozen=True)
class FirstStage:
    """A loss of rerankers, made by `first_stage`."""

    loss: RerankLoss
    weight: float

    def __call__(self, logits: Tensor, targets: Targets, /) -> Tensor:
        """
        Args:
            logits: [documents].
            targets: with `first_stage` [documents] float32.

        Raises:
            UsageError: the targets have no scores of a first stage.
        """
        if targets.first_stage is None:
            raise UsageError("first_stage: the data has no scores of a first stage; expected a column first_stage")
        return self.loss(full(logits) + self.weight * targets.first_stage, targets)


def first_stage(loss: RerankLoss, weight: float) -> FirstStage:
    """A loss of `logits + weight * the first stage's scores`.

    The sum is what the reranker will rank by (`Contract.first_stage_weight`). With a loss over lists that is a product
    of two models of which document is meant, softmax(weight * score) of the first stage's and softmax(logits); only the
    second is trained. The weight is then the scale of the first stage's own loss: 1 / temperature.

    Args:
        loss: any loss of rerankers, with its options bound.
        weight: above 0.

    Raises:
        UsageError: the weight is not.
    """
    if not 0 < weight < math.inf:
        raise UsageError(f"first_stage: expected a weight above 0, got {weight}")
    return FirstStage(loss, float(weight))
