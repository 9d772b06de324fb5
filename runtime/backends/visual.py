"""A model with images among the tokens: one graph for images, one for texts.

    batch -> distinct images -> cache, or vision graph -> table of visual tokens -> text graph -> vectors or scores

An image is run once as long as the cache holds its visual tokens, however often it comes and beside whatever text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.backends.onnx import OnnxEngine, Watch
from rtx.runtime.backends.opener import Graph, OpenGraph
from rtx.runtime.batching import plan_batches
from rtx.runtime.errors import EngineError, UsageError
from rtx.runtime.image_cache import DEFAULT_CACHE_BYTES, ImageCache
from rtx.runtime.text import Batch, Encoded
from rtx.runtime.visual_tokens import VisualTokens, check_images, count_tokens, text_inputs, vision_inputs

# Attention in the vision graph grows with images * patches², and padding with the batch: large images run alone.
DEFAULT_BATCH_PATCHES = 1024
MAX_BATCH_IMAGES = 64

# An image by its content and the grid it was cut into.
_Key = tuple[bytes, int, int]
# Its visual tokens [1 + deepstack layers, tokens, hidden] float32.
_Tokens = NDArray[np.float32]


class VisualEngine:
    """A vision graph and a text graph behind the contract of every engine.

    Args:
        vision: the vision graph, serialised, or the path of its file.
        text: the text graph, likewise.
        rules: how the model sees images.
        output: name of the text graph's output.
        threads: threads of one run of either; None for the cores that this process may use.
        device: as for `OnnxEngine`.
        name: what error messages call the model.
        cache_bytes: what the visual tokens that are kept may take; 0 keeps none.
        max_batch_patches: limit on images * patches of the largest that run together; a larger image runs alone.
        watch, image_watch: who looks inside the texts' graph, and the images'.
        open_graph: what opens each graph.

    Attributes:
        input_names: of the text graph.
        metadata: what who wrote the text graph noted in it.

    Raises:
        UsageError: a number is out of range.
        MissingExtraError: onnxruntime is not installed.
        EngineError: a graph cannot be loaded.
    """

    packed = False

    def __init__(
        self,
        vision: bytes | Path,
        text: bytes | Path,
        *,
        rules: VisualTokens,
        output: str,
        threads: int | None = None,
        device: str = "cpu",
        name: str = "onnx",
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        max_batch_patches: int = DEFAULT_BATCH_PATCHES,
        watch: Watch | None = None,
        image_watch: Watch | None = None,
        open_graph: OpenGraph = OnnxEngine,
    ) -> None:
        if max_batch_patches < 1:
            raise UsageError(f"max_batch_patches: expected at least 1, got {max_batch_patches}")
        self.name = name
        self._rules = rules
        self._max_batch_patches = max_batch_patches
        self._cache: ImageCache[_Key] = ImageCache(cache_bytes)
        with ExitStack() as opened:
            self._vision = open_graph(
                vision,
                output="image_embeds",
                threads=threads,
                device=device,
                name=f"{name} (vision)",
                watch=image_watch,
            )
            opened.callback(self._vision.close)
            self._text = open_graph(text, output=output, threads=threads, device=device, name=name, watch=watch)
            opened.pop_all()
        self.input_names = self._text.input_names
        self.metadata = self._text.metadata

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """One padded batch through the model.

        Args:
            batch: input_ids and attention_mask [rows, tokens] int64; with images also pixel_values [patches of all
                images, patch_width] float32, image_grid_thw [images, 3] int64 and image_digests [images, 2] uint64,
                equal for equal images. Without digests, images are told apart by their pixels.

        Returns:
            [rows, dimension] float32 vectors, or [rows] float32 scores.

        Raises:
            EngineError: the images do not fit the tokens, or a graph could not be run.
        """
        ids, mask, grids = batch["input_ids"], batch["attention_mask"], batch.get("image_grid_thw")
        try:
            check_images(batch, self._rules)
            keys = _keys(batch)
            starts, rows = _table_rows(keys, grids, self._rules)
            places = text_inputs(ids, mask, grids, self._rules, first_rows=rows)
        except EngineError as wrong:
            raise EngineError(f"{self.name}: {wrong}") from wrong
        tokens = self._see(batch, keys)
        none = np.zeros((1 + self._rules.deepstack_layers, 0, self._rules.hidden), dtype=np.float32)
        table = np.concatenate([tokens[key] for key in starts], axis=1) if starts else none
        inputs = {"input_ids": ids, "attention_mask": mask, "image_embeds": table[0], "deepstack": table[1:]}
        return self._text.run({**inputs, **places})

    def max_rows(self, longest: Encoded) -> int | None:
        return self._text.max_rows(longest)

    def close(self) -> None:
        self._vision.close()
        self._text.close()
        self._cache.clear()

    def _see(self, batch: Batch, keys: Sequence[_Key]) -> dict[_Key, _Tokens]:
        """The visual tokens of each distinct image. Two calls at once that both lack an image both run it."""
        tokens = self._cache.get(dict.fromkeys(keys))
        if len(tokens) == len(set(keys)):
            return tokens
        grids = batch["image_grid_thw"]
        patches = grids.prod(axis=1)
        starts = np.concatenate([[0], patches.cumsum()])
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        missing = sorted(index for key, index in first.items() if key not in tokens)
        groups = plan_batches(
            [int(patches[index]) for index in missing],
            max_batch_tokens=self._max_batch_patches,
            max_batch_items=MAX_BATCH_IMAGES,
        )
        for group in groups:
            images = [missing[index] for index in group]
            pixels = np.concatenate([batch["pixel_values"][starts[image] : starts[image + 1]] for image in images])
            found = _tokens_of(self._vision, pixels, grids[images], self._rules)
            for image, seen in zip(images, found, strict=True):
                tokens[keys[image]] = seen
                self._cache.put(keys[image], seen)
        return tokens


def _tokens_of(
    vision: Graph, pixels: NDArray[np.float32], grids: NDArray[np.int64], rules: VisualTokens
) -> list[_Tokens]:
    """The visual tokens of images that run together, [1 + deepstack layers, tokens, hidden] each."""
    image_embeds, deepstack = vision.fetch(("image_embeds", "deepstack"), vision_inputs(pixels, grids, rules))
    counts = count_tokens(grids, rules)
    expected = [rules.deepstack_layers, len(grids), int(counts.max()), rules.hidden]
    if list(image_embeds.shape) != expected[1:] or list(deepstack.shape) != expected:
        got = f"{list(image_embeds.shape)} and {list(deepstack.shape)}"
        raise EngineError(f"{vision.name}: expected {expected[1:]} and {expected} from the vision graph, got {got}")
    # Copies: what is kept should not hold on to the whole batch and its padding.
    return [
        np.concatenate([image_embeds[np.newaxis, image, :count], deepstack[:, image, :count]])
        for image, count in enumerate(counts)
    ]


def _keys(batch: Mapping[str, NDArray[Any]]) -> list[_Key]:
    """What tells the images of a batch apart, in their order."""
    grids = batch.get("image_grid_thw")
    if grids is None:
        return []
    sides = grids[:, 1:].tolist()
    digests = batch.get("image_digests")
    if digests is None:
        cuts = np.split(batch["pixel_values"], grids.prod(axis=1).cumsum()[:-1])
        contents = [hashlib.blake2b(cut.tobytes(), digest_size=16).digest() for cut in cuts]
    elif len(digests) != len(grids):
        raise EngineError(f"image_digests: expected one for each of {len(grids)} images, got {len(digests)}")
    else:
        contents = [digest.tobytes() for digest in digests]
    return [(content, rows, columns) for content, (rows, columns) in zip(contents, sides, strict=True)]


def _table_rows(
    keys: Sequence[_Key], grids: NDArray[np.int64] | None, rules: VisualTokens
) -> tuple[dict[_Key, int], NDArray[np.int64]]:
    """Where distinct images begin in the table that the text graph reads, in its order, and likewise all [images]."""
    starts: dict[_Key, int] = {}
    rows = 0
    for key, count in zip(keys, count_tokens(grids, rules).tolist() if grids is not None else [], strict=True):
        if key not in starts:
            starts[key] = rows
            rows += count
    return starts, np.array([starts[key] for key in keys], dtype=np.int64)
