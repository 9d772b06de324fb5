"""Tiny PDFs, written by hand: what stands where is known to the point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

# x, distance of the baseline from the top, font size, text, in points of a page of 400 × 500.
Text = tuple[float, float, float, str]
MakePdf = Callable[..., Path]
WIDTH, HEIGHT = 400, 500


@pytest.fixture
def make_pdf(tmp_path: Path) -> MakePdf:
    """`make_pdf(pages, outline=[(title, page), ...], drawing={page: b"operators"}, rotate=0, name="doc")`."""

    def make(
        pages: Sequence[Sequence[Text]],
        outline: Sequence[tuple[str, int]] = (),
        drawing: dict[int, bytes] | None = None,
        rotate: int = 0,
        name: str = "doc",
    ) -> Path:
        path = tmp_path / f"{name}.pdf"
        path.write_bytes(_pdf(pages, outline, drawing or {}, rotate))
        return path

    return make


def _pdf(
    pages: Sequence[Sequence[Text]], outline: Sequence[tuple[str, int]], drawing: dict[int, bytes], rotate: int
) -> bytes:
    # 1 catalogue, 2 page tree, 3 font, then a page and its content for each, then the outline and its entries.
    first_page, first_entry = 4, 4 + 2 * len(pages)
    kids = " ".join(f"{first_page + 2 * n} 0 R" for n in range(len(pages)))
    catalogue = f"<< /Type /Catalog /Pages 2 0 R /Outlines {first_entry} 0 R >>"
    objects = [
        catalogue.encode(),
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    for number, texts in enumerate(pages):
        stream = drawing.get(number, b"") + b"".join(map(_show, texts))
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {WIDTH} {HEIGHT}] /Rotate {rotate} /Contents "
            f"{first_page + 2 * number + 1} 0 R /Resources << /Font << /F1 3 0 R >> >> >>".encode()
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n".encode() + stream + b"\nendstream")
    last = first_entry + len(outline)
    objects.append(f"<< /Type /Outlines /First {first_entry + 1} 0 R /Last {last} 0 R >>".encode())
    for place, (title, page) in enumerate(outline, start=first_entry + 1):
        links = (f" /Next {place + 1} 0 R" if place < last else "") + (
            f" /Prev {place - 1} 0 R" if place > first_entry + 1 else ""
        )
        target = f"[{first_page + 2 * page} 0 R /XYZ 0 0 0]"
        objects.append(f"<< /Title ({title}) /Parent {first_entry} 0 R /Dest {target}{links} >>".encode())
    return _file(objects)


def _show(text: Text) -> bytes:
    x, below_top, size, characters = text
    escaped = characters.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")
    return f"BT /F1 {size} Tf {x} {HEIGHT - below_top} Td ({escaped}) Tj ET\n".encode("cp1252")


def _file(objects: Sequence[bytes]) -> bytes:
    whole, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(whole))
        whole += f"{number} 0 obj\n".encode() + body + b"\nendobj\n"
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    trailer = f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(whole)}\n%%EOF\n"
    return whole + f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{trailer}".encode()
