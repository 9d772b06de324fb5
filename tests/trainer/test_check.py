from __future__ import annotations

import base64
import io
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from rtx.runtime.cli import main
from rtx.runtime.errors import DataError
from rtx.runtime.evalset import EvalSet, load_evalset, write_evalset
from rtx.trainer.check import check_data
from rtx.trainer.data import TrainingData

ROWS = [
    {"query": "how to reset it", "positive": "hold the button", "negatives": ["a b c d", "plug it in"]},
    {"query": "why is it red", "positive": "it is  charging", "negative": "hold the button"},
    "\n",
    {"query": "how to reset it", "positive": "pull the plug"},
    {"query": "how to reset it", "positive": "hold the button", "negatives": ["pull the plug"]},
    {"query": "no answer"},
    "{nothing\n",
]
PAIRS = [
    {"query": "one", "document": "a", "label": 0.25},
    {"query": "one", "document": "b", "label": 0},
    {"query": "two", "documents": ["a", "c"], "labels": [1, 0.251]},
]
EVALSET = EvalSet(
    "manuals",
    {"q1": "Why is it  RED", "q2": "one"},
    {"d1": "It is charging", "d2": "b", "d3": "a B c d", "d4": "nowhere"},
    {"q1": {"d1": 1, "d3": 0}, "q2": {"d2": 2}},
)


@pytest.fixture
def files(tmp_path):
    paths = []
    for name, rows in (("train.jsonl", ROWS), ("pairs.jsonl", PAIRS)):
        paths.append(tmp_path / name)
        paths[-1].write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return paths


def findings_of(report):
    return {finding.kind: (finding.count, finding.examples) for finding in report.findings}


def test_rows_and_forms_are_counted_by_file(files):
    first, second = check_data(files).files
    assert (first.name, first.rows, first.bad_rows, first.documents) == (str(files[0]), 6, 2, 8)
    assert first.forms == {"positive": 4, "document": 0, "documents": 0}
    assert (second.rows, second.bad_rows, second.documents) == (3, 0, 4)
    assert second.forms == {"positive": 0, "document": 2, "documents": 1}


def test_lengths_in_words_and_characters(files):
    lengths = {(item.of, item.unit): item for item in check_data(files[:1]).lengths}
    assert set(lengths) == {(of, u) for of in ("query", "positive", "negative") for u in ("words", "characters")}
    queries = lengths["query", "words"]
    assert (queries.count, queries.min, queries.median, queries.p95, queries.max) == (4, 4, 4, 4, 4)
    negatives = lengths["negative", "characters"]
    assert (negatives.count, negatives.min, negatives.median, negatives.p95, negatives.max) == (4, 7, 10, 15, 15)
    assert all(item.over is None for item in lengths.values())


def test_images_are_counted_apart_and_a_forgotten_one_is_pointed_at(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = [
        {"query": "the lid", "positive": {"image": "a.png"}},
        {"query": "the valve", "positive": {"image": ["a.png", "a.png"], "text": "fig. 3"}},
        {"query": "the pump", "positive": "pages/a.png"},
        {"query": "what is main.py", "positive": "see a.png"},
    ]
    path = tmp_path / "pages.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check_data([path])
    lengths = {(item.of, item.unit): (item.count, item.min, item.max) for item in report.lengths}
    assert lengths["positive", "images"] == (2, 1, 2)
    assert lengths["positive", "words"] == (3, 1, 2)
    assert lengths["positive", "characters"] == (3, 6, 11)
    (paths,) = (finding for finding in report.findings if finding.kind == "image_paths")
    assert (paths.count, paths.examples) == (1, [f'{path}:3: "pages/a.png"'])


def test_percentiles_are_of_the_nearest_rank(tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"query": "x" * n, "positive": "y"}) + "\n" for n in range(100, 0, -1)))
    lengths = {(item.of, item.unit): item for item in check_data([path]).lengths}
    queries = lengths["query", "characters"]
    assert (queries.min, queries.median, queries.p95, queries.max) == (1, 50, 95, 100)


