"""How a decoded image becomes the input of a model: resize, crop, rescale, normalise, and cut into patches.

PIL image -> prepare (resize, crop; uint8) -> PreparedImage -> pixel_values (float32)

Geometry is pure arithmetic on sizes. Pixels are those of transformers' Pillow-backed image processors, bit by bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Layout = Literal["pixels", "patches"]
Resize = Literal["exact", "shortest_edge", "multiple"]
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]

CHANNELS = 3
MAX_ASPECT_RATIO = 200
"""Of an image that is resized to multiples of a patch; a longer one is refused, as transformers does."""

# So many patches at a time stay in the processor's cache.
_CACHED_PATCHES = 64
# An image whose shorter side is resized may become very long. Beyond so many pixels only what the crop keeps is made,
# which may differ by some levels of 255 (3 in a smooth picture, 26 in noise): by what it makes Pillow chooses whether
# rows or columns come first.
_WHOLE_RESIZE_PIXELS = 1 << 25


@dataclass(frozen=True, kw_only=True)
class ImageRules:
    """What is done to an image, as data.

    Attributes:
        layout: "pixels" for one [3, height, width] tensor an image; "patches" for flattened patches, all images in one
            [patches, 3·temporal_patch_size·patch_size²] tensor.
        resize: "exact" to height × width, whatever the aspect ratio; "shortest_edge" for the shorter side to
            `shortest_edge`, then height × width from the centre, black where the image is smaller; "multiple" for
            multiples of patch_size·merge_size, as near as possible to the image's own size and aspect ratio, with
            min_pixels to max_pixels pixels in all.
        resample: the filter.
        rescale: what a pixel value 0 … 255 is multiplied by.
        mean, std: what is subtracted then, and what the rest is divided by; of red, green and blue.
        height, width: of the tensor; 0 for "multiple".
        shortest_edge: of the image before the crop; 0 for the others.
        patch_size, temporal_patch_size, merge_size: sides of a patch in space and time, and how many patches a side
            make one token; 0 for "pixels".
        min_pixels, max_pixels: of an image resized to a multiple; 0 for the others.
    """

    layout: Layout
    resize: Resize
    resample: Resample
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float = 1 / 255
    height: int = 0
    width: int = 0
    shortest_edge: int = 0
    patch_size: int = 0
    temporal_patch_size: int = 0
    merge_size: int = 0
    min_pixels: int = 0
    max_pixels: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("layout", Layout), ("resize", Resize), ("resample", Resample)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name}: expected one of {', '.join(get_args(choices))}; got {getattr(self, name)!r}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != CHANNELS or not all(map(math.isfinite, values)):
                raise ValueError(f"{name}: expected {CHANNELS} numbers, got {values}")
        if min(self.std) <= 0:
            raise ValueError(f"std: expected numbers above 0, got {self.std}")
        if not 0 < self.rescale < math.inf:
            raise ValueError(f"rescale: expected a number above 0, got {self.rescale}")
        if (self.layout == "patches") != (self.resize == "multiple"):
            raise ValueError(f"resize: layout {self.layout} does not go with {self.resize}")
        needed = {
            "exact": ("height", "width"),
            "shortest_edge": ("height", "width", "shortest_edge"),
            "multiple": ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels"),
        }[self.resize]
        for name in _SIZES:
            value = getattr(self, name)
            if name in needed and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
            if name not in needed and value != 0:
                raise ValueError(f"{name}: has no meaning with resize {self.resize}; expected 0, got {value}")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels: expected at most max_pixels ({self.max_pixels}), got {self.min_pixels}")

    @property
    def factor(self) -> int:
        """What both sides of an image in patches are a multiple of: the side of one token, in pixels."""
        return self.patch_size * self.merge_size

    @property
    def patch_width(self) -> int:
        """Numbers in one flattened patch."""
        return CHANNELS * self.temporal_patch_size * self.patch_size**2

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) to which an image of that size is resized, before the crop.

        Raises:
            ValueError: a side is not positive, or the aspect ratio of an image in patches is above MAX_ASPECT_RATIO.
        """
        if min(height, width) < 1:
            raise ValueError(f"expected an image of at least 1 × 1 pixels, got {width} × {height}")
        if self.resize == "exact":
            return self.height, self.width
        if self.resize == "shortest_edge":
            return _with_shortest_edge(height, width, self.shortest_edge)
        return _multiple(height, width, self.factor, self.min_pixels, self.max_pixels)

    def prepared_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the PreparedImage of an image of that size: after the crop.

        Raises:
            ValueError: as `target_size`.
        """
        target = self.target_size(height, width)
        return target if self.resize == "multiple" else (self.height, self.width)

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        """(1, patches down, patches across) of a prepared image of that size.

        Raises:
            ValueError: the layout has no patches, or a side is no multiple of a token's.
        """
        if self.layout != "patches":
            raise ValueError(f"layout {self.layout} has no patches")
        if min(height, width) < 1 or height % self.factor or width % self.factor:
            raise ValueError(f"expected sides that are multiples of {self.factor}, got {width} × {height}")
        return 1, height // self.patch_size, width // self.patch_size

    def tokens(self, height: int, width: int) -> int:
        """Visual tokens of a prepared image of that size.

        Raises:
            ValueError: as `grid`.
        """
        _, down, across = self.grid(height, width)
        return down * across // self.merge_size**2


_SIZES = (
    "height",
    "width",
    "shortest_edge",
    "patch_size",
    "temporal_patch_size",
    "merge_size",
    "min_pixels",
    "max_pixels",
)


def _with_shortest_edge(height: int, width: int, shortest_edge: int) -> tuple[int, int]:
    """The shorter side becomes `shortest_edge`; the longer one is rounded down."""
    if width <= height:
        return int(shortest_edge * height / width), shortest_edge
    return shortest_edge, int(shortest_edge * width / height)


def _multiple(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Qwen-VL's resize: sides to the nearest multiple (ties to even), scaled first where that leaves the limits."""
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise ValueError(
            f"expected an image at most {MAX_ASPECT_RATIO} times as long as wide, got {width} × {height} pixels"
        )
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / factor)) for side in (height, width))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) for side in (height, width))
    return rows * factor, columns * factor


