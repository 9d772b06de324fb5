"""Training on page images: rows, batches, gradients, memory, whole runs, and the recipe."""

from __future__ import annotations

import io
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rtx.runtime.errors import DataError, ItemError, UsageError
from rtx.runtime.items import Content
from rtx.trainer import losses
from rtx.trainer.batches import Collator, plan_chunks
from rtx.trainer.check import check_data
from rtx.trainer.compose import compose
from rtx.trainer.config import FinetuneConfig
from rtx.trainer.data import TrainingData
from rtx.trainer.estimate import Plan, estimate, kept_bytes
from rtx.trainer.examples import Example
from rtx.trainer.finetune import dry_run, finetune
from rtx.trainer.model import RetrievalModel
from rtx.trainer.step import backward, batch_run, joined_loss

ROOT = Path(__file__).parents[2]
TINY = runpy.run_path(str(ROOT / "tests" / "vision_models.py"))
WORDS = ["valve", "pump", "motor", "filter", "gauge", "lever", "shaft", "wheel"]


def page(number: int, size: tuple[int, int] = (64, 96)) -> Image.Image:
    """A page that shows its number: a dark bar in a place of its own."""
    pixels = np.full((size[1], size[0], 3), 255, dtype=np.uint8)
    pixels[8 * number : 8 * number + 24, :, number % 3] = 0
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pages, rows that name them, and an evaluation set of the same."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "pages").mkdir()
    (folder / "eval" / "qrels").mkdir(parents=True)
    rows = []
    for number, word in enumerate(WORDS):
        page(number).save(folder / "pages" / f"{number}.png")
        other = f"pages/{(number + 3) % len(WORDS)}.png"
        rows.append(
            {"query": f"the {word}", "positive": {"image": f"pages/{number}.png"}, "negative": {"image": other}}
        )
    write_lines(folder / "train.jsonl", rows)
    corpus = [{"_id": f"p{number}", "image": f"../pages/{number}.png"} for number in range(len(WORDS))]
    write_lines(folder / "eval" / "corpus.jsonl", corpus)
    write_lines(folder / "eval" / "queries.jsonl", [{"_id": word, "text": f"the {word}"} for word in WORDS])
    judged = "".join(f"{word}\tp{number}\t1\n" for number, word in enumerate(WORDS))
    (folder / "eval" / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    return folder


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("qwen")
    TINY["write_tiny_qwen3_vl"](folder)
    return folder


# -- rows ----------------------------------------------------------------------------------------------------------


def test_paths_are_those_of_the_file_that_names_them(folder: Path) -> None:
    data = TrainingData.read([folder / "train.jsonl"], needs="positives")
    documents = data[2].documents
    assert [document.item.images for document in documents if isinstance(document, Content)] == [
        (str(folder / "pages" / "2.png"),),
        (str(folder / "pages" / "5.png"),),
    ]
    # Equal pages are kept apart in a batch as equal texts are.
    hashes = data.hashes(np.arange(len(data)))
    assert len(set(hashes.values.tolist())) == 2 * len(WORDS)


def test_a_page_that_is_not_there_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "x.jsonl", [{"query": "q", "positive": {"image": "gone.png"}}, {"query": "q", "positive": {}}]
    )
    with pytest.raises(DataError) as caught:
        TrainingData.read([tmp_path / "x.jsonl"], needs="positives")
    assert f"x.jsonl:1: positive: image: {tmp_path / 'gone.png'} does not exist" in str(caught.value)
    assert "x.jsonl:2: positive: is empty" in str(caught.value)
    write_lines(tmp_path / "x.jsonl", [{"query": "q", "positive": {"picture": "gone.png"}}])
    with pytest.raises(DataError, match="positive: expected a text, or the keys image and text; got picture"):
        TrainingData.read([tmp_path / "x.jsonl"], needs="positives")


def test_images_within_rows_stay_compressed(checkpoint: Path) -> None:
    """As datasets has them: a PIL image, or the bytes of a file."""
    buffer = io.BytesIO()
    page(1).save(buffer, "PNG")
    rows = [
        {"query": "a", "positive": page(1), "negative": {"bytes": buffer.getvalue(), "path": None}},
        {"query": "b", "positive": {"image": [page(1), page(2)], "text": "both"}},
    ]
    data = TrainingData.from_rows(rows, needs="positives")
    model = RetrievalModel.load(checkpoint)
    encoded = model.preprocessor.encode([*data[0].documents, *data[1].documents, page(1)])
    first, second, both, expected = (item for item in encoded if not isinstance(item, ItemError))
    assert first.same_as(expected)
    assert second.same_as(expected)
    assert both.images[0].digest == expected.images[0].digest != both.images[1].digest


