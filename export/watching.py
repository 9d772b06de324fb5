"""A look inside a graph while items run through it: outputs that are added to a copy, and who is told of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rtx.export.edit import Editor
from rtx.export.graph import strip_notes
from rtx.runtime.backends.graphs import open_graphs
from rtx.runtime.backends.onnx import Watch
from rtx.runtime.engine import run_batch
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.text import Encoded


class Watcher:
    """A copy of a graph with further outputs. What looks inside derives from this, adds them, and takes them.

    Args:
        graph: plain; stays as it is.
    """

    def __init__(self, graph: ir.Model) -> None:
        self.graph = graph.clone()
        self.editor = Editor(self.graph.graph, "watch")
        self._names: list[str] = []

    def show(self, value: ir.Value, shape: Sequence[int]) -> str:
        """Make a value of this shape an output; its name."""
        value.shape = ir.Shape(shape)
        self.graph.graph.outputs.append(value)
        self._names.append(str(value.name))
        return self._names[-1]

    def take(self, outputs: Mapping[str, NDArray[Any]]) -> None:
        """Is given what was shown, after each run; valid until it returns."""
        raise NotImplementedError

    def give(self) -> Mapping[str, NDArray[Any]]:
        """What the graph takes besides a batch, for the next run."""
        return {}

    def magnitude(self, before: ir.Node, x: ir.Value) -> ir.Value:
        """|x|, and infinity for NaN, which ReduceMax may lose."""
        infinity = self.editor.graph.initializers.get("watch_infinity")
        if infinity is None:
            infinity = self.editor.constant("watch_infinity", np.array(np.inf, dtype=np.float32))
        unknown = self.editor.insert(before, "IsNaN", x, dtype=ir.DataType.BOOL)
        return self.editor.insert(before, "Where", unknown, infinity, self.editor.insert(before, "Abs", x))

    @property
    def watch(self) -> Watch:
        return Watch(tuple(self._names), self.take, self.give)

    @contextlib.contextmanager
    def written(self, beside: Path) -> Iterator[Path]:
        """The graph as a file for a while, in the folder of the one whose large weights it shares."""
        path = beside.with_name(f"watched_{beside.name}")
        strip_notes(self.graph)
        try:
            ir.save(self.graph, path)
            yield path
        finally:
            path.unlink(missing_ok=True)


def run_watched(
    watchers: Sequence[Watcher],
    files: Sequence[Path],
    preprocessor: Preprocessor,
    items: Sequence[Encoded],
    *,
    threads: int | None,
) -> None:
    """Run items through graphs that are looked into, each alone: none is padded but to a model's fixed length.

    Args:
        watchers: of the graph for what has tokens, and of that for images if there is one.
        files: where these graphs are written as they are.
        preprocessor: of the model.
        items: what to run.
        threads: of ONNX Runtime.

    Raises:
        EngineError: an item could not be run.
    """
    with contextlib.ExitStack() as stack:
        written = [stack.enter_context(one.written(file)) for one, file in zip(watchers, files, strict=True)]
        engine = open_graphs(
            preprocessor.contract,
            *written,
            threads=threads,
            name="looking inside",
            cache_bytes=0,
            watch=watchers[0].watch,
            image_watch=watchers[-1].watch,
        )
        stack.callback(engine.close)
        for item in items:
            run_batch(engine, preprocessor, [item])
