"""Text to token ids: the one implementation that trainer, export gate and server share.

items -> check -> prompt -> tokenise (in parallel) -> truncate -> Encoded -> collate -> Batch
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from rtx.runtime.contract import Contract
from rtx.runtime.errors import BundleError, ItemError

Batch = dict[str, NDArray[np.int64]]
"""What a graph takes: by input name, [batch, tokens] int64."""

# A text longer than this many characters a token of the limit is cut before it is tokenised: the first attempt keeps so
# many characters, and each further one, needed only where tokens are long, four times as many.
_PRECUT_CHARS_PER_TOKEN = 16
# Tokens beyond the limit that the cut text must still have, so that no token near the limit can depend on the cut.
_PRECUT_MARGIN_TOKENS = 16


class Encoded(NamedTuple):
    """One tokenised item, truncated and with its special tokens.

    Attributes:
        ids, type_ids: token ids and segment ids, of equal length.
        prompt_tokens: leading tokens, special ones included, that belong to a prompt which pooling leaves out; else 0.
    """

    ids: list[int]
    type_ids: list[int]
    prompt_tokens: int = 0


class TextPreprocessor:
    """Tokenises by a contract.

    Args:
        contract: the model's input side.
        tokenizer_json: the content of a `tokenizer.json` of the `tokenizers` library.

    Raises:
        BundleError: the tokenizer cannot be read.
    """

    def __init__(self, contract: Contract, tokenizer_json: str) -> None:
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer_json)
        except Exception as broken:
            raise BundleError(f"tokenizer.json: cannot be read by tokenizers: {broken}") from broken
        self.contract = contract
        self.tokenizer_json = tokenizer_json
        self._tokenizer.no_padding()
        # A tokenizer that splits on white space first gives the same leading tokens for a text and for its beginning.
        self._splits_words = self._tokenizer.pre_tokenizer is not None
        self._tokenizer.enable_truncation(contract.max_tokens, strategy="longest_first", direction="right")
        self._prompt_tokens: dict[str, int] = {"": 0}
        self._untruncated: Tokenizer | None = None

    def encode(self, items: Sequence[object], *, prompt: str | None = None) -> list[Encoded | ItemError]:
        """Tokenise texts.

        Args:
            items: texts; anything else becomes an ItemError at its place.
            prompt: name of a prompt of the contract; None for the contract's default.

        Raises:
            UsageError: the prompt does not exist.
        """
        prefix = self.contract.prompt_text(prompt)
        checked = [check_text(index, item) for index, item in enumerate(items)]
        texts = [prefix + self._precut(text) for text in checked if isinstance(text, str)]
        encodings = iter(self._tokenizer.encode_batch_fast(texts))
        skipped = self._count_prompt_tokens(prefix) if not self.contract.include_prompt else 0
        return [
            text if isinstance(text, ItemError) else self._encoded(index, next(encodings), skipped)
            for index, text in enumerate(checked)
        ]

    def encode_pairs(self, pairs: Sequence[object]) -> list[Encoded | ItemError]:
        """Tokenise (query, document) pairs; the longer of the two is truncated first.

        The contract's default prompt, if it has one, goes before the query.
        """
        prefix = self.contract.prompt_text(None)
        checked = [check_pair(index, pair) for index, pair in enumerate(pairs)]
        texts = [
            (prefix + self._precut(pair[0]), self._precut(pair[1]))
            for pair in checked
            if not isinstance(pair, ItemError)
        ]
        encodings = iter(self._tokenizer.encode_batch_fast(texts))
        return [
            pair if isinstance(pair, ItemError) else self._encoded(index, next(encodings), 0)
            for index, pair in enumerate(checked)
        ]

    def collate(self, items: Sequence[Encoded]) -> Batch:
        """Pad items to their longest: by input name of the contract, [len(items), longest] int64."""
        contract = self.contract
        rows, columns = len(items), max((len(item.ids) for item in items), default=0)
        ids = np.full((rows, columns), contract.pad_token_id, dtype=np.int64)
        mask = np.zeros((rows, columns), dtype=np.int64)
        types = np.full((rows, columns), contract.pad_token_type_id, dtype=np.int64)
        pooled = np.zeros((rows, columns), dtype=np.int64)
        for row, item in enumerate(items):
            start = 0 if contract.padding_side == "right" else columns - len(item.ids)
            stop = start + len(item.ids)
            ids[row, start:stop] = item.ids
            types[row, start:stop] = item.type_ids
            mask[row, start:stop] = 1
            pooled[row, start + item.prompt_tokens : stop] = 1
        arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "pooling_mask": pooled}
        return {name: arrays[name] for name in contract.inputs}

    def _encoded(self, index: int, encoding: Encoding, prompt_tokens: int) -> Encoded | ItemError:
        if not encoding.ids:
            return ItemError(index, "gives no token at all; expected a text with at least one")
        return Encoded(encoding.ids, encoding.type_ids, min(prompt_tokens, len(encoding.ids)))

    def _precut(self, text: str) -> str:
        """The beginning of a very long text: enough of it for the truncated tokens to be those of the whole text."""
        keep = self.contract.max_tokens * _PRECUT_CHARS_PER_TOKEN
        if not self._splits_words or len(text) <= 2 * keep:
            return text
        while len(text) > 2 * keep:
            cut = text.rfind(" ", keep // 2, keep)
            if cut > 0 and self._count_tokens(text[:cut]) >= self.contract.max_tokens + _PRECUT_MARGIN_TOKENS:
                return text[:cut]
            keep *= 4
        return text

    def _count_tokens(self, text: str) -> int:
        # A tokenizer of its own: switching truncation off and on again would race with other threads.
        if self._untruncated is None:
            self._untruncated = Tokenizer.from_str(self.tokenizer_json)
            self._untruncated.no_padding()
            self._untruncated.no_truncation()
        return len(self._untruncated.encode(text, add_special_tokens=False).ids)

    def _count_prompt_tokens(self, prefix: str) -> int:
        """Tokens of the prompt alone with its leading special tokens, without a closing one."""
        if prefix not in self._prompt_tokens:
            encoding = self._tokenizer.encode(prefix)
            closing = 1 if encoding.special_tokens_mask and encoding.special_tokens_mask[-1] else 0
            self._prompt_tokens[prefix] = len(encoding.ids) - closing
        return self._prompt_tokens[prefix]


def check_text(index: int, item: object) -> str | ItemError:
    """The item if it is a text that can be tokenised, otherwise what is wrong with it."""
    if not isinstance(item, str):
        return ItemError(index, f"expected a text (str), got {type(item).__name__}")
    try:
        item.encode("utf-8")
    except UnicodeEncodeError as broken:
        return ItemError(index, f"holds an unpaired surrogate at character {broken.start}; expected valid Unicode")
    return item


def check_pair(index: int, pair: object) -> tuple[str, str] | ItemError:
    """The pair if both sides are texts, otherwise what is wrong with it."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        return ItemError(index, f"expected a (query, document) pair, got {type(pair).__name__}")
    query, document = check_text(index, pair[0]), check_text(index, pair[1])
    if isinstance(query, ItemError):
        return ItemError(index, f"query: {query.message}")
    if isinstance(document, ItemError):
        return ItemError(index, f"document: {document.message}")
    return query, document
