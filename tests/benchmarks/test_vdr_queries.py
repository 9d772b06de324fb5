from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from benchmarks.vdr.pages import OutlineEntry, Pdf
from benchmarks.vdr.queries import (
    CAPTION,
    TABLE,
    TITLE,
    FoldedText,
    Query,
    SearchText,
    captions,
    folded,
    is_listing,
    joined,
    running_heads,
    titles,
    unique,
    without_number,
)

Read = Callable[..., list[SearchText]]
PROSE = "This line of running text is as wide as the page lets it be"


@pytest.fixture
def read(make_pdf: Any) -> Read:
    """The pages of a PDF with these texts."""

    def read(*pages: Sequence[tuple[float, float, float, str]]) -> list[SearchText]:
        pdf = Pdf(make_pdf(pages))
        return [SearchText(pdf.text(number)) for number in range(len(pages))]

    return read


def found(page: SearchText) -> list[tuple[str, str, str]]:
    return [(query.kind, query.text, query.drop) for query in captions(0, page.page)]


def test_a_caption_ends_where_its_lines_do(read: Read) -> None:
    (page,) = read(
        [
            (50, 100, 10, "Figure 3.2: The voltage over time. It falls,"),
            (50, 112, 10, "as a capacitor’s does."),
            (50, 136, 10, PROSE),
            (50, 200, 10, "Figure 3.3: The current over time"),
            (50, 218, 10, PROSE),
            (50, 300, 10, "Table A.1. Names of the units in use"),
            (50, 312, 8, "volt ampere ohm farad"),
            (50, 400, 10, "Fig. 4: Signals that come"),
            (50, 414, 10, "Fig. 5: Signals that go"),
        ]
    )
    assert found(page) == [
        (CAPTION, "The voltage over time. It falls, as a capacitor’s does.", ""),
        (CAPTION, "The current over time", ""),
        (TABLE, "Names of the units in use", ""),
        (CAPTION, "Signals that come", ""),
        (CAPTION, "Signals that go", ""),
    ]
    first = next(captions(0, page.page))
    assert page.text[first.start : first.start + 11] == "The voltage"
    assert page.text[: first.stop].endswith("does.")


@pytest.mark.parametrize("raised", [96, 93])
def test_a_caption_goes_on_behind_an_index(read: Read, raised: float) -> None:
    (page,) = read(
        [
            (50, 100, 10, "Figure 1: Values of x"),
            (153, raised, 7, "2"),
            (160, 100, 10, "by age"),
            (50, 112, 10, "and sex"),
        ]
    )
    assert found(page) == [(CAPTION, "Values of x 2 by age and sex", "")]


def test_a_caption_ends_above_the_rows_of_its_table(read: Read) -> None:
    rows = [(50, 112, 10, "Algorithm"), (180, 112, 10, "Argument"), (50, 124, 10, "Nearest"), (180, 124, 10, "nn")]
    (page,) = read([(50, 100, 10, "Table 1: Methods for finding a tour"), *rows])
    assert found(page) == [(TABLE, "Methods for finding a tour", "")]
    # A line that was stretched to the margin has wide gaps too, but ends where the one above does.
    right = page.page.lines[0].right
    word = read([(50, 100, 10, "tours")])[0].page.lines[0]
    stretched = [
        (50, 112, 10, "for"),
        (right - (word.right - word.left) - 0.8, 112, 10, "tours"),
        (50, 124, 10, "of cities"),
    ]
    (page,) = read([(50, 100, 10, "Table 1: Methods for finding a tour"), *stretched])
    assert found(page) == [(TABLE, "Methods for finding a tour for tours of cities", "")]


def test_a_reference_in_running_text_is_no_caption(read: Read) -> None:
    (page,) = read(
        [
            (50, 100, 10, PROSE + " in"),
            (50, 112, 10, "Figure 3. The next sentence begins here and"),
            (50, 124, 10, "Table 4 shows what the reader can see by"),
            (50, 300, 10, "Figure 7 shows a signal that nobody asked for"),
        ]
    )
    assert found(page) == []


def test_a_caption_without_a_mark_behind_its_number(read: Read) -> None:
    (page,) = read([(50, 100, 10, "Table 4 Deaths from cholera in towns")])
    assert found(page) == [(TABLE, "Deaths from cholera in towns", "")]


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("Figure 1: Two words", "caption: under 3 words"),
        ("Table 1: x1 y2 z3 2000 3000", "table: mostly not letters"),
        ("Table 1: Prices of wheat (continued).", "table: continues another"),
    ],
)
def test_captions_that_make_no_query(read: Read, caption: str, reason: str) -> None:
    (page,) = read([(50, 100, 10, caption)])
    assert [drop for _, _, drop in found(page)] == [reason]


def test_a_long_caption_makes_no_query(read: Read) -> None:
    lines = [(20.0, 100 + 10 * n, 8.0, ("Figure 1: " if not n else "") + "word " * 16) for n in range(6)]
    (page,) = read(lines)
    assert [drop for _, _, drop in found(page)] == ["caption: over 80 words"]


