from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    Idefics3ImageProcessorPil,
    Qwen2VLImageProcessorPil,
    Siglip2ImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)
from transformers.image_transforms import get_resize_output_image_size
from transformers.image_utils import ChannelDimension
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from rtx.runtime.errors import CheckpointError, UsageError
from rtx.runtime.image_rules import ImagePreprocessor, ImageRules
from rtx.runtime.images import load_image
from rtx.runtime.schema import parse
from rtx.trainer.image_processor import check_settings, image_rules, load_image_processor

HALF = [0.5, 0.5, 0.5]
QWEN: dict[str, Any] = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": HALF,
    "image_std": HALF,
    "size": {"shortest_edge": 4096, "longest_edge": 40_000},
}
FAMILIES: dict[str, Any] = {
    "qwen3-vl": lambda: Qwen2VLImageProcessorPil(**QWEN),
    "qwen2-vl": lambda: Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=40_000),
    "clip": lambda: CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}),
    "siglip": lambda: SiglipImageProcessorPil(size={"height": 24, "width": 36}),
    "siglip2-fixed": lambda: SiglipImageProcessorPil(size={"height": 32, "width": 32}, resample=2, do_convert_rgb=None),
    "dinov2": lambda: BitImageProcessorPil(
        size={"shortest_edge": 37},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ),
    "vit": lambda: ViTImageProcessorPil(size={"height": 20, "width": 20}),
    "crop-of-its-own-size": lambda: CLIPImageProcessorPil(
        size={"height": 20, "width": 20}, crop_size={"height": 20, "width": 20}
    ),
    "crop-beyond-the-image": lambda: BitImageProcessorPil(
        size={"shortest_edge": 21}, crop_size={"height": 28, "width": 33}
    ),
    "neither-rescaled-nor-normalised": lambda: ViTImageProcessorPil(
        size={"height": 20, "width": 20}, do_rescale=False, do_normalize=False
    ),
    "normalised-alone": lambda: ViTImageProcessorPil(size={"height": 20, "width": 20}, do_rescale=False),
    "rescaled-alone": lambda: ViTImageProcessorPil(
        size={"height": 20, "width": 20}, do_normalize=False, rescale_factor=1 / 127.5, resample=1
    ),
    "one-mean-for-all": lambda: ViTImageProcessorPil(size={"height": 20, "width": 20}, image_mean=0.4, image_std=0.3),
}
SIZES = ((1, 1), (7, 150), (40, 30), (61, 47), (120, 121), (300, 200))


def pictures() -> Iterator[Image.Image]:
    random = np.random.default_rng(0)
    for height, width in SIZES:
        noise = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        yield Image.fromarray(noise)


def prepared(rules: ImageRules, images: list[Image.Image]) -> NDArray[np.float32]:
    preprocessor = ImagePreprocessor(rules)
    return preprocessor.pixel_values([preprocessor.prepare(load_image(image)) for image in images])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_processor_and_its_rules_prepare_images_alike(family: str, tmp_path: Path):
    FAMILIES[family]().save_pretrained(tmp_path)
    verbosity = transformers.utils.logging.get_verbosity()
    processor = load_image_processor(str(tmp_path))
    assert transformers.utils.logging.get_verbosity() == verbosity
    assert type(processor).__name__.endswith("Pil")
    rules = image_rules(processor, "model")
    data = json.loads(json.dumps(dataclasses.asdict(rules)))
    assert parse(ImageRules, data, source="contract") == rules
    images = list(pictures())
    expected = processor(images, return_tensors="np")
    values = prepared(rules, images)
    assert values.dtype == np.float32
    assert np.array_equal(values, expected["pixel_values"])
    if rules.layout == "patches":
        preprocessor = ImagePreprocessor(rules)
        grids = [preprocessor.grid(preprocessor.prepare(image)) for image in images]
        assert np.array_equal(grids, expected["image_grid_thw"])


sides = st.one_of(st.integers(1, 40), st.integers(1, 400))


@settings(max_examples=25, deadline=None)
@given(sides, sides, st.sampled_from(["qwen3-vl", "qwen2-vl", "clip", "siglip2-fixed", "dinov2"]))
def test_images_of_any_size_are_prepared_alike(height: int, width: int, family: str):
    processor = FAMILIES[family]()
    rules = image_rules(processor, "model")
    image = Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))
    if rules.layout == "patches" and max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="aspect ratio"):
            processor(image, return_tensors="np")
        with pytest.raises(ValueError, match="as long as wide"):
            prepared(rules, [image])
        return
    expected = processor(image, return_tensors="np")["pixel_values"]
    assert np.array_equal(prepared(rules, [image]), expected)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(1, 10_000), st.integers(1, 5_000_000))
