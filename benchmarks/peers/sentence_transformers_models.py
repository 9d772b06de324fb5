"""What the three ways of running sentence-transformers share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.worker import Run, Task


def open_model(path: Path, task: Task, *, backend: str, device: str = "cpu", **options: Any) -> Any:
    """A SentenceTransformer or a CrossEncoder, from a folder and without a hub."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import sentence_transformers

    kind: Callable[..., Any] = (
        sentence_transformers.SentenceTransformer if task == "embed" else sentence_transformers.CrossEncoder
    )
    return kind(str(path), device=device, backend=backend, model_kwargs=options)


def running(model: Any, task: Task) -> Run:
    """How its users run it: `encode` and `predict` order texts by length themselves."""

    def embed(items: Sequence[Any], batch_size: int) -> NDArray[np.float32]:
        return np.asarray(model.encode(list(items), batch_size=batch_size, show_progress_bar=False))

    def score(items: Sequence[Any], batch_size: int) -> NDArray[np.float32]:
        pairs = [(query, passage) for query, passage in items]
        return np.asarray(model.predict(pairs, batch_size=batch_size, show_progress_bar=False)).reshape(len(pairs))

    return embed if task == "embed" else score
