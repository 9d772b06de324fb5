"""What a model will be given: its user's own queries and documents, or pairs of them.

Read from an evaluation set, or from training data. The lengths that engines are tuned for come from it, and the scales
of 8 bits.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rtx.runtime.candidates import Candidates
from rtx.runtime.contract import Contract
from rtx.runtime.errors import DataError, ItemError, UsageError
from rtx.runtime.evalset import EvalSet, Problems
from rtx.runtime.items import Content
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.records import STDIN, BadRecord, Input
from rtx.runtime.text import Encoded
from rtx.trainer.data import read_rows
from rtx.trainer.examples import RowChecker

Item = TypeVar("Item")

# Texts that a user's data need not have and a service gets: next to nothing, other scripts, numbers. What a token of
# them looks like inside can be far from all others. But for the empty one, no golden text is among them.
_SCRAPS = (
    "",
    "x",
    "!",
    "\x01\x02",
    "ok",
    "0",
    "- - -",
    "日本語の説明書",
    "инструкция",
    "دليل المستخدم",
    "🙂🙂",
    "1234567890 1234567890",
    "http://a.example/b?c=d&e=f",
    "ñandú, café",
)
_SCRAPS_OF_OWN = 16


@dataclass(frozen=True)
class Served:
    """Queries and documents, each with its prompt, or for a reranker pairs.

    Attributes:
        queries, documents: texts, or with images `Content`.
        pairs: of a query and a document.
    """

    queries: Sequence[str] = ()
    documents: Sequence[str] = ()
    pairs: Sequence[tuple[str, str]] = ()

    @classmethod
    def of_evalset(cls, evalset: EvalSet, candidates: Candidates | None) -> Served:
        """The queries and the corpus, or each query beside its candidates."""
        if candidates is None:
            return cls([*evalset.queries.values()], [*evalset.corpus.values()])
        return cls(
            pairs=[(evalset.queries[q], evalset.corpus[one.document]) for q in candidates for one in candidates[q]]
        )

    @classmethod
    def of_file(cls, path: Path, contract: Contract) -> Served:
        """The queries and documents of training data, in any form of rows that `rtx finetune` reads.

        Raises:
            DataError: the file cannot be read, or a row of it cannot be used.
            UsageError: its name tells no format.
            MissingExtraError: pyarrow or datasets is needed and not installed.
        """
        checker, problems = RowChecker(None, contract=contract), Problems(str(path))
        pairs: list[tuple[str, str]] = []
        for row in read_rows(path):
            if isinstance(row.row, BadRecord):
                problems.add(str(row.row))
                continue
            example, _, wrong = checker.check(row.row, path.parent)
            if wrong:
                problems.add(f"{row.where}: {'; '.join(wrong)}")
            elif example is not None:
                pairs += [(example.query, document) for document in example.documents]
        problems.raise_any()
        if not pairs:
            raise DataError(f"{path}: has no rows")
        if contract.task == "rerank":
            return cls(pairs=pairs)
        return cls([*dict.fromkeys(query for query, _ in pairs)], [*dict.fromkeys(document for _, document in pairs)])

    def encode(self, preprocessor: Preprocessor, count: int) -> list[list[Encoded]]:
        """Some of each kind: queries and documents, or pairs; those that cannot be read or give no token are left out.

        Args:
            preprocessor: of the model.
            count: of each kind at most.
        """
        if self.pairs:
            return [_readable(preprocessor.encode_pairs(_some(self.pairs, count)))]
        prompts = preprocessor.contract.prompts
        return [
            _readable(preprocessor.encode(_some(items, count), prompt=side if side in prompts else None))
            for side, items in (("query", self.queries), ("document", self.documents))
        ]

    def scraps(self, preprocessor: Preprocessor) -> list[Encoded]:
        """What is next to nothing: first words and first characters of some texts, and a few texts that are odd."""
        own = [text for text in (*self.queries, *(query for query, _ in self.pairs)) if not isinstance(text, Content)]
        chosen = _some([text for text in own if text.strip()], _SCRAPS_OF_OWN)
        scraps = [*_SCRAPS, *(text.split()[0] for text in chosen), *(text.strip()[0] for text in chosen)]
        if preprocessor.contract.task == "rerank":
            documents = itertools.cycle([document for _, document in _some(self.pairs, _SCRAPS_OF_OWN)])
            pairs = [*zip(scraps, documents, strict=False), *((scrap, scrap) for scrap in scraps)]
            return _readable(preprocessor.encode_pairs(pairs))
        return _readable(preprocessor.encode(scraps))


def check_file(path: Path) -> None:
    """Before any work is done.

    Raises:
        DataError: there is no such file, or it cannot be read.
        UsageError: it is of no kind that training data can have.
    """
    if path.is_dir():
        return  # what `datasets` saved; reading it says what is wrong
    wrong = UsageError(f"calibration: {path}: expected training data, as jsonl, csv, tsv or parquet")
    if str(path) == STDIN:
        raise wrong
    try:
        with Input(str(path)) as source:
            file_format = source.format
    except UsageError as unknown:
        raise wrong from unknown
    if file_format == "txt":
        raise wrong


def lengths_of(sides: Sequence[Sequence[Encoded]]) -> list[int]:
    """Tokens of what has some, as many of each kind: queries are fewer than documents, and served as often."""
    found = [[item.length for item in side if item.ids] for side in sides]
    most = max(map(len, found), default=0)
    return [length for lengths in found for length in itertools.islice(itertools.cycle(lengths), most)]


def _some(items: Sequence[Item], count: int) -> list[Item]:
    return [*items] if len(items) <= count else random.Random(0).sample(items, count)


def _readable(rows: Sequence[Encoded | ItemError]) -> list[Encoded]:
    return [row for row in rows if not isinstance(row, ItemError)]
