"""Exported graphs of tiny models: each is exported once for all tests and workers."""

from __future__ import annotations

import hashlib
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from filelock import FileLock

from rtx.export.graph import export_graph
from rtx.export.graphs import Graphs, export_graphs
from rtx.export.packed import export_packed
from rtx.export.tensorrt import load_tensorrt
from rtx.runtime.backends.onnx import OnnxEngine
from rtx.runtime.errors import ExportError
from rtx.runtime.evalset import EvalSet
from rtx.runtime.golden import Deviation, deviation
from rtx.runtime.text import Batch
from rtx.trainer.compose import compose
from rtx.trainer.model import RetrievalModel

MODELS = [
    (architecture, task)
    for architecture in ("bert", "distilbert", "roberta", "xlm-roberta", "mpnet", "modernbert", "deberta-v2", "qwen3")
    for task in ("embed", "rerank")
] + [("qwen3-chat", "rerank")]

SOME = [("bert", "embed"), ("modernbert", "embed"), ("deberta-v2", "rerank"), ("qwen3-chat", "rerank")]

TINY_VISION = runpy.run_path(str(Path(__file__).parents[1] / "vision_models.py"))


class Exported(NamedTuple):
    """A model and its graph, which is the caller's own to change."""

    model: RetrievalModel
    graph: ir.Model

    def engine(self) -> OnnxEngine:
        """The graph in ONNX Runtime, once it is proven to be valid ONNX."""
        proto = ir.to_proto(self.graph)
        if all(node.domain == "" for node in self.graph.graph):
            onnx.checker.check_model(proto, full_check=True)
        return OnnxEngine(proto.SerializeToString(), output=self.model.contract.output, threads=1)

    def batch(self, rows: int, tokens: int) -> Batch:
        """Random tokens; every second row is half padding."""
        contract, vocabulary = self.model.contract, int(self.model.backbone.config.vocab_size)
        random = np.random.default_rng(rows * 1000 + tokens)
        mask = np.ones((rows, tokens), dtype=np.int64)
        mask[1::2, tokens // 2 + 1 :] = 0
        if contract.padding_side == "left":
            mask = mask[:, ::-1].copy()
        ids = np.where(mask == 1, random.integers(5, vocabulary - 1, mask.shape), contract.pad_token_id)
        count = mask.cumsum(axis=1)
        arrays = {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": np.where(mask * count * 2 > mask.sum(axis=1, keepdims=True), 1, 0),
            "pooling_mask": mask * (count > min(tokens - 1, 2)),
        }
        return {name: arrays[name].astype(np.int64) for name in contract.inputs}

    def batches(self) -> list[Batch]:
        """One token, one row, odd sizes, padding, the longest row."""
        longest = self.model.contract.max_tokens
        return [self.batch(*shape) for shape in ((1, 1), (1, 2), (3, 7), (2, 33), (2, longest))]

    def deviations(self) -> list[Deviation]:
        """The graph against PyTorch, a batch each."""
        engine, reference = self.engine(), self.model.engine()
        return [deviation(engine.run(batch), reference.run(batch)) for batch in self.batches()]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny products gain nothing from threads, and threads of two test workers stand in each other's way."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def exported(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[..., Exported]:
    """`exported(architecture, task, packed=False, **layout)` gives a tiny model, arguments as `tiny_checkpoint`,
    and its plain or packed graph."""
    base = tmp_path_factory.getbasetemp()
    # A worker of pytest-xdist has a folder of its own in the run's.
    shared = base.parent if hasattr(request.config, "workerinput") else base
    models: dict[str, RetrievalModel] = {}

    def export(architecture: str, task: str = "embed", *, packed: bool = False, **layout: Any) -> Exported:
        key = hashlib.sha256(repr((architecture, task, layout)).encode()).hexdigest()[:16]
        if key not in models:
            models[key] = RetrievalModel.load(tiny_checkpoint(architecture, task, **layout))
        file = shared / f"{key}{'_packed' * packed}.onnx"
        with FileLock(f"{file}.lock"):
            if not file.exists():
                ir.save((export_packed if packed else export_graph)(models[key]), file)
            return Exported(models[key], ir.load(file))

    return export


@pytest.fixture(scope="session")
def tensorrt_rtx() -> None:
    """TensorRT-RTX is there."""
    try:
        load_tensorrt("tensorrt-rtx")
    except ExportError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def image_checkpoint(once: Callable[..., Path], tiny_checkpoint: Callable[..., Path]) -> Callable[[str], Path]:
    """`image_checkpoint(kind)` gives a folder, of clip, siglip, router, qwen3-vl or qwen3-vl-reranker."""

    def write(kind: str, folder: Path) -> None:
        if kind == "router":
            TINY_VISION["write_tiny_dinov2"](folder / "dinov2")
            compose(str(tiny_checkpoint("bert")), str(folder / "dinov2")).save(folder / "model")
        else:
            reranks = {"reranker": True} if kind == "qwen3-vl-reranker" else {}
            TINY_VISION["write_tiny_qwen3_vl" if "qwen" in kind else f"write_tiny_{kind}"](folder / "model", **reranks)

    return lambda kind: once(f"image-{kind}", lambda folder: write(kind, folder)) / "model"


@pytest.fixture(scope="session")
def image_graphs(once: Callable[..., Path], image_checkpoint: Callable[[str], Path]) -> Callable[[str], Graphs]:
    """`image_graphs(kind)` gives the graphs of `image_checkpoint(kind)`, which are the caller's own to change."""

    def export(kind: str, folder: Path) -> None:
        task = "rerank" if kind == "qwen3-vl-reranker" else None
        graphs = export_graphs(RetrievalModel.load(image_checkpoint(kind), task=task))
        assert graphs.image is not None
        ir.save(graphs.tokens, folder / "tokens.onnx")
        ir.save(graphs.image, folder / "image.onnx")

    def get(kind: str) -> Graphs:
        folder = once(f"image-graphs-{kind}", lambda folder: export(kind, folder))
        return Graphs(ir.load(folder / "tokens.onnx"), ir.load(folder / "image.onnx"))

    return get


@pytest.fixture(scope="session", params=MODELS, ids="-".join)
def architecture_and_task(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Of the session, so that tests of the same model follow each other."""
    return request.param


@pytest.fixture
def each(architecture_and_task: tuple[str, str], exported: Callable[..., Exported]) -> Exported:
    """Every architecture, as an embedder and as a reranker, and a language model that reranks."""
    return exported(*architecture_and_task)


@pytest.fixture
def shared_graph(exported: Callable[..., Exported], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of the tiny BERT take the graph that other tests have exported, which is most of their time."""
    monkeypatch.setattr("rtx.export.pipeline.export_graphs", lambda model: Graphs(exported("bert", model.task).graph))


@pytest.fixture(params=SOME, ids="-".join)
def some(request: pytest.FixtureRequest, exported: Callable[..., Exported]) -> Exported:
    """One model of each way to write layers, for tests that the others would tell nothing new."""
    return exported(*request.param)


@pytest.fixture(scope="session")
def evalset() -> EvalSet:
    """Small, and of texts that a tiny tokenizer knows."""
    corpus = {
        "d0": "how to reset the pump",
        "d1": "a red cat in the garden",
        "d2": "sort the list of numbers in place",
        "d3": "close all open files at the end",
        "d4": "what the code of the query is for",
        "d5": "with a filter in the intake",
    }
    queries = {"q0": "reset pump", "q1": "sorting a list", "q2": "how files are closed", "q3": "the filter"}
    return EvalSet("small", queries, corpus, {"q0": {"d0": 1}, "q1": {"d2": 1}, "q2": {"d3": 1}, "q3": {"d5": 1}})
