"""What `rtx bench` shows of its result: one set of rows for the terminal and the page, plots, and a sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rtx.runtime.bench import PERCENTILES, BenchResult, SubjectResult
from rtx.runtime.engine import gpu_index
from rtx.runtime.plots import Bar, Mark, Point, Series, Span, svg_bars, svg_dots, svg_lines, svg_scatter
from rtx.runtime.report import (
    Cell,
    Column,
    Html,
    assign_colors,
    figure,
    figures,
    number,
    render,
    section,
    table,
)
from rtx.runtime.rounds import Stat

_MB = 1e6
_WORST_QUERIES = 5
_STAGE_LABELS = {"run": "run", "tokenize": "tokenise", "collate": "collate", "rest": "rest"}


@dataclass(frozen=True)
class Row:
    """A measure: its name, its unit or meaning, and a cell for each subject."""

    label: str
    unit: str
    cells: tuple[Cell, ...]


def result_rows(result: BenchResult) -> dict[str, list[Row]]:
    """Everything that was measured, by group."""
    subjects, items = result.subjects, _items(result)
    one = "each" if result.task == "embed" else "each pair"
    lengths = [Row(f"{n} tokens {one}", f"{items}/s", _stats(result, _at(n))) for n in result.workload.lengths]
    return {
        "Quality": list(_quality_rows(result)),
        f"Latency of {result.workload.call}": [
            Row(f"p{p}", "ms", _stats(result, f"latency_p{p}_ms")) for p in PERCENTILES
        ],
        "Throughput": [Row("Natural mix", f"{items}/s", _stats(result, "throughput_per_s")), *lengths],
        "Footprint": [
            Row("Cold start", "s, process start to first result", _stats(result, "cold_start_s")),
            Row("Peak memory", "MB", tuple(_megabytes(s.peak_rss_bytes) for s in subjects)),
            Row("Size on disk", "MB, weights and tokenizer", tuple(_megabytes(s.size_bytes) for s in subjects)),
        ],
    }


def where_of(result: BenchResult) -> str:
    """What ran it, in words."""
    gpu = gpu_index(result.device)
    if gpu is None:
        return f"{result.machine.cpu}, {result.threads} threads"
    name = result.machine.gpus[gpu] if gpu < len(result.machine.gpus) else result.device
    return f"{name}, beside {result.threads} threads of {result.machine.cpu}"


def headline(result: BenchResult) -> str:
    """What the bundle's default variant, or the last one measured, costs and gains."""
    chosen, baseline = _chosen(result), result.subjects[0]
    speed, latency = chosen.stats["throughput_per_s"], chosen.stats["latency_p50_ms"]
    verb = "embeds" if result.task == "embed" else "scores"
    does = "answers a single query" if result.task == "embed" else f"reranks {result.workload.call}"
    start = f"It starts in {number(chosen.stats['cold_start_s'].median, digits=2)} s"
    if chosen is baseline or speed.ratio is None:
        return (
            f"{chosen.name} {verb} {number(speed.median)} {_items(result)} a second and {does} in "
            f"{number(latency.median)} ms. {start}."
        )
    instead = number(baseline.stats["latency_p50_ms"].median)
    base_start = number(baseline.stats["cold_start_s"].median, digits=2)
    return (
        f"{chosen.name} {verb} {_ratio(speed.ratio)} as many {_items(result)} a second as {baseline.name} and {does} "
        f"in {number(latency.median)} ms instead of {instead}. {start} instead of {base_start}. "
        f"{_quality_sentence(result, chosen)}"
    )


