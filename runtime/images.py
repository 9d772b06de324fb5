"""Any image that a caller may hand over, decoded to RGB: file, bytes, base64, URL, PIL image, array.

text -> what it names (path, URL, base64) -> bytes -> header -> limits -> pixels -> upright -> RGB

Decoding runs in worker threads, on what strangers send: the size is checked before anything is decoded, only formats
that Pillow decodes by itself are opened, and no global of Pillow's is touched.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF", "QOI")
"""What is decoded, by Pillow's names. Others of its formats start programs, have no signature or are rare."""

_WHITE = (255, 255, 255, 255)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What is met where an image is expected, by what it begins with.
_NOT_IMAGES = (
    (rb"%PDF-", "a PDF document; expected an image: rtx.runtime.PdfPages makes one of each page"),
    (rb"(<\?xml.*)?(<!--.*-->)?\s*(<!DOCTYPE\s+svg.*)?<svg\b", "an SVG drawing; expected pixels: render it to a PNG"),
    (rb"<(!doctype\s+)?html\b", "a web page; expected an image"),
    (rb"version https://git-lfs", "a pointer of Git LFS; expected the image itself: git lfs pull brings it"),
    (rb".{4}ftyp(heic|heix|heim|heis|hevc|mif1|msf1)", "a HEIC image; expected one converted to JPEG or PNG"),
)
_SNIFFED_BYTES = 1024
# The shortest text that is taken for base64: an image of one pixel has about as many characters.
_SHORTEST_BASE64 = 32

# One image may be given twice and decoded by two threads; one that is not decoded yet shares its file with itself.
_loading = [threading.Lock() for _ in range(16)]


