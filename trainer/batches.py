"""Examples to what the model takes: which rows make a batch, and how a batch becomes tensors.

A pass over the data is a function of the examples, the seed and the number of the pass alone, so that a resumed run
sees the same batches. Rows of a batch are sorted by length and cut into chunks, so that little of it is padding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypedDict, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from rtx.runtime.batching import plan_batches
from rtx.runtime.errors import DataError, ItemError
from rtx.runtime.text import Encoded, TextPreprocessor
from rtx.trainer.data import Example, Pair, TrainingData, Triple


class Texts(NamedTuple):
    """The texts of a row, as numbers. Two rows may meet in a batch if they share no more than negatives."""

    anchors: frozenset[int]  # query and positive
    negatives: frozenset[int]


class BatchSampler(Sampler[list[int]]):
    """Every row once a pass, in batches of near-equal size without false negatives that can be told by their text.

    In a batch no query and no positive occurs twice, and none is another row's negative: in-batch negatives would tell
    the model that a text does not match itself. A row that fits no batch any more, because too many rows share its
    text, is left out of that pass. Pairs of a reranker are only shuffled.

    Args:
        data: what to draw from.
        batch_size: most rows of a batch.
        seed: of the shuffling.
    """

    def __init__(self, data: TrainingData, *, batch_size: int, seed: int) -> None:
        # Where processes share the batches, accelerate reads these two.
        self.batch_size, self.drop_last = batch_size, False
        self._rows = len(data)
        self._seed = seed
        self._epoch = 0
        self._shared = _rows_that_share(data.examples)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-self._rows // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.plan(self._epoch)

    def plan(self, epoch: int) -> list[list[int]]:
        """The batches of a pass, as positions in the data."""
        return plan_epoch(self._rows, self._shared, len(self), np.random.default_rng([self._seed, epoch]))


def plan_epoch(rows: int, shared: dict[int, Texts], batches: int, generator: np.random.Generator) -> list[list[int]]:
    """Spread rows over batches of near-equal size.

    Args:
        rows: number of rows.
        shared: the texts of those rows that must not meet every other row.
        batches: number of batches, 1 to `rows`.
        generator: decides which rows meet.

    Returns:
        `batches` lists of rows, none empty; a row is in at most one, and left out only if it fits in none.
    """
    room = [rows // batches + (batch < rows % batches) for batch in range(batches)]
    plan: list[list[int]] = [[] for _ in range(batches)]
    anchors: list[set[int]] = [set() for _ in range(batches)]
    negatives: list[set[int]] = [set() for _ in range(batches)]
    held: Counter[int] = Counter()
    order = generator.permutation(rows)
    # Rows that are hard to place come first: the others fit into whatever room is left.
    constrained = [row for row in order.tolist() if row in shared]
    starts = generator.integers(batches, size=len(constrained)).tolist()
    for row, start in zip(constrained, starts, strict=True):
        own = shared[row]
        if any(held[text] >= batches for text in own.anchors):
            continue
        for step in range(batches):
            batch = (start + step) % batches
            if (
                len(plan[batch]) < room[batch]
                and own.anchors.isdisjoint(anchors[batch])
                and own.anchors.isdisjoint(negatives[batch])
                and own.negatives.isdisjoint(anchors[batch])
            ):
                plan[batch].append(row)
                anchors[batch] |= own.anchors
                negatives[batch] |= own.negatives
                held.update(own.anchors)
                break
    free = iter([row for row in order.tolist() if row not in shared])
    for batch, limit in zip(plan, room, strict=True):
        batch += [row for _, row in zip(range(limit - len(batch)), free, strict=False)]
    return plan


def _rows_that_share(examples: Sequence[Example]) -> dict[int, Texts]:
    """The texts of rows whose query or positive occurs in another row, or whose negatives are another's."""
    numbers: dict[str, int] = {}

    def number(texts: Sequence[str]) -> frozenset[int]:
        return frozenset(numbers.setdefault(text, len(numbers)) for text in texts)

    texts = [
        Texts(number((example.query, example.positive)), number(example.negatives))
        for example in examples
        if isinstance(example, Triple)
    ]
    as_anchor = Counter(text for row in texts for text in row.anchors)
    as_negative = Counter(text for row in texts for text in row.negatives)
    return {
        index: row
        for index, row in enumerate(texts)
        if any(as_anchor[text] > 1 or as_negative[text] > (text in row.negatives) for text in row.anchors)
        or any(as_anchor[text] > (text in row.anchors) for text in row.negatives)
    }


class Side(TypedDict):
    """Texts of a batch that go through the model: chunks of similar length, and the way back to the given order.

    Attributes:
        chunks: by input name of the contract, [rows, tokens] int64 each.
        places: [texts] int64, where in the joined outputs of the chunks each text is.
    """

    chunks: list[dict[str, Tensor]]
    places: Tensor


class EmbedBatch(TypedDict):
    """`documents` holds the positive of each query in the queries' order, then all given negatives."""

    queries: Side
    documents: Side


class RerankBatch(TypedDict):
    """`labels` is [pairs] float32."""

    pairs: Side
    labels: Tensor


class Collator:
    """Tokenises a batch with the model's own preprocessing and pads it chunk by chunk.

    Args:
        preprocessor: the model's.
        chunk_tokens: most padded tokens of a chunk; a text longer than that is a chunk by itself.
    """

    def __init__(self, preprocessor: TextPreprocessor, *, chunk_tokens: int) -> None:
        self._preprocessor = preprocessor
        self._chunk_tokens = chunk_tokens

    def __call__(self, examples: Sequence[Example]) -> EmbedBatch | RerankBatch:
        """
        Raises:
            DataError: names every text that gives no token at all.
        """
        if isinstance(examples[0], Triple):
            triples = cast(Sequence[Triple], examples)
            queries = [triple.query for triple in triples]
            documents = [triple.positive for triple in triples]
            documents += [negative for triple in triples for negative in triple.negatives]
            return EmbedBatch(
                queries=self._side(queries, self._preprocessor.encode(queries, prompt="query")),
                documents=self._side(documents, self._preprocessor.encode(documents, prompt="document")),
            )
        pairs = [(pair.query, pair.document) for pair in cast(Sequence[Pair], examples)]
        labels = torch.tensor([pair.label for pair in cast(Sequence[Pair], examples)], dtype=torch.float32)
        return RerankBatch(pairs=self._side(pairs, self._preprocessor.encode_pairs(pairs)), labels=labels)

    def _side(self, texts: Sequence[object], encoded: Sequence[Encoded | ItemError]) -> Side:
        bad = [
            f"{str(text)[:60]!r}: {item.message}"
            for text, item in zip(texts, encoded, strict=True)
            if isinstance(item, ItemError)
        ]
        if bad:
            raise DataError("training data: " + "; ".join(bad))
        items = cast(Sequence[Encoded], encoded)
        lengths = [len(item.ids) for item in items]
        plan = plan_batches(lengths, max_batch_tokens=self._chunk_tokens, max_batch_items=len(items))
        chunks = [self._preprocessor.collate([items[index] for index in chunk]) for chunk in plan]
        places = torch.empty(len(items), dtype=torch.int64)
        places[[index for chunk in plan for index in chunk]] = torch.arange(len(items))
        return Side(
            chunks=[{name: torch.from_numpy(array) for name, array in chunk.items()} for chunk in chunks],
            places=places,
        )
