"""`sentence_bert_config.json`: how a checkpoint uses its transformer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rtx.runtime.contract import Task
from rtx.runtime.errors import CheckpointError
from rtx.runtime.schema import parse
from rtx.trainer.json_files import read_object
from rtx.trainer.layout import Layout, MessageFormat

# Before version 6 the file was named after the architecture.
_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_FORMATS: tuple[MessageFormat, ...] = ("flat", "structured")


class _Use(NamedTuple):
    """What a kind of model takes from its transformer, in the names of Sentence Transformers."""

    transformer_task: str
    method_output_name: str
    module_output_name: str


_Kind = Literal["embed", "features", "classify", "generate", "see"]

_USES: dict[_Kind, _Use] = {
    "embed": _Use("feature-extraction", "last_hidden_state", "token_embeddings"),
    "features": _Use("feature-extraction", "pooler_output", "sentence_embedding"),
    "classify": _Use("sequence-classification", "logits", "scores"),
    "generate": _Use("text-generation", "logits", "causal_logits"),
    # A language model that takes images.
    "see": _Use("any-to-any", "logits", "causal_logits"),
}
# What is served of what sentence-transformers knows. A video is not, but a model that takes one too is read.
_SERVED = ("text", "image", "message")


@dataclass(frozen=True, kw_only=True)
class _Config:
    """The file, version 6 and older names together."""

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


def read_transformer(folder: Path, path: str, task: Task, *, generates: bool = False) -> dict[str, Any]:
    """The fields of Layout that the file holds.

    Args:
        folder: the checkpoint.
        path: the transformer's folder in it.
        task: of the model.
        generates: a language model's logits are scored.

    Raises:
        CheckpointError: the file asks for something that rtx does not do.
    """
    names = [name for name in _FILES if (folder / path / name).exists()]
    if not names and not generates:
        return {"backbone_folder": path}
    file = folder / path / (names[0] if names else _FILES[0])
    data = dict(read_object(file) or {})
    for old, new in (
        ("model_args", "model_kwargs"),
        ("tokenizer_args", "processor_kwargs"),
        ("config_args", "config_kwargs"),
    ):
        if old in data:
            data.setdefault(new, data.pop(old))
    config = parse(_Config, data, source=str(file), error=CheckpointError)
    kinds: dict[str, tuple[_Kind, ...]] = {"embed": ("embed", "features"), "rerank": ("classify",)}
    use = _check(file, config, ("generate", "see") if generates else kinds[task])
    message = config.modality_config.get("message")
    chat: dict[str, Any] = {}
    if message is not None:
        kwargs = config.processing_kwargs.get("chat_template", {})
        # Whether truncation may cut off the template's end: here it never does.
        chat_kwargs = {key: value for key, value in kwargs.items() if key != "restore_suffix"}
        chosen = message.get("format") or config.message_format or "auto"
        chat = {"message_format": chosen, "chat_template_kwargs": chat_kwargs}
    features = use is _USES["features"]
    length = config.processing_kwargs.get("text", {}).get("max_length") if features else None
    return {
        "backbone_folder": path,
        "max_tokens": length or config.max_seq_length,
        "do_lower_case": config.do_lower_case,
        "images": "image" in config.modality_config,
        "features": features,
        **chat,
        "model_kwargs": _trusted(config.model_kwargs),
        "tokenizer_kwargs": _trusted(config.processor_kwargs),
        "config_kwargs": _trusted(config.config_kwargs),
    }


def read_image_transformer(folder: Path, path: str) -> None:
    """Check the file of a transformer that takes images alone.

    Raises:
        CheckpointError: it asks for something that rtx does not do.
    """
    file = folder / path / _FILES[0]
    config = parse(_Config, dict(read_object(file) or {}), source=str(file), error=CheckpointError)
    use = _USES["embed"]
    given = config.modality_config or {"image": _method(use, "image")}
    problems = _wrong_values(config, use) + _wrong_modalities(given, use, ("image",))
    problems += _wrong_processing(config.processing_kwargs, use, has_chat=False)
    for name in ("model_kwargs", "processor_kwargs", "config_kwargs"):
        if options := _trusted(getattr(config, name)):
            problems.append(f"{name}: expected {{}}, got {json.dumps(options)}")
    _raise_for(file, problems)


def _check(file: Path, config: _Config, kinds: Sequence[_Kind]) -> _Use:
    """Which of some kinds the file describes.

    Raises CheckpointError for what is set and not understood.
    """
    uses = [_USES[kind] for kind in kinds]
    # A language model that takes images has another task, a dual encoder another output.
    use = next(
        (u for u in uses if (config.transformer_task, config.module_output_name) == (u.transformer_task, u[2])), uses[0]
    )
    problems = _wrong_values(config, use)
    if config.modality_config:
        known = ("text", "message") if use in (_USES["classify"], _USES["generate"]) else _SERVED
        problems += _wrong_modalities(config.modality_config, use, known)
    problems += _wrong_processing(config.processing_kwargs, use, has_chat="message" in config.modality_config)
    _raise_for(file, problems)
    return use


def _raise_for(file: Path, problems: Sequence[str]) -> None:
    if problems:
        raise CheckpointError(f"{file}: not supported: {'; '.join(problems)}")


def _wrong_values(config: _Config, use: _Use) -> list[str]:
    # Without the task a folder is of a time when there was one for each kind of model; LogitScore is younger.
    tasks = (use.transformer_task,) if use.module_output_name == "causal_logits" else (None, use.transformer_task)
    expected: list[tuple[str, object, tuple[Any, ...]]] = [
        ("transformer_task", config.transformer_task, tasks),
        ("module_output_name", config.module_output_name, (None, use.module_output_name)),
        ("query_length", config.query_length, (None,)),
        ("document_length", config.document_length, (None,)),
        ("query_expansion", config.query_expansion, (None,)),
    ]
    return [
        f"{key}: expected {json.dumps(allowed[-1])}, got {json.dumps(value)}"
        for key, value, allowed in expected
        if value not in allowed
    ]


def _method(use: _Use, modality: str) -> dict[str, str]:
    method = f"get_{modality}_features" if use is _USES["features"] else "forward"
    return {"method": method, "method_output_name": use.method_output_name}


def _wrong_modalities(given: Mapping[str, Any], use: _Use, known: Sequence[str]) -> list[str]:
    problems = []
    for modality, entry in given.items():
        if modality == "video" and "image" in given:
            continue
        expected: dict[str, str] = _method(use, modality)
        found = dict(entry) if isinstance(entry, Mapping) else entry
        if modality == "message" and isinstance(found, dict) and found.get("format", "auto") in (*_FORMATS, "auto"):
            found.pop("format", None)
        if modality not in known or found != expected or (modality == "message" and use is _USES["features"]):
            wanted = {name: _method(use, name) for name in known}
            problems.append(f"modality_config: expected some of {json.dumps(wanted)}, got {json.dumps(given)}")
            break
    needed = [name for name in known if name == "text" or (name == "image" and use is _USES["see"])]
    if absent := [name for name in needed if name not in given]:
        problems.append(
            f"modality_config: expected {' and '.join(absent)} among the modalities, got {', '.join(given)}"
        )
    return problems


def _wrong_processing(given: Mapping[str, Any], use: _Use, *, has_chat: bool) -> list[str]:
    problems = []
    for key, value in given.items():
        fixed_by_caller = isinstance(value, dict) and {"padding", "truncation", "max_length"} & set(value)
        if key == "chat_template" and has_chat and isinstance(value, dict) and not fixed_by_caller:
            continue
        if key == "text" and use is _USES["features"] and _pads_to_a_length(value):
            continue
        problems.append(f"processing_kwargs: expected {{}}, got {json.dumps({key: value})}")
    return problems


def _pads_to_a_length(options: object) -> bool:
    """Whether texts of a dual encoder are padded to one length. Whether they have to be is seen from the model."""
    if not isinstance(options, dict) or not options.keys() <= {"padding", "truncation", "max_length"}:
        return False
    length = options.get("max_length", 1)
    padded = options.get("padding") == "max_length" and options.get("truncation", True) is True
    return padded and type(length) is int and length > 0


def _trusted(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Without what only the caller may decide."""
    return {key: value for key, value in kwargs.items() if key not in ("trust_remote_code", "torch_dtype", "dtype")}


