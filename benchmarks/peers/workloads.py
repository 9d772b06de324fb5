"""What is run: code and docstrings of installed packages, cut to lengths that are drawn log-uniformly."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from code_search import EVAL_DISTRIBUTIONS, Settings, build
from python_functions import Distribution, Function, installed, normalised_name, read_functions, summary

MIX_TOKENS = (16, 256)
QUERY_TOKENS = (8, 12)
LONG_TOKENS = 512
ARRIVAL_ITEMS = 8
PASSAGES_PER_QUERY = 8

# Of any one distribution, so that no one's style fills the pool.
_FUNCTIONS_PER_DISTRIBUTION = 400
_MIN_LINES, _MAX_LINES = 3, 200


@dataclass(frozen=True)
class Judged:
    """Queries, documents, and the one document that answers each query."""

    queries: tuple[str, ...]
    documents: tuple[str, ...]
    answers: tuple[int, ...]


@dataclass(frozen=True)
class Workloads:
    """Texts to run; each list is in random order, and any number of its first items is like the whole.

    Attributes:
        mix: passages of MIX_TOKENS tokens, log-uniform.
        mix_tokens: tokens of each, special ones included.
        long: passages of LONG_TOKENS tokens.
        queries: short texts of QUERY_TOKENS tokens.
        pairs: query and passage, PASSAGES_PER_QUERY to a query.
        judged: for ranking quality.
    """

    mix: tuple[str, ...]
    mix_tokens: tuple[int, ...]
    long: tuple[str, ...]
    queries: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    judged: Judged


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """How many of each there are to choose from."""

    mix: int = 1024
    long: int = 64
    queries: int = 64
    judged_per_distribution: int = 15
    documents_per_distribution: int = 30


def make_workloads(tokenizer_file: Path, amounts: Amounts, *, seed: int = 0) -> Workloads:
    """Read the packages of this environment; the same packages and seed give the same texts.

    Raises:
        DataError: there are too few functions with docstrings.
    """
    distributions = installed()
    functions = _functions(distributions)
    cutter = Cutter(tokenizer_file)
    random = np.random.default_rng(seed)
    passages = _stream([function.code for function in functions], random)
    mix = [cutter.take(passages, tokens) for tokens in log_uniform(MIX_TOKENS, amounts.mix, random)]
    long = [cutter.take(passages, LONG_TOKENS) for _ in range(amounts.long)]
    asked = _stream(_summaries(functions), random)
    lengths = random.integers(QUERY_TOKENS[0], QUERY_TOKENS[1] + 1, size=amounts.queries)
    queries = [cutter.take(asked, int(tokens)) for tokens in lengths]
    pairs = [(queries[row // PASSAGES_PER_QUERY % len(queries)], passage) for row, passage in enumerate(mix)]
    return Workloads(
        mix=tuple(mix),
        mix_tokens=tuple(map(cutter.count, mix)),
        long=tuple(long),
        queries=tuple(queries),
        pairs=tuple(pairs),
        judged=_judged(distributions, amounts, cutter),
    )


class Cutter:
    """Makes texts of a given number of tokens, special ones included."""

    def __init__(self, tokenizer_file: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special = self.count("")

    def count(self, text: str) -> int:
        return len(self._tokenizer.encode(text).ids)

    def take(self, texts: Iterator[str], tokens: int) -> str:
        """The next text, or several where one is too short, cut to so many tokens.

        Where the cut falls within a word, what is left of it can be fewer tokens than it was a part of.
        """
        text = next(texts)
        while self.count(text) < tokens:
            text = f"{text}\n{next(texts)}"
        return self.cut(text, tokens)

    def cut(self, text: str, tokens: int) -> str:
        """The first so many tokens of a text; a shorter one as it is."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        kept = tokens - self._special
        return text if len(encoding.ids) <= kept else text[: encoding.offsets[kept - 1][1]]


def log_uniform(bounds: tuple[int, int], count: int, random: np.random.Generator) -> list[int]:
    """So many lengths between two, evenly spread over their logarithm, in random order."""
    low, high = np.log(bounds)
    places: NDArray[np.float64] = (np.arange(count) + 0.5) / count
    lengths = np.exp(low + (high - low) * places).round().astype(int)
    return [int(length) for length in random.permutation(lengths)]


def _functions(distributions: Sequence[Distribution]) -> list[Function]:
    dropped: Counter[str] = Counter()
    named = {normalised_name(each.name): each for each in distributions}
    chosen = [named[name] for name in map(normalised_name, EVAL_DISTRIBUTIONS) if name in named]
    return [
        function
        for each in chosen
        for function in itertools.islice(
            read_functions(each, dropped, min_lines=_MIN_LINES, max_lines=_MAX_LINES), _FUNCTIONS_PER_DISTRIBUTION
        )
    ]


def _summaries(functions: Sequence[Function]) -> list[str]:
    found = []
    for function in functions:
        try:
            found.append(summary(function.docstring or ""))
        except ValueError:
            continue
    return found


def _stream(texts: Sequence[str], random: np.random.Generator) -> Iterator[str]:
    """Texts in random order, again and again."""
    return itertools.cycle([texts[place] for place in random.permutation(len(texts))])


def _judged(distributions: Sequence[Distribution], amounts: Amounts, cutter: Cutter) -> Judged:
    settings = Settings(
        train_pairs=1,
        queries_per_distribution=amounts.judged_per_distribution,
        documents_per_distribution=amounts.documents_per_distribution,
        min_queries=1,
    )
    found = build(distributions, settings).eval
    places = {function.identifier: place for place, function in enumerate(found.documents)}
    return Judged(
        queries=tuple(pair.query for pair in found.queries),
        documents=tuple(cutter.cut(function.code, MIX_TOKENS[1]) for function in found.documents),
        answers=tuple(places[pair.function.identifier] for pair in found.queries),
    )
