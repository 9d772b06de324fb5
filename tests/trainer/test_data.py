from __future__ import annotations

import csv
import gzip
import hashlib
import json
import multiprocessing
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from rtx.runtime.errors import ArtifactError, DataError, UsageError
from rtx.runtime.hashing import sha256_of
from rtx.trainer.data import Example, TrainingData


def write_jsonl(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def problems_of(paths, needs="positives", **options):
    with pytest.raises(DataError) as error:
        TrainingData.read(paths, needs=needs, **options)
    return str(error.value)


def triples(count):
    return [{"query": f"q{i}", "positive": f"p{i}", "negatives": [f"n{j}" for j in range(i % 3)]} for i in range(count)]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "tsv", "parquet", "datasets", "datasets_dict"])
def test_every_format_gives_the_same_examples(tmp_path, kind):
    rows = [
        {"query": "how, now\nbrown cow", "positive": 'a "quoted" cell', "negatives": ["x", "y\tz"]},
        {"query": "été", "positive": "summer", "negatives": ["winter"]},
    ]
    path = tmp_path / f"pairs.{kind}"
    if kind.startswith("jsonl"):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({**row, "negatives": json.dumps(row["negatives"])} for row in rows)
    elif kind == "tsv":
        # A tab always ends a field, and quotes are characters like others.
        rows[0] = {"query": "how, now", "positive": 'a "quoted" cell', "negatives": ["x"]}
        lines = [f"{row['query']}\t{row['positive']}\t{json.dumps(row['negatives'])}\n" for row in rows]
        path.write_text("query\tpositive\tnegatives\n" + "".join(lines), encoding="utf-8")
    elif kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        datasets = pytest.importorskip("datasets")
        made = datasets.Dataset.from_list(rows)
        (made if kind == "datasets" else datasets.DatasetDict(train=made, test=made)).save_to_disk(path)
    data = TrainingData.read([path], needs="positives")
    assert list(data) == [
        Example(row["query"], (row["positive"], *row["negatives"]), (1.0,) + (0.0,) * len(row["negatives"]))
        for row in rows
    ]
    assert [(source.name, source.rows) for source in data.sources] == [(path.name, 2)]
    # A csv row starts on line 2 and, with a line end in its cell, takes two.
    lines = {"csv": (2, 4), "tsv": (2, 3)}.get(kind, (1, 2))
    assert [data.where(0), data.where(1)] == [f"{path}:{line}" for line in lines]


def test_all_forms_of_a_row_meet_in_one_data_set(tmp_path):
    pairs = write_jsonl(
        tmp_path / "pairs.jsonl",
        [{"query": "q", "document": name, "label": label} for name, label in [("d", 1), ("e", 0.25), ("f", False)]],
    )
    (tmp_path / "pairs.csv").write_text("query,document,label\nq,g,0\n")
    mined = write_jsonl(
        tmp_path / "mined.jsonl",
        ["\n", {"query": "r", "positive": "a", "negatives": ["b", "c"]}, "\n", {"query": "s", "positive": "d"}],
    )
    data = TrainingData.read([pairs, tmp_path / "pairs.csv", mined], needs="labels")
    assert list(data) == [
        Example("q", ("d",), (1.0,)), Example("q", ("e",), (0.25,)), Example("q", ("f",), (0.0,)),
        Example("q", ("g",), (0.0,)), Example("r", ("a", "b", "c"), (1.0, 0.0, 0.0)), Example("s", ("d",), (1.0,)),
    ]  # fmt: skip
    assert [source.rows for source in data.sources] == [3, 1, 2]
    assert data.needs == "labels"
    assert data.documents == 8
    assert [data.where(index) for index in (0, 2, 3, 4, 5, -1)] == [
        f"{pairs}:1", f"{pairs}:3", f"{tmp_path / 'pairs.csv'}:2", f"{mined}:2", f"{mined}:4", f"{mined}:4",
    ]  # fmt: skip


