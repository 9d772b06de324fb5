"""What the layers of a model read on its user's own texts and images, and what 8 and 4 bits get by that.

    items -> plain graph, with a look at what each layer reads -> largest of each channel, some rows -> scales, factors

A static scale is fixed when the model is exported, where the int8 variant finds one a token while it runs. TensorRT
takes no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rtx.export.graph import module_of
from rtx.export.graphs import Graphs
from rtx.export.int4_blocks import Factors, choose_factor
from rtx.export.int8 import check_gemm, content_of, quantizable
from rtx.export.scales import CalibrationOptions, Scales, Seen, choose_scale
from rtx.export.watching import Watcher, run_watched
from rtx.runtime.errors import ExportError
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.text import Encoded

# Rows of an activation that are kept of each item, and what all may take: MiniLM's 4,832 rows take 312 MB.
_ROWS, _MOST_BYTES = 16, 1 << 30
_PLACES = "watch_places"
# Below 1 in float32 even times many rows.
_LAST = 1 - 2.0**-20


def activations(graph: ir.Graph) -> dict[ir.Value, list[tuple[ir.Node, ir.Value]]]:
    """What layers of a plain graph read, each with the nodes that do and their weights."""
    found: dict[ir.Value, list[tuple[ir.Node, ir.Value]]] = {}
    for node, weight in quantizable(graph):
        if node.op_type != "Gather":
            x = node.inputs[0]
            assert x is not None
            found.setdefault(x, []).append((node, weight))
    return found


def weight_of(node: ir.Node, weight: ir.Value, name: str = "calibration") -> NDArray[np.float32]:
    """The matrix [in, out] that a MatMul or Gemm multiplies by; `name` is in errors.

    Raises:
        ExportError: a Gemm that scales, or transposes its input, or a weight that holds NaN or infinity.
    """
    check_gemm(name, node)
    content = content_of(name, node, weight)
    return content.T if node.attributes.get_int("transB", False) else content


def calibrate(
    plain: Graphs,
    files: Sequence[Path],
    preprocessor: Preprocessor,
    items: Sequence[Encoded],
    options: CalibrationOptions | None,
    *,
    factors: bool = False,
    threads: int | None,
) -> Graphs:
    """Run items through the plain graphs and choose the scale and the factor of everything that layers read.

    Args:
        plain: the graphs.
        files: where they are written, that for what has tokens first.
        preprocessor: of the model.
        items: some of what will be served, at least one.
        options: how scales are chosen; None for none.
        factors: whether factors for weights in 4 bits are chosen, of the graph for what has tokens.
        threads: of ONNX Runtime.

    Returns:
        The graphs with their scales and factors. There are none for a graph that no item goes through.

    Raises:
        EngineError: an item could not be run.
        ExportError: what a layer reads is not finite, or a weight is in a way that is not known here.
    """
    graphs = [graph for graph in (plain.tokens, plain.image) if graph is not None]
    channels = sum(_channels(layers) for graph in graphs for layers in activations(graph.graph).values())
    rows = max(1, min(_ROWS, _MOST_BYTES // (4 * channels * len(items))))
    collectors = [_Collector(graph, rows) for graph in graphs]
    run_watched(collectors, files, preprocessor, items, threads=threads)
    seen = [of.take_all() for of in collectors]
    if factors:
        plain = plain._replace(factors=_factors(plain.tokens, seen[0]))
    if options is None:
        return plain
    found = [_choose(one, of, options) for one, of in zip(graphs, seen, strict=True)]
    return plain._replace(scales=found[0], image_scales=found[1] if len(found) > 1 else {})


def _channels(layers: Sequence[tuple[ir.Node, ir.Value]]) -> int:
    node, weight = layers[0]
    assert weight.const_value is not None
    return int(weight.const_value.shape.numpy()[1 if node.attributes.get_int("transB", False) else 0])


class _Collector(Watcher):
    """Keeps of what layers read the largest magnitude of each channel, and some rows.

    What is kept does not depend on how many rows there are: a long page image takes no more memory than a query.
    """

    def __init__(self, graph: ir.Model, rows: int) -> None:
        super().__init__(graph)
        self._largest: dict[str, NDArray[np.float32]] = {}
        self._some: dict[str, list[NDArray[np.float32]]] = {}
        # What an output is of, and whether it is the largest.
        self._shown: dict[str, tuple[str, bool]] = {}
        insert, constant = self.editor.insert, self.editor.constant
        self._rows, self._runs = rows, 0
        # Fractions of however many rows there are: others in each run.
        places = ir.Value(name=_PLACES, shape=ir.Shape([rows]), type=ir.TensorType(ir.DataType.FLOAT))
        self.graph.graph.inputs.append(places)
        rows_axis = constant("watch_rows_axis", np.array([0], dtype=np.int64))
        to_float, to_int = {"to": ir.DataType.FLOAT}, {"to": ir.DataType.INT64}
        for x, layers in activations(self.graph.graph).items():
            (before, _), channels = layers[0], _channels(layers)
            shape = constant(f"watch_{x.name}_shape", np.array([-1, channels], dtype=np.int64))
            flat = insert(before, "Reshape", x, shape)
            count = insert(before, "Shape", flat, attributes={"start": 0, "end": 1}, dtype=ir.DataType.INT64)
            place = insert(before, "Mul", places, insert(before, "Cast", count, attributes=to_float))
            place = insert(before, "Cast", place, attributes=to_int, dtype=ir.DataType.INT64)
            some = insert(before, "Gather", flat, place)
            magnitude = self.magnitude(before, flat)
            largest = insert(before, "ReduceMax", magnitude, rows_axis, attributes={"keepdims": 0})
            self._shown[self.show(largest, [channels])] = str(x.name), True
            self._shown[self.show(some, [rows, channels])] = str(x.name), False

    def take_all(self) -> dict[str, Seen]:
        """What was seen; the collector is empty afterwards."""
        return {x: Seen(self._largest.pop(x), np.concatenate(self._some.pop(x))) for x in list(self._largest)}

    def give(self) -> Mapping[str, NDArray[Any]]:
        # One in each of `rows` equal parts, at a place in it that runs through all of them by the golden ratio.
        phase = self._runs * 0.6180339887 % 1
        self._runs += 1
        places = (np.arange(self._rows) + phase) / self._rows
        return {_PLACES: np.minimum(places, _LAST).astype(np.float32)}

    def take(self, outputs: Mapping[str, NDArray[Any]]) -> None:
        for name, found in outputs.items():
            x, is_largest = self._shown[name]
            if not is_largest:
                self._some.setdefault(x, []).append(found.copy())
            elif x in self._largest:
                np.maximum(self._largest[x], found, out=self._largest[x])
            else:
                self._largest[x] = found.copy()


def _choose(graph: ir.Model, seen: Mapping[str, Seen], options: CalibrationOptions) -> Scales:
    return {
        x: choose_scale(some, weight, options, modules=modules) for x, some, weight, modules in _seen_by(graph, seen)
    }


def _factors(graph: ir.Model, seen: Mapping[str, Seen]) -> Factors:
    found = {x: choose_factor(some, weight, modules=modules) for x, some, weight, modules in _seen_by(graph, seen)}
    return {x: factor for x, factor in found.items() if factor is not None}


def _seen_by(
    graph: ir.Model, seen: Mapping[str, Seen]
) -> Iterator[tuple[str, Seen, NDArray[np.float32], tuple[str, ...]]]:
    """Each activation that was seen: its name, what was seen, [channels, out] of all its layers, and their modules."""
    for x, layers in activations(graph.graph).items():
        if (some := seen.get(str(x.name))) is None:
            continue
        modules = tuple(dict.fromkeys(module_of(node) for node, _ in layers))
        if not (np.isfinite(some.largest).all() and np.isfinite(some.rows).all()):
            raise ExportError(f"calibration: {modules[0]}: reads NaN or infinity on an item")
        yield str(x.name), some, np.concatenate([weight_of(*layer) for layer in layers], axis=1), modules
