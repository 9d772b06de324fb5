"""Engines of TensorRT-RTX, built for four kinds of GPUs on a machine without any: real ones, of tiny models."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from rtx.export import tensorrt
from rtx.export.calibration import activations, calibrate
from rtx.export.derive import derive, save
from rtx.export.engines import EngineOptions, image_profiles, token_profiles
from rtx.export.graphs import Graphs
from rtx.export.scales import CalibrationOptions, Scales
from rtx.export.tensorrt import (
    Built,
    build_engine,
    capability_names,
    check_network,
    describe_network,
    keep_timings,
    load_tensorrt,
    read_network,
    shapes_of,
    use_timings,
)
from rtx.runtime.backends.tensorrt import quiet_logger
from rtx.runtime.backends.visual import DEFAULT_BATCH_PATCHES, MAX_BATCH_IMAGES
from rtx.runtime.batching import plan_batches
from rtx.runtime.bundle import Bundle
from rtx.runtime.cli import main
from rtx.runtime.engine import Budget
from rtx.runtime.errors import BundleError, ExportError, UsageError
from rtx.runtime.manifest import Manifest
from rtx.runtime.text import Encoded
from rtx.trainer.model import RetrievalModel

SM = (80, 86, 89, 120)
# Inputs by type, as TensorRT calls it.
INT64, FLOAT, HALF = "INT64", "FLOAT", "HALF"

builds = pytest.mark.usefixtures("tensorrt_rtx")


def build(
    graph: ir.Model, profiles: Any, folder: Path, precision: Any, scales: Scales = MappingProxyType({}), sm: Any = ()
) -> Built:
    file = folder / f"{precision}.onnx"
    save(derive(precision, graph, (), scales), file)
    # TensorRT-RTX has no product in float32 for Turing.
    every = [capability for capability in capability_names(load_tensorrt("tensorrt-rtx")) if capability != 75]
    assert {*SM} < {*every}
    built = build_engine(file, profiles, target="tensorrt-rtx", capabilities=sm or every)
    assert built.version == load_tensorrt("tensorrt-rtx").__version__
    assert len(built.content) > 10_000
    # As TensorRT says it while it builds.
    assert len(built.workspace_bytes) == len(profiles)
    assert min(built.workspace_bytes) > 0
    return built


def count(network: tensorrt.Network, kind: str, dtype: str | None = None) -> int:
    """Layers of a kind, whose output is of a type."""
    found = {tuple(name.split()): number for name, number in network.layers.items()}
    return sum(number for (name, given), number in found.items() if name == kind and dtype in (None, given))


@builds
@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("bert", "embed"),
        ("mpnet", "embed"),
        ("modernbert", "embed"),
        ("deberta-v2", "rerank"),
        ("qwen3", "embed"),
    ],
)
def test_engines_of_texts(exported: Callable[..., Any], tmp_path: Path, architecture: str, task: str) -> None:
    model, graph = exported(architecture, task)
    profiles = token_profiles(model.contract, (16, model.contract.max_tokens))
    every = ("fp32", "fp16", "bf16", "int4-half")
    for precision in every if architecture == "bert" else ("fp16",):
        built = build(graph, profiles, tmp_path, precision)
        # What TensorRT notes of how it was built; its default is the other one.
        assert b"tf32=0" in built.content
        assert b"tf32=1" not in built.content
        network = built.network
        assert network.inputs == dict.fromkeys(model.contract.inputs, (INT64, (-1, -1)))
        dtype, shape = network.outputs[model.contract.output]
        assert (dtype, len(shape)) == (FLOAT, 2 if task == "embed" else 1)
        # What overflows or loses ties in half precision is not in half precision.
        assert count(network, "SOFTMAX") == count(network, "SOFTMAX", FLOAT) > 0
        half = "BF16" if precision == "bf16" else HALF
        assert count(network, "NORMALIZATION", half) == count(network, "REDUCE", half) == 0
        assert (count(network, "MATRIX_MULTIPLY", half) > 0) == (precision != "fp32")
        layers = sum(len(layers) for layers in activations(graph.graph).values())
        assert count(network, "DEQUANTIZE", HALF) == (layers if precision == "int4-half" else 0)


def calibrated(graphs: Graphs, model: RetrievalModel, folder: Path, items: Sequence[Any]) -> Graphs:
    files = [folder / "model.onnx", folder / "vision.onnx"][: 1 + (graphs.image is not None)]
    prepare = model.preprocessor.encode if model.task == "embed" else model.preprocessor.encode_pairs
    rows = [row for row in prepare(items) if isinstance(row, Encoded)]
    return calibrate(graphs, files, model.preprocessor, rows, CalibrationOptions(), threads=1)


@builds
@pytest.mark.parametrize(
    ("architecture", "task"), [("bert", "embed"), ("modernbert", "embed"), ("deberta-v2", "rerank"), ("qwen3", "embed")]
)
def test_engines_in_8_bits(exported: Callable[..., Any], tmp_path: Path, architecture: str, task: str) -> None:
    model, graph = exported(architecture, task)
    texts = ["how to reset the pump", "a red cat in the garden"]
    graphs = calibrated(Graphs(graph), model, tmp_path, texts if task == "embed" else [(text, "a") for text in texts])
    profiles = token_profiles(model.contract, (16, model.contract.max_tokens))
    network = build(graph, profiles, tmp_path, "int8-static", graphs.scales).network
    # What is rounded, once for all layers that read it; and each layer's weight.
    assert count(network, "QUANTIZE") == count(network, "QUANTIZE", "INT8") == len(graphs.scales)
    layers = sum(len(layers) for layers in activations(graph.graph).values())
    assert count(network, "DEQUANTIZE") == count(network, "DEQUANTIZE", HALF) >= len(graphs.scales) + layers
    assert count(network, "SOFTMAX") == count(network, "SOFTMAX", FLOAT) > 0


@builds
def test_an_engine_in_4_bits_with_factors(exported: Callable[..., Any], tmp_path: Path) -> None:
    model, graph = exported("bert", "embed")
    rows = [row for row in model.preprocessor.encode(["how to reset the pump", "a"]) if isinstance(row, Encoded)]
    files = [tmp_path / "model.onnx"]
    found = calibrate(Graphs(graph), files, model.preprocessor, rows, None, factors=True, threads=1).factors
    used = [factor for factor in found.values() if factor.values is not None]
    save(derive("int4-half", graph, factors=found), tmp_path / "int4.onnx")
    profiles = token_profiles(model.contract, (model.contract.max_tokens,))
    network = build_engine(tmp_path / "int4.onnx", profiles, target="tensorrt-rtx", capabilities=(89,)).network
    without = build(graph, profiles, tmp_path, "int4-half", sm=(89,)).network
    products = count(network, "ELEMENTWISE", HALF) - count(without, "ELEMENTWISE", HALF)
    assert products == len(used) > 0


@builds
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3-vl", "clip", "siglip"])
def test_engines_of_images(
    image_checkpoint: Callable[[str], Path], image_graphs: Callable[[str], Graphs], tmp_path: Path, kind: str
) -> None:
    model = RetrievalModel.load(image_checkpoint(kind))
    graphs = image_graphs(kind)
    assert graphs.image is not None
    ends = (16, model.contract.max_tokens)
    tokens = build(graphs.tokens, token_profiles(model.contract, ends), tmp_path, "fp16").network
    image = build(graphs.image, image_profiles(model.contract), tmp_path, "fp16").network
    assert count(tokens, "MATRIX_MULTIPLY", HALF) > 0
    assert count(image, "MATRIX_MULTIPLY", HALF) > 0
    assert {dtype for dtype, _ in (*tokens.outputs.values(), *image.outputs.values())} == {FLOAT}
    # Rounded to 8 bits, SigLIP's two towers differ from CLIP's in nothing.
    if kind == "siglip":
        return
    page = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    found = calibrated(graphs, model, tmp_path, ["a", page, "how do I reset it?"])
    for graph, scales, profiles in (
        (graphs.tokens, found.scales, token_profiles(model.contract, ends)),
        (graphs.image, found.image_scales, image_profiles(model.contract)),
    ):
        # Images have been seen by the graph for images.
        assert {*scales} == {str(x.name) for x in activations(graph.graph)}
        network = build(graph, profiles, tmp_path, "int8-static", scales, (89,)).network
        assert count(network, "QUANTIZE", "INT8") == len(scales) > 4
    if kind != "clip":
        return
    # Of texts alone there is no scale for images.
    texts = calibrated(graphs, model, tmp_path, ["a"])
    assert texts.scales
    assert not texts.image_scales
    with pytest.raises(ExportError, match=r"int8-static: no calibration item goes through \S+; expected items of each"):
        derive("int8-static", graphs.image, (), texts.image_scales)


@builds
def test_what_was_read_is_held_against_the_graph(exported: Callable[..., Any], tmp_path: Path) -> None:
    graph = exported("bert").graph
    save(graph, tmp_path / "model.onnx")
    trt = load_tensorrt("tensorrt-rtx")
    _builder, network, _parser = read_network(trt, tmp_path / "model.onnx", quiet_logger(trt), target="tensorrt-rtx")
    found = describe_network(network)
    check_network(found, graph)
    graph.graph.inputs[0].dtype = ir.DataType.INT32
    with pytest.raises(ExportError, match=r"input 'input_ids': the graph has \('INT32', \(-1, -1\)\), TensorRT read"):
        check_network(found, graph)
    graph.graph.inputs[0].dtype = ir.DataType.INT64
    graph.graph.outputs[0].shape = ir.Shape(["batch", 5])
    with pytest.raises(ExportError, match="output 'sentence_embedding': the graph has"):
        check_network(found, graph)
    graph.graph.outputs[0].name = "vector"
    with pytest.raises(ExportError, match=r"output 'vector': the graph has .* TensorRT read None"):
        check_network(found, graph)


def test_ranges_of_axes() -> None:
    value = ir.Value(name="pixels", shape=ir.Shape(["images", "4*image_tokens", 1536]))
    ranges = {"images": (1, 2, 4), "image_tokens": (1, 8, 16)}
    assert shapes_of(value, ranges) == ((1, 4, 1536), (2, 32, 1536), (4, 64, 1536))
    with pytest.raises(ExportError, match=r"input 'pixels': no range is known of its axis '4\*image_tokens'"):
        shapes_of(value, {"images": (1, 2, 4)})


@builds
def test_sizes_that_do_not_fit(exported: Callable[..., Any], tmp_path: Path) -> None:
    model, graph = exported("bert")
    save(graph, tmp_path / "model.onnx")

    def build_for(tokens: tuple[int, int, int]) -> None:
        build_engine(
            tmp_path / "model.onnx",
            [{"batch": (1, 1, 1), "tokens": tokens}],
            target="tensorrt-rtx",
            capabilities=(89,),
        )

    build_for((model.contract.max_tokens,) * 3)  # a box of one size
    with pytest.raises(ExportError, match=r"tensorrt-rtx: could not build model\.onnx: .+"):
        build_for((8, 4, 2))


@builds
def test_turing(exported: Callable[..., Any], tmp_path: Path) -> None:
    model, graph = exported("bert")
    profiles = token_profiles(model.contract, (64,))
    save(derive("fp16", graph), tmp_path / "fp16.onnx")
    assert build_engine(tmp_path / "fp16.onnx", profiles, target="tensorrt-rtx", capabilities=(75,)).content
    save(derive("fp32", graph), tmp_path / "fp32.onnx")
    with pytest.raises(ExportError, match=r"could not build fp32\.onnx: .*SM75.*FP32 GEMM is not supported"):
        build_engine(tmp_path / "fp32.onnx", profiles, target="tensorrt-rtx", capabilities=(75,))


@builds
def test_graphs_that_tensorrt_does_not_take(exported: Callable[..., Any], tmp_path: Path) -> None:
    model, graph = exported("bert")
    save(derive("int8", graph), tmp_path / "model.onnx")
    profiles = token_profiles(model.contract, (64,))
    with pytest.raises(ExportError, match=r"tensorrt-rtx: does not take model.onnx: In node .*QuantizeLinear"):
        build_engine(tmp_path / "model.onnx", profiles, target="tensorrt-rtx", capabilities=SM)


@builds
def test_options() -> None:
    rtx = EngineOptions(target="tensorrt-rtx", capabilities=SM, lengths=(16, 32))
    rtx.check(("fp32", "fp16"), 64)
    with pytest.raises(
        UsageError, match=r"--target tensorrt-rtx: .* fp32, fp16, bf16, int8-static, int4-half, not of int8$"
    ):
        rtx.check(("fp32", "int8"), 64)
    with pytest.raises(UsageError, match="model's limit of 20, got"):
        rtx.check(("fp32",), 20)
    with pytest.raises(UsageError, match=r"--sm: expected some of 75, 80, .*, got none"):
        EngineOptions(target="tensorrt-rtx").check(("fp32",), 64)
    with pytest.raises(UsageError, match="got 90; sm_90 and sm_100 need --target tensorrt, on such a GPU"):
        EngineOptions(target="tensorrt-rtx", capabilities=(80, 90)).check(("fp32",), 64)


def test_where_tensorrt_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ExportError, match=r"tensorrt: .*pip install tensorrt 'cuda-bindings>=12.9.1,<14'$"):
        EngineOptions(target="tensorrt").check(("fp32",), 64)
    for name in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ExportError, match=r"tensorrt-rtx: .* It comes with: pip install 'rtx-retrieval\[tensorrt"):
        load_tensorrt("tensorrt-rtx")


@pytest.fixture(scope="module")
def exporting(once: Callable[..., Path], tiny_checkpoint: Callable[..., Path]) -> tuple[Path, str]:
    """A bundle, and what the command said that wrote it."""
    options = ["--target", "tensorrt-rtx", "--sm", "80,86,89,120", "--lengths", "16", "--precision", "fp32"]
    options += ["--precision", "fp16", "--min-cosine", "0.9"]

    def export(folder: Path) -> None:
        command = ["export", str(tiny_checkpoint("bert")), "-o", str(folder / "tiny.rtx"), *options]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
        (folder / "said").write_text(result.output)

    folder = once("engines", export)
    return folder / "tiny.rtx", (folder / "said").read_text()


@pytest.fixture(scope="module")
def bundle(exporting: tuple[Path, str]) -> Path:
    return exporting[0]


@builds
def test_engines_in_a_bundle(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert Bundle.open(bundle).damaged() == {}
    assert sorted(manifest.engines) == [
        "engines/model.tensorrt-rtx.engine",
        "engines/model_fp16.tensorrt-rtx.engine",
    ]
    engine = manifest.engines["engines/model_fp16.tensorrt-rtx.engine"]
    assert engine.graph == "onnx/model_fp16.onnx"
    assert engine.sources == {engine.graph: manifest.files[engine.graph].sha256}
    assert (engine.target, engine.capabilities) == ("tensorrt-rtx", SM)
    assert [profile["tokens"] for profile in engine.profiles] == [(1, 16, 16), (17, 64, 64)]
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


@builds
def test_an_engine_of_another_graph(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    (file, engine), *_ = manifest.engines.items()
    other = dataclasses.replace(engine, sources={engine.graph: "0" * 64})
    with pytest.raises(ValueError, match=r"was built from another onnx/model\.onnx"):
        dataclasses.replace(manifest, engines={file: other})
    with pytest.raises(ValueError, match=r"files: engines/gone\.engine missing"):
        dataclasses.replace(manifest, engines={"engines/gone.engine": engine})
    with pytest.raises(ValueError, match=r"was built from another onnx/model\.onnx"):
        dataclasses.replace(manifest, engines={file: dataclasses.replace(engine, sources={})})
    content = manifest.to_bytes().replace(engine.sources[engine.graph].encode(), b"0" * 64)
    with pytest.raises(BundleError, match="was changed after it was written"):
        Manifest.from_bytes(content)


@builds
def test_info_shows_engines(bundle: Path) -> None:
    result = CliRunner().invoke(main, ["info", str(bundle)], env={"COLUMNS": "200"}, catch_exceptions=False)
    for shown in (
        "Engine engines/model_fp16.tensorrt-rtx.engine\n",
        "sm 80 86 89 120",
        "256 × 16 tokens, 256 × 64 tokens",
        " half",
    ):
        assert shown in result.output
    assert "workspace" in result.output
    assert "not known" not in result.output
    found = json.loads(CliRunner().invoke(main, ["info", str(bundle), "--json"]).output)
    engine = found["engines"]["engines/model.tensorrt-rtx.engine"]
    assert engine["bytes"] > 10_000
    assert len(engine["workspace_bytes"]) == 2
    # Hidden states of 256 rows of 16 tokens, and of 256 of 64, 32 numbers in float32 each.
    for workspace, tokens in zip(engine["workspace_bytes"], (16, 64), strict=True):
        assert workspace > 256 * tokens * 32 * 4


@builds
def test_what_the_command_says(exporting: tuple[Path, str]) -> None:
    assert "engines/model_fp16.tensorrt-rtx.engine: tensorrt-rtx " in exporting[1]
    assert "sm 80 86 89 120, up to 16 64 tokens" in exporting[1]


@builds
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sm", "80"), "--sm and --lengths: are of engines, which --target asks for"),
        (("--target", "tensorrt-rtx"), "--sm: expected some of"),
        (("--target", "tensorrt-rtx", "--sm", "80;86"), "expected whole numbers with commas between them, got '80;86'"),
        (("--target", "tensorrt-rtx", "--sm", "80", "--precision", "auto"), "not of fp32-packed, int8, int8-packed"),
    ],
)
def test_wrong_options(
    tiny_checkpoint: Callable[..., Path], bundle: Path, arguments: tuple[str, ...], message: str
) -> None:
    command = ["export", str(tiny_checkpoint("bert")), "-o", str(bundle), "--overwrite", *arguments]
    result = CliRunner().invoke(main, command)
    assert message in result.output
    assert result.exit_code != 0
    assert Bundle.open(bundle).damaged() == {}


def test_profiles_take_what_the_runtime_puts_together(image_checkpoint: Callable[[str], Path]) -> None:
    contract = RetrievalModel.load(image_checkpoint("clip")).contract
    for image_tokens, images in ((contract.image_tokens, 256), (50, 256), (577, 28)):
        (profile,) = image_profiles(dataclasses.replace(contract, image_tokens=image_tokens))
        assert profile["images"] == (1, images // 4, images)
        assert images <= Budget.of("tensorrt").max_batch_items
        assert images * image_tokens <= Budget.of("tensorrt").max_batch_tokens
    contract = RetrievalModel.load(image_checkpoint("qwen3-vl")).contract
    assert contract.images is not None
    assert contract.visual is not None
    profiles = image_profiles(contract)
    largest = contract.images.max_pixels // contract.images.factor**2
    for tokens in range(1, largest + 1):
        patches = [tokens * contract.visual.merge_size**2] * 2 * MAX_BATCH_IMAGES
        groups = plan_batches(patches, max_batch_tokens=DEFAULT_BATCH_PATCHES, max_batch_items=MAX_BATCH_IMAGES)
        for images in range(1, max(map(len, groups)) + 1):
            sizes = {"images": images, "image_tokens": tokens}
            assert any(all(_holds(each[name], size) for name, size in sizes.items()) for each in profiles), sizes


def _holds(ranges: tuple[int, int, int], size: int) -> bool:
    return ranges[0] <= size <= ranges[2]


@builds
@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_timings_are_kept_from_one_build_to_the_next(tmp_path: Path) -> None:
    trt = load_tensorrt("tensorrt-rtx")
    file = tmp_path / "new" / "timing"
    for content in (b"", b"of another GPU"):  # TensorRT-RTX has the functions, and times nothing
        config = trt.Builder(quiet_logger(trt)).create_builder_config()
        use_timings(config, file)
        keep_timings(config, file)
        kept = file.read_bytes()
        assert kept != content
        file.write_bytes(content)

    class Refusing:
        def __init__(self) -> None:
            self.asked: list[bytes] = []

        def create_timing_cache(self, content: bytes) -> bytes:
            self.asked.append(content)
            return content

        def set_timing_cache(self, timings: bytes, *, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            return timings == b""

    config = Refusing()
    use_timings(config, file)
    assert config.asked == [b"of another GPU", b""]
