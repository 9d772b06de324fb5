"""The packed graph: the plain one's numbers without its padding, for every architecture that asks for its attention."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from rtx.export.derive import derive
from rtx.export.graph import module_of
from rtx.export.int8_fused import quantize_int8_fused
from rtx.export.packed import export_packed
from rtx.export.pipeline import ExportOptions, export_bundle
from rtx.kernels import library
from rtx.runtime import bundle as bundle_module
from rtx.runtime.backends.onnx import OnnxEngine
from rtx.runtime.bundle import Bundle
from rtx.runtime.cli import main
from rtx.runtime.embedder import Embedder
from rtx.runtime.engine import Budget, run_items
from rtx.runtime.errors import ExportError
from rtx.runtime.evalset import EvalSet, write_evalset
from rtx.runtime.verification import verify_bundle
from rtx.trainer.model import RetrievalModel

pytestmark = pytest.mark.skipif(library.library_file() is None, reason=f"packed: {library.NOT_BUILT}")

TEXTS = ["sort the list", "a", "how do i reset the device and parse the file of the code " * 3, "x y", "the query"]
Exported = Callable[..., Any]
PACKED = ("bert", "distilbert", "roberta", "xlm-roberta", "modernbert", "qwen3")


def engine(graph: ir.Model, model: RetrievalModel, *, packed: bool = True) -> OnnxEngine:
    content = ir.to_proto(graph).SerializeToString()
    return OnnxEngine(content, output=model.contract.output, threads=1, packed=packed)


def encoded(model: RetrievalModel) -> list[Any]:
    if model.task == "embed":
        return model.preprocessor.encode(TEXTS, prompt="query" if "query" in model.contract.prompts else None)
    return model.preprocessor.encode_pairs([(text, TEXTS[0]) for text in TEXTS])


def held(exported: Exported, architecture: str, task: str = "embed", **layout: Any) -> None:
    """Packed against plain, together and alone, and int8 against the same arithmetic in standard operators."""
    model, plain_graph = exported(architecture, task, **layout)
    packed_graph = exported(architecture, task, packed=True, **layout)[1]
    items = encoded(model)
    assert [value.name for value in packed_graph.graph.inputs] == list(model.contract.inputs)
    assert [value.name for value in packed_graph.graph.outputs] == [model.contract.output]
    plain, packed = engine(plain_graph, model, packed=False), engine(packed_graph, model)
    whole, each = Budget(max_batch_items=64, max_batch_tokens=1 << 20), Budget(max_batch_items=1)
    expected = run_items(plain, model.preprocessor, items, whole)
    np.testing.assert_allclose(run_items(packed, model.preprocessor, items, whole), expected, atol=2e-6)
    np.testing.assert_allclose(run_items(packed, model.preprocessor, items, each), expected, atol=2e-6)
    assert quantize_int8_fused(packed_graph)
    kinds = [node.op_type for node in packed_graph.graph]
    assert "MatMul" not in kinds[: max(place for place, kind in enumerate(kinds) if kind == "PackedAttention")]
    int8 = engine(packed_graph, model)
    # What else is in the batch changes nothing.
    found = run_items(int8, model.preprocessor, items, whole)
    np.testing.assert_allclose(run_items(int8, model.preprocessor, items, each), found, atol=1e-6)
    # Attention as in the standard operators: what it rounds beside them, models as random as these make much of.
    attentions = [node for node in packed_graph.graph if node.op_type == "PackedAttention"]
    assert [node.attributes.get_int("bfloat16") for node in attentions] == [1] * len(attentions)
    for node in attentions:
        node.attributes["bfloat16"] = ir.AttrInt64("bfloat16", 0)
    int8, standard = engine(packed_graph, model), engine(derive("int8", plain_graph), model, packed=False)
    found = run_items(int8, model.preprocessor, items, whole)
    rounded = run_items(standard, model.preprocessor, items, whole)
    # A number at the edge of a step may fall on either side of it.
    assert np.abs(found - rounded).max() < 0.25 * np.abs(expected - rounded).max() + 1e-3
    assert np.abs(found - expected).max() > 1e-5


@pytest.mark.parametrize("architecture", PACKED)
def test_embedders(exported: Exported, architecture: str) -> None:
    held(exported, architecture)


def test_a_prompt_is_left_out_of_pooling(exported: Exported) -> None:
    held(exported, "bert", prompts={"query": "find: "}, include_prompt=False)


@pytest.mark.parametrize("architecture", ["bert", "qwen3", "qwen3-chat"])
def test_rerankers(exported: Exported, architecture: str) -> None:
    held(exported, architecture, "rerank")


@pytest.mark.parametrize("architecture", ["mpnet", "deberta-v2"])
def test_attention_of_its_own_is_refused(tiny_checkpoint: Callable[..., Path], architecture: str) -> None:
    model = RetrievalModel.load(tiny_checkpoint(architecture))
    before = model.backbone.config._attn_implementation
    with pytest.raises(ExportError, match=r"^packed: \w+ does not ask transformers for its attention"):
        export_packed(model)
    assert model.backbone.config._attn_implementation == before
    assert "forward" not in vars(model.backbone)


def test_rows_of_one_length_are_not_packed(tiny_checkpoint: Callable[..., Path]) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert"))
    model.contract = dataclasses.replace(model.contract, fixed_tokens=model.contract.max_tokens)
    with pytest.raises(ExportError, match="cannot be packed: its rows have one length"):
        export_packed(model)


ROTATED = ["RotaryEmbedding", "RotaryEmbedding"]
FUSED = {"bert": [], "distilbert": [], "roberta": [], "modernbert": ROTATED, "qwen3": ["RMSNorm", "RMSNorm", *ROTATED]}


@pytest.mark.parametrize("architecture", FUSED)
def test_what_stands_around_a_linear_layer_becomes_one_with_it(exported: Exported, architecture: str) -> None:
    graph = exported(architecture, packed=True).graph
    quantize_int8_fused(graph)
    kinds = [node.op_type for node in graph.graph if node.domain == library.DOMAIN]
    behind = ["PackedAttention", "Int8Linear", "Int8Linear", "Int8Linear"]
    assert sorted(kinds) == sorted(
        ["PackRows", "Int8Embedding", *2 * ["Int8Linear", *FUSED[architecture], *behind], "PackedPool"]
    )
    assert kinds[:2] == ["PackRows", "Int8Embedding"]
    assert kinds[-5:] == [*behind, "PackedPool"]
    # Between the embeddings and pooling nothing else computes.
    every = [node.op_type for node in graph.graph]
    between = every[every.index("PackedAttention") : every.index("PackedPool")]
    assert {*between} <= {*kinds, "Reshape"}


def test_layers_that_share_a_weight_keep_their_own_biases(exported: Exported) -> None:
    model, graph = exported("bert", packed=True)
    dense = [node for node in graph.graph if module_of(node).endswith("attention.output.dense")]
    first, second = (node for node in dense if node.op_type == "MatMul")
    second.replace_input_with(1, first.inputs[1])
    for number, node in enumerate(node for node in dense if node.op_type == "Add"):
        bias = next(value for value in node.inputs if value is not None and value.is_initializer())
        size = bias.const_value.shape[0]
        bias.const_value = ir.tensor(np.linspace(-number, 3 * number, size, dtype=np.float32), name=bias.name)
    batch = model.preprocessor.collate([item for item in encoded(model) if hasattr(item, "ids")])
    expected = engine(graph, model).run(batch)
    quantize_int8_fused(graph)
    assert (engine(graph, model).run(batch) * expected).sum(axis=1).min() > 0.99


def test_padding_on_either_side(exported: Exported) -> None:
    model, graph = exported("qwen3", packed=True)
    packed = engine(graph, model)
    items = [item for item in encoded(model) if hasattr(item, "ids")]
    batch = model.preprocessor.collate(items)
    assert batch["attention_mask"][:, 0].all()  # on the right
    flipped = {name: np.zeros_like(array) for name, array in batch.items()}
    for row, item in enumerate(items):
        for name, array in batch.items():
            flipped[name][row, -len(item.ids) :] = array[row, : len(item.ids)]
    right, left = (packed.run(some) for some in (batch, flipped))
    np.testing.assert_allclose(left, right, atol=1e-6)


@pytest.fixture(scope="module")
def bundle(once: Callable[..., Path], tiny_checkpoint: Callable[..., Path]) -> Path:
    def export(folder: Path) -> None:
        variants: Any = ("fp32", "int8", "int8-packed")
        export_bundle(str(tiny_checkpoint("bert")), folder / "tiny.rtx", ExportOptions(variants=variants, threads=1))

    return once("packed-bundle", export) / "tiny.rtx"


def test_a_bundle_says_which_variants_need_operators(bundle: Path) -> None:
    variants = Bundle.open(bundle).manifest.variants
    assert {name: variant.operators for name, variant in variants.items()} == {
        "fp32": False,
        "int8": False,
        "int8-packed": True,
    }
    assert variants["int8-packed"].precision == "int8"
    assert all(finding.ok for finding in verify_bundle(bundle))


def test_without_operators_the_plain_kin_serves(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle.open(bundle)
    manifest = dataclasses.replace(opened.manifest, default_variant="int8-packed")
    opened = Bundle(bundle, manifest)
    assert opened.variant()[0] == "int8-packed"
    monkeypatch.setattr(bundle_module, "library_file", lambda: None)
    assert opened.variant()[0] == "int8"
    only = {name: variant for name, variant in manifest.variants.items() if name != "int8"}
    assert Bundle(bundle, dataclasses.replace(manifest, variants=only)).variant()[0] == "fp32"


def test_without_operators_a_packed_variant_is_left_out(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rtx.export.pipeline.library_file", lambda: None)
    variants: Any = ("fp32", "fp32-packed")
    outcome = export_bundle(str(tiny_checkpoint("bert")), tmp_path / "x.rtx", ExportOptions(variants=variants))
    assert list(outcome.manifest.variants) == ["fp32"]
    assert outcome.manifest.rejected["fp32-packed"].endswith(library.NOT_BUILT)


def test_the_embedder_is_the_same_one(bundle: Path) -> None:
    texts = [*TEXTS, "", "?"]
    with Embedder.open(bundle, variant="int8-packed", threads=1) as packed:
        found = packed.embed(texts)
    with Embedder.open(bundle, variant="int8", threads=1) as int8:
        assert (found * int8.embed(texts)).sum(axis=1).min() > 0.9999


def test_auto_tries_what_a_cpu_runs_and_opens_the_fastest(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    texts = {f"d{number}": text for number, text in enumerate(TEXTS)}
    evalset = EvalSet("small", {"q": "sort a list", "r": "the code"}, texts, {"q": {"d0": 1}, "r": {"d2": 1}})
    write_evalset(evalset, tmp_path / "eval")
    command = ["export", str(tiny_checkpoint("bert")), "-o", str(tmp_path / "x.rtx"), "--precision", "auto"]
    command += ["--eval", str(tmp_path / "eval"), "--max-ndcg-drop", "1", "--min-cosine", "0.5", "--threads", "1"]
    result = CliRunner(env={"COLUMNS": "120"}).invoke(main, command)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "x.rtx" / "report.json").read_text())
    assert set(report["seconds"]) == {"fp32", "fp32-packed", "int8", "int8-packed"}
    fastest = min(report["seconds"].values())
    assert report["seconds"][report["default_variant"]] <= 1.05 * fastest
    lines = {line.split()[0]: line for line in result.output.splitlines() if line.startswith(("fp32", "int8"))}
    slowest = max(report["seconds"].values())
    for name, seconds in report["seconds"].items():
        assert f" {slowest / seconds:.2f}× " in lines[name]
    assert "NDCG@10 against speed" in (tmp_path / "x.rtx" / "report.html").read_text()
