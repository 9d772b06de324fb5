"""The gradient of a batch in bounded memory equals that of the whole batch at once."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from rtx.trainer import losses, step
from rtx.trainer.batches import Batch, Chunk, Collator, assemble, plan_chunks
from rtx.trainer.data import Example
from rtx.trainer.model import RetrievalModel
from rtx.trainer.step import backward, batch_run, joined_loss
from rtx.trainer.train import set_dropout

WORDS = ["how", "are", "what", "code", "list", "file", "model", "text", "query", "the", "with", "that"]


def examples(count=7, negatives=2, labels=None):
    generator = np.random.default_rng(0)

    def text():
        return " ".join(generator.choice(WORDS, size=generator.integers(1, 12)))

    found = []
    for row in range(count):
        documents = tuple(text() for _ in range(1 + negatives - row % 2))
        own = tuple(labels[: len(documents)]) if labels else (1.0, *[0.0] * (len(documents) - 1))
        found.append(Example(text(), documents, own))
    return found


EMBED = {
    "info_nce": (losses.info_nce, None),
    "info_nce, all directions": (
        functools.partial(losses.info_nce, directions=("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")),
        None,
    ),
    "info_nce, masked": (functools.partial(losses.info_nce, false_negative_margin=0.01), None),
    "gist": (losses.gist, None),
    "matryoshka": (losses.matryoshka(losses.info_nce, [32, 16, 8]), None),
    "matryoshka of cosent": (losses.matryoshka(losses.cosent, [32, 16, 8]), (0.9, 0.3, 0.1)),
    "cosent": (losses.cosent, (0.9, 0.3, 0.1)),
    "contrastive": (losses.contrastive, None),
    "triplet": (losses.triplet, None),
    "margin_mse": (losses.embed.margin_mse, (3.0, -1.0, 0.5)),
    "kl": (losses.kl, (3.0, -1.0, 0.5)),
}
RERANK = {
    "bce": (losses.bce, None),
    "cross_entropy": (losses.cross_entropy, None),
    "listnet": (losses.listnet, (0.9, 0.3, 0.1)),
    "ranknet": (losses.ranknet, (2.0, 1.0, 0.0)),
    "lambda_ndcg": (losses.lambda_ndcg, (2.0, 1.0, 0.0)),
    "margin_mse": (losses.rerank.margin_mse, (3.0, -1.0, 0.5)),
}


@pytest.fixture(scope="module")
def models(tiny_checkpoint):
    built = {}
    for task in ("embed", "rerank"):
        model = RetrievalModel.load(tiny_checkpoint("bert", task)).double().train()
        set_dropout(model, 0.3)
        built[task] = model
    return built


def gradients(model, rows, loss, *, chunk_tokens, activation_tokens, counter=None, in_step=False):
    batch = Collator(model.preprocessor, task=model.task)(list(enumerate(rows)))
    targets = batch.targets._replace(labels=batch.targets.labels.double())
    if "gist" in str(loss):
        generator = torch.Generator().manual_seed(3)
        counts = len(batch.sides[0]), len(batch.sides[1])
        targets = targets._replace(guide=tuple(torch.randn(n, 6, generator=generator).double() for n in counts))
    run = batch_run(model, batch, model.preprocessor.collate, torch.device("cpu"))

    def counted(chunk):
        if counter is not None:
            counter.append(torch.is_grad_enabled())
        return run(chunk)

    torch.manual_seed(1)
    model.zero_grad()
    value = backward(
        counted,
        plan_chunks(batch, chunk_tokens=chunk_tokens),
        joined_loss(loss, targets),
        activation_tokens=activation_tokens,
        in_step=in_step,
    )
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return value, found, torch.get_rng_state()


def check(model, rows, loss, chunk_tokens, activation_tokens):
    value, plain, after = gradients(model, rows, loss, chunk_tokens=chunk_tokens, activation_tokens=None)
    cached_value, cached, cached_after = gradients(
        model, rows, loss, chunk_tokens=chunk_tokens, activation_tokens=activation_tokens
    )
    assert cached_value.item() == pytest.approx(value.item(), abs=1e-12)
    assert cached.keys() == plain.keys()
    assert len(plain) > 20
    assert max(float(gradient.abs().max()) for gradient in plain.values()) > 1e-3
    for name, gradient in plain.items():
        assert torch.allclose(cached[name], gradient, rtol=0, atol=1e-10), name
    assert torch.equal(after, cached_after)


@pytest.mark.parametrize("name", EMBED)
@pytest.mark.parametrize(("chunk_tokens", "activation_tokens"), [(1, 0), (30, 0), (30, 60)])
def test_cached_equals_plain_for_embedders(models, name, chunk_tokens, activation_tokens):
    loss, labels = EMBED[name]
    check(models["embed"], examples(labels=labels), loss, chunk_tokens, activation_tokens)


@pytest.mark.parametrize("name", RERANK)
@pytest.mark.parametrize(("chunk_tokens", "activation_tokens"), [(1, 0), (40, 0), (40, 90)])
def test_cached_equals_plain_for_rerankers(models, name, chunk_tokens, activation_tokens):
    loss, labels = RERANK[name]
    check(models["rerank"], examples(labels=labels), loss, chunk_tokens, activation_tokens)


def test_what_fits_runs_once_and_the_rest_twice(models):
    rows = examples()
    counter: list[bool] = []
    gradients(models["embed"], rows, losses.info_nce, chunk_tokens=30, activation_tokens=None, counter=counter)
    assert set(counter) == {True}
    chunks = len(counter)
    counter.clear()
    gradients(models["embed"], rows, losses.info_nce, chunk_tokens=30, activation_tokens=0, counter=counter)
    # One keeps its activations, since memory for one is needed in any case.
    assert (counter.count(False), counter.count(True)) == (chunks - 1, chunks)
    counter.clear()
    gradients(models["embed"], rows, losses.info_nce, chunk_tokens=30, activation_tokens=10_000, counter=counter)
    assert (counter.count(False), counter.count(True)) == (0, chunks)


@pytest.mark.parametrize(
    ("activation_tokens", "other", "passes"),
    [
        # (chunks, live ones) of another process -> forward passes without and with gradient.
        (None, (24, 24), (0, 24)),
        (None, (24, 4), (20, 24)),
        (0, (24, 1), (23, 24)),
        (0, (3, 3), (19, 20)),
    ],
)
def test_chunks_that_others_wait_for_change_nothing(tiny_checkpoint, monkeypatch, activation_tokens, other, passes):
    # Without dropout: idle chunks draw random numbers too.
    model, rows = RetrievalModel.load(tiny_checkpoint("bert")).double().eval(), examples()
    options = {"chunk_tokens": 30, "activation_tokens": activation_tokens}
    value, plain, _ = gradients(model, rows, losses.info_nce, **options)
    monkeypatch.setattr(step, "gather_objects", lambda own: [own, other])
    counter: list[bool] = []
    waiting_value, waiting, _ = gradients(model, rows, losses.info_nce, **options, in_step=True, counter=counter)
    assert (counter.count(False), counter.count(True)) == passes
    assert waiting_value.item() == pytest.approx(value.item(), abs=1e-12)
    for name, gradient in plain.items():
        assert torch.allclose(waiting[name], gradient, rtol=0, atol=1e-12), name


def test_gradients_are_averaged_over_processes_once_at_the_end(models):
    """Everything but the last chunk's pass runs in the context without synchronisation."""
    model = models["embed"]
    batch = Collator(model.preprocessor, task="embed")(list(enumerate(examples())))
    inside, seen = [False], []

    class Unsynchronised:
        def __enter__(self):
            inside[0] = True

        def __exit__(self, *_):
            inside[0] = False

    run = batch_run(model, batch, model.preprocessor.collate, torch.device("cpu"))

    def propagate(value):
        seen.append(inside[0])
        value.backward()

    backward(
        run,
        plan_chunks(batch, chunk_tokens=30),
        joined_loss(losses.info_nce, batch.targets),
        activation_tokens=0,
        propagate=propagate,
        unsynchronised=Unsynchronised,
    )
    assert seen[:-1] == [True] * (len(seen) - 1)
    assert seen[-1] is False


