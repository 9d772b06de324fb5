"""The static int8 variant: scales of what was seen, PyTorch's numbers with rounded layers, from data to bundle."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray

from rtx.export.calibration import activations, calibrate, weight_of
from rtx.export.calibrators import LEVELS
from rtx.export.graph import module_of
from rtx.export.graphs import Graphs
from rtx.export.int8_static import insert_pairs, quantize_int8_static
from rtx.export.pipeline import ExportOptions, export_bundle
from rtx.export.scales import CalibrationOptions, Scale, quantize_columns
from rtx.export.served import Served, lengths_of
from rtx.runtime.bundle import Bundle
from rtx.runtime.cli import main
from rtx.runtime.embedder import Embedder
from rtx.runtime.errors import DataError, ExportError, UsageError
from rtx.runtime.evalset import EvalSet, write_evalset
from rtx.runtime.golden import deviation
from rtx.runtime.text import Encoded
from rtx.runtime.verification import verify_bundle
from rtx.trainer.model import RetrievalModel

TINY = runpy.run_path(str(Path(__file__).parents[1] / "vision_models.py"))
TEXTS = [
    "how to reset the pump",
    "a",
    "",
    "what the code of the query is for",
    "close all open files at the end of the list",
]


def calibrated(graphs: Graphs, model: RetrievalModel, folder: Path, items: list[Encoded], **options: Any) -> Graphs:
    files = [folder / "model.onnx", *([folder / "vision.onnx"] if graphs.image is not None else [])]
    return calibrate(graphs, files, model.preprocessor, items, CalibrationOptions(**options), threads=1)


def encoded(model: RetrievalModel, texts: list[str]) -> list[Encoded]:
    prepare = model.preprocessor.encode_pairs if model.task == "rerank" else model.preprocessor.encode
    rows = prepare([(text, TEXTS[0]) for text in texts] if model.task == "rerank" else texts)
    return [row for row in rows if isinstance(row, Encoded)]


@contextmanager
def rounded(model: RetrievalModel, scales: dict[str, Scale], keep: Collection[str]) -> Iterator[None]:
    """PyTorch's model with what its layers read, and their weights, rounded to 8 bits."""
    handles, before = [], []
    for scale in scales.values():
        migrated = torch.from_numpy(np.ones(1, np.float32) if scale.migrated is None else scale.migrated)
        for name in {*scale.modules}.difference(keep):
            linear = model.get_submodule(name)
            weight = linear.weight.detach().numpy()
            values, steps = quantize_columns(weight.T / migrated.numpy()[:, np.newaxis])
            before.append((linear, linear.weight.detach().clone()))
            linear.weight.data = torch.from_numpy((values * steps).T.copy())

            def read(_: Any, inputs: Any, scale: Scale = scale, migrated: Any = migrated) -> Any:
                return ((inputs[0] * migrated / scale.step).round().clamp(-LEVELS, LEVELS) * scale.step,)

            handles.append(linear.register_forward_pre_hook(read))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for linear, weight in before:
            linear.weight.data = weight


def test_it_is_pytorch_with_rounded_layers(some: Any, tmp_path: Path) -> None:
    """In float32 around the layers, so that nothing but the rounding differs."""
    graphs = calibrated(Graphs(some.graph), some.model, tmp_path, encoded(some.model, TEXTS))
    every = [module for scale in graphs.scales.values() for module in scale.modules]
    # DeBERTa has layers that read two things, which hooks do not tell apart.
    twice = {module for module in every if every.count(module) > 1}
    assert insert_pairs(some.graph, graphs.scales, twice) == [module for module in every if module not in twice]
    engine, reference = some.engine(), some.model.engine()
    exact = [reference.run(batch) for batch in some.batches()]
    with rounded(some.model, dict(graphs.scales), twice):
        expected = [reference.run(batch) for batch in some.batches()]
    found = [engine.run(batch) for batch in some.batches()]
    # A sum in another order moves a number over the edge of a step, which in layers this small is much.
    off = [deviation(one, other).max_abs for one, other in zip(found, expected, strict=True)]
    costs = [deviation(one, other).max_abs for one, other in zip(expected, exact, strict=True)]
    assert sum(off) < 0.3 * sum(costs)