def conditions(result: BenchResult) -> dict[str, str]:
    """What was measured on, and how, for people."""
    machine, workload = result.machine, result.workload
    memory = f"{number(machine.memory_bytes / 2**30)} GiB" if machine.memory_bytes else "unknown"
    return {
        "CPU": f"{machine.cpu}, {machine.cores} cores usable, {result.threads} threads a run",
        "Instruction sets": " ".join(machine.instruction_sets) or "none of those that matter here, or unknown",
        "Memory": memory,
        "Load before": number(machine.load, digits=2),
        "System": machine.system,
        "Versions": ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
        "Commit": machine.commit or "not from a repository",
        "Texts": f"{workload.source}; {number(workload.mix_tokens)} tokens on average in the mix",
        "A round": (
            f"{workload.calls} calls one by one, {workload.call}, {number(workload.call_tokens)} tokens an item on "
            f"average; {workload.items} {_items(result)} of the mix in one call; the same for every subject"
        ),
        "Rounds": f"{result.rounds}, interleaved, with rotating order; ratios are taken within a round",
    }


def bench_page(result: BenchResult) -> str:
    """The report as one self-contained page."""
    colors = assign_colors([s.name for s in result.subjects])
    # In pairs of equal height, as they stand side by side.
    plots = [_scatter(result, colors), _lengths(result, colors), _latency(result, colors), _stages(result, colors)]
    plots += [_cold_start(result, colors), _memory(result, colors), _differences(result, colors)]
    sections = [
        section("Speed and quality", figures(*(plot for plot in plots if plot is not None))),
        section("All numbers", _numbers(result, colors), note=_note(result)),
        *_worst(result),
    ]
    subline = f"{where_of(result)}, medians of {result.rounds} interleaved rounds."
    return render(
        f"{result.bundle}: benchmark", *sections, lead=headline(result), subline=subline, facts=conditions(result)
    )


def _quality_rows(result: BenchResult) -> Iterator[Row]:
    subjects = result.subjects
    first = subjects[0].quality
    if first is not None:
        size = f"{first.evalset}: {first.queries:,} queries, {first.documents:,} documents"
        yield Row("NDCG@10", size, tuple(_ndcg(s) for s in subjects))
        overlaps = [s.quality.comparison.overlap if s.quality and s.quality.comparison else None for s in subjects]
        yield Row(
            "Top-10 overlap",
            f"with {result.baseline}",
            tuple(Cell("–" if overlap is None else f"{100 * overlap:.1f} %") for overlap in overlaps),
        )
    name = "Cosine to the golden vectors" if result.task == "embed" else "Agreement with the golden scores"
    yield Row(
        name,
        "PyTorch in fp32 at export: least, mean",
        tuple(Cell(f"{s.deviation.min_cosine:.5f}", f"{s.deviation.mean_cosine:.5f}") for s in subjects),
    )


def _ndcg(subject: SubjectResult) -> Cell:
    if subject.quality is None:
        return Cell("–")
    value, comparison = f"{subject.quality.metrics['ndcg@10']:.4f}", subject.quality.comparison
    if comparison is None:
        return Cell(value)
    low, high = comparison.interval
    return Cell(value, f"{_signed(comparison.difference)} ({_signed(low)} to {_signed(high)})")


def _stats(result: BenchResult, name: str) -> tuple[Cell, ...]:
    return tuple(_stat_cell(subject.stats[name]) for subject in result.subjects)


def _stat_cell(stat: Stat) -> Cell:
    if stat.ratio is None or stat.ratio_low is None or stat.ratio_high is None:
        return Cell(number(stat.median), f"{number(stat.low)}–{number(stat.high)}")
    return Cell(number(stat.median), f"{_ratio(stat.ratio)} ({stat.ratio_low:.2f}–{stat.ratio_high:.2f})")


def _megabytes(size: int | None) -> Cell:
    return Cell(number(None if size is None else size / _MB))


