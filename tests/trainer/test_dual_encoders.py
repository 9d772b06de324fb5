"""CLIP and SigLIP, which embed texts and images apart, against sentence-transformers both ways."""

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
from rtx.trainer.backbone import Source
from rtx.trainer.model import RetrievalModel

TINY = runpy.run_path(str(Path(__file__).parents[1] / "vision_models.py"))
TOLERANCE = 1e-5
KINDS = ("clip", "siglip", "siglip2")
TEXTS = ["a photo of the cat", "The", "", "north of the sea, in a photo of the owl 12345 " * 3, "x"]
IMAGES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 3, 3), dtype=np.uint8)).resize(size)
    for seed, size in enumerate([(50, 40), (32, 32), (90, 33)])
]
ITEMS: list[Any] = [*TEXTS, *IMAGES]

Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """`tiny(kind)` gives a bare folder, which a test that changes it copies."""
    folders: dict[str, Path] = {}

    def write(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            TINY[f"write_tiny_{kind}"](folders[kind])
        return folders[kind]

    return write


def embed(model: RetrievalModel, items: Sequence[Any] = ITEMS, **options: Any) -> NDArray[np.float32]:
    return Embedder(model.preprocessor, model.engine()).embed(list(items), **options)


def theirs_of(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def encode(theirs: Any, **options: Any) -> NDArray[np.float32]:
    """Of ITEMS; sentence-transformers takes no batch of texts and images here."""
    parts: list[Any] = [theirs.encode(TEXTS, **options), theirs.encode(IMAGES, **options)]
    return np.concatenate(parts)


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    model = RetrievalModel.load(tiny(kind))
    vectors = embed(model)
    distances = np.abs(vectors[:, None] - vectors[None]).max(axis=-1)
    assert distances[~np.eye(len(ITEMS), dtype=bool)].min() > 0.01, "or the test shows nothing"
    assert model.contract.dimension == vectors.shape[1] == (24 if kind == "clip" else 32)

    model.save(tmp_path / "ours")
    theirs = theirs_of(tmp_path / "ours")
    np.testing.assert_allclose(encode(theirs), vectors, atol=TOLERANCE)
    theirs.save(str(tmp_path / "theirs"), create_model_card=False)
    again = RetrievalModel.load(tmp_path / "theirs")
    np.testing.assert_allclose(embed(again), vectors, atol=TOLERANCE)
    assert again.contract.images == model.contract.images
    assert again.contract.fixed_tokens == model.contract.fixed_tokens


def test_texts_of_siglip_are_padded_to_one_length(tiny: Tiny, tmp_path: Path) -> None:
    model = RetrievalModel.load(tiny("siglip2"))
    assert model.contract.inputs == ("input_ids",)
    assert (model.contract.max_tokens, model.contract.fixed_tokens) == (16, 16)
    model.save(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "sentence_bert_config.json").read_text())
    assert config["processing_kwargs"] == {"text": {"padding": "max_length"}}
    # Without it sentence-transformers pads to the longest text, and each vector depends on what it was embedded with.
    del config["processing_kwargs"]
    (tmp_path / "ours" / "sentence_bert_config.json").write_text(json.dumps(config))
    theirs = theirs_of(tmp_path / "ours")
    assert np.abs(theirs.encode(["x"])[0] - embed(model, ["x"])[0]).max() > 0.1
    np.testing.assert_array_equal(embed(RetrievalModel.load(tmp_path / "ours")), embed(model))
    # CLIP takes the vector of its end token, wherever that stands.
    assert RetrievalModel.load(tiny("clip")).contract.fixed_tokens == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_a_mask_hides_may_count_too(tiny: Tiny, tmp_path: Path, side: str) -> None:
    """A tokenizer that gives a mask does not keep SigLIP from taking the vector of its last token."""
    folder = tmp_path / "masked"
    shutil.copytree(tiny("siglip2"), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"model_input_names": ["input_ids", "attention_mask"], "padding_side": side}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model = RetrievalModel.load(folder)
    assert model.contract.inputs == ("input_ids", "attention_mask")
    assert model.contract.fixed_tokens == 16
    vectors = embed(model)
    np.testing.assert_allclose(np.concatenate([embed(model, [item]) for item in ITEMS]), vectors, atol=TOLERANCE)
    model.save(tmp_path / "ours")
    np.testing.assert_allclose(encode(theirs_of(tmp_path / "ours")), vectors, atol=TOLERANCE)


def test_a_length_that_they_were_told(tiny: Tiny, tmp_path: Path) -> None:
    theirs = theirs_of(tiny("siglip2"))
    theirs[0].processing_kwargs = {"text": {"padding": "max_length", "max_length": 12, "truncation": True}}
    theirs.save(str(tmp_path / "theirs"), create_model_card=False)
    model = RetrievalModel.load(tmp_path / "theirs")
    assert (model.contract.max_tokens, model.contract.fixed_tokens) == (12, 12)
    np.testing.assert_allclose(encode(theirs), embed(model), atol=TOLERANCE)
    model.save(tmp_path / "ours")
    np.testing.assert_allclose(encode(theirs_of(tmp_path / "ours")), embed(model), atol=TOLERANCE)
    with pytest.raises(UsageError, match="max_tokens: expected at most 16, the model's positions; got 17"):
        model.configure(max_tokens=17)
    # Shorter would be lost when it is saved: what it is filled to is all that a tokenizer keeps.
    with pytest.raises(UsageError, match=r"^max_tokens: this model's texts are filled to \d+ tokens; expected \d+$"):
        model.configure(max_tokens=8)


@pytest.mark.parametrize("kind", KINDS)
def test_an_item_alone_is_the_item_in_any_batch(tiny: Tiny, kind: str) -> None:
    model = RetrievalModel.load(tiny(kind))
    order = np.random.default_rng(0).permutation(len(ITEMS))
    together = np.empty((len(ITEMS), model.contract.dimension), np.float32)
    together[order] = embed(model, [ITEMS[index] for index in order])
    np.testing.assert_allclose(np.concatenate([embed(model, [item]) for item in ITEMS]), together, atol=TOLERANCE)


def test_prompts_go_before_texts_alone(tiny: Tiny, tmp_path: Path) -> None:
    model = RetrievalModel.load(tiny("clip"))
    plain = embed(model)
    model.configure(prompts={"query": "a photo of "}, default_prompt="query")
    model.save(tmp_path / "ours")
    vectors = embed(model)
    np.testing.assert_allclose(encode(theirs_of(tmp_path / "ours")), vectors, atol=TOLERANCE)
    assert np.abs(vectors - plain)[: len(TEXTS)].max() > 0.1
    np.testing.assert_array_equal(vectors[len(TEXTS) :], plain[len(TEXTS) :])


def test_the_matryoshka_cut(tiny: Tiny, tmp_path: Path) -> None:
    model = RetrievalModel.load(tiny("clip"))
    model.configure(truncate_dim=8)
    vectors = embed(model)
    assert vectors.shape == (len(ITEMS), 8)
    model.save(tmp_path / "ours")
    theirs = encode(theirs_of(tmp_path / "ours"), normalize_embeddings=True)
    np.testing.assert_allclose(theirs, vectors, atol=TOLERANCE)


def test_folders_of_the_first_kind(tiny: Tiny, tmp_path: Path) -> None:
    """Before version 5.4 sentence-transformers had a module of its own for CLIP."""
    shutil.copytree(tiny("clip"), tmp_path / "old" / "0_CLIPModel")
    modules = [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]
    (tmp_path / "old" / "modules.json").write_text(json.dumps(modules))
    model = RetrievalModel.load(tmp_path / "old")
    assert not model.contract.normalize
    vectors = embed(model)
    theirs = theirs_of(tmp_path / "old")
    np.testing.assert_allclose(encode(theirs), vectors, atol=TOLERANCE)
    theirs.save(str(tmp_path / "theirs"), create_model_card=False)
    for folder in (tmp_path / "theirs", tmp_path / "ours"):
        model.save(tmp_path / "ours")
        np.testing.assert_allclose(embed(RetrievalModel.load(folder)), vectors, atol=TOLERANCE)
    np.testing.assert_allclose(encode(theirs_of(tmp_path / "ours")), vectors, atol=TOLERANCE)


def test_half_precision(tiny: Tiny) -> None:
    model = RetrievalModel.load(tiny("siglip2"), dtype=torch.bfloat16)
    assert model.contract.fixed_tokens == 16
    vectors, exact = embed(model), embed(RetrievalModel.load(tiny("siglip2")))
    assert (vectors * exact).sum(axis=1).min() > 0.99
    assert RetrievalModel.load(tiny("clip"), dtype=torch.bfloat16).contract.fixed_tokens == 0


# ---------------------------------------------------------------- what cannot be


def test_a_text_beside_an_image_is_refused(tiny: Tiny) -> None:
    model = RetrievalModel.load(tiny("clip"))
    image = IMAGES[0]
    found = model.preprocessor.encode([{"text": "a", "image": image}, {"image": [image, image]}, {"image": image}])
    assert isinstance(found[0], ItemError)
    assert isinstance(found[1], ItemError)
    assert found[0].message == (
        "expected one text or one image, got a text beside an image: this model embeds them apart"
    )
    assert found[1].message == "expected one text or one image, got 2 images: this model embeds them apart"
    assert not isinstance(found[2], ItemError)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_images_of_a_size_that_the_model_does_not_take(tiny: Tiny, kind: str) -> None:
    size = {"height": 48, "width": 48}
    settings = {"size": {"shortest_edge": 48}, "crop_size": size} if kind == "clip" else {"size": size}
    with pytest.raises(UsageError, match=r"^the model does not take images of 48 × 48 pixels \(height × width\): "):
        RetrievalModel.load(tiny(kind), processor_kwargs=settings)
    with pytest.raises(UsageError, match="CLIPImageProcessorPil has no setting 'max_pixels'"):
        RetrievalModel.load(tiny("clip"), processor_kwargs={"max_pixels": 4096})


def test_a_filter_of_the_callers(tiny: Tiny, tmp_path: Path) -> None:
    model = RetrievalModel.load(tiny("clip"), processor_kwargs={"resample": 2})
    assert np.abs(embed(model) - embed(RetrievalModel.load(tiny("clip")))).max() > 1e-3
    model.save(tmp_path / "ours")
    np.testing.assert_allclose(encode(theirs_of(tmp_path / "ours")), embed(model), atol=TOLERANCE)


def test_a_model_that_is_no_dual_encoder_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """LayoutLMv3 takes a text and an image of it at once."""
    shutil.copytree(tiny("clip"), tmp_path / "layout")
    (tmp_path / "layout" / "model.safetensors").unlink()
    config = transformers.LayoutLMv3Config(
        vocab_size=600, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, input_size=32
    )
    transformers.LayoutLMv3Model(config).save_pretrained(tmp_path / "layout")
    with pytest.raises(CheckpointError, match="layoutlmv3 is no dual encoder; expected CLIP, SigLIP or the like"):
        RetrievalModel.load(tmp_path / "layout")


def test_without_tokenizer_or_image_processor(tiny: Tiny, tmp_path: Path) -> None:
    RetrievalModel.load(tiny("clip")).save(tmp_path / "ours")
    (tmp_path / "ours" / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="ours: no image processor that transformers can load: "):
        RetrievalModel.load(tmp_path / "ours")


def test_a_tokenizer_of_sentencepiece_gives_way(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the library is there, and the class that needs it can be made, or not."""
    plain = embed(RetrievalModel.load(tiny("siglip")))

    class Slow:
        is_fast = False

    chosen = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: Slow())
    np.testing.assert_array_equal(embed(RetrievalModel.load(tiny("siglip"))), plain)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", chosen)
    monkeypatch.setattr(Source, "find", lambda *_: None)
    with pytest.raises(CheckpointError, match="no tokenizer that transformers can load: SiglipTokenizer requires"):
        RetrievalModel.load(tiny("siglip"))
