"""The gradient of a batch in bounded memory, for any loss.

A batch runs in chunks. Those whose activations fit into a budget keep them; the others run twice: first without
gradient, for the loss of the whole batch, then each once more, by itself, with the gradient of the loss by its output.
That is the gradient cache (Gao et al. 2021, arXiv:2101.06983), and the same gradient as of the whole batch at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from rtx.trainer.batches import Batch, Chunk, assemble, pad_chunks
from rtx.trainer.engine import to_tensors
from rtx.trainer.losses.targets import Targets
from rtx.trainer.processes import gather, gather_objects, gather_targets

Run = Callable[[Chunk], Tensor]
JoinedLoss = Callable[[Sequence[Tensor]], Tensor]


def joined_loss(loss: Callable[..., Tensor], targets: Targets) -> JoinedLoss:
    """A loss of the outputs of all processes: outputs of this one, one a side -> the same scalar in each."""
    everything = gather_targets(targets)
    return lambda outputs: loss(*[gather(output) for output in outputs], everything)


def loss_of(
    run: Run,
    chunks: Sequence[Chunk],
    loss: JoinedLoss,
    *,
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Tensor:
    """The loss of a batch, with the graph of all chunks; they run in one context."""
    with context():
        outputs = [run(chunk) for chunk in chunks]
    value = loss(assemble(outputs, chunks))
    idle = [output for output, chunk in zip(outputs, chunks, strict=True) if chunk.idle]
    # They go back as the others do, with a gradient of zero.
    return value + sum_of_products(idle, [torch.zeros_like(output) for output in idle]) if idle else value


def backward(
    run: Run,
    chunks: Sequence[Chunk],
    loss: JoinedLoss,
    *,
    activation_tokens: int | None = None,
    in_step: bool = False,
    propagate: Callable[[Tensor], Any] = torch.Tensor.backward,
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    unsynchronised: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    check: Callable[[Tensor], None] = lambda _: None,
) -> Tensor:
    """Add the gradient of a batch to the parameters' gradients.

    Args:
        run: chunk -> output [texts, ...]; given the same state of the random generators, the same output.
        chunks: of the batch.
        loss: of the assembled outputs.
        activation_tokens: padded tokens whose activations may be held at once. What fits is run once, the rest twice.
            None holds all; 0 holds those of one chunk at a time.
        in_step: all processes run equally many chunks, and hold the activations of equally many: for a sharded model,
            of which each pass gathers the parts.
        propagate: back-propagates a scalar.
        context: in which chunks run, such as autocast. One for all that keep their activations: weights are cast once.
        unsynchronised: a context in which a backward pass does not average gradients over processes; the last
            backward pass is outside of it.
        check: given the loss before anything is propagated; may raise.

    Returns:
        The loss, a scalar without graph.
    """
    live = live_chunks(chunks, activation_tokens)
    if in_step:
        chunks, live = align_chunks(chunks, live)
    if len(live) == len(chunks):
        value = loss_of(run, chunks, loss, context=context)
        check(value)
        propagate(value)
        return value.detach()
    # The first chunks run twice, the last ones once: `live` is a tail, so that all draw their dropout in one order.
    again = [place for place in range(len(chunks)) if place not in live]
    states: dict[int, list[Tensor]] = {}
    outputs: list[Tensor] = []
    with unsynchronised():
        for place in again:
            states[place] = _random_state()
            with torch.no_grad(), context():
                outputs.append(run(chunks[place]))
        with context():
            outputs += [run(chunks[place]) for place in sorted(live)]
        leaves = [output.detach().requires_grad_() for output in outputs]
        value = loss(assemble(leaves, chunks))
        check(value)
        # Of an idle chunk it is zero.
        gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
        if live:
            propagate(sum_of_products([outputs[place] for place in live], [gradients[place] for place in live]))
        outputs.clear()
    for place in again:
        synchronisation = unsynchronised() if place != again[-1] else contextlib.nullcontext()
        with synchronisation, _replaying(states.pop(place)):
            with context():
                output = run(chunks[place])
            propagate(sum_of_products([output], [gradients[place]]))
    return value.detach()


def sum_of_products(outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A scalar whose gradient by the outputs are the given gradients."""
    return torch.stack([(output * gradient).sum() for output, gradient in zip(outputs, gradients, strict=True)]).sum()


def live_chunks(chunks: Sequence[Chunk], activation_tokens: int | None) -> set[int]:
    """Chunks that keep their activations: the last ones, and at least one, since one at a time is held in any case."""
    if activation_tokens is None:
        return set(range(len(chunks)))
    live: set[int] = set()
    held = 0
    for place in reversed(range(len(chunks))):
        held += chunks[place].tokens
        if live and held > activation_tokens:
            break
        live.add(place)
    return live


def align_chunks(chunks: Sequence[Chunk], live: set[int]) -> tuple[list[Chunk], set[int]]:
    """As many chunks in every process, of which as many are live. All processes have to call it.

    Args:
        chunks: of this process.
        live: a tail of them, as `live_chunks` gives it.
    """
    counts = gather_objects((len(chunks), len(live)))
    most = max(count for count, _ in counts)
    # A process that keeps all it has keeps idle ones too, which are small.
    kept = min(most if count == held else held for count, held in counts)
    return pad_chunks(chunks, most), set(range(most - kept, most))


def _random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def _restore(state: Sequence[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(list(state[1:]))


@contextlib.contextmanager
def _replaying(state: Sequence[Tensor]) -> Iterator[None]:
    """The same dropout again; what comes after is as random as if nothing had been repeated."""
    after = _random_state()
    _restore(state)
    try:
        yield
    finally:
        _restore(after)


def batch_run(model: Any, batch: Batch, collate: Callable[..., Any], device: torch.device) -> Run:
    """Pad a chunk and move it to the device when it is its turn, and run the model on it."""

    def run(chunk: Chunk) -> Tensor:
        arrays = collate([batch.sides[chunk.side][place] for place in chunk.places])
        output: Tensor = model(to_tensors(arrays, device))
        return output

    return run
