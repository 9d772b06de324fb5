"""The Sentence Transformers layout as data: what a checkpoint says of a model, beside its weights and its tokenizer.

    modules.json                        the chain of modules, each with its folder
    config_sentence_transformers.json   kind of model, prompts, similarity, truncate_dim, the reranker's activation
    sentence_bert_config.json           how the transformer is used; in older folders the limit on length
    1_Pooling/config.json               pooling modes
    2_Dense/config.json, .safetensors   any number of Dense and Normalize modules, in the chain's order
    1_LogitScore/config.json            the tokens whose logits score a pair, of a reranker that is a language model
    router_config.json                  of a model with a tower for texts and one for images: the modules of each, in
                                        folders text_0_Transformer, text_1_Pooling, image_0_Transformer, ...

Version 6 is written; version 6, all older ones and a bare Hugging Face folder are read. What changes a model's output
and is not understood is an error, never ignored.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, cast, get_args

from rtx.runtime.contract import Activation, Pooling, Similarity, Task
from rtx.runtime.errors import CheckpointError
from rtx.runtime.schema import parse
from rtx.trainer.json_files import one_of, read_json, read_object, typed, write_json
from rtx.trainer.layout import DenseConfig, HeadModule, ImageTower, Layout, LogitScoreConfig, NormalizeConfig
from rtx.trainer.transformer_config import (
    image_transformer_config,
    read_image_transformer,
    read_transformer,
    transformer_config,
)

# The version of the layout that is written. sentence-transformers warns about folders newer than itself.
LAYOUT_VERSION = "6.0.0"

# The kinds of model: the modules it starts with, and those that may follow in any number.
_CHAINS: tuple[tuple[str, list[str], list[str]], ...] = (
    ("SentenceTransformer", ["Transformer", "Pooling"], ["Dense", "Normalize"]),
    # A dual encoder, which pools by itself.
    ("SentenceTransformer", ["Transformer"], ["Dense", "Normalize"]),
    ("SentenceTransformer", ["CLIPModel"], ["Dense", "Normalize"]),
    # What stands behind a router is for all routes.
    ("SentenceTransformer", ["Router"], ["Pooling", "Dense", "Normalize"]),
    ("CrossEncoder", ["Transformer"], []),
    ("CrossEncoder", ["Transformer", "LogitScore"], []),
)
_TYPES = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Router": "sentence_transformers.base.modules.router.Router",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
    "LogitScore": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
}
_ROUTES = ("text", "image")
_HEAD = {"Dense", "Normalize"}
# Of fast and slow ones; their own are tokenizer.json and one or two of these.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
# In the order in which version 5 and older concatenate them.
_LEGACY_MODES: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATION_FILES: dict[Activation, str] = {
    "sigmoid": "torch.nn.modules.activation.Sigmoid",
    "identity": "torch.nn.modules.linear.Identity",
}


@dataclass(frozen=True, kw_only=True)
class _PoolingConfig:
    pooling_mode: tuple[Pooling, ...]
    embedding_dimension: int | None = None
    include_prompt: bool = True


@dataclass(frozen=True, kw_only=True)
class _RouterConfig:
    types: dict[str, str]
    structure: dict[str, tuple[str, ...]]
    parameters: dict[str, Any] = field(default_factory=dict)


def read_layout(folder: Path, task: Task | None = None) -> Layout:
    """Read what a checkpoint says about its model.

    Args:
        folder: the checkpoint.
        task: None for the checkpoint's own. Another than that starts from its backbone alone: "embed" with new pooling,
            "rerank" with a new classification head.

    Raises:
        CheckpointError: a file is missing, damaged, or asks for something that rtx does not do.
    """
    chain = _read_chain(folder)
    model = read_object(folder / "config_sentence_transformers.json") or {}
    kind = str(model.get("model_type", "SentenceTransformer"))
    tower = None
    if chain:
        _check_chain(folder, chain, kind)
    if chain and chain[0][0] == "Router":
        chain, tower = _read_router(folder, chain)
    backbone_folder = chain[0][1] if chain else ""
    _refuse_adapter(folder / backbone_folder / "adapter_config.json")
    _refuse_images_alone(folder / backbone_folder)
    backbone = read_object(folder / backbone_folder / "config.json")
    if backbone is None:
        missing = folder / backbone_folder / "config.json"
        raise CheckpointError(
            f"{missing}: missing; expected a Sentence Transformers checkpoint or a Hugging Face model"
        )
    if chain and kind == "SentenceTransformer" and task in (None, "embed"):
        return _read_embedder(folder, chain, model, tower)
    if chain and kind == "CrossEncoder" and task in (None, "rerank"):
        return _read_reranker(folder, chain, model, backbone)
    return _bare_layout(folder, backbone, backbone_folder, task)


def _refuse_adapter(file: Path) -> None:
    adapter = read_object(file)
    if adapter is not None:
        base = adapter.get("base_model_name_or_path") or "its base model"
        raise CheckpointError(
            f"{file.parent}: holds a PEFT adapter of {base}, not a whole model; merge them first: load {base}, then "
            "peft.PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(merged), and save the "
            "tokenizer beside it"
        )


def _refuse_images_alone(folder: Path) -> None:
    if _has_image_processor(folder) and not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder}: has an image processor and no tokenizer; expected a model of texts, or of both. rtx compose "
            "puts a model of images beside one of texts"
        )


def read_image_tower(folder: Path) -> ImageTower:
    """Read what a checkpoint of a model of images alone says about it, with Sentence Transformers' modules or without.

    Args:
        folder: the checkpoint.

    Returns:
        The tower; without modules its pooling is empty, as nothing is said about it.

    Raises:
        CheckpointError: it has no image processor, or asks for something that rtx does not do.
    """
    chain = _read_chain(folder) or [("Transformer", "")]
    names = [name for name, _ in chain]
    path = chain[0][1]
    if names[0] != "Transformer" or names[1:2] not in ([], ["Pooling"]) or not set(names[2:]) <= _HEAD:
        raise CheckpointError(
            f"{folder / 'modules.json'}: expected Transformer, Pooling, then any of {', '.join(sorted(_HEAD))}; got "
            f"{', '.join(names)}"
        )
    _refuse_adapter(folder / path / "adapter_config.json")
    if not _has_image_processor(folder / path):
        raise CheckpointError(
            f"{folder / path}: no image processor (preprocessor_config.json); expected a model of images"
        )
    read_image_transformer(folder, path)
    return _image_tower(folder, chain)


def _image_tower(folder: Path, chain: Sequence[tuple[str, str]]) -> ImageTower:
    """The tower of a chain of Transformer, Pooling if there is one, and what follows."""
    pooling = _PoolingConfig(pooling_mode=())
    if len(chain) > 1:
        pooling = _read_pooling(folder / chain[1][1] / "config.json")
    return ImageTower(
        folder=chain[0][1],
        pooling=pooling.pooling_mode,
        pooling_dimension=pooling.embedding_dimension,
        head=tuple(_read_module(folder, name, path) for name, path in chain[2:]),
    )


def _read_chain(folder: Path) -> list[tuple[str, str]]:
    """(class, folder) of each module; empty if there is no modules.json."""
    path = folder / "modules.json"
    entries = read_json(path)
    if entries is None:
        return []
    if not isinstance(entries, list) or not entries or not all(_is_module(entry) for entry in entries):
        raise CheckpointError(f"{path}: expected a list of modules, each with the keys type and path, both texts")
    chain = [(_class_of(entry["type"]), entry["path"].rstrip("/")) for entry in entries]
    outside = [path for _, path in chain if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts]
    if outside:
        raise CheckpointError(f"{folder / 'modules.json'}: expected paths inside the folder, got {', '.join(outside)}")
    return chain


def _is_module(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("type"), str) and isinstance(entry.get("path"), str)


def _class_of(dotted: str) -> str:
    """The class if Sentence Transformers defines it; code of the checkpoint's own keeps its whole name."""
    return dotted.rpartition(".")[2] if dotted.startswith("sentence_transformers.") else dotted