def test_every_bad_row_is_named_by_file_and_line(tmp_path):
    good = {"query": "q", "positive": "p"}
    first = write_jsonl(
        tmp_path / "first.jsonl",
        [
            good,
            "{not json\n",
            "\n",
            ["q", "p"],
            {"query": "q"},
            {"query": 3, "positive": " "},
            {**good, "negatives": "one"},
            {**good, "negatives": ["a", None]},
            {**good, "negative": ["a"]},
        ],
    )
    second = tmp_path / "second.csv"
    second.write_bytes(b"query,positive\nq,p\nq\nq,p,r\nq,\xff\n")
    message = problems_of([first, second])
    assert message.startswith("training data: 10 problems:\n")
    for expected in (
        f"{first}:2: is no valid JSON: ",
        f"{first}:4: expected a JSON object, got list",
        f"{first}:5: has no positive; it has query",
        f"{first}:6: query: expected a text (str), got int; positive: is empty",
        f"{first}:7: negatives: expected a list of texts (in csv: a JSON list)",
        f"{first}:8: negatives[1]: expected a text (str), got NoneType",
        f"{first}:9: negative: expected a text (str), got list",
        f"{second}:3: has 1 fields; expected 2",
        f"{second}:4: has 3 fields; expected 2",
        f"{second}:5: is no valid row: holds bytes that are not UTF-8",
    ):
        assert expected in message


def test_ten_problems_are_shown_and_the_rest_counted(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"anchor": "q", "positive": "p"}] * 37)
    message = problems_of([path])
    assert message.startswith("training data: 37 problems:\n")
    assert message.count("has no query; it has anchor, positive") == 10
    assert message.endswith("… and 27 more")


def test_rows_for_another_loss_are_one_error(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"query": "q", "document": "d", "label": 1}] * 37)
    assert problems_of([path]) == (
        f"training data: 1 problem:\n  {path}:1: has the columns document, label, query; "
        "expected query, positive and, where there are any, negative(s)"
    )


def test_a_misspelt_column_is_told_once(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"query": "q", "positive": "p", "negatve": "n"}] * 3)
    message = problems_of([path])
    assert message == f"training data: 1 problem:\n  {path}:1: column 'negatve' is not known; did you mean 'negative'?"


def test_files_that_cannot_be_read(tmp_path):
    assert "none.jsonl: cannot be read: No such file" in problems_of([tmp_path / "none.jsonl"])
    (tmp_path / "pairs.xml").write_text("<xml/>")
    with pytest.raises(UsageError, match=r"pairs\.xml: the ending tells no format that can be read \(\.jsonl"):
        TrainingData.read([tmp_path / "pairs.xml"], needs="positives")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert problems_of([tmp_path / "empty.jsonl"]) == "training data: no rows in empty.jsonl"
    (tmp_path / "folder").mkdir()
    assert "folder: is no folder that datasets' save_to_disk wrote" in problems_of([tmp_path / "folder"])
    with pytest.raises(DataError, match="rows:1: expected a mapping of columns, got tuple"):
        TrainingData.from_rows([("q", "p")], needs="positives")


def test_hashes_follow_the_content_not_the_name(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"query": "q", "positive": "p"}])
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert TrainingData.read([path], needs="positives").sources[0].sha256 == sha256_of(path)
    before = sha256_of(tmp_path)
    assert before == sha256_of(tmp_path)
    path.rename(tmp_path / "b.jsonl")
    assert sha256_of(tmp_path) != before  # within a folder, a name is content
    left = sha256_of(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "state").write_text("x")
    assert sha256_of(tmp_path, without="checkpoints") == left != sha256_of(tmp_path)
    rows = [{"query": "q", "positive": "p"}]
    first, again = (TrainingData.from_rows(rows, needs="positives").sources[0].sha256 for _ in range(2))
    other = TrainingData.from_rows([{"query": "q", "positive": "r"}], needs="positives").sources[0].sha256
    assert first == again != other


@pytest.fixture
def small_batches(monkeypatch):
    """Record batches of three rows, and pages that are given back all the time."""
    monkeypatch.setattr("rtx.trainer.store._BATCH_ROWS", 3)
    monkeypatch.setattr("rtx.trainer.store._READS_BEFORE_RELEASE", 2)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("memory_bytes", [0, 300, 2**30])
