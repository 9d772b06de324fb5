"""Side files that let other tools open a bundle as it is: FastEmbed, optimum-onnx, sentence-transformers.

They look for `config.json`, the tokenizer's files and Sentence Transformers' module list beside `onnx/model.onnx`. The
list is written in the names of version 5 and older, which version 6 reads too: optimum-onnx needs transformers 4, and
with it sentence-transformers 5. What each makes of a bundle is tested by `make interop`.

    FastEmbed                 output `sentence_embedding`, pooling disabled; truncates by tokenizer_config.json
    optimum-onnx              output `last_hidden_state`, which is the name that it insists on; its user pools
    sentence-transformers     the same through optimum-onnx, and then pooling and head by the module list

A model that leaves the prompt out of pooling has one input more, `pooling_mask`, which none of them knows. After a
Matryoshka cut sentence-transformers does not normalise again; its vectors point in the same direction.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from rtx.trainer.checkpoint import write_layout
from rtx.trainer.json_files import read_json
from rtx.trainer.model import RetrievalModel

_MODES = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}

# Of the calls that a tokenizer was last used for.
_TRUNCATION = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "is_local", "local_files_only")


def write_side_files(model: RetrievalModel, folder: Path) -> None:
    """Write what other tools read, all but the graphs, into a folder that exists.

    There is nothing for a model that takes images: no other tool knows its graphs.
    """
    if model.contract.takes_images:
        return
    model.backbone.config.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    # What tokenizer.json says of truncation is gone from ours; FastEmbed would take it from here.
    settings = read_json(folder / "tokenizer_config.json")
    kept = {name: value for name, value in settings.items() if name not in _TRUNCATION}
    _write(folder / "tokenizer_config.json", {**kept, "model_max_length": model.contract.max_tokens})
    if model.task != "embed":
        return
    versions = {"transformers": transformers.__version__, "pytorch": torch.__version__}
    written = write_layout(folder, model.layout, versions)
    modules = read_json(folder / "modules.json")
    for module in modules:
        module["type"] = "sentence_transformers.models." + module["type"].rpartition(".")[2]
    _write(folder / "modules.json", modules)
    pooling: dict[str, Any] = {flag: mode in model.layout.pooling for mode, flag in _MODES.items()}
    pooling["word_embedding_dimension"] = model.layout.pooling_dimension
    pooling["include_prompt"] = model.layout.include_prompt
    _write(folder / "1_Pooling" / "config.json", pooling)
    _write(
        folder / "sentence_bert_config.json",
        {"max_seq_length": model.contract.max_tokens, "do_lower_case": model.layout.do_lower_case},
    )
    for module, description in zip(model.head, written.head, strict=True):
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
        if weights:
            save_file(weights, folder / description.folder / "model.safetensors")


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