def test_sizes_are_those_of_transformers(height: int, width: int, fewest: int, more: int):
    rules = dataclasses.replace(
        image_rules(FAMILIES["qwen3-vl"](), "model"), min_pixels=fewest, max_pixels=fewest + more
    )
    try:
        expected = smart_resize(height, width, factor=32, min_pixels=fewest, max_pixels=fewest + more)
    except ValueError:
        with pytest.raises(ValueError, match="as long as wide"):
            rules.target_size(height, width)
    else:
        assert rules.target_size(height, width) == expected
    edge = dataclasses.replace(image_rules(FAMILIES["clip"](), "model"), shortest_edge=1 + fewest % 500)
    pixels = np.broadcast_to(np.uint8(0), (3, height, width))
    by_edge = get_resize_output_image_size(
        pixels, size=edge.shortest_edge, default_to_square=False, input_data_format=ChannelDimension.FIRST
    )
    assert edge.target_size(height, width) == by_edge


def test_transparent_images_are_laid_on_white_alike():
    random = np.random.default_rng(1)
    rgba = Image.fromarray(random.integers(0, 256, (50, 40, 4), dtype=np.uint8))
    palette = rgba.convert("RGB").quantize(8)
    palette.info["transparency"] = 2
    images = [rgba, rgba.convert("LA"), palette, rgba.convert("L"), rgba.convert("RGB").convert("1")]
    for family in ("qwen3-vl", "clip", "siglip"):
        processor = FAMILIES[family]()
        expected = processor(images, return_tensors="np")["pixel_values"]
        assert np.array_equal(prepared(image_rules(processor, "model"), images), expected)


# -- files -----------------------------------------------------------------------------------------------------------


def write(folder: Path, **files: Any) -> str:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


FAST = {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor"}


@pytest.mark.parametrize(
    "files",
    [
        {"preprocessor_config": QWEN | FAST},
        {"preprocessor_config": QWEN | {"image_processor_type": "Qwen2VLImageProcessor"}},
        {"preprocessor_config": QWEN, "config": {"model_type": "qwen3_vl"}},
        {
            "processor_config": {
                "image_processor": QWEN | FAST,
                "video_processor": {"video_processor_type": "Qwen3VLVideoProcessor"},
            }
        },
        # Of two, the one of the whole processor counts.
        {
            "processor_config": {"image_processor": QWEN | FAST},
            "preprocessor_config": FAST | QWEN | {"patch_size": 14},
        },
    ],
)
def test_files_of_qwen3_vl_are_read_without_torchvision(
    files: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    expected = ImageRules(
        layout="patches",
        resize="multiple",
        resample="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        min_pixels=4096,
        max_pixels=40_000,
    )
    assert image_rules(load_image_processor(write(tmp_path / "root", **files)), "model") == expected
    write(tmp_path / "0_Transformer", **files)
    assert image_rules(load_image_processor(str(tmp_path), subfolder="0_Transformer"), "model") == expected
    assert capfd.readouterr() == ("", "")


def test_what_transformers_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def from_pretrained(name: str, **arguments: Any) -> Any:
        calls.append((name, arguments, transformers.utils.logging.get_verbosity()))
        raise ImportError("needs\n  something")

    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", from_pretrained)
    with pytest.raises(CheckpointError, match=r"^owner/model/vision: no image processor .* load: needs something$"):
        load_image_processor("owner/model", subfolder="vision", revision="abc", backend="torchvision", max_pixels=5)
    location = {"subfolder": "vision", "revision": "abc", "trust_remote_code": False}
    # Quietly, and never with torchvision, which would resize a little differently.
    assert calls == [("owner/model", {**location, "backend": "pil", "max_pixels": 5}, transformers.logging.ERROR)]


@pytest.mark.parametrize("content", [{"size": {"shortest_edge": 4096, "longest_edge": 40_000}}, {"min_pixels": 100}])
def test_settings_go_before_the_files(content: dict[str, Any], tmp_path: Path):
    folder = write(tmp_path, preprocessor_config=QWEN | FAST | content)
    rules = image_rules(load_image_processor(folder, min_pixels=784, max_pixels=360_000), "model")
    assert (rules.min_pixels, rules.max_pixels) == (784, 360_000)
    size = {"shortest_edge": 1024, "longest_edge": 2048}
    rules = image_rules(load_image_processor(folder, size=size, resample=2, backend="torchvision"), "model")
    # A checkpoint's own min_pixels go before any size: so they do in transformers.
    assert (rules.min_pixels, rules.max_pixels) == (content.get("min_pixels", 1024), 2048)
    assert rules.resample == "bilinear"


def test_files_of_the_first_clip(tmp_path: Path):
    """Whole numbers for sizes, and a feature extractor for an image processor."""
    old = {
        "crop_size": 224,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 224,
    }
    rules = image_rules(load_image_processor(write(tmp_path, preprocessor_config=old)), "model")
    assert rules == ImageRules(
        layout="pixels",
        resize="shortest_edge",
        resample="bicubic",
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        height=224,
        width=224,
        shortest_edge=224,
    )


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "Can't load image processor"),
        ({"preprocessor_config": {"image_processor_type": "NoImageProcessor"}}, "Unrecognized image processor"),
        (
            {"preprocessor_config": {"image_processor_type": "DINOv3ViTImageProcessor"}},
            "Missing optional dependencies: torchvision",
        ),
        ({"preprocessor_config": FAST | {"size": {"edge": 3}}}, "size must have one of"),
    ],
)
def test_a_processor_that_cannot_be_loaded(files: dict[str, Any], reason: str, tmp_path: Path):
    folder = write(tmp_path, **files)
    with pytest.raises(CheckpointError, match=rf"^{folder}: no image processor that transformers can load: .*{reason}"):
        load_image_processor(folder)


