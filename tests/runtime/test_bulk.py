from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from rtx.runtime import bulk
from rtx.runtime.bulk import Totals, embed_records, without_invalid, write_output
from rtx.runtime.errors import DataError, InvalidItemsError, ItemError, UsageError
from rtx.runtime.parts import PartFolder
from rtx.runtime.records import BadRecord, Record
from rtx.runtime.vectors import ids_file

WIDTH = 4
ROWS_PER_PART = 3


class Stub:
    """Vectors that depend on the text alone, and a log of the texts of every call, which survives the process."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        wrong = [ItemError(i, "is unembeddable") for i, text in enumerate(texts) if text == "unembeddable"]
        if wrong:
            raise InvalidItemsError(wrong, len(texts))
        with self.log.open("a") as stream:
            stream.writelines(f"{text}\n" for text in texts)
        hashes = [hashlib.sha256(text.encode()).digest()[: 4 * WIDTH] for text in texts]
        return (np.frombuffer(b"".join(hashes), dtype=np.uint32).reshape(-1, WIDTH) / 2**32).astype(np.float32)

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


def items(count: int) -> list[Record | BadRecord]:
    """Every fifth is bad in one way or another."""
    bad: list[Record | BadRecord] = [
        Record(2, "in:2", {"text": 17}),
        BadRecord(7, "in:7", "is no valid JSON"),
        Record("twelve", "in:12", {"text": "unembeddable"}),
    ]
    good: list[Record | BadRecord] = [Record(f"id{i}", f"in:{i}", {"text": f"text {i}"}) for i in range(1, count + 1)]
    for place, record in zip((1, 6, 11), bad, strict=True):
        if place < count:
            good[place] = record
    return good


def run(output: Path, records: Iterable[Record | BadRecord], stub: Stub, **options: Any) -> Totals:
    with PartFolder(output, {"precision": "float32"}) as folder:
        embed = partial(without_invalid, stub)
        totals = embed_records(embed, records, folder, column="text", rows_per_part=ROWS_PER_PART, **options)
        write_output(output, folder, totals, width=WIDTH, dtype=np.dtype(np.float32), metadata={"bundle": "toy"})
        folder.remove()
    return totals


def _ids(output: Path) -> list[str]:
    if output.suffix == ".parquet":
        return list(pq.read_table(output)["id"].to_pylist())
    return [json.loads(line)["id"] for line in ids_file(output).read_text().splitlines()]


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file() and file.name != "log"}


def test_what_is_written(tmp_path: Path) -> None:
    totals = run(tmp_path / "out.npy", items(14), Stub(tmp_path / "log"))
    assert (totals.parts, totals.rows, totals.failed, totals.kept, totals.records) == (5, 11, 3, 0, 14)
    assert sorted(content(tmp_path)) == ["out.npy", "out.npy.errors.jsonl", "out.npy.ids.jsonl"]
    ids = _ids(tmp_path / "out.npy")
    assert ids == [f"id{i}" for i in (1, 3, 4, 5, 6, 8, 9, 10, 11, 13, 14)]
    expected = Stub(tmp_path / "log")([f"text {identifier[2:]}" for identifier in ids])
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)
    errors = [json.loads(line) for line in (tmp_path / "out.npy.errors.jsonl").read_text().splitlines()]
    assert errors == [
        {"where": "in:2", "id": 2, "error": "expected a text (str), got int"},
        {"where": "in:7", "id": 7, "error": "is no valid JSON"},
        {"where": "in:12", "id": "twelve", "error": "is unembeddable"},
    ]
    assert list(map(str, totals.first)) == [f"{error['where']}: {error['error']}" for error in errors]


def test_failures_of_a_part_keep_the_order_of_the_input(tmp_path: Path) -> None:
    unembeddable = Record(1, "in:1", {"text": "unembeddable"})
    run(tmp_path / "out.npy", [unembeddable, BadRecord(2, "in:2", "is no valid JSON")], Stub(tmp_path / "log"))
    errors = [json.loads(line) for line in (tmp_path / "out.npy.errors.jsonl").read_text().splitlines()]
    assert [error["where"] for error in errors] == ["in:1", "in:2"]


def test_no_records_give_an_empty_array(tmp_path: Path) -> None:
    run(tmp_path / "out.npy", [], Stub(tmp_path / "log"))
    assert np.load(tmp_path / "out.npy").shape == (0, WIDTH)
    assert sorted(content(tmp_path)) == ["out.npy", "out.npy.ids.jsonl"]


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_a_part_may_have_no_row_at_all(tmp_path: Path, suffix: str) -> None:
    bad = [BadRecord(i, f"in:{i}", "is no valid JSON") for i in range(ROWS_PER_PART)]
    good = Record("a", "in:9", {"text": "text"})
    stub = Stub(tmp_path / "log")
    _unfinished(tmp_path / f"out{suffix}", stub, [*bad, good], parts=1)
    totals = run(tmp_path / f"out{suffix}", [*bad, good], stub)
    assert (totals.rows, totals.failed, totals.kept) == (1, 3, 3)
    assert _ids(tmp_path / f"out{suffix}") == ["a"]


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_killed_at_every_step_a_run_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """SIGKILL before each single fsync, rename and removal of a run, which is then repeated undisturbed."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)  # what a killed process wrote is there without it
    whole = tmp_path / "whole"
    whole.mkdir()
    run(whole / f"out{suffix}", items(14), Stub(whole / "log"))
    texts = Stub(whole / "log").calls()
    steps = resumed = 0
    while True:
        folder = tmp_path / str(steps)
        folder.mkdir()
        output, stub = folder / f"out{suffix}", Stub(folder / "log")
        steps += 1
        if not _killed_at(steps, lambda output=output, stub=stub: run(output, items(14), stub)):
            break
        if output.exists():  # it comes last
            assert content(folder) == content(whole)
        if output.exists() and not (folder / f"{output.name}.partial" / "run.json").exists():
            # It was clearing up: nothing is left to do.
            with pytest.raises(UsageError, match="exists; pass --overwrite"):
                run(output, items(14), stub)
            continue
        finished = len(list(folder.glob("*.partial/0*.json")))
        before = stub.calls()
        totals = run(output, items(14), stub)
        assert totals.kept == min(finished * ROWS_PER_PART, 14)
        assert content(folder) == content(whole)
        again = stub.calls()[len(before) :]
        assert again == [text for text in texts if int(text.split()[1]) > totals.kept]
        resumed += 1
    assert content(folder) == content(whole)
    # 5 parts of two files, run.json, and the outputs: each an fsync and a rename.
    assert resumed >= 2 * (5 * 2 + 1 + 2)
    assert steps > resumed + 5


