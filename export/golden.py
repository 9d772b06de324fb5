"""The golden inputs: texts that have gone wrong elsewhere, and some of the user's own."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from rtx.runtime.contract import Contract
from rtx.runtime.engine import Budget, Engine, run_items
from rtx.runtime.errors import ExportError, ItemError
from rtx.runtime.evalset import EvalSet
from rtx.runtime.golden import Golden, tokenize
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.text import Encoded

# Empty, one letter, control characters, scripts, right to left, code, numbers, a long word, long texts.
_TEXTS = (
    "",
    "a",
    "?",
    "how do I reset it?",
    "a\x00b\x07c",
    "   white \t space \n\n everywhere   ",
    "Das Gerät muss vor der Wartung vom Stromnetz getrennt werden.",
    "本机保修期为两年，请保留购买凭证。",
    "لا تفتح الغطاء أثناء التشغيل",
    "Не открывайте крышку во время работы",
    "🔧 tighten to 25 N·m ±5 % (≈ 18 lb·ft)",
    "def parse(path: str) -> dict[str, int]:\n    return json.loads(Path(path).read_text())",
    "3.14159 2,718 1e-9 0x7f 192.0.2.1 2026-11-23T06:19:15Z",
    "antidisestablishmentarianism" * 8,
    "The filter is cleaned once a month. Press the button for three seconds until the light turns green.",
    "Retrieval quality is measured as NDCG at ten over held-out queries. " * 4,
    "The pump delivers twelve litres a minute at two bar; the motor draws four amperes. " * 12,
)
# One more goes past the limit on length, or, where attention over that many tokens would fill the memory, near to here.
_LONG = "A sentence that is longer than any limit says the same again and again. "
_WORDS_OF_LONG = 14
_LONG_TOKENS = 1500
_QUERY = "how long is the warranty?"
_FROM_EVALSET = 16


def golden_items(contract: Contract, evalset: EvalSet | None) -> tuple[list[object], list[str | None]]:
    """Items and the name of the prompt of each: built-in texts, then queries and documents of an evaluation set.

    For a reranker each text is the document of a pair, and the query of one more where it is short.
    """
    queries: list[str] = []
    documents: list[str] = []
    if evalset is not None:
        chosen = random.Random(0)
        queries = chosen.sample(sorted(evalset.queries.values()), min(_FROM_EVALSET, len(evalset.queries)))
        documents = chosen.sample(sorted(evalset.corpus.values()), min(_FROM_EVALSET, len(evalset.corpus)))
    built_in = (*_TEXTS, _LONG * (1 + min(contract.max_tokens, _LONG_TOKENS) // _WORDS_OF_LONG))
    if contract.task == "rerank":
        pairs: list[object] = [(_QUERY, text) for text in built_in]
        pairs += [(text, _TEXTS[14]) for text in _TEXTS[:8]]
        pairs += list(zip(queries, documents, strict=False))
        return pairs, [None] * len(pairs)
    texts = [*built_in, *queries, *documents]
    # The built-in texts take each kind of prompt in turn.
    prompts = [(None, "query", "document")[index % 3] for index in range(len(built_in))]
    return list(texts), [*prompts, *["query"] * len(queries), *["document"] * len(documents)]


def make_golden(
    preprocessor: Preprocessor, reference: Engine, items: Sequence[object], prompts: Sequence[str | None]
) -> Golden:
    """Run items through the reference engine, each alone.

    An item that gives no token (an empty text where the tokenizer adds no special token) is left out.

    Raises:
        ExportError: no item gives a token.
    """
    encoded = tokenize(preprocessor, items, prompts)
    kept = [index for index, item in enumerate(encoded) if not isinstance(item, ItemError)]
    tokens: list[Encoded] = [item for item in encoded if not isinstance(item, ItemError)]
    if not tokens:
        raise ExportError("the tokenizer gives no token for any golden text; the model cannot be held against anything")
    outputs = run_items(reference, preprocessor, tokens, Budget(max_batch_items=1))
    return Golden(
        tuple(items[index] for index in kept),
        tuple(prompts[index] for index in kept),
        tuple(tokens),
        np.ascontiguousarray(outputs),
    )