def test_a_layer_is_the_formula(some: Any, tmp_path: Path) -> None:
    """Layer by layer, each on what it reads in the graph itself, so that nothing adds up."""
    scales = calibrated(Graphs(some.graph), some.model, tmp_path, encoded(some.model, TEXTS)).scales
    before = {
        (module_of(node), x.name): (scales[str(x.name)], weight_of(node, weight))
        for x, layers in activations(some.graph.graph).items()
        for node, weight in layers
    }
    insert_pairs(some.graph, scales)
    layers = [node for node in some.graph.graph if node.op_type == "MatMul" and _reads_pair(node)]
    assert len(layers) == len(before)
    rounded = [node.inputs[0].producer().inputs[0].producer() for node in layers]
    shown = list(dict.fromkeys([*(node.inputs[0] for node in rounded), *(node.outputs[0] for node in layers)]))
    some.graph.graph.outputs.extend(value for value in shown if not value.is_graph_output())
    engine, batch = some.engine(), some.batch(3, 7)
    read = dict(zip(shown, engine.fetch([str(value.name) for value in shown], batch), strict=True))
    for node, rounding in zip(layers, rounded, strict=True):
        scale, weight = before[module_of(node), _unmigrated(rounding.inputs[0]).name]
        migrated = np.ones(1, np.float32) if scale.migrated is None else scale.migrated
        values, steps = quantize_columns(weight / (migrated[:, np.newaxis] if migrated.size > 1 else np.float32(1)))
        x = read[rounding.inputs[0]].astype(np.float64)  # migrated already
        q = np.clip(np.rint(x / scale.step), -LEVELS - 1, LEVELS)
        expected = (q @ values.astype(np.float64)) * scale.step * steps
        # Where x lies at the edge of a step, either side is right.
        edge = np.abs(np.abs(x / scale.step % 1) - 0.5).min(axis=-1) < 1e-4
        found = read[node.outputs[0]]
        np.testing.assert_allclose(found[~edge], expected[~edge], rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_the_rest_is_in_half_precision(some: Any, tmp_path: Path) -> None:
    graphs = calibrated(Graphs(some.graph.clone()), some.model, tmp_path, encoded(some.model, TEXTS))
    done = quantize_int8_static(some.graph, graphs.scales)
    assert len(done) > 5
    weights = [value for value in some.graph.graph.initializers.values() if value.dtype == ir.DataType.INT8]
    assert sum(value.const_value.shape.rank() == 2 for value in weights) >= len(done) - 2
    layers = [node for node in some.graph.graph if node.op_type == "MatMul" and _reads_pair(node)]
    assert len(layers) >= len(done)
    assert {node.outputs[0].dtype for node in layers} == {ir.DataType.FLOAT16}
    engine, reference = some.engine(), some.model.engine()
    off = [deviation(engine.run(batch), reference.run(batch)).max_abs for batch in some.batches()]
    assert 1e-5 < max(off) < 0.5  # tiny random models bear it worse than trained ones


def _unmigrated(x: ir.Value) -> ir.Value:
    producer = x.producer()
    migrates = producer is not None and (producer.name or "").startswith("int8_static")
    return producer.inputs[0] if migrates else x


def _reads_pair(node: ir.Node) -> bool:
    producers = [value.producer() for value in node.inputs]
    return all(producer is not None and producer.op_type == "DequantizeLinear" for producer in producers)


def test_what_is_seen_is_what_layers_read(exported: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    model, graph = exported("bert")
    looked: dict[str, Any] = {}

    def look(seen: Any, *_: Any, modules: tuple[str, ...]) -> None:
        looked[modules[0]] = seen

    monkeypatch.setattr("rtx.export.calibration.choose_scale", look)
    items = encoded(model, TEXTS)
    calibrated(Graphs(graph), model, tmp_path, items)
    read: dict[str, list[NDArray[np.float32]]] = {name: [] for name in looked}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: read[name].append(inputs[0].detach().numpy().reshape(-1, inputs[0].shape[-1]))
        )
        for name in looked
    ]
    for item in items:
        model.engine().run(model.preprocessor.collate([item]))
    for handle in handles:
        handle.remove()
    assert len(looked) == 8
    for name, seen in looked.items():
        rows = np.concatenate(read[name])
        np.testing.assert_allclose(seen.largest, np.abs(rows).max(axis=0), atol=1e-5)
        assert len(seen.rows) == 16 * len(items)
        # Rows of every item, each of them one that the layer reads.
        distances = np.abs(seen.rows[:, np.newaxis] - rows).max(axis=2)
        assert distances.min(axis=1).max() < 1e-5
        assert len({*distances.argmin(axis=1)}) > len(rows) / 2
    assert not [*tmp_path.iterdir()]


