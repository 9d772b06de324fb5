from __future__ import annotations

import csv
import gzip
import hashlib
import json

import pytest

from rtx.runtime.errors import DataError, UsageError
from rtx.runtime.hashing import sha256_of
from rtx.trainer.data import Pair, TrainingData, Triple


def write_jsonl(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def problems_of(paths, task="embed"):
    with pytest.raises(DataError) as error:
        TrainingData.read(paths, task=task)
    return str(error.value)


def test_all_spellings_of_negatives(tmp_path):
    rows = [
        {"query": "q0", "positive": "p0"},
        {"query": "q1", "positive": "p1", "negative": "n1"},
        {"query": "q2", "positive": "p2", "negatives": ["n2", "n3"]},
        {"query": "q3", "positive": "p3", "negative_2": "n5", "negative_10": "n6", "negative_1": "n4"},
        {"query": "q4", "positive": "p4", "negative": "", "negatives": None, "negative_1": None, "source": "web"},
    ]
    data = TrainingData.read([write_jsonl(tmp_path / "pairs.jsonl", rows)], task="embed")
    assert data.examples == [
        Triple("q0", "p0"),
        Triple("q1", "p1", ("n1",)),
        Triple("q2", "p2", ("n2", "n3")),
        Triple("q3", "p3", ("n4", "n5", "n6")),
        Triple("q4", "p4"),
    ]
    assert len(data) == 5
    assert data[1] == Triple("q1", "p1", ("n1",))


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
    data = TrainingData.read([path], task="embed")
    assert data.examples == [Triple(row["query"], row["positive"], tuple(row["negatives"])) for row in rows]
    assert [(source.name, source.rows) for source in data.sources] == [(path.name, 2)]


def test_a_reranker_takes_labelled_pairs_and_rows_with_negatives(tmp_path):
    pairs = write_jsonl(
        tmp_path / "pairs.jsonl",
        [{"query": "q", "document": name, "label": label} for name, label in [("d", 1), ("e", 0.25), ("f", False)]],
    )
    (tmp_path / "pairs.csv").write_text("query,document,label\nq,g,0\n")
    mined = write_jsonl(tmp_path / "mined.jsonl", [{"query": "r", "positive": "a", "negatives": ["b", "c"]}])
    data = TrainingData.read([pairs, tmp_path / "pairs.csv", mined], task="rerank")
    assert data.examples == [
        Pair("q", "d", 1.0), Pair("q", "e", 0.25), Pair("q", "f", 0.0), Pair("q", "g", 0.0),
        Pair("r", "a", 1.0), Pair("r", "b", 0.0), Pair("r", "c", 0.0),
    ]  # fmt: skip
    assert [source.rows for source in data.sources] == [3, 1, 1]


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


@pytest.mark.parametrize(
    ("label", "shown"), [(1.5, "1.5"), ("yes", "'yes'"), (None, "None"), (float("nan"), "nan"), ([1], r"\[1\]")]
)
def test_labels_are_numbers_from_0_to_1(label, shown):
    with pytest.raises(DataError, match=f"rows:1: label: expected a number from 0 to 1, got {shown}"):
        TrainingData.from_rows([{"query": "q", "document": "d", "label": label}], task="rerank")


@pytest.mark.parametrize("name", ["negatve", "Negative", "negative1", "negativs"])
def test_a_misspelt_column_is_not_left_out_in_silence(tmp_path, name):
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"query": "q", "positive": "p", name: "n"}] * 3)
    message = problems_of([path])
    assert message.startswith(f"training data: 1 problem:\n  {path}:1: column '{name}' is not known; did you mean 'neg")


def test_columns_of_another_meaning_are_left_out():
    row = {"query": "q", "positive": "p", "id": 1.5, "query_id": 2, "positive_id": 3, "negative_ids": [4], "title": "t"}
    assert TrainingData.from_rows([row], task="embed").examples == [Triple("q", "p")]
    pair = {"query": "q", "document": "d", "label": 1, "document_id": 5, "label_source": "web"}
    assert TrainingData.from_rows([pair], task="rerank").examples == [Pair("q", "d", 1.0)]


def test_files_that_cannot_be_read(tmp_path):
    assert "none.jsonl: cannot be read: No such file" in problems_of([tmp_path / "none.jsonl"])
    (tmp_path / "pairs.xml").write_text("<xml/>")
    with pytest.raises(UsageError, match=r"pairs\.xml: the ending tells no format that can be read \(\.jsonl"):
        TrainingData.read([tmp_path / "pairs.xml"], task="embed")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert problems_of([tmp_path / "empty.jsonl"]) == "training data: no rows in empty.jsonl"
    (tmp_path / "folder").mkdir()
    assert "folder: is no folder that datasets' save_to_disk wrote" in problems_of([tmp_path / "folder"])
    with pytest.raises(DataError, match="rows:1: expected a mapping of columns, got tuple"):
        TrainingData.from_rows([("q", "p")], task="embed")


def test_hashes_follow_the_content_not_the_name(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"query": "q", "positive": "p"}])
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    before = sha256_of(tmp_path)
    assert before == sha256_of(tmp_path)
    path.rename(tmp_path / "b.jsonl")
    assert sha256_of(tmp_path) != before  # within a folder, a name is content
    left = sha256_of(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "state").write_text("x")
    assert sha256_of(tmp_path, without="checkpoints") == left != sha256_of(tmp_path)
    rows = [{"query": "q", "positive": "p"}]
    first, again = (TrainingData.from_rows(rows, task="embed").sources[0].sha256 for _ in range(2))
    other = TrainingData.from_rows([{"query": "q", "positive": "r"}], task="embed").sources[0].sha256
    assert first == again != other
