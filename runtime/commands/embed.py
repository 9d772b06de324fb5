"""`rtx embed`: the texts of a file, or images and pages, to a file of vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from rtx.runtime.bulk import OnInvalid, Totals, embed_records, write_output
from rtx.runtime.bundle import Bundle
from rtx.runtime.commands.opening import batch_option, budget_of, device_option, open_as
from rtx.runtime.commands.progress import Progress
from rtx.runtime.embedder import CODES, Embedder, Precision
from rtx.runtime.engine import Engine
from rtx.runtime.errors import INTERRUPTED, DataError, ItemError, UsageError
from rtx.runtime.failures import failures_file
from rtx.runtime.hashing import sha256_of
from rtx.runtime.inputs import ITEM, Inputs
from rtx.runtime.items import read_item
from rtx.runtime.manifest import MANIFEST_FILE
from rtx.runtime.parts import PartFolder
from rtx.runtime.records import FORMATS, STDIN, Format
from rtx.runtime.text import Batch, Encoded
from rtx.runtime.vectors import check_vector_file, ids_file


@dataclass(frozen=True, kw_only=True)
class _Arguments:
    model: str
    sources: tuple[str, ...]
    output: Path
    variant: str | None
    prompt: str | None
    dimensions: int | None
    precision: Precision
    normalize: bool
    text_column: str
    image_column: str | None
    id_column: str | None
    file_format: Format | None
    dpi: int
    threads: int | None
    device: str
    max_batch_tokens: int | None
    rows_per_part: int
    on_invalid: OnInvalid
    overwrite: bool


@click.command()
@click.argument("model", type=click.Path())
@click.argument("sources", metavar="INPUT...", nargs=-1, required=True, type=click.Path(allow_dash=True))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="OUT.npy or OUT.parquet.")
@click.option("--variant", help="A variant of the bundle.  [default: the bundle's]")
@click.option("--prompt", metavar="NAME", help='Prompt put before each item: "query", "document", ...')
@click.option("--dimensions", type=click.IntRange(min=1), help="Keep the first N dimensions.")
@click.option("--precision", type=click.Choice(["float32", "int8", "binary"]), default="float32", show_default=True)
@click.option("--normalize", is_flag=True, help="Scale vectors to norm 1 where the model does not.")
@click.option("--text-column", default="text", show_default=True, help="'' for none.")
@click.option(
    "--image-column",
    help="A path from the file's own folder, a data URL, bytes, or a list of these; '' for none.  "
    "[default: image, if the model takes images]",
)
@click.option("--id-column", help="[default: id or _id where there is one, otherwise the line or row number]")
@click.option("--format", "file_format", type=click.Choice(FORMATS), help="[default: by the ending of INPUT]")
@click.option("--dpi", type=click.IntRange(36, 1200), default=144, show_default=True, help="Of the pages of a PDF.")
@click.option("--threads", type=click.IntRange(min=1), help="[default: all cores]")
@device_option
@batch_option
@click.option("--rows-per-part", type=click.IntRange(min=1), default=8192, show_default=True, help="See above.")
@click.option(
    "--on-invalid",
    type=click.Choice(["skip", "fail"]),
    default="skip",
    show_default=True,
    help="What an item that cannot be used does: it is left out and listed, or stops the run.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT, and an unfinished run that does not fit.")
def embed(**arguments: Any) -> None:
    """Embed INPUT with MODEL, a bundle or a checkpoint: the texts, and for a model that takes them the images, of
    records (jsonl, csv, tsv, txt, each also .gz; parquet; - for standard input), images, the pages of PDFs, and all
    images and PDFs in a folder.

    \b
    rtx embed manuals.rtx passages.jsonl -o passages.npy --prompt document
    rtx embed pages.rtx scans/ more/manual.pdf -o pages.parquet --prompt document

    A file's id is its path in the folder, a page's scans/manual.pdf#12. Of several INPUTs, these ids begin with INPUT,
    and records without an id get "passages.jsonl:17".

    Works through inputs of any size, in parts of --rows-per-part records, or 128 images, that are kept in OUT.partial
    until all are done. A run that was stopped, by whatever, goes on from its last finished part when the same command
    is given again.

    A parquet file has the columns id and embedding. Beside an npy file, OUT.npy.ids.jsonl has the id of each row.
    Items that cannot be embedded have no row; OUT.errors.jsonl (after the full name of OUT) lists them, and the exit
    code is 4.
    """
    failed = _run(_Arguments(**arguments))
    if failed:
        raise click.exceptions.Exit(DataError.exit_code)


def _run(given: _Arguments) -> int:
    """Number of items that have no vector."""
    for path in given.sources:
        check_vector_file(given.output, source=None if path == STDIN else path)
    budget = budget_of(given.device, given.max_batch_tokens)
    with (
        Inputs(given.sources, file_format=given.file_format, id_column=given.id_column, dpi=given.dpi) as source,
        open_as(
            Embedder, given.model, variant=given.variant, threads=given.threads, device=given.device, budget=budget
        ) as model,
    ):
        takes_images = model.contract.takes_images
        if not takes_images and (given.image_column or source.image):
            what = f"{source.image}: is an image" if source.image else f"--image-column {given.image_column}"
            raise UsageError(f"{what}; {given.model} takes texts only")
        normalize = True if given.normalize else None
        options: Any = {"prompt": given.prompt, "dimensions": given.dimensions, "normalize": normalize}
        # Of no items: what does not fit the model is found before the first one is read.
        empty = model.embed([], precision=given.precision, **options)
        metadata = _metadata(given, model)
        for folder_path, others in source.others.items():
            click.echo(f"{folder_path}: {others:,} files that are neither images nor PDFs are left aside", err=True)
        with PartFolder(given.output, metadata, overwrite=given.overwrite) as folder:
            _announce(folder)
            try:
                with Progress("items" if takes_images else "texts", source.fraction) as progress:
                    batches = _Batches(model.engine, progress)
                    model.engine = batches
                    totals = embed_records(
                        lambda items: _embed(model, items, given.precision, options),
                        source.records(
                            text_column=given.text_column,
                            image_column="image" if given.image_column is None else given.image_column,
                            takes_images=takes_images,
                        ),
                        folder,
                        column=ITEM,
                        rows_per_part=given.rows_per_part,
                        check=lambda place, item: read_item(place, item, model.contract),
                        on_invalid=given.on_invalid,
                        replace=given.overwrite,
                        on_progress=batches.done,
                    )
                shape = {"width": empty.shape[1], "dtype": empty.dtype}
                write_output(given.output, folder, totals, metadata=metadata, **shape)
            except KeyboardInterrupt:
                _say_how_to_resume(folder, given)
                raise click.exceptions.Exit(INTERRUPTED) from None
            folder.remove()
    _summarize(given.output, totals, empty)
    return totals.failed


def _metadata(given: _Arguments, model: Embedder) -> dict[str, Any]:
    """What vectors depend on beside their items. Threads and batches change the last bits at most."""
    images = {"image_column": given.image_column, "dpi": given.dpi} if model.contract.takes_images else {}
    return {
        **_identity(given),
        "prompt": given.prompt,
        "dimensions": given.dimensions or model.contract.dimension,
        "precision": given.precision,
        "normalize": given.normalize or model.contract.normalize,
        "text_column": given.text_column,
        "id_column": given.id_column,
        "rows_per_part": given.rows_per_part,
        **images,
    }


def _identity(given: _Arguments) -> dict[str, Any]:
    folder = Path(given.model)
    if not (folder / MANIFEST_FILE).exists():
        # A name on a hub stands for itself.
        content = sha256_of(folder, without="checkpoints") if folder.is_dir() else None
        return {"checkpoint": given.model, "checkpoint_sha256": content}
    bundle = Bundle.open(folder)
    return {
        "bundle": bundle.manifest.name,
        "bundle_sha256": hashlib.sha256(bundle.manifest.to_bytes()).hexdigest(),
        "variant": bundle.variant(given.variant)[0],
    }


def _embed(
    model: Embedder, items: Sequence[object], precision: Precision, options: Any
) -> tuple[NDArray[Any], list[int], list[ItemError]]:
    """The items that can be embedded, without a second run for the sake of the others.

    A vector that is not finite is one of those: one overflow in half precision must not end a run over millions.
    """
    vectors = model.embed(items, on_invalid="nan", **options)
    finite = np.isfinite(vectors).all(axis=1)
    errors = [ItemError(row, _why(model, items[row], options["prompt"])) for row in np.flatnonzero(~finite).tolist()]
    return CODES[precision](vectors[finite]), np.flatnonzero(finite).tolist(), errors


def _why(model: Embedder, item: object, prompt: str | None) -> str:
    """Why an item has no vector."""
    (found,) = model.preprocessor.encode([item], prompt=prompt)
    return found.message if isinstance(found, ItemError) else "the model gives it a vector that is not finite"


class _Batches:
    """An engine that tells of every batch: a call with many pages may take an hour.

    Args:
        engine: the one that runs them.
        progress: is told.
    """

    def __init__(self, engine: Engine, progress: Progress) -> None:
        self.name = engine.name
        self.packed = engine.packed
        self._engine = engine
        self._progress = progress
        self._told = 0

    def run(self, batch: Batch) -> NDArray[np.float32]:
        results = self._engine.run(batch)
        self._told += len(results)
        self._progress.add(len(results))
        return results

    def max_rows(self, longest: Encoded) -> int | None:
        return self._engine.max_rows(longest)

    def close(self) -> None:
        self._engine.close()

    def done(self, records: int, computed: bool) -> None:
        """The end of a call: what is told now is what no batch has told."""
        self._progress.add(records - (self._told if computed else 0), computed)
        self._told = 0 if computed else self._told


def _announce(folder: PartFolder) -> None:
    if finished := folder.finished():
        click.echo(f"going on with {folder.path}; finished parts: {finished:,}", err=True)


def _say_how_to_resume(folder: PartFolder, given: _Arguments) -> None:
    finished = folder.finished()
    if not finished:
        click.echo("interrupted before the first part was finished; nothing is kept", err=True)
        return
    same = "the same command, fed the same input," if STDIN in given.sources else "the same command"
    click.echo(f"interrupted; {same} goes on; finished parts, kept in {folder.path}: {finished:,}", err=True)


def _summarize(output: Path, totals: Totals, empty: NDArray[Any]) -> None:
    kept = f", {totals.kept:,} of the records by an earlier run" if totals.kept else ""
    ids = f"; ids in {ids_file(output)}" if output.suffix == ".npy" else ""
    click.echo(f"{output}: {totals.rows:,} vectors of {empty.shape[1]} {empty.dtype}{kept}{ids}", err=True)
    if totals.failed:
        count = "1 record has" if totals.failed == 1 else f"{totals.failed:,} records have"
        click.echo(f"{count} no vector; all are listed in {failures_file(output)}:", err=True)
        for failure in totals.first:
            click.echo(f"  {failure}", err=True)
        if totals.failed > len(totals.first):
            click.echo(f"  … and {totals.failed - len(totals.first):,} more", err=True)