def _check_chain(folder: Path, chain: Sequence[tuple[str, str]], kind: str) -> None:
    names = [name for name, _ in chain]
    for known, first, rest in _CHAINS:
        if kind == known and names[: len(first)] == first and set(names[len(first) :]) <= set(rest):
            return
    supported = "; ".join(
        f"{known} of {', '.join(first)}" + (f", then any of {', '.join(rest)}" if rest else "")
        for known, first, rest in _CHAINS
    )
    raise CheckpointError(
        f"{folder / 'modules.json'}: a {kind} of {', '.join(names)} is not supported; supported are: {supported}"
    )


def _read_router(folder: Path, chain: Sequence[tuple[str, str]]) -> tuple[list[tuple[str, str]], ImageTower]:
    """(class, folder) of each module that texts go through, and the tower that images go through.

    Modules behind the router belong to both.
    """
    path = chain[0][1]
    file = folder / path / "router_config.json"
    config = read_object(file)
    if config is None:
        raise CheckpointError(f"{file}: missing; expected the configuration of a Router module")
    routes = parse(_RouterConfig, config, source=str(file), error=CheckpointError)
    _check_routes(file, routes)
    # Each route has a folder of its own for what stands behind the router, once it is written.
    both = list(chain[1:])
    texts, images = (
        [(_class_of(routes.types[name]), f"{path}/{name}".lstrip("/")) for name in routes.structure[route]] + both
        for route in _ROUTES
    )
    names = [[name for name, _ in route] for route in (texts, images)]
    for route, found in zip(_ROUTES, names, strict=True):
        if found[:2] != ["Transformer", "Pooling"] or not set(found[2:]) <= _HEAD:
            raise CheckpointError(
                f"{file}: route {route}: expected Transformer, Pooling, then any of {', '.join(sorted(_HEAD))}; got "
                f"{', '.join(found)}"
            )
    read_image_transformer(folder, images[0][1])
    return texts, _image_tower(folder, images)


