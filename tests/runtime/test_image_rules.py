from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import rtx.runtime.image_rules
from rtx.runtime.errors import BundleError
from rtx.runtime.image_rules import ImagePreprocessor, ImageRules, PreparedImage
from rtx.runtime.schema import parse

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
QWEN = ImageRules(
    layout="patches",
    resize="multiple",
    resample="bicubic",
    mean=HALF,
    std=HALF,
    patch_size=16,
    temporal_patch_size=2,
    merge_size=2,
    min_pixels=4096,
    max_pixels=1_843_200,
)
CLIP = ImageRules(
    layout="pixels",
    resize="shortest_edge",
    resample="bicubic",
    mean=MEAN,
    std=STD,
    height=224,
    width=224,
    shortest_edge=224,
)
SIGLIP = ImageRules(layout="pixels", resize="exact", resample="bilinear", mean=HALF, std=HALF, height=24, width=36)
# Small patches of three frames, with numbers that all differ, so that no two axes can be mistaken for each other.
SMALL = dataclasses.replace(
    QWEN, mean=MEAN, std=STD, patch_size=2, temporal_patch_size=3, merge_size=2, min_pixels=16, max_pixels=5000
)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prepared(pixels: NDArray[np.uint8]) -> PreparedImage:
    return PreparedImage(pixels, b"")


def normalised(pixels: NDArray[np.uint8], rules: ImageRules) -> NDArray[np.float64]:
    return (pixels.astype(np.float64) * rules.rescale - rules.mean) / np.array(rules.std)


# -- rules as data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [QWEN, CLIP, SIGLIP])
def test_rules_survive_json(rules: ImageRules):
    data = json.loads(json.dumps(dataclasses.asdict(rules)))
    again = parse(ImageRules, data, source="contract", error=BundleError)
    assert again == rules
    assert again.rescale == 1 / 255


@pytest.mark.parametrize(
    ("rules", "changes", "expected"),
    [
        (CLIP, {"layout": "tiles"}, "layout: expected one of pixels, patches; got 'tiles'"),
        (CLIP, {"resize": "pad"}, "resize: expected one of exact, shortest_edge, multiple; got 'pad'"),
        (
            CLIP,
            {"resample": "cubic"},
            "resample: expected one of nearest, lanczos, bilinear, bicubic, box, hamming; got",
        ),
        (CLIP, {"mean": (0.5,)}, "mean: expected 3 numbers, got (0.5,)"),
        (CLIP, {"mean": (0.5, 0.5, float("nan"))}, "mean: expected 3 numbers, got (0.5, 0.5, nan)"),
        (CLIP, {"std": (0.5, 0.5, 0.0)}, "std: expected numbers above 0, got (0.5, 0.5, 0.0)"),
        (CLIP, {"rescale": 0.0}, "rescale: expected a number above 0, got 0.0"),
        (CLIP, {"layout": "patches"}, "resize: layout patches does not go with shortest_edge"),
        (QWEN, {"layout": "pixels"}, "resize: layout pixels does not go with multiple"),
        (CLIP, {"height": 0}, "height: expected at least 1, got 0"),
        (CLIP, {"shortest_edge": -1}, "shortest_edge: expected at least 1, got -1"),
        (SIGLIP, {"shortest_edge": 3}, "shortest_edge: has no meaning with resize exact; expected 0, got 3"),
        (SIGLIP, {"patch_size": 16}, "patch_size: has no meaning with resize exact; expected 0, got 16"),
        (QWEN, {"width": 32}, "width: has no meaning with resize multiple; expected 0, got 32"),
        (QWEN, {"merge_size": 0}, "merge_size: expected at least 1, got 0"),
        (QWEN, {"max_pixels": 4095}, "min_pixels: expected at most max_pixels (4095), got 4096"),
    ],
)
def test_rules_that_make_no_sense(rules: ImageRules, changes: dict[str, Any], expected: str):
    with pytest.raises(ValueError, match=next(iter(changes))) as caught:
        dataclasses.replace(rules, **changes)
    assert str(caught.value).startswith(expected)
    data = json.loads(json.dumps(dataclasses.asdict(rules) | changes))
    with pytest.raises(BundleError, match=f"^contract: .*{next(iter(changes))}"):
        parse(ImageRules, data, source="contract", error=BundleError)


