"""Measuring a bundle: correctness first, then the speed of every variant, and of PyTorch, in interleaved rounds."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice
from time import perf_counter
from typing import Any

import numpy as np

from rtx.runtime import coldstart
from rtx.runtime.backends.onnx import usable_cores
from rtx.runtime.bundle import Bundle
from rtx.runtime.candidates import Candidates
from rtx.runtime.embedder import Embedder
from rtx.runtime.engine import gpu_index
from rtx.runtime.errors import UsageError
from rtx.runtime.evalset import EvalSet
from rtx.runtime.evaluation import Comparison, compare, evaluate_embedder, evaluate_reranker
from rtx.runtime.golden import Deviation
from rtx.runtime.items import count_images
from rtx.runtime.machine import Machine, describe_machine
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.rounds import Block, Note, Stat, fitting_count, rotate, run_rounds, summarize
from rtx.runtime.subjects import PYTORCH, Subject, open_checkpoint, open_variants
from rtx.runtime.workload import DOCUMENTS_PER_QUERY, Item, Workload, count_tokens, make_workload

STAGES = ("tokenize", "collate", "run", "rest")
PERCENTILES = (50, 95, 99)

# PyTorch takes some 10 s to start: its starts vary by less than they differ from the others'.
_CHECKPOINT_STARTS = 2
# However slow a model is: fewer calls have no percentiles, fewer items are no mix.
_LEAST_CALLS, _MOST_CALLS = 20, 1000
_LEAST_MIX, _LEAST_ITEMS, _MOST_ITEMS = 32, 8, 4096


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """How to measure.

    Attributes:
        rounds: how often everything is measured.
        seconds: about how long the slowest subject takes for a measurement in a round; the others do the same work.
        threads: of one run; None for the cores that this process may use.
        device: as for `Session.open`.
        variants: of the bundle; none for all that run there.
        seed: of the choice of texts.
    """

    rounds: int = 5
    seconds: float = 2.0
    threads: int | None = None
    device: str = "cpu"
    variants: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UsageError(f"rounds: expected at least 1, got {self.rounds}")
        if not self.seconds > 0:
            raise UsageError(f"seconds: expected more than 0, got {self.seconds}")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads: expected at least 1, got {self.threads}")
        gpu_index(self.device)


@dataclass(frozen=True)
class Texts:
    """What to run, from outside: documents for throughput, queries for latency, and where they come from."""

    documents: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Judgements:
    """What ranking quality is measured on; a reranker needs candidates."""

    evalset: EvalSet
    candidates: Candidates | None = None


@dataclass(frozen=True)
class Quality:
    """Ranking quality of a subject.

    Attributes:
        evalset, queries, documents: the evaluation set and its size.
        metrics: means over its queries: "ndcg@10", ...
        comparison: with the baseline; None for the baseline itself.
    """

    evalset: str
    queries: int
    documents: int
    metrics: dict[str, float]
    comparison: Comparison | None


@dataclass(frozen=True)
class SubjectResult:
    """What was measured of one variant, or of PyTorch.

    Attributes:
        name: the variant's, or "PyTorch".
        precision: of its weights.
        deviation: from the golden outputs.
        size_bytes: of weights and tokenizer; None where they are not in a folder here.
        peak_rss_bytes: of a process that opens it and runs the mix; None where the system does not tell.
        stats: by name: latency_p50_ms, latency_p95_ms, latency_p99_ms of a call; throughput_per_s in items of the mix;
            throughput_per_s_at_N_tokens; stage_tokenize_ms, stage_collate_ms, stage_run_ms, stage_rest_ms of an item of
            the mix; cold_start_s from process start to first result.
        quality: where an evaluation set was given.
    """

    name: str
    precision: str
    deviation: Deviation
    size_bytes: int | None
    peak_rss_bytes: int | None
    stats: dict[str, Stat]
    quality: Quality | None


@dataclass(frozen=True)
class WorkloadInfo:
    """What was run.

    Attributes:
        source: where the texts come from.
        call: what one call is whose latency was measured.
        call_tokens: mean length of an item of a call.
        calls: of them in a round.
        items: of the mix in a round.
        images: in those.
        mix_tokens: mean length of an item of the mix.
        lengths: the lengths of which throughput was measured.
    """

    source: str
    call: str
    call_tokens: float
    calls: int
    items: int
    images: int
    mix_tokens: float
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class BenchResult:
    """Everything that was measured; the first of `subjects` is the baseline."""

    bundle: str
    task: str
    default_variant: str
    baseline: str
    subjects: tuple[SubjectResult, ...]
    workload: WorkloadInfo
    rounds: int
    threads: int
    device: str
    machine: Machine

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"kind": "rtx-bench", "version": 1, **dataclasses.asdict(self)}


def bench(
    path: str | os.PathLike[str],
    options: BenchOptions,
    *,
    against: str | None = None,
    texts: Texts | None = None,
    judgements: Judgements | None = None,
    note: Note = lambda _: None,
) -> BenchResult:
    """Measure a bundle.

    Args:
        path: the bundle.
        options: how to measure.
        against: the checkpoint that the bundle was made of, to be run on PyTorch as the baseline. Without it the
            baseline is the fp32 variant, or the first.
        texts: what to run; None for texts made of the tokenizer's vocabulary.
        judgements: measure ranking quality too.
        note: told what is done next.

    Raises:
        UsageError: there is no such variant, or judgements have no candidates for a reranker, or have some for an
            embedder.
        BundleError: the bundle is damaged, or variants are out of their tolerance on this machine.
        CheckpointError: the checkpoint is not the one that the bundle was made of.
        EngineError: a model could not be run.
    """
    machine, threads = describe_machine(), options.threads or usable_cores()
    bundle = Bundle.open(path)
    if judgements is not None and (bundle.manifest.contract.task == "rerank") != (judgements.candidates is not None):
        raise UsageError(
            "the ranking quality of a reranker needs candidates: documents of a first stage to reorder"
            if judgements.candidates is None
            else "candidates: only a reranker has them; an embedder ranks the whole corpus"
        )
    with ExitStack() as models:
        subjects = _open(bundle, options, threads, against, models, note)
        preprocessor = subjects[0].model.preprocessor
        workload = make_workload(preprocessor, **vars(texts or Texts()), seed=options.seed)
        note("finding out how much work fits into a round")
        plan = _Plan.fitting(workload, subjects, options.seconds)
        measured = run_rounds({s.name: s for s in subjects}, plan.blocks(), options.rounds, note=note)
        quality = _evaluate(subjects, judgements, note)
        info = plan.describe(workload, preprocessor)
    # The models are closed by now: processes that start have the machine to themselves.
    starts, peaks = _start_processes(subjects, workload, plan.mix.count, options.rounds, threads, note)
    stats = summarize({s.name: measured[s.name] | starts[s.name] for s in subjects}, baseline=subjects[0].name)
    return BenchResult(
        bundle=bundle.manifest.name,
        task=bundle.manifest.contract.task,
        default_variant=bundle.manifest.default_variant,
        baseline=subjects[0].name,
        subjects=tuple(
            SubjectResult(
                name=s.name,
                precision=s.origin.precision,
                deviation=s.deviation,
                size_bytes=s.origin.size_bytes,
                peak_rss_bytes=peaks[s.name],
                stats=stats[s.name],
                quality=quality.get(s.name),
            )
            for s in subjects
        ),
        workload=info,
        rounds=options.rounds,
        threads=threads,
        device=options.device,
        machine=machine,
    )


def _open(
    bundle: Bundle, options: BenchOptions, threads: int, against: str | None, models: ExitStack, note: Note
) -> list[Subject]:
    """The subjects, the baseline first."""
    subjects = []
    if against is not None:
        if gpu_index(options.device) is not None:
            raise UsageError(
                f"{against}: PyTorch runs on the CPU here, and is nothing to hold {options.device} against"
            )
        note(f"opening {against} on PyTorch")
        subjects.append(open_checkpoint(against, bundle, threads=threads, models=models))
    return subjects + open_variants(
        bundle, options.variants, threads=threads, device=options.device, models=models, note=note
    )


@dataclass
class _Latency:
    """Times calls one after the other."""

    calls: Sequence[Sequence[Item]]
    count: int

    def __call__(self, subject: Subject) -> dict[str, float]:
        self.run(subject, 1)  # the subject before has filled the caches with its own
        times_ms = []
        for call in islice(cycle(self.calls), self.count):
            start = perf_counter()
            subject.run(call, prompt="query")
            times_ms.append(1000 * (perf_counter() - start))
        values = np.percentile(times_ms, PERCENTILES).tolist()
        return {f"latency_p{p}_ms": value for p, value in zip(PERCENTILES, values, strict=True)}

    def run(self, subject: Subject, count: int) -> None:
        for call in islice(cycle(self.calls), count):
            subject.run(call, prompt="query")


@dataclass
class _Throughput:
    """Times one large call; `tokens` is the length of its items, None for a mix, of which stages are kept too."""

    items: Sequence[Item]
    tokens: int | None
    count: int

    def __call__(self, subject: Subject) -> dict[str, float]:
        self.run(subject, 1)
        subject.clock.reset()
        start = perf_counter()
        self.run(subject, self.count)
        elapsed_s = perf_counter() - start
        if self.tokens is not None:
            return {f"throughput_per_s_at_{self.tokens}_tokens": self.count / elapsed_s}
        spent = dataclasses.asdict(subject.clock)
        # Items of a long call are prepared while others run: together the stages can take longer than the call.
        spent["rest"] = max(0.0, elapsed_s - sum(spent.values()))
        stages = {f"stage_{name}_ms": 1000 * spent[name] / self.count for name in STAGES}
        return {"throughput_per_s": self.count / elapsed_s, **stages}

    def run(self, subject: Subject, count: int) -> None:
        subject.run(list(islice(cycle(self.items), count)), prompt="document")


@dataclass(frozen=True)
class _Plan:
    """The measurements of a round."""

    latency: _Latency
    mix: _Throughput
    by_length: tuple[_Throughput, ...]

    @classmethod
    def fitting(cls, workload: Workload, subjects: Sequence[Subject], seconds: float) -> _Plan:
        """As much as the slowest subject does in `seconds` for each measurement; all lengths together count as one."""
        latency = _Latency(workload.queries, _LEAST_CALLS)
        mix = _Throughput(workload.mix, None, _LEAST_MIX)
        by_length = tuple(_Throughput(items, tokens, _LEAST_ITEMS) for tokens, items in workload.by_length.items())
        latency.count = fitting_count(subjects, latency.run, seconds, least=_LEAST_CALLS, most=_MOST_CALLS)
        mix.count = fitting_count(subjects, mix.run, seconds, least=_LEAST_MIX, most=_MOST_ITEMS)
        for block in by_length:
            share = seconds / len(by_length)
            block.count = fitting_count(subjects, block.run, share, least=_LEAST_ITEMS, most=_MOST_ITEMS)
        return cls(latency, mix, by_length)

    def blocks(self) -> dict[str, Block[Subject]]:
        lengths = {f"throughput at {block.tokens} tokens": block for block in self.by_length}
        return {"latency": self.latency, "throughput": self.mix, **lengths}

    def describe(self, workload: Workload, preprocessor: Preprocessor) -> WorkloadInfo:
        reranks = preprocessor.contract.task == "rerank"
        called = [tokens for call in workload.queries for tokens in count_tokens(preprocessor, call, prompt="query")]
        return WorkloadInfo(
            source=workload.source,
            call=f"a query with {DOCUMENTS_PER_QUERY} documents" if reranks else "a single query",
            call_tokens=float(np.mean(called)),
            calls=self.latency.count,
            items=self.mix.count,
            images=sum(map(count_images, islice(cycle(workload.mix), self.mix.count))),
            mix_tokens=float(np.mean(workload.mix_tokens)),
            lengths=tuple(workload.by_length),
        )


def _evaluate(subjects: Sequence[Subject], judgements: Judgements | None, note: Note) -> dict[str, Quality]:
    """Ranking quality by subject; the first is the baseline of the comparisons."""
    if judgements is None:
        return {}
    evalset, evaluations = judgements.evalset, []
    for subject in subjects:
        note(f"ranking {evalset.name} with {subject.name}")
        if isinstance(subject.model, Embedder):
            evaluations.append(evaluate_embedder(subject.model, evalset))
        else:
            assert judgements.candidates is not None
            evaluations.append(evaluate_reranker(subject.model, evalset, judgements.candidates))
    compared = [None, *(compare(evaluations[0], other, evalset) for other in evaluations[1:])]
    return {
        subject.name: Quality(found.evalset, found.queries, found.documents, found.metrics, comparison)
        for subject, found, comparison in zip(subjects, evaluations, compared, strict=True)
    }


def _start_processes(
    subjects: Sequence[Subject], workload: Workload, items: int, rounds: int, threads: int, note: Note
) -> tuple[dict[str, dict[str, list[float]]], dict[str, int | None]]:
    """Cold starts in interleaved rounds; before them one of each that is not timed, for the peak of memory."""
    by_name = {subject.name: subject for subject in subjects}
    mix = list(islice(cycle(workload.mix), items))

    def start(name: str, further: Sequence[Item]) -> coldstart.Start:
        origin = by_name[name].origin
        first = workload.queries[0]
        return coldstart.measure(
            origin.path,
            variant=origin.variant,
            threads=threads,
            device=origin.device,
            first=first,
            further=further,
        )

    peaks = {}
    for name in by_name:
        note(f"memory: {name}")
        # It brings the libraries into the page cache as well: a start after a reboot is another matter.
        peaks[name] = start(name, mix).peak_rss_bytes
    starts: dict[str, list[float]] = {name: [] for name in by_name}
    for turn in range(rounds):
        for name in rotate(list(by_name), turn):
            if name != PYTORCH or turn < _CHECKPOINT_STARTS:
                note(f"cold start {turn + 1} of {rounds}: {name}")
                starts[name].append(start(name, ()).first_result_s)
    return {name: {"cold_start_s": values} for name, values in starts.items()}, peaks
