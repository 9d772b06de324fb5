"""A bundle as models of Triton Inference Server: one that takes texts and images, and the graphs that it asks.

    NAME/config.pbtxt, 1/model.py, 1/manifest.json, 1/tokenizer.json       Python backend: rtx.runtime.triton
    NAME_graph/config.pbtxt, 1/model.onnx                                  ONNX Runtime backend
                             1/model.plan                                  TensorRT backend, of an engine of TensorRT's
    NAME_image/config.pbtxt, 1/model.onnx                                  ONNX Runtime backend, of a model with images

The configurations are text of the protobuf message `inference.ModelConfig`
(github.com/triton-inference-server/common, protobuf/model_config.proto).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from rtx.export.tensorrt import Profile, shapes_of
from rtx.runtime import triton
from rtx.runtime.bundle import Bundle, runs_on_cpu, runs_on_gpu
from rtx.runtime.contract import Contract
from rtx.runtime.engine import Budget
from rtx.runtime.errors import BundleError, UsageError
from rtx.runtime.folder import replace_folder
from rtx.runtime.manifest import MANIFEST_FILE, TOKENIZER_FILE, EngineEntry, Variant

_CONFIG = "config.pbtxt"
_VERSION = "1"
_MAX_BATCH = Budget.of("cuda").max_batch_items
# How long the server waits for more requests.
_DELAY_US = 500
# While one instance waits for the graph, another prepares texts.
_INSTANCES = 2
# Of the text that warms the graph up, where its model takes any length.
_WARM_TOKENS = 16
_GRAPHS = ("_graph", "_image")
_WARM: Profile = {
    name: (size, size, size)
    for name, size in {"batch": 1, "tokens": _WARM_TOKENS, "visual_tokens": 1, "images": 1, "image_tokens": 4}.items()
}
_TYPES = {ir.DataType.INT64: "TYPE_INT64", ir.DataType.FLOAT: "TYPE_FP32"}
OPERATORS = "packed variants have operators of rtx, which Triton's ONNX Runtime lacks"
_MODEL = '''"""Texts in, {output} out: see rtx.runtime.triton."""

from rtx.runtime.triton import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


class Enum(str):
    """A value that stands without quotes."""


def write_repository(
    bundle: Bundle, repository: Path, *, variant: str | None = None, overwrite: bool = False
) -> tuple[str, ...]:
    """Write the models of a bundle into a model repository.

    Args:
        bundle: what is served.
        repository: the folder; other models in it stay.
        variant: whose graph is served; None for fp16 or what else a GPU runs, or else what a CPU runs.
        overwrite: replace models of these names.

    Returns:
        The names of the models, first that of the one that clients ask.

    Raises:
        UsageError: something is in the way, or the variant needs operators that Triton lacks.
        BundleError: a file of the bundle is damaged.
    """
    contract, name = bundle.manifest.contract, model_name(bundle.manifest.name)
    check_repository(repository, bundle.manifest.name, overwrite=overwrite)
    chosen, on_gpu = _choose(bundle, variant)
    plan = next((one for one in bundle.engines_of(chosen.file).items() if one[1].target == "tensorrt"), None)
    if contract.takes_images:  # an engine of each graph, or of none
        plan = None
    needed = (*chosen.graphs, *chosen.external, TOKENIZER_FILE, *([] if plan is None else [plan[0]]))
    if problems := [problem for file in needed if (problem := bundle.check(file)) is not None]:
        raise BundleError(f"{bundle.path}: {'; '.join(problems)}")
    graphs = [f"{name}{ending}" for ending, _ in zip(_GRAPHS, chosen.graphs, strict=False)]
    for graph, file in zip(graphs, chosen.graphs, strict=True):
        with replace_folder(repository / graph, marker=_CONFIG) as folder:
            read = ir.load(bundle.path / file)
            if plan is not None:
                _copy(bundle, plan[0], folder / _VERSION / "model.plan")
                config = plan_config(graph, read, contract, plan[1])
            else:
                _copy(bundle, file, folder / _VERSION / "model.onnx")
                for beside in (beside for beside in chosen.external if beside == f"{file}.data"):
                    _copy(bundle, beside, folder / _VERSION / Path(beside).name)
                config = graph_config(graph, read, contract, on_gpu=on_gpu)
            (folder / _CONFIG).write_text(to_text(config), encoding="utf-8")
    with replace_folder(repository / name, marker=_CONFIG) as folder:
        for file in (MANIFEST_FILE, TOKENIZER_FILE):
            _copy(bundle, file, folder / _VERSION / file)
        output = "vectors" if contract.task == "embed" else "scores"
        (folder / _VERSION / "model.py").write_text(_MODEL.format(output=output), encoding="utf-8")
        config = item_config(
            name,
            graphs,
            contract,
            on_gpu=on_gpu or plan is not None,
            engine=plan[0] if plan is not None else None,
        )
        (folder / _CONFIG).write_text(to_text(config), encoding="utf-8")
    return name, *graphs


def check_repository(repository: Path, name: str, *, overwrite: bool) -> None:
    """Raise UsageError if models cannot be written there, before any work is done."""
    if repository.exists() and not repository.is_dir():
        raise UsageError(f"{repository}: is a file; expected the folder of a model repository")
    if repository.is_symlink() and not repository.exists():
        raise UsageError(f"{repository}: is a link to nothing; expected the folder of a model repository")
    folder = repository.resolve()
    if bundle := next((one for one in (folder, *folder.parents) if (one / MANIFEST_FILE).is_file()), None):
        where = "is a bundle" if bundle == folder else f"is in the bundle {bundle}"
        raise UsageError(f"{repository}: {where}; expected the folder of a model repository")
    for model in (f"{model_name(name)}{ending}" for ending in ("", *_GRAPHS)):
        if not (target := repository / model).exists() or (target.is_dir() and not any(target.iterdir())):
            continue
        if not (target / _CONFIG).is_file():
            raise UsageError(f"{target}: is in the way and is no model of Triton; nothing was written")
        if not overwrite:
            raise UsageError(f"{target}: there is a model already; --overwrite replaces it")


def model_name(name: str) -> str:
    """A bundle's name as that of a model: letters, digits, dots, hyphens and underscores."""
    return re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII) or "model"


