"""Checkpoint to bundle: what passes is written whole, what fails is said, and a kill leaves nothing that opens."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import weakref

import numpy as np
import onnx_ir as ir
import pytest

from rtx.export import derive, pipeline, write
from rtx.export.edit import Editor
from rtx.export.graphs import Graphs
from rtx.export.pipeline import ExportOptions, choose_default, export_bundle
from rtx.runtime.backends.onnx import OnnxEngine
from rtx.runtime.bundle import Bundle
from rtx.runtime.candidates import Candidate
from rtx.runtime.contract import Contract
from rtx.runtime.embedder import Embedder
from rtx.runtime.errors import BundleError, CheckpointError, EngineError, GateError, UsageError
from rtx.runtime.manifest import CONTRACT_KEY, MANIFEST_FILE
from rtx.runtime.reranker import Reranker
from rtx.trainer.model import RetrievalModel

TEXTS = [
    "how to reset the pump",
    "",
    "a",
    "for file in code: text " * 30,
    "Größe 東京 \U0001f600",
    "what is the query?",
]


@pytest.fixture
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint("distilbert")


@pytest.fixture
def plain(exported):
    """The graph of `checkpoint`, to be broken."""
    return exported("distilbert").graph


@pytest.fixture
def export(monkeypatch, plain, checkpoint):
    """`export(target, **options)` exports `checkpoint`; its graph is made beforehand, and may have been changed."""

    def run(target, **options):
        monkeypatch.setattr(pipeline, "export_graphs", lambda _: Graphs(plain.clone()))
        return export_bundle(str(checkpoint), target, ExportOptions(**options))

    return run


def test_a_reranker_scores_as_pytorch_does(tiny_checkpoint, evalset, tmp_path):
    source = tiny_checkpoint("roberta", "rerank", activation="sigmoid", max_tokens=40)
    candidates = {query: [Candidate(key) for key in evalset.corpus] for query in evalset.queries}
    options = ExportOptions(variants=("fp32", "int8"), evalset=evalset, candidates=candidates, max_ndcg_drop=1.0)
    outcome = export_bundle(str(source), tmp_path / "judge.rtx", options)
    assert set(outcome.manifest.variants) == {"fp32", "int8"}
    assert outcome.verdicts["fp32"].ranking.difference == 0.0
    model = RetrievalModel.load(source)
    pairs = [(query, text) for query in TEXTS for text in TEXTS]
    expected = Reranker(model.preprocessor, model.engine()).score(pairs)
    for variant, atol in (("fp32", 1e-5), ("int8", 0.05)):
        with Reranker.open(tmp_path / "judge.rtx", variant=variant, threads=1) as reranker:
            assert reranker.contract == model.contract
            np.testing.assert_allclose(reranker.score(pairs), expected, atol=atol)
    # Other tools read its configuration and its tokenizer; it has no pooling to describe.
    assert not (tmp_path / "judge.rtx" / "modules.json").exists()
    assert (tmp_path / "judge.rtx" / "config.json").exists()


def test_a_language_model_scores_as_sentence_transformers_does(tiny_checkpoint, evalset, tmp_path):
    from sentence_transformers import CrossEncoder

    source = tiny_checkpoint("qwen3-chat", "rerank", prompts={"judge": "Find the text."}, default_prompt="judge")
    candidates = {query: [Candidate(key) for key in evalset.corpus] for query in evalset.queries}
    options = ExportOptions(
        variants=("fp32", "fp16", "int8"), evalset=evalset, candidates=candidates, max_ndcg_drop=1.0, min_cosine=0.5
    )
    outcome = export_bundle(str(source), tmp_path / "judge.rtx", options)
    assert set(outcome.manifest.variants) == {"fp32", "fp16", "int8"}
    # Where the query is too long, theirs cuts off all of the document.
    pairs = [(query, text) for query in TEXTS if len(query) < 60 for text in TEXTS]
    theirs = CrossEncoder(str(source), device="cpu").predict(pairs)
    assert np.ptp(theirs) > 0.3
    for variant, atol in (("fp32", 1e-5), ("fp16", 5e-3), ("int8", 0.1)):
        with Reranker.open(tmp_path / "judge.rtx", variant=variant, threads=1) as reranker:
            np.testing.assert_allclose(reranker.score(pairs), theirs, atol=atol)
    tokens = Bundle.open(tmp_path / "judge.rtx").golden().tokens
    # Whatever was cut, the template's end is there, whose last token is scored.
    assert max(len(item.ids) for item in tokens) == outcome.manifest.contract.max_tokens
    assert len({tuple(item.ids[-17:]) for item in tokens}) == 1


def test_left_padding_with_a_prompt_that_is_not_pooled(tiny_checkpoint, tmp_path):
    source = tmp_path / "checkpoint"
    shutil.copytree(
        tiny_checkpoint(
            "qwen3", pooling=("weightedmean", "lasttoken"), include_prompt=False, prompts={"query": "find the: "}
        ),
        source,
    )
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "left"}))
    export_bundle(str(source), tmp_path / "x.rtx", ExportOptions(dimensions=24, max_tokens=32))
    model = RetrievalModel.load(source, max_tokens=32)
    reference = Embedder(model.preprocessor, model.engine())
    with Embedder.open(tmp_path / "x.rtx", threads=1) as embedder:
        contract = embedder.contract
        assert (contract.padding_side, contract.dimension, contract.max_tokens) == ("left", 24, 32)
        assert "pooling_mask" in contract.inputs
        for prompt in (None, "query", "document"):
            vectors = embedder.embed(TEXTS, prompt=prompt)
            np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
            expected = reference.embed(TEXTS, prompt=prompt, dimensions=24)
            np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_what_fails_is_left_out_and_says_why(export, tmp_path):
    outcome = export(tmp_path / "x.rtx", variants=("fp32", "int8"), min_cosine=1.0)
    assert set(outcome.manifest.variants) == {"fp32"}
    assert outcome.manifest.default_variant == "fp32"
    reason = outcome.manifest.rejected["int8"]
    assert reason.startswith("differs from PyTorch: least cosine 0.9")
    assert "(at least 1.000000)" in reason
    assert not (tmp_path / "x.rtx" / "onnx" / "model_int8.onnx").exists()
    bundle = Bundle.open(tmp_path / "x.rtx")
    with pytest.raises(UsageError, match="variant 'int8' did not pass the gate: differs from PyTorch"):
        bundle.variant("int8")
    report = json.loads((tmp_path / "x.rtx" / "report.json").read_text())
    assert report["verdicts"]["int8"]["failures"] == [reason]
    assert list(report["bytes"]) == ["fp32"]


def test_fp32_is_judged_but_not_written_if_not_asked_for(export, tmp_path):
    outcome = export(tmp_path / "x.rtx", variants=("int8",))
    assert list(outcome.verdicts) == ["fp32", "int8"]
    assert list(outcome.manifest.variants) == ["int8"]
    assert [path.name for path in (tmp_path / "x.rtx" / "onnx").iterdir()] == ["model_int8.onnx"]
    assert list(Bundle.open(tmp_path / "x.rtx").damaged()) == []


def test_if_nothing_passes_nothing_is_written(export, tmp_path):
    with pytest.raises(GateError, match="no variant passed the gate, nothing was written:\n  int8: differs") as caught:
        export(tmp_path / "x.rtx", variants=("int8",), min_cosine=1.0)
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def drop_the_mask(graph):
    """Every token is attended, as if there were no padding."""
    mask, ids = (
        next(value for value in graph.inputs if value.name == name) for name in ("attention_mask", "input_ids")
    )
    editor = Editor(graph, "broken")
    first = next(iter(graph))
    same = editor.insert(first, "Equal", ids, ids, dtype=ir.DataType.BOOL)
    ones = editor.insert(first, "Cast", same, attributes={"to": ir.DataType.INT64}, dtype=ir.DataType.INT64)
    ir.convenience.replace_all_uses_with(mask, ones)


def replace_output(graph, make):
    """Let another node make the output."""
    editor = Editor(graph, "broken")
    last = graph.outputs[0].producer()
    editor.replace(last, make(editor, last))


def pool_the_first_token(graph):
    def first_token(editor, last):
        hidden = next(value for value in graph.outputs if value.name == "last_hidden_state")
        first = editor.insert(
            last,
            "Gather",
            hidden,
            editor.constant("zero", np.zeros((), np.int64)),
            attributes={"axis": 1},
        )
        return editor.insert(last, "LpNormalization", first, attributes={"axis": -1, "p": 2})

    replace_output(graph, first_token)


def forget_the_norm(graph):
    replace_output(graph, lambda editor, last: editor.insert(last, "Identity", last.inputs[0]))


def round_a_weight(graph):
    weight = next(value for value in graph.initializers.values() if value.name.endswith("word_embeddings.weight"))
    rounded = weight.const_value.numpy().astype(np.float16).astype(np.float32)
    weight.const_value = ir.tensor(rounded, name=weight.name)


def shift_a_position(graph):
    table = next(value for value in graph.initializers.values() if value.name.endswith("position_embeddings.weight"))
    table.const_value = ir.tensor(np.roll(table.const_value.numpy(), 1, axis=0), name=table.name)


def make_nan(graph):
    replace_output(
        graph,
        lambda editor, last: editor.insert(
            last, "Div", *[editor.insert(last, "Sub", last.inputs[0], last.inputs[0])] * 2
        ),
    )


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (drop_the_mask, "depends on the batch: "),
        (pool_the_first_token, "differs from PyTorch: "),
        (forget_the_norm, "differs from PyTorch: "),
        (round_a_weight, "differs from PyTorch: "),
        (shift_a_position, "differs from PyTorch: "),
        (make_nan, "differs from PyTorch: least cosine nan"),
    ],
)
def test_a_broken_graph_does_not_pass(export, plain, tmp_path, damage, found):
    damage(plain.graph)
    with pytest.raises(GateError, match=f"fp32: {found}"):
        export(tmp_path / "x.rtx")
    assert list(tmp_path.iterdir()) == []


def test_a_variant_that_cannot_be_derived_is_left_out(export, plain, tmp_path):
    weight = next(value for value in plain.graph.initializers.values() if value.name.endswith("word_embeddings.weight"))
    content = weight.const_value.numpy().copy()
    content[-1] = np.nan  # [MASK], which no text holds
    weight.const_value = ir.tensor(content, name=weight.name)
    outcome = export(tmp_path / "x.rtx", variants=("fp32", "int8"))
    assert outcome.manifest.rejected == {
        "int8": "backbone.embeddings.word_embeddings: the weight holds NaN or infinity"
    }
    report = json.loads((tmp_path / "x.rtx" / "report.json").read_text())
    assert report["verdicts"]["int8"]["parity"] is None
    assert "backbone.embeddings" in (tmp_path / "x.rtx" / "report.html").read_text()


def test_a_variant_that_does_not_load_is_left_out_and_engines_are_closed(export, tmp_path, monkeypatch):
    opened, closed = [], []

    class Engine(OnnxEngine):
        def __init__(self, contract, graph, image_graph, *, threads, name, cache_bytes, packed):
            assert image_graph is None
            assert cache_bytes == 0
            assert packed is False
            if name == "fp16":
                raise EngineError("fp16: ONNX Runtime cannot load the graph")
            super().__init__(graph, output=contract.output, threads=threads, name=name)
            opened.append(name)

        def close(self):
            closed.append(self.name)
            super().close()

    monkeypatch.setattr(pipeline, "open_graphs", Engine)
    outcome = export(tmp_path / "x.rtx", variants=("fp32", "fp16", "int8"), threads=1)
    assert outcome.manifest.rejected == {"fp16": "ONNX Runtime cannot load the graph"}
    assert sorted(opened) == sorted(closed) == ["fp32", "fp32", "int8", "int8"]


def test_what_is_in_the_way_stays(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / MANIFEST_FILE).write_text("{}")
    for name, overwrite, message in (
        ("file", True, "file: is in the way and is no bundle; nothing was written"),
        ("folder", True, "folder: is in the way and is no bundle; nothing was written"),
        ("bundle", False, "bundle: there is a bundle already; --overwrite replaces it"),
    ):
        # The checkpoint does not exist: what is in the way is found before anything is loaded.
        with pytest.raises(UsageError, match=message):
            export_bundle("./none", tmp_path / name, ExportOptions(overwrite=overwrite))
    with pytest.raises(CheckpointError):
        export_bundle("./none", tmp_path / "bundle", ExportOptions(overwrite=True))
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "file", "folder"]


def test_overwriting_keeps_the_old_bundle_until_the_new_one_has_passed(export, tmp_path):
    export(tmp_path / "x.rtx")
    old = (tmp_path / "x.rtx" / MANIFEST_FILE).read_bytes()
    with pytest.raises(GateError):
        export(tmp_path / "x.rtx", variants=("int8",), min_cosine=1.0, overwrite=True)
    assert (tmp_path / "x.rtx" / MANIFEST_FILE).read_bytes() == old
    assert list(Bundle.open(tmp_path / "x.rtx").damaged()) == []
    export(tmp_path / "x.rtx", variants=("int8",), overwrite=True)
    assert list(Bundle.open(tmp_path / "x.rtx").manifest.variants) == ["int8"]
    assert list(Bundle.open(tmp_path / "x.rtx").damaged()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["x.rtx"]


def test_weights_beyond_what_a_graph_can_hold_lie_beside_it(export, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(derive, "_EXTERNAL_FROM_BYTES", 10_000)
    outcome = export(tmp_path / "x.rtx", variants=("int8", "fp16"), min_cosine=0.9, threads=1)
    folder = tmp_path / "x.rtx"
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == [
        "model_fp16.onnx",
        "model_fp16.onnx.data",
        "model_int8.onnx",
        "model_int8.onnx.data",
    ]
    assert outcome.manifest.variants["fp16"].external == ("onnx/model_fp16.onnx.data",)
    sizes = json.loads((folder / "report.json").read_text())["bytes"]
    assert sizes["fp16"] == sum(path.stat().st_size for path in (folder / "onnx").glob("model_fp16*"))
    model = RetrievalModel.load(checkpoint)
    expected = Embedder(model.preprocessor, model.engine()).embed(TEXTS)
    with Embedder.open(folder, variant="fp16", threads=1) as embedder:
        np.testing.assert_allclose(embedder.embed(TEXTS), expected, atol=5e-3)
    data = folder / "onnx" / "model_fp16.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    assert [problem.split()[0] for problem in Bundle.open(folder).damaged()] == ["onnx/model_fp16.onnx.data"]
    with pytest.raises(BundleError, match=r"model_fp16\.onnx\.data was changed"):
        Embedder.open(folder, variant="fp16")


def test_a_small_variant_of_a_large_graph_holds_its_own_weights(export, plain, tmp_path, monkeypatch):
    """The plain graph lies beside its weights; an int8 one is below the limit, and must not point to that file."""
    weights = sum(value.const_value.nbytes for value in plain.graph.initializers.values())
    monkeypatch.setattr(derive, "_EXTERNAL_FROM_BYTES", weights - 1)
    outcome = export(tmp_path / "x.rtx", variants=("fp32", "int8"), threads=1)
    assert {name: found.external for name, found in outcome.manifest.variants.items()} == {
        "fp32": ("onnx/model.onnx.data",),
        "int8": (),
    }
    with Embedder.open(tmp_path / "x.rtx", variant="fp32", threads=1) as embedder:
        expected = embedder.embed(TEXTS)
    with Embedder.open(tmp_path / "x.rtx", variant="int8", threads=1) as embedder:
        assert ((embedder.embed(TEXTS) * expected).sum(axis=1) > 0.99).all()
    export(tmp_path / "y.rtx", variants=("int8",), threads=1)
    assert [path.name for path in (tmp_path / "y.rtx" / "onnx").iterdir()] == ["model_int8.onnx"]


def test_pytorchs_weights_are_gone_before_a_variant_is_opened(export, tmp_path, monkeypatch):
    """A model of 2B parameters would else be in memory twice, and with every variant open three times and more."""
    weights, held = [], []
    real_load, real_open = pipeline._load, pipeline.open_graphs

    def load(source, options):
        model = real_load(source, options)
        weights.extend(weakref.ref(weight) for weight in model.backbone.parameters())
        return model

    def open_graphs(*arguments, **settings):
        held.append(sum(weight() is not None and weight().device.type != "meta" for weight in weights))
        return real_open(*arguments, **settings)

    monkeypatch.setattr(pipeline, "_load", load)
    monkeypatch.setattr(pipeline, "open_graphs", open_graphs)
    export(tmp_path / "x.rtx", variants=("fp32", "int8"), threads=1)
    assert len(weights) > 10
    assert held == [0] * 4


KILLED = """
import sys, time
from pathlib import Path
import onnx_ir
from rtx.export import pipeline
from rtx.export.graphs import Graphs

