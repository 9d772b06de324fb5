from __future__ import annotations

import gc
import hashlib
import io
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pypdfium2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import rtx.runtime.pdf
from rtx.runtime.errors import DataError, MissingExtraError, UsageError
from rtx.runtime.pdf import PdfPages, page_scale

COLOURS = [(200, 10, 20), (10, 180, 20), (30, 30, 160)]
SIZES = [(200, 100), (100, 300), (50, 50)]


@pytest.fixture(scope="module")
def three_pages() -> bytes:
    """At 72 dots an inch a point is a pixel."""
    pages = [Image.new("RGB", size, colour) for size, colour in zip(SIZES, COLOURS, strict=True)]
    buffer = io.BytesIO()
    pages[0].save(buffer, "PDF", save_all=True, append_images=pages[1:], quality=95)
    return buffer.getvalue()


def document(page: str = "/MediaBox[0 0 100 80]", *objects: str, catalog: str = "", trailer: str = "") -> bytes:
    """A PDF of one page, and the objects from the fourth on."""
    numbered = [
        f"<</Type/Catalog/Pages 2 0 R{catalog}>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        f"<</Type/Page/Parent 2 0 R{page}>>",
        *objects,
    ]
    body = "".join(f"{number} 0 obj{content}endobj\n" for number, content in enumerate(numbered, 1))
    return f"%PDF-1.4\n{body}trailer<</Root 1 0 R/Size {len(numbered) + 1}{trailer}>>\n".encode("latin-1")


def stream(content: str, entries: str = "") -> str:
    return f"<</Length {len(content)}{entries}>>stream\n{content}\nendstream "


