"""Rows to what the model takes: tokenised texts, cut into chunks of similar length, and what the loss compares with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rtx.runtime.batching import plan_batches
from rtx.runtime.contract import Task
from rtx.runtime.errors import DataError, ItemError
from rtx.runtime.items import describe
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.text import Encoded
from rtx.trainer.data import Example, TrainingData
from rtx.trainer.losses.targets import Targets

# A row of the data with its position there.
Numbered = tuple[int, Example]


class NumberedRows(Dataset[Numbered]):
    """Rows that know their position, so that an error can name those of a batch."""

    def __init__(self, data: TrainingData) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Numbered:
        return index, self._data[index]


@dataclass(frozen=True)
class Batch:
    """The rows of a step, prepared but not padded yet: that is done chunk by chunk, when a chunk is run.

    Attributes:
        rows: the rows with their positions in the data.
        sides: prepared items by output of the model: (queries, documents) of an embedder, (pairs,) of a reranker. The
            documents stand row by row.
        targets: what the loss compares the outputs with.
    """

    rows: tuple[Numbered, ...]
    sides: tuple[list[Encoded], ...]
    targets: Targets

    @property
    def tokens(self) -> int:
        """Tokens of all items, with the positions of images in their tower and without padding."""
        return sum(item.length for side in self.sides for item in side)


class Chunk(NamedTuple):
    """Texts of one side that go through the model together.

    Attributes:
        side: position in the batch's sides.
        places: positions in that side.
        tokens: padded tokens.
        idle: run only because other processes run a chunk; its output is not part of the batch.
    """

    side: int
    places: list[int]
    tokens: int
    idle: bool = False


def plan_chunks(batch: Batch, *, chunk_tokens: int) -> list[Chunk]:
    """Cut a batch by tokens, not by texts, and put texts of similar length together, so that little of it is padding.

    An image counts by the positions that it takes in its tower, besides its tokens among those of a text.

    Args:
        batch: what to cut.
        chunk_tokens: most padded tokens of a chunk; an item longer than that is a chunk by itself.

    Returns:
        The chunks of each side, longest texts first.
    """
    chunks: list[Chunk] = []
    for number, side in enumerate(batch.sides):
        # Images that become vectors by themselves run apart from what has tokens.
        for kind in (True, False):
            some = [place for place, item in enumerate(side) if bool(item.ids) == kind]
            lengths = [side[place].length for place in some]
            plan = plan_batches(lengths, max_batch_tokens=chunk_tokens, max_batch_items=max(1, len(some)))
            chunks += [
                Chunk(number, [some[place] for place in places], len(places) * lengths[places[0]]) for places in plan
            ]
    return chunks


def pad_chunks(chunks: Sequence[Chunk], count: int) -> list[Chunk]:
    """So many chunks: idle ones of a single short text come first, where the fewest keep their activations."""
    shortest = min(chunks, key=lambda chunk: chunk.tokens / len(chunk.places))
    idle = Chunk(shortest.side, shortest.places[-1:], shortest.tokens // len(shortest.places), idle=True)
    return [idle] * (count - len(chunks)) + list(chunks)


def assemble(outputs: Sequence[Tensor], chunks: Sequence[Chunk]) -> list[Tensor]:
    """The outputs of chunks, [texts of the chunk, ...] each, as one tensor a side in the side's order."""
    sides: list[Tensor] = []
    for number in range(1 + max(chunk.side for chunk in chunks)):
        of_side = [place for place, chunk in enumerate(chunks) if chunk.side == number and not chunk.idle]
        joined = torch.cat([outputs[place] for place in of_side])
        order = torch.tensor([place for chunk in of_side for place in chunks[chunk].places])
        sides.append(joined[torch.argsort(order).to(joined.device)])
    return sides


class Collator:
    """Prepares the rows of a batch with the model's own preprocessing: here their images are read.

    Args:
        preprocessor: the model's.
        task: "embed" for queries and documents apart, "rerank" for pairs.
        where: names a row in messages, as `TrainingData.where` does.
    """

    def __init__(
        self, preprocessor: Preprocessor, *, task: Task, where: Callable[[int], str] = "row {}".format
    ) -> None:
        self._preprocessor = preprocessor
        self._task = task
        self._where = where

    def __call__(self, rows: Sequence[Numbered]) -> Batch:
        """
        Raises:
            DataError: names every row whose text gives no token at all, or whose image cannot be read.
        """
        examples = [example for _, example in rows]
        targets = Targets.of([example.labels for example in examples], [example.first_stage for example in examples])
        if self._task == "embed":
            queries = [example.query for example in examples]
            documents = [text for example in examples for text in example.documents]
            sides = (
                self._checked(rows, queries, self._preprocessor.encode(queries, prompt="query")),
                self._checked(rows, documents, self._preprocessor.encode(documents, prompt="document")),
            )
            return Batch(tuple(rows), sides, targets)
        pairs = [(example.query, text) for example in examples for text in example.documents]
        encoded = self._preprocessor.encode_pairs(pairs)
        return Batch(tuple(rows), (self._checked(rows, pairs, encoded),), targets)

    def _checked(
        self, rows: Sequence[Numbered], items: Sequence[object], encoded: Sequence[Encoded | ItemError]
    ) -> list[Encoded]:
        """What was made of all items, of which each row has one, or one for each of its documents."""
        if any(isinstance(made, ItemError) for made in encoded):
            owners = [
                row for row, example in rows for _ in range(1 if len(items) == len(rows) else len(example.documents))
            ]
            bad = (
                f"{self._where(row)}: {describe(item)}: {made.message}"
                for row, item, made in zip(owners, items, encoded, strict=True)
                if isinstance(made, ItemError)
            )
            raise DataError("training data: " + "; ".join(bad))
        return cast(list[Encoded], list(encoded))