def _check_routes(file: Path, routes: _RouterConfig) -> None:
    try:
        given = {ast.literal_eval(key): route for key, route in (routes.parameters.get("route_mappings") or {}).items()}
        wrong = {(task, modality): route for (task, modality), route in given.items() if modality != route}
    except (ValueError, SyntaxError, AttributeError, TypeError) as broken:
        raise CheckpointError(f"{file}: route_mappings: expected routes by (task, modality): {broken}") from broken
    unknown = [name for names in routes.structure.values() for name in names if name not in routes.types]
    if set(routes.structure) != set(_ROUTES) or wrong or unknown:
        raise CheckpointError(
            f"{file}: expected the routes text and image, each for its own modality and any task; got "
            f"{', '.join(routes.structure)}{f', mapped by {wrong}' if wrong else ''}"
            f"{f', of unknown modules {unknown}' if unknown else ''}"
        )


def _read_embedder(
    folder: Path, chain: Sequence[tuple[str, str]], model: Mapping[str, Any], tower: ImageTower | None
) -> Layout:
    transformer = read_transformer(folder, chain[0][1], "embed")
    if chain[0][0] == "CLIPModel":
        transformer |= {"features": True, "images": True}
    pools = [name for name, _ in chain[1:2]] == ["Pooling"]
    if pools == transformer.get("features", False):
        raise CheckpointError(
            f"{folder / 'modules.json'}: expected a Pooling module behind a transformer that gives token embeddings, "
            "and none behind one that gives sentence embeddings"
        )
    pooling = _read_pooling(folder / chain[1][1] / "config.json") if pools else _PoolingConfig(pooling_mode=())
    source = folder / "config_sentence_transformers.json"
    return Layout(
        task="embed",
        image_tower=tower,
        pooling=pooling.pooling_mode,
        pooling_dimension=pooling.embedding_dimension,
        include_prompt=pooling.include_prompt,
        head=tuple(_read_module(folder, name, path) for name, path in chain[2 if pools else 1 :]),
        similarity=cast(Similarity, one_of(source, model, "similarity_fn_name", get_args(Similarity)) or "cosine"),
        truncate_dim=typed(source, model, "truncate_dim", int),
        **_read_prompts(source, model),
        **transformer,
    )


def _read_reranker(
    folder: Path, chain: Sequence[tuple[str, str]], model: Mapping[str, Any], backbone: Mapping[str, Any]
) -> Layout:
    source = folder / "config_sentence_transformers.json"
    name = typed(source, model, "activation_fn", str)
    logit_score = _read_logit_score(folder / chain[1][1] / "config.json") if len(chain) > 1 else None
    return Layout(
        task="rerank",
        logit_score=logit_score,
        activation=_read_activation(source, name) if name else _legacy_activation(folder, backbone),
        first_stage_weight=typed(source, model, "first_stage_weight", float) or 0.0,
        **_read_prompts(source, model),
        **read_transformer(folder, chain[0][1], "rerank", generates=logit_score is not None),
    )


def _read_logit_score(file: Path) -> LogitScoreConfig:
    config = read_object(file)
    if config is None:
        raise CheckpointError(f"{file}: missing; expected the configuration of a LogitScore module")
    return parse(LogitScoreConfig, config, source=str(file), error=CheckpointError)


