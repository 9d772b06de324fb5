"""LoRA: small matrices beside the linear layers are trained, the model itself stays as it is.

W + (alpha / rank)·B·A, with A [rank, in] random and B [out, rank] zero at first: Hu et al. 2021, arXiv:2106.09685.

peft puts the adapters into `model.backbone`, in place, and into the tower of images where there is one. What is trained
beside them is what starts at random or stands for itself behind the transformer: an embedder's Dense modules, a
reranker's classifier. A checkpoint holds the whole model, merged, for every tool to open; the adapters lie beside it,
since a training run cannot go on from their sum.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rtx.runtime.errors import CheckpointError, MissingExtraError, UsageError
from rtx.trainer.backbone import input_embeddings, save_backbone
from rtx.trainer.parameters import closest, head_parameters, image_parameters

if TYPE_CHECKING:
    from rtx.trainer.model import RetrievalModel

ADAPTER_STATE_NAME = "adapter_state.safetensors"
"""In a training checkpoint: what `adapter_state` gives."""

_ADAPTER = "default"  # peft's name for the only one
_BACKBONE, _TOWER = "backbone.", "image_tower.backbone."
# Names that peft gives the parts of a layer it has put an adapter into.
_BASE, _ADAPTED = ".base_layer.", ".lora_"


def add_lora(
    model: RetrievalModel, *, rank: int, alpha: float, dropout: float = 0.0, targets: Sequence[str] | None = None
) -> None:
    """Put adapters into the transformers, and let nothing be trained but them and the head. In place.

    The adapters are float32 at least, whatever the backbone is. Seed torch before: A starts at random. Change the
    dropout of the transformer before, too: `dropout` is that of the adapters' input.

    Args:
        model: has no adapters yet.
        rank: of the update, at least 1.
        alpha: the update is scaled by alpha / rank.
        dropout: 0 to below 1.
        targets: which linear layers: the last parts of their names ("query", "attn.Wqkv") or patterns of the whole
            ("layers.1?.*_proj", "image_tower.*.q_proj"); None for all those in the blocks of the transformers. Where
            images become tokens of a language model, that model alone: what makes the tokens then needs no gradient.

    Raises:
        UsageError: the model has adapters, a number is out of range, or a target matches no linear layer.
    """
    if has_adapters(model):
        raise UsageError("lora: the model has adapters already")
    if rank < 1 or not alpha > 0 or not 0 <= dropout < 1:
        raise UsageError(
            f"lora: expected a rank of at least 1, an alpha above 0 and a dropout of 0 to below 1; "
            f"got {rank}, {alpha} and {dropout}"
        )
    chosen = _linear_layers(model, targets)
    peft = _peft()
    for prefix, transformer in _transformers(model).items():
        names = [name.removeprefix(prefix) for name in chosen if name.startswith(prefix)]
        if names:
            config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, bias="none")
            peft.inject_adapter_in_model(config, transformer, _ADAPTER)
    found = {name for name, _ in _lora_layers(model)}
    if found != set(chosen):
        raise UsageError(f"lora: peft adapted other layers than it was to: {', '.join(sorted(found ^ set(chosen)))}")
    trained = _trained_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
        if _ADAPTED in name:
            # Small steps are lost in bfloat16.
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def has_adapters(model: RetrievalModel) -> bool:
    """Whether `add_lora` was called."""
    return any(getattr(transformer, "peft_config", None) for transformer in _transformers(model).values())


def _transformers(model: RetrievalModel) -> dict[str, Any]:
    """What may have adapters, by how the names of its parameters begin."""
    towers = {} if model.image_tower is None else {_TOWER: model.image_tower.backbone}
    return {_BACKBONE: model.backbone, **towers}


def adapter_state(model: RetrievalModel, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What is trained: the adapters and the head, by their names in `model.state_dict()`.

    Args:
        model: has adapters.
        state: the model's state; None for its own. Of a sharded model it is the gathered one.
    """
    state = model.state_dict() if state is None else state
    return {name: state[name].detach() for name in sorted(_trained_names(model))}


