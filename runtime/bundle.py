"""A bundle on disk: opened read-only, every file that is read compared with its hash."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from rtx.kernels.library import library_file
from rtx.runtime.backends.graphs import GraphEngine, open_graphs
from rtx.runtime.backends.opener import OpenGraph
from rtx.runtime.backends.tensorrt import TensorRtEngine, installed_tensorrt, mismatch
from rtx.runtime.caching import cache_file
from rtx.runtime.engine import gpu_index, is_tensorrt
from rtx.runtime.errors import BundleError, EngineError, UsageError, nearest
from rtx.runtime.golden import Golden
from rtx.runtime.gpu import find_gpu
from rtx.runtime.hashing import sha256_of
from rtx.runtime.image_cache import DEFAULT_CACHE_BYTES
from rtx.runtime.images import ImageLimits
from rtx.runtime.manifest import (
    BUILDABLE,
    GOLDEN_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    EngineEntry,
    Manifest,
    Variant,
)
from rtx.runtime.preprocessor import Preprocessor


class Bundle:
    """What `rtx export` wrote: graphs, tokenizer, contract, golden vectors, report.

    Args:
        path: the folder.
        manifest: its manifest.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read a bundle's manifest; graphs are read when an engine is asked for.

        Raises:
            BundleError: the folder is no bundle, or its manifest is damaged or of another format version.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise BundleError(
                f"{folder}: {'is a file' if folder.exists() else 'does not exist'}; expected a bundle folder"
            )
        try:
            content = (folder / MANIFEST_FILE).read_bytes()
        except FileNotFoundError as missing:
            hint = (
                "it looks like a checkpoint; `rtx export` makes a bundle of it"
                if _is_checkpoint(folder)
                else ("expected a folder that `rtx export` wrote")
            )
            raise BundleError(f"{folder}: has no {MANIFEST_FILE}; {hint}") from missing
        except OSError as broken:
            raise BundleError(f"{folder / MANIFEST_FILE}: cannot be read: {broken.strerror}") from broken
        return cls(folder, Manifest.from_bytes(content, source=str(folder / MANIFEST_FILE)))

    def variant(self, name: str | None = None, *, device: str = "cpu") -> tuple[str, Variant]:
        """A variant and its name; None for the default, which on a GPU is fp16, or else fp32.

        Raises:
            UsageError: there is none of that name; says why, if it was exported and rejected. Or it runs on the CPU
                alone.
        """
        on_gpu = gpu_index(device) is not None
        name = name or (self._default_on_gpu(device) if on_gpu else self._default())
        if name in self.manifest.variants:
            found = self.manifest.variants[name]
            if not on_gpu and not runs_on_cpu(found):
                others = ", ".join(other for other, one in self.manifest.variants.items() if runs_on_cpu(one)) or "none"
                raise UsageError(
                    f"{self.path}: variant '{name}' is in bf16, which ONNX Runtime computes on GPUs alone; "
                    f"these run on a CPU: {others}"
                )
            if is_tensorrt(device):
                if not self.runs(found, device):
                    others = ", ".join(n for n, one in self.manifest.variants.items() if self.runs(one, device))
                    hint = f"these have one: {others}" if others else _no_engines(self.manifest)
                    raise UsageError(f"{self.path}: variant '{name}' has no engine of TensorRT; {hint}")
            elif on_gpu and not runs_on_gpu(found):
                others = ", ".join(other for other, one in self.manifest.variants.items() if runs_on_gpu(one))
                hint = f"these run on a GPU: {others}" if others else "export fp16 or fp32 for one that runs on a GPU"
                raise UsageError(f"{self.path}: variant '{name}' is not for ONNX Runtime on a GPU; {hint}")
            return name, found
        if name in self.manifest.rejected:
            raise UsageError(f"{self.path}: variant '{name}' did not pass the gate: {self.manifest.rejected[name]}")
        raise UsageError(f"{self.path}: has no variant '{name}' ({nearest(name, self.manifest.variants)})")

    def runs(self, variant: Variant, device: str) -> bool:
        """Whether a variant is one for a device; not whether that is there.

        Raises:
            UsageError: there is no such kind of device.
        """
        if gpu_index(device) is None:
            return runs_on_cpu(variant)
        return all(map(self.engines_of, variant.graphs)) if is_tensorrt(device) else runs_on_gpu(variant)

    def engines_of(self, graph: str) -> dict[str, EngineEntry]:
        """The engines that were built of a graph, by file."""
        return {file: entry for file, entry in self.manifest.engines.items() if entry.graph == graph}

    def _default_on_gpu(self, device: str) -> str:
        """What a GPU is fast at: half precision, or else float32."""
        names = [name for name, variant in self.manifest.variants.items() if self.runs(variant, device)]
        order = ("fp16", "bf16", "fp32", "fused")
        return min(names, key=lambda name: order.index(name) if name in order else len(order), default=self._default())

    def _default(self) -> str:
        """The default variant on a CPU; where it does not run there, or its operators were not built, the nearest."""
        variants, name = self.manifest.variants, self.manifest.default_variant
        if runs_on_cpu(variants[name]) and (not variants[name].operators or library_file() is not None):
            return name
        others = [other for other, one in variants.items() if runs_on_cpu(one) and not one.operators]
        same = [other for other in others if variants[other].precision == variants[name].precision]
        return next(iter([*same, *others]), name)

    def preprocessor(self, *, limits: ImageLimits | None = None, verify: bool = True) -> Preprocessor:
        """The tokenizer with the contract.

        Args:
            limits: how large images may be, and where they may come from.
            verify: compare the file with the hash in the manifest.

        Raises:
            BundleError: the tokenizer is missing or damaged.
        """
        try:
            content = self.read(TOKENIZER_FILE, verify=verify).decode()
        except UnicodeDecodeError as broken:
            raise BundleError(f"{self.path}: {TOKENIZER_FILE} is no UTF-8: {broken}") from broken
        return Preprocessor(self.manifest.contract, content, limits=limits)

    def golden(self, *, verify: bool = True) -> Golden:
        """The golden set.

        Raises:
            BundleError: it is missing or damaged.
        """
        return Golden.from_bytes(self.read(GOLDEN_FILE, verify=verify))

    def engine(
        self,
        variant: str | None = None,
        *,
        threads: int | None = None,
        device: str = "cpu",
        verify: bool = True,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> GraphEngine:
        """Load a variant: its graphs, or on "tensorrt" their engines.

        Args:
            variant: its name; None for the default.
            threads: of one run; None for the cores that this process may use.
            device: as for `Session.open`.
            verify: compare the files with the hashes in the manifest.
            cache_bytes: what is made of images and kept may take; 0 keeps none.

        Raises:
            UsageError: there is no such variant, or it does not run on such a device.
            BundleError: its file is missing or damaged.
            MissingExtraError: onnxruntime is not installed, or not the one that the device needs.
            EngineError: it cannot be loaded, or the device cannot be used.
        """
        name, chosen = self.variant(variant, device=device)
        if is_tensorrt(device):
            return open_graphs(
                self.manifest.contract,
                *map(Path, chosen.graphs),
                device=device,
                name=f"{self.path.name}:{name}",
                cache_bytes=cache_bytes,
                open_graph=self._opener(device, verify=verify),
            )
        graphs: list[bytes | Path]
        if chosen.external:
            # Weights beside the graph are found by its path, so it cannot be handed over as bytes.
            for file in (*chosen.graphs, *chosen.external):
                if verify and (problem := self.check(file)):
                    raise BundleError(f"{self.path}: {problem}")
            graphs = [self.path / file for file in chosen.graphs]
        else:
            graphs = [self.read(file, verify=verify) for file in chosen.graphs]
        name = f"{self.path.name}:{name}"
        return open_graphs(
            self.manifest.contract,
            *graphs,
            threads=threads,
            device=device,
            name=name,
            packed=chosen.operators,  # the operators of rtx are those of the packed graph
            cache_bytes=cache_bytes,
        )

    def _opener(self, device: str, *, verify: bool) -> OpenGraph:
        """Opens the engine of a graph that fits this machine."""
        gpu = find_gpu(gpu_index(device) or 0)

        def open_graph(graph: Path, *, output: str, name: str, **_: object) -> TensorRtEngine:
            engines, problems = self.engines_of(graph.as_posix()), []
            for file, entry in engines.items():
                if (problem := mismatch(entry, installed_tensorrt(entry.target), {gpu.capability})) is None:
                    kernels = cache_file("kernels", self.manifest.files[file].sha256[:16], gpu.name)
                    content = self.read(file, verify=verify)
                    return TensorRtEngine(content, entry, output=output, gpu=gpu, name=name, kernels=kernels)
                problems.append(f"{file}: {problem}")
            reasons = "; ".join(problems)
            raise EngineError(f"{name}: no engine can run on {device}: {reasons}. `rtx build --target` builds others")

        return open_graph

    def read(self, file: str, *, verify: bool = True) -> bytes:
        """A file's content.

        Raises:
            BundleError: it is missing, or is not the one that was written.
        """
        entry = self.manifest.files[file]
        try:
            content = (self.path / file).read_bytes()
        except OSError as broken:
            raise BundleError(f"{self.path}: {file} cannot be read: {broken.strerror}") from broken
        if verify and (len(content) != entry.bytes or hashlib.sha256(content).hexdigest() != entry.sha256):
            raise BundleError(f"{self.path}: {file} was changed after it was written (its hash does not fit)")
        return content

    def check(self, file: str) -> str | None:
        """Compare a file with its hash without holding it in memory: None, or what is wrong with it."""
        entry = self.manifest.files[file]
        try:
            if (size := (self.path / file).stat().st_size) != entry.bytes:
                return f"{file} has {size} bytes instead of {entry.bytes}"
            digest = sha256_of(self.path / file)
        except OSError as broken:
            return f"{file} cannot be read: {broken.strerror}"
        return None if digest == entry.sha256 else f"{file} was changed after it was written (its hash does not fit)"

    def damaged(self) -> dict[str, str]:
        """The files that are missing or changed, and what is wrong with each."""
        return {file: problem for file in sorted(self.manifest.files) if (problem := self.check(file))}

    def unlisted(self) -> list[str]:
        """The files of the folder that do not belong to the bundle."""
        known = {*self.manifest.files, MANIFEST_FILE}
        files = (path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if not path.is_dir())
        return sorted(file for file in files if file not in known)


def _no_engines(manifest: Manifest) -> str:
    """What brings engines of TensorRT to a bundle that has none."""
    if found := [name for name in manifest.variants if name in BUILDABLE]:
        return f"`rtx build --target` builds them of {', '.join(found)}"
    return "export fp16 too, with --target"


def runs_on_gpu(variant: Variant) -> bool:
    """Whether all of a variant can run on a GPU: in 8 and 4 bits it has operators that are of the CPU alone."""
    return not variant.operators and {variant.precision, variant.image_precision} <= {"fp32", "fp16", "bf16", None}


def runs_on_cpu(variant: Variant) -> bool:
    """Whether ONNX Runtime has all of a variant's operators on the CPU: in bf16 it has them on GPUs alone."""
    return "bf16" not in (variant.precision, variant.image_precision)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "modules.json").exists() or (folder / "config.json").exists()
