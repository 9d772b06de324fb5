from __future__ import annotations

import base64
import contextlib
import io
import os
import socket
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, features

from rtx.runtime.images import DEFAULT_LIMITS, BadImage, ImageLimits, load_image

HEIGHT, WIDTH = 21, 17
PIXELS: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
PIXELS[6:12] = [10, 200, 30]
PICTURE = Image.fromarray(PIXELS)
OTHER = Image.fromarray(PIXELS[::-1].copy())
LOSSLESS = {
    "PNG": {},
    "BMP": {},
    "PPM": {},
    "TIFF": {},
    "QOI": {},
    "WEBP": {"lossless": True},
    "JPEG2000": {"irreversible": False},
}
LOSSY = {"JPEG": {"quality": 95}, "GIF": {}, "AVIF": {"quality": 95}}


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        for category in (UserWarning, RuntimeWarning):
            warnings.simplefilter("error", category)
        yield


def encoded(image: Image.Image = PICTURE, kind: str = "PNG", **options: Any) -> bytes:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(source: object, limits: ImageLimits = DEFAULT_LIMITS) -> NDArray[np.uint8]:
    image = load_image(source, limits)
    assert image.mode == "RGB"
    return np.asarray(image)


def refusal(source: object, limits: ImageLimits = DEFAULT_LIMITS) -> str:
    with pytest.raises(BadImage) as caught:
        load_image(source, limits)
    return str(caught.value)


# -- what may be given -----------------------------------------------------------------------------------------------


def as_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


@pytest.mark.parametrize(
    "given_as",
    [
        bytes,
        bytearray,
        memoryview,
        as_base64,
        lambda content: base64.encodebytes(content).decode(),
        lambda content: base64.urlsafe_b64encode(content).decode(),
        lambda content: as_base64(content).rstrip("="),
        lambda content: f"data:image/png;base64,{as_base64(content)}",
        lambda content: f"DATA:;BASE64,{as_base64(content)}",
    ],
)
def test_bytes_and_base64(given_as: Callable[[bytes], object]):
    for extra in range(3):  # lengths that need 0, 1 and 2 characters of padding
        content = encoded() + b"\0" * extra
        assert np.array_equal(pixels_of(given_as(content)), PIXELS)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_formats_without_loss(kind: str):
    content = encoded(kind=kind, **LOSSLESS[kind])
    assert np.array_equal(pixels_of(content), PIXELS)
    assert np.array_equal(pixels_of(as_base64(content)), PIXELS)


@pytest.mark.parametrize("kind", LOSSY)
def test_formats_with_loss(kind: str):
    content = encoded(kind=kind, **LOSSY[kind])
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.array_equal(pixels_of(content), expected)
    assert np.array_equal(pixels_of(as_base64(content)), expected)


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "page.png").write_bytes(encoded())
    # The name decides nothing.
    (tmp_path / "page.jpg").write_bytes(encoded())
    inside = ImageLimits(base_folder=tmp_path)
    for path in ("page.png", "page.jpg"):
        assert np.array_equal(pixels_of(tmp_path / path), PIXELS)
        assert np.array_equal(pixels_of(str(tmp_path / path)), PIXELS)
        assert np.array_equal(pixels_of(path, inside), PIXELS)
        assert np.array_equal(pixels_of(str(tmp_path / path), ImageLimits(base_folder=Path("/nowhere"))), PIXELS)
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(pixels_of("page.png"), PIXELS)


