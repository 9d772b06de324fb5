"""`sentence_bert_config.json`: how a checkpoint uses its transformer."""

from __future__ import annotations

import json
from collections.abc import Mapping
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


_USES: dict[Literal["embed", "classify", "generate"], _Use] = {
    "embed": _Use("feature-extraction", "last_hidden_state", "token_embeddings"),
    "classify": _Use("sequence-classification", "logits", "scores"),
    "generate": _Use("text-generation", "logits", "causal_logits"),
}


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
    # A reranker's pairs may go through a chat template, an embedder's texts not yet.
    message = config.modality_config.get("message") if task == "rerank" else None
    _check(file, config, _USES["generate" if generates else "embed" if task == "embed" else "classify"], message)
    chat = {}
    if message is not None:
        kwargs = config.processing_kwargs.get("chat_template", {})
        # Whether truncation may cut off the template's end: here it never does.
        chat_kwargs = {key: value for key, value in kwargs.items() if key != "restore_suffix"}
        chosen = message.get("format") or config.message_format or "auto"
        chat = {"message_format": chosen, "chat_template_kwargs": chat_kwargs}
    return {
        "backbone_folder": path,
        "max_tokens": config.max_seq_length,
        "do_lower_case": config.do_lower_case,
        **chat,
        "model_kwargs": _trusted(config.model_kwargs),
        "tokenizer_kwargs": _trusted(config.processor_kwargs),
        "config_kwargs": _trusted(config.config_kwargs),
    }


def _check(file: Path, config: _Config, use: _Use, message: Mapping[str, Any] | None) -> None:
    """Raise CheckpointError for what is set and not understood."""
    text = {"method": "forward", "method_output_name": use.method_output_name}
    modalities: list[dict[str, Any]] = [{}, {"text": text}]
    processing: list[dict[str, Any]] = [{}]
    if message is not None:
        modalities = [{"text": text, "message": {**text, "format": name}} for name in (*_FORMATS, "auto")]
        modalities.append({"text": text, "message": text})
        chat_kwargs = config.processing_kwargs.get("chat_template")
        if isinstance(chat_kwargs, dict) and not {"padding", "truncation", "max_length"} & set(chat_kwargs):
            processing = [{"chat_template": chat_kwargs}]
    # Without the task a folder is of a time when there was one for each kind of model; LogitScore is younger.
    tasks = (use.transformer_task,) if use is _USES["generate"] else (None, use.transformer_task)
    expected: list[tuple[str, object, list[Any] | tuple[Any, ...]]] = [
        ("transformer_task", config.transformer_task, tasks),
        ("module_output_name", config.module_output_name, (None, use.module_output_name)),
        ("modality_config", config.modality_config, modalities),
        ("processing_kwargs", config.processing_kwargs, processing),
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


def _trusted(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Without what only the caller may decide."""
    return {key: value for key, value in kwargs.items() if key not in ("trust_remote_code", "torch_dtype", "dtype")}


def transformer_config(layout: Layout) -> dict[str, Any]:
    """The content of the file, version 6, for a layout whose `message_format` is settled."""
    # The limit on length is not here: version 6 keeps it in the tokenizer's `model_max_length`.
    kind: Literal["generate", "classify"] = "generate" if layout.is_language_model else "classify"
    use = _USES["embed" if layout.task == "embed" else kind]
    text = {"method": "forward", "method_output_name": use.method_output_name}
    modalities: dict[str, Any] = {"text": text}
    if layout.message_format is not None:
        modalities["message"] = {**text, "format": layout.message_format}
    config = {
        "transformer_task": use.transformer_task,
        "modality_config": modalities,
        "module_output_name": use.module_output_name,
    }
    if layout.chat_template_kwargs:
        config["processing_kwargs"] = {"chat_template": layout.chat_template_kwargs}
    return {**config, "do_lower_case": True} if layout.do_lower_case else config