@pytest.mark.parametrize(
    ("title", "text"),
    [
        ("4.1 Wiring", "Wiring"),
        ("4.1.2. Wiring", "Wiring"),
        ("A.1 Wiring", "Wiring"),
        ("Chapter 2: Wiring", "Wiring"),
        ("Appendix B Wiring", "Wiring"),
        ("Part II Wiring", "Wiring"),
        ("III Wiring", "Wiring"),
        ("C compilers", "C compilers"),
        ("2D plots", "2D plots"),
        ("Civil law", "Civil law"),
        ("Part of speech", "Part of speech"),
    ],
)
def test_numbers_of_titles(title: str, text: str) -> None:
    assert without_number(title) == text


def test_a_title_counts_where_it_is_a_heading(read: Read) -> None:
    pages = read(
        [(50, 100, 14, "2.1 Signals and"), (50, 116, 14, "noise"), (50, 150, 10, PROSE)],
        [
            (50, 100, 10, "We come to filters and gates soon, and"),
            (50, 112, 10, "to A/D conversion"),
            (50, 300, 10, "Filters and gates are many"),
        ],
        [(50, 100, 14, "B Filters and gates"), (50, 150, 10, PROSE)],
        [(50, 100, 14, "One"), (50, 120, 14, "Example 1"), (50, 150, 10, PROSE)],
    )
    entries = [
        OutlineEntry("2.1 Signals and noise", 0),
        OutlineEntry("Filters and gates", 1),
        OutlineEntry("Filters and gates", 2),
        OutlineEntry("One", 3),
        OutlineEntry("Example 1", 3),
        OutlineEntry("Elsewhere, not here", 3),
        OutlineEntry("Behind the end", 9),
    ]
    missing = "title: not found as a heading of its page"
    got = list(titles(entries, dict(enumerate(pages))))
    assert [(query.text, query.page, query.drop) for query in got] == [
        ("Signals and noise", 0, ""),
        ("Filters and gates", 1, missing),
        ("Filters and gates", 2, ""),
        ("One", 3, "title: under 2 words"),
        ("Example 1", 3, "title: under 2 words"),
        ("Elsewhere, not here", 3, missing),
        ("Behind the end", 9, missing),
    ]
    assert pages[0].text[got[0].start : got[0].stop].split() == ["Signals", "and", "noise"]


def test_words_are_found_whatever_their_spelling() -> None:
    text = FoldedText("THE VOLT-\r\nAGE of artists; the voltage. Ⅻ ﬁn")
    assert [text.text[start:stop] for start, stop in text.find(folded("the voltage"))] == [
        "THE VOLT-\r\nAGE",
        "the voltage",
    ]
    assert list(text.find(folded("art"))) == []
    assert list(text.find("")) == []
    assert [text.text[start:stop] for start, stop in text.find(folded("XII fin"))] == ["Ⅻ ﬁn"]


def test_lines_are_joined_without_their_hyphens() -> None:
    text = "A volt\x02\r\nage of low-\r\nfrequency sounds"
    assert joined(text, [(0, 7), (9, 20), (22, len(text))]) == "A voltage of low- frequency sounds"


def test_running_heads(read: Read) -> None:
    body = [(50.0, 100 + 12 * n, 10.0, PROSE) for n in range(29)]
    (page,) = read([(50, 40, 10, "Signals"), (300, 40, 10, "12"), *body, (200, 480, 10, "Page 12")])
    assert sorted(line.text for line in running_heads(page.page)) == ["Page 12", "Signals 12"]
    assert not page.has_outside_heads(folded("Signals"))
    assert page.has_outside_heads(folded("running text"))
    (page,) = read(body)
    assert running_heads(page.page) == ()


def test_pages_that_list_others(read: Read) -> None:
    names = ["Signals", "Noise", "Filters", "Gates", "Clocks", "Power"]
    contents, plain, index, prose = read(
        [(50, 100 + 12 * n, 10, f"{n} {name} . . . . . . {n + 3}") for n, name in enumerate(names[:3])],
        [(50, 100 + 12 * n, 10, f"{n} {name} {n + 3}") for n, name in enumerate(names)],
        [(50, 100 + 12 * n, 10, f"word{chr(97 + n)}, {n}, {n + 8}") for n in range(12)],
        [(50, 100 + 12 * n, 10, f"{PROSE} {n}") for n in range(12)],
    )
    listed = {folded(name) for name in names}
    assert is_listing(contents, ())
    assert is_listing(plain, listed)
    assert not is_listing(plain, listed - {"power"})
    assert is_listing(index, ())
    assert not is_listing(prose, listed)


def test_words_that_lead_to_two_pages() -> None:
    def query(text: str, drop: str = "") -> Query:
        return Query(TITLE, text, 0, 0, 1, drop)

    placed = [
        (query("Signals, noise"), "a/1"),
        (query("signals noise"), "a/2"),
        (query("Filters"), "a/1"),
        (query("filters!"), "a/1"),
        (query("Gates", "title: under 2 words"), "a/3"),
        (query("Clocks"), "a/4"),
    ]
    assert [query.drop for query in unique(placed)] == [
        "title: the same words on two pages",
        "title: the same words on two pages",
        "",
        "title: the same words twice on a page",
        "title: under 2 words",
        "",
    ]
