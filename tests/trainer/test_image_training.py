"""What of a model that takes images is frozen, adapted and trained how fast, and that it is trained at all."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rtx.runtime.embedder import Embedder
from rtx.runtime.errors import UsageError
from rtx.trainer.adapters import adapter_state, add_lora, load_adapter_state, merge, merged, save_adapter
from rtx.trainer.compose import compose
from rtx.trainer.model import RetrievalModel
from rtx.trainer.parameters import (
    embedding_parameters,
    freeze,
    head_parameters,
    image_layer_parameters,
    image_parameters,
    layer_parameters,
    parameter_groups,
)

TINY = runpy.run_path(str(Path(__file__).parents[1] / "vision_models.py"))
KINDS = ("clip", "siglip2", "qwen3_vl", "qwen3_vl rerank", "router")
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))

Load = Callable[[str], RetrievalModel]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Load:
    """`load(kind)` gives a fresh model, loaded from one folder a kind."""
    folders: dict[str, Path] = {}

    def loaded(kind: str) -> RetrievalModel:
        name, _, task = kind.partition(" ")
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name) / "model"
            if name == "router":
                TINY["write_tiny_dinov2"](folders[name].parent / "vision")
                compose(tiny_checkpoint("bert"), folders[name].parent / "vision").save(folders[name])
            else:
                TINY[f"write_tiny_{name}"](folders[name])
        return RetrievalModel.load(folders[name], task=task or None)  # type: ignore[arg-type]

    return loaded


def trained(model: RetrievalModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def every(model: RetrievalModel) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def beginning(model: RetrievalModel, *starts: str) -> set[str]:
    return {name for name in every(model) if name.startswith(starts)}


def batches_of(model: RetrievalModel) -> list[dict[str, Tensor]]:
    """Texts and images, apart where the model takes them so."""
    items: list[Any] = ["the sea", "a photo", IMAGE]
    if model.task == "rerank":
        encoded = model.preprocessor.encode_pairs([("the sea", IMAGE), (IMAGE, "a photo")])
    else:
        encoded = model.preprocessor.encode(items)
    rows: list[Any] = list(encoded)
    parts = [rows] if model.contract.visual is not None else [rows[:2], rows[2:]]
    return [
        {
            name: torch.from_numpy(array)
            for name, array in model.preprocessor.collate(part).items()
            if "digest" not in name
        }
        for part in parts
    ]


def outputs(model: RetrievalModel) -> list[Tensor]:
    with torch.no_grad():
        return [model(batch) for batch in batches_of(model)]


def gradients(model: RetrievalModel) -> dict[str, Tensor]:
    model.train()
    torch.manual_seed(0)
    for batch in batches_of(model):
        output = model(batch)
        (output * torch.randn_like(output)).sum().backward()
    model.eval()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# ---------------------------------------------------------------- parts

# Where images go: all of it, its blocks, what comes before them.
IMAGES = {
    "clip": (
        ("backbone.vision_model.", "backbone.visual_projection."),
        "backbone.vision_model.encoder.layers.",
        ("backbone.vision_model.embeddings.", "backbone.vision_model.pre_layrnorm."),
    ),
    "siglip2": (
        ("backbone.vision_model.",),
        "backbone.vision_model.encoder.layers.",
        ("backbone.vision_model.embeddings.",),
    ),
    "qwen3_vl": (
        ("backbone.visual.",),
        "backbone.visual.blocks.",
        ("backbone.visual.patch_embed.", "backbone.visual.pos_embed."),
    ),
    "qwen3_vl rerank": (
        ("backbone.model.visual.",),
        "backbone.model.visual.blocks.",
        ("backbone.model.visual.patch_embed.", "backbone.model.visual.pos_embed."),
    ),
    "router": (
        ("image_tower.",),
        "image_tower.backbone.encoder.layer.",
        ("image_tower.backbone.embeddings.",),
    ),
}
# The blocks that texts go through, and the tables before them.
TEXTS = {
    "clip": ("backbone.text_model.encoder.layers.", "backbone.text_model.embeddings."),
    "siglip2": ("backbone.text_model.encoder.layers.", "backbone.text_model.embeddings."),
    "qwen3_vl": ("backbone.language_model.layers.", "backbone.language_model.embed_tokens."),
    "qwen3_vl rerank": ("backbone.model.language_model.layers.", "backbone.model.language_model.embed_tokens."),
    "router": ("backbone.encoder.layer.", "backbone.embeddings."),
}


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_told_apart(load: Load, kind: str) -> None:
    model = load(kind)
    around, blocks, before = IMAGES[kind]
    assert set(image_parameters(model)) == beginning(model, *around)
    count = 3 if "qwen" in kind else 2
    assert [set(layer) for layer in image_layer_parameters(model)] == [
        beginning(model, f"{blocks}{number}.") for number in range(count)
    ]
    text_blocks, tables = TEXTS[kind]
    assert [set(layer) for layer in layer_parameters(model)] == [
        beginning(model, f"{text_blocks}{number}.") for number in range(count)
    ]
    assert set(embedding_parameters(model)) == beginning(model, tables)
    assert set(head_parameters(model)) == beginning(model, "image_tower.head.")
    for pattern, starts in {
        "images": around,
        "images.layers:1": (f"{blocks}1.",),
        "images.layers:0-": (blocks,),
        "images.embeddings": before,
        "embeddings": (tables,),
        "layers:0": (f"{text_blocks}0.",),
    }.items():
        assert set(freeze(load(kind), [pattern])) == beginning(model, *starts), pattern


def test_the_projection_of_images_is_a_head(load: Load) -> None:
    for pattern in ("head", "images.head", "image_tower.head"):
        assert freeze(load("router"), [pattern]) == ["image_tower.head.0.linear.weight"]
    assert freeze(load("router"), ["backbone"]) == sorted(
        beginning(load("router"), "backbone."), key=[name for name, _ in load("router").named_parameters()].index
    )


@pytest.mark.parametrize(
    ("kind", "pattern", "message"),
    [
        ("qwen3_vl", "images.layers:3", r"expected blocks of images\.layers:0 to images\.layers:2"),
        ("qwen3_vl", "images.head", "nothing with weights follows the transformer"),
        ("clip", "images.layer:1", "matches no parameter"),
        ("router", "image", r"matches no parameter \(nearest: images"),
    ],
)
def test_what_matches_nothing_is_said(load: Load, kind: str, pattern: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        freeze(load(kind), [pattern])


def test_a_model_of_texts_has_no_images(tiny_checkpoint: Callable[..., Path]) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert"))
    assert image_parameters(model) == {}
    assert image_layer_parameters(model) == []
    for pattern in ("images", "images.layers:0", "images.head"):
        with pytest.raises(UsageError, match=f"'{pattern}' matches nothing: the model takes no images"):
            freeze(model, [pattern])


@pytest.mark.parametrize(("kind", "patterns"), [("clip", ["images", "text_model"]), ("router", ["images", "backbone"])])
def test_what_is_never_run_is_nothing_to_train(load: Load, kind: str, patterns: list[str]) -> None:
    model = load(kind)
    if kind == "clip":
        patterns = [*patterns, "text_projection"]
    with pytest.raises(UsageError, match="nothing is left to train"):
        freeze(model, patterns)
    freeze(load("router"), ["backbone", "images.layers:0-", "images.head", "image_tower.backbone.layernorm"])
    with pytest.raises(UsageError, match="nothing is left to train"):
        # What is left is the token that stands for a masked patch.
        freeze(
            model if kind == "router" else load("router"),
            [
                "backbone",
                "images.layers:0-",
                "images.head",
                "image_tower.backbone.layernorm",
                "*.cls_token",
                "*.position_embeddings",
                "*.patch_embeddings",
            ],
        )


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_is_run_is_trained(load: Load, kind: str) -> None:
    model = load(kind)
    found = gradients(model)
    unused = {name for name in every(model) if name.endswith(("logit_scale", "logit_bias", "mask_token"))}
    unused |= beginning(model, "backbone.pooler.")
    # Adding to all keys leaves attention as it was.
    assert every(model) - set(found) == unused
    assert {name for name, grad in found.items() if not grad.any()} <= {n for n in every(model) if n.endswith("bias")}


@pytest.mark.parametrize("kind", ["qwen3_vl", "router"])
def test_frozen_images_stay_as_they_are(load: Load, kind: str) -> None:
    model = load(kind)
    freeze(model, ["images.layers:0-", "images.embeddings"])
    found = gradients(model)
    blocks, before = IMAGES[kind][1:]
    assert not found.keys() & beginning(model, blocks, *before)
    assert found.keys() & beginning(model, TEXTS[kind][0])
    assert found.keys() & set(image_parameters(model))


@pytest.mark.parametrize("kind", ["clip", "qwen3_vl", "router"])
def test_gradient_checkpointing_gives_the_same_gradient(load: Load, kind: str) -> None:
    plain = gradients(load(kind))
    model = load(kind)
    model.activation_checkpointing_enable()
    checkpointed = gradients(model)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)
    model.activation_checkpointing_disable()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


# ---------------------------------------------------------------- learning rates


def test_rates_by_part(load: Load) -> None:
    model = load("router")
    rates = {"images": 1e-4, "images.head": 1e-3}
    groups = parameter_groups(model, learning_rate=1e-5, weight_decay=0.01, rates=rates)
    found = {id(one): group["lr"] for group in groups for one in group["params"]}
    by_name = {name: found[id(parameter)] for name, parameter in model.named_parameters()}
    assert {by_name[name] for name in beginning(model, "backbone.")} == {1e-5}
    assert {by_name[name] for name in beginning(model, "image_tower.backbone.")} == {1e-4}
    assert by_name["image_tower.head.0.linear.weight"] == 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_rates_that_fall_with_depth(load: Load, kind: str) -> None:
    model = load(kind)
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.0, layer_decay=0.5)
    found = {id(one): group["lr"] for group in groups for one in group["params"]}
    by_name = {name: found[id(parameter)] for name, parameter in model.named_parameters()}
    _, blocks, before = IMAGES[kind]
    text_blocks, tables = TEXTS[kind]
    count = 3 if "qwen" in kind else 2
    for number in range(count):
        expected = 0.5 ** (count - number)
        assert {by_name[name] for name in beginning(model, f"{text_blocks}{number}.")} == {expected}
        images = 0.5 ** (count + 1) if "qwen" in kind else expected
        assert {by_name[name] for name in beginning(model, f"{blocks}{number}.")} == {images}
    assert {by_name[name] for name in beginning(model, tables, *before)} == {0.5 ** (count + 1)}
    if kind == "router":
        assert by_name["image_tower.head.0.linear.weight"] == by_name["image_tower.backbone.layernorm.weight"] == 1.0


# ---------------------------------------------------------------- LoRA


def adapted(model: RetrievalModel, seed: int = 0, **options: Any) -> RetrievalModel:
    """With adapters that do something: as peft makes them, they add zero."""
    torch.manual_seed(seed)
    add_lora(model, **{"rank": 2, "alpha": 4.0, **options})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def layers_with_adapters(model: RetrievalModel) -> set[str]:
    return {name.partition(".lora_A")[0] for name in trained(model) if ".lora_A" in name}


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_is_the_model(load: Load, tmp_path: Path, kind: str) -> None:
    model = adapted(load(kind))
    before = [tensor.clone() for tensor in outputs(load(kind))]
    expected = outputs(model)
    assert all((after - was).abs().max() > 1e-3 for after, was in zip(expected, before, strict=True))
    model.save(tmp_path / "merged")
    assert merged(model).keys() == load(kind).state_dict().keys()
    saved = RetrievalModel.load(tmp_path / "merged")
    for after, found in zip(expected, outputs(saved), strict=True):
        torch.testing.assert_close(found, after, rtol=0, atol=1e-5)
    merge(model)
    for after, found in zip(expected, outputs(model), strict=True):
        torch.testing.assert_close(found, after, rtol=0, atol=1e-5)
    assert model.state_dict().keys() == load(kind).state_dict().keys()


def test_what_is_adapted(load: Load) -> None:
    router = adapted(load("router"))
    found = layers_with_adapters(router)
    assert len({name for name in found if name.startswith("backbone.encoder.")}) == 2 * 6
    assert len({name for name in found if name.startswith("image_tower.backbone.encoder.")}) == 2 * 6
    assert {name for name in trained(router) if ".lora_" not in name} == {"image_tower.head.0.linear.weight"}
    # What makes tokens of images stays as it is, and needs no gradient.
    found = layers_with_adapters(adapted(load("qwen3_vl")))
    assert len(found) == 3 * 7
    assert all(name.startswith("backbone.language_model.layers.") for name in found)
    found = layers_with_adapters(adapted(load("qwen3_vl"), targets=("q_proj", "visual.blocks.*.qkv")))
    assert len(found) == 3 + 3
    found = layers_with_adapters(adapted(load("router"), targets=("image_tower.*.q_proj",)))
    assert found == {f"image_tower.backbone.encoder.layer.{number}.attention.q_proj" for number in (0, 1)}
    with pytest.raises(UsageError, match="'q_porj' matches no linear layer of the transformer"):
        adapted(load("router"), targets=("q_porj",))


@pytest.mark.parametrize("kind", ["router", "qwen3_vl"])
def test_a_run_goes_on_from_its_adapters(load: Load, kind: str) -> None:
    model, other = adapted(load(kind)), adapted(load(kind), seed=1)
    assert any((a != b).any() for a, b in zip(outputs(model), outputs(other), strict=True))
    load_adapter_state(other, adapter_state(model))
    for after, found in zip(outputs(model), outputs(other), strict=True):
        torch.testing.assert_close(found, after, rtol=0, atol=0)


@pytest.mark.parametrize("targets", [None, ("image_tower.*.q_proj",), ("query",)])
def test_peft_opens_the_adapters_of_each_tower(load: Load, tmp_path: Path, targets: Any) -> None:
    """sentence-transformers opens no adapters inside a Router; a tower without any is there whole."""
    import peft
    import transformers

    model = adapted(load("router"), targets=targets)
    save_adapter(model, tmp_path)
    again = load("router")
    assert again.image_tower is not None
    for holder, folder in ((again, "text_0_Transformer"), (again.image_tower, "image_0_Transformer")):
        with_adapters = (tmp_path / folder / "adapter_config.json").exists()
        assert with_adapters == (targets is None or (targets == ("query",)) == (folder[0] == "t"))
        assert with_adapters != (tmp_path / folder / "model.safetensors").exists()
        if with_adapters:
            config = peft.PeftConfig.from_pretrained(str(tmp_path / folder))
            base = transformers.AutoModel.from_pretrained(config.base_model_name_or_path)
            holder.backbone = peft.PeftModel.from_pretrained(base, tmp_path / folder).eval()
        else:
            holder.backbone = transformers.AutoModel.from_pretrained(tmp_path / folder)
    batches = batches_of(model)
    with torch.no_grad():
        for batch in batches:
            torch.testing.assert_close(again(batch), model(batch), rtol=0, atol=1e-5)


def test_sentence_transformers_opens_adapters_of_a_model_of_visual_tokens(load: Load, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = adapted(load("qwen3_vl"))
    save_adapter(model, tmp_path)
    with TINY["images_only"]():
        theirs = SentenceTransformer(str(tmp_path), device="cpu")
    items: list[Any] = ["the sea", IMAGE, {"image": IMAGE, "text": "a"}]
    vectors = Embedder(model.preprocessor, model.engine()).embed(items)
    np.testing.assert_allclose(theirs.encode(items), vectors, atol=1e-5)
