"""A causal language model as a reranker: the score is the logit of one token, less that of another, at the last token.

    score = (W[true] - W[false]) . h_last + b[true] - b[false]        (Qwen3-Reranker, arXiv:2506.05176)

Of the matrix of the language model's head two rows are read, so that no logits over the vocabulary are computed. They
are the language model's own parameters, often shared with its embeddings, and are trained and saved as such.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rtx.runtime.errors import CheckpointError
from rtx.trainer.backbone import eager_attention
from rtx.trainer.layout import Layout, LogitScoreConfig
from rtx.trainer.pooling import at_least_float32, pool
from rtx.trainer.rendering import (
    Chat,
    Rendered,
    choose_format,
    judge_template,
    passes_roles_through,
    render_item,
    render_pair,
)

_ANSWERS = ("yes", "no")
# Two ways to the same logit differ by some roundings of 2**-24, or of 2**-8 in the lowest precision; what a head does
# besides a product differs by more.
_TOLERANCE_FP32 = 1e-4
_TOLERANCE_HALF = 3e-2


def decoder_of(language_model: Any) -> Any:
    """The transformer of a language model, without its head but with the tower for its images, if it has one."""
    return language_model.model if _sees(language_model) else language_model.get_decoder()


def _sees(language_model: Any) -> bool:
    return "pixel_values" in inspect.signature(language_model.forward).parameters


def score_direction(language_model: Any, config: LogitScoreConfig) -> tuple[Tensor, Tensor]:
    """What last hidden states are projected on, [hidden], and what is added, []; gradients flow to the head's rows."""
    head = language_model.get_output_embeddings()
    bias = head.weight.new_zeros(head.weight.shape[0]) if getattr(head, "bias", None) is None else head.bias
    rows, biases = (at_least_float32(table[_ids(config, table.device)]) for table in (head.weight, bias))
    return (rows[0], biases[0]) if len(rows) == 1 else (rows[0] - rows[1], biases[0] - biases[1])


def _ids(config: LogitScoreConfig, device: torch.device) -> Tensor:
    ids = [config.true_token_id, config.false_token_id]
    return torch.tensor([token for token in ids if token is not None], device=device)


def score_last_token(hidden: Tensor, attention_mask: Tensor, direction: Tensor, bias: Tensor) -> Tensor:
    """Scores of rows, on whichever side they are padded.

    Args:
        hidden: [rows, tokens, hidden], any floating type.
        attention_mask: [rows, tokens], 1 for a token and 0 for padding.
        direction, bias: as `score_direction` gives them.

    Returns:
        [rows], at least float32.
    """
    return score(pool(hidden, attention_mask, ("lasttoken",)), direction, bias)


def score(vectors: Tensor, direction: Tensor, bias: Tensor) -> Tensor:
    """Scores [rows] of each row's last token vector [rows, hidden], by what `score_direction` gives."""
    # Not a matrix product: automatic mixed precision would bring that to half precision, in which scores tie.
    return (vectors * direction).sum(dim=-1) + bias


def settle(layout: Layout, tokenizer: Any, where: str) -> Layout:
    """Decide what a checkpoint leaves open: a reranker's two tokens, and how items or pairs go through a chat template.

    A language model that was not trained as a reranker mostly has a chat template without queries and documents. If it
    marks turns in the way of ChatML, the tokenizer is given the template of Qwen3-Reranker, or of Qwen3-VL-Reranker.

    Raises:
        CheckpointError: there is no token yes or no, no chat template for a pair, or none with a place for images.
    """
    starts = layout.new_logit_score
    if starts:
        layout = dataclasses.replace(layout, logit_score=_answers(tokenizer, where), new_logit_score=False)
    if layout.message_format != "auto":
        return layout
    if tokenizer.chat_template is None and not layout.images:
        return dataclasses.replace(layout, message_format=None)
    template = judge_template(tokenizer.get_vocab(), images=layout.images) if starts else None
    judge = dataclasses.replace(layout, message_format="structured" if layout.images else "flat")
    try:
        render: Callable[[Chat], Rendered] = functools.partial(render_pair, prompt=layout.prompt, images=layout.images)
        if layout.task == "embed":
            render = functools.partial(render_item, images=layout.images)
        chosen = choose_format(tokenizer, layout.chat_template_kwargs, render)
    except ValueError as wrong:
        if layout.logit_score is None and not layout.images:
            # A classifier, whose tokenizer joins the sides.
            return dataclasses.replace(layout, message_format=None)
        if template is None:
            raise CheckpointError(f"{where}: {wrong}; set one that does, in chat_template.jinja") from wrong
        tokenizer.chat_template = template
        return judge
    # sentence-transformers has such a template write a text model's pairs, but opens no bare model of images.
    if template and layout.images and passes_roles_through(Chat(tokenizer, chosen, layout.chat_template_kwargs)):
        tokenizer.chat_template = template
        return judge
    return dataclasses.replace(layout, message_format=chosen)


def _answers(tokenizer: Any, where: str) -> LogitScoreConfig:
    vocabulary = tokenizer.get_vocab()
    if absent := [token for token in _ANSWERS if token not in vocabulary]:
        raise CheckpointError(
            f"{where}: the tokenizer has no single token for {' and '.join(absent)}; expected both, since a causal "
            "language model ranks by its yes and no"
        )
    return LogitScoreConfig(true_token_id=vocabulary[_ANSWERS[0]], false_token_id=vocabulary[_ANSWERS[1]])


def check_head(language_model: Any, config: LogitScoreConfig, where: str) -> None:
    """Raise CheckpointError unless the language model's logits are one product with its head.

    Some scale or bound their logits besides; what that does to a score is not done here, and is an error.
    """
    head = language_model.get_output_embeddings()
    rows = 0 if head is None else head.weight.shape[0]
    ids = _ids(config, language_model.device)
    if rows <= int(ids.max()) or int(ids.min()) < 0:
        raise CheckpointError(
            f"{where}: 1_LogitScore: expected ids of tokens below {rows}, the size of the head; got {ids.tolist()}"
        )
    tokens = torch.stack([ids[-1], ids[0]]).unsqueeze(0)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad(), eager_attention(language_model):
        logits = at_least_float32(language_model(**batch).logits)[0, -1, ids]
        hidden = decoder_of(language_model)(**batch).last_hidden_state
        found = score_last_token(hidden, batch["attention_mask"], *score_direction(language_model, config))
    expected = logits[0] if len(logits) == 1 else logits[0] - logits[1]
    tolerance = _TOLERANCE_FP32 if hidden.dtype in (torch.float32, torch.float64) else _TOLERANCE_HALF
    if not (found[0] - expected).abs() <= tolerance * logits.abs().max().clamp(min=1.0):
        raise CheckpointError(
            f"{where}: {type(language_model).__name__} does more to its logits than a product with the head, such as "
            "scaling or bounding them; that is not supported for a reranker"
        )
