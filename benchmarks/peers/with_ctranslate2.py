"""CTranslate2: the encoder by its converter, in `int8` or `fp32`; tokens and pooling around it are ours."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.peers.tokens import in_batches, mean_pooled, open_tokenizer, padded
from benchmarks.peers.worker import Order, Run, Source, attempt, serve

FORMS = {"fp32": "float32", "int8": "int8"}
_HEAD = "classifier.npz"


def load(source: Source, form: str, threads: int) -> Run:
    import ctranslate2  # type: ignore[import-not-found]

    tokenizer = open_tokenizer(source)
    folder = str(source.artifact / form)
    encoder = ctranslate2.Encoder(folder, device="cpu", compute_type=FORMS[form], intra_threads=threads)
    head = np.load(source.artifact / _HEAD) if source.task == "rerank" else None

    def run(items: Sequence[Any], batch_size: int) -> NDArray[np.float32]:
        encoded = tokenizer(items)

        def forward(places: list[int]) -> NDArray[np.float32]:
            rows = [encoded[place] for place in places]
            lengths = np.array([len(row.ids) for row in rows], dtype=np.int32)
            types = padded([row.type_ids for row in rows], 0).tolist()
            output = encoder.forward_batch(
                ctranslate2.StorageView.from_array(padded([row.ids for row in rows], 0).astype(np.int32)),
                lengths=ctranslate2.StorageView.from_array(lengths),
                token_type_ids=types if head is not None else None,
            )
            if head is None:
                hidden = np.array(output.last_hidden_state)
                return mean_pooled(hidden, padded([row.attention_mask for row in rows], 0))
            scores: NDArray[np.float32] = np.array(output.pooler_output) @ head["weight"][0] + head["bias"]
            return scores

        return in_batches([len(row.ids) for row in encoded], batch_size, forward)

    return run


def prepare(source: Source, order: Order) -> Mapping[str, str]:
    from ctranslate2.converters import TransformersConverter  # type: ignore[import-not-found]

    failed: dict[str, str] = {}
    for form in order.forms:
        with attempt(form, failed):
            converter = TransformersConverter(str(source.checkpoint))
            converter.convert(str(source.artifact / form), quantization=FORMS[form])
    if source.task == "rerank":
        # It converts encoders alone: the head is one product in numpy.
        from transformers import AutoModelForSequenceClassification

        classifier: Any = AutoModelForSequenceClassification.from_pretrained(source.checkpoint).classifier
        weights = {name: value.detach().numpy() for name, value in classifier.named_parameters()}
        np.savez(source.artifact / _HEAD, **weights)
    return failed


if __name__ == "__main__":
    serve(load=load, prepare=prepare, packages=("ctranslate2", "tokenizers"))
