"""The option that benchmarks of the operators have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from rtx.kernels.library import ISAS, Isa, use_isa

Command = TypeVar("Command", bound=Callable[..., Any])


def isa_option(command: Command) -> Command:
    """`--isa`: what the operators of this process use from now on, which is what the command is given."""
    kind = click.Choice(ISAS)
    return click.option("--isa", type=kind, callback=_use, help="[default: the best of this machine]")(command)


def _use(_context: click.Context, _parameter: click.Parameter, isa: Isa | None) -> Isa:
    try:
        return use_isa(isa)
    except (ValueError, FileNotFoundError) as error:
        raise click.BadParameter(str(error)) from None
