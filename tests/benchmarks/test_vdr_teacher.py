"""A projection fitted to what the text embedder says of pages."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.vdr import teacher
from benchmarks.vdr.teacher import Page, fit_projection
from rtx.runtime.embedder import Embedder
from rtx.runtime.errors import DataError, UsageError
from rtx.trainer.compose import compose
from rtx.trainer.model import RetrievalModel

TINY = runpy.run_path(str(Path(__file__).parents[1] / "vision_models.py"))
Tiny = Callable[..., Path]


@pytest.fixture
def model(tiny_checkpoint: Tiny, tmp_path: Path) -> RetrievalModel:
    TINY["write_tiny_dinov2"](tmp_path / "vision")
    return compose(tiny_checkpoint("bert"), tmp_path / "vision", pooling="mean", image_size=(28, 28))


def make_pages(folder: Path, count: int) -> list[Page]:
    random = np.random.default_rng(0)
    pages = []
    for number in range(count):
        path = folder / f"{number}.png"
        Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((28, 28)).save(path)
        pages.append(Page(f"document {number % 3}", str(path), f"a page of the code, number {number} of file {number}"))
    return pages


def test_a_linear_map_is_found_again() -> None:
    random = np.random.default_rng(0)
    inputs, weight = random.standard_normal((50, 4)), random.standard_normal((4, 6))
    np.testing.assert_allclose(teacher._solve(inputs, inputs @ weight, 1e-9), weight, atol=1e-8)
    # One input of value 2 and weight 3: 3 * 2 * 2 / (2 * 2 + 4).
    np.testing.assert_allclose(teacher._solve(np.array([[2.0]]), np.array([[6.0]]), 4.0), [[1.5]])


def test_ranks_of_ones_own_text() -> None:
    texts = np.eye(3)
    assert teacher._ndcg(3 * texts, texts) == 1.0
    # The first and the second page change places: each is second.
    assert teacher._ndcg(texts[[1, 0, 2]], texts) == pytest.approx((2 / np.log2(3) + 1) / 3)
    # The second text is nearer to the first page.
    assert teacher._ndcg(np.array([[9.0, 1.0], [1.0, 9.0]]), np.array([[1.0, 0.0], [0.9, 0.1]])) == pytest.approx(
        (1 + 1 / np.log2(3)) / 2
    )


def test_pages_find_their_texts_afterwards(model: RetrievalModel, tmp_path: Path) -> None:
    pages = make_pages(tmp_path, 12)

    def cosines() -> np.ndarray:
        embedder = Embedder(model.preprocessor, model.engine())
        images = embedder.embed([{"image": page.image} for page in pages])
        return images @ embedder.embed([page.text for page in pages]).T

    before, texts = cosines(), Embedder(model.preprocessor, model.engine()).embed([page.text for page in pages])
    fitted = fit_projection(model, pages)
    assert fitted.pages == 12
    assert fitted.strength in teacher._STRENGTHS
    assert 0 < fitted.ndcg <= 1
    after = cosines()
    assert np.diag(after).mean() > 0.9 > np.diag(before).mean()
    np.testing.assert_array_equal(
        Embedder(model.preprocessor, model.engine()).embed([page.text for page in pages]), texts
    )


def test_pages_of_one_document_are_too_few(model: RetrievalModel, tmp_path: Path) -> None:
    pages = [page._replace(document="one") for page in make_pages(tmp_path, 3)]
    with pytest.raises(DataError, match="expected pages of two documents at least, got those of 1"):
        fit_projection(model, pages)


def test_a_model_without_a_projection(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected one projection, .* got none"):
        fit_projection(RetrievalModel.load(tiny_checkpoint("bert")), make_pages(tmp_path, 2))
