"""The models that a benchmark compares: opened, held against the golden outputs, with a clock on each stage."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rtx.runtime.bundle import Bundle
from rtx.runtime.cli import open_model
from rtx.runtime.contract import Contract
from rtx.runtime.embedder import Embedder
from rtx.runtime.engine import Budget, Engine
from rtx.runtime.errors import BundleError, CheckpointError, ItemError, UsageError
from rtx.runtime.golden import Deviation, Golden
from rtx.runtime.manifest import MANIFEST_FILE, TOKENIZER_FILE, Tolerance
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.reranker import Reranker
from rtx.runtime.rounds import Note
from rtx.runtime.stages import StageClock, TimedEngine, TimedPreprocessor
from rtx.runtime.workload import Item

PYTORCH = "PyTorch"

# How near a checkpoint on this machine has to be to the outputs in the bundle to count as the model it was made of.
_SAME_MODEL = Tolerance(min_cosine=0.9999, max_abs=float("inf"))


@dataclass(frozen=True)
class Origin:
    """Where a subject comes from.

    Attributes:
        path: of the bundle or checkpoint, as another process opens it.
        variant: of the bundle; None for a checkpoint.
        precision: of the weights.
        size_bytes: of weights and tokenizer; None where they are not in a folder here.
        device: that it runs on.
    """

    path: str
    variant: str | None
    precision: str
    size_bytes: int | None
    device: str = "cpu"


@dataclass(frozen=True)
class Subject:
    """A model under test.

    Attributes:
        name: the variant's, or "PyTorch".
        origin: where it comes from.
        model: through the same runtime for all.
        clock: what its stages have taken since the last reset.
        deviation: from the golden outputs of the bundle.
    """

    name: str
    origin: Origin
    model: Embedder | Reranker
    clock: StageClock
    deviation: Deviation

    def run(self, items: Sequence[Item], *, prompt: str) -> None:
        if isinstance(self.model, Embedder):
            self.model.embed(items, prompt=prompt)
        else:
            self.model.logits(items)


def open_checkpoint(path: str, bundle: Bundle, *, threads: int, models: ExitStack) -> Subject:
    """The checkpoint that a bundle was made of, on PyTorch.

    Args:
        path: its folder, or its name on the hub.
        bundle: the bundle, whose golden outputs it is held against.
        threads: of one run.
        models: closes what is opened.

    Raises:
        UsageError: it is a bundle.
        CheckpointError: it cannot be opened, or is not the model that the bundle was made of.
        MissingExtraError: torch is not installed.
    """
    if (Path(path) / MANIFEST_FILE).exists():
        raise UsageError(f"{path}: is a bundle; expected the checkpoint that {bundle.path} was made of")
    golden, other = bundle.golden(), f"{path}: is not the model that {bundle.path} was made of"
    model = open_model(path, threads=threads)
    models.enter_context(model)
    if different := _differences(model.contract, bundle.manifest.contract):
        raise CheckpointError(f"{other}: {'; '.join(different)}")
    origin = Origin(path, None, "fp32", checkpoint_bytes(Path(path)))
    subject = _subject(PYTORCH, origin, model.preprocessor, model.engine, golden)
    if (problem := _problem(subject, golden, _SAME_MODEL)) is not None:
        raise CheckpointError(f"{other}: {problem}")
    return subject


def open_variants(
    bundle: Bundle,
    names: Sequence[str],
    *,
    threads: int,
    device: str = "cpu",
    models: ExitStack,
    note: Note = lambda _: None,
) -> list[Subject]:
    """Variants of a bundle, the fp32 ones first.

    Args:
        bundle: the bundle.
        names: of the variants; none for all that run on the device.
        threads: of one run.
        device: as for `Session.open`.
        models: closes what is opened.
        note: told what is checked next.

    Raises:
        UsageError: there is no such variant, or it does not run on the device.
        BundleError: a file is damaged, or variants are out of their tolerance on this machine; all are named.
    """
    golden, manifest = bundle.golden(), bundle.manifest
    every = [name for name, variant in manifest.variants.items() if bundle.runs(variant, device)]
    # Where none runs, the default is asked for: that says why.
    wanted: Sequence[str | None] = names or every or [None]
    chosen = dict.fromkeys(bundle.variant(name, device=device)[0] for name in wanted)
    subjects, problems = [], []
    for name in sorted(chosen, key=lambda name: manifest.variants[name].precision != "fp32"):
        note(f"checking {name} against the golden outputs")
        variant = manifest.variants[name]
        size = sum(manifest.files[file].bytes for file in (*variant.graphs, *variant.external, TOKENIZER_FILE))
        origin = Origin(str(bundle.path), name, variant.precision, size, device)
        # No image is kept: the same ones come round after round, and PyTorch runs them each time.
        engine = bundle.engine(name, threads=threads, device=device, cache_bytes=0)
        subject = _subject(name, origin, bundle.preprocessor(), engine, golden)
        models.enter_context(subject.model)
        if (problem := _problem(subject, golden, variant.tolerance)) is not None:
            problems.append(f"variant '{name}': {problem}")
        subjects.append(subject)
    if problems:
        raise BundleError(f"{bundle.path}: fails on this machine, so nothing was measured: {'; '.join(problems)}")
    return subjects


def _subject(name: str, origin: Origin, preprocessor: Preprocessor, engine: Engine, golden: Golden) -> Subject:
    clock = StageClock()
    timed, watched = TimedPreprocessor(preprocessor, clock), TimedEngine(engine, clock)
    kind, budget = Embedder if preprocessor.contract.task == "embed" else Reranker, Budget.of(origin.device)
    model = kind(timed, watched, budget=budget)
    return Subject(name, origin, model, clock, golden.run(watched, timed, budget))


def _problem(subject: Subject, golden: Golden, tolerance: Tolerance) -> str | None:
    """What is wrong with a subject's tokens or outputs, or None."""
    tokens = golden.tokenize(subject.model.preprocessor)
    pairs = enumerate(zip(tokens, golden.tokens, strict=True))
    different = [index for index, (now, then) in pairs if isinstance(now, ItemError) or not now.same_as(then)]
    if different:
        return f"golden item {different[0]} is tokenised otherwise ({len(different)} of {len(tokens)} are)"
    found = subject.deviation
    if found.within(tolerance):
        return None
    return (
        f"golden item {found.worst} has cosine {found.min_cosine:.6f} (at least {tolerance.min_cosine:.6f} expected), "
        f"largest difference {found.max_abs:.2e} (at most {tolerance.max_abs:.2e} expected)"
    )


def _differences(found: Contract, expected: Contract) -> list[str]:
    theirs, ours = found.to_dict(), expected.to_dict()
    return [f"{name} is {theirs[name]!r} instead of {ours[name]!r}" for name in ours if theirs[name] != ours[name]]


def checkpoint_bytes(folder: Path) -> int | None:
    """Bytes of weights and tokenizer: what a user of the model downloads. None if it is not a folder here."""
    if not folder.is_dir():
        return None
    inside = [path for path in folder.rglob("*") if path.is_file() and not _is_aside(path.relative_to(folder))]
    weights = [path for path in inside if path.suffix == ".safetensors"]
    weights = weights or [path for path in inside if path.match("pytorch_model*.bin")]
    return sum(path.stat().st_size for path in (*weights, *(path for path in inside if path.name == TOKENIZER_FILE)))


def _is_aside(path: Path) -> bool:
    """Whether a file of a checkpoint is another format of the same weights, or a state of its training."""
    return any(
        part in ("onnx", "openvino", "checkpoints") or part.startswith("checkpoint-") for part in path.parts[:-1]
    )
