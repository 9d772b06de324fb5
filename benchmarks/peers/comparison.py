"""All models through their peers, each model a stage."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.peers.catalogue import BASELINE, CHECKPOINTS, OURS, ModelName, Peer
from benchmarks.peers.checkpoints import CheckpointName
from benchmarks.peers.environments import ensure_environment
from benchmarks.peers.quality import (
    LEAST_MEAN_COSINE,
    Agreement,
    Quality,
    Vectors,
    compare_rankings,
    compare_scores,
    compare_vectors,
)
from benchmarks.peers.report import Result, figures
from benchmarks.peers.stage import BATCH_SIZES, Load, Rounds, Stage, Subject
from benchmarks.peers.workloads import ARRIVAL_ITEMS, LONG_TOKENS, Amounts, Workloads, make_workloads
from rtx.runtime.errors import EngineError

MIX, ONLINE, QUERIES, LONG, PAIRS, STARTS = (
    "natural mix",
    f"natural mix, {ARRIVAL_ITEMS} at a time as they come",
    "single queries",
    f"passages of {LONG_TOKENS} tokens",
    "query–passage pairs",
    "start and memory",
)
_LEAST_MIX = 4 * ARRIVAL_ITEMS
_LEAST_LONG = 4
_MOST_PAIRS = 256
# For static quantisation, which pads each to 384 tokens: its default of 300 takes minutes with the smallest model.
_CALIBRATION_TEXTS: Mapping[CheckpointName, int] = {"minilm": 64, "pairs": 64, "base": 32, "qwen3": 8}
_CHECKPOINT_S = 600


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: of MiniLM.
        large_rounds: of the larger models.
        seconds: about how long the slowest peer takes for the natural mix; the other loads follow from its length.
        slice_items: passages that batch sizes are tried on.
        batch_sizes: that are tried.
        starts: of a process, for its first result.
        amounts: of texts to choose from.
    """

    rounds: int = 5
    large_rounds: int = 3
    seconds: float = 5.0
    slice_items: int = 48
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    starts: int = 3
    amounts: Amounts = dataclasses.field(default_factory=Amounts)


BRIEF = Plan(
    rounds=2,
    large_rounds=1,
    seconds=1.5,
    slice_items=24,
    batch_sizes=(4, 16),
    starts=1,
    amounts=Amounts(mix=256, long=16, queries=24, judged_per_distribution=6, documents_per_distribution=10),
)


