"""The page: text is escaped, nothing is fetched, the markup is well-formed."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from rtx.runtime.plots import Bar, svg_bars
from rtx.runtime.report import (
    Cell,
    Column,
    Html,
    assign_colors,
    definitions,
    figure,
    figures,
    number,
    paragraph,
    render,
    section,
    table,
    text,
)


def _page() -> str:
    bars = svg_bars([Bar("fp32", (("run", 2.0),), 1)], title="Stages", x_label="ms")
    columns = [Column("", left=True), Column("a<b", color=1), Column("int8", color=2, note="per token")]
    rows: list[str | list[str | Cell]] = ["Speed", ["p50", "2.60", Cell("0.35", "0.13×", tone="bad")]]
    return render(
        "manuals & slides.rtx",
        section("Parity", table(columns, rows, caption="Golden set."), paragraph("as measured"), note="exact"),
        section("Plots", figures(figure(bars, title="Stages", note="ms"))),
        lead='int8 keeps "everything" <but> this',
        subline="2 threads",
        facts={"CPU": "x & y"},
    )


def test_a_page_is_well_formed_and_says_what_it_was_given() -> None:
    root = ElementTree.fromstring(_page())
    words = " ".join(root.itertext())
    assert root.tag == "html"
    assert root.attrib["lang"] == "en"
    assert [heading.text for heading in root.iter("h2")] == ["Parity", "Plots", "Conditions"]
    for said in ("manuals & slides.rtx", 'int8 keeps "everything" <but> this', "2 threads", "a<b", "0.13×", "x & y"):
        assert said in words


def test_a_page_fetches_nothing_and_runs_nothing() -> None:
    page = _page()
    tags = {element.tag for element in ElementTree.fromstring(page).iter()}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert not re.search(r"(?i)https?:|//[a-z]|url\(|@import|@font-face|\bsrc=|\bhref=", page)


def test_a_page_is_for_both_modes_for_print_and_for_phones() -> None:
    page = _page()
    assert "@media (prefers-color-scheme: dark)" in page
    assert "@media print" in page
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in page
    assert not re.search(r"\$\{?[a-z]", page)  # a placeholder that was not filled


def test_every_plot_has_a_role_a_title_and_its_numbers_in_words() -> None:
    plots = list(ElementTree.fromstring(_page()).iter("svg"))
    assert len(plots) == 1
    for plot in plots:
        assert plot.attrib["role"] == "img"
        assert [child.tag for child in plot][:2] == ["title", "desc"]
        assert plot[0].text == "Stages"
        assert plot[1].text == "ms. fp32: run 2.00"


def test_a_table_marks_headings_groups_and_tones() -> None:
    root = ElementTree.fromstring(
        table([Column("", left=True), "int8"], ["Speed", [Cell("p50", "ms"), Cell("3", tone="good")]], label="Numbers")
    )
    assert root.attrib["aria-label"] == "Numbers"
    assert [(cell.attrib["scope"], "".join(cell.itertext())) for cell in root.iter("th")] == [
        ("col", ""),
        ("col", "int8"),
        ("rowgroup", "Speed"),
        ("row", "p50ms"),
    ]
    assert [(cell.attrib["class"], cell.text) for cell in root.iter("td")] == [("good", "3")]


def test_a_row_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"row \['a'\] has 3 cells, expected 2"):
        table(["", "x"], [["a", "b", "c"]])


def test_text_is_escaped_once_and_markup_not_at_all() -> None:
    assert text('<a href="x">&') == "&lt;a href=&quot;x&quot;&gt;&amp;"
    assert text(Html("<b>&amp;</b>")) == "<b>&amp;</b>"
    assert text(text("<")) == "&lt;"
    # Characters that are allowed in no page: a NUL, an escape, an unpaired surrogate.
    assert text("a\0b\x1bc\ud800d\n") == "a\ufffdb\ufffdc\ufffdd\n"
    # Spaces of other languages and invisible joiners belong to the text.
    assert text("1\u00a0000 \u200d") == "1\u00a0000 \u200d"


def test_definitions_keep_their_order() -> None:
    assert definitions({"b": "1", "a": "<"}) == "<dl><dt>b</dt><dd>1</dd><dt>a</dt><dd>&lt;</dd></dl>"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0342, "0.0342"),
        (3.4251, "3.43"),
        (34.25, "34.2"),
        (342.5, "342"),
        (34251.0, "34,251"),
        (0.0, "0.00"),
        (-0.0, "0.00"),
        (-1.5, "−1.50"),
        (9.999, "10.0"),
        (0.09999, "0.100"),
        (None, "–"),
        (float("nan"), "–"),
        (float("inf"), "∞"),
        (float("-inf"), "−∞"),
    ],
)
def test_numbers_have_three_digits(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_numbers_with_a_sign_and_other_digits() -> None:
    assert number(0.00123, signed=True, digits=2) == "+0.0012"
    assert number(-0.00123, signed=True, digits=2) == "−0.0012"


def test_a_subject_keeps_its_color_and_pytorch_is_neutral() -> None:
    assert assign_colors(["PyTorch", "fp32", "int8"]) == {"PyTorch": 0, "fp32": 1, "int8": 2}
    assert assign_colors(["fp32", "int8"]) == {"fp32": 1, "int8": 2}
    assert assign_colors(["a", "b"], neutral="b") == {"a": 1, "b": 0}
    many = assign_colors([str(index) for index in range(9)])
    assert list(many.values()) == [1, 2, 3, 4, 5, 6, 7, 1, 2]
