"""`rtx compose`: a text embedder and a vision transformer as one checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import click

from rtx.runtime.contract import Pooling
from rtx.runtime.errors import ArtifactError, UsageError
from rtx.runtime.lazy import naming_the_extra


class _ImageSize(click.ParamType[tuple[int, int]]):
    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", str(value))
        if match is None:
            self.fail(f"expected height x width in pixels, such as 448x336; got {value!r}", param, ctx)
        return int(match[1]), int(match[2])


@click.command()
@click.option("--text", required=True, metavar="CHECKPOINT", help="Embedder of texts.")
@click.option("--image", required=True, metavar="CHECKPOINT", help="Vision transformer, such as DINOv2.")
@click.option("--output", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--pooling",
    type=click.Choice(["cls", "mean"]),
    help="Over the tokens of an image.  [default: the image checkpoint's own, or cls]",
)
@click.option(
    "--image-size",
    type=_ImageSize(),
    help="Resize every image to these pixels, multiples of a patch.  [default: as the image checkpoint does]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the projection, which starts at random.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint in the output folder.")
def compose(
    text: str,
    image: str,
    output: Path,
    pooling: str | None,
    image_size: tuple[int, int] | None,
    seed: int,
    overwrite: bool,
) -> None:
    """Put a vision transformer beside a text embedder: a checkpoint for texts and images, to be trained.

    Texts keep their vectors. Those of images come out of a projection that starts at random: they mean nothing until
    rtx finetune has seen pairs of texts and images.

    \b
    rtx compose --text all-MiniLM-L6-v2/ --image dinov2-small/ --image-size 448x336 --output pages/
    """
    if output.exists() and not overwrite and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output}: exists; pass --overwrite to replace it")
    folder = output.resolve()
    for source in (text, image):
        if folder in (Path(source).resolve(), *Path(source).resolve().parents):
            raise UsageError(f"{output}: holds {source}, which is to be read; choose another output")
    with naming_the_extra("train", "rtx compose"):
        from safetensors import SafetensorError

        from rtx.trainer.compose import compose as put_together

    model = put_together(text, image, pooling=cast(Pooling | None, pooling), image_size=image_size, seed=seed)
    try:
        model.save(output)
    except (OSError, SafetensorError) as broken:
        raise ArtifactError(f"{output}: cannot be written: {broken}") from broken
    parameters = sum(parameter.numel() for parameter in model.parameters())
    click.echo(f"{output}: {model.contract.dimension} dimensions, {parameters / 1e6:,.1f} million parameters")
