from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.vdr.dataset import Content, Selection, counts, reasons, select, still_visible
from benchmarks.vdr.documents import Document
from benchmarks.vdr.pages import Pdf
from benchmarks.vdr.queries import folded

Read = Callable[..., Content]
Texts = Sequence[tuple[float, float, float, str]]
BODY = (50, 300, 10, "Some running text of the page")


@pytest.fixture
def read(make_pdf: Any) -> Read:
    def read(name: str, pages: Sequence[Texts], outline: Sequence[tuple[str, int]] = ()) -> Content:
        path = make_pdf(pages, outline, name=name)
        pdf = Pdf(path)
        document = Document(name, "package", "1.0", "test", Path(path), "0")
        return Content(document, tuple(pdf.text(number) for number in range(len(pdf))), tuple(pdf.outline()))

    return read


def caption(number: int, text: str) -> tuple[float, float, float, str]:
    return (50, 100 + 40 * number, 10, f"Figure {number}: {text}")


def asked(selection: Selection) -> list[tuple[str, int]]:
    return [(query.text, query.page) for query in selection.queries]


def test_queries_pages_and_what_is_hidden(read: Read) -> None:
    content = read(
        "a",
        [
            [caption(1, "Voltage over time"), caption(2, "Two words"), BODY],
            [(50, 60, 14, "2 Noise and hum"), (50, 100, 10, "as in voltage over time, which is"), BODY],
            [
                *((50, 100 + 12 * n, 10, f"Some title {n} . . . . . {n}") for n in range(4)),
                caption(5, "Books to be read"),
            ],
            [],
        ],
        [("2 Noise and hum", 1), ("Not there at all", 1)],
    )
    (selection,) = select([content], one_scope=True)
    assert asked(selection) == [("Voltage over time", 0), ("Noise and hum", 1)]
    assert selection.left_out == {2: "lists other pages", 3: "empty"}
    assert list(selection.corpus) == [0, 1]
    assert [query.drop for query in selection.found if query.drop] == [
        "caption: under 3 words",
        "caption: on a page that is left out",
        "title: not found as a heading of its page",
    ]
    hidden = {
        number: [" ".join(selection.pages[number].text[start:stop].split()) for start, stop in ranges]
        for number, ranges in selection.hidden.items()
    }
    # The caption that is no query too, and the words of a query on a page that is not its own.
    assert hidden == {0: ["Voltage over time", "Two words"], 1: ["Noise and hum", "voltage over time"]}
    assert still_visible([selection]) == []
    selection.hidden[1].pop()
    assert still_visible([selection]) == ["a/0002: Voltage over time"]
    assert counts(selection.queries) == {"caption": 1, "title": 1}
    assert reasons(selection.found) == {
        "caption: on a page that is left out": 1,
        "caption: under 3 words": 1,
        "title: not found as a heading of its page": 1,
    }


def test_words_that_only_what_is_hidden_parted_are_not_visible(read: Read) -> None:
    pages = [[caption(1, "Noise over all"), (50, 200, 10, "The noise, noise over all, over all."), BODY]]
    (selection,) = select([read("a", pages)], one_scope=True)
    assert still_visible([selection]) == []


def test_documents_of_an_evaluation_set_are_searched_together(read: Read) -> None:
    contents = [
        read("a", [[caption(1, "Voltage over time"), BODY], [caption(2, "Current over time"), BODY]]),
        read("b", [[caption(1, "VOLTAGE over time"), BODY], [caption(2, "Charge over time"), BODY]]),
    ]
    first, second = select(contents, one_scope=True)
    assert asked(first) == [("Current over time", 1)]
    assert asked(second) == [("Charge over time", 1)]
    assert first.found[0].drop == "caption: the same words on two pages"
    assert 0 in first.hidden  # a caption, though it is no query
    apart, _ = select(contents, one_scope=False)
    assert asked(apart) == [("Voltage over time", 0), ("Current over time", 1)]


def test_words_that_many_pages_have_make_no_query(read: Read) -> None:
    mentioned = (50, 200, 10, "see noise and hum here")
    head = (50, 30, 10, "Noise and hum")

    def drops(mentions: int) -> list[str]:
        pages = [
            [(50, 60, 14, "Noise and hum"), BODY],
            *([[head, mentioned, BODY]] * mentions),
            [head, (50, 100, 9, "x"), BODY],
        ]
        (selection,) = select([read(f"d{mentions}", pages, [("Noise and hum", 0)])], one_scope=True)
        return [query.drop for query in selection.found]

    assert drops(3) == [""]  # a running head is no mention
    assert drops(4) == ["title: words of many pages"]


def test_what_is_held_out_and_what_failed(read: Read) -> None:
    content = read("a", [[caption(1, "Voltage over time"), BODY], [caption(2, "Current over time"), BODY]])
    (selection,) = select(
        [content], one_scope=False, held_out=[folded("voltage, over time")], failed={"a/0002": "read by OCR"}
    )
    assert [query.drop for query in selection.found] == [
        "caption: asked for in an evaluation set",
        "caption: read by OCR",
    ]
