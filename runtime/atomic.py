"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rtx.runtime.errors import ArtifactError, UsageError

# Threads may write to the same path at once.
_NUMBERS = itertools.count()
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
"""No space, a file larger than is allowed, a quota: libraries that write tell of them without the file's name."""


def check_target(path: str | os.PathLike[str], *, source: str | None = None) -> None:
    """Find out before any work is done that a file cannot be written, or must not.

    Args:
        path: of the file.
        source: file that is read meanwhile, and would be lost if it were replaced.

    Raises:
        UsageError: its folder does not exist, it is the source, or something else than a file is there: a rename would
            put a file in the place of /dev/null.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise UsageError(f"{target}: the folder {target.parent} does not exist")
    if target.exists() and not target.is_file():
        raise UsageError(
            f"{target}: is {'a folder' if target.is_dir() else 'no regular file'}; expected a file to write"
        )
    if source is not None and target.exists() and Path(source).exists() and target.samefile(source):
        raise UsageError(f"{target}: is read as the input and would be lost; name another output")


@contextmanager
def atomic_file(path: str | os.PathLike[str], *, workspace: Path | None = None) -> Iterator[BinaryIO]:
    """A new file for writing, which takes the place of `path` when the block ends well and vanishes when it does not.

    A process that is killed in the block leaves `path` as it was, and an unfinished file `<name>.<pid>-<number>.tmp`.

    Args:
        path: the file.
        workspace: folder for the unfinished file, on the same file system; None for the folder of `path`.

    Raises:
        ArtifactError: the file cannot be written.
    """
    target = Path(path)
    temporary = (workspace or target.parent) / f"{target.name}.{os.getpid()}-{next(_NUMBERS)}.tmp"
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
