"""`rtx build`: what servers on GPUs need of a bundle that is there."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from rtx.export.build import build_for
from rtx.export.engines import EngineOptions, describe_engine
from rtx.export.options import capabilities_option, lengths_option, triton_option
from rtx.export.tensorrt import TARGETS
from rtx.export.triton import check_repository, write_repository
from rtx.runtime.bundle import Bundle
from rtx.runtime.errors import UsageError
from rtx.runtime.manifest import BUILDABLE, Target


@click.command()
@click.argument("path", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    help="Build engines and put them into the bundle: tensorrt-rtx ahead of time, without a GPU; tensorrt for the GPU "
    "of this machine.",
)
@capabilities_option
@lengths_option("those of the engines that are there, or else spread over the model's limit")
@click.option(
    "--variant",
    "variants",
    multiple=True,
    help=f"Whose engines, of {', '.join(BUILDABLE)}, and whose graph Triton serves; default: all that are there, and "
    "what --triton-repo of rtx export takes.",
)
@triton_option
@click.option("--overwrite", is_flag=True, help="Replace models that are there in --triton-repo.")
def build(
    path: Path,
    target: Target | None,
    capabilities: tuple[int, ...],
    lengths: tuple[int, ...],
    variants: tuple[str, ...],
    triton_repo: Path | None,
    overwrite: bool,
) -> None:
    """Build TensorRT engines of a bundle's graphs, or write models for Triton Inference Server of it.

    Neither the checkpoint nor PyTorch is needed. The graphs are those that passed the gate; engines that the bundle has
    of them with the same TensorRT are replaced.
    """
    if target is None and triton_repo is None:
        raise UsageError("expected --target, --triton-repo, or both")
    if target is None and (capabilities or lengths):
        raise UsageError("--sm and --lengths: are of engines, which --target asks for")
    if triton_repo is None and overwrite:
        raise UsageError("--overwrite: is of models in --triton-repo; engines are replaced as it is")
    if triton_repo is not None and len(variants) > 1:
        raise UsageError(f"--variant: Triton serves one, got {', '.join(variants)}")
    bundle = Bundle.open(path)
    if triton_repo is not None:
        check_repository(triton_repo, bundle.manifest.name, overwrite=overwrite)
    if target is not None:
        options = EngineOptions(target=target, capabilities=capabilities, lengths=lengths)
        built = build_for(path, options, variants, notify=lambda message: click.echo(f"· {message}", err=True))
        bundle = Bundle.open(path)
        for file, engine in built.items():
            click.echo(f"{file}: {describe_engine(engine)}, {bundle.manifest.files[file].bytes / 1e6:,.1f} MB")
        click.echo(f"wrote {path}  (next, where it runs: rtx verify {shlex.quote(str(path))} --device tensorrt)")
    if triton_repo is not None:
        served = variants[0] if variants else None
        names = write_repository(bundle, triton_repo, variant=served, overwrite=overwrite)
        click.echo(f"wrote {triton_repo}: the models {', '.join(names)}")
