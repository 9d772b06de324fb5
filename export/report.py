"""The export's page: report.json for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rtx.export.fp16 import LARGEST
from rtx.export.mixed import in_words
from rtx.runtime.plots import Mark, Point, Span, svg_dots, svg_scatter
from rtx.runtime.report import (
    Cell,
    Column,
    Html,
    assign_colors,
    figure,
    figures,
    number,
    paragraph,
    render,
    section,
    table,
)

_MOST_SCALES, _MOST_RANGES = 32, 8
_MINUS = str.maketrans("-", "−")


def render_report(name: str, report: Mapping[str, Any]) -> str:
    """The page of a bundle.

    Args:
        name: of the bundle.
        report: the content of report.json, as `rtx.export.write` makes it.
    """
    verdicts: dict[str, Any] = report["verdicts"]
    colors = assign_colors(list(verdicts))
    ranked = {variant: found["ranking"] for variant, found in verdicts.items() if found["ranking"] is not None}
    parts = [_gate(report), _parity(verdicts)]
    if mixed := {variant: found for variant, found in verdicts.items() if found["mixed"] is not None}:
        parts.append(_mixed(mixed))
    if report["ranges"]:
        parts.append(_ranges(report["ranges"]))
    if report["scales"]:
        parts.append(_scales(report["scales"]))
    if ranked:
        parts += [_ranking(ranked, report["seconds"], colors), _worst(ranked)]
    provenance = report["provenance"]
    return render(
        name,
        *parts,
        lead=_lead(report),
        subline=f"Exported from {provenance['source']} on {provenance['created'][:10]}. "
        f"{report['golden_items']} golden items; every number is against PyTorch in fp32.",
        facts={
            "Checkpoint": f"{provenance['source']}, SHA-256 {provenance['source_sha256'][:16]}…",
            "Command": provenance["command"],
            **provenance["versions"],
        },
    )


def _lead(report: Mapping[str, Any]) -> str:
    written, failed = list(report["bytes"]), [n for n, v in report["verdicts"].items() if not v["passed"]]
    lead = f"{_join(written)} {'agrees' if len(written) == 1 else 'agree'} with PyTorch within the gate's limits."
    return lead + (f" Not in the bundle, since the gate refused it: {_join(failed)}." if failed else "")


def _gate(report: Mapping[str, Any]) -> Html:
    rows: list[list[str | Cell]] = []
    slowest = max(report["seconds"].values(), default=0.0)
    for variant, verdict in report["verdicts"].items():
        size, seconds = report["bytes"].get(variant), report["seconds"].get(variant)
        state = Cell("passed", tone="good") if verdict["passed"] else Cell("failed", tone="bad")
        if verdict["passed"] and size is None:
            state = Cell("passed", note="not asked for, not written")
        elif variant == report["default_variant"]:
            state = Cell("passed", note="default", tone="good")
        rows.append(
            [
                Cell(variant),
                state,
                "–" if size is None else f"{size / 1e6:,.1f}",
                "–" if seconds is None else f"{slowest / seconds:.2f}×",
                Cell("; ".join(verdict["failures"]) or "–"),
            ]
        )
    shown = table(
        [
            Column("variant", left=True),
            Column("gate", left=True),
            Column("size", note="MB"),
            Column("speed", note="to the slowest"),
            Column("why not", left=True),
        ],
        rows,
        label="Gate",
    )
    return section(
        "Gate", shown, note="What failed is not in the bundle. Speed is a rough order; rtx bench measures it."
    )


def _parity(verdicts: Mapping[str, Any]) -> Html:
    rows = [
        [
            variant,
            _decimals(found["parity"], "mean_cosine"),
            _decimals(found["parity"], "min_cosine"),
            _power(found["parity"], "max_abs"),
            _decimals(found["invariance"], "min_cosine"),
            _power(found["invariance"], "max_abs"),
        ]
        for variant, found in verdicts.items()
    ]
    shown = table(
        [
            Column("variant", left=True),
            Column("cosine", note="mean"),
            Column("cosine", note="least"),
            Column("difference", note="largest"),
            Column("cosine", note="other batches, least"),
            Column("difference", note="other batches, largest"),
        ],
        rows,
        label="Parity and invariance",
    )
    note = "Golden items against PyTorch; then each item in other batches and with more padding against itself alone."
    return section("Parity and invariance", shown, note=note)


def _mixed(verdicts: Mapping[str, Any]) -> Html:
    rows: list[list[str | Cell]] = []
    for variant, verdict in verdicts.items():
        found, without = verdict["mixed"], verdict["mixed"]["without"]
        rows.append(
            [
                Cell(variant, note=f"{len(found['kept'])} of {found['layers']} layers in {found['precision']}"),
                in_words(found["kept"]),
                _decimals(without["parity"], "min_cosine"),
                _decimals(verdict["parity"], "min_cosine"),
                _change(without["ranking"]),
                _change(verdict["ranking"]),
            ]
        )
    shown = table(
        [
            Column("variant", left=True),
            Column("kept", left=True),
            Column("cosine", note="least, all in int8"),
            Column("cosine", note="least, as it is"),
            Column("NDCG", note="change, all in int8"),
            Column("NDCG", note="change, as it is"),
        ],
        rows,
        label="Layers that are kept",
    )
    note = "With all layers in int8 the gate refused these; the layers that cost most stayed as they were."
    return section("Layers that are kept", shown, note=note)


def _ranges(ranges: Sequence[Mapping[str, Any]]) -> Html:
    rows: list[list[str | Cell]] = [
        [found["module"], *_share(found["largest"], LARGEST)] for found in ranges[:_MOST_RANGES]
    ]
    shown = table(
        [Column("module", left=True), Column("largest"), Column("share", note="of 65,504")],
        rows,
        label="Half precision",
    )
    note = "The largest magnitudes of what is computed in half precision, on golden items and some of your own."
    return section("Half precision", shown, note=note)


def _share(largest: float | None, end: float) -> tuple[str, str]:
    return ("not finite", "–") if largest is None else (f"{largest:,.4g}", f"{100 * largest / end:.2f} %")


def _scales(scales: Sequence[Mapping[str, Any]]) -> Html:
    rows: list[list[str | Cell]] = [
        [
            in_words(found["modules"]),
            found["calibrator"],
            f"{found['migration']:g}",
            f"{found['step']:.3g}",
            f"{100 * found['clipped']:.3f} %",
            f"{found['error']:.4f}",
        ]
        for found in scales[:_MOST_SCALES]
    ]
    shown = table(
        [
            Column("layers", left=True),
            Column("calibrator", left=True),
            Column("migration"),
            Column("step"),
            Column("clipped"),
            Column("error", note="of results, relative"),
        ],
        rows,
        label="Static scales",
    )
    note = "How int8-static rounds what layers read; what that and 8-bit weights change in 99 % of results at most."
    if len(scales) > _MOST_SCALES:
        note += f" The {_MOST_SCALES} of {len(scales)} that lose most; report.json has all."
    return section("Static scales", shown, note=note)


def _ranking(ranked: Mapping[str, Any], seconds: Mapping[str, float], colors: Mapping[str, int]) -> Html:
    first = next(iter(ranked.values()))
    k, queries = first["k"], first["queries"]
    rows = [["PyTorch", number(first["reference"], digits=4), "–", "–", "–", number(first["ties_reference"], digits=2)]]
    rows += [
        [
            variant,
            number(found["other"], digits=4),
            f"{found['difference']:+.4f}".translate(_MINUS),
            f"{found['interval'][0]:+.4f} … {found['interval'][1]:+.4f}".translate(_MINUS),
            f"{found['overlap']:.3f}",
            number(found["ties_other"], digits=2),
        ]
        for variant, found in ranked.items()
    ]
    shown = table(
        [
            Column("variant", left=True),
            Column(f"NDCG@{k}"),
            Column("change"),
            Column("95 % interval", note="bootstrap over queries"),
            Column("kept", note=f"of the top {k}"),
            Column("ties", note="a query"),
        ],
        rows,
        label="Ranking quality",
    )
    spans = [
        Span(
            variant,
            (
                Mark("lower end", found["interval"][0], "tick"),
                Mark("change", found["difference"]),
                Mark("upper end", found["interval"][1], "tick"),
            ),
            colors[variant],
            f"{found['difference']:+.4f}".translate(_MINUS),
        )
        for variant, found in ranked.items()
    ]
    plot = svg_dots(spans, title=f"Change of NDCG@{k} by variant", x_label=f"change of NDCG@{k}", reference=0.0)
    title = f"Change of NDCG@{k} against PyTorch"
    plots = [figure(plot, title=title, note="with its 95 % interval")]
    if len(known := [variant for variant in ranked if variant in seconds]) > 1:
        plots.append(_frontier(ranked, {variant: seconds[variant] for variant in known}, colors, k))
    drawn = figures(*plots)
    return section("Ranking quality", shown, drawn, note=f"{first['evalset']}, {queries:,} queries.")


def _frontier(ranked: Mapping[str, Any], seconds: Mapping[str, float], colors: Mapping[str, int], k: int) -> Html:
    """Quality against speed, of the variants in the bundle."""
    slowest = max(seconds.values())
    points = [Point(name, slowest / taken, ranked[name]["other"], colors[name]) for name, taken in seconds.items()]
    title = f"NDCG@{k} against speed"
    svg = svg_scatter(points, title=title, x_label="× the slowest", y_label=f"NDCG@{k}", y_max=1.0)
    return figure(svg, title=title, note="Up and right is better. Speed is a rough order; rtx bench measures it.")


def _worst(ranked: Mapping[str, Any]) -> Html:
    rows: list[str | list[str | Cell]] = []
    for variant, found in ranked.items():
        fallen = found["worst"][:5]
        if fallen:
            rows.append(variant)
            rows += [
                [Cell(item["text"][:100], note=item["query"]), f"{item['reference']:.3f}", f"{item['other']:.3f}"]
                for item in fallen
            ]
    if not rows:
        return section("Queries that lost most", paragraph("None lost anything."))
    columns = [Column("query", left=True), Column("PyTorch"), Column("variant")]
    return section("Queries that lost most", table(columns, rows, label="Queries that lost most"))


def _change(ranking: Mapping[str, Any] | None) -> str:
    return "–" if ranking is None else f"{ranking['difference']:+.4f}".translate(_MINUS)


def _decimals(found: Mapping[str, float | None] | None, name: str) -> str:
    return _formatted(found, name, ".6f")


def _power(found: Mapping[str, float | None] | None, name: str) -> str:
    return _formatted(found, name, ".1e")


def _formatted(found: Mapping[str, float | None] | None, name: str, form: str) -> str:
    """A dash for a variant that could not be run, NaN for a number that is not finite."""
    if found is None:
        return "–"
    value = found[name]
    return "NaN" if value is None else f"{value:{form}}".translate(_MINUS)


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
