"""Texts of images by OCR, in an environment of its own, and what of the hidden texts OCR can still read.

python3 -m venv .venvs/ocr && .venvs/ocr/bin/pip install rapidocr==3.10.0 onnxruntime
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.vdr.dataset import Selection
from benchmarks.vdr.masking import text_without
from benchmarks.vdr.queries import FoldedText, folded
from rtx.runtime.errors import DataError
from rtx.runtime.hashing import sha256_of

PYTHON = ".venvs/ocr/bin/python"
TEXTS = "ocr.jsonl"
_INTERPRETER = Path(__file__).parents[2] / PYTHON
_WORKER = Path(__file__).with_name("ocr_worker.py")
# Of a page's pairs of neighbouring words that OCR read before masking: with more of them read after it, the page fails.
_MAX_PAIRS_LEFT = 0.25


@dataclass
class _Found:
    """How many words, pairs of neighbouring words, and whole queries are in a text of OCR."""

    words: int = 0
    pairs: int = 0
    whole: int = 0

    def add(self, other: _Found) -> None:
        self.words += other.words
        self.pairs += other.pairs
        self.whole += other.whole


def check_environment() -> None:
    """
    Raises:
        DataError: the environment with rapidocr is not there.
    """
    if not _INTERPRETER.is_file():
        raise DataError(
            f"{PYTHON}: is not there; OCR runs in an environment of its own: "
            "python3 -m venv .venvs/ocr && .venvs/ocr/bin/pip install rapidocr==3.10.0 onnxruntime"
        )


def read(images: Sequence[Path], texts: Path) -> dict[Path, str]:
    """The text of each image; what `texts` has of the same content is not read again.

    Raises:
        DataError: the environment is not there, or OCR failed.
    """
    check_environment()
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "images.txt"
        listed.write_text("".join(f"{image.resolve()}\n" for image in images), encoding="utf-8")
        command = [str(_INTERPRETER), str(_WORKER), str(listed), str(texts.resolve())]
        environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise DataError(f"OCR failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    by_content: dict[str, str] = {}
    for line in texts.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_content[row["sha256"]] = row["text"]
    return {image: by_content[sha256_of(image)] for image in images}


def check(selections: Sequence[Selection], out: Path, sample: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Read some pages before and after masking, and count what OCR finds of their queries.

    Words of a query may stand elsewhere on its page, so single words stay; pairs of its neighbouring words should not.

    Args:
        selections: of all splits.
        out: folder of the data set.
        sample: how many pages, taken by a hash of their ids.

    Returns:
        The counts, and by page id why the queries of a page have to be dropped.
    """
    targets = {
        (selection.page_id(query.page), query.page): selection
        for selection in selections
        for query in selection.queries
    }
    chosen = sorted(targets, key=lambda key: hashlib.sha256(key[0].encode()).hexdigest())[:sample]
    images = [out / folder / f"{key}.webp" for key, _ in chosen for folder in ("pages", "masked")]
    texts = read(images, out / TEXTS)
    before, after, layer = _Found(), _Found(), _Found()
    failed: dict[str, str] = {}
    queries = 0
    for key, number in chosen:
        selection = targets[key, number]
        shown = FoldedText(texts[out / "pages" / f"{key}.webp"])
        masked = FoldedText(texts[out / "masked" / f"{key}.webp"])
        remaining = FoldedText(text_without(selection.pages[number].page, selection.hidden[number]))
        pairs_before = pairs_left = 0
        for query in selection.queries:
            if query.page != number:
                continue
            queries += 1
            was = _count(query.text, shown, shown)
            now, plain = _count(query.text, shown, masked), _count(query.text, shown, remaining)
            before.add(was)
            after.add(now)
            layer.add(plain)
            pairs_before, pairs_left = pairs_before + was.pairs, pairs_left + max(now.pairs - plain.pairs, 0)
            if now.whole:
                failed[key] = "read by OCR after masking"
        if pairs_left > _MAX_PAIRS_LEFT * pairs_before:
            failed[key] = "read by OCR after masking"
    counts = {
        "pages": len(chosen),
        "queries": queries,
        "read_before_masking": vars(before),
        "of_these_after_masking": vars(after),
        "of_these_in_masked_text_layer": vars(layer),
        "pages_dropped": sorted(failed),
    }
    return counts, failed


def _count(query: str, shown: FoldedText, text: FoldedText) -> _Found:
    """What of a query is in `text`, of what is in `shown`."""
    words = [word for word in map(folded, re.findall(r"\w+", query)) if word]

    def both(wanted: str) -> bool:
        return any(True for _ in shown.find(wanted)) and any(True for _ in text.find(wanted))

    return _Found(
        words=sum(both(word) for word in words if len(word) > 2),
        pairs=sum(both(first + second) for first, second in itertools.pairwise(words)),
        whole=int(both("".join(words))),
    )
