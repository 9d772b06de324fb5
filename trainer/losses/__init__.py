"""Losses as pure functions with one calling form: (*outputs, targets) -> scalar.

An embedder's outputs are its vectors, `loss(queries, documents, targets)` (embed.py, and matryoshka.py around them); a
reranker's are its logits, one a document, `loss(logits, targets)` (rerank.py, and first_stage.py around them). Options
are keywords: bind them with functools.partial. All are computed in float32, under autocast too (in float64 if the
outputs are), and none knows of chunks, caches or processes: those belong to the step.

`margin_mse` here is the embedder's; the reranker's is `losses.rerank.margin_mse`.
"""

from rtx.trainer.losses import embed, rerank
from rtx.trainer.losses.embed import contrastive, cosent, gist, info_nce, kl, margin_mse, online_contrastive, triplet
from rtx.trainer.losses.matryoshka import Matryoshka, matryoshka
from rtx.trainer.losses.rerank import bce, cross_entropy, lambda_ndcg, listnet, ranknet
from rtx.trainer.losses.targets import Targets

__all__ = [
    "Matryoshka",
    "Targets",
    "bce",
    "contrastive",
    "cosent",
    "cross_entropy",
    "embed",
    "gist",
    "info_nce",
    "kl",
    "lambda_ndcg",
    "listnet",
    "margin_mse",
    "matryoshka",
    "online_contrastive",
    "ranknet",
    "rerank",
    "triplet",
]
