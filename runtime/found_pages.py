"""What a model found, to look at: some queries of an evaluation set, and with each the pages or texts that it ranked
first, the relevant ones marked.

Of images it holds small copies, however large the set; nothing is fetched and no script runs: what filters the queries
are radio buttons and the style sheet.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Literal, NamedTuple, get_args

from PIL import Image, features

from rtx.runtime.evalset import EvalSet
from rtx.runtime.evaluation import Evaluation
from rtx.runtime.images import BadImage, load_image
from rtx.runtime.items import Content
from rtx.runtime.metrics import bootstrap_interval
from rtx.runtime.report import Html, number, render, text

Outcome = Literal["missed", "late", "first"]
"""Where the best of a query's relevant documents stands: behind the first k, among them, at rank 1."""

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

# Of all pictures together, as they stand in the page.
_MAX_BYTES = 12 * 2**20
# A single picture is not larger, however few there are.
_MAX_PICTURE_BYTES = 48 * 2**10
# Longer side and quality, tried in turn until a picture is small enough.
_SIZES = ((360, 70), (360, 45), (280, 45), (200, 45), (140, 40), (96, 30))
_THREADS = 4
# Relevant documents behind the first k that are shown.
_MAX_BEHIND = 3
_WORDS = 45
_WORDS_BESIDE = 12
_CHARS = 320


def found_page(
    evalset: EvalSet,
    evaluation: Evaluation,
    *,
    model: str,
    queries: int = 50,
    facts: Mapping[str, str] | None = None,
    max_bytes: int = _MAX_BYTES,
) -> str:
    """The page, as HTML.

    Args:
        evalset: the set.
        evaluation: a model's rankings of it.
        model: what the page calls the model.
        queries: how many to show: a third each with their best relevant document missed, found late and found first,
            as far as there are so many, those with the smallest hashes; misses come first.
        facts: conditions, for the end of the page.
        max_bytes: of all pictures together. With more queries they are smaller, and missing at last.
    """
    ranked = list(_ranked(evalset, evaluation))
    chosen = [ranked[place] for place in choose(ranked, list(evalset.queries), queries)]
    pictures = _pictures(evalset, chosen, max_bytes)
    drawing = _Drawing(evalset, evaluation, pictures)
    cards = [drawing.card(query) for query in sorted(chosen, key=_worst_first)]
    low, high = bootstrap_interval(evaluation.ndcg)
    mean = evaluation.metrics[f"ndcg@{evaluation.k}"]
    others = [f"{name} {value:.3f}" for name, value in evaluation.metrics.items() if name != f"ndcg@{evaluation.k}"]
    page = render(
        f"{model} on {evaluation.evalset}: what it found",
        _filtered(ranked, chosen, cards, evaluation.k),
        lead=f"NDCG@{evaluation.k} {mean:.3f}, 95 % interval {low:.3f} to {high:.3f}.",
        subline=f"{evaluation.queries:,} queries, {evaluation.documents:,} documents. {', '.join(others)}.",
        facts=facts,
    )
    return page.replace("</style>", f"{_STYLE}</style>", 1)


class Ranked(NamedTuple):
    """A query and where its relevant documents stand.

    Attributes:
        place: of the query in the set.
        ndcg: of its ranking.
        outcome: of its best relevant document.
        best: that one's rank, from 1; None if it was not ranked at all.
        first: places in the corpus of the first k documents with their scores, best first.
        behind: relevant documents that are not among these, with their ranks; those of the highest grade first, then
            those of the best rank.
    """

    place: int
    ndcg: float
    outcome: Outcome
    best: int | None
    first: tuple[tuple[int, float], ...]
    behind: tuple[tuple[int, int | None], ...]


def _ranked(evalset: EvalSet, evaluation: Evaluation) -> Iterator[Ranked]:
    places = {document: place for place, document in enumerate(evalset.corpus)}
    k = evaluation.k
    rows = zip(evalset.queries, evaluation.indices.tolist(), evaluation.scores.tolist(), strict=True)
    for at, (query, indices, scores) in enumerate(rows):
        ranks = {place: rank for rank, place in enumerate(indices, start=1) if place >= 0}
        grades = {places[document]: grade for document, grade in evalset.qrels[query].items() if grade > 0}
        best = min((ranks[place] for place in grades if place in ranks), default=None)
        outcome: Outcome = "missed" if best is None or best > k else "first" if best == 1 else "late"
        behind = [place for place in grades if ranks.get(place, k + 1) > k]
        last = len(indices) + 1
        behind.sort(key=lambda place: (-grades[place], ranks.get(place, last), place))
        yield Ranked(
            at,
            float(evaluation.ndcg[at]),
            outcome,
            best,
            tuple((place, score) for place, score in zip(indices[:k], scores[:k], strict=True) if place >= 0),
            tuple((place, ranks.get(place)) for place in behind),
        )