class Comparison:
    """All models through their peers.

    Args:
        plan: how much.
        peers: whom.
        folder: for checkpoints and artifacts.
        threads: of each peer.
        ours: the peer that is set beside every other one.
    """

    def __init__(self, plan: Plan, peers: Sequence[Peer], folder: Path, threads: int, ours: str = OURS) -> None:
        self.missing: dict[str, str] = {}
        """By environment, why it could not be installed."""
        self._plan = plan
        self._ours = ours
        self._peers = peers
        self._folder = folder
        self._threads = threads
        self._pythons: dict[str, Path] = {}
        self._keys: dict[str, str] = {}
        self._batch_sizes: dict[str, int] = {}
        self._begun = time.monotonic()

    def run(self, models: Sequence[ModelName]) -> Iterator[Result]:
        """Each model as soon as it is through."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._install()
        self._note("texts")
        texts = make_workloads(self._checkpoint("minilm") / "tokenizer.json", self._plan.amounts)
        stages = {"minilm": self._minilm, "pairs": self._pairs, "base": self._large, "qwen3": self._large}
        for name in (checkpoint for model in models for checkpoint in CHECKPOINTS[model]):
            yield dataclasses.replace(stages[name](name, texts), ours=self._ours)

    def _install(self) -> None:
        wanted = [environment for peer in self._peers for environment in (peer.environment, peer.artifact)]
        for environment in dict.fromkeys(name for name in wanted if name is not None):
            self._note(f"environment: {environment}")
            try:
                self._pythons[environment], self._keys[environment] = ensure_environment(environment)
            except EngineError as error:
                self.missing[environment] = str(error)
                self._note(f"environment: {environment}: {error}")

    def _checkpoint(self, name: CheckpointName) -> Path:
        """The folder of a checkpoint, which is written if it is not there."""
        target = self._folder / name / "checkpoint"
        if not target.exists():
            self._note(f"checkpoint: {name}")
            partial = target.with_name("checkpoint.partial")
            shutil.rmtree(partial, ignore_errors=True)
            # In a process of its own, so that this one stays without PyTorch.
            command = [sys.executable, str(Path(__file__).with_name("checkpoints.py")), name, str(partial)]
            subprocess.run(command, check=True, stdout=sys.stderr, timeout=_CHECKPOINT_S)
            partial.rename(target)
        return target

    def _stage(self, name: CheckpointName, *, rerank: bool = False) -> tuple[Stage, list[Peer]]:
        peers = [peer for peer in self._peers if name in peer.checkpoints]
        checkpoint = self._checkpoint(name)
        stage = Stage(
            checkpoint,
            "rerank" if rerank else "embed",
            self._pythons,
            self._folder / name,
            threads=self._threads,
            note=lambda text: self._note(f"{name}: {text}"),
        )
        return stage, peers

    def _minilm(self, name: CheckpointName, texts: Workloads) -> Result:
        plan = self._plan
        stage, peers = self._stage(name)
        with stage.opened(peers, self._calibration(name, texts), self._keys):
            stage.tune(texts.mix[: plan.slice_items], plan.batch_sizes)
            self._batch_sizes = {subject.peer.name: subject.batch_size for subject in stage.running.values()}
            judged = texts.judged
            vectors = stage.vectors([*judged.queries, *judged.documents])
            quality = held_against(stage, vectors, lambda found, base: compare_rankings(found, base, judged))
            count = fitting(stage.running.values(), plan.seconds, least=_LEAST_MIX, most=len(texts.mix))
            mix = texts.mix[:count]
            tokens = sum(texts.mix_tokens[:count])
            loads = [
                Load(MIX, mix),
                Load(ONLINE, mix[: max(count // 2 // ARRIVAL_ITEMS, 1) * ARRIVAL_ITEMS], call_items=ARRIVAL_ITEMS),
                Load(QUERIES, texts.queries, call_items=1, latency=True),
                Load(LONG, texts.long[: max(tokens // 2 // LONG_TOKENS, _LEAST_LONG)]),
            ]
            measured = stage.measure(loads, plan.rounds)
        # No other process is in memory by now.
        measured[STARTS] = stage.cold_start(texts.queries[0], mix[: count // 2], plan.starts)
        return result(name, stage, measured, quality, loads)

    def _pairs(self, name: CheckpointName, texts: Workloads) -> Result:
        stage, peers = self._stage(name, rerank=True)
        with stage.opened(peers, self._calibration(name, texts), self._keys):
            self._take_batch_sizes(stage)
            items = self._fitting(stage, texts.pairs[:_MOST_PAIRS], self._plan.seconds / 2)
            quality = held_against(stage, stage.vectors(items), compare_scores)
            loads = [Load(PAIRS, items)]
            measured = stage.measure(loads, self._plan.rounds)
        return result(name, stage, measured, quality, loads)

    def _large(self, name: CheckpointName, texts: Workloads) -> Result:
        stage, peers = self._stage(name)
        with stage.opened(peers, self._calibration(name, texts), self._keys):
            self._take_batch_sizes(stage)
            items = self._fitting(stage, texts.mix[:_MOST_PAIRS], self._plan.seconds)
            quality = held_against(stage, stage.vectors(items), compare_vectors)
            loads = [Load(MIX, items), Load(QUERIES, texts.queries[:16], call_items=1, latency=True)]
            measured = stage.measure(loads, self._plan.large_rounds)
        return result(name, stage, measured, quality, loads)

    def _calibration(self, name: CheckpointName, texts: Workloads) -> Path:
        path = self._folder / name / "calibration.json"
        path.write_text(json.dumps(texts.mix[: _CALIBRATION_TEXTS[name]]), encoding="utf-8")
        return path

    def _take_batch_sizes(self, stage: Stage) -> None:
        for name, subject in stage.running.items():
            subject.batch_size = self._batch_sizes.get(name, subject.batch_size)

    def _fitting(self, stage: Stage, items: tuple[Any, ...], seconds: float) -> tuple[Any, ...]:
        """As many items as the slowest peer does in about so many seconds, at least a batch of 8."""
        stage.time(items[:ARRIVAL_ITEMS])
        return items[: fitting(stage.running.values(), seconds, least=ARRIVAL_ITEMS)]

    def _note(self, text: str) -> None:
        click.echo(f"{elapsed(self._begun):>7}  {text}", err=True)


def held_against(
    stage: Stage, found: Mapping[str, Vectors], compare: Callable[[Vectors, Vectors], Quality | Agreement]
) -> dict[str, Quality | Agreement]:
    """Each peer's vectors or logits beside the baseline's. A peer whose vectors are another model's is not measured."""
    if BASELINE not in found:
        return {}
    compared = {name: compare(own, found[BASELINE]) for name, own in found.items()}
    for name, quality in compared.items():
        if isinstance(quality, Quality) and not quality.mean_cosine >= LEAST_MEAN_COSINE:
            subject = stage.subjects[name]
            subject.failed = f"vectors: mean cosine to {BASELINE} is {quality.mean_cosine:.3f}"
            subject.worker.close()
    return compared


def fitting(subjects: Iterable[Subject], seconds: float, *, least: int, most: int = sys.maxsize) -> int:
    """How many items the slowest subject does in about so many seconds at the batch size that it has."""
    slowest = min((subject.tuned[subject.batch_size] for subject in subjects), default=0.0)
    return max(least, min(most, round(slowest * seconds)))


def result(
    name: str,
    stage: Stage,
    measured: Mapping[str, Rounds],
    quality: Mapping[str, Quality | Agreement],
    loads: Sequence[Load],
) -> Result:
    subjects = stage.subjects
    return Result(
        name=name,
        figures={title: figures(rounds) for title, rounds in measured.items()},
        quality=dict(quality),
        batch_sizes={peer: subject.batch_size for peer, subject in subjects.items()},
        tuned={peer: subject.tuned for peer, subject in subjects.items()},
        counts={load.title: len(load.items) for load in loads},
        versions={peer: subject.versions for peer, subject in subjects.items()},
        failed={peer: subject.failed for peer, subject in subjects.items() if subject.failed is not None},
    )


def elapsed(begun: float) -> str:
    """Minutes and seconds since then: "12:05"."""
    minutes, seconds = divmod(round(time.monotonic() - begun), 60)
    return f"{minutes}:{seconds:02}"
