"""The model of a command, and where it runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TypeVar

import click

from rtx.runtime.cli import open_model
from rtx.runtime.engine import Budget
from rtx.runtime.manifest import MANIFEST_FILE
from rtx.runtime.session import Session

S = TypeVar("S", bound=Session)


device_option = click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="cuda or cuda:N for an NVIDIA GPU; tensorrt or tensorrt:N for the bundle's engines on one.",
)


batch_option = click.option(
    "--max-batch-tokens",
    type=click.IntRange(min=1),
    help=f"[default: {Budget.of('cpu').max_batch_tokens}, on a GPU {Budget.of('cuda').max_batch_tokens}]",
)


def budget_of(device: str, max_batch_tokens: int | None) -> Budget:
    """What goes through an engine at once, where a user gave `--max-batch-tokens` and where not.

    Raises:
        UsageError: there is no such kind of device.
    """
    budget = Budget.of(device)
    return budget if max_batch_tokens is None else dataclasses.replace(budget, max_batch_tokens=max_batch_tokens)


def open_as(kind: type[S], path: str, *, variant: str | None, threads: int | None, device: str, budget: Budget) -> S:
    """A bundle on its engine, or a checkpoint on PyTorch.

    Raises:
        UsageError: it is of the other task, or a variant or device is named of what is no bundle.
        BundleError, CheckpointError, MissingExtraError, EngineError: as for `open_model`.
    """
    if (Path(path) / MANIFEST_FILE).exists():
        return kind.open(path, variant=variant, threads=threads, device=device, budget=budget)
    opened = open_model(path, variant=variant, threads=threads, device=device)
    try:
        return kind(opened.preprocessor, opened.engine, budget=budget)
    except BaseException:
        opened.close()
        raise
