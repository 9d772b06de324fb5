"""FastEmbed, with the graphs that sentence-transformers exports: `onnx` in fp32, and `onnx-int8` as it quantises it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.peers.worker import Run, Source, serve, width_of

FILES = {"onnx": "onnx/model.onnx", "onnx-int8": "onnx/model_int8.onnx"}
_NAME = "peers/model"


def load(source: Source, form: str, threads: int) -> Run:
    from fastembed.common.model_description import ModelSource  # type: ignore[import-not-found]

    # Nothing is fetched: the folder is given below.
    origin = ModelSource(hf=_NAME)
    place: dict[str, Any] = {"specific_model_path": str(source.artifact), "threads": threads}
    if source.task == "embed":
        from fastembed import TextEmbedding  # type: ignore[import-not-found]
        from fastembed.common.model_description import PoolingType

        TextEmbedding.add_custom_model(
            _NAME,
            pooling=PoolingType.MEAN,
            normalization=True,
            sources=origin,
            dim=width_of(source.checkpoint),
            model_file=FILES[form],
        )
        embedding = TextEmbedding(_NAME, **place)

        def embed(items: Sequence[Any], batch_size: int) -> NDArray[np.float32]:
            return np.stack(list(embedding.embed(items, batch_size=batch_size)))

        return embed
    from fastembed.rerank.cross_encoder import TextCrossEncoder  # type: ignore[import-not-found]

    TextCrossEncoder.add_custom_model(_NAME, sources=origin, model_file=FILES[form])
    encoder = TextCrossEncoder(_NAME, **place)

    def score(items: Sequence[Any], batch_size: int) -> NDArray[np.float32]:
        pairs = [(query, passage) for query, passage in items]
        return np.fromiter(encoder.rerank_pairs(pairs, batch_size=batch_size), dtype=np.float32)

    return score


if __name__ == "__main__":
    serve(load=load, packages=("fastembed", "onnxruntime", "tokenizers"))
