"""Golden vectors: inputs, what they were prepared to, and what PyTorch in fp32 made of them.

They travel in the bundle, so that wherever it is opened preprocessing and graphs can be held against the model that was
trained: by the export gate before anything is written, by `rtx verify`, and at the start of a server.

    inputs                             JSON: items and prompts; an image is its number
    image_0, image_1, ...              the files of the images
    lengths, ids, type_ids, ...        tokens of all items, one after the other
    image_counts, digests              prepared images of each item, and their digests
    pixels_0, pixels_1, ...            the prepared images
    outputs                            of PyTorch
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.engine import Budget, Engine, run_items
from rtx.runtime.errors import BundleError, ItemError
from rtx.runtime.image_rules import PreparedImage
from rtx.runtime.manifest import GOLDEN_FILE, Tolerance
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.text import Encoded

_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Deviation:
    """How far outputs are from the golden ones.

    Attributes:
        mean_cosine, min_cosine: of vectors; for scores 1 - |difference| / largest magnitude of the golden scores.
        max_abs: largest absolute difference of any output number.
        worst: the item that is furthest away.
    """

    mean_cosine: float
    min_cosine: float
    max_abs: float
    worst: int

    def within(self, tolerance: Tolerance) -> bool:
        # Written so that NaN is never within.
        return self.min_cosine >= tolerance.min_cosine and self.max_abs <= tolerance.max_abs


def deviation(outputs: NDArray[np.float32], golden: NDArray[np.float32]) -> Deviation:
    """Compare outputs with golden ones, both [n, dimension] or both [n]; in float64."""
    a, b = outputs.astype(np.float64), golden.astype(np.float64)
    difference = np.abs(a - b).reshape(len(b), -1).max(axis=1)
    if b.ndim == 2:
        closeness = np.sum(_unit(a) * _unit(b), axis=1)
    else:
        closeness = 1.0 - difference / max(float(np.abs(b).max()), np.finfo(np.float32).tiny)
    worst = int(np.argmin(closeness))  # the first NaN, if there is one
    return Deviation(float(closeness.mean()), float(closeness[worst]), float(difference.max()), worst)


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    unit: NDArray[np.float64] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    return unit


@dataclass(frozen=True)
class Golden:
    """The golden set.

    Attributes:
        items: texts, mappings of a text and images (bytes of files), or (query, document) pairs of these.
        prompts: for each item the name of its prompt, None for the contract's default.
        tokens: what the preprocessing made of each.
        outputs: [n, dimension] or [n] float32, by PyTorch in fp32, each item run alone.
    """

    items: tuple[Any, ...]
    prompts: tuple[str | None, ...]
    tokens: tuple[Encoded, ...]
    outputs: NDArray[np.float32]

    def to_bytes(self) -> bytes:
        """The content of golden.npz; the same for the same golden set."""
        lengths = np.array([len(item.ids) for item in self.tokens], dtype=np.int64)
        files: list[bytes] = []
        items = [_without_files(item, files) for item in self.items]
        text = json.dumps({"items": items, "prompts": self.prompts}, ensure_ascii=True)
        images = [image for item in self.tokens for image in item.images]
        arrays: dict[str, NDArray[Any]] = {
            **{f"image_{number}": np.frombuffer(file, dtype=np.uint8) for number, file in enumerate(files)},
            **{f"pixels_{number}": image.pixels for number, image in enumerate(images)},
        }
        if images:
            arrays["image_counts"] = np.array([len(item.images) for item in self.tokens], dtype=np.int64)
            arrays["image_tokens"] = np.array([item.image_tokens for item in self.tokens], dtype=np.int64)
            arrays["digests"] = np.frombuffer(b"".join(image.digest for image in images), dtype=np.uint8)
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            inputs=np.frombuffer(text.encode(), dtype=np.uint8),
            lengths=lengths,
            ids=np.array([token for item in self.tokens for token in item.ids], dtype=np.int64),
            type_ids=np.array([token for item in self.tokens for token in item.type_ids], dtype=np.int64),
            prompt_tokens=np.array([item.prompt_tokens for item in self.tokens], dtype=np.int64),
            outputs=self.outputs,
            **arrays,  # type: ignore[arg-type]
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Golden:
        """Read golden.npz.

        Raises:
            BundleError: it is not what `to_bytes` writes.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as data:
                arrays = {name: data[name] for name in data.files}
            inputs = json.loads(arrays["inputs"].tobytes())
            stops = np.cumsum(arrays["lengths"])
            rows = zip(stops - arrays["lengths"], stops, arrays["prompt_tokens"].tolist(), _images(arrays), strict=True)
            tokens = tuple(
                Encoded(arrays["ids"][start:stop].tolist(), arrays["type_ids"][start:stop].tolist(), skipped, *images)
                for start, stop, skipped, images in rows
            )
            items = tuple(_with_files(item, arrays) for item in inputs["items"])
            return cls(items, tuple(inputs["prompts"]), tokens, arrays["outputs"])
        except Exception as broken:  # a damaged zip raises a dozen different classes
            raise BundleError(f"{GOLDEN_FILE}: cannot be read ({type(broken).__name__}: {broken})") from broken

    def tokenize(self, preprocessor: Preprocessor) -> list[Encoded | ItemError]:
        """What a preprocessor makes of the items now, to be compared with `tokens`."""
        return tokenize(preprocessor, self.items, self.prompts)

    def run(self, engine: Engine, preprocessor: Preprocessor, budget: Budget) -> Deviation:
        """Run the recorded tokens through an engine and compare with the recorded outputs."""
        return deviation(run_items(engine, preprocessor, self.tokens, budget), self.outputs)


def _without_files(item: Any, files: list[bytes]) -> Any:
    """An item as JSON: the files of its images are put into `files`, and their numbers in their places."""
    if isinstance(item, tuple):
        return [_without_files(side, files) for side in item]
    if isinstance(item, Mapping):
        given = item.get("image", ())
        images = given if isinstance(given, list | tuple) else [given]
        numbers = range(len(files), len(files) + len(images))
        files += images
        return {"text": item.get("text", ""), "image": list(numbers)}
    return item


def _with_files(item: Any, arrays: Mapping[str, NDArray[Any]]) -> Any:
    """What `_without_files` was given."""
    if isinstance(item, list):
        return tuple(_with_files(side, arrays) for side in item)
    if isinstance(item, dict):
        return {"text": item["text"], "image": [arrays[f"image_{number}"].tobytes() for number in item["image"]]}
    return item


def _images(arrays: Mapping[str, NDArray[Any]]) -> Iterator[tuple[tuple[PreparedImage, ...], int]]:
    """The prepared images of each item, and the tokens that they become in a tower of their own."""
    if "image_counts" not in arrays:
        yield from (((), 0) for _ in arrays["lengths"])
        return
    digests = arrays["digests"].reshape(-1, _DIGEST_BYTES)
    number = 0
    for count, tokens in zip(arrays["image_counts"].tolist(), arrays["image_tokens"].tolist(), strict=True):
        places = range(number, number + count)
        yield tuple(PreparedImage(arrays[f"pixels_{place}"], digests[place].tobytes()) for place in places), tokens
        number += count


def tokenize(
    preprocessor: Preprocessor, items: Sequence[object], prompts: Sequence[str | None]
) -> list[Encoded | ItemError]:
    """Tokenise items, each with a prompt of its own."""
    if preprocessor.contract.task == "rerank":
        return preprocessor.encode_pairs(items)
    return [preprocessor.encode([item], prompt=prompt)[0] for item, prompt in zip(items, prompts, strict=True)]