@pytest.mark.parametrize("activation_tokens", [None, 60])
def test_weights_are_cast_once_for_all_chunks_that_keep_their_activations(tiny_checkpoint, activation_tokens):
    model = RetrievalModel.load(tiny_checkpoint("bert")).train()
    batch = Collator(model.preprocessor, task="embed")(list(enumerate(examples(20))))
    shape = model.backbone.encoder.layer[0].intermediate.dense.weight.shape
    casts: set[int] = set()
    kept = []

    def keep(tensor):
        if tensor.dtype == torch.bfloat16 and tensor.shape in (shape, shape[::-1]):
            casts.add(tensor.untyped_storage().data_ptr())
            kept.append(tensor)
        return tensor

    calls = []

    def check(_):
        calls.append(len(casts))

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backward(
            batch_run(model, batch, model.preprocessor.collate, torch.device("cpu")),
            plan_chunks(batch, chunk_tokens=30),
            joined_loss(losses.info_nce, batch.targets),
            activation_tokens=activation_tokens,
            context=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
            check=check,
        )
    # Two matrices of each of two blocks, however many chunks there are.
    assert calls == [4]


def test_the_check_comes_before_any_gradient(models):
    model = models["embed"]
    batch = Collator(model.preprocessor, task="embed")(list(enumerate(examples())))
    model.zero_grad()

    def refuse(value):
        raise ArithmeticError(value)

    for activation_tokens in (None, 0):
        with pytest.raises(ArithmeticError):
            backward(
                batch_run(model, batch, model.preprocessor.collate, torch.device("cpu")),
                plan_chunks(batch, chunk_tokens=30),
                joined_loss(losses.info_nce, batch.targets),
                activation_tokens=activation_tokens,
                check=refuse,
            )
    assert all(p.grad is None for p in model.parameters())


