"""Models with images from checkpoint to bundle: judged, written, verified, opened without torch, held to PyTorch."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rtx.export import pipeline
from rtx.export.derive import derive
from rtx.export.graphs import Graphs, check_exportable
from rtx.export.pipeline import ExportOptions, export_bundle
from rtx.runtime.backends.graphs import open_graphs
from rtx.runtime.bench import BenchOptions, Judgements, Texts, bench
from rtx.runtime.bench_page import result_rows
from rtx.runtime.bundle import Bundle
from rtx.runtime.candidates import Candidate
from rtx.runtime.cli import open_model
from rtx.runtime.embedder import Embedder
from rtx.runtime.errors import CheckpointError, ExportError, UsageError
from rtx.runtime.evalset import load_evalset
from rtx.runtime.golden import Golden, deviation
from rtx.runtime.reranker import Reranker
from rtx.runtime.verification import verify_bundle
from rtx.trainer.model import RetrievalModel

TINY = runpy.run_path(str(Path(__file__).parents[1] / "vision_models.py"))
FP32 = 1e-5


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PAGES = [picture(0, (96, 64)), picture(1, (40, 130)), picture(2, (33, 31))]
MIXED: list[Any] = ["how do I reset it?", PAGES[0], {"image": PAGES[1], "text": "fig. 3"}, {"image": PAGES}, PAGES[0]]
APART: list[Any] = ["how do I reset it?", PAGES[0], {"image": PAGES[1]}, "a", PAGES[0]]


@pytest.fixture(scope="module")
def checkpoint(image_checkpoint: Callable[[str], Path]) -> Callable[[str], Path]:
    return image_checkpoint


@pytest.mark.parametrize("kind", ["clip", "siglip", "router"])
def test_both_towers_agree_with_pytorch(
    checkpoint: Callable[[str], Path], image_graphs: Callable[[str], Graphs], kind: str
) -> None:
    model = RetrievalModel.load(checkpoint(kind))
    graphs = image_graphs(kind)
    assert graphs.image is not None
    expected = Embedder(model.preprocessor, model.engine()).embed(APART)
    for form, limit in (("fp32", FP32), ("fp16", 5e-3), ("int8", 0.15)):
        files = [serialised(derive(form, graph)) for graph in (graphs.tokens, graphs.image)]
        engine = open_graphs(model.contract, *files, threads=1)
        found = Embedder(model.preprocessor, engine).embed(APART)
        assert np.abs(found - expected).max() < limit, form
        assert (found[1] == found[4]).all()
        alone = np.stack([Embedder(model.preprocessor, engine).embed([item])[0] for item in APART])
        assert np.abs(found - alone).max() < (FP32 if form != "int8" else 2e-2), form
    # What was rounded shows.
    assert np.abs(found - expected).max() > 1e-6


def serialised(graph: Any) -> bytes:
    import onnx_ir as ir

    return bytes(ir.to_proto(graph).SerializeToString())


@pytest.fixture(scope="module")
def bundles(
    once: Callable[..., Path], checkpoint: Callable[[str], Path], image_graphs: Callable[[str], Graphs]
) -> Callable[[str], Path]:
    def export(folder: Path, kind: str) -> None:
        evalset = pages_to_find(folder / "eval") if kind == "router" else None
        variants = ("fp32", "int8-text") if kind == "qwen3-vl" else ("fp32",)
        source = str(checkpoint(kind))
        if kind == "qwen3-vl-reranker":
            RetrievalModel.load(source, task="rerank").save(folder / "checkpoint")
            source = str(folder / "checkpoint")
        options = ExportOptions(variants=variants, evalset=evalset, max_ndcg_drop=1.0, threads=1)  # type: ignore[arg-type]
        with pytest.MonkeyPatch.context() as patch:
            # Other tests take the same graphs, and exporting them is most of the time.
            patch.setattr(pipeline, "export_graphs", lambda _: image_graphs(kind))
            export_bundle(source, folder / "model.rtx", options)

    return lambda kind: once(f"bundle-{kind}", lambda folder: export(folder, kind)) / "model.rtx"


def pages_to_find(folder: Path) -> Any:
    (folder / "qrels").mkdir(parents=True)
    for number, page in enumerate(PAGES):
        page.save(folder / f"{number}.png")
    lines = [json.dumps({"_id": str(number), "image": f"{number}.png"}) for number in range(len(PAGES))]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "what the code is for"}))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t1\t1\n")
    return load_evalset(folder)


@pytest.mark.slow
def test_a_bundle_of_images_among_tokens(bundles: Callable[[str], Path], checkpoint: Callable[[str], Path]) -> None:
    path = bundles("qwen3-vl")
    assert all(finding.ok for finding in verify_bundle(path))
    bundle = Bundle.open(path)
    variants = bundle.manifest.variants
    assert {name: (v.file, v.image_file) for name, v in variants.items()} == {
        "fp32": ("onnx/model.onnx", "onnx/vision.onnx"),
        "int8-text": ("onnx/model_int8.onnx", "onnx/vision.onnx"),
    }
    assert (variants["int8-text"].precision, variants["int8-text"].image_precision) == ("int8", "fp32")
    model = RetrievalModel.load(checkpoint("qwen3-vl"))
    expected = Embedder(model.preprocessor, model.engine()).embed(MIXED)
    with Embedder.open(path, variant="fp32", threads=1) as opened:
        assert np.abs(opened.embed(MIXED) - expected).max() < FP32
        rows = opened.embed([*MIXED, b"no image"], on_invalid="nan")
        assert np.isnan(rows[-1]).all()
        assert np.abs(rows[:-1] - expected).max() < FP32
    golden = bundle.golden()
    assert sum(len(item.images) for item in golden.tokens) == 11
    again = Golden.from_bytes(golden.to_bytes())
    assert all(now.same_as(then) for now, then in zip(again.tokens, golden.tokens, strict=True))
    assert [type(item) for item in again.items] == [type(item) for item in golden.items]


@pytest.mark.slow
def test_a_reranker_judges_pages(bundles: Callable[[str], Path], checkpoint: Callable[[str], Path]) -> None:
    path = bundles("qwen3-vl-reranker")
    assert all(finding.ok for finding in verify_bundle(path))
    model = RetrievalModel.load(checkpoint("qwen3-vl-reranker"), task="rerank")
    pairs = [
        ("how?", PAGES[0]),
        (PAGES[1], {"image": PAGES[:2], "text": "both"}),
        ("how?", "by hand"),
        ("how?", PAGES[0]),
    ]
    expected = Reranker(model.preprocessor, model.engine()).score(pairs)
    with Reranker.open(path, threads=1) as opened:
        found = opened.score(pairs)
        assert np.abs(found - expected).max() < FP32
        assert found[0] == pytest.approx(found[3], abs=1e-6)
        ranked = opened.rank("how?", PAGES)
    assert [item.index for item in ranked] == sorted(range(3), key=lambda index: -ranked_score(ranked, index))


def ranked_score(ranked: Any, index: int) -> float:
    return float(next(item.score for item in ranked if item.index == index))


def test_a_bundle_of_two_towers(bundles: Callable[[str], Path], checkpoint: Callable[[str], Path]) -> None:
    path = bundles("router")
    assert all(finding.ok for finding in verify_bundle(path))
    report = json.loads((path / "report.json").read_text())
    assert report["verdicts"]["fp32"]["ranking"]["difference"] == pytest.approx(0, abs=1e-9)
    model = RetrievalModel.load(checkpoint("router"))
    expected = Embedder(model.preprocessor, model.engine()).embed(APART)
    with Embedder.open(path, threads=1) as opened:
        assert np.abs(opened.embed(APART) - expected).max() < FP32
        with pytest.raises(Exception, match="this model embeds them apart"):
            opened.embed([{"image": PAGES[0], "text": "fig. 3"}])


def test_an_image_that_is_prepared_otherwise_is_found(bundles: Callable[[str], Path], monkeypatch: Any) -> None:
    """As with another version of Pillow."""
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *_args, **options: resize(self, size, Image.Resampling.BOX, **options)
    )
    findings = {finding.check: finding for finding in verify_bundle(bundles("router"))}
    assert "its images are prepared otherwise" in findings["tokenizer"].problems[0]


def test_images_are_embedded_without_torch(bundles: Callable[[str], Path], tmp_path: Path) -> None:
    PAGES[0].save(tmp_path / "page.png")
    code = (
        "import sys; from pathlib import Path; from rtx.runtime import Embedder; "
        "vectors = Embedder.open(sys.argv[1], threads=1).embed(['a text', Path(sys.argv[2])]); "
        "print(vectors.shape, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(bundles("router")), str(tmp_path / "page.png")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == [
        "(2,",
        "32)",
        "False",
        "False",
    ]


def test_what_cannot_be_had_is_refused(checkpoint: Callable[[str], Path], tiny_checkpoint: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes no images, so that there is no int8-text"):
        export_bundle(str(tiny_checkpoint("bert")), tmp_path / "x.rtx", ExportOptions(variants=("int8-text",)))
    model = RetrievalModel.load(checkpoint("qwen3-vl"))
    model.backbone.config.model_type = "qwen2_5_vl"
    with pytest.raises(ExportError, match="no graph can be made of a qwen2_5_vl model; expected qwen3_vl"):
        check_exportable(model)
    assert not (tmp_path / "x.rtx").exists()


def test_a_batch_through_pytorch_is_one_through_the_graphs(checkpoint: Callable[[str], Path]) -> None:
    """The negative control: images in another order give other vectors."""
    model = RetrievalModel.load(checkpoint("clip"))
    items = [item for item in model.preprocessor.encode(PAGES[:2]) if not isinstance(item, str)]
    batch = model.preprocessor.collate(items)  # type: ignore[arg-type]
    with torch.no_grad():
        right = model.engine().run(batch)
        swapped = model.engine().run({**batch, "pixel_values": batch["pixel_values"][::-1].copy()})
    assert deviation(swapped, right).max_abs > 1e-3
    assert deviation(swapped[::-1], right).max_abs < FP32


def test_the_task_of_a_bare_reranker_is_named(once: Callable[..., Path], tmp_path: Path) -> None:
    bare = once("bare-reranker", lambda folder: TINY["write_tiny_qwen3_vl"](folder, reranker=True))
    with pytest.raises(CheckpointError, match="its task is then 'rerank'"):
        export_bundle(str(bare), tmp_path / "judge.rtx", ExportOptions())
    with open_model(bare, task="rerank") as model:
        assert isinstance(model, Reranker)
    model = pipeline._load(str(bare), ExportOptions(task="rerank"))
    assert model.contract.task == "rerank"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["router", "qwen3-vl-reranker"])
def test_pages_are_benchmarked(bundles: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    evalset = pages_to_find(tmp_path)
    candidates = {"q": [Candidate(key) for key in evalset.corpus]} if kind == "qwen3-vl-reranker" else None
    options = BenchOptions(rounds=1, seconds=0.001, threads=1, variants=("fp32",))
    texts = Texts(tuple(evalset.corpus.values()), tuple(evalset.queries.values()), "pages")
    result = bench(bundles(kind), options, texts=texts, judgements=Judgements(evalset, candidates))
    (subject,) = result.subjects
    assert subject.deviation.min_cosine > 0.9999
    assert subject.quality is not None
    assert result.workload.images == result.workload.items >= 32
    assert subject.stats["throughput_per_s"].median > 0
    assert subject.stats["cold_start_s"].median > 0
    assert result_rows(result)["Throughput"][0].unit == ("items/s" if candidates is None else "pairs/s")