def choose(ranked: Sequence[Ranked], names: Sequence[str], count: int) -> list[int]:
    """Positions of so many queries, of each outcome in turn: the same for the same set, and part of a larger choice."""
    by_hash = sorted(ranked, key=lambda query: hashlib.sha256(names[query.place].encode()).digest())
    groups = [[query.place for query in by_hash if query.outcome == outcome] for outcome in OUTCOMES]
    in_turn = [place for some in zip_longest(*groups) for place in some if place is not None]
    return in_turn[:count]


def _worst_first(query: Ranked) -> tuple[int, float, int]:
    return OUTCOMES.index(query.outcome), query.ndcg, query.place


# -- pictures --------------------------------------------------------------------------------------------------------


def _shown_documents(query: Ranked) -> Iterator[int]:
    yield from (place for place, _ in query.first)
    yield from (place for place, _ in query.behind[:_MAX_BEHIND])


def _first_image(item: str) -> str | None:
    return str(item.item.images[0]) if isinstance(item, Content) and item.item.images else None


def _pictures(evalset: EvalSet, chosen: Iterable[Ranked], max_bytes: int) -> dict[str, str | None]:
    """Data URLs by source of the image; None where it cannot be shown."""
    texts, queries = list(evalset.corpus.values()), list(evalset.queries.values())
    uses: Counter[str] = Counter()
    for query in chosen:
        shown = [queries[query.place], *(texts[place] for place in _shown_documents(query))]
        uses.update(source for item in shown if (source := _first_image(item)) is not None)
    most = min(_MAX_PICTURE_BYTES, max_bytes // max(1, uses.total()))
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(uses, pool.map(lambda source: picture(source, most), uses), strict=True))


def picture(source: str, max_bytes: int) -> str | None:
    """A small copy of an image as a data URL of at most so many bytes; None if it cannot be read or be so small."""
    try:
        image = load_image(source)
    except BadImage:
        return None
    kind, mime = ("WEBP", "image/webp") if features.check("webp") else ("JPEG", "image/jpeg")
    for side, quality in _SIZES:
        # Each from the last: the next are hardly ever needed.
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, kind, quality=quality)
        url = f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
        if len(url) <= max_bytes:
            return url
    return None


# -- markup ----------------------------------------------------------------------------------------------------------


_LABELS: dict[Outcome, str] = {"missed": "missed", "late": "found late", "first": "found first"}


def _filtered(ranked: Sequence[Ranked], chosen: Sequence[Ranked], cards: Sequence[Html], k: int) -> Html:
    """The queries, and what chooses among them."""
    all_of, shown = (Counter(query.outcome for query in some) for some in (ranked, chosen))
    meaning: dict[Outcome, str] = {
        "missed": f"no relevant document among the first {k}",
        "late": f"the best one at rank 2 to {k}",
        "first": "one at rank 1",
    }
    shares = "; ".join(
        f"{_LABELS[outcome]} ({meaning[outcome]}): {all_of[outcome]:,}, {all_of[outcome] / len(ranked):.0%}"
        for outcome in OUTCOMES
    )
    sampled = (
        f"Shown are {len(chosen):,} of {len(ranked):,} queries, drawn from each of these in turn: their shares here "
        "are not those of the set."
        if len(chosen) < len(ranked)
        else f"Shown are all {len(ranked):,} queries."
    )
    choices = [("all", f"all {len(chosen):,}")]
    choices += [(outcome, f"{_LABELS[outcome]} {shown[outcome]:,}") for outcome in OUTCOMES if shown[outcome]]
    buttons = "".join(
        f'<input type="radio" name="show" id="show-{key}"{" checked" if key == "all" else ""} />'
        f'<label for="show-{key}">{text(label)}</label>'
        for key, label in choices
    )
    return Html(
        f'<p class="note shares">Of all queries, {text(shares)}. {text(sampled)}</p>'
        f'<div class="queries" role="group" aria-label="Queries by what was found">{buttons}{"".join(cards)}</div>'
    )