def test_paths_that_are_no_images(tmp_path: Path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    os.mkfifo(tmp_path / "pipe.png")
    inside = ImageLimits(base_folder=tmp_path)
    assert refusal(tmp_path) == f"{tmp_path}: a folder; expected a file".replace(str(tmp_path), f"'{tmp_path}'")
    assert refusal("none.png", inside) == f"'none.png': no such file below {tmp_path}"
    assert refusal(tmp_path / "none.png") == f"'{tmp_path}/none.png': no such file"
    assert refusal("pipe.png", inside) == "'pipe.png': neither a file nor a folder; expected a file"
    assert refusal("empty.png", inside) == "'empty.png': empty (0 bytes); expected an image"
    assert refusal("text.png", inside).startswith(
        "'text.png': no image that can be read (8 bytes); expected one of PNG,"
    )
    assert refusal("text.png/page.png", inside) == "'text.png/page.png': cannot be read (Not a directory)"
    assert refusal("page\0.png", inside).startswith("'page\0.png': cannot be read (")
    long = "x" * 5000
    assert refusal(long) == f"'{'x' * 200}…' (5,000 characters): cannot be read (File name too long)"


def test_paths_can_be_forbidden_to_texts(tmp_path: Path):
    (tmp_path / "page.png").write_bytes(encoded())
    strict = ImageLimits(allow_paths=False)
    assert refusal(str(tmp_path / "page.png"), strict).startswith("no base64 of an image, and paths are not allowed")
    assert np.array_equal(pixels_of(as_base64(encoded()), strict), PIXELS)
    assert np.array_equal(pixels_of(tmp_path / "page.png", strict), PIXELS)


def test_texts_that_are_no_images():
    assert refusal("data:image/png,abc") == (
        "a data: URL that is not base64 ('data:image/png,abc'); expected data:image/…;base64,…"
    )
    assert refusal("data:image/png;base64").startswith("a data: URL that is not base64")
    assert refusal("data:image/png;base64,").startswith("empty (0 bytes)")
    assert refusal("data:image/png;base64,%%%").startswith("base64 that cannot be decoded (")
    assert refusal("data:image/png;base64,abcde").startswith("base64 that cannot be decoded (")
    assert refusal("file:///etc/passwd") == "a URL of the scheme file; expected http or https"
    assert refusal("S3://bucket/page.png") == "a URL of the scheme s3; expected http or https"
    assert refusal("http://localhost/page.png") == "URLs are not allowed here; expected a path, bytes or base64"
    assert refusal("") == "'.': a folder; expected a file"
    # A colon does not make a scheme, nor does the letter of a drive.
    assert refusal("page:1.png") == "'page:1.png': no such file"
    assert refusal(r"C:\page.png") == "'C:\\page.png': no such file"


@pytest.mark.parametrize("value", [None, 3, ["page.png"], {"image": "page.png"}, object()])
def test_other_things_are_refused(value: object):
    assert refusal(value).endswith(f"got {type(value).__name__}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"%PDF-1.7\n", "a PDF document; expected an image: rtx.runtime.PdfPages makes one of each page"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing; expected pixels: render it to a PNG"),
        (b'\xef\xbb\xbf <?xml version="1.0"?>\n<!-- a -->\n<svg>', "an SVG drawing; expected pixels"),
        (b"\n<!DOCTYPE html><html>", "a web page; expected an image"),
        (b"<HTML>", "a web page; expected an image"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS; expected the image itself"),
        (b"\0\0\0\x18ftypheic\0\0", "a HEIC image; expected one converted to JPEG or PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "no image that can be read (24 bytes)"),
        (b"\0" * 100, "no image that can be read (100 bytes)"),
    ],
)
def test_files_that_are_no_images(content: bytes, expected: str):
    assert refusal(content).startswith(expected)


# -- arrays ----------------------------------------------------------------------------------------------------------


def test_arrays():
    grey = PIXELS[:, :, 0]
    assert np.array_equal(pixels_of(PIXELS), PIXELS)
    assert np.array_equal(pixels_of(PIXELS[::-1, ::2]), PIXELS[::-1, ::2])
    for array in (grey, grey[:, :, None]):
        assert np.array_equal(pixels_of(array), np.repeat(grey[:, :, None], 3, axis=2))
    assert np.array_equal(pixels_of(grey > 100)[:, :, 1], np.where(grey > 100, 255, 0))
    opaque = np.dstack([PIXELS, np.full((HEIGHT, WIDTH), 255, np.uint8)])
    assert np.array_equal(pixels_of(opaque), PIXELS)
    assert (pixels_of(opaque * np.array([1, 1, 1, 0], np.uint8)) == 255).all()


def test_an_image_of_an_array_does_not_follow_the_array():
    grey = np.repeat(PIXELS[:, :, :1], 3, axis=2)
    opaque = np.dstack([PIXELS, np.full((HEIGHT, WIDTH), 255, np.uint8)])
    for given_array, expected in ((PIXELS, PIXELS), (PIXELS[:, :, 0], grey), (opaque, PIXELS)):
        array = given_array.copy()
        image = load_image(array)
        array[:] = 0
        assert np.array_equal(np.asarray(image), expected)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (PIXELS / 255, "an array of float64; expected uint8 (0 … 255) or bool: floats from 0 to 1 times 255, rounded"),
        (PIXELS.astype(np.int64), "an array of int64; expected uint8 (0 … 255) or bool"),
        (
            PIXELS.transpose(2, 0, 1),
            "an array of shape [3, 21, 17]; expected [height, width] or [height, width, channels] "
            "with 1, 3 or 4 channels",
        ),
        (PIXELS[None], "an array of shape [1, 21, 17, 3]; expected [height, width] or"),
        (PIXELS[0, :, 0], "an array of shape [17]; expected [height, width] or"),
        (PIXELS[:0], "an image of 17 × 0 pixels; expected at least 1 × 1"),
        (PIXELS[:, :, :2], "an array of shape [21, 17, 2]; expected [height, width] or"),
    ],
)
def test_arrays_that_leave_a_doubt_are_refused(array: NDArray[Any], expected: str):
    assert refusal(array).startswith(expected)


