"""What a benchmark runs: queries one by one, a mix of natural lengths, and items of one length each.

All of it is chosen deterministically, and every prefix of the mix holds the lengths of the whole: how many items a
machine gets through then does not change what they are like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from rtx.runtime.errors import ItemError
from rtx.runtime.items import check_text
from rtx.runtime.preprocessor import Preprocessor

Item = Any  # a text (str) or images (Content), or for a reranker a (query, document) pair of them

LENGTH_BUCKETS = (16, 64, 128, 256, 512)
DOCUMENTS_PER_QUERY = 10

_MIX_ITEMS = 256
_MIX_TOKENS = (16, 256)
_BUCKET_ITEMS = 16
_QUERIES = 128
_QUERY_TOKENS = (6, 16)
_QUERY_WORDS = 8
_WORDS = 2048
_GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True)
class Workload:
    """What is run.

    Attributes:
        queries: calls whose latency is measured: one short text each, or a query with DOCUMENTS_PER_QUERY documents.
        mix: items of natural lengths.
        by_length: items by their number of tokens, special tokens and prompt included.
        mix_tokens: number of tokens of each item of the mix.
        source: where the texts come from, for the report.
    """

    queries: tuple[tuple[Item, ...], ...]
    mix: tuple[Item, ...]
    by_length: dict[int, tuple[Item, ...]]
    mix_tokens: tuple[int, ...]
    source: str


def make_workload(
    preprocessor: Preprocessor,
    *,
    documents: Sequence[str] = (),
    queries: Sequence[str] = (),
    source: str = "",
    seed: int = 0,
) -> Workload:
    """Choose or make the items.

    Args:
        preprocessor: of the model; its tokenizer gives words where there are no documents, and counts tokens.
        documents: texts, or images as `Content`, to take the mix from; without any, texts of one-token words whose
            lengths are log-uniform between 16 and 256 tokens (87 on average).
        queries: texts whose latency is measured; without any, the first words of documents, or made like those.
        source: where documents and queries come from.
        seed: of the choice.
    """
    random = np.random.default_rng(seed)
    composer = _Composer(preprocessor, random)
    limit = preprocessor.contract.max_tokens
    documents = [text for text in documents if text.strip() and isinstance(check_text(0, text), str)]
    queries = [text for text in queries if text.strip() and isinstance(check_text(0, text), str)]
    if documents:
        chosen = _spread(sorted(documents, key=lambda text: (len(text), text)), _MIX_ITEMS)
        queries = queries or [" ".join(text.split()[:_QUERY_WORDS]) for text in chosen]
        mix = tuple(_item(preprocessor, text, queries[index % len(queries)]) for index, text in enumerate(chosen))
    else:
        shortest, longest = (min(tokens, limit) for tokens in _MIX_TOKENS)
        lengths = [round(shortest * (longest / shortest) ** u) for u in _low_discrepancy(_MIX_ITEMS)]
        mix = tuple(composer.item(tokens) for tokens in lengths)
        made = [round(low + u * (high - low)) for u in _low_discrepancy(_QUERIES) for low, high in [_QUERY_TOKENS]]
        queries = queries or [composer.text(min(tokens, limit), prompt="query") for tokens in made]
    queries = [queries[index % len(queries)] for index in random.permutation(max(len(queries), _QUERIES))[:_QUERIES]]
    lengths_run = [tokens for tokens in LENGTH_BUCKETS if tokens <= limit] or [limit]
    made_of_length = [tuple(composer.item(tokens) for _ in range(_BUCKET_ITEMS)) for tokens in lengths_run]
    return Workload(
        queries=tuple(_call(preprocessor, query, mix, row) for row, query in enumerate(queries)),
        mix=mix,
        # By the length that they have: a long prompt leaves no room for a short text.
        by_length={round(float(np.mean(count_tokens(preprocessor, items)))): items for items in made_of_length},
        mix_tokens=tuple(count_tokens(preprocessor, mix)),
        source=source if documents else "words of the tokenizer's vocabulary",
    )


def count_tokens(preprocessor: Preprocessor, items: Sequence[Item], *, prompt: str = "document") -> list[int]:
    """Tokens of each item as the graph gets it: truncated, special tokens and prompt included; 0 for an invalid one."""
    if preprocessor.contract.task == "rerank":
        encoded = preprocessor.encode_pairs(items)
    else:
        encoded = preprocessor.encode(items, prompt=prompt)
    return [0 if isinstance(item, ItemError) else len(item.ids) for item in encoded]


class _Composer:
    """Makes items of a given number of tokens out of words that are one token each."""

    def __init__(self, preprocessor: Preprocessor, random: np.random.Generator) -> None:
        self._preprocessor = preprocessor
        self._random = random
        self._words = _one_token_words(preprocessor.tokenizer_json, random)
        # Tokens beyond the words: special ones, the prompt's, the query's. Learnt from the item before.
        self._surplus: dict[str, int] = {}

    def item(self, tokens: int) -> Item:
        """A text, or a pair of a short query and a document, of so many tokens in all."""
        if self._preprocessor.contract.task == "embed":
            return self.text(tokens, prompt="document")
        query = self._draw(max(1, min(_QUERY_WORDS, tokens // 4)))
        return self._fit(tokens, lambda words: (query, words), prompt="")

    def text(self, tokens: int, *, prompt: str) -> Item:
        if self._preprocessor.contract.task == "rerank":
            return self._draw(tokens)
        return self._fit(tokens, lambda words: words, prompt=prompt)

    def _fit(self, tokens: int, build: Any, *, prompt: str) -> Item:
        """An item of `tokens` tokens, or as near to it as a few corrections bring it."""
        surplus, best, best_miss = self._surplus.get(prompt, 0), None, 0
        for _ in range(4):
            item = build(self._draw(max(1, tokens - surplus)))
            miss = count_tokens(self._preprocessor, [item], prompt=prompt)[0] - tokens
            if best is None or abs(miss) < abs(best_miss):
                best, best_miss = item, miss
            if miss == 0 or surplus + miss >= tokens:
                break
            surplus += miss
        self._surplus[prompt] = surplus
        return best

    def _draw(self, count: int) -> str:
        return " ".join(self._words[index] for index in self._random.integers(len(self._words), size=count))


def _one_token_words(tokenizer_json: str, random: np.random.Generator) -> list[str]:
    """Words of the vocabulary that are one token each within a text; if there are none, whatever it can spell."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    ids = sorted(tokenizer.get_vocab(with_added_tokens=False).values())
    drawn = [ids[index] for index in random.permutation(len(ids))[: 8 * _WORDS]]
    decoded = [text.strip() for text in tokenizer.decode_batch([[token] for token in drawn])]
    alphabetic = list(dict.fromkeys(text for text in decoded if text.isalpha()))
    doubled = tokenizer.encode_batch_fast([f"{text} {text}" for text in alphabetic], add_special_tokens=False)
    whole = [text for text, encoding in zip(alphabetic, doubled, strict=True) if len(encoding.ids) == 2]
    words = [text for text in whole if len(text) > 2] or whole or alphabetic or ["a"]
    return words[:_WORDS]


