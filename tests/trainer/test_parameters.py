"""Frozen parts and learning rates by group: what a pattern names, in any architecture, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rtx.runtime.errors import UsageError
from rtx.trainer.adapters import add_lora
from rtx.trainer.model import RetrievalModel
from rtx.trainer.parameters import (
    embedding_parameters,
    freeze,
    head_parameters,
    layer_parameters,
    parameter_groups,
)

ARCHITECTURES = ("bert", "distilbert", "roberta", "xlm-roberta", "mpnet", "modernbert", "deberta-v2", "qwen3")

Tiny = Callable[..., Path]


def trained(model: RetrievalModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def every(model: RetrievalModel) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def rates_of(model: RetrievalModel, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Name -> (learning rate, weight decay)."""
    found = {id(one): (group["lr"], group["weight_decay"]) for group in groups for one in group["params"]}
    return {name: found[id(parameter)] for name, parameter in model.named_parameters() if id(parameter) in found}


@pytest.mark.parametrize("task", ["embed", "rerank"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parts_are_told_apart_in_every_architecture(tiny_checkpoint: Tiny, architecture: str, task: str) -> None:
    model = RetrievalModel.load(tiny_checkpoint(architecture, task))
    embeddings, head, layers = embedding_parameters(model), head_parameters(model), layer_parameters(model)
    table = model.backbone.get_input_embeddings().weight
    assert any(parameter is table for parameter in embeddings.values())
    assert len(layers) == 2
    parts = [set(embeddings), set(head), *map(set, layers)]
    assert len(set.union(*parts)) == sum(map(len, parts))  # none in two of them
    assert bool(head) == (task == "rerank")
    # What is left stands beside the blocks: a norm above them, relative positions, a pooler that is not used.
    left = every(model) - set.union(*parts)
    assert {name.split(".")[-2].lower().strip("_") for name in left} <= {
        "norm", "final_norm", "dense", "layernorm", "rel_embeddings", "relative_attention_bias"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["embeddings"], ["backbone.embeddings."]),
        (["layers:1"], ["backbone.encoder.layer.1."]),
        (["layers:0-1"], ["backbone.encoder.layer.0.", "backbone.encoder.layer.1."]),
        (["layers:1-"], ["backbone.encoder.layer.1."]),
        (["head"], ["head."]),
        (["encoder.layer.0.attention"], ["backbone.encoder.layer.0.attention."]),
        (["backbone.pooler", "layers:0"], ["backbone.pooler.", "backbone.encoder.layer.0."]),
    ],
)
def test_a_pattern_freezes_what_it_names(tiny_checkpoint: Tiny, patterns: list[str], expected: list[str]) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert", dense=(16,)))
    frozen = freeze(model, patterns)
    assert set(frozen) == {name for name in every(model) if name.startswith(tuple(expected))}
    assert trained(model) == every(model) - set(frozen)


def test_a_pattern_may_have_wild_cards(tiny_checkpoint: Tiny) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert"))
    assert freeze(model, ["*.bias"]) == [name for name, _ in model.named_parameters() if name.endswith(".bias")]


def test_patterns_add_up(tiny_checkpoint: Tiny) -> None:
    model = RetrievalModel.load(tiny_checkpoint("qwen3"))
    freeze(model, ["embeddings"])
    freeze(model, ["layers:0"])
    assert {name.removeprefix("backbone.").rpartition(".weight")[0][:8] for name in trained(model)} == {
        "layers.1",
        "norm",
    }


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["embedings"], r"^freeze: 'embedings' matches no parameter \(nearest: embeddings"),
        (["layers:2"], "expected blocks of layers:0 to layers:1"),
        (["layers:0-2"], "expected blocks of layers:0 to layers:1"),
        (["layers:1-0"], "expected blocks of layers:0 to layers:1"),
        (["layers:"], "expected blocks of layers:0 to layers:1"),
        (["head"], "nothing with weights follows the transformer"),
        (["encoder.layr.0", "xyz"], r"'encoder.layr.0' .*nearest: encoder.layer.0.*; 'xyz' .*there are "),
        (["*"], "nothing is left to train"),
        # BERT's pooler is left, which an embedder never runs.
        (["embeddings", "layers:0-1"], "nothing is left to train"),
    ],
)
def test_a_pattern_that_cannot_be_is_one_error(tiny_checkpoint: Tiny, patterns: list[str], message: str) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert"))
    with pytest.raises(UsageError, match=message):
        freeze(model, patterns)
    assert trained(model) == every(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_options_the_groups_are_those_of_transformers(tiny_checkpoint: Tiny, architecture: str) -> None:
    model = RetrievalModel.load(tiny_checkpoint(architecture, dense=(16,)))
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.1)
    theirs = transformers.Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    assert [group["name"] for group in groups] == ["default", "default, no decay"]
    assert [[id(p) for p in group["params"]] for group in groups] == [
        [id(p) for name, p in model.named_parameters() if (name in theirs) == decay] for decay in (True, False)
    ]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.1), (1e-3, 0.0)]


