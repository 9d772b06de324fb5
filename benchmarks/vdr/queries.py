"""What a document asks of its own pages: captions and outline titles, each with the page where it stands.

A caption is found by its beginning ("Figure 3.2:") and ends where the geometry of the lines says so; an outline title
counts if it stands on the page it points to, as a heading. The query is the text without its number.
"""

from __future__ import annotations

import bisect
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from benchmarks.vdr.pages import Line, OutlineEntry, PageText

CAPTION, TABLE, TITLE = "caption", "table", "title"
KINDS = (CAPTION, TABLE, TITLE)

_MIN_WORDS = {CAPTION: 3, TABLE: 3, TITLE: 2}
_MAX_WORDS = 80
# A query that the text of more other pages holds word for word is no key to one page.
MAX_OTHER_PAGES = 3

_NUMBER = r"(?:[A-Z]\.?)?\d+(?:[.\-–]\d+)*|[A-Z]|[IVX]+"
_CAPTION_START = re.compile(
    rf"(Figure|Fig\.?|FIGURE|Table|TABLE)\s+({_NUMBER})(?:\s*(?:[:—–]|\.(?!\d))\s*(?=\S)|\s+(?=[A-Z][a-z]))"
)
_TITLE_NUMBER = re.compile(
    r"(?i:chapter|appendix|section|part)\s+(?:[A-Z]|[IVXLC]+|\d+(?:\.\d+)*)(?:\s*[.:—–-]\s*|\s+)"
    r"|(?:[A-Z]\.)?\d+(?:\.\d+)*[.:)]?\s+|[A-Z](?:\.\d+)+\.?\s+|[A-Z]\.\s+|[IVXLC]{2,5}\.?\s+"
)
_HEADING_NUMBER = re.compile(rf"(?:(?:{_TITLE_NUMBER.pattern})|[A-Z]\s)\W*")
# In heights of the line: the distance of two baselines inside a caption, and what a caption begins after.
_CAPTION_PITCH, _CAPTION_GAP = 1.5, 1.35
# In font sizes: words that are further apart are cells of a table, unless their line was stretched to end where the
# one above does.
_COLUMN_GAP, _FLUSH = 1.1, 0.25
# Baselines that are nearer belong to one row: what is raised or lowered in it.
_ROW = 0.8
_SAME_SIZE = 0.12
_WORD = re.compile(r"\w*[^\W\d]\w*")
_SOFT_HYPHEN = re.compile("[\x02\u00ad\ufffe]\\s*")
_LEADERS = re.compile(r"(?:\.\s?){4,}\s*[\divxlc]+$|(?:\. ){3,}\s*[\divxlc]*$", re.IGNORECASE)
_INDEX_ENTRY = re.compile(r"[^\W\d].*,\s(?:\d+(?:[–-]\d+)?,\s*)*\d+(?:[–-]\d+)?,?$")


@dataclass(frozen=True)
class Query:
    """A text and where it was written.

    Attributes:
        kind: one of KINDS.
        text: without its number.
        page: of the document, counted from 0.
        start, stop: its characters in the page's text.
        drop: why it makes no query; "" if it does.
    """

    kind: str
    text: str
    page: int
    start: int
    stop: int
    drop: str = ""


class FoldedText:
    """A text's letters and digits in one case, for finding words whatever their spacing, hyphens and line ends."""

    def __init__(self, text: str) -> None:
        self.text = text
        letters: list[str] = []
        places: list[int] = []
        for place, character in enumerate(text):
            for letter in _folded_character(character):
                letters.append(letter)
                places.append(place)
        self.letters = "".join(letters)
        self._places = array("l", places)

    def find(self, wanted: str) -> Iterator[tuple[int, int]]:
        """Ranges of characters with the words of `wanted`, a folded text; whole words only."""
        at = self.letters.find(wanted) if wanted else -1
        while at >= 0:
            start, stop = self._places[at], self._places[at + len(wanted) - 1] + 1
            if self._is_word_edge(start - 1) and self._is_word_edge(stop):
                yield start, stop
            at = self.letters.find(wanted, at + 1)

    def _is_word_edge(self, beside: int) -> bool:
        return not 0 <= beside < len(self.text) or not folded(self.text[beside])


