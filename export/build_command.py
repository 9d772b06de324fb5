"""`rtx build`: TensorRT engines for a bundle that is there."""

from __future__ import annotations

from pathlib import Path

import click

from rtx.export.build import build_for
from rtx.export.engines import BUILDABLE, EngineOptions, describe_engine
from rtx.export.options import capabilities_option, lengths_option
from rtx.export.tensorrt import TARGETS
from rtx.runtime.manifest import Target


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    required=True,
    help="tensorrt-rtx ahead of time, without a GPU; tensorrt for the GPU of this machine.",
)
@capabilities_option
@lengths_option("those of the engines that are there, or else spread over the model's limit")
@click.option("--variant", "variants", multiple=True, help=f"Of {', '.join(BUILDABLE)}; default: all that are there.")
def build(
    bundle: Path, target: Target, capabilities: tuple[int, ...], lengths: tuple[int, ...], variants: tuple[str, ...]
) -> None:
    """Build TensorRT engines of a bundle's graphs, and put them into it.

    Neither the checkpoint nor PyTorch is needed. The graphs are those that passed the gate; engines that the bundle has
    of them with the same TensorRT are replaced.
    """
    options = EngineOptions(target=target, capabilities=capabilities, lengths=lengths)
    built = build_for(bundle, options, variants, notify=lambda message: click.echo(f"· {message}", err=True))
    for file, engine in built.items():
        click.echo(f"{file}: {describe_engine(engine)}, {(bundle / file).stat().st_size / 1e6:,.1f} MB")
    click.echo(f"wrote {bundle}  (next: rtx doctor {bundle} --device tensorrt, and rtx verify)")
