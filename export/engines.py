"""The engines of a bundle: which graphs are built, for what sizes, and what is noted of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from rtx.export.buckets import check_lengths, fit_lengths, length_ranges, row_range, spread_lengths
from rtx.export.tensorrt import Profile, build_engine, check_capabilities, load_tensorrt
from rtx.export.variants import Files, external_files
from rtx.runtime.backends.visual import MAX_BATCH_IMAGES
from rtx.runtime.contract import Contract
from rtx.runtime.errors import UsageError
from rtx.runtime.hashing import sha256_of
from rtx.runtime.manifest import BUILDABLE, EngineEntry, Target

# Images that become visual tokens together, and how many the engine is tuned for.
_IMAGES = (1, 8, MAX_BATCH_IMAGES)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What engines to build.

    Attributes:
        target: which TensorRT.
        capabilities: compute capabilities, as 89; none for classic TensorRT.
        lengths: ends of buckets, in tokens; empty to find them, on the user's own texts if there are any.
    """

    target: Target
    capabilities: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()

    def check(self, variants: Iterable[str], max_tokens: int) -> None:
        """Before any work is done.

        Raises:
            UsageError: no engine can be built of one of the variants, or not for these capabilities or lengths.
            ExportError: this TensorRT is not there.
        """
        if others := [name for name in variants if name not in BUILDABLE]:
            raise UsageError(
                f"--target {self.target}: engines are built of {', '.join(BUILDABLE)}, not of {', '.join(others)}"
            )
        check_lengths(self.lengths, max_tokens)
        check_capabilities(load_tensorrt(self.target), self.target, self.capabilities)


def build_engines(
    folder: Path,
    files: Iterable[Files],
    contract: Contract,
    options: EngineOptions,
    lengths: Sequence[int] = (),
    *,
    kept: Mapping[str, Sequence[int]] = MappingProxyType({}),
    notify: Callable[[str], None],
) -> Iterator[tuple[EngineEntry, bytes]]:
    """Build an engine of each graph of a bundle.

    Args:
        folder: of the bundle.
        files: the graphs of each variant; of those that several have in common one engine is built.
        contract: of the model.
        options: what to build.
        lengths: tokens of texts as they are served, for buckets that fit them.
        kept: by graph for what has tokens, ends of its buckets in the place of these, if there are any.
        notify: told of each graph.

    Returns:
        What is noted of each engine, and the engine, one after the other.

    Raises:
        ExportError: an engine cannot be built.
    """
    ends, capabilities = _ends(contract, options, lengths), tuple(dict.fromkeys(options.capabilities))
    plan: dict[str, list[Profile]] = {}
    for pair in files:
        plan[pair.tokens] = token_profiles(contract, kept.get(pair.tokens) or ends)
        if pair.image is not None:
            plan[pair.image] = image_profiles(contract)
    for graph, profiles in plan.items():
        notify(f"{graph}: building its engine, {len(profiles)} profile{'s' * (len(profiles) > 1)}")
        built = build_engine(folder / graph, profiles, target=options.target, capabilities=capabilities)
        entry = EngineEntry(
            target=options.target,
            version=built.version,
            graph=graph,
            sources={
                path.relative_to(folder).as_posix(): sha256_of(path)
                for path in (folder / graph, *external_files(folder / graph))
            },
            capabilities=capabilities,
            profiles=tuple(dict(profile) for profile in profiles),
            layers=built.network.layers,
            workspace_bytes=built.workspace_bytes,
        )
        yield entry, built.content


def engine_file(entry: EngineEntry) -> str:
    """Where a bundle has an engine, unless something else is there."""
    return f"engines/{Path(entry.graph).stem}.{entry.target}.engine"


def describe_engine(engine: EngineEntry) -> str:
    """An engine in one line."""
    capabilities = f", sm {' '.join(map(str, engine.capabilities))}" if engine.capabilities else ""
    ends = [str(profile["tokens"][2]) for profile in engine.profiles if "tokens" in profile]
    buckets = f", up to {' '.join(ends)} tokens" if ends else ""
    return f"{engine.target} {engine.version}{capabilities}{buckets}"


def token_profiles(contract: Contract, ends: Sequence[int]) -> list[Profile]:
    """Sizes of what has tokens: one profile for each bucket of lengths."""
    if contract.fixed_tokens:
        return [{"batch": row_range(contract.fixed_tokens)}]
    profiles: list[Profile] = []
    for ranges in length_ranges(ends):
        rows = row_range(ranges[2])
        profiles.append({"batch": rows, "tokens": ranges})
        if contract.visual is not None:  # all tokens of a batch may stand for parts of images, or none
            profiles[-1]["visual_tokens"] = (0, rows[1] * ranges[1], rows[2] * ranges[2])
    return profiles


def image_profiles(contract: Contract) -> list[Profile]:
    """Sizes of images: one profile for each bucket of sizes, where these differ."""
    if contract.visual is None or contract.images is None:
        return [{"images": row_range(max(1, contract.image_tokens))}]
    most = max(1, contract.images.max_pixels // contract.images.factor**2)
    profiles = []
    for ranges in length_ranges(spread_lengths(most)):
        images = min(_IMAGES[2], row_range(ranges[2])[2])
        profiles.append({"images": (1, min(images, _IMAGES[1]), images), "image_tokens": ranges})
    return profiles


def _ends(contract: Contract, options: EngineOptions, lengths: Sequence[int]) -> tuple[int, ...]:
    if options.lengths:
        return check_lengths(options.lengths, contract.max_tokens)
    return fit_lengths(lengths, contract.max_tokens)
