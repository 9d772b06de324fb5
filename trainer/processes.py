"""Several processes that train one model: what each of them gives is joined, so that a loss sees the whole batch."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from torch import Tensor

from rtx.trainer.losses.targets import Targets
from rtx.trainer.sharding import check_launcher

# How long the other processes wait while the main one evaluates.
_TIMEOUT_S = 24 * 3600


def join_processes() -> None:
    """Meet the processes that a launcher started with this one, if one did. Once they have met, this does nothing.

    Raises:
        UsageError: the launcher was told to do what cannot be done.
    """
    check_launcher(os.environ)
    accelerate.PartialState(cpu=torch.cuda.device_count() == 0, timeout=timedelta(seconds=_TIMEOUT_S))


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and speaks to the user."""
    return world_size() == 1 or dist.get_rank() == 0


def from_main(value: Any) -> Any:
    """What the main process has for `value`, in all of them. Anything that can be pickled."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """The value of each process, in the order of their ranks, in all of them."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def gather(rows: Tensor) -> Tensor:
    """Join the rows of all processes, with gradient.

    Every process then computes the same loss of the joined rows. The gradient of a process's own rows is multiplied by
    the number of processes, because DistributedDataParallel averages over them: what comes out is the gradient of one
    process that had all rows.

    Args:
        rows: [rows of this process, ...]; the processes may have different numbers of rows.

    Returns:
        [rows of all processes, ...], in the order of their ranks.
    """
    if world_size() == 1:
        return rows
    joined: Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
    return joined


def gather_targets(targets: Targets) -> Targets:
    """Targets of the joined batch: the queries of a process are counted on from those of the ranks before it."""
    if world_size() == 1:
        return targets
    queries = _counts(int(targets.owner[-1]) + 1, targets.owner.device)
    offset = sum(queries[: dist.get_rank()])
    guide = targets.guide
    return Targets(
        owner=gather(targets.owner + offset),
        labels=gather(targets.labels),
        guide=None if guide is None else (gather(guide[0]), gather(guide[1])),
        first_stage=None if targets.first_stage is None else gather(targets.first_stage),
    )


def _counts(own: int, device: torch.device) -> list[int]:
    found = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(found, torch.tensor([own], device=device))
    return [int(count) for count in found]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        counts = _counts(len(rows), rows.device)
        ctx.first, ctx.count = sum(counts[: dist.get_rank()]), len(rows)
        # The collective takes equal shapes only.
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient[ctx.first : ctx.first + ctx.count] * world_size()
