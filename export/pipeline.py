"""Checkpoint to bundle: export, derive, judge, write.

    RetrievalModel -> plain graph -> variants -> gate -> bundle

Everything is made in a folder beside the target that becomes the bundle by one rename at the end. The manifest is its
last file, so that a folder left behind by a kill is no bundle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import itertools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from rtx.export.calibration import calibrate
from rtx.export.derive import map_weights, remove_unused, write_variant
from rtx.export.emulation import emulated
from rtx.export.engines import EngineOptions, build_engines, engine_file
from rtx.export.gate import MAX_NDCG_DROP, Gate, Verdict
from rtx.export.graphs import Graphs, check_exportable, export_graphs
from rtx.export.int4_blocks import Factor
from rtx.export.mixed import Mixed, Mixer, fails_on_quality
from rtx.export.packed import export_packed
from rtx.export.ranges import Range, measure_ranges, overflowing
from rtx.export.scales import CalibrationOptions, Scale
from rtx.export.served import Served, check_file, lengths_of
from rtx.export.variants import (
    VARIANTS,
    Files,
    VariantName,
    can_be_mixed,
    can_overflow,
    files_of,
    has_half_precision,
    is_calibrated,
    is_packed,
    learns_from_items,
    precision_of,
    runs_on_cpu,
    variants_of,
)
from rtx.export.write import write_bundle
from rtx.kernels.library import NOT_BUILT, library_file
from rtx.runtime.backends.graphs import GraphEngine, open_graphs
from rtx.runtime.candidates import Candidates
from rtx.runtime.contract import Task
from rtx.runtime.engine import Budget, run_items
from rtx.runtime.errors import EngineError, ExportError, GateError, UsageError
from rtx.runtime.evalset import EvalSet
from rtx.runtime.evaluation import Evaluation
from rtx.runtime.folder import replace_folder
from rtx.runtime.manifest import MANIFEST_FILE, EngineEntry, Manifest
from rtx.runtime.text import Encoded
from rtx.trainer.model import RetrievalModel

_SPEED_ROUNDS = 5
_SPEED_ITEMS = 32
# Items of each kind that show how long they are; of pages fewer, as all of them are in memory together.
_LENGTHS, _LENGTHS_OF_PAGES = 4096, 256
# Queries, and documents, that show what layers read; and how large numbers get, beside the golden items.
_CALIBRATION_ITEMS, _RANGE_ITEMS = 128, 16
# Differences below this are noise on a shared machine.
_SPEED_NOISE = 0.05

Notify = Callable[[str], None]


def _say_nothing(message: str) -> None:
    """The default of `notify`."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export and what to hold it to.

    Attributes:
        variants: names, of VARIANTS.
        task: what a checkpoint is that does not say so itself; None to tell it by what is in it.
        dimensions: keep the first so many of an embedder's (Matryoshka); None for the checkpoint's own.
        max_tokens: limit on length, special tokens included; None for the checkpoint's own.
        evalset: where ranking quality is measured; None leaves that check out.
        candidates: for a reranker, the documents to order, by query id; None with an evaluation set is an error.
        max_ndcg_drop: NDCG@10 that a variant may lose against PyTorch.
        min_cosine: least cosine to PyTorch on the golden inputs that a variant other than fp32 may have; None for the
            precision's own limit.
        mixed: whether layers of an int8 variant may stay as they are where it fails on quality.
        calibration: training data whose queries and documents show what layers read, for int8-static and int4-half;
            None for those of the evaluation set.
        scales: how int8-static chooses its scales.
        engines: what to build of the variants that pass; None for no engines.
        threads: of ONNX Runtime, for ranking and speed.
        overwrite: replace a bundle that is there.
        command: for the record.

    Raises:
        UsageError: a value is out of range.
    """

    variants: tuple[VariantName, ...] = ("fp32",)
    task: Task | None = None
    dimensions: int | None = None
    max_tokens: int | None = None
    evalset: EvalSet | None = None
    candidates: Candidates | None = None
    max_ndcg_drop: float = MAX_NDCG_DROP
    min_cosine: float | None = None
    mixed: bool = False
    calibration: Path | None = None
    scales: CalibrationOptions = field(default_factory=CalibrationOptions)
    engines: EngineOptions | None = None
    threads: int | None = None
    overwrite: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown or not self.variants:
            given = ", ".join(unknown) or "none"
            raise UsageError(f"variants: expected at least one of {', '.join(VARIANTS)}, got {given}")
        if not 0 <= self.max_ndcg_drop <= 1:
            raise UsageError(f"max_ndcg_drop: expected 0 to 1, got {self.max_ndcg_drop}")
        if self.min_cosine is not None and not 0 <= self.min_cosine <= 1:
            raise UsageError(f"min_cosine: expected 0 to 1, got {self.min_cosine}")
        if calibrated := [name for name in self.variants if is_calibrated(name)]:
            if self.calibration is None and self.evalset is None:
                needs = "queries and documents to find its scales on: training data (--calibration), or --eval"
                raise UsageError(f"{calibrated[0]}: needs {needs}")
        elif self.scales != CalibrationOptions():
            names = ", ".join(self.variants)
            raise UsageError(f"calibrator, migration: none of {names} has scales of what layers read; int8-static has")
        elif self.calibration is not None and not any(map(learns_from_items, self.variants)):
            names = ", ".join(self.variants)
            raise UsageError(f"calibration: none of {names} learns from items; int8-static and int4-half do")


@dataclass(frozen=True)
class Outcome:
    """What an export came to.

    Attributes:
        manifest: of the bundle.
        verdicts: of all variants that were asked for, and of the plain graph.
        reference: PyTorch's own ranking; None without an evaluation set.
        seconds: of one pass over some golden items, for each variant in the bundle that runs on a CPU.
        mixed: how those came to pass that have layers which stayed as they were.
        scales: of what the layers of int8-static read, those that lose most first; empty without it.
        ranges: how large numbers get where there is half precision, the largest first; empty without any.
        factors: of what the layers of int4-half read, those that lose most first; empty without it, or without items.
    """

    manifest: Manifest
    verdicts: dict[VariantName, Verdict]
    reference: Evaluation | None
    seconds: dict[VariantName, float]
    mixed: dict[VariantName, Mixed] = field(default_factory=dict)
    scales: tuple[Scale, ...] = ()
    ranges: tuple[Range, ...] = ()
    factors: tuple[Factor, ...] = ()


def export_bundle(source: str, target: Path, options: ExportOptions, *, notify: Notify = _say_nothing) -> Outcome:
    """Export a checkpoint.

    The plain fp32 graph is made and judged whether asked for or not, since every variant is derived from it.

    Args:
        source: folder or hub name of the checkpoint.
        target: the bundle's folder.
        options: what to export.
        notify: told what is going on, a sentence at a time.

    Raises:
        UsageError: something is in the way at the target, or the options do not fit the model.
        CheckpointError: the checkpoint cannot be opened.
        ExportError: the graph, or an engine of it, cannot be made.
        EngineError: the plain graph cannot be run.
        GateError: the plain graph or every variant failed the gate; nothing was written.
    """
    check_target(target, overwrite=options.overwrite)
    if options.calibration is not None:
        check_file(options.calibration)
    notify(f"loading {source}")
    model = _load(source, options)
    served = _served(model, options)
    with replace_folder(target, marker=MANIFEST_FILE) as folder:
        notify("PyTorch: golden outputs" + (f" and ranking of {options.evalset.name}" if options.evalset else ""))
        gate = Gate(
            model,
            evalset=options.evalset,
            candidates=options.candidates,
            max_ndcg_drop=options.max_ndcg_drop,
            min_cosine=options.min_cosine,
        )
        made = _make_variants(model, gate, folder, options, served, notify)
        verdicts = made.verdicts
        passed = [name for name in options.variants if verdicts[name].passed]
        if not passed:
            raise GateError(_refusal([verdicts[name] for name in options.variants]))
        files = {name: files_of(name, images=model.contract.takes_images) for name in passed}
        remove_unused(folder, {file for pair in files.values() for file in pair if file is not None})
        notify("comparing speed")
        on_cpu = {name: pair for name, pair in files.items() if runs_on_cpu(name)}
        seconds = _measure_speed(gate, folder, on_cpu, options.threads)
        engines: dict[str, EngineEntry] = {}
        if options.engines is not None:
            count = _LENGTHS_OF_PAGES if model.contract.takes_images else _LENGTHS
            lengths = [] if served is None else lengths_of(served.encode(gate.preprocessor, count))
            (folder / "engines").mkdir()
            for entry, content in build_engines(
                folder, files.values(), model.contract, options.engines, lengths, notify=notify
            ):
                (folder / engine_file(entry)).write_bytes(content)
                engines[engine_file(entry)] = entry
        manifest = write_bundle(
            folder,
            model,
            gate,
            verdicts,
            variants=passed,
            name=bundle_name(target),
            source=source,
            command=options.command,
            seconds=seconds,
            mixed=made.mixed,
            scales=made.scales,
            ranges=made.ranges,
            factors=made.factors,
            engines=engines,
            default_variant=choose_default(seconds) if seconds else passed[0],
        )
    return Outcome(manifest, verdicts, gate.reference, seconds, *made[1:])


def bundle_name(target: Path) -> str:
    """What a bundle in this folder is called."""
    return target.name.removesuffix(".rtx")


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raise UsageError if something is at the target that may not be replaced, before any work is done."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / MANIFEST_FILE).is_file():
        raise UsageError(f"{target}: is in the way and is no bundle; nothing was written")
    if not overwrite:
        raise UsageError(f"{target}: there is a bundle already; --overwrite replaces it")


def choose_default(seconds: Mapping[VariantName, float]) -> VariantName:
    """The fastest variant, or one that is closer to PyTorch and hardly slower."""
    limit = min(seconds.values()) * (1 + _SPEED_NOISE)
    return next(name for name in VARIANTS if name in seconds and seconds[name] <= limit)


def _load(source: str, options: ExportOptions) -> RetrievalModel:
    if (Path(source) / MANIFEST_FILE).is_file():
        raise UsageError(f"{source}: is a bundle already; expected the checkpoint that it was made of")
    model = RetrievalModel.load(source, task=options.task)
    check_exportable(model)
    if model.task == "rerank" and options.dimensions is not None:
        raise UsageError(f"dimensions: {source} is a reranker, which gives scores and no vectors")
    if model.task == "rerank" and options.evalset is not None and options.candidates is None:
        raise UsageError("measuring a reranker needs candidates: the documents to order for each query")
    if model.task == "embed" and options.candidates is not None:
        raise UsageError(f"candidates: {source} is an embedder, which ranks the whole corpus")
    known = variants_of(images=model.contract.takes_images)
    if unknown := [name for name in options.variants if name not in known]:
        raise UsageError(f"variants: {source} takes no images, so that there is no {' and no '.join(unknown)}")
    settings = {"max_tokens": options.max_tokens, "truncate_dim": options.dimensions}
    model.configure(**{name: value for name, value in settings.items() if value is not None})
    if options.engines is not None:
        options.engines.check(options.variants, model.contract.max_tokens)
    return model


def _served(model: RetrievalModel, options: ExportOptions) -> Served | None:
    """What the model will be given; None where nothing tells."""
    if options.calibration is not None:
        return Served.of_file(options.calibration, model.contract)
    return None if options.evalset is None else Served.of_evalset(options.evalset, options.candidates)


class _Made(NamedTuple):
    verdicts: dict[VariantName, Verdict]
    mixed: dict[VariantName, Mixed]
    scales: tuple[Scale, ...]
    ranges: tuple[Range, ...]
    factors: tuple[Factor, ...]


def _make_variants(
    model: RetrievalModel, gate: Gate, folder: Path, options: ExportOptions, served: Served | None, notify: Notify
) -> _Made:
    """Write each variant into the bundle's folder and judge it as it lies there."""
    images = model.contract.takes_images
    notify("exporting the graphs" if images else "exporting the graph")
    plain = export_graphs(model)
    if any(map(is_packed, options.variants)):
        notify("exporting the packed graph")
        plain = plain._replace(packed=_packed(model))
    (folder / "onnx").mkdir()
    write_variant("fp32", plain, folder)
    # From here on the weights are those on disk, read as they are needed: a large model in PyTorch, its graph and
    # ONNX Runtime's copy would not fit into memory together.
    map_weights(plain, folder, files_of("fp32", images=images))
    release_weights(model)
    verdicts: dict[VariantName, Verdict] = {}
    mixed: dict[VariantName, Mixed] = {}
    mixer: Mixer | None = None
    notify("fp32: deriving and judging")
    verdicts["fp32"] = _judge(gate, plain, folder, options.threads, "fp32")
    if not verdicts["fp32"].passed:
        raise GateError(_refusal([verdicts["fp32"]]))
    files = [folder / file for file in files_of("fp32", images=images) if file is not None]
    ranges: tuple[Range, ...] = ()
    if any(map(can_overflow, options.variants)):
        notify("measuring how large numbers get, where half precision ends at 65,504")
        ranges = _measure_ranges(plain, files, gate, served, options)
    uncalibrated = ""
    if served is not None and any(map(learns_from_items, options.variants)):
        items = _calibration_items(served, gate)
        notify(f"calibrating on {len(items)} items")
        try:
            plain = calibrate(
                plain,
                files,
                gate.preprocessor,
                items,
                options.scales if any(map(is_calibrated, options.variants)) else None,
                factors="int4-half" in options.variants,
                threads=options.threads,
            )
        except (ExportError, EngineError) as broken:
            uncalibrated = str(broken)
    judge = functools.partial(_judge, gate, plain, folder, options.threads)
    for name in dict.fromkeys(options.variants):
        if name in verdicts:
            continue
        if learns_from_items(name) and uncalibrated:
            verdicts[name] = gate.refuse(name, precision_of(name, images=images), uncalibrated)
            continue
        notify(f"{name}: deriving and judging")
        verdicts[name] = judge(name)
        # Layers that are kept do not mend what half precision does not hold.
        if can_overflow(name) and (too_large := overflowing(ranges)):
            verdicts[name] = dataclasses.replace(verdicts[name], failures=(*verdicts[name].failures, too_large))
        elif options.mixed and _has_graph_of_its_own(name, options) and fails_on_quality(verdicts[name]):
            if mixer is None:
                mixer = Mixer(gate, plain, folder, threads=options.threads, judge=judge, notify=notify)
            verdicts[name], found = mixer.mix(name, verdicts[name])
            mixed |= {} if found is None else {name: found}
    scales = sorted((*plain.scales.values(), *plain.image_scales.values()), key=lambda scale: -scale.error)
    factors = sorted(plain.factors.values(), key=lambda factor: -factor.error)
    return _Made(verdicts, mixed, tuple(scales), ranges, tuple(factors))


