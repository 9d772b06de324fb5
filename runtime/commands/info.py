"""`rtx info`: what is in a bundle or a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from rtx.runtime.bundle import Bundle
from rtx.runtime.cli import open_model
from rtx.runtime.commands.tables import in_bytes, print_pairs, print_table
from rtx.runtime.contract import Task
from rtx.runtime.manifest import MANIFEST_FILE

_REPORT_FILE = "report.json"
_ONLY_FOR = {
    "embed": ("pooling", "dimension", "normalize", "similarity", "include_prompt"),
    "rerank": ("activation", "first_stage_weight"),
}


@click.command()
@click.argument("path", metavar="BUNDLE|CHECKPOINT", type=click.Path(path_type=Path))
@click.option("--task", type=click.Choice(["embed", "rerank"]), help="Of a checkpoint that does not say it itself.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def info(path: Path, task: Task | None, as_json: bool) -> None:
    """Show what is in a bundle or a checkpoint.

    Of a bundle: its contract, its variants with their size and how closely they agree with PyTorch, the variants that
    did not pass the gate, and where it comes from. Of a checkpoint: its contract. `rtx doctor` tells what this machine
    can run.
    """
    if (path / MANIFEST_FILE).exists() or not path.is_dir():
        found = describe_bundle(Bundle.open(path))
    else:
        with open_model(path, task=task) as model:
            found = {"kind": "checkpoint", "path": str(path), "contract": model.contract.to_dict()}
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _show(found)


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """What a bundle's manifest and report say, for JSON.

    Raises:
        BundleError: the report is damaged.
    """
    manifest = bundle.manifest
    report: dict[str, Any] = json.loads(bundle.read(_REPORT_FILE)) if _REPORT_FILE in manifest.files else {}
    verdicts: dict[str, dict[str, Any]] = report.get("verdicts", {})
    variants = {}
    for name, variant in manifest.variants.items():
        verdict = verdicts.get(name, {})
        variants[name] = {
            **dataclasses.asdict(variant),
            "bytes": sum(manifest.files[file].bytes for file in (*variant.graphs, *variant.external)),
            "parity": verdict.get("parity"),
            "ranking": verdict.get("ranking"),
        }
    return {
        "kind": "bundle",
        "path": str(bundle.path),
        "name": manifest.name,
        "format_version": manifest.format_version,
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "contract": manifest.contract.to_dict(),
        "default_variant": manifest.default_variant,
        "variants": variants,
        "rejected": manifest.rejected,
        "engines": {
            file: {**dataclasses.asdict(engine), "bytes": manifest.files[file].bytes}
            for file, engine in manifest.engines.items()
        },
        "provenance": dataclasses.asdict(manifest.provenance),
    }


# -- for people ----------------------------------------------------------------------------------------------------


def _show(found: Mapping[str, Any]) -> None:
    if found["kind"] == "bundle":
        size = in_bytes(found["bytes"])
        print_pairs(f"{found['name']}: a bundle of format version {found['format_version']}, {size}", {})
        _print_variants(found)
        _print_engines(found["engines"])
        print_pairs("Contract", _contract_rows(found["contract"]))
        provenance = dict(found["provenance"])
        versions = provenance.pop("versions")
        print_pairs("Provenance", provenance | {"versions": ", ".join(f"{k} {v}" for k, v in versions.items())})
    else:
        print_pairs(f"{found['path']}: a checkpoint", _contract_rows(found["contract"]))


def _contract_rows(contract: Mapping[str, Any]) -> dict[str, str]:
    """The fields of a contract that mean something for its task, in words."""
    hidden = {field for task, fields in _ONLY_FOR.items() if task != contract["task"] for field in fields}
    rows = {field: _in_words(value) for field, value in contract.items() if field not in hidden}
    if images := contract.get("images"):
        together = "images, texts, or texts with images" if contract.get("visual") else "texts or images, one an item"
        rows = {"task": rows.pop("task"), "takes": together, **rows, "images": _images_in_words(images)}
    if visual := contract.get("visual"):
        side = visual["merge_size"]
        rows["visual"] = f"token {visual['image_token_id']} for {side} × {side} patches"
    if parts := contract.get("rendered"):
        sides = ("$A", "$B")[: len(parts) - 1]
        rows["rendered"] = repr(
            "".join(piece for pair in zip(parts, sides, strict=False) for piece in pair) + parts[-1]
        )
        if around := contract["rendered_prompt"]:
            rows["rendered_prompt"] = repr("$prompt".join(around) + "$A" + parts[-1])
    optional = ("rendered", "rendered_prompt", "rendered_image", "images", "visual", "image_tokens", "fixed_tokens")
    unused = {field for field in optional if not contract.get(field)}
    unused |= set() if contract.get("rendered") else {"strip_sides"}
    return {field: row for field, row in rows.items() if field not in unused}


def _images_in_words(rules: Mapping[str, Any]) -> str:
    """How an image is resized, in pixels, height before width."""
    size = f"{rules['height']} × {rules['width']}"
    if rules["resize"] == "multiple":
        factor = rules["patch_size"] * rules["merge_size"]
        limits = f"{rules['min_pixels']:,} to {rules['max_pixels']:,} pixels in all"
        return f"{rules['resample']} to multiples of {factor}, {limits}"
    if rules["resize"] == "exact":
        return f"{rules['resample']} to {size}"
    return f"{rules['resample']} to {rules['shortest_edge']} at the shorter side, {size} from the centre"


def _in_words(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {text!r}" for name, text in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _print_variants(found: Mapping[str, Any]) -> None:
    rows = []
    for name, variant in found["variants"].items():
        parity, ranking = variant["parity"], variant["ranking"]
        rows.append(
            (
                f"{name} (default)" if name == found["default_variant"] else name,
                _precision(variant),
                in_bytes(variant["bytes"]),
                f"{parity['min_cosine']:.6f}" if parity else "",
                f"{parity['max_abs']:.1e}" if parity else "",
                f"{ranking['difference']:+.4f}" if ranking else "",
            )
        )
    closeness = "least cosine" if found["contract"]["task"] == "embed" else "least agreement"
    columns = ("variant", "precision", "size", closeness, "largest difference", "NDCG@10")
    print_table("Variants, against PyTorch in fp32", columns, rows)
    if found["rejected"]:
        print_pairs("Did not pass the gate", found["rejected"])


def _print_engines(engines: Mapping[str, Mapping[str, Any]]) -> None:
    for file, engine in engines.items():
        types = Counter({name.split()[1]: 0 for name in engine["layers"]})
        for name, count in engine["layers"].items():
            types[name.split()[1]] += count
        workspace = in_bytes(max(engine["workspace_bytes"])) if engine["workspace_bytes"] else "not known"
        rows = {
            "built with": f"{engine['target']} {engine['version']}",
            "for": "sm " + " ".join(map(str, engine["capabilities"]))
            if engine["capabilities"]
            else "the builder's GPU",
            "size": in_bytes(engine["bytes"]),
            "workspace": workspace,
            "buckets": ", ".join(map(_bucket, engine["profiles"])),
            "layers": ", ".join(f"{count} {name.lower()}" for name, count in types.most_common()),
        }
        print_pairs(f"Engine {file}", rows)


def _bucket(profile: Mapping[str, Sequence[int]]) -> str:
    """The largest sizes of a bucket: "128 × 32 tokens"."""
    largest = {axis: ends[2] for axis, ends in profile.items()}
    rows = largest.get("batch", largest.get("images", 1))
    if "tokens" in largest:
        return f"{rows} × {largest['tokens']} tokens"
    if "image_tokens" in largest:
        return f"{rows} images × {largest['image_tokens']} tokens"
    return f"{rows} {'rows' if 'batch' in largest else 'images'}"


def _precision(variant: Mapping[str, Any]) -> str:
    kept = len(variant["kept"])
    left = f", {kept} layer{'s' * (kept > 1)} {variant['kept_precision']}" if kept else ""
    return f"{variant['precision']}{left}"
