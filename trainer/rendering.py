"""A tokenizer's chat template, rendered around an item or a pair and frozen as text.

An item is a message of the role user; a pair is one of the role query and one of the role document. Before them stands
a system message that holds the prompt, if there is one. These are the roles that Sentence Transformers gives. A
template is a program in Jinja; what counts here is that it writes each text as it is, once, with fixed texts around it,
and the same for every image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2

from rtx.trainer.layout import MessageFormat

# What a template raises that cannot take these messages.
_RENDERING_ERRORS = (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError)
# Sides that a template which writes them as they are cannot mistake for anything of its own.
_MARKS = ("xqueryx", "xdocumentx")
_PROBES = (("A b.", "c\n\nd: <e>"), ("  one \n", "\n\ttwo  "))

_UNEVEN_IMAGES = "expected the same text for every image, before the text of its message"

# What a message in the structured form is written as.
_IMAGE = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
_PARTS = (
    "{%- macro parts(content) -%}{%- if content is string -%}{{- content -}}{%- else -%}"
    "{%- for part in content -%}{%- if part.type == 'image' -%}" + "".join(_IMAGE) + "{%- else -%}"
    "{{- part.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)

_CHATML = ("<|im_start|>", "<|im_end|>")
_THINK = "<think>"
_JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
# A role that no template names.
_UNKNOWN_ROLE = "xrolex"


class Rendered(NamedTuple):
    """What a chat template makes of a pair, or of an item.

    Attributes:
        parts: the texts before the query, between query and document, and behind the document; of an item without a
            prompt the texts before and behind it.
        strip_sides: whether whitespace around a text is dropped.
        prompt: the texts around the prompt of an item that has one, which stand before it then; of a pair nothing, as
            the prompt is among its parts.
        image: what is written for an image; "" for a template that is not asked for images.
        strip_prompt: whether whitespace around the prompt of an item is dropped.
    """

    parts: tuple[str, ...]
    strip_sides: bool
    prompt: tuple[str, ...] = ()
    image: str = ""
    strip_prompt: bool = False


class Chat:
    """A tokenizer's chat template with its variables.

    Args:
        tokenizer: of transformers.
        message_format: "flat" or "structured".
        variables: of the template.
    """

    def __init__(self, tokenizer: Any, message_format: MessageFormat, variables: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._format = message_format
        self._variables = variables

    def render(self, *messages: tuple[str, str, int]) -> str:
        """Messages of a role, a text and a number of images before it.

        Raises:
            ValueError: the template fails.
        """
        conversation = [{"role": role, "content": self._content(text, images)} for role, text, images in messages]
        try:
            return str(self._tokenizer.apply_chat_template(conversation, tokenize=False, **self._variables))
        except _RENDERING_ERRORS as broken:
            reason = " ".join(str(broken).split())
            roles = " and ".join(role for role, *_ in messages if role != "system")
            what = f"the role{'s' if ' ' in roles else ''} {roles}"
            raise ValueError(f"chat_template: cannot render {what}: {reason}") from broken

    def _content(self, text: str, images: int) -> object:
        if self._format == "flat":
            return text
        return [{"type": "image"}] * images + ([{"type": "text", "text": text}] if text or not images else [])


def render_pair(chat: Chat, prompt: str, *, images: bool = False) -> Rendered:
    """Render a chat template around a pair.

    Args:
        chat: the template.
        prompt: the system message; "" for none.
        images: whether the sides may hold images.

    Raises:
        ValueError: the template fails, or does not write query and document as they are, once, in this order.
    """
    system = [("system", prompt, 0)] if prompt else []

    def render(query: str, document: str, first: int = 0, second: int = 0) -> str:
        return chat.render(*system, ("query", query, first), ("document", document, second))

    text = render(*_MARKS)
    if [text.count(mark) for mark in _MARKS] != [1, 1] or text.index(_MARKS[0]) > text.index(_MARKS[1]):
        raise ValueError(
            "chat_template: expected the messages of the roles query and document, each once and in this order, got "
            f"{text[:200]!r}"
        )
    before, rest = text.split(_MARKS[0])
    between, behind = rest.split(_MARKS[1])
    parts = (before, between, behind)
    strip = _strips(parts, lambda probe: render(probe[0], probe[1]), _PROBES)
    image = ""
    if images:
        image = _image_text(render(_MARKS[0], _MARKS[1], 1), text, _MARKS[0])
        written = f"{before}{image * 2}a{between}{image}b{behind}"
        if render("a", "b", 2, 1) != written or render("", "", 0, 1) != f"{before}{between}{image}{behind}":
            raise ValueError(f"chat_template: {_UNEVEN_IMAGES}")
    return Rendered(parts, strip, image=image)


def render_item(chat: Chat, *, images: bool = False) -> Rendered:
    """Render a chat template around an item, with and without a prompt.

    Args:
        chat: the template.
        images: whether the item may hold images.

    Raises:
        ValueError: the template fails, or does not write prompt and text as they are, once, in this order.
    """
    content, prompt = _MARKS[1], _MARKS[0]
    text = chat.render(("user", content, 0))
    with_prompt = chat.render(("system", prompt, 0), ("user", content, 0))
    if text.count(content) != 1 or [with_prompt.count(mark) for mark in _MARKS] != [1, 1]:
        raise ValueError(
            "chat_template: expected the messages of the roles system and user, each once and in this order (of a "
            f"reranker, query and document: its task is then 'rerank'), got {with_prompt[:200]!r}"
        )
    before, behind = text.split(content)
    start, rest = with_prompt.split(prompt)
    between, end = rest.split(content)
    if end != behind:
        raise ValueError("chat_template: writes something else behind an item that has a prompt")
    probes = [(document,) for _, document in _PROBES]
    strip = _strips((before, behind), lambda probe: chat.render(("user", probe[0], 0)), probes)
    around = start, between + "a" + behind
    strip_prompt = _strips(around, lambda probe: chat.render(("system", probe[0], 0), ("user", "a", 0)), probes)
    image = ""
    if images:
        image = _image_text(chat.render(("user", content, 1)), text, content)
        written = f"{start}p{between}{image * 2}a{behind}"
        if (
            chat.render(("system", "p", 0), ("user", "a", 2)) != written
            or chat.render(("user", "", 1)) != f"{before}{image}{behind}"
        ):
            raise ValueError(f"chat_template: {_UNEVEN_IMAGES}")
    return Rendered((before, behind), strip, (start, between), image, strip_prompt)


def passes_roles_through(chat: Chat) -> bool:
    """Whether a template writes the roles of a pair as it would any other: it was not made for pairs."""

    def render(first: str, second: str) -> str:
        return chat.render((first, "a", 0), (second, "b", 0))

    try:
        known, unknown = render("query", "document"), render(f"{_UNKNOWN_ROLE}1", f"{_UNKNOWN_ROLE}2")
    except ValueError:
        return False
    renamed = unknown.replace(f"{_UNKNOWN_ROLE}1", "query").replace(f"{_UNKNOWN_ROLE}2", "document")
    return _UNKNOWN_ROLE in unknown and renamed == known


def _image_text(with_image: str, without: str, mark: str) -> str:
    """What is written for one image, which stands right before a mark."""
    place = without.index(mark)
    image = with_image[place : len(with_image) - (len(without) - place)]
    if not image or with_image != f"{without[:place]}{image}{without[place:]}":
        raise ValueError(f"chat_template: {_UNEVEN_IMAGES}")
    return image


def _strips(parts: Sequence[str], render: Callable[[tuple[str, ...]], str], probes: Sequence[tuple[str, ...]]) -> bool:
    """Whether the template drops whitespace around texts.

    Raises ValueError if it writes them neither with nor without.
    """
    for strip in (False, True):
        if all(render(probe) == _written(parts, probe, strip) for probe in probes):
            return strip
    raise ValueError(
        "chat_template: writes something else around or in place of some texts; expected fixed texts around them"
    )


def choose_format(tokenizer: Any, variables: Mapping[str, Any], render: Callable[[Chat], Rendered]) -> MessageFormat:
    """The form of messages with which the tokenizer's chat template can be rendered.

    Args:
        tokenizer, variables: of the template.
        render: `render_pair` or `render_item` with its other arguments.

    Raises:
        ValueError: with none.
    """
    try:
        render(Chat(tokenizer, "flat", variables))
        return "flat"
    except ValueError as flat:
        try:
            render(Chat(tokenizer, "structured", variables))
            return "structured"
        except ValueError:
            raise flat from None


def judge_template(vocabulary: Mapping[str, int], *, images: bool = False) -> str | None:
    """A chat template that asks whether the document meets the query, for language models that were not trained as
    rerankers, or whose template does not show it: the published format of Qwen3-Reranker (arXiv:2506.05176).

    Args:
        vocabulary: token -> id.
        images: whether messages may hold images; the format is that of Qwen3-VL-Reranker then.

    Returns:
        Jinja, for messages in the flat form, or with images in the structured form; None if the tokenizer does not mark
        turns in the way of ChatML, or images in the way of Qwen-VL.
    """
    if not all(token in vocabulary for token in (*_CHATML, *(_IMAGE if images else ()))):
        return None

    def content(role: str, otherwise: str = "") -> str:
        found = f"messages | selectattr('role', 'eq', '{role}') | map(attribute='content') | first{otherwise}"
        return f"{{{{ parts({found}) }}}}" if images else f"{{{{ {found} }}}}"

    if images:
        system = content(
            "system", " | default('Given a search query, retrieve relevant candidates that answer the query.')"
        )
        user = f"<Instruct>: {system}<Query>:{content('query')}\n<Document>:{content('document')}"
    else:
        system = content(
            "system", " | default('Given a web search query, retrieve relevant passages that answer the query')"
        )
        user = f"<Instruct>: {system}\n<Query>: {content('query')}\n<Document>: {content('document')}"
    # Models that think first are told that they have done so. Jinja drops a line break that ends a template.
    thought = "{{ '<think>\\n\\n</think>\\n\\n' }}" if _THINK in vocabulary and not images else "{{ '' }}"
    return (
        f"{_PARTS if images else ''}<|im_start|>system\n{_JUDGE}<|im_end|>\n"
        f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{thought}"
    )


def _written(parts: Sequence[str], texts: Sequence[str], strip: bool) -> str:
    between = (text.strip() if strip else text for text in texts)
    return "".join(piece for pair in zip(parts, between, strict=False) for piece in pair) + parts[-1]
