"""Options that commands of this room have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def _numbers(_context: click.Context, _parameter: click.Parameter, given: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in (given or "").split(",") if number.strip())
    except ValueError:
        raise click.BadParameter(f"expected whole numbers with commas between them, got '{given}'") from None


capabilities_option = click.option(
    "--sm",
    "capabilities",
    callback=_numbers,
    help="For tensorrt-rtx: compute capabilities to build for, as 80,86,89,120.",
)


triton_option = click.option(
    "--triton-repo",
    type=click.Path(path_type=Path),
    help="Also write models for Triton Inference Server into this model repository.",
)


def lengths_option(default: str) -> Callable[[F], F]:
    """`--lengths`, with what they are without it."""
    return click.option(
        "--lengths",
        callback=_numbers,
        help="Ends of the buckets of lengths that engines are tuned for, in tokens, as 32,128,512; default: "
        f"{default}.",
    )
