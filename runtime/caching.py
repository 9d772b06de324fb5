"""Files that may be thrown away: what was compiled or timed for a GPU, kept from one start to the next."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from rtx.runtime.atomic import atomic_file
from rtx.runtime.errors import ArtifactError


def cache_file(*parts: str) -> Path:
    """Where something is kept: in the folder that `RTX_CACHE` names, or else rtx of `XDG_CACHE_HOME`, or ~/.cache/rtx.

    Args:
        parts: what tells it from all else, such as a version and the name of a GPU.
    """
    if named := os.environ.get("RTX_CACHE"):
        folder = Path(named)
    elif home := os.environ.get("XDG_CACHE_HOME"):
        folder = Path(home) / "rtx"
    else:
        try:
            folder = Path.home() / ".cache" / "rtx"
        except RuntimeError:  # a container's user without a home: what can be neither read nor written
            folder = Path(os.devnull)
    return folder / "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", part) for part in parts)


def read_cache(file: Path) -> bytes:
    """What is kept; nothing where that cannot be read."""
    with suppress(OSError):
        return file.read_bytes()
    return b""


def write_cache(file: Path, content: bytes) -> str | None:
    """Keep something; why that cannot be, or None. Processes that write at once leave the file of one of them."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as stream:
            stream.write(content)
    except (OSError, ArtifactError) as broken:
        return str(broken)
    return None
