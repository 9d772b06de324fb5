"""What opens one graph of a model: ONNX Runtime a graph, TensorRT the engine that was built of it, Triton's server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from rtx.runtime.engine import Engine
from rtx.runtime.text import Batch


class Graph(Engine, Protocol):
    """One graph, as an engine whose outputs can be asked for by name.

    Attributes:
        input_names: of the graph.
        metadata: what who wrote the graph noted in it.
    """

    input_names: tuple[str, ...]
    metadata: dict[str, str]

    def fetch(self, outputs: Sequence[str], batch: Batch) -> list[NDArray[Any]]:
        """Some of the graph's outputs.

        Raises:
            EngineError: the batch could not be run.
        """


OpenGraph = Callable[..., Graph]
"""Called as `rtx.runtime.backends.onnx.OnnxEngine` is."""
