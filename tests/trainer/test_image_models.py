"""Models that take texts and images as tokens of one row (Qwen3-VL), against sentence-transformers both ways."""

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
from numpy.typing import NDArray
from PIL import Image

from rtx.runtime.embedder import Embedder
from rtx.runtime.engine import Budget
from rtx.runtime.errors import CheckpointError, ItemError, UsageError
from rtx.runtime.reranker import Reranker
from rtx.runtime.text import Encoded
from rtx.trainer.model import RetrievalModel

TINY = runpy.run_path(str(Path(__file__).parents[1] / "vision_models.py"))
TOLERANCE = 1e-5
IMAGE_TOKEN = "<|image_pad|>"

Write = Callable[..., Path]


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth enough that resizing does not turn it into a mean."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


A, B, C = picture(40, 50), picture(64, 32, 1), picture(33, 90, 2)
ITEMS: list[Any] = [
    "a photo of the cat",
    A,
    {"image": B, "text": "the"},
    "",
    {"image": [A, C], "text": "north of the sea.\n\nIn the end"},
    {"image": [B, C]},
    {"text": "  an owl "},
    {"image": C, "text": ""},
]
PAIRS: list[tuple[Any, Any]] = [
    ("the cat", "a dog in the north"),
    ("the", {"text": "yes.\n"}),
    ("what is in it?", A),
    (B, {"image": C, "text": "owl"}),
    ({"image": [A, B], "text": "q"}, C),
    ("beyond the yes " * 6, {"image": A, "text": "no"}),
]
PROMPTS = {"query": "Find the page. ", "other": " Same\nas this:"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """`tiny("embed" or "rerank")` gives a bare folder, which a test that changes it copies."""
    folders: dict[str, Path] = {}

    def write(task: str) -> Path:
        if task not in folders:
            folders[task] = tmp_path_factory.mktemp(task)
            TINY["write_tiny_qwen3_vl"](folders[task], reranker=task == "rerank")
        return folders[task]

    return write


def embed(model: RetrievalModel, items: Sequence[Any] = ITEMS, **options: Any) -> NDArray[np.float32]:
    return Embedder(model.preprocessor, model.engine()).embed(list(items), **options)


def score(model: RetrievalModel, pairs: Sequence[Any] = PAIRS) -> NDArray[np.float32]:
    return Reranker(model.preprocessor, model.engine()).score(list(pairs))


def sentence_transformer(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    with TINY["images_only"]():
        return SentenceTransformer(str(folder), device="cpu")


def cross_encoder(folder: Path) -> Any:
    from sentence_transformers import CrossEncoder

    with TINY["images_only"]():
        return CrossEncoder(str(folder), device="cpu")


def encoded(model: RetrievalModel, item: Any) -> Encoded:
    (found,) = model.preprocessor.encode_pairs([item]) if model.task == "rerank" else model.preprocessor.encode([item])
    assert isinstance(found, Encoded), found
    return found


def refusal(model: RetrievalModel, item: Any) -> str:
    (found,) = model.preprocessor.encode_pairs([item]) if model.task == "rerank" else model.preprocessor.encode([item])
    assert isinstance(found, ItemError)
    return found.message


def apart(vectors: NDArray[np.float32]) -> bool:
    """Whether rows differ from each other, without which no comparison shows anything."""
    distances = np.abs(vectors[:, None] - vectors[None]).max(axis=-1)
    return bool(distances[~np.eye(len(vectors), dtype=bool)].min() > 0.01)


# ---------------------------------------------------------------- embedders, both ways with sentence-transformers


def bare_sentence_transformer(folder: Path) -> Any:
    """sentence-transformers itself would take the mean here, as it does only for models that cannot generate."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    with TINY["images_only"]():
        transformer = Transformer(str(folder))
    return SentenceTransformer(modules=[transformer, Pooling(32, "lasttoken")], device="cpu")


def test_a_bare_model_embeds_by_its_last_token(tiny: Write) -> None:
    model = RetrievalModel.load(tiny("embed"))
    assert model.contract.pooling == ("lasttoken",)
    vectors = embed(model)
    assert apart(vectors)
    theirs = bare_sentence_transformer(tiny("embed"))
    np.testing.assert_allclose(theirs.encode(ITEMS, normalize_embeddings=True), vectors, atol=TOLERANCE)


@pytest.mark.parametrize("prompt", [None, "query", "other"])
def test_both_ways_with_an_instruction_as_the_system_message(tiny: Write, tmp_path: Path, prompt: str | None) -> None:
    model = RetrievalModel.load(tiny("embed"))
    model.configure(prompts=PROMPTS)
    model.save(tmp_path / "ours")
    vectors = embed(model, prompt=prompt)
    theirs = sentence_transformer(tmp_path / "ours")
    np.testing.assert_allclose(theirs.encode(ITEMS, prompt_name=prompt), vectors, atol=TOLERANCE)
    text = model.tokenizer.decode(encoded(model, ITEMS[2]).ids)
    assert text.startswith(
        "<|im_start|>system\nRepresent the user's input.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    )
    if prompt is not None:
        assert np.abs(vectors - embed(model)).max() > 0.01

    theirs.save(str(tmp_path / "theirs"), create_model_card=False)
    again = RetrievalModel.load(tmp_path / "theirs")
    np.testing.assert_allclose(embed(again, prompt=prompt), vectors, atol=TOLERANCE)
    assert again.contract.images == model.contract.images
    assert again.contract.rendered == model.contract.rendered


def test_the_default_prompt(tiny: Write, tmp_path: Path) -> None:
    model = RetrievalModel.load(tiny("embed"))
    model.configure(prompts=PROMPTS, default_prompt="query")
    model.save(tmp_path / "ours")
    vectors = embed(model)
    theirs = sentence_transformer(tmp_path / "ours")
    np.testing.assert_allclose(theirs.encode(ITEMS), vectors, atol=TOLERANCE)
    text = model.tokenizer.decode(model.preprocessor.encode(["x"], prompt="other")[0].ids)  # type: ignore[union-attr]
    assert text == "<|im_start|>system\n Same\nas this:<|im_end|>\n<|im_start|>user\nx<|im_end|>\n"
    np.testing.assert_array_equal(embed(RetrievalModel.load(tmp_path / "ours")), vectors)


def test_variables_of_the_chat_template(tiny: Write, tmp_path: Path) -> None:
    theirs = bare_sentence_transformer(tiny("embed"))
    theirs[0].processing_kwargs = {"chat_template": {"add_generation_prompt": True}}
    theirs.save(str(tmp_path / "theirs"), create_model_card=False)
    model = RetrievalModel.load(tmp_path / "theirs")
    assert model.contract.rendered[1] == "<|im_end|>\n<|im_start|>assistant\n"
    vectors = embed(model)
    np.testing.assert_allclose(theirs.encode(ITEMS), vectors, atol=TOLERANCE)
    model.save(tmp_path / "ours")
    np.testing.assert_allclose(sentence_transformer(tmp_path / "ours").encode(ITEMS), vectors, atol=TOLERANCE)


def test_a_template_that_drops_whitespace_around_prompts_and_texts(tiny: Write, tmp_path: Path) -> None:
    folder = tmp_path / "trims"
    shutil.copytree(tiny("embed"), folder)
    template = (folder / "chat_template.jinja").read_text()
    assert "{{- part.text -}}" in template
    (folder / "chat_template.jinja").write_text(template.replace("part.text", "part.text | trim"))
    model = RetrievalModel.load(folder)
    model.configure(prompts=PROMPTS)
    assert model.contract.strip_sides
    assert model.contract.prompts == {"query": "Find the page.", "other": "Same\nas this:"}
    assert model.layout.prompts == PROMPTS
    model.save(tmp_path / "ours")
    theirs = sentence_transformer(tmp_path / "ours")
    for prompt in PROMPTS:
        vectors = embed(model, prompt=prompt)
        np.testing.assert_allclose(theirs.encode(ITEMS, prompt_name=prompt), vectors, atol=TOLERANCE)
        assert np.abs(vectors - embed(model)).max() > 0.01


def test_a_processors_own_chat_template_counts(tiny: Write, tmp_path: Path) -> None:
    """Older processors keep it in a file of their own, beside another one of the tokenizer's."""
    folder = tmp_path / "older"
    shutil.copytree(tiny("embed"), folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template.replace("Represent", "Describe")}))
    model = RetrievalModel.load(folder)
    assert "Describe the user's input." in model.contract.rendered[0]
    vectors = embed(model)
    np.testing.assert_allclose(
        bare_sentence_transformer(folder).encode(ITEMS, normalize_embeddings=True), vectors, atol=TOLERANCE
    )
    model.save(tmp_path / "ours")
    np.testing.assert_allclose(sentence_transformer(tmp_path / "ours").encode(ITEMS), vectors, atol=TOLERANCE)