def _item(preprocessor: Preprocessor, document: str, query: str) -> Item:
    return document if preprocessor.contract.task == "embed" else (query, document)


def _call(preprocessor: Preprocessor, query: str, mix: Sequence[Item], row: int) -> tuple[Item, ...]:
    """What is sent at once: the query alone, or with the next few documents of the mix."""
    if preprocessor.contract.task == "embed":
        return (query,)
    start = row * DOCUMENTS_PER_QUERY
    return tuple((query, mix[(start + place) % len(mix)][1]) for place in range(DOCUMENTS_PER_QUERY))


def _spread(ordered: Sequence[str], count: int) -> list[str]:
    """Up to `count` texts of a list, evenly from all over it, in an order whose every prefix is even as well."""
    if len(ordered) <= count:
        ranks = np.argsort(_low_discrepancy(len(ordered)), kind="stable")
        places = np.empty(len(ordered), dtype=np.int64)
        places[ranks] = np.arange(len(ordered))
    else:
        places = np.floor(_low_discrepancy(count) * len(ordered)).astype(np.int64)
    return [ordered[place] for place in places.tolist()]


def _low_discrepancy(count: int) -> NDArray[np.float64]:
    """Multiples of the golden ratio modulo 1: every prefix fills [0, 1) evenly (Weyl 1916, Math. Annalen 77:313)."""
    return np.asarray(np.arange(1, count + 1) * _GOLDEN_RATIO % 1.0, dtype=np.float64)
