"""What lies in a bundle beside the graphs: tokenizer, golden set, files for other tools, reports, manifest."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from rtx.export.gate import Gate, Verdict
from rtx.export.int4_blocks import Factor
from rtx.export.interop import write_side_files
from rtx.export.mixed import Mixed
from rtx.export.ranges import Range
from rtx.export.report import render_report
from rtx.export.scales import Scale
from rtx.export.variants import VariantName, external_files, files_of, is_packed, precisions_of
from rtx.runtime.hashing import sha256_of
from rtx.runtime.manifest import (
    FORMAT_VERSION,
    GOLDEN_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    EngineEntry,
    FileEntry,
    Manifest,
    Provenance,
    Variant,
)
from rtx.trainer.backbone import Source
from rtx.trainer.model import RetrievalModel

_PACKAGES = ("torch", "transformers", "tokenizers", "onnx", "onnxscript", "onnxruntime", "numpy", "pillow")


def write_bundle(
    folder: Path,
    model: RetrievalModel,
    gate: Gate,
    verdicts: Mapping[VariantName, Verdict],
    *,
    variants: Sequence[VariantName],
    name: str,
    source: str,
    command: str,
    seconds: Mapping[VariantName, float],
    mixed: Mapping[VariantName, Mixed],
    scales: Sequence[Scale],
    factors: Sequence[Factor],
    ranges: Sequence[Range],
    engines: Mapping[str, EngineEntry],
    default_variant: VariantName,
) -> Manifest:
    """Write everything beside the graphs, the manifest last.

    Args:
        folder: holds the graphs that passed, their engines, and nothing else.
        model: that they were made from.
        gate: that they passed.
        verdicts: on all variants.
        variants: that are in the bundle.
        name: of the bundle.
        source: folder or hub name of the checkpoint.
        command: for the record.
        seconds: of one pass over the golden items, for each of these that runs on a CPU.
        mixed: how those came to pass that have layers which stayed as they were.
        scales: of what the layers of int8-static read.
        factors: of what those of int4-half read.
        ranges: how large numbers get where there is half precision.
        engines: that lie in the folder, by file.
        default_variant: the one that is opened where none is named.
    """
    write_side_files(model, folder)
    (folder / TOKENIZER_FILE).write_text(gate.preprocessor.tokenizer_json, encoding="utf-8")
    (folder / GOLDEN_FILE).write_bytes(gate.golden.to_bytes())
    provenance = Provenance(
        source=checkpoint_name(source),
        source_sha256=hash_checkpoint(source),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        versions=_versions(),
    )
    written: dict[str, Variant] = {
        variant: _variant(folder, variant, verdicts[variant], mixed.get(variant), images=model.contract.takes_images)
        for variant in dict.fromkeys(variants)
    }
    report = {
        "provenance": dataclasses.asdict(provenance),
        "golden_items": len(gate.golden.items),
        "verdicts": {
            variant: {**verdict.to_dict(), "mixed": mixed[variant].to_dict() if variant in mixed else None}
            for variant, verdict in verdicts.items()
        },
        "scales": [scale.to_dict() for scale in scales],
        "factors": [factor.to_dict() for factor in factors],
        "ranges": [one.to_dict() for one in ranges],
        "reference": gate.reference.to_dict() if gate.reference is not None else None,
        "max_ndcg_drop": gate.max_ndcg_drop,
        "seconds": dict(seconds),
        "default_variant": default_variant,
        "bytes": {variant: _bytes(folder, found) for variant, found in written.items()},
    }
    content = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / "report.json").write_text(content, encoding="utf-8")
    (folder / "report.html").write_text(render_report(name, report), encoding="utf-8")
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        contract=model.contract,
        variants=written,
        default_variant=default_variant,
        files={
            path.relative_to(folder).as_posix(): FileEntry(sha256=sha256_of(path), bytes=path.stat().st_size)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
        provenance=provenance,
        rejected={variant: "; ".join(found.failures) for variant, found in verdicts.items() if found.failures},
        engines=dict(engines),
    )
    (folder / MANIFEST_FILE).write_bytes(manifest.to_bytes())
    return manifest


def checkpoint_name(source: str) -> str:
    """A checkpoint's name on the hub, or its folder's without the path, which is nobody else's business."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def hash_checkpoint(source: str) -> str:
    """SHA-256 over the names and contents of a checkpoint's files, but for those of an unfinished training run."""
    return sha256_of(Source.open(source).folder, without="checkpoints")


def _variant(folder: Path, name: VariantName, verdict: Verdict, mixed: Mixed | None, *, images: bool) -> Variant:
    files, (tokens, image) = files_of(name, images=images), precisions_of(name)
    beside = [path for file in files if file is not None for path in external_files(folder / file)]
    return Variant(
        file=files.tokens,
        precision=tokens,
        image_file=files.image,
        image_precision=image if images else None,
        tolerance=verdict.limits.parity,
        external=tuple(f"onnx/{path.name}" for path in beside),
        operators=is_packed(name),
        kept=() if mixed is None else mixed.kept,
        kept_precision="fp32" if mixed is None else mixed.precision,
    )


def _bytes(folder: Path, variant: Variant) -> int:
    return sum((folder / file).stat().st_size for file in (*variant.graphs, *variant.external))


def _versions() -> dict[str, str]:
    return {
        "rtx-retrieval": importlib.metadata.version("rtx-retrieval"),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in _PACKAGES},
    }