def test_what_published_checkpoints_say_besides(tiny: Write, tmp_path: Path) -> None:
    """Videos, which are not served, and the form of messages in its older place."""
    RetrievalModel.load(tiny("embed")).save(tmp_path / "ours")
    file = tmp_path / "ours" / "sentence_bert_config.json"
    config = json.loads(file.read_text())
    modalities = config["modality_config"]
    modalities |= {"video": modalities["image"]}
    for name in ("structured", "auto", None):
        modalities["message"].pop("format", None)
        file.write_text(json.dumps({**config, "message_format": name}))
        model = RetrievalModel.load(tmp_path / "ours")
        np.testing.assert_array_equal(embed(model), embed(RetrievalModel.load(tiny("embed"))))
        assert model.layout.message_format == "structured"
    # Messages are what images need a place in.
    file.write_text(json.dumps({**config, "message_format": "flat"}))
    with pytest.raises(CheckpointError, match="expected the same text for every image"):
        RetrievalModel.load(tmp_path / "ours")
    del modalities["text"]
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="expected text among the modalities, got image, message, video"):
        RetrievalModel.load(tmp_path / "ours")


def test_nothing_is_kept_for_generation(tiny: Write) -> None:
    model = RetrievalModel.load(tiny("embed"))
    tensors = {name: torch.from_numpy(ids) for name, ids in model.preprocessor.collate([encoded(model, "a")]).items()}
    with torch.no_grad():
        assert model.backbone(**tensors).past_key_values is None


