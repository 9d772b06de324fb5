"""A model with a graph for texts and one for images, which both give vectors."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.backends.onnx import OnnxEngine, Watch
from rtx.runtime.backends.opener import OpenGraph
from rtx.runtime.errors import EngineError
from rtx.runtime.image_cache import DEFAULT_CACHE_BYTES, ImageCache
from rtx.runtime.text import Batch, Encoded


class TowersEngine:
    """Two graphs behind the contract of every engine.

    Args:
        image: the images' graph, serialised, or the path of its file.
        text: the texts' graph, likewise.
        output: name of the output of both.
        threads: threads of one run of either; None for the cores that this process may use.
        device: as for `OnnxEngine`.
        name: what error messages call the model.
        packed: whether the texts' graph leaves out padding; images have none.
        cache_bytes: what the vectors of images that are kept may take; 0 keeps none.
        watch, image_watch: who looks inside the texts' graph, and the images'.
        open_graph: what opens each graph.

    Attributes:
        input_names: of the texts' graph.
        metadata: what who wrote the texts' graph noted in it.

    Raises:
        UsageError: a number is out of range.
        MissingExtraError: onnxruntime is not installed.
        EngineError: a graph cannot be loaded.
    """

    def __init__(
        self,
        image: bytes | Path,
        text: bytes | Path,
        *,
        output: str,
        threads: int | None = None,
        device: str = "cpu",
        name: str = "onnx",
        packed: bool = False,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        watch: Watch | None = None,
        image_watch: Watch | None = None,
        open_graph: OpenGraph = OnnxEngine,
    ) -> None:
        self.name = name
        self.packed = packed
        self._cache: ImageCache[bytes] = ImageCache(cache_bytes)
        with ExitStack() as opened:
            self._image = open_graph(
                image, output=output, threads=threads, device=device, name=f"{name} (images)", watch=image_watch
            )
            opened.callback(self._image.close)
            self._text = open_graph(text, output=output, threads=threads, device=device, name=name, watch=watch)
            opened.pop_all()
        self.input_names = self._text.input_names
        self.metadata = self._text.metadata

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """One batch of texts or of images through its graph.

        Args:
            batch: the contract's inputs [rows, tokens] int64; or pixel_values [images, 3, height, width] float32 with
                image_digests [images, 2] uint64, equal for equal images.

        Returns:
            [rows, dimension] float32 vectors.

        Raises:
            EngineError: the graph could not be run.
        """
        if "input_ids" in batch:
            return self._text.run(batch)
        keys = [digest.tobytes() for digest in batch["image_digests"]]
        vectors = self._cache.get(dict.fromkeys(keys))
        first = {key: place for place, key in reversed(list(enumerate(keys)))}
        missing = sorted(place for key, place in first.items() if key not in vectors)
        if missing:
            found = self._image.run({"pixel_values": batch["pixel_values"][missing]})
            if len(found) != len(missing):
                raise EngineError(f"{self.name}: expected {len(missing)} vectors of images, got {len(found)}")
            for place, vector in zip(missing, found, strict=True):
                vectors[keys[place]] = vector.copy()
                self._cache.put(keys[place], vectors[keys[place]])
        return np.stack([vectors[key] for key in keys])

    def max_rows(self, longest: Encoded) -> int | None:
        return (self._text if longest.ids else self._image).max_rows(longest)

    def close(self) -> None:
        self._image.close()
        self._text.close()
        self._cache.clear()
