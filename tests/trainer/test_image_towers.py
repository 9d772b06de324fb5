"""Models with a tower for texts and one for images (Routers), against sentence-transformers both ways."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image

from rtx.runtime.embedder import Embedder
from rtx.runtime.errors import CheckpointError, ItemError, UsageError
from rtx.trainer.model import RetrievalModel

TINY = runpy.run_path(str(Path(__file__).parents[1] / "vision_models.py"))
TOLERANCE = 1e-5
TEXTS = ["a query of the code", "File", "", "naïve text with more words than the others have " * 3]
IMAGES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 3, 3), dtype=np.uint8)).resize(size)
    for seed, size in enumerate([(50, 40), (32, 32), (90, 33)])
]
ITEMS: list[Any] = [*TEXTS, *IMAGES]

Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dinov2")
    TINY["write_tiny_dinov2"](folder)
    return folder


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Tiny, dinov2: Path) -> Path:
    """As sentence-transformers writes it, with a Normalize module in each route."""
    folder = tmp_path_factory.mktemp("router") / "theirs"
    theirs_of_modules(tiny_checkpoint("bert", bare=True), dinov2).save(str(folder), create_model_card=False)
    return folder


def theirs_of_modules(
    text: Path,
    image: Path,
    *,
    behind: Sequence[str] = (),
    image_pooling: str = "cls",
    names: Sequence[str] = ("text", "image"),
    **options: Any,
) -> Any:
    """A Router of sentence-transformers, not saved yet; what is not behind it is in both routes."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(0)
    routes: list[list[Any]] = [[Transformer(str(text))], [Transformer(str(image))]]
    if "Pooling" not in behind:
        routes[0].append(Pooling(32, "mean"))
        routes[1].append(Pooling(24, image_pooling))
        routes[1].append(Dense(24, 32, bias=False, activation_function=torch.nn.Identity()))
    if "Normalize" not in behind:
        routes[0].append(Normalize())
        routes[1].append(Normalize())
    made = {"Pooling": lambda: Pooling(32, "mean"), "Dense": lambda: Dense(32, 16), "Normalize": Normalize}
    modules = [Router(dict(zip(names, routes, strict=True)), **options), *(made[name]() for name in behind)]
    return SentenceTransformer(modules=modules, device="cpu")


