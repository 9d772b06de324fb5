"""What tests of several rooms share: checkpoints of tiny random models, one of each architecture.

A folder is built once a session and shared: a test that changes one copies it first.
"""

from __future__ import annotations

import gc
import os
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from filelock import FileLock

# Kernels of Triton run in its interpreter here. It decorates functions of its own when it is imported, as collecting
# tests of any room may do. `make test-gpu` says that they run on the GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples in every run, no time limit on a shared machine, nothing written into the checkout.
hypothesis.settings.register_profile("rtx", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("rtx")


def pytest_collection_finish() -> None:
    """Each training, and each export, collects garbage: what the modules hold is none, and is a million objects."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


ARCHITECTURES = ("bert", "distilbert", "roberta", "xlm-roberta", "mpnet", "modernbert", "deberta-v2", "qwen3")

# Causal language models that rerank by yes and no: with a chat template around the pair, and with the pair as it is.
LANGUAGE_MODELS = ("qwen3-chat", "qwen3-plain")

# As that of Qwen3-Reranker, but shorter.
_CHAT_TEMPLATE = """<|im_start|>system
Is it "yes" or "no"?<|im_end|>
<|im_start|>user
<I>: {{ messages | selectattr('role', 'eq', 'system') | map(attribute='content') | first | default('the query') }}
<Q>: {{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}
<D>: {{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}<|im_end|>
<|im_start|>assistant
{{ '<think>\n\n</think>\n\n' }}"""

_WORDS = [
    "the",
    "a",
    "of",
    "in",
    "to",
    "and",
    "is",
    "for",
    "with",
    "on",
    "how",
    "what",
    "code",
    "file",
    "text",
    "query",
]
_CHARACTERS = string.ascii_letters + string.digits + string.punctuation
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    # Large enough for attention to differ from a plain mean and for texts to differ from each other.
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_checkpoint(architecture, task="embed", bare=False, seed=0, **layout)` gives a folder.

    `architecture` is one of ARCHITECTURES, or with task "rerank" of LANGUAGE_MODELS; `bare` leaves out the Sentence
    Transformers side. `layout` sets fields of rtx.trainer.layout.Layout, and for an embedder `normalize=True` and
    `dense=()`, the widths of Dense modules.
    """
    folders: dict[str, Path] = {}

    def cached(key: object, build: Callable[[Path], None]) -> Path:
        name = repr(key)
        if name not in folders:
            folder = tmp_path_factory.mktemp("tiny")
            build(folder)
            folders[name] = folder
        return folders[name]

    def tiny(architecture: str, task: str = "embed", *, bare: bool = False, seed: int = 0, **layout: Any) -> Path:
        key = (architecture, task, seed)
        backbone = cached(key, lambda folder: _build_backbone(folder, architecture, task, seed))
        if bare:
            return backbone
        return cached((key, layout), lambda folder: _build_checkpoint(folder, backbone, task, seed, layout))

    return tiny


def _build_checkpoint(folder: Path, backbone: Path, task: Any, seed: int, options: dict[str, Any]) -> None:
    import dataclasses

    import torch

    from rtx.trainer import pooling
    from rtx.trainer.layout import DenseConfig, HeadModule, NormalizeConfig
    from rtx.trainer.model import RetrievalModel

    model = RetrievalModel.load(backbone, task=task)
    options = dict(options)
    widths, normalize = options.pop("dense", ()), options.pop("normalize", True)
    layout = dataclasses.replace(model.layout, **options)
    modules: list[torch.nn.Module] = []
    if layout.task == "embed":
        torch.manual_seed(seed + 1)
        description: list[HeadModule] = []
        width = model.backbone.config.hidden_size * len(layout.pooling)
        for out in widths:
            description.append(HeadModule(config=DenseConfig(in_features=width, out_features=out)))
            modules.append(pooling.Dense(width, out, bias=True, activation=torch.nn.Tanh(), use_residual=False))
            width = out
        if normalize:
            description.append(HeadModule(config=NormalizeConfig()))
            modules.append(pooling.Normalize())
        layout = dataclasses.replace(layout, head=tuple(description))
    RetrievalModel(model.backbone, model.tokenizer, modules, layout=layout).save(folder)


def _build_backbone(folder: Path, architecture: str, task: str, seed: int) -> None:
    import torch
    import transformers

    tokenizer = _tokenizer(architecture)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")}
    ids["vocab_size"] = len(tokenizer)
    special: dict[str, dict[str, Any]] = {
        "distilbert": {"hidden_dim": 64},
        # These count positions from behind the padding index.
        **{name: {"max_position_embeddings": 66} for name in ("roberta", "xlm-roberta", "mpnet")},
        "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 16},
        "deberta-v2": {
            "relative_attention": True,
            "position_biased_input": False,
            "pos_att_type": ["p2c", "c2p"],
            "type_vocab_size": 0,
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
        },
        "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
        # The chat template alone has some 90 tokens. The head is the matrix of the embeddings.
        "qwen3-chat": {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 192,
            "tie_word_embeddings": True,
        },
        "qwen3-plain": {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False},
    }
    kind = "qwen3" if architecture in LANGUAGE_MODELS else architecture
    config = transformers.AutoConfig.for_model(kind, **{**_SIZES, **ids, **special.get(architecture, {})})
    torch.manual_seed(seed)
    if task == "rerank" and architecture not in LANGUAGE_MODELS:
        config.num_labels = 1
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    elif kind == "qwen3":
        model = transformers.AutoModelForCausalLM.from_config(config)
    else:
        model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and the padding token's vector start at zero, norms at one: then a lost one would not show.
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.get_input_embeddings().weight[tokenizer.pad_token_id].normal_(std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(architecture: str) -> Any:
    import transformers

    if architecture in ("bert", "distilbert", "mpnet"):
        first = ["<s>", "<pad>", "</s>", "[UNK]"] if architecture == "mpnet" else ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        last = "<mask>" if architecture == "mpnet" else "[MASK]"
        lower = sorted(set(_CHARACTERS.lower()))
        pieces = [*first, *lower, *(f"##{character}" for character in lower), *_WORDS[2:], last]
        kind = {"bert": "BertTokenizer", "distilbert": "DistilBertTokenizer", "mpnet": "MPNetTokenizer"}[architecture]
        return getattr(transformers, kind)(vocab={piece: index for index, piece in enumerate(pieces)})
    if architecture in ("xlm-roberta", "deberta-v2"):
        first = (
            ["<s>", "<pad>", "</s>", "<unk>"] if architecture == "xlm-roberta" else ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
        )
        last = "<mask>" if architecture == "xlm-roberta" else "[MASK]"
        scored = [("▁", -2.0), *((c, -4.0) for c in _CHARACTERS), *((f"▁{word}", -3.0) for word in _WORDS)]
        vocab = [*((token, 0.0) for token in first), *scored, (last, 0.0)]
        if architecture == "xlm-roberta":
            return transformers.XLMRobertaTokenizer(vocab=vocab)
        return transformers.DebertaV2Tokenizer(vocab=vocab, unk_id=3)
    return _byte_level_tokenizer(architecture)


def _byte_level_tokenizer(architecture: str) -> Any:
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    first, last = {
        "roberta": (["<s>", "<pad>", "</s>", "<unk>"], ["<mask>"]),
        "modernbert": (["[PAD]", "[CLS]", "[SEP]", "[UNK]"], ["[MASK]"]),
        "qwen3": ([], ["<|endoftext|>"]),
        "qwen3-plain": ([], ["<|endoftext|>"]),
        "qwen3-chat": ([], ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]),
    }[architecture]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ġ", "a"), ("o", "r"), ("e", "r"), ("Ġ", "of")]
    if architecture in LANGUAGE_MODELS:
        merges += [("y", "e"), ("ye", "s"), ("n", "o"), (".", "Ċ"), ("Ċ", "Ċ"), ("Ġ", "s")]
    merged = [left + right for left, right in [("o", "f"), *merges]]
    pieces = [*first, *sorted(pre_tokenizers.ByteLevel.alphabet()), *merged, *last]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges.insert(0, ("o", "f"))
    if architecture == "roberta":
        return transformers.RobertaTokenizer(vocab=vocab, merges=merges)
    if architecture == "qwen3-chat":
        tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges, additional_special_tokens=last[1:])
        tokenizer.chat_template = _CHAT_TEMPLATE
        return tokenizer
    if architecture in ("qwen3", "qwen3-plain"):
        tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges)
        # As the tokenizer of Qwen3-Embedding: an end token, whose vector is the text's.
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="$A <|endoftext|>",
            pair="$A $B:1 <|endoftext|>:1",
            special_tokens=[("<|endoftext|>", vocab["<|endoftext|>"])],
        )
        return tokenizer
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "unk", "mask")}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=["input_ids", "attention_mask"], **names
    )


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[[str, Callable[[Path], None]], Path]:
    """`once(name, fill)`: a folder that `fill` fills for all processes of a test run. The first that asks does it."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def get(name: str, fill: Callable[[Path], None]) -> Path:
        folder = shared / f"once-{name}"
        with FileLock(f"{folder}.lock"):
            if not (folder / "filled").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                (folder / "filled").touch()
        return folder

    return get
