"""Qwen3-VL's two graphs against transformers: on texts with images, and with each mistake made on purpose."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from rtx.export import visual
from rtx.export.fp16 import to_fp16
from rtx.export.fused import fuse
from rtx.export.gate import limits
from rtx.export.graph import is_norm, is_scoring, module_of
from rtx.export.int8 import quantize_int8
from rtx.export.visual import export_text, export_vision, visual_rules
from rtx.export.visual_modules import VisionTower
from rtx.runtime.backends import visual as visual_engine
from rtx.runtime.backends.visual import VisualEngine
from rtx.runtime.errors import ExportError
from rtx.runtime.golden import deviation
from rtx.runtime.visual_tokens import VisualTokens
from rtx.trainer.layout import LogitScoreConfig
from rtx.trainer.pooling import Dense, l2_normalize, pool

# Three exports, of some ten seconds each, two of which other tests take as well.
pytestmark = pytest.mark.slow

TINY = runpy.run_path(str(Path(__file__).parents[1] / "vision_models.py"))
TOLERANCE = 1e-5
# One vision batch for all images of a test, so that the smaller ones are padded.
TOGETHER = 1 << 20

FOLDERS = {"embed": "embedder", "rerank": "reranker"}
KINDS = {"embed": "qwen3-vl", "rerank": "qwen3-vl-reranker"}
# Rows of a batch: a number is so many tokens of text; an image has rows and columns of patches, and a seed.
SMALL, WIDE, HIGH, LARGE, OTHER = (2, 2, 1), (4, 10, 2), (8, 2, 3), (6, 8, 4), (4, 10, 5)
MIXED = [[3, WIDE, 2], [2, SMALL, 1, LARGE, 3], [5], [1, OTHER, 2, HIGH, 1, WIDE, 4]]
BATCHES = {
    "images and texts": MIXED,
    "one image": [[4, LARGE, 3]],
    "several images": [[2, HIGH, 1, WIDE, 1, SMALL, 1, OTHER, 2]],
    "texts": [[4], [11], [1]],
    "one token": [[1]],
    "nothing but an image": [[SMALL], [LARGE], [WIDE, 1]],
    "an image twice": [[1, WIDE, 1, WIDE, 2], [2, WIDE, 1]],
}


class Vectors(nn.Module):
    """What follows an embedder's hidden states: with weights, as some checkpoints have."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.dense = Dense(32, 24, bias=True, activation=nn.Tanh(), use_residual=False)

    def forward(self, hidden, attention_mask):
        return l2_normalize(self.dense(pool(hidden, attention_mask, ("lasttoken",))))


def answers(tokenizer):
    true, false = tokenizer.convert_tokens_to_ids(["yes", "no"])
    return LogitScoreConfig(true_token_id=true, false_token_id=false)


@pytest.fixture(scope="module")
def tiny(once, image_checkpoint, image_graphs):
    """The embedder and the reranker, with the same weights, and their graphs."""

    def fill(folder):
        for task, name in FOLDERS.items():
            shutil.copytree(image_checkpoint(KINDS[task]), folder / name)
        model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(folder / "reranker")
        ir.save(image_graphs(KINDS["embed"]).image, folder / "vision.onnx")
        ir.save(export_text(model.model, Vectors(), output="sentence_embedding"), folder / "embed.onnx")
        ir.save(image_graphs(KINDS["rerank"]).tokens, folder / "rerank.onnx")

    folder = once("qwen3-vl", fill)
    reranker = transformers.Qwen3VLForConditionalGeneration.from_pretrained(folder / "reranker").eval()
    return SimpleNamespace(
        folder=folder,
        embedder=transformers.AutoModel.from_pretrained(folder / "embedder").eval(),
        reranker=reranker,
        answers=answers(transformers.AutoTokenizer.from_pretrained(folder / "reranker")),
        rules=visual_rules(reranker.config),
    )


def engine(tiny, task="embed", *, vision=None, text=None, **options):
    """The graphs as they are, or variants of them, once these are proven to be valid ONNX."""
    graphs = [
        ir.to_proto(graph if graph is not None else ir.load(tiny.folder / f"{name}.onnx"))
        for name, graph in (("vision", vision), (task, text))
    ]
    for graph in graphs:
        if all(node.domain == "" for node in graph.graph.node):
            onnx.checker.check_model(graph, full_check=True)
    output = "sentence_embedding" if task == "embed" else "scores"
    options = {"max_batch_patches": TOGETHER, "threads": 1, **options}
    return VisualEngine(*(graph.SerializeToString() for graph in graphs), rules=tiny.rules, output=output, **options)


