"""A text embedder and a vision transformer put together: a model with a tower for each (a Router), to be aligned by
training. A projection that starts at random brings images to the width of the text vectors.

    texts    the text embedder, as it is
    images   vision transformer -> pooling -> projection -> normalised, if the text vectors are
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, get_args

import torch

from rtx.runtime.contract import Pooling
from rtx.runtime.errors import CheckpointError, UsageError
from rtx.trainer.backbone import Source
from rtx.trainer.checkpoint import read_image_tower
from rtx.trainer.head import make_dense, normalizes
from rtx.trainer.image_processing import ImageProcessing
from rtx.trainer.image_tower import ImageEncoder, load_image_tower
from rtx.trainer.layout import DenseConfig, HeadModule, ImageTower, NormalizeConfig
from rtx.trainer.model import RetrievalModel
from rtx.trainer.pooling import Normalize

_IDENTITY = "torch.nn.modules.linear.Identity"
# What a vision transformer that says nothing is pooled by: the token that it was trained to gather the image in.
_POOLING: Pooling = "cls"


def compose(
    text: str | os.PathLike[str],
    image: str | os.PathLike[str],
    *,
    pooling: Pooling | None = None,
    image_size: tuple[int, int] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> RetrievalModel:
    """Put a vision transformer beside a text embedder.

    Args:
        text: checkpoint of an embedder of texts; a folder, or a name on the Hugging Face hub.
        image: a vision transformer such as DINOv2, bare or with Sentence Transformers' modules.
        pooling: over the tokens of an image; None for the image checkpoint's own, and "cls" if it has none.
        image_size: (height, width) in pixels that every image is resized to, whatever its aspect ratio; None for what
            the image checkpoint's processor does.
        seed: of the projection. Where the image checkpoint ends in a Dense module of the right width there is none.
        dtype: of both transformers.
        trust_remote_code: run Python code that the checkpoints bring.

    Returns:
        The model, in evaluation mode. Its texts have the vectors that they had.

    Raises:
        CheckpointError: one of the checkpoints is missing, damaged or not supported.
        UsageError: `text` is no embedder of texts alone, or the vision transformer takes no images of that size.
    """
    base = RetrievalModel.load(text, dtype=dtype, trust_remote_code=trust_remote_code)
    if base.task != "embed" or base.contract.takes_images:
        found = "it takes images already" if base.task == "embed" else "it is a reranker"
        raise UsageError(f"{text}: expected an embedder of texts; {found}")
    source = Source.open(os.fspath(image))
    described = read_image_tower(source.folder)
    modes = (pooling,) if pooling is not None else described.pooling or (_POOLING,)
    if unknown := [mode for mode in modes if mode not in get_args(Pooling)]:
        raise UsageError(f"pooling: expected one of {', '.join(get_args(Pooling))}; got {unknown[0]}")
    described = dataclasses.replace(described, pooling=modes, head=_without_end(described))
    tower = load_image_tower(source, described, dtype=dtype, trust_remote_code=trust_remote_code)
    _check_patches(tower, image_size)
    images = ImageProcessing.load(source, described.folder, {}, settings=_exact(image_size))
    if images.rules.layout != "pixels":
        raise CheckpointError(f"{image}: its image processor cuts patches; expected one that gives pixels")
    tower = _projected(tower, base.full_dimension, seed=seed, normalized=normalizes(base.layout))
    model = RetrievalModel(
        base.backbone,
        base.tokenizer,
        list(base.head),
        layout=dataclasses.replace(base.layout, image_tower=tower.layout),
        images=images,
        image_tower=tower,
        source=f"{text} and {image}",
    )
    model.check_image_size()
    return model.eval()


def _without_end(described: ImageTower) -> tuple[HeadModule, ...]:
    """The head as far as its last Dense module: whether vectors are normalised is for the text side to say."""
    dense = [place for place, module in enumerate(described.head) if isinstance(module.config, DenseConfig)]
    return described.head[: dense[-1] + 1] if dense else ()


def _exact(image_size: tuple[int, int] | None) -> dict[str, Any]:
    """Settings of an image processor."""
    if image_size is None:
        return {}
    height, width = image_size
    return {"size": {"height": height, "width": width}, "do_center_crop": False}


def _check_patches(tower: ImageEncoder, image_size: tuple[int, int] | None) -> None:
    patch = getattr(tower.backbone.config, "patch_size", None)
    if image_size is None or not isinstance(patch, int):
        return
    if min(image_size) < 1 or any(side % patch for side in image_size):
        raise UsageError(
            f"image_size: expected multiples of {patch}, the side of a patch; got {image_size[0]} × {image_size[1]}"
        )


def _projected(tower: ImageEncoder, width: int, *, seed: int, normalized: bool) -> ImageEncoder:
    """The tower with what brings its vectors to a width, and to length 1."""
    head, modules = list(tower.layout.head), list(tower.head)
    if not head or tower.dimension != width:
        # No bias and no activation: what makes two spaces one is a linear map.
        config = DenseConfig(in_features=tower.dimension, out_features=width, bias=False, activation_function=_IDENTITY)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            modules.append(make_dense(config, "projection"))
        head.append(HeadModule(config=config))
    if normalized:
        head.append(HeadModule(config=NormalizeConfig()))
        modules.append(Normalize())
    return ImageEncoder(tower.backbone, modules, dataclasses.replace(tower.layout, head=tuple(head)))
