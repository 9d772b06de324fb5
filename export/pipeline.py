"""Checkpoint to bundle: export, derive, judge, write.

    RetrievalModel -> plain graph -> variants -> gate -> bundle

Everything is made in a folder beside the target that becomes the bundle by one rename at the end. The manifest is its
last file, so that a folder left behind by a kill is no bundle.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnx_ir as ir

from rtx.export.fp16 import to_fp16
from rtx.export.fused import fuse
from rtx.export.gate import Limits, Verdict, judge, limits, surroundings
from rtx.export.golden import golden_items, make_golden
from rtx.export.graph import ExportError, export_graph, strip_notes
from rtx.export.int8 import quantize_int8
from rtx.export.interop import write_side_files
from rtx.export.report import render_report
from rtx.runtime.backends.onnx import OnnxEngine
from rtx.runtime.candidates import Candidates
from rtx.runtime.embedder import Embedder
from rtx.runtime.engine import Budget, Engine, run_items
from rtx.runtime.errors import GateError, UsageError
from rtx.runtime.evalset import EvalSet
from rtx.runtime.evaluation import Comparison, Evaluation, compare, evaluate_embedder, evaluate_reranker
from rtx.runtime.folder import replace_folder
from rtx.runtime.golden import Golden
from rtx.runtime.manifest import (
    FORMAT_VERSION,
    GOLDEN_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    FileEntry,
    Manifest,
    Provenance,
    Variant,
)
from rtx.runtime.reranker import Reranker
from rtx.runtime.text import TextPreprocessor
from rtx.trainer.model import RetrievalModel

VariantName = Literal["fp32", "fp16", "int8", "fused"]
VARIANTS: tuple[VariantName, ...] = get_args(VariantName)

_FILES: dict[VariantName, str] = {
    "fp32": "onnx/model.onnx",
    "fp16": "onnx/model_fp16.onnx",
    "int8": "onnx/model_int8.onnx",
    "fused": "onnx/model_fused.onnx",
}
_PACKAGES = ("torch", "transformers", "tokenizers", "onnx", "onnxscript", "onnxruntime", "numpy")
# Protobuf messages end at 2 GiB; from here on weights lie in a file of their own.
_EXTERNAL_FROM_BYTES = 1_900_000_000
_SPEED_ROUNDS = 5
_SPEED_ITEMS = 32
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
        evalset: where ranking quality is measured; None leaves that check out.
        candidates: for a reranker, the documents to order, by query id; None with an evaluation set is an error.
        max_ndcg_drop: NDCG@10 that a variant may lose against PyTorch.
        min_cosine: least cosine to PyTorch on the golden inputs that a variant other than fp32 may have; None for the
            precision's own limit.
        threads: of ONNX Runtime, for ranking and speed.
        overwrite: replace a bundle that is there.
        command: for the record.
    """

    variants: tuple[VariantName, ...] = ("fp32",)
    evalset: EvalSet | None = None
    candidates: Candidates | None = None
    max_ndcg_drop: float = 0.005
    min_cosine: float | None = None
    threads: int | None = None
    overwrite: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        if not self.variants:
            raise UsageError(f"variants: expected at least one of {', '.join(VARIANTS)}")
        if not 0 <= self.max_ndcg_drop <= 1:
            raise UsageError(f"max_ndcg_drop: expected 0 to 1, got {self.max_ndcg_drop}")


@dataclass(frozen=True)
class Outcome:
    """What an export came to.

    Attributes:
        manifest: of the bundle.
        verdicts: of all variants that were asked for, and of the plain graph.
        reference: PyTorch's own ranking; None without an evaluation set.
    """

    manifest: Manifest
    verdicts: dict[str, Verdict]
    reference: Evaluation | None


