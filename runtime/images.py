"""Any image that a caller may hand over, decoded to RGB: file, bytes, base64, URL, PIL image, array.

Decoding runs in worker threads and on what strangers send: size is checked from the header before anything is decoded,
only formats that Pillow itself decodes are opened, and no global of Pillow's is touched.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF", "QOI", "ICO")
"""What is decoded, by Pillow's names. Others of Pillow's call programs, have no signature, or are not seen any more."""


class BadImage(ValueError):  # noqa: N818 - a reason, which the caller turns into an ItemError
    """An image that cannot be used; the text is one sentence with what was expected."""


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What is accepted.

    Attributes:
        max_bytes: of a file, of what a URL answers, of decoded base64.
        max_pixels: height times width, checked before decoding.
        allow_urls: whether http:// and https:// are fetched.
        allow_paths: whether a text may name a file. A server that takes texts from strangers says no.
        base_folder: what relative paths are relative to; None for the working directory.
        timeout_s: how long a URL's server may take to connect, and between two pieces of its answer.
    """

    max_bytes: int = 64 << 20
    max_pixels: int = 100_000_000
    allow_urls: bool = False
    allow_paths: bool = True
    base_folder: Path | None = None
    timeout_s: float = 10.0


DEFAULT_LIMITS = ImageLimits()


def load_image(source: object, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Decode one image: upright by its EXIF orientation, its first frame, on white where it is transparent.

    Args:
        source: a path, bytes, a PIL image (which is not changed), a uint8 or bool array [height, width] or
            [height, width, 1 | 3 | 4], or a text: a path, an http(s) URL, a data: URL, or base64.
        limits: what is accepted.

    Returns:
        In mode RGB. 16-bit grey is scaled to 8 bits.

    Raises:
        BadImage: it cannot be used.
    """
    if isinstance(source, str):
        return _from_text(source, limits)
    if isinstance(source, Path):
        return _from_path(source, limits)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_bytes(bytes(source), limits)
    if isinstance(source, Image.Image):
        return _from_pil(source, limits)
    if isinstance(source, np.ndarray):
        return _from_array(source, limits)
    raise BadImage(f"expected an image (path, bytes, base64, URL, PIL image or array), got {type(source).__name__}")


def _from_text(text: str, limits: ImageLimits) -> Image.Image:
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", text)
    kind = scheme.group(1).lower() if scheme and len(scheme.group(1)) > 1 else ""
    if kind == "data":
        header, comma, body = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise BadImage("a data: URL that is not base64; expected data:image/…;base64,…")
        return _from_bytes(_decode_base64(body, limits), limits)
    if kind in ("http", "https"):
        if not limits.allow_urls:
            raise BadImage("URLs are not allowed here; expected a file, bytes or base64")
        return _from_bytes(_fetch(text, limits), limits)
    if kind and text[len(kind) : len(kind) + 3] == "://":
        raise BadImage(f"a URL of scheme {kind}; expected http or https")
    if _looks_like_base64(text):
        return _from_bytes(_decode_base64(text, limits), limits)
    if not limits.allow_paths:
        raise BadImage("expected an image as base64 or a data: URL; paths are not allowed here")
    return _from_path(Path(text), limits)


def _looks_like_base64(text: str) -> bool:
    return len(text) >= 64 and text.startswith(("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk", "SUkqA", "TU0AK"))


def _decode_base64(text: str, limits: ImageLimits) -> bytes:
    if len(text) * 3 // 4 > limits.max_bytes * 2:
        raise BadImage(_too_many_bytes(len(text) * 3 // 4, limits))
    compact = "".join(text.split()).rstrip("=").translate({ord("-"): "+", ord("_"): "/"})
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError) as wrong:
        raise BadImage(f"base64 that cannot be decoded: {wrong}") from wrong


def _too_many_bytes(count: int, limits: ImageLimits) -> str:
    return f"{count:,} bytes; expected at most {limits.max_bytes:,} (max_bytes)"


def _fetch(url: str, limits: ImageLimits) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=limits.timeout_s) as answer:
            content: bytes = answer.read(limits.max_bytes + 1)
    except (OSError, ValueError) as wrong:
        raise BadImage(f"the URL could not be fetched: {wrong}") from wrong
    return content


def _from_path(path: Path, limits: ImageLimits) -> Image.Image:
    path = (limits.base_folder or Path()) / path
    try:
        with path.open("rb") as file:
            content = file.read(limits.max_bytes + 1)
    except (OSError, ValueError) as wrong:
        raise BadImage(f"{path}: {getattr(wrong, 'strerror', None) or wrong}") from wrong
    try:
        return _from_bytes(content, limits)
    except BadImage as wrong:
        raise BadImage(f"{path}: {wrong}") from wrong


def _from_bytes(content: bytes, limits: ImageLimits) -> Image.Image:
    if not content:
        raise BadImage("0 bytes; expected an image")
    if len(content) > limits.max_bytes:
        raise BadImage(_too_many_bytes(len(content), limits))
    image = _open(io.BytesIO(content), content[:16])
    return _to_rgb(image, limits)


def _open(file: IO[bytes], prefix: bytes) -> Image.Image:
    """The image of a file, its header read and nothing decoded.

    Pillow's own `open` warns of large images by a limit that is one global of the process: its plugins are called
    without it, and `max_pixels` is checked instead.
    """
    if not all(name in Image.OPEN for name in FORMATS):
        Image.init()
    for name in FORMATS:
        if name not in Image.OPEN:
            continue
        factory, accept = Image.OPEN[name]
        if accept is not None and accept(prefix) is not True:
            continue
        file.seek(0)
        try:
            return factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue
        except (OSError, ValueError, EOFError) as wrong:
            raise BadImage(f"{name} that cannot be read: {wrong}") from wrong
    raise BadImage("not an image in a format that can be read")


_loading = [threading.Lock() for _ in range(16)]


def _from_pil(image: Image.Image, limits: ImageLimits) -> Image.Image:
    # One image may be handed over twice, to two threads: Pillow's images that are not decoded yet share their file.
    with _loading[hash(id(image)) % len(_loading)]:
        return _to_rgb(image, limits)


def _to_rgb(image: Image.Image, limits: ImageLimits) -> Image.Image:
    width, height = image.size
    if width * height > limits.max_pixels:
        raise BadImage(f"{width} × {height} pixels; expected at most {limits.max_pixels:,} (max_pixels)")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode == "I;16":
            return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            on_white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            return Image.alpha_composite(on_white, image.convert("RGBA")).convert("RGB")
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as wrong:
        raise BadImage(f"cannot be decoded: {wrong}") from wrong


def _to_8_bits(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    return ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _from_array(array: NDArray[Any], limits: ImageLimits) -> Image.Image:
    if array.dtype not in (np.uint8, np.bool_):
        raise BadImage(f"an array of {array.dtype}; expected uint8 (0 … 255) or bool")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise BadImage(f"an array of shape {array.shape}; expected [height, width] or [height, width, 1 | 3 | 4]")
    if array.size == 0:
        raise BadImage(f"an array of shape {array.shape}; expected at least one pixel")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    return _to_rgb(Image.fromarray(array), limits)
