"""LoRA: small matrices beside the linear layers are trained, the model itself stays as it is.

W + (alpha / rank)·B·A, with A [rank, in] random and B [out, rank] zero at first: Hu et al. 2021, arXiv:2106.09685.

peft puts the adapters into `model.backbone`, in place. What is trained beside them is what starts at random or stands
for itself behind the transformer: an embedder's Dense modules, a reranker's classifier. A checkpoint holds the whole
model, merged, for every tool to open; the adapters lie beside it, since a training run cannot go on from their sum.
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
from rtx.trainer.parameters import closest, head_parameters

if TYPE_CHECKING:
    from rtx.trainer.model import RetrievalModel

ADAPTER_STATE_NAME = "adapter_state.safetensors"
"""In a training checkpoint: what `adapter_state` gives."""

_ADAPTER = "default"  # peft's name for the only one
_BACKBONE = "backbone."
# Names that peft gives the parts of a layer it has put an adapter into.
_BASE, _ADAPTED = ".base_layer.", ".lora_"


def add_lora(
    model: RetrievalModel, *, rank: int, alpha: float, dropout: float = 0.0, targets: Sequence[str] | None = None
) -> None:
    """Put adapters into the backbone, and let nothing be trained but them and the head. In place.

    The adapters are float32 at least, whatever the backbone is. Seed torch before: A starts at random. Change the
    dropout of the transformer before, too: `dropout` is that of the adapters' input.

    Args:
        model: has no adapters yet.
        rank: of the update, at least 1.
        alpha: the update is scaled by alpha / rank.
        dropout: 0 to below 1.
        targets: which linear layers: the last parts of their names ("query", "attn.Wqkv") or patterns of the whole
            ("layers.1?.*_proj"); None for all those in the transformer's blocks.

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
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=chosen, bias="none")
    peft.inject_adapter_in_model(config, model.backbone, _ADAPTER)
    found = {name for name, _ in _lora_layers(model.backbone)}
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
    return bool(getattr(model.backbone, "peft_config", None))


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
    for name, layer in _lora_layers(model.backbone) if has_adapters(model) else ():
        key = f"{_BACKBONE}{name}.base_layer.weight"
        weight = state[key]
        full = torch.promote_types(weight.dtype, torch.float32)
        down, up = (state[f"{_BACKBONE}{name}.lora_{part}.{_ADAPTER}.weight"].to(full) for part in "AB")
        state[key] = (weight.to(full) + layer.scaling[_ADAPTER] * (up @ down)).to(weight.dtype)
    return {name.replace(_BASE, "."): tensor for name, tensor in state.items() if _ADAPTED not in name}


def merge(model: RetrievalModel) -> None:
    """Add the adapters to their weights for good: afterwards the model has none. In place."""
    if not has_adapters(model):
        return
    weights = merged(model)
    for name, layer in list(_lora_layers(model.backbone)):
        parent, _, child = name.rpartition(".")
        plain = layer.get_base_layer()
        plain.weight.data = weights[f"{_BACKBONE}{name}.weight"]
        setattr(model.backbone.get_submodule(parent), child, plain)
    del model.backbone.peft_config
    model.requires_grad_(True)


def save_adapter(model: RetrievalModel, folder: Path, *, base: str | None = None) -> None:
    """Write the adapters, and the classifier of a reranker, as peft has them, with the model's Sentence Transformers
    side and tokenizer around them. peft, transformers and sentence-transformers open the folder and fetch its base.

    Args:
        model: has adapters.
        folder: exists.
        base: what they belong to; None for the path or name that the backbone was loaded from.

    Raises:
        UsageError: the model has no adapters.
    """
    if not has_adapters(model):
        raise UsageError("the model has no adapters that could be saved")
    heads = {name.removeprefix(_BACKBONE) for name in head_parameters(model) if name.startswith(_BACKBONE)}
    kind = "SEQ_CLS" if model.backbone.get_output_embeddings() is None else "CAUSAL_LM"
    config = model.backbone.peft_config[_ADAPTER].to_dict()
    config |= {
        "base_model_name_or_path": base or model.backbone.name_or_path,
        "task_type": "FEATURE_EXTRACTION" if model.task == "embed" else kind,
        "inference_mode": True,
        "modules_to_save": sorted({_module_to_save(name) for name in heads}) or None,
        "target_modules": sorted(config["target_modules"]),
    }
    weights = {
        f"base_model.model.{name.removeprefix(_BACKBONE).replace(f'.{_ADAPTER}.', '.')}": tensor.cpu().contiguous()
        for name, tensor in adapter_state(model).items()
        if name.startswith(_BACKBONE)
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=list) + "\n")
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.write_around(folder)


def _module_to_save(parameter: str) -> str:
    """The outermost module of a head, as peft matches them: by the end of its name."""
    parts = parameter.split(".")
    return parts[1] if parts[1:2] == ["pooler"] else parts[0]


def _linear_layers(model: RetrievalModel, targets: Sequence[str] | None) -> list[str]:
    """Names of the layers to adapt, in the model's order. A head's are left out: they are trained themselves."""
    backbone, heads = model.backbone, head_parameters(model)
    linear = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and f"{_BACKBONE}{name}.weight" not in heads
    ]
    if targets is None:
        stacks = tuple(f"{name}." for name, module in backbone.named_modules() if isinstance(module, nn.ModuleList))
        found = [name for name in linear if name.startswith(stacks)]
        if not found:
            raise UsageError(f"lora: {type(backbone).__name__} has no linear layers in blocks; name the targets")
        return found
    embeddings = backbone.get_input_embeddings().weight
    problems, chosen = [], set()
    for target in targets:
        found = [name for name in linear if _matches(name, target)]
        if tied := [name for name in found if backbone.get_submodule(name).weight is embeddings]:
            problems.append(f"'{target}': {tied[0]} shares its weight with the embeddings")
        elif not found:
            problems.append(f"'{target}' matches no linear layer of the transformer ({closest(target, _ends(linear))})")
        chosen |= set(found)
    if problems or not chosen:
        raise UsageError(f"lora targets: {'; '.join(problems) or 'expected at least one'}")
    return [name for name in linear if name in chosen]


def _matches(name: str, target: str) -> bool:
    return fnmatch.fnmatchcase(name, target) or fnmatch.fnmatchcase(name, f"*.{target}")


def _ends(names: Iterable[str]) -> set[str]:
    """What a target can be: the last part of a name, or the last two where the last alone says little."""
    return {".".join(name.split(".")[-parts:]) for name in names for parts in (1, 2)}


def _lora_layers(backbone: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in backbone.named_modules() if hasattr(module, "lora_A"))


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