def _quality_sentence(result: BenchResult, chosen: SubjectResult) -> str:
    if chosen.quality is None or chosen.quality.comparison is None:
        what = "vectors have a cosine of" if result.task == "embed" else "scores have an agreement of"
        return f"Its {what} {chosen.deviation.min_cosine:.4f} or more to those of PyTorch."
    comparison = chosen.quality.comparison
    low, high = comparison.interval
    size = round(abs(comparison.difference), 4)
    side = "below" if comparison.difference < 0 else "above"
    where = f"{size:.4f} {side} {result.baseline}" if size else f"that of {result.baseline}"
    return f"Its NDCG@10 is {comparison.other:.4f}, {where} (95 % interval {_signed(low)} to {_signed(high)})."


def _numbers(result: BenchResult, colors: dict[str, int]) -> Html:
    columns = [Column("", left=True), *(Column(s.name, color=colors[s.name]) for s in result.subjects)]
    rows: list[str | list[str | Cell]] = []
    for group, measures in result_rows(result).items():
        rows.append(group)
        rows += [[Cell(row.label, row.unit), *row.cells] for row in measures]
    return table(columns, rows, label="All numbers")


def _note(result: BenchResult) -> str:
    if len(result.subjects) == 1:
        return "Medians over rounds; the second line of a cell holds the quartiles."
    return (
        f"Medians over rounds. The second line of a cell is the ratio to {result.baseline} in the same round with its "
        f"quartiles; for {result.baseline} itself, the quartiles of the number."
    )


def _scatter(result: BenchResult, colors: dict[str, int]) -> Html:
    items, judged = _items(result), result.subjects[0].quality is not None
    y_label = "NDCG@10" if judged else ("mean cosine" if result.task == "embed" else "mean agreement")
    points = []
    for subject in result.subjects:
        speed = subject.stats["throughput_per_s"]
        quality = subject.quality.metrics["ndcg@10"] if subject.quality else subject.deviation.mean_cosine
        points.append(Point(subject.name, speed.median, quality, colors[subject.name], (speed.low, speed.high)))
    title = f"{y_label} over throughput"
    svg = svg_scatter(points, title=title, x_label=f"{items}/s", y_label=y_label, y_max=1.0)
    named = y_label[0].upper() + y_label[1:]
    reads = f"{named} over {items}/s of the natural mix. Up and right is better; whiskers are quartiles."
    return figure(svg, title="Quality against speed", note=reads)


def _latency(result: BenchResult, colors: dict[str, int]) -> Html:
    def span(subject: SubjectResult) -> Span:
        p50, p95, p99 = (subject.stats[f"latency_p{p}_ms"].median for p in PERCENTILES)
        marks = (Mark("p50", p50), Mark("p95", p95, "ring"), Mark("p99", p99, "tick"))
        return Span(subject.name, marks, colors[subject.name], f"{number(p50)} ms")

    title = f"Latency of {result.workload.call}"
    svg = svg_dots([span(s) for s in result.subjects], title=title, x_label="ms", from_zero=True)
    return figure(svg, title=title, note="Dot: p50. Ring: p95. Line: p99. Less is better.")


def _lengths(result: BenchResult, colors: dict[str, int]) -> Html | None:
    lengths, items = result.workload.lengths, _items(result)
    if len(lengths) < 2:
        return None
    series = [
        Series(s.name, tuple((float(n), s.stats[_at(n)].median) for n in lengths), colors[s.name])
        for s in result.subjects
    ]
    one = items.removesuffix("s")
    svg = svg_lines(series, title="Throughput by length", x_label=f"tokens a {one}", y_label=f"{items}/s")
    reads = f"{items.capitalize()} per second. Both axes are logarithmic: equal ratios are equal distances."
    return figure(svg, title="Throughput by length", note=reads)


