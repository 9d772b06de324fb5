"""How many tokens the texts of an example have before they are truncated. Free of torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from rtx.runtime.errors import ItemError
from rtx.runtime.preprocessor import Preprocessor
from rtx.runtime.text import Encoded
from rtx.trainer.check import Length, Measure, Role
from rtx.trainer.examples import Example

_NO_LIMIT = 2**30


def token_lengths(preprocessor: Preprocessor) -> Measure:
    """Lengths in tokens with prompts and special tokens: of queries and documents, or of a reranker's pairs.

    Args:
        preprocessor: the model's; its limit is not applied.
    """
    # The one implementation that trains and serves, so that the count is what a model is given.
    unlimited = dataclasses.replace(preprocessor.contract, max_tokens=_NO_LIMIT, fixed_tokens=0)
    whole = Preprocessor(unlimited, preprocessor.tokenizer_json)

    def embedder(example: Example, roles: Sequence[Role]) -> Iterator[Length]:
        yield from _lengths(("query",), whole.encode([example.query], prompt="query"))
        yield from _lengths(roles, whole.encode(example.documents, prompt="document"))

    def reranker(example: Example, roles: Sequence[Role]) -> Iterator[Length]:
        pairs = [(example.query, document) for document in example.documents]
        yield from _lengths([f"query + {role}" for role in roles], whole.encode_pairs(pairs))

    return embedder if preprocessor.contract.task == "embed" else reranker


def _lengths(names: Sequence[str], items: Sequence[Encoded | ItemError]) -> Iterator[Length]:
    for name, item in zip(names, items, strict=True):
        yield Length(name, "tokens", 0 if isinstance(item, ItemError) else len(item.ids))
