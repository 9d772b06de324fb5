"""One self-contained page for what was measured: inline CSS and SVG, no script, nothing fetched.

The export gate and `rtx bench` both write theirs with it:

    page = render(
        "manuals.rtx",
        section("Parity", table(["variant", "min cosine"], [["int8", "0.9991"]], caption="Golden set, 32 texts.")),
        section("Quality", figures(figure(svg_dots(...), title="NDCG@10", note="difference to PyTorch"))),
        lead="int8 keeps the ranking of PyTorch at a quarter of the size.",
        facts={"CPU": "AMD EPYC", "threads": "2"},
    )

Every function is pure and returns Html. A plain str is text and is escaped wherever it is put; Html is markup and is
put as it is, so text from a data set cannot become markup by accident. The plots (`svg_scatter`, `svg_lines`,
`svg_bars`, `svg_dots`) are in `rtx.runtime.plots`. Colours are numbers: 0 is the neutral one of what all else is
compared with, 1 to 7 are accents; `assign_colors` gives every subject one that it keeps all over a page.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template
from typing import Literal

COLORS = 8

# Controls, surrogates and non-characters: no page may hold them, even escaped, and data sets do.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

Tone = Literal["", "good", "bad"]


class Html(str):
    """Markup whose text is escaped already."""

    __slots__ = ()


@dataclass(frozen=True)
class Cell:
    """A table's cell: a text, a smaller second line, and whether it is good or bad news."""

    text: str
    note: str = ""
    tone: Tone = ""


@dataclass(frozen=True)
class Column:
    """A table's column: numbers stand right, words left; `color` puts the subject's dot before the heading."""

    heading: str
    left: bool = False
    note: str = ""
    color: int | None = None


def render(
    title: str,
    *sections: Html,
    lead: str = "",
    subline: str = "",
    facts: Mapping[str, str] | None = None,
) -> str:
    """The page.

    Args:
        title: names what was measured.
        sections: from `section`, in the order of the page.
        lead: what a reader should take home, in one sentence or two.
        subline: how it was measured, in one line.
        facts: conditions (device, versions, ...) for the end of the page.
    """
    head = [Html(f'<p class="lead">{text(lead)}</p>')] if lead else []
    head += [Html(f'<p class="subline">{text(subline)}</p>')] if subline else []
    body = [*sections]
    if facts:
        body.append(section("Conditions", definitions(facts)))
    template = Template(resources.files("rtx.runtime").joinpath("report.html").read_text(encoding="utf-8"))
    return template.substitute(title=text(title), lead="\n".join(head), body="\n".join(body))


def section(heading: str, *parts: Html, note: str = "") -> Html:
    """A part of the page: a heading, a sentence of explanation, then whatever belongs under it."""
    explained = f'<p class="note">{text(note)}</p>' if note else ""
    return Html(f"<section><h2>{text(heading)}</h2>{explained}{''.join(parts)}</section>")


def paragraph(content: str) -> Html:
    return Html(f"<p>{text(content)}</p>")


def figures(*shown: Html) -> Html:
    """Figures side by side where there is room, below each other on a phone."""
    return Html(f'<div class="figures">{"".join(shown)}</div>')


def figure(svg: Html, *, title: str, note: str = "") -> Html:
    """A plot with its title and, smaller, its unit and how to read it."""
    explained = f"<span>{text(note)}</span>" if note else ""
    return Html(f"<figure><figcaption><strong>{text(title)}</strong>{explained}</figcaption>{svg}</figure>")


def table(
    columns: Sequence[str | Column],
    rows: Sequence[str | Sequence[str | Cell]],
    *,
    caption: str = "",
    label: str = "",
) -> Html:
    """A table; the first cell of a row is its heading.

    Args:
        columns: headings; a plain str is a column of numbers.
        rows: as many cells as there are columns, or a str: a heading over the rows that follow.
        caption: what the numbers are; shown above the table.
        label: names the table for who cannot see it, where there is no caption.

    Raises:
        ValueError: a row has another number of cells than there are columns.
    """
    heads = [column if isinstance(column, Column) else Column(column) for column in columns]
    lines = []
    for row in rows:
        if isinstance(row, str):
            lines.append(f'<tr><th class="group" scope="rowgroup" colspan="{len(heads)}">{text(row)}</th></tr>')
            continue
        if len(row) != len(heads):
            raise ValueError(f"row {row[:1]} has {len(row)} cells, expected {len(heads)}")
        cells = (_cell(cell, head, first=head is heads[0]) for cell, head in zip(row, heads, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    described = f"<caption>{text(caption)}</caption>" if caption else ""
    header = "".join(_heading(head) for head in heads)
    # A wide table scrolls by itself, and by keyboard, instead of widening the page.
    return Html(
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(caption or label or "Table")}">'
        f"<table>{described}<thead><tr>{header}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def definitions(facts: Mapping[str, str]) -> Html:
    """Names and what they stand for."""
    return Html(f"<dl>{''.join(f'<dt>{text(k)}</dt><dd>{text(v)}</dd>' for k, v in facts.items())}</dl>")


def text(content: str) -> Html:
    """Text made safe to stand in markup or in a quoted attribute; Html stays as it is."""
    if isinstance(content, Html):
        return content
    return Html(html.escape(_FORBIDDEN.sub("\ufffd", content)))


def number(value: float | None, *, digits: int = 3, signed: bool = False) -> str:
    """A number for people: so many significant digits, thousands apart, a true minus; "–" for None and NaN."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    rounded = float(f"{value:.{digits - 1}e}")  # 9.999 has one decimal less than 9.99
    decimals = max(0, digits - 1 - (math.floor(math.log10(abs(rounded))) if rounded else 0))
    return f"{value + 0.0:{'+' if signed else ''},.{decimals}f}".replace("-", "−")  # -0.0 + 0.0 is 0.0


def assign_colors(subjects: Sequence[str], *, neutral: str = "PyTorch") -> dict[str, int]:
    """A colour for each subject: 0 for the neutral one, accents for the others in their order."""
    accents = [name for name in subjects if name != neutral]
    colors = {name: 1 + index % (COLORS - 1) for index, name in enumerate(accents)}
    return {name: colors.get(name, 0) for name in subjects}


def _heading(column: Column) -> str:
    shown = text(column.heading)
    if column.color is not None:
        shown = Html(f'<span class="subject"><span class="dot b{column.color % COLORS}"></span>{shown}</span>')
    note = f"<small>{text(column.note)}</small>" if column.note else ""
    return f'<th{_class("left" if column.left else "")} scope="col">{shown}{note}</th>'


def _cell(cell: str | Cell, column: Column, *, first: bool) -> str:
    shown = cell if isinstance(cell, Cell) else Cell(cell)
    note = f"<small>{text(shown.note)}</small>" if shown.note else ""
    classes = _class(" ".join(filter(None, ("left" if column.left else "", shown.tone))))
    opening, closing = (f'<th scope="row"{classes}>', "</th>") if first else (f"<td{classes}>", "</td>")
    return f"{opening}{text(shown.text)}{note}{closing}"


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""