def _calibration_items(served: Served, gate: Gate) -> list[Encoded]:
    found = served.encode(gate.preprocessor, _CALIBRATION_ITEMS if not served.pairs else 2 * _CALIBRATION_ITEMS)
    return [*itertools.chain.from_iterable(found), *served.scraps(gate.preprocessor)]


def _measure_ranges(
    plain: Graphs, files: Sequence[Path], gate: Gate, served: Served | None, options: ExportOptions
) -> tuple[Range, ...]:
    own = [] if served is None else served.encode(gate.preprocessor, _RANGE_ITEMS)
    items = [*gate.golden.tokens, *itertools.chain.from_iterable(own)]
    return measure_ranges(plain, files, gate.preprocessor, items, threads=options.threads)


def _has_graph_of_its_own(name: VariantName, options: ExportOptions) -> bool:
    """Whether layers of a variant can stay as they are, and those of no other variant with them."""
    file = files_of(name, images=False).tokens
    others = [other for other in options.variants if other != name and files_of(other, images=False).tokens == file]
    return can_be_mixed(name) and not others


def _judge(
    gate: Gate, plain: Graphs, folder: Path, threads: int | None, name: VariantName, keep: Collection[str] = ()
) -> Verdict:
    """Write a variant, with some modules left as they are, and judge it as it lies there."""
    images = plain.image is not None
    precision = precision_of(name, images=images)
    try:
        write_variant(name, plain, folder, keep)
        engine = _open(gate, folder, files_of(name, images=images), threads, name, rounding=True)
    except (ExportError, EngineError) as broken:
        return gate.refuse(name, precision, str(broken).removeprefix(f"{name}: "))
    with contextlib.closing(engine):
        if keep:
            # Of many that are tried, most are not close enough: those need no ranking of the evaluation set.
            found = gate.golden.run(engine, gate.preprocessor, Budget(max_batch_items=1))
            if not found.within(gate.limits(precision).parity):
                closeness = f"least cosine {found.min_cosine:.6f}, largest difference {found.max_abs:.2e}"
                return gate.refuse(name, precision, closeness)
        return gate.judge(name, precision, engine)


