"""How large the numbers of a model get where its fp16 graph has half precision, which ends at 65,504.

    golden items, the user's own -> plain graph, with a look at what fp16 makes half -> largest magnitude of each module

Of a model that overflows this says where, and of others how much room there is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from rtx.export.fp16 import LARGEST, bound_masks, half_values
from rtx.export.graph import module_of
from rtx.export.graphs import Graphs
from rtx.export.watching import Watcher, run_watched
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.text import Encoded

_SHOWN = 5


@dataclass(frozen=True)
class Range:
    """The largest magnitude in a module.

    Attributes:
        module: as `RetrievalModel.named_modules` calls it.
        largest: of what it computes in half precision; infinity if that is no number even in float32.
    """

    module: str
    largest: float

    @property
    def fits(self) -> bool:
        """Whether half precision holds it."""
        return self.largest <= LARGEST

    def to_dict(self) -> dict[str, Any]:
        """As report.json holds it; a number that is not finite is None."""
        return {"module": self.module, "largest": self.largest if math.isfinite(self.largest) else None}


def measure_ranges(
    plain: Graphs, files: Sequence[Path], preprocessor: Preprocessor, items: Sequence[Encoded], *, threads: int | None
) -> tuple[Range, ...]:
    """Run items through the plain graphs and look how large numbers get.

    Args:
        plain: the graphs.
        files: where they are written, that for what has tokens first.
        preprocessor: of the model.
        items: what to run.
        threads: of ONNX Runtime.

    Returns:
        One for each module with anything in half precision, the largest first.

    Raises:
        EngineError: an item could not be run.
    """
    watchers = [_Largest(graph) for graph in (plain.tokens, plain.image) if graph is not None]
    run_watched(watchers, files, preprocessor, items, threads=threads)
    found: dict[str, float] = {}
    for watcher in watchers:
        for module, largest in watcher.largest.items():
            found[module] = max(found.get(module, 0.0), largest)
    ranges = [Range(module, largest) for module, largest in found.items()]
    return tuple(sorted(ranges, key=lambda one: -one.largest))


def overflowing(ranges: Sequence[Range]) -> str:
    """A sentence on what half precision does not hold; empty if there is nothing."""
    out = [one for one in ranges if not one.fits]
    if not out:
        return ""
    shown = ", ".join(f"{one.module} reaches {_number(one.largest)}" for one in out[:_SHOWN])
    more = f", and {len(out) - _SHOWN} more" if len(out) > _SHOWN else ""
    return f"half precision ends at {LARGEST:,.0f}: {shown}{more}"


def _number(number: float) -> str:
    return f"{number:,.0f}" if number < 1e9 else f"{number:.3g}"


class _Largest(Watcher):
    """Keeps the largest magnitude of all that is computed in half precision, by module."""

    def __init__(self, graph: ir.Model) -> None:
        super().__init__(graph)
        self.largest: dict[str, float] = {}
        self._modules: dict[str, str] = {}
        half = half_values(graph)
        # A mask is as large as float32 gets, and in half precision no more than is needed.
        bound_masks(self.graph)
        for node in list(self.graph.graph):
            for value in node.outputs:
                if value.name in half and (readers := value.uses()):
                    reader = next(iter(readers)).node
                    magnitude = self.magnitude(reader, value)
                    largest = self.editor.insert(reader, "ReduceMax", magnitude, attributes={"keepdims": 0})
                    self._modules[self.show(largest, [])] = module_of(node)

    def take(self, outputs: Mapping[str, NDArray[Any]]) -> None:
        for name, found in outputs.items():
            module = self._modules[name]
            self.largest[module] = max(self.largest.get(module, 0.0), float(found))