# -- colours ---------------------------------------------------------------------------------------------------------


def on_white(pixels: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.float64]:
    share = alpha[:, :, None] / 255
    return np.round(share * pixels + (1 - share) * 255)


def test_transparency_is_laid_on_white():
    alpha = np.linspace(0, 255, HEIGHT * WIDTH).astype(np.uint8).reshape(HEIGHT, WIDTH)
    image = Image.fromarray(np.dstack([PIXELS, alpha]))
    expected = on_white(PIXELS, alpha)
    for source in (image, encoded(image), encoded(image, "WEBP", lossless=True, exact=True), encoded(image, "TIFF")):
        # Pillow blends in integers.
        assert np.abs(pixels_of(source) - expected).max() <= 1
    grey = Image.fromarray(PIXELS[:, :, 0])
    with_alpha = Image.merge("LA", [grey, Image.fromarray(alpha)])
    for source in (with_alpha, encoded(with_alpha)):
        assert np.abs(pixels_of(source) - on_white(PIXELS[:, :, :1], alpha)).max() <= 1
    # Multiplied by their opacity, as a renderer leaves them.
    for premultiplied in (image.convert("RGBa"), with_alpha.convert("La")):
        back = premultiplied.convert("RGBA" if premultiplied.mode == "RGBa" else "LA")
        assert np.array_equal(pixels_of(premultiplied), pixels_of(back))


def test_palettes():
    image = PICTURE.quantize(8)
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(pixels_of(image), expected)
    for kind in ("PNG", "GIF", "TIFF", "BMP"):
        assert np.array_equal(pixels_of(encoded(image, kind)), expected)


@pytest.mark.parametrize("transparency", [3, bytes([255, 255, 255, 0])])
def test_palettes_with_transparent_colours(transparency: int | bytes):
    """Pillow warns where a palette has several opacities; the colour that is transparent becomes white."""
    image = PICTURE.quantize(8)
    expected = np.asarray(image.convert("RGB")).copy()
    expected[np.asarray(image) == 3] = 255
    assert np.array_equal(pixels_of(encoded(image, transparency=transparency)), expected)
    image.info["transparency"] = transparency
    assert np.array_equal(pixels_of(image), expected)


def test_transparent_colours_of_images_without_palette():
    grey = Image.fromarray(PIXELS[:, :, 0])
    assert (pixels_of(encoded(grey, transparency=10))[6:12] == 255).all()
    assert (pixels_of(encoded(PICTURE, transparency=(10, 200, 30)))[6:12] == 255).all()


def test_grey_of_16_bits_is_scaled():
    values = np.array([[0, 1, 128, 129, 257, 32768, 65407, 65535]], np.uint16)
    expected = [0, 0, 0, 1, 1, 128, 255, 255]
    deep = Image.fromarray(values)
    assert deep.mode == "I;16"
    for source in (deep, encoded(deep), encoded(deep, "TIFF"), encoded(deep, "PPM")):
        result = pixels_of(source)
        assert result[0, :, 0].tolist() == result[0, :, 1].tolist() == expected
    swapped = Image.frombytes("I;16B", (8, 1), values.byteswap().tobytes())
    assert pixels_of(swapped)[0, :, 2].tolist() == expected


def test_values_without_a_range_are_refused():
    for kind in ("I", "F"):
        image = Image.new(kind, (2, 2))
        expected = f"an image of mode {kind}, whose values have no fixed range; expected 8 or 16 bits"
        assert refusal(image) == expected
        assert refusal(encoded(image, "TIFF")) == expected


