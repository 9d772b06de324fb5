"""Items with images to what a model takes: tokens with places for them, or images by themselves."""

from __future__ import annotations

import dataclasses
import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from rtx.runtime import preprocessor as module
from rtx.runtime.contract import Contract
from rtx.runtime.errors import ItemError, UsageError
from rtx.runtime.image_rules import ImagePreprocessor, ImageRules, PreparedImage
from rtx.runtime.images import ImageLimits, load_image
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.text import Encoded
from rtx.runtime.visual_tokens import VisualTokens

HALF = (0.5, 0.5, 0.5)
SPECIAL = ["<pad>", "<sys>", "<end>", "<img>", "<see>", "</see>"]
PATCHES = ImageRules(
    layout="patches",
    resize="multiple",
    resample="bicubic",
    mean=HALF,
    std=HALF,
    patch_size=2,
    temporal_patch_size=2,
    merge_size=2,
    min_pixels=16,
    max_pixels=96,
)
TOGETHER = Contract(
    task="embed",
    inputs=("input_ids", "attention_mask"),
    max_tokens=64,
    pad_token_id=0,
    rendered=("<sys>be<end>", "<end>"),
    rendered_prompt=("<sys>", "<end>"),
    rendered_image="<see><img></see>",
    images=PATCHES,
    visual=VisualTokens(image_token_id=3, merge_size=2, patch_width=24, position_grid=2, hidden=4, deepstack_layers=0),
    prompts={"query": "find it"},
)
JUDGE = dataclasses.replace(
    TOGETHER, task="rerank", rendered=("<sys>be<end>", "<end>", "<end>"), rendered_prompt=(), prompts={}
)
PIXELS = ImageRules(layout="pixels", resize="exact", resample="bilinear", mean=HALF, std=HALF, height=4, width=6)
APART = Contract(
    task="embed",
    inputs=("input_ids", "attention_mask"),
    max_tokens=16,
    pad_token_id=0,
    images=PIXELS,
    image_tokens=6,
    prompts={"query": "find it "},
)