def kind_of(layout: Layout) -> _Kind:
    """What the transformer of a model is to Sentence Transformers."""
    if layout.task == "embed":
        return "features" if layout.features else "embed"
    if layout.is_language_model:
        return "see" if layout.images else "generate"
    return "classify"


def transformer_config(layout: Layout) -> dict[str, Any]:
    """The content of the file, version 6, for a layout whose `message_format` is settled."""
    # The limit on length is not here: version 6 keeps it in the tokenizer's `model_max_length`.
    use = _USES[kind_of(layout)]
    modalities: dict[str, Any] = {"text": _method(use, "text")}
    if layout.images:
        modalities["image"] = _method(use, "image")
    if layout.message_format is not None:
        modalities["message"] = {**_method(use, "message"), "format": layout.message_format}
    config = {
        "transformer_task": use.transformer_task,
        "modality_config": modalities,
        "module_output_name": use.module_output_name,
    }
    processing: dict[str, Any] = {}
    if layout.chat_template_kwargs:
        processing["chat_template"] = layout.chat_template_kwargs
    if layout.fixed_tokens:
        processing["text"] = {"padding": "max_length"}
    if processing:
        config["processing_kwargs"] = processing
    return {**config, "do_lower_case": True} if layout.do_lower_case else config


def image_transformer_config() -> dict[str, Any]:
    """The content of the file for a transformer that takes images alone."""
    use = _USES["embed"]
    return {
        "transformer_task": use.transformer_task,
        "modality_config": {"image": _method(use, "image")},
        "module_output_name": use.module_output_name,
    }
