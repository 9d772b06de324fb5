"""What a measurement ran on: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rtx.runtime.backends.onnx import usable_cores
from rtx.runtime.errors import EngineError
from rtx.runtime.gpu import find_gpus

# Instructions that decide how fast int8 and fp32 products are, as /proc/cpuinfo calls them.
_INSTRUCTION_SETS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")
_PACKAGES = ("rtx-retrieval", "onnxruntime", "onnxruntime-gpu", "tokenizers", "numpy", "torch", "transformers")


@dataclass(frozen=True)
class Machine:
    """What a measurement ran on.

    Attributes:
        cpu: model name.
        cores: that this process may use.
        instruction_sets: of those that matter here, the ones that the CPU has.
        memory_bytes: of the machine; None where the system does not tell.
        gpus: names of the NVIDIA GPUs that the driver finds, in its order.
        load: mean number of waiting processes over the last minute, before anything was run.
        system: operating system and architecture.
        versions: of Python and of the installed packages that matter.
        commit: of the repository that rtx was imported from, with "+" for changes since; None if it was installed.
    """

    cpu: str
    cores: int
    instruction_sets: tuple[str, ...]
    memory_bytes: int | None
    gpus: tuple[str, ...]
    load: float | None
    system: str
    versions: dict[str, str]
    commit: str | None


def describe_machine() -> Machine:
    cpu = _cpuinfo()
    flags = {*cpu.get("flags", "").split(), *cpu.get("Features", "").split()}
    installed = {package: version for package in _PACKAGES if (version := installed_version(package))}
    name = cpu.get("model name") or platform.processor() or platform.machine()
    return Machine(
        cpu=name,
        cores=usable_cores(),
        instruction_sets=tuple(flag for flag in _INSTRUCTION_SETS if flag in flags),
        memory_bytes=_memory_bytes(),
        gpus=_gpus(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        system=f"{platform.system()} {platform.machine()}",
        versions={"python": platform.python_version(), **installed},
        commit=_commit(),
    )


def _cpuinfo() -> dict[str, str]:
    """The entries of the first core in /proc/cpuinfo; empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    entries = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in entries}


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _gpus() -> tuple[str, ...]:
    try:
        return tuple(gpu.name for gpu in find_gpus().devices)
    except EngineError:
        return ()


def installed_version(package: str) -> str | None:
    """Version of a distribution; None if it is not installed. Nothing of it is imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    # Only if git knows this very file: an environment may lie inside a repository that is not ours.
    source = Path(__file__).resolve()
    if _git(source, "ls-files", "--error-unmatch", source.name) is None:
        return None
    commit = _git(source, "rev-parse", "--short=12", "HEAD")
    changed = _git(source, "status", "--porcelain", "--untracked-files=no", "--", ":/")
    return f"{commit}{'+' if changed else ''}" if commit else None


def _git(source: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(source.parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
