"""The Sentence Transformers layout as data: what a checkpoint says of a model, beside its weights and its tokenizer.

    modules.json                        the chain of modules, each with its folder
    config_sentence_transformers.json   kind of model, prompts, similarity, truncate_dim, the reranker's activation
    sentence_bert_config.json           how the transformer is used; in older folders the limit on length
    1_Pooling/config.json               pooling modes
    2_Dense/config.json, .safetensors   any number of Dense and Normalize modules, in the chain's order
    1_LogitScore/config.json            the tokens whose logits score a pair, of a reranker that is a language model

Version 6 is written; version 6, all older ones and a bare Hugging Face folder are read. What changes a model's output
and is not understood is an error, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, cast, get_args

from rtx.runtime.contract import Activation, Pooling, Similarity, Task
from rtx.runtime.errors import CheckpointError
from rtx.runtime.schema import parse
from rtx.trainer.json_files import one_of, read_json, read_object, typed, write_json
from rtx.trainer.layout import DenseConfig, HeadModule, Layout, LogitScoreConfig, NormalizeConfig
from rtx.trainer.transformer_config import read_transformer, transformer_config

# The version of the layout that is written. sentence-transformers warns about folders newer than itself.
LAYOUT_VERSION = "6.0.0"

# The kinds of model: the modules it starts with, and those that may follow in any number.
_CHAINS: tuple[tuple[str, list[str], list[str]], ...] = (
    ("SentenceTransformer", ["Transformer", "Pooling"], ["Dense", "Normalize"]),
    ("CrossEncoder", ["Transformer"], []),
    ("CrossEncoder", ["Transformer", "LogitScore"], []),
)
_TYPES = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
    "LogitScore": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore",
}
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
    backbone_folder = chain[0][1] if chain else ""
    model = read_object(folder / "config_sentence_transformers.json") or {}
    kind = str(model.get("model_type", "SentenceTransformer"))
    if chain:
        _check_chain(folder, chain, kind)
    _refuse_adapter(folder / backbone_folder / "adapter_config.json")
    backbone = read_object(folder / backbone_folder / "config.json")
    if backbone is None:
        missing = folder / backbone_folder / "config.json"
        raise CheckpointError(
            f"{missing}: missing; expected a Sentence Transformers checkpoint or a Hugging Face model"
        )
    if chain and kind == "SentenceTransformer" and task in (None, "embed"):
        return _read_embedder(folder, chain, model)
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


def _read_embedder(folder: Path, chain: Sequence[tuple[str, str]], model: Mapping[str, Any]) -> Layout:
    pooling = _read_pooling(folder / chain[1][1] / "config.json")
    source = folder / "config_sentence_transformers.json"
    return Layout(
        task="embed",
        pooling=pooling.pooling_mode,
        pooling_dimension=pooling.embedding_dimension,
        include_prompt=pooling.include_prompt,
        head=tuple(_read_module(folder, name, path) for name, path in chain[2:]),
        similarity=cast(Similarity, one_of(source, model, "similarity_fn_name", get_args(Similarity)) or "cosine"),
        truncate_dim=typed(source, model, "truncate_dim", int),
        **_read_prompts(source, model),
        **read_transformer(folder, chain[0][1], "embed"),
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
    causal = str(architectures[0]).endswith("ForCausalLM") and backbone.get("is_causal", True) is not False
    if task == "rerank" and str(architectures[0]).endswith("ForCausalLM"):
        return Layout(
            task="rerank",
            backbone_folder=backbone_folder,
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
        pooling=("lasttoken",) if causal else ("mean",),
        head=(HeadModule(config=NormalizeConfig()),),
    )


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
    """Write a layout as version 6 into a folder that holds the backbone and the tokenizer in its root.

    Args:
        folder: exists.
        layout: what to write; `pooling_dimension` is set.
        versions: of "transformers" and "pytorch", for the record.

    Returns:
        The layout with the folders that its modules have now; the weights of a Dense module belong there.
    """
    head = tuple(
        replace(module, folder=f"{index}_{_name_of(module)}") for index, module in enumerate(layout.head, start=2)
    )
    chain = [("Transformer", "")]
    if layout.task == "embed":
        chain += [("Pooling", "1_Pooling"), *((_name_of(module), module.folder) for module in head)]
        pooling = {
            "embedding_dimension": layout.pooling_dimension,
            "pooling_mode": layout.pooling[0] if len(layout.pooling) == 1 else list(layout.pooling),
            "include_prompt": layout.include_prompt,
        }
        write_json(folder / "1_Pooling" / "config.json", pooling, indent=4)
        for module in head:
            write_json(folder / module.folder / "config.json", _module_config(module), indent=4)
    if layout.logit_score is not None:
        chain.append(("LogitScore", "1_LogitScore"))
        write_json(folder / "1_LogitScore" / "config.json", vars(layout.logit_score), indent=4)
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": _TYPES[name]}
        for index, (name, path) in enumerate(chain)
    ]
    write_json(folder / "modules.json", modules, indent=2)
    write_json(folder / "config_sentence_transformers.json", _model_config(layout, versions), indent=2, sort_keys=True)
    write_json(folder / "sentence_bert_config.json", transformer_config(layout), indent=4)
    return replace(layout, head=head, backbone_folder="", new_classifier=False)


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
