"""Files that may be thrown away."""

from __future__ import annotations

from pathlib import Path

import pytest

from rtx.runtime.caching import cache_file, read_cache, write_cache


def test_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RTX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_file("kernels", "ab12", "NVIDIA L4") == Path("/home/someone/.cache/rtx/kernels-ab12-NVIDIA_L4")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_file("timing", "10.9.0", "../a/b") == Path("/caches/rtx/timing-10.9.0-.._a_b")
    monkeypatch.setenv("RTX_CACHE", "/volume")
    assert cache_file("timing") == Path("/volume/timing")


def test_a_user_without_a_home_has_a_cache_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> str:
        raise KeyError("no such user")

    for name in ("HOME", "XDG_CACHE_HOME", "RTX_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", none)
    assert read_cache(cache_file("timing")) == b""
    assert write_cache(cache_file("timing"), b"one") is not None
    monkeypatch.setenv("RTX_CACHE", "/volume")
    assert cache_file("timing") == Path("/volume/timing")


def test_what_cannot_be_read_is_nothing(tmp_path: Path) -> None:
    assert read_cache(tmp_path / "none") == b""
    assert read_cache(tmp_path) == b""


def test_what_cannot_be_written_says_why(tmp_path: Path) -> None:
    assert write_cache(tmp_path / "new" / "file", b"one") is None
    assert write_cache(tmp_path / "new" / "file", b"two") is None
    assert read_cache(tmp_path / "new" / "file") == b"two"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]
    for file in (tmp_path / "new" / "file" / "deeper", tmp_path / "new"):
        problem = write_cache(file, b"")
        assert problem is not None
        assert str(tmp_path / "new") in problem
