"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rtx.runtime.errors import ArtifactError


@contextmanager
def atomic_file(path: str | os.PathLike[str], *, workspace: Path | None = None) -> Iterator[BinaryIO]:
    """A new file for writing, which takes the place of `path` when the block ends well and vanishes when it does not.

    A process that is killed in the block leaves `path` as it was, and an unfinished file `<name>.<pid>.tmp`.

    Args:
        path: the file.
        workspace: folder for the unfinished file, on the same file system; None for the folder of `path`.

    Raises:
        ArtifactError: the file cannot be written.
    """
    target = Path(path)
    temporary = (workspace or target.parent) / f"{target.name}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
        sync(target.parent)
    except OSError as broken:
        temporary.unlink(missing_ok=True)
        raise ArtifactError(f"{target}: cannot be written: {broken.strerror or broken}") from broken
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk: a rename is safe from a power cut only after that."""
    if os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
