"""What the graphs of a vision-language model take, against what transformers computes inside its model."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from transformers import vision_utils

from rtx.runtime.errors import BundleError, EngineError
from rtx.runtime.schema import parse
from rtx.runtime.visual_tokens import (
    VisualTokens,
    check_images,
    count_tokens,
    interpolation,
    patch_places,
    text_inputs,
    vision_inputs,
)

IMAGE, TEXT, PAD = 7, 3, 0
RULES = VisualTokens(image_token_id=IMAGE, merge_size=2, patch_width=12, position_grid=5, hidden=8, deepstack_layers=2)
SIZES = [(2, 2), (2, 4), (6, 4), (4, 10), (12, 2), (8, 8)]


def grids(*sizes):
    return np.array([(1, *size) for size in sizes], dtype=np.int64).reshape(-1, 3)


def tokens(*parts):
    """Token ids: a number is so many tokens of text, a pair the placeholders of an image with that grid."""
    ids = []
    for part in parts:
        ids += [TEXT] * part if isinstance(part, int) else [IMAGE] * (part[0] * part[1] // 4)
    return ids


def padded(*rows, side="right"):
    longest = max(map(len, rows))
    ids, mask = np.full((len(rows), longest), PAD), np.zeros((len(rows), longest), dtype=np.int64)
    for number, row in enumerate(rows):
        place = slice(len(row)) if side == "right" else slice(longest - len(row), None)
        ids[number, place], mask[number, place] = row, 1
    return ids, mask


def rope_index(ids, mask, image_grids):
    """As transformers has it; only what the method reads is there of the model."""
    config = transformers.Qwen3VLConfig(image_token_id=IMAGE)
    model = transformers.Qwen3VLModel.__new__(transformers.Qwen3VLModel)
    torch.nn.Module.__init__(model)
    model.config = config
    found, _ = model.get_rope_index(
        torch.from_numpy(ids),
        torch.from_numpy((ids == IMAGE).astype(np.int32)),
        image_grid_thw=torch.from_numpy(image_grids),
        attention_mask=torch.from_numpy(mask),
    )
    return found.numpy()


@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_of_tokens_are_those_of_transformers(side):
    rows = [
        tokens(2, (4, 10), 3),
        tokens(1, (12, 2), 1, (2, 4), 1, (8, 8), 2),
        tokens(4),
        tokens((6, 4)),
        tokens(3, (2, 2)),
    ]
    ids, mask = padded(*rows, side=side)
    image_grids = grids((4, 10), (12, 2), (2, 4), (8, 8), (6, 4), (2, 2))
    found = text_inputs(ids, mask, image_grids, RULES)
    assert found["position_ids"].dtype == np.int64
    assert np.array_equal(found["position_ids"], rope_index(ids, mask, image_grids))


def test_positions_by_hand():
    """Two tokens, an image of two rows and three columns of tokens, two tokens."""
    ids, mask = padded(tokens(2, (4, 6), 2))
    found = text_inputs(ids, mask, grids((4, 6)), RULES)["position_ids"][:, 0].tolist()
    assert found == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_images_that_touch_are_told_apart_by_their_grids():
    """transformers would take the two for one, and fail."""
    ids, mask = padded(tokens((2, 4), (4, 2), 1))
    found = text_inputs(ids, mask, grids((2, 4), (4, 2)), RULES)["position_ids"][:, 0].tolist()
    assert found == [[0, 0, 2, 2, 4], [0, 0, 2, 3, 4], [0, 1, 2, 2, 4]]


def test_visual_tokens_are_numbered_in_the_order_of_the_rows():
    ids, mask = padded(tokens(1, (2, 4), 1), tokens(3), tokens((2, 2), 1, (2, 6)), side="left")
    image_grids = grids((2, 4), (2, 2), (2, 6))
    found = text_inputs(ids, mask, image_grids, RULES)["visual_index"]
    assert found.tolist() == [[0, 0, 1, 2, 0], [0, 0, 0, 0, 0], [3, 0, 4, 5, 6]]
    # A table in which the first image and the last, say, share rows with others.
    shared = text_inputs(ids, mask, image_grids, RULES, first_rows=np.array([7, 0, 6]))["visual_index"]
    assert shared.tolist() == [[0, 0, 8, 9, 0], [0, 0, 0, 0, 0], [1, 0, 7, 8, 9]]


def test_texts_have_plain_positions_and_no_visual_tokens():
    ids, mask = padded(tokens(4), tokens(2), side="left")
    found = text_inputs(ids, mask, None, RULES)
    assert found["position_ids"].tolist() == [[[0, 1, 2, 3], [0, 0, 0, 1]]] * 3
    assert not found["visual_index"].any()


@pytest.mark.parametrize("rows", [[tokens((2, 4), 1)], [tokens((2, 2), 1, (2, 2))], [tokens((2, 2)), tokens((2, 4))]])
def test_placeholders_that_do_not_fit_the_grids_name_the_row(rows):
    ids, mask = padded(*rows)
    with pytest.raises(EngineError, match=rf"^input_ids: row {len(rows) - 1}: the image tokens do not fit image_grid"):
        text_inputs(ids, mask, grids((2, 2)) if len(rows) > 1 else grids((2, 6)), RULES)


@pytest.mark.parametrize("side", [2, 5, 48])
def test_places_in_the_learned_grid_are_those_of_transformers(side):
    indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        torch.from_numpy(grids(*SIZES)), side, align_corners=True, spatial_merge_size=2
    )
    found = [interpolation(patch_places(*size, 2), size, side) for size in SIZES]
    assert np.array_equal(np.concatenate([index for index, _ in found]), indices.numpy())
    # To the last bit.
    assert np.array_equal(np.concatenate([weight for _, weight in found]), weights.numpy())
    assert found[0][1].dtype == np.float32


def test_interpolation_is_that_of_pytorch_itself():
    """The weighted rows are what resampling the grid gives, with corners on corners."""
    grid = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    for size in [(2, 4), (12, 2), (8, 8), (1, 7)]:
        resampled = torch.nn.functional.interpolate(grid, size=size, mode="bilinear", align_corners=True)
        indices, weights = interpolation(patch_places(*size, 1), size, 5)
        rows = grid[0].reshape(3, 25).T.numpy()[indices]
        found = (rows * weights[..., np.newaxis]).sum(axis=1)
        # It multiplies by a rounded interval where transformers divides: a position of up to 4 is off by some 2**-22.
        assert np.allclose(found, resampled[0].reshape(3, -1).T.numpy(), rtol=0, atol=5e-6)


def test_patches_of_a_visual_token_follow_each_other():
    expected = vision_utils.get_vision_position_ids(torch.from_numpy(grids(*SIZES)), 2).numpy()
    assert np.array_equal(np.concatenate([patch_places(*size, 2) for size in SIZES]), expected)
    assert patch_places(2, 4, 2).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]


def test_vision_inputs_hold_one_image_a_row_and_zeros_behind_it():
    image_grids = grids((2, 2), (4, 2))
    pixels = np.random.default_rng(0).normal(size=(12, RULES.patch_width)).astype(np.float32)
    found = vision_inputs(pixels, image_grids, RULES)
    shapes = {name: (array.shape, array.dtype) for name, array in found.items()}
    assert shapes == {
        "pixel_values": ((2, 8, 12), np.float32),
        "interp_indices": ((2, 8, 4), np.int64),
        "interp_weights": ((2, 8, 4), np.float32),
        "pos_hw": ((2, 8, 2), np.int64),
        "patch_mask": ((2, 8), np.int64),
    }
    assert found["patch_mask"].tolist() == [[1] * 4 + [0] * 4, [1] * 8]
    assert np.array_equal(found["pixel_values"][0, :4], pixels[:4])
    assert np.array_equal(found["pixel_values"][1], pixels[4:])
    assert np.array_equal(found["pos_hw"][1], patch_places(4, 2, 2))
    for name, array in found.items():
        assert not array[0, 4:].any(), name
    alone = vision_inputs(pixels[4:], image_grids[1:], RULES)
    assert all(np.array_equal(alone[name][0], found[name][1]) for name in found)


def test_tokens_are_counted_by_the_grid():
    assert count_tokens(grids((2, 2), (4, 10)), RULES).tolist() == [1, 10]


def batch_of(*sizes):
    image_grids = grids(*sizes)
    ids, mask = padded(tokens(2, *sizes, 1))
    pixels = np.zeros((int(image_grids.prod(axis=1).sum()), RULES.patch_width), dtype=np.float32)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_grid_thw": image_grids}


def test_images_are_checked_against_the_batch():
    check_images(batch_of((2, 4), (4, 4)), RULES)
    check_images({"input_ids": np.array([[TEXT]])}, RULES)
    good = batch_of((2, 4))
    for change, message in (
        (
            {"image_grid_thw": np.array([[2, 2, 4]])},
            r"image_grid_thw: image 0: expected one frame, got 2; video is not",
        ),
        ({"image_grid_thw": np.array([[1, 2, 3]])}, r"image 0: expected sides that are multiples of 2, got 2 x 3 patc"),
        ({"image_grid_thw": np.array([[1, 0, 4]])}, r"image 0: expected sides that are multiples of 2, got 0 x 4 patc"),
        ({"image_grid_thw": np.array([1, 2, 4])}, r"image_grid_thw: expected the shape \[images, 3\], got \[3\]"),
        ({"pixel_values": good["pixel_values"][1:]}, r"pixel_values: expected the shape \[8, 12\] .*, got \[7, 12\]"),
        ({"pixel_values": good["pixel_values"][:, 1:]}, r"expected the shape \[8, 12\] .*, got \[8, 11\]"),
        ({"input_ids": np.array([[IMAGE]])}, r"input_ids: expected 2 times the image token 7 .*, got 1$"),
    ):
        with pytest.raises(EngineError, match=message):
            check_images(good | change, RULES)


def test_rules_are_plain_data():
    data = json.loads(json.dumps(dataclasses.asdict(RULES)))
    assert parse(VisualTokens, data, source="visual", error=BundleError) == RULES
    with pytest.raises(BundleError, match=r"^visual: merge_size: expected at least 1, got 0$"):
        parse(VisualTokens, data | {"merge_size": 0}, source="visual", error=BundleError)