class _Drawing:
    """Cards of queries.

    Args:
        evalset, evaluation: as for `found_page`.
        pictures: data URLs by source of the image.
    """

    def __init__(self, evalset: EvalSet, evaluation: Evaluation, pictures: Mapping[str, str | None]) -> None:
        self._set = evalset
        self._evaluation = evaluation
        self._pictures = pictures
        self._queries = list(evalset.queries.items())
        self._documents = list(evalset.corpus.items())

    def card(self, query: Ranked) -> Html:
        """A query with what it found."""
        name, item = self._queries[query.place]
        grades = self._set.qrels[name]
        found = [self._document(place, grades, rank, score) for rank, (place, score) in enumerate(query.first, start=1)]
        behind = [
            self._document(place, grades, rank, self._score(query.place, rank))
            for place, rank in query.behind[:_MAX_BEHIND]
        ]
        more = len(query.behind) - len(behind)
        kept = f" and {more:,} more" if more else ""
        rest = (
            f"<h3>Relevant, but behind the first {self._evaluation.k}{kept}</h3>{self._list(behind)}" if behind else ""
        )
        nothing = "" if found else "<p>Nothing was ranked.</p>"
        return Html(
            f'<section class="query {query.outcome}">{self._question(name, item)}'
            f'<p class="outcome"><span class="badge">{text(self._outcome(query))}</span>'
            f"NDCG@{self._evaluation.k} {query.ndcg:.3f}<span>{text(name)}</span></p>"
            f"{nothing}{self._list(found)}{rest}</section>"
        )

    def _outcome(self, query: Ranked) -> str:
        if query.best is None:
            return f"missed: not among the first {self._evaluation.indices.shape[1]:,}"
        return {"missed": f"missed: rank {query.best:,}", "late": f"found at rank {query.best:,}"}.get(
            query.outcome, "found first"
        )

    def _score(self, query: int, rank: int | None) -> float | None:
        return None if rank is None else float(self._evaluation.scores[query, rank - 1])

    def _question(self, name: str, item: str) -> str:
        words = _plain(item)
        shown = self._picture(item, f"query {name}")
        heading = f"<h2>{text(words or 'an image')}</h2>"
        return f'<div class="question">{shown}{heading}</div>' if shown else heading

    def _list(self, documents: Sequence[str]) -> str:
        if not documents:
            return ""
        kind = "pages" if any("<figure" in document for document in documents) else "texts"
        return f'<ol class="{kind}" tabindex="0" aria-label="Documents by rank">{"".join(documents)}</ol>'

    def _document(self, place: int, grades: Mapping[str, int], rank: int | None, score: float | None) -> str:
        name, item = self._documents[place]
        grade = grades.get(name, 0)
        mark = ""
        if grade > 0:
            graded = f" ({grade})" if max(grades.values()) > 1 else ""
            mark = f'<span class="mark"><span aria-hidden="true">✓ </span>relevant{graded}</span>'
        ranked = f"{rank:,}" if rank is not None else f"behind {self._evaluation.indices.shape[1]:,}"
        head = (
            f'<p class="rank"><strong>{ranked}</strong>{mark}'
            f'<span class="score">{"" if score is None else number(score)}</span></p>'
        )
        body = self._body(name, item)
        return f'<li class="{"relevant" if mark else "other"}">{head}{body}<p class="id">{text(name)}</p></li>'

    def _body(self, name: str, item: str) -> str:
        title = self._set.titles.get(name, "")
        if not isinstance(item, Content):
            words = _plain(item).removeprefix(_one_line(title)).strip() if title else _plain(item)
            heading = f"<strong>{text(_cut(title, _WORDS_BESIDE))}</strong> " if title else ""
            return f'<p class="words">{heading}{text(_cut(words, _WORDS))}</p>'
        images, words = item.item.images, _cut(_plain(item), _WORDS_BESIDE)
        several = f"1 of {len(images)} images. " if len(images) > 1 else ""
        beside = f"<figcaption>{text(several + words)}</figcaption>" if several or words else ""
        return f"<figure>{self._picture(item, name)}{beside}</figure>"

    def _picture(self, item: str, name: str) -> str:
        source = _first_image(item)
        if source is None:
            return ""
        url = self._pictures.get(source)
        if url is None:
            return '<span class="nothing">no picture</span>'
        return f'<img src="{url}" alt="{text(name)}" loading="lazy" />'


def _plain(item: str) -> str:
    return _one_line(item.item.text if isinstance(item, Content) else item)


def _one_line(content: str) -> str:
    return " ".join(content.split())


