"""What a training run will need, before it starts: parameters, steps, tokens a step, and an estimate of its memory.

Nothing of the memory is a formula of some architecture. Activations are counted, not guessed: small batches go forward
once, and what autograd keeps of them for the way back is summed by storage. It grows as a polynomial of rows and
tokens, exactly (attention is where the square comes from), so that a few sizes tell all others, on this device and with
this attention, dropout, precision, gradient checkpointing and set of trained parameters.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor, nn

from rtx.runtime.image_rules import PreparedImage
from rtx.runtime.text import Encoded
from rtx.trainer.batches import Batch, Chunk, plan_chunks
from rtx.trainer.engine import to_tensors
from rtx.trainer.losses.embed import as_part_of
from rtx.trainer.losses.targets import Targets
from rtx.trainer.parameters import embedding_parameters, head_parameters, layer_parameters
from rtx.trainer.step import live_chunks

if TYPE_CHECKING:
    from rtx.trainer.model import RetrievalModel

# Sizes that are measured: two of rows, where the growth is linear, three of tokens, where it is quadratic. More than
# one row, since padding is only possible then; even and not tiny, since kernels round sizes up.
_ROWS = (2, 4)
_MOST_TOKENS = 128
# Sides, in tokens, of square images that are measured.
_IMAGE_SIDES = (2, 4, 8)
# The loss is measured on so many rows of a batch, half of them and a quarter; it grows with their square.
_LOSS_ROWS = 128


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What of a run's options its needs depend on.

    Attributes:
        steps: of the optimizer, in all.
        batch_size: rows of a batch, over all processes.
        chunk_tokens: most padded tokens of a forward pass.
        activation_tokens: padded tokens whose activations are held at once; None for those of the whole batch.
        accumulated: batches of a step.
        processes: how many share a batch.
        bf16: forward passes run in bfloat16, the weights are as they are.
        gradient_checkpointing: of the backbone, as the loop will switch it on.
        guided: the loss is given vectors of a second model.
    """

    steps: int
    batch_size: int
    chunk_tokens: int
    activation_tokens: int | None = None
    accumulated: int = 1
    processes: int = 1
    bf16: bool = False
    gradient_checkpointing: bool = False
    guided: bool = False


