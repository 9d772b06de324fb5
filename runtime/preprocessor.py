"""Items to what a model takes: the one implementation that trainer, export gate and server share.

items -> check -> images: decode, resize (in parallel)
               -> texts: prompt, tokenise, truncate          -> Encoded -> collate -> Batch
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rtx.runtime.contract import Contract
from rtx.runtime.errors import ItemError
from rtx.runtime.image_rules import ImagePreprocessor, ImageRules, PreparedImage
from rtx.runtime.images import BadImage, ImageLimits, load_image
from rtx.runtime.items import Item, read_item, read_pair
from rtx.runtime.text import Batch, Encoded, Sized, TextTokenizer

# Decoding and resizing release Python's lock; more threads than this wait for memory.
_IMAGE_THREADS = 4

_SIDES = ("query", "document")

# An item with its prepared images.
_Side = tuple[Item, tuple[PreparedImage, ...]]


class Preprocessor:
    """Prepares items by a contract. Safe to call from several threads.

    Args:
        contract: the model's input side.
        tokenizer_json: the content of a `tokenizer.json` of the `tokenizers` library.
        limits: how large images may be, and where they may come from.

    Raises:
        BundleError: the tokenizer cannot be read, puts more special tokens around a text than the contract's limit, or
            others than the contract names.
    """

    def __init__(self, contract: Contract, tokenizer_json: str, *, limits: ImageLimits | None = None) -> None:
        self.contract = contract
        self.tokenizer_json = tokenizer_json
        self.limits = limits or ImageLimits()
        self._texts = TextTokenizer(contract, tokenizer_json)
        self._images = ImagePreprocessor(contract.images) if contract.images is not None else None

    def encode(self, items: Sequence[object], *, prompt: str | None = None) -> list[Encoded | ItemError]:
        """Prepare items.

        Args:
            items: texts, images and mappings of both (see `rtx.runtime.items`), as far as the model takes them;
                anything else becomes an ItemError at its place.
            prompt: name of a prompt of the contract; None for the contract's default.

        Raises:
            UsageError: the prompt does not exist.
        """
        self.contract.prompt_text(prompt)
        checked = [read_item(index, item, self.contract) for index, item in enumerate(items)]
        if self._images is None:  # nothing to decode, and nothing to put among the tokens
            texts: list[Sized] = [(item, ()) for item in checked if not isinstance(item, ItemError)]
            tokenized = iter(self._texts.tokenize(texts, prompt=prompt))
            return [
                item if isinstance(item, ItemError) else _joined(index, next(tokenized), (), None)
                for index, item in enumerate(checked)
            ]
        ready = self._prepare([item if isinstance(item, ItemError) else (item,) for item in checked])
        with_tokens = [sides for sides in ready if isinstance(sides, tuple) and not self._is_vector(sides)]
        rows = iter(self._texts.tokenize([_sizes(sides, self)[0] for sides in with_tokens], prompt=prompt))
        encoded: list[Encoded | ItemError] = []
        for index, sides in enumerate(ready):
            if isinstance(sides, ItemError):
                encoded.append(sides)
            elif self._is_vector(sides):
                encoded.append(Encoded([], [], images=sides[0][1], image_tokens=self.contract.image_tokens))
            else:
                encoded.append(_joined(index, next(rows), sides, self.contract.images))
        return encoded

    def encode_pairs(self, pairs: Sequence[object]) -> list[Encoded | ItemError]:
        """Prepare (query, document) pairs; of texts that are too long the longer one is truncated first.

        The contract's default prompt, if it has one, goes before the query, or is in the rendered template.
        """
        ready = self._prepare([read_pair(index, pair, self.contract) for index, pair in enumerate(pairs)])
        sized = [_sizes(sides, self) for sides in ready if isinstance(sides, tuple)]
        rows = iter(self._texts.tokenize_pairs([(query, document) for query, document in sized]))
        return [
            sides if isinstance(sides, ItemError) else _joined(index, next(rows), sides, self.contract.images)
            for index, sides in enumerate(ready)
        ]

    def collate(self, items: Sequence[Encoded]) -> Batch:
        """Items of one kind, with tokens or with images alone, as a batch (see `rtx.runtime.text.Batch`)."""
        has_tokens = any(item.ids for item in items) or self.contract.images is None
        assert not has_tokens or all(item.ids for item in items), "items with tokens, and images by themselves"
        batch = self._texts.pad(items) if has_tokens else {}
        images = [image for item in items for image in item.images]
        if images and self._images is not None:
            batch["pixel_values"] = self._images.pixel_values(images)
            if self.contract.visual is not None:
                grids = [self._images.grid(image) for image in images]
                batch["image_grid_thw"] = np.array(grids, dtype=np.int64)
            digests = b"".join(image.digest for image in images)
            batch["image_digests"] = np.frombuffer(digests, dtype=np.uint64).reshape(len(images), 2)
        return batch

    def visual_tokens(self, image: PreparedImage) -> int:
        """Tokens that an image becomes among those of a text."""
        assert self.contract.images is not None
        return self.contract.images.tokens(*image.pixels.shape[:2])

    def _is_vector(self, sides: Sequence[_Side]) -> bool:
        """Whether an item is an image that becomes a vector by itself."""
        return self.contract.visual is None and bool(sides[0][1])

    def _prepare(self, checked: Sequence[tuple[Item, ...] | ItemError]) -> list[tuple[_Side, ...] | ItemError]:
        """Decode and resize the images of all items, each source once, several at a time."""
        sources: dict[object, object] = {}
        for sides in checked:
            if isinstance(sides, tuple):
                sources |= {_key(source): source for item in sides for source in item.images}
        if len(sources) < 2:
            prepared = {key: self._prepare_one(source) for key, source in sources.items()}
        else:
            with ThreadPoolExecutor(min(_IMAGE_THREADS, len(sources))) as pool:
                prepared = dict(zip(sources, pool.map(self._prepare_one, sources.values()), strict=True))
        return [
            sides if isinstance(sides, ItemError) else _with_images(index, sides, prepared)
            for index, sides in enumerate(checked)
        ]

    def _prepare_one(self, source: object) -> PreparedImage | str:
        """A prepared image, or what is wrong with its source."""
        assert self._images is not None
        try:
            return self._images.prepare(load_image(source, self.limits))
        except (BadImage, ValueError) as wrong:
            return str(wrong)


def _key(source: object) -> object:
    """Equal for sources that are read once."""
    return str(source) if isinstance(source, str | os.PathLike) else id(source)


def _with_images(
    index: int, sides: Sequence[Item], prepared: Mapping[object, PreparedImage | str]
) -> tuple[_Side, ...] | ItemError:
    found: list[_Side] = []
    for side, item in enumerate(sides):
        images = [prepared[_key(source)] for source in item.images]
        for number, image in enumerate(images):
            if isinstance(image, str):
                where = f"{_SIDES[side]}: " if len(sides) > 1 else ""
                which = f"image {number}" if len(images) > 1 else "image"
                return ItemError(index, f"{where}{which}: {image}")
        found.append((item, tuple(image for image in images if not isinstance(image, str))))
    return tuple(found)


def _sizes(sides: Sequence[_Side], preprocessor: Preprocessor) -> list[Sized]:
    return [(item, tuple(preprocessor.visual_tokens(image) for image in images)) for item, images in sides]


def _joined(index: int, row: Encoded | str, sides: Sequence[_Side], rules: ImageRules | None) -> Encoded | ItemError:
    """Tokens with the images that have places among them."""
    if isinstance(row, str):
        return ItemError(index, row)
    images = tuple(image for _, images in sides for image in images)
    if rules is None or not images:
        return row
    return row._replace(
        images=images, image_tokens=sum(math.prod(rules.grid(*image.pixels.shape[:2])) for image in images)
    )