class BadImage(ValueError):  # noqa: N818 - a reason, which the caller turns into an ItemError
    """An image that cannot be used; the text is one sentence with what was expected."""


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What is accepted.

    Attributes:
        max_bytes: of a file, of what a URL answers, of base64 once it is decoded.
        max_pixels: height times width; of what is to be decoded it is checked before. The default is where Pillow
            begins to warn: with more, it does warn of a TIFF, and refuses it from twice that on.
        allow_urls: whether http:// and https:// are fetched. Whoever names a URL reaches what this machine reaches.
        allow_paths: whether a text may name a file. A server that takes texts from strangers says no.
        base_folder: what relative paths are relative to; None for the working directory.
        timeout_s: of a fetch as a whole (see `rtx.runtime.fetching.fetch`).
    """

    max_bytes: int = 64 << 20
    max_pixels: int = 89_478_485
    allow_urls: bool = False
    allow_paths: bool = True
    base_folder: Path | None = None
    timeout_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")


DEFAULT_LIMITS = ImageLimits()


def load_image(source: object, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Decode one image: upright by its EXIF orientation, the first of several frames, on white where it is transparent.

    transformers' image processors lay transparent images on white too; its `load_image` drops the transparency, so that
    black on transparent becomes black on black. Grey of 16 bits is scaled to 8, where Pillow cuts it off at 255. Colour
    profiles are ignored, as they are there.

    Args:
        source: a Path; bytes; a PIL image, at its current frame; an array [height, width] or
            [height, width, 1 | 3 | 4] of uint8 or bool; or a text: a path, an http(s) URL, a data: URL, or base64,
            which is known by its beginning.
        limits: what is accepted.

    Returns:
        In mode RGB, all decoded. A PIL image that is upright RGB already is returned itself; none is changed, beyond
        being decoded.

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
    kind = type(source).__name__
    raise BadImage(f"expected an image (a path, bytes, base64, a URL, a PIL image or a uint8 array), got {kind}")


def _from_text(text: str, limits: ImageLimits) -> Image.Image:
    scheme = re.match(r"([a-z][a-z0-9+.-]+):(//)?", text[:32], re.IGNORECASE)
    kind = scheme.group(1).lower() if scheme else ""
    if kind == "data":
        header, comma, body = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise BadImage(f"a data: URL that is not base64 ({_shown(text, 40)}); expected data:image/…;base64,…")
        return _from_bytes(_decoded(body, limits), limits)
    if kind in ("http", "https"):
        return _from_url(text, limits)
    if scheme and scheme.group(2):
        raise BadImage(f"a URL of the scheme {kind}; expected http or https")
    if looks_like_base64(text):
        return _from_bytes(_decoded(text, limits), limits)
    if not limits.allow_paths:
        raise BadImage(f"no base64 of an image, and paths are not allowed here: {_shown(text)}")
    return _from_path(Path(text), limits)


def _shown(text: str, limit_characters: int = 80) -> str:
    if len(text) <= limit_characters:
        return f"'{text}'"
    return f"'{text[:limit_characters]}…' ({len(text):,} characters)"


# -- base64 ----------------------------------------------------------------------------------------------------------


def looks_like_base64(text: str) -> bool:
    """Whether it begins as the base64 of an image does. A path hardly can: base64 has no full stop."""
    head = "".join(text[: 2 * _SHORTEST_BASE64].split())[:_SHORTEST_BASE64]
    if len(head) < _SHORTEST_BASE64:
        return False
    try:
        prefix = base64.b64decode(head.translate(_TO_STANDARD), validate=True)
    except ValueError:
        return False
    return next(_candidates(prefix[:16]), None) is not None


_TO_STANDARD = {ord("-"): "+", ord("_"): "/"}


def _decoded(text: str, limits: ImageLimits) -> bytes:
    compact = "".join(text.split()).rstrip("=")
    _check_bytes(len(compact) * 3 // 4, limits)
    try:
        return base64.b64decode(compact.translate(_TO_STANDARD) + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError) as wrong:
        raise BadImage(f"base64 that cannot be decoded ({wrong})") from wrong


def _check_bytes(count: int, limits: ImageLimits) -> None:
    if count > limits.max_bytes:
        raise BadImage(f"an image of {count:,} bytes; expected at most {limits.max_bytes:,} (max_bytes)")


# -- URLs ------------------------------------------------------------------------------------------------------------


def _from_url(url: str, limits: ImageLimits) -> Image.Image:
    if not limits.allow_urls:
        raise BadImage("URLs are not allowed here; expected a path, bytes or base64")
    # Here, as they take longer to import than all else in this file.
    import http.client
    import urllib.error

    from rtx.runtime.fetching import FetchError, fetch

    try:
        # What may stand in a query, a signature for instance, does not belong in a log.
        where = _shown(url.partition("?")[0].partition("#")[0])
        content = fetch(url, check_bytes=lambda count: _check_bytes(count, limits), timeout_s=limits.timeout_s)
        return _from_bytes(content, limits)
    except (BadImage, FetchError) as wrong:
        raise BadImage(f"{where}: {wrong}") from wrong
    except urllib.error.HTTPError as wrong:
        wrong.close()
        raise BadImage(f"{where}: the server answers {wrong.code} ({wrong.reason})") from wrong
    except (OSError, ValueError, http.client.HTTPException) as wrong:
        raise BadImage(f"{where}: cannot be fetched ({wrong})") from wrong


# -- files and bytes -------------------------------------------------------------------------------------------------


def _from_path(path: Path, limits: ImageLimits) -> Image.Image:
    shown = _shown(str(path), 200)
    below = "" if limits.base_folder is None or path.is_absolute() else f" below {limits.base_folder}"
    try:
        path = limits.base_folder / path if limits.base_folder is not None else path
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise BadImage("a folder; expected a file")
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("neither a file nor a folder; expected a file")
        _check_bytes(status.st_size, limits)
        return _from_bytes(path.read_bytes(), limits)
    except BadImage as wrong:
        raise BadImage(f"{shown}: {wrong}") from wrong
    except FileNotFoundError as wrong:
        raise BadImage(f"{shown}: no such file{below}") from wrong
    except (OSError, ValueError) as wrong:
        raise BadImage(f"{shown}: cannot be read ({getattr(wrong, 'strerror', None) or wrong})") from wrong


def _from_bytes(content: bytes, limits: ImageLimits) -> Image.Image:
    if not content:
        raise BadImage("empty (0 bytes); expected an image")
    _check_bytes(len(content), limits)
    return _to_rgb(_opened(content), limits)


def _opened(content: bytes) -> Image.Image:
    """The image in a file, of which only the header has been read.

    `Image.open` compares the size with a global of Pillow's and warns: the plugins are called without it.
    """
    file = io.BytesIO(content)
    for name, factory in _candidates(content[:16]):
        try:
            return factory(file, "")
        # What a plugin raises on damaged bytes is nowhere said.
        except Exception as wrong:
            raise BadImage(_damaged(name, wrong)) from wrong
    head = content[:_SNIFFED_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, message in _NOT_IMAGES:
        if re.match(pattern, head, re.IGNORECASE | re.DOTALL):
            raise BadImage(message)
    raise BadImage(f"no image that can be read ({len(content):,} bytes); expected one of {', '.join(FORMATS)}")


def _candidates(prefix: bytes) -> Iterator[tuple[str, Callable[[IO[bytes], str], Image.Image]]]:
    """Names and openers of the formats that a file's first 16 bytes belong to: one, as their signatures differ."""
    Image.init()
    from PIL import JpegImagePlugin

    for name in FORMATS:
        # AVIF and QOI are missing in older versions of Pillow.
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is not None and accept is not None and accept(prefix) is True:
            # Pillow's opener of JPEG looks for further images in the file, and warns of what it does not find.
            yield name, JpegImagePlugin.JpegImageFile if name == "JPEG" else factory