def test_other_modes():
    bilevel = PICTURE.convert("1")
    for source in (bilevel, encoded(bilevel), encoded(bilevel, "TIFF", compression="group4")):
        assert np.array_equal(pixels_of(source)[:, :, 0], np.asarray(bilevel) * 255)
    cmyk = PICTURE.convert("CMYK")
    for source in (cmyk, encoded(cmyk, "TIFF")):
        assert np.array_equal(pixels_of(source), PIXELS)
    assert np.abs(pixels_of(PICTURE.convert("YCbCr")).astype(int) - PIXELS).max() <= 3
    assert np.array_equal(pixels_of(PICTURE.convert("RGBX")), PIXELS)
    unknown = Image.new("L", (1, 1))
    unknown._mode = "XYZ"
    assert refusal(unknown).startswith("an image of mode XYZ that cannot be turned into RGB (")


# -- frames and orientation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF"])
def test_the_first_of_several_frames(kind: str):
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(kind, {})
    single = encoded(PICTURE, "JPEG" if kind == "MPO" else kind, **options)
    several = encoded(PICTURE, kind, save_all=True, append_images=[OTHER, PICTURE], **options)
    assert np.abs(pixels_of(several).astype(int) - pixels_of(single)).max() <= (40 if kind == "AVIF" else 0)
    assert np.abs(pixels_of(several).astype(int) - np.asarray(OTHER)).max() > 100


def test_a_pil_image_at_its_current_frame():
    image = Image.open(io.BytesIO(encoded(save_all=True, append_images=[OTHER])))
    image.seek(1)
    assert np.array_equal(pixels_of(image), np.asarray(OTHER))
    image.seek(0)
    assert np.array_equal(pixels_of(image), PIXELS)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2),
        6: np.rot90(PIXELS, -1),
        7: np.rot90(PIXELS, 2).transpose(1, 0, 2),
        8: np.rot90(PIXELS),
    }[orientation]
    for kind in ("PNG", "WEBP", "TIFF"):
        content = encoded(PICTURE, kind, exif=exif, **LOSSLESS[kind])
        assert np.array_equal(pixels_of(content), upright), kind
        lazy = Image.open(io.BytesIO(content))
        assert np.array_equal(pixels_of(lazy), upright), kind
        # Twice: nothing of the image was changed. TIFF's are turned by Pillow itself.
        assert np.array_equal(pixels_of(lazy), upright), kind
        assert np.array_equal(pixels_of(ImageOps.exif_transpose(lazy)), upright), kind
    content = encoded(PICTURE, "JPEG", exif=exif)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(pixels_of(content), np.asarray(turned))


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"\0" * 40])
def test_damaged_metadata_say_nothing(exif: bytes):
    assert np.array_equal(pixels_of(encoded(exif=exif)), PIXELS)


def test_a_damaged_list_of_further_images_says_nothing():
    """Pillow looks for it in each JPEG, and warns."""
    content = encoded(PICTURE, "JPEG")
    listed = content[:2] + b"\xff\xe2" + struct.pack(">H", 30) + b"MPF\0II*\0" + b"\xff" * 20 + content[2:]
    assert np.array_equal(pixels_of(listed), pixels_of(content))


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_does_not_exist_says_nothing(orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels_of(encoded(exif=exif)), PIXELS)


# -- the caller's images ---------------------------------------------------------------------------------------------


def test_a_given_image_is_not_changed():
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = PICTURE.quantize(8)
    palette.info["transparency"] = 3
    opened = Image.open(io.BytesIO(encoded(exif=exif)))
    for image in (PICTURE.copy(), PICTURE.convert("RGBA"), palette, opened):
        before = (image.mode, image.size, dict(image.info), image.tobytes(), dict(image.getexif()))
        result = load_image(image)
        assert (image.mode, image.size, dict(image.info), image.tobytes(), dict(image.getexif())) == before
        assert (result is image) == (image.mode == "RGB" and image is not opened)


def test_an_image_without_pixels_is_refused():
    assert refusal(Image.new("RGB", (0, 5))) == "an image of 0 × 5 pixels; expected at least 1 × 1"


def test_one_pixel():
    pixel = np.array([[[1, 2, 3]]], np.uint8)
    for kind, options in LOSSLESS.items():
        content = encoded(Image.fromarray(pixel), kind, **options)
        assert np.array_equal(pixels_of(content), pixel)
        if kind != "PPM":  # shorter than any text that is taken for base64
            assert np.array_equal(pixels_of(as_base64(content)), pixel)