class PreparedImage(NamedTuple):
    """An image as the model will see it, before its numbers become floats.

    Attributes:
        pixels: [height, width, 3] uint8, read-only.
        digest: 16 bytes that stand for shape and pixels: two images of one digest are the same to the model.
    """

    pixels: NDArray[np.uint8]
    digest: bytes


class ImagePreprocessor:
    """Prepares images by rules. Its methods may run in several threads at once."""

    def __init__(self, rules: ImageRules) -> None:
        self.rules = rules
        self._filter = Image.Resampling[rules.resample.upper()]
        self._values = _values(rules)

    def prepare(self, image: Image.Image) -> PreparedImage:
        """Resize and crop.

        Args:
            image: in mode RGB; it is not changed.

        Raises:
            ValueError: its mode is another, or its size is one that the rules refuse.
        """
        if image.mode != "RGB":
            raise ValueError(f"expected an image in mode RGB, got {image.mode}")
        rules = self.rules
        target = rules.target_size(image.height, image.width)
        if rules.resize == "shortest_edge":
            image = self._cropped(image, *target)
        else:
            image = image.resize(target[::-1], self._filter)
        pixels = np.asarray(image)
        digest = hashlib.blake2b(np.array(pixels.shape, dtype="<i8").tobytes(), digest_size=16)
        digest.update(pixels.data)
        return PreparedImage(pixels, digest.digest())

    def _cropped(self, image: Image.Image, height: int, width: int) -> Image.Image:
        """What the crop keeps of the image resized to height × width."""
        rules = self.rules
        # Floor division, also of negative numbers: an odd difference puts the smaller margin first, and the larger
        # border first where the image is too small.
        top, left = (height - rules.height) // 2, (width - rules.width) // 2
        box = (left, top, left + rules.width, top + rules.height)
        if height * width <= _WHOLE_RESIZE_PIXELS:
            return image.resize((width, height), self._filter).crop(box)
        across, down = image.width / width, image.height / height
        kept = (max(left, 0), max(top, 0), min(left + rules.width, width), min(top + rules.height, height))
        source = (kept[0] * across, kept[1] * down, kept[2] * across, kept[3] * down)
        part = image.resize((kept[2] - kept[0], kept[3] - kept[1]), self._filter, box=source)
        return part.crop((box[0] - kept[0], box[1] - kept[1], box[2] - kept[0], box[3] - kept[1]))

    def grid(self, image: PreparedImage) -> tuple[int, int, int]:
        """(1, patches down, patches across) of a prepared image.

        Raises:
            ValueError: as `ImageRules.grid`.
        """
        return self.rules.grid(*image.pixels.shape[:2])

    def pixel_values(self, images: Sequence[PreparedImage]) -> NDArray[np.float32]:
        """The model's input.

        Returns:
            [len(images), 3, height, width] float32 for layout "pixels"; for "patches" [patches of all images,
            patch_width] float32, image by image, the patches of a token side by side, and each patch channel by
            channel, frame by frame (all alike), row by row.
        """
        rules = self.rules
        if rules.layout == "pixels":
            values = np.empty((len(images), CHANNELS, rules.height, rules.width), np.float32)
            for image, out in zip(images, values, strict=True):
                for channel in range(CHANNELS):
                    out[channel] = self._values[channel].take(image.pixels[:, :, channel])
            return values
        counts = [math.prod(self.grid(image)) for image in images]
        values = np.empty((sum(counts), rules.patch_width), np.float32)
        start = 0
        for image, count in zip(images, counts, strict=True):
            self._patches(image.pixels, values[start : start + count])
            start += count
        return values

    def _patches(self, pixels: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        patch, merge = self.rules.patch_size, self.rules.merge_size
        rows, columns = pixels.shape[0] // self.rules.factor, pixels.shape[1] // self.rules.factor
        tokens = pixels.reshape(rows, merge, patch, columns, merge, patch, CHANNELS)
        ordered = np.ascontiguousarray(tokens.transpose(0, 3, 1, 4, 6, 2, 5)).reshape(-1, CHANNELS, patch * patch)
        frames = out.reshape(len(out), CHANNELS, self.rules.temporal_patch_size, patch * patch)
        for start in range(0, len(out), _CACHED_PATCHES):
            part = slice(start, start + _CACHED_PATCHES)
            for channel in range(CHANNELS):
                frames[part, channel, 0] = self._values[channel].take(ordered[part, channel])
            frames[part, :, 1:] = frames[part, :, :1]


def _values(rules: ImageRules) -> NDArray[np.float32]:
    """What each of the 256 pixel values becomes, [3, 256]: rounded where transformers' processors round."""
    rescaled = (np.arange(256, dtype=np.float64) * rules.rescale).astype(np.float32)
    mean, std = (np.array(numbers, np.float32)[:, None] for numbers in (rules.mean, rules.std))
    values: NDArray[np.float32] = (rescaled - mean) / std
    return values
