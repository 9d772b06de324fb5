"""One loss at several dimensions, so that a vector can be cut short later."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from rtx.runtime.errors import UsageError
from rtx.trainer.losses.arithmetic import full
from rtx.trainer.losses.targets import Targets

EmbedLoss = Callable[[Tensor, Tensor, Targets], Tensor]


@dataclass(frozen=True)
class Matryoshka:
    """A loss of embedders, made by `matryoshka`."""

    loss: EmbedLoss
    dimensions: tuple[int, ...]
    weights: tuple[float, ...]

    def __call__(self, queries: Tensor, documents: Tensor, targets: Targets, /) -> Tensor:
        """
        Raises:
            UsageError: the vectors are shorter than a dimension.
        """
        width, most = queries.shape[-1], max(self.dimensions)
        if most > width:
            raise UsageError(f"matryoshka: dimension {most} is more than the model's {width}")
        total = queries.new_zeros((), dtype=full(queries[:0]).dtype)
        for dimension, weight in zip(self.dimensions, self.weights, strict=True):
            total = total + weight * self.loss(_cut(queries, dimension), _cut(documents, dimension), targets)
        return total


def matryoshka(loss: EmbedLoss, dimensions: Sequence[int], weights: Sequence[float] | None = None) -> Matryoshka:
    """A loss that is the weighted sum of another one at each dimension: Kusupati et al. 2022, arXiv:2205.13147.

    Vectors are cut to the dimension and normalised again. A guide's vectors stay as they are.

    Args:
        loss: any loss of embedders, with its options bound.
        dimensions: to cut to. The full one is trained only if it is among them.
        weights: one a dimension, 1 by default.

    Raises:
        UsageError: no dimension, one twice or below 1, or weights that do not fit.
    """
    dimensions = tuple(dimensions)
    weights = (1.0,) * len(dimensions) if weights is None else tuple(float(weight) for weight in weights)
    if not dimensions or min(dimensions) < 1 or len(set(dimensions)) < len(dimensions):
        raise UsageError(f"matryoshka: expected different dimensions of at least 1, got {list(dimensions)}")
    if len(weights) != len(dimensions) or not all(0 < weight < math.inf for weight in weights):
        raise UsageError(f"matryoshka: expected {len(dimensions)} weights above 0, got {list(weights)}")
    return Matryoshka(loss, dimensions, weights)


def _cut(vectors: Tensor, dimension: int) -> Tensor:
    return F.normalize(full(vectors[..., :dimension]), dim=-1)
