"""One model through all of its peers: prepared, opened, tuned, held against the baseline, and run in rounds.

What a peer cannot do is noted, and the others go on.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.catalogue import Peer, script_of
from benchmarks.peers.process import Worker
from benchmarks.peers.worker import Task
from rtx.runtime.errors import EngineError
from rtx.runtime.rounds import Block, run_rounds

HERE = Path(__file__).parent
Note = Callable[[str], None]
Rounds = dict[str, dict[str, list[float]]]
"""By peer and by name of the number: its values by round."""

BATCH_SIZES = (4, 8, 16, 32, 64)
USUAL_BATCH_SIZE = 8
_TUNING_PASSES = 3

_PREPARE_S, _LOAD_S, _RUN_S = 1800.0, 600.0, 600.0
# Of a float32 checkpoint: its weights, once more while they are read, and what an engine makes of them.
_MEMORY_FACTOR, _MEMORY_BYTES = 2.5, 700 << 20


@dataclass(frozen=True)
class Load:
    """A measurement.

    Attributes:
        title: of its table.
        items: texts, or pairs of them.
        call_items: how many are given at once; None for all.
        latency: whether milliseconds of a call are asked for, and not items a second.
    """

    title: str
    items: tuple[Any, ...]
    call_items: int | None = None
    latency: bool = False


@dataclass
class Subject:
    """A peer with one model.

    Attributes:
        peer: which.
        worker: its process.
        batch_size: items that go through the model at once.
        tuned: items a second at each batch size that was tried.
        versions: of what it runs on.
        failed: why it is not measured (any further).
    """

    peer: Peer
    worker: Worker
    batch_size: int = USUAL_BATCH_SIZE
    tuned: dict[int, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    failed: str | None = None


class Stage:
    """One model and its peers.

    Args:
        checkpoint: folder of the model.
        task: "embed" or "rerank".
        pythons: interpreter of each environment that there is.
        folder: for artifacts, vectors and logs.
        threads: of each peer.
        note: told what is going on.
    """

    def __init__(
        self,
        checkpoint: Path,
        task: Task,
        pythons: Mapping[str, Path],
        folder: Path,
        *,
        threads: int,
        note: Note,
    ) -> None:
        self.checkpoint = checkpoint
        self.task = task
        self.folder = folder
        self.subjects: dict[str, Subject] = {}
        self._pythons = pythons
        self._threads = threads
        self._note = note

    @property
    def running(self) -> dict[str, Subject]:
        """Those that nothing is wrong with."""
        return {name: subject for name, subject in self.subjects.items() if subject.failed is None}

    @contextmanager
    def opened(self, peers: Sequence[Peer], calibration: Path, keys: Mapping[str, str]) -> Iterator[None]:
        """Prepare what the peers open and open it; whatever happens, no process is left when the block ends.

        Args:
            peers: whom to open.
            calibration: texts for static quantisation.
            keys: by environment, what its artifact was made with: one of another key is made anew.
        """
        try:
            self.subjects = {peer.name: Subject(peer, self._worker(peer.name, peer.environment)) for peer in peers}
            for subject in self.subjects.values():
                if subject.peer.environment not in self._pythons:
                    subject.failed = f"there is no environment {subject.peer.environment}"
            for environment in dict.fromkeys(peer.artifact for peer in peers if peer.artifact is not None):
                self._prepare(environment, calibration, keys.get(environment, ""))
            self._open_all()
            yield
        finally:
            for subject in self.subjects.values():
                subject.worker.close()

    def tune(self, items: Sequence[Any], batch_sizes: tuple[int, ...]) -> None:
        """Find the batch size at which each peer is fastest, on a few items."""
        for name, subject in self.running.items():
            self._note(f"batch size: {name}")
            with noting(subject):
                # Each several times, the best of which counts: other tenants of the machine make all but that slower.
                for batch_size in batch_sizes * _TUNING_PASSES:
                    subject.batch_size = batch_size
                    self._time(subject, items)
                subject.batch_size = max(subject.tuned, key=lambda size: subject.tuned[size])

    def time(self, items: Sequence[Any]) -> None:
        """See how fast each peer is at the batch size that it has."""
        for name, subject in self.running.items():
            self._note(f"warm up: {name}")
            with noting(subject):
                self._time(subject, items)

    def vectors(self, items: Sequence[Any]) -> dict[str, NDArray[np.float32]]:
        """What each peer makes of the items."""
        found: dict[str, NDArray[np.float32]] = {}
        out = self.folder / "vectors.npy"
        for name, subject in self.running.items():
            self._note(f"quality: {name}")
            with noting(subject):
                self.run(subject, items, out=out)
                found[name] = np.load(out)
                if not np.isfinite(found[name]).all():
                    raise EngineError(f"{name}: gave numbers that are not finite")
        return found

    def measure(self, loads: Sequence[Load], rounds: int) -> dict[str, Rounds]:
        """Run every load in every round; by title."""
        measured: dict[str, Rounds] = {}
        blocks = {load.title: self._block(load) for load in loads}
        for name, found in self._rounds(blocks, rounds).items():
            for number, values in found.items():
                title, _, key = number.rpartition("/")
                measured.setdefault(title, {}).setdefault(name, {})[key] = values
        return measured

    def cold_start(self, query: Any, items: Sequence[Any], rounds: int) -> Rounds:
        """Seconds from the start of a process to its first result, and the most memory of one that runs the items."""

        def start(subject: Subject) -> Mapping[str, float]:
            numbers: dict[str, float] = {}
            if subject.failed is None:
                worker = self._worker(subject.peer.name, subject.peer.environment)
                fresh = Subject(subject.peer, worker, batch_size=subject.batch_size)
                with noting(subject), closing(worker):
                    begun = time.monotonic()
                    self._load(fresh)
                    self.run(fresh, [query])
                    numbers["cold_start_s"] = time.monotonic() - begun
                    if (peak := self.run(fresh, items)["peak_rss_bytes"]) is not None:
                        numbers["peak_rss_mb"] = peak / 1e6
            return numbers

        return self._rounds({"cold start": start}, rounds)

    def run(
        self, subject: Subject, items: Sequence[Any], *, call_items: int | None = None, out: Path | None = None
    ) -> dict[str, Any]:
        """Items through a peer.

        Raises:
            EngineError: it failed.
        """
        request = {"do": "run", "items": list(items), "batch_size": subject.batch_size, "call_items": call_items}
        return subject.worker.ask({**request, "out": None if out is None else str(out)}, timeout_s=_RUN_S)

    def _time(self, subject: Subject, items: Sequence[Any]) -> None:
        self.run(subject, items[: len(items) // 4 + 1])
        rate = len(items) / sum(self.run(subject, items)["seconds"])
        subject.tuned[subject.batch_size] = max(rate, subject.tuned.get(subject.batch_size, 0.0))

    def _rounds(self, blocks: Mapping[str, Block[Subject]], rounds: int) -> Rounds:
        return run_rounds(self.running, blocks, rounds, note=self._note) if self.running else {}

    def _block(self, load: Load) -> Callable[[Subject], Mapping[str, float]]:
        def block(subject: Subject) -> Mapping[str, float]:
            numbers: dict[str, float] = {}
            if subject.failed is None:
                with noting(subject):
                    seconds = self.run(subject, load.items, call_items=load.call_items)["seconds"]
                    if load.latency:
                        p50, p95 = np.percentile(seconds, (50, 95)).tolist()
                        numbers = {f"{load.title}/p50_ms": p50 * 1e3, f"{load.title}/p95_ms": p95 * 1e3}
                    else:
                        numbers = {f"{load.title}/per_s": len(load.items) / sum(seconds)}
            return numbers

        return block

    def _prepare(self, environment: str, calibration: Path, key: str) -> None:
        """Have an artifact made, unless it is there; peers that open what could not be made fail."""
        users = [subject for subject in self.running.values() if subject.peer.artifact == environment]
        if environment not in self._pythons:
            for subject in users:
                subject.failed = f"there is no environment {environment}"
            return
        artifact = self._artifact(environment)
        ready = artifact / "ready.json"
        forms = {subject.peer.form for subject in users}
        wanted = {"key": key, "script": (HERE / script_of(environment)).read_text(encoding="utf-8")}
        known = json.loads(ready.read_text(encoding="utf-8")) if ready.exists() else {"forms": []}
        if {name: known.get(name) for name in wanted} != wanted or not forms <= set(known["forms"]):
            self._note(f"prepare: {environment}")
            shutil.rmtree(artifact, ignore_errors=True)
            artifact.mkdir(parents=True)
            worker = self._worker(f"prepare {environment}", environment)
            order = {"forms": sorted(forms), "calibration": str(calibration)}
            request = {**self._source(artifact), **order, "do": "prepare"}
            try:
                known = {**wanted, **order, **worker.ask(request, timeout_s=_PREPARE_S)}
            except EngineError as error:
                for subject in users:
                    subject.failed = str(error)
                return
            finally:
                worker.close()
            ready.write_text(json.dumps(known), encoding="utf-8")
        for subject in users:
            subject.failed = known["failed"].get(subject.peer.form)

    def _open_all(self) -> None:
        """As many at a time as there are threads: most of it is Python that imports."""
        for subject in self.running.values():
            # Here, and not where it is asked: a worker ends with the thread that started it.
            subject.worker.start()
        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(self._open, self.running.values()))

    def _open(self, subject: Subject) -> None:
        self._note(f"open: {subject.peer.name}")
        with noting(subject):
            needed = _MEMORY_FACTOR * (self.checkpoint / "model.safetensors").stat().st_size + _MEMORY_BYTES
            if (free := available_bytes()) is not None and free < needed:
                raise EngineError(f"memory: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
            self._load(subject)

    def _load(self, subject: Subject) -> None:
        artifact = self._artifact(subject.peer.artifact or subject.peer.environment)
        request = {**self._source(artifact), "do": "load", "form": subject.peer.form, "threads": self._threads}
        subject.versions = subject.worker.ask(request, timeout_s=_LOAD_S)["versions"]

    def _source(self, artifact: Path) -> dict[str, str]:
        return {"checkpoint": str(self.checkpoint), "artifact": str(artifact), "task": self.task}

    def _artifact(self, environment: str) -> Path:
        return self.folder / environment

    def _worker(self, name: str, environment: str) -> Worker:
        python = self._pythons.get(environment, Path(sys.executable))
        # -P: the scripts of this folder are no modules that a library could find by mistake.
        command = [str(python), "-P", str(HERE / script_of(environment))]
        log = self.folder / f"{name.replace(', ', '_').replace(' ', '_')}.log"
        return Worker(name, command, environment=variables(self._threads), log=log)


@contextmanager
def noting(subject: Subject) -> Iterator[None]:
    """A peer that fails is not asked again."""
    try:
        yield
    except EngineError as error:
        subject.failed = str(error)
        subject.worker.close()


def variables(threads: int) -> dict[str, str]:
    """The environment of a worker: what this machine has, and the number of threads in every way that is read."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OMP_", "MKL_"))}
    count = str(threads)
    limits = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}
    return (
        kept | limits | {"RAYON_NUM_THREADS": count, "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
    )


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    except (OSError, StopIteration):
        return None
