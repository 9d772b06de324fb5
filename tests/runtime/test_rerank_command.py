from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from rtx.runtime.cli import main
from rtx.runtime.commands import rerank as command
from rtx.runtime.reranker import Reranker

QUERY = "how do i reset it?"
DOCUMENTS = ["sort the list", "hold the button to reset it", "", "reset the device", "reset the device"]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def rerank(toy_reranker_bundle: Path) -> Callable[..., Result]:
    """Runs `rtx rerank` on the toy bundle."""
    return lambda *arguments, stdin=None: invoke(toy_reranker_bundle, *arguments, stdin=stdin)


def invoke(bundle: Path, *arguments: str, stdin: str | bytes | None = None) -> Result:
    result = CliRunner().invoke(main, ["rerank", str(bundle), *arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def scores(toy_reranker_bundle: Path) -> NDArray[np.float32]:
    """Of QUERY with each of DOCUMENTS."""
    with Reranker.open(toy_reranker_bundle) as model:
        return model.score([(QUERY, document) for document in DOCUMENTS])


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def jsonl(rows: Sequence[object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_each_record_is_ranked_by_itself(rerank: Callable[..., Result], scores: NDArray[np.float32]) -> None:
    Path("in.jsonl").write_text(
        jsonl(
            [
                {"id": "list", "query": QUERY, "documents": DOCUMENTS},
                {"id": "pair", "query": QUERY, "document": DOCUMENTS[0]},
                {"query": QUERY, "document": DOCUMENTS[1], "documents": None},
                {"id": 9, "query": QUERY, "documents": []},
            ]
        )
    )
    result = rerank("in.jsonl", "-o", "out.jsonl", "--with-text")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    order = np.argsort(-scores, kind="stable").tolist()
    ranked, first, second, empty = lines(Path("out.jsonl").read_text())
    assert ranked["id"] == "list"
    assert [entry["index"] for entry in ranked["ranking"]] == order
    assert order.index(3) + 1 == order.index(4)  # equal texts, equal scores: in the order of the input
    assert [entry["document"] for entry in ranked["ranking"]] == [DOCUMENTS[index] for index in order]
    np.testing.assert_allclose([entry["score"] for entry in ranked["ranking"]], scores[order], rtol=1e-6)
    assert (first["id"], first["document"]) == ("pair", DOCUMENTS[0])
    assert second["id"] == 3
    np.testing.assert_allclose([first["score"], second["score"]], scores[:2], rtol=1e-6)
    assert empty == {"id": 9, "ranking": []}
    assert sorted(file.name for file in Path().iterdir()) == ["in.jsonl", "out.jsonl"]


def test_top_k_and_columns_of_other_names(rerank: Callable[..., Result], scores: NDArray[np.float32]) -> None:
    pq.write_table(pa.table({"key": ["a"], "q": [QUERY], "passages": [DOCUMENTS]}), "in.parquet")
    columns = ["--query-column", "q", "--documents-column", "passages", "--id-column", "key"]
    result = rerank("in.parquet", "--top-k", "2", "--variant", "int8", "--threads", "1", *columns)
    assert result.exit_code == 0, result.stderr
    (ranked,) = lines(result.stdout)
    assert ranked["id"] == "a"
    assert [set(entry) for entry in ranked["ranking"]] == [{"index", "score"}] * 2
    assert [entry["index"] for entry in ranked["ranking"]] == np.argsort(-scores, kind="stable")[:2].tolist()


def test_pairs_of_a_csv_file(rerank: Callable[..., Result], scores: NDArray[np.float32]) -> None:
    Path("in.csv").write_text("query,passage\n" + "".join(f"{QUERY},{document}\n" for document in DOCUMENTS[:2]))
    result = rerank("in.csv", "--document-column", "passage")
    assert [line["id"] for line in lines(result.stdout)] == [2, 3]
    np.testing.assert_allclose([line["score"] for line in lines(result.stdout)], scores[:2], rtol=1e-6)


@pytest.mark.parametrize("window", [1, 2, 1024])
def test_lines_of_standard_input_for_one_query(
    rerank: Callable[..., Result], scores: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(command, "_RECORDS_PER_CALL", window)
    documents = DOCUMENTS[:4]  # without the tie, which another batch could break in the last bit
    result = rerank("-", "--query", QUERY, stdin="".join(f"{document}\n" for document in documents))
    order = np.argsort(-scores[:4])
    assert [line["id"] for line in lines(result.stdout)] == (order + 1).tolist()
    np.testing.assert_allclose([line["score"] for line in lines(result.stdout)], scores[order], rtol=1e-5)

    few = rerank("-", "--query", QUERY, "--top-k", "2", "--with-text", stdin="\n".join(documents))
    assert [line["document"] for line in lines(few.stdout)] == [documents[index] for index in order[:2]]


def test_a_terminal_gets_a_table(
    rerank: Callable[..., Result], scores: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_is_terminal", lambda: True)
    result = rerank("-", "--query", QUERY, stdin="sort the list\nhold the [red] button\n")
    header, first, second = result.stdout.splitlines()
    assert header.split() == ["score", "id", "document"]
    assert first.split()[1:] == ["2", "hold", "the", "[red]", "button"]
    assert second.split() == [f"{scores[0]:.4f}", "1", "sort", "the", "list"]


BAD = jsonl(
    [
        {"id": "fine", "query": "x", "document": "y"},
        {"id": "number", "query": 5, "documents": ["a"]},
        {"query": "x", "documents": ["a", 3, "b", "\ud800"]},
        {"query": "x", "documents": "a"},
        {"query": "x"},
        {"documents": ["a"]},
        {"query": "x", "document": None},
        {"query": "x", "documents": list(range(9))},
        {"id": "last", "query": "x", "document": "y"},
    ]
)
MESSAGES = [
    "query: expected a text (str), got int",
    "documents[1]: expected a text (str), got int; documents[3]: holds an unpaired surrogate at character 0; expected "
    "valid Unicode",
    "documents: expected a list of texts, got str",
    "has neither a column 'documents' nor a column 'document'",
    "has no column 'query' (its columns: documents)",
    "document: expected a text (str), got NoneType",
    "; ".join(f"documents[{i}]: expected a text (str), got int" for i in range(5)) + "; and 4 more",
]


def test_bad_records_are_listed_and_the_others_ranked(rerank: Callable[..., Result]) -> None:
    Path("in.jsonl").write_text(BAD)
    result = rerank("in.jsonl", "-o", "out.jsonl")
    assert result.exit_code == 4
    assert result.stderr == "7 records could not be ranked; all are listed in out.jsonl.errors.jsonl\n"
    assert [line["id"] for line in lines(Path("out.jsonl").read_text())] == ["fine", "last"]
    listed = lines(Path("out.jsonl.errors.jsonl").read_text())
    assert sorted((line["where"], line["error"]) for line in listed) == [
        (f"in.jsonl:{i}", message) for i, message in enumerate(MESSAGES, 2)
    ]
    assert {line["id"] for line in listed} == {"number", 3, 4, 5, 6, 7, 8}


def test_without_an_output_file_bad_records_go_to_standard_error(rerank: Callable[..., Result]) -> None:
    result = rerank("-", stdin=BAD)
    assert result.exit_code == 4
    assert [line["id"] for line in lines(result.stdout)] == ["fine", "last"]
    *each, total = result.stderr.splitlines()
    assert sorted(each) == [f"error: stdin:{i}: {message}" for i, message in enumerate(MESSAGES, 2)]
    assert total == "7 records could not be ranked"

    result = rerank("-", "--query", "x", stdin=b"fine\n\xff\n")
    assert result.exit_code == 4
    assert [line["id"] for line in lines(result.stdout)] == [1]
    assert result.stderr.splitlines()[0] == "error: stdin:2: is not valid UTF-8 at byte 0"


def test_fail_stops_at_the_first_and_writes_nothing(rerank: Callable[..., Result]) -> None:
    Path("in.jsonl").write_text(BAD)
    result = rerank("in.jsonl", "-o", "out.jsonl", "--on-invalid", "fail")
    assert (result.exit_code, result.stderr) == (4, f"error: in.jsonl:2: {MESSAGES[0]}\n")
    assert [file.name for file in Path().iterdir()] == ["in.jsonl"]


def test_a_score_that_is_not_finite_fails_alone(rerank: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    original = Reranker.score

    def overflow(self: Reranker, pairs: Sequence[tuple[str, str]], **options: Any) -> NDArray[np.float32]:
        result = original(self, pairs, **options)
        result[[document == "open" for _, document in pairs]] = np.nan
        return result

    monkeypatch.setattr(Reranker, "score", overflow)
    rows = [
        {"query": "x", "document": "open"},
        {"query": "x", "document": "a"},
        {"query": "x", "documents": ["a", "open"]},
    ]
    result = rerank("-", stdin=jsonl(rows))
    assert [line["id"] for line in lines(result.stdout)] == [2]
    message = "the model gives it a score that is not finite"
    assert result.stderr.splitlines()[:2] == [f"error: stdin:1: {message}", f"error: stdin:3: {message}"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["in.jsonl", "-o", "there.jsonl"], 2, "there.jsonl: exists; pass --overwrite to replace it"),
        (["in.jsonl", "-o", "in.jsonl", "--overwrite"], 2, "in.jsonl: is read as the input and would be lost"),
        (["in.jsonl", "-o", "pipe", "--overwrite"], 2, "pipe: is no regular file; expected a file to write"),
        (["in.jsonl", "-o", "nix/out.jsonl"], 2, "nix/out.jsonl: the folder nix does not exist"),
        (["in.jsonl", "--query", "\udcff"], 2, "--query: holds an unpaired surrogate"),
        (["in.txt"], 2, "in.txt: a txt input has one text a line; it cannot hold queries and documents: pass --query"),
        (["nix.jsonl"], 4, "nix.jsonl: cannot be read"),
        (["in.jsonl", "--variant", "fp16"], 2, "variant 'fp16' did not pass the gate"),
    ],
)
def test_what_cannot_work_is_said(rerank: Callable[..., Result], arguments: list[str], code: int, message: str) -> None:
    Path("in.jsonl").write_text(jsonl([{"query": "x", "document": "y"}]))
    Path("in.txt").write_text("a\n")
    Path("there.jsonl").write_text("old")
    os.mkfifo("pipe")  # stands for /dev/null, which a rename by root would replace for the whole machine
    result = rerank(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert Path("there.jsonl").read_text() == "old"


def test_overwrite_replaces_the_output_and_its_list_of_errors(rerank: Callable[..., Result]) -> None:
    Path("in.jsonl").write_text(BAD)
    rerank("in.jsonl", "-o", "out.jsonl")
    Path("in.jsonl").write_text(BAD.splitlines()[0])
    assert rerank("in.jsonl", "-o", "out.jsonl", "--overwrite").exit_code == 0
    assert [line["id"] for line in lines(Path("out.jsonl").read_text())] == ["fine"]
    assert not Path("out.jsonl.errors.jsonl").exists()


def test_an_embedder_is_refused(toy_bundle: Path) -> None:
    Path("in.jsonl").write_text(jsonl([{"query": "x", "document": "y"}]))
    result = invoke(toy_bundle, "in.jsonl")
    assert (result.exit_code, "use `rtx embed`" in result.stderr) == (2, True)


@pytest.fixture
def on_top(tmp_path_factory: pytest.TempPathFactory, write_bundle: Any, rerank_contract: Any) -> Path:
    """The toy reranker on top of a first stage whose scores count twice."""
    contract = dataclasses.replace(rerank_contract, activation="identity", first_stage_weight=2.0)
    return Path(write_bundle(tmp_path_factory.mktemp("on-top") / "on-top.rtx", contract))


def test_the_first_stage_is_read_from_a_column(on_top: Path, scores: NDArray[np.float32]) -> None:
    first_stage = [3.0, 0.0, 1.0, 0.5, 0.25]
    rows = [
        {"query": QUERY, "documents": DOCUMENTS, "bm25": first_stage},
        {"query": QUERY, "document": DOCUMENTS[1], "bm25": 1},
        {"query": QUERY, "documents": [], "bm25": []},
    ]
    result = invoke(on_top, "-", "--first-stage-column", "bm25", stdin=jsonl(rows))
    assert result.exit_code == 0, result.stderr
    ranked, pair, empty = lines(result.stdout)
    expected = scores + 2 * np.array(first_stage, dtype=np.float32)
    assert [entry["index"] for entry in ranked["ranking"]] == np.argsort(-expected).tolist()
    np.testing.assert_allclose([entry["score"] for entry in ranked["ranking"]], sorted(expected)[::-1], rtol=1e-6)
    np.testing.assert_allclose(pair["score"], scores[1] + 2, rtol=1e-6)
    assert empty["ranking"] == []

    documents = [{"document": text, "first_stage": score} for text, score in zip(DOCUMENTS, first_stage, strict=True)]
    result = invoke(on_top, "-", "--query", QUERY, "--format", "jsonl", stdin=jsonl(documents))
    assert [line["id"] for line in lines(result.stdout)] == (np.argsort(-expected) + 1).tolist()


def test_records_without_the_first_stage_that_a_model_needs(on_top: Path) -> None:
    rows = [
        {"query": "x", "documents": ["a", "b"]},
        {"query": "x", "documents": ["a", "b"], "first_stage": [1]},
        {"query": "x", "documents": ["a", "b"], "first_stage": [1, "high"]},
        {"query": "x", "document": "a"},
        {"query": "x", "document": "a", "first_stage": [1]},
        {"query": "x", "document": "a", "first_stage": 1e39},
        {"query": "x", "documents": ["a"], "first_stage": [True]},
        {"id": "fine", "query": "x", "document": "a", "first_stage": "0.5"},
    ]
    result = invoke(on_top, "-", stdin=jsonl(rows))
    assert (result.exit_code, [line["id"] for line in lines(result.stdout)]) == (4, ["fine"])
    need = "has no column 'first_stage'; this model was trained on top of a first stage and needs its scores: "
    expected = "first_stage: expected a list of 2 finite numbers, one a document"
    assert sorted(result.stderr.splitlines()[:-1]) == [
        f"error: stdin:1: {need}a list of 2 finite numbers, one a document",
        f"error: stdin:2: {expected}",
        f"error: stdin:3: {expected}",
        f"error: stdin:4: {need}a finite number",
        "error: stdin:5: first_stage: expected a finite number",
        "error: stdin:6: first_stage: expected a finite number",
        "error: stdin:7: first_stage: expected a list of 1 finite numbers, one a document",
    ]
