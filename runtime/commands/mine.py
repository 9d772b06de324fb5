"""`rtx mine`: hard negatives for training rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

import click

from rtx.runtime.atomic import check_target
from rtx.runtime.bulk import OnInvalid
from rtx.runtime.cli import open_model
from rtx.runtime.commands.mine_summary import show
from rtx.runtime.commands.progress import Progress
from rtx.runtime.embedder import Embedder
from rtx.runtime.errors import DataError, UsageError
from rtx.runtime.evalset import Problems
from rtx.runtime.failures import failure_log, failures_file
from rtx.runtime.items import Content
from rtx.runtime.mining import INDEXES, Index, Logits, Unusable, mine
from rtx.runtime.mining_files import Fewer, read_corpus, read_rows, write_mined
from rtx.runtime.negatives import SAMPLINGS, Rules, Sampling
from rtx.runtime.records import FORMATS, STDIN, BadRecord, Format, Input
from rtx.runtime.reranker import Reranker

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class _Arguments:
    model: str
    source: str
    output: Path
    corpus: tuple[str, ...]
    negatives: int
    skip: int
    depth: int
    margin: float | None
    relative_margin: float | None
    max_score: float | None
    min_score: float | None
    sampling: Sampling
    seed: int
    rescore: str | None
    scores: bool
    first_stage: bool
    pairs: bool
    fewer: Fewer
    index: Index
    variant: str | None
    rescore_variant: str | None
    threads: int | None
    query_column: str
    positive_column: str
    text_column: str
    title_column: str
    image_column: str | None
    file_format: Format | None
    on_invalid: OnInvalid
    overwrite: bool


_RULES = Rules()
_RELATIVE_MARGIN_HELP = "Take what scores at most the positive's score * (1 - M); 0.05 is common."


@click.command()
@click.argument("model", type=click.Path())
@click.argument("source", metavar="INPUT", type=click.Path(allow_dash=True))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="OUT.jsonl.")
@click.option("--corpus", multiple=True, type=click.Path(), help="Texts to mine from.  [default: those of INPUT]")
@click.option("--negatives", type=int, default=_RULES.negatives, show_default=True, help="How many a query.")
@click.option("--skip", type=int, default=_RULES.skip, show_default=True, help="Ranks to leave out at the top.")
@click.option("--depth", type=int, default=_RULES.depth, show_default=True, help="The last rank to look at.")
@click.option("--margin", type=float, metavar="M", help="Take what scores at most the positive's score - M.")
@click.option("--relative-margin", type=float, metavar="M", help=_RELATIVE_MARGIN_HELP)
@click.option("--max-score", type=float, help="Take what scores at most this.")
@click.option("--min-score", type=float, help="Take what scores at least this.")
@click.option(
    "--sampling",
    type=click.Choice(SAMPLINGS),
    default=_RULES.sampling,
    show_default=True,
    help="Of those left, the highest scores or any.",
)
@click.option("--seed", type=int, default=_RULES.seed, show_default=True, help="Of random sampling.")
@click.option("--rescore", metavar="RERANKER", help="A bundle or checkpoint; the rules go by its logits.")
@click.option("--scores", is_flag=True, help="Write the scores, which margin_mse and kl learn from.")
@click.option("--first-stage", is_flag=True, help="Write MODEL's scores, for a reranker that is trained on top of it.")
@click.option("--pairs", is_flag=True, help="Write lines {query, document, label}.")
@click.option(
    "--fewer",
    type=click.Choice(["keep", "drop"]),
    default="keep",
    show_default=True,
    help="Whether a query with fewer negatives is written with those it has or left out.",
)
@click.option("--index", type=click.Choice(INDEXES), default="exact", show_default=True, help="faiss is faster.")
@click.option("--variant", help="A variant of the bundle.  [default: the bundle's]")
@click.option("--rescore-variant", help="A variant of RERANKER.")
@click.option("--threads", type=click.IntRange(min=1), help="Of the models.  [default: all cores]")
@click.option("--query-column", default="query", show_default=True)
@click.option("--positive-column", default="positive", show_default=True)
@click.option("--text-column", default="text", show_default=True, help="Of the corpus.")
@click.option("--title-column", default="title", show_default=True, help="Put before the text; '' for none.")
@click.option("--image-column", help="Of the corpus; '' for none.  [default: image, if MODEL takes images]")
@click.option("--format", "file_format", type=click.Choice(FORMATS), help="[default: by the ending of INPUT]")
@click.option(
    "--on-invalid",
    type=click.Choice(["skip", "fail"]),
    default="skip",
    show_default=True,
    help="What a record that cannot be used does: it is left out and listed, or stops the run.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
def mine_negatives(**arguments: Any) -> None:
    """Find hard negatives for the training rows of INPUT: documents, texts or images, that MODEL, a bundle or a
    checkpoint of an embedder, ranks high for a query and that are not known to answer it.

    \b
    rtx mine manuals.rtx train.jsonl -o mined.jsonl --relative-margin 0.05 --negatives 5
    rtx mine manuals.rtx train.jsonl -o taught.jsonl --depth 30 --rescore judge.rtx --margin 1 --scores
    rtx finetune --model manuals/ --train mined.jsonl --output better/

    INPUT (jsonl, csv, tsv, each also .gz; parquet; - for standard input) has a query and a positive a record, texts or
    {"image": "page.png"}; a query with several positives has several records. Negatives are taken from the positives
    and negatives of INPUT, or from the texts and images of --corpus (also txt; BEIR's corpus.jsonl). A positive of a
    query is never its negative, nor is its own text, nor an image of the same bytes. With several positives, the
    margins go by the one with the lowest score.

    OUT has a line {"query", "positive", "negatives"} for each record, those of one query together. Records that cannot
    be used are listed in OUT.errors.jsonl, and the exit code is then 4.
    """
    given = _Arguments(**arguments)
    failed = _run(given)
    if failed:
        count = "1 record" if failed == 1 else f"{failed:,} records"
        click.echo(f"{count} could not be used; all are listed in {failures_file(given.output)}", err=True)
        raise click.exceptions.Exit(DataError.exit_code)


def _run(given: _Arguments) -> int:
    """Number of records that could not be used."""
    rules = Rules(**{rule.name: getattr(given, rule.name) for rule in dataclasses.fields(Rules)})
    _check(given)
    with ExitStack() as stack:
        log = _Log(given, stack.enter_context(failure_log(given.output)))
        # All are opened before the first text is embedded: a misspelt path shows at once, not after some minutes.
        source = stack.enter_context(Input(given.source, file_format=given.file_format))
        corpora = [stack.enter_context(Input(path)) for path in given.corpus]
        model = _open(given.model, given.variant, given, stack)
        if not isinstance(model, Embedder):
            raise UsageError(f"{given.model}: is a reranker; expected an embedder (a reranker goes to --rescore)")
        reranker = None if given.rescore is None else _open(given.rescore, given.rescore_variant, given, stack)
        if not isinstance(reranker, Reranker | None):
            raise UsageError(f"--rescore: {given.rescore} is an embedder; expected a reranker")
        columns = {"query_column": given.query_column, "positive_column": given.positive_column}
        rows = list(log.usable(read_rows(source, **columns, contract=model.contract)))
        if not rows:
            log.raise_all(source)
        columns = {"text_column": given.text_column, "title_column": given.title_column}
        columns["image_column"] = _image_column(given, model)
        corpus = [
            text for file in corpora for text in log.usable(read_corpus(file, **columns, contract=model.contract))
        ]
        log.check()
        if reranker is not None and not reranker.contract.takes_images:
            documents = [*corpus, *(document for row in rows for document in (row.query, row.positive, *row.negatives))]
            if any(isinstance(document, Content) for document in documents):
                raise UsageError(f"--rescore: {given.rescore} takes texts only, and there are images")
        mined = mine(
            model,
            rows,
            corpus=corpus if corpora else None,
            rules=rules,
            reranker=None if reranker is None else Logits(reranker),
            index=given.index,
            folder=given.output.absolute().parent,
            on_progress=stack.enter_context(_Stages()),
        )
        options: Any = {
            "pairs": given.pairs,
            "scores": given.scores,
            "with_first_stage": given.first_stage,
            "fewer": given.fewer,
        }
        summary = write_mined(given.output, mined, on_unusable=log.unusable, **options)
    show(summary, given.output, rules)
    return log.count


def _image_column(given: _Arguments, model: Embedder) -> str:
    """The corpus's column of images; "" for a model that takes none, which leaves them aside."""
    if given.image_column is not None:
        if given.image_column and not model.contract.takes_images:
            raise UsageError(f"--image-column {given.image_column}: {given.model} takes texts only")
        return given.image_column
    return "image" if model.contract.takes_images else ""


def _check(given: _Arguments) -> None:
    """What can be said before anything is read."""
    if given.output.suffix != ".jsonl":
        raise UsageError(f"{given.output}: expected a name that ends in .jsonl")
    if given.pairs and given.scores:
        raise UsageError("--scores: go with rows of a positive and negatives, not with --pairs, which have labels")
    if given.first_stage and given.rescore is not None:
        raise UsageError("--first-stage: writes MODEL's scores, which --rescore replaces")
    if given.rescore_variant is not None and given.rescore is None:
        raise UsageError("--rescore-variant: names a variant of the RERANKER in --rescore, which is missing")
    for path in (given.source, *given.corpus):
        for file in (given.output, failures_file(given.output)):
            check_target(file, source=None if path == STDIN else path)
    if given.output.exists() and not given.overwrite:
        raise UsageError(f"{given.output}: exists; pass --overwrite to replace it")


def _open(path: str, variant: str | None, given: _Arguments, stack: ExitStack) -> Embedder | Reranker:
    model = open_model(path, variant=variant, threads=given.threads)
    stack.callback(model.close)
    return model


class _Log:
    """Takes out of what is read the records that cannot be used, and writes them down.

    Args:
        given: whether one of them stops the run.
        write: puts one into the list beside the output.
    """

    def __init__(self, given: _Arguments, write: Callable[[BadRecord], None]) -> None:
        self.count = 0
        self._stops = given.on_invalid == "fail"
        self._write = write
        self._problems = Problems("records that cannot be used")

    def usable(self, records: Iterable[_T | BadRecord]) -> Iterator[_T]:
        for record in records:
            if isinstance(record, BadRecord):
                self._add(record)
            else:
                yield record

    def unusable(self, found: Unusable) -> None:
        where = found.row.where
        self._add(BadRecord(int(where.rpartition(":")[2]), where, found.message))
        self.check()

    def check(self) -> None:
        """
        Raises:
            DataError: there was one, and none is allowed.
        """
        if self._stops:
            self._problems.raise_any()

    def raise_all(self, source: Input) -> NoReturn:
        """
        Raises:
            DataError: always; none of the records could be used.
        """
        self._problems.raise_any()
        raise DataError(f"{source.name}: has no record; expected queries with a positive each")

    def _add(self, record: BadRecord) -> None:
        self.count += 1
        self._problems.add(str(record))
        self._write(record)


class _Stages:
    """A Progress for each stage of a run."""

    def __init__(self) -> None:
        self._what = ""
        self._state = [0, 1]
        self._shown: Progress | None = None
        self._stack = ExitStack()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what or self._shown is None:
            self._stack.close()
            self._what, self._state = what, [0, total]
            self._shown = self._stack.enter_context(Progress(what, lambda: self._state[0] / self._state[1]))
        added = done - self._state[0]
        self._state[0] = done
        self._shown.add(added)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
