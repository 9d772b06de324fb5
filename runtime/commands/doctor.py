"""`rtx doctor`: what this machine has, what is missing, and which variant of a bundle would run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from rtx.runtime.bundle import Bundle
from rtx.runtime.commands.tables import in_bytes, print_pairs, print_table
from rtx.runtime.doctor import examine
from rtx.runtime.engine import TENSORRT, gpu_index, is_tensorrt
from rtx.runtime.errors import EngineError, UsageError


@click.command()
@click.argument("path", metavar="[BUNDLE]", required=False, type=click.Path(path_type=Path))
@click.option("--device", help="Fail unless this device can run: cpu, cuda, or tensorrt for the engines of BUNDLE.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def doctor(path: Path | None, device: str | None, as_json: bool) -> None:
    """Show what this machine can run and what is missing; with a bundle, what would run of it and where.

    What decides how fast int8 is, the GPUs and whether ONNX Runtime runs a graph on each, which optional packages are
    there, and which command installs a missing one.
    """
    gpu = None if device is None else gpu_index(device)
    if device is not None and is_tensorrt(device) and path is None:
        raise UsageError(f"--device {device}: an engine belongs to a bundle; expected one")
    found = examine(None if path is None else Bundle.open(path))
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _show(found)
    if device is not None and (problem := _why_not(found, device, gpu)):
        raise EngineError(f"{device}: {problem}")


def _why_not(found: Mapping[str, Any], device: str, gpu: int | None) -> str | None:
    """Why a device cannot run; of a bundle, if one was given."""
    if gpu is not None and is_tensorrt(device):
        if problem := found["gpu"]["problem"]:
            return str(problem)
        if (there := found["bundle"]["devices"].get(f"{TENSORRT}:{gpu}")) is None and found["bundle"]["engines"]:
            return f"there is no such GPU; {len(found['gpu']['devices'])} found"
        return "the bundle has no engines; `rtx build --target` builds them" if there is None else there["problem"]
    engine = found["engines"]["onnx" if gpu is None else "onnx, cuda"]
    if problem := engine["problem"]:
        return str(problem)
    if gpu is not None and gpu not in {one["index"] for one in found["gpu"]["devices"]}:
        return f"there is no such GPU; {len(found['gpu']['devices'])} found"
    if found["bundle"] is None:
        return None
    name = device if gpu is None else f"cuda:{gpu}"
    why: str | None = found["bundle"]["devices"][name]["problem"]
    return why


def _show(found: Mapping[str, Any]) -> None:
    machine, gpus = found["machine"], found["gpu"]
    memory = machine["memory_bytes"]
    print_pairs(
        f"rtx {found['rtx']} on this machine",
        {
            "CPU": machine["cpu"],
            "cores": f"{machine['cores']} that this process may use",
            "instructions": ", ".join(machine["instruction_sets"]) or "none that matter here",
            "operators": f"built, {found['operators']}"
            if found["operators"]
            else "not built: packed variants cannot run",
            "memory": in_bytes(memory) if memory is not None else "unknown",
            "system": machine["system"],
            "Python": machine["versions"]["python"],
            "GPU": gpus["problem"] or f"{len(gpus['devices'])}, by a driver for CUDA {gpus['cuda']}",
        },
    )
    if gpus["devices"]:
        rows = [
            (f"cuda:{one['index']}", one["name"], f"sm_{one['capability']}", in_bytes(one["memory_bytes"]))
            for one in gpus["devices"]
        ]
        print_table("GPUs", ("device", "name", "capability", "memory"), rows)
    engines = [
        (name, entry["runs"], entry["version"] or "", entry["problem"] or "yes")
        for name, entry in found["engines"].items()
    ]
    print_table("Engines", ("engine", "runs", "version", "can it?"), engines)
    extras = []
    for extra, entry in found["extras"].items():
        packages = [f"{package} {version or 'missing'}" for package, version in entry["packages"].items()]
        if extra != "dev":
            extras.append((extra, ", ".join([*entry["includes"], *packages]), entry["install"] or ""))
    print_table("Extras", ("extra", "packages and extras", "to install"), extras)
    if found["bundle"] is not None:
        _show_bundle(found["bundle"])


def _show_bundle(bundle: Mapping[str, Any]) -> None:
    rows = [
        (device, one["variant"] or "none", one["precision"] or "", one["problem"] or "yes")
        for device, one in bundle["devices"].items()
    ]
    title = f"What opens of {bundle['path']} where no variant is named"
    print_table(title, ("device", "variant", "precision", "can it?"), rows)
    if bundle["engines"]:
        rows_of_engines = [(file, one["problem"] or "yes") for file, one in bundle["engines"].items()]
        print_table("Engines of TensorRT, for --device tensorrt", ("engine", "can it?"), rows_of_engines)