def test_many_threads_and_one_image():
    large = Image.fromarray(np.tile(PIXELS, (20, 20, 1)))
    content = encoded(large)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            lazy = Image.open(io.BytesIO(content))
            for image in pool.map(load_image, [lazy] * 16 + [content] * 4):
                assert np.array_equal(np.asarray(image), np.asarray(large))


# -- limits ----------------------------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (head, data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_the_size_is_checked_before_decoding():
    limit = DEFAULT_LIMITS.max_pixels
    assert limit == Image.MAX_IMAGE_PIXELS
    assert refusal(png_header(10_001, 10_000)) == (
        "an image of 10,001 × 10,000 pixels; expected at most 89,478,485 in all (max_pixels)"
    )
    assert "(max_pixels)" in refusal(png_header(2**31 - 1, 2**31 - 1))
    opened = Image.open(io.BytesIO(encoded()))
    opened._size = (limit, 2)
    assert "(max_pixels)" in refusal(opened)
    small = ImageLimits(max_pixels=HEIGHT * WIDTH - 1)
    exact = ImageLimits(max_pixels=HEIGHT * WIDTH)
    for source in (PICTURE, PIXELS, encoded()):
        assert "an image of 17 × 21 pixels" in refusal(source, small)
        assert np.array_equal(pixels_of(source, exact), PIXELS)


def test_pillows_own_limit_is_not_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    assert np.array_equal(pixels_of(encoded()), PIXELS)
    for kind in LOSSLESS.keys() - {"TIFF"}:
        assert np.array_equal(pixels_of(encoded(kind=kind, **LOSSLESS[kind])), PIXELS)
    assert Image.MAX_IMAGE_PIXELS == 200
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert refusal(encoded(kind="TIFF")).startswith("a TIFF image that is too large (")


def test_the_number_of_bytes_is_checked(tmp_path: Path):
    content = encoded()
    path = tmp_path / "page.png"
    path.write_bytes(content)
    exact, small = ImageLimits(max_bytes=len(content)), ImageLimits(max_bytes=len(content) - 1)
    expected = f"an image of {len(content):,} bytes; expected at most {len(content) - 1:,} (max_bytes)"
    for source in (content, as_base64(content), f"data:;base64,{as_base64(content)}", path):
        assert np.array_equal(pixels_of(source, exact), PIXELS)
        assert refusal(source, small).endswith(expected)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path):
    path = tmp_path / "sparse.png"
    path.touch()
    os.truncate(path, 1 << 40)
    assert refusal(path).endswith("an image of 1,099,511,627,776 bytes; expected at most 67,108,864 (max_bytes)")