def test_the_last_matching_rate_counts(tiny_checkpoint: Tiny) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert", dense=(16,)))
    rates = {"layers:0-1": 2e-4, "layers:1": 3e-4, "head": 5e-3}
    groups = parameter_groups(model, learning_rate=1e-4, weight_decay=0.1, rates=rates)
    found = rates_of(model, groups)
    assert found.keys() == every(model)
    assert found["backbone.embeddings.word_embeddings.weight"] == (1e-4, 0.1)
    assert found["backbone.encoder.layer.0.output.dense.weight"] == (2e-4, 0.1)
    assert found["backbone.encoder.layer.1.output.dense.weight"] == (3e-4, 0.1)
    assert found["backbone.encoder.layer.1.output.LayerNorm.weight"] == (3e-4, 0.0)
    assert found["head.0.linear.weight"] == (5e-3, 0.1)
    assert [group["name"] for group in groups][:4] == [
        "default",
        "default, no decay",
        "layers:0-1",
        "layers:0-1, no decay",
    ]
    torch.optim.AdamW(groups)


def test_frozen_parameters_are_in_no_group(tiny_checkpoint: Tiny) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert"))
    freeze(model, ["embeddings", "layers:0"])
    groups = parameter_groups(model, learning_rate=1e-4, weight_decay=0.1, rates={"layers:0-1": 1e-5})
    assert rates_of(model, groups).keys() == trained(model)
    with pytest.raises(UsageError, match="'embeddings': all that it matches is frozen"):
        parameter_groups(model, learning_rate=1e-4, weight_decay=0.1, rates={"embeddings": 1e-5})


def test_the_rate_falls_from_block_to_block(tiny_checkpoint: Tiny) -> None:
    model = RetrievalModel.load(tiny_checkpoint("qwen3", dense=(16,)))
    options: dict[str, Any] = {"learning_rate": 1e-3, "weight_decay": 0.0, "layer_decay": 0.5}
    groups = parameter_groups(model, **options, rates={"*.q_proj.*": 7.0})
    assert [group["name"] for group in groups if group["lr"] == 7.0] == ["*.q_proj.*"]
    found = rates_of(model, groups)
    assert found["head.0.linear.weight"][0] == found["backbone.norm.weight"][0] == 1e-3
    assert found["backbone.layers.1.mlp.up_proj.weight"][0] == pytest.approx(0.5e-3)
    assert found["backbone.layers.0.mlp.up_proj.weight"][0] == pytest.approx(0.25e-3)
    assert found["backbone.embed_tokens.weight"][0] == pytest.approx(0.125e-3)
    assert found["backbone.layers.0.self_attn.q_proj.weight"][0] == 7.0


def test_rates_out_of_range_are_listed(tiny_checkpoint: Tiny) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert"))
    with pytest.raises(UsageError, match=r"'embeddings': expected more than 0, got -1.*layer decay: .*got 1.5"):
        parameter_groups(
            model, learning_rate=1e-3, weight_decay=0.0, rates={"embeddings": -1.0, "layers:0": 1.0}, layer_decay=1.5
        )


def test_adapters_are_grouped_and_frozen_like_other_parameters(tiny_checkpoint: Tiny) -> None:
    torch.manual_seed(0)
    model = RetrievalModel.load(tiny_checkpoint("bert", dense=(16,)))
    add_lora(model, rank=2, alpha=2)
    found = rates_of(model, parameter_groups(model, learning_rate=1e-4, weight_decay=0.0, rates={"head": 1e-2}))
    assert {rate for name, (rate, _) in found.items() if "lora_" in name} == {1e-4}
    assert {rate for name, (rate, _) in found.items() if "lora_" not in name} == {1e-2}
    freeze(model, ["layers:0"])
    assert not any(".layer.0." in name for name in trained(model))
    assert any("layer.1.attention.self.query.lora_A" in name for name in trained(model))


def test_the_order_of_groups_does_not_depend_on_chance(tiny_checkpoint: Tiny) -> None:
    def order() -> list[list[str]]:
        model = RetrievalModel.load(tiny_checkpoint("bert", dense=(16,)))
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = parameter_groups(
            model, learning_rate=1e-3, weight_decay=0.1, rates={"layers:1": 1e-4, "*.query.*": 1e-5}, layer_decay=0.9
        )
        return [[group["name"], *(names[id(parameter)] for parameter in group["params"])] for group in groups]

    assert order() == order()
    assert order()[-2][:2] == ["*.query.*", "backbone.encoder.layer.0.attention.self.query.weight"]


def test_a_sharded_model_is_split_at_its_blocks(tiny_checkpoint: Tiny) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    model = RetrievalModel.load(tiny_checkpoint("qwen3"))
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(model)
    split_at = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert [name for name, module in model.named_modules() if split_at(module)] == [
        "backbone.layers.0",
        "backbone.layers.1",
    ]