def _bare_layout(folder: Path, backbone: Mapping[str, Any], backbone_folder: str, task: Task | None) -> Layout:
    """A model of transformers without a Sentence Transformers side.

    An embedder pools as sentence-transformers does here, the mean or a causal model's last token, and normalises. A
    causal model as a reranker is scored by its yes and no, as there.
    """
    architectures = backbone.get("architectures") or [""]
    classifies = str(architectures[0]).endswith("ForSequenceClassification")
    sees = _sees(folder / backbone_folder)
    generates = str(architectures[0]).endswith("ForCausalLM") or (
        sees and str(architectures[0]).endswith("ForConditionalGeneration")
    )
    causal = generates and backbone.get("is_causal", True) is not False
    if task == "rerank" and generates:
        return Layout(
            task="rerank",
            backbone_folder=backbone_folder,
            images=sees,
            new_logit_score=True,
            message_format="auto",
            activation="sigmoid",
        )
    if task == "rerank" or (task is None and classifies):
        activation = _legacy_activation(folder / backbone_folder, backbone)
        return Layout(
            task="rerank",
            backbone_folder=backbone_folder,
            new_classifier=not classifies,
            message_format="auto" if classifies else None,
            activation=activation,
        )
    return Layout(
        task="embed",
        backbone_folder=backbone_folder,
        images=sees,
        features=sees and not causal,
        message_format="auto" if sees and causal else None,
        pooling=() if sees and not causal else ("lasttoken",) if causal else ("mean",),
        head=(HeadModule(config=NormalizeConfig()),),
    )


def _sees(folder: Path) -> bool:
    """Whether a folder has a tokenizer and an image processor: its model takes texts and images."""
    return _has_image_processor(folder) and any((folder / name).exists() for name in _TOKENIZER_FILES)


def _has_image_processor(folder: Path) -> bool:
    processor = read_object(folder / "processor_config.json") or {}
    image = read_object(folder / "preprocessor_config.json") or {}
    return "image_processor" in processor or bool({"image_processor_type", "image_mean"} & set(image))


def _read_module(folder: Path, name: str, path: str) -> HeadModule:
    file = folder / path / "config.json"
    if name == "Normalize":
        config = read_object(file) or {}
        return HeadModule(config=parse(NormalizeConfig, config, source=str(file), error=CheckpointError), folder=path)
    dense = read_object(file)
    if dense is None:
        raise CheckpointError(f"{file}: missing; expected the configuration of a Dense module")
    return HeadModule(config=parse(DenseConfig, dense, source=str(file), error=CheckpointError), folder=path)


def _read_pooling(file: Path) -> _PoolingConfig:
    config = read_object(file)
    if config is None:
        raise CheckpointError(f"{file}: missing; expected the configuration of a Pooling module")
    data = {key: value for key, value in config.items() if key not in _LEGACY_MODES}
    if "word_embedding_dimension" in data:
        data.setdefault("embedding_dimension", data.pop("word_embedding_dimension"))
    # Without any mode sentence-transformers takes the mean.
    legacy = [mode for key, mode in _LEGACY_MODES.items() if config.get(key)] or ["mean"]
    modes = data.setdefault("pooling_mode", legacy)
    if isinstance(modes, str):
        data["pooling_mode"] = [modes]
    return parse(_PoolingConfig, data, source=str(file), error=CheckpointError)


def _read_prompts(source: Path, model: Mapping[str, Any]) -> dict[str, Any]:
    prompts = model.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise CheckpointError(f"{source}: prompts: expected texts by name, got {prompts!r}")
    default = typed(source, model, "default_prompt_name", str)
    if default is not None and default not in prompts:
        raise CheckpointError(f"{source}: default_prompt_name: '{default}' is not in prompts ({', '.join(prompts)})")
    return {"prompts": {name: text or "" for name, text in prompts.items()}, "default_prompt": default}


def _legacy_activation(folder: Path, backbone: Mapping[str, Any]) -> Activation:
    """The activation as config.json names it before version 6; sigmoid if it does not."""
    section = backbone.get("sentence_transformers") or {}
    name = section.get("activation_fn") or backbone.get("sbert_ce_default_activation_function")
    return _read_activation(folder / "config.json", name) if name else "sigmoid"


def _read_activation(source: Path, dotted: str) -> Activation:
    for activation, name in _ACTIVATION_FILES.items():
        if dotted.startswith("torch.nn.") and dotted.rpartition(".")[2] == name.rpartition(".")[2]:
            return activation
    raise CheckpointError(
        f"{source}: activation_fn: expected {' or '.join(_ACTIVATION_FILES.values())}, got {dotted!r}"
    )