def test_examples_on_disk_are_those_in_memory(tmp_path, memory_bytes):
    rows = triples(20)
    data = TrainingData.from_rows(iter(rows), needs="positives", folder=tmp_path, memory_bytes=memory_bytes)
    assert len(list(tmp_path.iterdir())) == (memory_bytes < 2**30)
    expected = [
        Example(row["query"], (row["positive"], *row["negatives"]), (1.0,) + (0.0,) * len(row["negatives"]))
        for row in rows
    ]
    assert list(data) == expected
    assert data[-20] == expected[0]
    assert data[3:18:4] == expected[3:18:4]
    assert [data.where(index) for index in range(20)] == [f"rows:{number}" for number in range(1, 21)]
    for wrong in (20, -21):
        with pytest.raises(IndexError):
            data[wrong]
    # The file goes with the data.
    del data
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("memory_bytes", [0, 2**30])
def test_scores_of_a_first_stage_come_back_with_their_rows(memory_bytes):
    rows = [{**row, "first_stage": [number, *range(len(row["negatives"]))]} for number, row in enumerate(triples(20))]
    data = TrainingData.from_rows(rows, needs="labels", with_first_stage=True, memory_bytes=memory_bytes)
    assert data.with_first_stage
    assert [example.first_stage for example in data] == [tuple(map(float, row["first_stage"])) for row in rows]
    assert data.where(19) == "rows:20"


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("memory_bytes", [0, 2**30])
def test_hashes_are_of_the_texts_in_the_order_asked_for(memory_bytes):
    rows = triples(20)
    data = TrainingData.from_rows(rows, needs="positives", memory_bytes=memory_bytes)
    asked = np.array([19, 0, 7, 7, 2, 11], dtype=np.uint32)
    hashes = data.hashes(asked)
    texts = [[rows[row]["query"], rows[row]["positive"], *rows[row]["negatives"]] for row in asked]
    assert np.diff(hashes.starts).tolist() == [len(row) for row in texts]
    expected = [
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        for row in texts
        for text in row
    ]
    assert hashes.values.tolist() == expected


def _in_child(data, sent):
    sent.send((len(data), data[7], data.where(7), data.sources, data._store.path))


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_another_process_reads_the_same_file(tmp_path, way):
    data = TrainingData.from_rows(triples(2000), needs="positives", folder=tmp_path, memory_bytes=0)
    (file,) = tmp_path.iterdir()
    # A copy is a path and no rows.
    assert len(pickle.dumps(data)) < 1000
    context = multiprocessing.get_context(way)
    received, sent = context.Pipe()
    child = context.Process(target=_in_child, args=(data, sent))
    child.start()
    assert received.recv() == (2000, data[7], "rows:8", data.sources, file)
    child.join()
    # The child has gone; its end is not that of the file.
    assert file.exists()
    assert data[1999].query == "q1999"


def test_a_forked_process_that_drops_the_data_leaves_the_file(tmp_path):
    data = TrainingData.from_rows(triples(10), needs="positives", folder=tmp_path, memory_bytes=0)
    pid = os.fork()
    if pid == 0:
        del data
        os._exit(0)
    os.waitpid(pid, 0)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_and_rows_that_are_refused_leave_nothing(tmp_path):
    with pytest.raises(ArtifactError, match="nowhere: the checked training data cannot be written: "):
        TrainingData.from_rows(triples(10), needs="positives", folder=tmp_path / "nowhere", memory_bytes=0)
    with pytest.raises(DataError):
        TrainingData.from_rows([*triples(10000), {}], needs="positives", folder=tmp_path, memory_bytes=0)
    assert list(tmp_path.iterdir()) == []


def test_reading_reports_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("rtx.trainer.data._ROWS_BETWEEN_REPORTS", 10)
    path = write_jsonl(tmp_path / "pairs.jsonl", triples(25))
    told = []
    TrainingData.read([path], needs="positives", report=lambda rows, fraction: told.append((rows, fraction)))
    assert [rows for rows, _ in told] == [10, 20]
    assert all(0 < fraction <= 1 for _, fraction in told)


# Peak of what the process holds of its own: pages of a mapped file can be dropped at any time.
MEASURE = """
import sys, threading, time
from rtx.trainer.data import TrainingData
from rtx.trainer.sampler import BatchSampler
peak = 0
def watch():
    global peak
    while True:
        with open("/proc/self/status") as status:
            peak = max(peak, *(int(line.split()[1]) for line in status if line.startswith("RssAnon")))
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
data = TrainingData.read([sys.argv[1]], needs="positives", folder=sys.argv[2], memory_bytes=2**20)
rows = 0
for batch in BatchSampler(data, batch_size=64, seed=0, no_duplicates=True):
    rows += len(batch)
    if rows < 2**14:
        assert all(data[row].documents for row in batch)
print(rows, peak, data.sources[0].rows)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_times_the_rows_take_hardly_more_memory(tmp_path):
    peaks = []
    for count in (10_000, 100_000):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as stream:
            for i in range(count):
                text = f"{i} some words" + " that make it as long as an answer may be" * 5
                stream.write(f'{{"query": "number {i}", "positive": "yes {text}", "negatives": ["no {text}"]}}\n')
        command = [sys.executable, "-c", MEASURE, str(path), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows, peak, read = map(int, done.stdout.split())
        assert rows == read == count
        peaks.append(peak / 1024)
    # MiB; the texts of the larger file are 45 MiB.
    assert peaks[1] - peaks[0] < 12, peaks
