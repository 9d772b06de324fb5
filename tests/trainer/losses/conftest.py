"""sentence-transformers' losses on given vectors and logits: their modules ask a model, and the model is a stub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast


class _GivenVectors(nn.Module):
    """Its features are the vectors. As a guide, it takes others than as the model that is trained."""

    max_seq_length = 8
    device = torch.device("cpu")

    def __init__(self, of: str, dim: int) -> None:
        super().__init__()
        self._of, self._dim = of, dim
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features[self._of]}

    def get_embedding_dimension(self) -> int:
        return self._dim


class _GivenLogits(CrossEncoder):
    """Its documents are the positions of their logits."""

    num_labels = 1
    device = torch.device("cpu")

    def __init__(self, logits: Tensor) -> None:
        nn.Module.__init__(self)
        self._logits = logits

    def preprocess(self, pairs: list[tuple[str, str]], **_: Any) -> dict[str, Tensor]:
        return {"positions": torch.tensor([int(document) for _, document in pairs])}

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"scores": self._logits[features["positions"]]}


@pytest.fixture
def reference_of_vectors() -> Callable[..., Tensor]:
    """`reference_of_vectors(make, columns, labels, guides)`: the loss that `make(model, guide)` gives.

    `columns` are queries, positives, negatives, ..., each [rows, dim]; so are `guides`.
    """

    def run(
        make: Callable[[Any, Any], nn.Module],
        columns: list[Tensor],
        labels: Tensor | None = None,
        guides: list[Tensor] | None = None,
    ) -> Tensor:
        model = _GivenVectors("vectors", columns[0].shape[1])
        guide = _GivenVectors("guide", columns[0].shape[1])
        features = [
            {"vectors": column, "guide": other}
            for column, other in zip(columns, guides or [None] * len(columns), strict=True)
        ]
        loss: Tensor = make(model, guide)(features, labels)
        return loss

    return run


@pytest.fixture
def reference_of_logits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Tensor]]:
    """`reference_of_logits(make, logits, labels)`: the loss that `make(model)` gives. `labels` are one list a query."""
    # These losses cast what they get to float32; only in float64 do two ways of summing agree to the last digits.
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)

    def run(make: Callable[[Any], nn.Module], logits: Tensor, labels: list[list[float]]) -> Tensor:
        positions = iter(range(len(logits)))
        documents = [[str(next(positions)) for _ in row] for row in labels]
        queries = [f"query {number}" for number in range(len(labels))]
        loss: Tensor = make(_GivenLogits(logits))((queries, documents), [torch.tensor(row) for row in labels])
        return loss

    yield run
    torch.set_default_dtype(before)
