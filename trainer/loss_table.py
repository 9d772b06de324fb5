"""Which losses there are and what each of them needs. Free of torch, so that a flag can be checked at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from rtx.runtime.contract import Task
from rtx.runtime.errors import UsageError
from rtx.trainer.examples import Needs

Direction = Literal["query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc"]
Partition = Literal["joint", "per_direction"]
MarginStrategy = Literal["absolute", "relative"]
Similarity = Literal["dot", "cosine"]
Distance = Literal["cosine", "euclidean"]


@dataclass(frozen=True)
class LossSpec:
    """What a run has to know of a loss beside its function in rtx.trainer.losses.

    Attributes:
        needs: what a row of the data has to have.
        options: keywords of the function that are options of a run, under the same names.
        in_batch: whether other rows' documents are negatives, so that no text may occur twice in a batch.
        guided: whether a second model has to embed the texts too.
    """

    needs: Needs
    options: tuple[str, ...] = ()
    in_batch: bool = False
    guided: bool = False


LOSSES: dict[Task, dict[str, LossSpec]] = {
    "embed": {
        "info_nce": LossSpec("positives", ("scale", "directions", "partition", "false_negative_margin"), in_batch=True),
        "gist": LossSpec(
            "positives", ("scale", "directions", "guide_margin", "guide_margin_strategy"), in_batch=True, guided=True
        ),
        "cosent": LossSpec("labels", ("scale",)),
        "contrastive": LossSpec("labels", ("distance", "margin")),
        "online_contrastive": LossSpec("labels", ("distance", "margin")),
        "triplet": LossSpec("negatives", ("distance", "margin")),
        "margin_mse": LossSpec("scores", ("similarity", "scale")),
        "kl": LossSpec("scores", ("similarity", "scale", "temperature")),
    },
    "rerank": {
        "bce": LossSpec("labels", ("pos_weight",)),
        "cross_entropy": LossSpec("lists", ("scale",)),
        "listnet": LossSpec("lists"),
        "ranknet": LossSpec("lists", ("sigma",)),
        "lambda_ndcg": LossSpec("lists", ("k", "mu", "sigma")),
        "margin_mse": LossSpec("scores"),
    },
}
DEFAULT_LOSS: dict[Task, str] = {"embed": "info_nce", "rerank": "bce"}


# What data that was read for one need also has.
SUFFICES: dict[Needs, tuple[Needs, ...]] = {
    "positives": ("positives", "negatives", "scores"),
    "negatives": ("negatives", "scores"),
    "labels": ("labels",),
    "lists": ("lists",),
    "scores": ("scores",),
}
# Every keyword of a loss that is an option of a run.
LOSS_OPTIONS = frozenset(option for losses in LOSSES.values() for spec in losses.values() for option in spec.options)


def spec_of(loss: Callable[..., Any], task: Task) -> LossSpec | None:
    """What a loss needs, by the name of its function; None for a loss of the caller's own.

    Raises:
        UsageError: it is a loss of the other task.
    """
    while not hasattr(loss, "__name__"):
        inner = loss.func if isinstance(loss, functools.partial) else getattr(loss, "loss", None)
        if inner is None:
            return None
        loss = inner
    # A module there has the name of its task.
    package, _, room = loss.__module__.rpartition(".")
    if package != "rtx.trainer.losses":
        return None
    if room != task:
        raise UsageError(f"loss {loss.__name__}: is one of rtx.trainer.losses.{room}; expected one of {task}")
    return LOSSES[task].get(loss.__name__)
