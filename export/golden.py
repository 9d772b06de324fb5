"""The golden inputs: texts and images that have gone wrong elsewhere, and some of the user's own."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from rtx.runtime.contract import Contract
from rtx.runtime.engine import Budget, Engine, run_items
from rtx.runtime.errors import ExportError, ItemError
from rtx.runtime.evalset import EvalSet
from rtx.runtime.golden import Golden, tokenize
from rtx.runtime.images import BadImage, load_image
from rtx.runtime.items import Content
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.text import Encoded

# Empty, one letter, control characters, scripts, right to left, code, numbers, a long word, long texts.
_TEXTS = (
    "",
    "a",
    "?",
    "how do I reset it?",
    "a\x00b\x07c",
    "   white \t space \n\n everywhere   ",
    "Das Gerät muss vor der Wartung vom Stromnetz getrennt werden.",
    "本机保修期为两年，请保留购买凭证。",
    "لا تفتح الغطاء أثناء التشغيل",
    "Не открывайте крышку во время работы",
    "🔧 tighten to 25 N·m ±5 % (≈ 18 lb·ft)",
    "def parse(path: str) -> dict[str, int]:\n    return json.loads(Path(path).read_text())",
    "3.14159 2,718 1e-9 0x7f 192.0.2.1 2026-11-23T06:19:15Z",
    "antidisestablishmentarianism" * 8,
    "The filter is cleaned once a month. Press the button for three seconds until the light turns green.",
    "Retrieval quality is measured as NDCG at ten over held-out queries. " * 4,
    "The pump delivers twelve litres a minute at two bar; the motor draws four amperes. " * 12,
)
# One more goes past the limit on length, or, where attention over that many tokens would fill the memory, near to here.
_LONG = "A sentence that is longer than any limit says the same again and again. "
_WORDS_OF_LONG = 14
_LONG_TOKENS = 1500
_QUERY = "how long is the warranty?"
_FROM_EVALSET = 16
_IMAGES_FROM_EVALSET = 4


def golden_items(contract: Contract, evalset: EvalSet | None) -> tuple[list[object], list[str | None]]:
    """Items and the name of the prompt of each: built-in ones, then queries and documents of an evaluation set.

    For a reranker each of them is the document of a pair, and the query of one more where it is short.
    """
    queries: list[object] = []
    documents: list[object] = []
    if evalset is not None:
        queries = _sample(evalset.queries, _FROM_EVALSET)
        documents = _sample(evalset.corpus, _FROM_EVALSET)
    built_in: list[object] = [*_TEXTS, _LONG * (1 + min(contract.max_tokens, _LONG_TOKENS) // _WORDS_OF_LONG)]
    if contract.takes_images:
        built_in += _image_items(contract)
    if contract.task == "rerank":
        pairs: list[object] = [(_QUERY, item) for item in built_in]
        pairs += [(text, _TEXTS[14]) for text in _TEXTS[:8]]
        pairs += list(zip(queries, documents, strict=False))
        if contract.takes_images:
            pairs.append((built_in[-1], built_in[-1]))
        return pairs, [None] * len(pairs)
    # The built-in items take each kind of prompt in turn.
    prompts = [(None, "query", "document")[index % 3] for index in range(len(built_in))]
    return [*built_in, *queries, *documents], [*prompts, *["query"] * len(queries), *["document"] * len(documents)]


def _sample(texts: Mapping[str, str], count: int) -> list[object]:
    """Some of an evaluation set's texts; of those with images fewer, and with the files themselves."""
    chosen = random.Random(0).sample(sorted(texts.values()), min(count, len(texts)))
    found: list[object] = []
    images = 0
    for text in chosen:
        item = text.item if isinstance(text, Content) else None
        if item is None:
            found.append(text)
        elif images < _IMAGES_FROM_EVALSET:
            # What cannot be read is named where the set is evaluated.
            with contextlib.suppress(BadImage, OSError):
                found.append({"text": item.text, "image": [_file(str(image)) for image in item.images]})
                images += 1
    return found


def _file(source: str) -> bytes:
    """The bytes of an image's file, or of what is read in another way."""
    path = Path(source)
    return path.read_bytes() if not source.startswith("data:") and path.is_file() else _png(load_image(source))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _image_items(contract: Contract) -> list[object]:
    """Images that have gone wrong elsewhere: odd sizes, one pixel, a thin strip, transparency, text on white."""
    noise = np.random.default_rng(0)
    page = Image.new("RGB", (425, 550), "white")
    drawing = ImageDraw.Draw(page)
    for line in range(12):
        drawing.text((40, 40 + 36 * line), f"{line + 1}. Turn the valve by {15 * line} degrees.", fill="black")
    ramp = np.linspace(0, 255, 97 * 203 * 3).reshape(97, 203, 3).astype(np.uint8)
    clear = Image.new("RGBA", (60, 90), (0, 0, 0, 0))
    ImageDraw.Draw(clear).rectangle((10, 20, 40, 60), fill=(200, 30, 30, 255))
    pictures = [
        Image.fromarray(noise.integers(0, 256, (48, 64, 3), dtype=np.uint8)),
        Image.fromarray(ramp),
        Image.new("RGB", (1, 1), (12, 200, 90)),
        Image.fromarray(noise.integers(0, 256, (24, 600), dtype=np.uint8)),
        clear,
        page,
    ]
    files = [_png(picture) for picture in pictures]
    items: list[object] = [{"text": "", "image": [file]} for file in files]
    if contract.visual is None:
        return items
    # Beside texts, several in an item, the same one twice.
    items += [{"text": text, "image": [file]} for text, file in zip(("fig. 3", _TEXTS[14]), files, strict=False)]
    return [*items, {"text": "which of them is newer?", "image": [files[0], files[5], files[0]]}]


def make_golden(
    preprocessor: Preprocessor, reference: Engine, items: Sequence[object], prompts: Sequence[str | None]
) -> Golden:
    """Run items through the reference engine, each alone.

    An item that gives no token (an empty text where the tokenizer adds no special token) is left out.

    Raises:
        ExportError: no item gives a token.
    """
    encoded = tokenize(preprocessor, items, prompts)
    kept = [index for index, item in enumerate(encoded) if not isinstance(item, ItemError)]
    tokens: list[Encoded] = [item for item in encoded if not isinstance(item, ItemError)]
    if not tokens:
        raise ExportError("the tokenizer gives no token for any golden text; the model cannot be held against anything")
    outputs = run_items(reference, preprocessor, tokens, Budget(max_batch_items=1))
    return Golden(
        tuple(items[index] for index in kept),
        tuple(prompts[index] for index in kept),
        tuple(tokens),
        np.ascontiguousarray(outputs),
    )
