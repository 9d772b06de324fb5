"""`rtx eval`: the ranking quality of a bundle or a checkpoint on an evaluation set."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rtx.runtime.atomic import atomic_file, check_target
from rtx.runtime.candidates import Candidates, read_candidates, write_candidates
from rtx.runtime.cli import open_model
from rtx.runtime.commands.opening import device_option
from rtx.runtime.commands.progress import Progress
from rtx.runtime.embedder import Embedder
from rtx.runtime.errors import UsageError
from rtx.runtime.evalset import EvalSet, load_evalset
from rtx.runtime.evaluation import (
    Comparison,
    Evaluation,
    compare,
    evaluate_candidates,
    evaluate_embedder,
    evaluate_reranker,
    evaluate_weights,
)
from rtx.runtime.found_pages import found_page
from rtx.runtime.reranker import Reranker

_SHOWN_CHARS = 100
# What stands for the order of the candidates among the names of models.
_FIRST_STAGE = "first stage"


@dataclass(frozen=True, kw_only=True)
class _Arguments:
    model: str
    eval_dir: str
    variant: str | None
    split: str
    k: int
    depth: int
    candidates: str | None
    save_candidates: str | None
    first_stage_weight: tuple[float, ...]
    against: str | None
    against_variant: str | None
    keep_identical_ids: bool
    worst: int
    threads: int | None
    device: str
    json_file: str | None
    found: str | None
    found_queries: int


@click.command()
@click.argument("model", type=click.Path())
@click.argument("eval_dir", type=click.Path())
@click.option("--variant", help="A variant of the bundle.  [default: the bundle's]")
@click.option("--split", default="test", show_default=True, help="Which qrels of the evaluation set.")
@click.option("--k", type=click.IntRange(min=1), default=10, show_default=True, help="Cutoff of most metrics.")
@click.option("--depth", type=click.IntRange(min=1), default=100, show_default=True, help="Documents ranked a query.")
@click.option("--candidates", type=click.Path(), help="For a reranker: what it orders, as a TREC run file or jsonl.")
@click.option("--save-candidates", type=click.Path(), help="Write the ranking, for a reranker: .jsonl or a TREC run.")
@click.option(
    "--first-stage-weight",
    type=click.FloatRange(min=0),
    multiple=True,
    metavar="W",
    help="For a reranker: measure its logit plus W times the candidate's score too. May be repeated, to choose a W.",
)
@click.option("--against", type=click.Path(), help="A second bundle or checkpoint, to measure the difference from.")
@click.option("--against-variant", help="Its variant; alone, another variant of the same bundle.")
@click.option("--keep-identical-ids", is_flag=True, help="Rank a document though it has the id of the query.")
@click.option("--worst", type=click.IntRange(min=0), default=10, show_default=True, help="Queries to name.")
@click.option("--threads", type=click.IntRange(min=1), help="[default: all cores]")
@device_option
@click.option("--json", "json_file", type=click.Path(), help="Write all numbers to this file.")
@click.option("--found", type=click.Path(), metavar="FILE.html", help="Write a page to look at: what each query found.")
@click.option("--found-queries", type=click.IntRange(min=1), default=50, show_default=True, help="On that page.")
def evaluate(**arguments: Any) -> None:
    """Measure how well MODEL, a bundle or a checkpoint, ranks the evaluation set in EVAL_DIR (BEIR layout).

    An embedder ranks the whole corpus, a reranker the documents in --candidates. With --against, both models are
    measured, and the difference comes with its 95 % interval and the queries that lost most; without it, a reranker is
    compared with the order of its candidates.

    \b
    rtx eval manuals.rtx manuals/eval --save-candidates found.jsonl
    rtx eval judge.rtx manuals/eval --candidates found.jsonl
    rtx eval judge.rtx manuals/dev --candidates found-dev.jsonl --first-stage-weight 20 --first-stage-weight 60
    rtx eval manuals.rtx manuals/eval --variant int8 --against manuals/
    rtx eval pages.rtx scans/eval --found found.html
    """
    _run(_Arguments(**arguments))


def _run(given: _Arguments) -> None:
    _check(given)
    evalset = load_evalset(given.eval_dir, split=given.split)
    candidates = read_candidates(given.candidates, evalset) if given.candidates is not None else None
    names = _names(given)
    models: list[Embedder | Reranker] = []
    with ExitStack() as stack:
        # All are opened before the first is measured: a misspelt path shows at once, not after some minutes.
        for path, variant in names:
            models.append(open_model(path, variant=variant, threads=given.threads, device=given.device))
            stack.callback(models[-1].close)
        _check_candidates(models, given)
        weighted = _measure_weights(models[0], evalset, candidates, given)
        known = [weighted[models[0].contract.first_stage_weight]] if weighted else []
        evaluations = known + [_measure(model, evalset, candidates, given) for model in models[len(known) :]]
    if len(evaluations) == 1 and candidates is not None:
        ignored = not given.keep_identical_ids
        names.append((_FIRST_STAGE, None))
        evaluations.append(
            evaluate_candidates(evalset, candidates, k=given.k, depth=given.depth, ignore_identical_ids=ignored)
        )
    measured = evaluations[0]
    reports = [
        {"model": path, "variant": variant, **found.to_dict()}
        for (path, variant), found in zip(names, evaluations, strict=True)
    ]
    report: dict[str, Any] = reports[0]
    comparison = None
    if len(evaluations) > 1:
        comparison = compare(evaluations[1], measured, evalset, worst=given.worst)
        report |= {"against": reports[1], "comparison": comparison.to_dict()}
    if weighted:
        by_weight = {weight: compare(evaluations[1], found, evalset) for weight, found in weighted.items()}
        report["by_first_stage_weight"] = {f"{weight:g}": found.to_dict() for weight, found in by_weight.items()}
    if given.save_candidates is not None:
        write_candidates(measured.candidates(evalset, given.depth), given.save_candidates)
    if given.json_file is not None:
        with atomic_file(given.json_file) as stream:
            stream.write(json.dumps(report, indent=2, ensure_ascii=False).encode() + b"\n")
    if given.found is not None:
        _write_found(given.found, evalset, measured, given)
    labels = [path if variant is None else f"{path} ({variant})" for path, variant in names]
    _show(labels, evaluations, comparison)
    if weighted:
        _show_weights(by_weight)


def _check(given: _Arguments) -> None:
    """What can be said before anything is read."""
    if given.k > given.depth:
        raise UsageError(f"--k: expected at most --depth ({given.depth}), got {given.k}")
    files = (("--json", given.json_file), ("--save-candidates", given.save_candidates), ("--found", given.found))
    for option, path in files:
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise UsageError(f"{option}: the folder {Path(path).parent} does not exist")
        if path is not None:
            check_target(path, source=given.candidates)


def _names(given: _Arguments) -> list[tuple[str, str | None]]:
    """Paths and variants: of the model, and of what it is compared with, if anything."""
    names = [(given.model, given.variant)]
    if given.against is not None or given.against_variant is not None:
        names.append((given.against if given.against is not None else given.model, given.against_variant))
    return names


def _check_candidates(models: Sequence[Embedder | Reranker], given: _Arguments) -> None:
    has_reranker = any(isinstance(model, Reranker) for model in models)
    if has_reranker and given.candidates is None:
        raise UsageError("a reranker orders what a first stage found: pass --candidates FILE (from --save-candidates)")
    if given.first_stage_weight and (not isinstance(models[0], Reranker) or len(models) > 1):
        raise UsageError("--first-stage-weight: only for a reranker by itself, without --against")
    if not has_reranker and given.candidates is not None:
        raise UsageError("--candidates: only a reranker has them; an embedder ranks the whole corpus")


def _measure_weights(
    model: Embedder | Reranker, evalset: EvalSet, candidates: Candidates | None, given: _Arguments
) -> dict[float, Evaluation]:
    """The model with each weight that was asked for, and with its own; nothing if none was."""
    if not given.first_stage_weight:
        return {}
    assert isinstance(model, Reranker)
    assert candidates is not None
    weights = sorted({*given.first_stage_weight, model.contract.first_stage_weight})
    with _progress("pairs") as progress:
        return evaluate_weights(model, evalset, candidates, weights, **_options(given), progress=progress)


def _measure(
    model: Embedder | Reranker, evalset: EvalSet, candidates: Candidates | None, given: _Arguments
) -> Evaluation:
    with _progress("texts" if isinstance(model, Embedder) else "pairs") as progress:
        if isinstance(model, Embedder):
            return evaluate_embedder(model, evalset, **_options(given), progress=progress)
        assert candidates is not None
        return evaluate_reranker(model, evalset, candidates, **_options(given), progress=progress)


def _write_found(path: str, evalset: EvalSet, measured: Evaluation, given: _Arguments) -> None:
    name = given.model if given.variant is None else f"{given.model} ({given.variant})"
    facts = {
        "Model": name,
        "Evaluation set": f"{given.eval_dir}, qrels of {given.split}, SHA-256 {measured.sha256[:16]}…",
        "Ranked": f"the first {given.depth:,} documents of each query"
        + (f", from {given.candidates}" if given.candidates is not None else ""),
    }
    page = found_page(evalset, measured, model=name, queries=given.found_queries, facts=facts)
    with atomic_file(path) as stream:
        stream.write(page.encode())


def _options(given: _Arguments) -> Any:
    return {"k": given.k, "depth": given.depth, "ignore_identical_ids": not given.keep_identical_ids}


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    state = [0, 1]
    with Progress(what, lambda: state[0] / state[1]) as shown:

        def progress(done: int, total: int) -> None:
            added = done - state[0]
            state[:] = done, total
            shown.add(added)

        yield progress


def _show(labels: Sequence[str], evaluations: Sequence[Evaluation], comparison: Comparison | None) -> None:
    console = Console()
    first = evaluations[0]
    table = Table(title=escape(f"{first.evalset}: {first.queries:,} queries, {first.documents:,} documents"))
    table.add_column("metric")
    for label in labels:
        table.add_column(escape(label), justify="right", overflow="fold")
    for name in first.metrics:
        table.add_row(name, *(f"{found.metrics[name]:.4f}" for found in evaluations))
    table.add_row(f"ties@{first.k}", *(f"{found.ties:.2f}" for found in evaluations))
    if any(found.unranked for found in evaluations):
        table.add_row("queries without a ranking", *(f"{found.unranked:,}" for found in evaluations))
    console.print(table)
    if comparison is not None:
        _show_comparison(console, comparison)


def _show_weights(by_weight: Mapping[float, Comparison]) -> None:
    table = Table(title="by the weight of the first stage")
    k = next(iter(by_weight.values())).k
    for column in ("weight", f"ndcg@{k}", "to the first stage", "95% interval"):
        table.add_column(column, justify="right")
    for weight, found in by_weight.items():
        low, high = found.interval
        table.add_row(f"{weight:g}", f"{found.other:.4f}", f"{found.difference:+.4f}", f"{low:+.4f} to {high:+.4f}")
    Console().print(table)


def _show_comparison(console: Console, found: Comparison) -> None:
    low, high = found.interval
    console.print(
        f"ndcg@{found.k}: {found.difference:+.4f}, {found.confidence:.0%} interval {low:+.4f} to {high:+.4f}; "
        f"better on {found.improved:,} queries, worse on {found.fell:,} of {found.queries:,}; "
        f"top-{found.k} overlap {found.overlap:.3f}"
    )
    if not found.worst:
        return
    table = Table(title=f"queries whose ndcg@{found.k} fell most")
    for column in ("query", "text"):
        table.add_column(column, overflow="fold")
    for column in ("against", "model"):
        table.add_column(column, justify="right", no_wrap=True)
    for change in found.worst:
        text = change.text if len(change.text) <= _SHOWN_CHARS else f"{change.text[:_SHOWN_CHARS]}…"
        table.add_row(escape(change.query), escape(text), f"{change.reference:.3f}", f"{change.other:.3f}")
    console.print(table)
