"""What a caller may hand over as one item: which values are texts, images or both, and what is said of all others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rtx.runtime.contract import Contract
from rtx.runtime.errors import ItemError
from rtx.runtime.image_rules import ImageRules
from rtx.runtime.items import Content, Item, count_images, describe, is_image, read_item, read_pair
from rtx.runtime.visual_tokens import VisualTokens

HALF = (0.5, 0.5, 0.5)
TEXTS = Contract(task="embed", inputs=("input_ids",), max_tokens=8, pad_token_id=0)
# Images by themselves, and images among the tokens of texts.
APART = Contract(
    task="embed",
    inputs=("input_ids",),
    max_tokens=8,
    pad_token_id=0,
    images=ImageRules(layout="pixels", resize="exact", resample="bicubic", mean=HALF, std=HALF, height=4, width=4),
)
TOGETHER = Contract(
    task="embed",
    inputs=("input_ids",),
    max_tokens=8,
    pad_token_id=0,
    rendered=("<", ">"),
    rendered_prompt=("[", "]<"),
    rendered_image="@",
    images=ImageRules(
        layout="patches",
        resize="multiple",
        resample="bicubic",
        mean=HALF,
        std=HALF,
        patch_size=2,
        temporal_patch_size=2,
        merge_size=2,
        min_pixels=16,
        max_pixels=64,
    ),
    visual=VisualTokens(image_token_id=3, merge_size=2, patch_width=24, position_grid=2, hidden=4, deepstack_layers=0),
)
CONTRACTS = {"texts": TEXTS, "apart": APART, "together": TOGETHER}
PICTURE = Image.new("RGB", (4, 4))
IMAGES: dict[str, Any] = {
    "path": Path("page.png"),
    "bytes": b"\x89PNG",
    "bytearray": bytearray(b"\x89PNG"),
    "view": memoryview(b"\x89PNG"),
    "PIL": PICTURE,
    "array": np.zeros((4, 4, 3), np.uint8),
}


def read(value: object, contract: Contract = TOGETHER) -> Item:
    found = read_item(7, value, contract)
    assert isinstance(found, Item), found
    return found


def refusal(value: object, contract: Contract = TOGETHER) -> str:
    found = read_item(7, value, contract)
    assert isinstance(found, ItemError)
    assert found.index == 7
    return found.message


@pytest.mark.parametrize("kind", CONTRACTS)
def test_a_string_is_a_text_and_never_a_path(kind: str) -> None:
    for text in ("page.png", "", "data:image/png;base64,AAAA", "https://example.com/a.png"):
        assert read(text, CONTRACTS[kind]) == Item(text)


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_by_itself_and_under_its_key(name: str) -> None:
    image = IMAGES[name]
    assert is_image(image)
    for contract in (APART, TOGETHER):
        for value in (image, {"image": image}, {"image": [image]}, {"image": (image,), "text": ""}):
            found = read(value, contract)
            assert found.text == ""
            assert len(found.images) == 1
            assert found.images[0] is image


def test_a_mapping() -> None:
    assert read({"text": "fig. 3"}, APART) == read({"text": "fig. 3", "image": None}) == Item("fig. 3")
    # Under its key a string is a path, a URL or base64.
    assert read({"image": "page.png"}) == Item("", ("page.png",))
    assert read({"text": "fig. 3", "image": "page.png"}) == Item("fig. 3", ("page.png",))
    assert read({"image": ["a.png", Path("b.png")], "text": "both"}) == Item("both", ("a.png", Path("b.png")))
    assert read({"image": [], "text": "none"}) == Item("none")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"text": "a", "img": "b", "url": "c"}, "expected the keys text and image, got img, url"),
        ({}, "expected a text or an image under the keys text and image, got neither"),
        ({"image": []}, "expected a text or an image under the keys text and image, got neither"),
        ({"text": None, "image": None}, "expected a text or an image under the keys text and image, got neither"),
        ({"text": 3}, "text: expected a text (str), got int"),
        ({"text": "a\ud800"}, "text: holds an unpaired surrogate at character 1; expected valid Unicode"),
        ({"image": 3}, "image: expected a path, bytes, a PIL image or an array, got int"),
        ({"image": [PICTURE, None]}, "image: expected a path, bytes, a PIL image or an array, got NoneType"),
        ({"image": [[PICTURE]]}, "image: expected a path, bytes, a PIL image or an array, got list"),
        (3, "expected a text, an image or a mapping of both, got int"),
        (None, "expected a text, an image or a mapping of both, got NoneType"),
        ([PICTURE], "expected a text, an image or a mapping of both, got list"),
        ("a\udfff", "holds an unpaired surrogate at character 1; expected valid Unicode"),
    ],
)
def test_what_is_no_item(value: object, message: str) -> None:
    assert refusal(value) == message


@pytest.mark.parametrize("name", IMAGES)
def test_a_model_of_texts_takes_no_image(name: str) -> None:
    image = IMAGES[name]
    kind = type(image).__name__
    assert refusal(image, TEXTS) == f"expected a text (str), got {kind}; this model takes no images"
    assert refusal({"image": image}, TEXTS) == "expected a text (str), got dict; this model takes no images"
    assert refusal(Content.of("a", ["b.png"]), TEXTS) == "expected a text, got an image; this model takes no images"
    assert refusal(3, TEXTS) == "expected a text (str), got int"
    assert refusal({"text": "a"}, TEXTS) == "expected a text (str), got dict"


def test_a_model_that_embeds_them_apart() -> None:
    for value in ({"text": "a", "image": PICTURE}, Content.of("a", ["b.png"])):
        assert refusal(value, APART) == (
            "expected one text or one image, got a text beside an image: this model embeds them apart"
        )
    for value in ({"image": [PICTURE] * 3}, Content.of("", ["a.png"] * 3)):
        assert refusal(value, APART) == "expected one text or one image, got 3 images: this model embeds them apart"
    assert read(Content.of("", ["a.png"]), APART) == Item("", ("a.png",))


def test_what_is_no_text_and_no_image_is_not_supported() -> None:
    assert refusal({"video": "a.mp4"}) == "expected the keys text and image, got video; video is not supported"
    assert refusal({"picture": "a.png"}) == "expected the keys text and image, got picture"


def test_pairs() -> None:
    assert read_pair(0, ("q", {"image": "a.png"}), TOGETHER) == (Item("q"), Item("", ("a.png",)))
    assert read_pair(0, ["q", "d"], TEXTS) == (Item("q"), Item("d"))
    for pair, message in (
        ("qd", "expected a (query, document) pair, got str"),
        (("q",), "expected a (query, document) pair, got tuple of 1"),
        (["q", "d", "e"], "expected a (query, document) pair, got list of 3"),
        ((PICTURE, 3), "document: expected a text, an image or a mapping of both, got int"),
        ((None, 3), "query: expected a text, an image or a mapping of both, got NoneType"),
    ):
        found = read_pair(2, pair, TOGETHER)
        assert isinstance(found, ItemError)
        assert (found.index, found.message) == (2, message)


# ---------------------------------------------------------------- texts and images as one string


def test_content_stands_wherever_a_text_may() -> None:
    content = Content.of("fig. 3", ["a.png", "data:image/png;base64,AA"])
    assert isinstance(content, str)
    assert read(content) == Item("fig. 3", ("a.png", "data:image/png;base64,AA"))
    # Without images it is the text.
    assert type(Content.of("fig. 3", [])) is str
    # Whoever writes the same characters has written a text.
    assert read(str(content)) == Item(str(content))
    assert refusal(Content.of("a\ud800", ["a.png"])).startswith("holds an unpaired surrogate")


@given(st.text(), st.lists(st.text(min_size=1), max_size=3))
def test_what_is_stored_comes_back(text: str, images: list[str]) -> None:
    content = Content.of(text, images)
    stored = Content.storable(content)
    assert type(stored) is str
    found = Content.stored(json.loads(json.dumps(stored)))
    assert found == content
    assert read(found) == Item(text, tuple(images))
    assert isinstance(found, Content) == bool(images)
    # A text that looks like a stored one stays a text as well.
    assert Content.stored(Content.storable(stored)) == stored
    assert not isinstance(Content.stored(Content.storable(stored)), Content)


# ---------------------------------------------------------------- counting, describing


def test_counting_images() -> None:
    counted = {
        0: ["page.png", {"text": "a"}, {}, ("a", "b"), 3, {"image": None}, {"image": []}],
        1: [PICTURE, Path("a"), {"image": "a"}, ("q", PICTURE), Content.of("a", ["b"])],
        2: [{"image": [PICTURE, "a"]}, (PICTURE, {"image": "b", "text": "c"}), Content.of("", ["a", "b"])],
    }
    for count, values in counted.items():
        for value in values:
            assert count_images(value) == count, value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("short", "'short'"),
        ("x" * 100, repr("x" * 60)),
        (Path("a/page.png"), "a/page.png"),
        (b"12345", "of 5 bytes"),
        (PICTURE, "(Image)"),
        ({"text": "t", "image": "a.png"}, "image a.png and 't'"),
        (Content.of("t", ["a.png"]), "image a.png and 't'"),
        (("q", {"image": PICTURE}), "('q', image (Image))"),
        ({"image": "A" * 2000}, "image of 2000 characters"),
    ],
)
def test_an_item_in_few_words(value: object, expected: str) -> None:
    assert describe(value) == expected
