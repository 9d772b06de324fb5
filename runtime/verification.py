"""A bundle against its own record: what `rtx verify` checks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar

import numpy as np

from rtx.runtime.backends.graphs import VISUAL_INPUTS, GraphEngine
from rtx.runtime.bundle import Bundle
from rtx.runtime.contract import Contract
from rtx.runtime.engine import Budget, gpu_index, is_tensorrt
from rtx.runtime.errors import BundleError, EngineError, ItemError, UsageError
from rtx.runtime.golden import Golden
from rtx.runtime.gpu import find_gpu
from rtx.runtime.items import describe
from rtx.runtime.manifest import CONTRACT_KEY, GOLDEN_FILE, MANIFEST_FILE, TOKENIZER_FILE, Tolerance
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.text import Encoded

_SHOWN_CHARS = 60

T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """What one check came to.

    Attributes:
        check: what was checked.
        measured: what was found, in some words.
        problems: a sentence for each thing that is wrong; empty if nothing is.
        skipped: whether it could not be made on this device.
    """

    check: str
    measured: str = ""
    problems: tuple[str, ...] = ()
    skipped: bool = False

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_bundle(
    path: str | os.PathLike[str], *, variant: str | None = None, threads: int | None = None, device: str = "cpu"
) -> list[Finding]:
    """Check files against their hashes, the tokenizer and the graphs against the golden set and the contract.

    What needs a damaged file is not run: a graph with a flipped byte can take the process down.

    Args:
        path: the bundle's folder.
        variant: the one to run; None for all.
        threads: of one run; None for all cores that the process may use.
        device: as for `Session.open`; variants that do not run there are left out.

    Returns:
        What each check came to; a damaged manifest is the only finding, since nothing can be held against it.

    Raises:
        UsageError: there is no such variant, or it does not run on that device.
        MissingExtraError: onnxruntime is not installed, or not the one that the device needs.
        EngineError: there is no such GPU for engines.
    """
    gpu = gpu_index(device)  # before anything is read
    if gpu is not None and is_tensorrt(device):
        find_gpu(gpu)  # what is missing here is no fault of the bundle
    try:
        bundle = Bundle.open(path)
    except BundleError as broken:
        return [Finding("manifest", problems=(str(broken),))]
    manifest, contract = bundle.manifest, bundle.manifest.contract
    names = [name for name, one in manifest.variants.items() if bundle.runs(one, device)]
    if variant is not None:
        names = [bundle.variant(variant, device=device)[0]]
    damaged = bundle.damaged()
    size = sum(entry.bytes for entry in manifest.files.values())
    findings = [
        Finding("manifest", f"format version {manifest.format_version}"),
        Finding("files", f"{len(manifest.files)} files, {size:,} bytes", tuple(damaged.values())),
        Finding("other files", "", tuple(f"{file} is not listed in {MANIFEST_FILE}" for file in bundle.unlisted())),
    ]
    golden, problems = _opened(lambda: bundle.golden(verify=False), damaged, GOLDEN_FILE)
    if golden is not None and (problems := _check_golden(golden, contract)):
        golden = None
    findings.append(Finding("golden set", f"{len(golden.items)} items" if golden else "", problems))
    preprocessor, problems = _opened(lambda: bundle.preprocessor(verify=False), damaged, TOKENIZER_FILE)
    if preprocessor is not None:
        problems = _check_tokens(golden, preprocessor) if golden else ("not checked: there is no golden set",)
    findings.append(Finding("tokenizer", "" if problems else "gives the golden tokens", problems))
    for name in names:
        findings += _check_variant(bundle, name, damaged, golden, preprocessor, threads=threads, device=device)
    left_out = [name for name in manifest.variants if variant is None and name not in names]
    why = "there is no engine of it" if is_tensorrt(device) else f"ONNX Runtime does not run it on {device}"
    findings += [Finding(name, why, skipped=True) for name in left_out]
    return findings


def _check_variant(
    bundle: Bundle,
    name: str,
    damaged: Mapping[str, str],
    golden: Golden | None,
    preprocessor: Preprocessor | None,
    *,
    threads: int | None,
    device: str,
) -> list[Finding]:
    chosen, contract = bundle.manifest.variants[name], bundle.manifest.contract
    engines = [file for graph in chosen.graphs for file in bundle.engines_of(graph)]
    engine, problems = _opened(
        lambda: bundle.engine(name, threads=threads, device=device, verify=False),
        damaged,
        *(engines if is_tensorrt(device) else (*chosen.graphs, *chosen.external)),
    )
    if engine is None:
        return [Finding(f"{name} graph", problems=problems), _not_run(name, "there is no graph")]
    graph = Finding(
        f"{name} graph", f"{', '.join(contract.inputs)} → {contract.output}", _check_graph(engine, contract)
    )
    if not graph.ok:
        outputs = _not_run(name, "the graph does not fit the contract")
    elif golden is None or preprocessor is None:
        outputs = _not_run(name, f"there is no {'golden set' if golden is None else 'tokenizer'}")
    else:
        outputs = _check_outputs(name, engine, golden, preprocessor, Budget.of(device), chosen.tolerance)
    engine.close()
    return [graph, outputs]


def _not_run(name: str, reason: str) -> Finding:
    return Finding(f"{name} outputs", problems=(f"not checked: {reason}",))


def _check_golden(golden: Golden, contract: Contract) -> tuple[str, ...]:
    """Whether the golden set is one of this contract."""
    problems = []
    expected = contract.output_shape(len(golden.items))
    if golden.outputs.shape != expected or not len(golden.items) == len(golden.prompts) == len(golden.tokens):
        problems.append(
            f"expected outputs {list(expected)}, got {list(golden.outputs.shape)} for {len(golden.items)} items, "
            f"{len(golden.prompts)} prompts, {len(golden.tokens)} rows of tokens"
        )
    if not len(golden.items):
        problems.append("is empty")
    elif not np.isfinite(golden.outputs).all():
        problems.append("holds outputs that are not finite")
    if long := [len(item.ids) for item in golden.tokens if len(item.ids) > contract.max_tokens]:
        problems.append(f"holds a row of {max(long)} tokens; the contract's limit is {contract.max_tokens}")
    for prompt in sorted({prompt for prompt in golden.prompts if prompt is not None}):
        try:
            contract.prompt_text(prompt)
        except UsageError as unknown:
            problems.append(str(unknown))
    return tuple(problems)


def _check_tokens(golden: Golden, preprocessor: Preprocessor) -> tuple[str, ...]:
    """Whether the tokenizer makes of the golden items what it made when the bundle was written."""
    found = golden.tokenize(preprocessor)
    pairs = enumerate(zip(found, golden.tokens, strict=True))
    different = [index for index, (now, then) in pairs if isinstance(now, ItemError) or not now.same_as(then)]
    if not different:
        return ()
    first = different[0]
    how = _difference(found[first], golden.tokens[first])
    return (f"{len(different)} of {len(found)} items have other tokens; first {_describe(golden, first)}: {how}",)


def _difference(found: Encoded | ItemError, golden: Encoded) -> str:
    if isinstance(found, ItemError):
        return found.message
    for what, new, old in (("token", found.ids, golden.ids), ("segment", found.type_ids, golden.type_ids)):
        for position, (a, b) in enumerate(zip_longest(new, old)):
            if a != b:
                return f"{what} {position} is {_or_missing(a)}, expected {_or_missing(b)}"
    if [image.digest for image in found.images] != [image.digest for image in golden.images]:
        sizes = [" and ".join("×".join(map(str, i.pixels.shape[:2])) for i in item.images) for item in (found, golden)]
        return f"its images are prepared otherwise (height × width {sizes[0]}, expected {sizes[1]})"
    return f"{found.prompt_tokens} tokens belong to the prompt, expected {golden.prompt_tokens}"


def _or_missing(token: int | None) -> str:
    return "none" if token is None else str(token)


def _check_graph(engine: GraphEngine, contract: Contract) -> tuple[str, ...]:
    """Whether a graph takes what the contract says and holds the same contract."""
    problems = []
    expected_inputs = {*contract.inputs, *(VISUAL_INPUTS if contract.visual is not None else ())}
    if missing := sorted(expected_inputs - set(engine.input_names)):
        problems.append(f"the graph has no input {', '.join(missing)}; the contract names it")
    if unknown := sorted(set(engine.input_names) - expected_inputs):
        problems.append(f"the graph has the input {', '.join(unknown)}; the contract does not name it")
    if CONTRACT_KEY in engine.metadata:
        try:
            within: dict[str, Any] = json.loads(engine.metadata[CONTRACT_KEY])
        except ValueError:
            return (*problems, f"the graph's {CONTRACT_KEY} is no JSON")
        expected = json.loads(json.dumps(contract.to_dict()))
        if different := sorted(key for key in {*expected, *within} if expected.get(key) != within.get(key)):
            problems.append(f"the graph was written for another contract: {', '.join(different)} differ")
    return tuple(problems)


def _check_outputs(
    name: str, engine: GraphEngine, golden: Golden, preprocessor: Preprocessor, budget: Budget, tolerance: Tolerance
) -> Finding:
    """Whether a graph gives the golden outputs as closely as it did when the bundle was written."""
    check = f"{name} outputs"
    try:
        found = golden.run(engine, preprocessor, budget)
    except EngineError as broken:
        return Finding(check, problems=(str(broken),))
    closeness = "cosine" if preprocessor.contract.task == "embed" else "agreement"
    measured = (
        f"least {closeness} {found.min_cosine:.6f} (at least {tolerance.min_cosine:g}), "
        f"largest difference {found.max_abs:.2e} (at most {tolerance.max_abs:.2e})"
    )
    if found.within(tolerance):
        return Finding(check, measured)
    return Finding(check, problems=(f"{measured}; worst is {_describe(golden, found.worst)}",))


def _describe(golden: Golden, index: int) -> str:
    shown = describe(golden.items[index], _SHOWN_CHARS)
    prompt = golden.prompts[index]
    return f"item {index} {shown}" + (f" with prompt '{prompt}'" if prompt is not None else "")


def _opened(open_it: Callable[[], T], damaged: Mapping[str, str], *files: str) -> tuple[T | None, tuple[str, ...]]:
    """What `open_it` gives, which needs `files`, or None and why it cannot be had."""
    if blocked := [file for file in files if file in damaged]:
        return None, (f"not checked: {', '.join(blocked)} is damaged",)
    try:
        return open_it(), ()
    except (BundleError, EngineError) as broken:
        return None, (str(broken),)
