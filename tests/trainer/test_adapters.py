"""LoRA: what it adapts and trains, that the merged model is the same model, and that a run goes on to the bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from rtx.runtime.errors import CheckpointError, UsageError
from rtx.trainer.adapters import (
    ADAPTER_STATE_NAME,
    adapter_state,
    add_lora,
    has_adapters,
    load_adapter_state,
    merge,
    merged,
    save_adapter,
)
from rtx.trainer.model import RetrievalModel

ARCHITECTURES = ("bert", "distilbert", "roberta", "xlm-roberta", "mpnet", "modernbert", "deberta-v2", "qwen3")
TEXTS = ["how to list the files of a folder", "a query", "what is the code for in the text with"]
# The same sum in another order: a few units in the last place of each layer, which in float32 is some 1e-7 of numbers
# near 1, and of the larger ones inside of Qwen3 more. In float64 nothing of that hides a mistake.
TOLERANCE = 1e-6
TOLERANCE_FLOAT64 = 1e-13

Tiny = Callable[..., Path]


def batch_of(model: RetrievalModel, texts: list[str] = TEXTS) -> dict[str, Tensor]:
    pre = model.preprocessor
    encoded: list[Any] = (
        pre.encode(texts) if model.task == "embed" else pre.encode_pairs([(text, "the code") for text in texts])
    )
    return {name: torch.from_numpy(array) for name, array in pre.collate(encoded).items()}


def adapted(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> RetrievalModel:
    """With adapters that do something: as peft makes them, they add zero."""
    torch.manual_seed(seed)
    model = RetrievalModel.load(folder, dtype=dtype)
    add_lora(model, **{"rank": 4, "alpha": 8.0, **options})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def trained(model: RetrievalModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def train_a_step(model: RetrievalModel, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    target = torch.randn(len(TEXTS), model.full_dimension)
    loss = (model.train()(batch_of(model)) - target).square().sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("task", ["embed", "rerank"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_merged_model_is_the_model(tiny_checkpoint: Tiny, tmp_path: Path, architecture: str, task: str) -> None:
    source, dtype = tiny_checkpoint(architecture, task), torch.float64
    model = adapted(source, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = batch_of(model)
    with torch.no_grad():
        plain, expected = RetrievalModel.load(source, dtype=dtype)(batch), model(batch)
    assert (expected - plain).abs().max() > 1e-2  # else the adapters do nothing
    model.save(tmp_path / "saved")
    saved = RetrievalModel.load(tmp_path / "saved", dtype=dtype)
    # A reranker's logits are made float32.
    tolerance = TOLERANCE_FLOAT64 if expected.dtype == dtype else TOLERANCE
    with torch.no_grad():
        torch.testing.assert_close(saved(batch), expected, rtol=0, atol=tolerance)
        assert torch.equal(model(batch), expected)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert saved.state_dict().keys() == merged(model).keys() == RetrievalModel.load(source).state_dict().keys()


def test_in_float32_the_merged_model_agrees_to_1e6(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    model = adapted(tiny_checkpoint("bert"))
    model.save(tmp_path / "saved")
    with torch.no_grad():
        expected, found = model(batch_of(model)), RetrievalModel.load(tmp_path / "saved")(batch_of(model))
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("task", ["embed", "rerank"])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert", "deberta-v2", "qwen3"])
def test_other_tools_open_the_adapter(tiny_checkpoint: Tiny, tmp_path: Path, architecture: str, task: str) -> None:
    import peft
    from sentence_transformers import CrossEncoder, SentenceTransformer

    source = tiny_checkpoint(architecture, task)
    model = adapted(source)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(source)
    assert not (tmp_path / "model.safetensors").exists()
    with torch.no_grad():
        expected = model(batch_of(model))
    if task == "embed":
        loader, found = transformers.AutoModel, SentenceTransformer(str(tmp_path)).encode(TEXTS, convert_to_tensor=True)
    else:
        loader = transformers.AutoModelForSequenceClassification
        found = CrossEncoder(str(tmp_path)).predict(
            [(text, "the code") for text in TEXTS], activation_fn=torch.nn.Identity(), convert_to_tensor=True
        )
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    again = RetrievalModel.load(source)
    again.backbone = peft.PeftModel.from_pretrained(loader.from_pretrained(source), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(batch_of(model)), expected, rtol=0, atol=TOLERANCE)


def test_only_adapters_and_heads_are_trained(tiny_checkpoint: Tiny) -> None:
    embedder = adapted(tiny_checkpoint("bert", dense=(16,)))
    assert {name.rpartition(".")[0] for name in trained(embedder) if "lora_" not in name} == {"head.0.linear"}
    assert sum("lora_A" in name for name in trained(embedder)) == 2 * 6
    torch.manual_seed(0)
    new = RetrievalModel.load(tiny_checkpoint("roberta", bare=True), task="rerank")
    add_lora(new, rank=2, alpha=2)
    heads = {name.removeprefix("backbone.") for name in trained(new) if "lora_" not in name}
    assert heads == {f"classifier.{layer}.{part}" for layer in ("dense", "out_proj") for part in ("weight", "bias")}
    torch.manual_seed(0)
    named = RetrievalModel.load(tiny_checkpoint("roberta", bare=True), task="rerank")
    add_lora(named, rank=2, alpha=2, targets=("dense",))
    for model in (new, named):
        assert not any("lora" in name for name in model.state_dict() if "classifier" in name)


def test_the_classifier_of_a_new_reranker_and_bert_s_pooler_go_with_the_adapter(
    tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = RetrievalModel.load(tiny_checkpoint("bert", bare=True), task="rerank")
    add_lora(model, rank=2, alpha=2)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier", "pooler"]
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(weights["base_model.model.classifier.weight"], model.backbone.classifier.weight)
    assert "base_model.model.bert.pooler.dense.weight" in weights


def test_weights_of_a_dense_head_lie_beside_the_adapter(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    model = adapted(tiny_checkpoint("bert", dense=(16,)))
    save_adapter(model, tmp_path)
    assert torch.equal(
        load_file(tmp_path / "2_Dense" / "model.safetensors")["linear.weight"], model.head[0].linear.weight
    )


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("query", "value"), {"query", "value"}),
        (("attention.output.dense",), {"attention.output.dense"}),
        (("encoder.layer.1.*.dense",), {"attention.output.dense", "intermediate.dense", "output.dense"}),
    ],
)
def test_targets_are_ends_of_names_or_patterns(
    tiny_checkpoint: Tiny, targets: tuple[str, ...], expected: set[str]
) -> None:
    model = adapted(tiny_checkpoint("bert"), targets=targets)
    found = {name.partition(".lora_A")[0] for name in trained(model) if "lora_A" in name}
    assert all(any(name.endswith(one) for one in expected) for name in found)
    assert len(found) == (3 if "1" in targets[0] else 2 * len(targets))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("query", "q_proj", "valeu")}, r"'q_proj' matches no linear.*'valeu' .*nearest: value"),
        ({"targets": ()}, "at least one"),
        ({"rank": 0}, "rank of at least 1.*got 0"),
        ({"alpha": 0.0}, "alpha above 0"),
        ({"dropout": 1.0}, "dropout of 0 to below 1"),
    ],
)
def test_what_cannot_be_is_one_error(tiny_checkpoint: Tiny, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        adapted(tiny_checkpoint("bert"), **options)


def test_adapters_are_added_once(tiny_checkpoint: Tiny) -> None:
    model = adapted(tiny_checkpoint("bert"))
    with pytest.raises(UsageError, match="adapters already"):
        add_lora(model, rank=1, alpha=1)


def test_a_tied_output_layer_is_left_alone(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    model = RetrievalModel.load(tiny_checkpoint("qwen3"))
    config = model.backbone.config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model.backbone = transformers.AutoModelForCausalLM.from_config(config)
    assert model.backbone.lm_head.weight is model.backbone.model.embed_tokens.weight
    with pytest.raises(UsageError, match=r"lm_head shares its weight with the embeddings"):
        add_lora(model, rank=2, alpha=2, targets=("lm_head",))
    add_lora(model, rank=2, alpha=2)
    assert all("lora_" in name for name in trained(model))
    model.write(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.backbone.lm_head.weight)


def test_a_run_goes_on_from_its_adapters_to_the_bit(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    source = tiny_checkpoint("bert", dense=(16,))

    def start(seed: int) -> tuple[RetrievalModel, torch.optim.Optimizer]:
        model = adapted(source, seed=seed, dropout=0.1)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    unbroken, optimizer = start(seed=0)
    train_a_step(unbroken, optimizer, seed=1)
    save_file(adapter_state(unbroken), tmp_path / ADAPTER_STATE_NAME)
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    resumed, again = start(seed=5)
    load_adapter_state(resumed, load_file(tmp_path / ADAPTER_STATE_NAME))
    again.load_state_dict(optimizer_state)
    train_a_step(unbroken, optimizer, seed=2)
    train_a_step(resumed, again, seed=2)
    expected, found = unbroken.state_dict(), resumed.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not torch.equal(expected["head.0.linear.weight"], RetrievalModel.load(source).head[0].linear.weight)


def test_the_state_of_other_adapters_is_refused(tiny_checkpoint: Tiny) -> None:
    model = adapted(tiny_checkpoint("bert"))
    before = adapter_state(model)["backbone.encoder.layer.0.attention.self.key.lora_A.default.weight"].clone()
    with pytest.raises(CheckpointError, match=r"expected \[4, 32\], got \[2, 32\].*and 1[0-9] more"):
        load_adapter_state(model, adapter_state(adapted(tiny_checkpoint("bert"), rank=2)))
    with pytest.raises(CheckpointError, match=r"query\.lora_A\.default\.weight: expected \[4, 32\], got None"):
        load_adapter_state(model, adapter_state(adapted(tiny_checkpoint("bert"), targets=("value",))))
    assert torch.equal(before, model.backbone.encoder.layer[0].attention.self.key.lora_A.default.weight)


def test_merging_for_good_leaves_a_plain_model(tiny_checkpoint: Tiny) -> None:
    model = adapted(tiny_checkpoint("qwen3"))
    batch = batch_of(model)
    with torch.no_grad():
        expected = model(batch)
        merge(model)
        torch.testing.assert_close(model(batch), expected, rtol=0, atol=TOLERANCE)
    assert not has_adapters(model)
    assert model.state_dict().keys() == RetrievalModel.load(tiny_checkpoint("qwen3")).state_dict().keys()
    add_lora(model, rank=2, alpha=2)  # and can be adapted anew
    assert has_adapters(model)


def test_weights_can_come_from_another_state(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    model, other = adapted(tiny_checkpoint("bert"), seed=0), adapted(tiny_checkpoint("bert"), seed=1)
    model.write(tmp_path, other.state_dict())
    found = RetrievalModel.load(tmp_path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in merged(other).items())


def test_adapters_of_a_half_precision_model_are_float32(tiny_checkpoint: Tiny) -> None:
    torch.manual_seed(0)
    model = RetrievalModel.load(tiny_checkpoint("qwen3"), dtype=torch.bfloat16)
    add_lora(model, rank=2, alpha=2)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {tensor.dtype for tensor in merged(model).values()} == {torch.bfloat16}
    model(batch_of(model)).sum().backward()


@pytest.mark.parametrize("architecture", ["bert", "qwen3"])
def test_gradient_checkpointing_gives_adapters_the_same_gradient(tiny_checkpoint: Tiny, architecture: str) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = adapted(tiny_checkpoint(architecture)).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(3)
        model(batch_of(model)).square().sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert len(plain) >= 2 * 12
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)
