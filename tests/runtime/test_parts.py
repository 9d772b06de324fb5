from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from rtx.runtime.errors import ArtifactError, UsageError
from rtx.runtime.parts import Part, PartFolder, digest_records
from rtx.runtime.records import BadRecord, Record

RUN = {"variant": "int8", "dimensions": 2}
PART = Part("0" * 64, ("a", 2), (BadRecord(3, "in:3", "is no valid JSON"),))
VECTORS = np.array([[1, 2], [3, 4]], dtype=np.float32)


def test_a_part_comes_back_as_it_was_written(tmp_path: Path) -> None:
    with PartFolder(tmp_path / "out.npy", RUN) as folder:
        assert folder.part(0) is None
        folder.write(0, PART, VECTORS)
    with PartFolder(tmp_path / "out.npy", RUN) as folder:
        assert folder.finished() == 1
        assert folder.part(0) == PART
        np.testing.assert_array_equal(folder.vectors(0), VECTORS)
        folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_parts_is_not_left_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), PartFolder(tmp_path / "out.npy", RUN):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_in_the_folder_stay(tmp_path: Path) -> None:
    with PartFolder(tmp_path / "out.npy", RUN) as folder:
        folder.write(0, PART, VECTORS)
        (folder.path / "notes.md").touch()
        folder.remove()
    assert [file.name for file in (tmp_path / "out.npy.partial").iterdir()] == ["notes.md"]


def test_other_arguments_are_refused_by_name_or_replace_the_parts(tmp_path: Path) -> None:
    with PartFolder(tmp_path / "out.npy", RUN) as folder:
        folder.write(0, PART, VECTORS)
    with pytest.raises(UsageError) as raised:
        PartFolder(tmp_path / "out.npy", {"variant": "fp32", "dimensions": 2, "prompt": "query"})
    assert str(raised.value) == (
        f"{tmp_path / 'out.npy.partial'}: holds an unfinished run with other arguments (prompt None there, "
        "'query' here; variant 'int8' there, 'fp32' here). Repeat those to go on with it, or pass "
        "--overwrite to discard it"
    )
    with PartFolder(tmp_path / "out.npy", RUN) as folder:  # nothing was lost, and no lock was left
        assert folder.finished() == 1
    with PartFolder(tmp_path / "out.npy", {"variant": "fp32"}, overwrite=True) as folder:
        assert folder.finished() == 0


def test_overwrite_keeps_parts_that_fit(tmp_path: Path) -> None:
    (tmp_path / "out.npy").touch()
    with PartFolder(tmp_path / "out.npy", RUN, overwrite=True) as folder:
        folder.write(0, PART, VECTORS)
    with PartFolder(tmp_path / "out.npy", RUN, overwrite=True) as folder:
        assert folder.finished() == 1


def test_an_output_that_exists_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.npy").touch()
    with pytest.raises(UsageError, match=r"out\.npy: exists; pass --overwrite to replace it$"):
        PartFolder(tmp_path / "out.npy", RUN)
    assert [file.name for file in tmp_path.iterdir()] == ["out.npy"]


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    output = tmp_path / "out.npy"
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            folder = PartFolder(output, RUN)
            folder.write(0, PART, VECTORS)
            os.write(tell, b"!")
            signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(ready, 1) == b"!"
        with pytest.raises(
            UsageError, match=r"out\.npy: another rtx process is writing it; wait for it or name another"
        ):
            PartFolder(output, RUN, overwrite=True)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(tell)
    with PartFolder(output, RUN) as folder:
        assert folder.part(0) == PART


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "out.npy.partial").write_text("a file")
    with pytest.raises(ArtifactError, match=r"out\.npy\.partial: cannot be created: File exists"):
        PartFolder(tmp_path / "out.npy", RUN)


def test_the_digest_is_of_ids_and_content_not_of_places() -> None:
    def digest(*records: Record | BadRecord) -> str:
        return digest_records(records)

    one = Record("a", "in:1", {"text": "x"})
    assert digest(one) == digest(Record("a", "moved:9", {"text": "x"}))
    others = [
        (),
        (one, one),
        (Record("b", "in:1", {"text": "x"}),),
        (Record("a", "in:1", {"text": "y"}),),
        (Record("a", "in:1", {"text": "\ud800"}),),
        (Record("a", "in:1", {"text": None}),),
        (Record("a", "in:1", {"text": b"x"}),),
        (BadRecord("a", "in:1", "x"),),
    ]
    assert len({digest(one), *(digest(*records) for records in others)}) == 1 + len(others)


@pytest.mark.parametrize("damage", ["{", "{}", '{"digest": 1, "ids": [1], "failures": []}', ""])
def test_a_damaged_part_is_made_again(tmp_path: Path, damage: str) -> None:
    with PartFolder(tmp_path / "out.npy", RUN) as folder:
        folder.write(0, PART, VECTORS)
        (folder.path / "000000.json").write_text(damage)
        assert folder.part(0) is None
        folder.write(0, PART, VECTORS)
        assert folder.part(0) == PART


def test_a_damaged_record_of_the_run_is_no_run_to_go_on_with(tmp_path: Path) -> None:
    with PartFolder(tmp_path / "out.npy", RUN) as folder:
        folder.write(0, PART, VECTORS)
    (tmp_path / "out.npy.partial" / "run.json").write_text("{")
    with pytest.raises(UsageError, match="pass --overwrite to discard it"):
        PartFolder(tmp_path / "out.npy", RUN)
    with PartFolder(tmp_path / "out.npy", RUN, overwrite=True) as folder:
        assert folder.finished() == 0