def _damaged(name: str | None, wrong: Exception) -> str:
    kind = f"{name} image" if name else "image"
    article = "an" if kind[0] in "AEIOUaeiou" else "a"
    if isinstance(wrong, Image.DecompressionBombError):
        return f"{article} {kind} that is too large ({wrong})"
    return f"{article} {kind} that is truncated, damaged or of an unknown kind ({str(wrong) or type(wrong).__name__})"


# -- pixels ----------------------------------------------------------------------------------------------------------


def _from_pil(image: Image.Image, limits: ImageLimits) -> Image.Image:
    with _loading[hash(id(image)) % len(_loading)]:
        _check_size(*image.size, limits)
        _decode(image)
    return _to_rgb(image, limits)


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if width < 1 or height < 1:
        raise BadImage(f"an image of {width} × {height} pixels; expected at least 1 × 1")
    if width * height > limits.max_pixels:
        expected = f"expected at most {limits.max_pixels:,} in all (max_pixels)"
        raise BadImage(f"an image of {width:,} × {height:,} pixels; {expected}")


def _decode(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as wrong:
        raise BadImage(_damaged(image.format, wrong)) from wrong


def _to_rgb(image: Image.Image, limits: ImageLimits) -> Image.Image:
    _check_size(*image.size, limits)
    _decode(image)
    image = _upright(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray(_in_8_bits(np.asarray(image)))
    if image.mode in ("I", "F"):
        raise BadImage(f"an image of mode {image.mode}, whose values have no fixed range; expected 8 or 16 bits")
    try:
        if "a" in image.getbands():
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except (ValueError, KeyError, OSError) as wrong:
        raise BadImage(f"an image of mode {image.mode} that cannot be turned into RGB ({wrong})") from wrong


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - damaged metadata say nothing, as those that are not there
        return image
    turn = _UPRIGHT.get(orientation)
    return image if turn is None else image.transpose(turn)


def _in_8_bits(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    # 65535 / 255 is 257: the nearest of 256 values.
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _from_array(array: NDArray[Any], limits: ImageLimits) -> Image.Image:
    if array.dtype not in (np.uint8, np.bool_):
        hint = ": floats from 0 to 1 times 255, rounded" if array.dtype.kind == "f" else ""
        raise BadImage(f"an array of {array.dtype}; expected uint8 (0 … 255) or bool{hint}")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise BadImage(
            f"an array of shape {list(array.shape)}; expected [height, width] or [height, width, channels] "
            "with 1, 3 or 4 channels"
        )
    _check_size(array.shape[1], array.shape[0], limits)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    return _to_rgb(Image.fromarray(array), limits)