# -- geometry --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (480, 640)),  # multiples of 32 stay as they are
        ((481, 655), (480, 640)),  # to the nearest
        ((496, 656), (512, 640)),  # 15.5 and 20.5: ties to the even number
        ((500, 660), (512, 672)),
        ((2200, 1700), (1536, 1184)),  # too large: √(1.8432M / 3.74M) · 2200 = 1544.4, rounded down
        ((10, 10), (64, 64)),  # too small: enlarged to 4096 pixels
        ((1, 1), (64, 64)),
        ((1, 200), (32, 928)),  # √(4096 / 200) · 1 = 4.5 and · 200 = 905.1, both rounded up
        ((40, 8000), (32, 8000)),
        ((500, 100_000), (96, 19_200)),  # the most that is allowed: √27.126736 is 125 / 24
    ],
)
def test_multiples_by_hand(size: tuple[int, int], expected: tuple[int, int]):
    assert QWEN.target_size(*size) == QWEN.prepared_size(*size) == expected
    assert QWEN.target_size(*size[::-1]) == expected[::-1]


def test_a_side_has_one_token_at_least():
    rules = dataclasses.replace(QWEN, max_pixels=4096)
    # √(80000 / 4096) · 32 = 141.4 pixels a token: of 20 none, of 4000 28.
    assert rules.target_size(20, 4000) == (32, 896)
    assert rules.target_size(4000, 20) == (896, 32)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_multiples_keep_the_limits(height: int, width: int):
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="at most 200 times as long as wide"):
            QWEN.target_size(height, width)
        return
    rows, columns = QWEN.target_size(height, width)
    assert rows % 32 == columns % 32 == 0
    assert 4096 <= rows * columns <= 1_843_200
    # Prepared once more, it stays as it is.
    assert QWEN.target_size(rows, columns) == (rows, columns)
    assert QWEN.tokens(rows, columns) == rows * columns // 1024
    assert QWEN.grid(rows, columns) == (1, rows // 16, columns // 16)


def test_the_shorter_side_by_hand():
    assert CLIP.target_size(480, 640) == (224, 298)  # 298.7, rounded down
    assert CLIP.target_size(640, 480) == (298, 224)
    assert CLIP.target_size(7, 7) == (224, 224)
    assert CLIP.target_size(1, 1000) == (224, 224_000)
    assert CLIP.prepared_size(1, 1000) == (224, 224)


def test_an_exact_size():
    assert SIGLIP.target_size(1, 1000) == SIGLIP.prepared_size(5, 5) == (24, 36)


@pytest.mark.parametrize("rules", [QWEN, CLIP, SIGLIP])
@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 3)])
def test_sizes_without_pixels_are_refused(rules: ImageRules, size: tuple[int, int]):
    with pytest.raises(ValueError, match="expected an image of at least 1 × 1 pixels, got"):
        rules.target_size(*size)


def test_grids_are_of_prepared_images_in_patches():
    with pytest.raises(ValueError, match="expected sides that are multiples of 32, got 640 × 470"):
        QWEN.grid(470, 640)
    with pytest.raises(ValueError, match="expected sides that are multiples of 32"):
        QWEN.tokens(0, 32)
    with pytest.raises(ValueError, match="layout pixels has no patches"):
        CLIP.tokens(224, 224)


# -- resize and crop -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [SMALL, CLIP, SIGLIP])
def test_prepared_images_are_what_pillow_makes(rules: ImageRules):
    kind = Image.Resampling[rules.resample.upper()]
    preprocessor = ImagePreprocessor(rules)
    for height, width in ((1, 1), (37, 61), (90, 45), (50, 51), (3, 200)):
        image = noise(height, width)
        before = image.tobytes()
        rows, columns = rules.target_size(height, width)
        expected = np.asarray(image.resize((columns, rows), kind))
        if rules is CLIP:
            top, left = (rows - 224) // 2, (columns - 224) // 2
            expected = expected[top : top + 224, left : left + 224]
        result = preprocessor.prepare(image)
        assert np.array_equal(result.pixels, expected)
        assert result.pixels.dtype == np.uint8
        assert not result.pixels.flags.writeable
        assert result.pixels.shape[:2] == rules.prepared_size(height, width)
        assert image.tobytes() == before