def _killed_at(step: int, function: Callable[[], object]) -> bool:
    """Run in a child that kills itself before its `step`-th change of the disk; False if it ends before."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            left = step

            def counted(real: Callable[..., Any]) -> Callable[..., Any]:
                def wrapped(*arguments: Any, **options: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*arguments, **options)

                return wrapped

            for module, name in ((os, "fsync"), (os, "replace"), (Path, "unlink"), (Path, "rmdir")):
                setattr(module, name, counted(getattr(module, name)))
            function()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def test_only_the_end_of_a_part_that_was_being_written_is_computed_again(tmp_path: Path) -> None:
    """Half-written files, as a kill in the middle of a write leaves them, count for nothing."""
    output, stub = tmp_path / "out.npy", Stub(tmp_path / "log")
    with pytest.raises(_StopError):
        run(output, _stopping(items(14), 8), stub)
    partial = tmp_path / "out.npy.partial"
    assert sorted(file.name for file in partial.glob("0*")) == [
        "000000.json",
        "000000.npy",
        "000001.json",
        "000001.npy",
    ]
    (partial / "000002.npy").write_bytes((partial / "000001.npy").read_bytes()[:100])
    (partial / "000002.json.4711.tmp").write_text('{"digest": "')
    (partial / "000001.npy").write_bytes(b"")  # its .json is there: a power cut, not a kill
    before = len(stub.calls())
    totals = run(output, items(14), stub)
    assert stub.calls()[before:] == [f"text {i}" for i in (4, 5, 6, 8, 9, 10, 11, 13, 14)]
    assert totals.kept == 3
    assert not partial.exists()
    np.testing.assert_array_equal(np.load(output), Stub(tmp_path / "other")(_texts(items(14))))


class _StopError(Exception):
    pass


def _stopping(records: Sequence[Record | BadRecord], after: int) -> Iterator[Record | BadRecord]:
    yield from records[:after]
    raise _StopError


def _texts(records: Sequence[Record | BadRecord]) -> list[str]:
    fields = [record.fields["text"] for record in records if isinstance(record, Record)]
    return [text for text in fields if isinstance(text, str) and text != "unembeddable"]


def _unfinished(output: Path, stub: Stub, records: Sequence[Record | BadRecord], parts: int) -> None:
    with pytest.raises(_StopError):
        run(output, _stopping(records, parts * ROWS_PER_PART), stub)
    assert len(list(output.parent.glob("*.partial/0*.json"))) == parts


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda rows: [*rows[:4], Record("id5", "in:5", {"text": "changed"}), *rows[5:]], "it differs from in:4 on"),
        (lambda rows: [*rows[:4], Record("other", "in:5", {"text": "text 5"}), *rows[5:]], "it differs from in:4 on"),
        (lambda rows: [Record("new", "in:0", {"text": "new"}), *rows], "it differs from in:0 on"),
        (lambda rows: rows[:8], "it differs from in:7 on"),
        (lambda rows: rows[:6], "it ends after 6 records"),
    ],
)
def test_a_changed_input_is_refused_or_what_still_fits_is_kept(
    tmp_path: Path, change: Callable[[list[Record | BadRecord]], list[Record | BadRecord]], difference: str
) -> None:
    output, stub = tmp_path / "out.npy", Stub(tmp_path / "log")
    _unfinished(output, stub, items(14), parts=3)
    with pytest.raises(DataError) as raised:
        run(output, change(items(14)), stub)
    partial = tmp_path / "out.npy.partial"
    assert str(raised.value).startswith(
        f"the input is not the one that the unfinished run in {partial} has read: {difference}. Go on with the former "
    )
    assert len(list(partial.glob("0*.json"))) == 3
    before = len(stub.calls())
    totals = run(output, change(items(14)), stub, replace=True)
    np.testing.assert_array_equal(np.load(output), Stub(tmp_path / "other")(_texts(change(items(14)))))
    assert len(stub.calls()) - before == totals.records - totals.kept - _failed_after(change(items(14)), totals.kept)


def _failed_after(records: Sequence[Record | BadRecord], start: int) -> int:
    return len(records[start:]) - len(_texts(records[start:]))


def test_input_that_moved_or_grew_is_the_same_as_far_as_it_was_read(tmp_path: Path) -> None:
    output, stub = tmp_path / "out.npy", Stub(tmp_path / "log")
    _unfinished(output, stub, items(14), parts=3)
    moved = [
        Record(record.id, f"elsewhere:{record.id}", record.fields) if isinstance(record, Record) else record
        for record in items(20)
    ]
    assert run(output, moved, stub).kept == 9
    np.testing.assert_array_equal(np.load(output), Stub(tmp_path / "other")(_texts(items(20))))


@pytest.mark.parametrize(("place", "computed"), [(1, 0), (7, 6)])
def test_fail_stops_at_the_first_bad_record_and_keeps_finished_parts(tmp_path: Path, place: int, computed: int) -> None:
    records = [Record(i, f"in:{i}", {"text": f"text {i}"}) for i in range(14)]
    rows: list[Record | BadRecord] = [
        *records[:place],
        Record(place, f"in:{place}", {"text": "\ud800"}),
        *records[place:],
    ]
    output, stub = tmp_path / "out.npy", Stub(tmp_path / "log")
    with pytest.raises(DataError, match=rf"^in:{place}: holds an unpaired surrogate at character 0; expected valid"):
        run(output, rows, stub, on_invalid="fail")
    assert len(stub.calls()) == computed
    assert (tmp_path / "out.npy.partial").exists() == (computed > 0)
    assert run(output, records, stub, replace=True).kept == computed
    assert len(np.load(output)) == 14


def test_fail_also_stops_at_what_only_the_model_finds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^in:3: is unembeddable$"):
        run(
            tmp_path / "out.npy",
            [Record(3, "in:3", {"text": "unembeddable"})],
            Stub(tmp_path / "log"),
            on_invalid="fail",
        )


def test_parts_of_long_texts_end_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "_MAX_PART_CHARS", 25)
    records = [Record(i, f"in:{i}", {"text": text}) for i, text in enumerate(["x" * 10, "y" * 20, "z" * 99, "a", "b"])]
    with PartFolder(tmp_path / "out.npy", {}) as folder:
        embed = partial(without_invalid, Stub(tmp_path / "log"))
        totals = embed_records(embed, records, folder, column="text", rows_per_part=100)
        parts = [folder.part(index) for index in range(totals.parts)]
    assert [part.ids for part in parts if part] == [(0, 1), (2,), (3, 4)]


def test_progress_tells_what_was_computed_from_what_was_kept(tmp_path: Path) -> None:
    output, stub = tmp_path / "out.npy", Stub(tmp_path / "log")
    _unfinished(output, stub, items(14), parts=2)
    seen: list[tuple[int, bool]] = []
    run(output, items(14), stub, on_progress=lambda records, computed: seen.append((records, computed)))
    assert sum(records for records, computed in seen if not computed) == 6
    assert sum(records for records, computed in seen if computed) == 8


def test_without_invalid_runs_the_others_and_names_positions() -> None:
    def double(values: list[int]) -> NDArray[np.int64]:
        for limit in (100, 10):  # two kinds of fault, found one after the other
            if wrong := [ItemError(i, f"over {limit}") for i, value in enumerate(values) if value > limit]:
                raise InvalidItemsError(wrong, len(values))
        return 2 * np.array(values)

    results, rows, errors = without_invalid(double, [1, 200, 20, 3, 300])
    assert results.tolist() == [2, 6]
    assert rows == [0, 3]
    assert errors == [ItemError(1, "over 100"), ItemError(4, "over 100"), ItemError(2, "over 10")]


_MEASURE_PEAK = """
import resource, sys
import numpy as np
from pathlib import Path
from rtx.runtime.bulk import embed_records, write_output
from rtx.runtime.parts import PartFolder
from rtx.runtime.records import Input

def embed(texts):
    return np.zeros((len(texts), 64), np.float32), list(range(len(texts))), []

for source in sys.argv[1:]:
    output = Path(source).with_suffix(".npy")
    with Input(source) as lines, PartFolder(output, {}) as folder:
        totals = embed_records(embed, lines.records(["text"]), folder, column="text", rows_per_part=4096)
        write_output(output, folder, totals, width=64, dtype=np.dtype(np.float32), metadata={})
        folder.remove()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    """Kept in memory, 200,000 records and their vectors would take more than 100 MB."""
    sources = [tmp_path / "few.jsonl", tmp_path / "many.jsonl"]
    for source, rows in zip(sources, (20_000, 200_000), strict=True):
        with source.open("w") as stream:
            stream.writelines(f'{{"id": "{i:06d}", "text": "text {i:06d}"}}\n' for i in range(rows))
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE_PEAK, *map(str, sources)], capture_output=True, text=True, check=True
    )
    few, many = (int(line) * (1 if sys.platform == "darwin" else 1024) for line in result.stdout.split())
    assert np.load(tmp_path / "many.npy", mmap_mode="r").shape == (200_000, 64)
    assert many - few < 20e6
