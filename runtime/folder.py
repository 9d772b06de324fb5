"""A folder that is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from rtx.runtime.atomic import FULL, sync
from rtx.runtime.errors import ArtifactError, UsageError


@contextlib.contextmanager
def replace_folder(target: Path, *, marker: str = "config.json") -> Iterator[Path]:
    """Fill a temporary folder beside `target`, and put it in its place when the block ends without an error.

    Args:
        target: what is to be there afterwards. A folder of the same kind is replaced.
        marker: file that a folder of this kind has; a folder that is neither empty nor has it is left alone.

    Raises:
        UsageError: something else is in the way, or this process is in the folder.
        ArtifactError: there is no room for it.
    """
    target = target.absolute()
    if _is_within(target):
        # Whoever is in it would be left in what has no name any more.
        raise UsageError(f"{target}: is the folder that this runs in, and would be replaced; run it from another one")
    if target.exists() and not _may_replace(target, marker):
        raise UsageError(
            f"{target}: is in the way: neither an empty folder nor one with a {marker}; nothing was written"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with ending_by_exception():
        written = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        try:
            yield written
            _share(written)
            for path in (*written.rglob("*"), written):
                sync(path)
            _swap(written, target)
            sync(target.parent)
        except OSError as broken:
            if broken.errno not in FULL:
                raise
            reason = f"cannot be written: {broken.strerror}; nothing was changed there"
            raise ArtifactError(f"{target}: {reason}") from broken
        finally:
            shutil.rmtree(written, ignore_errors=True)


@contextlib.contextmanager
def ending_by_exception() -> Iterator[None]:
    """Let SIGTERM, with which a container is stopped, end the block as Ctrl-C does: what was begun is removed."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # whoever handles it does so
        yield
        return
    signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)  # what a shell reports of it


def _may_replace(target: Path, marker: str) -> bool:
    return target.is_dir() and ((target / marker).is_file() or not any(target.iterdir()))


def _swap(written: Path, target: Path) -> None:
    """A folder cannot be renamed onto one that has files: the old one moves out of the way first."""
    if not target.exists():
        written.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    target.rename(old / target.name)
    try:
        written.rename(target)
    except BaseException:
        # Whatever fails here, Ctrl-C too: what was there is removed only once the new folder is in its place.
        if not target.exists():
            (old / target.name).rename(target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _is_within(target: Path) -> bool:
    """Whether this process is in a folder."""
    try:
        return Path.cwd().is_relative_to(target.resolve())
    except FileNotFoundError:  # it is where nothing is any more
        return False


def _share(folder: Path) -> None:
    """Give everything the rights that a new file has: mkdtemp and safetensors make theirs for the owner alone."""
    # There is no way of reading the mask but setting it.
    mask = os.umask(0o077)
    os.umask(mask)
    for path in (*folder.rglob("*"), folder):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
