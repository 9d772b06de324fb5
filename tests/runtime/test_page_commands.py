"""`rtx mine`, `rtx rerank` and `rtx eval` on page images, by a tiny Qwen3-VL."""

from __future__ import annotations

import dataclasses
import json
import runpy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from rtx.runtime import bulk
from rtx.runtime.cli import main, open_model
from rtx.runtime.embedder import Embedder
from rtx.runtime.evalset import load_evalset
from rtx.runtime.evaluation import compare, evaluate_embedder
from rtx.runtime.items import Content
from rtx.runtime.reranker import Reranker
from rtx.trainer.data import TrainingData
from rtx.trainer.model import RetrievalModel

TINY = runpy.run_path(str(Path(__file__).parents[1] / "vision_models.py"))
WORDS = ["valve", "pump", "motor", "filter", "gauge", "lever", "shaft", "wheel"]


@pytest.fixture(scope="module")
def checkpoint(once: Callable[..., Path]) -> Path:
    return once("embed-pages", TINY["write_tiny_qwen3_vl"])


@pytest.fixture(scope="module")
def judge(once: Callable[..., Path]) -> Path:
    def fill(folder: Path) -> None:
        TINY["write_tiny_qwen3_vl"](folder / "bare", reranker=True)
        RetrievalModel.load(folder / "bare", task="rerank").save(folder / "judge")

    return once("rerank-pages", fill) / "judge"