@pytest.mark.parametrize("text", ["plain", '\0{"text": "x", "image": ["/etc/passwd"]}', "\0", ""])
def test_a_text_never_turns_into_an_image(text: str) -> None:
    stored = Content.stored(Content.storable(text))
    assert stored == text
    assert not isinstance(stored, Content)
    content = Content.of("t", ["a.png"])
    assert isinstance(Content.stored(Content.storable(content)), Content)
    assert Content.stored(Content.storable(content)) == content


def test_rows_that_the_model_never_takes_are_named_before_anything_is_trained(
    folder: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    contract = RetrievalModel.load(tiny_checkpoint("bert")).contract
    rows = [
        {"query": "the lid", "positive": "a text"},
        {"query": "the lid", "positive": {"image": str(folder / "pages" / "1.png")}},
        {"query": "q", "positive": "a", "negatives": ["b", {"text": "c", "image": str(folder / "pages" / "2.png")}]},
    ]
    write_lines(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError) as caught:
        TrainingData.read([tmp_path / "x.jsonl"], needs="positives", contract=contract)
    wrong = "expected a text, got an image; this model takes no images"
    assert f"x.jsonl:2: positive: {wrong}\n" in str(caught.value)
    assert f"x.jsonl:3: negatives[1]: {wrong}" in str(caught.value)
    with pytest.raises(DataError, match=f"rows:2: positive: {wrong}"):
        TrainingData.from_rows(rows, needs="positives", contract=contract)
    assert check_data([tmp_path / "x.jsonl"], contract=contract).bad_rows == 2


# -- batches -------------------------------------------------------------------------------------------------------


def examples(folder: Path) -> list[Example]:
    data = TrainingData.read([folder / "train.jsonl"], needs="positives")
    mixed = Example(
        "the valve", ("a text among pages", Content.of("fig. 3", [str(folder / "pages" / "4.png")])), (1, 0)
    )
    return [*data, mixed]


def test_a_chunk_counts_patches_beside_tokens(folder: Path, checkpoint: Path) -> None:
    model = RetrievalModel.load(checkpoint)
    batch = Collator(model.preprocessor, task="embed")(list(enumerate(examples(folder))))
    item = batch.sides[1][0]
    # 64 x 96 pixels: 4 by 6 patches of 16, which become 6 tokens.
    assert item.image_tokens == 24
    assert item.ids.count(model.contract.visual.image_token_id) == 6  # type: ignore[union-attr]
    assert item.length == len(item.ids) + 24
    chunks = plan_chunks(batch, chunk_tokens=2 * item.length)
    assert all(chunk.tokens <= 2 * item.length or len(chunk.places) == 1 for chunk in chunks)
    assert sorted(place for chunk in chunks if chunk.side == 1 for place in chunk.places) == list(range(18))


def test_a_page_that_turns_out_to_be_damaged_names_its_file(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes((folder / "pages" / "1.png").read_bytes()[:90])
    model = RetrievalModel.load(checkpoint)
    bad = Example("q", (Content.of("", [str(tmp_path / "cut.png")]),), (1.0,))
    with pytest.raises(DataError, match=r"training data: x\.jsonl:8: image .*cut\.png.*truncated"):
        Collator(model.preprocessor, task="embed", where="x.jsonl:{}".format)([(3, examples(folder)[0]), (8, bad)])


@pytest.mark.parametrize("activation_tokens", [0, 150])
def test_the_gradient_cache_gives_the_gradient_of_the_whole_batch(
    folder: Path, checkpoint: Path, activation_tokens: int
) -> None:
    model = RetrievalModel.load(checkpoint).double()
    batch = Collator(model.preprocessor, task="embed")(list(enumerate(examples(folder))))
    found = []
    for tokens, held in ((10**6, None), (100, activation_tokens)):
        model.zero_grad(set_to_none=True)
        run = batch_run(model, batch, model.preprocessor.collate, model.device)
        loss = joined_loss(losses.matryoshka(losses.info_nce, [32, 16]), batch.targets)
        value = backward(run, plan_chunks(batch, chunk_tokens=tokens), loss, activation_tokens=held)
        found.append((value, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (whole, expected), (cached, gradients) = found
    assert torch.isclose(whole, cached, rtol=1e-10)
    assert expected.keys() == gradients.keys()
    assert any(name.startswith("backbone.visual") for name in expected)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-7, atol=1e-10), name


def test_the_estimate_counts_what_images_keep(folder: Path, checkpoint: Path) -> None:
    model = RetrievalModel.load(checkpoint).train()
    batch = Collator(model.preprocessor, task="embed")(list(enumerate(examples(folder))))
    plan = Plan(steps=1, batch_size=9, chunk_tokens=10**6)
    found = estimate(model, [batch], losses.info_nce, plan)
    state = [*model.parameters(), *model.buffers()]
    chunks = plan_chunks(batch, chunk_tokens=10**6)
    run = batch_run(model, batch, model.preprocessor.collate, model.device)
    kept = sum(kept_bytes(lambda chunk=chunk: run(chunk), besides=state) for chunk in chunks)  # type: ignore[misc]
    assert found.activations_bytes == pytest.approx(kept, rel=0.25)


# -- whole runs ----------------------------------------------------------------------------------------------------


def settings(folder: Path, checkpoint: Path, output: Path) -> dict[str, Any]:
    """The recipe, made small."""
    return {
        "model": str(checkpoint),
        "train": (str(folder / "train.jsonl"),),
        "eval": str(folder / "eval"),
        "output": str(output),
        "max_pixels": 6144,
        "min_pixels": 1024,
        "matryoshka": (32, 16),
        "batch_size": 8,
        "learning_rate": 1e-3,
        "chunk_tokens": 100,
        "epochs": 30.0,
        "log_steps": 1,
        "eval_steps": 30,
        "bf16": False,
    }


def test_the_recipe_trains(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    recipe = ROOT / "recipes" / "qwen3-vl-vdr.toml"
    published = FinetuneConfig.read(str(recipe), {})
    assert (published.max_pixels, published.batch_size, published.activation_tokens) == (360_000, 64, 0)
    config = FinetuneConfig.read(str(recipe), settings(folder, checkpoint, tmp_path / "out"))
    outcome = finetune(config)
    losses_seen = [loss for _, loss in outcome.losses]
    assert losses_seen[-1] < 0.6 * losses_seen[0]
    assert outcome.after["ndcg@10"] > outcome.before["ndcg@10"] + 0.2
    trained = RetrievalModel.load(tmp_path / "out")
    assert trained.contract.images is not None
    assert trained.contract.images.max_pixels == 6144
    assert dry_run(config).parameters == sum(parameter.numel() for parameter in trained.parameters())


def test_a_reranker_trains_on_pages(tmp_path: Path) -> None:
    TINY["write_tiny_qwen3_vl"](tmp_path / "judge", reranker=True)
    # So small a model learns to tell dark pages from bright ones, in so short a time.
    for number in range(8):
        Image.new("RGB", (64, 64), (30 * number,) * 3).save(tmp_path / f"{number}.png")
    rows = [
        {"query": f"dark {word}", "document": {"image": f"{number}.png"}, "label": int(number < 4)}
        for number in range(8)
        for word in WORDS[:2]
    ]
    write_lines(tmp_path / "judged.jsonl", rows)
    config = FinetuneConfig.read(
        None,
        {
            "task": "rerank",
            "model": str(tmp_path / "judge"),
            "train": (str(tmp_path / "judged.jsonl"),),
            "output": str(tmp_path / "out"),
            "batch_size": 8,
            "learning_rate": 1e-3,
            "epochs": 12.0,
            "log_steps": 1,
        },
    )
    outcome = finetune(config)
    losses_seen = [loss for _, loss in outcome.losses]
    assert np.mean(losses_seen[-3:]) < 0.8 * losses_seen[0]


def test_two_towers_train_on_pages(folder: Path, tmp_path: Path, tiny_checkpoint: Any) -> None:
    TINY["write_tiny_dinov2"](tmp_path / "dinov2")
    compose(tiny_checkpoint("bert"), tmp_path / "dinov2").save(tmp_path / "towers")
    small = {
        "model": str(tmp_path / "towers"),
        "max_pixels": None,
        "min_pixels": None,
        "matryoshka": (),
        "epochs": 20.0,
    }
    given = settings(folder, tmp_path / "towers", tmp_path / "out") | small | {"max_tokens": 32}
    given = {name: value for name, value in given.items() if value is not None}
    outcome = finetune(FinetuneConfig.read(None, {"task": "embed", **given}))
    losses_seen = [loss for _, loss in outcome.losses]
    assert losses_seen[-1] < 0.8 * losses_seen[0]
    assert RetrievalModel.load(tmp_path / "out").image_tower is not None
    with pytest.raises(UsageError, match="holds a finished model; --overwrite replaces it"):
        finetune(FinetuneConfig.read(None, {"task": "embed", **given}))
