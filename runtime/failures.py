"""The list of the records that an output lacks, beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rtx.runtime.atomic import atomic_file
from rtx.runtime.records import BadRecord


def failures_file(output: Path) -> Path:
    """Where the list is: a line `{"where": ..., "id": ..., "error": ...}` for each."""
    return output.with_name(output.name + ".errors.jsonl")


@contextmanager
def failure_log(output: Path, *, workspace: Path | None = None) -> Iterator[Callable[[BadRecord], None]]:
    """Takes failures one by one; at the end of the block their list is there, or none if there were none.

    Args:
        output: the file that lacks them.
        workspace: as in `atomic_file`.

    Raises:
        ArtifactError: the list cannot be written.
    """
    empty = True
    with atomic_file(failures_file(output), workspace=workspace) as stream:

        def log(failure: BadRecord) -> None:
            nonlocal empty
            empty = False
            line = {"where": failure.where, "id": failure.id, "error": failure.message}
            stream.write(json.dumps(line).encode() + b"\n")

        yield log
    if empty:
        failures_file(output).unlink()
