from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from rtx.runtime.errors import UsageError
from rtx.runtime.mining import MinedQuery, Negative, Positive, Relevant, Unusable
from rtx.runtime.mining_files import read_corpus, read_rows, write_mined
from rtx.runtime.records import BadRecord, Input


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def mined(query: str, positives: list[int], negatives: list[int], **dropped: int) -> MinedQuery:
    """Of three negatives wanted; the document d5 scores 5 and has rank 5."""
    return MinedQuery(
        query,
        tuple(Positive(f"d{number}", float(number), number, number % 2 == 0) for number in positives),
        tuple(Negative(f"d{number}", float(number), number) for number in negatives),
        wanted=3,
        candidates=10,
        dropped=dropped,
    )


UNUSABLE = Unusable(Relevant("x", "d9", where="train.jsonl:3"), "query: the model gives it no finite vector")
SOME = [mined("q", [3], [2, 1], margin=4), UNUSABLE, mined("r", [40, 8], [7, 6, 5], margin=3, max_score=1)]
NONE = mined("s", [5], [], margin=10)


def test_a_row_a_positive_and_their_totals(tmp_path):
    unusable: list[Unusable] = []
    summary = write_mined(tmp_path / "out.jsonl", SOME, on_unusable=unusable.append)
    assert lines(tmp_path / "out.jsonl") == [
        {"query": "q", "positive": "d3", "negatives": ["d2", "d1"]},
        {"query": "r", "positive": "d40", "negatives": ["d7", "d6", "d5"]},
        {"query": "r", "positive": "d8", "negatives": ["d7", "d6", "d5"]},
    ]
    assert unusable == [UNUSABLE]
    counts = (summary.queries, summary.lines, summary.short, summary.none, summary.left_out, summary.unusable)
    assert counts == (2, 3, 1, 0, 0, 1)
    assert (summary.candidates, dict(summary.dropped)) == (20, {"margin": 7, "max_score": 1})
    assert summary.ranks == {
        "1": 0,
        "2-3": 1,
        "4-10": 1,
        "11-30": 0,
        "31-100": 1,
        "101-300": 0,
        "301-1000": 0,
        "deeper": 0,
    }
    assert summary.positives_in_corpus == 2
    assert (summary.positives.count, summary.positives.mean) == (3, 17)
    assert (summary.positives.lowest, summary.positives.highest) == (3, 40)
    assert (summary.negatives.count, summary.negatives.mean) == (5, pytest.approx(21 / 5))
    assert (summary.negatives.lowest, summary.negatives.highest) == (1, 7)
    assert [example.query for example in summary.examples] == ["q", "r"]


def test_no_more_than_three_examples_and_the_deepest_ranks(tmp_path):
    deep = MinedQuery("t", (Positive("p", 1.0, None, False), Positive("o", 1.0, 1001, False)), (), 3, 0, {})
    summary = write_mined(tmp_path / "out.jsonl", [deep, NONE, *SOME * 3])
    assert [example.query for example in summary.examples] == ["q", "r", "q"]
    assert summary.ranks["deeper"] == 2


def test_rows_with_scores(tmp_path):
    summary = write_mined(tmp_path / "out.jsonl", [NONE, *SOME], scores=True)
    # One score teaches nothing: a query without a negative has no line.
    assert lines(tmp_path / "out.jsonl") == [
        {"query": "q", "positive": "d3", "negatives": ["d2", "d1"], "scores": [3, 2, 1]},
        {"query": "r", "positive": "d40", "negatives": ["d7", "d6", "d5"], "scores": [40, 7, 6, 5]},
        {"query": "r", "positive": "d8", "negatives": ["d7", "d6", "d5"], "scores": [8, 7, 6, 5]},
    ]
    assert (summary.queries, summary.lines, summary.none, summary.left_out) == (3, 3, 1, 1)


@pytest.mark.parametrize(("fewer", "queries"), [("keep", ["s", "q", "r", "r"]), ("drop", ["r", "r"])])
def test_queries_with_fewer_negatives(tmp_path, fewer, queries):
    summary = write_mined(tmp_path / "out.jsonl", [NONE, *SOME], fewer=fewer)
    assert [line["query"] for line in lines(tmp_path / "out.jsonl")] == queries
    assert (summary.short, summary.none, summary.left_out) == (2, 1, 4 - len(queries))
    assert (summary.positives.count, summary.negatives.count) == (4, 5 if fewer == "keep" else 3)


def test_pairs(tmp_path):
    write_mined(tmp_path / "out.jsonl", [NONE, *SOME], pairs=True)
    assert [(line["query"], line["document"], line["label"]) for line in lines(tmp_path / "out.jsonl")] == [
        ("s", "d5", 1),
        *(("q", text, label) for text, label in (("d3", 1), ("d2", 0), ("d1", 0))),
        *(("r", text, label) for text, label in (("d40", 1), ("d8", 1), ("d7", 0), ("d6", 0), ("d5", 0))),
    ]
    with pytest.raises(UsageError, match=r"^scores: go with rows of a positive and negatives"):
        write_mined(tmp_path / "out.jsonl", SOME, pairs=True, scores=True)


