"""Images among the tokens of a text, as Qwen3-VL has them: what its two graphs take besides pixels and token ids.

An image is a grid of patches, `merge_size` by `merge_size` of which become one visual token. The vision graph takes one
image a row; the text graph takes a table of visual tokens and each token's row in it. Both need positions that follow
from the grids alone, which are computed here.

    patches        in the order of the image processor: the merge_size² patches of a visual token follow each other
    places         a learned grid of position_grid² vectors is resampled to the image's grid: four rows and weights a
                   patch (bilinear, corners on corners)
    positions      of a token in time, height and width (arXiv:2502.13923, section 2.1.2). Those of a text are equal; an
                   image's height and width count on from the token before it, and what follows goes on behind the
                   longer of its sides.

All of it is numpy, so that the runtime needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.errors import EngineError

_Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class VisualTokens:
    """How a model sees images.

    Attributes:
        image_token_id: the token that stands for a visual token among those of a text.
        merge_size: patches a side that become one visual token.
        patch_width: numbers in a flattened patch.
        position_grid: side of the learned grid of positions.
        hidden: width of a visual token.
        deepstack_layers: layers of the text model, from the first on, after which visual tokens are added once more.
    """

    image_token_id: int
    merge_size: int
    patch_width: int
    position_grid: int
    hidden: int
    deepstack_layers: int

    def __post_init__(self) -> None:
        for field in fields(self):
            least = 0 if field.name in ("image_token_id", "deepstack_layers") else 1
            if getattr(self, field.name) < least:
                raise ValueError(f"{field.name}: expected at least {least}, got {getattr(self, field.name)}")


def count_tokens(image_grid_thw: _Integers, rules: VisualTokens) -> _Integers:
    """Visual tokens [I] int64 of images with grids [I, 3]."""
    counts: _Integers = image_grid_thw.prod(axis=1) // rules.merge_size**2
    return counts


def check_images(batch: Mapping[str, NDArray[Any]], rules: VisualTokens) -> None:
    """Raise EngineError unless the images of a batch fit its placeholders, its patches and the model."""
    grids = batch.get("image_grid_thw", np.zeros((0, 3), dtype=np.int64))
    pixels = batch.get("pixel_values", np.zeros((0, rules.patch_width), dtype=np.float32))
    placeholders = int((batch["input_ids"] == rules.image_token_id).sum())
    if grids.ndim != 2 or grids.shape[1] != 3:
        raise EngineError(f"image_grid_thw: expected the shape [images, 3], got {list(grids.shape)}")
    for index, (frames, rows, columns) in enumerate(grids.tolist()):
        if frames != 1:
            raise EngineError(
                f"image_grid_thw: image {index}: expected one frame, got {frames}; video is not supported"
            )
        if min(rows, columns) < 1 or rows % rules.merge_size or columns % rules.merge_size:
            raise EngineError(
                f"image_grid_thw: image {index}: expected sides that are multiples of {rules.merge_size}, got "
                f"{rows} x {columns} patches"
            )
    expected = [int(grids.prod(axis=1).sum()), rules.patch_width]
    if list(pixels.shape) != expected:
        raise EngineError(f"pixel_values: expected the shape {expected} by image_grid_thw, got {list(pixels.shape)}")
    visual = int(count_tokens(grids, rules).sum())
    if placeholders != visual:
        raise EngineError(
            f"input_ids: expected {visual} times the image token {rules.image_token_id} by image_grid_thw, "
            f"got {placeholders}"
        )


def vision_inputs(
    pixel_values: NDArray[np.float32], image_grid_thw: _Integers, rules: VisualTokens
) -> dict[str, NDArray[Any]]:
    """What the vision graph takes: one image a row, padded to the largest with zeros.

    Args:
        pixel_values: [patches of all images, patch_width] float32.
        image_grid_thw: [I, 3] int64, one frame each; at least one image.
        rules: of the model.

    Returns:
        pixel_values [I, P, patch_width] float32, interp_indices [I, P, 4] int64, interp_weights [I, P, 4] float32,
        pos_hw [I, P, 2] int64 and patch_mask [I, P] int64; P is the number of patches of the largest image.
    """
    counts = image_grid_thw.prod(axis=1)
    shape = len(counts), int(counts.max())
    inputs: dict[str, NDArray[Any]] = {
        "pixel_values": np.zeros((*shape, rules.patch_width), dtype=np.float32),
        "interp_indices": np.zeros((*shape, 4), dtype=np.int64),
        "interp_weights": np.zeros((*shape, 4), dtype=np.float32),
        "pos_hw": np.zeros((*shape, 2), dtype=np.int64),
        "patch_mask": np.zeros(shape, dtype=np.int64),
    }
    start = 0
    for image, ((_, rows, columns), count) in enumerate(zip(image_grid_thw.tolist(), counts.tolist(), strict=True)):
        places = patch_places(rows, columns, rules.merge_size)
        indices, weights = interpolation(places, (rows, columns), rules.position_grid)
        inputs["pixel_values"][image, :count] = pixel_values[start : start + count]
        inputs["interp_indices"][image, :count] = indices
        inputs["interp_weights"][image, :count] = weights
        inputs["pos_hw"][image, :count] = places
        inputs["patch_mask"][image, :count] = 1
        start += count
    return inputs


def patch_places(rows: int, columns: int, merge_size: int) -> _Integers:
    """Row and column [rows * columns, 2] int64 of each patch, in the order of the image processor."""
    blocks = np.indices((rows, columns)).reshape(2, rows // merge_size, merge_size, columns // merge_size, merge_size)
    return blocks.transpose(1, 3, 2, 4, 0).reshape(rows * columns, 2)


def interpolation(
    places: _Integers, size: tuple[int, int], position_grid: int
) -> tuple[_Integers, NDArray[np.float32]]:
    """Where patches lie in the learned grid: the four positions around each and their bilinear weights.

    Args:
        places: [patches, 2], row and column of each patch.
        size: rows and columns of the image.
        position_grid: side of the learned grid.

    Returns:
        [patches, 4] int64 rows of the flattened grid, and [patches, 4] float32 weights.
    """
    # In float32 and in this order of operations, as PyTorch does it: the weights are then the same to the last bit.
    intervals = np.maximum(np.asarray(size) - 1, 1).astype(np.float32)
    exact = places.astype(np.float32) * np.float32(position_grid - 1) / intervals
    low = np.floor(exact)
    corners = low[..., np.newaxis] + np.array([0, 1], dtype=np.float32)  # [patches, 2 axes, 2 corners]
    weights = np.float32(1) - np.abs(exact[..., np.newaxis] - corners)
    indices = np.minimum(corners, position_grid - 1).astype(np.int64)
    height, width = (indices[:, 0, :, np.newaxis], indices[:, 1, np.newaxis, :])
    product = weights[:, 0, :, np.newaxis] * weights[:, 1, np.newaxis, :]
    return (height * position_grid + width).reshape(-1, 4), product.reshape(-1, 4)


def text_inputs(
    input_ids: _Integers,
    attention_mask: _Integers,
    image_grid_thw: _Integers | None,
    rules: VisualTokens,
    *,
    first_rows: _Integers | None = None,
) -> dict[str, NDArray[Any]]:
    """What the text graph takes besides token ids: positions, and where the visual tokens are.

    Args:
        input_ids: [B, T] int64, with a placeholder for each visual token.
        attention_mask: [B, T] int64, 1 for a token and 0 for padding, on either side.
        image_grid_thw: [I, 3] int64, the images of all rows in order; None for no images.
        rules: of the model.
        first_rows: [I] int64, where in the table of visual tokens each image begins; None for one after the other.

    Returns:
        position_ids [3, B, T] int64 (time, height, width; 0 at padding) and visual_index [B, T] int64 (j for the visual
        token in row j - 1 of the table, 0 for a token of text).

    Raises:
        EngineError: an image's placeholders are split, or run over the end of a row.
    """
    position_ids = np.zeros((3, *input_ids.shape), dtype=np.int64)
    visual_index = np.zeros(input_ids.shape, dtype=np.int64)
    grids = np.zeros((0, 3), dtype=np.int64) if image_grid_thw is None else image_grid_thw
    counts = count_tokens(grids, rules)
    if first_rows is None:
        first_rows = np.concatenate([[0], counts.cumsum()[:-1]]).astype(np.int64)
    image = 0
    for row in range(len(input_ids)):
        columns = np.flatnonzero(attention_mask[row])
        visual = input_ids[row, columns] == rules.image_token_id
        positions = np.tile(np.arange(len(columns), dtype=np.int64), (3, 1))
        index = np.zeros(len(columns), dtype=np.int64)
        start = 0
        while visual[start:].any():
            start += int(visual[start:].argmax())
            count = int(counts[image]) if image < len(counts) else 0
            if not count or not visual[start : start + count].sum() == count:
                raise EngineError(f"input_ids: row {row}: the image tokens do not fit image_grid_thw")
            height, width = (int(side) // rules.merge_size for side in grids[image, 1:])
            stop = start + count
            first = positions[0, start]
            places = patch_places(height, width, 1)
            positions[0, start:stop] = first
            positions[1:, start:stop] = first + places.T
            positions[:, stop:] += max(height, width) - count
            index[start:stop] = first_rows[image] + 1 + np.arange(count)
            image, start = image + 1, stop
        position_ids[:, row, columns] = positions
        visual_index[row, columns] = index
    return {"position_ids": position_ids, "visual_index": visual_index}
