"""rtx, from a bundle that `rtx export` wrote: `fp32`, `fp32-packed`, `int8-packed`, `fp16@cuda`, `fp16@tensorrt`."""

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
    from rtx.export.engines import EngineOptions
    from rtx.export.variants import VariantName

# It is told tokens, not items: the default budget of 1,024 tokens stands for batches of 8.
_TOKENS_PER_ITEM = 128


def load(source: Source, form: str, threads: int) -> Run:
    kind = Embedder if source.task == "embed" else Reranker
    variant, _, device = form.partition("@")
    opened = kind.open(source.artifact / "model.rtx", variant=variant, threads=threads, device=device or "cpu")
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

    named = dict.fromkeys(form.partition("@")[0] for form in order.forms)
    variants = cast("tuple[VariantName, ...]", tuple(named))
    engines = any(form.endswith("@tensorrt") for form in order.forms)
    # A head with random weights scores near 0, where a relative difference means little; correlations are shown.
    least = 0.5 if source.task == "rerank" else None
    options = ExportOptions(
        variants=variants, overwrite=True, min_cosine=least, engines=engines_here() if engines else None
    )
    outcome = export_bundle(str(source.checkpoint), source.artifact / "model.rtx", options, notify=print)
    failed = {name: "; ".join(verdict.failures) for name, verdict in outcome.verdicts.items() if not verdict.passed}
    return {form: failed[variant] for form in order.forms if (variant := form.partition("@")[0]) in failed}


def engines_here() -> EngineOptions:
    """Engines for the first GPU: of TensorRT-RTX, or of TensorRT where that one does not build for it."""
    from rtx.export.engines import EngineOptions
    from rtx.export.tensorrt import capability_names, load_tensorrt
    from rtx.runtime.gpu import find_gpu

    capability = find_gpu(0).capability
    if capability in capability_names(load_tensorrt("tensorrt-rtx")):
        return EngineOptions(target="tensorrt-rtx", capabilities=(capability,))
    return EngineOptions(target="tensorrt")


if __name__ == "__main__":
    serve(load=load, prepare=prepare, packages=("rtx-retrieval", "onnxruntime", "tokenizers"))