def test_labels_and_scores_are_told_apart(files, tmp_path):
    scored = tmp_path / "scored.jsonl"
    scores = [[i / 4, -i] for i in range(20)]
    scored.write_text("".join(json.dumps({**ROWS[1], "scores": pair}) + "\n" for pair in scores))
    labels, teacher = check_data([*files, scored]).labels
    assert (labels.of, labels.count, labels.min, labels.median, labels.max) == ("labels", 4, 0, 0.25, 1)
    assert labels.values == {0: 1, 0.25: 2, 1: 1}
    assert (teacher.of, teacher.count, teacher.min, teacher.max, teacher.values) == ("scores", 40, -19, 4.75, None)


def test_what_is_wrong_is_counted_with_the_first_examples(files):
    train, pairs = files
    assert findings_of(check_data(files)) == {
        "bad_rows": (
            2,
            [
                f"{train}:6: has no positive; it has query",
                f"{train}:7: is no valid JSON: Expecting property name enclosed in double quotes at character 2",
            ],
        ),
        "duplicate_queries": (
            3,
            [
                f'{train}:1 and {train}:4: "how to reset it"',
                f'{train}:4 and {train}:5: "how to reset it"',
                f'{pairs}:1 and {pairs}:2: "one"',
            ],
        ),
        "duplicate_pairs": (1, [f'{train}:1 and {train}:5: "how to reset it"']),
        "duplicate_documents": (
            4,
            [
                f'{train}:1 and {train}:2: "hold the button"',
                f'{train}:2 and {train}:5: "hold the button"',
                f'{train}:4 and {train}:5: "pull the plug"',
            ],
        ),
        "several_positives": (
            2,
            [f'{train}:1 and {train}:4: "how to reset it"', f'{pairs}:3: "two"'],
        ),
        "contradictions": (1, [f'{train}:4 and {train}:5: "pull the plug"']),
    }


def test_leaks_are_exact_or_but_for_case_and_white_space(files):
    train, pairs = files
    report = check_data(files, evalset=EVALSET)
    found = {kind: value for kind, value in findings_of(report).items() if kind.startswith(("leaked", "shared"))}
    assert found == {
        "leaked_queries": (2, [f'{pairs}:1: "one" is q2', f'{pairs}:2: "one" is q2']),
        "leaked_queries_almost": (1, [f'{train}:2: "why is it red" is q1']),
        "leaked_documents": (1, [f'{pairs}:2: "b" is d2']),
        "leaked_documents_almost": (1, [f'{train}:2: "it is charging" is d1']),
        # Judged, but not relevant.
        "shared_documents": (1, [f'{train}:1: "a b c d" is d3']),
    }
    assert report.leaks == 5


@pytest.mark.parametrize(("needs", "bad"), [(None, 2), ("positives", 5), ("negatives", 6), ("labels", 2), ("lists", 5)])
def test_rows_are_held_against_what_a_loss_needs(files, needs, bad):
    assert check_data(files, needs=needs).bad_rows == bad


def test_a_row_that_training_takes_is_no_bad_one(files):
    # The check and the training read by the same rules.
    good = files[1]
    assert check_data([good], needs="labels").bad_rows == 0
    assert len(TrainingData.read([good], needs="labels")) == 3
    with pytest.raises(DataError, match="2 problems"):
        TrainingData.read(files, needs="labels")


def test_a_misspelt_column_is_shown_once_and_rows_with_it_are_still_looked_at(tmp_path):
    path = tmp_path / "misspelt.jsonl"
    path.write_text('{"query": "q", "positive": "p", "negatve": "n"}\n' * 3)
    assert findings_of(check_data([path])) == {
        "bad_rows": (1, [f"{path}:1: column 'negatve' is not known; did you mean 'negative'?"]),
        "duplicate_queries": (1, [f'{path}:2 and {path}:3: "q"']),
        "duplicate_pairs": (1, [f'{path}:2 and {path}:3: "q"']),
        "duplicate_documents": (1, [f'{path}:2 and {path}:3: "p"']),
    }