def _stages(result: BenchResult, colors: dict[str, int]) -> Html:
    def bar(subject: SubjectResult) -> Bar:
        spent = {label: subject.stats[f"stage_{name}_ms"].median for name, label in _STAGE_LABELS.items()}
        total = sum(spent.values())
        shares = " · ".join(f"{label} {100 * ms / total:.1f} %" for label, ms in spent.items())
        # Medians of parts: the rest can come out below zero where it is next to nothing.
        parts = tuple((label, max(ms, 0.0)) for label, ms in spent.items())
        return Bar(subject.name, parts, colors[subject.name], f"{number(total)} ms", shares)

    one = _items(result).removesuffix("s")
    svg = svg_bars([bar(s) for s in result.subjects], title="Where the time goes", x_label=f"ms a {one}")
    reads = f"Milliseconds a {one} of the natural mix. Run is the engine with its copies in and out; less is better."
    return figure(svg, title="Where the time goes", note=reads)


def _cold_start(result: BenchResult, colors: dict[str, int]) -> Html:
    bars = _plain_bars(result, colors, lambda s: s.stats["cold_start_s"].median, "s")
    svg = svg_bars(bars, title="Cold start", x_label="seconds")
    reads = "Seconds from the start of a process to its first result, files in the page cache. Less is better."
    return figure(svg, title="Cold start", note=reads)


def _memory(result: BenchResult, colors: dict[str, int]) -> Html | None:
    if any(s.peak_rss_bytes is None for s in result.subjects):
        return None
    bars = _plain_bars(result, colors, lambda s: (s.peak_rss_bytes or 0) / _MB, "MB")
    svg = svg_bars(bars, title="Peak memory", x_label="MB")
    return figure(svg, title="Peak memory", note="MB resident in a process that runs the mix. Less is better.")


def _plain_bars(
    result: BenchResult, colors: dict[str, int], value: Callable[[SubjectResult], float], unit: str
) -> list[Bar]:
    return [Bar(s.name, (("", value(s)),), colors[s.name], f"{number(value(s))} {unit}") for s in result.subjects]


def _differences(result: BenchResult, colors: dict[str, int]) -> Html | None:
    spans = []
    for subject in result.subjects:
        if subject.quality is not None and subject.quality.comparison is not None:
            difference, (low, high) = subject.quality.comparison.difference, subject.quality.comparison.interval
            marks = (Mark("difference", difference), Mark("lower end", low, "tick"), Mark("upper end", high, "tick"))
            spans.append(Span(subject.name, marks, colors[subject.name], _signed(difference)))
    if not spans:
        return None
    title = f"NDCG@10 against {result.baseline}"
    svg = svg_dots(spans, title=title, x_label="difference of NDCG@10", reference=0.0, min_span=0.01)
    return figure(svg, title=title, note="Difference of the means, with its 95 % bootstrap interval over queries.")


def _worst(result: BenchResult) -> Iterator[Html]:
    for subject in result.subjects:
        comparison = subject.quality.comparison if subject.quality is not None else None
        if comparison is None or not comparison.worst:
            continue
        rows: list[list[str | Cell]] = [
            [Cell(change.text, change.query), f"{change.reference:.3f}", f"{change.other:.3f}"]
            for change in comparison.worst[:_WORST_QUERIES]
        ]
        columns: list[str | Column] = [Column("query", left=True), result.baseline, subject.name]
        fell = f"{comparison.fell:,} of {comparison.queries:,} queries fell, {comparison.improved:,} improved."
        shown = table(columns, rows, caption="NDCG@10 of the queries that fell most.")
        yield section(f"What {subject.name} ranks differently", shown, note=fell)


def _chosen(result: BenchResult) -> SubjectResult:
    by_name = {subject.name: subject for subject in result.subjects}
    return by_name.get(result.default_variant, result.subjects[-1])


def _items(result: BenchResult) -> str:
    if result.task == "rerank":
        return "pairs"
    return "items" if result.workload.images else "texts"


def _at(tokens: int) -> str:
    return f"throughput_per_s_at_{tokens}_tokens"


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}×"


def _signed(difference: float) -> str:
    """With its sign and 4 digits; what rounds to nothing has none."""
    rounded = round(difference, 4)
    return f"{rounded:+.4f}".replace("-", "−") if rounded else "0.0000"