def batch_of(rows, rules, side="right"):
    """Random tokens and pixels; those of a row do not depend on the other rows."""
    ids, images = [], []
    for row in rows:
        random = np.random.default_rng(len(row))
        tokens = []
        for part in row:
            if isinstance(part, int):
                tokens += random.integers(0, 200, part).tolist()
            else:
                tokens += [rules.image_token_id] * (part[0] * part[1] // rules.merge_size**2)
                images.append(part)
        ids.append(tokens)
    shape = len(ids), max(map(len, ids))
    batch = {name: np.zeros(shape, dtype=np.int64) for name in ("input_ids", "attention_mask")}
    for number, tokens in enumerate(ids):
        place = slice(len(tokens)) if side == "right" else slice(shape[1] - len(tokens), None)
        batch["input_ids"][number, place], batch["attention_mask"][number, place] = tokens, 1
    if images:
        pixels = [np.random.default_rng(seed).normal(size=(h * w, rules.patch_width)) for h, w, seed in images]
        batch["pixel_values"] = np.concatenate(pixels).astype(np.float32)
        batch["image_grid_thw"] = np.array([(1, height, width) for height, width, _ in images])
        batch["image_digests"] = np.array([(seed, 0) for _, _, seed in images], dtype=np.uint64)
    return batch


@torch.no_grad()
def reference(tiny, batch, task="embed"):
    """transformers' own forward pass."""
    inputs = {name: torch.from_numpy(array) for name, array in batch.items() if name != "image_digests"}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if "image_grid_thw" in batch:
        inputs["mm_token_type_ids"] = (ids == tiny.rules.image_token_id).int()
    if task == "embed":
        return Vectors().eval()(tiny.embedder(**inputs).last_hidden_state, mask).numpy()
    logits = tiny.reranker(**inputs).logits
    last = (mask * torch.arange(mask.shape[1])).argmax(dim=1)
    yes, no = (
        logits[torch.arange(len(last)), last, token]
        for token in (tiny.answers.true_token_id, tiny.answers.false_token_id)
    )
    return torch.sigmoid(yes - no).numpy()


def difference(found, expected):
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    return float(np.abs(found - expected).max())


@pytest.mark.parametrize("task", ["embed", "rerank"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", BATCHES)
def test_graphs_agree_with_transformers(tiny, name, side, task):
    batch = batch_of(BATCHES[name], tiny.rules, side)
    expected = reference(tiny, batch, task)
    assert difference(engine(tiny, task).run(batch), expected) < TOLERANCE
    # The tiny models tell items apart, so that agreement means something.
    assert len(expected) == 1 or np.abs(expected[1:] - expected[0]).max() > 100 * TOLERANCE


@pytest.mark.parametrize("task", ["embed", "rerank"])
def test_what_transformers_makes_of_messages_and_images(tiny, task):
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)) for size in ((70, 41, 3), (33, 130, 3))]
    with TINY["images_only"]():
        processor = transformers.AutoProcessor.from_pretrained(tiny.folder / FOLDERS[task])
    role = "user" if task == "embed" else "document"
    contents = [[{"type": "image"}, {"type": "text", "text": "the file"}], [{"type": "text", "text": "is it?"}]]
    contents.append([{"type": "text", "text": "this:"}, {"type": "image"}])
    texts = [processor.apply_chat_template([{"role": role, "content": content}]) for content in contents]
    batch = dict(processor(text=texts, images=images, padding=True, return_tensors="np"))
    assert batch["image_grid_thw"].tolist() == [[1, 4, 2], [1, 2, 8]]
    assert (batch["attention_mask"][1, 0] == 0) == (task == "rerank"), "padding on the left"
    del batch["mm_token_type_ids"]
    assert difference(engine(tiny, task).run(batch), reference(tiny, batch, task)) < TOLERANCE


@pytest.mark.parametrize("side", ["right", "left"])
def test_an_item_alone_is_the_item_in_a_batch(tiny, side):
    whole = engine(tiny, max_batch_patches=TOGETHER).run(batch_of(MIXED, tiny.rules, side))
    for options in ({"cache_bytes": 0}, {}):
        one = engine(tiny, max_batch_patches=1, **options)
        for row, expected in zip(MIXED, whole, strict=True):
            assert difference(one.run(batch_of([row], tiny.rules, side))[0], expected) < TOLERANCE


