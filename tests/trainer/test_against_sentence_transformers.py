"""The same training as with sentence-transformers' trainer: same weights and batches, the same losses step by step."""

from __future__ import annotations

import functools
import io

import numpy as np
import pytest
from rich.console import Console

from rtx.trainer import losses
from rtx.trainer.config import TrainingArguments
from rtx.trainer.data import TrainingData
from rtx.trainer.model import RetrievalModel
from rtx.trainer.progress import Progress
from rtx.trainer.train import Trainer

STEPS = 200
WORDS = ["how", "are", "what", "code", "list", "file", "model", "text", "query", "the", "with", "that"]
OPTIONS = {"learning_rate": 1e-4, "weight_decay": 0.01, "max_grad_norm": 1.0, "seed": 3}


def rows(count=400):
    generator = np.random.default_rng(0)

    def text():
        return " ".join(generator.choice(WORDS, size=generator.integers(1, 9)).tolist())

    return [{"query": f"{text()} {i}", "positive": f"{text()} {i}", "negative": f"{text()} {-i}"} for i in range(count)]


def pairs(count=400):
    return [
        {"query": row["query"], "document": row["positive" if i % 3 else "negative"], "label": float(i % 3 > 0)}
        for i, row in enumerate(rows(count))
    ]


class FixedBatches:
    def __init__(self, batches, batch_size):
        self.batches, self.batch_size, self.drop_last = batches, batch_size, False

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def ours(checkpoint, folder, data, needs, loss, **options):
    model = RetrievalModel.load(checkpoint)
    arguments = TrainingArguments(
        output=str(folder), batch_size=4, epochs=2, dropout=0.0, log_steps=1, threads=1, **OPTIONS, **options
    )
    data = TrainingData.from_rows(data, needs=needs)
    built = Trainer(model, arguments, train_dataset=data, loss=loss, progress=Progress(Console(file=io.StringIO())))
    batches = [list(built.sampler.plan(epoch)) for epoch in (0, 1)]
    return [loss for _, loss in built.train().losses], batches


def theirs(trainer, arguments, model, loss, data, batches, folder):
    import datasets
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    # One pass of 200 steps: the sampler of a second pass would be asked again.
    flat = [batch for epoch in batches for batch in epoch]
    made = arguments(
        output_dir=str(folder),
        max_steps=len(flat),
        per_device_train_batch_size=4,
        warmup_steps=0.1,
        batch_sampler=lambda *_, **__: FixedBatches(flat, 4),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **OPTIONS,
    )
    built = trainer(model=model, args=made, train_dataset=datasets.Dataset.from_list(data), loss=loss)
    built.train()
    return [entry["loss"] for entry in built.state.log_history if "loss" in entry]


def check(own, other):
    assert len(own) == len(other) == STEPS
    # It learns, so that what is compared is not where it started from.
    assert np.mean(own[-20:]) < np.mean(own[:20]) - 0.02
    assert np.abs(np.array(own) - np.array(other)).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["info_nce", "matryoshka", "cached"])
def test_an_embedder_follows_their_loss_curve(tiny_checkpoint, tmp_path, name):
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses as their_losses

    checkpoint = tiny_checkpoint("bert")
    loss, options = functools.partial(losses.info_nce, scale=5.0), {}
    model = SentenceTransformer(str(checkpoint), device="cpu")
    their_loss = their_losses.MultipleNegativesRankingLoss(model, scale=5.0)
    if name == "matryoshka":
        loss = losses.matryoshka(loss, [32, 16, 8])
        their_loss = their_losses.MatryoshkaLoss(model, their_loss, [32, 16, 8])
    if name == "cached":
        options = {"activation_tokens": 0, "chunk_tokens": 40}
        their_loss = their_losses.CachedMultipleNegativesRankingLoss(model, scale=5.0, mini_batch_size=3)
    own, batches = ours(checkpoint, tmp_path / "ours", rows(), "positives", loss, **options)
    kinds = SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    check(own, theirs(*kinds, model, their_loss, rows(), batches, tmp_path / "theirs"))


@pytest.mark.slow
def test_a_reranker_follows_their_loss_curve(tiny_checkpoint, tmp_path):
    from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    checkpoint = tiny_checkpoint("bert", "rerank")
    model = CrossEncoder(str(checkpoint), device="cpu")
    own, batches = ours(checkpoint, tmp_path / "ours", pairs(), "labels", losses.bce)
    kinds = CrossEncoderTrainer, CrossEncoderTrainingArguments
    check(own, theirs(*kinds, model, BinaryCrossEntropyLoss(model), pairs(), batches, tmp_path / "theirs"))
