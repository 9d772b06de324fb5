from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rtx.runtime.candidates import Candidate
from rtx.runtime.evalset import EvalSet
from rtx.runtime.evaluation import Evaluation, evaluate_candidates
from rtx.runtime.found_pages import Ranked, choose, found_page, picture
from rtx.runtime.items import Content

DOCUMENTS = 12
# What each query ranks, best first; the relevant document is the query's own number.
ORDERS = {
    "q0": [0, 1, 2, 3, 4, 5],
    "q1": [2, 3, 1, 4, 5, 6],
    "q2": [3, 4, 5, 6, 2, 7],
    "q3": [4, 5, 6, 7, 8, 9],
}


def evaluated(evalset: EvalSet, orders: dict[str, list[int]] = ORDERS, k: int = 3) -> Evaluation:
    names = list(evalset.corpus)
    candidates = {query: [Candidate(names[place]) for place in order] for query, order in orders.items()}
    return evaluate_candidates(evalset, candidates, k=k, depth=6)


def texts(**changes: Any) -> EvalSet:
    corpus = {f"d{number}": f"title {number} the text of document {number}" for number in range(DOCUMENTS)}
    fields: dict[str, Any] = {
        "name": "toys",
        "queries": {query: f"where is {query}?" for query in ORDERS},
        "corpus": corpus,
        "qrels": {query: {f"d{query[1:]}": 1} for query in ORDERS},
    }
    return EvalSet(**(fields | changes))


@pytest.fixture
def pages(tmp_path: Path) -> EvalSet:
    rng = np.random.default_rng(0)
    corpus = {}
    for number in range(DOCUMENTS):
        pixels = rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((300, 400)).save(tmp_path / f"{number}.png")
        corpus[f"d{number}"] = Content.of("", [str(tmp_path / f"{number}.png")])
    return texts(corpus=corpus)


class Parsed(HTMLParser):
    """Cards by query: outcome, and documents as (id, rank, whether it is marked, what it shows)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def of(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def cards(page: str) -> dict[str, tuple[str, list[tuple[str, str, bool]]]]:
    """By query, its outcome and the documents shown with it: id, rank, and whether it is framed and marked."""
    found = {}
    for outcome, body in re.findall(r'<section class="query (\w+)">(.*?)</section>', page, flags=re.DOTALL):
        query = re.search(r"<span>(q\d)</span></p>", body)
        assert query is not None
        documents = []
        for kind, item in re.findall(r'<li class="(\w+)">(.*?)</li>', body, flags=re.DOTALL):
            rank, name = re.search(r"<strong>(.*?)</strong>", item), re.search(r'<p class="id">(.*?)</p>', item)
            assert rank is not None
            assert name is not None
            assert ("✓" in item) is (kind == "relevant")
            documents.append((name[1], rank[1], kind == "relevant"))
        found[query[1]] = (outcome, documents)
    return found


def test_each_query_stands_beside_what_it_found() -> None:
    evalset = texts()
    evaluation = evaluated(evalset)
    page = found_page(evalset, evaluation, model="toy.rtx")
    found = cards(page)
    # Misses first; those that were not found at all are no worse than those found at rank 5.
    assert list(found) == ["q2", "q3", "q1", "q0"]
    assert found["q0"] == ("first", [("d0", "1", True), ("d1", "2", False), ("d2", "3", False)])
    assert found["q1"] == ("late", [("d2", "1", False), ("d3", "2", False), ("d1", "3", True)])
    assert found["q2"][0] == "missed"
    assert found["q2"][1][3:] == [("d2", "5", True)]
    assert found["q3"][1][3:] == [("d3", "behind 6", True)]
    for shown in ("missed: rank 5", "missed: not among the first 6", "found at rank 3", "found first"):
        assert page.count(f">{shown}<") == 1
    assert "NDCG@3 0.500" in page
    mean = evaluation.metrics["ndcg@3"]
    assert mean == pytest.approx((1 + 0.5) / 4)
    assert re.search(rf"NDCG@3 {mean:.3f}, 95 % interval 0\.\d+ to [01]\.\d+\.", page)
    assert "4 queries, 12 documents" in page
    assert "missed (no relevant document among the first 3): 2, 50%" in page


def test_the_page_needs_nothing_else(pages: EvalSet) -> None:
    page = found_page(pages, evaluated(pages), model="toy.rtx", facts={"Model": "toy.rtx"})
    parsed = Parsed(page)
    assert not parsed.open
    assert not {"script", "link", "iframe"} & {tag for tag, _ in parsed.tags}
    assert all(str(image["src"]).startswith("data:image/") for image in parsed.of("img"))
    assert not re.search(r"""(?:src|href|url\()\s*=?\s*["']?(?:https?:)?//""", page)
    # Three documents a query, and two that were missed.
    assert [image["alt"] for image in parsed.of("img")].count("d3") == 3
    assert len(parsed.of("img")) == 4 * 3 + 2
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) == 4
    assert {label["for"] for label in parsed.of("label")} == set(ids)
    assert "prefers-color-scheme: dark" in page


def test_markup_in_a_set_stays_text() -> None:
    corpus = {f"d{number}": "<script>alert(1)</script>" for number in range(DOCUMENTS)}
    queries = dict.fromkeys(ORDERS, '<img src="x"> & "quotes"')
    page = found_page(texts(corpus=corpus, queries=queries), evaluated(texts()), model="<b>")
    parsed = Parsed(page)
    assert not {"script", "img", "b"} & {tag for tag, _ in parsed.tags}
    assert "&lt;img src=&quot;x&quot;&gt; &amp;" in page