def test_layers_can_be_kept(exported: Callable[..., Any], tmp_path: Path) -> None:
    model, graph = exported("bert")
    graphs = calibrated(Graphs(graph.clone()), model, tmp_path, encoded(model, TEXTS))
    kept = "backbone.encoder.layer.0.attention.self.key"
    done = quantize_int8_static(graph, graphs.scales, {kept})
    assert kept not in done
    assert {"backbone.encoder.layer.0.attention.self.query", "backbone.encoder.layer.1.output.dense"} <= {*done}


def test_each_item_shows_other_rows(exported: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    """Of a large model one row an item is kept: not the first of each, which in a chat template is always the same."""
    monkeypatch.setattr("rtx.export.calibration._ROWS", 1)
    model, graph = exported("bert")
    looked: dict[str, Any] = {}

    def look(seen: Any, *_: Any, modules: tuple[str, ...]) -> None:
        looked[modules[0]] = seen

    monkeypatch.setattr("rtx.export.calibration.choose_scale", look)
    (item,) = encoded(model, ["what the code of the query is for"])
    calibrated(Graphs(graph), model, tmp_path, [item] * 24)
    rows = looked["backbone.encoder.layer.0.attention.self.query"].rows
    assert len(rows) == 24
    assert len(np.unique(rows.round(4), axis=0)) == item.length


def test_one_layer_reads_what_another_gives() -> None:
    """Straight from layer to layer, as in a weight of low rank."""
    random = np.random.default_rng(0)
    x = ir.Value(name="x", shape=ir.Shape(["rows", 8]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="by hand")
    value, scales = x, {}
    for place in range(3):
        tensor = ir.tensor(random.normal(size=(8, 8)).astype(np.float32), name=f"w{place}")
        weight = ir.Value(
            name=tensor.name, shape=ir.Shape([8, 8]), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.register_initializer(weight)
        node = ir.node("MatMul", [value, weight], name=f"layer{place}")
        names = ["", "model", "model.backbone", f"model.backbone.{place}", "op"]
        node.metadata_props["pkg.torch.onnx.name_scopes"] = repr(names)
        node.metadata_props["pkg.torch.onnx.class_hierarchy"] = repr(["Module"] * len(names))
        scales[str(value.name)] = Scale((f"backbone.{place}",), "absmax", 0.0, 0.125, None, 0.0, 0.0)
        graph.append(node)
        value = node.outputs[0]
        value.name, value.type, value.shape = f"y{place}", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["rows", 8])
    graph.outputs.append(value)
    model = ir.Model(graph, ir_version=10)
    assert insert_pairs(model, scales) == [f"backbone.{place}" for place in range(3)]
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph) == 3


@pytest.mark.usefixtures("shared_graph")
def test_a_model_that_cannot_be_calibrated_is_exported_without(
    tiny_checkpoint: Callable[..., Path], evalset: EvalSet, tmp_path: Path, monkeypatch: Any
) -> None:
    def refuse(*_: Any) -> Any:
        raise ExportError("calibration: some.layer: a Gemm that scales")

    monkeypatch.setattr("rtx.export.calibration.weight_of", refuse)
    # int4-half, too: without the factors that were asked for it would be another model.
    options = ExportOptions(variants=("fp32", "int8-static", "int4-half"), evalset=evalset, threads=1)
    outcome = export_bundle(str(tiny_checkpoint("bert")), tmp_path / "x.rtx", options)
    assert [*outcome.manifest.variants] == ["fp32"]
    for name in ("int8-static", "int4-half"):
        assert outcome.verdicts[name].failures == ("calibration: some.layer: a Gemm that scales",)


def test_numbers_that_are_not_finite(exported: Callable[..., Any], tmp_path: Path) -> None:
    model, graph = exported("bert")
    for name, value in graph.graph.initializers.items():
        if "word_embeddings" in name:
            value.const_value = ir.tensor(np.full_like(value.const_value.numpy(), np.nan), name=name)
    with pytest.raises(
        ExportError, match=r"calibration: backbone\.encoder\.layer\.0\.attention\.self\.query: reads NaN or"
    ):
        calibrated(Graphs(graph), model, tmp_path, encoded(model, TEXTS))


PAIRS = [
    {"query": "reset pump", "positive": "how to reset the pump", "negative": "a red cat in the garden"},
    {"query": "reset pump", "document": "with a filter in the intake", "label": 0.2},
    {"query": "sorting a list", "documents": ["sort the list of numbers in place", "a red cat"], "labels": [1, 0]},
]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in PAIRS))
    return tmp_path / "pairs.jsonl"