def notify(message):
    print(message, flush=True)
    if message == "comparing speed":
        time.sleep(600)

checkpoint, target, graph = sys.argv[1:]
pipeline.export_graphs = lambda model: Graphs(onnx_ir.load(graph))
pipeline.export_bundle(checkpoint, Path(target), pipeline.ExportOptions(threads=1), notify=notify)
"""


@pytest.mark.slow
def test_a_kill_leaves_nothing_that_opens(plain, checkpoint, tmp_path):
    ir.save(plain, tmp_path / "plain.onnx")
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "x.rtx"
    command = [sys.executable, "-c", KILLED, checkpoint, target, tmp_path / "plain.onnx"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert any(line == "comparing speed\n" for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not target.exists()
    (left,) = (tmp_path / "out").iterdir()
    # The graph has passed its gate and lies there, and still it is no bundle.
    assert (left / "onnx" / "model.onnx").exists()
    with pytest.raises(BundleError, match=rf"has no {MANIFEST_FILE}"):
        Bundle.open(left)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"variants": ()},
            "variants: expected at least one of fp32, fused, fp32-packed, fp16, bf16, int8, .*, int4-half, got none",
        ),
        ({"variants": ("fp32", "int2")}, "variants: .* got int2"),
        ({"max_ndcg_drop": -0.1}, "max_ndcg_drop: expected 0 to 1, got -0.1"),
        ({"max_ndcg_drop": float("nan")}, "max_ndcg_drop: expected 0 to 1, got nan"),
        ({"min_cosine": 1.5}, "min_cosine: expected 0 to 1, got 1.5"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UsageError, match=message):
        ExportOptions(**options)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("embed", {"dimensions": 33}, "truncate_dim: expected 1 to 32, got 33"),
        ("embed", {"max_tokens": 65}, "max_tokens: expected at most 64"),
        ("embed", {"max_tokens": 2}, "max_tokens: expected more than the 2 special tokens"),
        ("rerank", {"dimensions": 8}, "dimensions: .* is a reranker, which gives scores and no vectors"),
    ],
)
def test_options_have_to_fit_the_model(tiny_checkpoint, tmp_path, task, options, message):
    with pytest.raises(UsageError, match=message):
        export_bundle(str(tiny_checkpoint("distilbert", task)), tmp_path / "x.rtx", ExportOptions(**options))
    assert list(tmp_path.iterdir()) == []


def test_measuring_a_reranker_needs_candidates(tiny_checkpoint, evalset, tmp_path):
    with pytest.raises(UsageError, match="needs candidates"):
        export_bundle(str(tiny_checkpoint("distilbert", "rerank")), tmp_path / "x.rtx", ExportOptions(evalset=evalset))


@pytest.mark.parametrize(
    ("seconds", "default"),
    [
        ({"fp32": 1.0, "int8": 0.5}, "int8"),
        ({"int8": 0.97, "fp32": 1.0}, "fp32"),  # within noise: the closer one
        ({"fp32": 1.0, "fused": 0.9, "int8": 0.88}, "fused"),
        ({"int8": 1.0}, "int8"),
    ],
)
def test_the_default_is_the_fastest_beyond_noise(seconds, default):
    assert choose_default(seconds) == default


def test_a_checkpoint_is_known_by_its_name_and_its_content(tmp_path, monkeypatch):
    folder = tmp_path / "deep" / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "1_Pooling" / "config.json").write_text("{}")
    assert write.checkpoint_name(str(folder)) == "model"
    assert write.checkpoint_name(f"{folder}/") == "model"
    monkeypatch.chdir(folder)
    assert write.checkpoint_name(".") == "model"
    assert write.checkpoint_name("Qwen/Qwen3-Embedding-0.6B") == "Qwen/Qwen3-Embedding-0.6B"
    first = write.hash_checkpoint(".")
    assert write.hash_checkpoint(str(folder)) == first
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "optimizer.pt").write_text("of an unfinished run")
    assert write.hash_checkpoint(".") == first
    (folder / "config.json").write_text("{ }")
    second = write.hash_checkpoint(".")
    (folder / "1_Pooling" / "config.json").rename(folder / "pooling.json")
    assert len({first, second, write.hash_checkpoint(".")}) == 3


def test_the_contract_in_the_metadata_is_the_manifests(export, tmp_path):
    outcome = export(tmp_path / "x.rtx", variants=("fp32", "fp16", "int8", "fused"), max_ndcg_drop=1)
    for variant in outcome.manifest.variants.values():
        metadata = ir.load(tmp_path / "x.rtx" / variant.file).metadata_props
        assert Contract.from_dict(json.loads(metadata[CONTRACT_KEY])) == outcome.manifest.contract
    assert dataclasses.asdict(outcome.manifest.variants["int8"].tolerance) == {"min_cosine": 0.98, "max_abs": 0.1}
