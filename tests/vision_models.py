"""Tiny random models of images, in the files that their published checkpoints consist of: Qwen3-VL, dual encoders
(CLIP, SigLIP, SigLIP 2 of a fixed resolution) and DINOv2.

A plain module, which tests load with `runpy.run_path` as they do others.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
MIN_PIXELS = 32 * 32
MAX_PIXELS = 12 * 32 * 32

# As Qwen3-VL's: a string, or parts in the order of the message.
_PARTS = """
{%- macro parts(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' or 'image' in part -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' or 'video' in part -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
_EMBEDDER_TEMPLATE = (
    _PARTS
    + """
{%- if messages[0].role != 'system' -%}
{{- "<|im_start|>system\nRepresent the user's input.<|im_end|>\n" -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' + parts(message.content) + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""
)
_RERANKER_TEMPLATE = (
    _PARTS
    + """
{%- set ns = namespace(instruction='Is it a match?', query='', document='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- set ns.instruction = parts(message.content) -%}
{%- elif message.role == 'query' -%}
{%- set ns.query = parts(message.content) -%}
{%- elif message.role == 'document' -%}
{%- set ns.document = parts(message.content) -%}
{%- endif -%}
{%- endfor -%}
{{- '<|im_start|>system\nThe answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n' -}}
{{- '<Instruct>: ' + ns.instruction + '<Query>:' + ns.query + '\n<Document>:' + ns.document + '<|im_end|>\n' -}}
{{- '<|im_start|>assistant\n' -}}
"""
)


def write_tiny_qwen3_vl(folder: Path, *, seed: int = 0, reranker: bool = False) -> None:
    """Write a checkpoint: config.json, model.safetensors, tokenizer, chat template and processor files.

    Args:
        folder: where to; made if it does not exist.
        seed: of the weights.
        reranker: with a template of the roles query and document, and padding on the left.
    """
    import torch
    import transformers

    tokenizer = _tokenizer(_RERANKER_TEMPLATE if reranker else _EMBEDDER_TEMPLATE, "left" if reranker else "right")
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    config = transformers.Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            # Large enough for attention to differ from a plain mean and for items to differ from each other.
            "initializer_range": 0.2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
            # 5 by 5, which no image's grid is: their sides are even.
            "num_position_embeddings": 25,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.2,
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = transformers.Qwen3VLForConditionalGeneration(config)
    _disturb(model)
    with torch.no_grad():
        # A patch has 1536 values: as they are, they would drown its position.
        model.model.visual.patch_embed.proj.weight.mul_(0.1)
        model.model.visual.pos_embed.weight.normal_(std=1.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    geometry = {
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    kinds = {
        "preprocessor_config": {"image_processor_type": "Qwen2VLImageProcessorFast"},
        "video_preprocessor_config": {"video_processor_type": "Qwen3VLVideoProcessor"},
    }
    for name, kind in kinds.items():
        (folder / f"{name}.json").write_text(json.dumps(geometry | kind, indent=2))


def write_tiny_clip(folder: Path, *, seed: int = 0) -> None:
    """Write a checkpoint as the first ones of CLIP are: its image processor is described in the oldest way.

    Args:
        folder: where to; made if it does not exist.
        seed: of the weights.
    """
    import torch
    import transformers

    pieces, merges = _byte_pairs(end_of_word="</w>")
    ends = ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate([*pieces, *ends])}, merges=merges, model_max_length=32
    )
    text = {**_ENCODER, "vocab_size": len(tokenizer), "max_position_embeddings": 32, "projection_dim": 24}
    # The text tower takes the vector at the first token of this id.
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {**_ENCODER, "image_size": 32, "patch_size": 8, "projection_dim": 24}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    torch.manual_seed(seed)
    model = transformers.CLIPModel(config)
    _widen(model)
    _disturb(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = {
        "crop_size": 32,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 32,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


def write_tiny_siglip(folder: Path, *, seed: int = 0) -> None:
    """Write a checkpoint whose text tower takes the last of a fixed number of tokens, padding or not, without a mask.

    Args:
        folder: where to; made if it does not exist.
        seed: of the weights.
    """
    _write_siglip(folder, _unigrams(), seed=seed, resample=3)
    described = json.loads((folder / "tokenizer_config.json").read_text())
    # As published: this class reads a model of sentencepiece. The same for tokenizers lies beside that.
    described |= {"tokenizer_class": "SiglipTokenizer", "processor_class": "SiglipProcessor"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2))


def write_tiny_siglip2(folder: Path, *, seed: int = 0) -> None:
    """Write a checkpoint of SigLIP 2 with a fixed resolution: a SigLIP whose tokenizer is Gemma's and has no limit.

    Args:
        folder: where to; made if it does not exist.
        seed: of the weights.
    """
    import transformers

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*special, "▁", *(chr(code) for code in range(33, 127)), "th", "the", "of"]
    tokenizer = transformers.GemmaTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[("t", "h"), ("th", "e"), ("o", "f")],
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
        model_input_names=["input_ids"],
    )
    _write_siglip(folder, tokenizer, seed=seed, resample=2)


def _unigrams() -> Any:
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["<pad>", "</s>", "<unk>"]
    letters = [chr(code) for code in range(97, 123)]
    words = ["▁the", "▁a", "▁of", "▁photo", "of", "er", "in"]
    pieces = [*special, "▁", *letters, *(str(digit) for digit in range(10)), *words]
    backend = Tokenizer(models.Unigram([(piece, -2.0 - (len(piece) == 1)) for piece in pieces], unk_id=2))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=16,
        model_input_names=["input_ids"],
    )


def _write_siglip(folder: Path, tokenizer: Any, *, seed: int, resample: int) -> None:
    import torch
    import transformers

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    text = {**_ENCODER, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32}
    config = transformers.SiglipConfig(text_config=text, vision_config={**_ENCODER, "image_size": 32, "patch_size": 8})
    torch.manual_seed(seed)
    model = transformers.SiglipModel(config)
    _widen(model)
    _disturb(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "SiglipProcessor",
        "resample": resample,
        "rescale_factor": 1 / 255,
        "size": {"height": 32, "width": 32},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


def write_tiny_dinov2(folder: Path, *, seed: int = 0) -> None:
    """Write a bare vision transformer, as DINOv2 is published: patches of 14 pixels, and no tokenizer.

    Args:
        folder: where to; made if it does not exist.
        seed: of the weights.
    """
    import torch
    import transformers

    config = transformers.Dinov2Config(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=56,
        patch_size=14,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    model = transformers.Dinov2Model(config)
    _disturb(model)
    with torch.no_grad():
        model.embeddings.position_embeddings.normal_()
        model.embeddings.patch_embeddings.projection.weight.mul_(0.1)
    model.save_pretrained(folder)
    processor = {
        "crop_size": {"height": 28, "width": 28},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "BitImageProcessor",
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 32},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


# Of both towers of a dual encoder.
_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def _widen(model: Any) -> None:
    """Make a dual encoder's matrices large enough for attention to differ from a mean and for items to differ."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.03 if "patch_embedding" in name else 0.2)


def _disturb(model: Any) -> None:
    """Move biases from zero and norms from one: else a lost one would not show."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))


def _byte_pairs(*, end_of_word: str = "") -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces of words and their merges, as the tokenizers of GPT and CLIP have them."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", f"e{end_of_word}"), ("p", "h"), ("o", f"f{end_of_word}"), ("i", "n")]
    ends = [f"{letter}{end_of_word}" for letter in letters] if end_of_word else []
    return [*letters, *ends, *(left + right for left, right in merges)], merges


def _tokenizer(chat_template: str, padding_side: str) -> Any:
    import transformers
    from tokenizers import pre_tokenizers

    merges = [("o", "f"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ġ", "a"), ("o", "r"), ("e", "r")]
    merges += [("y", "e"), ("ye", "s"), ("n", "o"), (".", "Ċ"), ("Ċ", "Ċ"), ("Ġ", "s")]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges), *SPECIAL_TOKENS]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=merges,
        additional_special_tokens=SPECIAL_TOKENS[1:],
        padding_side=padding_side,
        model_max_length=512,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@contextlib.contextmanager
def images_only() -> Iterator[None]:
    """AutoProcessor opens the checkpoint without torchvision, which nothing but the video processor asks for.

    `SentenceTransformer(folder)` opens an embedder within it, and goes on working after it. sentence-transformers 6.2
    opens no bare vision-language model as a CrossEncoder, with torchvision or without:
    `CrossEncoder(modules=[Transformer(folder, transformer_task="any-to-any"), LogitScore(yes, no)])` works.
    """
    from transformers import processing_utils
    from transformers.video_processing_utils import VideoProcessorMixin

    class NoVideo(VideoProcessorMixin):
        model_input_names: tuple[str, ...] = ()

        @classmethod
        def from_pretrained(cls, *_: object, **__: object) -> NoVideo:
            return cls()

    known = processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING
    loaders = {name: NoVideo if name == "video_processor" else known[name] for name in known.keys()}  # noqa: SIM118
    with (
        mock.patch.object(processing_utils, "MODALITY_TO_AUTOPROCESSOR_MAPPING", loaders),
        mock.patch.dict(processing_utils.MODALITY_TO_BASE_CLASS_MAPPING, {"video_processor": "ImageProcessingMixin"}),
    ):
        yield
