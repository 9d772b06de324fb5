"""`rtx embed`: the texts of a file to a file of vectors."""

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
from rtx.runtime.commands.progress import Progress
from rtx.runtime.embedder import CODES, Embedder, Precision
from rtx.runtime.engine import Budget
from rtx.runtime.errors import INTERRUPTED, DataError, InvalidItemsError, ItemError
from rtx.runtime.failures import failures_file
from rtx.runtime.parts import PartFolder
from rtx.runtime.records import FORMATS, STDIN, Format, Input
from rtx.runtime.vectors import check_vector_file, ids_file


@dataclass(frozen=True, kw_only=True)
class _Arguments:
    bundle: str
    source: str
    output: Path
    variant: str | None
    prompt: str | None
    dimensions: int | None
    precision: Precision
    normalize: bool
    text_column: str
    id_column: str | None
    file_format: Format | None
    threads: int | None
    max_batch_tokens: int
    rows_per_part: int
    on_invalid: OnInvalid
    overwrite: bool


@click.command()
@click.argument("bundle", type=click.Path())
@click.argument("source", metavar="INPUT", type=click.Path(allow_dash=True))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="OUT.npy or OUT.parquet.")
@click.option("--variant", help="A variant of the bundle.  [default: the bundle's]")
@click.option("--prompt", metavar="NAME", help='Prompt put before each text: "query", "document", ...')
@click.option("--dimensions", type=click.IntRange(min=1), help="Keep the first N dimensions.")
@click.option("--precision", type=click.Choice(["float32", "int8", "binary"]), default="float32", show_default=True)
@click.option("--normalize", is_flag=True, help="Scale vectors to norm 1 where the model does not.")
@click.option("--text-column", default="text", show_default=True)
@click.option("--id-column", help="[default: id where there is one, otherwise the line or row number]")
@click.option("--format", "file_format", type=click.Choice(FORMATS), help="[default: by the ending of INPUT]")
@click.option("--threads", type=click.IntRange(min=1), help="[default: all cores]")
@click.option("--max-batch-tokens", type=click.IntRange(min=1), default=Budget().max_batch_tokens, show_default=True)
@click.option("--rows-per-part", type=click.IntRange(min=1), default=8192, show_default=True, help="See above.")
@click.option(
    "--on-invalid",
    type=click.Choice(["skip", "fail"]),
    default="skip",
    show_default=True,
    help="What a record without a usable text does: it is left out and listed, or stops the run.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT, and an unfinished run that does not fit.")
def embed(**arguments: Any) -> None:
    """Embed the texts of INPUT (jsonl, csv, tsv, txt, each also .gz; parquet; - for standard input).

    Works through inputs of any size, in parts of --rows-per-part records that are kept in OUT.partial until all are
    done. A run that was stopped, by whatever, goes on from its last finished part when the same command is given again.

    A parquet file has the columns id and embedding. Beside an npy file, OUT.npy.ids.jsonl has the id of each row.
    Records that cannot be embedded have no row; OUT.errors.jsonl (after the full name of OUT) lists them, and the exit
    code is 4.
    """
    failed = _run(_Arguments(**arguments))
    if failed:
        raise click.exceptions.Exit(DataError.exit_code)


def _run(given: _Arguments) -> int:
    """Number of records that have no vector."""
    check_vector_file(given.output, source=None if given.source == STDIN else given.source)
    budget = Budget(max_batch_tokens=given.max_batch_tokens)
    with (
        Input(given.source, file_format=given.file_format, id_column=given.id_column) as source,
        Embedder.open(given.bundle, variant=given.variant, threads=given.threads, budget=budget) as model,
    ):
        normalize = True if given.normalize else None
        options: Any = {"prompt": given.prompt, "dimensions": given.dimensions, "normalize": normalize}
        # Of no texts: what does not fit the model is found before the first one is read.
        empty = model.embed([], precision=given.precision, **options)
        metadata = _metadata(given)
        with PartFolder(given.output, metadata, overwrite=given.overwrite) as folder:
            _announce(folder)
            try:
                with Progress("texts", source.fraction) as progress:
                    totals = embed_records(
                        lambda texts: CODES[given.precision](_finite(model.embed(texts, **options), texts)),
                        source.records([given.text_column]),
                        folder,
                        column=given.text_column,
                        rows_per_part=given.rows_per_part,
                        on_invalid=given.on_invalid,
                        replace=given.overwrite,
                        on_progress=progress.add,
                    )
                shape = {"width": empty.shape[1], "dtype": empty.dtype}
                write_output(given.output, folder, totals, metadata=metadata, **shape)
            except KeyboardInterrupt:
                _say_how_to_resume(folder, given)
                raise click.exceptions.Exit(INTERRUPTED) from None
            folder.remove()
    _summarize(given.output, totals, empty)
    return totals.failed


def _metadata(given: _Arguments) -> dict[str, Any]:
    """What vectors depend on beside their texts. Threads and batches change the last bits at most."""
    bundle = Bundle.open(given.bundle)
    return {
        "bundle": bundle.manifest.name,
        "bundle_sha256": hashlib.sha256(bundle.manifest.to_bytes()).hexdigest(),
        "variant": bundle.variant(given.variant)[0],
        "prompt": given.prompt,
        "dimensions": given.dimensions or bundle.manifest.contract.dimension,
        "precision": given.precision,
        "normalize": given.normalize or bundle.manifest.contract.normalize,
        "text_column": given.text_column,
        "id_column": given.id_column,
        "rows_per_part": given.rows_per_part,
    }


def _finite(vectors: NDArray[np.float32], texts: Sequence[str]) -> NDArray[np.float32]:
    """The vectors if all are finite: one overflow in half precision must not end a run over millions of texts."""
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        message = "the model gives it a vector that is not finite"
        raise InvalidItemsError([ItemError(int(row), message) for row in np.flatnonzero(~finite)], len(texts))
    return vectors


def _announce(folder: PartFolder) -> None:
    if finished := folder.finished():
        click.echo(f"going on with {folder.path}; finished parts: {finished:,}", err=True)


def _say_how_to_resume(folder: PartFolder, given: _Arguments) -> None:
    finished = folder.finished()
    if not finished:
        click.echo("interrupted before the first part was finished; nothing is kept", err=True)
        return
    same = "the same command, fed the same input," if given.source == STDIN else "the same command"
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
