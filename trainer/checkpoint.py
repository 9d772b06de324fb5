"""The Sentence Transformers layout as data: what a checkpoint says of a model, beside its weights and its tokenizer.

    modules.json                        the chain of modules, each with its folder
    config_sentence_transformers.json   kind of model, prompts, similarity, truncate_dim, the reranker's activation
    sentence_bert_config.json           how the transformer is used; in older folders the limit on length
    1_Pooling/config.json               pooling modes
    2_Dense/config.json, .safetensors   any number of Dense and Normalize modules, in the chain's order

Version 6 is written; version 6, all older ones and a bare Hugging Face folder are read. What changes a model's output
and is not understood is an error, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, cast, get_args

from rtx.runtime.contract import Activation, Pooling, Similarity, Task
from rtx.runtime.errors import CheckpointError
from rtx.runtime.schema import parse
from rtx.trainer.layout import DenseConfig, HeadModule, Layout, NormalizeConfig

# The version of the layout that is written. sentence-transformers warns about folders newer than itself.
LAYOUT_VERSION = "6.0.0"

_NO_LOGIT_SCORE = "rerankers that score by a language model's yes and no tokens are not supported yet"
# By kind of model: the modules it starts with, and those that may follow in any number.
_CHAINS = {
    "SentenceTransformer": (["Transformer", "Pooling"], ["Dense", "Normalize"]),
    "CrossEncoder": (["Transformer"], []),
}
_TYPES = {
    "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "Dense": "sentence_transformers.base.modules.dense.Dense",
    "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
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
# Before version 6 the file was named after the architecture.
_TRANSFORMER_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_TRANSFORMER_TASK: dict[Task, str] = {"embed": "feature-extraction", "rerank": "sequence-classification"}
_BACKBONE_OUTPUT: dict[Task, str] = {"embed": "last_hidden_state", "rerank": "logits"}
_MODULE_OUTPUT: dict[Task, str] = {"embed": "token_embeddings", "rerank": "scores"}


@dataclass(frozen=True, kw_only=True)
class _PoolingConfig:
    pooling_mode: tuple[Pooling, ...]
    embedding_dimension: int | None = None
    include_prompt: bool = True


@dataclass(frozen=True, kw_only=True)
class _TransformerConfig:
    """`sentence_bert_config.json`, version 6 and older names together."""

    max_seq_length: int | None = None
    do_lower_case: bool = False
    transformer_task: str | None = None
    modality_config: dict[str, Any] = field(default_factory=dict)
    module_output_name: str | None = None
    message_format: str | None = None
    processing_kwargs: dict[str, Any] = field(default_factory=dict)
    unpad_inputs: bool | None = None
    query_length: int | None = None
    document_length: int | None = None
    query_expansion: dict[str, Any] | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    processor_kwargs: dict[str, Any] = field(default_factory=dict)
    config_kwargs: dict[str, Any] = field(default_factory=dict)


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
    model = _read_object(folder / "config_sentence_transformers.json") or {}
    kind = str(model.get("model_type", "SentenceTransformer"))
    if chain:
        _check_chain(folder, chain, kind)
    if (folder / backbone_folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder}: holds a PEFT adapter, not a whole model; merge it into its base model first")
    backbone = _read_object(folder / backbone_folder / "config.json")
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
    expected, repeated = _CHAINS.get(kind, ([], []))
    if expected and names[: len(expected)] == expected and set(names[len(expected) :]) <= set(repeated):
        return
    supported = "; ".join(
        f"{kind} of {', '.join(first)}" + (f", then any of {', '.join(rest)}" if rest else "")
        for kind, (first, rest) in _CHAINS.items()
    )
    hint = f"; {_NO_LOGIT_SCORE}" if "LogitScore" in names else ""
    raise CheckpointError(
        f"{folder / 'modules.json'}: a {kind} of {', '.join(names)} is not supported; supported are: {supported}{hint}"
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
        similarity=cast(Similarity, _one_of(source, model, "similarity_fn_name", get_args(Similarity)) or "cosine"),
        truncate_dim=_typed(source, model, "truncate_dim", int),
        **_read_prompts(source, model),
        **_read_transformer(folder, chain[0][1], "embed"),
    )


def _read_reranker(
    folder: Path, chain: Sequence[tuple[str, str]], model: Mapping[str, Any], backbone: Mapping[str, Any]
) -> Layout:
    source = folder / "config_sentence_transformers.json"
    name = _typed(source, model, "activation_fn", str)
    return Layout(
        task="rerank",
        activation=_read_activation(source, name) if name else _legacy_activation(folder, backbone),
        **_read_prompts(source, model),
        **_read_transformer(folder, chain[0][1], "rerank"),
    )


def _bare_layout(folder: Path, backbone: Mapping[str, Any], backbone_folder: str, task: Task | None) -> Layout:
    """A model of transformers without a Sentence Transformers side.

    An embedder pools as sentence-transformers does here, the mean or a causal model's last token, and normalises.
    """
    architectures = backbone.get("architectures") or [""]
    classifies = str(architectures[0]).endswith("ForSequenceClassification")
    causal = str(architectures[0]).endswith("ForCausalLM") and backbone.get("is_causal", True) is not False
    if task == "rerank" and str(architectures[0]).endswith("ForCausalLM"):
        # A new classification head would rank at random what others rank by the model's yes and no.
        raise CheckpointError(f"{folder / backbone_folder / 'config.json'}: {architectures[0]}: {_NO_LOGIT_SCORE}")
    if task == "rerank" or (task is None and classifies):
        activation = _legacy_activation(folder / backbone_folder, backbone)
        return Layout(
            task="rerank", backbone_folder=backbone_folder, new_classifier=not classifies, activation=activation
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
        config = _read_object(file) or {}
        return HeadModule(config=parse(NormalizeConfig, config, source=str(file), error=CheckpointError), folder=path)
    dense = _read_object(file)
    if dense is None:
        raise CheckpointError(f"{file}: missing; expected the configuration of a Dense module")
    return HeadModule(config=parse(DenseConfig, dense, source=str(file), error=CheckpointError), folder=path)


def _read_pooling(file: Path) -> _PoolingConfig:
    config = _read_object(file)
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


def _read_transformer(folder: Path, path: str, task: Task) -> dict[str, Any]:
    """The fields of Layout that come from `sentence_bert_config.json`."""
    names = [name for name in _TRANSFORMER_FILES if (folder / path / name).exists()]
    if not names:
        return {"backbone_folder": path}
    file = folder / path / names[0]
    data = dict(_read_object(file) or {})
    for old, new in (
        ("model_args", "model_kwargs"),
        ("tokenizer_args", "processor_kwargs"),
        ("config_args", "config_kwargs"),
    ):
        if old in data:
            data.setdefault(new, data.pop(old))
    config = parse(_TransformerConfig, data, source=str(file), error=CheckpointError)
    text = {"method": "forward", "method_output_name": _BACKBONE_OUTPUT[task]}
    expected: list[tuple[str, object, tuple[object, ...]]] = [
        ("transformer_task", config.transformer_task, (None, _TRANSFORMER_TASK[task])),
        ("module_output_name", config.module_output_name, (None, _MODULE_OUTPUT[task])),
        ("modality_config", config.modality_config, ({}, {"text": text})),
        ("processing_kwargs", config.processing_kwargs, ({},)),
        ("query_length", config.query_length, (None,)),
        ("document_length", config.document_length, (None,)),
        ("query_expansion", config.query_expansion, (None,)),
    ]
    problems = [
        f"{key}: expected {json.dumps(allowed[-1])}, got {json.dumps(value)}"
        for key, value, allowed in expected
        if value not in allowed
    ]
    if problems:
        raise CheckpointError(f"{file}: not supported: {'; '.join(problems)}")
    return {
        "backbone_folder": path,
        "max_tokens": config.max_seq_length,
        "do_lower_case": config.do_lower_case,
        "model_kwargs": _trusted(config.model_kwargs),
        "tokenizer_kwargs": _trusted(config.processor_kwargs),
        "config_kwargs": _trusted(config.config_kwargs),
    }


def _trusted(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Without what only the caller may decide."""
    return {key: value for key, value in kwargs.items() if key not in ("trust_remote_code", "torch_dtype", "dtype")}