class SearchText(FoldedText):
    """The text of a page, with its lines."""

    def __init__(self, page: PageText) -> None:
        super().__init__(page.text)
        self.page = page
        self._starts = [line.start for line in page.lines]

    def line_at(self, character: int) -> Line | None:
        """The line that holds a character."""
        place = bisect.bisect_right(self._starts, character) - 1
        line = self.page.lines[place] if place >= 0 else None
        return line if line is not None and character < line.stop else None

    @cached_property
    def heads(self) -> tuple[Line, ...]:
        """The running head and foot."""
        return running_heads(self.page)

    def has_outside_heads(self, wanted: str) -> bool:
        """Whether the page has the words of a folded text anywhere but in its running head and foot."""
        return any(self.line_at(start) not in self.heads for start, _ in self.find(wanted))


def folded(text: str) -> str:
    """Letters and digits alone, in one case: equal for two spellings of the same words."""
    normal = unicodedata.normalize("NFKC", text).casefold()
    return "".join(character for character in normal if character.isalnum())


_folded_character = lru_cache(maxsize=None)(folded)


def running_heads(page: PageText) -> tuple[Line, ...]:
    """The first and the last line of a page, if they stand apart from the rest."""
    lines = sorted(page.lines, key=lambda line: line.baseline)
    if len(lines) < 3:
        return ()
    heads = []
    first = [line for line in lines if line.baseline < lines[0].baseline + 0.5 * lines[0].size]
    rest = lines[len(first) :]
    if rest and first[0].baseline < 0.16 * page.height and _gap(first[-1], rest[0]) > _CAPTION_GAP:
        heads += first
    last = [line for line in lines if line.baseline > lines[-1].baseline - 0.5 * lines[-1].size]
    rest = lines[: -len(last)]
    if rest and last[0].baseline > 0.85 * page.height and _gap(rest[-1], last[0]) > _CAPTION_GAP:
        heads += last
    return tuple(heads)


def _gap(above: Line, below: Line) -> float:
    return (below.baseline - above.baseline) / max(above.size, below.size, 1.0)


def captions(number: int, page: PageText) -> Iterator[Query]:
    """The captions of figures and tables on a page."""
    for place, line in enumerate(page.lines):
        match = _CAPTION_START.match(line.text)
        if match is None or not _begins_block(page.lines, place):
            continue
        lines = list(_block(page.lines, place))
        start = _skip_folded(page.text, line.start, len(folded(match[0])))
        text = joined(page.text, [(max(each.start, start), each.stop) for each in lines])
        kind = TABLE if match[1].lower().startswith("table") else CAPTION
        yield _checked(Query(kind, text, number, start, lines[-1].stop))


def _begins_block(lines: Sequence[Line], place: int) -> bool:
    """Whether no line of running text leads to this one."""
    line = lines[place]
    above = [
        other
        for other in lines
        if other.baseline < line.baseline and other.left < line.right and line.left < other.right
    ]
    nearest = max(above, key=lambda other: other.baseline, default=None)
    if nearest is None or abs(nearest.size - line.size) > _SAME_SIZE * line.size:
        return True
    return _gap(nearest, line) > _CAPTION_GAP or nearest.left > line.left + line.size or line.left > nearest.left + 15


def _block(lines: Sequence[Line], place: int) -> Iterator[Line]:
    """The line and those that go on with it: next in the file, of its size, at one pitch, over the same width."""
    row, pitch, right = lines[place], None, lines[place].right
    yield row
    for line in lines[place + 1 :]:
        distance = line.baseline - row.baseline
        if abs(distance) < _ROW * row.size and line.left > right - row.size:
            right = max(right, line.right)
            yield line  # more of the same row: an index, or words after a wide gap
            continue
        is_next = _ROW * row.size < distance < _CAPTION_PITCH * row.size and (pitch is None or distance < 1.15 * pitch)
        is_alike = abs(line.size - row.size) <= _SAME_SIZE * row.size
        overlap = min(right, line.right) - max(row.left, line.left)
        is_prose = line.widest_gap < _COLUMN_GAP or abs(line.right - right) < _FLUSH * row.size
        if not (is_next and is_alike and is_prose and overlap > 0) or _CAPTION_START.match(line.text):
            return
        row, pitch, right = line, distance if pitch is None else pitch, line.right
        yield line


