"""`rtx embed` on images, PDFs and folders of them, by a tiny Qwen3-VL."""

from __future__ import annotations

import base64
import io
import json
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image

from rtx.runtime import bulk
from rtx.runtime.cli import main, open_model
from rtx.runtime.commands import opening
from rtx.runtime.embedder import Embedder
from rtx.runtime.inputs import Inputs, Page
from rtx.runtime.pdf import PdfPages
from rtx.runtime.records import Record

TINY = runpy.run_path(str(Path(__file__).parents[1] / "vision_models.py"))


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(once: Callable[..., Path]) -> Path:
    return once("embed-pages", TINY["write_tiny_qwen3_vl"])


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Iterator[Embedder]:
    with open_model(checkpoint) as opened:
        assert isinstance(opened, Embedder)
        yield opened


@pytest.fixture
def loaded(model: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening takes most of the time of a test that does not look at it."""
    monkeypatch.setattr(opening, "open_model", lambda *_, **__: Embedder(model.preprocessor, model.engine))


def invoke(checkpoint: Path, *arguments: str) -> Result:
    result = CliRunner().invoke(main, ["embed", str(checkpoint), *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def page(number: int, size: tuple[int, int] = (64, 96)) -> Image.Image:
    """A page that shows its number: a dark bar in a place of its own."""
    pixels = np.full((size[1], size[0], 3), 255, dtype=np.uint8)
    pixels[8 * number : 8 * number + 24, :, number % 3] = 0
    return Image.fromarray(pixels)


def write_pdf(path: str, *numbers: int, **options: Any) -> None:
    first, *others = (page(number) for number in numbers)
    first.save(path, "PDF", save_all=True, append_images=others, **options)


def scans() -> None:
    """Images and PDFs in folders, with some that cannot be used and some that are neither."""
    for folder in ("scans/b", "scans/.hidden"):
        Path(folder).mkdir(parents=True)
    for number, name in enumerate(("a.png", "b/1.jpg", "b.png", ".hidden/x.png", "b/.x.png")):
        page(number).save(f"scans/{name}")
    write_pdf("scans/b/two.pdf", 3, 4)
    Path("scans/b/cut.PNG").write_bytes(Path("scans/a.png").read_bytes()[:60])
    Path("scans/c.pdf").write_bytes(encrypted())
    Path("scans/notes.txt").write_text("neither\n")


def encrypted() -> bytes:
    standard = "<</Filter/Standard/V 1/R 2/P -4/O<" + "00" * 32 + ">/U<" + "00" * 32 + ">>>"
    return (
        "%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
        "3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>endobj\n"
        f"4 0 obj{standard}endobj\ntrailer<</Root 1 0 R/Size 5/Encrypt 4 0 R/ID[<00><00>]>>\n"
    ).encode()


def ids(output: str = "out.npy") -> list[str | int]:
    return [json.loads(line)["id"] for line in Path(f"{output}.ids.jsonl").read_text().splitlines()]


def errors(output: str = "out.npy") -> dict[str, str]:
    lines = map(json.loads, Path(f"{output}.errors.jsonl").read_text().splitlines())
    return {line["where"]: line["error"] for line in lines}


def same(vectors: NDArray[Any], expected: NDArray[Any]) -> None:
    """Equal but for what another batch changes."""
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=2e-6)


def write_jsonl(path: str, rows: Sequence[object]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder_is_its_images_and_the_pages_of_its_pdfs(checkpoint: Path, model: Embedder) -> None:
    scans()
    result = invoke(checkpoint, "scans", "-o", "out.npy", "--prompt", "query", "--dpi", "72")
    assert result.exit_code == 4
    assert ids() == ["a.png", "b/1.jpg", "b/two.pdf#1", "b/two.pdf#2", "b.png"]
    pages = PdfPages("scans/b/two.pdf", dpi=72)
    items = [Path("scans/a.png"), Path("scans/b/1.jpg"), pages[0], pages[1], Path("scans/b.png")]
    same(np.load("out.npy"), model.embed(items, prompt="query"))
    # Different pages, seen as such.
    assert len(np.unique(np.load("out.npy").round(4), axis=0)) == 5
    found = errors()
    assert found["scans/c.pdf"] == "encrypted; expected its password"
    assert found["scans/b/cut.PNG"].startswith("a PNG image that is truncated, damaged or of an unknown kind (")
    assert list(found) == ["scans/b/cut.PNG", "scans/c.pdf"]
    assert result.stderr.splitlines()[:3] == [
        "scans: 1 files that are neither images nor PDFs are left aside",
        "out.npy: 5 vectors of 32 float32; ids in out.npy.ids.jsonl",
        "2 records have no vector; all are listed in out.npy.errors.jsonl:",
    ]


@pytest.mark.usefixtures("loaded")
def test_several_inputs_of_every_kind(checkpoint: Path, model: Embedder) -> None:
    scans()
    write_jsonl("texts.jsonl", [{"text": "the valve"}, {"id": "own", "text": "the pump", "image": "scans/a.png"}])
    sources = ["scans/a.png", "texts.jsonl", "./scans/b/two.pdf", "scans/b/"]
    assert invoke(checkpoint, *sources, "-o", "out.parquet").exit_code == 4
    table = pq.read_table("out.parquet")
    assert table["id"].to_pylist() == [
        "scans/a.png",
        "texts.jsonl:1",
        "own",
        "scans/b/two.pdf#1",
        "scans/b/two.pdf#2",
        "scans/b/1.jpg",
        "scans/b/two.pdf#1",
        "scans/b/two.pdf#2",
    ]
    pages = list(PdfPages("scans/b/two.pdf"))
    both = {"text": "the pump", "image": "scans/a.png"}
    items = [Path("scans/a.png"), "the valve", both, *pages, Path("scans/b/1.jpg"), *pages]
    same(np.array(table["embedding"].to_pylist()), model.embed(items))
    assert json.loads(table.schema.metadata[b"rtx"])["checkpoint"] == str(checkpoint)


@pytest.mark.usefixtures("loaded")
def test_images_of_records(checkpoint: Path, model: Embedder) -> None:
    Path("data/pages").mkdir(parents=True)
    for number in range(3):
        page(number).save(f"data/pages/{number}.png")
    url = f"data:image/png;base64,{base64.b64encode(Path('data/pages/2.png').read_bytes()).decode()}"
    rows: list[dict[str, Any]] = [
        {"image": "pages/0.png"},
        {"image": ["pages/0.png", "pages/1.png"], "text": "both"},
        {"image": url, "text": None},
        {"text": "alone", "image": None},
        {"text": ""},
        {"image": "pages/gone.png"},
        {"image": "http://localhost/x.png"},
        {"image": None, "text": None},
        {"text": 5, "image": "pages/0.png"},
        {"title": "neither"},
    ]
    write_jsonl("data/rows.jsonl", rows)
    assert invoke(checkpoint, "data/rows.jsonl", "-o", "out.npy").exit_code == 4
    first, second, third = (f"data/pages/{number}.png" for number in range(3))
    items = [Path(first), {"text": "both", "image": [first, second]}, Path(third), "alone", ""]
    same(np.load("out.npy"), model.embed(items))
    assert ids() == [1, 2, 3, 4, 5]
    assert errors() == {
        "data/rows.jsonl:6": "image: data/pages/gone.png does not exist",
        "data/rows.jsonl:7": "image: URLs are not fetched here, got 'http://localhost/x.png'; "
        "expected a path, a data URL or base64",
        "data/rows.jsonl:8": "image: is empty, and there is no text",
        "data/rows.jsonl:9": "text: expected a text (str), got int",
        "data/rows.jsonl:10": "has no column 'text' (its columns: title)",
    }


@pytest.mark.usefixtures("loaded")
def test_images_of_a_parquet_file(checkpoint: Path, model: Embedder) -> None:
    """As datasets writes them: bytes, and a name that means nothing here. And without a column of texts."""
    contents = []
    for number in range(3):
        buffer = io.BytesIO()
        page(number).save(buffer, "PNG")
        contents.append({"bytes": buffer.getvalue(), "path": f"{number}.png"})
    pq.write_table(pa.table({"scan": contents, "key": ["x", "y", "z"]}), "in.parquet")
    columns = ["--image-column", "scan", "--id-column", "key"]
    assert invoke(checkpoint, "in.parquet", "-o", "out.npy", *columns).exit_code == 0
    assert ids() == ["x", "y", "z"]
    same(np.load("out.npy"), model.embed([page(number) for number in range(3)]))
    result = invoke(checkpoint, "in.parquet", "-o", "other.npy")
    assert (result.exit_code, "in.parquet: has no column 'text'" in result.stderr) == (4, True)


@pytest.mark.usefixtures("loaded")
def test_a_column_is_left_out_by_an_empty_name(checkpoint: Path, model: Embedder) -> None:
    page(1).save("1.png")
    write_jsonl("in.jsonl", [{"text": "the valve", "image": "1.png"}])
    for option, item in (("--image-column", "the valve"), ("--text-column", Path("1.png"))):
        assert invoke(checkpoint, "in.jsonl", "-o", "out.npy", option, "", "--overwrite").exit_code == 0
        same(np.load("out.npy"), model.embed([item]))
    both = ["--image-column", "", "--text-column", ""]
    result = invoke(checkpoint, "in.jsonl", "-o", "out.npy", "--overwrite", *both)
    assert (result.exit_code, "text column: expected a name" in result.stderr) == (2, True)


# -- parts ---------------------------------------------------------------------------------------------------------


class Interrupted:
    """Makes the command end, as by Ctrl-C, in its n-th call of the embedder, and counts the items of all calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.items = 0
        self.calls_left = -1
        original = Embedder.embed

        def counted(model: Embedder, items: Sequence[object], **options: Any) -> NDArray[Any]:
            if items:
                if self.calls_left == 0:
                    raise KeyboardInterrupt
                self.calls_left -= 1
                self.items += len(items)
            return original(model, items, **options)

        monkeypatch.setattr(Embedder, "embed", counted)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Interrupted:
    monkeypatch.setattr(bulk, "IMAGES_PER_CALL", 3)
    return Interrupted(monkeypatch)


def many() -> None:
    """Seven items, and one that is none, in three parts of at most three images."""
    scans()
    write_pdf("scans/d.pdf", 5, 6)


@pytest.mark.usefixtures("loaded")
def test_a_stopped_run_goes_on_byte_for_byte(checkpoint: Path, interrupted: Interrupted) -> None:
    many()
    assert invoke(checkpoint, "scans", "-o", "whole.npy").exit_code == 4
    interrupted.items, interrupted.calls_left = 0, 2
    result = invoke(checkpoint, "scans", "-o", "out.npy")
    assert result.exit_code == 130
    assert "finished parts, kept in out.npy.partial: 2\n" in result.stderr
    interrupted.items, interrupted.calls_left = 0, -1
    # What was read is the same wherever it lies.
    shutil.move("scans", "moved")
    assert invoke(checkpoint, "moved", "-o", "out.npy").exit_code == 4
    assert interrupted.items == 2
    assert (
        ids("whole.npy")
        == ids()
        == [*("a.png", "b/1.jpg", "b/two.pdf#1", "b/two.pdf#2", "b.png", "d.pdf#1", "d.pdf#2")]
    )
    for suffix in ("", ".ids.jsonl"):
        assert Path(f"out.npy{suffix}").read_bytes() == Path(f"whole.npy{suffix}").read_bytes()
    assert list(errors().values()) == list(errors("whole.npy").values())


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("changed", ["a.png", "b/two.pdf", "dpi"])
def test_another_page_does_not_go_on_with_the_parts(checkpoint: Path, interrupted: Interrupted, changed: str) -> None:
    many()
    interrupted.calls_left = 2
    assert invoke(checkpoint, "scans", "-o", "out.npy").exit_code == 130
    interrupted.calls_left = -1
    if changed == "dpi":
        result = invoke(checkpoint, "scans", "-o", "out.npy", "--dpi", "100")
        assert (result.exit_code, "(dpi 144 there, 100 here)" in result.stderr) == (2, True)
        return
    if changed == "a.png":
        page(7).save("scans/a.png")
    else:
        write_pdf("scans/b/two.pdf", 3, 7)
    result = invoke(checkpoint, "scans", "-o", "out.npy")
    assert result.exit_code == 4
    assert "the input is not the one that the unfinished run in out.npy.partial has read" in result.stderr


@pytest.mark.usefixtures("loaded")
def test_fail_stops_at_the_first_bad_image(checkpoint: Path) -> None:
    scans()
    result = invoke(checkpoint, "scans", "-o", "out.npy", "--on-invalid", "fail")
    assert result.exit_code == 4
    assert result.stderr.splitlines()[-1] == "error: scans/c.pdf: encrypted; expected its password"
    Path("scans/c.pdf").unlink()
    result = invoke(checkpoint, "scans", "-o", "out.npy", "--on-invalid", "fail")
    assert result.stderr.splitlines()[-1].startswith("error: scans/b/cut.PNG: a PNG image that is truncated")
    assert not Path("out.npy").exists()


@pytest.mark.usefixtures("loaded")
def test_a_bad_image_costs_no_second_run_of_the_others(checkpoint: Path, interrupted: Interrupted) -> None:
    scans()
    assert invoke(checkpoint, "scans/a.png", "scans/b/cut.PNG", "scans/b.png", "-o", "out.npy").exit_code == 4
    assert interrupted.items == 3


# -- memory --------------------------------------------------------------------------------------------------------


def test_pages_are_rendered_when_they_are_needed_and_kept_by_nobody(
    model: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pdf("many.pdf", *range(8), *range(8))
    rendered: list[int] = []
    original = PdfPages.__getitem__

    def counted(self: PdfPages, index: int) -> Image.Image:
        rendered.append(index)
        return original(self, index)

    monkeypatch.setattr(PdfPages, "__getitem__", counted)
    with Inputs(["many.pdf"]) as source:
        records = list(source.records(text_column="text", image_column="image"))
        assert rendered == []
        items = [record.fields["item"] for record in records if isinstance(record, Record)]
        model.embed(items)
    assert sorted(rendered) == list(range(16))
    assert all(isinstance(item, Page) and item._rendered is None for item in items)


def test_few_pdfs_are_open_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        write_pdf(f"{number:02}.pdf", number % 8)
    opened = [0, 0]

    class Counted(PdfPages):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            opened[0] += 1
            opened[1] = max(opened)

        def __del__(self) -> None:
            opened[0] -= 1

    monkeypatch.setattr("rtx.runtime.inputs.PdfPages", Counted)
    with Inputs(["."]) as source:
        records = list(source.records(text_column="text", image_column="image"))
        assert len(records) == 20
        assert opened[1] <= 5
        pages = [record.fields["item"] for record in records if isinstance(record, Record)]
        assert {item.convert("RGB").mode for item in pages} == {"RGB"}
        assert opened[1] <= 5


def test_how_much_is_read() -> None:
    scans()
    write_jsonl("texts.jsonl", [{"text": "a"}])
    with Inputs(["texts.jsonl", "scans", "scans/a.png"]) as source:
        records = source.records(text_column="text", image_column="image")
        seen = [(record.where, source.fraction()) for record in records]
        seen.append(("end", source.fraction()))
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)  # type: ignore[type-var]
    assert dict(seen)["scans/b/two.pdf#2"] == pytest.approx((4 + 0.5) / 8)
    assert fractions[-1] == 1


# -- what cannot work ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nix.png"], 4, "nix.png: cannot be read: No such file or directory"),
        (["1.png", "nix.pdf"], 4, "nix.pdf: cannot be read: No such file or directory"),
        (["empty"], 4, "empty: holds no image and no PDF; other files are given one by one"),
        (["x.docx"], 2, "x.docx: the ending tells no format that can be read"),
        (["-", "-", "--format", "jsonl"], 2, "standard input can be read once; - is there more than once"),
        (["nowhere"], 4, "nowhere: cannot be read: No such file or directory"),
        (["1.png", "1.png"], 2, "1.png: is given more than once"),
        (
            ["https://example.com/1.png"],
            2,
            "https://example.com/1.png: is not fetched here; expected a file, a folder or -",
        ),
        (["1.png", "--dpi", "5"], 2, "5 is not in the range 36<=x<=1200"),
    ],
)
def test_inputs_that_cannot_be_read(checkpoint: Path, arguments: list[str], code: int, message: str) -> None:
    page(1).save("1.png")
    Path("empty").mkdir()
    Path("x.docx").touch()
    result = invoke(checkpoint, *arguments, "-o", "out.npy")
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
    assert not list(Path().glob("out*"))


