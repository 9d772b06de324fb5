"""The estimate of a run's needs, against what autograd keeps and what a process takes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rtx.runtime.errors import UsageError
from rtx.runtime.text import Encoded
from rtx.trainer import losses
from rtx.trainer.adapters import add_lora
from rtx.trainer.batches import Batch, plan_chunks
from rtx.trainer.estimate import (
    Plan,
    activation_growth,
    count_parts,
    estimate,
    kept_bytes,
    loss_bytes,
    render,
    sample_batches,
)
from rtx.trainer.losses.targets import Targets
from rtx.trainer.model import RetrievalModel
from rtx.trainer.parameters import freeze

ARCHITECTURES = ("bert", "distilbert", "roberta", "xlm-roberta", "mpnet", "modernbert", "deberta-v2", "qwen3")

Tiny = Callable[..., Path]


def encoded(*lengths: int) -> list[Encoded]:
    return [Encoded([5] * length, [0] * length) for length in lengths]


def batch_of(queries: list[int], documents: list[int]) -> Batch:
    """Rows with one positive and as many negatives as there are documents left."""
    each = len(documents) // len(queries)
    rows = tuple((row, None) for row in range(len(queries)))
    targets = Targets.of([(1.0, *[0.0] * (each - 1))] * len(queries))
    return Batch(rows, (encoded(*queries), encoded(*documents)), targets)  # type: ignore[arg-type]


def inputs(model: RetrievalModel, *lengths: int) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in model.preprocessor.collate(encoded(*lengths)).items()}


def held(model: RetrievalModel, *lengths: int, bf16: bool = False) -> int:
    def run() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            output: torch.Tensor = model(inputs(model, *lengths))
            return output

    return kept_bytes(run, besides=[*model.parameters(), *model.buffers()])


def test_a_storage_counts_once_and_not_if_it_is_held_anyway() -> None:
    given, weight = torch.ones(3, 4, requires_grad=True), torch.ones(4, 5, requires_grad=True)
    assert kept_bytes(lambda: given @ weight, besides=()) == 4 * (3 * 4 + 4 * 5)
    assert kept_bytes(lambda: given @ weight, besides=[weight]) == 4 * 3 * 4
    assert kept_bytes(lambda: (given @ weight).sum() + (given @ weight).exp().sum(), besides=[weight]) == 4 * (12 + 15)
    assert kept_bytes(lambda: given.detach() @ weight, besides=[weight]) == 4 * 3 * 4
    assert kept_bytes(lambda: given.detach() @ weight.detach(), besides=()) == 0


@pytest.mark.parametrize("task", ["embed", "rerank"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_few_sizes_tell_all_others(tiny_checkpoint: Tiny, architecture: str, task: str) -> None:
    model = RetrievalModel.load(tiny_checkpoint(architecture, task))
    kept, again = activation_growth(model)
    assert not model.training
    model.train()
    for lengths in ((20, 19, 7), (64, *[50] * 7)):
        assert kept.at(len(lengths), lengths[0]) == pytest.approx(held(model, *lengths), rel=1e-6)
    assert again.at(8, 64) == 0


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}], ids=lambda one: next(iter(one)))
@pytest.mark.parametrize("architecture", ["bert", "modernbert", "qwen3"])
def test_precision_and_checkpointing_are_measured_too(
    tiny_checkpoint: Tiny, architecture: str, options: dict[str, bool]
) -> None:
    model = RetrievalModel.load(tiny_checkpoint(architecture))
    plain, _ = activation_growth(model)
    kept, again = activation_growth(model, **options)
    assert not getattr(model.backbone, "is_gradient_checkpointing", False)
    model.train()
    if "gradient_checkpointing" in options:
        model.activation_checkpointing_enable()
        # Of two blocks, one at a time is computed again.
        assert again.at(8, 64) == pytest.approx((plain.at(8, 64) - kept.at(8, 64)) / 2)
    lengths = (64, *[50] * 7)
    assert kept.at(8, 64) == pytest.approx(held(model, *lengths, bf16="bf16" in options), rel=1e-6)
    assert kept.at(8, 64) < 0.95 * plain.at(8, 64)


def test_a_model_that_does_gradient_checkpointing_already_is_measured_alike(tiny_checkpoint: Tiny) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert"))
    before = activation_growth(model, gradient_checkpointing=True)
    model.activation_checkpointing_enable()
    after = activation_growth(model, gradient_checkpointing=True)
    assert [one.at(8, 64) for one in after] == pytest.approx([one.at(8, 64) for one in before])
    assert after[1].at(8, 64) > 0
    assert model.backbone.is_gradient_checkpointing


def test_a_model_without_gradient_checkpointing_is_one_error(tiny_checkpoint: Tiny) -> None:
    model = RetrievalModel.load(tiny_checkpoint("mpnet"))
    with pytest.raises(UsageError, match="gradient_checkpointing: MPNetModel of transformers cannot do it"):
        activation_growth(model, gradient_checkpointing=True)
    assert not model.training


def test_frozen_blocks_keep_nothing(tiny_checkpoint: Tiny) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert"))
    before, _ = activation_growth(model)
    freeze(model, ["embeddings", "layers:0"])
    after, _ = activation_growth(model)
    assert 0.4 < after.at(8, 64) / before.at(8, 64) < 0.6


def test_measuring_leaves_the_model_and_chance_as_they_were(tiny_checkpoint: Tiny) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert"))
    state = torch.get_rng_state()
    estimate(model, [batch_of([4, 5], [9, 8])], losses.info_nce, Plan(steps=1, batch_size=2, chunk_tokens=64))
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_parameters_are_counted_by_part(tiny_checkpoint: Tiny) -> None:
    torch.manual_seed(0)
    model = RetrievalModel.load(tiny_checkpoint("bert", dense=(16,)))
    add_lora(model, rank=2, alpha=2)
    parts = {part.name: part for part in count_parts(model)}
    assert parts.keys() == {"embeddings", "2 blocks", "adapters", "head", "beside them"}
    assert (parts["head"].parameters, parts["head"].trained) == (32 * 16 + 16, 32 * 16 + 16)
    # A [2, in] and B [out, 2] of query, key, value, output, up and down, in two blocks.
    assert parts["adapters"].trained == 2 * 2 * (4 * (32 + 32) + 2 * (32 + 64))
    assert parts["2 blocks"].trained == parts["embeddings"].trained == 0
    assert sum(part.parameters for part in parts.values()) == sum(one.numel() for one in model.parameters())


def test_bytes_of_parameters(tiny_checkpoint: Tiny) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert"))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    plan = Plan(steps=1, batch_size=2, chunk_tokens=64)
    found = estimate(model, [batch_of([4, 5], [9, 8])], losses.info_nce, plan)
    assert (found.weights_bytes, found.gradients_bytes, found.optimizer_bytes) == (
        4 * numbers + buffers,
        4 * numbers,
        8 * numbers,
    )
    freeze(model, ["embeddings"])
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    plan = Plan(steps=1, batch_size=4, chunk_tokens=64, processes=2)
    found = estimate(model, [batch_of([4, 5], [9, 8])], losses.info_nce, plan)
    assert (found.weights_bytes, found.gradients_bytes, found.optimizer_bytes) == (
        4 * numbers + buffers,
        2 * 4 * trained,
        8 * trained,
    )
    assert (found.parameters, found.trained) == (numbers, trained)


def test_activations_are_those_of_the_chunks_that_are_held(tiny_checkpoint: Tiny) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert"))
    batch = batch_of([6, 5, 4, 4], [40, 39, 38, 37, 20, 19, 18, 17])
    sizes = [(len(chunk.places), chunk.tokens // len(chunk.places)) for chunk in plan_chunks(batch, chunk_tokens=80)]
    kept, _ = activation_growth(model)
    bytes_of = [kept.at(*size) for size in sizes]
    assert len(sizes) == 4

    def found(activation_tokens: int | None) -> int:
        plan = Plan(steps=1, batch_size=4, chunk_tokens=80, activation_tokens=activation_tokens)
        return estimate(model, [batch_of([4], [5]), batch], losses.info_nce, plan).activations_bytes

    assert found(None) == pytest.approx(sum(bytes_of), abs=1)
    assert found(0) == pytest.approx(max(bytes_of), abs=1)
    assert found(80 + 78) == pytest.approx(sum(bytes_of[-2:]), abs=1)


def test_tokens_and_texts_of_a_step(tiny_checkpoint: Tiny) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert"))
    batches = [batch_of([4, 2], [10, 5]), batch_of([6, 6], [8, 8])]
    plan = Plan(steps=7, batch_size=4, chunk_tokens=64, accumulated=3, processes=2)
    found = estimate(model, batches, losses.info_nce, plan)
    assert (found.texts, found.sampled_rows, found.longest_tokens) == (2 * 3 * 4, 4, 10)
    assert found.tokens == 2 * 3 * (21 + 28) / 2
    assert found.padded_tokens == 2 * 3 * (28 + 28) / 2


@pytest.mark.parametrize("task", ["embed", "rerank"])
def test_the_loss_of_a_large_batch_is_told_from_its_beginning(tiny_checkpoint: Tiny, task: str) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert", task))
    loss = losses.info_nce if task == "embed" else losses.listnet
    rows = 300
    batch = batch_of([4] * rows, [9] * 2 * rows)
    found = loss_bytes(model, [batch], loss, Plan(steps=1, batch_size=rows, chunk_tokens=64))
    shapes = [(rows, 32), (2 * rows, 32)] if task == "embed" else [(2 * rows,)]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    kept = kept_bytes(lambda: loss(*leaves, batch.targets), besides=())
    assert found == pytest.approx(kept + 2 * sum(leaf.nbytes for leaf in leaves), rel=0.01)
    twice = loss_bytes(model, [batch], loss, Plan(steps=1, batch_size=2 * rows, chunk_tokens=64, processes=2))
    assert twice > (3.1 if task == "embed" else 1.9) * found


def test_a_guide_is_given_to_the_loss_that_needs_one(tiny_checkpoint: Tiny) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert"))
    batch = batch_of([4] * 8, [9] * 8)
    plan = Plan(steps=1, batch_size=8, chunk_tokens=64, guided=True)
    assert loss_bytes(model, [batch], partial(losses.gist, scale=20.0), plan) > 0


def test_enough_batches_are_looked_at() -> None:
    batches = [batch_of([4] * 3, [5] * 3) for _ in range(9)]
    assert len(sample_batches(iter(batches), rows=7)) == 3
    assert len(sample_batches(iter(batches), rows=1)) == 1
    assert len(sample_batches(iter(batches), rows=1000)) == 9


@pytest.mark.parametrize(
    ("activation_tokens", "held"), [(None, "a whole batch"), (0, "one chunk"), (4096, "4,096 tokens")]
)
def test_the_table_has_the_numbers(tiny_checkpoint: Tiny, activation_tokens: int | None, held: str) -> None:
    model = RetrievalModel.load(tiny_checkpoint("bert"))
    freeze(model, ["embeddings"])
    plan = Plan(steps=1234, batch_size=2, chunk_tokens=64, activation_tokens=activation_tokens, accumulated=2)
    found = estimate(model, [batch_of([4, 2], [10, 5])], losses.info_nce, plan)
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(render(found))
    rows = {line[:17].strip(): " ".join(line[17:].split()) for line in console.export_text().splitlines()}
    assert rows["steps"] == "1,234"
    assert rows["rows a step"] == "4 8 texts in 2 batches, by 2 rows looked at"
    assert rows["tokens a step"] == "42 56 with padding (25%); longest text 10"
    assert rows["embeddings"].endswith("frozen")
    assert rows["2 blocks"].endswith("trained")
    assert rows["activations"].endswith(f"of {held}, measured on small batches")
    assert " KiB " in rows["memory"]


@pytest.mark.slow
def test_a_process_takes_what_was_estimated(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """A model of MiniLM's size: the peak of a real step, within 15 %."""
    script = Path(__file__).with_name("peak_memory.py")
    # Memory that is free goes back to the system: else the peak is that of malloc's habits.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    source = tiny_checkpoint("bert", bare=True)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(source), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        timeout=300,
    )
    for name, (estimated, measured) in json.loads(done.stdout.splitlines()[-1]).items():
        assert 0.85 < estimated / measured < 1.15, name
