"""Golden vectors: inputs, their tokens, and what PyTorch in fp32 made of them.

They travel in the bundle, so that wherever it is opened the tokenizer and the graph can be held against the model that
was trained: by the export gate before anything is written, by `rtx verify`, and at the start of a server.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.engine import Budget, Engine, run_items
from rtx.runtime.errors import BundleError, ItemError
from rtx.runtime.manifest import GOLDEN_FILE, Tolerance
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.text import Encoded


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
        items: texts, or (query, document) pairs.
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
        text = json.dumps({"items": self.items, "prompts": self.prompts}, ensure_ascii=True)
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            inputs=np.frombuffer(text.encode(), dtype=np.uint8),
            lengths=lengths,
            ids=np.array([token for item in self.tokens for token in item.ids], dtype=np.int64),
            type_ids=np.array([token for item in self.tokens for token in item.type_ids], dtype=np.int64),
            prompt_tokens=np.array([item.prompt_tokens for item in self.tokens], dtype=np.int64),
            outputs=self.outputs,
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
            tokens = tuple(
                Encoded(arrays["ids"][start:stop].tolist(), arrays["type_ids"][start:stop].tolist(), int(skipped))
                for start, stop, skipped in zip(
                    stops - arrays["lengths"], stops, arrays["prompt_tokens"].tolist(), strict=True
                )
            )
            items = tuple(tuple(item) if isinstance(item, list) else item for item in inputs["items"])
            return cls(items, tuple(inputs["prompts"]), tokens, arrays["outputs"])
        except Exception as broken:  # a damaged zip raises a dozen different classes
            raise BundleError(f"{GOLDEN_FILE}: cannot be read ({type(broken).__name__}: {broken})") from broken

    def tokenize(self, preprocessor: Preprocessor) -> list[Encoded | ItemError]:
        """What a preprocessor makes of the items now, to be compared with `tokens`."""
        return tokenize(preprocessor, self.items, self.prompts)

    def run(self, engine: Engine, preprocessor: Preprocessor, budget: Budget) -> Deviation:
        """Run the recorded tokens through an engine and compare with the recorded outputs."""
        return deviation(run_items(engine, preprocessor, self.tokens, budget), self.outputs)


def tokenize(
    preprocessor: Preprocessor, items: Sequence[object], prompts: Sequence[str | None]
) -> list[Encoded | ItemError]:
    """Tokenise items, each with a prompt of its own."""
    if preprocessor.contract.task == "rerank":
        return preprocessor.encode_pairs(items)
    return [preprocessor.encode([item], prompt=prompt)[0] for item, prompt in zip(items, prompts, strict=True)]
