"""SHA-256 of what lies on disk, without holding it in memory."""

from __future__ import annotations

import hashlib
from pathlib import Path


def sha256_of(path: str | Path, *, without: str | None = None) -> str:
    """Hash of a file's content, or of all files in a folder with their names in it, in hexadecimal.

    Args:
        path: file or folder.
        without: name of subfolders that are left out.

    Raises:
        OSError: it cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file in sorted(item for item in path.rglob("*") if item.is_file()):
        relative = file.relative_to(path)
        if without not in relative.parts[:-1]:
            digest.update(f"{relative.as_posix()} {sha256_of(file)}\n".encode())
    return digest.hexdigest()