@pytest.mark.parametrize("resample", ["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"])
def test_filters(resample: str):
    rules = parse(ImageRules, {**dataclasses.asdict(SIGLIP), "resample": resample}, source="test")
    image = noise(50, 50)
    expected = image.resize((36, 24), Image.Resampling[resample.upper()])
    assert np.array_equal(ImagePreprocessor(rules).prepare(image).pixels, np.asarray(expected))


@pytest.mark.parametrize(("height", "width"), [(4, 5), (5, 4), (4, 4), (5, 5), (2, 3), (9, 4), (4, 9)])
def test_crops_by_hand(height: int, width: int):
    """Resized to a shorter side of 4; where the crop is larger, there is black, the larger border first."""
    rules = dataclasses.replace(CLIP, shortest_edge=4, height=height, width=width)
    image = noise(4, 4)
    frame = np.zeros((20, 20, 3), np.uint8)
    frame[8:12, 8:12] = np.asarray(image)
    top, left = 8 + (4 - height) // 2, 8 + (4 - width) // 2
    result = ImagePreprocessor(rules).prepare(image).pixels
    assert np.array_equal(result, frame[top : top + height, left : left + width])


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (3, 700), (700, 3), (90, 31), (64, 64)])
@pytest.mark.parametrize("crop", [(28, 30), (40, 30), (40, 45)])
def test_what_is_cropped_need_not_be_resized_whole(
    size: tuple[int, int], crop: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    rules = dataclasses.replace(CLIP, shortest_edge=33, height=crop[0], width=crop[1])
    down, across = (np.linspace(0, 120, side) for side in size)
    smooth = Image.fromarray(np.repeat((down[:, None] + across)[:, :, None], 3, axis=2).astype(np.uint8))
    for image, most in ((smooth, 3), (noise(*size), 30)):
        whole = ImagePreprocessor(rules).prepare(image).pixels.astype(int)
        with monkeypatch.context() as patched:
            patched.setattr(rtx.runtime.image_rules, "_WHOLE_RESIZE_PIXELS", 0)
            part = ImagePreprocessor(rules).prepare(image).pixels.astype(int)
        assert part.shape == whole.shape
        assert np.abs(part - whole).max() <= most
        assert np.abs(part - whole).mean() < 0.5


def test_an_image_of_one_row_and_a_million_columns_fits_into_memory():
    image = Image.fromarray(np.full((1, 1_000_000, 3), [10, 20, 30], np.uint8))
    assert (ImagePreprocessor(CLIP).prepare(image).pixels == [10, 20, 30]).all()


def test_prepared_images_do_not_share_memory_with_what_was_given():
    array = np.asarray(noise(24, 36)).copy()
    image = Image.frombuffer("RGB", (36, 24), array, "raw", "RGB", 0, 1)
    result = ImagePreprocessor(SIGLIP).prepare(image).pixels
    before = result.copy()
    array[:] = 0
    assert np.array_equal(result, before)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_other_modes_are_refused(mode: str):
    with pytest.raises(ValueError, match=f"expected an image in mode RGB, got {mode}"):
        ImagePreprocessor(CLIP).prepare(Image.new(mode, (3, 3)))


def test_an_image_too_long_for_patches_is_refused():
    ImagePreprocessor(SMALL).prepare(noise(1, 200))
    with pytest.raises(ValueError, match="at most 200 times as long as wide, got 201 × 1 pixels"):
        ImagePreprocessor(SMALL).prepare(noise(1, 201))


# -- digests ---------------------------------------------------------------------------------------------------------


def test_a_digest_stands_for_shape_and_pixels():
    preprocessor = ImagePreprocessor(SMALL)
    image = noise(20, 40)
    digest = preprocessor.prepare(image).digest
    assert len(digest) == 16
    assert preprocessor.prepare(image.copy()).digest == digest
    pixels = np.asarray(image).copy()
    # The same bytes in another shape.
    assert preprocessor.prepare(Image.fromarray(pixels.reshape(40, 20, 3))).digest != digest
    pixels[0, 0, 0] ^= 1
    assert preprocessor.prepare(Image.fromarray(pixels)).digest != digest


def test_a_digest_is_the_same_on_every_machine():
    """blake2b of the shape, as 64-bit integers from the low byte up, and of the bytes in order."""
    rules = dataclasses.replace(SIGLIP, height=1, width=1)
    image = Image.fromarray(np.array([[[1, 2, 3]]], np.uint8))
    expected = hashlib.blake2b(struct.pack("<3q", 1, 1, 3) + bytes([1, 2, 3]), digest_size=16)
    assert ImagePreprocessor(rules).prepare(image).digest == expected.digest()


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_all_values_are_rescaled_and_normalised():
    """To one unit in the last place of what is subtracted: each of three operations rounds once."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    rules = dataclasses.replace(CLIP, height=16, width=16)
    values = ImagePreprocessor(rules).pixel_values([prepared(ramp)])
    assert values.dtype == np.float32
    assert np.abs(values[0].transpose(1, 2, 0) - normalised(ramp, rules)).max() < 4e-7


def test_pixels_have_channels_first():
    image = np.asarray(noise(24, 36))
    values = ImagePreprocessor(SIGLIP).pixel_values([prepared(image), prepared(image[:, ::-1])])
    assert values.shape == (2, 3, 24, 36)
    expected = normalised(image, SIGLIP).transpose(2, 0, 1)
    assert np.abs(values[0] - expected).max() < 4e-7
    assert np.abs(values[1] - expected[:, :, ::-1]).max() < 4e-7


def test_patches_by_hand():
    """Patch by patch as a token holds them: token rows, token columns, rows in a token, columns in a token."""
    height, width = 8, 12
    image = np.asarray(noise(height, width))
    values = ImagePreprocessor(SMALL).pixel_values([prepared(image)])
    assert values.shape == (24, 3 * 3 * 2 * 2)
    expected = []
    for token_row in range(0, height, 4):
        for token_column in range(0, width, 4):
            for row in (token_row, token_row + 2):
                for column in (token_column, token_column + 2):
                    patch = normalised(image[row : row + 2, column : column + 2], SMALL)
                    expected.append(
                        [patch[y, x, c] for c in range(3) for _ in range(3) for y in (0, 1) for x in (0, 1)]
                    )
    assert np.abs(values - expected).max() < 4e-7


@pytest.mark.parametrize("rules", [SMALL, CLIP, SIGLIP])
def test_an_image_is_the_same_beside_any_other(rules: ImageRules):
    preprocessor = ImagePreprocessor(rules)
    images = [preprocessor.prepare(noise(height, width, height)) for height, width in ((30, 40), (61, 17), (5, 5))]
    alone = [preprocessor.pixel_values([image]) for image in images]
    for order in ((0, 1, 2), (2, 0, 1), (1, 1, 0)):
        together = preprocessor.pixel_values([images[i] for i in order])
        assert np.array_equal(together, np.concatenate([alone[i] for i in order]))
    if rules is SMALL:
        assert [len(values) for values in alone] == [np.prod(preprocessor.grid(image)) for image in images]


@pytest.mark.parametrize(("rules", "shape"), [(QWEN, (0, 1536)), (CLIP, (0, 3, 224, 224))])
def test_no_images(rules: ImageRules, shape: tuple[int, ...]):
    assert ImagePreprocessor(rules).pixel_values([]).shape == shape
    assert QWEN.patch_width == 1536


def test_many_threads():
    preprocessor = ImagePreprocessor(SMALL)
    images = [noise(30 + seed, 40, seed) for seed in range(20)]

    def values(image: Image.Image) -> bytes:
        return preprocessor.pixel_values([preprocessor.prepare(image)]).tobytes()

    expected = [values(image) for image in images]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(values, images)) == expected
