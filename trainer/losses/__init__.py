"""Losses as pure functions with one calling form: (*outputs, targets) -> scalar.

An embedder's outputs are its vectors, `loss(queries, documents, targets)`; a reranker's are its logits, one a document,
`loss(logits, targets)`. Options are keywords: bind them with functools.partial. All are computed in float32, under
autocast too (in float64 if the outputs are), and none knows of chunks, caches or processes: those belong to the step.
"""

from rtx.trainer.losses.embed import info_nce
from rtx.trainer.losses.rerank import bce
from rtx.trainer.losses.targets import Targets

__all__ = ["Targets", "bce", "info_nce"]