# -- what cannot be said in rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (
            CLIPImageProcessorPil(do_center_crop=False),
            "do_center_crop: expected true with size.shortest_edge, as images would differ in size",
        ),
        (
            CLIPImageProcessorPil(size={"height": 30, "width": 30}, crop_size={"height": 20, "width": 20}),
            "crop_size: a crop from an image resized to {'height': 30, 'width': 30} is not supported, "
            "got {'height': 20, 'width': 20}",
        ),
        (
            CLIPImageProcessorPil(size={"longest_edge": 30, "shortest_edge": 20}),
            "size: expected either height and width or shortest_edge, got {'longest_edge': 30, 'shortest_edge': 20}",
        ),
        (
            CLIPImageProcessorPil(crop_size={"shortest_edge": 20}),
            "crop_size: expected height and width, got {'shortest_edge': 20}",
        ),
        (ViTImageProcessorPil(do_resize=False), "do_resize: expected true, as images of any size cannot be joined"),
        (ViTImageProcessorPil(do_pad=True), "do_pad: padded images are not supported"),
        (
            ViTImageProcessorPil(resample="bicubic"),
            "resample: expected one of 0 (nearest), 1 (lanczos), 2 (bilinear), 3 (bicubic), 4 (box), 5 (hamming), "
            "got 'bicubic'",
        ),
        (ViTImageProcessorPil(image_mean=[0.5]), "image_mean: expected 3 numbers, got (0.5,)"),
        (ViTImageProcessorPil(image_std=[0.5, 0.5, 0.0]), "std: expected numbers above 0, got (0.5, 0.5, 0.0)"),
        (
            ViTImageProcessorPil(do_pad=True, do_resize=False),
            "do_resize: expected true, as images of any size cannot be joined; do_pad: padded images are not supported",
        ),
        (
            Qwen2VLImageProcessorPil(size={"height": 30, "width": 30}),
            "size: expected shortest_edge and longest_edge (numbers of pixels), got {'height': 30, 'width': 30}",
        ),
        (Qwen2VLImageProcessorPil(patch_size=16.5), "settings: patch_size: expected a whole number, got 16.5"),
        (ViTImageProcessorPil(size={"height": True, "width": 3}), "size: height: expected a whole number, got True"),
        (
            Qwen2VLImageProcessorPil(min_pixels=200, max_pixels=100),
            "min_pixels: expected at most max_pixels (100), got 200",
        ),
    ],
)
def test_settings_that_rules_cannot_say(processor: Any, expected: str):
    with pytest.raises(CheckpointError) as caught:
        image_rules(processor, "model")
    message = str(caught.value)
    assert message.startswith(f"model: {type(processor).__name__}: ")
    assert expected in message


class ResizesItself(CLIPImageProcessorPil):
    def resize(self, image: Any, *_: Any, **__: Any) -> Any:
        return image


class PatchesItself(Qwen2VLImageProcessorPil):
    def patchify(self, image: Any, *_: Any, **__: Any) -> Any:
        return image, 1, 1


class OrdersItself(CLIPImageProcessorPil):
    def _preprocess(self, images: Any, *_: Any, **__: Any) -> Any:
        return images


@pytest.mark.parametrize(
    "processor",
    [Idefics3ImageProcessorPil(), Siglip2ImageProcessorPil(), ResizesItself(), PatchesItself(), OrdersItself()],
)
def test_a_processor_with_steps_of_its_own_is_refused(processor: Any):
    with pytest.raises(CheckpointError, match="prepares images in a way of its own; supported are") as caught:
        image_rules(processor, "model")
    assert ("fixed resolution" in str(caught.value)) == (type(processor) is Siglip2ImageProcessorPil)


def test_a_processor_without_pillow_is_refused():
    with pytest.raises(CheckpointError, match="model: object: does not work with Pillow"):
        image_rules(object(), "model")


def test_settings_that_a_processor_would_ignore_are_named():
    check_settings(FAMILIES["qwen3-vl"](), ["max_pixels", "size", "resample"], "model")
    expected = "model: SiglipImageProcessorPil has no setting 'max_pixels' (known: crop_size"
    with pytest.raises(UsageError, match=re.escape(expected)):
        check_settings(FAMILIES["siglip"](), ["max_pixels", "size"], "model")


def test_a_processor_for_torchvision_alone_is_refused_without_sending_for_it(tmp_path: Path):
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "DINOv3ViTImageProcessorFast"}')
    with pytest.raises(
        CheckpointError, match=r": DINOv3ViTImageProcessor: works with torchvision alone; supported are"
    ):
        load_image_processor(str(tmp_path))
