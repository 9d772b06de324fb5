from __future__ import annotations

import gzip

import numpy as np
import pytest

from rtx.runtime.candidates import Candidate, check_scored, read_candidates, write_candidates
from rtx.runtime.errors import DataError
from rtx.runtime.evalset import EvalSet

EVALSET = EvalSet(
    "tiny",
    {"q1": "a", "q2": "b", "q3": "c"},
    {"d1": "x", "d2": "y", "d3": "z", "4": "w"},
    {"q1": {"d1": 1}, "q2": {"d2": 1}, "q3": {"d3": 1}},
)
EXPECTED = {"q1": [Candidate("d3"), Candidate("d1"), Candidate("4")], "q2": [Candidate("d2")], "q3": []}
SCORED = {
    "q1": [Candidate("d3", 7.5), Candidate("d1", 7.5), Candidate("4", -10.0)],
    "q2": [Candidate("d2", 0.0)],
    "q3": [],
}


def test_read_jsonl(tmp_path):
    file = tmp_path / "found.jsonl"
    file.write_text(
        '{"query-id": "q1", "corpus-ids": ["d3", "d1", 4]}\n'
        '{"query-id": "q9", "corpus-ids": ["d9"], "note": "a query of another split"}\n\n'
        '{"query-id": "q2", "corpus-ids": ["d2"]}\n'
        '{"query-id": "q3", "corpus-ids": []}\n'
    )
    assert read_candidates(file, EVALSET) == EXPECTED
    zipped = tmp_path / "found.jsonl.gz"
    zipped.write_bytes(gzip.compress(file.read_bytes()))
    assert read_candidates(zipped, EVALSET) == EXPECTED


def test_read_jsonl_with_scores(tmp_path):
    file = tmp_path / "found.jsonl"
    file.write_text(
        '{"query-id": "q1", "corpus-ids": ["d3", "d1", 4], "scores": [7.5, 7.5, -10]}\n'
        '{"query-id": "q2", "corpus-ids": ["d2"], "scores": [0]}\n'
    )
    assert read_candidates(file, EVALSET) == SCORED


def test_read_run_sorts_by_score_then_rank_then_line(tmp_path):
    file = tmp_path / "bm25.run"
    # q3 is not in the file: the first stage found nothing for it. Equal scores of q1 go by rank, others do not.
    file.write_text(
        "q1 Q0 4 0 -1e1 bm25\nq1 Q0 d1 2 7.5 bm25\nq1 Q0 d3 1 7.50 bm25\nq2\tQ0\td2\t1\t0\tbm25\nq9 Q0 d9 1 1 bm25\n"
    )
    assert read_candidates(file, EVALSET) == SCORED


@pytest.mark.parametrize("name", ["found.jsonl", "found.run"])
def test_write_and_read_again(tmp_path, name):
    score = float(np.float32(0.1))  # a float32 that is long in decimals comes back to the last bit
    candidates = SCORED | {"q3": [Candidate("d1", score)]}
    write_candidates(candidates, tmp_path / name)
    assert read_candidates(tmp_path / name, EVALSET) == candidates
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_scores_that_are_not_known_are_not_written(tmp_path):
    write_candidates(EXPECTED, tmp_path / "found.jsonl")
    assert read_candidates(tmp_path / "found.jsonl", EVALSET) == EXPECTED
    assert "scores" not in (tmp_path / "found.jsonl").read_text()


def test_run_file_as_trec_eval_reads_it(tmp_path):
    write_candidates(EXPECTED, tmp_path / "found.run")
    assert (tmp_path / "found.run").read_text() == (
        "q1 Q0 d3 1 3 rtx-ranks\nq1 Q0 d1 2 2 rtx-ranks\nq1 Q0 4 3 1 rtx-ranks\nq2 Q0 d2 1 1 rtx-ranks\n"
    )
    # What only counts down is not taken for scores.
    assert read_candidates(tmp_path / "found.run", EVALSET) == EXPECTED
    write_candidates(SCORED, tmp_path / "found.run")
    assert (tmp_path / "found.run").read_text().splitlines()[2] == "q1 Q0 4 3 -10.0 rtx"


