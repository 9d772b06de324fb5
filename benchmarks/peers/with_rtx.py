"""rtx, from a bundle that `rtx export` wrote: `fp32`, `fp32-packed`, `int8-packed`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.peers.worker import Order, Run, Source, serve
from rtx.runtime import Budget, Embedder, Reranker

if TYPE_CHECKING:
    from rtx.export.variants import VariantName

# It is told tokens, not items: the default budget of 1,024 tokens stands for batches of 8.
_TOKENS_PER_ITEM = 128


def load(source: Source, form: str, threads: int) -> Run:
    kind = Embedder if source.task == "embed" else Reranker
    opened = kind.open(source.artifact / "model.rtx", variant=form, threads=threads)
    models: dict[int, Embedder | Reranker] = {}

    def run(items: Sequence[Any], batch_size: int) -> NDArray[np.float32]:
        if batch_size not in models:
            budget = Budget(max_batch_tokens=batch_size * _TOKENS_PER_ITEM)
            models[batch_size] = kind(opened.preprocessor, opened.engine, budget=budget)
        model = models[batch_size]
        if isinstance(model, Embedder):
            return model.embed(items)
        return model.logits([(query, passage) for query, passage in items])

    return run


def prepare(source: Source, order: Order) -> Mapping[str, str]:
    from rtx.export.pipeline import ExportOptions, export_bundle

    variants = cast("tuple[VariantName, ...]", order.forms)
    # A head with random weights scores near 0, where a relative difference means little; correlations are shown.
    least = 0.5 if source.task == "rerank" else None
    options = ExportOptions(variants=variants, overwrite=True, min_cosine=least)
    outcome = export_bundle(str(source.checkpoint), source.artifact / "model.rtx", options, notify=print)
    return {name: "; ".join(verdict.failures) for name, verdict in outcome.verdicts.items() if not verdict.passed}


if __name__ == "__main__":
    serve(load=load, prepare=prepare, packages=("rtx-retrieval", "onnxruntime", "tokenizers"))
