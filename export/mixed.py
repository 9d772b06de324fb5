"""Mixed precision: where an int8 variant loses too much, the layers that cost most stay as they are.

    units       layers that read the same (query, key and value), and the word embeddings
    rank        the error of the graph in which one unit alone is int8, a unit at a time
    least_kept  the 1, 2, 4, ... most sensitive units kept until the gate passes, then as few as it passes with

What is kept is float32, and half precision in the static variant.

Errors of units add up: on MiniLM to 2.3e-3 of mean cosine, where the graph with all in int8 has 2.2e-3. The other way
round, all in int8 but for one unit, the error of that unit is lost among the others': the twelve best by it have 17.6M
weights, the word embeddings among them, and leave 3.1e-4; by the error of each alone, 6.3M weights leave 3.0e-4.
By error for each weight the sets hardly differ.

The graphs are those of `rtx.export.int8` for the packed variant too: it has the same layers and the same arithmetic.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from rtx.export.derive import derive, write_variant
from rtx.export.gate import Gate, Verdict
from rtx.export.graph import module_of, strip_notes
from rtx.export.graphs import Graphs
from rtx.export.int8 import quantizable
from rtx.export.int8_static import insert_pairs
from rtx.export.variants import Form, VariantName, files_of, form_of, kept_in
from rtx.runtime.backends.graphs import open_graphs
from rtx.runtime.engine import Budget, run_items
from rtx.runtime.errors import EngineError, ExportError
from rtx.runtime.golden import deviation
from rtx.runtime.manifest import Precision

MOST_MEASURED = 40
"""Graphs that are made and run to find out what units cost: each takes as long as to open the model."""

# Enough to tell which layers cost most; the gate runs all of them.
_ITEMS = 16
_LONGEST_ITEM = 128
_TRIAL = "onnx/trial.onnx"

Unit = tuple[str, ...]
"""Modules that are kept together."""


@dataclass(frozen=True)
class Mixed:
    """How a variant came to pass.

    Attributes:
        kept: modules whose weights are not int8, as `RetrievalModel.named_modules` calls them.
        precision: of these.
        layers: how many modules could be int8, these included.
        without: the verdict on the variant with all of them in int8.
    """

    kept: tuple[str, ...]
    precision: Precision
    layers: int
    without: Verdict

    def to_dict(self) -> dict[str, Any]:
        """As report.json holds it."""
        kept = {"kept": list(self.kept), "precision": self.precision, "layers": self.layers}
        return {**kept, "without": self.without.to_dict()}


class Mixer:
    """Finds what to keep, for the variants of one export.

    Args:
        gate: that they have to pass.
        plain: what they are derived from; only layers of what has tokens are kept.
        folder: of the bundle; holds the plain graphs.
        threads: of ONNX Runtime.
        judge: writes a variant with these modules kept and holds it against the gate.
        notify: told what is going on, a sentence at a time.
    """

    def __init__(
        self,
        gate: Gate,
        plain: Graphs,
        folder: Path,
        *,
        threads: int | None,
        judge: Callable[[VariantName, Collection[str]], Verdict],
        notify: Callable[[str], None],
    ) -> None:
        self._gate, self._plain, self._folder = gate, plain, folder
        self._threads, self._judge, self._notify = threads, judge, notify
        self._ranked: dict[Form, list[Unit]] = {}
        self._first = 1  # what came of one variant is likely to be right for the next

    def mix(self, name: VariantName, without: Verdict) -> tuple[Verdict, Mixed | None]:
        """Try to make a variant pass that has failed on quality.

        Args:
            name: of the variant, whose files are overwritten.
            without: the verdict on it with all layers in int8.

        Returns:
            The verdict on what now lies in the folder, with how it came to that; or, where nothing helps, the first
            verdict with one more sentence, and None.
        """
        try:
            ranked = self._ranking(name, without)
        except (ExportError, EngineError) as broken:
            return _failed(without, f"which layers cost most cannot be measured: {broken}"), None
        verdicts: dict[int, Verdict] = {}

        def passes(count: int) -> bool:
            self._notify(f"{name}: judging with {count} of {len(ranked)} groups of layers in {kept_in(name)}")
            verdicts[count] = self._judge(name, _modules(ranked[:count]))
            return verdicts[count].passed

        most = len(ranked) // 2
        count = least_kept(most, passes, self._first)
        if count is None:
            self._first = most
            last = f": {'; '.join(verdicts[most].failures)}" if most in verdicts else ""
            reason = f"half of the layers in {kept_in(name)}, where int8 gains nothing any more, do not mend that{last}"
            return _failed(without, reason), None
        self._first, kept = count, _modules(ranked[:count])
        if count != next(reversed(verdicts)):
            write_variant(name, self._plain, self._folder, kept)
        return verdicts[count], Mixed(kept, kept_in(name), len(_modules(ranked)), without)

    def _ranking(self, name: VariantName, without: Verdict) -> list[Unit]:
        """All units, the most sensitive first; measured once for each way to quantise them."""
        form = form_of(name)
        if form not in self._ranked:
            units = units_of(self._plain.tokens.graph, embeddings=form != "int8-static")
            self._notify(f"{name}: measuring which of {len(units)} groups of layers cost most")
            places = self._places(without)
            try:
                self._ranked[form] = rank(units, lambda modules: self._error(form, modules, places))
            finally:
                (self._folder / _TRIAL).unlink(missing_ok=True)
        return self._ranked[form]

    def _places(self, without: Verdict) -> list[int]:
        """Some golden items, short ones, and the one that came out worst."""
        tokens = self._gate.golden.tokens
        short = [place for place, item in enumerate(tokens) if item.length <= _LONGEST_ITEM] or [*range(len(tokens))]
        chosen = short[:: math.ceil(len(short) / _ITEMS)]
        worst = [] if without.parity is None else [without.parity.worst]
        return sorted({*chosen, *worst})

    def _error(self, form: Form, modules: Collection[str], places: Sequence[int]) -> float:
        """1 - mean cosine to PyTorch (or relative error of scores) where these modules alone are int8."""
        others = set(_modules(units_of(self._plain.tokens.graph))).difference(modules)
        if form == "int8-static":  # half precision would be a copy of all weights, and is the same for all
            graph = self._plain.tokens.clone()
            insert_pairs(graph, self._plain.scales, others)
        else:
            graph = derive(form, self._plain.tokens, others)
        strip_notes(graph)
        # Large weights lie beside the plain graph, in the same folder: what is in float32 stays there.
        ir.save(graph, self._folder / _TRIAL)
        image = files_of("fp32", images=self._plain.image is not None).image
        golden, preprocessor = self._gate.golden, self._gate.preprocessor
        engine = open_graphs(
            preprocessor.contract,
            self._folder / _TRIAL,
            None if image is None else self._folder / image,
            threads=self._threads,
            name="trial",
            cache_bytes=0,
        )
        with contextlib.closing(engine):
            outputs = run_items(engine, preprocessor, [golden.tokens[place] for place in places], Budget())
        found = 1.0 - deviation(outputs, golden.outputs[np.asarray(places)]).mean_cosine
        return found if math.isfinite(found) else math.inf


def fails_on_quality(verdict: Verdict) -> bool:
    """Whether a variant ran, gave the same in every batch, and was not close enough to PyTorch."""
    known = verdict.invariance is not None and verdict.invariance.within(verdict.limits.invariance)
    return known and not verdict.passed


def units_of(graph: ir.Graph, *, embeddings: bool = True) -> list[Unit]:
    """The units of a plain graph, in its order, with or without the word embeddings."""
    units: dict[ir.Value | None, list[str]] = {}
    seen: set[str] = set()
    for node, weight in quantizable(graph):
        if node.op_type == "Gather" and not embeddings:
            continue
        # A module that is used several times, as DeBERTa's are for positions, belongs where it is used first.
        if (module := module_of(node)) not in seen:
            seen.add(module)
            units.setdefault(weight if node.op_type == "Gather" else node.inputs[0], []).append(module)
    return [tuple(modules) for modules in units.values()]


def rank(units: Sequence[Unit], error: Callable[[Unit], float], most: int = MOST_MEASURED) -> list[Unit]:
    """Units by what they cost, the dearest first.

    Of more units than may be measured, those of one kind that follow each other are measured together; what costs most
    is halved as long as more may be measured, and each unit bears an equal share of what it was measured in.

    Args:
        units: in the graph's order.
        error: of the graph in which these modules alone are int8.
        most: how often that may be asked, at the least once for each kind of unit.
    """
    errors = {group: error(_modules(group)) for group in _groups(units, most)}
    for _ in range((most - len(errors)) // 2):
        several = [group for group in errors if len(group) > 1]
        if not several:
            break
        worst = max(several, key=errors.__getitem__)
        del errors[worst]
        middle = len(worst) // 2
        errors |= {half: error(_modules(half)) for half in (worst[:middle], worst[middle:])}
    shares = {unit: total / len(group) for group, total in errors.items() for unit in group}
    return sorted(units, key=lambda unit: -shares[unit])


def _groups(units: Sequence[Unit], most: int) -> list[tuple[Unit, ...]]:
    """Units one by one, or so many of a kind together that half of the measurements are left to look closer."""
    if len(units) <= most:
        return [(unit,) for unit in units]
    kinds: dict[str, list[Unit]] = {}
    for unit in units:
        kinds.setdefault(re.sub(r"\d+", "#", unit[0]), []).append(unit)
    longest = max(map(len, kinds.values()))
    sizes = (size for size in range(2, longest) if sum(-(-len(kin) // size) for kin in kinds.values()) <= most // 2)
    size = next(sizes, longest)
    return [tuple(kin[at : at + size]) for kin in kinds.values() for at in range(0, len(kin), size)]


def least_kept(most: int, passes: Callable[[int], bool], first: int = 1) -> int | None:
    """The least count from 1 to `most` that passes, or None; whatever is above one that passes is taken to pass too.

    Args:
        most: the greatest that is asked for.
        passes: whether a count does; asked once for each.
        first: where to begin; of a guess that passes, the next lower one is asked for.
    """
    failed, count = 0, min(first, most)
    while count > failed and not passes(count):
        failed, count = count, min(2 * count, most)
    if count == failed:
        return None
    while count - failed > 1:
        middle = count - 1 if count == first else (failed + count) // 2
        failed, count = (failed, middle) if passes(middle) else (middle, count)
    return count


def in_words(modules: Sequence[str]) -> str:
    """Names of modules; of those that follow each other in one, its name once."""
    parents = itertools.groupby(modules, key=lambda name: name.rpartition(".")[0])
    parts = ((parent, [name.rpartition(".")[2] for name in names]) for parent, names in parents)
    joined = ((parent, names[0] if len(names) == 1 else f"{{{', '.join(names)}}}") for parent, names in parts)
    return ", ".join(f"{parent}.{names}" if parent else names for parent, names in joined)


def _modules(units: Sequence[Unit]) -> tuple[str, ...]:
    return tuple(itertools.chain.from_iterable(units))


def _failed(verdict: Verdict, reason: str) -> Verdict:
    return dataclasses.replace(verdict, failures=(*verdict.failures, reason))