@pytest.mark.parametrize(
    ("name", "content", "problems"),
    [
        (
            "bad.jsonl",
            '{"query-id": "q1", "corpus-ids": "d1"}\n{"query-id": "q1"}\n{"query-id": "q2", "corpus-ids": [1.5]}\n'
            '{"query-id": "q2", "corpus-ids": ["d1", "d9", "d1"]}\n{"query-id": "q2", "corpus-ids": []}\n'
            '{"query-id": "q3", "corpus-ids": ["d1"], "scores": [1, 2]}\n'
            '{"query-id": "q3", "corpus-ids": ["d1"], "scores": [NaN]}\n'
            '{"query-id": "q3", "corpus-ids": ["d1", "d2"], "scores": [0.1, 0.9]}\n'
            f'{{"query-id": "q3", "corpus-ids": ["d1"], "scores": [1{"0" * 400}]}}\n',
            [
                "bad.jsonl:1: corpus-ids: expected a list of ids",
                "bad.jsonl:2: has no column 'corpus-ids'",
                "bad.jsonl:3: corpus-ids: expected a list of ids",
                "bad.jsonl:4: document 'd9' of query 'q2' is not in the corpus",
                "bad.jsonl:4: document 'd1' is there twice for query 'q2'",
                "bad.jsonl:5: query 'q2' is there twice",
                "bad.jsonl:6: scores: expected a list of 1 finite numbers, one a document",
                "bad.jsonl:7: scores: expected a list of 1 finite numbers, one a document",
                "bad.jsonl:8: scores: expected the best first; higher is better",
                "bad.jsonl:9: scores: expected a list of 1 finite numbers, one a document",
            ],
        ),
        (
            "bad.run",
            "q1 Q0 d1 1 high bm25\nq1 Q0 d1 1 nan bm25\nq1 d1\nq1 Q0 d1 1 2 bm25\nq1 Q0 d1 2 1 bm25\n",
            [
                "bad.run:1: expected numbers as rank and score, got 1 and high",
                "bad.run:2: expected numbers as rank and score, got 1 and nan",
                "bad.run:3: expected the six columns of a TREC run file",
                "bad.run: document 'd1' is there twice for query 'q1'",
            ],
        ),
    ],
)
def test_bad_lines_are_named(tmp_path, name, content, problems):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        read_candidates(tmp_path / name, EVALSET)
    lines = str(caught.value).replace(f"{tmp_path}/", "").splitlines()
    assert lines[0] == f"{name}: {len(problems)} problems:"
    for line, problem in zip(lines[1:], problems, strict=True):
        assert line.startswith(f"  {problem}")


def test_a_file_for_other_queries_is_refused(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"query-id": "x", "corpus-ids": ["d1"]}\n')
    with pytest.raises(DataError, match="holds none of the 3 queries of 'tiny'"):
        read_candidates(tmp_path / "other.jsonl", EVALSET)


def test_ids_with_white_space_need_jsonl(tmp_path):
    candidates = {"q 1": [Candidate("d1")], "q2": [Candidate("d\u00a02")]}
    with pytest.raises(DataError) as caught:
        write_candidates(candidates, tmp_path / "found.run")
    assert "2 problems" in str(caught.value)
    assert "use a name in .jsonl" in str(caught.value)
    assert not list(tmp_path.iterdir())
    write_candidates(candidates, tmp_path / "found.jsonl")


def test_scores_that_are_needed_are_named():
    check_scored(SCORED, "tiny")
    with pytest.raises(DataError) as caught:
        check_scored(SCORED | {"q2": EXPECTED["q2"]}, "tiny")
    assert str(caught.value).splitlines() == [
        "candidates for 'tiny': a reranker on top of a first stage needs its scores: 1 problem:",
        "  query 'q2': document 'd2' has no score",
    ]