def colour_of(image: Image.Image) -> tuple[int, ...]:
    return tuple(int(value) for value in np.asarray(image)[image.height // 2, image.width // 2])


# -- pages -----------------------------------------------------------------------------------------------------------


def test_pages_are_rendered_in_order(three_pages: bytes, tmp_path: Path):
    path = tmp_path / "three.pdf"
    path.write_bytes(three_pages)
    for source in (three_pages, path, str(path)):
        with PdfPages(source, dpi=72) as pages:
            images = list(pages)
            assert len(pages) == 3
            assert [image.size for image in images] == SIZES
            assert {image.mode for image in images} == {"RGB"}
            for image, colour in zip(images, COLOURS, strict=True):
                # JPEG inside.
                assert np.abs(np.subtract(colour_of(image), colour)).max() <= 4
            assert np.array_equal(np.asarray(pages[-1]), np.asarray(images[2]))
            with pytest.raises(IndexError):
                pages[3]


@pytest.mark.parametrize("dpi", [36, 144, 100])
def test_resolution(three_pages: bytes, dpi: int):
    sizes = [image.size for image in PdfPages(three_pages, dpi=dpi)]
    assert sizes == [(math.ceil(width * dpi / 72), math.ceil(height * dpi / 72)) for width, height in SIZES]


def test_some_of_the_pages(three_pages: bytes):
    pages = PdfPages(three_pages, dpi=72, pages=(1, 3))
    assert [image.size for image in pages] == SIZES[1:]
    assert pages[0].size == SIZES[1]
    assert len(pages) == 2
    for wrong in ((0, 4), (2, 2), (-1, 2)):
        with pytest.raises(
            UsageError, match=f"the PDF: pages: expected 0 ≤ first < .* ≤ 3, got {wrong[0]}, {wrong[1]}"
        ):
            PdfPages(three_pages, pages=wrong)


def test_a_page_is_rendered_when_it_is_asked_for(three_pages: bytes, monkeypatch: pytest.MonkeyPatch):
    rendered = []
    original = PdfPages._render

    def render(pages: PdfPages, number: int) -> Image.Image:
        rendered.append(number)
        return original(pages, number)

    monkeypatch.setattr(PdfPages, "_render", render)
    images = iter(PdfPages(three_pages, dpi=72))
    assert rendered == []
    next(images)
    next(images)
    assert rendered == [0, 1]


def test_images_outlive_the_document(three_pages: bytes):
    with PdfPages(three_pages, dpi=72) as pages:
        image = pages[1]
        before = image.tobytes()
    del pages
    gc.collect()
    assert image.tobytes() == before


def test_what_is_transparent_is_white_and_a_turned_page_is_turned():
    half = document(
        "/MediaBox[0 0 100 80]/Rotate 90/Contents 4 0 R/Resources<</ExtGState<</G<</ca 0.5>>>>>>",
        stream("/G gs 1 0 0 rg 0 0 100 40 re f"),
    )
    image = PdfPages(half, dpi=72)[0]
    assert image.size == (80, 100)
    # The lower half of the page is on the left.
    assert image.getpixel((10, 50)) in ((255, 127, 127), (255, 128, 128))
    assert image.getpixel((70, 50)) == (255, 255, 255)


def test_fields_of_forms_are_drawn():
    form = document(
        "/MediaBox[0 0 100 80]/Annots[4 0 R]",
        "<</Type/Annot/Subtype/Widget/FT/Tx/T(a)/V(x)/Rect[20 20 80 60]/F 4/P 3 0 R/AP<</N 5 0 R>>>>",
        stream("1 0 0 rg 0 0 60 40 re f", "/Type/XObject/Subtype/Form/BBox[0 0 60 40]"),
        catalog="/AcroForm<</Fields[4 0 R]/DA(/Helv 0 Tf 0 g)>>",
    )
    assert colour_of(PdfPages(form, dpi=72)[0]) == (255, 0, 0)


# -- limits ----------------------------------------------------------------------------------------------------------


def test_a_page_as_large_as_a_house_is_rendered_small():
    """200 inches a side, at 300 dots an inch 3.6 billion pixels."""
    plan = document("/MediaBox[0 0 14400 14400]")
    assert PdfPages(plan, dpi=300, max_pixels=10_000)[0].size == (99, 99)
    strip = document("/MediaBox[0 0 14400 1]")
    width, height = PdfPages(strip, dpi=300, max_pixels=10_000)[0].size
    assert width * height <= 10_000
    assert width > 5_000


@given(st.floats(0.1, 20_000), st.floats(0.1, 20_000), st.floats(0.01, 20), st.integers(1, 10**8))
def test_a_page_has_at_most_so_many_pixels(width: float, height: float, scale: float, max_pixels: int):
    found = page_scale(width, height, scale, max_pixels)
    pixels = math.ceil(width * found) * math.ceil(height * found)
    assert pixels <= max_pixels
    assert found <= scale
    if found < scale:
        # Hardly larger, and it would be too large: two rows and columns more.
        assert (width * found + 2) * (height * found + 2) > max_pixels
    else:
        assert found == scale


@pytest.mark.parametrize("option", [{"dpi": 0}, {"dpi": math.inf}, {"max_pixels": 0}])
def test_options_are_checked(three_pages: bytes, option: dict[str, int]):
    name = next(iter(option))
    with pytest.raises(UsageError, match=f"{name}: expected a number above 0, got {option[name]}"):
        PdfPages(three_pages, **option)


# -- what is no PDF --------------------------------------------------------------------------------------------------


def test_files_that_are_no_pdfs(three_pages: bytes, tmp_path: Path):
    (tmp_path / "empty.pdf").touch()
    (tmp_path / "text.pdf").write_text("text")
    for name, reason in (
        ("none.pdf", "cannot be read: No such file or directory"),
        ("", "cannot be read: Is a directory"),
        ("empty.pdf", r"empty \(0 bytes\); expected a PDF"),
        ("text.pdf", "no PDF, a damaged one, or one without pages"),
    ):
        with pytest.raises(DataError, match=f"^{tmp_path / name}: {reason}$"):
            PdfPages(tmp_path / name)
    with pytest.raises(DataError, match=r"^the PDF: empty \(0 bytes\)"):
        PdfPages(b"")
    with pytest.raises(DataError, match=r"^the PDF: no PDF, a damaged one, or one without pages"):
        PdfPages(three_pages[:500])


def test_a_pdf_without_pages():
    buffer = io.BytesIO()
    with pypdfium2.PdfDocument.new() as empty:
        empty.save(buffer)
    with pytest.raises(DataError, match="the PDF: no PDF, a damaged one, or one without pages"):
        PdfPages(buffer.getvalue())


def test_a_damaged_page_is_named(three_pages: bytes):
    # The second page becomes something else; the others can still be read.
    where = [at for at in range(len(three_pages)) if three_pages.startswith(b"/Type /Page\n", at)]
    assert len(where) == 3
    damaged = three_pages[: where[1]] + b"/Type /Pagx\n" + three_pages[where[1] + 12 :]
    pages = PdfPages(damaged, dpi=72)
    assert pages[0].size == SIZES[0]
    with pytest.raises(DataError, match="the PDF: page 2 cannot be rendered"):
        pages[1]


# -- passwords -------------------------------------------------------------------------------------------------------

_PADDING = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")


def rc4(key: bytes, data: bytes) -> bytes:
    state, j = list(range(256)), 0
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    i = j = 0
    out = bytearray()
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)


def encrypted(password: bytes) -> bytes:
    """An empty page behind a password, by the oldest rule of PDF 1.4: 40 bits, revision 2."""
    padded, file_id = (password + _PADDING)[:32], b"0123456789abcdef"
    owner = rc4(hashlib.md5(padded).digest()[:5], padded)
    rights = (-4).to_bytes(4, "little", signed=True)
    key = hashlib.md5(padded + owner + rights + file_id).digest()[:5]
    user = rc4(key, _PADDING)
    standard = f"<</Filter/Standard/V 1/R 2/P -4/O<{owner.hex()}>/U<{user.hex()}>>>"
    return document("/MediaBox[0 0 100 80]", standard, trailer=f"/Encrypt 4 0 R/ID[<{file_id.hex()}><{file_id.hex()}>]")


def test_encrypted_pdfs(three_pages: bytes):
    secret = encrypted(b"open sesame")
    assert PdfPages(secret, dpi=72, password="open sesame")[0].size == (100, 80)
    with pytest.raises(DataError, match="the PDF: encrypted; expected its password"):
        PdfPages(secret)
    with pytest.raises(DataError, match="the PDF: encrypted; the password is not its own"):
        PdfPages(secret, password="sesame")
    assert len(PdfPages(three_pages, password="not needed")) == 3


# -- life ------------------------------------------------------------------------------------------------------------


def test_a_closed_document_renders_nothing(three_pages: bytes):
    pages = PdfPages(three_pages)
    pages.close()
    pages.close()
    with pytest.raises(UsageError, match="the PDF: is closed"):
        pages[0]


@pytest.mark.parametrize("call", [lambda pages: pages[0], PdfPages.close, lambda pages: PdfPages(pages.source)])
def test_one_thread_at_a_time_calls_pdfium(three_pages: bytes, call: Callable[[Any], object]):
    pages = PdfPages(three_pages)
    pages.source = three_pages
    with ThreadPoolExecutor(1) as pool:
        with rtx.runtime.pdf._pdfium:
            waiting = pool.submit(call, pages)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.05)
        waiting.result(timeout=10)


def test_many_threads(three_pages: bytes):
    shared = PdfPages(three_pages, dpi=72)
    expected = [image.tobytes() for image in shared]

    def render(number: int) -> bytes:
        own = PdfPages(three_pages, dpi=72)
        return (shared if number % 2 else own)[number % 3].tobytes()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(render, range(60))) == [expected[number % 3] for number in range(60)]
    gc.collect()


def test_without_pypdfium2(three_pages: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(MissingExtraError, match=r"reading pages of a PDF needs the package 'pypdfium2'.*\[pdf\]"):
        PdfPages(three_pages)