def load_adapter_state(model: RetrievalModel, state: Mapping[str, Tensor]) -> None:
    """Go on from what `adapter_state` gave, bit for bit.

    Args:
        model: has the same adapters, and the same weights below them.
        state: as `adapter_state` gave it.

    Raises:
        CheckpointError: it is that of another model, or of other adapters.
    """
    own = adapter_state(model)
    wrong = [
        f"{name}: expected {_shape(own.get(name))}, got {_shape(state.get(name))}"
        for name in sorted({*own, *state})
        if _shape(own.get(name)) != _shape(state.get(name))
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"adapters: not those of this model: {'; '.join(wrong[:5])}{more}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def merged(model: RetrievalModel, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of the whole model with the adapters added to theirs, by the names of a model without adapters.

    The model stays as it is, to the bit. Weights without an adapter are the model's own, not copies; in half precision
    the sum is rounded to what the weight is. Without adapters, this is the model's state.

    Args:
        model: with adapters or without.
        state: the model's state; None for its own. Of a sharded model it is the gathered one.
    """
    state = dict(model.state_dict() if state is None else state)
    for name, layer in _lora_layers(model) if has_adapters(model) else ():
        key = f"{name}.base_layer.weight"
        weight = state[key]
        full = torch.promote_types(weight.dtype, torch.float32)
        down, up = (state[f"{name}.lora_{part}.{_ADAPTER}.weight"].to(full) for part in "AB")
        state[key] = (weight.to(full) + layer.scaling[_ADAPTER] * (up @ down)).to(weight.dtype)
    return {name.replace(_BASE, "."): tensor for name, tensor in state.items() if _ADAPTED not in name}


def merge(model: RetrievalModel) -> None:
    """Add the adapters to their weights for good: afterwards the model has none. In place."""
    if not has_adapters(model):
        return
    weights = merged(model)
    for name, layer in list(_lora_layers(model)):
        parent, _, child = name.rpartition(".")
        plain = layer.get_base_layer()
        plain.weight.data = weights[f"{name}.weight"]
        setattr(model.get_submodule(parent), child, plain)
    for transformer in _transformers(model).values():
        if hasattr(transformer, "peft_config"):
            del transformer.peft_config
    model.requires_grad_(True)


def save_adapter(model: RetrievalModel, folder: Path, *, base: str | None = None) -> None:
    """Write the adapters, and the classifier of a reranker, as peft has them, with the model's Sentence Transformers
    side and tokenizer around them. peft, transformers and sentence-transformers open the folder and fetch its base.

    Args:
        model: has adapters.
        folder: exists. Of a model with two towers, each one's adapters lie in that tower's folder.
        base: what they belong to; None for the path or name that the backbone was loaded from.

    Raises:
        UsageError: the model has no adapters.
    """
    if not has_adapters(model):
        raise UsageError("the model has no adapters that could be saved")
    written = model.write_around(folder)
    _write_adapter(model, _BACKBONE, folder / written.backbone_folder, base, model.layout.backbone_folder)
    if model.image_tower is not None and written.image_tower is not None:
        _write_adapter(model, _TOWER, folder / written.image_tower.folder, base, model.image_tower.layout.folder)


def _write_adapter(model: RetrievalModel, prefix: str, folder: Path, base: str | None, base_folder: str) -> None:
    """Of one transformer, which lies in `base_folder` of its base; one without adapters is written whole."""
    transformer = _transformers(model)[prefix]
    if not getattr(transformer, "peft_config", None):
        save_backbone(transformer, folder, transformer.state_dict())
        return
    heads = {name.removeprefix(prefix) for name in head_parameters(model) if name.startswith(prefix)}
    kind = "SEQ_CLS" if transformer.get_output_embeddings() is None else "CAUSAL_LM"
    config = transformer.peft_config[_ADAPTER].to_dict()
    config |= {
        "base_model_name_or_path": "/".join(part for part in (base or transformer.name_or_path, base_folder) if part),
        "task_type": "FEATURE_EXTRACTION" if model.task == "embed" else kind,
        "inference_mode": True,
        "modules_to_save": sorted({_module_to_save(name) for name in heads}) or None,
        "target_modules": sorted(config["target_modules"]),
    }
    weights = {
        f"base_model.model.{name.removeprefix(prefix).replace(f'.{_ADAPTER}.', '.')}": tensor.cpu().contiguous()
        for name, tensor in adapter_state(model).items()
        if name.startswith(prefix)
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=list) + "\n")
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _module_to_save(parameter: str) -> str:
    """The outermost module of a head, as peft matches them: by the end of its name."""
    parts = parameter.split(".")
    return parts[1] if parts[1:2] == ["pooler"] else parts[0]


def _linear_layers(model: RetrievalModel, targets: Sequence[str] | None) -> list[str]:
    """Names of the layers to adapt, in the model's order. A head's are left out: they are trained themselves."""
    heads = head_parameters(model)
    linear = [
        f"{prefix}{name}"
        for prefix, transformer in _transformers(model).items()
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and f"{prefix}{name}.weight" not in heads
    ]
    if targets is None:
        return _in_blocks(model, linear)
    embeddings = input_embeddings(model.backbone).weight
    problems, chosen = [], set()
    for target in targets:
        found = [name for name in linear if _matches(name.removeprefix(_BACKBONE), target)]
        if tied := [name for name in found if model.get_submodule(name).weight is embeddings]:
            problems.append(f"'{target}': {tied[0].removeprefix(_BACKBONE)} shares its weight with the embeddings")
        elif not found:
            problems.append(f"'{target}' matches no linear layer of the transformer ({closest(target, _ends(linear))})")
        chosen |= set(found)
    if problems or not chosen:
        raise UsageError(f"lora targets: {'; '.join(problems) or 'expected at least one'}")
    return [name for name in linear if name in chosen]


def _in_blocks(model: RetrievalModel, linear: Sequence[str]) -> list[str]:
    """Those of the layers that are in the blocks of the transformers."""
    stacks = tuple(
        f"{prefix}{name}."
        for prefix, transformer in _transformers(model).items()
        for name, module in transformer.named_modules()
        if isinstance(module, nn.ModuleList)
    )
    left_out = image_parameters(model) if model.contract.visual is not None else {}
    found = [name for name in linear if name.startswith(stacks) and f"{name}.weight" not in left_out]
    if not found:
        raise UsageError(f"lora: {type(model.backbone).__name__} has no linear layers in blocks; name the targets")
    return found


def _matches(name: str, target: str) -> bool:
    return fnmatch.fnmatchcase(name, target) or fnmatch.fnmatchcase(name, f"*.{target}")


def _ends(names: Iterable[str]) -> set[str]:
    """What a target can be: the last part of a name, or the last two where the last alone says little."""
    return {".".join(name.split(".")[-parts:]) for name in names for parts in (1, 2)}


def _lora_layers(model: RetrievalModel) -> Iterator[tuple[str, Any]]:
    """Names and modules with adapters."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


def _trained_names(model: RetrievalModel) -> set[str]:
    adapters = {name for name, _ in model.named_parameters() if _ADAPTED in name}
    return adapters | set(head_parameters(model))


def _shape(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else list(tensor.shape)


def _peft() -> Any:
    try:
        import peft
    except ImportError as missing:
        raise MissingExtraError("peft", "train", "LoRA") from missing
    return peft