def graph_config(name: str, graph: ir.Model, contract: Contract, *, on_gpu: bool) -> dict[str, Any]:
    """The configuration of a graph's model.

    The first axis is the batch's. Where images are tokens among others, some inputs have it elsewhere, or not at all:
    the server is told all axes then.
    """
    batched = contract.visual is None

    def sides(values: Sequence[ir.Value]) -> list[dict[str, Any]]:
        found = []
        for value in values:
            assert value.dtype is not None
            assert value.shape is not None
            dims = [axis if isinstance(axis, int) else -1 for axis in value.shape][int(batched) :]
            # Scores have no axis but the batch's.
            shape: dict[str, Any] = {"dims": dims} if dims else {"dims": [1], "reshape": {"shape": []}}
            found.append({"name": str(value.name), "data_type": Enum(_TYPES[value.dtype]), **shape})
        return found

    inputs = sides(graph.graph.inputs)
    # Of the graph, not of the model that asks it: the server loads all at once, and the graph may not be there yet.
    warm = [
        {"data_type": side["data_type"], "dims": [*shapes_of(value, _WARM)[1][int(batched) :]], "zero_data": True}
        for side, value in zip(inputs, graph.graph.inputs, strict=True)
    ]
    given = [{"key": side["name"], "value": value} for side, value in zip(inputs, warm, strict=True)]
    config: dict[str, Any] = {
        "name": name,
        "backend": "onnxruntime",
        "max_batch_size": _MAX_BATCH if batched else 0,
        "input": inputs,
        "output": sides(graph.graph.outputs),
        "instance_group": [{"kind": Enum("KIND_GPU" if on_gpu else "KIND_CPU"), "count": 1}],
        "model_warmup": [{"name": "one row", "batch_size": 1, "inputs": given}],
    }
    if on_gpu:  # float32 without TF32, as in `rtx.runtime.backends.onnx`
        cuda = {"name": "cuda", "parameters": [{"key": "use_tf32", "value": "0"}]}
        config["optimization"] = {"execution_accelerators": {"gpu_execution_accelerator": [cuda]}}
    return config