def test_a_run_that_fails_leaves_what_was_there(tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text("before\n")

    def failing() -> Iterable[MinedQuery | Unusable]:
        yield from SOME
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_mined(target, failing())
    assert target.read_text() == "before\n"
    assert list(tmp_path.iterdir()) == [target]


def test_a_killed_run_leaves_what_was_there(tmp_path):
    code = """
import os, signal
from rtx.runtime.mining import MinedQuery, Negative, Positive
from rtx.runtime.mining_files import write_mined

def killed():
    found = MinedQuery("q", (Positive("p", 1.0, 1, True),), (Negative("n" * 100_000, 0.0, 1),), 1, 1, {})
    yield from [found] * 100
    os.kill(os.getpid(), signal.SIGKILL)

write_mined("out.jsonl", killed())
"""
    (tmp_path / "out.jsonl").write_text("before\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert done.returncode == -9
    assert (tmp_path / "out.jsonl").read_text() == "before\n"


def test_training_rows_are_read_with_all_their_negatives(tmp_path):
    source = tmp_path / "train.jsonl"
    rows: list[Any] = [
        {"query": "a", "positive": "b", "id": 7, "other": [1]},
        {
            "query": "a",
            "positive": "b",
            "negative": "c",
            "negative_2": "d",
            "negative_10": None,
            "negatives": ["e"],
        },
        {"query": " ", "positive": 3},
        {"question": "a", "positive": "b", "negatives": "c"},
        {"query": "a", "positive": "b", "negatives": ["c", 1, ""]},
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    with Input(str(source)) as opened:
        read = list(read_rows(opened))
    assert read[:2] == [
        Relevant("a", "b", (), f"{source}:1"),
        Relevant("a", "b", ("c", "d", "e"), f"{source}:2"),
    ]
    assert [str(record).removeprefix(str(source)) for record in read[2:] if isinstance(record, BadRecord)] == [
        ":3: query: is empty; positive: expected a text (str), got int",
        ":4: has no query; it has negatives, positive, question; "
        "negatives: expected a list of texts (in csv: a JSON list)",
        ":5: negatives[1]: expected a text (str), got int; negatives[2]: is empty",
        ":6: is no valid JSON: Expecting property name enclosed in double quotes at character 2",
    ]


def test_columns_of_a_csv_file(tmp_path):
    (tmp_path / "train.csv").write_text('q,p,negatives\na,b,"[""c"", ""d""]"\ne,f,\n')
    with Input(str(tmp_path / "train.csv")) as opened:
        read = list(read_rows(opened, query_column="q", positive_column="p"))
    assert [row[:3] for row in read if isinstance(row, Relevant)] == [("a", "b", ("c", "d")), ("e", "f", ())]


def test_a_corpus_is_read_as_an_evaluation_set_reads_it(tmp_path):
    source = tmp_path / "corpus.jsonl"
    records = [{"_id": "1", "title": "A", "text": "b "}, {"_id": "2", "text": "c"}, {"_id": "3", "title": None}]
    records.append({"_id": "4", "title": 1, "text": None})
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    with Input(str(source)) as opened:
        read = list(read_corpus(opened))
    assert read[:2] == ["A b", "c"]
    assert [str(record).removeprefix(str(source)) for record in read[2:]] == [
        ":3: has no column 'text' (its columns: _id, title)",
        ":4: text: expected a text (str), got NoneType; title: expected a text (str), got int",
    ]
    with Input(str(source)) as opened:
        assert list(read_corpus(opened, title_column=""))[:2] == ["b", "c"]
    (tmp_path / "corpus.txt").write_text("x\ny\n")
    with Input(str(tmp_path / "corpus.txt")) as opened:
        assert list(read_corpus(opened)) == ["x", "y"]


def test_scores_for_a_reranker_on_top(tmp_path):
    write_mined(tmp_path / "rows.jsonl", SOME[:1], with_first_stage=True, scores=True)
    assert lines(tmp_path / "rows.jsonl") == [
        {"query": "q", "positive": "d3", "negatives": ["d2", "d1"], "scores": [3, 2, 1], "first_stage": [3, 2, 1]}
    ]
    write_mined(tmp_path / "pairs.jsonl", SOME[:1], with_first_stage=True, pairs=True)
    assert lines(tmp_path / "pairs.jsonl") == [
        {"query": "q", "document": "d3", "label": 1, "first_stage": 3},
        {"query": "q", "document": "d2", "label": 0, "first_stage": 2},
        {"query": "q", "document": "d1", "label": 0, "first_stage": 1},
    ]
