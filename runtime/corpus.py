"""The texts and images that a search goes through, each once, with their vectors."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rtx.runtime.bulk import calls, without_invalid
from rtx.runtime.errors import ArtifactError, DataError, InvalidItemsError, ItemError
from rtx.runtime.evaluation import EmbeddingModel
from rtx.runtime.inputs import image_digest
from rtx.runtime.items import Content, read_item

# Vectors that take more are kept in a file.
_MEMORY_BYTES = 2**30
# Texts of one call of the model: enough to sort by length, few enough to show progress.
_TEXTS_PER_CALL = 2048

Key = bytes
"""What two texts share that differ in white space at most, and two images of the same bytes, wherever they lie."""


def key_of(text: str) -> Key:
    if isinstance(text, Content):
        item = text.item
        text = "\0".join([item.text, *(_digest(str(image)) for image in item.images)])
    # Sixteen bytes instead of a second copy of each text.
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()


def _digest(image: str) -> str:
    if image.startswith("data:"):
        return image_digest(image)
    try:
        status = os.stat(image)
    except (OSError, ValueError):
        return image_digest(image)
    return _file_digest(image, status.st_size, status.st_mtime_ns)


# A key is asked for several times, and a file may be large.
@lru_cache(maxsize=1 << 18)
def _file_digest(path: str, _size: int, _changed_ns: int) -> str:
    return image_digest(path)


@dataclass(frozen=True, eq=False)
class Corpus:
    """What a search goes through.

    Attributes:
        texts: no two with the same key, in the order in which they were first given.
        vectors: [texts, dim] float32, all finite; in memory, or mapped from a file.
        places: position by key.
        left_out: how many texts were given besides: "empty", "repeated", and "without a vector" (see `embed_or_nan`).
    """

    texts: Sequence[str]
    vectors: NDArray[np.float32]
    places: dict[Key, int]
    left_out: dict[str, int]


def embed_corpus(
    model: EmbeddingModel,
    texts: Iterable[str],
    *,
    folder: Path | None = None,
    on_progress: Callable[[int, int], object] = lambda _done, _total: None,
) -> Corpus:
    """Embed the distinct texts, with the prompt "document".

    Args:
        model: makes the vectors.
        texts: any number, with repetitions; each a valid text (`rtx.runtime.items.check_text`), or a `Content`.
        folder: where vectors go that take more than 1 GiB, into a file without a name that vanishes with the process;
            None for the system's folder for temporary files.
        on_progress: called with the number of texts that are done, and of all.

    Raises:
        InvalidItemsError: the model does not take images, or not beside a text, and texts have them; all are listed.
        DataError: there is no text, or the model gives a usable vector to none.
        ArtifactError: the vectors cannot be written.
    """
    left_out = {"empty": 0, "repeated": 0, "without a vector": 0}
    distinct: dict[Key, str] = {}
    for text in texts:
        if not text.strip():
            left_out["empty"] += 1
        elif (key := key_of(text)) in distinct:
            left_out["repeated"] += 1
        else:
            distinct[key] = text
    keys, all_texts = list(distinct), list(distinct.values())
    del distinct
    _check(model, all_texts)
    kept: list[int] = []

    def blocks() -> Iterator[NDArray[np.float32]]:
        done = 0
        for some in calls(all_texts, _TEXTS_PER_CALL):
            vectors, _ = embed_or_nan(model, some, prompt="document")
            finite = np.flatnonzero(np.isfinite(vectors).all(axis=1))
            kept.extend((finite + done).tolist())
            done += len(some)
            yield vectors[finite]
            on_progress(done, len(all_texts))

    vectors = collect(blocks(), rows=len(all_texts), dim=model.contract.dimension, folder=folder)
    left_out["without a vector"] = len(all_texts) - len(kept)
    if not kept:
        raise DataError(f"the corpus has no text that can be compared; left out: {_counts(left_out)}")
    places = {keys[place]: row for row, place in enumerate(kept)}
    return Corpus([all_texts[place] for place in kept], vectors, places, left_out)


def _check(model: EmbeddingModel, texts: Sequence[str]) -> None:
    """
    Raises:
        InvalidItemsError: the model takes no such items as some of the images are.
    """
    contents = ((place, text) for place, text in enumerate(texts) if isinstance(text, Content))
    found = (read_item(place, text, model.contract) for place, text in contents)
    if errors := [wrong for wrong in found if isinstance(wrong, ItemError)]:
        raise InvalidItemsError(errors, len(texts))


def embed_or_nan(
    model: EmbeddingModel, texts: Sequence[str], *, prompt: str
) -> tuple[NDArray[np.float32], dict[int, str]]:
    """[texts, dim] float32, not finite where the model overflows, makes no token of a text, or an image is damaged; and
    by row, why, where there is more to say than that.
    """
    all_vectors = np.full((len(texts), model.contract.dimension), np.nan, dtype=np.float32)
    reasons: dict[int, str] = {}
    done = 0
    for some in calls(texts, _TEXTS_PER_CALL):
        vectors, rows, errors = without_invalid(lambda items: model.embed(items, prompt=prompt), some)
        all_vectors[np.array(rows, dtype=np.int64) + done] = vectors
        reasons |= {done + error.index: error.message for error in errors}
        done += len(some)
    return all_vectors, reasons


def collect(
    blocks: Iterable[NDArray[np.float32]], *, rows: int, dim: int, folder: Path | None = None
) -> NDArray[np.float32]:
    """Blocks of vectors one below the other, in memory or, where they may take more than 1 GiB, mapped from a file.

    Args:
        blocks: [some, dim] float32 each.
        rows: most that come together.
        dim: of all.
        folder: as in `embed_corpus`.

    Returns:
        [rows that came, dim] float32.

    Raises:
        ArtifactError: the file cannot be written.
    """
    if rows * dim * 4 > _MEMORY_BYTES:
        return _collect_in_file(blocks, dim, folder)
    vectors = np.empty((rows, dim), dtype=np.float32)
    filled = 0
    for block in blocks:
        vectors[filled : filled + len(block)] = block
        filled += len(block)
    return vectors[:filled]


def _collect_in_file(blocks: Iterable[NDArray[np.float32]], dim: int, folder: Path | None) -> NDArray[np.float32]:
    # Written, not mapped for writing: a full disk is then an error and not the death of the process.
    filled = 0
    with _as_artifact_error(folder):
        # Without a buffer, which would be written once more, and fail once more, when the stream is closed.
        stream = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed below
    with stream:
        for block in blocks:
            with _as_artifact_error(folder):
                rest = np.ascontiguousarray(block, dtype=np.float32).ravel().view(np.uint8)
                while len(rest):
                    rest = rest[stream.write(rest.data) :]
            filled += len(block)
        if not filled:  # a mapping of nothing does not exist
            return np.empty((0, dim), dtype=np.float32)
        # The mapping outlives the stream.
        return np.asarray(np.memmap(stream, np.float32, "r", shape=(filled, dim)))


@contextmanager
def _as_artifact_error(folder: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as broken:
        where, why = folder or tempfile.gettempdir(), broken.strerror or broken
        raise ArtifactError(f"{where}: the vectors of the corpus cannot be kept there: {why}") from broken


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.items())
