from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.vdr import baselines, ocr
from benchmarks.vdr.build import Settings, build, report
from benchmarks.vdr.documents import Document
from rtx.runtime.errors import DataError
from rtx.runtime.evaluation import Evaluation

BODY = (50, 300, 10, "Some running text of the page")
SETTINGS = Settings(dpi=72, workers=1, min_queries=1)


def caption(number: int, text: str) -> tuple[float, float, float, str]:
    return (50, 100 + 40 * number, 10, f"Figure {number}: {text}")


@pytest.fixture
def documents(make_pdf: Any) -> list[Document]:
    """One of each split; the caption of the test document is one of the training document too."""

    def document(name: str, split: str, *args: Any) -> Document:
        path = make_pdf(*args, name=name)
        return Document(name, "package", "1.0", split, path, hashlib.sha256(path.read_bytes()).hexdigest())

    train = [
        [caption(1, "Voltage over time"), caption(2, "Current by the hour"), BODY],
        [(50, 60, 14, "3 Noise and hum"), BODY],
        [BODY],
    ]
    return [
        document("manual", "train", train, [("3 Noise and hum", 1)]),
        document("guide", "test", [[caption(1, "Voltage over time"), BODY], [BODY]]),
        document("notes", "dev", [[(50, 100, 10, "Table 1: Names of units"), BODY]]),
    ]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def built(documents: list[Document], tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    out = tmp_path / "out"
    return out, build(documents, out, SETTINGS)


def test_training_rows_and_evaluation_sets(built: tuple[Path, dict[str, Any]]) -> None:
    out, _ = built
    assert rows(out / "train.jsonl") == [
        {
            "query": "Current by the hour",
            "positive": {"image": "masked/manual/0001.webp"},
            "kind": "caption",
            "document": "manual",
        },
        {
            "query": "Noise and hum",
            "positive": {"image": "masked/manual/0002.webp"},
            "kind": "title",
            "document": "manual",
        },
    ]
    plain = rows(out / "train_unmasked.jsonl")
    assert [row["positive"]["image"] for row in plain] == ["pages/manual/0001.webp", "pages/manual/0002.webp"]
    masked = out / "eval" / "test-masked"
    assert rows(masked / "corpus.jsonl") == [
        {"_id": "guide/0001", "image": "../../masked/guide/0001.webp", "text": ""},
        {"_id": "guide/0002", "image": "../../pages/guide/0002.webp", "text": ""},
    ]
    assert rows(masked / "queries.jsonl") == [{"_id": "guide/q0000", "text": "Voltage over time", "kind": "caption"}]
    assert (masked / "qrels" / "test.tsv").read_text() == "query-id\tcorpus-id\tscore\nguide/q0000\tguide/0001\t1\n"
    unmasked = out / "eval" / "test-unmasked"
    assert [row["image"] for row in rows(unmasked / "corpus.jsonl")] == [
        "../../pages/guide/0001.webp",
        "../../pages/guide/0002.webp",
    ]
    assert rows(out / "eval" / "dev-masked" / "queries.jsonl") == [
        {"_id": "notes/q0000", "text": "Names of units", "kind": "table"}
    ]
    for folder in (masked, unmasked):
        for row in rows(folder / "corpus.jsonl"):
            assert (folder / row["image"]).is_file()


def test_images_and_texts_without_the_queries(built: tuple[Path, dict[str, Any]]) -> None:
    out, _ = built
    plain, masked = (
        np.asarray(Image.open(out / folder / "guide" / "0001.webp").convert("L")) for folder in ("pages", "masked")
    )
    assert plain.shape == masked.shape == (500, 400)
    row = np.s_[130:145]
    assert plain[row, 95:190].min() < 100
    assert masked[row, 100:190].min() == 255
    assert masked[row, 45:95].min() < 100  # "Figure 1:" stays
    assert np.array_equal(plain[200:], masked[200:])
    texts = {row["_id"]: row["text"] for row in rows(out / "page_text.jsonl")}
    assert texts["guide/0001"] == "Figure 1: Voltage over time\nSome running text of the page"
    assert list(texts) == [
        "manual/0001",
        "manual/0002",
        "manual/0003",
        "notes/0001",
        "guide/0001",
        "guide/0002",
    ]
    without = {row["_id"]: row["text"] for row in rows(out / "page_text_masked.jsonl")}
    assert without["guide/0001"] == "Figure 1:\nSome running text of the page"
    assert without["guide/0002"] == texts["guide/0002"]


def test_the_manifest(built: tuple[Path, dict[str, Any]]) -> None:
    out, manifest = built
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert manifest["documents"]["manual"] | {"sha256": ""} == {
        "package": "package",
        "version": "1.0",
        "split": "train",
        "sha256": "",
        "pages": 3,
        "corpus": 3,
        "left_out": {},
        "masked": 2,
        "queries": {"caption": 1, "title": 1},
        "dropped": {"caption: asked for in an evaluation set": 1},
    }
    assert manifest["totals"]["test"]["by_kind"] == {"caption": 1}
    assert manifest["totals"]["train"]["targets"] == 2
    checks = manifest["checks"]
    assert checks["queries_in_masked_text"] == checks["character_boxes_with_ink_after"] == 0
    assert checks["character_boxes"] == checks["character_boxes_with_ink_before"] > 50
    lines = list(report(manifest))
    assert lines[0].split() == ["pages", "corpus", "masked", "caption", "table", "title"]
    assert ["test", "guide", "2", "2", "1", "1", "0", "0"] in [line.split() for line in lines]


def test_a_second_run_finds_everything_there(
    built: tuple[Path, dict[str, Any]], documents: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, manifest = built
    for name in ("masked/manual/0001.webp", "pages/guide/0002.webp", "pages/guide/text.npz"):  # as if cut off there
        (out / name).unlink()

    def states() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in out.rglob("*.webp")}

    before = states()
    assert build(documents, out, SETTINGS) == manifest
    after = states()
    assert {path.relative_to(out).as_posix() for path in after.keys() - before.keys()} == {
        "masked/manual/0001.webp",
        "pages/guide/0002.webp",
    }
    assert {path: after[path] for path in before} == before
    monkeypatch.setattr("benchmarks.vdr.work.version", lambda _: "another")
    build(documents, out, SETTINGS)
    assert all(time > before[path] for path, time in states().items() if path in before)


def test_two_processes_do_the_same_as_one(
    built: tuple[Path, dict[str, Any]], documents: list[Document], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    build(documents, other, Settings(dpi=72, workers=2, min_queries=1))
    hashes = [
        {path.relative_to(out): hashlib.sha256(path.read_bytes()).hexdigest() for path in out.rglob("*.webp")}
        for out in (built[0], other)
    ]
    assert hashes[0] == hashes[1]
    assert (built[0] / "manifest.json").read_bytes() == (other / "manifest.json").read_bytes()


def test_too_few_queries_are_an_error(documents: list[Document], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train: 2 queries, expected at least 50"):
        build(documents, tmp_path / "out", Settings(dpi=72, workers=1))
    with pytest.raises(DataError, match="two documents have the same name"):
        build([documents[0], documents[0]], tmp_path / "out", SETTINGS)


@pytest.fixture
def fake_ocr(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """OCR that reads of each image, by its folder and document, what it is told to."""

    def install(texts: dict[str, str]) -> None:
        def read(images: list[Path], _: Path) -> dict[Path, str]:
            return {image: texts.get("/".join(image.parts[-3:]), "") for image in images}

        monkeypatch.setattr(ocr, "read", read)

    return install


def test_queries_that_ocr_still_reads_are_dropped(
    documents: list[Document], tmp_path: Path, fake_ocr: Callable[[dict[str, str]], None]
) -> None:
    fake_ocr(
        {
            "pages/manual/0001.webp": "Figure 2: Current by the hour",
            "masked/manual/0001.webp": "Figure 2: Current by the",
            "pages/manual/0002.webp": "3 Noise and hum. The noise",
            "masked/manual/0002.webp": "The noise",
            "pages/guide/0001.webp": "Figure 1: Voltage over time",
        }
    )
    manifest = build(documents, tmp_path / "out", Settings(dpi=72, workers=1, ocr_sample=9, min_queries=1))
    assert manifest["checks"]["ocr"] == {
        "pages": 4,
        "queries": 4,
        "read_before_masking": {"words": 3 + 3 + 3, "pairs": 3 + 2 + 2, "whole": 3},
        "of_these_after_masking": {"words": 2 + 1, "pairs": 2, "whole": 0},
        "of_these_in_masked_text_layer": {"words": 1, "pairs": 0, "whole": 0},
        "pages_dropped": ["manual/0001"],
    }
    assert [row["query"] for row in rows(tmp_path / "out" / "train.jsonl")] == ["Noise and hum"]
    assert manifest["documents"]["manual"]["dropped"]["caption: read by OCR after masking"] == 1


def test_baselines_read_the_set(built: tuple[Path, dict[str, Any]], fake_ocr: Callable[[dict[str, str]], None]) -> None:
    out, _ = built
    pages = baselines.load(out, "test", masked=True)
    assert pages.evalset.corpus == {
        "guide/0001": "Figure 1:\nSome running text of the page",
        "guide/0002": "Some running text of the page",
    }
    assert pages.evalset.qrels == {"guide/q0000": {"guide/0001": 1}}
    assert pages.kinds == {"guide/q0000": "caption"}
    fake_ocr({"masked/guide/0001.webp": "Figure 1"})
    assert baselines.read_by_ocr(pages, out).evalset.corpus == {"guide/0001": "Figure 1", "guide/0002": "-"}
    with pytest.raises(DataError, match=r"eval/test-masked: is not there; expected a data set"):
        baselines.load(out.parent, "test", masked=True)


def test_figures_by_kind(built: tuple[Path, dict[str, Any]]) -> None:
    pages = baselines.load(built[0], "test", masked=False)
    evaluation = Evaluation(
        "test", "0", 1, 2, 0, 10, {}, 0.0, np.array([0.5]), np.zeros((1, 1), np.int64), np.zeros((1, 1), np.float32)
    )
    cell = {"queries": 1, "ndcg@10": 0.5, "interval": [0.5, 0.5]}
    assert baselines.by_kind(evaluation, pages) == {"all": cell, "caption": cell}


def test_ocr_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ocr, "_INTERPRETER", tmp_path / "python")
    with pytest.raises(DataError, match=r"\.venvs/ocr/bin/python: is not there; .*pip install rapidocr"):
        ocr.read([], tmp_path / "texts.jsonl")
