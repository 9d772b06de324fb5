"""Which parameters are trained, and how fast: parts of a model by name, of any architecture.

A pattern is one of

    embeddings      the tables of tokens, positions and segments, and their norm
    layers:0-5      blocks of the transformer, counted from the input; layers:3 is one, layers:6- is that and all above
    head            what follows the transformer: an embedder's Dense modules, a reranker's classifier; those of both
                    towers where texts and images have one each
    images          all that images go through and texts do not
    images.embeddings, images.layers:0-5, images.head      the same parts of that
    encoder.*.bias  a parameter's name as a file-name pattern, or a module's name for all that is in it
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import transformers
from torch import nn

from rtx.runtime.errors import UsageError
from rtx.trainer.backbone import input_embeddings

if TYPE_CHECKING:
    from rtx.trainer.model import RetrievalModel

_BACKBONE = "backbone."
_TOWER, _TOWER_HEAD = "image_tower.backbone.", "image_tower.head."
_IMAGES = "images"
_LAYERS = re.compile(r"layers:(\d+)(-?)(\d*)")
# What transformers calls the part of a model that images go through.
_IMAGE_MODULES = ("visual", "vision_model", "visual_projection")
# What an embedder never runs: BERT's pooler, what stands for a masked patch in pre-training, what the similarities of
# CLIP and SigLIP are scaled by.
_UNUSED = (
    f"{_BACKBONE}pooler.",
    f"{_BACKBONE}logit_scale",
    f"{_BACKBONE}logit_bias",
    f"{_TOWER}pooler.",
    f"{_TOWER}embeddings.mask_token",
)


def freeze(model: RetrievalModel, patterns: Sequence[str]) -> list[str]:
    """Leave parameters as they are in training. In place, and not at all if it raises.

    Args:
        model: its other parameters stay as they are, trained or not.
        patterns: as the module describes them.

    Returns:
        Names of the parameters that match.

    Raises:
        UsageError: a pattern matches nothing, or nothing would be left to train.
    """
    frozen = {name for matched in _match_all(model, patterns, "freeze") for name in matched}
    unused = _UNUSED if model.task == "embed" else ()
    left = {name for name, parameter in model.named_parameters() if parameter.requires_grad and name not in frozen}
    if not any(not name.startswith(unused) for name in left):
        raise UsageError(f"freeze: {', '.join(patterns)}: nothing is left to train")
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    return [name for name, _ in model.named_parameters() if name in frozen]


def parameter_groups(
    model: RetrievalModel,
    *,
    learning_rate: float,
    weight_decay: float,
    rates: Mapping[str, float] | None = None,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """The trained parameters as groups of an optimizer, in an order that depends on the model and the options alone.

    Args:
        model: frozen as it is to be trained.
        learning_rate: of all that no pattern matches, at its peak.
        weight_decay: of all but biases and norms.
        rates: pattern -> learning rate; where several match, the last one counts.
        layer_decay: factor on the learning rate from each block to the one below it; embeddings have the lowest rate,
            the head has the full one (Howard and Ruder 2018, arXiv:1801.06146). A tower of images is counted from its
            own top; what makes tokens of images has the rate of embeddings. Rates that were given stay as they are.

    Returns:
        Dicts with name, params, lr and weight_decay; the groups without a rate of their own come first.

    Raises:
        UsageError: a pattern matches nothing that is trained, or a number is out of range.
    """
    rates = rates or {}
    bad = [f"rates: '{pattern}': expected more than 0, got {rate}" for pattern, rate in rates.items() if not rate > 0]
    if not 0 < layer_decay <= 1:
        bad.append(f"layer decay: expected above 0 and at most 1, got {layer_decay}")
    if bad:
        raise UsageError("; ".join(bad))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    own: dict[str, int] = {}
    for number, (pattern, matched) in enumerate(zip(rates, _match_all(model, list(rates), "rates"), strict=True)):
        if not matched & trained.keys():
            raise UsageError(f"rates: '{pattern}': all that it matches is frozen")
        own |= dict.fromkeys(matched, number)
    # Asked of transformers, so that a run without options has the groups that its Trainer would make.
    decayed = set(transformers.Trainer.get_decay_parameter_names(cast(Any, None), model))
    below = _blocks_above(model) if layer_decay < 1 else {}
    groups: dict[tuple[int, int, bool], dict[str, Any]] = {}
    for name, parameter in trained.items():
        number, depth = own.get(name, -1), 0 if name in own else below.get(name, 0)
        rate = learning_rate * layer_decay**depth if number < 0 else list(rates.values())[number]
        label = list(rates)[number] if number >= 0 else f"{depth} below the head" if depth else "default"
        key = (number, depth, name not in decayed)
        empty = {
            "name": label if name in decayed else f"{label}, no decay",
            "params": [],
            "lr": rate,
            "weight_decay": weight_decay if name in decayed else 0.0,
        }
        groups.setdefault(key, empty)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def head_parameters(model: RetrievalModel) -> dict[str, nn.Parameter]:
    """What follows the transformer, by the names of `model.named_parameters()`.

    An embedder's Dense modules, of both towers if it has two; a reranker's classification head, with BERT's pooler,
    which is part of it. The output layer of a language model is no head: it is the embeddings' table or as large as
    that.
    """
    backbone = model.backbone
    inner = _BACKBONE
    if model.task == "rerank" and backbone.base_model is not backbone:
        inner = f"{_BACKBONE}{backbone.base_model_prefix}."
    output = backbone.get_output_embeddings()
    excluded = {id(parameter) for parameter in output.parameters()} if output is not None else set()
    classifies = model.task == "rerank" and output is None
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in excluded
        and not name.startswith(_TOWER)
        and (not name.startswith(inner) or (classifies and name.startswith(f"{inner}pooler.")))
    }


def embedding_parameters(model: RetrievalModel) -> dict[str, nn.Parameter]:
    """Everything before the first block, by name: the outermost module around the token embeddings without a block."""
    tokens = input_embeddings(model.backbone)
    table = next(name for name, module in model.named_modules() if module is tokens)
    first = f"{next(iter(_blocks(model)), table.rpartition('.')[0])}."
    around = itertools.accumulate(table.split("."), "{}.{}".format)
    outermost = next(name for name in around if not first.startswith(f"{name}."))
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(f"{outermost}.")}


def layer_parameters(model: RetrievalModel) -> list[dict[str, nn.Parameter]]:
    """The parameters of each block of the transformer that texts go through, from the input up, by name. Empty if it
    has no such stack."""
    return _parameters_of(model, _blocks(model))


def image_parameters(model: RetrievalModel) -> dict[str, nn.Parameter]:
    """What images go through and texts do not, by name: a tower, or what makes tokens of images."""
    around = _around_images(model)
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(around)}


def image_layer_parameters(model: RetrievalModel) -> list[dict[str, nn.Parameter]]:
    """The parameters of each block of the transformer that images go through, from the input up, by name."""
    return _parameters_of(model, _blocks(model, images=True))


def _image_embedding_parameters(model: RetrievalModel) -> dict[str, nn.Parameter]:
    """What comes before the first block: patches and positions."""
    first = next(iter(image_layer_parameters(model)), {})
    before = itertools.takewhile(lambda item: item[0] not in first, image_parameters(model).items())
    return dict(before) if first else {}


def _parameters_of(model: RetrievalModel, modules: Sequence[str]) -> list[dict[str, nn.Parameter]]:
    return [
        {name: parameter for name, parameter in model.named_parameters() if name.startswith(f"{module}.")}
        for module in modules
    ]


def _around_images(model: RetrievalModel) -> tuple[str, ...]:
    """How the names begin of what images go through."""
    if model.layout.image_tower is not None:
        return (_TOWER, _TOWER_HEAD)
    names = [name for name, _ in model.backbone.named_modules() if name.split(".")[-1] in _IMAGE_MODULES]
    return tuple(f"{_BACKBONE}{name}." for name in names) if model.layout.images else ()


def closest(wanted: str, known: Iterable[str], shown: int = 3) -> str:
    """A hint for a message where there are too many names to list them: the nearest ones, or some."""
    known = sorted(set(known))
    close = difflib.get_close_matches(wanted, known, n=shown, cutoff=0.5)
    if close:
        return f"nearest: {', '.join(close)}"
    return f"there are {', '.join(known[:shown])}{', …' if len(known) > shown else ''}"


def _blocks(model: RetrievalModel, *, images: bool = False) -> list[str]:
    """Names of the blocks' modules: the outermost list of as many modules as the configuration has layers.

    Where blocks share their weights there are fewer of them: then it is the outermost list.
    """
    around = _around_images(model)
    transformer, prefix = model.backbone, _BACKBONE
    config = transformer.config.get_text_config()
    if images and model.image_tower is not None:
        transformer, prefix = model.image_tower.backbone, _TOWER
        config = transformer.config
    elif images:
        config = getattr(transformer.config, "vision_config", None)
    layers = getattr(config, "num_hidden_layers", None) or getattr(config, "depth", None)
    lists = {
        f"{prefix}{name}": len(module)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.ModuleList) and f"{prefix}{name}.".startswith(around) == images
    }
    name = next((name for name, length in lists.items() if length == layers), next(iter(lists), None))
    return [f"{name}.{number}" for number in range(lists[name])] if name is not None else []


def _blocks_above(model: RetrievalModel) -> dict[str, int]:
    """Name -> how many steps a parameter is below the head. What is in no block and no embedding is not below it."""
    layers, own = layer_parameters(model), image_layer_parameters(model)
    depths = dict.fromkeys(embedding_parameters(model), len(layers) + 1)
    if model.contract.visual is not None:
        # Visual tokens are embeddings of the language model.
        return depths | _below(layers) | dict.fromkeys(image_parameters(model), len(layers) + 1)
    return depths | _below(layers) | _below(own) | dict.fromkeys(_image_embedding_parameters(model), len(own) + 1)


def _below(layers: Sequence[Mapping[str, nn.Parameter]]) -> dict[str, int]:
    return {name: len(layers) - number for number, layer in enumerate(layers) for name in layer}


def _match_all(model: RetrievalModel, patterns: Sequence[str], what: str) -> list[set[str]]:
    """The names that each pattern matches. Raises UsageError, which names every pattern that matches none."""
    found = [_match(model, pattern) for pattern in patterns]
    empty = [
        f"'{pattern}' {_hint(model, pattern)}" for pattern, names in zip(patterns, found, strict=True) if not names
    ]
    if empty:
        raise UsageError(f"{what}: {'; '.join(empty)}")
    return found


def _match(model: RetrievalModel, pattern: str) -> set[str]:
    of_images = pattern.startswith(f"{_IMAGES}.")
    part = pattern.removeprefix(f"{_IMAGES}.")
    if pattern == _IMAGES:
        return set(image_parameters(model))
    if part == "embeddings":
        return set(_image_embedding_parameters(model) if of_images else embedding_parameters(model))
    if part == "head":
        return {name for name in head_parameters(model) if not of_images or name.startswith(_TOWER_HEAD)}
    if chosen := _LAYERS.fullmatch(part):
        first = int(chosen[1])
        last = int(chosen[3]) if chosen[3] else None if chosen[2] else first
        layers = image_layer_parameters(model) if of_images else layer_parameters(model)
        inside = first < len(layers) and (last is None or first <= last < len(layers))
        return {name for layer in layers[first : None if last is None else last + 1] for name in layer if inside}
    names = [name for name, _ in model.named_parameters()]
    return {
        name
        for name in names
        for spelt in (name, name.removeprefix(_BACKBONE))
        if fnmatch.fnmatchcase(spelt, pattern) or fnmatch.fnmatchcase(spelt, f"{pattern}.*")
    }


def _hint(model: RetrievalModel, pattern: str) -> str:
    """Why a pattern matches nothing."""
    of_images = pattern.partition(".")[0] == _IMAGES
    part = pattern.removeprefix(f"{_IMAGES}.")
    if of_images and not _around_images(model):
        return "matches nothing: the model takes no images"
    if part == "head":
        return "matches nothing: nothing with weights follows the transformer"
    if part.startswith("layers:"):
        start = pattern.removesuffix(part)
        last = len(_blocks(model, images=of_images)) - 1
        return f"matches nothing: expected blocks of {start}layers:0 to {start}layers:{last}"
    names = [name.removeprefix(_BACKBONE).split(".") for name, _ in model.named_parameters()]
    modules = {".".join(parts[:end]) for parts in names for end in range(1, len(parts) + 1)}
    return f"matches no parameter ({closest(pattern, {*modules, 'embeddings', 'head', 'images', 'layers:0'})})"