# ---------------------------------------------------------------- the models before


def write_tiny_predecessor(folder: Path, name: str) -> None:
    """Write Qwen2-VL or Qwen2.5-VL with the tokenizer and the processor files of a tiny Qwen3-VL."""
    import transformers

    TINY["write_tiny_qwen3_vl"](folder)
    given = json.loads((folder / "config.json").read_text())
    text = {
        "vocab_size": given["text_config"]["vocab_size"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 1, 1]},
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    sizes = {"embed_dim": 32, "mlp_ratio": 2} if name == "Qwen2VL" else {"intermediate_size": 64, "window_size": 64}
    width = {"hidden_size": 32, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    vision = {"depth": 2, "num_heads": 2, "patch_size": 16, **width, **sizes}
    ids = {key: value for key, value in given.items() if key.endswith("_token_id") and "pad" not in key}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **ids)
    torch.manual_seed(0)
    getattr(transformers, f"{name}ForConditionalGeneration")(config).save_pretrained(folder)
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        described = (folder / file).read_text().replace("Qwen3VLProcessor", f"{name}Processor")
        (folder / file).write_text(described)


@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen2_5_VL"])
def test_the_models_before(tmp_path: Path, name: str) -> None:
    write_tiny_predecessor(tmp_path / "bare", name)
    model = RetrievalModel.load(tmp_path / "bare")
    vectors = embed(model)
    assert apart(vectors)
    model.save(tmp_path / "ours")
    np.testing.assert_allclose(sentence_transformer(tmp_path / "ours").encode(ITEMS), vectors, atol=TOLERANCE)
    np.testing.assert_allclose(np.concatenate([embed(model, [item]) for item in ITEMS]), vectors, atol=TOLERANCE)
    judge = RetrievalModel.load(tmp_path / "bare", task="rerank")
    judge.save(tmp_path / "judge")
    np.testing.assert_allclose(cross_encoder(tmp_path / "judge").predict(PAIRS), score(judge), atol=TOLERANCE)


