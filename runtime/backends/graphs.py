"""The graphs of a model as one engine: texts alone, images among texts, or a tower for each."""

from __future__ import annotations

from pathlib import Path

from rtx.runtime.backends.onnx import OnnxEngine, Watch
from rtx.runtime.backends.opener import Graph, OpenGraph
from rtx.runtime.backends.towers import TowersEngine
from rtx.runtime.backends.visual import VisualEngine
from rtx.runtime.contract import Contract
from rtx.runtime.image_cache import DEFAULT_CACHE_BYTES

VISUAL_INPUTS = ("position_ids", "visual_index", "image_embeds", "deepstack")
"""What the graph for tokens takes besides the contract's inputs where images are tokens among them."""

GraphEngine = Graph | TowersEngine | VisualEngine


def open_graphs(
    contract: Contract,
    graph: bytes | Path,
    image_graph: bytes | Path | None = None,
    *,
    threads: int | None = None,
    device: str = "cpu",
    name: str = "onnx",
    packed: bool = False,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    watch: Watch | None = None,
    image_watch: Watch | None = None,
    open_graph: OpenGraph = OnnxEngine,
) -> GraphEngine:
    """Open what a model of this contract needs.

    Args:
        contract: of the model.
        graph: what has tokens goes through, serialised or the path of its file.
        image_graph: what images go through, likewise; None for a model that takes none.
        threads: threads of one run; None for the cores that this process may use.
        device: as for `OnnxEngine`.
        name: what error messages call the model.
        packed: whether the graph for what has tokens leaves out padding; none does that has images among them.
        cache_bytes: what is made of images and kept may take; 0 keeps none.
        watch: who looks inside the graph for what has tokens.
        image_watch: who looks inside that for images.
        open_graph: what opens each graph.

    Raises:
        UsageError: `threads` is out of range, or there is no such kind of device.
        MissingExtraError: onnxruntime is not installed, or not the one that the device needs.
        EngineError: a graph cannot be loaded, or the device cannot be used.
    """
    if image_graph is None:
        return open_graph(
            graph, output=contract.output, threads=threads, device=device, name=name, packed=packed, watch=watch
        )
    if contract.visual is None:
        return TowersEngine(
            image_graph,
            graph,
            output=contract.output,
            threads=threads,
            device=device,
            name=name,
            packed=packed,
            cache_bytes=cache_bytes,
            watch=watch,
            image_watch=image_watch,
            open_graph=open_graph,
        )
    return VisualEngine(
        image_graph,
        graph,
        rules=contract.visual,
        output=contract.output,
        threads=threads,
        device=device,
        name=name,
        cache_bytes=cache_bytes,
        watch=watch,
        image_watch=image_watch,
        open_graph=open_graph,
    )
