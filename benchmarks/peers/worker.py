"""The worker's side of a comparison: a peer as a process that answers JSON, a line in and a line out.

    {"do": "prepare", "checkpoint", "artifact", "task", "forms", "calibration"}   {"failed": {form: reason}}
    {"do": "load", "checkpoint", "artifact", "task", "form", "threads"}           {"versions": {package: version}}
    {"do": "run", "items", "batch_size", "call_items", "out"}    {"seconds": [of each call], "peak_rss_bytes"}

What goes wrong is answered by {"error": sentence}, and the process goes on; it ends with its input. Runs in
environments that have nothing of rtx: standard library and numpy alone, whatever Python they have.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, TextIO

import numpy as np
from numpy.typing import NDArray

Task = Literal["embed", "rerank"]
Run = Callable[[Sequence[Any], int], NDArray[np.float32]]
"""Items, and how many go through the model at once, to [items, dimension] vectors or [items] logits, float32.

Items are texts, or for a reranker lists of a query and a passage.
"""

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Source:
    """What a peer opens.

    Attributes:
        checkpoint: folder in the Sentence Transformers layout.
        artifact: folder with what `prepare` made of it.
        task: "embed" or "rerank".
    """

    checkpoint: Path
    artifact: Path
    task: Task


@dataclass(frozen=True)
class Order:
    """What `prepare` is to make.

    Attributes:
        forms: that will be loaded.
        calibration: a JSON list of texts like those that will be run.
    """

    forms: tuple[str, ...]
    calibration: Path


Prepare = Callable[[Source, Order], Mapping[str, str]]
"""Fills the artifact's folder; by form, why one could not be made."""
Load = Callable[[Source, str, int], Run]
"""Opens a form of the model for so many threads."""


def prepare_nothing(_source: Source, _order: Order) -> Mapping[str, str]:
    """The `prepare` of a peer that opens the checkpoint as it is."""
    return {}


@contextmanager
def attempt(form: str, failed: MutableMapping[str, str]) -> Iterator[None]:
    """One form of several: a failure is noted, and the others are made."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  # a peer may fail by anything
        traceback.print_exc()
        failed[form] = sentence(error)


def serve(
    *,
    load: Load,
    packages: Sequence[str],
    prepare: Prepare = prepare_nothing,
    versions: Callable[[], Mapping[str, str]] = dict,
) -> None:
    """Answer until the input ends.

    Args:
        load: opens a form.
        packages: whose versions are told.
        prepare: makes the artifact.
        versions: of what is no package, once a form is loaded.
    """
    end_with_parent()
    answers = _answers()
    worker = _Worker(load, packages, prepare, versions)
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:  # noqa: BLE001  # whatever it was, the driver has to know
            traceback.print_exc()
            answer = {"error": sentence(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class _Worker:
    def __init__(
        self, load: Load, packages: Sequence[str], prepare: Prepare, versions: Callable[[], Mapping[str, str]]
    ) -> None:
        self._load = load
        self._versions = versions
        self._packages = packages
        self._prepare = prepare
        self._run: Run | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if request["do"] == "run":
            return self._timed(request)
        source = Source(Path(request["checkpoint"]), Path(request["artifact"]), request["task"])
        if request["do"] == "prepare":
            order = Order(tuple(request["forms"]), Path(request["calibration"]))
            return {"failed": dict(self._prepare(source, order))}
        if request["do"] == "load":
            self._run = self._load(source, request["form"], request["threads"])
            return {"versions": {**{name: metadata.version(name) for name in self._packages}, **self._versions()}}
        raise ValueError(f"do: expected prepare, load or run, got {request['do']!r}")

    def _timed(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self._run is None:
            raise ValueError("run: nothing is loaded")
        items, size = request["items"], request["call_items"] or len(request["items"])
        seconds, parts = [], []
        for at in range(0, len(items), size):
            call = items[at : at + size]
            start = perf_counter()
            parts.append(self._run(call, request["batch_size"]))
            seconds.append(perf_counter() - start)
        if request["out"] is not None:
            np.save(request["out"], np.concatenate(parts).astype(np.float32, copy=False))
        return {"seconds": seconds, "peak_rss_bytes": peak_rss_bytes()}


def sentence(error: BaseException) -> str:
    """The first line of what an exception says, with its type."""
    said = str(error).strip().split("\n", 1)[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def width_of(checkpoint: Path) -> int:
    """Dimension of a checkpoint's vectors."""
    width: int = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    return width


def has_vnni() -> bool:
    """Whether the CPU multiplies 8-bit integers without saturating on the way."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False
    return "avx512_vnni" in flags or "avx_vnni" in flags


def peak_rss_bytes() -> int | None:
    """Most resident memory of this process so far, and of those that it started; None where the system does not tell.

    Peaks are added up: processes that had theirs at different times had less together.
    """
    peaks: dict[int, int] = {}
    parents: dict[int, int] = {}
    # Not ru_maxrss: on Linux a process inherits the peak of the one that started it.
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            lines = (folder / "status").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:  # it has ended
            continue
        found = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines) if rest.strip()}
        if "VmHWM" in found:
            parents[int(folder.name)] = int(found["PPid"])
            peaks[int(folder.name)] = int(found["VmHWM"]) * 1024
    family = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(peaks[pid] for pid in family) if family <= {*peaks} else None


def _answers() -> TextIO:
    """Where answers go. What a library prints goes to the log instead."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def end_with_parent() -> None:
    """A process that stands still would outlive what started it, where that is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