@pytest.fixture(autouse=True)
def _manuals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight pages, rows that name them, and an evaluation set of the same."""
    monkeypatch.chdir(tmp_path)
    Path("pages").mkdir()
    Path("eval/qrels").mkdir(parents=True)
    for number in range(8):
        page(number).save(f"pages/{number}.png")
    write("train.jsonl", [{"query": f"the {word}", "positive": {"image": f"pages/{n}.png"}} for n, word in numbered()])
    write("eval/corpus.jsonl", [{"_id": f"p{number}", "image": f"../pages/{number}.png"} for number in range(8)])
    write("eval/queries.jsonl", [{"_id": word, "text": f"the {word}"} for word in WORDS])
    judged = "".join(f"{word}\tp{number}\t1\n" for number, word in numbered())
    Path("eval/qrels/test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")


def numbered() -> list[tuple[int, str]]:
    return list(enumerate(WORDS))


def page(number: int) -> Image.Image:
    """A page that shows its number: a dark bar in a place of its own."""
    pixels = np.full((96, 64, 3), 255, dtype=np.uint8)
    pixels[8 * number : 8 * number + 24, :, number % 3] = 0
    return Image.fromarray(pixels)


def write(name: str, records: Sequence[object]) -> None:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def run(command: str, model: Path, *arguments: object) -> Result:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(main, [command, str(model), *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


# -- mine ----------------------------------------------------------------------------------------------------------


def test_negatives_are_pages_of_the_corpus(checkpoint: Path) -> None:
    # The positive of the first row once more, under another name.
    shutil.copy("pages/0.png", "pages/copy.png")
    corpus = [*lines("eval/corpus.jsonl"), {"_id": "c", "image": "../pages/copy.png"}, {"_id": "t", "text": "the lid"}]
    write("eval/corpus.jsonl", corpus)
    result = run("mine", checkpoint, "train.jsonl", "-o", "mined.jsonl", "--corpus", "eval/corpus.jsonl", "--depth", 9)
    assert result.exit_code == 0, result.stderr
    found = lines("mined.jsonl")
    assert [(row["query"], row["positive"]) for row in found] == [
        (f"the {word}", {"image": f"pages/{number}.png"}) for number, word in numbered()
    ]
    with open_model(checkpoint) as model:
        assert isinstance(model, Embedder)
        items = [*(Path(f"pages/{number}.png") for number in range(8)), "the lid"]
        documents = model.embed(items, prompt="document")
        queries = model.embed([f"the {word}" for word in WORDS], prompt="query")
    for number, row in enumerate(found):
        order = [place for place in np.argsort(-(documents @ queries[number])).tolist() if place != number][:3]
        expected: list[Any] = [{"image": f"pages/{place}.png"} if place < 8 else "the lid" for place in order]
        assert row["negatives"] == expected
    assert "8 positives by rank; in the corpus: 8\n" in result.stdout
    assert "pages/0.png (rank" in result.stdout
    assert "\0" not in result.stdout
    read = TrainingData.read(["mined.jsonl"], needs="negatives")
    assert read[0].documents[0] == Content.of("", [str(Path("pages/0.png").absolute())])
    # Elsewhere, pages are named by their whole path.
    Path("out").mkdir()
    assert run("mine", checkpoint, "train.jsonl", "-o", "out/mined.jsonl", "--pairs").exit_code == 0
    assert lines("out/mined.jsonl")[0]["document"] == {"image": str(Path("pages/0.png").absolute())}


def test_texts_beside_pages_and_pages_as_queries(checkpoint: Path) -> None:
    rows = [
        {"query": {"image": "pages/1.png"}, "positive": {"image": ["pages/2.png", "pages/3.png"], "text": "both"}},
        {"query": "the valve", "positive": "a text", "negative": {"image": "pages/4.png"}},
    ]
    write("train.jsonl", rows)
    assert run("mine", checkpoint, "train.jsonl", "-o", "mined.jsonl").exit_code == 0
    first, second = lines("mined.jsonl")
    assert (first["query"], first["positive"]) == (rows[0]["query"], rows[0]["positive"])
    assert {json.dumps(row) for row in first["negatives"]} == {'"a text"', '{"image": "pages/4.png"}'}
    assert second["query"] == "the valve"
    assert rows[0]["positive"] in second["negatives"]


def test_a_reranker_of_pages_decides(checkpoint: Path, judge: Path) -> None:
    options = ("--rescore", judge, "--scores", "--depth", 5)
    result = run("mine", checkpoint, "train.jsonl", "-o", "mined.jsonl", *options)
    assert result.exit_code == 0, result.stderr
    row = lines("mined.jsonl")[3]
    with open_model(judge) as model:
        assert isinstance(model, Reranker)
        scores = model.logits([(row["query"], document) for document in (row["positive"], *row["negatives"])])
    np.testing.assert_allclose(row["scores"], scores, rtol=1e-3, atol=1e-3)


def test_damaged_pages_are_named(checkpoint: Path) -> None:
    for number in (2, 5):
        Path(f"pages/{number}.png").write_bytes(Path(f"pages/{number}.png").read_bytes()[:60])
    Path("pages/6.png").unlink()
    result = run("mine", checkpoint, "train.jsonl", "-o", "mined.jsonl")
    assert result.exit_code == 4
    found = {line["where"]: line["error"] for line in lines("mined.jsonl.errors.jsonl")}
    assert found["train.jsonl:7"] == "positive: image: pages/6.png does not exist"
    for number in (2, 5):
        assert found[f"train.jsonl:{number + 1}"].startswith("positive: image: '")
        assert f"pages/{number}.png': a PNG image that is truncated" in found[f"train.jsonl:{number + 1}"]
    used = {document["image"] for row in lines("mined.jsonl") for document in (row["positive"], *row["negatives"])}
    assert used == {f"pages/{number}.png" for number in (0, 1, 3, 4, 7)}


def test_models_of_texts_are_not_given_pages_to_mine(toy_bundle: Path, checkpoint: Path, toy_reranker_bundle: Path):
    result = run("mine", toy_bundle, "train.jsonl", "-o", "mined.jsonl")
    assert result.exit_code == 4
    assert "train.jsonl:1: positive: expected a text, got an image; this model takes no images" in result.stderr
    result = run("mine", checkpoint, "train.jsonl", "-o", "mined.jsonl", "--rescore", toy_reranker_bundle)
    assert (result.exit_code, "takes texts only, and there are images" in result.stderr) == (2, True)
    assert not list(Path().glob("mined*"))
    # Pages beside texts are left aside, as they were before models took them.
    write("train.jsonl", [{"query": "reset", "positive": "reset the device"}])
    write("corpus.jsonl", [{"text": "sort the list", "image": "gone.png"}, {"text": "clean it", "image": "gone.png"}])
    assert run("mine", toy_bundle, "train.jsonl", "-o", "mined.jsonl", "--corpus", "corpus.jsonl").exit_code == 0
    assert set(lines("mined.jsonl")[0]["negatives"]) == {"sort the list", "clean it"}


def test_what_the_model_never_takes_is_listed_and_the_rest_is_mined(toy_bundle: Path) -> None:
    rows = [
        {"query": "reset", "positive": "reset the device"},
        {"query": "sort", "positive": {"image": "pages/0.png"}},
        {"query": "clean", "positive": "clean it", "negatives": ["wipe it", {"image": "pages/1.png"}]},
        {"query": "order", "positive": "sort the list"},
    ]
    write("train.jsonl", rows)
    result = run("mine", toy_bundle, "train.jsonl", "-o", "mined.jsonl")
    assert result.exit_code == 4, result.output
    wrong = "expected a text, got an image; this model takes no images"
    assert [(line["where"], line["error"]) for line in lines("mined.jsonl.errors.jsonl")] == [
        ("train.jsonl:2", f"positive: {wrong}"),
        ("train.jsonl:3", f"negatives[1]: {wrong}"),
    ]
    assert [row["query"] for row in lines("mined.jsonl")] == ["reset", "order"]
    assert lines("mined.jsonl")[0]["negatives"] == ["sort the list"]


def test_a_call_has_a_bounded_number_of_pages(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = Embedder.embed

    def counted(self: Embedder, items: Sequence[object], **options: Any) -> Any:
        calls.append(len(items))
        return original(self, items, **options)

    monkeypatch.setattr(Embedder, "embed", counted)
    monkeypatch.setattr(bulk, "IMAGES_PER_CALL", 3)
    assert run("mine", checkpoint, "train.jsonl", "-o", "mined.jsonl").exit_code == 0
    assert calls == [3, 3, 2, 8]


# -- rerank --------------------------------------------------------------------------------------------------------


def test_pages_are_ordered_for_a_query(judge: Path) -> None:
    Path("pages/5.png").write_bytes(b"damaged")
    rows = [
        {"id": "list", "query": "dark", "documents": [{"image": "pages/0.png"}, "a text", {"image": "pages/1.png"}]},
        {"id": "pair", "query": {"image": "pages/2.png"}, "document": {"image": ["pages/3.png"], "text": "both"}},
        {"id": "cut", "query": "dark", "document": {"image": "pages/5.png"}},
        {"id": "gone", "query": "dark", "document": {"image": "pages/gone.png"}},
        {"id": "one of them", "query": "dark", "documents": ["a", {"image": "pages/5.png"}, {"image": "x.png"}, 5]},
        {"id": "key", "query": "dark", "document": {"picture": "pages/0.png"}},
        {"id": "fine", "query": "dark", "document": "a text"},
        {"id": "query", "query": {"image": "pages/5.png"}, "documents": ["a", "b", {"image": "pages/0.png"}]},
    ]
    write("in.jsonl", rows)
    assert run("rerank", judge, "in.jsonl", "-o", "out.jsonl", "--with-text").exit_code == 4
    with open_model(judge) as model:
        assert isinstance(model, Reranker)
        pages = [Path(f"pages/{number}.png") for number in range(4)]
        both = {"image": [pages[3]], "text": "both"}
        pairs: list[Any] = [("dark", pages[0]), ("dark", "a text"), ("dark", pages[1]), (pages[2], both)]
        scores = model.score(pairs)
    found = {line["id"]: line for line in lines("out.jsonl")}
    assert set(found) == {"list", "pair", "fine"}
    order = np.argsort(-scores[:3]).tolist()
    assert [entry["index"] for entry in found["list"]["ranking"]] == order
    assert [entry["document"] for entry in found["list"]["ranking"]] == [rows[0]["documents"][at] for at in order]  # type: ignore[index]
    np.testing.assert_allclose([entry["score"] for entry in found["list"]["ranking"]], scores[order], atol=2e-6)
    np.testing.assert_allclose([found["pair"]["score"], found["fine"]["score"]], scores[[3, 1]], atol=2e-6)
    assert found["pair"]["document"] == rows[1]["document"]
    errors = {line["id"]: line["error"] for line in lines("out.jsonl.errors.jsonl")}
    assert "pages/5.png': no image that can be read (7 bytes)" in errors["cut"]
    assert errors["gone"] == "document: image: pages/gone.png does not exist"
    assert errors["one of them"] == "documents[2]: image: x.png does not exist"
    assert errors["query"].startswith("query: image: '")
    assert errors["query"].count("pages/5.png': no image that can be read (7 bytes)") == 1
    assert errors["key"] == "document: expected a text, or the keys image and text; got picture"


def test_pages_for_one_query(judge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("in.jsonl", [{"id": f"p{number}", "document": {"image": f"pages/{number}.png"}} for number in range(8)])
    result = run("rerank", judge, "in.jsonl", "--query", "dark", "--top-k", 3)
    best = [json.loads(line) for line in result.stdout.splitlines()]
    with open_model(judge) as model:
        assert isinstance(model, Reranker)
        scores = model.score([("dark", Path(f"pages/{number}.png")) for number in range(8)])
    assert [line["id"] for line in best] == [f"p{at}" for at in np.argsort(-scores)[:3].tolist()]
    monkeypatch.setattr("rtx.runtime.commands.rerank._is_terminal", lambda: True)
    shown = run("rerank", judge, "in.jsonl", "--query", "dark", "--top-k", 1).stdout.splitlines()[1]
    assert shown.split() == [f"{scores.max():.4f}", best[0]["id"], "image", f"pages/{best[0]['id'][1:]}.png"]


def test_a_reranker_of_texts_is_given_no_page(toy_reranker_bundle: Path) -> None:
    write("in.jsonl", [{"query": "dark", "document": {"image": "pages/0.png"}}, {"query": "dark", "document": "a"}])
    assert run("rerank", toy_reranker_bundle, "in.jsonl", "-o", "out.jsonl").exit_code == 4
    (error,) = lines("out.jsonl.errors.jsonl")
    assert error["error"] == "document: expected a text, got an image; this model takes no images"
    assert len(lines("out.jsonl")) == 1


# -- eval ----------------------------------------------------------------------------------------------------------


def test_pages_are_ranked_and_looked_at(checkpoint: Path, judge: Path) -> None:
    files = ["--json", "report.json", "--save-candidates", "found.jsonl", "--found", "found.html"]
    result = run("eval", checkpoint, "eval", "--k", 3, *files, "--found-queries", 5)
    assert result.exit_code == 0, result.output
    report = json.loads(Path("report.json").read_text())
    with open_model(checkpoint) as model:
        assert isinstance(model, Embedder)
        documents = model.embed([Path(f"pages/{number}.png") for number in range(8)], prompt="document")
        scores = model.embed([f"the {word}" for word in WORDS], prompt="query") @ documents.T
    ranks = (scores > np.diag(scores)[:, None]).sum(axis=1)
    assert report["metrics"]["recall@3"] == pytest.approx((ranks < 3).mean())
    assert [line["corpus-ids"][0] for line in lines("found.jsonl")] == [f"p{at}" for at in scores.argmax(axis=1)]
    page = Path("found.html").read_text()
    assert page.count('<section class="query ') == 5
    assert f"NDCG@3 {report['metrics']['ndcg@3']:.3f}, 95 % interval" in page
    assert page.count('src="data:image/') >= 15
    assert "SHA-256 " + report["sha256"][:16] in page

    candidates = ["--candidates", "found.jsonl"]
    result = run("eval", judge, "eval", "--k", 3, *candidates, "--found", "judged.html", "--json", "judged.json")
    assert result.exit_code == 0, result.output
    with open_model(judge) as model:
        assert isinstance(model, Reranker)
        own = model.score([("the pump", Path(f"pages/{number}.png")) for number in range(8)])
    assert json.loads(Path("judged.json").read_text())["against"]["model"] == "first stage"
    assert Path("judged.html").read_text().count('<section class="query ') == 8
    card = Path("judged.html").read_text().split("<h2>the pump</h2>")[1]
    assert card.split('<p class="id">')[1].startswith(f"p{own.argmax()}<")


def test_what_cannot_be_evaluated_is_named(checkpoint: Path, toy_bundle: Path) -> None:
    result = run("eval", toy_bundle, "eval", "--found", "found.html")
    assert (result.exit_code, result.stderr) == (
        4,
        "error: 'eval': document 'p0' is an image; this model takes texts only\n",
    )
    Path("pages/6.png").write_bytes(b"damaged")
    result = run("eval", checkpoint, "eval", "--found", "found.html")
    assert result.exit_code == 4
    assert "item 6: document 'p6': image: '" in result.stderr
    assert "pages/6.png': no image that can be read" in result.stderr
    assert not Path("found.html").exists()
    result = run("eval", checkpoint, "eval", "--found", "nowhere/found.html")
    assert (result.exit_code, "--found: the folder nowhere does not exist" in result.stderr) == (2, True)


def test_queries_of_images_are_described(checkpoint: Path) -> None:
    write("eval/queries.jsonl", [{"_id": word, "image": f"../pages/{n}.png"} for n, word in numbered()])
    evalset = load_evalset("eval")
    with open_model(checkpoint) as model:
        assert isinstance(model, Embedder)
        first = evaluate_embedder(model, evalset)
    (change,) = compare(first, dataclasses.replace(first, ndcg=first.ndcg - 0.5), evalset, worst=1).worst
    assert change.text.startswith("image ")
    assert change.text.endswith(f"pages/{WORDS.index(change.query)}.png")