@pytest.mark.parametrize("name", ["max_bytes", "max_pixels", "timeout_s"])
def test_limits_are_checked(name: str):
    with pytest.raises(ValueError, match=f"{name}: expected a number above 0, got 0"):
        ImageLimits(**{name: 0})


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *LOSSLESS.items(),
        *LOSSY.items(),
        ("JPEG", {"progressive": True}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("GIF", {"save_all": True, "append_images": [OTHER]}),
        ("PNG", {"save_all": True, "append_images": [OTHER]}),
    ],
)
def test_a_truncated_image_is_never_half_an_image(kind: str, options: dict[str, Any]):
    content = encoded(kind=kind, **options)
    whole = pixels_of(content)
    cuts = sorted({*range(0, len(content), max(1, len(content) // 60)), *range(len(content) - 20, len(content))})
    messages = []
    for cut in cuts:
        try:
            assert np.array_equal(pixels_of(content[:cut]), whole), cut
        except BadImage as wrong:
            messages.append(str(wrong))
    assert len(messages) > len(cuts) / 4
    assert all("truncated" in message for message in messages[12:])


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted({*LOSSLESS, *LOSSY} - {"AVIF"})),
    damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_a_damaged_image_is_an_image_or_refused(kind: str, damage: list[tuple[float, int]]):
    content = bytearray(encoded(kind=kind))
    for where, value in damage:
        content[int(where * len(content))] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = load_image(content, ImageLimits(max_pixels=1_000_000))
        except BadImage:
            return
    assert image.mode == "RGB"
    assert image.tobytes()


# -- URLs ------------------------------------------------------------------------------------------------------------


class Pages(BaseHTTPRequestHandler):
    def do_GET(self):
        # The caller hangs up where it has read enough.
        with contextlib.suppress(OSError):
            self.serve()

    def serve(self) -> None:
        path = self.path.partition("?")[0]
        content = encoded()
        if path == "/page.png":
            self.answer(200, content, {"Content-Length": str(len(content))})
        elif path == "/endless":
            self.answer(200, content, {})
            while True:
                self.wfile.write(content)
        elif path == "/large":
            self.answer(200, b"", {"Content-Length": str(10**12)})
        elif path == "/short":
            self.answer(200, content[:100], {"Content-Length": str(len(content))})
        elif path == "/slow":
            self.answer(200, b"", {"Content-Length": str(len(content))})
            for byte in content[:40]:
                self.wfile.write(bytes([byte]))
                threading.Event().wait(0.05)
        elif path == "/headers":
            for byte in b"HTTP/1.0 200 OK\r\nX-Header: " + b"x" * 20:
                self.wfile.write(bytes([byte]))
                threading.Event().wait(0.05)
        elif path == "/web":
            self.answer(200, b"<html>", {"Content-Length": "6"})
        elif path == "/loop":
            self.answer(302, b"", {"Location": "/loop"})
        elif path == "/moved":
            self.answer(301, b"", {"Location": "/page.png"})
        elif path == "/local":
            self.answer(302, b"", {"Location": "file:///etc/passwd"})
        elif path == "/ftp":
            self.answer(302, b"", {"Location": "ftp://localhost/page.png"})
        else:
            self.answer(404, b"", {})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as running:
        running.daemon_threads = True
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


WEB = ImageLimits(allow_urls=True, timeout_s=5)


def test_urls(server: str):
    for path in ("/page.png", "/page.png?size=3", "/moved"):
        assert np.array_equal(pixels_of(server + path, WEB), PIXELS)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/none?signature=secret", "/none': the server answers 404 (Not Found)"),
        ("/local", "/local': the server answers 302 (Found - Redirection to url 'file:///etc/passwd' is not"),
        ("/ftp", "/ftp': cannot be fetched (<urlopen error unknown url type: ftp>)"),
        ("/short", "/short': the answer is truncated after 100 of"),
        ("/web", "/web': a web page; expected an image"),
    ],
)
def test_urls_that_cannot_be_used(server: str, path: str, expected: str):
    assert refusal(server + path, WEB).startswith(f"'{server}{expected}")


def test_a_loop_of_redirects_ends(server: str):
    assert "/loop': the server answers 302" in refusal(server + "/loop", WEB)


def test_no_more_bytes_are_read_than_allowed(server: str):
    small = ImageLimits(allow_urls=True, max_bytes=100_000, timeout_s=1)
    assert "bytes; expected at most 100,000 (max_bytes)" in refusal(server + "/endless", small)
    assert "an image of 1,000,000,000,000 bytes; expected at most 100,000" in refusal(server + "/large", small)


HURRIED = ImageLimits(allow_urls=True, timeout_s=0.3)


@pytest.mark.parametrize("path", ["/slow", "/headers"])
def test_a_server_that_drips_is_not_waited_for(server: str, path: str):
    begun = time.monotonic()
    assert refusal(server + path, HURRIED) == f"'{server}{path}': not fetched whole within 0.3 s (timeout_s)"
    assert time.monotonic() - begun < 1.5


def test_a_handshake_that_drips_is_not_waited_for():
    def drip() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listening.accept()
            with connection:
                # A record of TLS, of which the end does not come.
                for byte in b"\x16\x03\x03\x40\x00" + bytes(35):
                    connection.sendall(bytes([byte]))
                    threading.Event().wait(0.05)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=drip)
        thread.start()
        url = f"https://127.0.0.1:{listening.getsockname()[1]}/page.png"
        begun = time.monotonic()
        assert refusal(url, HURRIED) == f"'{url}': not fetched whole within 0.3 s (timeout_s)"
        assert time.monotonic() - begun < 1.5
        thread.join()


def test_servers_that_are_not_there():
    assert "cannot be fetched" in refusal("http://127.0.0.1:9/page.png", WEB)
    assert "cannot be fetched" in refusal("http:///page.png", WEB)
    assert "cannot be fetched" in refusal("http://[::1/page.png", WEB)
    assert "cannot be fetched" in refusal("http://exa mple/page.png", WEB)
