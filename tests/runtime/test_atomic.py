from __future__ import annotations

import errno
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest

from rtx.runtime.atomic import atomic_file
from rtx.runtime.errors import ArtifactError


def test_the_file_is_there_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_bytes(b"old")
    with atomic_file(target) as stream:
        stream.write(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_in_the_block_leaves_everything_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(target) as stream:
        _write_and_stop(stream)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def _write_and_stop(stream: BinaryIO) -> None:
    stream.write(b"new")
    raise KeyboardInterrupt


def test_the_unfinished_file_lies_in_the_workspace(tmp_path: Path) -> None:
    workspace = tmp_path / "work"
    workspace.mkdir()
    with atomic_file(tmp_path / "out", workspace=workspace):
        (unfinished,) = workspace.iterdir()
        assert re.fullmatch(rf"out\.{os.getpid()}-\d+\.tmp", unfinished.name)
    assert list(workspace.iterdir()) == []
    assert (tmp_path / "out").read_bytes() == b""


def test_threads_may_write_the_same_file_at_once(tmp_path: Path) -> None:
    contents = [bytes([number]) * 100_000 for number in range(4)]

    def write(content: bytes) -> None:
        for _ in range(20):
            with atomic_file(tmp_path / "out") as stream:
                stream.write(content)

    with ThreadPoolExecutor(len(contents)) as pool:
        list(pool.map(write, contents))
    assert (tmp_path / "out").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(ArtifactError, match=r"out: cannot be written: No space left on device$"),
        atomic_file(tmp_path / "out") as stream,
    ):
        stream.write(b"new")
    assert list(tmp_path.iterdir()) == []
