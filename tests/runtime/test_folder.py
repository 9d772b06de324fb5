"""A folder that is there whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rtx.runtime.errors import ArtifactError, UsageError
from rtx.runtime.folder import replace_folder


def test_a_folder_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with replace_folder(target) as folder:
        (folder / "config.json").write_text("old")
        assert not target.exists()

    def fail_half_way() -> None:
        with replace_folder(target) as folder:
            (folder / "config.json").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert (target / "config.json").read_text() == "old"
    with replace_folder(target) as folder:
        (folder / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_a_folder_is_not_replaced_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "model" / "deep")

    def fill(target: Path) -> None:
        with replace_folder(target) as folder:
            (folder / "config.json").touch()

    with pytest.raises(UsageError, match="is the folder that this runs in"):
        fill(tmp_path / "model")
    (tmp_path / "model" / "deep").rmdir()  # a shell may stand where nothing is any more
    fill(tmp_path / "other")
    assert (tmp_path / "other" / "config.json").exists()


@pytest.mark.parametrize("failure", [OSError("no space"), KeyboardInterrupt()])
def test_a_swap_that_stops_in_the_middle_puts_back_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    target = tmp_path / "model"
    with replace_folder(target) as folder:
        (folder / "config.json").write_text("old")
    rename = Path.rename

    def stop_at_the_new_folder(path: Path, to: Path) -> Path:
        if path.suffix == ".partial":
            raise failure
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", stop_at_the_new_folder)
    with pytest.raises(type(failure)), replace_folder(target) as folder:
        (folder / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_rights_are_those_of_new_files(tmp_path: Path) -> None:
    with replace_folder(tmp_path / "model") as folder:
        (folder / "inner").mkdir(mode=0o700)
        for name in ("config.json", "inner/weights"):
            (folder / name).touch(mode=0o600)
    (tmp_path / "new").mkdir()
    (tmp_path / "new.txt").touch()
    for name in ("model", "model/inner"):
        assert (tmp_path / name).stat().st_mode == (tmp_path / "new").stat().st_mode
    for name in ("model/config.json", "model/inner/weights"):
        assert (tmp_path / name).stat().st_mode == (tmp_path / "new.txt").stat().st_mode


def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with replace_folder(tmp_path / "empty") as folder:
        (folder / "config.json").write_text("new")
    assert (tmp_path / "empty" / "config.json").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name in ("thesis", "file"):
        with pytest.raises(UsageError, match=f"{name}: is in the way"), replace_folder(tmp_path / name):
            pass
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "thesis"]


def test_a_full_disk_is_named_by_what_was_to_be_there(tmp_path: Path) -> None:
    """Libraries that write a part of it do not say which."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("old")

    def fill_the_disk() -> None:
        with replace_folder(tmp_path / "model") as folder:
            (folder / "config.json").write_text("new")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ArtifactError, match=r"/model: cannot be written: No space left on device; nothing was changed"):
        fill_the_disk()
    assert (tmp_path / "model" / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_container_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM is how that begins; by itself it would end the process there and then."""
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from rtx.runtime.folder import replace_folder\n"
        "target = Path(sys.argv[1])\n"
        "with replace_folder(target) as folder:\n"
        "    (folder / 'config.json').write_text('{}')\n"
        "    assert len(list(target.parent.iterdir())) == 1\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    raise AssertionError('goes on')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "x")], capture_output=True, check=False)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert not [*tmp_path.iterdir()]


def test_who_handles_the_signal_goes_on_to(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with replace_folder(tmp_path / "x") as folder:
            (folder / "config.json").write_text("{}")
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]
    assert (tmp_path / "x" / "config.json").exists()
    with replace_folder(tmp_path / "y") as folder:
        (folder / "config.json").write_text("{}")
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before
