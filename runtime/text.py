"""Texts to token ids, by a model's contract: its special tokens or chat template, its prompts, its limit.

`rtx.runtime.preprocessor` is what trainer, export gate and server call; this is its half for texts. Where images become
tokens among those of a text, it leaves room for them: as many places as the image has visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from rtx.runtime.contract import Contract
from rtx.runtime.errors import BundleError
from rtx.runtime.image_rules import PreparedImage
from rtx.runtime.items import Item
from rtx.runtime.pairs import PairTemplate, special_token_template
from rtx.runtime.rendered import RenderedItem, RenderedPair

Batch = dict[str, NDArray[Any]]
"""What an engine takes, by names that are those of transformers:

    input_ids, attention_mask, token_type_ids, pooling_mask   [rows, tokens] int64, those that the contract lists
    pixel_values      images of the rows, in order: [images, 3, height, width] float32, or of a model that makes tokens
                      of them [patches of all images, values of a patch] float32
    image_grid_thw    [images, 3] int64, of a model that makes tokens of them: frames, rows and columns of patches
    image_digests     [images, 2] uint64: equal for equal images

A batch has tokens, or images that become vectors by themselves, or tokens with images among them.
"""

# A text longer than this many characters a token of the limit is cut before it is tokenised: the first attempt keeps so
# many characters, and each further one, needed only where tokens are long, four times as many.
_PRECUT_CHARS_PER_TOKEN = 16
# Tokens beyond the limit that the cut text must still have before its last word, which the cut may have split: a token
# depends on its own word alone, and where words end on little more than the next character.
_PRECUT_MARGIN_TOKENS = 16

# An item and how many visual tokens each of its images has.
Sized = tuple[Item, tuple[int, ...]]


class Encoded(NamedTuple):
    """One item, tokenised and truncated, with its special tokens, and its prepared images.

    Attributes:
        ids, type_ids: token ids and segment ids, of equal length; empty for an image that becomes a vector by itself.
        prompt_tokens: leading tokens, special ones included, that belong to a prompt which pooling leaves out; else 0.
        images: prepared images, in the order of their places among the tokens.
        image_tokens: positions that its images take inside a tower of their own: there an image costs about as much as
            a text of so many tokens.
    """

    ids: list[int]
    type_ids: list[int]
    prompt_tokens: int = 0
    images: tuple[PreparedImage, ...] = ()
    image_tokens: int = 0

    def same_as(self, other: Encoded) -> bool:
        """Whether the model is given the same; images are compared by their digests."""
        digests = ([image.digest for image in item.images] for item in (self, other))
        return self._replace(images=()) == other._replace(images=()) and next(digests) == next(digests)

    @property
    def length(self) -> int:
        """What it costs to run: its tokens, and the positions of its images in their tower."""
        return len(self.ids) + self.image_tokens


class TextTokenizer:
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
        self._rendered_items: dict[tuple[str, int], RenderedItem] = {}
        self._rendered_pairs: dict[tuple[int, int], RenderedPair] = {}
        self._prompt_tokens: dict[str, int] = {"": 0}
        pairs = contract.task == "rerank"
        tokenizer = self._tokenizer(truncating=not pairs)
        if contract.rendered:
            try:
                around = self._rendered_pair(0, 0) if pairs else self._rendered_item(contract.prompt_text(None), 0)
            except ValueError as wrong:
                raise BundleError(str(wrong)) from wrong
            special, template = around.special_tokens, around.template
        else:
            special = tokenizer.num_special_tokens_to_add(pairs)
            template = special_token_template(tokenizer, pair=pairs)
        if contract.max_tokens <= special:
            # tokenizers would not truncate at all.
            raise BundleError(f"max_tokens: {contract.max_tokens} leaves no room beside {special} special tokens")
        if contract.template not in ("", template):
            raise BundleError(f"tokenizer.json: makes '{template}' of an item; the contract says '{contract.template}'")

    def tokenize(self, items: Sequence[Sized], *, prompt: str | None = None) -> list[Encoded | str]:
        """Tokenise items.

        Args:
            items: with the visual tokens of their images.
            prompt: name of a prompt of the contract; None for the contract's default.

        Returns:
            For each item its tokens without its images, or a sentence that says what is wrong with it.

        Raises:
            UsageError: the prompt does not exist.
        """
        prefix = self.contract.prompt_text(prompt)
        if self.contract.rendered:
            return self._tokenize_rendered(prefix, items)
        texts = [prefix + self._precut(item.text) for item, _ in items]
        encodings = self._tokenizer(truncating=True).encode_batch_fast(texts)
        skipped = self._count_prompt_tokens(prefix) if not self.contract.include_prompt else 0
        return [_some(Encoded(row.ids, row.type_ids, min(skipped, len(row.ids)))) for row in encodings]

    def tokenize_pairs(self, pairs: Sequence[tuple[Sized, Sized]]) -> list[Encoded | str]:
        """Tokenise (query, document) pairs; the longer of the two is truncated first.

        The contract's default prompt, if it has one, goes before the query, or is in the rendered template.
        """
        if self.contract.rendered:
            return self._tokenize_rendered_pairs(pairs)
        prefix = self.contract.prompt_text(None)
        sides = [self._precut_pair(prefix + query.text, document.text) for (query, _), (document, _) in pairs]
        # One query stands beside many documents: each text is tokenised once.
        texts = list(dict.fromkeys(text for pair in sides for text in pair))
        tokenizer = self._tokenizer(truncating=False)
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        tokens = {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}
        if self._pair_template is None:
            self._pair_template = PairTemplate(tokenizer)
        template, limit = self._pair_template, self.contract.max_tokens
        rows = (Encoded(*template.build(tokens[first], tokens[second], max_tokens=limit)) for first, second in sides)
        return [_some(row) for row in rows]

    def _tokenize_rendered(self, prefix: str, items: Sequence[Sized]) -> list[Encoded | str]:
        contents = [self._precut(self._stripped(item.text)) for item, _ in items]
        around = [self._rendered_item(prefix, len(visual)) for _, visual in items]
        texts = [template.text(content) for template, content in zip(around, contents, strict=True)]
        encodings = self._tokenizer(truncating=False).encode_batch_fast(texts, add_special_tokens=False)
        rows: list[Encoded | str] = []
        for template, content, (_, visual), encoding in zip(around, contents, items, encodings, strict=True):
            room = self.contract.max_tokens - sum(visual) + len(visual)
            if room < template.special_tokens:
                rows.append(self._too_large(visual, template.special_tokens))
            else:
                ids = encoding.ids if len(encoding.ids) <= room else template.cut(content, max_tokens=room)
                rows.append(self._expand(ids, visual))
        return rows

    def _tokenize_rendered_pairs(self, pairs: Sequence[tuple[Sized, Sized]]) -> list[Encoded | str]:
        sides = [
            self._precut_pair(self._stripped(query.text), self._stripped(document.text))
            for (query, _), (document, _) in pairs
        ]
        around = [self._rendered_pair(len(first), len(second)) for (_, first), (_, second) in pairs]
        texts = [template.text(*side) for template, side in zip(around, sides, strict=True)]
        encodings = self._tokenizer(truncating=False).encode_batch_fast(texts, add_special_tokens=False)
        rows: list[Encoded | str] = []
        for template, side, ((_, first), (_, second)), encoding in zip(around, sides, pairs, encodings, strict=True):
            visual = (*first, *second)
            room = self.contract.max_tokens - sum(visual) + len(visual)
            if room < template.special_tokens:
                rows.append(self._too_large(visual, template.special_tokens))
            else:
                ids = encoding.ids if len(encoding.ids) <= room else template.cut(*side, max_tokens=room)
                rows.append(self._expand(ids, visual))
        return rows

    def _rendered_item(self, prefix: str, images: int) -> RenderedItem:
        """The chat template around an item with a prompt and so many images.

        Raises ValueError if the template cannot be cut.
        """
        key = prefix, images
        if key not in self._rendered_items:
            before, behind = self.contract.rendered
            if prefix:
                start, between = self.contract.rendered_prompt
                before = f"{start}{prefix}{between}"
            before += self.contract.rendered_image * images
            self._rendered_items[key] = RenderedItem(self._tokenizer(truncating=False), before, behind)
        return self._rendered_items[key]

    def _rendered_pair(self, first: int, second: int) -> RenderedPair:
        """The chat template around a pair with so many images on each side.

        Raises ValueError if the template cannot be cut.
        """
        key = first, second
        if key not in self._rendered_pairs:
            before, between, behind = self.contract.rendered
            image = self.contract.rendered_image
            parts = (before + image * first, between + image * second, behind)
            self._rendered_pairs[key] = RenderedPair(self._tokenizer(truncating=False), parts)
        return self._rendered_pairs[key]

    def _stripped(self, text: str) -> str:
        return text.strip() if self.contract.strip_sides else text

    def _too_large(self, visual: Sequence[int], special: int) -> str:
        return (
            f"its images take {sum(visual)} tokens and the template {special - len(visual)}; "
            f"expected at most {self.contract.max_tokens} together (max_tokens)"
        )

    def _expand(self, ids: list[int], visual: Sequence[int]) -> Encoded | str:
        """Each image's placeholder as many times as the image has tokens."""
        rules = self.contract.visual
        if rules is not None:
            places = [place for place, token in enumerate(ids) if token == rules.image_token_id]
            if len(places) != len(visual):
                token = self._tokenizer(truncating=False).id_to_token(rules.image_token_id)
                return f"its text holds {token}, which stands for an image; expected none"
            for place, count in zip(reversed(places), reversed(visual), strict=True):
                ids = [*ids[:place], *[rules.image_token_id] * count, *ids[place + 1 :]]
        return _some(Encoded(ids, [0] * len(ids)))

    def pad(self, items: Sequence[Encoded]) -> Batch:
        """Pad items to their longest, or to the contract's fixed length: by input name, [len(items), tokens] int64."""
        contract = self.contract
        longest = max((len(item.ids) for item in items), default=0)
        rows, columns = len(items), max(longest, contract.fixed_tokens)
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


def _some(row: Encoded) -> Encoded | str:
    """The row, if it is not empty."""
    return row if row.ids else "gives no token; expected at least one"
