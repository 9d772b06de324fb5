"""Plain ONNX Runtime, with the least around it: tokenizers, a session, numpy. `fp32` fused, `int8` fused and quantised.

Texts are ordered by their number of tokens and padded to the longest of their batch. The graph is fused by ONNX
Runtime's own optimizer for transformers (Attention, SkipLayerNormalization, BiasGelu) and quantised by its own
`quantize_dynamic` with a scale for each channel of a weight and one for each activation.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.peers.tokens import in_batches, mean_pooled, open_tokenizer, padded
from benchmarks.peers.worker import Order, Run, Source, attempt, has_vnni, serve

_OPSET = 17


def load(source: Source, form: str, threads: int) -> Run:
    import onnxruntime

    tokenizer = open_tokenizer(source)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    file = str(source.artifact / f"{form}.onnx")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    inputs = {given.name for given in session.get_inputs()}

    def run(items: Sequence[Any], batch_size: int) -> NDArray[np.float32]:
        encoded = tokenizer(items)

        def forward(places: list[int]) -> NDArray[np.float32]:
            rows = [encoded[place] for place in places]
            batch = {
                "input_ids": padded([row.ids for row in rows], 0),
                "attention_mask": padded([row.attention_mask for row in rows], 0),
                "token_type_ids": padded([row.type_ids for row in rows], 0),
            }
            output = session.run(None, {name: batch[name] for name in inputs})[0]
            return mean_pooled(output, batch["attention_mask"]) if source.task == "embed" else output[:, 0]

        return in_batches([len(row.ids) for row in encoded], batch_size, forward)

    return run


def prepare(source: Source, _order: Order) -> Mapping[str, str]:
    import onnxruntime.quantization
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    plain = source.artifact / "plain.onnx"
    config = _export(source, plain)
    failed: dict[str, str] = {}
    fused = source.artifact / "fp32.onnx"
    with attempt("fp32", failed):
        options = FusionOptions("bert")
        # Positions and masks of the exporter's own stay as they are: fused, they would ask for int32 inputs.
        options.enable_embed_layer_norm = False
        model = optimize_model(
            str(plain),
            "bert",
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            optimization_options=options,
            opt_level=0,
        )
        found = model.get_fused_operator_statistics()
        print(found)
        if found["Attention"] != config.num_hidden_layers:
            raise ValueError(f"fusion: expected {config.num_hidden_layers} Attention, got {found['Attention']}")
        model.save_model_to_file(str(fused))
    with attempt("int8", failed):
        onnxruntime.quantization.quantize_dynamic(
            fused,
            source.artifact / "int8.onnx",
            weight_type=onnxruntime.quantization.QuantType.QInt8,
            per_channel=True,
            # Products of 8 bits saturate where the CPU has no VNNI: weights of 7 bits do not.
            reduce_range=not has_vnni(),
            extra_options={"DefaultTensorType": 1},
        )
    plain.unlink()
    return failed


def _export(source: Source, target: Path) -> Any:
    """The graph with `last_hidden_state` or logits as its output."""
    import torch
    import transformers

    kind: Any = transformers.AutoModel if source.task == "embed" else transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(source.checkpoint, attn_implementation="eager").eval()
    output = "last_hidden_state" if source.task == "embed" else "logits"

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, return_dict=True
            )[output]

    names = ["input_ids", "attention_mask", "token_type_ids"]
    ones = torch.ones((2, 16), dtype=torch.int64)
    torch.onnx.export(
        Graph().eval(),
        (ones, ones, torch.zeros_like(ones)),
        str(target),
        input_names=names,
        output_names=[output],
        dynamic_axes={name: {0: "batch", 1: "tokens"} for name in names},
        opset_version=_OPSET,
        dynamo=False,
    )
    return model.config


if __name__ == "__main__":
    serve(load=load, prepare=prepare, packages=("onnxruntime", "tokenizers"))
