"""Engines for a bundle that is there: its graphs passed the gate when it was written, and stay as they are.

    bundle ─► its graphs, by their hashes ─► engines, under names that no manifest has ─► a manifest with them

An engine runs with one version of TensorRT and, of the classic one, on one kind of GPU: this builds for another,
without the checkpoint, PyTorch or a second export. The manifest is replaced last and at once: before that the bundle is
the old one, and after it the new one, whatever ends this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeVar

from rtx.export.engines import EngineOptions, build_engines, engine_file
from rtx.export.variants import Files
from rtx.runtime.atomic import atomic_file
from rtx.runtime.bundle import Bundle
from rtx.runtime.errors import ArtifactError, BundleError, UsageError, nearest
from rtx.runtime.folder import ending_by_exception
from rtx.runtime.manifest import BUILDABLE, MANIFEST_FILE, EngineEntry, FileEntry, Target

T = TypeVar("T")


def build_for(
    path: Path, options: EngineOptions, variants: Sequence[str] = (), *, notify: Callable[[str], None]
) -> dict[str, EngineEntry]:
    """Build engines of a bundle's graphs and put them into it. Those that it has of the same graphs and the same
    TensorRT are replaced, all others stay.

    Args:
        path: of the bundle.
        options: what to build. Without lengths, a graph's buckets are those of an engine that it has, or else of one
            that another has, or else spread over the model's limit.
        variants: whose graphs; none for all that engines are built of.
        notify: told of each graph.

    Returns:
        What is noted of each new engine, by its file.

    Raises:
        BundleError: the folder is no bundle, a file was changed after it was written, or the bundle was changed by
            something else meanwhile.
        UsageError: no engine can be built of a variant, or not for these capabilities or lengths; or another process
            builds for this bundle.
        ExportError: this TensorRT is not there, or does not build one of them.
        ArtifactError: an engine cannot be written.
    """
    Bundle.open(path)  # what is no bundle is not locked
    with _alone(path), ending_by_exception():
        return _build_for(Bundle.open(path), options, variants, notify)


def _build_for(
    bundle: Bundle, options: EngineOptions, variants: Sequence[str], notify: Callable[[str], None]
) -> dict[str, EngineEntry]:
    """As `build_for`, while no other process builds for the bundle."""
    path, manifest = bundle.path, bundle.manifest
    if unknown := [name for name in variants if name not in manifest.variants]:
        raise UsageError(f"{path}: has no variant '{unknown[0]}' ({nearest(unknown[0], manifest.variants)})")
    chosen = {name: one for name, one in manifest.variants.items() if name in (variants or BUILDABLE)}
    if not chosen:
        there = ", ".join(manifest.variants)
        raise UsageError(f"{path}: engines are built of {', '.join(BUILDABLE)}; this bundle has {there}")
    options.check(chosen, manifest.contract.max_tokens)
    files = [Files(one.file, one.image_file) for one in chosen.values()]
    graphs = {graph for one in chosen.values() for graph in one.graphs}
    old = {file: one for file, one in manifest.engines.items() if one.graph in graphs and one.target == options.target}
    # All of it: what is noted as a whole bundle has to be one.
    if problems := [problem for file, problem in bundle.damaged().items() if file not in old]:
        raise BundleError(f"{path}: {'; '.join(problems)}")
    kept = {} if options.lengths else {one.tokens: _ends_of(bundle, one.tokens, options.target) for one in files}
    built: dict[str, EngineEntry] = {}
    entries: dict[str, FileEntry] = {}
    try:
        for entry, content in build_engines(path, files, manifest.contract, options, kept=kept, notify=notify):
            digest = hashlib.sha256(content).hexdigest()
            file = _free_name(bundle, entry, digest)
            built[file], entries[file] = entry, FileEntry(sha256=digest, bytes=len(content))
            _write(path / file, content)
        for file, entry in old.items():
            now = {sm for one in built.values() if one.graph == entry.graph for sm in one.capabilities}
            if lost := sorted({*entry.capabilities} - now):
                notify(f"{file} was also for sm {' '.join(map(str, lost))}, which --sm does not name")
        renewed = dataclasses.replace(
            manifest,
            files={**_without(manifest.files, old), **entries},
            engines={**_without(manifest.engines, old), **built},
        )
        if Bundle.open(path).manifest != manifest:
            raise BundleError(f"{path}: was changed while engines were built for it; they are not put into it")
        with atomic_file(path / MANIFEST_FILE) as stream:
            stream.write(renewed.to_bytes())
    finally:
        # What ended this may have come before the manifest was replaced, or after.
        with contextlib.suppress(BundleError):
            listed = Bundle.open(path).manifest.files
            for file in ({*built} | {*old}) - {*listed}:
                with contextlib.suppress(OSError):  # it is gone, or a folder
                    (path / file).unlink()
    return built


def _ends_of(bundle: Bundle, graph: str, target: Target) -> tuple[int, ...]:
    """Ends of the buckets that engines of a bundle have: of this graph, of this TensorRT, or else of others."""

    def distance(entry: EngineEntry) -> tuple[bool, bool]:
        return entry.graph != graph, entry.target != target

    there = sorted(bundle.manifest.engines.values(), key=distance)
    ends = (tuple(profile["tokens"][2] for profile in one.profiles if "tokens" in profile) for one in there)
    return next(filter(None, ends), ())


def _free_name(bundle: Bundle, entry: EngineEntry, digest: str) -> str:
    """Where an engine is written: nothing else is there, and if it is an engine it is the same."""
    file = engine_file(entry)
    listed = bundle.manifest.files.get(file)
    if (listed is not None and listed.sha256 == digest) or not os.path.lexists(bundle.path / file):
        return file
    place = PurePosixPath(file)
    return str(place.with_name(f"{place.stem}-{digest[:12]}{place.suffix}"))


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as broken:
        raise ArtifactError(f"{path.parent}: cannot be made: {broken.strerror}") from broken
    with atomic_file(path) as stream:
        stream.write(content)


def _without(entries: Mapping[str, T], old: Collection[str]) -> dict[str, T]:
    return {file: entry for file, entry in entries.items() if file not in old}


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Raise UsageError if another process builds for this bundle; where locks are not known, none does."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as taken:
            raise UsageError(f"{path}: another process is building engines for it; wait until it has ended") from taken
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
