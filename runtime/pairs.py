"""A pair to one row of tokens, by special tokens around its two sides or by a chat template.

Either way both sides are truncated to fit, the longer one first, and nothing else of the row is. The `tokenizers`
library truncates pairs too, but keeps every piece that it cuts off, and every combination of such pieces: two texts of
10,000 tokens at a limit of 64 fill the memory of a server.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
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


class RenderedPair:
    """A chat template around a pair.

    The whole is tokenised as one text, as the model was trained on it: a token may hold the end of one part and the
    beginning of the next, such as the space before a word, or a full stop with the line break behind it. Such a token
    belongs to the side that it touches.

    Args:
        tokenizer: a tokenizer that does not truncate.
        parts: the texts before the first side, between the sides, and behind the second one.

    Raises:
        ValueError: a part goes on with the word before it, so that its tokens depend on where that side is cut.
    """

    def __init__(self, tokenizer: Tokenizer, parts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._before, self._between, self._behind = parts
        # With a letter on each side the parts' own tokens show: those behind a side that is cut are always these.
        encoding = tokenizer.encode(self.text("a", "a"), add_special_tokens=False)
        first, second = len(self._before), len(self._before) + 1 + len(self._between)
        starts, ends = zip(*encoding.offsets, strict=True)
        stops = bisect_right(ends, first), bisect_right(ends, second)
        begins = bisect_left(starts, first + 1), bisect_left(starts, second + 1)
        if any(ends[begin - 1] > side + 1 for begin, side in zip(begins, (first, second), strict=True)):
            raise ValueError(
                "rendered: the text behind a side goes on with its last word; expected a space, a line break or a "
                "special token between them"
            )
        head, self._middle = encoding.ids[: stops[0]], encoding.ids[begins[0] : stops[1]]
        self._tail = encoding.ids[begins[1] :]
        # What a word takes with it of the part before: the space, in most tokenizers.
        self._taken = second - max(ends[: stops[1]], default=0)
        self.special_tokens = len(head) + len(self._middle) + len(self._tail)
        self.template = " ".join(map(str, [*head, "$A", *self._middle, "$B", *self._tail]))

    def text(self, first: str, second: str) -> str:
        """The pair as the chat template writes it."""
        return f"{self._before}{first}{self._between}{second}{self._behind}"

    def cut(self, first: str, second: str, *, max_tokens: int) -> list[int]:
        """Token ids of a pair that is longer than `max_tokens` as a whole, with its sides truncated to fit."""
        encoding = self._tokenizer.encode(self.text(first, second), add_special_tokens=False)
        ids, (starts, ends) = encoding.ids, zip(*encoding.offsets, strict=True)
        end_of_first = len(self._before) + len(first)
        start_of_second = end_of_first + len(self._between)
        a = bisect_right(ends, len(self._before))
        b = max(a, bisect_left(starts, end_of_first))
        c = max(b, bisect_right(ends, start_of_second - self._taken))
        d = max(c, bisect_left(starts, start_of_second + len(second)))
        head, middle, tail = ids[:a], ids[b:c], self._tail

        def fit() -> tuple[int, int]:
            return longest_first(b - a, d - c, max_tokens - len(head) - len(middle) - len(tail))

        lengths = fit()
        if lengths[0] < b - a:
            # The first side's last token, which may have held a piece of the middle, goes.
            middle = self._middle
            lengths = fit()
            if lengths[1] == d - c:
                tail = ids[d:]
                lengths = fit()
        return [*head, *ids[a : a + lengths[0]], *middle, *ids[c : c + lengths[1]], *tail]


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
