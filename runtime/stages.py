"""Where the time of a call goes: the preprocessor and the engine, each with a clock around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.engine import Engine
from rtx.runtime.errors import ItemError
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.text import Batch, Encoded


@dataclass
class StageClock:
    """Seconds spent in each stage since the last reset. Not for calls from several threads at once.

    Attributes:
        tokenize: texts to token ids, truncation included.
        collate: token ids copied into padded arrays.
        run: the engine, with its own copies in and out.
    """

    tokenize: float = 0.0
    collate: float = 0.0
    run: float = 0.0

    def reset(self) -> None:
        for stage in fields(self):
            setattr(self, stage.name, 0.0)


class TimedPreprocessor(Preprocessor):
    """A preprocessor that does the same and takes the time."""

    def __init__(self, preprocessor: Preprocessor, clock: StageClock) -> None:
        super().__init__(preprocessor.contract, preprocessor.tokenizer_json, limits=preprocessor.limits)
        self._clock = clock

    def encode(self, items: Sequence[object], *, prompt: str | None = None) -> list[Encoded | ItemError]:
        start = perf_counter()
        encoded = super().encode(items, prompt=prompt)
        self._clock.tokenize += perf_counter() - start
        return encoded

    def encode_pairs(self, pairs: Sequence[object]) -> list[Encoded | ItemError]:
        start = perf_counter()
        encoded = super().encode_pairs(pairs)
        self._clock.tokenize += perf_counter() - start
        return encoded

    def collate(self, items: Sequence[Encoded]) -> Batch:
        start = perf_counter()
        batch = super().collate(items)
        self._clock.collate += perf_counter() - start
        return batch


class TimedEngine:
    """An engine that does the same and takes the time."""

    def __init__(self, engine: Engine, clock: StageClock) -> None:
        self.name = engine.name
        self.packed = engine.packed
        self._engine = engine
        self._clock = clock

    def run(self, batch: Batch) -> NDArray[np.float32]:
        start = perf_counter()
        output = self._engine.run(batch)
        self._clock.run += perf_counter() - start
        return output

    def max_rows(self, longest: Encoded) -> int | None:
        return self._engine.max_rows(longest)

    def close(self) -> None:
        self._engine.close()