def write_layout(folder: Path, layout: Layout, versions: Mapping[str, str]) -> Layout:
    """Write a layout as version 6.

    Args:
        folder: exists.
        layout: what to write; `pooling_dimension` is set.
        versions: of "transformers" and "pytorch", for the record.

    Returns:
        The layout with the folders that its modules have now; their weights belong there.
    """
    placed = _placed(layout)
    tower = placed.image_tower
    routes = {"text": _route(placed.backbone_folder, placed.pooling, placed.head, "text" if tower else "")}
    _write_modules(folder, placed, routes["text"])
    write_json(folder / placed.backbone_folder / "sentence_bert_config.json", transformer_config(layout), indent=4)
    if tower is None:
        chain = routes["text"]
    else:
        chain = [("Router", "")]
        routes["image"] = _route(tower.folder, tower.pooling, tower.head, "image")
        _write_modules(folder, tower, routes["image"])
        write_json(folder / tower.folder / "sentence_bert_config.json", image_transformer_config(), indent=4)
        router = {
            "types": {path: _TYPES[name] for route in routes.values() for name, path in route},
            "structure": {name: [path for _, path in route] for name, route in routes.items()},
            "parameters": {"default_route": "text", "allow_empty_key": True, "route_mappings": {}},
        }
        write_json(folder / "router_config.json", router, indent=4)
    if layout.logit_score is not None:
        chain = [*chain, ("LogitScore", "1_LogitScore")]
        write_json(folder / "1_LogitScore" / "config.json", vars(layout.logit_score), indent=4)
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": _TYPES[name]}
        for index, (name, path) in enumerate(chain)
    ]
    write_json(folder / "modules.json", modules, indent=2)
    write_json(folder / "config_sentence_transformers.json", _model_config(layout, versions), indent=2, sort_keys=True)
    return placed


def _placed(layout: Layout) -> Layout:
    """The layout with the folders that version 6 gives its modules."""
    tower = layout.image_tower
    prefix = "" if tower is None else "text_"
    head = _placed_head(layout.head, prefix, first=2 if layout.pooling else 1)
    if tower is not None:
        tower = replace(tower, folder="image_0_Transformer", head=_placed_head(tower.head, "image_", first=2))
    backbone_folder = "" if tower is None else "text_0_Transformer"
    return replace(layout, head=head, image_tower=tower, backbone_folder=backbone_folder, new_classifier=False)


def _placed_head(head: Sequence[HeadModule], prefix: str, *, first: int) -> tuple[HeadModule, ...]:
    return tuple(
        replace(module, folder=f"{prefix}{number}_{_name_of(module)}")
        for number, module in enumerate(head, start=first)
    )


def _route(
    transformer: str, pooling: Sequence[Pooling], head: Sequence[HeadModule], route: str
) -> list[tuple[str, str]]:
    """(class, folder) of each module of a route; "" for the only one."""
    chain = [("Transformer", transformer)]
    if pooling:
        chain.append(("Pooling", f"{route}_1_Pooling".lstrip("_")))
    return [*chain, *((_name_of(module), module.folder) for module in head)]


def _write_modules(folder: Path, described: Layout | ImageTower, chain: Sequence[tuple[str, str]]) -> None:
    """The configurations of the modules behind a transformer."""
    if described.pooling:
        pooling = {
            "embedding_dimension": described.pooling_dimension,
            "pooling_mode": described.pooling[0] if len(described.pooling) == 1 else list(described.pooling),
            "include_prompt": described.include_prompt if isinstance(described, Layout) else True,
        }
        write_json(folder / chain[1][1] / "config.json", pooling, indent=4)
    for module in described.head:
        write_json(folder / module.folder / "config.json", _module_config(module), indent=4)


def _name_of(module: HeadModule) -> str:
    return "Dense" if isinstance(module.config, DenseConfig) else "Normalize"


def _module_config(module: HeadModule) -> dict[str, Any]:
    # The residual is new in 5.7: a folder that has none stays readable for older versions.
    return {key: value for key, value in vars(module.config).items() if (key, value) != ("use_residual", False)}


def _model_config(layout: Layout, versions: Mapping[str, str]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "__version__": {"sentence_transformers": LAYOUT_VERSION, **versions},
        "model_type": "SentenceTransformer" if layout.task == "embed" else "CrossEncoder",
        "prompts": layout.prompts,
        "default_prompt_name": layout.default_prompt,
    }
    if layout.task == "rerank":
        config["activation_fn"] = _ACTIVATION_FILES[layout.activation]
        # Ours: sentence-transformers passes over it, and gives the logit alone.
        weight = float(layout.first_stage_weight)
        return {**config, "first_stage_weight": weight} if weight else config
    config["similarity_fn_name"] = layout.similarity
    return config if layout.truncate_dim is None else {**config, "truncate_dim": layout.truncate_dim}