@dataclass(frozen=True)
class Part:
    """Parameters of a part of the model, and how many of them are trained."""

    name: str
    parameters: int
    trained: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will need. Memory is that of one process.

    Attributes:
        parts: embeddings, blocks, adapters, head and what is beside them; those that the model has.
        plan: what was asked.
        sampled_rows: the rows that texts and tokens are counted on.
        texts, tokens, padded_tokens: of a step, over all processes; means over the sample.
        longest_tokens: of the longest text in the sample.
        weights_bytes, gradients_bytes, optimizer_bytes: of parameters; gradients with what is exchanged of them, if
            there are several processes; two moments for AdamW.
        activations_bytes: most that a batch of the sample holds at once for the way back, and what is computed again
            of it with gradient checkpointing.
        loss_bytes: what the loss holds of the joined batch.
    """

    parts: tuple[Part, ...]
    plan: Plan
    sampled_rows: int
    texts: float
    tokens: float
    padded_tokens: float
    longest_tokens: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    loss_bytes: int

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def trained(self) -> int:
        return sum(part.trained for part in self.parts)

    @property
    def total_bytes(self) -> int:
        """Some per cent too little, since what an operation needs for a moment is not in it.

        Not in it either: Python and its libraries, what the allocator holds for later (malloc mostly as much again,
        CUDA's some per cent), and the index of an evaluation.
        """
        held = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes
        return held + self.activations_bytes + self.loss_bytes


@dataclass(frozen=True)
class Growth:
    """Bytes as a polynomial: of rows in the first degree, of tokens in the second.

    Attributes:
        coefficients: [2, 3] float64, of rows^i · tokens^j.
    """

    coefficients: NDArray[np.float64] = field(repr=False)

    @classmethod
    def of(cls, measure: Callable[[int, int], float], rows: Sequence[int], tokens: Sequence[int]) -> Growth:
        """
        Args:
            measure: rows, tokens -> bytes.
            rows, tokens: two and three sizes, all different.
        """
        sizes = list(product(rows, tokens))
        terms = [[row**i * token**j for i in range(2) for j in range(3)] for row, token in sizes]
        found = np.array([measure(row, token) for row, token in sizes], dtype=np.float64)
        return cls(np.linalg.solve(np.array(terms, dtype=np.float64), found).reshape(2, 3).astype(np.float64))

    def at(self, rows: int, tokens: int) -> float:
        return float(np.array([1, rows]) @ self.coefficients @ np.array([1, tokens, tokens**2]))


def estimate(model: RetrievalModel, batches: Sequence[Batch], loss: Callable[..., Tensor], plan: Plan) -> Estimate:
    """Measure what a run will need. The model is as it was afterwards, and so are the random generators.

    Args:
        model: as it will be trained: frozen, with its adapters, on its device.
        batches: some of one process, as they will be trained on.
        loss: (queries, documents, targets) or (logits, targets) -> scalar, its options bound.
        plan: of the run.
    """
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    weights = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _state(model)}
    chunks = [plan_chunks(batch, chunk_tokens=plan.chunk_tokens) for batch in batches]
    kept, again = activation_growth(model, bf16=plan.bf16, gradient_checkpointing=plan.gradient_checkpointing)
    images = image_growth(model, kept, bf16=plan.bf16) if any(map(_has_images, batches)) else (0.0, 0.0, 0.0)
    held = []
    for batch, own in zip(batches, chunks, strict=True):
        sizes = [_size(batch, chunk) for chunk in own]
        needs = [kept.at(*size) + _of_images(batch, chunk, images) for chunk, size in zip(own, sizes, strict=True)]
        live = sum(needs[place] for place in live_chunks(own, plan.activation_tokens))
        held.append(max(live, *needs) + max(again.at(*size) for size in sizes))
    share = plan.accumulated * plan.processes / len(batches)
    return Estimate(
        parts=count_parts(model),
        plan=plan,
        sampled_rows=sum(len(batch.rows) for batch in batches),
        texts=share * sum(len(side) for batch in batches for side in batch.sides),
        tokens=share * sum(batch.tokens for batch in batches),
        padded_tokens=share * sum(chunk.tokens for own in chunks for chunk in own),
        longest_tokens=max(item.length for batch in batches for side in batch.sides for item in side),
        weights_bytes=sum(weights.values()),
        gradients_bytes=trained * (2 if plan.processes > 1 else 1),
        optimizer_bytes=2 * trained,
        activations_bytes=round(max(held)),
        loss_bytes=round(loss_bytes(model, batches, loss, plan)),
    )


def sample_batches(loader: Iterable[Batch], *, rows: int = 4096) -> list[Batch]:
    """The first batches of a pass that have so many rows together; at least one, if there is any."""
    found: list[Batch] = []
    for batch in loader:
        found.append(batch)
        if sum(len(one.rows) for one in found) >= rows:
            break
    return found


def count_parts(model: RetrievalModel) -> tuple[Part, ...]:
    """The model's parameters by part."""
    layers = {name for layer in layer_parameters(model) for name in layer}
    embeddings, head = embedding_parameters(model), head_parameters(model)
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        part = (
            "adapters"
            if ".lora_" in name
            else "embeddings"
            if name in embeddings
            else f"{len(layer_parameters(model))} blocks"
            if name in layers
            else "head"
            if name in head
            else "beside them"
        )
        count = counts.setdefault(part, [0, 0])
        count[0] += parameter.numel()
        count[1] += parameter.numel() if parameter.requires_grad else 0
    return tuple(Part(name, *count) for name, count in counts.items())


def activation_growth(
    model: RetrievalModel, *, bf16: bool = False, gradient_checkpointing: bool = False
) -> tuple[Growth, Growth]:
    """Bytes that a forward pass keeps for the way back, and bytes that are computed again on it, a block at a time.

    Args:
        model: as it will be trained.
        bf16: under autocast.
        gradient_checkpointing: without it, nothing is computed again.
    """
    longest = min(_MOST_TOKENS, model.contract.max_tokens)
    # A text of one token has no padding.
    tokens = sorted({max(2, longest // 4), max(3, longest // 2), max(4, longest)})

    def measure(rows: int, length: int) -> float:
        batch = _padded_batch(model, rows, length)

        def run() -> Tensor:
            with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
                output: Tensor = model(batch)
                return output

        return float(kept_bytes(run, besides=_state(model)))

    with _training(model):
        with _checkpointing(model, False):
            whole = Growth.of(measure, _ROWS, tokens)
        if not gradient_checkpointing:
            return whole, Growth(np.zeros((2, 3)))
        with _checkpointing(model, True):
            kept = Growth.of(measure, _ROWS, tokens)
    return kept, Growth((whole.coefficients - kept.coefficients) / max(1, len(layer_parameters(model))))


def image_growth(model: RetrievalModel, kept: Growth, *, bf16: bool = False) -> tuple[float, float, float]:
    """Bytes that a forward pass keeps of one image for the way back: the factors of 1, of its positions and of their
    square, positions being those in the images' tower.

    Args:
        model: as it will be trained, with its gradient checkpointing as it is.
        kept: of tokens, as `activation_growth` gives it.
        bf16: under autocast.
    """

    def measure(items: list[Encoded]) -> float:
        batch = to_tensors(model.preprocessor.collate(items), model.device)

        def run() -> Tensor:
            with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
                output: Tensor = model(batch)
                return output

        return float(kept_bytes(run, besides=_state(model)))

    contract = model.contract
    assert contract.images is not None
    with _training(model):
        if contract.visual is None:
            one = Encoded([], [], images=(_blank(contract.images.height, contract.images.width),))
            return measure([one, one]) - measure([one]), 0.0, 0.0
        factor, token = contract.images.factor, contract.visual.image_token_id
        found = []
        for side in _IMAGE_SIDES:
            ids = [*[token] * side**2, contract.pad_token_id]
            image = Encoded(ids, [0] * len(ids), images=(_blank(side * factor, side * factor),))
            found.append(measure([image]) - kept.at(1, len(ids)))
    positions = [(side * contract.visual.merge_size) ** 2 for side in _IMAGE_SIDES]
    square, linear, constant = np.polyfit(positions, found, 2).tolist()
    return constant, linear, square


def _blank(height: int, width: int) -> PreparedImage:
    return PreparedImage(np.zeros((height, width, 3), dtype=np.uint8), bytes(16))


def _has_images(batch: Batch) -> bool:
    return any(item.images for side in batch.sides for item in side)


def _size(batch: Batch, chunk: Chunk) -> tuple[int, int]:
    """Rows and padded tokens of a chunk; without tokens, as those of images that become vectors by themselves, 0."""
    longest = max(len(batch.sides[chunk.side][place].ids) for place in chunk.places)
    return (len(chunk.places), longest) if longest else (0, 0)


def _of_images(batch: Batch, chunk: Chunk, growth: tuple[float, float, float]) -> float:
    """Bytes that a chunk's images keep."""
    constant, linear, square = growth
    total = 0.0
    for place in chunk.places:
        item = batch.sides[chunk.side][place]
        if item.images:
            each = item.image_tokens / len(item.images)
            total += len(item.images) * (constant + linear * each + square * each**2)
    return total


def loss_bytes(model: RetrievalModel, batches: Sequence[Batch], loss: Callable[..., Tensor], plan: Plan) -> float:
    """Bytes that the loss keeps of a whole batch, of all processes."""
    targets = max((batch.targets for batch in batches), key=lambda one: len(one.owner))
    width = model.full_dimension if model.task == "embed" else 0
    rows = len(targets.first)

    def measure(count: int) -> float:
        part = targets.owner < count
        documents = int(part.sum())
        sizes = (count, documents) if width else (documents,)
        with torch.random.fork_rng(devices=[]):
            outputs = [torch.randn(size, width) if width else torch.randn(size) for size in sizes]
        leaves = [output.to(model.device).requires_grad_() for output in outputs]
        guide = (leaves[0].detach(), leaves[1].detach()) if plan.guided else None
        first_stage = None if targets.first_stage is None else targets.first_stage[part]
        own = Targets(targets.owner[part], targets.labels[part], guide, first_stage)
        return float(kept_bytes(lambda: loss(*leaves, own), besides=())) + sum(leaf.nbytes * 2 for leaf in leaves)

    if rows < 4:
        return measure(rows)
    counts = [min(rows, _LOSS_ROWS) // part for part in (1, 2, 4)]
    with as_part_of(plan.batch_size**2 * len(targets.owner) // rows):
        measured = [measure(count) for count in counts]
    return float(np.polyval(np.polyfit(counts, measured, 2), plan.batch_size))


def kept_bytes(run: Callable[[], Tensor], *, besides: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the gradient of `run`, each storage once.

    Args:
        run: gives a tensor with a graph.
        besides: tensors that are held anyway, such as the parameters.
    """
    held = {tensor.untyped_storage().data_ptr() for tensor in besides}
    kept: list[weakref.ref[Tensor]] = []

    def keep(tensor: Tensor) -> Tensor:
        # Not the tensor itself: an output that is kept for its own gradient would never be let go.
        view = tensor.detach()
        kept.append(weakref.ref(view))
        return view

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    # What lies in a branch of the graph that the output does not depend on is gone by now.
    storages = [view.untyped_storage() for reference in kept if (view := reference()) is not None]
    del output
    return sum({one.data_ptr(): one.nbytes() for one in storages if one.data_ptr() not in held}.values())


def _state(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _padded_batch(model: RetrievalModel, rows: int, tokens: int) -> dict[str, Tensor]:
    """Texts of so many tokens, the last of them one shorter: a full batch may take a way of its own."""
    token = model.preprocessor.contract.pad_token_id
    lengths = [tokens] * (rows - 1) + [tokens - 1 if rows > 1 else tokens]
    arrays = model.preprocessor.collate([Encoded([token] * length, [0] * length) for length in lengths])
    return to_tensors(arrays, model.device)


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    was = model.training
    model.train()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        model.train(was)


@contextlib.contextmanager
def _checkpointing(model: RetrievalModel, on: bool) -> Iterator[None]:
    was = model.backbone.is_activation_checkpointing
    _set_checkpointing(model, on)
    try:
        yield
    finally:
        _set_checkpointing(model, was)


def _set_checkpointing(model: RetrievalModel, on: bool) -> None:
    if on:
        model.activation_checkpointing_enable()
    elif model.backbone.is_activation_checkpointing:
        model.activation_checkpointing_disable()


def render(found: Estimate) -> Table:
    """The estimate as a table for a terminal."""
    plan = found.plan
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    table.add_row("[bold]parameters", f"[bold]{_short(found.parameters)}", _trained(found.trained, found.parameters))
    for part in found.parts:
        table.add_row(f"  {part.name}", _short(part.parameters), _trained(part.trained, part.parameters))
    batches = f" in {plan.accumulated} batches" if plan.accumulated > 1 else ""
    shared = f" over {plan.processes} processes" if plan.processes > 1 else ""
    seen = f"by {found.sampled_rows:,} rows looked at"
    table.add_row("[bold]steps", f"[bold]{plan.steps:,}", "")
    table.add_row(
        "  rows a step", f"{plan.batch_size * plan.accumulated:,}", f"{found.texts:,.0f} texts{batches}{shared}, {seen}"
    )
    padding = f"{found.padded_tokens:,.0f} with padding ({1 - found.tokens / found.padded_tokens:.0%})"
    table.add_row("  tokens a step", f"{found.tokens:,.0f}", f"{padding}; longest text {found.longest_tokens:,}")
    table.add_row("[bold]memory", f"[bold]{_bytes(found.total_bytes)}", "an estimate, without Python's own")
    table.add_row("  weights", _bytes(found.weights_bytes), "")
    table.add_row("  gradients", _bytes(found.gradients_bytes), "and their exchange" if plan.processes > 1 else "")
    table.add_row("  AdamW", _bytes(found.optimizer_bytes), "two moments of each trained parameter")
    limit = plan.activation_tokens
    held = "a whole batch" if limit is None else f"{limit:,} tokens" if limit else "one chunk"
    table.add_row("  activations", _bytes(found.activations_bytes), f"of {held}, measured on small batches")
    table.add_row("  loss", _bytes(found.loss_bytes), f"of {plan.batch_size:,} rows")
    return table


def _trained(trained: int, of: int) -> str:
    return (
        "trained" if trained == of else "frozen" if trained == 0 else f"{_short(trained)} trained ({trained / of:.1%})"
    )


def _short(number: int) -> str:
    """A number with three digits that count: 22.7 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"
    return str(number)


def _bytes(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 2**10:.0f} KiB"