def plan_config(name: str, graph: ir.Model, contract: Contract, engine: EngineEntry) -> dict[str, Any]:
    """The configuration of the graph's model where an engine of TensorRT takes the graph's place."""
    rows = max(profile["batch"][2] for profile in engine.profiles)
    profiles = [str(at) for at in range(len(engine.profiles))]
    return {
        **graph_config(name, graph, contract, on_gpu=False),
        "backend": "tensorrt",
        "max_batch_size": rows,
        "instance_group": [{"kind": Enum("KIND_GPU"), "count": 1, "profile": profiles}],
    }


def item_config(
    name: str, graphs: Sequence[str], contract: Contract, *, on_gpu: bool, engine: str | None = None
) -> dict[str, Any]:
    """The configuration of the model that clients ask.

    Args:
        name: of the model.
        graphs: the models that it asks: for what has tokens, and for images if the model takes them.
        contract: of the bundle.
        on_gpu: whether these run on one, and take large batches.
        engine: the bundle's file that takes the graph's place.
    """

    def text(of: str, *, optional: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = {"name": of, "data_type": Enum("TYPE_STRING"), "dims": [1]}
        return {**found, "optional": True} if optional else found

    def item(of: str) -> list[dict[str, Any]]:
        images = contract.takes_images
        return [text(of, optional=images), *([text(triton.IMAGES[of], optional=True)] if images else [])]

    if contract.task == "embed":
        inputs = [*item(triton.TEXT), text(triton.PROMPT, optional=True)]
        output, width = triton.EMBEDDING, contract.dimension
    else:
        inputs = [*item(triton.QUERY), *item(triton.DOCUMENT)]
        if contract.first_stage_weight > 0:
            inputs.append({"name": triton.FIRST_STAGE, "data_type": Enum("TYPE_FP32"), "dims": [1]})
        output, width = triton.SCORE, 1
    tokens = Budget.of("cuda" if on_gpu else "cpu").max_batch_tokens
    parameters = {triton.GRAPH: graphs[0], triton.MAX_TOKENS: str(tokens)}
    if len(graphs) > 1:
        parameters[triton.IMAGE_GRAPH] = graphs[1]
    if engine is not None:
        parameters[triton.ENGINE] = engine
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": _MAX_BATCH,
        "input": inputs,
        "output": [{"name": output, "data_type": Enum("TYPE_FP32"), "dims": [width]}],
        "instance_group": [{"kind": Enum("KIND_CPU"), "count": _INSTANCES}],
        "dynamic_batching": {"max_queue_delay_microseconds": _DELAY_US},
        "parameters": [{"key": key, "value": {"string_value": value}} for key, value in parameters.items()],
    }


def to_text(message: Mapping[str, Any], indent: int = 0) -> str:
    """A message of protobuf as text: messages nest, and a list of them repeats the field."""
    lines = []
    space = "  " * indent
    for name, value in message.items():
        for one in value if _repeats(value) else [value]:
            if isinstance(one, Mapping):
                lines.append(f"{space}{name} {{\n{to_text(one, indent + 1)}{space}}}\n")
            else:
                lines.append(f"{space}{name}: {_scalar(one)}\n")
    return "".join(lines)


def _repeats(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _scalar(value: object) -> str:
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    return json.dumps(value)


def _choose(bundle: Bundle, variant: str | None) -> tuple[Variant, bool]:
    """A variant, and whether it goes to a GPU."""
    variants = bundle.manifest.variants
    if variant is None:
        on_gpu = [name for name, one in variants.items() if runs_on_gpu(one)]
        on_cpu = [name for name, one in variants.items() if runs_on_cpu(one) and not one.operators]
        if not on_gpu and not on_cpu:
            raise UsageError(f"{bundle.path}: {OPERATORS}; export fp16 or fp32 too")
        variant = bundle.variant(device="cuda")[0] if on_gpu else on_cpu[0]
    chosen = variants.get(variant) or bundle.variant(variant)[1]
    if chosen.operators:
        raise UsageError(f"{bundle.path}: variant '{variant}': {OPERATORS}; export fp16 or fp32 too")
    return chosen, runs_on_gpu(chosen)


def _copy(bundle: Bundle, file: str, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(bundle.path / file, target)