# ---------------------------------------------------------------- rerankers, both ways with sentence-transformers


def their_reranker(folder: Path) -> Any:
    """sentence-transformers opens no bare model of images as a reranker: its modules are given."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore

    with TINY["images_only"]():
        transformer = Transformer(str(folder), transformer_task="any-to-any")
    ids = [transformer.tokenizer.convert_tokens_to_ids(answer) for answer in ("yes", "no")]
    return CrossEncoder(modules=[transformer, LogitScore(*ids)], device="cpu")


def test_a_reranker_scores_as_theirs(tiny: Write, tmp_path: Path) -> None:
    model = RetrievalModel.load(tiny("rerank"), task="rerank")
    assert model.contract.padding_side == "left"
    scores = score(model)
    assert np.ptp(scores) > 0.1
    theirs = their_reranker(tiny("rerank"))
    np.testing.assert_allclose(theirs.predict(PAIRS, activation_fn=torch.nn.Sigmoid()), scores, atol=TOLERANCE)

    model.save(tmp_path / "ours")
    theirs = cross_encoder(tmp_path / "ours")
    np.testing.assert_allclose(theirs.predict(PAIRS), scores, atol=TOLERANCE)
    config = json.loads((tmp_path / "ours" / "sentence_bert_config.json").read_text())
    assert config["transformer_task"] == "any-to-any"
    theirs.save(str(tmp_path / "theirs"), create_model_card=False)
    np.testing.assert_allclose(score(RetrievalModel.load(tmp_path / "theirs")), scores, atol=TOLERANCE)


def test_a_rerankers_default_prompt_is_its_instruction(tiny: Write, tmp_path: Path) -> None:
    model = RetrievalModel.load(tiny("rerank"), task="rerank")
    plain = score(model)
    model.configure(prompts={"judge": "Find the page of the answer."}, default_prompt="judge")
    assert "<Instruct>: Find the page of the answer.<Query>:" in model.contract.rendered[0]
    assert np.abs(score(model) - plain).max() > 1e-3
    model.save(tmp_path / "ours")
    np.testing.assert_allclose(cross_encoder(tmp_path / "ours").predict(PAIRS), score(model), atol=TOLERANCE)


def test_a_model_that_is_no_reranker_is_given_the_published_template(tiny: Write, tmp_path: Path) -> None:
    """Its own template writes turns of the roles query and document, which it has never seen."""
    model = RetrievalModel.load(tiny("embed"), task="rerank")
    judge = (
        "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".'
    )
    instruction = "Given a search query, retrieve relevant candidates that answer the query."
    assert model.contract.rendered == (
        f"<|im_start|>system\n{judge}<|im_end|>\n<|im_start|>user\n<Instruct>: {instruction}<Query>:",
        "\n<Document>:",
        "<|im_end|>\n<|im_start|>assistant\n",
    )
    model.save(tmp_path / "ours")
    np.testing.assert_allclose(cross_encoder(tmp_path / "ours").predict(PAIRS), score(model), atol=TOLERANCE)
    # As an embedder it is what it was before.
    assert "Represent" in RetrievalModel.load(tiny("embed")).contract.rendered[0]


# ---------------------------------------------------------------- rows and batches


@pytest.mark.parametrize("task", ["embed", "rerank"])
def test_a_head_of_its_own(tiny: Write, tmp_path: Path, task: str) -> None:
    """The larger models have one beside the table of embeddings: an embedder leaves it out, a reranker scores by it."""
    import transformers

    folder = tmp_path / "untied"
    shutil.copytree(tiny(task), folder)
    torch.manual_seed(0)
    whole = transformers.Qwen3VLForConditionalGeneration.from_pretrained(tiny(task))
    whole.lm_head.weight = torch.nn.Parameter(torch.randn_like(whole.lm_head.weight))
    whole.config.tie_word_embeddings = whole.config.text_config.tie_word_embeddings = False
    whole.save_pretrained(folder)
    model, tied = (RetrievalModel.load(path, task=task) for path in (folder, tiny(task)))  # type: ignore[arg-type]
    if task == "embed":
        np.testing.assert_array_equal(embed(model), embed(tied))
    else:
        assert np.abs(score(model) - score(tied)).max() > 0.1
        model.save(tmp_path / "ours")
        np.testing.assert_allclose(cross_encoder(tmp_path / "ours").predict(PAIRS), score(model), atol=TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_item_alone_is_the_item_in_any_batch(tiny: Write, tmp_path: Path, side: str) -> None:
    folder = tmp_path / side
    shutil.copytree(tiny("embed"), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"padding_side": side}))
    model = RetrievalModel.load(folder)
    assert model.contract.padding_side == side
    alone = np.concatenate([embed(model, [item]) for item in ITEMS])
    order = np.random.default_rng(0).permutation(len(ITEMS))
    together = np.empty_like(alone)
    budget = Budget(max_batch_tokens=1 << 20, max_batch_items=64)
    embedder = Embedder(model.preprocessor, model.engine(), budget=budget)
    together[order] = embedder.embed([ITEMS[index] for index in order])
    np.testing.assert_allclose(together, alone, atol=TOLERANCE)
    np.testing.assert_allclose(alone, embed(RetrievalModel.load(tiny("embed"))), atol=TOLERANCE)


@pytest.mark.parametrize("task", ["embed", "rerank"])
def test_a_long_text_loses_words_and_nothing_of_images_and_template(tiny: Write, task: str) -> None:
    model = RetrievalModel.load(tiny(task), task=task)  # type: ignore[arg-type]
    long = {"image": [A, B], "text": "the sea in the north " * 60}
    item = ("the query of the page " * 40, long) if task == "rerank" else long
    special = len(encoded(model, ("", {"image": [A, B]}) if task == "rerank" else {"image": [A, B]}).ids)
    model.configure(max_tokens=special + 12)
    row = encoded(model, item)
    assert len(row.ids) == special + 12
    text = model.tokenizer.decode(row.ids)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n" if task == "rerank" else "<|im_end|>\n")
    visual = [model.preprocessor.visual_tokens(image) for image in row.images]
    places = [f"<|vision_start|>{IMAGE_TOKEN * count}<|vision_end|>" for count in visual]
    assert f"{''.join(places)}the s" in text
    if task == "rerank":
        assert "<Query>:the q" in text
    # It runs, and what was cut off does not count.
    run, others = (score, [(item[0], {**long, "text": long["text"] + "x"})]) if task == "rerank" else (embed, [long])
    np.testing.assert_allclose(run(model, [item]), run(model, others), atol=TOLERANCE)


def test_what_does_not_fit_is_one_error_an_item(tiny: Write) -> None:
    model = RetrievalModel.load(tiny("embed"))
    template = len(encoded(model, "").ids)
    visual = model.preprocessor.visual_tokens(encoded(model, A).images[0])
    model.configure(max_tokens=template + 2 + visual - 1)
    assert refusal(model, {"image": A, "text": "the"}) == (
        f"its images take {visual} tokens and the template {template + 2}; "
        f"expected at most {template + 2 + visual - 1} together (max_tokens)"
    )
    model.configure(max_tokens=template + 2 + visual)
    assert len(encoded(model, {"image": A, "text": "the"}).ids) == template + 2 + visual
    # Its neighbours are embedded.
    found = model.preprocessor.encode(["the", {"image": [A, B, C]}, A])
    assert [type(row) for row in found] == [Encoded, ItemError, Encoded]
    assert isinstance(found[1], ItemError)
    assert found[1].index == 1


def test_a_text_that_spells_an_images_token_is_refused(tiny: Write) -> None:
    model = RetrievalModel.load(tiny("embed"))
    for item in (f"see {IMAGE_TOKEN} here", {"image": A, "text": IMAGE_TOKEN}):
        assert refusal(model, item) == f"its text holds {IMAGE_TOKEN}, which stands for an image; expected none"
    reranker = RetrievalModel.load(tiny("rerank"), task="rerank")
    assert "which stands for an image" in refusal(reranker, (A, IMAGE_TOKEN))


# ---------------------------------------------------------------- the image processor's settings


def test_settings_of_the_image_processor_are_part_of_the_contract_and_saved(tiny: Write, tmp_path: Path) -> None:
    plain = RetrievalModel.load(tiny("embed"))
    model = RetrievalModel.load(tiny("embed"), processor_kwargs={"max_pixels": 4 * 32 * 32, "min_pixels": 32 * 32 * 2})
    assert (plain.contract.images.max_pixels, model.contract.images.max_pixels) == (12288, 4096)  # type: ignore[union-attr]
    large = [picture(100, 100)]
    assert len(encoded(model, large[0]).ids) < len(encoded(plain, large[0]).ids)
    vectors = embed(model, large)
    assert np.abs(vectors - embed(plain, large)).max() > 1e-3
    model.save(tmp_path / "ours")
    theirs = sentence_transformer(tmp_path / "ours")
    np.testing.assert_allclose(theirs.encode(large), vectors, atol=TOLERANCE)
    theirs.save(str(tmp_path / "theirs"), create_model_card=False)
    for name in ("ours", "theirs"):
        again = RetrievalModel.load(tmp_path / name)
        assert again.contract.images == model.contract.images
    video = json.loads((tmp_path / "ours" / "video_preprocessor_config.json").read_text())
    assert video == json.loads((tiny("embed") / "video_preprocessor_config.json").read_text())


def test_unknown_settings_are_refused(tiny: Write, tiny_checkpoint: Write) -> None:
    with pytest.raises(UsageError, match=r"has no setting 'max_pixel' \(did you mean 'max_pixels'\?"):
        RetrievalModel.load(tiny("embed"), processor_kwargs={"max_pixel": 4096})
    with pytest.raises(UsageError, match=r"^processor_kwargs \(max_pixels\): .* takes no images$"):
        RetrievalModel.load(tiny_checkpoint("bert"), processor_kwargs={"max_pixels": 4096})


# ---------------------------------------------------------------- checkpoints that cannot be used


def broken(tiny: Write, tmp_path: Path, files: dict[str, Any], task: str = "embed") -> Path:
    folder = tmp_path / "broken"
    shutil.copytree(tiny(task), folder)
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
        elif isinstance(content, dict):
            (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | content))
        else:
            (folder / name).write_text(content)
    return folder


def test_without_an_image_processor_it_is_a_model_of_texts(tiny: Write, tmp_path: Path) -> None:
    """A bare folder says by its files what it takes; one with modules says it in words, and has to have them."""
    model = RetrievalModel.load(tiny("embed"))
    model.save(tmp_path / "ours")
    (tmp_path / "ours" / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="ours: no image processor that transformers can load: "):
        RetrievalModel.load(tmp_path / "ours")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"preprocessor_config.json": {"do_pad": True}}, "do_pad: padded images are not supported"),
        ({"preprocessor_config.json": {"image_processor_type": "Siglip2ImageProcessor"}}, "a way of its own"),
        ({"chat_template.jinja": "{{ messages[0].role }}"}, "chat_template: expected the messages of the roles"),
        (
            {"chat_template.jinja": "{{ messages | map(attribute='content') | join }}"},
            "expected the same text for every image, before the text of its message",
        ),
    ],
)
def test_what_is_not_supported_is_said(tiny: Write, tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as found:
        RetrievalModel.load(broken(tiny, tmp_path, files))
    assert "\n" not in str(found.value)


def test_a_backbone_of_another_kind_is_refused(tmp_path: Path) -> None:
    """Its files say that it takes images; how is not known."""
    import transformers

    TINY["write_tiny_qwen3_vl"](tmp_path)
    config = transformers.LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 300,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        },
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="llava takes images in a way that is not supported; expected Qwen3-VL"):
        RetrievalModel.load(tmp_path)


def test_a_model_of_texts_takes_no_image(tiny_checkpoint: Write) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert"))
    assert refusal(model, A) == "expected a text (str), got Image; this model takes no images"
    assert refusal(model, {"image": "page.png"}) == "expected a text (str), got dict; this model takes no images"
    reranker = RetrievalModel.load(tiny_checkpoint("bert", "rerank"))
    assert refusal(reranker, ("q", A)) == "document: expected a text (str), got Image; this model takes no images"
