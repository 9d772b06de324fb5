from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from rtx.runtime import Embedder, Reranker
from rtx.runtime.candidates import read_candidates
from rtx.runtime.cli import main
from rtx.runtime.evalset import EvalSet, load_evalset, write_evalset
from rtx.runtime.evaluation import evaluate_embedder, evaluate_reranker, evaluate_weights

TEXTS = {
    "reset": "hold the button to reset the device",
    "coffee": "clean the coffee machine with water and steam",
    "parse": "parse the file and return a table",
    "sort": "sort the list of strings",
    "image": "search for an image in the index",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    queries = {"q1": "how to reset my device", "q2": "sort a list", "q3": "[red] broken pump"}
    qrels = {"q1": {"reset": 2, "coffee": 1}, "q2": {"sort": 1}, "q3": {"image": 1}}
    folder = tmp_path_factory.mktemp("evalset") / "toys"
    write_evalset(EvalSet("toys", queries, TEXTS, qrels), folder)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, ["eval", *map(str, arguments)])


def test_embedder(toy_bundle, folder, tmp_path):
    result = run(toy_bundle, folder, "--k", 3, "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    with Embedder.open(toy_bundle) as model:
        expected = evaluate_embedder(model, load_evalset(folder), k=3)
    assert report == {"model": str(toy_bundle), "variant": None, **expected.to_dict()}
    assert "toys: 3 queries, 5 documents" in result.stdout
    for name, value in expected.metrics.items():
        assert any(name in line and f"{value:.4f}" in line for line in result.stdout.splitlines()), name


def test_against_another_variant(toy_bundle, folder, tmp_path):
    json_file = tmp_path / "report.json"
    result = run(toy_bundle, folder, "--k", 1, "--against-variant", "int8", "--json", json_file)
    assert result.exit_code == 0, result.output
    report = json.loads(json_file.read_text())
    assert (report["variant"], report["against"]["variant"]) == (None, "int8")
    comparison = report["comparison"]
    assert comparison["difference"] == report["metrics"]["ndcg@1"] - report["against"]["metrics"]["ndcg@1"]
    assert f"{toy_bundle} (int8)" in result.stdout
    low, high = comparison["interval"]
    assert f"ndcg@1: {comparison['difference']:+.4f}, 95% interval {low:+.4f} to {high:+.4f}" in result.stdout


def test_embedder_then_reranker(toy_bundle, toy_reranker_bundle, folder, tmp_path):
    found = tmp_path / "found.jsonl"
    assert run(toy_bundle, folder, "--k", 2, "--depth", 3, "--save-candidates", found).exit_code == 0
    evalset = load_evalset(folder)
    candidates = read_candidates(found, evalset)
    with Embedder.open(toy_bundle) as model:
        first = evaluate_embedder(model, evalset, k=2, depth=3)
    assert candidates == first.candidates(evalset, 3)
    json_file = tmp_path / "report.json"
    options = ("--k", 2, "--candidates", found, "--against", toy_bundle, "--json", json_file)
    result = run(toy_reranker_bundle, folder, *options)
    assert result.exit_code == 0, result.output
    report = json.loads(json_file.read_text())
    with Reranker.open(toy_reranker_bundle) as reranker:
        second = evaluate_reranker(reranker, evalset, candidates, k=2)
    assert report["metrics"] == second.metrics
    assert report["against"]["metrics"]["ndcg@2"] == first.metrics["ndcg@2"]
    # Without another model, the order of the candidates is what it has to beat.
    result = run(toy_reranker_bundle, folder, "--k", 2, "--candidates", found, "--json", json_file)
    assert "first stage" in result.stdout
    alone = json.loads(json_file.read_text())
    assert alone["metrics"] == second.metrics
    assert alone["against"]["model"] == "first stage"
    assert alone["against"]["metrics"]["ndcg@2"] == first.metrics["ndcg@2"]
    assert alone["comparison"] == report["comparison"]


def test_worst_queries_are_named_with_their_text(toy_bundle, folder, monkeypatch):
    ndcg = iter([[0.5, 1.0, 0.25], [1.0, 1.0, 1.0]])

    def measured(*arguments, **options):
        return dataclasses.replace(evaluate_embedder(*arguments, **options), ndcg=np.array(next(ndcg)))

    monkeypatch.setattr("rtx.runtime.commands.eval.evaluate_embedder", measured)
    monkeypatch.setattr("rtx.runtime.commands.eval._SHOWN_CHARS", 12)
    result = run(toy_bundle, folder, "--against", toy_bundle)
    assert result.exit_code == 0, result.output
    assert "ndcg@10: -0.4167, 95% interval" in result.stdout
    assert "better on 0 queries, worse on 2 of 3; top-10 overlap 1.000" in result.stdout
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│ q" in line]
    # Texts are shown as they are, though rich would take [red] for a colour.
    assert rows == [["q3", "[red] broken…", "1.000", "0.250"], ["q1", "how to reset…", "1.000", "0.500"]]


def test_what_was_found_is_written_to_look_at(toy_bundle, folder, tmp_path):
    result = run(toy_bundle, folder, "--k", 2, "--found", tmp_path / "found.html", "--variant", "int8")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "found.html").read_text()
    assert f"{toy_bundle} (int8) on toys: what it found" in page
    assert page.count('<section class="query ') == 3
    assert "[red] broken pump" in page
    assert "hold the button to reset the device" in page


