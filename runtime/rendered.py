"""A chat template around an item or a pair, frozen as texts (`rtx.trainer.rendering` makes them).

The whole is tokenised as one text, as the model was trained on it: a token may hold the end of one part and the
beginning of the next, such as the space before a word, or a full stop with the line break behind it. Such a token
belongs to the content that it touches. What is too long loses content, and nothing of the template.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from tokenizers import Tokenizer

from rtx.runtime.pairs import longest_first


class RenderedItem:
    """A chat template around one content.

    Args:
        tokenizer: a tokenizer that does not truncate.
        before, behind: the texts around the content.

    Raises:
        ValueError: the text behind goes on with the word before it, so that its tokens depend on where that is cut.
    """

    def __init__(self, tokenizer: Tokenizer, before: str, behind: str) -> None:
        self._tokenizer = tokenizer
        self._before, self._behind = before, behind
        # With a letter as the content the template's own tokens show: those behind a content that is cut are always
        # these.
        encoding = tokenizer.encode(self.text("a"), add_special_tokens=False)
        stop = len(before) + 1
        starts, ends = zip(*encoding.offsets, strict=True)
        head, tail = bisect_right(ends, len(before)), bisect_left(starts, stop)
        if ends[tail - 1] > stop:
            raise ValueError(
                "rendered: the text behind an item goes on with its last word; expected a space, a line break or a "
                "special token between them"
            )
        self._tail = encoding.ids[tail:]
        self.special_tokens = head + len(self._tail)
        self.template = " ".join(map(str, [*encoding.ids[:head], "$A", *self._tail]))

    def text(self, content: str) -> str:
        """The item as the chat template writes it."""
        return f"{self._before}{content}{self._behind}"

    def cut(self, content: str, *, max_tokens: int) -> list[int]:
        """Token ids of an item that is longer than `max_tokens` as a whole, with its content truncated to fit."""
        encoding = self._tokenizer.encode(self.text(content), add_special_tokens=False)
        starts, ends = zip(*encoding.offsets, strict=True)
        first = bisect_right(ends, len(self._before))
        last = max(first, bisect_left(starts, len(self._before) + len(content)))
        room = max(0, max_tokens - first - len(self._tail))
        return [*encoding.ids[: first + min(room, last - first)], *self._tail]


class RenderedPair:
    """A chat template around a pair.

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
