"""What a caller may hand over as one item: a text, an image, or a mapping of both.

    "how do I reset it?"                            a text; a str is never a path
    Path("page.png"), bytes, PIL image, array       an image
    {"image": "page.png"}                           the same; here a str is a path, a data URL or base64
    {"text": "fig. 3", "image": page}               both
    {"image": [page, page]}                         several

Free of any model: whether it takes images, and both in one item, is said by its contract.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import NamedTuple

import numpy as np

from rtx.runtime.contract import Contract
from rtx.runtime.errors import ItemError

_KEYS = ("text", "image")


class Content(str):
    """A text with images, or images alone, as one string that stands wherever a text may: in a corpus, in a row.

    It is the JSON of a text and of sources of images that are texts (paths, data URLs), behind a character that JSON
    cannot begin with. Only who reads the user's own files makes one: a plain string of the same content stays a text.
    """

    __slots__ = ()
    _MARK = "\0"

    @classmethod
    def of(cls, text: str, images: Sequence[str]) -> str:
        """The text itself where there are no images."""
        if not images:
            return text
        return cls(cls._MARK + json.dumps({"text": text, "image": list(images)}, ensure_ascii=False))

    @classmethod
    def storable(cls, text: str) -> str:
        """A text or a content as a plain string that `stored` tells apart again."""
        is_content = isinstance(text, cls) or not text.startswith(cls._MARK)
        return str(text) if is_content else str(cls(cls._MARK + json.dumps({"text": text, "image": []})))

    @classmethod
    def stored(cls, text: str) -> str:
        """What `storable` was made of."""
        if not text.startswith(cls._MARK):
            return text
        content = cls(text)
        return content if content.item.images else content.item.text

    @property
    def item(self) -> Item:
        found = json.loads(self[len(self._MARK) :])
        return Item(found["text"], tuple(found["image"]))


class Item(NamedTuple):
    """One item.

    Attributes:
        text: "" where there are images alone.
        images: sources of images in order, as `rtx.runtime.images.load_image` takes them.
    """

    text: str
    images: tuple[object, ...] = ()


def read_item(index: int, value: object, contract: Contract) -> Item | ItemError:
    """The item that a value stands for, if the model of this contract takes it, otherwise what is wrong with it."""
    if isinstance(value, str):
        item = value.item if isinstance(value, Content) else Item(value)
        text = check_text(index, item.text)
        return text if isinstance(text, ItemError) else _fitting(index, item, contract)
    if not contract.takes_images:
        return ItemError(index, f"expected a text (str), got {type(value).__name__}{_hint(value)}")
    if isinstance(value, Mapping):
        return _read_mapping(index, value, contract)
    if is_image(value):
        return Item("", (value,))
    return ItemError(index, f"expected a text, an image or a mapping of both, got {type(value).__name__}")


def _hint(value: object) -> str:
    holds_image = is_image(value) or (isinstance(value, Mapping) and "image" in value)
    return "; this model takes no images" if holds_image else ""


def _read_mapping(index: int, value: Mapping[object, object], contract: Contract) -> Item | ItemError:
    if unknown := [str(key) for key in value if key not in _KEYS]:
        return ItemError(index, f"expected the keys text and image, got {', '.join(unknown)}{unsupported(unknown)}")
    text = value.get("text")
    checked = check_text(index, text) if text is not None else ""
    if isinstance(checked, ItemError):
        return ItemError(index, f"text: {checked.message}")
    given = value.get("image")
    images = tuple(given) if isinstance(given, list | tuple) else () if given is None else (given,)
    if wrong := [type(image).__name__ for image in images if not (is_image(image) or isinstance(image, str))]:
        return ItemError(index, f"image: expected a path, bytes, a PIL image or an array, got {wrong[0]}")
    if text is None and not images:
        return ItemError(index, "expected a text or an image under the keys text and image, got neither")
    return _fitting(index, Item(checked, images), contract)


def unsupported(keys: Iterable[str]) -> str:
    """What is to be said of keys that name what no model is given here, as the end of a sentence; "" for others."""
    found = [key for key in keys if key in ("video", "audio")]
    return f"; {' and '.join(found)} is not supported" if found else ""


def _fitting(index: int, item: Item, contract: Contract) -> Item | ItemError:
    """The item, if a model of this contract takes so many images beside a text."""
    if item.images and not contract.takes_images:
        return ItemError(index, "expected a text, got an image; this model takes no images")
    if item.images and contract.visual is None and (item.text or len(item.images) > 1):
        what = "a text beside an image" if item.text else f"{len(item.images)} images"
        return ItemError(index, f"expected one text or one image, got {what}: this model embeds them apart")
    return item


def is_image(value: object) -> bool:
    """Whether a value that stands by itself is the source of an image."""
    # PIL is not imported to ask: who has no PIL image has not imported it either.
    pil = any(f"{base.__module__}.{base.__qualname__}" == "PIL.Image.Image" for base in type(value).__mro__)
    return pil or isinstance(value, PurePath | bytes | bytearray | memoryview | np.ndarray)


def count_images(value: object) -> int:
    """How many images an item or a pair holds, as far as it is one."""
    if isinstance(value, Content):
        return len(value.item.images)
    if isinstance(value, str):
        return 0
    if isinstance(value, Mapping):
        images = value.get("image")
        return len(images) if isinstance(images, list | tuple) else int(images is not None)
    if isinstance(value, list | tuple):
        return sum(count_images(side) for side in value)
    return int(is_image(value))


def read_pair(index: int, pair: object, contract: Contract) -> tuple[Item, Item] | ItemError:
    """The two items of a (query, document) pair, otherwise what is wrong with it."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        length = f" of {len(pair)}" if isinstance(pair, tuple | list) else ""
        return ItemError(index, f"expected a (query, document) pair, got {type(pair).__name__}{length}")
    query, document = read_item(index, pair[0], contract), read_item(index, pair[1], contract)
    if isinstance(query, ItemError):
        return ItemError(index, f"query: {query.message}")
    if isinstance(document, ItemError):
        return ItemError(index, f"document: {document.message}")
    return query, document


def describe(value: object, limit_chars: int = 60) -> str:
    """An item or a pair in a few words, for messages."""
    if isinstance(value, Content):
        value = {"text": value.item.text, "image": value.item.images}
    if isinstance(value, tuple):
        return f"({', '.join(describe(side, limit_chars // 2) for side in value)})"
    if isinstance(value, Mapping):
        given = value.get("image", ())
        images = given if isinstance(given, list | tuple) else (given,)
        parts = [f"image {_shown(image)}" for image in images]
        return " and ".join([*parts, *([repr(str(value["text"])[:limit_chars])] if value.get("text") else [])])
    return repr(str(value)[:limit_chars]) if isinstance(value, str) else _shown(value)


def _shown(image: object) -> str:
    if isinstance(image, str | PurePath):
        return str(image)[-60:] if len(str(image)) < 1000 else f"of {len(str(image))} characters"
    return f"of {len(image)} bytes" if isinstance(image, bytes) else f"({type(image).__name__})"


def check_text(index: int, item: object) -> str | ItemError:
    """The item if it is a text that can be tokenised, otherwise what is wrong with it."""
    if not isinstance(item, str):
        return ItemError(index, f"expected a text (str), got {type(item).__name__}")
    try:
        item.encode("utf-8")
    except UnicodeEncodeError as broken:
        return ItemError(index, f"holds an unpaired surrogate at character {broken.start}; expected valid Unicode")
    return item