def titles(entries: Iterable[OutlineEntry], pages: Mapping[int, SearchText]) -> Iterator[Query]:
    """The outline titles that stand on their page as a heading; the others come with a reason."""
    for entry in entries:
        text = without_number(entry.title)
        page = pages.get(entry.page)
        found = None if page is None else heading(page, text)
        if found is None:
            yield Query(TITLE, text, entry.page, 0, 0, "title: not found as a heading of its page")
        else:
            yield _checked(Query(TITLE, text, entry.page, *found))


def without_number(title: str) -> str:
    """ "4.1 Wiring" -> "Wiring", "Chapter 2: Wiring" -> "Wiring"."""
    match = _TITLE_NUMBER.match(title)
    return title[match.end() :] if match else title


def heading(page: SearchText, text: str) -> tuple[int, int] | None:
    """The first place where `text`, but for a number, is a line or some lines by itself."""
    for start, stop in page.find(folded(text)):
        first, last = page.line_at(start), page.line_at(stop - 1)
        if first is None or last is None:
            continue
        before = page.page.text[first.start : start].strip()
        after = page.page.text[stop : last.stop]
        if not folded(after) and (not folded(before) or _HEADING_NUMBER.fullmatch(f"{before} ")):
            return start, stop
    return None


def _checked(query: Query) -> Query:
    words = len(_WORD.findall(query.text))
    if words < _MIN_WORDS[query.kind]:
        return replace(query, drop=f"{query.kind}: under {_MIN_WORDS[query.kind]} words")
    if words > _MAX_WORDS:
        return replace(query, drop=f"{query.kind}: over {_MAX_WORDS} words")
    if query.text.rstrip(").").endswith("continued"):
        return replace(query, drop=f"{query.kind}: continues another")
    letters = folded(query.text)
    if 2 * sum(letter.isalpha() for letter in letters) < len(letters) or "\ufffd" in query.text:
        return replace(query, drop=f"{query.kind}: mostly not letters")
    return query


def joined(text: str, ranges: Iterable[tuple[int, int]]) -> str:
    """Lines as one text; a hyphen that only the end of a line brought is taken out."""
    whole = " ".join(text[start:stop] for start, stop in ranges)
    return " ".join(_SOFT_HYPHEN.sub("", whole).split())


def _skip_folded(text: str, start: int, letters: int) -> int:
    """The first visible character after so many letters, and after the punctuation that follows them."""
    place = start
    while letters > 0:
        letters -= len(folded(text[place]))
        place += 1
    while place < len(text) and not folded(text[place]) and (text[place].isspace() or text[place] in ".:—–-"):
        place += 1
    return place


def is_listing(page: SearchText, elsewhere: Iterable[str]) -> bool:
    """Whether a page lists what other pages hold: contents, figures, an index.

    Args:
        page: the page.
        elsewhere: folded titles and captions of other pages.
    """
    lines = [line.text for line in page.page.lines]
    if sum(_LEADERS.search(line) is not None for line in lines) >= 3:
        return True
    entries = sum(_INDEX_ENTRY.search(line) is not None for line in lines)
    if len(lines) >= 10 and entries > 0.5 * len(lines):
        return True
    listed = {folded(without_number(line).rstrip("0123456789 ")) for line in lines}
    return len(listed.intersection(elsewhere)) >= 6


def unique(placed: Sequence[tuple[Query, str]]) -> list[Query]:
    """With a reason on all whose words are asked for on two pages, and on all but one of several on a page.

    Args:
        placed: queries, each with an id of its page.
    """
    pages: dict[str, set[str]] = {}
    for query, page in placed:
        pages.setdefault(folded(query.text), set()).add(page)
    seen: set[tuple[str, str]] = set()
    checked = []
    for query, page in placed:
        key = folded(query.text)
        if not query.drop and len(pages[key]) > 1:
            query = replace(query, drop=f"{query.kind}: the same words on two pages")
        elif not query.drop and (key, page) in seen:
            query = replace(query, drop=f"{query.kind}: the same words twice on a page")
        elif not query.drop:
            seen.add((key, page))
        checked.append(query)
    return checked