def _read_prompts(source: Path, model: Mapping[str, Any]) -> dict[str, Any]:
    prompts = model.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise CheckpointError(f"{source}: prompts: expected texts by name, got {prompts!r}")
    default = _typed(source, model, "default_prompt_name", str)
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


def _one_of(source: Path, data: Mapping[str, Any], key: str, known: Sequence[str]) -> str | None:
    value = data.get(key)
    if value is not None and value not in known:
        raise CheckpointError(f"{source}: {key}: expected one of {', '.join(known)}, got {value!r}")
    return value


def _typed(source: Path, data: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
    value = data.get(key)
    if value is not None and type(value) is not kind:
        raise CheckpointError(f"{source}: {key}: expected {kind.__name__}, got {value!r}")
    return value


def read_json(path: Path) -> Any:
    """The decoded file; None if there is none.

    Raises:
        CheckpointError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as broken:
        raise CheckpointError(f"{path}: not readable as JSON: {broken}") from broken


def _read_object(path: Path) -> dict[str, Any] | None:
    data = read_json(path)
    if data is not None and not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


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
        _write_json(folder / "1_Pooling" / "config.json", pooling, indent=4)
        for module in head:
            _write_json(folder / module.folder / "config.json", _module_config(module), indent=4)
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": _TYPES[name]}
        for index, (name, path) in enumerate(chain)
    ]
    _write_json(folder / "modules.json", modules, indent=2)
    _write_json(folder / "config_sentence_transformers.json", _model_config(layout, versions), indent=2, sort_keys=True)
    _write_json(folder / "sentence_bert_config.json", _transformer_config(layout), indent=4)
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
        return {**config, "activation_fn": _ACTIVATION_FILES[layout.activation]}
    config["similarity_fn_name"] = layout.similarity
    return config if layout.truncate_dim is None else {**config, "truncate_dim": layout.truncate_dim}


def _transformer_config(layout: Layout) -> dict[str, Any]:
    # The limit on length is not here: version 6 keeps it in the tokenizer's `model_max_length`.
    text = {"method": "forward", "method_output_name": _BACKBONE_OUTPUT[layout.task]}
    config = {
        "transformer_task": _TRANSFORMER_TASK[layout.task],
        "modality_config": {"text": text},
        "module_output_name": _MODULE_OUTPUT[layout.task],
    }
    return {**config, "do_lower_case": True} if layout.do_lower_case else config


def _write_json(path: Path, data: object, *, indent: int, sort_keys: bool = False) -> None:
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(data, indent=indent, sort_keys=sort_keys)
    path.write_text(text + "\n", encoding="utf-8")