@pytest.mark.usefixtures("loaded")
def test_a_pdf_without_what_reads_it(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans()
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    result = invoke(checkpoint, "scans", "-o", "out.npy")
    assert result.exit_code == 8
    assert "reading pages of a PDF needs the package 'pypdfium2'" in result.stderr
    assert "pip install 'rtx-retrieval[pdf]'" in result.stderr
    assert invoke(checkpoint, "scans/a.png", "-o", "out.npy").exit_code == 0


@pytest.mark.parametrize("source", ["scans", "scans/a.png", "scans/b/two.pdf", "in.jsonl"])
def test_a_model_of_texts_is_given_no_image(toy_bundle: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted = Interrupted(monkeypatch)
    scans()
    write_jsonl("in.jsonl", [{"image": "scans/a.png"}, {"text": "a"}])
    result = invoke(toy_bundle, source, "-o", "out.npy")
    assert result.exit_code == 2
    assert "takes texts only" in result.stderr
    assert result.stderr.count("\n") == 1
    assert interrupted.items == 0
    assert not list(Path().glob("out*"))


def test_a_model_of_texts_leaves_the_images_of_records_aside(toy_bundle: Path) -> None:
    write_jsonl("in.jsonl", [{"text": "a", "image": "gone.png"}, {"image": "gone.png"}, {"text": "b"}])
    assert invoke(toy_bundle, "in.jsonl", "-o", "out.npy").exit_code == 4
    assert ids() == [1, 3]
    assert errors() == {"in.jsonl:2": "has an image and no text; this model takes texts only"}
    result = invoke(toy_bundle, "in.jsonl", "-o", "out.npy", "--overwrite", "--image-column", "image")
    assert (result.exit_code, "--image-column image; " in result.stderr) == (2, True)


@pytest.mark.usefixtures("loaded")
def test_odd_names_and_records_cost_the_others_nothing(checkpoint: Path) -> None:
    """A link to itself, a data URL that is none, a name that is too long; paths beside the file, whatever the form."""
    Path("folder").mkdir()
    page(1).save("folder/1.png")
    page(2).save("1.png")
    Path("folder/2.png").symlink_to("2.png")
    Path("folder/x").symlink_to("x")
    result = invoke(checkpoint, "folder", "-o", "a.npy")
    assert (result.exit_code, np.load("a.npy").shape[0]) == (4, 1), result.stderr
    assert [json.loads(line)["id"] for line in Path("a.npy.errors.jsonl").read_text().splitlines()] == ["2.png"]
    rows = [
        {"id": "0", "image": "1.png"},
        {"id": "1", "image": "data:image/png;base64,\u00e9"},
        {"id": "2", "image": "a" * 300},
        {"id": "3", "text": {"image": "1.png"}},
    ]
    Path("folder/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = invoke(checkpoint, "folder/rows.jsonl", "--id-column", "id", "-o", "b.npy")
    assert result.exit_code == 4, result.stderr
    assert [json.loads(line)["id"] for line in Path("b.npy.errors.jsonl").read_text().splitlines()] == ["1", "2"]
    vectors = np.load("b.npy")
    np.testing.assert_array_equal(vectors, np.load("a.npy")[[0, 0]])
