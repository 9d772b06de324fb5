"""The fields of a training row: texts, lists, and all spellings of negatives.

What is wrong is added to a list of problems, so that one look at a row names all of it.
"""

from __future__ import annotations

import base64
import io
import json
import numbers
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image

from rtx.runtime.contract import Contract
from rtx.runtime.errors import ItemError
from rtx.runtime.images import BadImage, load_image, looks_like_base64
from rtx.runtime.items import Content, check_text, describe, is_image, read_item, unsupported

Row = Mapping[str, object]

LARGEST_FLOAT32 = 3.4028234663852886e38
# What has a scheme and two slashes.
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
NUMBERED_NEGATIVE = re.compile(r"negative_\d+")


def is_blank(value: object) -> bool:
    """Whether a field has nothing: null, or an empty cell."""
    return value is None or (isinstance(value, str) and not value)


def finite_float32(value: object) -> float | None:
    """A number that is finite in float32, also as text (a cell of a csv file); None for anything else, booleans too."""
    if isinstance(value, bool) or not isinstance(value, str | numbers.Real):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= LARGEST_FLOAT32 else None


def missing(row: Row, name: str) -> str:
    """The problem that a row lacks a field."""
    return f"has no {name}; it has {', '.join(sorted(row)) or 'no field at all'}"


def read_text(row: Row, name: str, problems: list[str]) -> str:
    """A text that is not empty; what comes with a problem is not to be used."""
    if name not in row:
        problems.append(missing(row, name))
        return ""
    value = check_text(0, row[name])
    if isinstance(value, ItemError):
        problems.append(f"{name}: {value.message}")
        return ""
    if not value.strip():
        problems.append(f"{name}: is empty")
    return value


def read_content(
    row: Row, name: str, problems: list[str], folder: Path | None = None, contract: Contract | None = None
) -> str:
    """A text that is not empty, or a text with images as a `Content`; what comes with a problem is not to be used.

    Images come as `{"image": path or data URL or a list of them, "text": ...}`, or as datasets has them: a PIL image,
    or `{"bytes": ..., "path": ...}`.

    Args:
        row, name, problems: as for `read_text`.
        folder: what relative paths are relative to; None for the working directory.
        contract: of the model that is to take it: what it never takes is a problem too. None for any model.
    """
    value = row.get(name)
    if not isinstance(value, Mapping) and not is_image(value):
        return read_text(row, name, problems)
    before = len(problems)
    given, text = value, ""
    if isinstance(value, Mapping) and not {"bytes", "path"} & set(value):
        if unknown := sorted(map(str, set(value) - {"text", "image"})):
            problems.append(
                f"{name}: expected a text, or the keys image and text; got {', '.join(unknown)}{unsupported(unknown)}"
            )
        given = value.get("image")
        # Beside an image a text that is blank is none.
        blank = is_blank(value.get("text")) or (isinstance(value["text"], str) and not value["text"].strip())
        if value.get("text") is not None and not (blank and given is not None):
            text = read_text({"text": value["text"]}, "text", problems)
    several = given if isinstance(given, list | tuple) else () if is_blank(given) else (given,)
    images = [_image_source(f"{name}: image", image, problems, folder) for image in several]
    if len(problems) == before and not (images or text):
        problems.append(f"{name}: is empty")
    content = Content.of(text, images)
    if contract is not None and len(problems) == before:
        fitting = read_item(0, content, contract)
        problems += [f"{name}: {fitting.message}"] if isinstance(fitting, ItemError) else []
    return content


def _image_source(name: str, given: object, problems: list[str], folder: Path | None) -> str:
    """A path or a data URL for an image of a row, with the bytes of one that is in the row itself."""
    if isinstance(given, Mapping) and {"bytes", "path"} & set(given):
        given = given.get("bytes") or given.get("path")
    if isinstance(given, str) and given[:5].lower() == "data:":
        return f"data:{given[5:]}"
    if isinstance(given, str) and URL.match(given):
        problems.append(
            f"{name}: URLs are not fetched here, got {describe(given)}; expected a path, a data URL or base64"
        )
        return ""
    if isinstance(given, str) and looks_like_base64(given):
        return f"data:image/*;base64,{given}"
    if isinstance(given, str) and given:
        path = Path(given) if folder is None else folder / given
        try:
            if not path.is_file():
                problems.append(f"{name}: {path} {'is no file' if path.exists() else 'does not exist'}")
        except (OSError, ValueError) as wrong:  # a name that is too long, or that holds a NUL
            problems.append(f"{name}: {describe(given)} is no path: {getattr(wrong, 'strerror', None) or wrong}")
        return str(path.absolute())
    try:
        content = bytes(given) if isinstance(given, bytes | bytearray) else _png(load_image(given))
    except BadImage as wrong:
        problems.append(f"{name}: {wrong}")
        return ""
    return f"data:image/*;base64,{base64.b64encode(content).decode('ascii')}"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def single_negatives(names: Iterable[str]) -> tuple[str, ...]:
    """Of a row's columns, those that may have one negative each, in order."""
    numbered = sorted((name for name in names if NUMBERED_NEGATIVE.fullmatch(name)), key=lambda name: int(name[9:]))
    return ("negative", *numbered)


def read_negatives(
    row: Row,
    single: tuple[str, ...],
    problems: list[str],
    folder: Path | None = None,
    contract: Contract | None = None,
) -> tuple[str, ...]:
    """All negatives of a row, from `negative`, `negative_1` … (`single`) and then `negatives`, a list.

    A field that is blank has none. In the list nothing may be blank, since `scores` may go with it place by place.
    """
    found = [(name, row[name]) for name in single if not is_blank(row.get(name))]
    if not is_blank(row.get("negatives")):
        found += read_items(row, "negatives", "texts", problems)
    return tuple(read_content({name: value}, name, problems, folder, contract) for name, value in found)


def read_items(row: Row, name: str, kind: str, problems: list[str]) -> list[tuple[str, object]]:
    """The items of a list with their places, as "negatives[0]"."""
    if name not in row:
        problems.append(missing(row, name))
        return []
    several = row[name]
    if isinstance(several, str):
        # A cell of a csv file.
        try:
            several = json.loads(several)
        except (ValueError, RecursionError):
            several = None
        if not isinstance(several, list):
            problems.append(f"{name}: expected a list of {kind} (in csv: a JSON list)")
            return []
    if isinstance(several, Mapping) or not isinstance(several, Iterable):
        problems.append(f"{name}: expected a list of {kind}, got {type(several).__name__}")
        return []
    return [(f"{name}[{place}]", value) for place, value in enumerate(several)]
