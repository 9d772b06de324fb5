"""Text to token ids: the one implementation that trainer, export gate and server share.

items -> check -> prompt -> tokenise (in parallel) -> truncate -> Encoded -> collate -> Batch
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from rtx.runtime.contract import Contract
from rtx.runtime.errors import BundleError, ItemError
from rtx.runtime.pairs import PairTemplate, RenderedPair, special_token_template

Batch = dict[str, NDArray[np.int64]]
"""What a graph takes: by input name, [batch, tokens] int64."""

# A text longer than this many characters a token of the limit is cut before it is tokenised: the first attempt keeps so
# many characters, and each further one, needed only where tokens are long, four times as many.
_PRECUT_CHARS_PER_TOKEN = 16
# Tokens beyond the limit that the cut text must still have before its last word, which the cut may have split: a token
# depends on its own word alone, and where words end on little more than the next character.
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
        BundleError: the tokenizer cannot be read, puts more special tokens around a text than the contract's limit, or
            others than the contract names.
    """

    def __init__(self, contract: Contract, tokenizer_json: str) -> None:
        self.contract = contract
        self.tokenizer_json = tokenizer_json
        self._tokenizers: dict[bool, Tokenizer] = {}
        self._pair_template: PairTemplate | None = None
        self._prompt_tokens: dict[str, int] = {"": 0}
        pairs = contract.task == "rerank"
        tokenizer = self._tokenizer(truncating=not pairs)
        self._rendered: RenderedPair | None = None
        if contract.rendered:
            try:
                self._rendered = RenderedPair(tokenizer, contract.rendered)
            except ValueError as wrong:
                raise BundleError(str(wrong)) from wrong
            special, template = self._rendered.special_tokens, self._rendered.template
        else:
            special = tokenizer.num_special_tokens_to_add(pairs)
            template = special_token_template(tokenizer, pair=pairs)
        if contract.max_tokens <= special:
            # tokenizers would not truncate at all.
            raise BundleError(f"max_tokens: {contract.max_tokens} leaves no room beside {special} special tokens")
        if contract.template not in ("", template):
            raise BundleError(f"tokenizer.json: makes '{template}' of an item; the contract says '{contract.template}'")

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
        encodings = iter(self._tokenizer(truncating=True).encode_batch_fast(texts))
        skipped = self._count_prompt_tokens(prefix) if not self.contract.include_prompt else 0
        rows = (Encoded(row.ids, row.type_ids, min(skipped, len(row.ids))) for row in encodings)
        return _merged(checked, rows)

    def encode_pairs(self, pairs: Sequence[object]) -> list[Encoded | ItemError]:
        """Tokenise (query, document) pairs; the longer of the two is truncated first.

        The contract's default prompt, if it has one, goes before the query, or is in the rendered template.
        """
        checked = [check_pair(index, pair) for index, pair in enumerate(pairs)]
        if self._rendered is not None:
            given = [self._stripped(pair) for pair in checked if isinstance(pair, tuple)]
            return _merged(checked, self._encode_rendered(self._rendered, given))
        prefix = self.contract.prompt_text(None)
        valid = [self._precut_pair(prefix + pair[0], pair[1]) for pair in checked if isinstance(pair, tuple)]
        # One query stands beside many documents: each text is tokenised once.
        texts = list(dict.fromkeys(text for pair in valid for text in pair))
        tokenizer = self._tokenizer(truncating=False)
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        tokens = {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}
        if self._pair_template is None:
            self._pair_template = PairTemplate(tokenizer)
        template, limit = self._pair_template, self.contract.max_tokens
        rows = (Encoded(*template.build(tokens[first], tokens[second], max_tokens=limit)) for first, second in valid)
        return _merged(checked, rows)

    def _stripped(self, pair: tuple[str, str]) -> tuple[str, str]:
        return (pair[0].strip(), pair[1].strip()) if self.contract.strip_sides else pair

    def _encode_rendered(self, rendered: RenderedPair, pairs: Sequence[tuple[str, str]]) -> Iterator[Encoded]:
        limit = self.contract.max_tokens
        sides = [self._precut_pair(*pair) for pair in pairs]
        texts = [rendered.text(*pair) for pair in sides]
        encodings = self._tokenizer(truncating=False).encode_batch_fast(texts, add_special_tokens=False)
        for pair, encoding in zip(sides, encodings, strict=True):
            ids = encoding.ids if len(encoding.ids) <= limit else rendered.cut(*pair, max_tokens=limit)
            yield Encoded(ids, [0] * len(ids))

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

    def _precut(self, text: str, *, min_tokens: int = 0) -> str:
        """The beginning of a very long text: enough of it for the truncated tokens to be those of the whole text.

        Args:
            text: any text.
            min_tokens: keep so many tokens even if the contract's limit is less.
        """
        needed = max(self.contract.max_tokens, min_tokens) + _PRECUT_MARGIN_TOKENS
        keep = needed * _PRECUT_CHARS_PER_TOKEN
        while len(text) > 2 * keep:
            # Between words if there is a space; text without one (Chinese, minified code) is cut anywhere.
            cut = max(text.rfind(" ", keep // 2, keep), 0) or keep
            words = self._tokenizer(truncating=False).encode(text[:cut], add_special_tokens=False).word_ids
            if sum(word != words[-1] for word in words) >= needed:
                return text[:cut]
            keep *= 4
        return text

    def _precut_pair(self, first: str, second: str) -> tuple[str, str]:
        """As `_precut`; the side with more tokens keeps more, since that decides which of the two is truncated."""
        shorter, longer = sorted((first, second), key=len)
        if len(longer) <= 2 * self.contract.max_tokens * _PRECUT_CHARS_PER_TOKEN:
            return first, second
        tokens = self._tokenizer(truncating=False).encode(shorter, add_special_tokens=False)
        cut = self._precut(longer, min_tokens=len(tokens.ids))
        return (first, cut) if longer is second else (cut, second)

    def _count_prompt_tokens(self, prefix: str) -> int:
        """Tokens of the prompt alone with its leading special tokens, without a closing one."""
        if prefix not in self._prompt_tokens:
            encoding = self._tokenizer(truncating=True).encode(prefix)
            closing = 1 if encoding.special_tokens_mask and encoding.special_tokens_mask[-1] else 0
            self._prompt_tokens[prefix] = len(encoding.ids) - closing
        return self._prompt_tokens[prefix]

    def _tokenizer(self, *, truncating: bool) -> Tokenizer:
        # Two objects, the second read when it is needed: switching truncation off and on would race with other threads.
        if truncating not in self._tokenizers:
            try:
                tokenizer = Tokenizer.from_str(self.tokenizer_json)
            except Exception as broken:
                raise BundleError(f"tokenizer.json: cannot be read by tokenizers: {broken}") from broken
            tokenizer.no_padding()
            if truncating:
                tokenizer.enable_truncation(self.contract.max_tokens, direction="right")
            else:
                tokenizer.no_truncation()
            self._tokenizers[truncating] = tokenizer
        return self._tokenizers[truncating]


def _merged(checked: Sequence[object], rows: Iterator[Encoded]) -> list[Encoded | ItemError]:
    """Rows of the valid items and errors of the others, in the order of `checked`."""
    merged = [item if isinstance(item, ItemError) else next(rows) for item in checked]
    return [
        item if isinstance(item, ItemError) or item.ids else ItemError(index, "gives no token; expected at least one")
        for index, item in enumerate(merged)
    ]


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
        length = f" of {len(pair)}" if isinstance(pair, tuple | list) else ""
        return ItemError(index, f"expected a (query, document) pair, got {type(pair).__name__}{length}")
    query, document = check_text(index, pair[0]), check_text(index, pair[1])
    if isinstance(query, ItemError):
        return ItemError(index, f"query: {query.message}")
    if isinstance(document, ItemError):
        return ItemError(index, f"document: {document.message}")
    return query, document
