"""The command `rtx export`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import click

from rtx.export.calibrators import CALIBRATORS, Calibrator
from rtx.export.engines import EngineOptions, describe_engine
from rtx.export.fp16 import LARGEST
from rtx.export.gate import MAX_NDCG_DROP, Verdict
from rtx.export.mixed import Mixed, fails_on_quality, in_words
from rtx.export.options import capabilities_option, lengths_option, triton_option
from rtx.export.pipeline import ExportOptions, Outcome, bundle_name, check_target, export_bundle
from rtx.export.ranges import overflowing
from rtx.export.scales import CalibrationOptions, Scale
from rtx.export.tensorrt import TARGETS
from rtx.export.triton import OPERATORS, check_repository, write_repository
from rtx.export.variants import ON_CPU, VARIANTS, VariantName, can_be_mixed, is_packed
from rtx.runtime.bundle import Bundle
from rtx.runtime.candidates import read_candidates
from rtx.runtime.contract import Task
from rtx.runtime.errors import UsageError
from rtx.runtime.evalset import load_evalset
from rtx.runtime.manifest import BUILDABLE, Target

_AUTO, _BEST = "auto", "best"


@click.command()
@click.argument("checkpoint")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the bundle to write.")
@click.option(
    "--precision",
    "variants",
    type=click.Choice([_AUTO, *VARIANTS]),
    multiple=True,
    default=("fp32",),
    show_default=True,
    help="Variant to export; may be given several times. auto: fp32 and int8, also packed, and --mixed; the fastest is "
    "opened.",
)
@click.option(
    "--mixed",
    is_flag=True,
    help="Where an int8 variant fails on quality, keep the layers that cost most in fp32 (int8-static: fp16).",
)
@click.option("--task", type=click.Choice(["embed", "rerank"]), help="Of a checkpoint that does not say it itself.")
@click.option("--dimensions", type=click.IntRange(min=1), help="Keep the first so many (Matryoshka).")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), help="Limit on length, special tokens included; default: the model's."
)
@click.option("--eval", "eval_dir", type=click.Path(path_type=Path), help="Evaluation set in the BEIR layout.")
@click.option("--split", default="test", show_default=True, help="Which qrels of the evaluation set.")
@click.option(
    "--candidates",
    type=click.Path(path_type=Path),
    help="For a reranker: the documents to order for each query (jsonl, or a TREC run).",
)
@click.option(
    "--max-ndcg-drop",
    type=click.FloatRange(0, 1),
    default=MAX_NDCG_DROP,
    show_default=True,
    help="NDCG@10 a variant may lose.",
)
@click.option(
    "--min-cosine",
    type=click.FloatRange(0, 1),
    help="Least cosine to PyTorch of what is not fp32; default: by precision.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="For int8-static and int4-half: training data, on whose queries and documents scales and factors of what "
    "layers read are found; default: those of --eval.",
)
@click.option(
    "--calibrator",
    type=click.Choice([_BEST, *CALIBRATORS]),
    default=_BEST,
    show_default=True,
    help="For int8-static: where what layers read is clipped; best: of each layer, what changes its results least.",
)
@click.option(
    "--migration",
    type=click.FloatRange(0, 1),
    help="For int8-static: how far large channels are moved into the weights (SmoothQuant), 0 for not; default: the "
    "best of each.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Threads of ONNX Runtime while measuring; default: all cores."
)
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    help=f"Also build engines of {', '.join(BUILDABLE)}: tensorrt-rtx ahead of time, without a GPU; tensorrt for "
    "the GPU of this machine.",
)
@capabilities_option
@lengths_option("those that fit the texts of --calibration or --eval best")
@triton_option
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there, and models in --triton-repo.")
def export(
    checkpoint: str,
    output: Path,
    variants: tuple[str, ...],
    task: Task | None,
    dimensions: int | None,
    max_tokens: int | None,
    eval_dir: Path | None,
    split: str,
    candidates: Path | None,
    max_ndcg_drop: float,
    min_cosine: float | None,
    mixed: bool,
    calibration: Path | None,
    calibrator: str,
    migration: float | None,
    threads: int | None,
    target: Target | None,
    capabilities: tuple[int, ...],
    lengths: tuple[int, ...],
    triton_repo: Path | None,
    overwrite: bool,
) -> None:
    """Turn a checkpoint into a bundle of ONNX graphs, through the gate.

    Every variant is compared with PyTorch before anything is written: on golden inputs, alone and in batches, and with
    --eval by NDCG@10. A variant that fails is left out; if none passes, nothing is written and the exit code is 3.
    """
    check_target(output, overwrite=overwrite)
    if triton_repo is not None:
        check_repository(triton_repo, bundle_name(output), overwrite=overwrite)
        if all(map(is_packed, _expanded(variants))):
            raise UsageError(f"--triton-repo: {OPERATORS}; export fp16 or fp32 too")
    if candidates is not None and eval_dir is None:
        raise UsageError("--candidates: needs --eval, the evaluation set that they belong to")
    if target is None and (capabilities or lengths):
        raise UsageError("--sm and --lengths: are of engines, which --target asks for")
    evalset = load_evalset(eval_dir, split=split) if eval_dir is not None else None
    options = ExportOptions(
        variants=_expanded(variants),
        task=task,
        dimensions=dimensions,
        max_tokens=max_tokens,
        evalset=evalset,
        candidates=read_candidates(candidates, evalset) if candidates is not None and evalset is not None else None,
        max_ndcg_drop=max_ndcg_drop,
        min_cosine=min_cosine,
        mixed=mixed or _AUTO in variants,
        calibration=calibration,
        scales=CalibrationOptions(
            calibrator=None if calibrator == _BEST else cast(Calibrator, calibrator), migration=migration
        ),
        engines=None if target is None else EngineOptions(target=target, capabilities=capabilities, lengths=lengths),
        threads=threads,
        overwrite=overwrite,
        command=shlex.join(["rtx", *_without_folders(sys.argv[1:])]),
    )
    outcome = export_bundle(checkpoint, output, options, notify=lambda message: click.echo(f"· {message}", err=True))
    _print(outcome, output, mixed=options.mixed)
    if triton_repo is not None:
        names = write_repository(Bundle.open(output), triton_repo, overwrite=overwrite)
        click.echo(f"wrote {triton_repo}: the models {', '.join(names)}")


def _expanded(names: Sequence[str]) -> tuple[VariantName, ...]:
    """The variants that are asked for, each once."""
    return tuple(dict.fromkeys(found for name in names for found in (ON_CPU if name == _AUTO else (_name(name),))))


def _name(name: str) -> VariantName:
    return cast(VariantName, name)


def _without_folders(arguments: Sequence[str]) -> list[str]:
    """What is recorded of a command in a bundle that others get: names, not where they lie on this machine."""
    recorded = []
    for argument in arguments:
        option, equals, value = argument.rpartition("=")
        recorded.append(option + equals + (Path(value).name if Path(value).is_absolute() else value))
    return recorded


def _print(outcome: Outcome, output: Path, *, mixed: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    # Narrow enough for a terminal of 80 columns.
    table = Table(
        title=f"{output.name} against PyTorch fp32",
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("variant", no_wrap=True)
    headings = ["least\ncosine", "max\nabs", "batch\nabs"]
    if outcome.reference is not None:
        headings += ["NDCG\n@10", "change", "95 %\ninterval", "top\n10"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("speed", justify="right", no_wrap=True)
    table.add_column("gate", no_wrap=True)
    if outcome.reference is not None:
        table.add_row("PyTorch", "", "", "", f"{outcome.reference.metrics['ndcg@10']:.4f}")
    for name, verdict in outcome.verdicts.items():
        cells = _cells(verdict)
        if (ranking := verdict.ranking) is not None:
            low, high = ranking.interval
            cells += [f"{ranking.other:.4f}", f"{ranking.difference:+.4f}", f"{_signed(low)} {_signed(high)}"]
            cells.append(f"{ranking.overlap:.3f}")
        elif outcome.reference is not None:
            cells += ["–"] * 4
        table.add_row(name, *cells, _speed(name, outcome), _gate(name, outcome))
    Console().print(table)
    for name, found in outcome.mixed.items():
        click.echo(f"{name}: {_mixed(found)}")
    if outcome.ranges and not overflowing(outcome.ranges):
        click.echo(f"half precision: numbers reach {outcome.ranges[0].largest:,.4g}, of {LARGEST:,.0f}")
    if outcome.scales:
        click.echo(f"int8-static: {_scales(outcome.scales)}")
    for name, verdict in outcome.verdicts.items():
        for failure in verdict.failures:
            click.echo(f"left out: {name} {failure}", err=True)
        if not mixed and can_be_mixed(name) and fails_on_quality(verdict):
            click.echo(f"{name}: --mixed keeps the layers that cost most as they were", err=True)
    for file, engine in outcome.manifest.engines.items():
        click.echo(f"{file}: {describe_engine(engine)}, {outcome.manifest.files[file].bytes / 1e6:,.1f} MB")
    click.echo(f"wrote {output}  (report: {output / 'report.html'})")


def _mixed(mixed: Mixed) -> str:
    """What stayed as it was, and what would have been without."""
    without = mixed.without
    quality = [] if without.parity is None else [f"least cosine {without.parity.min_cosine:.5f}"]
    quality += [] if without.ranking is None else [f"NDCG@{without.ranking.k} {without.ranking.difference:+.4f}"]
    layers = f"{len(mixed.kept)} of {mixed.layers} layers in {mixed.precision}"
    return f"{layers} (without: {', '.join(quality)}): {in_words(mixed.kept)}"


def _scales(scales: Sequence[Scale]) -> str:
    """How far results of layers are off; the report has each."""
    return f"results of layers are off by {scales[len(scales) // 2].error:.3f} (median), {scales[0].error:.3f} (most)"


def _speed(name: VariantName, outcome: Outcome) -> str:
    """To the slowest, by one short measurement."""
    seconds = outcome.seconds
    return f"{max(seconds.values()) / seconds[name]:.2f}×" if name in seconds else ""


def _gate(name: VariantName, outcome: Outcome) -> str:
    if not outcome.verdicts[name].passed:
        return "left out"
    if name not in outcome.manifest.variants:
        return "unasked"
    return "default" if name == outcome.manifest.default_variant else "passed"


def _signed(number: float) -> str:
    """As "+.0026": intervals have to be short."""
    return f"{number:+.4f}".replace("0.", ".", 1)


def _cells(verdict: Verdict) -> list[str]:
    if verdict.parity is None or verdict.invariance is None:
        return ["–"] * 3
    return [
        f"{verdict.parity.min_cosine:.5f}",
        f"{verdict.parity.max_abs:.0e}",
        f"{verdict.invariance.max_abs:.0e}",
    ]