def export_bundle(source: str, target: Path, options: ExportOptions, *, notify: Notify = _say_nothing) -> Outcome:
    """Export a checkpoint.

    Args:
        source: folder or hub name of the checkpoint.
        target: the bundle's folder.
        options: what to export.
        notify: told what is going on, a sentence at a time.

    Raises:
        UsageError: something is in the way at the target, or the options do not fit the model.
        CheckpointError: the checkpoint cannot be opened.
        ExportError: the graph cannot be made.
        GateError: the plain graph or every variant failed the gate; nothing was written.
    """
    check_target(target, overwrite=options.overwrite)
    notify(f"loading {source}")
    model = RetrievalModel.load(source)
    if model.task == "rerank" and options.evalset is not None and options.candidates is None:
        raise UsageError("measuring a reranker needs candidates: the documents to order for each query")
    with replace_folder(target, marker=MANIFEST_FILE) as folder:
        gate = _Gate(model, options, notify)
        notify("exporting the graph")
        graph = export_graph(model)
        (folder / "onnx").mkdir()
        names: dict[VariantName, None] = dict.fromkeys(("fp32", *options.variants))
        for name in names:
            notify(f"{name}: deriving")
            _save(_derive(name, graph), folder / _FILES[name])
            gate.judge(name, folder / _FILES[name])
            if name == "fp32" and not gate.verdicts["fp32"].passed:
                raise GateError(_refusal({"fp32": gate.verdicts["fp32"]}))
        passed = [name for name in options.variants if gate.verdicts[name].passed]
        if not passed:
            raise GateError(_refusal({name: gate.verdicts[name] for name in options.variants}))
        for name in names:
            if name not in passed:
                _remove(folder / _FILES[name])
        notify("comparing speed")
        seconds = gate.measure_speed(passed)
        manifest = _write_rest(folder, target.name, source, model, options, gate, seconds)
    return Outcome(manifest, gate.verdicts, gate.reference)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raise UsageError if something is at the target that may not be replaced, before any work is done."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / MANIFEST_FILE).is_file():
        raise UsageError(f"{target}: is in the way and is no bundle; nothing was written")
    if not overwrite:
        raise UsageError(f"{target}: there is a bundle already; --overwrite replaces it")


class _Gate:
    """The checks with all they need, and what they found so far."""

    def __init__(self, model: RetrievalModel, options: ExportOptions, notify: Notify) -> None:
        self.options = options
        self.notify = notify
        self.preprocessor = TextPreprocessor(model.contract, model.preprocessor.tokenizer_json)
        self.verdicts: dict[str, Verdict] = {}
        self.limits: dict[str, Limits] = {}
        self.engines: dict[str, Engine] = {}
        self.reference: Evaluation | None = None
        notify("PyTorch: golden outputs")
        items, prompts = golden_items(model.task, options.evalset)
        self.golden: Golden = make_golden(self.preprocessor, model.engine(), items, prompts)
        if options.evalset is not None:
            notify(f"PyTorch: ranking {len(options.evalset.queries)} queries of {options.evalset.name}")
            self.reference = self._rank(model.engine())

    def judge(self, name: VariantName, file: Path) -> None:
        options = self.options
        output = self.preprocessor.contract.output
        engine = OnnxEngine(file, output=output, threads=options.threads, name=name)
        self.notify(f"{name}: parity and invariance")
        tokens = self.golden.tokens
        held_to = limits(_precision(name), self.preprocessor.contract.task, float(np.abs(self.golden.outputs).max()))
        if options.min_cosine is not None and _precision(name) != "fp32":
            parity = dataclasses.replace(held_to.parity, min_cosine=options.min_cosine)
            held_to = dataclasses.replace(held_to, parity=parity)
        alone = run_items(engine, self.preprocessor, tokens, Budget(max_batch_items=1))
        elsewhere = surroundings(engine, self.preprocessor, tokens)
        ranking: Comparison | None = None
        if self.reference is not None:
            assert options.evalset is not None
            self.notify(f"{name}: ranking {len(options.evalset.queries)} queries of {options.evalset.name}")
            ranking = compare(self.reference, self._rank(engine), options.evalset)
        self.limits[name] = held_to
        self.engines[name] = engine
        self.verdicts[name] = judge(
            name, held_to, alone, elsewhere, self.golden, ranking, max_ndcg_drop=options.max_ndcg_drop
        )

    def measure_speed(self, names: list[VariantName]) -> dict[VariantName, float]:
        """Median seconds of a pass over the golden items, the variants in turn in each round."""
        items = self.golden.tokens[:_SPEED_ITEMS]
        seconds: dict[VariantName, list[float]] = {name: [] for name in names}
        for _ in range(_SPEED_ROUNDS):
            for name in names:
                start = time.perf_counter()
                run_items(self.engines[name], self.preprocessor, items, Budget())
                seconds[name].append(time.perf_counter() - start)
        return {name: float(np.median(times)) for name, times in seconds.items()}

    def _rank(self, engine: Engine) -> Evaluation:
        options = self.options
        assert options.evalset is not None
        if self.preprocessor.contract.task == "embed":
            return evaluate_embedder(Embedder(self.preprocessor, engine), options.evalset)
        assert options.candidates is not None
        return evaluate_reranker(Reranker(self.preprocessor, engine), options.evalset, options.candidates)


