"""The gate: what a variant has to show before it is written.

    parity       golden outputs against PyTorch in fp32
    invariance   an item alone = in a batch = with more padding
    ranking      NDCG@10 on an evaluation set against PyTorch, where there is one

A check that fails has a sentence that says by how much; a variant with any such sentence is not in the bundle.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtx.export.golden import golden_items, make_golden
from rtx.runtime.candidates import Candidates
from rtx.runtime.contract import Task
from rtx.runtime.embedder import Embedder
from rtx.runtime.engine import Budget, Engine, run_batch, run_items
from rtx.runtime.errors import EngineError, ExportError
from rtx.runtime.evalset import EvalSet
from rtx.runtime.evaluation import Comparison, Evaluation, compare, evaluate_embedder, evaluate_reranker
from rtx.runtime.golden import Deviation, Golden, deviation
from rtx.runtime.items import describe
from rtx.runtime.manifest import Precision, Tolerance
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.reranker import Reranker
from rtx.runtime.text import Batch, Encoded
from rtx.trainer.model import RetrievalModel

MAX_NDCG_DROP = 0.005
"""NDCG@10 that a variant may lose against PyTorch, unless told otherwise."""


@dataclass(frozen=True)
class Limits:
    """What a precision is held to.

    Attributes:
        parity: against PyTorch in fp32.
        invariance: an item in two surroundings.
    """

    parity: Tolerance
    invariance: Tolerance


def limits(precision: Precision, task: Task, magnitude: float) -> Limits:
    """The limits of a precision; absolute ones scale with the outputs' magnitude where that is above 1.

    fp32: sums of some hundred terms in another order differ by about sqrt(terms) * 2**-24 = 1e-6 of the result; a
        network of some dozen layers keeps that below 1e-5. Surroundings change the order of sums likewise.
    fp16: a rounding is 2**-11 = 5e-4 of the value. Rounding errors of independent sign in the two dozen products of a
        deep path add up to about sqrt(24) * 5e-4 = 2.4e-3 of the vector, a cosine of 1 - 3e-6; a fiftyfold of that is
        let pass, since activations differ much in size.
    bf16: a rounding is 2**-8, eight times that of fp16, and 64 times in the cosine.
    int8: 255 steps over a range of some seven standard deviations round by 0.8 % of the standard deviation, both in
        weights and in activations; outliers widen the range of a token several times. Twelve layers at 6 % each give a
        relative error of 0.06 * sqrt(12) = 20 %, a cosine of 0.98, which texts of one or two tokens come near to.
        Rankings are what counts, and the evaluation set measures them. Surroundings change fp32 sums in the last digit,
        which moves a value over the edge of a rounding step now and then, far below the parity limit.
    int4: 15 steps over some five standard deviations of a block of 32 weights round by 10 % of the standard deviation.
        Twelve layers at 10 % each give a relative error of 0.1 * sqrt(12) = 35 %, a cosine of 0.94; short texts come
        down to 0.89 (MiniLM). What is let pass is below that: whether a model bears it, the evaluation set says.
    """
    scale = max(1.0, magnitude)
    if precision == "fp32":
        close = Tolerance(min_cosine=1 - 1e-5, max_abs=1e-5 * scale)
        return Limits(close, close)
    if precision in ("fp16", "bf16"):
        finer = 1 if precision == "fp16" else 8
        parity = 1 - 2e-4 * finer**2 if task == "embed" else 1 - 1e-2 * finer
        return Limits(
            Tolerance(min_cosine=parity, max_abs=2e-2 * finer * scale),
            Tolerance(min_cosine=1 - 1e-4 * finer**2, max_abs=5e-3 * finer * scale),
        )
    if precision == "int4":
        # Nothing depends on the surroundings but the order of fp32 sums, as in fp32.
        parity = 0.85 if task == "embed" else 0.7
        close = Tolerance(min_cosine=1 - 1e-5, max_abs=1e-4 * scale)
        return Limits(Tolerance(min_cosine=parity, max_abs=0.3 * scale), close)
    parity = 0.98 if task == "embed" else 0.9
    return Limits(
        Tolerance(min_cosine=parity, max_abs=0.1 * scale), Tolerance(min_cosine=1 - 1e-3, max_abs=2e-2 * scale)
    )


@dataclass(frozen=True)
class Verdict:
    """What the gate found of a variant.

    Attributes:
        name: of the variant.
        limits: what it was held to.
        parity: golden outputs against PyTorch; None if it could not be run.
        invariance: items in batches and with padding against the same items alone, on the variant itself; None if it
            could not be run.
        ranking: against PyTorch on the evaluation set; None without one, or if it could not be run.
        failures: a sentence each; empty if it passed.
    """

    name: str
    limits: Limits
    parity: Deviation | None
    invariance: Deviation | None
    ranking: Comparison | None
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """As report.json holds it; a number that is not finite is None."""
        return {
            "name": self.name,
            "passed": self.passed,
            "failures": list(self.failures),
            "limits": dataclasses.asdict(self.limits),
            "parity": _plain(self.parity),
            "invariance": _plain(self.invariance),
            "ranking": self.ranking.to_dict() if self.ranking is not None else None,
        }


class Gate:
    """Holds variants against a model in PyTorch, whose side of every comparison is measured here, once.

    Args:
        model: the reference, in float32.
        evalset: where ranking quality is measured; None leaves that check out.
        candidates: for a reranker with an evaluation set, the documents to order, by query id.
        max_ndcg_drop: NDCG@10 that a variant may lose.
        min_cosine: least cosine to PyTorch of a variant that is not fp32; None for its precision's own.

    Raises:
        ExportError: the tokenizer gives no token for any golden item, or PyTorch gives numbers that are not finite.
    """

    def __init__(
        self,
        model: RetrievalModel,
        *,
        evalset: EvalSet | None = None,
        candidates: Candidates | None = None,
        max_ndcg_drop: float = MAX_NDCG_DROP,
        min_cosine: float | None = None,
    ) -> None:
        self.preprocessor = model.preprocessor
        self._evalset = evalset
        self._candidates = candidates
        self.max_ndcg_drop = max_ndcg_drop
        self._min_cosine = min_cosine
        engine = model.engine()
        self.golden: Golden = make_golden(self.preprocessor, engine, *golden_items(model.contract, evalset))
        outputs = zip(self.golden.items, self.golden.outputs, strict=True)
        if bad := [item for item, output in outputs if not np.isfinite(output).all()]:
            raise ExportError(
                f"PyTorch itself gives numbers that are not finite for {len(bad)} of {len(self.golden.items)} golden "
                f"items, first for {describe(bad[0])}; there is nothing to hold a graph against"
            )
        self.reference: Evaluation | None = self._rank(engine) if evalset is not None else None

    def limits(self, precision: Precision) -> Limits:
        """What a variant of this precision is held to."""
        found = limits(precision, self.preprocessor.contract.task, float(np.abs(self.golden.outputs).max()))
        if self._min_cosine is None or precision == "fp32":
            return found
        return dataclasses.replace(found, parity=dataclasses.replace(found.parity, min_cosine=self._min_cosine))

    def judge(self, name: str, precision: Precision, engine: Engine) -> Verdict:
        """Run all checks on a variant."""
        held_to = self.limits(precision)
        ranking = None
        try:
            alone = run_items(engine, self.preprocessor, self.golden.tokens, Budget(max_batch_items=1))
            elsewhere = surroundings(engine, self.preprocessor, self.golden.tokens)
            if self.reference is not None and self._evalset is not None and np.isfinite(alone).all():
                ranking = compare(self.reference, self._rank(engine), self._evalset)
        except EngineError as broken:
            return self.refuse(name, precision, f"cannot be run: {broken}")
        return judge(name, held_to, alone, elsewhere, self.golden, ranking, max_ndcg_drop=self.max_ndcg_drop)

    def refuse(self, name: str, precision: Precision, reason: str) -> Verdict:
        """The verdict on a variant that cannot be checked."""
        return Verdict(name, self.limits(precision), None, None, None, (reason,))

    def _rank(self, engine: Engine) -> Evaluation:
        assert self._evalset is not None
        if self.preprocessor.contract.task == "embed":
            return evaluate_embedder(Embedder(self.preprocessor, engine), self._evalset)
        assert self._candidates is not None
        return evaluate_reranker(Reranker(self.preprocessor, engine), self._evalset, self._candidates)


def judge(
    name: str,
    limits: Limits,
    alone: NDArray[np.float32],
    elsewhere: NDArray[np.float32],
    golden: Golden,
    ranking: Comparison | None = None,
    *,
    max_ndcg_drop: float = MAX_NDCG_DROP,
) -> Verdict:
    """Hold what a variant gave against its limits.

    Args:
        name: of the variant.
        limits: of its precision.
        alone: [items, ...]: its outputs for the golden items, each run alone.
        elsewhere: [surroundings, items, ...]: its outputs for the same items in other surroundings.
        golden: what PyTorch made of them.
        ranking: its rankings on an evaluation set against those of PyTorch.
        max_ndcg_drop: NDCG@10 that it may lose.
    """
    parity = deviation(alone, golden.outputs)
    invariance = deviation(np.concatenate(elsewhere), np.concatenate([alone] * len(elsewhere)))
    failures = []
    if not parity.within(limits.parity):
        failures.append(_failure("differs from PyTorch", parity, limits.parity, golden))
    if not invariance.within(limits.invariance):
        failures.append(_failure("depends on the batch", invariance, limits.invariance, golden))
    if ranking is not None and not ranking.difference >= -max_ndcg_drop:
        failures.append(
            f"loses ranking quality: NDCG@{ranking.k} {ranking.difference:+.4f} against PyTorch "
            f"(95 % interval {ranking.interval[0]:+.4f} to {ranking.interval[1]:+.4f}), allowed is -{max_ndcg_drop:g}"
        )
    return Verdict(name, limits, parity, invariance, ranking, tuple(failures))


def surroundings(engine: Engine, preprocessor: Preprocessor, items: Sequence[Encoded]) -> NDArray[np.float32]:
    """Items in mixed batches in their order, in batches of similar length, and alone with padding.

    Returns:
        [3, len(items), ...] float32.
    """
    mixed = np.empty(preprocessor.contract.output_shape(len(items)), dtype=np.float32)
    # Images that become vectors by themselves run apart from what has tokens.
    for kind in (True, False):
        places = [place for place, item in enumerate(items) if bool(item.ids) == kind]
        for start in range(0, len(places), 4):
            some = places[start : start + 4]
            mixed[some] = run_batch(engine, preprocessor, [items[place] for place in some])
    similar = run_items(engine, preprocessor, items, Budget())
    longest = preprocessor.contract.max_tokens
    padded = [engine.run(_padded(preprocessor, item, min(len(item.ids) + 7, longest))) for item in items]
    return np.stack([mixed, similar, np.concatenate(padded)])


def _padded(preprocessor: Preprocessor, item: Encoded, length: int) -> Batch:
    """The item alone, padded to a length: it is collated beside a longer one, which is then left out."""
    if not item.ids:
        return preprocessor.collate([item])
    filler = Encoded([item.ids[0]] * length, [0] * length, item.prompt_tokens)
    batch = preprocessor.collate([item, filler])
    # The filler has no images: all that there are belong to the item.
    return {name: array[:1] if name in preprocessor.contract.inputs else array for name, array in batch.items()}


def _failure(what: str, found: Deviation, limit: Tolerance, golden: Golden) -> str:
    worst = golden.items[found.worst % len(golden.items)]
    return (
        f"{what}: least cosine {found.min_cosine:.6f} (at least {limit.min_cosine:.6f}), "
        f"largest difference {found.max_abs:.2e} (at most {limit.max_abs:.2e}); worst item: {describe(worst)}"
    )


def _plain(found: Deviation | None) -> dict[str, Any] | None:
    if found is None:
        return None
    # JSON has no NaN.
    return {name: value if math.isfinite(value) else None for name, value in dataclasses.asdict(found).items()}
