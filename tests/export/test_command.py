"""`rtx export` from end to end: what it prints, what it writes, its exit codes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import rtx.export
from rtx.export.graph import CONTRACT_KEY
from rtx.export.graphs import Graphs
from rtx.export.write import hash_checkpoint
from rtx.runtime.bundle import Bundle
from rtx.runtime.cli import main
from rtx.runtime.contract import Contract
from rtx.runtime.embedder import Embedder
from rtx.runtime.evalset import write_evalset
from rtx.trainer.model import RetrievalModel

VARIANTS = ("fp32", "fused", "fp16", "int8")
TEXTS = [
    "how to reset the pump",
    "",
    "a",
    "for file in code: text " * 30,
    "Größe 東京 \U0001f600",
    "what is the query?",
]


def run(*arguments):
    return CliRunner().invoke(main, ["export", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def source(tiny_checkpoint):
    return tiny_checkpoint(
        "bert", pooling=("mean", "cls"), dense=(24,), truncate_dim=16, prompts={"query": "find: ", "document": ""}
    )


@pytest.fixture(scope="module")
def beir(tmp_path_factory, evalset):
    folder = tmp_path_factory.mktemp("beir") / "small"
    write_evalset(evalset, folder)
    return folder


@pytest.fixture(scope="module")
def done(source, beir, tmp_path_factory):
    """What the command said, and the bundle that it wrote."""
    target = tmp_path_factory.mktemp("out") / "model.rtx"
    arguments = [argument for variant in VARIANTS for argument in ("--precision", variant)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["rtx", "export", str(source), f"--output={target}", "--dimensions", "12"])
        result = run(
            source, "-o", target, *arguments, "--dimensions", 12, "--eval", beir, "--max-ndcg-drop", 1, "--threads", 1
        )
    assert result.exit_code == 0, result.output
    return result, target


def test_every_variant_embeds_as_pytorch_does(done, source):
    model = RetrievalModel.load(source)
    model.configure(truncate_dim=12)
    reference = Embedder(model.preprocessor, model.engine())
    bundle = Bundle.open(done[1])
    assert set(bundle.manifest.variants) == set(VARIANTS)
    assert bundle.manifest.contract == model.contract
    for variant, found in bundle.manifest.variants.items():
        with Embedder.open(done[1], variant=variant, threads=1) as embedder:
            for prompt in (None, "query", "document"):
                vectors, expected = embedder.embed(TEXTS, prompt=prompt), reference.embed(TEXTS, prompt=prompt)
                assert vectors.shape == (len(TEXTS), 12)
                assert np.abs(vectors - expected).max() <= found.tolerance.max_abs
                assert (vectors * expected).sum(axis=1).min() >= found.tolerance.min_cosine - 1e-6


def test_golden_tokens_are_what_the_opened_bundle_makes(done):
    bundle = Bundle.open(done[1])
    golden = bundle.golden()
    assert golden.tokenize(bundle.preprocessor()) == list(golden.tokens)
    assert len(golden.items) > 20


def test_every_file_is_listed_and_a_flipped_byte_is_found(done, tmp_path):
    copy = tmp_path / "model.rtx"
    shutil.copytree(done[1], copy)
    files = sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file())
    assert sorted(["manifest.json", *Bundle.open(copy).manifest.files]) == files
    assert list(Bundle.open(copy).damaged()) == []
    bundle = Bundle.open(copy)
    for name in bundle.manifest.files:
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert [problem.split()[0] for problem in bundle.damaged()] == [name]
        (copy / name).write_bytes(content)


def test_nothing_tells_where_on_this_machine_it_was_made(done, source):
    places = [os.fspath(Path(rtx.export.__file__).parent.parent), os.fspath(source), os.fspath(done[1]), 'File "']
    places += ["site-packages", "pkg.torch", str(Path.home()) + "/"]
    for path in done[1].rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert [place for place in places if place.encode() in content] == [], path.name
    assert Bundle.open(done[1]).manifest.provenance.command == (
        f"rtx export {source.name} --output=model.rtx --dimensions 12"
    )


def test_graphs_are_valid_and_carry_the_contract(done):
    bundle = Bundle.open(done[1])
    for name, variant in bundle.manifest.variants.items():
        graph = onnx.load(done[1] / variant.file)
        if name != "fused":
            onnx.checker.check_model(graph, full_check=True)
        (carried,) = (entry.value for entry in graph.metadata_props if entry.key == CONTRACT_KEY)
        assert Contract.from_dict(json.loads(carried)) == bundle.manifest.contract
        assert graph.producer_name == "rtx"
        assert [value.name for value in graph.graph.output] == ["sentence_embedding", "last_hidden_state"]


def test_the_report_holds_what_was_measured(done, source, evalset):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    report = json.loads((done[1] / "report.json").read_text(), parse_constant=refuse)
    assert set(report) == {
        "provenance",
        "golden_items",
        "verdicts",
        "reference",
        "max_ndcg_drop",
        "seconds",
        "default_variant",
        "bytes",
        "scales",
        "factors",
        "ranges",
    }
    assert report["provenance"]["source"] == source.name
    assert report["provenance"]["source_sha256"] == hash_checkpoint(str(source))
    assert set(report["provenance"]["versions"]) >= {"rtx-retrieval", "python", "torch", "onnxruntime"}
    assert report["reference"]["queries"] == len(evalset.queries)
    assert list(report["verdicts"]) == list(VARIANTS)
    for name, verdict in report["verdicts"].items():
        assert verdict["passed"], verdict["failures"]
        limits = verdict["limits"]
        for check in ("parity", "invariance"):
            assert verdict[check]["max_abs"] <= limits[check]["max_abs"]
            assert verdict[check]["min_cosine"] >= limits[check]["min_cosine"]
        assert verdict["ranking"]["evalset"] == "small"
        assert report["bytes"][name] == (done[1] / Bundle.open(done[1]).manifest.variants[name].file).stat().st_size
        assert report["seconds"][name] > 0
    assert report["verdicts"]["fp32"]["ranking"]["difference"] == 0
    assert report["verdicts"]["fp32"]["ranking"]["overlap"] == 1


def test_the_page_and_the_table_name_every_variant(done):
    result, target = done
    page = (target / "report.html").read_text()
    default = Bundle.open(target).manifest.default_variant
    for name in VARIANTS:
        assert name in page
        (row,) = (line for line in result.stdout.splitlines() if line.strip().startswith(name))
        assert row.split()[-1] == ("default" if name == default else "passed")
    assert max(map(len, result.stdout.partition("wrote")[0].splitlines())) <= 80
    assert f"wrote {target}" in result.stdout
    assert "exporting the graph" in result.stderr


def test_exit_codes(tiny_checkpoint, exported, tmp_path, monkeypatch):
    source = tiny_checkpoint("distilbert")
    monkeypatch.setattr("rtx.export.pipeline.export_graphs", lambda _: Graphs(exported("distilbert").graph))
    partly = run(source, "-o", tmp_path / "a.rtx", "--precision", "fp32", "--precision", "int8", "--min-cosine", 1)
    assert partly.exit_code == 0
    assert "left out: int8 differs from PyTorch" in partly.stderr
    (row,) = (line for line in partly.stdout.splitlines() if line.strip().startswith("int8"))
    assert row.split()[-2:] == ["left", "out"]
    only = run(source, "-o", tmp_path / "a.rtx", "--precision", "int8", "--overwrite")
    gates = [line.split()[-1] for line in only.stdout.splitlines() if line.startswith(("fp32", "int8"))]
    assert gates == ["unasked", "default"]
    none = run(source, "-o", tmp_path / "b.rtx", "--precision", "int8", "--min-cosine", 1)
    assert none.exit_code == 3
    assert "error: no variant passed the gate, nothing was written:\n  int8: differs" in none.stderr
    there = run(source, "-o", tmp_path / "a.rtx")
    assert (there.exit_code, "--overwrite replaces it" in there.stderr) == (2, True)
    missing = run(tmp_path / "none", "-o", tmp_path / "c.rtx")
    assert (missing.exit_code, "none: no such folder" in missing.stderr) == (5, True)
    alone = run(source, "-o", tmp_path / "c.rtx", "--candidates", "run.txt")
    assert (alone.exit_code, "--candidates: needs --eval" in alone.stderr) == (2, True)
    again = run(tmp_path / "a.rtx", "-o", tmp_path / "c.rtx")
    assert (again.exit_code, "a.rtx: is a bundle already" in again.stderr) == (2, True)
    unknown = run(source, "-o", tmp_path / "c.rtx", "--precision", "int2")
    assert unknown.exit_code == 2
    no_set = run(source, "-o", tmp_path / "c.rtx", "--eval", tmp_path / "nowhere")
    assert no_set.exit_code == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.rtx"]