def test_chunks_are_cut_by_tokens_and_hold_every_text_once(models):
    preprocessor = models["embed"].preprocessor
    batch = Collator(preprocessor, task="embed")(list(enumerate(examples(20))))
    chunks = plan_chunks(batch, chunk_tokens=25)
    for side, items in enumerate(batch.sides):
        assert sorted(place for chunk in chunks if chunk.side == side for place in chunk.places) == [*range(len(items))]
    for chunk in chunks:
        lengths = [len(batch.sides[chunk.side][place].ids) for place in chunk.places]
        assert chunk.tokens == len(lengths) * max(lengths)
        assert chunk.tokens <= 25 or len(lengths) == 1


def test_outputs_come_back_in_the_order_of_the_texts():
    chunks = [Chunk(0, [2, 0], 2), Chunk(1, [1], 1), Chunk(0, [1], 1), Chunk(1, [0], 1)]
    outputs = [torch.tensor([2.0, 0.0]), torch.tensor([11.0]), torch.tensor([1.0]), torch.tensor([10.0])]
    first, second = assemble(outputs, chunks)
    assert first.tolist() == [0, 1, 2]
    assert second.tolist() == [10, 11]


def test_documents_stand_row_by_row(models):
    rows = [Example("how", ("a", "b c", "d"), (1, 0, 0)), Example("what", ("e f g",), (1,))]
    batch: Batch = Collator(models["embed"].preprocessor, task="embed")([(5, rows[0]), (9, rows[1])])
    assert [len(side) for side in batch.sides] == [2, 4]
    assert batch.targets.owner.tolist() == [0, 0, 0, 1]
    assert batch.targets.labels.tolist() == [1, 0, 0, 1]
    assert batch.targets.first.tolist() == [0, 3]
    assert [row for row, _ in batch.rows] == [5, 9]
    pairs = Collator(models["rerank"].preprocessor, task="rerank")([(0, rows[0]), (1, rows[1])])
    assert [len(side) for side in pairs.sides] == [4]
