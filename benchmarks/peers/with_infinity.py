"""Infinity's engine in this process, on PyTorch; its server is left out."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.peers.worker import Run, Source, serve


def load(source: Source, _form: str, threads: int) -> Run:
    import torch

    torch.set_num_threads(threads)
    engines = _Engines(str(source.checkpoint))

    def embed(items: Sequence[Any], batch_size: int) -> NDArray[np.float32]:
        vectors, _ = engines.wait(engines.of(batch_size).embed(sentences=list(items)))
        return np.stack(vectors)

    def score(items: Sequence[Any], batch_size: int) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = engines.wait(_score(engines.of(batch_size), items))
        return scores

    return embed if source.task == "embed" else score


async def _score(engine: Any, items: Sequence[Any]) -> NDArray[np.float32]:
    """Its requests are a query with its documents: all of them at once, as they would reach a server."""
    grouped = [(query, [passage for _, passage in pairs]) for query, pairs in groupby(items, key=lambda pair: pair[0])]
    requests = (engine.rerank(query=query, docs=passages, raw_scores=True) for query, passages in grouped)
    answers = await asyncio.gather(*requests)
    scores = []
    for found, _ in answers:
        scores += [one.relevance_score for one in sorted(found, key=lambda one: one.index)]
    return np.array(scores, dtype=np.float32)


class _Engines:
    """One engine at a time: it takes its batch size when it starts."""

    def __init__(self, checkpoint: str) -> None:
        self._checkpoint = checkpoint
        self._loop = asyncio.new_event_loop()
        self._engine: Any = None
        self._batch_size = 0

    def of(self, batch_size: int) -> Any:
        from infinity_emb import AsyncEmbeddingEngine, EngineArgs  # type: ignore[import-not-found]

        if batch_size != self._batch_size:
            if self._engine is not None:
                self.wait(self._engine.astop())
            arguments = EngineArgs(
                model_name_or_path=self._checkpoint,
                batch_size=batch_size,
                engine="torch",
                device="cpu",
                dtype="float32",
                model_warmup=False,
                trust_remote_code=False,
            )
            self._engine, self._batch_size = AsyncEmbeddingEngine.from_args(arguments), batch_size
            self.wait(self._engine.astart())
        return self._engine

    def wait(self, answer: Any) -> Any:
        return self._loop.run_until_complete(answer)


if __name__ == "__main__":
    serve(load=load, packages=("infinity-emb", "sentence-transformers", "transformers", "torch"))
