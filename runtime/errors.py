"""Every error that rtx raises on purpose.

    RtxError                       exit  1   HTTP 500   the root: catch this one to catch them all
    ├── UsageError                 exit  2   HTTP 400   an option, a configuration key, a name that does not exist
    ├── GateError                  exit  3   HTTP 500   nothing passed the export gate, so nothing was written
    ├── DataError                  exit  4   HTTP 422   a data file or an evaluation set that cannot be used as it is
    │   └── InvalidItemsError      exit  4   HTTP 422   items of a call that cannot be embedded or ranked, all listed
    ├── ArtifactError              exit  5   HTTP 503   something on disk that is missing, damaged or of another version
    │   ├── BundleError            exit  5   HTTP 503   … a bundle
    │   └── CheckpointError        exit  5   HTTP 503   … a checkpoint
    ├── EngineError                exit  6   HTTP 503   a graph that could not be loaded or run
    ├── TrainingError              exit  7   HTTP 500   a training run that cannot go on
    ├── MissingExtraError          exit  8   HTTP 501   an optional dependency that is not installed
    └── ExportError                exit  9   HTTP 500   a model of which no graph can be made

A message names the item, says what was wrong with it and what was expected. `assert` is for our own bugs only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

INTERRUPTED = 130
"""What a shell reports for a command that Ctrl-C ended; a command that says how to go on exits with it."""


class RtxError(Exception):
    """Root of the tree; `exit_code` is what the command line exits with, `http_status` what a server answers."""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500


class UsageError(RtxError):
    exit_code = 2
    http_status = 400


class GateError(RtxError):
    exit_code = 3
    http_status = 500


class DataError(RtxError):
    exit_code = 4
    http_status = 422


@dataclass(frozen=True)
class ItemError:
    """What was wrong with one item of a call: its position, and one sentence with what was expected."""

    index: int
    message: str

    def __str__(self) -> str:
        return f"item {self.index}: {self.message}"


class InvalidItemsError(DataError):
    """Raised before anything is computed; `items` lists every offender, so that one pass mends them all."""

    def __init__(self, items: Sequence[ItemError], total: int) -> None:
        self.items = tuple(items)
        self.total = total
        shown = "\n".join(f"  {item}" for item in self.items[:10])
        more = f"\n  … and {len(self.items) - 10} more" if len(self.items) > 10 else ""
        super().__init__(f"{len(self.items)} of {total} items cannot be used:\n{shown}{more}")

    def __reduce__(self) -> tuple[type[InvalidItemsError], tuple[tuple[ItemError, ...], int]]:
        return type(self), (self.items, self.total)  # an error that cannot be pickled kills a pool of processes


class ArtifactError(RtxError):
    exit_code = 5
    http_status = 503


class BundleError(ArtifactError):
    pass


class CheckpointError(ArtifactError):
    pass


class EngineError(RtxError):
    exit_code = 6
    http_status = 503


class TrainingError(RtxError):
    exit_code = 7
    http_status = 500


class MissingExtraError(RtxError):
    """`extra` is the name of the optional dependency group that brings the missing module."""

    exit_code = 8
    http_status = 501

    def __init__(self, module: str, extra: str, purpose: str) -> None:
        self.module = module
        self.extra = extra
        self.purpose = purpose
        # The two packages of ONNX Runtime own the same files.
        command = ("pip uninstall onnxruntime; " if extra == "gpu" else "") + install_command(extra)
        super().__init__(f"{purpose} needs the package '{module}', which is not installed. Install it with: {command}")

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str, str]]:
        return type(self), (self.module, self.extra, self.purpose)


class ExportError(RtxError):
    exit_code = 9
    http_status = 500


def install_command(extra: str) -> str:
    """The command that brings an extra."""
    return f"pip install 'rtx-retrieval[{extra}]'"


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that names the right spelling: "did you mean 'epochs'? known: batch_size, epochs"."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}known: {', '.join(known) or '(none)'}"
