"""A tokenizer's chat template, rendered around a pair and frozen as text.

A pair is a message of the role query and one of the role document, behind a system message that holds the prompt, if
there is one: the roles that Sentence Transformers gives to the two sides. A template is a program in Jinja; what counts
here is that it writes both sides as they are, each once, with fixed texts around them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2

from rtx.trainer.layout import MessageFormat

# What a template raises that cannot take these messages.
_RENDERING_ERRORS = (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError)
# Sides that a template which writes them as they are cannot mistake for anything of its own.
_MARKS = ("xqueryx", "xdocumentx")
_PROBES = (("A b.", "c\n\nd: <e>"), ("  one \n", "\n\ttwo  "))

_CHATML = ("<|im_start|>", "<|im_end|>")
_THINK = "<think>"


class Rendered(NamedTuple):
    """What a chat template makes of a pair.

    Attributes:
        parts: the texts before the query, between query and document, and behind the document.
        strip_sides: whether whitespace around query and document is dropped.
    """

    parts: tuple[str, str, str]
    strip_sides: bool


def render_pair(tokenizer: Any, message_format: MessageFormat, prompt: str, variables: Mapping[str, Any]) -> Rendered:
    """Render the tokenizer's chat template.

    Args:
        tokenizer: of transformers.
        message_format: "flat" or "structured".
        prompt: the system message; "" for none.
        variables: of the template.

    Raises:
        ValueError: the template fails, or does not write query and document as they are, once, in this order.
    """

    def render(query: str, document: str) -> str:
        sides = (("query", query), ("document", document))
        messages = [("system", prompt), *sides] if prompt else sides
        conversation = [{"role": role, "content": _content(text, message_format)} for role, text in messages]
        try:
            return str(tokenizer.apply_chat_template(conversation, tokenize=False, **variables))
        except _RENDERING_ERRORS as broken:
            reason = " ".join(str(broken).split())
            raise ValueError(f"chat_template: cannot render the roles query and document: {reason}") from broken

    text = render(*_MARKS)
    if [text.count(mark) for mark in _MARKS] != [1, 1] or text.index(_MARKS[0]) > text.index(_MARKS[1]):
        raise ValueError(
            "chat_template: expected the messages of the roles query and document, each once and in this order, got "
            f"{text[:200]!r}"
        )
    before, rest = text.split(_MARKS[0])
    between, behind = rest.split(_MARKS[1])
    for strip in (False, True):
        if all(render(*probe) == _written(before, between, behind, probe, strip) for probe in _PROBES):
            return Rendered((before, between, behind), strip)
    raise ValueError(
        "chat_template: writes something else around or in place of some texts; expected a fixed text around query and "
        "document"
    )


def choose_format(tokenizer: Any, prompt: str, variables: Mapping[str, Any]) -> MessageFormat:
    """The form of messages with which the tokenizer's chat template carries a pair.

    Raises:
        ValueError: with none.
    """
    try:
        render_pair(tokenizer, "flat", prompt, variables)
        return "flat"
    except ValueError as flat:
        try:
            render_pair(tokenizer, "structured", prompt, variables)
            return "structured"
        except ValueError:
            raise flat from None


def judge_template(vocabulary: Mapping[str, int]) -> str | None:
    """A chat template that asks whether the document meets the query, for language models that were not trained as
    rerankers: the published format of Qwen3-Reranker (arXiv:2506.05176).

    Args:
        vocabulary: token -> id.

    Returns:
        Jinja, for messages in the flat form; None if the tokenizer does not mark turns in the way of ChatML.
    """
    if not all(token in vocabulary for token in _CHATML):
        return None

    def content(role: str, otherwise: str = "") -> str:
        return f"{{{{ messages | selectattr('role', 'eq', '{role}') | map(attribute='content') | first{otherwise} }}}}"

    instruction = "Given a web search query, retrieve relevant passages that answer the query"
    # Models that think first are told that they have done so. Jinja drops a line break that ends a template.
    thought = "{{ '<think>\\n\\n</think>\\n\\n' }}" if _THINK in vocabulary else "{{ '' }}"
    system = content("system", f" | default('{instruction}')")
    return (
        "<|im_start|>system\n"
        "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".<|im_end|>\n'
        f"<|im_start|>user\n<Instruct>: {system}\n<Query>: {content('query')}\n<Document>: {content('document')}"
        f"<|im_end|>\n<|im_start|>assistant\n{thought}"
    )


def _content(text: str, message_format: MessageFormat) -> object:
    return text if message_format == "flat" else [{"type": "text", "text": text}]


def _written(before: str, between: str, behind: str, sides: Sequence[str], strip: bool) -> str:
    query, document = (side.strip() if strip else side for side in sides)
    return f"{before}{query}{between}{document}{behind}"
