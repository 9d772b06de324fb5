from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rtx.runtime.errors import DataError, UsageError
from rtx.runtime.evalset import EvalSet, load_evalset, write_evalset

CORPUS = [
    {"_id": "d1", "title": "Cats", "text": "purr."},
    {"_id": "d2", "title": "", "text": " Dogs bark. "},
    {"_id": "d3", "title": None, "text": "", "metadata": {"url": "x"}},
    {"_id": 4, "text": "no title"},
]
QUERIES = [
    {"_id": "q2", "text": "dogs?"},
    {"_id": "q1", "text": "cats?", "metadata": {}},
    {"_id": "q3", "text": "not judged in this split"},
    {"_id": "q4", "text": "judged, but nothing is relevant"},
]
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td3\t0\nq2\td2\t1\nq2\t4\t1\nq4\td1\t0\n"


def make(folder: Path, corpus=CORPUS, queries=QUERIES, qrels: str | None = QRELS, file: str = "qrels/test.tsv") -> Path:
    for name, rows in (("corpus", corpus), ("queries", queries)):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if qrels is not None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(qrels.encode())
    return folder


def problems_of(folder: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        load_evalset(folder)
    assert caught.value.exit_code == 4
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def test_load(tmp_path):
    evalset = load_evalset(make(tmp_path))
    assert evalset.name == tmp_path.name
    assert evalset.corpus == {"d1": "Cats purr.", "d2": "Dogs bark.", "d3": "", "4": "no title"}
    # In the order of the queries file; q3 is not judged, q4 has nothing relevant.
    assert list(evalset.queries.items()) == [("q2", "dogs?"), ("q1", "cats?")]
    assert evalset.qrels == {"q2": {"d2": 1, "4": 1}, "q1": {"d1": 2, "d3": 0}}


@pytest.mark.parametrize(
    ("file", "qrels"),
    [
        ("qrels/test.tsv", "q1\td1\t2\nq2\td2\t1\n"),
        ("qrels.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t2\nq2\td2\t1"),
        ("qrels.txt", "q1 0 d1 2\nq2 0 d2 1\n"),
        ("qrels/test.txt", "q1\t0\td1\t2\n\n  q2   Q0 d2   +1 \n"),
        ("qrels/test.tsv", "\ufeffqid\tpid\tlabel\r\nq1\td1\t2\r\n\r\nq2\td2\t1\r\n"),
        ("qrels.tsv", 'query-id\tcorpus-id\tscore\n"q1"\td1\t2\nq2\t"d2"\t1\nq2\td2\t1\n'),
    ],
)
def test_forms_of_qrels(tmp_path, file, qrels):
    assert load_evalset(make(tmp_path, qrels=qrels, file=file)).qrels == {"q2": {"d2": 1}, "q1": {"d1": 2}}


def test_ids_with_quotes_as_csv_writes_them_and_as_they_are(tmp_path):
    # BEIR's FEVER has documents such as "Weird_Al"_Yankovic, which its writer quotes.
    corpus = [{"_id": '"Weird_Al"_Yankovic', "text": "a"}, {"_id": '"Heroes"', "text": "b"}]
    qrels = 'query-id\tcorpus-id\tscore\nq1\t"""Weird_Al""_Yankovic"\t1\nq1\t"Heroes"\t2\n'
    evalset = load_evalset(make(tmp_path, corpus=corpus, qrels=qrels))
    assert evalset.qrels == {"q1": {'"Weird_Al"_Yankovic': 1, '"Heroes"': 2}}


def test_gzipped_files(tmp_path):
    make(tmp_path)
    expected = load_evalset(tmp_path)
    for file in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        (tmp_path / f"{file}.gz").write_bytes(gzip.compress((tmp_path / file).read_bytes()))
        (tmp_path / file).unlink()
    assert load_evalset(tmp_path) == expected


def test_another_split_has_another_name(tmp_path):
    make(tmp_path)
    make(tmp_path, qrels="q2\td1\t1\n", file="qrels/dev.tsv")
    evalset = load_evalset(tmp_path, split="dev")
    assert evalset.name == f"{tmp_path.name}/dev"
    assert evalset.qrels == {"q2": {"d1": 1}}


def test_missing_files_are_all_named(tmp_path):
    assert problems_of(tmp_path) == [
        f"{tmp_path}: is no evaluation set in the BEIR layout: corpus.jsonl, queries.jsonl, qrels/test.tsv not found"
    ]
    make(tmp_path, file="qrels/dev.tsv")
    make(tmp_path, file="qrels/train.tsv")
    assert problems_of(tmp_path) == [
        f"{tmp_path}: is no evaluation set in the BEIR layout: qrels/test.tsv not found (splits in qrels: dev, train)"
    ]


def test_bad_lines_of_corpus_and_queries_are_named(tmp_path):
    corpus = [
        {"_id": "d1", "text": "a"},
        '{"_id": "d2", "text": ',
        '["d3"]',
        {"id": "d4", "text": "b"},
        {"_id": "d5", "title": "c"},
        {"_id": "d6", "text": None},
        {"_id": "d7", "title": 3, "text": "d"},
        {"_id": "d1", "text": "e"},
        '{"_id": "d9", "text": "\\ud800"}',
        {"_id": 1.5, "text": "f"},
    ]
    queries = [{"_id": "q1", "text": "  "}, {"_id": "q2", "text": "x"}, {"_id": "q2", "text": "x"}]
    lines = problems_of(make(tmp_path, corpus=corpus, queries=queries))
    assert lines[0] == f"{tmp_path}: 11 problems:"
    expected = [
        ("corpus.jsonl:2: ", "no valid JSON"),
        ("corpus.jsonl:3: ", "expected a JSON object, got list"),
        ("corpus.jsonl:4: ", "'_id'"),
        ("corpus.jsonl:5: ", "'text'"),
        ("corpus.jsonl:6: ", "text: expected a text (str), got NoneType"),
        ("corpus.jsonl:7: ", "title: expected a text (str), got int"),
        ("corpus.jsonl:8: ", "document id 'd1' is there twice"),
        ("corpus.jsonl:9: ", "text: holds an unpaired surrogate"),
        ("corpus.jsonl:10: ", "got float"),
        ("queries.jsonl:1: ", "query 'q1' is empty"),
    ]
    for line, (start, part) in zip(lines[1:-1], expected, strict=True):
        assert line.startswith(f"  {start}")
        assert part in line
    assert lines[-1] == "  … and 1 more"


def test_an_image_with_a_blank_text_and_neither(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    corpus = [{"_id": "d1", "text": " ", "image": "1.png"}, {"_id": "d2", "text": "b"}]
    parts = {"queries": [{"_id": "q1", "text": "x"}], "qrels": "query-id\tcorpus-id\tscore\nq1\td1\t1\n"}
    loaded = load_evalset(make(tmp_path, corpus=corpus, **parts))
    assert loaded.corpus["d1"].item == ("", (str(tmp_path / "1.png"),))
    corpus.append({"_id": "d3", "image": None})
    lines = problems_of(make(tmp_path, corpus=corpus, **parts))
    assert lines == [f"{tmp_path}: 1 problem:", "  corpus.jsonl:3: image: is empty, and there is no text"]


def test_bytes_that_are_no_utf8_are_named(tmp_path):
    make(tmp_path)
    (tmp_path / "corpus.jsonl").write_bytes(b'{"_id": "d1", "text": "caf\xe9"}\n')
    assert problems_of(tmp_path)[1] == "  corpus.jsonl:1: is not valid UTF-8 at byte 26"


def test_bad_lines_of_qrels_are_named(tmp_path):
    qrels = "\n".join(
        [
            "query-id\tcorpus-id\tscore",
            "q1\td1\t1",
            "q9\td1\t1",
            "q1\td9\t1",
            "q1\td2\thigh",
            "q1\td2\t1.0",
            "q1\td1\t2",
            "q1 d1",
            "query-id\tcorpus-id\tscore",
        ]
    )
    assert problems_of(make(tmp_path, qrels=qrels)) == [
        f"{tmp_path}: 7 problems:",
        "  qrels/test.tsv:3: query 'q9' is not in the queries file",
        "  qrels/test.tsv:4: document 'd9' is not in the corpus",
        "  qrels/test.tsv:5: expected a whole number as the grade, got 'high'",
        "  qrels/test.tsv:6: expected a whole number as the grade, got '1.0'",
        "  qrels/test.tsv:7: query 'q1', document 'd1': graded 1 and 2",
        "  qrels/test.tsv:8: expected query-id, corpus-id and score between tabs, "
        "or the four columns of a TREC qrels file",
        # Only the first line can be a header.
        "  qrels/test.tsv:9: query 'query-id' is not in the queries file",
    ]


def test_a_first_line_with_a_known_id_is_no_header(tmp_path):
    assert problems_of(make(tmp_path, qrels="q1\td1\tbad\nq2\td2\t1\n"))[1] == (
        "  qrels/test.tsv:1: expected a whole number as the grade, got 'bad'"
    )


@pytest.mark.parametrize("qrels", ["", "query-id\tcorpus-id\tscore\n", "q1\td1\t0\nq2\td2\t-1\n"])
def test_nothing_relevant_is_an_error(tmp_path, qrels):
    assert problems_of(make(tmp_path, qrels=qrels)) == [
        "qrels/test.tsv: judges no document relevant; expected at least one grade above 0"
    ]


def test_an_evaluation_set_made_by_hand_is_checked():
    with pytest.raises(DataError) as caught:
        EvalSet("mine", {"q1": "a", "q2": "b"}, {"d1": "x"}, {"q1": {"d1": 0}, "q2": {"d1": 1, "d2": 1}, "q3": {}})
    assert str(caught.value).splitlines() == [
        "evaluation set 'mine': 3 problems:",
        "  query 'q1' has no relevant document (a grade above 0)",
        "  query 'q2': qrels name document 'd2', which is not in the corpus",
        "  qrels name query 'q3', which is not among the queries",
    ]
    with pytest.raises(DataError, match="has no query"):
        EvalSet("mine", {}, {"d1": "x"}, {})


def small(queries: int = 40, documents: int = 200) -> EvalSet:
    return EvalSet(
        "small",
        {f"q{i}": f"query {i}" for i in range(queries)},
        {f"d{i}": f"document {i}" for i in range(documents)},
        {f"q{i}": {f"d{i}": 1, f"d{i + 100}": 0} for i in range(queries)},
    )


def test_limit_samples_queries_and_keeps_what_is_judged():
    evalset = small()
    part = evalset.limit(10, seed=3, documents=50)
    assert (len(part.queries), len(part.corpus)) == (10, 50)
    assert part.name == "small[10 queries, 50 documents, seed 3]"
    assert list(part.queries) == [query for query in evalset.queries if query in part.queries]
    assert list(part.corpus) == [document for document in evalset.corpus if document in part.corpus]
    assert part.qrels == {query: evalset.qrels[query] for query in part.queries}
    # More is judged for ten queries than 5 documents.
    assert set(evalset.limit(10, seed=3, documents=5).corpus) == {d for grades in part.qrels.values() for d in grades}


def test_limit_without_documents_keeps_the_corpus():
    assert small().limit(10).corpus == small().corpus


def test_a_smaller_sample_is_part_of_a_larger_one_and_a_seed_of_another_sample():
    evalset = small()
    assert set(evalset.limit(5).queries) < set(evalset.limit(10).queries)
    assert set(evalset.limit(5, documents=50).corpus) < set(evalset.limit(10, documents=80).corpus)
    assert evalset.limit(10, seed=1).queries != evalset.limit(10, seed=2).queries
    # The sample goes by ids, so that the order of a file does not change it.
    backwards = EvalSet("b", dict(reversed(evalset.queries.items())), evalset.corpus, evalset.qrels)
    assert set(backwards.limit(10).queries) == set(evalset.limit(10).queries)


def test_limit_above_the_size_is_the_whole_set():
    evalset = small()
    assert evalset.limit(1000) is evalset
    assert evalset.limit(40, documents=200) is evalset
    with pytest.raises(UsageError, match="at least 1 query and 1 document, got 0 and None"):
        evalset.limit(0)


def test_hash_changes_with_all_content_and_its_order_and_not_with_the_name():
    evalset = small(2, 102)
    parts = {"queries": evalset.queries, "corpus": evalset.corpus, "qrels": evalset.qrels}
    assert EvalSet("other", **parts).sha256 == evalset.sha256
    # Known from the definition: it must not change with a Python or library version.
    assert evalset.sha256 == "3198ec36f1fd366963e441a2fea9196fc4c3cf02069cd21fa64441074be51325"
    others = [
        {"queries": {"q0": "query 0", "q1": "query one"}},
        {"queries": dict(reversed(evalset.queries.items()))},
        {"corpus": evalset.corpus | {"d0": ""}},
        {"corpus": dict(reversed(evalset.corpus.items()))},
        {"corpus": evalset.corpus | {"d999": ""}},
        {"qrels": evalset.qrels | {"q0": {"d0": 2, "d100": 0}}},
        {"qrels": evalset.qrels | {"q0": {"d0": 1}}},
    ]
    hashes = {EvalSet("small", **(parts | changed)).sha256 for changed in others}
    assert len(hashes | {evalset.sha256}) == len(others) + 1


def test_write_and_load_again(tmp_path):
    text = 'line one\nline two\u2028 "quoted" \\ ü 🙂 \x00'
    evalset = EvalSet(
        "mine",
        {"q 1": text, '"q"2': "b"},
        {'"d"1': text, "d2": "", '"d"3"': "c"},
        {"q 1": {'"d"1': 2, "d2": 0}, '"q"2': {"d2": 1, '"d"3"': -1}},
    )
    write_evalset(evalset, tmp_path / "mine", split="dev")
    again = load_evalset(tmp_path / "mine", split="dev")
    assert (again.queries, again.corpus, again.qrels) == (evalset.queries, evalset.corpus, evalset.qrels)
    assert again.sha256 == evalset.sha256
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


IDS = st.text(st.characters(exclude_characters="\t\r\n", exclude_categories=["Cs"]), min_size=1, max_size=5)
TEXTS = st.text(max_size=10).map(str.strip).filter(bool)


@given(
    queries=st.dictionaries(IDS, TEXTS, min_size=1, max_size=4),
    corpus=st.dictionaries(IDS, TEXTS, min_size=1, max_size=6),
    grades=st.lists(st.integers(-2, 5), min_size=24, max_size=24),
)
def test_whatever_is_written_is_read_again(tmp_path_factory, queries, corpus, grades):
    values = iter(grades)
    qrels = {query: {document: next(values) for document in corpus} | {next(iter(corpus)): 1} for query in queries}
    evalset = EvalSet("any", queries, corpus, qrels)
    folder = tmp_path_factory.mktemp("evalset") / "any"
    write_evalset(evalset, folder)
    assert load_evalset(folder) == evalset


def test_write_replaces_an_evaluation_set_and_nothing_else(tmp_path):
    write_evalset(small(), tmp_path / "set")
    write_evalset(small(3), tmp_path / "set")
    assert len(load_evalset(tmp_path / "set").queries) == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="is in the way"):
        write_evalset(small(), tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("bad", ["a\tb", "a\nb", ""])
def test_ids_that_qrels_cannot_hold_are_refused(tmp_path, bad):
    evalset = EvalSet("mine", {"q": "a"}, {bad: "b"}, {"q": {bad: 1}})
    with pytest.raises(DataError, match="expected a text without tabs and line ends"):
        write_evalset(evalset, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_corpus_of_pages_is_known_by_their_content(tmp_path):
    """Wherever it lies, and also where the pages are in the lines themselves."""
    page = b"the bytes of some image"
    hashes = []
    for name, content in (("a", page), ("b", page), ("c", page + b" ")):
        folder = tmp_path / name
        (folder / "qrels").mkdir(parents=True)
        (folder / "p.gif").write_bytes(content)
        url = f"data:image/gif;base64,{base64.b64encode(page * 400).decode()}"
        lines = [{"_id": "p1", "image": "p.gif"}, {"_id": "p2", "text": "fig. 3", "image": [url, "p.gif"]}]
        (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "which?"}))
        (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\tp1\t1\n")
        loaded = load_evalset(folder)
        assert loaded.corpus["p1"].item.images == (str(folder / "p.gif"),)
        assert loaded.corpus["p2"].item == ("fig. 3", (url, str(folder / "p.gif")))
        hashes.append(loaded.sha256)
    assert hashes[0] == hashes[1] != hashes[2]
    (tmp_path / "a" / "p.gif").unlink()
    with pytest.raises(DataError, match=r"corpus\.jsonl:1: document: image: .*p\.gif does not exist"):
        load_evalset(tmp_path / "a")