def theirs_of(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def encode(theirs: Any, **options: Any) -> NDArray[np.float32]:
    """Of ITEMS; sentence-transformers takes no batch of texts and images here."""
    parts: list[Any] = [theirs.encode(TEXTS, **options), theirs.encode(IMAGES, **options)]
    return np.concatenate(parts)


def embed(model: RetrievalModel, items: Sequence[Any] = ITEMS, **options: Any) -> NDArray[np.float32]:
    return Embedder(model.preprocessor, model.engine()).embed(list(items), **options)


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_both_ways(router: Path, tmp_path: Path) -> None:
    model = RetrievalModel.load(router)
    vectors = embed(model)
    distances = np.abs(vectors[:, None] - vectors[None]).max(axis=-1)
    assert distances[~np.eye(len(ITEMS), dtype=bool)].min() > 0.01, "or the test shows nothing"
    np.testing.assert_allclose(encode(theirs_of(router)), vectors, atol=TOLERANCE)
    assert (model.contract.dimension, model.contract.image_tokens, model.contract.normalize) == (32, 4, True)

    model.save(tmp_path / "ours")
    assert files_of(tmp_path / "ours") == files_of(router)
    for name in ("router_config.json", "modules.json", "image_0_Transformer/sentence_bert_config.json"):
        mine, other = (json.loads((folder / name).read_text()) for folder in (tmp_path / "ours", router))
        assert mine == other, name
    np.testing.assert_allclose(encode(theirs_of(tmp_path / "ours")), vectors, atol=TOLERANCE)
    np.testing.assert_array_equal(embed(RetrievalModel.load(tmp_path / "ours")), vectors)
    # One that is there is replaced, though it has no config.json of its own.
    model.save(tmp_path / "ours")


BEHIND = {"normalised behind": ["Normalize"], "projected and normalised behind": ["Dense", "Normalize"]}


@pytest.mark.parametrize("behind", BEHIND)
def test_what_stands_behind_the_router(tiny_checkpoint: Tiny, dinov2: Path, tmp_path: Path, behind: str) -> None:
    theirs = theirs_of_modules(tiny_checkpoint("bert", bare=True), dinov2, behind=BEHIND[behind])
    theirs.save(str(tmp_path / "theirs"), create_model_card=False)
    model = RetrievalModel.load(tmp_path / "theirs")
    vectors = embed(model)
    np.testing.assert_allclose(encode(theirs), vectors, atol=TOLERANCE)
    model.save(tmp_path / "ours")
    again = RetrievalModel.load(tmp_path / "ours")
    np.testing.assert_array_equal(embed(again), vectors)
    np.testing.assert_allclose(encode(theirs_of(tmp_path / "ours")), vectors, atol=TOLERANCE)


def test_pooling_behind_the_router(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    text = tiny_checkpoint("bert", bare=True)
    theirs = theirs_of_modules(text, tmp_path / "vit", behind=["Pooling", "Normalize"])
    theirs.save(str(tmp_path / "theirs"), create_model_card=False)
    model = RetrievalModel.load(tmp_path / "theirs")
    np.testing.assert_allclose(encode(theirs), embed(model), atol=TOLERANCE)
    # This transformer has positions for images of one size.
    with pytest.raises(UsageError, match=r"^the model does not take images of 40 × 32 pixels \(height × width\): "):
        RetrievalModel.load(tmp_path / "theirs", processor_kwargs={"size": {"height": 40, "width": 32}})


def test_images_of_another_size(router: Path, tmp_path: Path) -> None:
    settings = {"size": {"height": 42, "width": 70}, "do_center_crop": False}
    model = RetrievalModel.load(router, processor_kwargs=settings)
    assert model.contract.image_tokens == 15
    vectors = embed(model)
    assert np.abs(vectors - embed(RetrievalModel.load(router))).max() > 0.01
    model.save(tmp_path / "ours")
    np.testing.assert_allclose(encode(theirs_of(tmp_path / "ours")), vectors, atol=TOLERANCE)
    assert RetrievalModel.load(tmp_path / "ours").contract == model.contract


def test_prompts_belong_to_texts(router: Path, tmp_path: Path) -> None:
    model = RetrievalModel.load(router)
    plain = embed(model)
    model.configure(prompts={"query": "query: "}, include_prompt=False)
    model.save(tmp_path / "ours")
    vectors = embed(model, prompt="query")
    np.testing.assert_allclose(encode(theirs_of(tmp_path / "ours"), prompt_name="query"), vectors, atol=TOLERANCE)
    assert np.abs(vectors - plain)[: len(TEXTS)].max() > 0.01
    np.testing.assert_array_equal(vectors[len(TEXTS) :], plain[len(TEXTS) :])


def test_an_item_alone_is_the_item_in_any_batch(router: Path) -> None:
    model = RetrievalModel.load(router)
    order = np.random.default_rng(0).permutation(len(ITEMS))
    together = np.empty((len(ITEMS), 32), np.float32)
    together[order] = embed(model, [ITEMS[index] for index in order])
    np.testing.assert_allclose(np.concatenate([embed(model, [item]) for item in ITEMS]), together, atol=TOLERANCE)


def test_a_text_beside_an_image_is_refused(router: Path) -> None:
    (found,) = RetrievalModel.load(router).preprocessor.encode([{"text": "a", "image": IMAGES[0]}])
    assert isinstance(found, ItemError)
    assert found.message == "expected one text or one image, got a text beside an image: this model embeds them apart"


def test_half_precision(router: Path, tmp_path: Path) -> None:
    model = RetrievalModel.load(router, dtype=torch.bfloat16)
    exact = embed(RetrievalModel.load(router))
    assert (embed(model) * exact).sum(axis=1).min() > 0.99
    model.save(tmp_path / "ours")
    again = RetrievalModel.load(tmp_path / "ours", dtype=torch.bfloat16)
    np.testing.assert_array_equal(embed(again), embed(model))


# ---------------------------------------------------------------- routes


def test_routes_by_modality_and_any_task(tiny_checkpoint: Tiny, dinov2: Path, tmp_path: Path) -> None:
    mappings = {(None, "image"): "image", ("query", "text"): "text"}
    text = tiny_checkpoint("bert", bare=True)
    theirs = theirs_of_modules(text, dinov2, route_mappings=mappings, default_route="image")
    theirs.save(str(tmp_path / "theirs"), create_model_card=False)
    np.testing.assert_allclose(encode(theirs), embed(RetrievalModel.load(tmp_path / "theirs")), atol=TOLERANCE)


ROUTES: dict[str, tuple[dict[str, Any], str]] = {
    "of tasks": ({"names": ("query", "document")}, "expected the routes text and image, .* got query, document$"),
    "crossed": (
        {"route_mappings": {(None, "text"): "image"}},
        r"got text, image, mapped by \{\(None, 'text'\): 'image'\}",
    ),
    "of both": ({"route_mappings": {(None, ("image", "text")): "image"}}, r"mapped by \{\(None, \('image', 'text'\)\)"),
    "of any modality": ({"route_mappings": {("query", None): "text"}}, r"mapped by \{\('query', None\): 'text'\}"),
}


@pytest.mark.parametrize("routes", ROUTES)
def test_other_routes_are_refused(tiny_checkpoint: Tiny, dinov2: Path, tmp_path: Path, routes: str) -> None:
    options, message = ROUTES[routes]
    theirs = theirs_of_modules(tiny_checkpoint("bert", bare=True), dinov2, **options)
    theirs.save(str(tmp_path / "theirs"), create_model_card=False)
    with pytest.raises(CheckpointError, match=message):
        RetrievalModel.load(tmp_path / "theirs")


def changed(router: Path, tmp_path: Path, file: str, content: Any) -> Path:
    folder = tmp_path / "changed"
    shutil.copytree(router, folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(json.dumps(content(json.loads((folder / file).read_text()))))
    return folder


def without(route: str, module: str) -> Callable[[Any], Any]:
    def change(config: Any) -> Any:
        config["structure"][route] = [name for name in config["structure"][route] if not name.endswith(module)]
        return config

    return change


IMAGE = "image_0_Transformer"
FAULTS: dict[str, tuple[str, Any, str]] = {
    "no configuration": ("router_config.json", None, "missing; expected the configuration of a Router module"),
    "an unknown module": (
        "router_config.json",
        lambda config: {**config, "structure": {**config["structure"], "image": ["image_9_Transformer"]}},
        r"of unknown modules \['image_9_Transformer'\]",
    ),
    "no pooling": (
        "router_config.json",
        without("image", "Pooling"),
        "route image: expected Transformer, Pooling, then any of Dense, Normalize; got Transformer, Dense, Normalize",
    ),
    "one normalised": (
        "router_config.json",
        without("text", "Normalize"),
        "texts come to 32 dimensions, images to 32 normalised",
    ),
    "of two widths": (
        "router_config.json",
        without("image", "Dense"),
        "texts .* 32 dimensions normalised, images to 24",
    ),
    "mapped by nonsense": (
        "router_config.json",
        lambda config: {**config, "parameters": {"route_mappings": {"text": "text"}}},
        r"route_mappings: expected routes by \(task, modality\)",
    ),
    "no image processor": (f"{IMAGE}/preprocessor_config.json", None, f"{IMAGE}: no image processor that transformers"),
    "another modality": (
        f"{IMAGE}/sentence_bert_config.json",
        lambda config: {**config, "modality_config": {"audio": config["modality_config"]["image"]}},
        "not supported: modality_config: expected some of",
    ),
    "settings in a call": (
        f"{IMAGE}/sentence_bert_config.json",
        lambda config: {**config, "processing_kwargs": {"image": {"do_resize": False}}},
        "not supported: processing_kwargs: expected {}",
    ),
    "settings in loading": (
        f"{IMAGE}/sentence_bert_config.json",
        lambda config: {**config, "processor_kwargs": {"do_resize": False}},
        "not supported: processor_kwargs: expected {}",
    ),
    "pooling of another width": (
        "image_1_Pooling/config.json",
        lambda config: {**config, "embedding_dimension": 25},
        "pooling expects 25 dimensions, the model has 24",
    ),
    "weights that are missing": ("image_2_Dense/model.safetensors", None, "image_2_Dense: the weights are missing"),
    "a transformer of texts": (
        f"{IMAGE}/config.json",
        lambda _: {"model_type": "bert", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
        f"{IMAGE}: bert is no model of images alone",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_said(router: Path, tmp_path: Path, fault: str) -> None:
    file, content, message = FAULTS[fault]
    with pytest.raises(CheckpointError, match=message) as found:
        RetrievalModel.load(changed(router, tmp_path, file, content))
    assert "\n" not in str(found.value)


def test_a_model_of_images_alone_is_no_embedder(dinov2: Path) -> None:
    with pytest.raises(CheckpointError, match="has an image processor and no tokenizer; expected a model of texts"):
        RetrievalModel.load(dinov2)