@pytest.mark.usefixtures("shared_graph")
def test_from_the_command_line(
    tiny_checkpoint: Callable[..., Path], pairs: Path, evalset: EvalSet, tmp_path: Path
) -> None:
    write_evalset(evalset, tmp_path / "eval")
    options = ["--precision", "int8-static", "--precision", "fp16", "--min-cosine", "0.5", "--max-ndcg-drop", "1"]
    options += ["--calibration", str(pairs), "--eval", str(tmp_path / "eval"), "--threads", "1"]
    target = tmp_path / "tiny.rtx"
    result = CliRunner().invoke(main, ["export", str(tiny_checkpoint("bert")), "-o", str(target), *options])
    assert result.exit_code == 0, result.output
    assert "calibrating on " in result.stderr
    assert "int8-static: results of layers are off by 0.0" in result.stdout
    bundle = Bundle.open(target)
    variant = bundle.manifest.variants["int8-static"]
    assert (variant.file, variant.precision, variant.operators) == ("onnx/model_int8_static.onnx", "int8", False)
    report = json.loads((target / "report.json").read_text())
    scales = report["scales"]
    assert sum(len(scale["modules"]) for scale in scales) == 12
    assert [scale["error"] for scale in scales] == sorted((scale["error"] for scale in scales), reverse=True)
    page = (target / "report.html").read_text()
    assert "Static scales" in page
    assert scales[0]["modules"][0] in page
    assert not [finding for finding in verify_bundle(target) if finding.problems]
    with Embedder.open(target, variant="int8-static") as static, Embedder.open(target, variant="fp16") as half:
        vectors = static.embed(TEXTS), half.embed(TEXTS)
    cosine = (vectors[0] * vectors[1]).sum(axis=1)
    assert 0.5 < cosine.min() < 0.99999


