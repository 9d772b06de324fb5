"""Engines for a bundle that is there: its graphs passed the gate when it was written, and stay as they are.

    bundle ─► its graphs, by their hashes ─► engines ─► the bundle with these, in the place of the old one

An engine runs with one version of TensorRT and, of the classic one, on one kind of GPU: this builds for another,
without the checkpoint, PyTorch or a second export.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from rtx.export.engines import BUILDABLE, EngineOptions, build_engines, engine_file
from rtx.export.variants import Files
from rtx.runtime.bundle import Bundle
from rtx.runtime.errors import BundleError, UsageError
from rtx.runtime.folder import replace_folder
from rtx.runtime.hashing import sha256_of
from rtx.runtime.manifest import MANIFEST_FILE, EngineEntry, FileEntry, Target


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
        UsageError: no engine can be built of a variant, or not for these capabilities or lengths.
        ExportError: this TensorRT is not there, or does not build one of them.
        ArtifactError: there is no room for them.
    """
    bundle = Bundle.open(path)
    manifest, folder = bundle.manifest, path.resolve()  # what a link leads to is replaced, not the link
    if unknown := [name for name in variants if name not in manifest.variants]:
        bundle.variant(unknown[0])  # says what there is
    chosen = {name: one for name, one in manifest.variants.items() if name in (variants or BUILDABLE)}
    if not chosen:
        there = ", ".join(manifest.variants)
        raise UsageError(f"{path}: engines are built of {', '.join(BUILDABLE)}; this bundle has {there}")
    options.check(chosen, manifest.contract.max_tokens)
    replaced = {engine_file(graph, options.target) for one in chosen.values() for graph in one.graphs}
    # All of it: what is written as a whole bundle has to be one.
    if problems := [problem for file, problem in bundle.damaged().items() if file not in replaced]:
        raise BundleError(f"{path}: {'; '.join(problems)}")

    def check_unchanged() -> None:
        if Bundle.open(folder).manifest != manifest:
            raise BundleError(f"{path}: was changed while engines were built for it; nothing was written")

    with replace_folder(folder, marker=MANIFEST_FILE, check=check_unchanged) as written:
        _link_all(folder, written, {MANIFEST_FILE, *replaced})
        files = [Files(one.file, one.image_file) for one in chosen.values()]
        kept = {} if options.lengths else {one.tokens: _ends_of(bundle, one.tokens, options.target) for one in files}
        built = build_engines(written, files, manifest.contract, options, kept=kept, notify=notify)
        entries = {file: _entry(written / file) for file in built}
        renewed = dataclasses.replace(
            manifest, files={**manifest.files, **entries}, engines={**manifest.engines, **built}
        )
        (written / MANIFEST_FILE).write_bytes(renewed.to_bytes())
    return built


def _ends_of(bundle: Bundle, graph: str, target: Target) -> tuple[int, ...]:
    """Ends of the buckets that engines of a bundle have: of this graph, of this TensorRT, or else of others."""

    def distance(entry: EngineEntry) -> tuple[bool, bool]:
        return entry.graph != graph, entry.target != target

    there = sorted(bundle.manifest.engines.values(), key=distance)
    ends = (tuple(profile["tokens"][2] for profile in one.profiles if "tokens" in profile) for one in there)
    return next(filter(None, ends), ())


def _link_all(source: Path, target: Path, left_out: set[str]) -> None:
    """Everything of a folder in another one, without a copy where the file system can do without."""
    for path in sorted(source.rglob("*")):
        place = path.relative_to(source)
        if place.as_posix() in left_out:
            continue
        if path.is_symlink():
            (target / place).symlink_to(path.readlink())
        elif path.is_dir():
            (target / place).mkdir()
        else:
            try:
                os.link(path, target / place)
            except OSError:
                shutil.copy2(path, target / place)


def _entry(path: Path) -> FileEntry:
    return FileEntry(sha256=sha256_of(path), bytes=path.stat().st_size)
