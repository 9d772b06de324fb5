from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from rtx.runtime.cli import main
from rtx.runtime.embedder import Embedder
from rtx.runtime.mining import MinedQuery, Relevant, mine
from rtx.runtime.negatives import Rules
from rtx.runtime.reranker import Reranker

_WORDS = "boil broken button calibrate check clean coffee copy device error file filter fish grind image key light list"
ROWS = [
    {"query": "reset the device", "positive": "hold the button to reset the device"},
    {"query": "clean the coffee machine", "positive": "clean the machine with steam", "negative": "grind the coffee"},
    {"query": "reset the device", "positive": "turn it off and on", "negatives": ["update the device"]},
    {"query": "parse a file", "positive": "parse the file and return a table"},
]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("train.jsonl", ROWS)


def write(name: str, records: Sequence[object]) -> None:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))


def lines(name: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def files() -> list[str]:
    return sorted(file.name for file in Path().iterdir())


def run(bundle: Path, *arguments: object, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(main, ["mine", str(bundle), *map(str, arguments)], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def rtx_mine(toy_bundle: Path) -> Callable[..., Result]:
    return lambda *arguments, stdin=None: run(toy_bundle, *arguments, stdin=stdin)


@pytest.fixture
def many() -> list[Relevant]:
    """In many.jsonl too."""
    draw, words = random.Random(0), _WORDS.split()
    rows = []
    for number in range(60):
        positive = draw.sample(words, 6)
        query = " ".join([*draw.sample(positive, 3), draw.choice(words)])
        rows.append(Relevant(query, " ".join(positive), where=f"many.jsonl:{number + 1}"))
    write("many.jsonl", [{"query": row.query, "positive": row.positive} for row in rows])
    return rows


def test_writes_what_mine_gives(toy_bundle, many):
    options = ("--relative-margin", 0.05, "--skip", 2, "--depth", 30, "--negatives", 4, "--max-score", 0.9)
    result = run(toy_bundle, "many.jsonl", "-o", "out.jsonl", *options)
    assert (result.exit_code, result.stderr) == (0, "")
    rules = Rules(relative_margin=0.05, skip=2, depth=30, negatives=4, max_score=0.9)
    with Embedder.open(toy_bundle) as model:
        expected = [found for found in mine(model, many, rules=rules) if isinstance(found, MinedQuery)]
    assert lines() == [
        {"query": found.query, "positive": positive.text, "negatives": [negative.text for negative in found.negatives]}
        for found in expected
        for positive in found.positives
    ]
    assert 100 < sum(len(found.negatives) for found in expected) < 240
    assert files() == ["many.jsonl", "out.jsonl", "train.jsonl"]
    assert f"out.jsonl: {len(lines())} lines from {len(expected)} queries\n" in result.stdout
    short = [found for found in expected if len(found.negatives) < 4]
    none = [found for found in short if not found.negatives]
    assert f"queries with fewer than 4 negatives: {len(short)}, of them with none: {len(none)}\n" in result.stdout
    example = next(found for found in expected if found.negatives)
    assert f"query            {example.query}\n" in result.stdout
    best = example.negatives[0]
    assert f"negative {best.score:8.4f}  {best.text} (rank {best.rank})\n" in result.stdout


def test_other_ways_to_the_same_negatives(toy_bundle, many):
    same = ("--negatives", 5, "--margin", 0.02)
    run(toy_bundle, "many.jsonl", "-o", "out.jsonl", *same)
    expected = lines()
    Path("out.csv").write_text("q,p\n" + "".join(f"{row.query},{row.positive}\n" for row in many))
    columns = ("--query-column", "q", "--positive-column", "p")
    assert run(toy_bundle, "out.csv", "-o", "csv.jsonl", *columns, *same).exit_code == 0
    assert lines("csv.jsonl") == expected
    table = pa.table({"query": [row.query for row in many], "positive": [row.positive for row in many]})
    pq.write_table(table, "out.parquet")
    assert run(toy_bundle, "out.parquet", "-o", "parquet.jsonl", *same, "--threads", 1).exit_code == 0
    assert lines("parquet.jsonl") == expected
    stdin = ("-", "--format", "jsonl", "-o", "stdin.jsonl", *same)
    assert run(toy_bundle, *stdin, stdin=Path("many.jsonl").read_text()).exit_code == 0
    assert lines("stdin.jsonl") == expected
    write("corpus.jsonl", [{"_id": f"{number}", "text": row.positive} for number, row in enumerate(many)])
    assert run(toy_bundle, "many.jsonl", "-o", "corpus-out.jsonl", "--corpus", "corpus.jsonl", *same).exit_code == 0
    assert lines("corpus-out.jsonl") == expected


@pytest.mark.usefixtures("many")
def test_faiss_finds_the_same(toy_bundle):
    pytest.importorskip("faiss")
    run(toy_bundle, "many.jsonl", "-o", "out.jsonl")
    assert run(toy_bundle, "many.jsonl", "-o", "faiss.jsonl", "--index", "faiss").exit_code == 0
    assert lines("faiss.jsonl") == lines()


def test_rows_of_one_query_and_the_negatives_that_rows_have(rtx_mine):
    result = rtx_mine("train.jsonl", "-o", "out.jsonl", "--negatives", "10")
    assert result.exit_code == 0, result.stderr
    assert [(line["query"], line["positive"]) for line in lines()] == [
        (ROWS[place]["query"], ROWS[place]["positive"]) for place in (0, 2, 1, 3)
    ]
    texts = {
        *(row["positive"] for row in ROWS),
        "grind the coffee",
        "update the device",
    }
    assert set(lines()[0]["negatives"]) == texts - {ROWS[0]["positive"], ROWS[2]["positive"]}
    assert lines()[1]["negatives"] == lines()[0]["negatives"]
    assert set(lines()[2]["negatives"]) == texts - {ROWS[1]["positive"]}


def test_texts_of_several_corpora(rtx_mine):
    write("a.jsonl", [{"_id": "1", "title": "update", "text": "the device"}, {"_id": "2", "text": "sort the list"}])
    Path("b.txt").write_text("hold the button  to reset the device\n\nreset the device\nfind an image\n")
    result = rtx_mine("train.jsonl", "-o", "out.jsonl", "--corpus", "a.jsonl", "--corpus", "b.txt")
    assert result.exit_code == 0, result.stderr
    # Neither the positive, though written with more white space, nor the query itself.
    assert set(lines()[0]["negatives"]) == {"update the device", "sort the list", "find an image"}
    assert "reset the device" in lines()[2]["negatives"]
    assert "4 positives by rank; in the corpus: 1\n" in result.stdout


def test_a_reranker_decides(toy_bundle, toy_reranker_bundle, many):
    options = ("--rescore", toy_reranker_bundle, "--rescore-variant", "int8", "--depth", 10, "--margin", 0.1)
    result = run(toy_bundle, "many.jsonl", "-o", "out.jsonl", *options, "--scores", "--variant", "int8")
    assert result.exit_code == 0, result.stderr
    rules = Rules(depth=10, margin=0.1)
    with (
        Embedder.open(toy_bundle, variant="int8") as model,
        Reranker.open(toy_reranker_bundle, variant="int8") as reranker,
    ):
        expected = [
            found for found in mine(model, many, rules=rules, reranker=reranker) if isinstance(found, MinedQuery)
        ]
        pairs = [(line["query"], text) for line in lines() for text in (line["positive"], *line["negatives"])]
        scores = reranker.score(pairs).tolist()
    assert [line["negatives"] for line in lines()] == [
        [negative.text for negative in found.negatives]
        for found in expected
        if found.negatives
        for _ in found.positives
    ]
    assert [score for line in lines() for score in line["scores"]] == pytest.approx(scores, rel=1e-4, abs=1e-6)
    for line in lines():
        assert max(line["scores"][1:]) <= line["scores"][0] - 0.1
    left_out = sum(not found.negatives for found in expected)
    assert left_out > 0
    assert f"queries left out: {left_out}\n" in result.stdout


def test_pairs_and_queries_with_fewer(rtx_mine):
    result = rtx_mine("train.jsonl", "-o", "out.jsonl", "--pairs", "--negatives", "5", "--fewer", "drop")
    assert result.exit_code == 0, result.stderr
    # Six texts, two of them positives of the first query.
    assert [(line["query"], line["label"]) for line in lines()] == [
        (ROWS[place]["query"], label) for place in (1, 3) for label in (1, 0, 0, 0, 0, 0)
    ]
    assert "queries left out: 1\n" in result.stdout


def test_finetune_reads_what_is_written(rtx_mine):
    data = pytest.importorskip("rtx.trainer.data")
    for name, needs, options in (
        ("rows.jsonl", "negatives", ()),
        ("scores.jsonl", "scores", ("--scores",)),
        ("pairs.jsonl", "labels", ("--pairs",)),
    ):
        assert rtx_mine("train.jsonl", "-o", name, *options).exit_code == 0
        read = data.TrainingData.read([name], needs=needs)
        assert len(read) == len(lines(name))
        first = lines(name)[0]
        documents = [first["positive"], *first["negatives"]] if "positive" in first else [first["document"]]
        labels = first.get("scores", [1.0, 0.0, 0.0, 0.0][: len(documents)])
        assert (read[0].query, list(read[0].documents)) == ("reset the device", documents)
        assert read[0].labels == pytest.approx(labels)


@pytest.mark.usefixtures("many")
def test_random_negatives_come_from_the_seed(toy_bundle):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        options = ("--sampling", "random", "--seed", seed)
        assert run(toy_bundle, "many.jsonl", "-o", f"{name}.jsonl", *options).exit_code == 0
    assert lines("a.jsonl") == lines("b.jsonl") != lines("c.jsonl")


def test_records_that_cannot_be_used_are_left_out_and_listed(rtx_mine):
    write("bad.jsonl", [ROWS[0], {"query": "reset"}, {"query": " ", "positive": 3}, ROWS[1]])
    write("corpus.jsonl", [{"text": "sort the list"}, {"text": 1}])
    result = rtx_mine("bad.jsonl", "-o", "out.jsonl", "--corpus", "corpus.jsonl")
    assert result.exit_code == 4
    assert result.stderr == "3 records could not be used; all are listed in out.jsonl.errors.jsonl\n"
    assert [line["query"] for line in lines()] == [ROWS[0]["query"], ROWS[1]["query"]]
    assert lines("out.jsonl.errors.jsonl") == [
        {"where": "bad.jsonl:2", "id": 2, "error": "has no positive; it has query"},
        {"where": "bad.jsonl:3", "id": 3, "error": "query: is empty; positive: expected a text (str), got int"},
        {"where": "corpus.jsonl:2", "id": 2, "error": "text: expected a text (str), got int"},
    ]


def test_records_that_cannot_be_used_stop_the_run_if_asked(rtx_mine):
    write("bad.jsonl", [ROWS[0], {"query": "reset"}, {"query": " ", "positive": 3}])
    result = rtx_mine("bad.jsonl", "-o", "out.jsonl", "--on-invalid", "fail")
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr == (
        "error: records that cannot be used: 2 problems:\n"
        "  bad.jsonl:2: has no positive; it has query\n"
        "  bad.jsonl:3: query: is empty; positive: expected a text (str), got int\n"
    )
    assert files() == ["bad.jsonl", "train.jsonl"]


def test_a_vector_that_is_not_finite(rtx_mine, monkeypatch):
    embed = Embedder.embed

    def overflowing(self: Embedder, items: Any, **options: Any) -> Any:
        vectors = embed(self, items, **options)
        vectors[[item == "parse a file" for item in items]] = float("inf")
        return vectors

    monkeypatch.setattr(Embedder, "embed", overflowing)
    result = rtx_mine("train.jsonl", "-o", "out.jsonl")
    assert (result.exit_code, len(lines())) == (4, 3)
    assert "rows that could not be compared: 1\n" in result.stdout
    assert lines("out.jsonl.errors.jsonl") == [
        {"where": "train.jsonl:4", "id": 4, "error": "query: the model gives it no finite vector"}
    ]
    result = rtx_mine("train.jsonl", "-o", "other.jsonl", "--on-invalid", "fail")
    assert result.exit_code == 4
    assert "  train.jsonl:4: query: the model gives it no finite vector\n" in result.stderr
    assert "other.jsonl" not in files()


def test_ctrl_c_leaves_nothing_half_done(rtx_mine, monkeypatch):
    def interrupted(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("rtx.runtime.mining.choose", interrupted)
    result = rtx_mine("train.jsonl", "-o", "out.jsonl")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert files() == ["train.jsonl"]


def test_replaces_a_file_only_when_asked(rtx_mine):
    Path("out.jsonl").write_text("before\n")
    result = rtx_mine("train.jsonl", "-o", "out.jsonl")
    assert (result.exit_code, result.stderr) == (2, "error: out.jsonl: exists; pass --overwrite to replace it\n")
    assert Path("out.jsonl").read_text() == "before\n"
    assert rtx_mine("train.jsonl", "-o", "out.jsonl", "--overwrite").exit_code == 0
    assert len(lines()) == 4


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("-o", "train.jsonl", "--overwrite"), 2, "train.jsonl: is read as the input and would be lost"),
        (("-o", "c.jsonl", "--corpus", "c.jsonl", "--overwrite"), 2, "c.jsonl: is read as the input and would be lost"),
        (("-o", "out.json"), 2, "out.json: expected a name that ends in .jsonl"),
        (("-o", "nowhere/out.jsonl"), 2, "the folder nowhere does not exist"),
        (("-o", "o.jsonl", "--pairs", "--scores"), 2, "--scores: go with rows of a positive and negatives, not with"),
        (("-o", "o.jsonl", "--rescore-variant", "int8"), 2, "--rescore-variant: names a variant of the RERANKER in"),
        (("-o", "o.jsonl", "--first-stage", "--rescore", "x.rtx"), 2, "--first-stage: writes MODEL's scores, which"),
        (("-o", "o.jsonl", "--negatives", "0"), 2, "negatives: expected at least 1, got 0"),
        (("-o", "o.jsonl", "--margin", "nan"), 2, "margin: expected a finite number, got nan"),
        (("-o", "o.jsonl", "--corpus", "none.jsonl"), 4, "none.jsonl: cannot be read: No such file or directory"),
        (("-o", "o.jsonl", "--corpus", "e.jsonl"), 4, "the corpus has no text that can be compared"),
        (("-o", "o.jsonl", "--rescore", "none.rtx"), 5, "none.rtx: does not exist; expected a bundle or a checkpoint"),
        (("-o", "o.jsonl", "--query-column", "q"), 4, "train.jsonl:1: has no q; it has positive, query"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_message(rtx_mine, arguments, code, message):
    Path("e.jsonl").touch()
    write("c.jsonl", [{"text": "a"}])
    before = files()
    result = rtx_mine("train.jsonl", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert files() == before


def test_an_input_without_records(rtx_mine):
    Path("empty.jsonl").touch()
    result = rtx_mine("empty.jsonl", "-o", "out.jsonl")
    assert (result.exit_code, result.stderr) == (
        4,
        "error: empty.jsonl: has no record; expected queries with a positive each\n",
    )
    assert rtx_mine("c.txt", "-o", "out.jsonl").exit_code == 4
    Path("c.txt").write_text("a\n")
    result = rtx_mine("c.txt", "-o", "out.jsonl")
    assert (result.exit_code, result.stderr) == (2, "error: c.txt: a txt input has no columns\n")


def test_models_of_the_other_task(toy_bundle, toy_reranker_bundle):
    result = run(toy_reranker_bundle, "train.jsonl", "-o", "out.jsonl")
    assert (result.exit_code, result.stderr) == (
        2,
        f"error: {toy_reranker_bundle}: is a reranker; expected an embedder (a reranker goes to --rescore)\n",
    )
    result = run(toy_bundle, "train.jsonl", "-o", "out.jsonl", "--rescore", toy_bundle)
    assert (result.exit_code, result.stderr) == (
        2,
        f"error: --rescore: {toy_bundle} is an embedder; expected a reranker\n",
    )


def test_without_faiss_the_extra_is_named_before_any_work(rtx_mine, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    result = rtx_mine("train.jsonl", "-o", "out.jsonl", "--index", "faiss")
    assert (result.exit_code, result.stderr) == (
        8,
        "error: searching with faiss needs the package 'faiss', which is not installed. "
        "Install it with: pip install 'rtx-retrieval[faiss]'\n",
    )


def test_a_checkpoint_mines_too(tiny_checkpoint):
    checkpoint = tiny_checkpoint("bert")
    result = run(checkpoint, "train.jsonl", "-o", "out.jsonl", "--threads", 1)
    assert result.exit_code == 0, result.stderr
    assert len(lines()) == 4
    assert all(len(line["negatives"]) == 3 for line in lines())


def test_progress_is_told_by_stage(rtx_mine, monkeypatch):
    from rtx.runtime.commands import progress

    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    result = rtx_mine("train.jsonl", "-o", "out.jsonl")
    told = [line.split(", ")[0] + line[line.index(" (") :] for line in result.stderr.splitlines()]
    assert told == ["6 texts (100%)", "3 queries (100%)"]
