"""The contract of every engine, and the one loop that runs items through one.

An engine turns a padded batch into vectors or scores. It knows nothing of texts, prompts or order; what calls it knows
nothing of ONNX Runtime, TensorRT or PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.batching import plan_batches
from rtx.runtime.errors import EngineError, UsageError
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.text import Batch, Encoded

# More than any model gains from. ONNX Runtime starts as many as it is told, and from 2**31 on raises TypeError.
_MAX_THREADS = 1024

TENSORRT = "tensorrt"
"""The device whose engines are TensorRT's."""


def check_threads(threads: int | None) -> None:
    """Raise UsageError for a number of threads that no engine can run with; None lets the engine choose."""
    if threads is not None and threads < 1:
        raise UsageError(f"threads: expected at least 1, got {threads}")
    if threads is not None and threads > _MAX_THREADS:
        raise UsageError(f"threads: expected at most {_MAX_THREADS}, got {threads}")


def gpu_index(device: str) -> int | None:
    """The number of the GPU that a device's name means, as "cuda:1" or "tensorrt:1"; None for "cpu".

    On "cuda", ONNX Runtime runs a bundle's graphs; on "tensorrt", TensorRT runs its engines.

    Raises:
        UsageError: it means no device.
    """
    if device == "cpu":
        return None
    kind, colon, number = device.partition(":")
    if kind not in ("cuda", TENSORRT) or (colon and not (number.isascii() and number.isdigit())):
        raise UsageError(f"device: expected cpu, cuda or cuda:N, {TENSORRT} or {TENSORRT}:N, got '{device}'")
    return int(number or 0)


def is_tensorrt(device: str) -> bool:
    """Whether a device's name asks for a bundle's engines."""
    return device.partition(":")[0] == TENSORRT


class Engine(Protocol):
    """Runs a model. Safe to call from several threads at once.

    Attributes:
        name: what error messages call it.
        packed: whether it leaves out the padding of what has tokens: a batch then costs the sum of its lengths, and it
            is of no use to put items of similar length together.
    """

    name: str
    packed: bool

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """One padded batch through the model.

        Args:
            batch: arrays by name (see `rtx.runtime.text.Batch`).

        Returns:
            [rows, dimension] float32 vectors, or [rows] float32 scores; the caller's to keep.

        Raises:
            EngineError: the batch could not be run.
        """

    def max_rows(self, longest: Encoded) -> int | None:
        """How many rows a batch may have in which this item has most tokens: None for any, 0 if `run` takes none."""

    def close(self) -> None:
        """Give back what the engine holds. Calling it twice is allowed; running afterwards is not."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much goes through the engine at once.

    Attributes:
        max_batch_tokens: limit on rows * longest row, padding included, or for an engine that packs on the sum of the
            lengths. On a CPU small batches are the fast ones: they stay in the cache (docs/benchmarks.md).
        max_batch_items: limit on the rows.
    """

    max_batch_tokens: int = 1024
    max_batch_items: int = 64

    @classmethod
    def of(cls, device: str) -> Budget:
        """The default of a device. That of GPUs is the largest batch that engines are built for, and not measured."""
        return cls() if gpu_index(device) is None else cls(max_batch_tokens=16_384, max_batch_items=256)

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "max_batch_items"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: expected at least 1, got {getattr(self, name)}")


def run_items(
    engine: Engine, preprocessor: Preprocessor, items: Sequence[Encoded], budget: Budget
) -> NDArray[np.float32]:
    """Items through the engine in batches within the budget, results in the order of `items`.

    Batches are of similar length, or in the order of `items` if the engine packs. Images that become vectors by
    themselves run apart from what has tokens.

    Returns:
        [len(items), dimension] or [len(items)] float32; of length 0 along the first axis if there are no items.

    Raises:
        EngineError: the engine failed, or what it gave is not what the contract says.
    """
    if len(items) == 1:  # a single query: nothing to plan, and nothing to put in order
        return run_batch(engine, preprocessor, items)
    results = np.empty(preprocessor.contract.output_shape(len(items)), dtype=np.float32)
    for kind in (True, False):
        places = [place for place, item in enumerate(items) if bool(item.ids) == kind]
        batches = plan_batches(
            [items[place].length for place in places],
            max_batch_tokens=budget.max_batch_tokens,
            max_batch_items=budget.max_batch_items,
            packed=engine.packed,
        )
        for batch in batches:
            rows = [places[index] for index in batch]
            results[rows] = run_batch(engine, preprocessor, [items[row] for row in rows])
    return results


def run_batch(engine: Engine, preprocessor: Preprocessor, items: Sequence[Encoded]) -> NDArray[np.float32]:
    """Items through the engine in one batch, or in as few as it takes: [len(items), dimension] or [len(items)] float32.

    Args:
        engine: that runs them.
        preprocessor: makes a batch of them.
        items: at least one; either all of them have tokens, or none.

    Raises:
        EngineError: the engine failed, or what it gave is not what the contract says.
    """
    most = engine.max_rows(max(items, key=_tokens))
    if most is None or len(items) <= most:
        return _run_whole(engine, preprocessor, items)
    results = np.empty(preprocessor.contract.output_shape(len(items)), dtype=np.float32)
    # The longest first, so that the rest, which are shorter, may have more rows.
    left = sorted(range(len(items)), key=lambda place: -_tokens(items[place]))
    while left:
        most = engine.max_rows(items[left[0]])
        rows, left = left[: most or 1], left[most or 1 :]
        results[rows] = _run_whole(engine, preprocessor, [items[row] for row in rows])
    return results


def _tokens(item: Encoded) -> int:
    """What a batch is padded to; not `length`, which counts what an image costs besides."""
    return len(item.ids)


def rows_taken(profiles: Sequence[Mapping[str, Sequence[int]]], longest: Encoded) -> int:
    """`Engine.max_rows` of an engine that was built for some sizes.

    Args:
        profiles: as `EngineEntry` has them: of batches of tokens, or of images that become vectors by themselves.
        longest: of a batch.
    """
    if not longest.ids:
        return max(one["images"][2] for one in profiles)
    tokens = len(longest.ids)
    # Where rows have a fixed length, profiles have no range of it.
    fits = (
        one["batch"][2] for one in profiles if "tokens" not in one or one["tokens"][0] <= tokens <= one["tokens"][2]
    )
    return max(fits, default=0)


def _run_whole(engine: Engine, preprocessor: Preprocessor, items: Sequence[Encoded]) -> NDArray[np.float32]:
    results = engine.run(preprocessor.collate(items))
    expected = preprocessor.contract.output_shape(len(items))
    # NumPy would spread a wrong shape over the rows, or round another type, without a word.
    if results.shape != expected or results.dtype != np.float32:
        got = f"{list(results.shape)} {results.dtype}"
        raise EngineError(f"{engine.name}: expected {list(expected)} float32 from the engine, got {got}")
    return results