def run(*arguments):
    return CliRunner().invoke(main, ["data", "check", *map(str, arguments)])


def test_the_command_shows_everything_and_fails_for_bad_rows(files, tmp_path):
    write_evalset(EVALSET, tmp_path / "beir")
    result = run(*files, "--eval", tmp_path / "beir")
    assert result.exit_code == 4
    assert result.stderr.endswith("error: rows that cannot be used: 2\n")
    shown = " ".join(result.stdout.split())
    for part in (
        "file rows bad documents with positive with label with labels",
        "6 2 8 4 0 0",
        "query words 7",
        "labels: 0 (1), 0.25 (2), 1 (1)",
        f"rows that cannot be used: 2 {files[0]}:6: has no positive; it has query",
        f'queries that are evaluation queries but for case and white space: 1 {files[0]}:2: "why is it red" is q1',
    ):
        assert part in shown


def test_the_command_fails_for_leaks_only_if_told_to(files, tmp_path):
    write_evalset(EVALSET, tmp_path / "beir")
    assert run(files[1], "--eval", tmp_path / "beir").exit_code == 0
    result = run(files[1], "--eval", tmp_path / "beir", "--strict")
    assert (result.exit_code, result.stderr) == (4, "error: texts that are also in the evaluation set: 3\n")
    assert run(files[1], "--strict").exit_code == 0


def test_the_command_writes_json(files):
    found = json.loads(run(files[1], "--json").stdout)
    assert found == json.loads(json.dumps(check_data(files[1:]).to_dict()))
    assert found["labels"][0]["values"] == {"0.0": 1, "0.25": 2, "1.0": 1}
    assert found["files"][0]["rows"] == 3
    assert found["bad_rows"] == found["leaks"] == 0


def test_the_command_takes_a_loss_or_a_task(files):
    assert run(files[1], "--loss", "bce").exit_code == 0
    result = run(files[1], "--task", "embed")
    assert result.exit_code == 4
    assert "expected query, positive and, where there are any, negative(s)" in " ".join(result.stdout.split())
    result = run(files[1], "--loss", "inf_nce")
    assert result.exit_code == 2
    assert "error: loss 'inf_nce' does not exist (did you mean 'info_nce'? known: bce, " in result.stderr
    assert "info_nce" not in run(files[1], "--task", "rerank", "--loss", "info_nce").stdout


def test_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    result = run(tmp_path / "empty.jsonl")
    assert (result.exit_code, result.stderr) == (4, f"error: no rows in {tmp_path / 'empty.jsonl'}\n")


TOKENS = [
    {"query": "what is code file", "positive": "code " * 80, "negatives": ["a of in to and", "a of in to and is"]}
] * 2


def test_tokens_are_counted_with_prompts_and_special_tokens_and_not_cut(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint("bert", prompts={"query": "how ", "document": "for "}, max_tokens=8)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TOKENS))
    result = run(path, "--model", folder, "--json")
    report = json.loads(result.stdout)
    assert report["max_tokens"] == 8
    # count, min, max and how many are over 8; each word is a token, and so is a prompt, [CLS] and [SEP].
    assert {item["of"]: (item["count"], item["min"], item["max"], item["over"]) for item in report["lengths"]} == {
        "query": (2, 7, 7, 0),
        "positive": (2, 83, 83, 2),
        "negative": (4, 8, 9, 2),
    }
    assert {item["unit"] for item in report["lengths"]} == {"tokens"}
    shown = " ".join(run(path, "--model", folder).stdout.split())
    assert "count min median p95 max over 8" in shown
    assert "negative tokens 4 8 8 9 9 2 (50.0%)" in shown