def test_what_is_asked_for_must_fit(tiny_checkpoint: Callable[..., Path], pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int8-static: needs queries and documents to find its scales on"):
        ExportOptions(variants=("int8-static",))
    with pytest.raises(UsageError, match="calibration: none of fp32 learns from items; int8-static and int4-half do"):
        ExportOptions(variants=("fp32",), calibration=pairs)
    for name in ("-", "x.txt", "x.png"):
        (tmp_path / "x.txt").write_text("a")
        (tmp_path / "x.png").write_bytes(b"a")
        path = Path(name) if name == "-" else tmp_path / name
        options = ExportOptions(variants=("int8-static",), calibration=path)
        with pytest.raises(UsageError, match=r"expected training data, as jsonl, csv, tsv or parquet"):
            export_bundle("no/such/checkpoint", tmp_path / "x.rtx", options)  # before anything is loaded
    for name, given in (("int8", None), ("int4-half", pairs)):
        with pytest.raises(UsageError, match=f"calibrator, migration: none of {name} has scales of what layers read"):
            ExportOptions(variants=(name,), calibration=given, scales=CalibrationOptions(migration=0.5))
    pairs.write_text('{"query": "a", "positive": ""}\n{"query": 3}\n')
    options = ExportOptions(variants=("int8-static",), calibration=pairs)
    with pytest.raises(DataError, match=r"pairs.jsonl: 2 problems"):
        export_bundle(str(tiny_checkpoint("bert")), tmp_path / "x.rtx", options)
    assert not (tmp_path / "x.rtx").exists()


@pytest.mark.usefixtures("shared_graph")
def test_layers_that_cost_most_are_kept_in_half_precision(
    tiny_checkpoint: Callable[..., Path], evalset: EvalSet, tmp_path: Path
) -> None:
    def export(**options: Any) -> Any:
        given = ExportOptions(variants=("int8-static",), evalset=evalset, max_ndcg_drop=1.0, threads=1, **options)
        return export_bundle(str(tiny_checkpoint("bert")), tmp_path / "x.rtx", given)

    plain = export(min_cosine=0.5)
    found = plain.verdicts["int8-static"].parity
    again = export(min_cosine=found.min_cosine + (1 - found.min_cosine) / 4, mixed=True, overwrite=True)
    mixed = again.mixed["int8-static"]
    assert mixed.precision == "fp16"
    assert 0 < len(mixed.kept) <= mixed.layers == 12
    assert again.verdicts["int8-static"].parity.min_cosine > found.min_cosine
    variant = again.manifest.variants["int8-static"]
    assert (variant.kept, variant.kept_precision) == (mixed.kept, "fp16")


def test_what_is_served(exported: Callable[..., Any], pairs: Path, evalset: EvalSet) -> None:
    embedder = exported("bert", prompts={"query": "find: ", "document": ""})[0]
    served = Served.of_file(pairs, embedder.contract)
    assert served.queries == ["reset pump", "sorting a list"]
    assert len(served.documents) == 5
    queries, documents = served.encode(embedder.preprocessor, 100)
    assert [*map(len, (queries, documents))] == [2, 5]
    assert queries == embedder.preprocessor.encode(["reset pump", "sorting a list"], prompt="query")
    assert [*map(len, served.encode(embedder.preprocessor, 1))] == [1, 1]
    assert Served.of_evalset(evalset, None).queries == [*evalset.queries.values()]
    reranker = exported("bert", "rerank")[0]
    served = Served.of_file(pairs, reranker.contract)
    assert served.pairs[1] == ("reset pump", "a red cat in the garden")
    assert [*map(len, served.encode(reranker.preprocessor, 100))] == [5]
    for model in (embedder, reranker):
        scraps = Served.of_file(pairs, model.contract).scraps(model.preprocessor)
        assert min(scrap.length for scrap in scraps) <= 4
        assert len(scraps) > 14


def test_lengths_count_queries_as_often_as_documents() -> None:
    def rows(*lengths: int) -> list[Encoded]:
        return [Encoded([1] * length, [0] * length, 0) for length in lengths]

    assert lengths_of([rows(3), rows(5, 6, 7)]) == [3, 3, 3, 5, 6, 7]
    assert lengths_of([rows(4, 2)]) == [4, 2]
    assert lengths_of([[], rows(1)]) == [1]
    assert lengths_of([]) == []
