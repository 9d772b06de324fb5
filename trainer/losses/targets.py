"""What the data says of a batch: which query each document was given with, and how well it answers it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Targets(NamedTuple):
    """What a loss compares the model's outputs with. Documents stand row by row: all of query 0, then all of query 1 …

    Attributes:
        owner: [documents] int64, never falling: the query that each document was given with. Every query has one.
        labels: [documents] float32: 1 for a positive and 0 for a given negative, or a grade, or a teacher's score.
            Where the data has positives, the first document of a query is its positive.
        guide: vectors of the same texts by a second model, ([queries, dim], [documents, dim]), any floating type.
        first_stage: [documents] float32, the scores that a first stage gave; None where the data has none.
    """

    owner: Tensor
    labels: Tensor
    guide: tuple[Tensor, Tensor] | None = None
    first_stage: Tensor | None = None

    @classmethod
    def of(cls, labels: Sequence[Sequence[float]], first_stage: Sequence[Sequence[float]] = ()) -> Targets:
        """Targets of queries with their documents' labels, `Targets.of([(1, 0, 0), (1,)])`, and first-stage scores."""
        lengths = torch.tensor([len(row) for row in labels])
        return cls(
            torch.repeat_interleave(torch.arange(len(labels)), lengths),
            torch.tensor([label for row in labels for label in row], dtype=torch.float32),
            first_stage=torch.tensor([score for row in first_stage for score in row], dtype=torch.float32)
            if any(first_stage)
            else None,
        )

    def to(self, device: torch.device) -> Targets:
        """The same on another device."""
        guide = self.guide
        moved = None if guide is None else (guide[0].to(device), guide[1].to(device))
        first_stage = None if self.first_stage is None else self.first_stage.to(device)
        return Targets(self.owner.to(device), self.labels.to(device), moved, first_stage)

    @property
    def first(self) -> Tensor:
        """[queries] int64: where each query's first document stands."""
        starts = torch.ones_like(self.owner, dtype=torch.bool)
        starts[1:] = self.owner[1:] != self.owner[:-1]
        return starts.nonzero().squeeze(-1)

    @property
    def place(self) -> Tensor:
        """[documents] int64: which document of its query each one is, counted from 0."""
        return torch.arange(len(self.owner), device=self.owner.device) - self.first[self.owner]

    def lists(self, values: Tensor, fill: float) -> Tensor:
        """Values of the documents [documents] as one row a query, [queries, most documents of a query]."""
        place = self.place
        rows = values.new_full((len(self.first), int(place.max()) + 1), fill)
        return rows.index_put((self.owner, place), values)

    def log_softmax(self, values: Tensor) -> Tensor:
        """Log-probabilities [documents], each among the documents of its query, of scores [documents]."""
        return torch.log_softmax(self.lists(values, -torch.inf), dim=1)[self.owner, self.place]

    def margins(self, values: Tensor) -> Tensor:
        """How much more a query's first document has than each of its others, [documents - queries]."""
        own = self.first[self.owner]
        others = own != torch.arange(len(self.owner), device=self.owner.device)
        return (values[own] - values)[others]