@pytest.fixture(scope="module")
def tokenizer_json() -> str:
    """Words of letters, byte by byte, and special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL, *letters, "Ġa", "be"]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [("Ġ", "a"), ("b", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return str(tokenizer.to_str())


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# Of 2 and of 6 visual tokens.
WIDE, LARGE = picture(4, 8), picture(8, 12, 1)


def some(found: Encoded | ItemError) -> Encoded:
    assert isinstance(found, Encoded), found
    return found


def wrong(found: Encoded | ItemError) -> ItemError:
    assert isinstance(found, ItemError), found
    return found


def shown(tokenizer_json: str, encoded: Encoded | ItemError) -> str:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    return "".join(str(tokenizer.id_to_token(token)) for token in some(encoded).ids).replace("Ġ", " ")


def prepared(rules: ImageRules, image: Image.Image) -> PreparedImage:
    return ImagePreprocessor(rules).prepare(image)


# ---------------------------------------------------------------- images among tokens


def test_each_image_has_as_many_places_as_it_has_tokens(tokenizer_json: str) -> None:
    ready = Preprocessor(TOGETHER, tokenizer_json)
    items: list[Any] = ["ab", WIDE, {"image": [LARGE, WIDE], "text": " ab"}, {"text": "", "image": LARGE}]
    encoded = ready.encode(items)
    wide, large = (f"<see>{'<img>' * count}</see>" for count in (2, 6))
    assert [shown(tokenizer_json, row) for row in encoded] == [
        "<sys>be<end>ab<end>",
        f"<sys>be<end>{wide}<end>",
        f"<sys>be<end>{large}{wide} ab<end>",
        f"<sys>be<end>{large}<end>",
    ]
    assert [len(some(row).images) for row in encoded] == [0, 1, 2, 1]
    assert shown(tokenizer_json, ready.encode([{"image": WIDE}], prompt="query")[0]) == f"<sys>find it<end>{wide}<end>"
    with pytest.raises(UsageError, match="prompt 'qery' does not exist"):
        ready.encode([WIDE], prompt="qery")


def test_pairs_hold_images_on_either_side(tokenizer_json: str) -> None:
    ready = Preprocessor(JUDGE, tokenizer_json)
    wide, large = (f"<see>{'<img>' * count}</see>" for count in (2, 6))
    pairs: list[Any] = [("a", "b"), ("a", WIDE), ({"image": [WIDE, LARGE]}, {"image": LARGE, "text": "b"})]
    encoded = ready.encode_pairs(pairs)
    assert [shown(tokenizer_json, row) for row in encoded] == [
        "<sys>be<end>a<end>b<end>",
        f"<sys>be<end>a<end>{wide}<end>",
        f"<sys>be<end>{wide}{large}<end>{large}b<end>",
    ]
    assert [image.pixels.shape for image in some(encoded[2]).images] == [(4, 8, 3), (8, 12, 3), (8, 12, 3)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch(tokenizer_json: str, side: str) -> None:
    contract = dataclasses.replace(TOGETHER, padding_side=side)
    ready = Preprocessor(contract, tokenizer_json)
    rows = [some(row) for row in ready.encode([{"image": LARGE, "text": "a"}, "abc", WIDE])]
    batch = ready.collate(rows)
    width = max(len(row.ids) for row in rows)
    for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
        empty = [0] * (width - len(row.ids))
        assert ids.tolist() == (empty + row.ids if side == "left" else row.ids + empty)
        assert mask.tolist() == (empty + [1] * len(row.ids) if side == "left" else [1] * len(row.ids) + empty)
    assert batch["image_grid_thw"].tolist() == [[1, 4, 6], [1, 2, 4]]
    assert batch["image_grid_thw"].dtype == np.int64
    images = ImagePreprocessor(PATCHES)
    expected = images.pixel_values([images.prepare(LARGE), images.prepare(WIDE)])
    np.testing.assert_array_equal(batch["pixel_values"], expected)
    assert batch["pixel_values"].shape == (4 * 6 + 2 * 4, 24)
    assert batch["image_digests"].dtype == np.uint64
    assert batch["image_digests"].tobytes() == images.prepare(LARGE).digest + images.prepare(WIDE).digest
    # Texts alone have no images.
    assert set(ready.collate(rows[1:2])) == {"input_ids", "attention_mask"}


def test_a_long_text_loses_words_and_no_place(tokenizer_json: str) -> None:
    places = f"<see>{'<img>' * 6}</see>"
    ready = Preprocessor(dataclasses.replace(TOGETHER, max_tokens=16), tokenizer_json)
    found = ready.encode([{"image": LARGE, "text": "xyz" * 50}])[0]
    assert shown(tokenizer_json, found) == f"<sys>be<end>{places}xyzx<end>"
    judge = Preprocessor(dataclasses.replace(JUDGE, max_tokens=20), tokenizer_json)
    found = judge.encode_pairs([("q" * 90, {"image": LARGE, "text": "d" * 90})])[0]
    assert shown(tokenizer_json, found) == f"<sys>be<end>qqq<end>{places}dddd<end>"


@pytest.mark.parametrize("max_tokens", range(9, 14))
def test_images_that_do_not_fit(tokenizer_json: str, max_tokens: int) -> None:
    ready = Preprocessor(dataclasses.replace(TOGETHER, max_tokens=max_tokens), tokenizer_json)
    found = ready.encode([{"image": LARGE, "text": "a"}, "a"])
    # Template: <sys> be <end> <see> </see> <end>.
    if max_tokens < 12:
        error = wrong(found[0])
        assert (error.index, error.message) == (
            0,
            f"its images take 6 tokens and the template 6; expected at most {max_tokens} together (max_tokens)",
        )
    else:
        assert shown(tokenizer_json, found[0]).endswith("</see><end>" if max_tokens == 12 else "</see>a<end>")
    assert shown(tokenizer_json, found[1]) == "<sys>be<end>a<end>"


@pytest.mark.parametrize("text", ["<img>", "a <img> b", "<see><img></see>"])
def test_a_text_that_spells_a_place(tokenizer_json: str, text: str) -> None:
    ready = Preprocessor(TOGETHER, tokenizer_json)
    for item in (text, {"image": WIDE, "text": text}):
        assert wrong(ready.encode([item])[0]).message == (
            "its text holds <img>, which stands for an image; expected none"
        )
    judge = Preprocessor(JUDGE, tokenizer_json)
    assert "stands for an image" in wrong(judge.encode_pairs([(text, WIDE)])[0]).message
    # Where it is cut off it is not there.
    short = Preprocessor(dataclasses.replace(TOGETHER, max_tokens=16), tokenizer_json)
    some(short.encode(["a" * 40 + text])[0])


# ---------------------------------------------------------------- images by themselves


def test_images_that_become_vectors_by_themselves(tokenizer_json: str) -> None:
    ready = Preprocessor(APART, tokenizer_json)
    encoded = [some(row) for row in ready.encode(["ab", WIDE, {"image": LARGE}], prompt="query")]
    assert shown(tokenizer_json, encoded[0]) == "find it ab"
    assert [row.ids for row in encoded[1:]] == [[], []]
    assert [row.length for row in encoded] == [len(encoded[0].ids), 6, 6]
    batch = ready.collate(encoded[1:])
    assert set(batch) == {"pixel_values", "image_digests"}
    images = ImagePreprocessor(PIXELS)
    np.testing.assert_array_equal(
        batch["pixel_values"], images.pixel_values([images.prepare(i) for i in (WIDE, LARGE)])
    )
    assert batch["pixel_values"].shape == (2, 3, 4, 6)
    assert set(ready.collate(encoded[:1])) == {"input_ids", "attention_mask"}
    with pytest.raises(AssertionError):
        ready.collate(encoded)


def test_texts_of_a_fixed_length(tokenizer_json: str) -> None:
    contract = dataclasses.replace(APART, inputs=("input_ids",), max_tokens=5, fixed_tokens=8)
    ready = Preprocessor(contract, tokenizer_json)
    batch = ready.collate([some(row) for row in ready.encode(["abcdefghij", "x"])])
    assert list(batch) == ["input_ids"]
    assert batch["input_ids"].shape == (2, 8)
    assert (batch["input_ids"] != 0).sum(axis=1).tolist() == [5, 1]


# ---------------------------------------------------------------- where images come from


def test_one_bad_image_is_one_error(tokenizer_json: str, tmp_path: Path) -> None:
    ready = Preprocessor(TOGETHER, tokenizer_json)
    (tmp_path / "notes.txt").write_text("no image")
    bad: list[Any] = [{"image": str(tmp_path / "none.png")}, {"image": [WIDE, tmp_path / "notes.txt"]}, b""]
    bad.append(picture(1, 300))
    found = ready.encode(["a", *bad, WIDE])
    assert [isinstance(row, ItemError) for row in found] == [False, True, True, True, True, False]
    messages = [wrong(row).message for row in found[1:5]]
    assert messages[0] == f"image: '{tmp_path / 'none.png'}': no such file"
    assert messages[1].startswith(f"image 1: '{tmp_path / 'notes.txt'}': no image that can be read")
    assert messages[2] == "image: empty (0 bytes); expected an image"
    assert messages[3] == "image: expected an image at most 200 times as long as wide, got 300 × 1 pixels"
    judge = Preprocessor(JUDGE, tokenizer_json)
    assert wrong(judge.encode_pairs([("q", b"")])[0]).message == "document: image: empty (0 bytes); expected an image"


def test_limits_are_the_callers(tokenizer_json: str, tmp_path: Path) -> None:
    WIDE.save(tmp_path / "page.png")
    limits = ImageLimits(max_pixels=40, base_folder=tmp_path)
    ready = Preprocessor(TOGETHER, tokenizer_json, limits=limits)
    some(ready.encode([{"image": "page.png"}])[0])
    assert "expected at most 40 in all (max_pixels)" in wrong(ready.encode([LARGE])[0]).message
    closed = Preprocessor(TOGETHER, tokenizer_json, limits=ImageLimits(allow_paths=False))
    assert "paths are not allowed here" in wrong(closed.encode([{"image": str(tmp_path / "page.png")}])[0]).message


def test_each_source_is_read_once(tokenizer_json: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WIDE.save(tmp_path / "page.png")
    path = tmp_path / "page.png"
    read: list[object] = []
    threads: set[int] = set()

    def counting(source: object, limits: ImageLimits) -> Image.Image:
        read.append(source)
        threads.add(threading.get_ident())
        return load_image(source, limits)

    monkeypatch.setattr(module, "load_image", counting)
    ready = Preprocessor(TOGETHER, tokenizer_json)
    content = path.read_bytes()
    found = ready.encode([path, {"image": [str(path), WIDE]}, WIDE, content, {"image": content}])
    assert len(read) == 3
    assert threading.get_ident() not in threads
    assert len({image.digest for row in found for image in some(row).images}) == 1
    # The rows of a reranker mostly have one query.
    Preprocessor(JUDGE, tokenizer_json).encode_pairs([(WIDE, "a"), (WIDE, "b"), (WIDE, LARGE)])
    assert len(read) == 5


def test_sources_of_one_image_give_one_result(tokenizer_json: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    LARGE.save(buffer, "PNG")
    (tmp_path / "large.png").write_bytes(buffer.getvalue())
    sources: list[Any] = [LARGE, np.asarray(LARGE), buffer.getvalue(), tmp_path / "large.png"]
    for contract in (TOGETHER, APART):
        ready = Preprocessor(contract, tokenizer_json)
        batches = [ready.collate([some(row)]) for row in ready.encode(sources)]
        for batch in batches[1:]:
            for name, array in batches[0].items():
                np.testing.assert_array_equal(batch[name], array)


def test_calls_from_several_threads(tokenizer_json: str) -> None:
    ready = Preprocessor(TOGETHER, tokenizer_json)
    items: list[Any] = [{"image": [WIDE, LARGE], "text": "ab" * count} for count in range(8)]
    expected = ready.encode(items)
    found: list[Any] = [None] * 4

    def run(number: int) -> None:
        found[number] = ready.encode(items)

    workers = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    def ids(rows: list[Encoded | ItemError]) -> list[list[int]]:
        return [some(row).ids for row in rows]

    assert all(ids(rows) == ids(expected) for rows in found)


def test_a_model_of_texts_is_not_asked_for_images(tokenizer_json: str) -> None:
    contract = Contract(task="embed", inputs=("input_ids",), max_tokens=8, pad_token_id=0)
    ready = Preprocessor(contract, tokenizer_json)
    found = ready.encode(["a", WIDE])
    assert wrong(found[1]).message == "expected a text (str), got Image; this model takes no images"
    batch: dict[str, NDArray[Any]] = ready.collate([some(found[0])])
    assert list(batch) == ["input_ids"]
    assert list(ready.collate([])) == ["input_ids"]