def _cut(content: str, words: int) -> str:
    """The first words."""
    first = " ".join(content.split(" ")[:words])
    if len(first) > _CHARS:
        first = first[:_CHARS].rpartition(" ")[0] or first[:_CHARS]
    return first if len(first) == len(content) else f"{first} …"


_STYLE = """
.shares { margin: 0 0 24px; max-width: none; }
.queries { margin-bottom: 60px; }
.queries > input { position: absolute; opacity: 0; width: 1px; height: 1px; }
.queries > label {
  display: inline-block; margin: 0 8px 12px 0; padding: 5px 14px; border: 1px solid var(--line); border-radius: 999px;
  cursor: pointer; font-variant-numeric: tabular-nums;
}
.queries > input:checked + label { border-color: var(--ink); font-weight: 600; }
.queries > input:focus-visible + label { outline: 2px solid var(--c1); outline-offset: 2px; }
#show-missed:checked ~ .query:not(.missed), #show-late:checked ~ .query:not(.late),
#show-first:checked ~ .query:not(.first) { display: none; }
.query { margin: 28px 0 0; padding: 26px 0 0; border-top: 1px solid var(--line); }
.query h2 { margin: 0 0 6px; overflow-wrap: anywhere; }
.query h3 { margin: 20px 0 10px; font-size: 0.9375rem; font-weight: 600; color: var(--soft); }
.question { display: flex; gap: 16px; align-items: start; margin-bottom: 10px; }
.question img { max-width: 120px; max-height: 160px; border: 1px solid var(--line); }
.outcome { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 0 0 16px; color: var(--soft); font-size: 0.9375rem;
  font-variant-numeric: tabular-nums; align-items: baseline; max-width: none; }
.outcome span { overflow-wrap: anywhere; }
.badge { font-weight: 600; color: var(--ink); }
.missed .badge { color: var(--bad); }
.first .badge { color: var(--good); }
.query ol { list-style: none; margin: 0; padding: 0; }
.query li p { margin: 0; max-width: none; }
.query li { min-width: 0; border: 1px solid var(--line); border-radius: 6px; padding: 8px 10px; }
.query li.relevant { border-color: var(--good); box-shadow: inset 0 0 0 1px var(--good); }
.rank { display: flex; flex-wrap: wrap; gap: 0 8px; align-items: baseline; line-height: 1.3; }
.rank { font-variant-numeric: tabular-nums; }
.rank .score { margin-left: auto; color: var(--soft); font-size: 0.875rem; }
.mark { color: var(--good); font-weight: 600; font-size: 0.875rem; white-space: nowrap; }
.id { color: var(--soft); font-size: 0.8125rem; line-height: 1.35; overflow-wrap: anywhere; }
ol.pages { display: grid; grid-template-columns: repeat(auto-fill, minmax(168px, 1fr)); gap: 14px; }
ol.pages li { display: flex; flex-direction: column; gap: 8px; }
ol.pages .id { margin-top: auto; }
ol.pages figure { max-width: none; }
ol.pages img, .nothing { display: block; width: 100%; height: 220px; object-fit: contain; background: var(--wash); }
.nothing { display: grid; place-items: center; color: var(--soft); font-size: 0.875rem; }
.query figcaption { margin: 6px 0 0; font-size: 0.8125rem; line-height: 1.4; overflow-wrap: anywhere; }
ol.texts li {
  display: grid; grid-template: auto 1fr / 9.5em minmax(0, 1fr); gap: 2px 20px; margin: 0 0 8px;
}
ol.texts .words { grid-row: 1 / span 2; grid-column: 2; line-height: 1.45; overflow-wrap: anywhere; }
ol.pages .words { font-size: 0.8125rem; line-height: 1.4; overflow-wrap: anywhere; }
@media screen and (max-width: 600px) {
  ol.pages {
    display: flex; overflow-x: auto; gap: 10px; margin: 0 -18px; padding: 2px 18px 10px;
    scroll-snap-type: x proximity; scroll-padding: 18px;
  }
  ol.pages li { flex: 0 0 172px; scroll-snap-align: start; }
  ol.pages img { height: 190px; }
  ol.texts li { grid-template: none / minmax(0, 1fr); }
  ol.texts .words {
    grid-row: auto; grid-column: 1; display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 5;
    line-clamp: 5; overflow: hidden;
  }
}
@media print {
  .queries > input, .queries > label { display: none; }
  .query h2, .query h3, .outcome { break-after: avoid; }
  ol.pages { grid-template-columns: repeat(5, 1fr); gap: 8px; }
  ol.pages img, .nothing { height: 130px; }
  .query li { break-inside: avoid; }
}
"""