def _packed(model: RetrievalModel) -> ir.Model | ExportError:
    """The packed graph, or why there is none: the other variants do without."""
    if library_file() is None:
        return ExportError(f"packed: {NOT_BUILT}")
    try:
        return export_packed(model)
    except ExportError as refused:
        return refused


def release_weights(model: RetrievalModel) -> None:
    """Free the weights of the transformers; what else the model knows stays."""
    for transformer in (model.backbone, None if model.image_tower is None else model.image_tower.backbone):
        if transformer is not None:
            transformer.to("meta")
    # Graphs refer to themselves: without this, weights that were theirs stay until Python looks for such circles.
    gc.collect()


def _open(
    gate: Gate, folder: Path, files: Files, threads: int | None, name: VariantName, *, rounding: bool = False
) -> GraphEngine:
    """A variant as it lies there; `rounding` lets half precision round as on a GPU, which a CPU leaves out."""
    with contextlib.ExitStack() as stack:
        paths = [folder / file for file in files if file is not None]
        if rounding and has_half_precision(name):
            # What is opened is in memory, or mapped.
            paths = [stack.enter_context(emulated(path)) for path in paths]
        # No image is kept: each pass over the golden items should run all of it.
        return open_graphs(
            gate.preprocessor.contract,
            paths[0],
            paths[1] if len(paths) > 1 else None,
            threads=threads,
            name=name,
            cache_bytes=0,
            packed=is_packed(name),
        )


def _measure_speed(
    gate: Gate, folder: Path, files: Mapping[VariantName, Files], threads: int | None
) -> dict[VariantName, float]:
    """Median seconds of a pass over some golden items, the variants in turn in each round."""
    # Every so many, so that images are among them.
    items = gate.golden.tokens[:: max(1, len(gate.golden.tokens) // _SPEED_ITEMS)][:_SPEED_ITEMS]
    seconds: dict[VariantName, list[float]] = {name: [] for name in files}
    with contextlib.ExitStack() as stack:
        engines = {name: _open(gate, folder, pair, threads, name) for name, pair in files.items()}
        for engine in engines.values():
            stack.callback(engine.close)
        for _ in range(_SPEED_ROUNDS):
            for name, engine in engines.items():
                start = time.perf_counter()
                run_items(engine, gate.preprocessor, items, Budget())
                seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(times)) for name, times in seconds.items()}


def _refusal(verdicts: Sequence[Verdict]) -> str:
    reasons = [f"  {verdict.name}: {failure}" for verdict in verdicts for failure in verdict.failures]
    return "no variant passed the gate, nothing was written:\n" + "\n".join(reasons)