def test_the_vision_graph_agrees_with_transformers(tiny):
    batch = batch_of(MIXED, tiny.rules)
    with torch.no_grad():
        grids = torch.from_numpy(batch["image_grid_thw"])
        expected = tiny.embedder.get_image_features(torch.from_numpy(batch["pixel_values"]), grids, return_dict=True)
    found = visual_engine._tokens_of(engine(tiny)._vision, batch["pixel_values"], batch["image_grid_thw"], tiny.rules)
    for image, tokens in enumerate(found):
        layers = [expected.pooler_output[image], *(layer[image] for layer in expected.deepstack_features)]
        assert difference(tokens, torch.stack(layers).numpy()) < 1e-4, image  # numbers of up to 10


def flat(position_ids):
    return np.broadcast_to(np.arange(position_ids.shape[2]), position_ids.shape)


def shifted(visual_index):
    return np.where(visual_index > 0, visual_index % max(visual_index.max(), 1) + 1, 0)


def first_corner(weights):
    return np.broadcast_to(np.float32([1, 0, 0, 0]), weights.shape)


# By name: which part of the way to a vector it spoils, what of it, and how.
MISTAKES = {
    "none": None,
    "no patch mask": ("vision_inputs", "patch_mask", np.ones_like),
    "no interpolation": ("vision_inputs", "interp_weights", first_corner),
    "rows and columns of patches swapped": ("vision_inputs", "pos_hw", lambda places: places[..., ::-1]),
    "positions in one dimension": ("text_inputs", "position_ids", flat),
    "height and width of tokens swapped": ("text_inputs", "position_ids", lambda positions: positions[[0, 2, 1]]),
    "visual tokens off by one": ("text_inputs", "visual_index", shifted),
    "no deepstack": ("_tokens_of", slice(1, None), np.zeros_like),
    "deepstack layers exchanged": ("_tokens_of", slice(1, None), lambda layers: layers[::-1].copy()),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_comparison_with_transformers_sees_each_mistake(tiny, monkeypatch, name):
    if MISTAKES[name] is not None:
        part, key, spoil = MISTAKES[name]
        original = getattr(visual_engine, part)

        def spoiled(*arguments, **options):
            result = original(*arguments, **options)
            for values in result if part == "_tokens_of" else [result]:
                values[key] = spoil(values[key])
            return result

        monkeypatch.setattr(visual_engine, part, spoiled)
    batch = batch_of(MIXED, tiny.rules)
    found = difference(engine(tiny).run(batch), reference(tiny, batch))
    assert found < TOLERANCE if name == "none" else found > 50 * TOLERANCE
    # A text is right whatever is done to images: texts alone see none of this.
    texts = batch_of([[4], [9]], tiny.rules)
    assert difference(engine(tiny).run(texts), reference(tiny, texts)) < TOLERANCE


def deviations(tiny, task, precision, **graphs):
    running = engine(tiny, task, **graphs)
    allowed = limits(precision, task, 1.0).parity
    for rows in BATCHES.values():
        batch = batch_of(rows, tiny.rules, "left" if task == "rerank" else "right")
        found = deviation(running.run(batch), reference(tiny, batch, task))
        assert found.within(allowed), found


def load(tiny, name, change):
    graph = ir.load(tiny.folder / f"{name}.onnx")
    change(graph)
    return graph


@pytest.mark.parametrize("task", ["embed", "rerank"])
def test_half_precision_is_near_to_transformers(tiny, task):
    vision, text = load(tiny, "vision", to_fp16), load(tiny, task, to_fp16)
    deviations(tiny, task, "fp16", vision=vision, text=text)
    floats = {ir.DataType.FLOAT, ir.DataType.FLOAT16}
    for graph in (vision, text):
        values = [*graph.graph.inputs, *graph.graph.outputs]
        assert all(value.dtype == ir.DataType.FLOAT for value in values if value.dtype in floats)
        halves = {node.op_type for node in graph.graph if node.outputs[0].dtype == ir.DataType.FLOAT16}
        assert {"MatMul", "Add", "Gather", "Transpose"} <= halves
        assert not {"Softmax", "Cos", "Sin", "ReduceMean", "LayerNormalization"} & halves


@pytest.mark.parametrize("task", ["embed", "rerank"])
def test_fused_graphs_agree_with_transformers(tiny, task):
    vision, text = load(tiny, "vision", fuse), load(tiny, task, fuse)
    assert {"MultiHeadAttention", "SkipLayerNormalization"} <= {node.op_type for node in vision.graph}
    assert {"MultiHeadAttention", "SkipSimplifiedLayerNormalization"} <= {node.op_type for node in text.graph}
    deviations(tiny, task, "fp32", vision=vision, text=text)


@pytest.mark.parametrize("task", ["embed", "rerank"])
def test_int8_text_is_near_to_transformers(tiny, task):
    deviations(tiny, task, "int8", text=load(tiny, task, quantize_int8))


def test_int8_vision_is_near_to_transformers(tiny):
    deviations(tiny, "embed", "int8", vision=load(tiny, "vision", quantize_int8))


@pytest.mark.parametrize(("file", "model"), [("embed", "embedder"), ("rerank", "reranker"), ("vision", "embedder")])
def test_nodes_know_the_modules_they_come_from(tiny, file, model):
    """Variants keep norms and scoring in float32 by these names."""
    graph = ir.load(tiny.folder / f"{file}.onnx").graph
    inside = {module_of(node) for node in graph if not is_scoring(node)}
    known = {f"backbone.{name}".rstrip(".") for name, _ in getattr(tiny, model).named_modules()}
    assert inside <= known
    products = [node for node in graph if node.op_type in ("MatMul", "Gemm")]
    scored = [node for node in products if is_scoring(node)]
    assert len(scored) == (1 if file == "embed" else 0), "Dense alone"
    norms = {module_of(node) for node in graph if is_norm(node)}
    expected = {name for name in known if "norm" in name.rpartition(".")[2]}
    assert norms == {name for name in expected if ("visual" in name) == (file == "vision")}


def test_exporting_leaves_the_model_as_it_was(tiny, monkeypatch):
    model = transformers.AutoModel.from_pretrained(tiny.folder / "embedder", attn_implementation="sdpa").train()
    seen = []

    def fail(module, *_, **__):
        language_model = model.language_model
        seen.append((module.training, model.training, language_model.config._attn_implementation))
        try:
            raise ValueError("no such operator\nand more")
        except ValueError as cause:
            raise torch.onnx.errors.OnnxExporterError("advice") from cause

    monkeypatch.setattr(torch.onnx, "export", fail)
    for export in (export_vision, lambda model: export_text(model, Vectors(), output="sentence_embedding")):
        with pytest.raises(ExportError, match=r"^torch\.onnx cannot export qwen3_vl: no such operator$"):
            export(model)
    assert seen == [(False, False, "eager")] * 2
    assert model.training
    assert model.language_model.training
    assert model.language_model.config._attn_implementation == "sdpa"


def test_weights_are_shared(tiny):
    tower = VisionTower(tiny.embedder.visual)
    own = {parameter.data_ptr() for parameter in tower.parameters()}
    assert own <= {parameter.data_ptr() for parameter in tiny.embedder.visual.parameters()}
    assert len(own) == len(list(tiny.embedder.visual.parameters()))


def test_rules_are_read_from_the_configuration(tiny):
    assert tiny.rules == VisualTokens(
        image_token_id=tiny.embedder.config.image_token_id,
        merge_size=2,
        patch_width=3 * 2 * 16 * 16,
        position_grid=5,
        hidden=32,
        deepstack_layers=2,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"^images among the tokens of a text: no graph can be made of a qwen2_5_vl model; expected qwen3_vl$"),
        (
            {"vision_config": {"num_position_embeddings": 24}},
            r"^num_position_embeddings: expected a square number, got 24",
        ),
        (
            {"text_config": {"rope_parameters": {"rope_type": "dynamic"}}},
            r"^rope_type: dynamic changes with the length",
        ),
        (
            {"vision_config": {"deepstack_visual_indexes": [0, 1, 2, 3]}},
            r"deepstack_visual_indexes: expected 1 to 3 .*, got 4",
        ),
    ],
)
def test_what_no_graph_can_be_made_of_says_why(tiny, change, message):
    config = (
        transformers.Qwen2_5_VLConfig()
        if not change
        else tiny.embedder.config.__class__(**tiny.embedder.config.to_dict())
    )
    for part, values in change.items():
        for key, value in values.items():
            setattr(getattr(config, part), key, value)
    for export in (export_vision, lambda model: export_text(model, Vectors(), output="sentence_embedding")):
        with pytest.raises(ExportError, match=message):
            export(SimpleNamespace(config=config))
    assert visual.ARCHITECTURE == "qwen3_vl"
