from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from rtx.runtime.errors import UsageError
from rtx.trainer.config import TrainingArguments
from rtx.trainer.model import RetrievalModel
from rtx.trainer.processes import join_processes
from rtx.trainer.sharding import check_launcher, copy_to_shard, gather_weights
from rtx.trainer.train import Trainer

# What accelerate's launcher sets by itself, where it is told to use FSDP and no more.
DEFAULTS = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_MIXED_PRECISION": "no",
    "FSDP_VERSION": "1",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}
FITTING = {**DEFAULTS, "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}


def test_fsdp_is_refused_with_all_settings_that_it_cannot_have():
    with pytest.raises(UsageError) as error:
        check_launcher(DEFAULTS)
    assert str(error.value) == (
        "FSDP: accelerate's configuration: "
        "fsdp_version: expected 2, got 1 (version 1 joins parameters that may have different rates); "
        "fsdp_cpu_ram_efficient_loading: expected false, got true (each process reads the whole model)"
    )
    with pytest.raises(UsageError, match=r"mixed_precision: expected no, got bf16 .*--bf16"):
        check_launcher({**FITTING, "ACCELERATE_MIXED_PRECISION": "bf16"})


def test_other_launches_are_left_alone():
    check_launcher(FITTING)
    check_launcher({})
    # What would be wrong with FSDP only.
    check_launcher({**DEFAULTS, "ACCELERATE_USE_FSDP": "false", "ACCELERATE_MIXED_PRECISION": "bf16"})


def test_deepspeed_is_refused_with_what_to_use():
    with pytest.raises(UsageError, match=r"^DeepSpeed: not supported, since it steps inside .* use FSDP"):
        check_launcher({"ACCELERATE_USE_DEEPSPEED": "true"})


def test_the_launcher_is_looked_at_before_processes_meet(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match=r"^DeepSpeed"):
        join_processes()


def test_fsdp_without_a_gpu_is_refused_and_not_left_out(tiny_checkpoint, tmp_path, monkeypatch):
    for name, value in FITTING.items():
        monkeypatch.setenv(name, value)
    model, rows = RetrievalModel.load(tiny_checkpoint("bert")), [{"query": "how", "positive": "so"}]
    with pytest.raises(UsageError, match=r"^FSDP: accelerate has it for GPUs only"):
        Trainer(model, TrainingArguments(output=str(tmp_path)), train_dataset=rows)


def test_fsdp_of_a_model_that_takes_images_is_refused(tmp_path, monkeypatch):
    """A process whose chunk has no image would not gather the vision layers that another waits for."""
    runpy.run_path(str(Path(__file__).parents[1] / "vision_models.py"))["write_tiny_clip"](tmp_path / "clip")
    for name, value in FITTING.items():
        monkeypatch.setenv(name, value)
    model, rows = RetrievalModel.load(tmp_path / "clip"), [{"query": "how", "positive": "so"}]
    with pytest.raises(UsageError, match=r"^FSDP: models that take images are not sharded"):
        Trainer(model, TrainingArguments(output=str(tmp_path / "out")), train_dataset=rows)


def test_a_copy_to_shard_lies_in_the_same_memory_until_it_is_moved(tiny_checkpoint):
    model = RetrievalModel.load(tiny_checkpoint("qwen3-chat", "rerank"))
    before = gather_weights(model)
    copied = copy_to_shard(model)
    assert copied.tokenizer is model.tokenizer
    pairs = list(zip(model.parameters(), copied.parameters(), strict=True))
    assert all(one is not two and one.data_ptr() == two.data_ptr() for one, two in pairs)
    assert copied.backbone.lm_head.weight is copied.backbone.get_input_embeddings().weight
    for parameter in copied.parameters():
        # As FSDP moves it to a GPU, a block at a time.
        parameter.data = torch.zeros_like(parameter)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_tied_is_gathered_once(tiny_checkpoint):
    model = RetrievalModel.load(tiny_checkpoint("qwen3-chat", "rerank"))
    found = gather_weights(model)
    assert found["backbone.lm_head.weight"] is found["backbone.model.embed_tokens.weight"]
    assert found.keys() == model.state_dict().keys()
    assert gather_weights(model, keep=False) == {}
