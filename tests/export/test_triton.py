"""Models for Triton Inference Server: configurations by its schema, the Python model in a stand-in for the server."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import io
import json
import runpy
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from google.protobuf import json_format, text_format
from PIL import Image

from rtx.export.graphs import Graphs
from rtx.export.pipeline import ExportOptions, export_bundle
from rtx.export.triton import item_config, model_name, to_text, write_repository
from rtx.runtime.backends.onnx import OnnxEngine
from rtx.runtime.bundle import Bundle
from rtx.runtime.cli import main
from rtx.runtime.embedder import Embedder
from rtx.runtime.engine import Budget
from rtx.runtime.errors import BundleError, ItemError, UsageError
from rtx.runtime.manifest import MANIFEST_FILE, EngineEntry, FileEntry
from rtx.runtime.reranker import Reranker

TEXTS = ["how to reset the pump", "a", "what the code of the query is for"]


def schema() -> Any:
    """The message of the published schema, without the rest of the client."""
    client = importlib.util.find_spec("tritonclient")
    assert client is not None
    assert client.origin is not None
    file = Path(client.origin).parent / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ModelConfig  # type: ignore[attr-defined]


if importlib.util.find_spec("tritonclient") is None:
    pytest.skip("tritonclient is not installed, as `make` does it", allow_module_level=True)
CONFIG = schema()


def parsed(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), CONFIG())


class Tensor:
    def __init__(self, name: str, array: Any) -> None:
        self._name, self._array = name, np.asarray(array)

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


class Response:
    def __init__(self, output_tensors: list[Tensor], error: Any = None) -> None:
        self.tensors, self._error = {tensor.name(): tensor for tensor in output_tensors}, error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> Any:
        return self._error


class Error:
    def __init__(self, message: str) -> None:
        self._message = message

    def message(self) -> str:
        return self._message


class Request:
    """What a client has sent."""

    def __init__(self, **inputs: Any) -> None:
        self.tensors = {name: Tensor(name, array) for name, array in inputs.items()}


class Server:
    """The server: the graph's model by ONNX Runtime, with what its configuration says checked; and the Python model."""

    def __init__(self, repository: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[tuple[int, ...]] = []
        self.fails = ""
        graphs = {
            file.parents[1].name: (parsed(file.parents[1]), ort.InferenceSession(file))
            for file in sorted(repository.glob(f"{name}_*/1/model.onnx"))
        }
        server = self

        class InferenceRequest:
            def __init__(self, model_name: str, requested_output_names: list[str], inputs: Any, preferred_memory: Any):
                self.config, self.session = graphs[model_name]
                self.outputs = {output.name: output for output in self.config.output}
                assert {*requested_output_names} <= {*self.outputs}
                assert preferred_memory == ("memory", 0, 0)
                self.wanted = requested_output_names
                self.inputs = {tensor.name(): tensor.as_numpy() for tensor in inputs}

            def exec(self) -> Response:
                if server.fails:
                    return Response([], Error(server.fails))
                batched = int(self.config.max_batch_size > 0)
                assert {*self.inputs} == {one.name for one in self.config.input}
                for one in self.config.input:
                    array = self.inputs[one.name]
                    kind = CONFIG.DESCRIPTOR.fields_by_name["input"].message_type.fields_by_name["data_type"].enum_type
                    name = {np.dtype(np.int64): "TYPE_INT64", np.dtype(np.float32): "TYPE_FP32"}[array.dtype]
                    assert one.data_type == kind.values_by_name[name].number
                    assert array.size > 0
                    assert all(want in (-1, has) for want, has in zip(one.dims, array.shape[batched:], strict=True))
                    assert not batched or array.shape[0] <= self.config.max_batch_size
                server.batches.append(self.inputs[self.config.input[0].name].shape)
                found = dict(zip(self.wanted, self.session.run(self.wanted, self.inputs), strict=True))
                return Response([Tensor(name, self.shaped(name, array)) for name, array in found.items()])

            def shaped(self, name: str, array: Any) -> Any:
                """A model's output has the axes of its configuration before they are reshaped."""
                output = self.outputs[name]
                return array.reshape(len(array), *output.dims) if output.HasField("reshape") else array

        module = types.ModuleType("triton_python_backend_utils")
        module.__dict__.update(
            Tensor=Tensor,
            InferenceRequest=InferenceRequest,
            InferenceResponse=Response,
            TritonError=Error,
            TRITONSERVER_MEMORY_CPU=0,
            PreferredMemory=lambda kind, device: ("memory", kind, device),
            get_input_tensor_by_name=lambda request, wanted: request.tensors.get(wanted),
            get_output_tensor_by_name=lambda response, wanted: response.tensors.get(wanted),
        )
        monkeypatch.setitem(sys.modules, module.__name__, module)
        self.config = parsed(repository / name)
        self.model = runpy.run_path(str(repository / name / "1" / "model.py"))["TritonPythonModel"]()
        config = json_format.MessageToDict(self.config, preserving_proto_field_name=True)
        arguments = {
            "model_repository": str(repository / name),
            "model_version": "1",
            "model_config": json.dumps(config),
        }
        self.model.initialize(arguments)

    def __call__(self, *requests: Request) -> list[Any]:
        """Results of requests that came together, or the message of an error."""
        names = {one.name for one in self.config.input}
        assert all({*request.tensors} <= names for request in requests)
        (output,) = self.config.output
        found = []
        for response in self.model.execute(list(requests)):
            if response.has_error():
                found.append(response.error().message())
                continue
            array = response.tensors[output.name].as_numpy()
            assert array.dtype == np.float32
            assert array.shape[1:] == tuple(output.dims)
            found.append(array)
        return found


def column(texts: list[str]) -> Any:
    return np.array([[text.encode()] for text in texts], dtype=object)


@pytest.fixture(scope="module")
def embedder(once: Callable[..., Path], tiny_checkpoint: Callable[..., Path]) -> Path:
    def export(folder: Path) -> None:
        checkpoint = str(tiny_checkpoint("bert", prompts={"query": "find: ", "document": ""}))
        export_bundle(checkpoint, folder / "my models!.rtx", ExportOptions(variants=("fp32",), threads=1))

    return once("triton-embedder", export) / "my models!.rtx"


@pytest.fixture(scope="module")
def reranker(once: Callable[..., Path], tiny_checkpoint: Callable[..., Path]) -> Path:
    def export(folder: Path) -> None:
        options = ExportOptions(variants=("fp32",), threads=1)
        export_bundle(str(tiny_checkpoint("bert", "rerank")), folder / "judge.rtx", options)

    return once("triton-reranker", export) / "judge.rtx"


def test_an_embedder(embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *_ = write_repository(Bundle.open(embedder), tmp_path)
    assert name == "my_models_"
    assert {path.name for path in tmp_path.iterdir()} == {name, f"{name}_graph"}
    server = Server(tmp_path, name, monkeypatch)
    config = server.config
    assert (config.backend, config.max_batch_size) == ("python", 256)
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert [(one.name, one.optional) for one in config.input] == [("text", False), ("prompt", True)]
    with Embedder.open(embedder) as model:
        plain, queries = model.embed(TEXTS), model.embed(TEXTS, prompt="query")
    # Three requests that came together: two run together, as their prompt is the same.
    found = server(
        Request(text=column(TEXTS[:1])),
        Request(text=column(TEXTS), prompt=column(["query"] * 3)),
        Request(text=column(TEXTS[1:])),
    )
    np.testing.assert_allclose(found[0], plain[:1], atol=1e-6)
    np.testing.assert_allclose(found[1], queries, atol=1e-6)
    np.testing.assert_allclose(found[2], plain[1:], atol=1e-6)
    assert np.abs(plain - queries).max() > 1e-3
    assert [rows for rows, _ in server.batches] == [3, 3]
    server.model.finalize()


def test_what_is_wrong_with_a_request_is_its_own(
    embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(tmp_path, write_repository(Bundle.open(embedder), tmp_path)[0], monkeypatch)
    good = Request(text=column(TEXTS))
    (expected,) = server(good)
    bytes_of_no_text = np.array([[b"a"], [b"\xff\xfe"]], dtype=object)
    found = server(
        Request(text=bytes_of_no_text),
        good,
        Request(),
        Request(text=column(["a"]), prompt=column(["poem"])),
        Request(text=column(["a", "b"]), prompt=column(["query", "document"])),
        good,
    )
    np.testing.assert_allclose(found[1], expected, atol=1e-6)
    np.testing.assert_allclose(found[5], expected, atol=1e-6)
    assert found[0].startswith("row 1: text: expected UTF-8, got 'utf-8' codec can't decode byte 0xff")
    assert found[2] == "input 'text' is missing"
    assert "poem" in found[3]
    assert found[4] == "prompt: expected the same for all rows of a request, got query, document"
    server.fails = "out of memory"
    assert server(good) == ["my_models__graph: out of memory"]


def test_the_graph_gets_no_more_rows_than_it_takes(
    embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many requests came together: the stand-in refuses more, as the server does."""
    server = Server(tmp_path, write_repository(Bundle.open(embedder), tmp_path)[0], monkeypatch)
    found = server(*[Request(text=column(["a"] * 100))] * 3)
    assert [array.shape for array in found] == [(100, 32)] * 3
    assert sum(rows for rows, _ in server.batches) == 300
    assert max(rows for rows, _ in server.batches) == 256


def test_a_row_that_cannot_be_embedded(embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is counted in its own request, and fails no other."""
    server = Server(tmp_path, write_repository(Bundle.open(embedder), tmp_path)[0], monkeypatch)
    prepared = server.model._model.preprocessor
    real = prepared.encode

    def encode(items: Any, **options: Any) -> Any:
        rows = real(items, **options)
        return [ItemError(at, "is bad") if item == "bad" else row for at, (item, row) in enumerate(zip(items, rows))]  # noqa: B905

    monkeypatch.setattr(prepared, "encode", encode)
    found = server(Request(text=column(TEXTS)), Request(text=column(["a", "bad", "b"])), Request(text=column(["bad"])))
    assert found[0].shape == (3, 32)
    assert found[1:] == ["row 1: is bad", "row 0: is bad"]


def test_a_reranker(reranker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tmp_path, write_repository(Bundle.open(reranker), tmp_path)[0], monkeypatch)
    assert [one.name for one in server.config.input] == ["query", "document"]
    graph = parsed(tmp_path / "judge_graph")
    # A score a row has no axis of its own, which a configuration cannot say without a reshape.
    assert [*graph.output[0].dims] == [1]
    assert graph.output[0].HasField("reshape")
    assert not graph.output[0].reshape.shape
    pairs = [(TEXTS[0], text) for text in TEXTS]
    with Reranker.open(reranker) as model:
        expected = model.score(pairs)
    found = server(
        Request(query=column([TEXTS[0]]), document=column(TEXTS[:1])),
        Request(query=column([TEXTS[0]] * 2), document=column(TEXTS[1:])),
        Request(query=column(["a", "b"]), document=column(["a"])),
    )
    np.testing.assert_allclose(np.concatenate(found[:2])[:, 0], expected, atol=1e-6)
    assert found[2] == "document: expected 2 rows, as query has, got 1"


def test_the_files(embedder: Path, tmp_path: Path) -> None:
    name, *_ = write_repository(Bundle.open(embedder), tmp_path)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        f"{name}/config.pbtxt",
        f"{name}/1/model.py",
        f"{name}/1/manifest.json",
        f"{name}/1/tokenizer.json",
        f"{name}_graph/config.pbtxt",
        f"{name}_graph/1/model.onnx",
    }
    graph = parsed(tmp_path / f"{name}_graph")
    assert graph.backend == "onnxruntime"
    assert [(one.name, [*one.dims]) for one in graph.input] == [
        (one, [-1]) for one in ("input_ids", "attention_mask", "token_type_ids")
    ]
    kinds = graph.instance_group[0].DESCRIPTOR.enum_types_by_name["Kind"].values_by_name
    assert graph.instance_group[0].kind == kinds["KIND_GPU"].number
    (cuda,) = graph.optimization.execution_accelerators.gpu_execution_accelerator
    assert (cuda.name, dict(cuda.parameters)) == ("cuda", {"use_tf32": "0"})
    # The model of texts would ask a graph that may not be loaded yet.
    assert not parsed(tmp_path / name).model_warmup
    (warm,) = graph.model_warmup
    assert {key: ([*value.dims], value.zero_data) for key, value in warm.inputs.items()} == {
        one.name: ([16], True) for one in graph.input
    }


def test_the_warm_up_is_a_batch_that_the_graph_takes(embedder: Path, tmp_path: Path) -> None:
    graph = tmp_path / write_repository(Bundle.open(embedder), tmp_path)[1]
    config = parsed(graph)
    zeros = {key: np.zeros((1, *value.dims), np.int64) for key, value in config.model_warmup[0].inputs.items()}
    engine = OnnxEngine(graph / "1" / "model.onnx", output=config.output[0].name, threads=1)
    assert np.isfinite(engine.run(zeros)).all()


@pytest.fixture(scope="module")
def with_images(
    once: Callable[..., Path], image_checkpoint: Callable[[str], Path], image_graphs: Callable[[str], Graphs]
) -> Callable[[str], Path]:
    """`with_images(kind)` gives the bundle of a model of `image_checkpoint`."""

    def export(kind: str, folder: Path) -> None:
        task: Any = "rerank" if "reranker" in kind else None
        options = ExportOptions(variants=("fp32",), threads=1, task=task)
        with pytest.MonkeyPatch.context() as patch:
            # Other tests take the same graphs, and exporting them is most of the time.
            patch.setattr("rtx.export.pipeline.export_graphs", lambda _: image_graphs(kind))
            export_bundle(str(image_checkpoint(kind)), folder / f"{kind}.rtx", options)

    return lambda kind: once(f"triton-{kind}", lambda folder: export(kind, folder)) / f"{kind}.rtx"


def png(width: int, height: int, seed: int) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def cells(*values: bytes) -> Any:
    return np.array([[value] for value in values], dtype=object)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "qwen3-vl"])
def test_images(with_images: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    bundle = with_images(kind)
    names = write_repository(Bundle.open(bundle), tmp_path)
    assert names == (kind, f"{kind}_graph", f"{kind}_image")
    server = Server(tmp_path, kind, monkeypatch)
    assert [(one.name, one.optional) for one in server.config.input] == [
        ("text", True),
        ("image", True),
        ("prompt", True),
    ]
    pages = [png(64, 48, 1), png(40, 80, 2)]
    mixed: list[Any] = ["a red cat", pages[0], "the pump", pages[1], pages[0]]
    if kind == "qwen3-vl":
        mixed.append({"text": "what is this?", "image": pages[1]})
    texts = [one if isinstance(one, str) else one["text"] if isinstance(one, dict) else "" for one in mixed]
    images = [b"" if isinstance(one, str) else one["image"] if isinstance(one, dict) else one for one in mixed]
    with Embedder.open(bundle) as model:
        expected, alone = model.embed(mixed), model.embed(["a red cat", "the pump"])
    found = server(
        Request(text=column(texts), image=cells(*images)),
        Request(text=column(["a red cat", "the pump"])),
        Request(image=cells(*pages)),
    )
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    np.testing.assert_allclose(found[1], alone, atol=1e-5)
    np.testing.assert_allclose(found[2], expected[[1, 3]], atol=1e-5)
    # What names a file is a text, and what is no image is the fault of its own request.
    (tmp_path / "page.png").write_bytes(pages[0])
    path = str(tmp_path / "page.png")
    found = server(
        Request(text=column([path])),
        Request(image=cells(path.encode())),
        Request(),
        Request(text=column(["a", "b"]), image=cells(pages[0])),
        Request(image=cells(pages[0])),
    )
    assert found[0].shape == (1, expected.shape[1])
    assert "row 0: " in found[1]
    assert "image" in found[1]
    assert found[2] == "input 'text' or 'image' is missing"
    assert found[3] == "image: expected 2 rows, as text has, got 1"
    np.testing.assert_allclose(found[4], expected[1:2], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "qwen3-vl"])
def test_graphs_with_images_warm_up(with_images: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    _, *graphs = write_repository(Bundle.open(with_images(kind)), tmp_path)
    for name in graphs:
        config = parsed(tmp_path / name)
        session = ort.InferenceSession(tmp_path / name / "1" / "model.onnx")
        rows = (1,) if config.max_batch_size else ()
        types = {one.name: np.float32 if "float" in one.type else np.int64 for one in session.get_inputs()}
        given = config.model_warmup[0].inputs
        assert config.model_warmup[0].batch_size == 1  # of 0 the server skips the sample
        assert {*given} == {*types}
        zeros = {key: np.zeros((*rows, *value.dims), types[key]) for key, value in given.items()}
        assert len(session.run(None, zeros)) == len(config.output)


@pytest.mark.slow
def test_a_reranker_of_pages(
    with_images: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = with_images("qwen3-vl-reranker")
    name, *_ = write_repository(Bundle.open(bundle), tmp_path)
    server = Server(tmp_path, name, monkeypatch)
    page = png(64, 48, 1)
    with Reranker.open(bundle) as model:
        expected = model.score([("the pump", page), ("the pump", "how to reset it")])
    (found,) = server(
        Request(
            query=column(["the pump"] * 2), document=column(["", "how to reset it"]), document_image=cells(page, b"")
        )
    )
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-5)


def test_what_is_in_the_way(embedder: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(embedder)
    name, graph = write_repository(bundle, tmp_path)
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match=r"my_models_: there is a model already; --overwrite replaces it"):
        write_repository(bundle, tmp_path)
    assert write_repository(bundle, tmp_path, overwrite=True) == (name, graph)
    (tmp_path / f"{name}_graph" / "config.pbtxt").unlink()
    with pytest.raises(UsageError, match=r"my_models__graph: is in the way and is no model of Triton"):
        write_repository(bundle, tmp_path, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file; expected the folder of a model repository"):
        write_repository(bundle, tmp_path / "file")
    assert (tmp_path / "other").exists()


def test_an_engine_of_tensorrt_is_a_plan(embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is none, and the server's graph model computes what it would."""
    bundle = Bundle.open(embedder)
    shutil.copytree(embedder, tmp_path / "my.rtx")
    file, content = "engines/model.tensorrt.engine", b"an engine"
    (tmp_path / "my.rtx" / "engines").mkdir()
    (tmp_path / "my.rtx" / file).write_bytes(content)
    entry = EngineEntry(
        target="tensorrt",
        version="10.13.0",
        graph="onnx/model.onnx",
        sources={"onnx/model.onnx": bundle.manifest.files["onnx/model.onnx"].sha256},
        capabilities=(),
        profiles=({"batch": (1, 1, 4), "tokens": (1, 8, 8)}, {"batch": (1, 1, 2), "tokens": (9, 64, 64)}),
        layers={},
    )
    files = {**bundle.manifest.files, file: FileEntry(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))}
    manifest = dataclasses.replace(bundle.manifest, files=files, engines={file: entry})
    (tmp_path / "my.rtx" / MANIFEST_FILE).write_bytes(manifest.to_bytes())
    name, _ = write_repository(Bundle.open(tmp_path / "my.rtx"), tmp_path / "models")
    graph = tmp_path / "models" / f"{name}_graph"
    assert [path.name for path in (graph / "1").iterdir()] == ["model.plan"]
    config = parsed(graph)
    assert (config.backend, config.max_batch_size) == ("tensorrt", 4)
    tokens = parsed(tmp_path / "models" / name).parameters["max_batch_tokens"].string_value
    assert int(tokens) == Budget.of("tensorrt").max_batch_tokens
    assert [*config.instance_group[0].profile] == ["0", "1"]
    assert not config.optimization.execution_accelerators.gpu_execution_accelerator
    shutil.copyfile(embedder / "onnx" / "model.onnx", graph / "1" / "model.onnx")
    server = Server(tmp_path / "models", name, monkeypatch)
    texts = ["a"] * 9 + [TEXTS[0] * 4] * 3
    (found,) = server(Request(text=column(texts)))
    with Embedder.open(embedder) as model:
        np.testing.assert_allclose(found, model.embed(texts), atol=1e-6)
    assert sorted(rows for rows, _ in server.batches) == [2, 2, 4, 4]


def test_which_variant(embedder: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(embedder)
    packed = dataclasses.replace(bundle.manifest.variants["fp32"], operators=True)
    bundle.manifest = dataclasses.replace(bundle.manifest, variants={"fp32": packed})
    for variant in (None, "fp32"):
        with pytest.raises(UsageError, match="packed variants have operators of rtx, which Triton's"):
            write_repository(bundle, tmp_path, variant=variant)
    with pytest.raises(UsageError, match="has no variant 'fp8'"):
        write_repository(Bundle.open(embedder), tmp_path, variant="fp8")
    assert not [*tmp_path.iterdir()]


def test_batches_are_as_large_as_the_device_likes(embedder: Path) -> None:
    contract = Bundle.open(embedder).manifest.contract
    for device in ("cpu", "cuda"):
        config = item_config("toy", ["toy_graph"], contract, on_gpu=device != "cpu")
        parameters = {one["key"]: one["value"]["string_value"] for one in config["parameters"]}
        assert int(parameters["max_batch_tokens"]) == Budget.of(device).max_batch_tokens


def test_a_damaged_bundle(embedder: Path, tmp_path: Path) -> None:
    shutil.copytree(embedder, tmp_path / "x.rtx")
    graph = tmp_path / "x.rtx" / "onnx" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    (tmp_path / "x.rtx" / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"onnx/model\.onnx was changed .*; tokenizer\.json cannot be read"):
        write_repository(Bundle.open(tmp_path / "x.rtx"), tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_packed_variants_alone_are_refused_before_any_work(tmp_path: Path) -> None:
    command = ["export", "no/such/checkpoint", "-o", str(tmp_path / "x.rtx"), "--precision", "int8-packed"]
    result = CliRunner().invoke(main, [*command, "--triton-repo", str(tmp_path / "models")])
    assert "--triton-repo: packed variants have operators of rtx, which Triton's ONNX Runtime lacks" in result.output
    assert result.exit_code == UsageError.exit_code


@pytest.mark.usefixtures("shared_graph")
def test_from_the_command_line(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    command = ["export", str(tiny_checkpoint("bert")), "--threads", "1", "--triton-repo", str(tmp_path / "models")]
    result = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "tiny.rtx")])
    assert result.exit_code == 0, result.output
    assert "the models tiny, tiny_graph" in result.stdout
    again = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "sub" / "tiny.rtx")])
    assert again.exit_code == 2
    assert "there is a model already" in again.stderr
    assert not (tmp_path / "sub").exists()  # before any work


def test_names_and_texts() -> None:
    assert model_name("bücher v1/2") == "b_cher_v1_2"
    assert model_name("") == "model"
    text = to_text({"name": 'a "b"\\', "n": 3, "on": True, "dims": [-1, 2], "none": [], "inner": {"x": 1.5}})
    assert text == 'name: "a \\"b\\"\\\\"\nn: 3\non: true\ndims: [-1, 2]\nnone: []\ninner {\n  x: 1.5\n}\n'
