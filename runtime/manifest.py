"""manifest.json: what is in a bundle, as frozen dataclasses.

The file holds the SHA-256 of its own other content and is written in one canonical form, so that a change of any byte
of it is found, as it is for every file that it lists.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from rtx.runtime.contract import Contract
from rtx.runtime.errors import BundleError
from rtx.runtime.schema import parse

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
GOLDEN_FILE = "golden.npz"
TOKENIZER_FILE = "tokenizer.json"
# Under this key of its metadata a graph holds the contract too, for whoever has the graph alone.
CONTRACT_KEY = "rtx.contract"


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """SHA-256 (hexadecimal) and size of a file of the bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far a variant may be from the golden outputs that PyTorch made.

    Attributes:
        min_cosine: least cosine similarity of a vector to its golden one; 1 - the largest relative error for scores.
        max_abs: largest absolute difference of any output number.
    """

    min_cosine: float
    max_abs: float


Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
Target = Literal["tensorrt-rtx", "tensorrt"]
"""What engines are built with."""
BUILDABLE = ("fp32", "fp16", "bf16", "int8-static", "int4-half")
"""Variants that engines are built of: the others' operators are ONNX Runtime's, or rtx's own for it."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One graph of the bundle.

    Attributes:
        file: path of the graph in the bundle.
        precision: of the linear layers' weights.
        image_file: path of the graph that images go through first or by themselves; None for a model without one.
        image_precision: of that graph's linear layers; None without one.
        tolerance: what it was held to when it was written, and is held to by `rtx verify`.
        external: further files that hold its weights.
        operators: whether it needs the compiled operators of `rtx.kernels.library`.
        kept: modules of the backbone whose weights are in a higher precision, as `RetrievalModel.named_modules` calls
            them, where all of its linear layers in `precision` were too coarse.
        kept_precision: of these.
    """

    file: str
    precision: Precision
    tolerance: Tolerance
    image_file: str | None = None
    image_precision: Precision | None = None
    external: tuple[str, ...] = ()
    operators: bool = False
    kept: tuple[str, ...] = ()
    kept_precision: Precision = "fp32"

    @property
    def graphs(self) -> tuple[str, ...]:
        """Paths of its graphs, without the files that hold weights beside them."""
        return (self.file,) if self.image_file is None else (self.file, self.image_file)


@dataclass(frozen=True, kw_only=True)
class EngineEntry:
    """An engine of TensorRT, built ahead of time. It runs with what it was built for and with nothing else.

    Attributes:
        target: which TensorRT.
        version: of it.
        graph: path of the graph in the bundle that it was built from.
        sources: SHA-256 of that file, and of those that hold its weights.
        capabilities: compute capabilities that it was built for, as 89; none with classic TensorRT, which builds for
            the GPU at hand.
        profiles: of each bucket of sizes, the least, best and largest size of the graph's axes by their names.
        layers: how many there are of each kind and type of what they give, "SOFTMAX FLOAT".
        workspace_bytes: of each profile, what TensorRT planned to compute in when it built the engine; empty where it
            did not say. Weights and a batch's inputs and outputs come on top.
    """

    target: Target
    version: str
    graph: str
    sources: dict[str, str]
    capabilities: tuple[int, ...]
    profiles: tuple[dict[str, tuple[int, ...]], ...]
    layers: dict[str, int]
    workspace_bytes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a bundle comes from.

    Attributes:
        source: name of the checkpoint (the folder's name or hub name, not its path on somebody's machine).
        source_sha256: hash over the checkpoint's files.
        created: UTC time in ISO 8601.
        command: what wrote it.
        versions: of rtx, torch, transformers, onnx, onnxruntime, Python.
    """

    source: str
    source_sha256: str
    created: str
    command: str
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that the runtime needs to know of a bundle before it opens a graph.

    Attributes:
        format_version: of bundles.
        name: of the bundle.
        contract: of the model.
        variants: by name.
        default_variant: the one that is opened where none is named.
        files: all of the bundle but this one.
        provenance: where it comes from.
        rejected: variants that did not pass the gate, and why.
        engines: by file.
    """

    format_version: int
    name: str
    contract: Contract
    variants: dict[str, Variant]
    default_variant: str
    files: dict[str, FileEntry]
    provenance: Provenance
    rejected: dict[str, str] = field(default_factory=dict)
    engines: dict[str, EngineEntry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.default_variant not in self.variants:
            raise ValueError(f"default_variant: '{self.default_variant}' is not one of {', '.join(self.variants)}")
        listed = {file for v in self.variants.values() for file in (*v.graphs, *v.external)}
        if absent := sorted({TOKENIZER_FILE, GOLDEN_FILE, *listed, *self.engines} - set(self.files)):
            raise ValueError(f"files: {', '.join(absent)} missing")
        for file, engine in self.engines.items():
            for source, digest in {engine.graph: "", **engine.sources}.items():
                if source not in self.files or self.files[source].sha256 != digest:
                    raise ValueError(f"engines: {file} was built from another {source}")
        if outside := sorted(file for file in self.files if not _is_inside(file)):
            raise ValueError(f"files: {', '.join(outside)}: expected plain paths inside the bundle")

    def to_bytes(self) -> bytes:
        """The canonical content of manifest.json."""
        body = dataclasses.asdict(self)
        return _canonical({**body, "sha256": hashlib.sha256(_canonical(body)).hexdigest()})

    @classmethod
    def from_bytes(cls, content: bytes, *, source: str = MANIFEST_FILE) -> Manifest:
        """Read manifest.json.

        Args:
            content: of the file.
            source: the file, for messages.

        Raises:
            BundleError: it is no JSON, was changed after it was written, has another format version or lacks keys.
        """
        try:
            data: dict[str, Any] = json.loads(content)
            digest = data.pop("sha256")
            version = data["format_version"]
            body = _canonical(data)
            canonical = _canonical({**data, "sha256": digest})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as broken:
            raise BundleError(f"{source}: is no manifest of rtx ({type(broken).__name__}: {broken})") from broken
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{source}: has format version {version}; this rtx reads version {FORMAT_VERSION}. "
                "Export the checkpoint again, or install the rtx that wrote it"
            )
        if hashlib.sha256(body).hexdigest() != digest or content != canonical:
            raise BundleError(f"{source}: was changed after it was written (its own hash does not fit)")
        return parse(cls, data, source=source, error=BundleError)


def _is_inside(file: str) -> bool:
    path = PurePosixPath(file)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in file


def _canonical(data: object) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
