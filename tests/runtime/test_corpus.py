from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import pytest

from rtx.runtime import corpus as corpus_module
from rtx.runtime.contract import Contract
from rtx.runtime.corpus import collect, embed_corpus
from rtx.runtime.errors import ArtifactError, DataError, InvalidItemsError, ItemError


class Numbers:
    """The vector of "d3" is (3, 3); "<silent>" has none, and that of "d0" overflows."""

    contract = Contract(task="embed", inputs=("input_ids",), max_tokens=8, pad_token_id=0, dimension=2)

    def embed(self, items, *, prompt=None):
        assert prompt == "document"
        if silent := [ItemError(at, "gives no token") for at, item in enumerate(items) if item == "<silent>"]:
            raise InvalidItemsError(silent, len(items))
        numbers = [float(item.strip()[1:]) for item in items]
        return np.array([[number or np.inf] * 2 for number in numbers], dtype=np.float32).reshape(-1, 2)


def test_a_corpus_has_each_text_once():
    corpus = embed_corpus(Numbers(), ["d3", "", "d1", " d3", "<silent>", "d3\n", "d0", " ", "d2"])
    assert corpus.texts == ["d3", "d1", "d2"]
    assert corpus.vectors[:, 0].tolist() == [3, 1, 2]
    assert sorted(corpus.places.values()) == [0, 1, 2]
    assert corpus.left_out == {"empty": 2, "repeated": 2, "without a vector": 2}


@pytest.mark.parametrize("mapped", [False, True])
def test_vectors_are_collected_as_they_come(monkeypatch, tmp_path, mapped):
    if mapped:
        monkeypatch.setattr(corpus_module, "_MEMORY_BYTES", 0)
    blocks = [np.arange(8, dtype=np.float32).reshape(2, 4), np.empty((0, 4), np.float32), np.ones((1, 4), np.float32)]
    vectors = collect(iter(blocks), rows=5, dim=4, folder=tmp_path)
    np.testing.assert_array_equal(vectors, np.concatenate(blocks))
    assert (vectors.dtype, vectors.shape) == (np.float32, (3, 4))
    assert collect(iter(blocks[1:2]), rows=5, dim=4, folder=tmp_path).shape == (0, 4)
    assert isinstance(vectors.base, np.memmap) is mapped
    assert list(tmp_path.iterdir()) == []


def test_vectors_that_cannot_be_kept_are_one_error(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus_module, "_MEMORY_BYTES", 0)
    with pytest.raises(ArtifactError, match="the vectors of the corpus cannot be kept there: No such file"):
        embed_corpus(Numbers(), ["d1"], folder=tmp_path / "nowhere")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("rows", [1, 100_000])
def test_a_full_disk_is_one_error(monkeypatch, rows):
    monkeypatch.setattr(corpus_module, "_MEMORY_BYTES", 0)
    monkeypatch.setattr(
        tempfile,
        "TemporaryFile",
        lambda **options: Path("/dev/full").open("w+b", options["buffering"]),  # noqa: SIM115
    )
    with pytest.raises(ArtifactError, match=f"^{tempfile.gettempdir()}: the vectors .*: No space left on device$"):
        collect([np.ones((rows, 4), np.float32)], rows=rows, dim=4)


@pytest.mark.parametrize(("texts", "left_out"), [([], "0 empty"), ([" ", ""], "2 empty"), (["<silent>"], "0 empty")])
def test_a_corpus_of_nothing(texts, left_out):
    without = texts.count("<silent>")
    with pytest.raises(DataError) as raised:
        embed_corpus(Numbers(), texts)
    assert str(raised.value) == (
        f"the corpus has no text that can be compared; left out: {left_out}, 0 repeated, {without} without a vector"
    )


def test_a_stream_may_take_a_part_at_a_time(monkeypatch, tmp_path):
    class Slow(io.FileIO):
        def write(self, content):
            return super().write(content[:5])

    monkeypatch.setattr(corpus_module, "_MEMORY_BYTES", 0)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Slow(tmp_path / "vectors", "w+"))
    block = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(collect([block, block], rows=4, dim=4), np.concatenate([block, block]))
