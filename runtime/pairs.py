"""A pair to one row of tokens, by special tokens around its two sides.

Both sides are truncated to fit, the longer one first, and nothing else of the row is. The `tokenizers`
library truncates pairs too, but keeps every piece that it cuts off, and every combination of such pieces: two texts of
10,000 tokens at a limit of 64 fill the memory of a server.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from rtx.runtime.errors import BundleError


class _Part(NamedTuple):
    """A special token of the row, or (side 0 or 1) the place of the first or the second token list."""

    side: int | None
    token: int
    type_id: int


class PairTemplate:
    """Where the two sides of a pair go between the special tokens of a tokenizer.

    Args:
        tokenizer: a tokenizer that does not truncate.

    Raises:
        BundleError: the tokenizer does not put each side once, whole, into a row.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        row = tokenizer.encode("a", "b")
        self._parts: list[_Part] = []
        for token, type_id, side in zip(row.ids, row.type_ids, row.sequence_ids, strict=True):
            if side is None or not self._parts or self._parts[-1].side != side:
                self._parts.append(_Part(side, token, type_id))
        self.special_tokens = sum(part.side is None for part in self._parts)
        a, b = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("a", "b"))
        swapped = tokenizer.encode("b", "a")
        if not a or not b or self.build(b, a, max_tokens=len(swapped.ids)) != (swapped.ids, swapped.type_ids):
            raise BundleError("tokenizer.json: does not put each side of a pair once, whole, into a row")

    def build(self, first: Sequence[int], second: Sequence[int], *, max_tokens: int) -> tuple[list[int], list[int]]:
        """Truncate the sides to fit and put special tokens around them.

        Args:
            first, second: token ids, without special tokens.
            max_tokens: longest row, special tokens included.

        Returns:
            Token ids and segment ids of the row.
        """
        lengths = longest_first(len(first), len(second), max_tokens - self.special_tokens)
        sides = (first[: lengths[0]], second[: lengths[1]])
        ids: list[int] = []
        type_ids: list[int] = []
        for part in self._parts:
            tokens = [part.token] if part.side is None else sides[part.side]
            ids += tokens
            type_ids += [part.type_id] * len(tokens)
        return ids, type_ids


def special_token_template(tokenizer: Tokenizer, *, pair: bool) -> str:
    """What a tokenizer puts around a text or a pair, in token ids: "101 $A 102", or "101 $A 102 $B:1 102:1".

    Segment ids other than 0 stand behind a colon.
    """
    row = tokenizer.encode("a", "b") if pair else tokenizer.encode("a")
    parts: list[str] = []
    for token, type_id, side, attended in zip(row.ids, row.type_ids, row.sequence_ids, row.attention_mask, strict=True):
        name = str(token) if side is None else ("$A", "$B")[side]
        part = f"{name}:{type_id}" if type_id else name
        if attended and (side is None or part not in parts[-1:]):
            parts.append(part)
    return " ".join(parts)


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of two sides after truncation to `room` tokens: the longer loses tokens until both are equally long, then
    both do; of an odd number the longer keeps one more. The rule of the same name in `tokenizers`."""
    shorter = min(first, second, room // 2)
    longer = min(max(first, second), room - shorter)
    return (longer, shorter) if first > second else (shorter, longer)