def test_tokens_of_a_model_that_fills_its_texts(tmp_path):
    vision_models = runpy.run_path(str(Path(__file__).parents[1] / "vision_models.py"))
    vision_models["write_tiny_siglip"](tmp_path / "siglip")
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"query": "the cat", "positive": "a photo of the owl"}\n')
    found = json.loads(run(path, "--model", tmp_path / "siglip", "--json").stdout)["lengths"]
    assert {item["of"]: item["max"] < 64 for item in found} == {"query": True, "positive": True}


def test_tokens_of_a_reranker_are_those_of_its_pairs(tiny_checkpoint, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TOKENS))
    report = json.loads(run(path, "--model", tiny_checkpoint("bert", "rerank"), "--json").stdout)
    assert report["max_tokens"] == 64
    assert {item["of"]: (item["count"], item["min"], item["max"], item["over"]) for item in report["lengths"]} == {
        "query + positive": (2, 87, 87, 2),
        "query + negative": (4, 12, 13, 0),
    }


def test_the_command_needs_neither_torch_nor_pyarrow(files):
    code = (
        "import sys\n"
        "from rtx.runtime.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: assert not {'torch', 'transformers', 'pyarrow'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "data", "check", str(files[1])], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_page_leaks_however_its_path_is_spelt(tmp_path):
    (tmp_path / "pages").mkdir()
    for name in ("1", "2"):
        Image.new("RGB", (8, 8), (int(name), 0, 0)).save(tmp_path / "pages" / f"{name}.png")
    folder = tmp_path / "eval"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text('{"_id": "d1", "image": "../pages/1.png"}\n')
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "how?"}\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    train = tmp_path / "train.jsonl"
    train.write_text(
        "".join(json.dumps({"query": f"q{name}", "positive": {"image": f"pages/{name}.png"}}) + "\n" for name in (1, 2))
    )
    found = findings_of(check_data([train], evalset=load_evalset(folder)))
    count, (example,) = found["leaked_documents"]
    assert count == 1
    assert example.startswith(f"{train}:1: ")
    assert example.endswith(" is d1")


def test_images_of_rows_are_paths_data_urls_or_base64(tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    sources = [encoded, f"DATA:image/png;base64,{encoded}", "HTTPS://example.org/1.png", "none.png", "a" * 300]
    train = tmp_path / "train.jsonl"
    train.write_text(
        "".join(json.dumps({"query": f"q{i}", "positive": {"image": s}}) + "\n" for i, s in enumerate(sources))
    )
    assert len(encoded) > 4096  # more than a file's name may be long
    count, (url, missing, long) = findings_of(check_data([train]))["bad_rows"]
    assert count == 3
    assert url == (
        f"{train}:3: positive: image: URLs are not fetched here, got 'HTTPS://example.org/1.png'; "
        "expected a path, a data URL or base64"
    )
    assert missing == f"{train}:4: positive: image: {tmp_path / 'none.png'} does not exist"
    assert long.startswith(f"{train}:5: positive: image: 'aaaa")
    assert long.endswith(" is no path: File name too long")
    assert len(long) < len(str(train)) + 130


def test_a_blank_image_is_none(tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_text(
        '{"query": "q", "positive": {"image": ""}}\n{"query": "q", "positive": {"image": "", "text": "a"}}\n'
    )
    assert findings_of(check_data([train]))["bad_rows"] == (1, [f"{train}:1: positive: is empty"])


def test_a_document_leaks_with_and_without_its_title(tmp_path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text(
        '{"_id": "d1", "title": "Reset", "text": "Hold the button."}\n{"_id": "d2", "title": "Reset", "text": ""}\n'
    )
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": "how?"}\n')
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    texts = ["Hold the button.", "Reset Hold the button.", "hold  the button.", "Reset", "the button."]
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"query": f"q{i}", "positive": text}) + "\n" for i, text in enumerate(texts)))
    found = findings_of(check_data([train], evalset=load_evalset(tmp_path)))
    assert found["leaked_documents"][0] == 2
    assert found["leaked_documents_almost"] == (1, [f'{train}:3: "hold the button." is d1'])
    assert found["shared_documents"] == (1, [f'{train}:4: "Reset" is d2'])
