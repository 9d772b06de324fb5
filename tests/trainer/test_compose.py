"""A text embedder and a vision transformer put together, in Python and on the command line."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from rtx.runtime.cli import main
from rtx.runtime.embedder import Embedder
from rtx.runtime.errors import CheckpointError, UsageError
from rtx.trainer.compose import compose
from rtx.trainer.model import RetrievalModel

TINY = runpy.run_path(str(Path(__file__).parents[1] / "vision_models.py"))
TOLERANCE = 1e-5
TEXTS = ["a query of the code", "File", "naïve text"]
IMAGES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 3, 3), dtype=np.uint8)).resize(size)
    for seed, size in enumerate([(50, 40), (90, 33)])
]

Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dinov2")
    TINY["write_tiny_dinov2"](folder)
    return folder


def embed(model: RetrievalModel, items: Any) -> NDArray[np.float32]:
    return Embedder(model.preprocessor, model.engine()).embed(items)


def theirs_of(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def check_against_theirs(model: RetrievalModel, folder: Path) -> NDArray[np.float32]:
    """The image vectors, after a comparison of the saved model's with sentence-transformers'."""
    model.save(folder)
    theirs, vectors = theirs_of(folder), embed(model, IMAGES)
    np.testing.assert_allclose(theirs.encode(IMAGES), vectors, atol=TOLERANCE)
    np.testing.assert_allclose(theirs.encode(TEXTS), embed(model, TEXTS), atol=TOLERANCE)
    np.testing.assert_array_equal(embed(RetrievalModel.load(folder), IMAGES), vectors)
    return vectors


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "qwen3"])
@pytest.mark.parametrize("normalize", [True, False])
def test_texts_keep_their_vectors(
    tiny_checkpoint: Tiny, dinov2: Path, tmp_path: Path, architecture: str, normalize: bool
) -> None:
    text = tiny_checkpoint(architecture, normalize=normalize, prompts={"query": "q: "})
    model = compose(text, dinov2)
    np.testing.assert_array_equal(embed(model, TEXTS), embed(RetrievalModel.load(text), TEXTS))
    assert model.contract.prompts == {"query": "q: "}
    assert model.contract.normalize == normalize
    vectors = check_against_theirs(model, tmp_path / "ours")
    assert bool(np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)) == normalize
    described = json.loads((tmp_path / "ours" / "image_2_Dense" / "config.json").read_text())
    assert (described["in_features"], described["out_features"], described["bias"]) == (24, 32, False)
    assert described["activation_function"] == "torch.nn.modules.linear.Identity"


def test_a_text_side_with_a_head_of_its_own(tiny_checkpoint: Tiny, dinov2: Path, tmp_path: Path) -> None:
    text = tiny_checkpoint("bert", dense=(16,), pooling=("mean", "max"))
    model = compose(text, dinov2)
    assert model.contract.dimension == 16
    np.testing.assert_array_equal(embed(model, TEXTS), embed(RetrievalModel.load(text), TEXTS))
    check_against_theirs(model, tmp_path / "ours")


def test_pooling(tiny_checkpoint: Tiny, dinov2: Path, tmp_path: Path) -> None:
    models = {mode: compose(tiny_checkpoint("bert"), dinov2, pooling=mode) for mode in (None, "cls", "mean")}  # type: ignore[arg-type]
    vectors = {mode: embed(model, IMAGES) for mode, model in models.items()}
    np.testing.assert_array_equal(vectors[None], vectors["cls"])
    assert np.abs(vectors["mean"] - vectors["cls"]).max() > 0.01
    check_against_theirs(models["mean"], tmp_path / "ours")
    with pytest.raises(UsageError, match=r"pooling: expected one of cls, max, mean, .*; got first"):
        compose(tiny_checkpoint("bert"), dinov2, pooling="first")  # type: ignore[arg-type]


def test_the_projection_depends_on_the_seed_alone(tiny_checkpoint: Tiny, dinov2: Path) -> None:
    torch.manual_seed(1)
    first = compose(tiny_checkpoint("bert"), dinov2, seed=3)
    drawn = torch.rand(())
    torch.manual_seed(1)
    assert torch.rand(()) == drawn, "the generator of the caller is as it was"
    second = compose(tiny_checkpoint("bert"), dinov2, seed=3)
    np.testing.assert_array_equal(embed(first, IMAGES), embed(second, IMAGES))
    other = compose(tiny_checkpoint("bert"), dinov2, seed=4)
    assert np.abs(embed(other, IMAGES) - embed(first, IMAGES)).max() > 0.01


def test_images_of_one_size(tiny_checkpoint: Tiny, dinov2: Path, tmp_path: Path) -> None:
    """DINOv2 resamples its positions, here and in sentence-transformers."""
    model = compose(tiny_checkpoint("bert"), dinov2, image_size=(42, 28))
    rules = model.contract.images
    assert rules is not None
    assert (rules.resize, rules.height, rules.width) == ("exact", 42, 28)
    check_against_theirs(model, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "image_0_Transformer" / "preprocessor_config.json").read_text())
    assert written["size"] == {"height": 42, "width": 28}
    assert written["do_center_crop"] is False
    assert written["image_processor_type"] == "BitImageProcessor"
    for size in ((42, 27), (0, 28)):
        with pytest.raises(UsageError, match="image_size: expected multiples of 14, the side of a patch; got"):
            compose(tiny_checkpoint("bert"), dinov2, image_size=size)


def test_a_vision_model_that_sentence_transformers_wrote(tiny_checkpoint: Tiny, dinov2: Path, tmp_path: Path) -> None:
    theirs = theirs_of(dinov2)
    theirs.save(str(tmp_path / "vision"), create_model_card=False)
    model = compose(tiny_checkpoint("bert"), tmp_path / "vision")
    assert model.layout.image_tower is not None
    assert model.layout.image_tower.pooling == ("mean",)
    check_against_theirs(model, tmp_path / "ours")
    assert compose(tiny_checkpoint("bert"), tmp_path / "vision", pooling="cls").layout.image_tower.pooling == ("cls",)  # type: ignore[union-attr]


def test_a_vision_model_that_has_a_projection_keeps_it(tiny_checkpoint: Tiny, dinov2: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    for width in (32, 20):
        modules = [Transformer(str(dinov2)), Pooling(24, "mean"), Dense(24, width), Normalize()]
        vision = SentenceTransformer(modules=modules, device="cpu")
        vision.save(str(tmp_path / f"vision{width}"), create_model_card=False)
        model = compose(tiny_checkpoint("bert"), tmp_path / f"vision{width}")
        vectors = check_against_theirs(model, tmp_path / f"ours{width}")
        same = vectors.shape == (2, width) and np.allclose(vectors, vision.encode(IMAGES), atol=TOLERANCE)
        assert same == (width == 32)


def test_a_vision_transformer_of_one_size(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    check_against_theirs(compose(tiny_checkpoint("bert"), tmp_path / "vit"), tmp_path / "ours")
    with pytest.raises(UsageError, match="the model does not take images of 40 × 32 pixels"):
        compose(tiny_checkpoint("bert"), tmp_path / "vit", image_size=(40, 32))


def test_the_vision_part_of_a_dual_encoder(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """Its image processor names the class that joined it with a tokenizer, which is not there any more."""
    import transformers

    TINY["write_tiny_siglip2"](tmp_path / "whole")
    torch.manual_seed(0)
    config = transformers.SiglipConfig.from_pretrained(tmp_path / "whole").vision_config
    transformers.SiglipVisionModel(config).save_pretrained(tmp_path / "vision")
    shutil.copy(tmp_path / "whole" / "preprocessor_config.json", tmp_path / "vision")
    check_against_theirs(compose(tiny_checkpoint("bert"), tmp_path / "vision", pooling="mean"), tmp_path / "ours")


def test_a_network_without_tokens(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    import transformers

    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    transformers.ResNetModel(config).save_pretrained(tmp_path / "resnet")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "resnet" / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(CheckpointError, match="resnet has no hidden_size; expected a vision transformer"):
        compose(tiny_checkpoint("bert"), tmp_path / "resnet")


def test_what_cannot_be_put_together(tiny_checkpoint: Tiny, dinov2: Path, tmp_path: Path) -> None:
    text = tiny_checkpoint("bert")
    with pytest.raises(UsageError, match=r"expected an embedder of texts; it is a reranker$"):
        compose(tiny_checkpoint("bert", "rerank"), dinov2)
    TINY["write_tiny_clip"](tmp_path / "clip")
    with pytest.raises(UsageError, match=r"expected an embedder of texts; it takes images already$"):
        compose(tmp_path / "clip", dinov2)
    with pytest.raises(CheckpointError, match="clip is no model of images alone"):
        compose(text, tmp_path / "clip")
    with pytest.raises(CheckpointError, match="no image processor"):
        compose(text, tiny_checkpoint("bert"))
    with pytest.raises(CheckpointError, match="no such folder"):
        compose(text, tmp_path / "nothing")
    shutil.copytree(dinov2, tmp_path / "router")
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Router"}]
    (tmp_path / "router" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(
        CheckpointError, match="expected Transformer, Pooling, then any of Dense, Normalize; got Router"
    ):
        compose(text, tmp_path / "router")


# ---------------------------------------------------------------- the command


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["compose", *map(str, arguments)])


def test_an_output_that_is_read_stays(tiny_checkpoint: Tiny, dinov2: Path, tmp_path: Path) -> None:
    text = shutil.copytree(tiny_checkpoint("bert"), tmp_path / "in" / "text")
    for output in (text, tmp_path / "in"):
        result = run("--text", text, "--image", dinov2, "--output", output, "--overwrite")
        assert (result.exit_code, f"{output}: holds {text}, which is to be read" in result.stderr) == (2, True)
    assert RetrievalModel.load(text).contract.takes_images is False


def test_the_command(tiny_checkpoint: Tiny, dinov2: Path, tmp_path: Path) -> None:
    text, output = tiny_checkpoint("bert"), tmp_path / "pages"
    options = ("--text", text, "--image", dinov2, "--output", output)
    done = run(*options, "--pooling", "mean", "--image-size", "42x28", "--seed", 5)
    assert done.exit_code == 0, done.output
    assert done.output.startswith(f"{output}: 32 dimensions, 0.1 million parameters")
    expected = compose(text, dinov2, pooling="mean", image_size=(42, 28), seed=5)
    found = RetrievalModel.load(output)
    np.testing.assert_array_equal(embed(found, IMAGES), embed(expected, IMAGES))
    assert found.contract == expected.contract

    refused = run(*options)
    assert refused.exit_code != 0
    assert refused.output == f"error: {output}: exists; pass --overwrite to replace it\n"
    assert run(*options, "--overwrite").exit_code == 0
    assert RetrievalModel.load(output).contract.images != expected.contract.images
    # Nothing but a checkpoint is replaced.
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    refused = run(*options[:-1], tmp_path / "notes", "--overwrite")
    assert "is in the way" in refused.output
    assert (tmp_path / "notes" / "todo.txt").exists()


@pytest.mark.parametrize("size", ["448", "448x", "x3", "0x4", "4x-4", "axb"])
def test_sizes_that_are_none(tmp_path: Path, size: str) -> None:
    done = run("--text", "t", "--image", "i", "--output", tmp_path / "o", "--image-size", size)
    assert done.exit_code != 0
    assert "expected height x width in pixels, such as 448x336; got" in done.output


def shown(folder: Path) -> dict[str, str]:
    """What rtx info says of a checkpoint, by field."""
    done = CliRunner().invoke(main, ["info", str(folder)], env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    rows = (line.split("  ", 1) for line in done.output.splitlines()[1:] if "  " in line)
    return {field: value.strip() for field, value in rows}


def test_info_shows_what_it_takes(tiny_checkpoint: Tiny, dinov2: Path, tmp_path: Path) -> None:
    compose(tiny_checkpoint("bert"), dinov2).save(tmp_path / "crop")
    rows = shown(tmp_path / "crop")
    assert rows["takes"] == "texts or images, one an item"
    assert rows["images"] == "bicubic to 32 at the shorter side, 28 × 28 from the centre"
    assert rows["image_tokens"] == "4"
    compose(tiny_checkpoint("bert"), dinov2, image_size=(42, 28)).save(tmp_path / "exact")
    assert shown(tmp_path / "exact")["images"] == "bicubic to 42 × 28"
    TINY["write_tiny_qwen3_vl"](tmp_path / "tokens")
    rows = shown(tmp_path / "tokens")
    assert rows["takes"] == "images, texts, or texts with images"
    assert rows["images"] == "bicubic to multiples of 32, 1,024 to 12,288 pixels in all"
    assert rows["visual"] == "token 275 for 2 × 2 patches"
    assert "takes" not in shown(tiny_checkpoint("bert"))