def _derive(name: VariantName, plain: ir.Model) -> ir.Model:
    """A variant of the plain graph, which stays as it is."""
    if name == "fp16":
        if _bytes(plain) > _EXTERNAL_FROM_BYTES:
            raise ExportError("fp16: graphs of more than 2 GiB cannot be converted yet; leave --precision fp16 out")
        return to_fp16(plain)
    variant = plain.clone()
    if name == "int8":
        quantize_int8(variant)
    elif name == "fused":
        fuse(variant)
    return variant


def _precision(name: VariantName) -> Literal["fp32", "fp16", "int8"]:
    return "fp32" if name == "fused" else name


def _bytes(graph: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None)


def _save(graph: ir.Model, path: Path) -> None:
    strip_notes(graph)
    external = f"{path.name}.data" if _bytes(graph) > _EXTERNAL_FROM_BYTES else None
    ir.save(graph, path, external_data=external)


def _external(path: Path) -> list[Path]:
    beside = path.with_name(f"{path.name}.data")
    return [beside] if beside.exists() else []


def _remove(path: Path) -> None:
    for file in (path, *_external(path)):
        file.unlink()


def _write_rest(
    folder: Path,
    name: str,
    source: str,
    model: RetrievalModel,
    options: ExportOptions,
    gate: _Gate,
    seconds: dict[VariantName, float],
) -> Manifest:
    """Everything beside the graphs; the manifest last."""
    write_side_files(model, folder)
    (folder / TOKENIZER_FILE).write_text(gate.preprocessor.tokenizer_json, encoding="utf-8")
    (folder / GOLDEN_FILE).write_bytes(gate.golden.to_bytes())
    variants = {
        variant: Variant(
            file=_FILES[variant],
            precision=_precision(variant),
            tolerance=gate.limits[variant].parity,
            external=tuple(f"onnx/{path.name}" for path in _external(folder / _FILES[variant])),
        )
        for variant in seconds
    }
    provenance = Provenance(
        source=Path(source).name,
        source_sha256=hash_checkpoint(source),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=options.command,
        versions=_versions(),
    )
    report = {
        "provenance": dataclasses.asdict(provenance),
        "golden_items": len(gate.golden.items),
        "limits": {variant: dataclasses.asdict(found) for variant, found in gate.limits.items()},
        "verdicts": {variant: verdict.to_dict() for variant, verdict in gate.verdicts.items()},
        "reference": gate.reference.to_dict() if gate.reference is not None else None,
        "max_ndcg_drop": options.max_ndcg_drop,
        "seconds": seconds,
        "bytes": {variant: (folder / found.file).stat().st_size for variant, found in variants.items()},
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(render_report(name, report), encoding="utf-8")
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        contract=model.contract,
        variants=dict(variants),
        default_variant=choose_default(seconds),
        files={
            path.relative_to(folder).as_posix(): FileEntry(sha256=_sha256(path), bytes=path.stat().st_size)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
        provenance=provenance,
        rejected={
            variant: "; ".join(verdict.failures) for variant, verdict in gate.verdicts.items() if verdict.failures
        },
    )
    (folder / MANIFEST_FILE).write_bytes(manifest.to_bytes())
    return manifest


def choose_default(seconds: Mapping[VariantName, float]) -> VariantName:
    """The fastest variant, or one that is closer to PyTorch and hardly slower."""
    limit = min(seconds.values()) * (1 + _SPEED_NOISE)
    return next(variant for variant in ("fp32", "fused", "fp16", "int8") if seconds.get(variant, math.inf) <= limit)


def hash_checkpoint(source: str) -> str:
    """SHA-256 over the names and contents of a checkpoint folder's files; of the name, for one on the hub."""
    folder = Path(source)
    total = hashlib.sha256()
    if not folder.is_dir():
        return hashlib.sha256(source.encode()).hexdigest()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and "checkpoints" not in relative.parts:
            total.update(f"{relative.as_posix()}\0{_sha256(path)}\n".encode())
    return total.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    return {
        "rtx-retrieval": importlib.metadata.version("rtx-retrieval"),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in _PACKAGES},
    }


def _refusal(verdicts: dict[str, Verdict]) -> str:
    reasons = [f"  {name}: {failure}" for name, verdict in verdicts.items() for failure in verdict.failures]
    return "no variant passed the gate, nothing was written:\n" + "\n".join(reasons)
