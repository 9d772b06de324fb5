"""vLLM's engine, in half precision on a GPU. It puts batches together itself, so that no batch size is told to it.

Nobody has run it here: there is no GPU, and it asks for a PyTorch of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
# In this process, which is what ends with the driver.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.peers.worker import Run, Source, serve

# It takes nine tenths of a GPU by default, and the others have to be beside it.
_PART_OF_MEMORY = 0.3


def load(source: Source, _form: str, _threads: int) -> Run:
    from vllm import LLM, PoolingParams  # type: ignore[import-not-found]

    engine = LLM(
        model=str(source.checkpoint),
        runner="pooling",
        dtype="float16",
        gpu_memory_utilization=_PART_OF_MEMORY,
        # The same texts come in every round.
        enable_prefix_caching=False,
    )

    def embed(items: Sequence[Any], _batch_size: int) -> NDArray[np.float32]:
        found = engine.embed(list(items), use_tqdm=False)
        return np.array([one.outputs.embedding for one in found], dtype=np.float32)

    def score(items: Sequence[Any], _batch_size: int) -> NDArray[np.float32]:
        queries, passages = ([pair[side] for pair in items] for side in range(2))
        logits = PoolingParams(use_activation=False)
        found = engine.score(queries, passages, pooling_params=logits, use_tqdm=False)
        return np.array([one.outputs.score for one in found], dtype=np.float32)

    return embed if source.task == "embed" else score


if __name__ == "__main__":
    serve(load=load, packages=("vllm", "transformers", "torch"))
