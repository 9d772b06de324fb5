"""What was measured, as Markdown tables and as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.peers.catalogue import BASELINE, OURS
from benchmarks.peers.quality import Agreement, Quality
from benchmarks.peers.stage import Rounds


@dataclass(frozen=True)
class Figure:
    """A number of a peer over the rounds.

    Attributes:
        median, low, high: over rounds; low and high are the least and the largest.
        ratio, ratio_low, ratio_high: the same of the ratio to the baseline in the same round; None where there is none.
        rounds: as measured.
    """

    median: float
    low: float
    high: float
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    rounds: tuple[float, ...]


@dataclass(frozen=True)
class Result:
    """What came of a model.

    Attributes:
        name: of the model.
        figures: by title of the measurement, by peer, by name of the number.
        quality: by peer.
        batch_sizes: by peer, that it was run with.
        tuned: by peer, items a second at each batch size that was tried.
        counts: by title of the measurement, how many items it has.
        versions: by peer, of the packages that it runs on.
        failed: by peer, why it is not measured, or not all of it.
        ours: the peer that is set beside every other one.
    """

    name: str
    figures: dict[str, dict[str, dict[str, Figure]]]
    quality: dict[str, Quality | Agreement]
    batch_sizes: dict[str, int]
    tuned: dict[str, dict[int, float]]
    counts: dict[str, int]
    versions: dict[str, dict[str, str]]
    failed: dict[str, str]
    ours: str = OURS


def figures(rounds: Rounds) -> dict[str, dict[str, Figure]]:
    """Values by round to medians with their spread, and ratios to the baseline; a peer without any is left out."""
    return {
        name: {
            key: figure(values, rounds.get(BASELINE, {}).get(key, ()) if name != BASELINE else ())
            for key, values in numbers.items()
        }
        for name, numbers in rounds.items()
        if numbers
    }


def figure(values: Sequence[float], baseline: Sequence[float]) -> Figure:
    """One number, with its ratio to the baseline in the rounds that both have."""
    ratios = [value / base for value, base in zip(values, baseline, strict=False) if base]
    return Figure(
        median(values),
        min(values),
        max(values),
        ratio=median(ratios) if ratios else None,
        ratio_low=min(ratios, default=None),
        ratio_high=max(ratios, default=None),
        rounds=tuple(values),
    )


def tables(result: Result) -> Iterator[str]:
    """Markdown: a table a measurement, one of quality, and a sentence for each peer that is missing."""
    for title, rows in result.figures.items():
        count = result.counts.get(title)
        yield f"\n### {result.name}: {title}" + (f", {count} a round" if count else "") + "\n"
        yield from _measured(rows, result.batch_sizes, result.ours)
    if result.quality:
        yield f"\n### {result.name}: against {BASELINE}\n"
        yield from _qualities(result.quality)
    if result.failed:
        yield ""
        for name, reason in result.failed.items():
            yield f"- {result.name}, {name}: not measured, or not all of it: {reason.removeprefix(f'{name}: ')}"


def plain(result: Result) -> dict[str, Any]:
    """For JSON."""
    return dataclasses.asdict(result)


_HEADINGS = {
    "per_s": "a second",
    "p50_ms": "p50, ms",
    "p95_ms": "p95, ms",
    "cold_start_s": "start to first result, s",
    "peak_rss_mb": "peak memory, MB",
}


def _measured(rows: Mapping[str, Mapping[str, Figure]], batch_sizes: Mapping[str, int], ours: str) -> Iterator[str]:
    keys = list(dict.fromkeys(key for numbers in rows.values() for key in numbers))
    head = ["", "batch"]
    for key in keys:
        head += [_HEADINGS[key], "ratio (least–most)"]
    head.append(f"{ours} / this")
    yield from _table(
        head,
        (
            [
                name,
                str(batch_sizes[name]),
                *(cell for key in keys for cell in _cells(numbers.get(key))),
                _beside(rows, ours, name, keys[0]),
            ]
            for name, numbers in rows.items()
        ),
    )


def _beside(rows: Mapping[str, Mapping[str, Figure]], ours: str, name: str, key: str) -> str:
    """A number of ours beside a peer's, in the same rounds."""
    own, other = rows.get(ours, {}).get(key), rows[name].get(key)
    if own is None or other is None or name == ours:
        return ""
    return _spread(figure(own.rounds, other.rounds))


def _cells(found: Figure | None) -> tuple[str, str]:
    if found is None:
        return "", ""
    return f"{found.median:.3g}", "1" if found.ratio is None else _spread(found)


def _spread(found: Figure) -> str:
    return "" if found.ratio is None else f"{found.ratio:.2f} ({found.ratio_low:.2f}–{found.ratio_high:.2f})"


def _qualities(quality: Mapping[str, Quality | Agreement]) -> Iterator[str]:
    rows = {
        name: {key: value for key, value in dataclasses.asdict(found).items() if value is not None}
        for name, found in quality.items()
    }
    head = [key.replace("_", " ") for key in next(iter(rows.values()))]
    yield from _table(["", *head], ([name, *(f"{value:.4f}" for value in row.values())] for name, row in rows.items()))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    yield from (f"| {' | '.join(row)} |" for row in rows)
