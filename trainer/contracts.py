"""The contract of a model: what its tokenizer, its chat template, its image processor and its layout come to."""

from __future__ import annotations

from typing import Any, get_args

from tokenizers import Tokenizer

from rtx.runtime.contract import Activation, Contract
from rtx.runtime.image_rules import ImageRules
from rtx.runtime.pairs import special_token_template
from rtx.runtime.rendered import RenderedItem, RenderedPair
from rtx.runtime.visual_tokens import VisualTokens
from rtx.trainer.backbone import graph_inputs, position_limit
from rtx.trainer.head import normalizes
from rtx.trainer.layout import Layout
from rtx.trainer.rendering import Chat, Rendered, render_item, render_pair

# What an image costs in its own tower where the tower does not say how it cuts images.
_IMAGE_TOKENS = 256


def build_contract(
    layout: Layout,
    backbone: Any,
    tokenizer: Any,
    tokenizer_json: str,
    *,
    full_dimension: int,
    images: ImageRules | None = None,
    image_backbone: Any = None,
) -> Contract:
    """The contract of a model.

    Args:
        layout: with settled `message_format` and `max_tokens`.
        backbone: the transformer that texts go through.
        tokenizer: of transformers.
        tokenizer_json: of the same tokenizer, for the `tokenizers` library.
        full_dimension: width of an embedder's vectors before the Matryoshka cut.
        images: how images are prepared; None for a model that takes none.
        image_backbone: what images go through, where that is another transformer.

    Raises:
        ValueError: a setting does not fit the model.
    """
    if layout.activation not in get_args(Activation):
        raise ValueError(f"activation: expected {' or '.join(get_args(Activation))}, got {layout.activation!r}")
    if type(layout.first_stage_weight) not in (int, float):
        raise ValueError(f"first_stage_weight: expected a number, got {layout.first_stage_weight!r}")
    embeds = layout.task == "embed"
    rendered = _render(layout, tokenizer)
    special, template = _template(layout, rendered, tokenizer, tokenizer_json)
    if layout.max_tokens is None or layout.max_tokens <= special:
        raise ValueError(f"max_tokens: expected more than the {special} special tokens, got {layout.max_tokens}")
    positions = position_limit(backbone)
    if positions is not None and layout.max_tokens > positions:
        raise ValueError(f"max_tokens: expected at most {positions}, the model's positions; got {layout.max_tokens}")
    if layout.truncate_dim is not None and not 1 <= layout.truncate_dim <= full_dimension:
        raise ValueError(f"truncate_dim: expected 1 to {full_dimension}, got {layout.truncate_dim}")
    inputs = graph_inputs(backbone, tokenizer, layout)
    by_tokens = layout.images and not layout.features
    return Contract(
        task=layout.task,
        inputs=inputs if layout.include_prompt else (*inputs, "pooling_mask"),
        max_tokens=layout.max_tokens,
        padding_side=tokenizer.padding_side,
        pad_token_id=tokenizer.pad_token_id,
        pad_token_type_id=tokenizer.pad_token_type_id,
        template=template,
        fixed_tokens=layout.fixed_tokens,
        rendered=rendered.parts if rendered is not None else (),
        rendered_prompt=rendered.prompt if rendered is not None else (),
        rendered_image=rendered.image if rendered is not None else "",
        strip_sides=rendered is not None and rendered.strip_sides,
        images=images,
        visual=visual_tokens(backbone.config, images) if by_tokens and images is not None else None,
        image_tokens=0 if by_tokens or images is None else _image_tokens(images, image_backbone or backbone),
        pooling=layout.pooling,
        dimension=(layout.truncate_dim or full_dimension) if embeds else 1,
        normalize=normalizes(layout),
        similarity=layout.similarity,
        prompts={name: _as_written(prompt, rendered) for name, prompt in layout.prompts.items()},
        default_prompt=layout.default_prompt,
        include_prompt=layout.include_prompt,
        activation=layout.activation,
        first_stage_weight=float(layout.first_stage_weight),
    )


def visual_tokens(config: Any, images: ImageRules) -> VisualTokens:
    """How images become tokens in a model of this configuration (Qwen3-VL, Qwen2.5-VL)."""
    vision = config.vision_config
    positions = getattr(vision, "num_position_embeddings", None)
    return VisualTokens(
        image_token_id=config.image_token_id,
        merge_size=images.merge_size,
        patch_width=images.patch_width,
        # Qwen2.5-VL has no learned grid.
        position_grid=round(positions**0.5) if positions else 1,
        hidden=config.get_text_config().hidden_size,
        deepstack_layers=len(getattr(vision, "deepstack_visual_indexes", None) or ()),
    )


def _render(layout: Layout, tokenizer: Any) -> Rendered | None:
    """What the chat template makes of an item or a pair; None if nothing goes through one."""
    if layout.message_format is None:
        return None
    chat = Chat(tokenizer, layout.message_format, layout.chat_template_kwargs)
    if layout.task == "embed":
        return render_item(chat, images=layout.images)
    return render_pair(chat, layout.prompt, images=layout.images)


def _template(layout: Layout, rendered: Rendered | None, tokenizer: Any, tokenizer_json: str) -> tuple[int, str]:
    """How many special tokens stand around an item, and what they are."""
    pair = layout.task == "rerank"
    if rendered is None:
        special = tokenizer.num_special_tokens_to_add(pair=pair)
        return special, special_token_template(tokenizer.backend_tokenizer, pair=pair)
    plain = Tokenizer.from_str(tokenizer_json)
    if pair:
        around: RenderedItem | RenderedPair = RenderedPair(plain, rendered.parts)
    else:
        before, behind = rendered.parts
        if prompt := _as_written(layout.prompt, rendered):
            before = rendered.prompt[0] + prompt + rendered.prompt[1]
        around = RenderedItem(plain, before, behind)
    return around.special_tokens, around.template


def _as_written(prompt: str, rendered: Rendered | None) -> str:
    """A prompt as the chat template writes it."""
    return prompt.strip() if rendered is not None and rendered.strip_prompt else prompt


def _image_tokens(images: ImageRules, backbone: Any) -> int:
    """Tokens that an image becomes inside its tower, by which its cost is counted."""
    config = getattr(backbone.config, "vision_config", backbone.config)
    patch = getattr(config, "patch_size", None)
    if not isinstance(patch, int) or patch < 1:
        return _IMAGE_TOKENS
    return max(1, (images.height // patch) * (images.width // patch))
