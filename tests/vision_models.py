"""Tiny random vision-language models, in the files that a checkpoint of Qwen3-VL consists of.

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
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases start at zero and norms at one: then a lost one would not show.
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
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
