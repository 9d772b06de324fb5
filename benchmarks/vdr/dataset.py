"""Which texts become queries, which pages make up a corpus, and what is hidden of them.

A query's words have to lead to one page. Within its scope (a document in training; all documents of its split where it
is evaluated) it is dropped if two pages ask for the same words, or if the running text of more than a few other pages
has them. Pages that list what other pages hold (contents, lists of figures, indexes) and empty ones are in no corpus.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.vdr.documents import Document
from benchmarks.vdr.masking import hidden_ranges, parts_without
from benchmarks.vdr.pages import OutlineEntry, PageText
from benchmarks.vdr.queries import (
    MAX_OTHER_PAGES,
    FoldedText,
    Query,
    SearchText,
    captions,
    folded,
    is_listing,
    titles,
    unique,
)

LISTING, EMPTY = "lists other pages", "empty"


@dataclass(frozen=True)
class Content:
    """A document that was read."""

    document: Document
    pages: tuple[PageText, ...]
    outline: tuple[OutlineEntry, ...]


@dataclass
class Selection:
    """What is taken of a document.

    Attributes:
        document: it.
        pages: its pages by number.
        left_out: numbers of the pages that are in no corpus, with the reason.
        found: all captions and titles; those without a reason in `drop` are queries.
        hidden: by page, the characters that the masked corpus does not show.
    """

    document: Document
    pages: dict[int, SearchText]
    left_out: dict[int, str]
    found: list[Query]
    hidden: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    @property
    def corpus(self) -> dict[int, SearchText]:
        return {number: page for number, page in self.pages.items() if number not in self.left_out}

    @property
    def queries(self) -> list[Query]:
        return [query for query in self.found if not query.drop]

    def page_id(self, number: int) -> str:
        return page_id(self.document.name, number)


def page_id(document: str, number: int) -> str:
    """Pages are counted from 1 where people see them."""
    return f"{document}/{number + 1:04d}"


def select(
    contents: Sequence[Content],
    *,
    one_scope: bool,
    held_out: Iterable[str] = (),
    failed: Mapping[str, str] | None = None,
) -> list[Selection]:
    """Choose queries and pages of the documents of one split.

    Args:
        contents: the documents.
        one_scope: whether the documents are searched together, as those of an evaluation set are.
        held_out: folded texts that no query may have.
        failed: by page id, why the queries of a page are dropped.
    """
    selections = [_find(content) for content in contents]
    for scope in [selections] if one_scope else [[selection] for selection in selections]:
        _drop(scope, frozenset(held_out), failed or {})
        texts = {folded(query.text) for selection in scope for query in selection.queries}
        for selection in scope:
            for number, page in selection.corpus.items():
                found = [query for query in selection.found if query.page == number]
                ranges = hidden_ranges(page, found, texts)
                if ranges:
                    selection.hidden[number] = ranges
    return selections


def _find(content: Content) -> Selection:
    pages = {number: SearchText(page) for number, page in enumerate(content.pages)}
    found = [query for number, page in enumerate(content.pages) for query in captions(number, page)]
    found += titles(content.outline, pages)
    by_page: dict[int, set[str]] = {}
    for query in found:
        by_page.setdefault(query.page, set()).add(folded(query.text))
    everything = set().union(*by_page.values())
    left_out = {}
    for number, page in pages.items():
        if not page.letters:
            left_out[number] = EMPTY
        elif is_listing(page, everything - by_page.get(number, set())):
            left_out[number] = LISTING
    return Selection(content.document, pages, left_out, found)


def _drop(scope: Sequence[Selection], held_out: frozenset[str], failed: Mapping[str, str]) -> None:
    """Give a reason to every query that has to go."""
    for selection in scope:
        selection.found = [_placed(query, selection, held_out, failed) for query in selection.found]
    # Pages of different documents have to differ for `unique`, and the queries of one page have to stay together.
    everything = [
        (selection, query, page_id(selection.document.name, query.page))
        for selection in scope
        for query in selection.found
    ]
    checked = unique([(query, place) for _, query, place in everything])
    for selection in scope:
        selection.found = []
    for (selection, _, _), query in zip(everything, checked, strict=True):
        selection.found.append(query if query.drop else _distinct(query, selection, scope))


def _placed(query: Query, selection: Selection, held_out: frozenset[str], failed: Mapping[str, str]) -> Query:
    if query.drop:
        return query
    if query.page in selection.left_out:
        return replace(query, drop=f"{query.kind}: on a page that is left out")
    if folded(query.text) in held_out:
        return replace(query, drop=f"{query.kind}: asked for in an evaluation set")
    if reason := failed.get(selection.page_id(query.page)):
        return replace(query, drop=f"{query.kind}: {reason}")
    return query


def _distinct(query: Query, own: Selection, scope: Sequence[Selection]) -> Query:
    wanted = folded(query.text)
    others = 0
    for selection in scope:
        for number, page in selection.corpus.items():
            if (selection is own and number == query.page) or wanted not in page.letters:
                continue
            others += page.has_outside_heads(wanted)
            if others > MAX_OTHER_PAGES:
                return replace(query, drop=f"{query.kind}: words of many pages")
    return query


def still_visible(selections: Sequence[Selection]) -> list[str]:
    """Page ids and queries that the masked text of a page of their scope still has; there should be none."""
    wanted = {folded(query.text): query.text for selection in selections for query in selection.queries}
    left = []
    for selection in selections:
        for number, page in selection.corpus.items():
            parts = [FoldedText(part) for part in parts_without(page.page, selection.hidden.get(number, []))]
            letters = " ".join(part.letters for part in parts)
            for key, query in wanted.items():
                if key in letters and any(True for part in parts for _ in part.find(key)):
                    left.append(f"{selection.page_id(number)}: {query}")
    return left


def counts(queries: Iterable[Query]) -> dict[str, int]:
    """How many by kind."""
    return dict(sorted(Counter(query.kind for query in queries).items()))


def reasons(queries: Iterable[Query]) -> dict[str, int]:
    """Why queries were dropped, and how many."""
    return dict(sorted(Counter(query.drop for query in queries if query.drop).items()))