def test_keep_identical_ids(toy_bundle, tmp_path):
    # The query is a document of the corpus, as in ArguAna, and nearest to itself.
    evalset = EvalSet("self", {"sort": TEXTS["sort"]}, TEXTS, {"sort": {"parse": 1}})
    write_evalset(evalset, tmp_path / "self")
    rankings = []
    for option in ((), ("--keep-identical-ids",)):
        file = tmp_path / "found.jsonl"
        assert run(toy_bundle, tmp_path / "self", "--save-candidates", file, *option).exit_code == 0
        rankings.append([candidate.document for candidate in read_candidates(file, evalset)["sort"]])
    without, kept = rankings
    assert kept == ["sort", *without]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (("{embedder}", "{folder}", "--candidates", "{run}"), 2, "--candidates: only a reranker has them"),
        (("{reranker}", "{folder}"), 2, "pass --candidates FILE (from --save-candidates)"),
        (("{embedder}", "{folder}", "--k", "11", "--depth", "10"), 2, "--k: expected at most --depth (10), got 11"),
        (("{embedder}", "{folder}", "--json", "nowhere/report.json"), 2, "--json: the folder nowhere does not exist"),
        (("{embedder}", "{folder}", "--variant", "int4"), 2, "int4"),
        (("{embedder}", "nowhere"), 4, "nowhere: is no evaluation set in the BEIR layout"),
        (("{embedder}", "{folder}", "--split", "dev"), 4, "qrels/dev.tsv not found (splits in qrels: test)"),
    ],
)
def test_errors(toy_bundle, toy_reranker_bundle, folder, tmp_path, arguments, exit_code, message):
    (tmp_path / "found.run").write_text("q1 Q0 reset 1 1 x\n")
    names = {
        "{embedder}": toy_bundle,
        "{reranker}": toy_reranker_bundle,
        "{folder}": folder,
        "{run}": tmp_path / "found.run",
    }
    result = run(*(names.get(argument, argument) for argument in arguments))
    assert result.exit_code == exit_code, result.output
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def test_a_weight_of_the_first_stage_is_chosen(toy_bundle, toy_reranker_bundle, folder, tmp_path):
    found, json_file = tmp_path / "found.jsonl", tmp_path / "report.json"
    assert run(toy_bundle, folder, "--save-candidates", found).exit_code == 0
    weights = ("--first-stage-weight", 3, "--first-stage-weight", 0.5)
    result = run(toy_reranker_bundle, folder, "--k", 2, "--candidates", found, *weights, "--json", json_file)
    assert result.exit_code == 0, result.output
    evalset = load_evalset(folder)
    candidates = read_candidates(found, evalset)
    with Reranker.open(toy_reranker_bundle) as reranker:
        expected = evaluate_weights(reranker, evalset, candidates, [0.0, 0.5, 3.0], k=2)
        alone = evaluate_reranker(reranker, evalset, candidates, k=2)
    report = json.loads(json_file.read_text())
    assert report["metrics"] == alone.metrics  # its own weight is 0
    table = report["by_first_stage_weight"]
    assert {key: value["other"] for key, value in table.items()} == {
        f"{weight:g}": found.metrics["ndcg@2"] for weight, found in expected.items()
    }
    assert "by the weight of the first stage" in result.stdout
    assert f"{expected[3.0].metrics['ndcg@2']:.4f}" in result.stdout
    refused = run(toy_bundle, folder, *weights)
    assert (refused.exit_code, "--first-stage-weight: only for a reranker by itself" in refused.stderr) == (2, True)