def test_texts_are_shown_by_their_first_words() -> None:
    corpus = {f"d{number}": f"Title {number} {'word ' * 100}" for number in range(DOCUMENTS)}
    evalset = texts(corpus=corpus, titles={f"d{number}": f"Title {number}" for number in range(DOCUMENTS)})
    page = found_page(evalset, evaluated(evalset), model="toy.rtx")
    assert f'<p class="words"><strong>Title 2</strong> {"word " * 45}…</p>' in page
    assert '<ol class="texts"' in page
    assert "<img" not in page


def test_grades_are_shown_where_they_differ() -> None:
    qrels = {query: {f"d{query[1:]}": 2, "d1": 1, "d11": 0} for query in ORDERS}
    qrels["q1"] = {"d1": 1}
    evalset = texts(qrels=qrels)
    page = found_page(evalset, evaluated(evalset), model="toy.rtx")
    assert cards(page)["q0"][1] == [("d0", "1", True), ("d1", "2", True), ("d2", "3", False)]
    assert page.count("relevant (2)<") == 3
    # Both are behind the first three; the higher grade comes first.
    assert cards(page)["q3"][1][3:] == [("d3", "behind 6", True), ("d1", "behind 6", True)]


def test_many_relevant_documents_are_counted() -> None:
    qrels = {query: {f"d{number}": 1 for number in range(DOCUMENTS)} for query in ORDERS}
    evalset = texts(qrels=qrels)
    page = found_page(evalset, evaluated(evalset), model="toy.rtx")
    assert page.count("Relevant, but behind the first 3 and 6 more<") == 4
    assert [rank for _, rank, _ in cards(page)["q0"][1][3:]] == ["4", "5", "6"]


def test_a_query_without_a_ranking() -> None:
    page = found_page(texts(), evaluated(texts(), ORDERS | {"q0": []}), model="toy.rtx")
    assert cards(page)["q0"] == ("missed", [("d0", "behind 6", True)])
    assert page.count("Nothing was ranked.") == 1


# -- the sample ----------------------------------------------------------------------------------------------------


def ranked(*outcomes: str) -> list[Ranked]:
    return [Ranked(place, 0.0, outcome, None, (), ()) for place, outcome in enumerate(outcomes)]  # type: ignore[arg-type]


def test_the_sample_has_of_each_outcome_as_many() -> None:
    some = ranked(*["missed"] * 5, *["late"] * 2, *["first"] * 93)
    names = [f"q{number}" for number in range(100)]
    chosen = choose(some, names, 12)
    kinds = [some[place].outcome for place in chosen]
    assert [kinds.count(kind) for kind in ("missed", "late", "first")] == [5, 2, 5]
    # The same again, of another order too, and part of a larger one.
    assert choose(some, names, 12) == chosen == choose(list(reversed(some)), names, 30)[:12]
    assert sorted(choose(some, names, 200)) == list(range(100))


def test_the_page_shows_the_sample_and_says_so() -> None:
    page = found_page(texts(), evaluated(texts()), model="toy.rtx", queries=3)
    assert sorted(outcome for outcome, _ in cards(page).values()) == ["first", "late", "missed"]
    assert "Shown are 3 of 4 queries" in page
    assert ">missed 1</label>" in page


# -- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_bytes", [40_000, 8_000, 3_000])
def test_pictures_fit(pages: EvalSet, max_bytes: int) -> None:
    source = str(pages.corpus["d1"].item.images[0])  # type: ignore[attr-defined]
    url = picture(source, max_bytes)
    assert url is not None
    assert len(url) <= max_bytes
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as small:
        assert small.height / small.width == pytest.approx(4 / 3, abs=0.04)
        assert small.height <= 360


def test_all_pictures_together_fit(pages: EvalSet) -> None:
    for max_bytes in (10**6, 60_000, 1_000):
        page = found_page(pages, evaluated(pages), model="toy.rtx", max_bytes=max_bytes)
        total = sum(len(str(image["src"])) for image in Parsed(page).of("img"))
        assert total <= max_bytes
        assert page.count(">no picture<") == (0 if total else 14)


def test_an_image_that_cannot_be_read_is_no_picture(pages: EvalSet) -> None:
    Path(str(pages.corpus["d3"].item.images[0])).write_bytes(b"damaged")  # type: ignore[attr-defined]
    page = found_page(pages, evaluated(pages), model="toy.rtx")
    assert page.count(">no picture<") == 3
    assert len(Parsed(page).of("img")) == 11


def test_images_beside_texts_and_as_queries(pages: EvalSet) -> None:
    first, second = (str(pages.corpus[name].item.images[0]) for name in ("d1", "d2"))  # type: ignore[attr-defined]
    evalset = texts(
        corpus=texts().corpus | {"d0": Content.of("a caption", [first, second])},
        queries=texts().queries | {"q0": Content.of("", [second]), "q1": Content.of("and a text", [first])},
    )
    page = found_page(evalset, evaluated(evalset), model="toy.rtx")
    assert [image["alt"] for image in Parsed(page).of("img")] == ["query q1", "query q0", "d0"]
    assert "<figcaption>1 of 2 images. a caption</figcaption>" in page
    assert "<h2>an image</h2>" in page
    assert "<h2>and a text</h2>" in page
